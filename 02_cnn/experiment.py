"""What each ingredient of the CNN is worth: one change at a time, three seeds; and what depth costs without skips.

You learn here: how to take one thing away at a time; and what depth does to a plain network and to a residual one.

    python 02_cnn/experiment.py                        everything
    python 02_cnn/experiment.py --only depth           one of: ingredients depth

Every figure is the share of validation pictures named correctly; the test part is not used here at all.
You should see (CIFAR-10 as JPEG, three seeds): 73.3 ± 0.4 % with everything, 63.9 without batch norm, 59.4 with SGD for
Muon, 62.6 with none of them. All tables stand in this chapter's README.md.
Writes to outputs/: experiment_ingredients and experiment_depth, .json and .png.
Left out on purpose: tuning the learning rate of every row.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from load import Data, augment, load_data
from train import Conv, Normalise, Simple, batch_norm, make_optimizers
from train import evaluate, schedule, set_rates

# Shapes: B batch, N pictures, C channels in, M channels out (filters), H height, W width, K classes

SCRIPT = "02_cnn/experiment.py"
BASE = {"pad": 2, "cutout": 0, "augment": True, "batch_norm": True, "dropout": 0.0, "label_smoothing": 0.1,
        "optimizer": "muon"}
## Which of several ingredients helps can be asked from both ends: what is lost without it, the rest in place, and what
## it gains alone, added to nothing (BARE). The two answers differ where ingredients need each other.
BARE = BASE | {"augment": False, "batch_norm": False, "label_smoothing": 0.0, "optimizer": "sgd"}
RECIPES = {
    "as it is": BASE,
    "no augmentation": BASE | {"augment": False},
    "flips only": BASE | {"pad": 0},
    "and cutout 8": BASE | {"cutout": 8},  # DeVries & Taylor 2017
    "no batch norm": BASE | {"batch_norm": False},  # Ioffe & Szegedy 2015
    "dropout 0.2": BASE | {"dropout": 0.2},  # Srivastava et al. 2014
    "no label smoothing": BASE | {"label_smoothing": 0.0},  # Szegedy et al. 2016
    "AdamW for all": BASE | {"optimizer": "adamw"},  # Loshchilov & Hutter 2017; a learning rate and decay of its own
    "SGD with momentum for all": BASE | {"optimizer": "sgd"},  # Sutskever et al. 2013
    "none of them: SGD": BARE,
    "augmentation alone": BARE | {"augment": True},
    "batch norm alone": BARE | {"batch_norm": True},
    "dropout 0.2 alone": BARE | {"dropout": 0.2},
    "label smoothing alone": BARE | {"label_smoothing": 0.1},
    "Muon alone": BARE | {"optimizer": "muon"},
}


# ---------------------------------------------------------------------------------------------- networks
class Stage(nn.Module):
    """Two convolutions, with or without the skip around them: (B, C, H, W) -> (B, M, H / stride, W / stride).

    ## Where the number of channels changes, the skip takes every second pixel and fills the new channels with zeros
    ## (option A of He et al. 2015), so that plain and residual networks have the very same weights.
    """

    def __init__(self, C: int, M: int, stride: int, skip: bool):
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.norm2 = Conv(C, M), batch_norm(M), Conv(M, M), batch_norm(M)
        self.stride, self.skip, self.more = stride, skip, M - C

    def forward(self, x: Tensor) -> Tensor:
        ## What a convolution with this stride gives; three quarters of it are computed in vain, for one Conv for all.
        h = self.conv1(x)[:, :, :: self.stride, :: self.stride]
        h = self.norm2(self.conv2(F.relu(self.norm1(h))))
        if self.skip:
            h = h + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(h)


def deep(depth: int, skip: bool, data: Data) -> nn.Module:
    """The CIFAR-10 network of He et al. 2015, section 4.2: depth = 6 n + 2 layers, with 16, 32 and 64 channels."""
    n, layers, C = (depth - 2) // 6, [], 16
    for M, stride in ((16, 1), (32, 2), (64, 2)):
        for i in range(n):
            layers.append(Stage(C, M, stride if i == 0 else 1, skip))
            C = M
    return nn.Sequential(Normalise(data.mean, data.std), Conv(3, 16), batch_norm(16), nn.ReLU(), *layers,
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(data.classes)))


def simple(recipe: dict, data: Data) -> nn.Module:
    """train.py's simple network at half its width; without batch norm, every convolution gets a bias instead."""
    K = len(data.classes)
    model = Simple(K, data.mean, data.std, widths=(32, 64, 128), dropout=recipe["dropout"])
    if not recipe["batch_norm"]:
        for i, layer in enumerate(model):
            if isinstance(layer, nn.BatchNorm2d):
                model[i] = Bias(layer.num_features)
    if recipe["optimizer"] != "muon":  # train.py's head is made for its own learning rates
        model[-1] = nn.Linear(model[-1].in_features, K)
    return model


class Bias(nn.Module):
    """One learned number per channel, added: (B, C, H, W) -> same shape."""

    def __init__(self, C: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


# ---------------------------------------------------------------------------------------------- one run
def optimizers_of(model: nn.Module, name: str, batch_size: int) -> list[torch.optim.Optimizer]:
    """train.py's pair, AdamW, or SGD, each with a usual learning rate and decay."""
    if name == "muon":
        return make_optimizers(model, 0.053, 0.12, batch_size)
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw":
        one = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.05)
    else:  # SGD's usual 0.1 and 5e-4 are for the mean over a batch, and the loss here is a sum
        one = torch.optim.SGD(trained, lr=0.1 / batch_size, momentum=0.9, nesterov=True,
                              weight_decay=5e-4 * batch_size)
    one.param_groups[0]["peak"] = one.param_groups[0]["lr"]
    return [one]


def fit(model: nn.Module, x: Tensor, y: Tensor, recipe: dict, pictures: int, batch_size: int, seed: int,
        dtype: torch.dtype) -> None:
    """Train model on x (N, 3, H, W) uint8 with labels y (N,), in shuffled passes, until it has seen `pictures`."""
    generator = torch.Generator().manual_seed(seed)
    steps = pictures // batch_size
    optimizers = optimizers_of(model, recipe["optimizer"], batch_size)
    ## Weights of a fixed size belong to train.py's recipe, and do no harm behind batch norm alone; the other optimizers
    ## have weight decay instead.
    fixed = recipe["optimizer"] == "muon" and recipe["batch_norm"]
    convs = [layer for layer in model.modules() if fixed and isinstance(layer, Conv)]
    passes = -(-steps * batch_size // len(y))
    order = torch.cat([torch.randperm(len(y), generator=generator) for _ in range(passes)]).to(x.device)
    model.train()
    for step, rows in zip(range(steps), order.split(batch_size)):
        batch = augment(x[rows], recipe["pad"], recipe["cutout"]) if recipe["augment"] else x[rows]
        set_rates(optimizers, schedule(step, steps))
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            logits = model(batch).float()
        F.cross_entropy(logits, y[rows], label_smoothing=recipe["label_smoothing"], reduction="sum").backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for conv in convs:
            conv.rescale()


# ---------------------------------------------------------------------------------------------- the two tables
INGREDIENTS = {name: (recipe, partial(simple, recipe)) for name, recipe in RECIPES.items()}
## SGD, as in the paper: Muon makes every direction of an update equally long, whatever depth did to the gradient.
DEPTH = {f"{layers} layers, {name}": (BASE | {"optimizer": "sgd"}, partial(deep, layers, skip))
         for layers in (8, 20, 32) for name, skip in (("plain", False), ("residual", True))}
TABLES = {"ingredients": (INGREDIENTS, 1, 250), "depth": (DEPTH, 2, 125)}  # rows, part of the pictures, batch size


def main() -> None:
    parser = utils.parser(__doc__, __file__, "device", "dtype")
    add = parser.add_argument
    add("--data", help="cifar10, shapes or a folder; without it CIFAR-10, or shapes if that is out of reach")
    add("--only", nargs="+", choices=TABLES, default=list(TABLES), help="which tables to make")
    add("--seeds", type=utils.count, default=3, help="runs per row, with seeds 0, 1, 2, ...")
    add("--pictures", type=utils.number(int, "[500, inf)"), default=100_000,
        help="pictures that each run sees; the deep networks see half as many")
    args = utils.parse_args(parser)
    data = load_data(args.data)
    x, y, val_x, val_y = (part.to(args.device) for part in data[:4])
    print(f"{data.label}; {str(args.dtype)[6:]} on {args.device.type}; validation accuracy, mean ± std of {args.seeds} "
          "seeds")
    for table in args.only:
        print(f"\n{table}")
        (recipes, part, batch_size), rows, path = TABLES[table], [], args.out / f"experiment_{table}.json"
        facts = {"script": SCRIPT, "data": data.name, "stand_in": bool(data.stand_in), "device": args.device.type,
                 "dtype": str(args.dtype)[6:], "torch": str(torch.__version__), "pictures": args.pictures, "rows": rows}
        for name, (recipe, make_model) in recipes.items():
            found = []
            for seed in range(args.seeds):
                torch.manual_seed(seed)
                model = make_model(data).to(args.device, memory_format=torch.channels_last)
                fit(model, x, y, recipe, args.pictures // part, batch_size, seed, args.dtype)
                found.append(evaluate(model, val_x, val_y, args.dtype)[1])
            std = float(np.std(found, ddof=1)) if args.seeds > 1 else 0.0
            rows.append({"name": name, "accuracy": found, "mean": float(np.mean(found)), "std": std})
            print(f"  {name:28}{rows[-1]['mean']:8.2%}" + f" ± {std:.2%}" * (args.seeds > 1), flush=True)
            utils.write_atomically(path, lambda file: file.write(json.dumps(facts, indent=1).encode()))
        names, means, stds = zip(*[(row["name"], row["mean"], row["std"]) for row in reversed(rows)])
        figure, axes = utils.pyplot().subplots(figsize=(9, 1 + 0.36 * len(rows)))
        axes.errorbar(means, names, xerr=stds, fmt="o")
        axes.set(title=f"{table} ({data.label})", xlabel="validation accuracy")
        utils.write_atomically(path.with_suffix(".png"), figure.savefig)
        print(f"wrote {path} and .png")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
