"""Change one thing at a time: how far back to look, what to normalise, which cell, how to say many steps.

You learn here: which of the choices in train.py matter and which do not; and that four months of validation can name
another winner than four months of test.

    python 03_lstm/experiment.py
    python 03_lstm/experiment.py --rows lookback cell      only the rows whose names hold one of these words

You should see (ETTh1; seeds 0 to 2; torch 2.15, bfloat16; one core of an AMD EPYC; seven minutes), MSE 96 rows ahead,
mean ± standard deviation, and seconds of training (test: repeat last 1.294, NLinear .370):
                                                  validation       test            seconds
    base: GRU, lookback 720, segment 48           .689 ± .003      .423 ± .003     8
    lookback 24, segment 24                       .756 ± .002      .483 ± .001     3
    lookback 96                                   .713 ± .005      .432 ± .004     3
    lookback 192                                  .700 ± .004      .425 ± .004     4
    lookback 336                                  .693 ± .003      .425 ± .003     5
    normalisation off                             .746 ± .006      .433 ± .004     9
    normalisation: window mean                    .707 ± .004      .387 ± .002     8
    normalisation: mean and deviation (RevIN)     .709 ± .006      .380 ± .000     8
    hidden 16                                     .926 ± .006      .666 ± .008     4
    hidden 256                                    .640 ± .002      .362 ± .001    22
    recursive: each segment from the one before   .698 ± .000      .431 ± .001     6
    cell: LSTM                                    .686 ± .001      .419 ± .003     4
    cell: plain tanh                              .751 ± .008      .488 ± .007     3
    cell: none, linear over the same 720 hours    .694 ± .001      .365 ± .001     1
    cell: LSTM over the last 96 hours, hourly     .911 ± .018      .656 ± .016     3
    segment 12                                    .939 ± .015      .616 ± .008    15
    segment 24                                    .688 ± .005      .424 ± .001     9
    segment 120                                   .685 ± .002      .421 ± .001     4
    loss: squared error                           .684 ± .003      .417 ± .003     6
    dropout 0                                     .671 ± .002      .402 ± .002     6
Two passes are few, so that a row also says how fast its net learns: 16 units, segments of 12 hours and hourly steps
have not got far by then. Both parts agree on units, on longer lookbacks, and that GRU and LSTM are alike and a plain
tanh is worse. On a window's level they disagree: validation likes the last value, the test part mean and deviation. A
line over the same hours is level with the first row on validation and better on the test part; of the nets only that
with 256 units beats it on both.
Writes to outputs/: experiment.json, experiment.png.
Left out on purpose: members. Every row is one net, without the straight line at its side, so that nothing hides behind
an average. It is smaller than train.py's (64 units, not 128), is brought to the last value and learns for two epochs,
not three, so that twenty rows take minutes. The line and the hourly LSTM compute in float32. `recursive` has no
embeddings of place and channel: it reads what it said instead.
"""

import json
import math
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils  # noqa: E402
from load import Data, load_data, windows  # noqa: E402
from train import MODELS, NLinear, SegmentGRU, batches, evaluate, repeat_last, schedule, set_dtype  # noqa: E402
from train import LINEAR_LOOKBACK, LSTMForecaster, level_and_spread  # noqa: E402

# Shapes: N rows, B windows, T time steps looked back on (lookback), P predicted steps (horizon), C channels, M hidden
#         units, W time steps of a segment, S segments read, Q segments predicted

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

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        W, M, Q = self.segment, self.recipe["hidden"], len(self.place)
        if self.recipe["cell"] == "gru" and self.recipe["steps"] == "direct":
            return super().forward(x)
        level, spread = level_and_spread(x, self.norm)
        z = ((x - level) / spread)[:, T % W :]
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            z = z.mT.reshape(B * C, T // W, W).transpose(0, 1).to(self.dtype)  # (S, B C, W)
            _, state = self.rnn(F.relu(self.embed(z)))
            mask = self.dropout(torch.ones(B * C, M, device=x.device, dtype=self.dtype))
            if self.recipe["steps"] == "recursive":
                ## What was just said is read as the next segment: an error in the first day is the second's input.
                said = []
                for _ in range(Q):
                    h = state[0] if self.recipe["cell"] == "lstm" else state  # (1, B C, M)
                    said.append(self.out(h[0] * mask))  # (B C, W)
                    _, state = self.rnn(F.relu(self.embed(said[-1]))[None], state)
                y = torch.stack(said, 1)  # (B C, Q, W)
            else:
                p = torch.cat([self.place.expand(C, Q, M // 2), self.channel[:, None].expand(C, Q, M // 2)], -1)
                p = p.to(self.dtype).repeat(B, 1, 1).view(1, B * C * Q, M)
                repeat = lambda s: s.repeat_interleave(Q, 1)  # noqa: E731  (1, B C, M) -> (1, B C Q, M)
                h, _ = self.rnn(p, tuple(map(repeat, state)) if isinstance(state, tuple) else repeat(state))
                y = self.out(h[0].view(B * C, Q, M) * mask[:, None])  # (B C, Q, W)
        return y.float().view(B, C, Q * W)[..., : self.horizon].mT * spread + level


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
def run(recipe: dict, data: Data, longest: int, horizon: int, epochs: int, seed: int, device: torch.device,
        dtype: str) -> dict:
    """Train one row's net from the start: its validation and test MSE, and seconds of training.

    data: read with lookback `longest`, of which the recipe may use less. All rows learn from forecasts that begin at
    the same hours, and are judged on the same ones.
    """
    utils.set_seed(seed)
    T = recipe["lookback"]
    train, val, test = (part[longest - T :].to(device) for part in (data.train, data.val, data.test))
    model = make(recipe, len(data.columns), horizon).to(device)
    set_dtype(model, dtype)
    inputs, targets = windows(train, T, horizon)  # views
    optimizer = torch.optim.AdamW(model.parameters(), lr=MODELS["segment"]["lr"], weight_decay=0.0, fused=True)
    batch_size = MODELS["segment"]["batch_size"]
    steps, begun = epochs * math.ceil(len(inputs) / batch_size), time.perf_counter()
    for step, rows in zip(range(steps), batches(len(inputs), batch_size, seed)):
        optimizer.param_groups[0]["lr"] = MODELS["segment"]["lr"] * schedule(step, steps)
        model.train()
        error = model(inputs[rows.to(device)]) - targets[rows.to(device)]
        loss = (error.abs() if recipe["loss"] == "mae" else error.square()).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - begun
    return {"val_mse": evaluate(model, val, T, horizon)["mse"], "test_mse": evaluate(model, test, T, horizon)["mse"],
            "seconds": seconds}


def main() -> None:
    utils.keep_memory()
    parser = utils.parser(__doc__)
    add = parser.add_argument
    add("--data", help="etth1, station or a CSV file; without it ETTh1, or station if that is out of reach")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--horizon", type=int, default=96, help="rows to forecast")
    add("--epochs", type=int, default=2, help="passes over the training windows for every row")
    add("--seeds", type=int, default=3, help="runs per row, with seeds 0, 1, 2, ...")
    add("--hidden", type=int, default=BASE["hidden"], help="hidden units of every row that does not name them")
    add("--rows", nargs="+", metavar="WORD", help="only the rows whose names hold one of these words; without it all")
    add("--out", type=Path, default=Path(__file__).parent / "outputs", help="folder for table and plot")
    args = parser.parse_args()
    chosen = [(name, BASE | {"hidden": args.hidden} | change) for name, change in CHANGES
              if not args.rows or any(word in name for word in args.rows)]
    if not chosen:
        raise utils.InputError(f"--rows {' '.join(args.rows)}: no row's name holds that; there is: "
                               f"{'; '.join(name for name, _ in CHANGES)}.")
    utils.check(args, above_zero="horizon epochs seeds hidden")
    utils.check_writable(args.out)
    device = utils.pick_device(args.device)
    dtype = str(utils.pick_dtype(device)).removeprefix("torch.")
    longest = max(recipe["lookback"] for _, recipe in chosen)
    data = load_data(args.data, longest, args.horizon)
    label = data.name + ", stand-in" * data.stand_in
    naive, line = (evaluate(f, data.test, longest, args.horizon)["mse"] for f in (
        lambda x: repeat_last(x, args.horizon), NLinear(min(longest, LINEAR_LOOKBACK), args.horizon).fit(data.train)))
    ## Validation is what a choice may be made by. Test stands beside it to be read, and to see how far one season can
    ## be trusted to speak for another.
    print(f"{label}; {dtype} on {device.type}; MSE {args.horizon} rows ahead, mean ± std of {args.seeds} seeds, "
          f"{args.epochs} epochs, {args.hidden} hidden units where the name has no other\n"
          f"repeat last, test: {naive:.4f}; NLinear, test: {line:.4f}"
          + (f"; the best possible, test: {data.noise_floor:.4f}" if data.noise_floor is not None else "") + "\n"
          f"{'':46}{'validation':>17}{'test':>17}{'seconds':>9}", flush=True)
    rows = []
    for name, recipe in chosen:
        runs = [run(recipe, data, longest, args.horizon, args.epochs, seed, device, dtype)
                for seed in range(args.seeds)]
        rows.append({"name": name, "recipe": recipe, "runs": runs})
        (val, val_std), (test, test_std) = (utils.mean_std([r[key] for r in runs]) for key in ("val_mse", "test_mse"))
        print(f"{name:46}{val:8.4f} ± {val_std:.4f}{test:8.4f} ± {test_std:.4f}"
              f"{utils.mean_std([r['seconds'] for r in runs])[0]:9.0f}", flush=True)
        table = {"script": SCRIPT, "data": data.name, "stand_in": data.stand_in, "device": device.type, "dtype": dtype,
                 "torch": str(torch.__version__), "horizon": args.horizon, "epochs": args.epochs, "repeat_last": naive,
                 "nlinear": line, "noise_floor": data.noise_floor, "rows": rows}
        utils.write_atomically(args.out / "experiment.json", json.dumps(table, indent=1).encode())

    figure, axes = plt.subplots(figsize=(8, 0.35 * len(rows) + 1.2))
    for key, marker, color, offset in (("val_mse", "o", utils.COLORS[0], -0.12),
                                       ("test_mse", "s", utils.COLORS[1], 0.12)):
        for i, row in enumerate(rows):
            mean, std = utils.mean_std([r[key] for r in row["runs"]])
            axes.errorbar(mean, i + offset, xerr=std, fmt=marker, color=color,
                          label=key.split("_")[0] if i == 0 else None)
    axes.axvline(line, color="black", lw=0.8, ls=":", label="NLinear, test")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set(title=f"One change at a time ({label}), {args.horizon} rows ahead", xlabel="MSE, scaled")
    axes.legend()
    utils.save_figure(figure, args.out / "experiment.png")
    print(f"\nwrote experiment.json and experiment.png to {args.out}")
    if data.stand_in:
        utils.notice(f"STAND-IN: these figures are for {data.name}, not for ETTh1.")


if __name__ == "__main__":
    utils.run(main)
