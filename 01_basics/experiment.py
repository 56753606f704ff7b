"""What each choice of train.py is worth; what under- and overfitting look like; and how far an MLP can go.

You learn here: how to compare fairly (one change, several seeds, mean and spread); which choices matter and which
don't; how to read a pair of learning curves; and what takes an MLP from 98.5 to 99.6 %, one step at a time.

    python 01_basics/experiment.py                                everything
    python 01_basics/experiment.py --only fitting momentum        parts and rows whose names hold one of these words

You should see in `choices` (MNIST, five seeds) validation accuracies of 98.51 ± 0.07 % as in train.py, 94.12 ± 0.03 %
without a hidden layer; the tables are in README.md.
Writes to outputs/: choices.json, fitting.json, limits.json; choices.png, limits.png, a fitting_*.png for each network.
Left out on purpose: tuning the learning rate for every row of `choices`. Figures are those after the last epoch; the
test part, shown in `limits`, chose nothing.
"""
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from load import Data, load_data, prepare
from train import evaluate, fit

# Shapes: N pictures, B batch, I inputs (784 pixels), K classes (10 digits), H height, W width
SCRIPT = "01_basics/experiment.py"


# ---------------------------------------------------------------------------------------------- one change at a time
def in_order(x: Tensor, y: Tensor, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """In place of train.py's `batches`: the same order in every epoch."""
    return zip(x.split(batch_size), y.split(batch_size))


def by_digit(x: Tensor, y: Tensor, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """In place of train.py's `batches`: first all zeros, then all ones, and so on."""
    rows = y.argsort(stable=True)
    return in_order(x[rows], y[rows], batch_size, seed)


SGD = torch.optim.SGD
# The model's options, what pixels are divided by (None: normalised), and arguments of train.py's `fit`.
BASE = {"widths": (128,), "activation": nn.ReLU, "scale": None, "lr": 3e-3, "weight_decay": 0.3, "batch_size": 64}
CHOICES = [  # each change alone, against BASE
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
    ("pixels from 0 to 1", {"scale": 255}),
    ("pixels from 0 to 255", {"scale": 1}),
    ("the same order in every epoch", {"batches": in_order}),
    ("sorted by digit", {"batches": by_digit}),
    ("a learning rate that stays", {"decay": False}),
    ("no weight decay", {"weight_decay": 0.0}),
    ("SGD, 0.1, no weight decay", {"optimizer": SGD, "lr": 0.1, "weight_decay": 0.0}),
    ("SGD, 0.003, no weight decay", {"optimizer": SGD, "weight_decay": 0.0}),
    ("SGD, 0.03, momentum 0.9, no weight decay",
     {"optimizer": functools.partial(SGD, momentum=0.9), "lr": 0.03, "weight_decay": 0.0}),
]


def build(widths: tuple[int, ...], activation: type[nn.Module] = nn.ReLU, norm: bool = False,
          dropout: float = 0.0) -> nn.Sequential:
    """Linear layers of the given widths, each hidden one with an activation: (B, H, W) or (B, I) -> (B, K)."""
    layers = [nn.Flatten()]
    for inputs, outputs in zip((784, *widths), widths):
        ## Batch norm (Ioffe & Szegedy 2015): each unit to mean 0, variance 1 over the batch, so that no layer has to
        ## follow every shift of the layer below. Dropout (Srivastava et al. 2014): a share of the units is silent,
        ## another one at each step, so that none can rely on a single other one.
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs) if norm else nn.Identity(), activation(),
                   nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear((784, *widths)[-1], 10))


def measure_choices(data: Data, device: torch.device, rows: list, seeds: int, epochs: int) -> Iterator[dict]:
    """Yield the validation accuracies of each row of CHOICES, one per seed, with mean and standard deviation."""
    print(f"{data.label}: validation accuracy after {epochs} epochs, mean ± std of {seeds} seeds")
    normalised = prepare(data, device)
    for name, change in rows:
        recipe = BASE | change
        widths, activation, scale = (recipe.pop(option) for option in ("widths", "activation", "scale"))
        train, val = normalised[:2] if scale is None else (
            ((x / scale).flatten(1).to(device), y.to(device)) for x, y in (data[:2], data[2:4]))
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            *_, last = fit(build(widths, activation).to(device), train, val, epochs, seed=seed, **recipe)
            found.append(last["val_accuracy"])
        mean, std = np.mean(found), np.std(found, ddof=1) if seeds > 1 else 0.0
        print(f"  {name:52}{mean:8.2%} ± {std:.2%}", flush=True)
        yield {"name": name, "accuracy": found, "mean": mean, "std": std}


def draw_errors(rows: list[dict], label: str, path: Path) -> None:
    """Draw the share of mistakes on validation in each row of `choices` (mean and spread) or `limits`."""
    figure, axes = utils.pyplot().subplots(figsize=(8, 0.36 * len(rows) + 1.4))
    axes.errorbar([1 - row["mean"] for row in rows], range(len(rows)), xerr=[row["std"] for row in rows], fmt="o")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set(title=f"What each choice is worth ({label})", xlabel="share of mistakes (validation)", xscale="log")
    utils.write_atomically(path, figure.savefig)


# ---------------------------------------------------------------------------------------------- under- and overfitting
FITTING = [  # (name, hidden units, training pictures)
    ("2 hidden units: too small", 2, None),
    ("128 hidden units", 128, None),
    ("128 units, 1,000 pictures: too few", 128, 1000),
]


def measure_fitting(data: Data, device: torch.device, rows: list, seeds: int, epochs: int) -> Iterator[dict]:
    """Yield the curves of each row of FITTING, by seed 0: loss and accuracy on train and validation.

    ## Underfitting: both losses stay high, close together; the network is too small for the task. Overfitting: the
    ## training loss goes to zero while the validation loss turns and rises; it learns its pictures by heart.
    ## The learning rate stays as it is, and weights don't decay, because both would hide the turn.
    """
    print(f"\n{data.label}: seed 0, no weight decay, loss and accuracy on train | validation")
    (x, y), val, _ = prepare(data, device)
    for name, hidden, n in rows:
        train, curves = (x[:n], y[:n]), []
        repeat = 1 if n is None else 5  # fewer pictures make shorter epochs: more of them
        torch.manual_seed(0)
        model = build((hidden,)).to(device)
        for row in fit(model, train, val, 3 * repeat * epochs, 64, 3e-3, weight_decay=0.0, seed=0, decay=False):
            row["train_loss"], row["train_accuracy"] = evaluate(model, *train)  # not as fit has them, on the way
            curves.append(row)
        lowest = min(curves, key=lambda row: row["val_loss"])
        print("  {:44}{train_loss:.4f}, {train_accuracy:.2%} | {val_loss:.4f}, {val_accuracy:.2%}; lowest validation "
              "loss {:.4f}, epoch {}".format(name, lowest["val_loss"], lowest["epoch"], **row), flush=True)
        yield {"name": name, "curves": curves}


def draw_fitting(rows: list[dict], label: str, path: Path) -> None:
    """Draw each row's losses over the epochs, in a picture of its own."""
    for i, row in enumerate(rows, 1):
        utils.plot_history(path.with_stem(f"fitting_{i}"), row["curves"], ["train_loss", "val_loss"],
                           f"{row['name']} ({label})", "epoch", "loss, nats")


# ---------------------------------------------------------------------------------------------- how far an MLP can go
def straighten(x: Tensor, one_size: bool = False) -> Tensor:
    """Slanted digits made upright and centred, by their ink alone: (N, H, W) uint8 -> (N, H, W) float, 0 to 255.

    one_size: narrow and wide, low and high digits also come closer to each other.

    ## Ink as mass, with y down and x to the right: m is its sum, (cy, cx) its centre, and
    ##     slant = sum of ink (y - cy)(x - cx) / sum of ink (y - cy)^2
    ## is the slope of the line x(y) that lies closest to it (least squares). Moving each row back by slant (y - cy)
    ## makes that line upright. This is no augmentation: every picture is changed, test pictures too, and in one way
    ## only. A difference between writers that says nothing about the digit is gone (LeCun et al. 1998: "deslanted").
    """
    N, H, W = x.shape
    x = x.float()
    rows, columns = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
    m = x.sum((1, 2)).clamp(min=1)  # (N,)
    cy, cx = (x.sum(2) * rows).sum(1) / m, (x.sum(1) * columns).sum(1) / m  # (N,)
    y, x_off = rows - cy[:, None], columns - cx[:, None]  # (N, H), (N, W): distances from the centre
    yy, xx = ((x.sum(2) * y**2).sum(1) / m).clamp(min=0.5), (x.sum(1) * x_off**2).sum(1) / m  # (N,): mean squares
    slant = torch.einsum("nij,ni,nj->n", x, y, x_off) / m / yy
    high = wide = torch.ones(N, device=x.device)
    if one_size:
        ## The root of the mean squared distance says how far the ink spreads. That spread comes closer to a fifth of
        ## the height and a seventh of the width. Powers below 1 stop it before it gets there. A 1 ends as a broad
        ## smear: ugly to us, and unlike every other digit.
        high = (yy.sqrt() / (H / 5)) ** 0.5
        wide = ((xx - slant**2 * yy).clamp(min=0.5).sqrt() / (W / 7)) ** 0.7  # the width that is left once upright
    ## grid_sample asks, for each pixel of the result, where in the source to look, -1 to 1 from edge to edge.
    down = high[:, None, None] * (rows - (H - 1) / 2)[:, None]  # (N, H, 1): from the result's middle, in source pixels
    right = wide[:, None, None] * (columns - (W - 1) / 2)  # (N, 1, W)
    look_x = right + slant[:, None, None] * down + cx[:, None, None]  # (N, H, W)
    look_y = (down + cy[:, None, None]).expand_as(look_x)
    where = torch.stack([(2 * look_x + 1) / W - 1, (2 * look_y + 1) / H - 1], -1)  # (N, H, W, 2)
    return torch.cat([F.grid_sample(a[:, None], b, align_corners=False)[:, 0]
                      for a, b in zip(x.split(5000), where.split(5000))])


def distort(x: Tensor, turn: float = 0.2, stretch: float = 0.12, slant: float = 0.12, move: float = 1.5,
            bend: float = 1.5) -> Tensor:
    """Each picture of a batch as another hand might have written it: (B, H, W) -> (B, H, W).

    Drawn for each picture: a turn (up to `turn` radians), a stretch per axis and a slant (up to these shares), a move
    and a bend in pixels. `bend` is the standard deviation of the shifts of a 3 x 3 grid of points, with a smooth
    surface through them.

    ## Elastic distortion, after Simard, Steinkraus & Platt (2003): the sheet of paper is rubber, pulled at random. A 3
    ## stays a 3, but hardly a stroke stays where it was, and 55,000 pictures become as many as one likes. A hand should
    ## be able to do what a distortion does. A grid of 6 x 6 makes strokes tremble; 2 x 2 hardly bends them (README.md).
    """
    B, H, W = x.shape

    def uniform(size: float) -> Tensor:
        return size * (2 * torch.rand(B, device=x.device) - 1)  # (B,)

    angle, wide, high, lean = uniform(turn), 1 + uniform(stretch), 1 + uniform(stretch), uniform(slant)
    affine = torch.stack([wide * angle.cos(), lean - wide * angle.sin(), uniform(2 * move / W),
                          high * angle.sin(), high * angle.cos(), uniform(2 * move / H)], 1).view(B, 2, 3)
    where = F.affine_grid(affine, [B, 1, H, W], align_corners=False)  # (B, H, W, 2)
    points = 2 * bend / W * torch.randn(B, 2, 3, 3, device=x.device)
    where = where + F.interpolate(points, size=(H, W), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    ## Beyond the edge there is paper, too, so "border" repeats the edge. Zeros would be grey, because x is normalised.
    return F.grid_sample(x[:, None], where, padding_mode="border", align_corners=False)[:, 0]


def prepare_upright(data: Data, device: torch.device, straight: bool, one_size: bool) -> list[tuple[Tensor, Tensor]]:
    """The parts train, validation and test, straightened or not: x (N, H, W) normalised, y (N,) each."""
    parts = [straighten(x.to(device), one_size) if straight else x.to(device).float() for x in data[:6:2]]
    mean, std = parts[0].mean(), parts[0].std()
    return [((x - mean) / std, y.to(device)) for x, y in zip(parts, data[1:6:2])]


def fit_deep(model: nn.Module, x: Tensor, y: Tensor, epochs: int, batch_size: int, lr: float, dtype: torch.dtype,
             loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor], change: Callable | None = None) -> None:
    """Train on x (N, H, W), y (N,): train.py's loop in dtype, with a warm-up, any loss, and any change of pictures."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.98), fused=True)
    step, steps, begun = 0, epochs * len(y.split(batch_size)), time.perf_counter()
    for epoch in range(epochs):
        for rows in torch.randperm(len(y), device=y.device).split(batch_size):
            batch = (change(x[rows]) if change else x[rows]).flatten(1)  # (B, I)
            ## Up for a tenth of the steps (warm-up: Adam's averages are still poor), then down to zero.
            rise, fall = (step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps)
            optimizer.param_groups[0]["lr"] = lr * min(rise, fall)
            optimizer.zero_grad()
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                loss = loss_of(model, batch, y[rows])
            loss.backward()
            optimizer.step()
            step += 1
        utils.progress(epoch + 1, epochs, begun, f"loss {loss.item():.4f}", "pictures", len(y))


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Probabilities (N, K) for pictures x (N, H, W)."""
    model.eval()
    return torch.cat([model(part).softmax(1) for part in x.split(5000)])


def accuracy(p: Tensor, y: Tensor) -> float:
    """Share of correct answers among probabilities p (N, K), for digits y (N,)."""
    return (p.argmax(1) == y).float().mean().item()


# Each row keeps what the rows above it brought, except for what it names, and has the epochs, rate and batch that suit
# it. epochs: with --epochs 10. tests/exercises/ladder.py goes on from the fifth row in another way.
DEEP = {"norm": False, "dropout": 0.0, "straight": False, "one_size": False, "change": None, "label_smoothing": 0.0,
        "members": 1, "epochs": 12, "batch_size": 250, "lr": 2e-3}
LIMITS = [
    ("three hidden layers of 1,024 units", {}),
    ("+ batch norm behind each of them", {"norm": True}),
    ("+ dropout 0.2", {"dropout": 0.2}),
    ("+ digits straightened", {"straight": True}),
    ("+ and brought to one size", {"one_size": True}),
    ("+ digits distorted, not of one size; no dropout; 100 epochs",
     {"dropout": 0.0, "one_size": False, "change": distort, "label_smoothing": 0.1, "epochs": 100, "batch_size": 500,
      "lr": 3e-3}),
    ("+ the mean of three such networks", {"members": 3}),
]


def measure_limits(data: Data, device: torch.device, rows: list, seeds: int, epochs: int) -> Iterator[dict]:
    """Yield accuracies and seconds of each row of LIMITS, from seed 0 on as many as it has members."""
    print(f"\n{data.label}: how far an MLP can go; accuracy on validation | test, seconds")
    recipe, dtype = DEEP, utils.pick_dtype(device)

    def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:  # x (B, I), y (B,)
        return F.cross_entropy(model(x).float(), y, label_smoothing=recipe["label_smoothing"])

    for name, change in LIMITS:
        recipe = recipe | change
        if (name, change) not in rows:
            continue
        (x, y), (val_x, val_y), (test_x, test_y) = prepare_upright(data, device, recipe["straight"], recipe["one_size"])
        members, begun = [], time.perf_counter()
        for seed in range(recipe["members"]):
            torch.manual_seed(seed)
            model = build((1024, 1024, 1024), norm=recipe["norm"], dropout=recipe["dropout"]).to(device)
            fit_deep(model, x, y, recipe["epochs"] * epochs // 10, recipe["batch_size"], recipe["lr"], dtype, loss_of,
                     recipe["change"])
            members.append((predict(model, val_x), predict(model, test_x)))
        seconds = time.perf_counter() - begun
        ## The mean of several networks: their mistakes are partly chance, and chance cancels in the mean (Hansen &
        ## Salamon 1990).
        mean = [torch.stack(part).mean(0) for part in zip(*members)]
        (val, test), *single = ([accuracy(v, val_y), accuracy(t, test_y)] for v, t in (mean, *members))
        print(f"  {name:60}{val:8.2%} | {test:.2%}, {seconds:5.0f} s".ljust(79), flush=True)
        yield {"name": name, "mean": val, "std": 0.0, "test_accuracy": test, "seconds": seconds, "members": single}


# A part is its rows, the generator that measures them, and the function that draws them.
PARTS = {"choices": (CHOICES, measure_choices, draw_errors), "fitting": (FITTING, measure_fitting, draw_fitting),
         "limits": (LIMITS, measure_limits, draw_errors)}


def main() -> None:
    parser = utils.parser(__doc__, __file__, "device")
    add = parser.add_argument
    add("--data", help="mnist or typeset; without it MNIST, or typeset if that is out of reach")
    add("--only", nargs="+", metavar="WORD", help="the parts (choices, fitting, limits) and rows whose names hold one "
        "of these words; without it everything")
    add("--seeds", type=utils.count, default=5, help="runs per row of choices, with seeds 0, 1, 2, ...")
    add("--epochs", type=utils.count, default=10, help="passes over the training pictures in each run; fitting: three "
        "times as many, limits: 1.2 and 10 times")
    args = utils.parse_args(parser)
    chosen = {part: [row for row in rows if not args.only or any(word in f"{part}: {row[0]}" for word in args.only)]
              for part, (rows, _, _) in PARTS.items()}
    if not any(chosen.values()):
        raise utils.InputError(f"--only {' '.join(args.only)}: no part's and no row's name holds any of these words.")
    data = load_data(args.data)
    for part, (_, measure, draw) in PARTS.items():
        table = []
        for row in measure(data, args.device, chosen[part], args.seeds, args.epochs) if chosen[part] else ():
            table.append(row)
            facts = json.dumps({"script": SCRIPT, "torch": str(torch.__version__), "device": args.device.type,
                                "epochs": args.epochs, "rows": table} | data.facts, indent=1)
            utils.write_atomically(args.out / f"{part}.json", lambda file: file.write(facts.encode()))
        if table:
            draw(table, data.label, args.out / f"{part}.png")
    print(f"\nwrote tables (.json) and plots (.png) to {args.out}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
