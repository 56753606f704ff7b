"""Fine-tune a pre-trained model on a text of your own: all of it, its last block, or low-rank adapters (LoRA).

You learn here: what changes when training starts from somebody else's weights; how adapters train a quarter of a
percent of GPT-2's parameters; and how a batch that does not fit is taken in parts.

    python 06_finetune/train.py                                         GPT-2 and Tiny Shakespeare, LoRA
    python 06_finetune/train.py --method full --model smollm2           every weight of a Llama
    python 06_finetune/train.py --model stand-in --data my_novel.txt    without GPT-2's weights; any UTF-8 text
    torchrun --nproc_per_node=2 06_finetune/train.py                    two processes, for example on two GPUs

You should see (the stand-in on Tiny Shakespeare, seed 0): 4.47 bits per character before, 3.44 with LoRA after 20 s,
3.11 by the last block, 2.79 in full after 26 s. With GPT-2 itself, whose weights were out of reach, not measured.
Writes to outputs/: adapter/ (LoRA, in PEFT's format) or model/ (a folder that transformers opens), each with the best
weights by validation; checkpoint.pt (for --resume), metrics.json, history.png. Left out: quantised weights (QLoRA)."""
import math
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from load import MODELS, TEXTS, Base, Data, batches, find_base, load_data, load_result, save_result
from lora import add_lora
from memory import load_trainable, peak_memory, trainable_state

# Shapes: B batch, T time (tokens in a window), V vocabulary, N tokens in a text

SCRIPT = "06_finetune/train.py"


# ---------------------------------------------------------------------------------------------- model
# Method -> AdamW's peak learning rate for the stand-in and for others: the first was the best of a few tried by the
# loss after 300 steps on Tiny Shakespeare (seed 0), the second is a usual one, not measured here.
LR = {"lora": (1e-2, 1e-3), "full": (1e-3, 5e-5), "head": (3e-3, 3e-4)}
LORA = {"lora_rank": 8, "lora_alpha": 16.0, "lora_targets": None}  # the last: the network's own, if none are given


def freeze(model: nn.Module, method: str, dropout: float, lora_rank: int, lora_alpha: float, lora_targets: list[str]
           ) -> None:
    """Freeze what the method leaves alone, and add adapters where it is LoRA. Raises utils.InputError as add_lora does,
    and for dropout in a network that has none.

    ## full: every weight. Per parameter AdamW takes four numbers (weight, gradient, two averages): 2 GB for GPT-2.
    ## head: the last block and the norm after it. What lies below is used as it is, and needs no gradients at all. The
    ##       matrix that makes scores stays too: it is the token embedding, which the first layer reads.
    ## lora: the weights stay, and small matrices beside them learn the change (lora.py).
    """
    if method == "lora":
        try:
            add_lora(model, lora_rank, lora_alpha, dropout, lora_targets)
        except ValueError as error:
            raise utils.InputError(str(error)) from error
        return
    if method == "head":
        model.requires_grad_(False)
        for part in model.top:
            part.requires_grad_()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Dropout)]
    if dropout and not layers:
        raise utils.InputError(f"{type(model).__name__} has no dropout layers; leave dropout at 0, or take LoRA's own.")
    for layer in layers:
        layer.p = dropout


# ---------------------------------------------------------------------------------------------- the loop
def make_optimizers(model: nn.Module, lr: float, weight_decay: float = 0.01) -> list[torch.optim.Optimizer]:
    """One AdamW for all that is trained. Its group keeps the `peak` rate."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [torch.optim.AdamW([{"params": trained, "peak": lr}], lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay,
                              fused=trained[0].device.type in ("cpu", "cuda"))]


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate: up in a line, then down as half a cosine to a tenth (Loshchilov & Hutter 2016).

    ## AdamW's first steps are all equally long, however small the gradient, and the weights that they could spoil are
    ## good ones: hence the warm-up.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def evaluate(model: nn.Module, ids: Tensor, block_size: int, dtype: torch.dtype, batch_size: int = 4) -> float:
    """Mean loss in nats per token on ids (N,): windows of block_size one after another, every token counted once."""
    training, total = model.training, 0.0
    model.eval()  # no dropout
    n = (len(ids) - 1) // block_size * block_size
    parts = [*zip(*(part.view(-1, block_size).split(batch_size) for part in (ids[:n], ids[1 : n + 1])))]
    if n < len(ids) - 1:
        parts.append((ids[None, n:-1], ids[None, n + 1 :]))  # the last window is shorter
    for x, y in parts:  # (B, T) each
        with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
            total += model(x, targets=y).item() * y.numel()
    model.train(training)
    return total / (len(ids) - 1)


def sample(model: nn.Module, base: Base, length: int, dtype: torch.dtype, seed: int, prompt: str = "\n") -> str:
    """`length` tokens drawn at temperature 0.8 from the 50 likeliest, after a prompt; the same seed, the same luck."""
    device = next(model.parameters()).device
    ids = base.tokenizer.encode(prompt, special=False)
    model.eval()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        new = list(base.module.generate(model, ids, length, 0.8, 50, stop=base.tokenizer.end,
                                        generator=torch.Generator(device).manual_seed(seed)))
    return base.tokenizer.decode(ids + new)


def fit(model: nn.Module, optimizers: list[torch.optim.Optimizer], train: Tensor, val: Tensor, steps: int,
        batch_size: int, block_size: int, eval_every: int, seed: int, dtype: torch.dtype, warmup: int = 20,
        micro_batch_size: int = 4, first_step: int = 0, seconds: float = 0.0, forward: nn.Module | None = None,
        shard: slice = slice(None)) -> Iterator[dict]:
    """Train on windows of train (N,); after every eval_every steps, and the last, evaluate on val and yield a row.

    A run that goes on begins at first_step, a multiple of eval_every, after so many seconds. forward: what computes the
    loss where model is wrapped; shard: the rows of each batch that this process takes.
    """
    B, T, forward = batch_size, block_size, forward or model
    trained = [p for p in model.parameters() if p.requires_grad]
    stream = islice(batches(train, T, B, seed), first_step, None)
    begun = time.perf_counter() - seconds
    for start in range(first_step, steps, eval_every):
        end = min(start + eval_every, steps)
        losses = []
        model.train()
        for step, (x, y) in zip(range(start, end), stream):  # x, y (B, T)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * schedule(step, steps, warmup)
            ## Gradient accumulation: backward adds to the gradients that are there. So a batch can be taken in parts,
            ## each weighted by its share; the step then follows the mean over all of it, with the memory of one part.
            x, y = x[shard], y[shard]
            loss = torch.zeros((), device=x.device)
            for a, b in zip(x.split(micro_batch_size), y.split(micro_batch_size)):
                ## Mixed precision: what is trained, and its updates, stay in float32; autocast gives the matrix
                ## products bfloat16 copies. (With LoRA the frozen ones are bfloat16 as it is: see main.)
                with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                    part = forward(a, targets=b) * (len(a) / len(x))  # ()
                part.backward()
                loss += part.detach()
            nn.utils.clip_grad_norm_(trained, 1.0)  # one odd batch costs one short step (Pascanu et al. 2013)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()  # now: an evaluation needs no gradients, and large models have large ones
            losses.append(loss)
            if step % 10 == 9:  # looking at the loss makes a GPU wait, so not at every step
                utils.progress(step + 1, steps, begun, f"loss {loss.item():.3f}", "tokens", B * T)
        train_loss = torch.stack(losses).mean().item()  # waits for a GPU to finish
        seconds = time.perf_counter() - begun
        figures = torch.tensor([train_loss, evaluate(model, val, T, dtype)], device=train.device)
        if dist.is_initialized():
            dist.all_reduce(figures.div_(dist.get_world_size()))  # the mean over all processes: all see the same
        train_loss, val_loss = figures.tolist()
        if not figures.isfinite().all():
            raise utils.InputError(f"the loss became {figures.sum():g} by step {end}; make lr smaller.")
        yield {"step": end, "seconds": seconds, "tokens": end * B * T,
               "train_loss": train_loss, "val_loss": val_loss}
        begun = time.perf_counter() - seconds  # the clock stood still meanwhile


# ---------------------------------------------------------------------------------------------- main
def parse_options():
    """The options' values. Raises utils.InputError for those that don't go together."""
    parser = utils.parser(__doc__, __file__, "device", "dtype", "seed", "compile", "resume")  # --device, --seed, --out
    add = parser.add_argument
    add("--method", choices=LR, default="lora", help="what is trained: adapters, every weight, or the last block")
    add("--model", help=MODELS)
    add("--data", help=TEXTS)
    add("--steps", type=utils.count, default=300, help="updates; the learning rate falls to a tenth at the last one")
    add("--batch-size", type=utils.count, default=4, help="windows per step; larger: steadier, learns less per token")
    add("--micro-batch-size", type=utils.count, default=4, help="windows at once: less memory, and the same result")
    add("--block-size", type=utils.count, help="tokens in a window; without it 256, or the model's n_positions if less")
    add("--lora-rank", type=utils.count, help="r: rank of each change; parameters grow with it (default: 8)")
    add("--lora-alpha", type=utils.positive, help="the change counts alpha / r times (default: 16)")
    add("--lora-targets", nargs="+", help="ends of layers' names (c_attn; Llama: q_proj v_proj); a wrong one lists all")
    add("--dropout", type=utils.share, default=0.0, help="share zeroed; helps where a small text is read many times")
    add("--lr", type=utils.positive, help=f"AdamW's peak learning rate; without it, for stand-in and others: {LR}")
    add("--warmup", type=utils.count, default=20, help="steps over which the learning rate rises from zero")
    add("--eval-every", type=utils.count, default=100, help="steps between evaluations on all of validation")
    add("--patience", type=utils.count, default=3, help="evaluations without a new best that end it (early stopping)")
    add("--activation-checkpointing", action="store_true", help="less memory, one more forward pass per step")
    args = utils.parse_args(parser)
    for name, value in LORA.items():
        if vars(args)[name] and args.method != "lora":
            raise utils.InputError(f"--{name.replace('_', '-')} is for --method lora, not for {args.method}.")
        vars(args)[name] = vars(args)[name] or value
    return args


def report(args, base: Base, text: Data, model: nn.Module, before: float, history: list, best: dict) -> None:
    """Print and write what the best weights reach, beside guessing and the start."""
    label, memory = f"{base.label}, on {text.label}", peak_memory(args.device)
    ## A token is a unit of the tokenizer's own choosing, so losses per token can't be compared between vocabularies.
    ## Per character they can: nats per token * tokens / characters, and / ln 2 for bits.
    per_character = (len(text.val) - 1) / text.val_characters / math.log(2)
    metrics = {"val_loss": best["val_loss"], "perplexity": math.exp(min(best["val_loss"], 700)),
               "best_step": best["step"], "bits_per_character": best["val_loss"] * per_character,
               "before_val_loss": before, "before_bits_per_character": before * per_character,
               "trained_parameters": utils.count_parameters(model), "peak_memory_bytes": memory}
    print(f"\n{'':24}nats per token   perplexity   bits per character   ({label}, validation)")
    for name, nats in {"guessing uniformly": math.log(base.config["vocab_size"]), "before training": before,
                       f"{args.method}, step {best['step']}": best["val_loss"]}.items():
        print(f"{name:24}{nats:14.4f}{math.exp(min(nats, 700)):13.3f}{nats * per_character:21.4f}")
    if best["val_loss"] > before:
        print("training made it worse: try a smaller --lr")
    after = load_result(base, args.out, args.method).to(args.device)  # as anybody would load it
    print(f"{history[-1]['seconds']:.0f} s of training, {memory / 1e9:.2f} GB of memory at most (0: not known)\n\n"
          f"it writes:\n{sample(after, base, 200, args.dtype, args.seed)}\n")
    utils.save_metrics(args, SCRIPT, text._replace(stand_in=base.stand_in or text.stand_in), after, metrics, history,
                       model=base.name + base.note, parameters=sum(p.numel() for p in after.parameters()))
    utils.plot_history(args.out / "history.png", [{"step": 0, "val_loss": before}, *history],
                       ["train_loss", "val_loss"], f"{args.method}: {label}", y="nats per token")
    print(f"wrote adapter/ or model/, checkpoint.pt, metrics.json and history.png to {args.out}")
    base.notice()
    utils.stand_in_notice(text.name, text.stand_in)


def main() -> None:
    ## Several processes, as in chapter 05: each holds the whole model, takes its share of every batch, and averages its
    ## gradients with the others'. All else each does as if it were alone, but only rank 0 prints and writes.
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)  # by utils.run
    args = parse_options()
    if args.batch_size % world:
        raise utils.InputError(f"--batch-size {args.batch_size} can't be shared evenly by {world} processes.")
    base = find_base(args.model)
    args.block_size = args.block_size or min(256, base.config["n_positions"])
    args.lora_targets = args.lora_targets or base.module.TARGETS
    text = load_data(args.data, base.tokenizer, args.block_size)
    train, val = text.train.to(args.device), text.val.to(args.device)
    free = ("out", "device", "compile", "resume", "micro_batch_size", "activation_checkpointing")
    options = {name: value for name, value in vars(args).items() if name not in free}
    options |= {"model": base.name, "data": f"{text.name} of {len(train):,} tokens"}
    saved = utils.load_checkpoint(args.out / "checkpoint.pt", SCRIPT, options) if args.resume else None

    torch.manual_seed(args.seed)
    ## What is frozen need not be more precise than what it is multiplied with. (Not so with `head`, which writes the
    ## frozen weights out again: they stay as they were.)
    model = base.read(args.dtype if args.method == "lora" else torch.float32)
    freeze(model, args.method, args.dropout, *(vars(args)[name] for name in LORA))
    model.checkpointing = args.activation_checkpointing
    optimizers = make_optimizers(model.to(args.device), args.lr or LR[args.method][not base.stand_in])
    torch.manual_seed(args.seed + rank)  # all ranks have the same adapters by now, and need different dropout
    first_step, history, best = 0, [], {"step": 0, "val_loss": math.inf}

    n_trained, whole = utils.count_parameters(model), sum(p.numel() for p in model.parameters())
    print(f"{base.label}, on {text.label}: {len(train):,} tokens to train on, {len(val):,} to validate on\n"
          f"{args.method}: {n_trained:,} trained parameters of {whole:,} ({n_trained / whole:.4%}); "
          f"{str(args.dtype)[6:]} on {args.device.type}")
    x, y = next(batches(text.train, args.block_size, args.batch_size, args.seed))
    print(f"a window:     {base.tokenizer.decode(x[0, :16].tolist())!r}\n"
          f"its targets:  {base.tokenizer.decode(y[0, :16].tolist())!r}")
    ## Unlike in all other chapters the model knows something already, and the loss before training is below ln V. If it
    ## is not, the tokenizer's files are likely those of other weights.
    V, before = base.config["vocab_size"], evaluate(model, val, args.block_size, args.dtype)
    print(f"before training: loss {before:.4f}; guessing uniformly, ln {V}: {math.log(V):.4f}; it writes:\n"
          f"{sample(model, base, 60, args.dtype, args.seed)}\n")
    if saved:
        first_step, history, best = saved["step"], saved["history"], saved["best"]
        load_trainable(model, saved.pop("trained"))  # gigabytes, perhaps, that are of no use from here on
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        torch.set_rng_state(saved["random_state"] if rank == 0 else torch.get_rng_state())
    forward = torch.compile(model) if args.compile else model
    forward = nn.parallel.DistributedDataParallel(forward) if world > 1 else forward
    for row in fit(model, optimizers, train, val, args.steps, args.batch_size, args.block_size, args.eval_every,
                   args.seed, args.dtype, args.warmup, args.micro_batch_size, first_step,
                   history[-1]["seconds"] if history else 0.0, forward, slice(rank, None, world)):
        history.append(row)
        best = row if row["val_loss"] < best["val_loss"] else best
        ## Early stopping: the model has been learning the training text by heart for a while.
        stop = row["step"] - best["step"] >= args.patience * args.eval_every
        print("step {:5}  {:4.0f} s  {:,} tokens  train {:.4f}  validation {:.4f}".format(*row.values()).ljust(79),
              flush=True)
        if rank == 0:
            if best is row:
                save_result(model, base, args.out, args.method)
            utils.write_atomically(args.out / "checkpoint.pt", torch.save, {
                "script": SCRIPT, "torch": str(torch.__version__), "options": options, "best": best,
                "step": args.steps if stop else row["step"], "history": history,
                "trained": trainable_state(model), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "random_state": torch.get_rng_state()})  # of the CPU: on a GPU dropout goes on with other numbers
        if stop:
            break
    if rank == 0:
        report(args, base, text, model, before, history, best)


## Try this, with --model stand-in on Tiny Shakespeare (seed 0; experiment.py has the tables). As it is: 4.639 nats.
##   --lora-rank 64                                               4.593   eight times the parameters, hardly better
##   --lora-targets mlp.c_proj                                    4.374   the same rank, in each MLP's second layer
##   --lora-targets c_attn attn.c_proj mlp.c_fc mlp.c_proj        4.292   in all of them
##   --lora-alpha 64                                              5.262   much too large a step

if __name__ == "__main__":
    utils.run(main, go_on="--resume")
