"""How chapter 03's default model was chosen: every candidate's error in seasons that end before the test part begins.

    python tests/seasons.py                                     ten minutes on one core
    python tests/seasons.py --horizons 96 --seasons 2880        one of twelve parts

A season is train.py's --earlier: all parts of ETTh1 end so many rows earlier. From 2,880 on, a season's own test part
lies before the real one, no row of which is read here. In each, the members are trained as train.py does, weighted by
that season's validation, and judged by its test part. 03_lstm/train.py tells above its MODELS what came out. pytest does
not collect this file.
"""

import argparse
import itertools
import math

import torch
import torch.nn as nn
from conftest import chapter

import utils

load, train = chapter("03_lstm", "load", "train")
RECIPE = train.MODELS["segment"]
NORMS = ["revin", "last"]
NAMES = [*NORMS, "line"]


def fit(horizon: int, earlier: int, hidden: int, epochs: int) -> tuple[train.SegmentRNN, load.Data]:
    """Nets and line, trained on one season for one horizon from seed 0, and that season's data."""
    T, batch = RECIPE["lookback"], RECIPE["batch_size"]
    data = load.load_data("etth1", T, horizon, earlier)
    inputs, targets = load.windows(data.train, T, horizon)
    steps = epochs * math.ceil(len(inputs) / batch)
    utils.set_seed(0)
    model = train.SegmentRNN(inputs.shape[2], T, horizon, RECIPE["segment"], hidden, RECIPE["dropout"], NORMS, True)
    model.line.fit(data.train)
    train.set_dtype(model, str(utils.pick_dtype(torch.device("cpu"))).removeprefix("torch."))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE["lr"], weight_decay=0.0, fused=True)
    for step, rows in zip(range(steps), train.batches(len(inputs), batch, 0)):
        optimizer.param_groups[0]["lr"] = RECIPE["lr"] * train.schedule(step, steps)
        optimizer.zero_grad()
        (model.trained(inputs[rows]) - targets[rows]).abs().mean((1, 2, 3)).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval(), data


@torch.no_grad()
def products(model: train.SegmentRNN, part: torch.Tensor, horizon: int) -> torch.Tensor:
    """G (E, E): mean products of each two members' errors on a part. A weighted mean's MSE is w^T G w."""
    G, n = torch.zeros(len(NAMES), len(NAMES), dtype=torch.float64), 0
    for x, y in zip(*(side.split(128) for side in load.windows(part, model.lookback, horizon))):
        e = (model.members(x) - y).flatten(1)
        G, n = G + (e @ e.T).double(), n + y.numel()
    return G / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--horizons", type=int, nargs="+", default=[96, 192, 336, 720])
    parser.add_argument("--seasons", type=int, nargs="+", default=[2880, 3600, 4320])
    parser.add_argument("--hidden", type=int, default=RECIPE["hidden"])
    parser.add_argument("--epochs", type=int, default=RECIPE["epochs"])
    args = parser.parse_args()
    if min(args.seasons) < 2880:
        raise utils.InputError("--seasons below 2880 would read rows of the real test part; take 2880 or more.")
    utils.keep_memory()
    groups = [some for n in range(1, len(NAMES) + 1) for some in itertools.combinations(range(len(NAMES)), n)]
    errors: dict[str, list[float]] = {}
    for horizon, earlier in itertools.product(args.horizons, args.seasons):
        model, data = fit(horizon, earlier, args.hidden, args.epochs)
        G_val, G_test = (products(model, part, horizon) for part in (data.val, data.test))
        for some in groups:
            g_val, g_test = G_val[some, :][:, some], G_test[some, :][:, some]
            how = {"": torch.ones(1, dtype=g_val.dtype)} if len(some) == 1 else {
                ", all alike": torch.full((len(some),), 1 / len(some), dtype=g_val.dtype),
                ", by validation": train.best_weights(g_val)}
            for name, w in how.items():
                errors.setdefault(" + ".join(NAMES[i] for i in some) + name, []).append((w @ g_test @ w).item())
        weights = ", ".join(f"{name} {w:.2f}" for name, w in zip(NAMES, train.best_weights(G_val)))
        print(f"{horizon} rows ahead, {earlier} earlier: weights {weights}; MSE of all by validation "
              f"{list(errors.values())[-1][-1]:.4f}, of the line {G_test[-1, -1]:.4f}", flush=True)
    score = {name: math.exp(sum(map(math.log, found)) / len(found)) for name, found in errors.items()}
    print("\ngeometric mean of the MSE on the seasons' own test parts")
    for name in sorted(score, key=score.get):
        print(f"{score[name]:.4f}  {name}")


if __name__ == "__main__":
    utils.run(main)
