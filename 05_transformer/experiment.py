"""What each ingredient of the GPT is worth: one change at a time, from the recipe of 2019 to train.py's.

You learn here: how to ablate. Every row adds one thing to the kept rows above it and is trained twice, on an equal
number of characters (what does it learn from the same text?) and for an equal time (is that worth what it costs?).

    python 05_transformer/experiment.py                               about 40 minutes on two CPU cores
    python 05_transformer/experiment.py --only squared context        only the rows whose names hold one of these words

You should see (Tiny Shakespeare, three seeds, nats per character after 500,000 characters of training): 2.08 ± 0.01 by
the recipe of 2019, 1.77 ± 0.01 with all that was kept. The whole table stands in this chapter's README.md.
Writes to outputs/: experiment.json, experiment.png. Left out on purpose: searching a learning rate for every row; all
AdamW rows share one and all Muon rows share one.
"""

import contextlib
import functools
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from load import Data, load_data
from train import GPT, PRESETS, Attention, Block, attend, fit, make_optimizers, norm, rotate

# Shapes: B batch, T time, C channels (n_embd), A heads, D channels per head (C = A * D), V vocabulary

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
NORMS = {"layer": nn.LayerNorm, "plain": functools.partial(nn.LayerNorm, elementwise_affine=False),
         "rms": functools.partial(nn.RMSNorm, elementwise_affine=False)}  # without subtracting the mean


class AnyAttention(Attention):
    """train.py's attention, with rotary positions and QK-norm as switches: (B, T, C) -> (B, T, C)."""

    def __init__(self, recipe: dict):
        super().__init__(SIZES["n_embd"], SIZES["n_head"])
        self.recipe = recipe

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        qk = qkv[:, :, :2]  # (B, T, 2, A, D)
        qk = norm(qk) if self.recipe["qk_norm"] else qk
        qk = rotate(qk, cos, sin) if self.recipe["positions"] == "rotary" else qk
        q, k = qk.to(qkv.dtype).permute(2, 0, 3, 1, 4)  # (B, A, T, D) each
        y, _ = attend(q, k, qkv[:, :, 2].transpose(1, 2), keep_weights=False)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class AnyBlock(Block):
    """train.py's block, with norm, activation and initialisation as switches: (B, T, C) -> (B, T, C)."""

    def __init__(self, recipe: dict):
        super().__init__(SIZES["n_embd"], SIZES["n_head"], recipe["dropout"])
        self.recipe, self.attention = recipe, AnyAttention(recipe)
        self.norm1, self.norm2 = (NORMS[recipe["norm"]](SIZES["n_embd"]) for _ in range(2))
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
        self.last_norm = NORMS[recipe["norm"]](SIZES["n_embd"])
        ## GPT-2 has no norm right after the embedding. Embeddings that start at 0.02 need none; larger ones do.
        self.first_norm = nn.Identity() if recipe["norm"] == "layer" else NORMS[recipe["norm"]](SIZES["n_embd"])
        if recipe["positions"] == "learned":
            self.positions = nn.Embedding(recipe["block_size"], SIZES["n_embd"])
            nn.init.normal_(self.positions.weight, std=0.02)
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
    groups = [{"params": matrices, "peak": ADAMW_LR, "weight_decay": 0.1},
              {"params": others, "peak": ADAMW_LR, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=ADAMW_LR, betas=(0.9, 0.99), fused=True)]


# ---------------------------------------------------------------------------------------------- runs
def start(recipe: dict, data: Data, val: Tensor, device: torch.device, dtype: torch.dtype, seed: int, steps: int,
          eval_every: int) -> Iterator[dict]:
    """train.py's fit on a new model: it trains, and yields a row of figures after every eval_every steps."""
    torch.manual_seed(seed)
    model = AnyGPT(len(data.vocab), recipe).to(device)
    model.dtype = dtype
    return fit(model, any_optimizers(model, recipe), data.train.to(device), val.to(device), steps,
               CHARACTERS_PER_STEP // recipe["block_size"], eval_every, seed)


def final_loss(recipe: dict, data: Data, device: torch.device, dtype: torch.dtype, seed: int, steps: int) -> float:
    """Train one recipe from the start for `steps` steps: its whole-validation loss, in nats per character."""
    with contextlib.redirect_stdout(io.StringIO()):  # the table needs no progress lines between its rows
        *_, row = start(recipe, data, data.val, device, dtype, seed, steps, steps)
    return row["val_loss"]


def speeds(all_recipes: list[dict], data: Data, device: torch.device, dtype: torch.dtype, steps: int) -> list[float]:
    """Characters per second of training for each recipe: the median of 9 turns of some steps each.

    ## A laptop gets warm and a shared machine gets busy: timed one after the other, the last would look slow. So they
    ## take turns, and what slows one slows all. The clock of a row stands still while others run, and in evaluations.
    """
    running = [start(recipe, data, data.val[: recipe["block_size"] + 1], device, dtype, 0, 10 * steps, steps)
               for recipe in all_recipes]
    with contextlib.redirect_stdout(io.StringIO()):
        clocks = [[next(rows)["seconds"] for rows in running] for _ in range(10)]
    turns = [[steps * CHARACTERS_PER_STEP / (after - before) for before, after in zip(*pair)]
             for pair in zip(clocks, clocks[1:])]  # without the first turn, which pays for what is done only once
    return np.median(turns, 0).tolist()


def recipes() -> list[tuple[str, str, dict]]:
    """(name, source, whole recipe) of every row: each change on top of the kept ones before it."""
    rows, current = [("2019 recipe", "Radford et al. 2019", BASE)], BASE
    for name, source, change, kept in CHANGES:
        rows.append((f"+ {name}" + "  (not kept)" * (not kept), source, current | change))
        current = current | change if kept else current
    return rows


def spread(losses: list[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample; 0 for one value."""
    return float(np.mean(losses)), float(np.std(losses, ddof=1)) if len(losses) > 1 else 0.0


def main() -> None:
    parser = utils.parser(__doc__, __file__, "device", "dtype")
    add = parser.add_argument
    add("--data", help="tinyshakespeare, pydocs or a text file; without it the first, or pydocs if out of reach")
    add("--seeds", type=utils.count, default=3, help="runs per row and budget, with seeds 0, 1, 2, ...")
    add("--seconds", type=utils.positive, default=30, help="the equal wall-clock: training time of each run")
    add("--characters", type=utils.number(int, f"[{CHARACTERS_PER_STEP}, inf)"), default=500_000,
        help="the equal number of characters that each run reads; one step is the least")
    add("--only", nargs="+", metavar="WORD", help="only the rows whose names hold one of these words; without it all")
    args = utils.parse_args(parser)
    chosen = [row for row in recipes() if not args.only or any(word in row[0] for word in args.only)]
    if not chosen:
        raise utils.InputError(f"--only {' '.join(args.only)}: no row's name holds that; see README.md for the names.")
    data = load_data(args.data, max(change.get("block_size", 0) for _, _, change, _ in CHANGES))
    print(f"{data.label}; {str(args.dtype)[6:]} on {args.device.type}; whole-validation loss in nats per character, "
          f"mean ± std of {args.seeds} seeds\n{'':56}characters/s   after {args.characters:,} characters   "
          f"after {args.seconds:g} s")

    ## Equal wall-clock: as many steps as a recipe makes in the given seconds, by its speed beside the others'. The
    ## learning rate falls to nearly zero in every run, so none is cut off in the middle of its schedule.
    steps = max(1, args.characters // CHARACTERS_PER_STEP // 50)
    rows, per_second = [], speeds([recipe for _, _, recipe in chosen], data, args.device, args.dtype, steps)
    for (name, source, recipe), speed in zip(chosen, per_second):
        by_characters, by_seconds = (
            [final_loss(recipe, data, args.device, args.dtype, seed, max(1, round(characters / CHARACTERS_PER_STEP)))
             for seed in range(args.seeds)] for characters in (args.characters, args.seconds * speed))
        rows.append({"name": name, "source": source, "recipe": recipe, "characters_per_second": speed,
                     "by_characters": by_characters, "by_seconds": by_seconds})
        means = [spread(rows[-1][key]) for key in ("by_characters", "by_seconds")]
        print(f"{name:56}{speed:12,.0f}"
              + "".join(f"{mean:15.4f} ± {std:.4f}" for mean, std in means), flush=True)
        table = json.dumps({"script": SCRIPT, "data": data.label, "device": args.device.type, "dtype": str(args.dtype),
                            "torch": str(torch.__version__), "options": sys.argv[1:], "rows": rows}, indent=1)
        utils.write_atomically(args.out / "experiment.json", lambda file: file.write(table.encode()))

    figure, axes = utils.pyplot().subplots(figsize=(8, 0.45 * len(rows) + 1.2))
    for key, text in (("by_characters", f"{args.characters:,} characters"), ("by_seconds", f"{args.seconds:g} s")):
        means, stds = zip(*(spread(row[key]) for row in rows))
        axes.errorbar(means, range(len(rows)), xerr=stds, fmt="o", label=f"after {text}")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set(title=f"One change at a time ({data.label})", xlabel="validation loss, nats per character")
    axes.legend()
    utils.write_atomically(args.out / "experiment.png", figure.savefig)
    print(f"\nwrote experiment.json and experiment.png to {args.out}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
