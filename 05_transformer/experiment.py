"""What each ingredient of the GPT is worth: one change at a time, from the recipe of 2019 to train.py's.

You learn here: how to ablate. Every row adds one thing to the kept rows above it and is trained twice, on an equal
number of characters (what does it learn from the same text?) and for an equal time (is that worth what it costs?).

    python 05_transformer/experiment.py                               about 40 minutes on two CPU cores
    python 05_transformer/experiment.py --rows squared context        only the rows whose names hold one of these words

You should see (Tiny Shakespeare, seeds 0 to 2, two cores of an AMD EPYC, torch 2.15, nats per character on validation):
                                          characters/s   after 500,000 characters      after 30 s
    2019 recipe                                 35,100              2.082 ± 0.011   1.882 ± 0.009
    + rotary positions                          31,200              2.019 ± 0.010   1.892 ± 0.011
    + RMSNorm, also after embedding             29,600              1.987 ± 0.009   1.869 ± 0.008   not kept
    + norm without gain, ditto                  32,500              1.990 ± 0.003   1.850 ± 0.018
    + QK-norm                                   31,200              1.943 ± 0.007   1.795 ± 0.006
    + Muon                                      22,600              1.792 ± 0.004   1.705 ± 0.011
    + token shift                               22,200              1.781 ± 0.002   1.700 ± 0.011
    + embeddings start at 1, not 0.02           22,000              1.804 ± 0.005   1.719 ± 0.013   not kept
    + zero-initialised projections              22,300              1.793 ± 0.005   1.707 ± 0.010   not kept
and from a second run, on a faster hour of the same machine, so that the last column can't be compared with the above:
    + ReLU squared                              25,200              1.753 ± 0.004   1.655 ± 0.010
    + context 128                               24,500              1.757 ± 0.008   1.655 ± 0.004
    + context 256                               23,100              1.772 ± 0.005   1.663 ± 0.008
    + dropout 0.1                               18,400              1.855 ± 0.006   1.824 ± 0.009   not kept
Rotary positions lose by the clock what they win by the character: kept. Long contexts don't pay within 30 s, and do
within the five minutes that train.py takes: 1.409 there against 1.422 in the same time with
--block-size 128 --batch-size 16 --steps 3170 (seed 0).
Writes to outputs/: experiment.json, experiment.png. Left out on purpose: searching a learning rate for every row; all
AdamW rows share one and all Muon rows share one.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils  # noqa: E402
from load import Data, batches, load_data  # noqa: E402
from train import GPT, PRESETS, Attention, Block, attend, evaluate  # noqa: E402
from train import make_optimizers, norm, rotate, schedule  # noqa: E402

# Shapes: B batch, T time, C channels (n_embd), H heads, D channels per head (C = H * D), V vocabulary

SCRIPT = "05_transformer/experiment.py"
SIZES = {name: PRESETS["small"][name] for name in ("n_layer", "n_head", "n_embd")}  # the same in every row
CHARACTERS_PER_STEP = PRESETS["small"]["batch_size"] * PRESETS["small"]["block_size"]
ADAMW_LR = 4e-3  # best of 1e-3, 2e-3 and 4e-3 for the 2019 recipe: 2.187, 2.067, 2.036 after 290 steps (seed 0)

## The recipe of GPT-2 (Radford et al. 2019) without its biases and tied head, at the context of nanoGPT's CPU example.
BASE = {"positions": "learned", "norm": "layer", "qk_norm": False, "optimizer": "adamw", "shift": False,
        "embedding_std": 0.02, "zero_init": False, "activation": "gelu", "block_size": 64, "dropout": 0.0}

## One change at a time: (name, source, what changes, kept). A change that is kept is part of every later row; one that
## is not was tried on top of the rows above it, lost, and stays in the table all the same.
CHANGES = [
    ("rotary positions", "Su et al. 2021", {"positions": "rotary"}, True),
    ("RMSNorm, also after embedding", "Zhang & Sennrich 2019", {"norm": "rms"}, False),
    ("norm without gain, also after embedding", "Xu et al. 2019", {"norm": "plain"}, True),
    ("QK-norm", "Henry et al. 2020", {"qk_norm": True}, True),
    ("Muon", "Jordan et al. 2024", {"optimizer": "muon"}, True),
    ("token shift", "Peng et al. 2023", {"shift": True}, True),
    ("embeddings start at 1, not 0.02", "", {"embedding_std": 1.0}, False),
    ("zero-initialised projections", "Zhang et al. 2019", {"zero_init": True}, False),
    ("ReLU squared", "So et al. 2021", {"activation": "relu2"}, True),
    ("context 128", "", {"block_size": 128}, True),
    ("context 256", "", {"block_size": 256}, True),
    ("dropout 0.1", "Srivastava et al. 2014", {"dropout": 0.1}, False),
]


# ---------------------------------------------------------------------------------------------- one model, all switches
class AnyNorm(nn.Module):
    """Layer norm with gain and bias, train.py's norm without, or RMSNorm: any shape -> same shape."""

    def __init__(self, n_embd: int, kind: str):
        super().__init__()
        self.kind = kind
        if kind == "layer":
            self.gain, self.bias = nn.Parameter(torch.ones(n_embd)), nn.Parameter(torch.zeros(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            return F.rms_norm(x, x.shape[-1:])  # divides by the root of the mean square, without subtracting the mean
        return F.layer_norm(x, x.shape[-1:], self.gain, self.bias) if self.kind == "layer" else norm(x)


class AnyAttention(Attention):
    """train.py's attention, with rotary positions and QK-norm as switches: (B, T, C) -> (B, T, C)."""

    def __init__(self, recipe: dict):
        super().__init__(SIZES["n_embd"], SIZES["n_head"])
        self.recipe = recipe

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        qk = qkv[:, :, :2]  # (B, T, 2, H, D)
        qk = norm(qk) if self.recipe["qk_norm"] else qk
        qk = rotate(qk, cos, sin) if self.recipe["positions"] == "rotary" else qk
        q, k = qk.to(qkv.dtype).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y, _ = attend(q, k, qkv[:, :, 2].transpose(1, 2), keep_weights=False)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class AnyBlock(Block):
    """train.py's block, with norm, activation and initialisation as switches: (B, T, C) -> (B, T, C)."""

    def __init__(self, recipe: dict):
        super().__init__(SIZES["n_embd"], SIZES["n_head"], recipe["dropout"])
        self.recipe, self.attention = recipe, AnyAttention(recipe)
        self.norm1, self.norm2 = (AnyNorm(SIZES["n_embd"], recipe["norm"]) for _ in range(2))
        for linear in (self.attention.out, self.down):  # those that write to the residual path
            std = 0.0 if recipe["zero_init"] else 0.02 / math.sqrt(2 * SIZES["n_layer"])
            nn.init.normal_(linear.weight, std=std)
        if not recipe["zero_init"]:  # otherwise they start as nn.Linear has them, up to 1 / sqrt(inputs)
            for linear in (self.attention.qkv, self.up):
                nn.init.normal_(linear.weight, std=0.02)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), cos, sin))
        h = self.up(self.norm2(x))  # (B, T, 4C)
        h = F.relu(h).square() if self.recipe["activation"] == "relu2" else F.gelu(h)
        return x + self.dropout(self.down(h))


class AnyGPT(GPT):
    """train.py's GPT with a recipe's entries as switches; with the switches at train.py's settings it is the same."""

    def __init__(self, vocab_size: int, recipe: dict):
        super().__init__(vocab_size, recipe["block_size"], **SIZES, dropout=recipe["dropout"])
        self.recipe = recipe
        self.blocks = nn.ModuleList(AnyBlock(recipe) for _ in range(SIZES["n_layer"]))
        self.last_norm = AnyNorm(SIZES["n_embd"], recipe["norm"])
        ## GPT-2 has no norm right after the embedding. Embeddings that start at 0.02 need none; larger ones do.
        self.first_norm = nn.Identity() if recipe["norm"] == "layer" else AnyNorm(SIZES["n_embd"], recipe["norm"])
        if recipe["positions"] == "learned":
            self.positions = nn.Embedding(recipe["block_size"], SIZES["n_embd"])
            nn.init.normal_(self.positions.weight, std=0.02)
        if not recipe["shift"]:
            del self.shift
        nn.init.normal_(self.characters.weight, std=recipe["embedding_std"])
        nn.init.normal_(self.head.weight, std=0.0 if recipe["zero_init"] else 0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.characters(ids)  # (B, T, C)
        if self.recipe["shift"]:
            x = x + self.shift * F.pad(x, (0, 0, 1, 0))[:, :-1]
        if self.recipe["positions"] == "learned":
            x = x + self.positions.weight[: ids.shape[1]]
        x = self.first_norm(x)
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            x = self.dropout(x.to(self.dtype))
            for block in self.blocks:
                x = block(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
            logits = self.head(self.last_norm(x)).float()  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def any_optimizers(model: AnyGPT, recipe: dict) -> list[torch.optim.Optimizer]:
    """train.py's pair, or AdamW for everything, with weight decay on the matrices alone as in nanoGPT."""
    if recipe["optimizer"] == "muon":
        return make_optimizers(model, **{name: PRESETS["small"][name] for name in ("lr", "muon_lr", "weight_decay")})
    matrices, others = ([p for p in model.parameters() if (p.dim() >= 2) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=ADAMW_LR, betas=(0.9, 0.99), fused=True)]


# ---------------------------------------------------------------------------------------------- one run
def start(recipe: dict, data: Data, device: torch.device, dtype: torch.dtype, seed: int, steps: int):
    """A new model, and a generator that trains it, one step of `steps` each time it is asked for the loss."""
    utils.set_seed(seed)
    model = AnyGPT(len(data.vocab), recipe).to(device)
    model.dtype = dtype
    return model, training(model, recipe, data.train.to(device), seed, steps)


def training(model: AnyGPT, recipe: dict, text: Tensor, seed: int, steps: int) -> Iterator[Tensor]:
    """Yield the loss of each step, while training model on text (N,)."""
    optimizers = any_optimizers(model, recipe)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    stream = batches(text, recipe["block_size"], CHARACTERS_PER_STEP // recipe["block_size"], seed)
    for step, (x, y) in enumerate(islice(stream, steps)):
        for optimizer, lrs in zip(optimizers, peaks):
            for group, lr in zip(optimizer.param_groups, lrs):
                group["lr"] = lr * schedule(step, steps, 20)
        loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        yield loss.detach()


def run(recipe: dict, data: Data, device: torch.device, dtype: torch.dtype, seed: int, steps: int) -> float:
    """Train one recipe from the start for `steps` steps: its whole-validation loss, in nats per character."""
    model, losses = start(recipe, data, device, dtype, seed, steps)
    for _ in losses:
        pass
    return evaluate(model, data.val.to(device), recipe["block_size"])


def speeds(all_recipes: list[dict], data: Data, device: torch.device, dtype: torch.dtype, steps: int) -> list[float]:
    """Characters per second of training for each recipe: the median of 9 turns of some steps each.

    ## A laptop gets warm and a shared machine gets busy: timed one after the other, the last would look slow. So they
    ## take turns, and what slows one slows all.
    """
    running = [start(recipe, data, device, dtype, 0, 10 * steps)[1] for recipe in all_recipes]
    turns = []
    for _ in range(10):
        turns.append([])
        for losses in running:
            begun = time.perf_counter()
            for loss in islice(losses, steps):
                pass
            loss.item()  # a GPU works ahead: wait for it before reading the clock
            turns[-1].append(steps * CHARACTERS_PER_STEP / (time.perf_counter() - begun))
    return [statistics.median(turn) for turn in zip(*turns[1:])]  # the first turn pays for what is done only once


def recipes() -> list[tuple[str, str, dict, bool]]:
    """(name, source, whole recipe, kept) of every row: each change on top of the kept ones before it."""
    rows, current = [("2019 recipe", "Radford et al. 2019", BASE, True)], BASE
    for name, source, change, kept in CHANGES:
        rows.append((f"+ {name}", source, current | change, kept))
        current = current | change if kept else current
    return rows


def main() -> None:
    utils.keep_memory()
    parser = utils.parser(__doc__)
    add = parser.add_argument
    add("--data", help="tinyshakespeare, pydocs or a text file; without it the first, or pydocs if that is out of "
        "reach")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--seeds", type=int, default=3, help="runs per row and budget, with seeds 0, 1, 2, ...")
    add("--seconds", type=float, default=30, help="the equal wall-clock: training time of each run")
    add("--characters", type=int, default=500_000, help="the equal number of characters that each run reads")
    add("--rows", nargs="+", metavar="WORD", help="only the rows whose names hold one of these words; without it all")
    add("--out", type=Path, default=Path(__file__).parent / "outputs", help="folder for table and plot")
    args = parser.parse_args()
    chosen = [row for row in recipes() if not args.rows or any(word in row[0] for word in args.rows)]
    if not chosen:
        raise utils.InputError(f"--rows {' '.join(args.rows)}: no row's name holds that; there is: "
                               f"{'; '.join(row[0] for row in recipes())}.")
    utils.check(args, above_zero="seeds seconds")
    if args.characters < CHARACTERS_PER_STEP:
        raise utils.InputError(f"--characters {args.characters} must be at least {CHARACTERS_PER_STEP}, one step's.")
    utils.check_writable(args.out)
    device = utils.pick_device(args.device)
    dtype = utils.pick_dtype(device)
    precision = str(dtype).removeprefix("torch.")
    data = load_data(args.data, max(change.get("block_size", 0) for _, _, change, _ in CHANGES))
    label = data.name + ", stand-in" * data.stand_in
    print(f"{label}; {precision} on {device.type}; whole-validation loss in nats per character, mean ± std of "
          f"{args.seeds} seeds\n{'':56}characters/s   after {args.characters:,} characters   after {args.seconds:g} s")

    ## Equal wall-clock: as many steps as a recipe makes in the given seconds, by its speed beside the others'. The
    ## learning rate falls to nearly zero in every run, so none is cut off in the middle of its schedule.
    steps = max(1, args.characters // CHARACTERS_PER_STEP // 50)
    rows, per_second = [], speeds([recipe for _, _, recipe, _ in chosen], data, device, dtype, steps)
    for (name, source, recipe, kept), speed in zip(chosen, per_second):
        by_characters, by_seconds = (
            [run(recipe, data, device, dtype, seed, max(1, round(characters / CHARACTERS_PER_STEP)))
             for seed in range(args.seeds)] for characters in (args.characters, args.seconds * speed))
        rows.append({"name": name, "source": source, "kept": kept, "recipe": recipe, "characters_per_second": speed,
                     "by_characters": by_characters, "by_seconds": by_seconds})
        means = [utils.mean_std(rows[-1][key]) for key in ("by_characters", "by_seconds")]
        print(f"{name + '  (not kept)' * (not kept):56}{speed:12,.0f}"
              + "".join(f"{mean:15.4f} ± {std:.4f}" for mean, std in means), flush=True)
        table = {"script": SCRIPT, "data": data.name, "stand_in": data.stand_in, "device": device.type,
                 "dtype": precision, "torch": str(torch.__version__), "characters": args.characters,
                 "seconds": args.seconds, "rows": rows}
        utils.write_atomically(args.out / "experiment.json", json.dumps(table, indent=1).encode())

    figure, axes = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.2))
    for key, marker, color, offset, text in (
            ("by_characters", "o", utils.COLORS[0], -0.12, f"after {args.characters:,} characters"),
            ("by_seconds", "s", utils.COLORS[1], 0.12, f"after {args.seconds:g} s of training")):
        for i, row in enumerate(rows):
            mean, std = utils.mean_std(row[key])
            axes.errorbar(mean, i + offset, xerr=std, fmt=marker, color=color, mfc=color if row["kept"] else "white",
                          label=text if i == 0 else None)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set(title=f"One change at a time ({label}); hollow: not kept", xlabel="validation loss, nats per character")
    axes.legend()
    utils.save_figure(figure, args.out / "experiment.png")
    print(f"\nwrote experiment.json and experiment.png to {args.out}")
    if data.stand_in:
        utils.notice(f"STAND-IN: these figures are for {data.name}, not for Tiny Shakespeare.")


if __name__ == "__main__":
    utils.run(main)
