"""How chapter 03's default was chosen: each candidate's validation error at five starting points, the test part unread.

    python tests/seasons.py                                  some forty minutes on one core
    python tests/seasons.py --horizons 96 --seasons 0        one of twenty parts, two minutes

A "season" is train.py's --earlier: all parts of ETTh1 end so many rows earlier; the five lie a month apart. A candidate
is the mean of one or two nets and one line; its score the geometric mean of its validation MSE over seasons and
horizons. 03_lstm/train.py tells above its MODELS what came out. pytest does not collect this file.
"""

import argparse
import itertools
import math

import torch
import torch.nn as nn
from conftest import chapter

import utils

load, train, experiment = chapter("03_lstm", "load", "train", "experiment")
EPOCHS, RECIPE = 3, train.MODELS["segment"]
# What is trained side by side from one seed: (nets, as name -> what differs from train.py's; a line's name; the loss)
GROUPS = [({"revin": {"norm": "revin"}, "last": {"norm": "last"}}, "trained line", "mae"),
          ({"revin, dropout 0.7": {"norm": "revin", "dropout": 0.7}}, None, "mae"),
          ({"revin, squared error": {"norm": "revin"}}, "line, squared error", "mse"),
          ({"revin, segment 24": {"norm": "revin", "segment": 24}}, None, "mae")]
EXACT = "exact line"


def members(horizon: int, earlier: int) -> tuple[dict[str, nn.Module], load.Data]:
    """Every net and line by name, trained on one season for one horizon, and that season's data."""
    T, batch = RECIPE["lookback"], RECIPE["batch_size"]
    data = load.load_data("etth1", T, horizon, earlier)
    inputs, targets = load.windows(data.train, T, horizon)
    steps = EPOCHS * math.ceil(len(inputs) / batch)
    found = {EXACT: train.NLinear(train.LINEAR_LOOKBACK, horizon).fit(data.train)}
    for nets, line, loss_name in GROUPS:
        utils.set_seed(0)
        base = {"channels": inputs.shape[2], "lookback": T, "horizon": horizon, "segment": RECIPE["segment"],
                "hidden": RECIPE["hidden"], "dropout": RECIPE["dropout"]}
        group = nn.ModuleList([train.SegmentGRU(**(base | change)) for change in nets.values()])
        if line:
            group.append(experiment.Line(T, horizon))
        train.set_dtype(group, str(utils.pick_dtype(torch.device("cpu"))).removeprefix("torch."))
        optimizer = torch.optim.AdamW(group.parameters(), lr=RECIPE["lr"], weight_decay=0.0, fused=True)
        for step, rows in zip(range(steps), train.batches(len(inputs), batch, 0)):
            optimizer.param_groups[0]["lr"] = RECIPE["lr"] * train.schedule(step, steps)
            error = torch.stack([member(inputs[rows]) for member in group]) - targets[rows]
            optimizer.zero_grad()
            (error.abs() if loss_name == "mae" else error.square()).mean((1, 2, 3)).sum().backward()
            for member in group:
                nn.utils.clip_grad_norm_(member.parameters(), 1.0)
            optimizer.step()
        found |= dict(zip([*nets, line] if line else nets, group.eval()))
    return found, data


@torch.no_grad()
def errors(found: dict[str, nn.Module], data: load.Data, horizon: int) -> torch.Tensor:
    """G (E, E): mean products of each two members' errors on validation. The MSE of members' mean is the mean of G."""
    G, n = torch.zeros(len(found), len(found), dtype=torch.float64), 0
    for x, y in zip(*(side.split(128) for side in load.windows(data.val, RECIPE["lookback"], horizon))):
        error = torch.stack([(member(x) - y).flatten() for member in found.values()])
        G, n = G + (error @ error.T).double(), n + y.numel()
    return G / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--horizons", type=int, nargs="+", default=[96, 192, 336, 720])
    parser.add_argument("--seasons", type=int, nargs="+", default=[0, 720, 1440, 2160, 2880])
    args = parser.parse_args()
    utils.keep_memory()
    parts = []
    for horizon, earlier in itertools.product(args.horizons, args.seasons):
        found, data = members(horizon, earlier)
        parts.append(errors(found, data, horizon))
        alone = ", ".join(f"{name} {mse:.4f}" for name, mse in zip(found, parts[-1].diag()))
        print(f"{horizon} rows ahead, {earlier} earlier: {alone}", flush=True)
    names = list(found)
    lines = [name for name in names if "line" in name]
    nets = [name for name in names if name not in lines]
    candidates = [(*some, line) for k in (1, 2) for some in itertools.combinations(nets, k) for line in lines]
    score = {}
    for candidate in candidates + [(name,) for name in names]:
        rows = [names.index(name) for name in candidate]
        score[candidate] = math.exp(sum(G[rows][:, rows].mean().log().item() for G in parts) / len(parts))
    print("\ngeometric mean of the validation MSE")
    for candidate in sorted(score, key=score.get):
        print(f"{score[candidate]:.4f}  {' + '.join(candidate)}")


if __name__ == "__main__":
    utils.run(main)
