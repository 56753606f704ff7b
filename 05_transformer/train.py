"""A character GPT and the loop that trains it, in five minutes on two CPU cores.

You learn here: how a transformer is put together, what each line of a training loop is for, and which few changes to
the recipe of 2019 make it learn several times faster.

    python 05_transformer/train.py                                       Tiny Shakespeare
    python 05_transformer/train.py --data my_novel.txt                   any UTF-8 text
    python 05_transformer/train.py --resume                              after Ctrl-C
    torchrun --nproc_per_node=2 05_transformer/train.py                  two processes, for example on two GPUs

You should see (Tiny Shakespeare, two cores of an AMD EPYC, three seeds): validation loss 1.413 ± 0.005 nats per
character, or 2.04 bits, after 300 to 380 s.
Writes to outputs/: model.pt (the best weights by validation), checkpoint.pt (for --resume), metrics.json, history.png.
Left out on purpose: subwords (chapter 06), gradient accumulation (chapter 06), anything that needs a cluster.
"""

import math
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from load import Data, batches, bigram_loss, decode, load_data

# Shapes: B batch, T time (at most block_size), C channels (n_embd), A heads, D channels per head (C = A * D),
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
    """Rotary position embedding (Su et al. 2021, section 3.2): x (B, T, 2, A, D) -> same shape.

    ## Attention by itself sees a bag of characters. Here channels i and i + D/2 form a point in the plane, which is
    ## turned by an angle proportional to its position:
    ##     (a, b)  ->  (a cos - b sin,  b cos + a sin)
    ## The dot product of two turned points depends on the two original points and on the difference of their
    ## positions, never on the positions themselves. So a score knows how far back a key lies, and a pattern learned at
    ## one place works at every other.
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin  # roll swaps the halves; sin carries the signs


def attend(q: Tensor, k: Tensor, v: Tensor, keep_weights: bool = True) -> tuple[Tensor, Tensor | None]:
    """Causal attention: q, k, v (B, A, T, D) -> y (B, A, T, D) and weights (B, A, T, T),
    which a CUDA device makes only if asked for."""
    if q.is_cuda and not keep_weights:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True), None  # one fused kernel
    ## The same, spelled out. On a CPU it is no slower than the fused kernel (benchmark.py --rows attention).
    T, D = q.shape[2:]
    future = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)  # 0 on and below the diagonal
    p = torch.add(future, q @ k.mT, alpha=D**-0.5).softmax(-1)  # (B, A, T, T)
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
        qk = rotate(norm(qkv[:, :, :2]), cos, sin).to(qkv.dtype)  # (B, T, 2, A, D)
        q, k = qk.permute(2, 0, 3, 1, 4)  # (B, A, T, D) each
        v = qkv[:, :, 2].transpose(1, 2)  # (B, A, T, D)
        y, weights = attend(q, k, v, keep_weights=self.keep_weights)  # (B, A, T, D)
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
            raise utils.InputError(f"n_embd {n_embd} must be divisible by n_head {n_head}, with an even quotient.")
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


# ---------------------------------------------------------------------------------------------- the loop
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
    """Muon for the matrices inside the blocks, AdamW for embedding and head. Each group keeps its `peak` rate.

    ## A matrix's gradient is dominated by a few directions. Muon (Jordan et al. 2024) averages gradients as momentum
    ## does, then replaces the average U S V^T by (nearly) U V^T: every direction gets the same step. That costs a few
    ## matrix products per step; experiment.py shows what it buys.
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if not name.startswith("blocks.") or p.ndim != 2]
    return [torch.optim.Muon([{"params": matrices, "peak": muon_lr}], lr=muon_lr, momentum=0.95,
                             weight_decay=weight_decay),
            torch.optim.AdamW([{"params": others, "peak": lr}], lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor on every learning rate: a linear rise, then a linear fall to 2 % at the last step."""
    return min((step + 1) / warmup, 1 - 0.98 * step / steps)


def fit(model: GPT, optimizers: list[torch.optim.Optimizer], train: Tensor, val: Tensor, steps: int, batch_size: int,
        eval_every: int, seed: int, first_step: int = 0, seconds: float = 0.0, forward: nn.Module | None = None,
        shard: slice = slice(None), warmup: int = 20, grad_clip: float = 1.0) -> Iterator[dict]:
    """Train on windows of train (N,); after every eval_every steps, and the last, evaluate on val and yield a row.

    A run that goes on begins at first_step, a multiple of eval_every, after so many seconds. forward: what computes the
    loss where model is wrapped; shard: the rows of each batch that this process takes.
    """
    B, T = batch_size, model.block_size
    stream, begun = islice(batches(train, T, B, seed), first_step, None), time.perf_counter() - seconds
    for start in range(first_step, steps, eval_every):
        losses, end = [], min(start + eval_every, steps)
        for step, (x, y) in zip(range(start, end), stream):  # x, y (B, T)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * schedule(step, steps, warmup)
                optimizer.zero_grad()
            loss = (forward or model)(x[shard], y[shard])  # ()
            loss.backward()
            ## One odd batch can have a huge gradient. Cut to length grad_clip (Pascanu et al. 2013), it costs one short
            ## step, not the run.
            nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.detach())
            if step % 10 == 9:  # looking at the loss makes a GPU wait, so not at every step
                utils.progress(step + 1, steps, begun, f"loss {loss.item():.3f}", "characters", B * T)
        train_loss = torch.stack(losses).mean().item()  # waits for a GPU to finish
        seconds = time.perf_counter() - begun
        figures = torch.tensor([train_loss, evaluate(model, val, T)], device=train.device)
        if dist.is_initialized():
            dist.all_reduce(figures.div_(dist.get_world_size()))  # the mean over all processes: all see the same
        train_loss, val_loss = figures.tolist()
        if not figures.isfinite().all():
            raise utils.InputError(f"the loss became {figures.sum():g} by step {end}; make lr and muon_lr smaller.")
        yield {"step": end, "seconds": seconds, "characters": end * B * T, "train_loss": train_loss,
               "val_loss": val_loss}
        begun = time.perf_counter() - seconds  # the clock stood still meanwhile


# ---------------------------------------------------------------------------------------------- main
PRESETS = {"small": dict(steps=3000, batch_size=8, block_size=256, n_layer=4, n_head=3, n_embd=192, dropout=0.0,
                         lr=2e-3, muon_lr=0.02, weight_decay=0.1)}
PRESETS["large"] = PRESETS["small"] | dict(steps=2000, batch_size=64, n_layer=6, n_head=6, n_embd=384, dropout=0.2)


def parse_options():
    """The options' values, the preset's where none was given."""
    parser = utils.parser(__doc__, __file__, "device", "dtype", "seed", "compile", "resume")  # --device, --seed, --out
    parser.epilog = "; ".join(f"--preset {name}: {', '.join(f'{k} {v}' for k, v in preset.items())}"
                              for name, preset in PRESETS.items())
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="small: for two CPU cores; large: for a GPU, 10.7 M "
        "parameters, each step over 40 times the arithmetic of small's; not yet timed on a GPU")
    add("--data", help="tinyshakespeare, pydocs or a text file; without it the first, or pydocs if out of reach")
    add("--steps", type=utils.count, help="updates; the learning rates fall to nearly zero at the last one")
    add("--batch-size", type=utils.count, help="windows per step; larger is steadier, and learns less per character")
    add("--block-size", type=utils.count, help="context: how far back the model looks; attention costs its square")
    add("--n-layer", type=utils.count, help="blocks: how many times information can move between positions")
    add("--n-head", type=utils.count, help="attention heads per block, each n_embd / n_head channels wide")
    add("--n-embd", type=utils.count, help="width C; parameters and time grow with its square")
    add("--dropout", type=utils.share, help="share of channels zeroed: against overfitting, slows learning")
    add("--lr", type=utils.positive, help="AdamW's peak learning rate, for embedding and head")
    add("--muon-lr", type=utils.positive, help="Muon's peak learning rate, for the matrices in the blocks")
    add("--weight-decay", type=utils.number(float, "[0, inf)"), help="Muon's: times muon_lr, the pull towards zero")
    add("--eval-every", type=utils.count, default=250, help="steps between evaluations on all of validation")
    add("--patience", type=utils.count, default=5, help="evaluations without a new best that end it (early stopping)")
    args = utils.parse_args(parser)
    vars(args).update({name: value for name, value in PRESETS[args.preset].items() if vars(args)[name] is None})
    return args


def report(args, data: Data, model: GPT, history: list[dict], best: dict, baselines: dict[str, float]) -> None:
    """Print and write what the best weights reach, beside baselines: name -> nats per character."""
    model.load_state_dict(utils.load_checkpoint(args.out / "model.pt", SCRIPT)["model"])  # the best, maybe not the last
    metrics = {"val_loss": best["val_loss"], "perplexity": math.exp(min(best["val_loss"], 700)),
               "bits_per_character": best["val_loss"] / math.log(2), "best_step": best["step"],
               "last_val_loss": history[-1]["val_loss"], **{f"{k}_val_loss": nats for k, nats in baselines.items()}}
    print(f"\n{'':24}nats per character   perplexity   bits per character   ({data.label}, validation)")
    for name, nats in (baselines | {f"GPT, step {best['step']}": best["val_loss"]}).items():
        print(f"{name:24}{nats:18.4f}{math.exp(min(nats, 700)):13.3f}{nats / math.log(2):21.4f}")
    if (simple := min(baselines, key=baselines.get)) and baselines[simple] < best["val_loss"]:
        print(f"the {simple} model is better here: try more --steps, or more text")
    print(f"{history[-1]['seconds']:.0f} s of training\n\nit writes:\n"
          f"{decode(generate(model, data.val[None, :1].to(args.device), 400)[0], data.vocab)}\n")
    utils.save_metrics(args, SCRIPT, data, model, metrics, history)
    utils.plot_history(args.out / "history.png", history, ["train_loss", "val_loss"],
                       f"A character GPT on {data.label}", y="nats per character")
    print(f"wrote model.pt, checkpoint.pt, metrics.json and history.png to {args.out}")
    utils.stand_in_notice(data.name, data.stand_in)


def main() -> None:
    ## Several processes: torchrun starts this script twice and tells each its rank. Each holds the whole model, takes
    ## its share of every batch, and averages its gradients with the others': the step of one process with all of it.
    ## Everything else each does as if it were alone, but only rank 0 prints and writes.
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)  # by utils.run
    args = parse_options()
    if args.batch_size % world:
        raise utils.InputError(f"--batch-size {args.batch_size} can't be shared evenly by {world} processes.")
    free = ("out", "device", "compile", "resume")
    options = {name: value for name, value in vars(args).items() if name not in free}
    saved = utils.load_checkpoint(args.out / "checkpoint.pt", SCRIPT, options) if args.resume else None
    data = load_data(args.data, args.block_size)
    train, val, vocab = data.train.to(args.device), data.val.to(args.device), data.vocab
    if saved and (saved["vocab"], saved["characters"]) != (vocab, len(train)):
        raise utils.InputError(f"--resume: {data.name} is not the text it was then; start anew without --resume.")

    torch.manual_seed(args.seed)
    config = {name: vars(args)[name] for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout")}
    config["vocab_size"] = len(vocab)
    model = GPT(**config).to(args.device)
    model.dtype = args.dtype
    optimizers = make_optimizers(model, args.lr, args.muon_lr, args.weight_decay)
    torch.manual_seed(args.seed + rank)  # all ranks have the same weights by now, and need different dropout
    first_step, history, best = 0, [], {"step": 0, "val_loss": math.inf}

    bigram, uniform = bigram_loss(data.train, data.val, len(vocab)), math.log(len(vocab))
    print(f"{data.label}: {len(train):,} characters to train on, {len(val):,} to validate on, {len(vocab)} distinct\n"
          f"{utils.count_parameters(model):,} parameters; {str(args.dtype)[6:]} on {args.device.type}; "
          f"{args.steps * args.batch_size * args.block_size / len(train):.1f} passes over the text")
    x, y = next(batches(data.train, args.block_size, 1, args.seed))
    print(f"a window:         {decode(x[0, :50], vocab)!r}\nits targets:      {decode(y[0, :50], vocab)!r}")
    ## The head starts small, so the first loss is close to ln V: all characters about equally likely. Anything else is
    ## a mistake in head or loss. A leak of targets into inputs shows later, as a loss too good to be true.
    print(f"before training:  loss {evaluate(model, val, args.block_size):.4f}; guessing uniformly, ln {len(vocab)}: "
          f"{uniform:.4f}; bigram: {bigram:.4f}\n"
          f"it writes:        {decode(generate(model, val[None, :1], 60)[0], vocab)!r}\n")
    if saved:
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        first_step, history, best = saved["step"], saved["history"], saved["best"]
        torch.set_rng_state(saved["random_state"] if rank == 0 else torch.get_rng_state())
    forward = torch.compile(model) if args.compile else model
    forward = nn.parallel.DistributedDataParallel(forward) if world > 1 else forward
    for row in fit(model, optimizers, train, val, args.steps, args.batch_size, args.eval_every, args.seed, first_step,
                   history[-1]["seconds"] if saved else 0.0, forward, slice(rank, None, world)):
        history.append(row)
        best = row if row["val_loss"] < best["val_loss"] else best
        stop = row["step"] - best["step"] >= args.patience * args.eval_every  # early stopping
        print("step {:5}  {:4.0f} s  {:,} characters  train {:.4f}  validation {:.4f}".format(*row.values()).ljust(79),
              flush=True)
        state = {"script": SCRIPT, "config": config, "vocab": vocab, "data": data.name, "stand_in": data.stand_in,
                 "torch": str(torch.__version__), "model": model.state_dict(), "metrics": best}
        if rank == 0:
            if best is row:
                utils.write_atomically(args.out / "model.pt", torch.save, state)
            utils.write_atomically(args.out / "checkpoint.pt", torch.save, state | {
                "options": options, "characters": len(train), "step": args.steps if stop else row["step"],
                "history": history, "best": best, "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "random_state": torch.get_rng_state()})  # of the CPU: on a GPU dropout goes on with other numbers
        if stop:
            break
    if rank == 0:
        report(args, data, model, history, best, {"uniform": uniform, "bigram": bigram})


## Try this, with --steps 500 --eval-every 500. Each was run once (seed 0, Tiny Shakespeare); as it is: 1.5833 in 47 s.
##   --batch-size 32 --steps 125 --eval-every 125   1.9660   the same text in four times larger batches: steps matter
##   --block-size 32 --batch-size 64                1.6410   it sees a line at most, and no longer who is speaking
##   --dropout 0.2                                  1.7402   nothing to prevent yet: one pass has no overfitting

if __name__ == "__main__":
    utils.run(main, go_on="--resume")
