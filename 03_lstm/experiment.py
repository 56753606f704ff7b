"""Change one thing at a time: how far back to look, what to normalise, which cell, how to say many steps.

You learn here: which of the choices in train.py matter and which do not; and that four months of validation can name
another winner than four months of test.

    python 03_lstm/experiment.py                           seven minutes on one core
    python 03_lstm/experiment.py --only lookback cell      only the rows whose names hold one of these words

You should see (ETTh1, three seeds, MSE 96 rows ahead): the base .689 ± .003 on validation, .423 ± .003 on test; with
256 units .640 and .362; a plain tanh .751 and .488. The whole table stands in this chapter's README.md.
Writes to outputs/: experiment.json, experiment.png. Left out on purpose: members. Every row is one net, without the
straight line at its side, smaller than train.py's (64 units), for two epochs, so that twenty rows take minutes.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from load import Data, load_data
from train import LINEAR_LOOKBACK, MODELS, LSTMForecaster, NLinear, SegmentGRU, evaluate, fit, repeat_last, set_dtype

# Shapes: N rows, B windows, T time steps looked back on (lookback), P predicted steps (horizon), C channels, M hidden
#         units; `segment` is the steps of a segment, `places` the segments to predict

SCRIPT = "03_lstm/experiment.py"
BASE = {"cell": "gru", "lookback": 720, "segment": 48, "hidden": 64, "norm": "last", "steps": "direct", "loss": "mae",
        "dropout": 0.5}

## One change at a time: (name, what changes against BASE). The first row is the base.
CHANGES = [
    ("base: GRU, lookback 720, segment 48", {}),
    ("lookback 24, segment 24", {"lookback": 24, "segment": 24}),
    ("lookback 96", {"lookback": 96}),
    ("lookback 192", {"lookback": 192}),
    ("lookback 336", {"lookback": 336}),
    ("normalisation off", {"norm": "none"}),
    ("normalisation: window mean", {"norm": "mean"}),
    ("normalisation: mean and deviation (RevIN)", {"norm": "revin"}),
    ("hidden 16", {"hidden": 16}),
    ("hidden 256", {"hidden": 256}),
    ("recursive: each segment from the one before", {"steps": "recursive"}),
    ("cell: LSTM", {"cell": "lstm"}),
    ("cell: plain tanh", {"cell": "tanh"}),
    ("cell: none, linear over the same 720 hours", {"cell": "linear"}),
    ("cell: LSTM over the last 96 hours, hourly", {"cell": "hours", "lookback": 96}),
    ("segment 12", {"segment": 12}),
    ("segment 24", {"segment": 24}),
    ("segment 120", {"segment": 120}),
    ("loss: squared error", {"loss": "mse"}),
    ("dropout 0", {"dropout": 0.0}),
]


# ---------------------------------------------------------------------------------------------- one model, all switches
class AnySegment(SegmentGRU):
    """train.py's SegmentGRU with the cell, and direct or recursive steps, as switches: (B, T, C) -> (B, P, C)."""

    def __init__(self, channels: int, horizon: int, recipe: dict):
        super().__init__(channels, recipe["lookback"], horizon, recipe["segment"], recipe["hidden"], recipe["dropout"],
                         recipe["norm"])
        self.recipe = recipe
        M = recipe["hidden"]
        if recipe["cell"] != "gru":
            self.rnn = nn.LSTM(M, M) if recipe["cell"] == "lstm" else nn.RNN(M, M)

    def predict(self, state: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """(B C, places, segment) from the cell's state after the window, (1, B C, M); of an LSTM h and c."""
        if self.recipe["cell"] == "gru" and self.recipe["steps"] == "direct":
            return super().predict(state)
        h = state[0] if self.recipe["cell"] == "lstm" else state  # (1, B C, M)
        places, C, M = len(self.place), len(self.channel), h.shape[-1]
        mask = self.dropout(torch.ones_like(h[0], dtype=self.dtype))  # (B C, M)
        if self.recipe["steps"] == "recursive":
            ## What was just said is read as the next segment: an error in the first day is the second's input.
            said = []
            for _ in range(places):
                said.append(self.out(state[0] * mask))  # (B C, segment)
                _, state = self.rnn(F.relu(self.embed(said[-1]))[None], state)
            return torch.stack(said, 1)
        p = [part.expand(C, places, M // 2) for part in (self.place, self.channel[:, None])]
        p = torch.cat(p, -1).to(self.dtype).repeat(h.shape[1] // C, 1, 1).view(1, -1, M)  # (1, B C places, M)
        h0 = h.repeat_interleave(places, 1)  # (1, B C places, M): every place starts from the same state
        h, _ = self.rnn(p, (h0, state[1].repeat_interleave(places, 1)) if self.recipe["cell"] == "lstm" else h0)
        return self.out(h.view(-1, places, M) * mask[:, None])


class Line(nn.Module):
    """NLinear as published, trained by gradients: T hours to P, the same for all channels, (B, T, C) -> (B, P, C)."""

    def __init__(self, lookback: int, horizon: int):
        super().__init__()
        self.out = nn.Linear(lookback, horizon)
        nn.init.constant_(self.out.weight, 1 / lookback)  # it starts as the window's mean
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        level = x[:, -1:]
        return self.out((x - level).mT).mT + level


def make(recipe: dict, channels: int, horizon: int) -> nn.Module:
    """The net of one row."""
    if recipe["cell"] == "linear":
        return Line(recipe["lookback"], horizon)
    if recipe["cell"] == "hours":
        return LSTMForecaster(channels, horizon, recipe["hidden"], recipe["dropout"], recipe["norm"])
    return AnySegment(channels, horizon, recipe)


# ---------------------------------------------------------------------------------------------- one run
def measure(recipe: dict, data: Data, longest: int, horizon: int, epochs: int, seed: int, device: torch.device,
            dtype: torch.dtype) -> dict:
    """Train one row's net from the start: its validation and test MSE, and seconds of training.

    data: read with lookback `longest`, of which the recipe may use less. All rows learn from forecasts that begin at
    the same hours, and are judged on the same ones.
    """
    torch.manual_seed(seed)
    T, base = recipe["lookback"], MODELS["segment"]
    train, val, test = (part[longest - T :].to(device) for part in (data.train, data.val, data.test))
    model = make(recipe, len(data.columns), horizon).to(device)
    set_dtype(model, dtype)
    with contextlib.redirect_stdout(io.StringIO()):  # the table needs no progress lines between its rows
        *_, row = fit(model, train, val, T, horizon, epochs, base["batch_size"], base["lr"], seed, recipe["loss"])
    return {"val_mse": row["val_mse"], "test_mse": evaluate(model, test, T, horizon)["mse"], "seconds": row["seconds"]}


def mean_std(runs: list[dict], key: str) -> tuple[float, float]:
    """Mean and standard deviation of a figure over runs; 0 for one run."""
    values = [run[key] for run in runs]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def main() -> None:
    parser = utils.parser(__doc__, __file__, "device", "dtype")
    add = parser.add_argument
    add("--data", help="etth1, station or a CSV file; without it ETTh1, or station if that is out of reach")
    add("--horizon", type=utils.count, default=96, help="rows to forecast")
    add("--epochs", type=utils.count, default=2, help="passes over the training windows for every row")
    add("--seeds", type=utils.count, default=3, help="runs per row, with seeds 0, 1, 2, ...")
    add("--hidden", type=utils.count, default=BASE["hidden"], help="hidden units of rows that do not name them")
    add("--only", nargs="+", metavar="WORD", help="only the rows whose names hold one of these words; without it all")
    args = utils.parse_args(parser)
    chosen = [(name, BASE | {"hidden": args.hidden} | change) for name, change in CHANGES
              if not args.only or any(word in name for word in args.only)]
    if not chosen:
        raise utils.InputError(f"--only {' '.join(args.only)}: no row's name holds that; there is: "
                               f"{'; '.join(name for name, _ in CHANGES)}.")
    longest = max(recipe["lookback"] for _, recipe in chosen)
    data = load_data(args.data, longest, args.horizon)
    naive, line = (evaluate(f, data.test, longest, args.horizon)["mse"] for f in (
        lambda x: repeat_last(x, args.horizon), NLinear(min(longest, LINEAR_LOOKBACK), args.horizon).fit(data.train)))
    ## Validation is what a choice may be made by. Test stands beside it to be read, and to see how far one season can
    ## be trusted to speak for another.
    print(f"{data.label}; {str(args.dtype)[6:]} on {args.device.type}; MSE {args.horizon} rows ahead, mean ± std of "
          f"{args.seeds} seeds, {args.epochs} epochs, {args.hidden} hidden units where the name has no other\n"
          f"repeat last, test: {naive:.4f}; NLinear, test: {line:.4f}\n"
          f"{'':46}{'validation':>17}{'test':>17}{'seconds':>9}", flush=True)
    rows = []
    for name, recipe in chosen:
        runs = [measure(recipe, data, longest, args.horizon, args.epochs, seed, args.device, args.dtype)
                for seed in range(args.seeds)]
        rows.append({"name": name, "recipe": recipe, "runs": runs})
        (val, val_std), (test, test_std) = (mean_std(runs, key) for key in ("val_mse", "test_mse"))
        print(f"{name:46}{val:8.4f} ± {val_std:.4f}{test:8.4f} ± {test_std:.4f}"
              f"{mean_std(runs, 'seconds')[0]:9.0f}", flush=True)
        table = json.dumps({"script": SCRIPT, "data": data.name, "stand_in": bool(data.stand_in), "nlinear": line,
                            "device": args.device.type, "dtype": str(args.dtype)[6:], "horizon": args.horizon,
                            "torch": str(torch.__version__), "epochs": args.epochs, "repeat_last": naive, "rows": rows},
                           indent=1)
        utils.write_atomically(args.out / "experiment.json", lambda file: file.write(table.encode()))

    figure, axes = utils.pyplot().subplots(figsize=(8, 0.35 * len(rows) + 1.2))
    for key, marker, color, offset in (("val_mse", "o", "C0", -0.12), ("test_mse", "s", "C1", 0.12)):
        for i, row in enumerate(rows):
            mean, std = mean_std(row["runs"], key)
            axes.errorbar(mean, i + offset, xerr=std, fmt=marker, color=color,
                          label=key.split("_")[0] if i == 0 else None)
    axes.axvline(line, color="black", lw=0.8, ls=":", label="NLinear, test")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set(title=f"One change at a time ({data.label}), {args.horizon} rows ahead", xlabel="MSE, scaled")
    axes.legend()
    utils.write_atomically(args.out / "experiment.png", figure.savefig)
    print(f"\nwrote experiment.json and experiment.png to {args.out}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
