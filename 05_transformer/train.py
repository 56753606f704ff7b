"""A character GPT and the loop that trains it, in five minutes on two CPU cores.

You learn here: how a transformer is put together, what each line of a training loop is for, and which few changes to
the recipe of 2019 make it learn several times faster.

    python 05_transformer/train.py                                       Tiny Shakespeare
    python 05_transformer/train.py --data my_novel.txt                   any UTF-8 text
    python 05_transformer/train.py --resume                              after Ctrl-C
    torchrun --nproc_per_node=2 05_transformer/train.py                  two processes, for example on two GPUs

You should see (Tiny Shakespeare; two cores of an AMD EPYC with AVX512-BF16, no AMX; torch 2.15; seeds 0, 1, 2):
    validation loss 1.413 ± 0.005 nats per character (1.409, 1.412, 1.418), perplexity 4.11, 2.04 bits per character,
    after 304, 326 and 378 s of training, the machine slowing down from 20,000 characters per second to 16,000; below
    1.88, which nanoGPT's README names for its CPU recipe, at the first evaluation (25 s)
Writes to outputs/: model.pt (the best weights by validation), checkpoint.pt (for --resume), metrics.json, history.png.
Left out on purpose: subwords (chapter 06), gradient accumulation, mixture of experts, anything that needs a cluster.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils  # noqa: E402
from load import batches, bigram_loss, decode, load_data  # noqa: E402

# Shapes: B batch, T time (at most block_size), C channels (n_embd), H heads, D channels per head (C = H * D),
#         V vocabulary, N characters in a text

SCRIPT = "05_transformer/train.py"


# ---------------------------------------------------------------------------------------------- model
def norm(x: Tensor) -> Tensor:
    """Bring the last dimension to mean 0 and variance 1: any shape -> same shape (layer norm, Ba et al. 2016).

    ## The usual learned gain is left out: the matrix that reads the result can scale each channel by itself.
    """
    return F.layer_norm(x, x.shape[-1:])


def rotary_tables(block_size: int, D: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every rotary angle, (T, 1, 1, D) each, laid out for `rotate`."""
    frequency = 10000.0 ** -(torch.arange(0, D, 2) / D)  # (D/2,) radians per character: 1 down to nearly 1/10000
    angle = torch.arange(block_size)[:, None] * frequency  # (T, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1)[:, None, None], torch.cat([-sin, sin], -1)[:, None, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, section 3.2): x (B, T, 2, H, D) -> same shape.

    ## Attention by itself sees a bag of characters. Here channels i and i + D/2 form a point in the plane, which is
    ## turned by an angle proportional to its position:
    ##     (a, b)  ->  (a cos - b sin,  b cos + a sin)
    ## The dot product of two turned points depends on the two original points and on the difference of their
    ## positions, never on the positions themselves. So a score knows how far back a key lies, and a pattern learned at
    ## one place works at every other.
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin  # roll swaps the halves; sin carries the signs


def attend(q: Tensor, k: Tensor, v: Tensor, keep_weights: bool = True) -> tuple[Tensor, Tensor | None]:
    """Causal attention: q, k, v (B, H, T, D) -> y (B, H, T, D) and weights (B, H, T, T),
    which a CUDA device makes only if asked for."""
    if q.is_cuda and not keep_weights:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True), None  # one fused kernel
    ## The same, spelled out. On a CPU it is no slower than the fused kernel (benchmark.py --rows attention).
    T, D = q.shape[2:]
    future = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)  # 0 on and below the diagonal
    p = torch.add(future, q @ k.mT, alpha=D**-0.5).softmax(-1)  # (B, H, T, T)
    return p.to(v.dtype) @ v, p


class Attention(nn.Module):
    """Multi-head causal self-attention, (B, T, C) -> (B, T, C). from_scratch.py derives it step by step."""

    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)  # queries, keys and values in one product
        self.out = nn.Linear(n_embd, n_embd, bias=False)
        self.keep_weights, self.weights = False, None  # load_model.py turns this on to draw them

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        D = C // self.n_head
        qkv = self.qkv(x).view(B, T, 3, self.n_head, D)
        ## QK-norm (Henry et al. 2020): queries and keys all get length sqrt(D), so that scores stay between -sqrt(D)
        ## and sqrt(D) however large the weights grow.
        qk = rotate(norm(qkv[:, :, :2]), cos, sin).to(qkv.dtype)  # (B, T, 2, H, D)
        q, k = qk.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        v = qkv[:, :, 2].transpose(1, 2)  # (B, H, T, D)
        y, weights = attend(q, k, v, keep_weights=self.keep_weights)  # (B, H, T, D)
        self.weights = weights.detach() if self.keep_weights else None
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """Attention moves information between positions, then an MLP works on each position: (B, T, C) -> (B, T, C).

    ## Both are added to their input (the residual path, He et al. 2015), and norm comes before them, not after (Xiong
    ## et al. 2020): between blocks, the path from loss to embedding has nothing that could shrink a gradient.
    """

    def __init__(self, n_embd: int, n_head: int, dropout: float):
        super().__init__()
        self.attention = Attention(n_embd, n_head)
        self.up = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.down = nn.Linear(4 * n_embd, n_embd, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(norm(x), cos, sin))
        ## ReLU squared (So et al. 2021): like ReLU it is exactly zero for half of its inputs, but without the kink.
        h = F.relu(self.up(norm(x))).square()  # (B, T, 4C)
        return x + self.dropout(self.down(h))


class GPT(nn.Module):
    """A decoder-only transformer over characters: GPT-2 (Radford et al. 2019), with what experiment.py kept."""

    def __init__(self, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int, dropout: float):
        super().__init__()
        if n_embd % n_head or n_embd // n_head % 2:
            raise utils.InputError(f"--n-embd {n_embd} must be divisible by --n-head {n_head}, with an even quotient.")
        self.block_size = block_size
        self.dtype = torch.float32  # what activations are computed in; the weights are always float32
        self.characters = nn.Embedding(vocab_size, n_embd)
        self.shift = nn.Parameter(torch.zeros(n_embd))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout) for _ in range(n_layer))
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        ## GPT-2's first weights: all matrices and the embedding small, so that the first steps can turn them anywhere.
        ## Smaller still are those whose products are added up on the residual path, two for each of n_layer blocks: the
        ## variance of a sum grows with the number of its terms, and 1 / sqrt(2 n_layer) takes that back.
        for name, matrix in self.named_parameters():
            if matrix.ndim == 2:
                adds = name.endswith(("attention.out.weight", "down.weight"))
                nn.init.normal_(matrix, std=0.02 / math.sqrt(2 * n_layer) if adds else 0.02)
        for name, table in zip(("cos", "sin"), rotary_tables(block_size, n_embd // n_head)):
            self.register_buffer(name, table, persistent=False)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """ids (B, T) -> logits (B, T, V) in float32; with targets (B, T) -> their mean cross-entropy, in nats."""
        x = self.characters(ids)  # (B, T, C)
        ## Token shift (Peng et al. 2023): each position also gets the embedding of the character before, weighted per
        ## channel. Pairs say much more than single characters, and this way no attention head has to fetch them.
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]  # (B, T, C), zeros for the first character
        x = norm(x + self.shift * before)
        cos, sin = (table[: ids.shape[1]] for table in (self.cos, self.sin))  # (T, 1, 1, D) each
        ## Mixed precision (Micikevicius et al. 2018): products and the residual path in `dtype`, where that is a faster
        ## bfloat16; weights, their gradients, the optimizer and the loss in float32.
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            x = self.dropout(x.to(self.dtype))
            for block in self.blocks:
                x = block(x, cos, sin)
            logits = self.head(norm(x)).float()  # (B, T, V)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---------------------------------------------------------------------------------------------- small functions
@torch.no_grad()
def evaluate(model: GPT, ids: Tensor, block_size: int) -> float:
    """Mean loss over all of ids, (N,) -> nats per character: consecutive windows, the last as long as what is left.

    ## Each character but the first is predicted exactly once, from what stands before it in its window: the first of a
    ## window from one character, the last from block_size. Nothing is sampled and nothing is dropped.
    """
    model.eval()
    n = (len(ids) - 1) // block_size * block_size
    inputs, targets = ids[:n].view(-1, block_size), ids[1 : n + 1].view(-1, block_size)  # (windows, T)
    rows = max(1, 8192 // block_size)
    total = sum(model(x, y).item() * x.numel() for x, y in zip(inputs.split(rows), targets.split(rows)))
    if n < len(ids) - 1:
        total += model(ids[None, n:-1], ids[None, n + 1 :]).item() * (len(ids) - 1 - n)
    model.train()
    return total / (len(ids) - 1)


@torch.no_grad()
def generate(model: GPT, ids: Tensor, length: int) -> Tensor:
    """Continue ids (1, T) by `length` characters drawn from the model: (1, T + length). load_model.py does it fast."""
    model.eval()
    for _ in range(length):
        logits = model(ids[:, -model.block_size :])[:, -1]  # (1, V): only the last position predicts something new
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)], 1)
    model.train()
    return ids


def make_optimizers(model: GPT, lr: float, muon_lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embedding and head.

    ## A matrix's gradient is dominated by a few directions. Muon (Jordan et al. 2024) averages gradients as momentum
    ## does, then replaces the average U S V^T by (nearly) U V^T: every direction gets the same step. That costs a few
    ## matrix products per step; experiment.py shows what it buys.
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if not name.startswith("blocks.") or p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=weight_decay),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor on every learning rate: a linear rise, then a linear fall to 2 % at the last step."""
    return min((step + 1) / warmup, 1 - 0.98 * step / steps)


# ---------------------------------------------------------------------------------------------- options
PRESETS = {
    "small": dict(steps=3000, batch_size=8, block_size=256, n_layer=4, n_head=3, n_embd=192, dropout=0.0,
                  lr=2e-3, muon_lr=0.02, weight_decay=0.1),
    "large": dict(steps=2000, batch_size=64, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2,
                  lr=2e-3, muon_lr=0.02, weight_decay=0.1),
}


def parse_options() -> tuple[argparse.Namespace, dict]:
    """Return every option with its value, and a dict of only those that the user gave. Raises utils.InputError."""
    parser = utils.parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="small: for two CPU cores; large: for a GPU, 10.7 M "
        "parameters, each step over 40 times the arithmetic of small's; not yet timed on a GPU")
    add("--data", type=utils.name_or_path("tinyshakespeare", "pydocs"),
        help="tinyshakespeare, pydocs or a text file; without it the first, or pydocs if that is out of reach")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: what multiplies faster here")
    add("--seed", type=int, default=0, help="decides weights, batches and dropout")
    add("--steps", type=int, help="updates; the learning rates fall to nearly zero at the last one")
    add("--batch-size", type=int, help="windows per step; larger is steadier, and learns less per character")
    add("--block-size", type=int, help="context: how far back the model looks; attention costs its square")
    add("--n-layer", type=int, help="blocks: how many times information can move between positions")
    add("--n-head", type=int, help="attention heads per block, each n_embd / n_head channels wide")
    add("--n-embd", type=int, help="width C; parameters and time grow with its square")
    add("--dropout", type=float, help="share of channels zeroed: against overfitting, slows learning")
    add("--lr", type=float, help="AdamW's peak learning rate, for embedding and head")
    add("--muon-lr", type=float, help="Muon's peak learning rate, for the matrices in the blocks")
    add("--weight-decay", type=float, help="Muon's: share of every weight taken per step, times muon_lr")
    add("--warmup", type=int, default=20, help="steps over which the learning rates rise from zero")
    add("--grad-clip", type=float, default=1.0, help="a longer gradient is cut to this (Pascanu et al. 2013)")
    add("--eval-every", type=int, default=250, help="steps between evaluations on all validation text; each saves")
    add("--patience", type=int, default=5, help="stop after so many evaluations without a new best (early stopping)")
    add("--compile", action="store_true", help="torch.compile: slow to start, then faster steps")
    add("--resume", action="store_true", help="go on from checkpoint.pt in --out, with the options of that run")
    add("--out", type=Path, default=Path(__file__).parent / "outputs", help="folder for everything written")
    parser.set_defaults(**PRESETS["small"])  # for --help
    parser.set_defaults(**PRESETS[parser.parse_known_args()[0].preset])
    args, given = utils.parse(parser)
    utils.check(args, above_zero="steps batch_size block_size n_layer n_head n_embd lr muon_lr warmup grad_clip "
                "eval_every patience", not_negative="weight_decay", shares="dropout")
    return args, given


def main() -> None:
    utils.keep_memory()
    args, given = parse_options()
    checkpoint_path, model_path = args.out / "checkpoint.pt", args.out / "model.pt"
    saved = utils.resume(args, given, SCRIPT)
    device = utils.pick_device(args.device)

    ## Several processes: `torchrun --nproc_per_node=2 05_transformer/train.py` starts this script twice and tells each
    ## its rank. Each holds the whole model, takes its share of every batch, and averages its gradients with the
    ## others', so that all take the very step that one process would take with the whole batch.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0:
        utils.check_writable(args.out)
    if world > 1:
        if args.batch_size % world:
            raise utils.InputError(f"--batch-size {args.batch_size} can't be shared evenly by {world} processes.")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.dtype == "auto":
        names = [str(utils.pick_dtype(device)).removeprefix("torch.")]
        if world > 1:
            dist.broadcast_object_list(names)  # a matter of timing, on which ranks could disagree
        args.dtype = names[0]

    # data
    if rank > 0:
        dist.barrier()  # until rank 0 has downloaded the text
    data = load_data(args.data, args.block_size)
    if rank == 0 and world > 1:
        dist.barrier()
    args.data = args.data or data.name  # what it came to be, for --resume
    train, val, vocab = data.train.to(device), data.val.to(device), data.vocab
    label = data.name + ", stand-in" * data.stand_in
    if saved and (saved["vocab"], saved["characters"]) != (vocab, len(train)):
        raise utils.InputError(f"--resume: {data.name} is not the text it was then; start anew without --resume.")

    # model and optimizers
    utils.set_seed(args.seed)
    config = dict(vocab_size=len(vocab), block_size=args.block_size, n_layer=args.n_layer, n_head=args.n_head,
                  n_embd=args.n_embd, dropout=args.dropout)
    model = GPT(**config).to(device)
    model.dtype = getattr(torch, args.dtype)
    optimizers = make_optimizers(model, args.lr, args.muon_lr, args.weight_decay)
    first_step, seconds, history, losses, best = 0, 0.0, [], [], {"step": 0, "val_loss": math.inf}
    torch.manual_seed(args.seed + rank)  # all ranks have the same weights by now, and need different dropout
    if saved:
        utils.load_weights(model, saved, checkpoint_path)
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        first_step, seconds, history, best = saved["step"], saved["seconds"], saved["history"], saved["best"]
        losses = [loss.to(device) for loss in saved["losses"]]
        if rank == 0:
            torch.set_rng_state(saved["random_state"])
        else:
            torch.manual_seed(args.seed + rank + first_step)
    step_model = torch.compile(model) if args.compile else model
    step_model = DistributedDataParallel(step_model) if world > 1 else step_model

    # sanity numbers before training
    bigram = bigram_loss(data.train, data.val, len(vocab))
    if rank == 0:
        print(f"{label}: {len(train):,} characters to train on, {len(val):,} to validate on, {len(vocab)} distinct\n"
              f"{utils.count_parameters(model):,} parameters; {args.dtype} on {device.type}; "
              f"{args.steps * args.batch_size * args.block_size / len(train):.1f} passes over the text")
        x, y = next(batches(data.train, args.block_size, 1, args.seed))
        print(f"a window:         {decode(x[0, :50], vocab)!r}\nits targets:      {decode(y[0, :50], vocab)!r}")
        if saved:
            print(f"resumed after step {first_step} and {seconds:.0f} s of training\n")
        else:
            ## The head starts small, so the first loss is close to ln V: all characters about equally likely. Anything
            ## else is a mistake in head or loss. A leak of targets into inputs shows later, as a loss too good to be
            ## true.
            print(f"before training:  loss {evaluate(model, val, args.block_size):.4f}; guessing uniformly, "
                  f"ln {len(vocab)}: {math.log(len(vocab)):.4f}; bigram: {bigram:.4f}")
            print(f"it writes:        {decode(generate(model, val[None, :1], 60)[0], vocab)!r}\n")

    def save() -> None:
        """Write all that decides how the run goes on; and, where the newest weights are the best so far, the model."""
        state = {"script": SCRIPT, "config": config, "vocab": vocab, "data": data.name, "stand_in": data.stand_in,
                 "torch": str(torch.__version__), "model": model.state_dict(), "metrics": best}
        if best["step"] == done:
            utils.save_checkpoint(model_path, state)
        utils.save_checkpoint(checkpoint_path, state | {
            "options": utils.plain(args), "characters": len(train), "step": done, "seconds": seconds,
            "history": history, "best": best, "losses": losses,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "random_state": torch.get_rng_state()})  # of the CPU: on a GPU dropout goes on with other numbers

    ## Ctrl-C only leaves a note, which the loop reads between two steps, where everything fits together.
    interrupted, restore_signals = utils.catch_signals()

    # ------------------------------------------------------------------------------------------ the loop
    advice = "no file was touched since the last evaluation; start again with a smaller --lr and --muon-lr."
    bar, begun = utils.Progress(args.steps, "characters", first_step), time.perf_counter()
    stream = batches(train, args.block_size, args.batch_size, args.seed)  # the same on every rank
    for step, (x, y) in zip(range(args.steps), stream):  # x, y (B, T)
        if step < first_step:
            continue  # resumed: these were seen before
        if step - best["step"] >= args.patience * args.eval_every:
            break  # early stopping
        for optimizer, peak in zip(optimizers, (args.muon_lr, args.lr)):
            optimizer.param_groups[0]["lr"] = peak * schedule(step, args.steps, args.warmup)

        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = step_model(x[rank::world], y[rank::world])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.detach())

        done = step + 1
        due = done % args.eval_every == 0 or done == args.steps
        if not due and done % 10:  # looking at the loss makes a GPU wait, so not at every step
            continue
        stop = torch.tensor(len(interrupted), device=device)
        if world > 1:
            dist.all_reduce(stop)  # all ranks stop at the same step, or none
        if not math.isfinite(loss.item()):
            raise utils.InputError(f"the loss became {loss.item()} by step {done}; {advice}")
        if rank == 0:
            bar.update(done, f"loss {loss.item():.3f}", args.batch_size * args.block_size)
        if due or stop:
            seconds += time.perf_counter() - begun
            if due:
                train_loss = torch.stack(losses).mean()
                val_loss = torch.tensor(evaluate(model, val, args.block_size) if rank == 0 else 0.0, device=device)
                if world > 1:
                    dist.all_reduce(train_loss)  # the sum over ranks
                    dist.broadcast(val_loss, 0)
                row = {"step": done, "seconds": seconds, "characters": done * args.batch_size * args.block_size,
                       "train_loss": train_loss.item() / world, "val_loss": val_loss.item()}
                history.append(row)
                losses = []
                best = row if row["val_loss"] < best["val_loss"] else best
            if due and not math.isfinite(row["train_loss"] + row["val_loss"]):
                raise utils.InputError(f"the loss became {row['train_loss'] + row['val_loss']} by step {done}; "
                                       + advice)
            if rank == 0:
                save()
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
        dist.barrier()  # gloo may abort one that leaves too early
        dist.destroy_process_group()
    if rank:
        return
    model.load_state_dict(utils.load_checkpoint(model_path, SCRIPT, device)["model"])  # best, maybe not last
    loss, uniform = best["val_loss"], math.log(len(vocab))
    perplexity = lambda nats: math.exp(min(nats, 700))  # noqa: E731  (a float ends at exp 709)
    metrics = {"val_loss": loss, "perplexity": perplexity(loss), "bits_per_character": loss / math.log(2),
               "best_step": best["step"], "last_val_loss": history[-1]["val_loss"], "bigram_val_loss": bigram,
               "uniform_val_loss": uniform}
    print(f"\n{'':24}nats per character   perplexity   bits per character   ({label}, validation)")
    for name, nats in (("guessing uniformly", uniform), ("bigram", bigram), (f"GPT, step {best['step']}", loss)):
        print(f"{name:24}{nats:18.4f}{perplexity(nats):13.3f}{nats / math.log(2):21.4f}")
    print(f"{seconds:.0f} s of training\n\nit writes:\n{decode(generate(model, val[None, :1], 400)[0], vocab)}\n")
    utils.save_metrics(args.out / "metrics.json", script=SCRIPT, data=data.name, stand_in=data.stand_in,
                       device=device.type, seed=args.seed, seconds=seconds, parameters=utils.count_parameters(model),
                       metrics=metrics, history=history)
    utils.plot_history(args.out / "history.png", history, ["train_loss", "val_loss"], f"A character GPT on {label}",
                       y="nats per character")
    print(f"wrote model.pt, checkpoint.pt, metrics.json and history.png to {args.out}")
    if data.stand_in:
        utils.notice(f"STAND-IN: these figures are for {data.name}, not for Tiny Shakespeare.")


## Try this, with --steps 500 --eval-every 500. Each was run once (seed 0, Tiny Shakespeare); as it is: 1.5833 in 47 s.
##   --batch-size 32 --steps 125 --eval-every 125   1.9660   the same text in four times larger batches: steps matter
##   --block-size 32 --batch-size 64                1.6410   it sees a line at most, and no longer who is speaking
##   --dropout 0.2                                  1.7402   nothing to prevent yet: one pass has no overfitting

if __name__ == "__main__":
    utils.run(main)
