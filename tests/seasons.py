"""How chapter 03's default was chosen: each candidate's validation error at five starting points, the test part unread.

    python tests/seasons.py                                  some forty minutes on one core
    python tests/seasons.py --horizons 96 --seasons 0        one of twenty parts, two minutes

A "season" is train.py's --earlier: all parts of ETTh1 end so many rows earlier; the five lie a month apart. A candidate
is the mean of one or two nets and one line; its score the geometric mean of its validation MSE over seasons and
horizons. 03_lstm/README.md tells what came out. pytest does not collect this file.
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


class Members(nn.Module):
    """Nets and lines that train.fit trains side by side, each by itself; as a forecaster, their mean."""

    def __init__(self, nets: list[nn.Module]):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([net(x) for net in self.nets]).mean(0)


def members(horizon: int, earlier: int) -> tuple[dict[str, nn.Module], load.Data]:
    """Every net and line by name, trained on one season for one horizon, and that season's data."""
    T = RECIPE["lookback"]
    data = load.load_data("etth1", T, horizon, earlier)
    found = {EXACT: train.NLinear(train.LINEAR_LOOKBACK, horizon).fit(data.train)}
    for nets, line, loss_name in GROUPS:
        torch.manual_seed(0)
        base = {"channels": len(data.columns), "lookback": T, "horizon": horizon, "segment": RECIPE["segment"],
                "hidden": RECIPE["hidden"], "dropout": RECIPE["dropout"]}
        group = [train.SegmentGRU(**(base | change)) for change in nets.values()]
        group = Members(group + ([experiment.Line(T, horizon)] if line else []))
        train.set_dtype(group, utils.pick_dtype(torch.device("cpu")))
        for _ in train.fit(group, data.train, data.val, T, horizon, EPOCHS, RECIPE["batch_size"], RECIPE["lr"], 0,
                           loss_name):
            pass
        found |= dict(zip([*nets, line] if line else nets, group.eval().nets))
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
