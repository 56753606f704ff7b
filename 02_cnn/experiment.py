"""What each ingredient of the CNN is worth: one change at a time, three seeds, and transfer without a download.

You learn here: how to take one thing away at a time; what depth does to a plain network and to a residual one; and how
few pictures are enough when a network has already learned to see on other classes.

    python 02_cnn/experiment.py                        everything
    python 02_cnn/experiment.py --only depth           one or two of: ingredients depth transfer

Every figure is the share of validation pictures named correctly; the test part is not used here at all.
You should see (CIFAR-10 as JPEG, three seeds): 73.3 ± 0.4 % with everything, 63.9 without batch norm, 59.4 with SGD for
Muon, 62.6 with none of them. All tables stand in this chapter's README.md.
Writes to outputs/: experiment.json, experiment.png; with --only experiment_PART.json and .png. Left out on purpose:
tuning the learning rate of every row.
"""

import copy
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
from load import Data, augment, load_data
from train import Conv, Normalise, Simple, batch_norm, make_optimizers
from train import evaluate, schedule, set_rates

# Shapes: B batch, N pictures, C channels in, M channels out (filters), H height, W width, K classes

SCRIPT = "02_cnn/experiment.py"
BASE = {"pad": 2, "cutout": 0, "augment": True, "batch_norm": True, "dropout": 0.0, "label_smoothing": 0.1,
        "optimizer": "muon"}
CHANGES = [  # one at a time, against BASE
    ("as it is", "", {}),
    ("no augmentation", "", {"augment": False}),
    ("flips only", "", {"pad": 0}),
    ("and cutout 8", "DeVries & Taylor 2017", {"cutout": 8}),
    ("no batch norm", "Ioffe & Szegedy 2015", {"batch_norm": False}),
    ("dropout 0.2", "Srivastava et al. 2014", {"dropout": 0.2}),
    ("no label smoothing", "Szegedy et al. 2016", {"label_smoothing": 0.0}),
    ("AdamW for all", "Loshchilov & Hutter 2017", {"optimizer": "adamw"}),  # with learning rate and decay of its own
    ("SGD with momentum for all", "Sutskever et al. 2013", {"optimizer": "sgd"}),
]
## Which of several ingredients helps can be asked from both ends: what is lost without it, the rest in place (above),
## and what it gains alone, added to nothing (below). The two answers differ where ingredients need each other.
BARE = {"augment": False, "batch_norm": False, "label_smoothing": 0.0, "optimizer": "sgd"}
CHANGES += [(name, "", BARE | change) for name, change in (
    ("none of them: SGD", {}),
    ("augmentation alone", {"augment": True}),
    ("batch norm alone", {"batch_norm": True}),
    ("dropout 0.2 alone", {"dropout": 0.2}),
    ("label smoothing alone", {"label_smoothing": 0.1}),
    ("Muon alone", {"optimizer": "muon"}),
)]
DEPTHS = (8, 20, 32)


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


def simple(recipe: dict, data: Data, K: int) -> nn.Module:
    """train.py's simple network at half its width; without batch norm, every convolution gets a bias instead."""
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
def optimizers_of(model: nn.Module, name: str, batch_size: int, lr: float = 1.0) -> list[torch.optim.Optimizer]:
    """train.py's pair, AdamW, or SGD, each with a usual learning rate and decay; lr multiplies the learning rates."""
    if name == "muon":
        return make_optimizers(model, 0.053 * lr, 0.12 * lr, batch_size)
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw":
        one = torch.optim.AdamW(trained, lr=3e-3 * lr, weight_decay=0.05)
    else:  # SGD's usual 0.1 and 5e-4 are for the mean over a batch, and the loss here is a sum
        one = torch.optim.SGD(trained, lr=0.1 / batch_size * lr, momentum=0.9, nesterov=True,
                              weight_decay=5e-4 * batch_size)
    one.param_groups[0]["peak"] = one.param_groups[0]["lr"]
    return [one]


def fit(model: nn.Module, x: Tensor, y: Tensor, recipe: dict, pictures: int, batch_size: int, seed: int,
        dtype: torch.dtype, lr: float = 1.0) -> nn.Module:
    """Train model on x (N, 3, H, W) uint8 with labels y (N,), in shuffled passes, until it has seen `pictures`."""
    generator = torch.Generator().manual_seed(seed)
    steps = max(1, pictures // batch_size)
    optimizers = optimizers_of(model, recipe["optimizer"], batch_size, lr)
    ## Weights of a fixed size belong to train.py's recipe, and do no harm behind batch norm alone; the other optimizers
    ## have weight decay instead.
    fixed = recipe["optimizer"] == "muon" and recipe["batch_norm"]
    convs = [layer for layer in model.modules() if fixed and isinstance(layer, Conv)]
    order = torch.cat([torch.randperm(len(y), generator=generator)
                       for _ in range(-(-steps * batch_size // len(y)))]).to(x.device)
    model.train()
    for layer in model.modules():  # what is frozen keeps its running averages too
        if isinstance(layer, nn.BatchNorm2d) and not layer.bias.requires_grad:
            layer.eval()
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
    return model


# ---------------------------------------------------------------------------------------------- the three parts
def ingredients(data: Data, seeds: int, pictures: int, device: torch.device, dtype: torch.dtype):
    """Yield (name, source, accuracies over seeds): the simple network, one thing changed at a time."""
    for name, source, change in CHANGES:
        recipe, found = BASE | change, []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = simple(recipe, data, len(data.classes)).to(device, memory_format=torch.channels_last)
            fit(model, data.train_x, data.train_y, recipe, pictures, 250, seed, dtype)
            found.append(evaluate(model, data.val_x, data.val_y, dtype)[1])
        yield name, source, found


def depth(data: Data, seeds: int, pictures: int, device: torch.device, dtype: torch.dtype):
    """Yield (name, source, accuracies over seeds): 8, 20 and 32 layers, plain and with skip connections.

    ## SGD, as in the paper: Muon makes every direction of an update equally long, whatever depth did to the gradient.
    """
    recipe = BASE | {"optimizer": "sgd"}
    for layers in DEPTHS:
        for skip in (False, True):
            found = []
            for seed in range(seeds):
                torch.manual_seed(seed)
                model = deep(layers, skip, data).to(device, memory_format=torch.channels_last)
                fit(model, data.train_x, data.train_y, recipe, pictures // 2, 125, seed, dtype)
                found.append(evaluate(model, data.val_x, data.val_y, dtype)[1])
            yield f"{layers} layers, {'residual' if skip else 'plain'}", "He et al. 2015", found


def transfer(data: Data, seeds: int, pictures: int, device: torch.device, dtype: torch.dtype):
    """Yield (name, source, accuracies over seeds): the last two classes from few pictures, with and without a teacher.

    ## The network first learns the other classes. Its last layer is then replaced, and it learns to tell the last two
    ## apart, which it has never seen: by its new last layer alone, by all layers, or, to compare, from nothing.
    """
    K = len(data.classes)
    if K < 4:
        print(f"transfer is left out: {data.name} has {K} classes, and it takes four")
        return
    old = data.train_y < K - 2
    val = data.val_y >= K - 2
    found = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        teacher = simple(BASE, data, K - 2).to(device, memory_format=torch.channels_last)
        fit(teacher, data.train_x[old], data.train_y[old], BASE, pictures, 250, seed, dtype)
        g = torch.Generator().manual_seed(seed)
        each = [(data.train_y == k).nonzero()[:, 0] for k in (K - 2, K - 1)]
        each = [rows[torch.randperm(len(rows), generator=g).to(rows.device)] for rows in each]
        for n in (20, 100, 500):
            if min(map(len, each)) < n // 2:
                if seed == 0:
                    print(f"  {n} pictures: left out, {data.name} has too few of these classes")
                continue
            rows = torch.cat([part[: n // 2] for part in each])  # half of them from each class
            x, y = data.train_x[rows], data.train_y[rows] - (K - 2)
            for way in ("from scratch", "all layers", "last layer"):
                torch.manual_seed(seed)
                recipe = BASE | {"optimizer": "adamw"}
                model = simple(recipe, data, 2).to(device) if way == "from scratch" else copy.deepcopy(teacher)
                model[-1] = nn.Linear(model[-1].in_features, 2).to(device)
                if way == "last layer":
                    model.requires_grad_(False)[-1].requires_grad_(True)
                ## A new last layer starts as noise and has 60 steps, or 150. Alone it needs a larger rate: with 0.3 it
                ## named 78.7 % correctly from 500 pictures, with 3.0 it names 88.1 % (seeds 0 to 2).
                lr = 3.0 if way == "last layer" else 0.3
                fit(model, x, y, recipe, 60 * 50, 50 if n > 20 else 20, seed, dtype, lr)
                found.setdefault((n, way), []).append(
                    evaluate(model, data.val_x[val], data.val_y[val] - (K - 2), dtype)[1])
    for (n, way), values in found.items():
        yield f"{n} pictures of {' and '.join(data.classes[-2:])}, {way}", "", values


PARTS = {"ingredients": ingredients, "depth": depth, "transfer": transfer}


def main() -> None:
    parser = utils.parser(__doc__, __file__, "device", "dtype")
    add = parser.add_argument
    add("--data", help="cifar10, shapes or a folder; without it CIFAR-10, or shapes if that is out of reach")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="which tables to make")
    add("--seeds", type=utils.count, default=3, help="runs per row, with seeds 0, 1, 2, ...")
    add("--pictures", type=utils.number(int, "[500, inf)"), default=100_000,
        help="pictures that each run sees; the deep networks see half as many")
    args = utils.parse_args(parser)
    data = load_data(args.data)
    data = data._replace(**{name: getattr(data, name).to(args.device)
                            for name in ("train_x", "train_y", "val_x", "val_y")})
    print(f"{data.label}; {str(args.dtype)[6:]} on {args.device.type}; validation accuracy, mean ± std of {args.seeds} "
          "seeds")
    only, tables = [part for part in PARTS if part in args.only], {}  # each once
    stem = "experiment" if len(only) == len(PARTS) else "experiment_" + "_".join(only)
    facts = {"script": SCRIPT, "data": data.name, "stand_in": bool(data.stand_in), "device": args.device.type,
             "dtype": str(args.dtype)[6:], "torch": str(torch.__version__), "pictures": args.pictures}
    for part in only:
        print(f"\n{part}")
        for name, source, found in PARTS[part](data, args.seeds, args.pictures, args.device, args.dtype):
            mean, std = float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
            tables.setdefault(part, []).append({"name": name, "source": source, "accuracy": found, "mean": mean,
                                                "std": std})
            print(f"  {name:52}{mean:8.2%}" + f" ± {std:.2%}" * (len(found) > 1) + f"   {source}", flush=True)
            text = json.dumps(facts | {"tables": tables}, indent=1)
            utils.write_atomically(args.out / f"{stem}.json", lambda file: file.write(text.encode()))
    if not tables:
        return
    heights = [len(rows) for rows in tables.values()]
    figure, axes = utils.pyplot().subplots(len(tables), 1, squeeze=False, height_ratios=heights,
                                           figsize=(9, 0.36 * sum(heights) + 1.1 * len(tables)))
    for a, (part, rows) in zip(axes[:, 0], tables.items()):
        a.errorbar([row["mean"] for row in rows], range(len(rows)), xerr=[row["std"] for row in rows], fmt="o")
        a.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
        a.invert_yaxis()
        a.set_title(f"{part} ({data.label})")
    axes[-1, 0].set_xlabel("validation accuracy")
    figure.tight_layout()
    utils.write_atomically(args.out / f"{stem}.png", figure.savefig)
    print(f"\nwrote {stem}.json and {stem}.png to {args.out}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
