"""What each choice of train.py is worth: one change at a time; and what under- and overfitting look like.

You learn here: how to compare fairly (one change, several seeds, mean and spread); which choices matter and which
don't; how to read a pair of learning curves.

    python 01_basics/experiment.py                       everything
    python 01_basics/experiment.py --parts choices       one of: choices fitting

Figures are the share of validation pictures named right after the last epoch; the test part is not used here.
Writes to outputs/: choices.json, choices.png, fitting.json, fitting.png. Left out on purpose: choosing the best of many
settings for every row; all rows share train.py's, but for what their name says.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils  # noqa: E402
from load import Data, load_data, normalise  # noqa: E402
from train import epoch_batches, evaluate  # noqa: E402

# Shapes: N pictures, B batch, I inputs (784 pixels), K classes (10 digits)

SCRIPT = "01_basics/experiment.py"
# decay: whether the learning rate falls to zero
BASE = {"widths": (128,), "activation": nn.ReLU, "optimizer": "adam", "lr": 3e-3, "weight_decay": 0.3, "decay": True,
        "batch_size": 64, "pixels": "normal", "order": "shuffled"}
CHANGES = [  # each alone, against BASE
    ("as in train.py: 784-128-10, AdamW, 0.003, batch 64", {}),
    ("no hidden layer (logistic regression)", {"widths": ()}),
    ("three layers: 784-256-128-10", {"widths": (256, 128)}),
    ("tanh for ReLU", {"activation": nn.Tanh}),
    ("no activation at all", {"activation": nn.Identity}),
    ("learning rate 0.0003", {"lr": 3e-4}),
    ("learning rate 0.03", {"lr": 0.03}),
    ("learning rate 0.3", {"lr": 0.3}),
    ("batch 16", {"batch_size": 16}),
    ("batch 512", {"batch_size": 512}),
    ("batch 512, learning rate 0.01", {"batch_size": 512, "lr": 1e-2}),
    ("pixels from 0 to 1", {"pixels": "unit"}),
    ("pixels from 0 to 255", {"pixels": "bytes"}),
    ("the same order in every epoch", {"order": "fixed"}),
    ("sorted by digit", {"order": "sorted"}),
    ("a learning rate that stays", {"decay": False}),
    ("no weight decay", {"weight_decay": 0.0}),
    ("SGD, 0.1, no weight decay", {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0}),
    ("SGD, 0.003, no weight decay", {"optimizer": "sgd", "weight_decay": 0.0}),
    ("SGD, 0.03, momentum 0.9, no weight decay", {"optimizer": "momentum", "lr": 0.03, "weight_decay": 0.0}),
]
FITTING = [  # (name, hidden units, training pictures)
    ("2 hidden units: too small", 2, None),
    ("128 hidden units", 128, None),
    ("128 units, 1,000 pictures: too few", 128, 1000),
]


def build(widths: tuple[int, ...], activation: type[nn.Module], inputs: int) -> nn.Sequential:
    """Linear layers of the given widths with an activation between them: (B, I) -> (B, K)."""
    sizes, layers = (inputs, *widths, 10), []
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def pixels(x: Tensor, data: Data, kind: str) -> Tensor:
    """Pictures (N, H, W) uint8 as inputs (N, I), normalised, scaled to 0 .. 1, or as they are."""
    if kind == "normal":
        return normalise(x, data.mean, data.std).flatten(1)
    return x.flatten(1).float() / (255 if kind == "unit" else 1)


def fit(recipe: dict, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], seed: int,
        epochs: int) -> Iterator[tuple[float, float, float, float]]:
    """Train on train = (x (N, I), y (N,)); after each epoch yield loss and accuracy on train, then on val."""
    utils.set_seed(seed)
    x, y = train
    model = build(recipe["widths"], recipe["activation"], x.shape[1]).to(x.device)
    options = {"lr": recipe["lr"], "weight_decay": recipe["weight_decay"], "fused": True}
    if recipe["optimizer"] == "adam":
        optimizer = torch.optim.AdamW(model.parameters(), **options)
    else:
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9 * (recipe["optimizer"] == "momentum"), **options)
    if recipe["order"] == "sorted":
        rows = y.argsort(stable=True)
        x, y = x[rows], y[rows]
    steps, step = epochs * len(y.split(recipe["batch_size"])), 0
    for epoch in range(epochs):
        batches = (epoch_batches(x, y, recipe["batch_size"], seed * 1_000_003 + epoch) if recipe["order"] == "shuffled"
                   else zip(x.split(recipe["batch_size"]), y.split(recipe["batch_size"])))
        for a, b in batches:
            optimizer.param_groups[0]["lr"] = recipe["lr"] * (1 - step / steps if recipe["decay"] else 1)
            optimizer.zero_grad()
            F.cross_entropy(model(a), b).backward()
            optimizer.step()
            step += 1
        yield (*evaluate(model, x, y), *evaluate(model, *val))


def main() -> None:
    utils.keep_memory()
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", help="mnist or typeset; without it MNIST, or typeset if it is out of reach")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--parts", nargs="+", choices=["choices", "fitting"], default=["choices", "fitting"], help="what to measure")
    add("--seeds", type=int, default=5, help="runs per row, with seeds 0, 1, 2, ...")
    add("--epochs", type=int, default=10, help="passes over the training pictures in each run")
    add("--out", type=Path, default=Path(__file__).parent / "outputs", help="folder for tables and plots")
    args = parser.parse_args()
    if args.seeds < 1 or args.epochs < 1:
        raise utils.InputError("--seeds and --epochs must be at least 1.")
    utils.check_writable(args.out)
    device = utils.pick_device(args.device)
    data = load_data(args.data)
    label = data.name + ", stand-in" * data.stand_in
    y, val_y = data.train_y.to(device), data.val_y.to(device)
    tables = {"script": SCRIPT, "data": data.name, "stand_in": data.stand_in, "device": device.type,
              "torch": str(torch.__version__), "epochs": args.epochs}
    seeds = range(args.seeds)

    def inputs(kind: str) -> tuple[Tensor, Tensor]:
        return pixels(data.train_x, data, kind).to(device), pixels(data.val_x, data, kind).to(device)

    def write(part: str, rows: list[dict]) -> None:
        utils.write_atomically(args.out / f"{part}.json", json.dumps(tables | {"rows": rows}, indent=1).encode())

    if "choices" in args.parts:
        print(f"{label}: validation accuracy after {args.epochs} epochs, mean ± std of {args.seeds} seeds")
        rows = []
        for name, change in CHANGES:
            recipe = BASE | change
            x, val_x = inputs(recipe["pixels"])
            found = [list(fit(recipe, (x, y), (val_x, val_y), seed, args.epochs))[-1][3] for seed in seeds]
            mean, std = statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0
            rows.append({"name": name, "accuracy": found, "mean": mean, "std": std})
            print(f"  {name:52}{mean:8.2%} ± {std:.2%}", flush=True)
            write("choices", rows)
        figure, axes = plt.subplots(figsize=(8, 0.36 * len(CHANGES) + 1.2))
        axes.errorbar([1 - row["mean"] for row in rows], range(len(rows)), xerr=[row["std"] for row in rows], fmt="o")
        axes.set_xscale("log")
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.invert_yaxis()
        axes.set(title=f"One change at a time ({label})", xlabel="share of validation pictures named wrong (log scale)")
        utils.save_figure(figure, args.out / "choices.png")

    if "fitting" in args.parts:
        ## Underfitting: both losses stay high, close together; the network is too small for the task. Overfitting: the
        ## training loss goes to zero while the validation loss turns and rises; it learns its pictures by heart.
        ## The learning rate stays as it is, and weights don't decay: both would hide the turn.
        print(f"\n{label}: seed 0, no weight decay, loss and accuracy on train | validation")
        x, val_x = inputs("normal")
        figure, all_axes = plt.subplots(1, len(FITTING), figsize=(11, 3.4), sharey=True)
        rows = []
        for axes, (name, hidden, n) in zip(all_axes, FITTING):
            repeat = 1 if n is None else 5  # fewer pictures make shorter epochs: more of them
            recipe = BASE | {"widths": (hidden,), "weight_decay": 0.0, "decay": False}
            curve = list(fit(recipe, (x[:n], y[:n]), (val_x, val_y), 0, 3 * repeat * args.epochs))
            train_loss, train_accuracy, val_loss, val_accuracy = zip(*curve)
            lowest = min(range(len(curve)), key=lambda i: val_loss[i])
            print(f"  {name:44}{train_loss[-1]:.4f}, {train_accuracy[-1]:.2%} | {val_loss[-1]:.4f}, "
                  f"{val_accuracy[-1]:.2%}; lowest validation loss {val_loss[lowest]:.4f}, epoch {lowest + 1}",
                  flush=True)
            rows.append({"name": name, "train_loss": train_loss, "val_loss": val_loss,
                                      "train_accuracy": train_accuracy, "val_accuracy": val_accuracy})
            write("fitting", rows)
            epochs = range(1, len(curve) + 1)
            axes.plot(epochs, train_loss, "-", label="train")
            axes.plot(epochs, val_loss, "--", label="validation")
            axes.set(title=name, xlabel="epoch", ylabel="loss, nats" if axes is all_axes[0] else "")
            axes.set_yscale("log")
            axes.legend()
        figure.suptitle(f"Underfitting, a fit, and overfitting ({label})")
        figure.tight_layout()
        utils.save_figure(figure, args.out / "fitting.png")
    print(f"\nwrote tables (.json) and plots (.png) to {args.out}")
    if data.stand_in:
        utils.notice(f"STAND-IN: these figures are for {data.name}, not for MNIST.")


if __name__ == "__main__":
    utils.run(main)
