"""Fine-tune a pre-trained GPT-2 on a text of your own: all of it, its last block, or low-rank adapters (LoRA).

You learn here: what changes when training starts from somebody else's weights; how adapters train a quarter of a
percent of GPT-2's parameters; and how a batch that does not fit is taken in parts.

    python 06_finetune/train.py                                         GPT-2 and Tiny Shakespeare, LoRA
    python 06_finetune/train.py --method full                           every weight
    python 06_finetune/train.py --model stand-in --data my_novel.txt    without GPT-2's weights; any UTF-8 text
    python 06_finetune/train.py --resume                                after Ctrl-C
    torchrun --nproc_per_node=2 06_finetune/train.py                    two processes, for example on two GPUs

You should see (two cores of an AMD EPYC with AVX512-BF16, no AMX; torch 2.15; bfloat16; Tiny Shakespeare; seed 0) with
the stand-in, whose vocabulary cuts it into 57,389 tokens to validate on:
                       nats per token   bits per character   seconds of training
    before                  6.02               4.47
    --method lora           4.64               3.44                20
    --method head           4.19               3.11                19
    --method full           3.76               2.79                26
With GPT-2 itself it was not measured, as its weights can't be had where this was written. A step of 4 x 256 tokens with
random weights of its shape takes about 1.3 s (tests/benchmark.py --rows lora), the default's 300 steps about seven
minutes. Validation also picks the step whose weights are kept, so its figure is a little too good.
Writes to outputs/: adapter/ (LoRA, in PEFT's format) or model/ (a folder that transformers opens), each with the best
weights by validation; checkpoint.pt (for --resume), metrics.json, history.png.
Left out on purpose: quantised weights (QLoRA), instruction formats, several documents with borders between them.
"""

import argparse
import contextlib
import datetime
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

sys.path.append(str(Path(__file__).resolve().parents[1]))
import bpe  # noqa: E402
import utils  # noqa: E402
from gpt2 import GPT2, SIZES, generate, loss_on, read_model, save_model, shrink  # noqa: E402
from load import Base, batches, find_base, load_text, warn  # noqa: E402
from lora import add_lora  # noqa: E402
from memory import load_trainable, peak_memory, trainable_state  # noqa: E402
from peft_files import load_adapter, save_adapter  # noqa: E402

# Shapes: B batch, T time (tokens in a window), V vocabulary, N tokens in a text

SCRIPT = "06_finetune/train.py"
PREFIX = "transformer."  # what stands before every name in transformers' GPT2LMHeadModel, and so in PEFT's files


# ---------------------------------------------------------------------------------------------- what is trained
def prepare(model: GPT2, args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Freeze what the method leaves alone, and add adapters where it is LoRA.

    ## full: every weight. Per parameter AdamW takes four numbers (weight, gradient, two averages): 2 GB for GPT-2.
    ## head: the last block and the norm after it. What lies below is used as it is, and needs no gradients at all. The
    ##       matrix that makes scores stays too: it is the token embedding, which the first layer reads.
    ## lora: the weights stay, and small matrices beside them learn the change (lora.py).
    """
    if args.method == "lora":
        add_lora(model, args.lora_rank, args.lora_alpha, args.dropout, args.lora_targets)
    elif args.method == "head":
        model.requires_grad_(False)
        model.h[-1].requires_grad_()
        model.ln_f.requires_grad_()
    if args.method != "lora":
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = args.dropout
    elif dtype == torch.bfloat16:
        ## What is frozen need not be more precise than what it is multiplied with. (Not with `head`, which writes the
        ## frozen weights out again: they shall be as they were.)
        shrink(model)
    model.checkpointing = args.activation_checkpointing


def save_result(model: GPT2, base: Base, args: argparse.Namespace) -> None:
    """Write outputs/adapter, or a whole model to outputs/model."""
    if args.method == "lora":
        save_adapter(model, args.out / "adapter", base.name, PREFIX)
    else:
        folder = args.out / "model"
        base.tokenizer.save(folder)
        save_model(model, folder, base.tokenizer.vocab[bpe.END])


def load_result(base: Base, out: Path, method: str) -> GPT2:
    """The model that save_result wrote, from its files: base and adapter, or the whole."""
    if method != "lora":
        return read_model(out / "model", base.config)
    model = read_model(base.path, base.config)
    load_adapter(model, out / "adapter", PREFIX)
    return model.eval()


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate: up in a line, then down as half a cosine to a tenth (Loshchilov & Hutter 2016).

    ## AdamW's first steps are all equally long, however small the gradient, and the weights that they could spoil are
    ## good ones: hence the warm-up.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def check_options(args: argparse.Namespace, given: dict) -> None:
    """Raise InputError for an adapter's option beside another --method, which would pass over it."""
    for name in ("lora_rank", "lora_alpha", "lora_targets"):
        if name in given and args.method != "lora" and not args.resume:
            raise utils.InputError(f"--{name.replace('_', '-')} is for --method lora, not for {args.method}; leave it "
                                   "out.")


def sample(model: GPT2, base: Base, prompt: str, length: int, dtype: torch.dtype, seed: int) -> str:
    """`length` tokens drawn at temperature 0.8 from the 50 likeliest, after a prompt; the same seed, the same luck."""
    device = model.wte.weight.device
    ids = base.tokenizer.encode(prompt, special=False)
    model.eval()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        new = list(generate(model, ids, length, 0.8, 50, stop=base.tokenizer.vocab[bpe.END],
                            generator=torch.Generator(device).manual_seed(seed)))
    model.train()
    return base.tokenizer.decode(ids + new)


# ---------------------------------------------------------------------------------------------- options
# Method -> AdamW's peak learning rate for the stand-in and for GPT-2: the first was the best of a few tried by the loss
# after 300 steps on Tiny Shakespeare (seed 0), the second is a usual one, not measured here.
LR = {"lora": (1e-2, 1e-3), "full": (1e-3, 5e-5), "head": (3e-3, 3e-4)}
place = utils.name_or_path(*SIZES, "stand-in", "tinyshakespeare", "python", "pydocs")  # what --model and --data take


def parse_options() -> tuple[argparse.Namespace, dict]:
    """Return every option with its value, and a dict of only those that the user gave. Raises utils.InputError."""
    parser = utils.parser(__doc__)
    add = parser.add_argument
    add("--method", choices=LR, default="lora", help="what is trained: adapters, every weight, or the last block")
    add("--model", type=place, help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, stand-in, or a folder with config.json, "
        "model.safetensors, vocab.json and merges.txt; without it gpt2, or the stand-in if that is out of reach")
    add("--data", type=place, help="tinyshakespeare, python, pydocs or a text file; without it the first, or python "
        "if that is out of reach")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: what multiplies faster here")
    add("--seed", type=int, default=0, help="decides adapters, batches, dropout and samples")
    add("--steps", type=int, default=300, help="updates; the learning rate falls to a tenth at the last one")
    add("--batch-size", type=int, default=4, help="windows per step; larger is steadier, and learns less per token")
    add("--micro-batch-size", type=int, default=4, help="windows at once: gradients are summed up over the parts of a "
        "batch (gradient accumulation); memory shrinks with it, the result stays")
    add("--block-size", type=int, default=256, help="context: tokens in a window, at most the model's n_positions")
    add("--lora-rank", type=int, default=8, help="r: rank of each change; parameters grow with it")
    add("--lora-alpha", type=float, default=16.0, help="the change counts alpha / r times")
    add("--lora-targets", nargs="+", default=["c_attn"], help="layers that get adapters, by the end of their names: "
        "c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj")
    add("--dropout", type=float, default=0.0, help="share zeroed while training: of the adapters' input, or with full "
        "and head of the network's activations; helps where a small text is read many times")
    add("--lr", type=float, help="AdamW's peak learning rate; without it, for the stand-in and for GPT-2: "
        + ", ".join(f"{method} {a:g} and {b:g}" for method, (a, b) in LR.items()))
    add("--weight-decay", type=float, default=0.01, help="share of every weight taken per step, times the rate")
    add("--warmup", type=int, default=20, help="steps over which the learning rate rises from zero")
    add("--grad-clip", type=float, default=1.0, help="a longer gradient is cut to this (Pascanu et al. 2013)")
    add("--eval-every", type=int, default=100, help="steps between evaluations on all validation text; each saves")
    add("--patience", type=int, default=3, help="stop after so many evaluations without a new best (early stopping)")
    add("--activation-checkpointing", action="store_true", help="keep less for the backward pass and compute it again: "
        "less memory, one more forward pass per step")
    add("--prompt", default="\n", help="what the samples before and after go on from")
    add("--compile", action="store_true", help="torch.compile: slow to start, then faster steps")
    add("--resume", action="store_true", help="go on from checkpoint.pt in --out, with the options of that run")
    add("--out", type=Path, default=Path(__file__).parent / "outputs", help="folder for everything written")
    args, given = utils.parse(parser)
    check_options(args, given)
    utils.check(args, above_zero="steps batch_size micro_batch_size block_size lr warmup grad_clip eval_every patience",
                not_negative="weight_decay", shares="dropout")
    if not args.prompt:
        raise utils.InputError("--prompt is empty; give at least one character, such as a line break.")
    return args, given


def main() -> None:
    utils.keep_memory()
    args, given = parse_options()
    checkpoint_path = args.out / "checkpoint.pt"
    saved = utils.resume(args, given, SCRIPT, free=("micro_batch_size", "activation_checkpointing", "prompt"))
    device = utils.pick_device(args.device)

    ## Several processes, as in chapter 05: each holds the whole model, takes its share of every batch, and averages its
    ## gradients with the others'.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0:
        utils.check_writable(args.out)
    if world > 1:
        if args.batch_size % world:
            raise utils.InputError(f"--batch-size {args.batch_size} can't be shared evenly by {world} processes.")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        wait = datetime.timedelta(hours=2)  # for rank 0's download
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=wait)
    if args.dtype == "auto":
        names = [str(utils.pick_dtype(device)).removeprefix("torch.")]
        if world > 1:
            dist.broadcast_object_list(names)  # a matter of timing, on which ranks could disagree
        args.dtype = names[0]
    dtype = getattr(torch, args.dtype)

    # model and text
    if rank > 0:
        dist.barrier()  # until rank 0 has downloaded, or pre-trained, what is needed
    base = find_base(args.model)
    positions, V = base.config["n_positions"], base.config["vocab_size"]
    if args.block_size > positions:
        raise utils.InputError(f"--block-size {args.block_size} is more than the {positions} positions that "
                               f"{base.name} knows; make it smaller.")
    text = load_text(args.data, base.tokenizer, args.block_size)
    ## What was left open is settled by now, and saved with the rest for --resume.
    args.model, args.data = base.name, args.data or text.name
    args.lr = args.lr or LR[args.method][not base.stand_in]
    if rank == 0 and world > 1:
        dist.barrier()
    train, val = text.train.to(device), text.val.to(device)
    label = f"{base.label()}, on {text.name}{', stand-in' * text.stand_in}"
    if saved and (saved["base"], saved["text"]) != (base.name, [text.name, len(train)]):
        raise utils.InputError(f"--resume: {label} is not what the run had then; start anew without --resume.")

    utils.set_seed(args.seed)
    model = read_model(base.path, base.config)
    total = utils.count_parameters(model)
    prepare(model, args, dtype)
    model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay,
                                  fused=device.type in ("cpu", "cuda"))
    first_step, seconds, history, losses, best = 0, 0.0, [], [], {"step": 0, "val_loss": math.inf}
    torch.manual_seed(args.seed + rank)  # all ranks have the same adapters by now, and need different dropout
    if saved:
        load_trainable(model, saved["trained"])
        optimizer.load_state_dict(saved["optimizer"])
        first_step, seconds, history, best = saved["step"], saved["seconds"], saved["history"], saved["best"]
        losses, before = [loss.to(device) for loss in saved["losses"]], saved["before"]
        if rank == 0:
            torch.set_rng_state(saved["random_state"])
        else:
            torch.manual_seed(args.seed + rank + first_step)
        saved = {"step": first_step}  # the rest may be gigabytes
        if rank == 0 and best["step"] == first_step:
            save_result(model, base, args)  # a kill may have come between checkpoint and result
    step_model = torch.compile(model) if args.compile else model
    step_model = DistributedDataParallel(step_model) if world > 1 else step_model

    # sanity numbers before training
    n_trained, whole = utils.count_parameters(model), sum(p.numel() for p in model.parameters())
    if rank == 0:
        print(f"{label}: {len(train):,} tokens to train on, {len(val):,} to validate on\n"
              f"{args.method}: {n_trained:,} trained parameters of {whole:,} ({n_trained / whole:.4%}); "
              f"{args.dtype} on {device.type}; "
              f"{args.steps * args.batch_size * args.block_size / len(train):.1f} passes over the text")
        x, y = next(batches(text.train, args.block_size, args.batch_size, args.seed))
        print(f"a window:     {base.tokenizer.decode(x[0, :16].tolist())!r}\n"
              f"its targets:  {base.tokenizer.decode(y[0, :16].tolist())!r}")
        if saved:
            print(f"resumed after step {first_step} and {seconds:.0f} s of training\n")
        else:
            ## Unlike in all other chapters the model knows something already, and the loss before training is below
            ## ln V. If it is not, a wrong vocabulary is the likeliest reason.
            before = loss_on(model, val, args.block_size, dtype)
            print(f"before training: loss {before:.4f}; guessing uniformly, ln {V}: {math.log(V):.4f}; it writes:\n"
                  f"{sample(model, base, args.prompt, 60, dtype, args.seed)}\n")
            if before > math.log(V):
                print("this is worse than guessing: are vocab.json and merges.txt those of these weights?\n")

    def save() -> None:
        """Write all that decides how the run goes on; and, where the newest weights are the best so far, the result."""
        utils.save_checkpoint(checkpoint_path, {
            "script": SCRIPT, "base": base.name, "text": [text.name, len(train)], "stand_in": base.stand_in,
            "torch": str(torch.__version__), "options": utils.plain(args), "step": done, "seconds": seconds,
            "history": history, "best": best, "before": before, "losses": losses, "trained": trainable_state(model),
            "optimizer": optimizer.state_dict(),
            "random_state": torch.get_rng_state()})  # of the CPU: on a GPU dropout goes on with other numbers
        if best["step"] == done:
            save_result(model, base, args)

    ## Ctrl-C only leaves a note, which the loop reads between two steps, where everything fits together.
    interrupted, restore_signals = utils.catch_signals()

    # ------------------------------------------------------------------------------------------ the loop
    advice = "no file was touched since the last evaluation; start again with a smaller --lr."
    bar, begun = utils.Progress(args.steps, "tokens", first_step), time.perf_counter()
    stream = batches(train, args.block_size, args.batch_size, args.seed)  # the same on every rank
    for step, (x, y) in zip(range(args.steps), stream):  # x, y (B, T)
        if step < first_step:
            continue  # resumed: these were seen before
        if step - best["step"] >= args.patience * args.eval_every:
            break  # early stopping: it has been learning the training text by heart for a while
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(step, args.steps, args.warmup)

        ## Gradient accumulation: backward adds to the gradients that are there. So a batch can be taken in parts, each
        ## weighted by its share; the step then follows the mean over all of it, with the memory of one part.
        x, y = x[rank::world], y[rank::world]
        parts = list(zip(x.split(args.micro_batch_size), y.split(args.micro_batch_size)))
        loss = torch.zeros((), device=device)
        for i, (a, b) in enumerate(parts):
            last = i == len(parts) - 1  # gradients go to the other processes once a step, not once a part
            with contextlib.nullcontext() if world == 1 or last else step_model.no_sync():
                ## Mixed precision: the weights that are trained, and their updates, stay in float32; autocast gives the
                ## matrix products bfloat16 copies of them. (With LoRA the frozen ones are bfloat16 as it is: `shrink`.)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    part = step_model(a, targets=b) * (len(a) / len(x))  # ()
                part.backward()
            loss += part.detach()
        nn.utils.clip_grad_norm_(trained, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()  # now: an evaluation has no need of gradients, and large models have large ones
        losses.append(loss)

        done = step + 1
        due = done % args.eval_every == 0 or done == args.steps
        if device.type == "cuda" and not due and done % 10:
            continue  # looking at the loss makes a GPU wait
        stop = torch.tensor([len(interrupted), not math.isfinite(loss.item())], device=device)
        if world > 1:
            dist.all_reduce(stop)  # all ranks stop at the same step, or none
        stop, broken = stop.tolist()
        if broken:
            raise utils.InputError(f"the loss became {loss.item()} by step {done}; {advice}")
        if rank == 0:
            bar.update(done, f"loss {loss.item():.3f}", args.batch_size * args.block_size)
        if due or stop:
            seconds += time.perf_counter() - begun
            if due:
                train_loss = torch.stack(losses).mean()
                val_loss = loss_on(model, val, args.block_size, dtype) if rank == 0 else 0.0
                val_loss = torch.tensor(val_loss, device=device)
                if world > 1:
                    dist.all_reduce(train_loss)  # the sum over ranks
                    dist.broadcast(val_loss, 0)
                row = {"step": done, "seconds": seconds, "tokens": done * args.batch_size * args.block_size,
                       "train_loss": train_loss.item() / world, "val_loss": val_loss.item()}
                history.append(row)
                losses = []
                best = row if row["val_loss"] < best["val_loss"] else best
            if due and not math.isfinite(row["train_loss"] + row["val_loss"]):
                raise utils.InputError(f"the loss became {row['val_loss']} by step {done}; {advice}")
            if rank == 0:
                save()
            if world > 1:
                dist.barrier()
            if stop:
                raise KeyboardInterrupt(f"Saved at step {done}; go on with: {utils.go_on(SCRIPT, args.out)}")
            if rank == 0:
                bar.clear()
                print(f"step {done:5}  {seconds:4.0f} s  train {row['train_loss']:.4f}  "
                      f"validation {row['val_loss']:.4f}", flush=True)
            begun = time.perf_counter()

    # report
    restore_signals()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank:
        return
    memory = peak_memory(device)
    ## A token is a unit of the tokenizer's own choosing, so losses per token can't be compared between vocabularies.
    ## Per character they can: nats per token * tokens / characters, and / ln 2 for bits.
    bits = lambda nats: nats * (len(val) - 1) / text.val_characters / math.log(2)  # noqa: E731
    perplexity = lambda nats: math.exp(min(nats, 700))  # noqa: E731  (a float ends at exp 709)
    metrics = {"val_loss": best["val_loss"], "perplexity": perplexity(best["val_loss"]), "best_step": best["step"],
               "bits_per_character": bits(best["val_loss"]), "last_val_loss": history[-1]["val_loss"],
               "before_val_loss": before, "before_bits_per_character": bits(before), "trained_parameters": n_trained,
               "peak_memory_bytes": memory}
    rows = (("guessing uniformly", math.log(V)), ("before training", before),
            (f"{args.method}, step {best['step']}", best["val_loss"]))
    print(f"\n{'':24}nats per token   perplexity   bits per character   ({label}, validation)")
    for name, nats in rows:
        print(f"{name:24}{nats:14.4f}{perplexity(nats):13.3f}{bits(nats):21.4f}")
    if best["val_loss"] > before:
        print("training made it worse: try a smaller --lr")
    held = f"{memory / 1e9:.2f} GB of memory at most" if memory else "memory not known"
    print(f"{seconds:.0f} s of training, {held}\n\nit writes:")
    after = load_result(base, args.out, args.method).to(device)  # as anybody would load it
    print(sample(after, base, args.prompt, 200, dtype, args.seed) + "\n")
    utils.save_metrics(args.out / "metrics.json", script=SCRIPT, data=text.name, model=base.name,
                       stand_in=base.stand_in or text.stand_in, device=device.type, seed=args.seed, seconds=seconds,
                       parameters=total, metrics=metrics, history=history)
    start = [{"step": 0, "val_loss": before}]
    utils.plot_history(args.out / "history.png", start + history, ["train_loss", "val_loss"], f"{args.method}: {label}",
                       y="nats per token")
    result = "adapter/" if args.method == "lora" else "model/"
    print(f"wrote {result}, checkpoint.pt, metrics.json and history.png to {args.out}")
    warn(base, text)


## Try this, with --model stand-in on Tiny Shakespeare (seed 0; experiment.py has the tables). As it is: 4.639 nats.
##   --lora-rank 64                                               4.593   eight times the parameters, hardly better
##   --lora-targets mlp.c_proj                                    4.374   the same rank, in each MLP's second layer
##   --lora-targets c_attn attn.c_proj mlp.c_fc mlp.c_proj        4.292   in all of them
##   --lora-alpha 64                                              5.262   much too large a step

if __name__ == "__main__":
    utils.run(main)
