"""What each choice of train.py is worth; what under- and overfitting look like; and how far an MLP can go.

You learn here: how to compare fairly (one change, several seeds, mean and spread); which choices matter and which
don't; how to read a pair of learning curves; and what takes an MLP from 98 to 99.5 %, one step at a time.

    python 01_basics/experiment.py                       everything
    python 01_basics/experiment.py --parts choices       one of: choices fitting limits

Figures are the share of pictures named right after the last epoch: of the validation part, which the choices were made
by; in `limits` also of the test part, which chose nothing.

You should see for `choices` (MNIST, ten epochs, five seeds), % of the validation pictures, mean ± standard deviation:
    as in train.py               98.51 ± 0.07      pixels from 0 to 1           98.18 ± 0.10
    no hidden layer              94.12 ± 0.03      pixels from 0 to 255         97.37 ± 0.17
    three layers                 98.68 ± 0.12      the same order every epoch   98.51 ± 0.12
    tanh for ReLU                98.16 ± 0.07      sorted by digit              53.61 ± 5.52
    no activation at all         94.22 ± 0.06      a learning rate that stays   96.99 ± 0.46
    learning rate 0.0003         97.69 ± 0.10      no weight decay              98.35 ± 0.11
    learning rate 0.03           96.32 ± 0.36      SGD, 0.1                     98.16 ± 0.15
    learning rate 0.3            13.76 ± 7.07      SGD, 0.003                   93.41 ± 0.14
    batch 16                     98.23 ± 0.03      SGD, 0.03, momentum 0.9      98.36 ± 0.20
    batch 512                    98.17 ± 0.13      batch 512, rate 0.01         98.30 ± 0.18
For `fitting` (seed 0, loss on train | validation at the end): 2 hidden units 1.497 | 1.443; 128 units 0.023 | 0.288,
its lowest 0.100 in epoch 4; 128 units and 1,000 pictures 0.0001 | 0.462, its lowest 0.313 in epoch 5.

For `limits` (MNIST, seed 0, the last row seeds 0 to 2; two cores of an Intel Xeon with AMX, torch 2.15, bfloat16), % of
the pictures and seconds of training:
                                                                             validation      test  seconds
    three hidden layers of 1,024 units                                             98.68     98.53       37
    + batch norm behind each of them                                               98.82     98.66       27
    + dropout 0.2                                                                  98.86     98.61       49
    + digits straightened                                                          98.96     99.08       46
    + and brought to one size                                                      99.24     99.18       47
    + virtual adversarial training, not dropout, 20 epochs                         99.46     99.35      114
    + a ladder network instead, 100 epochs                                         99.52     99.42      743
    + trained on the validation pictures, too                                          -     99.49      706
    + three layers again, digits distorted instead                                 99.64     99.57      230
    + the mean of three such networks                                              99.64     99.58      714
Each of the three alone: 99.64, 99.66, 99.60 in validation; 99.57, 99.49, 99.54 in test. The ladder network with seeds
0, 1, 2: 99.52, 99.60, 99.56 in validation; 99.42, 99.37, 99.45 in test; trained on the validation pictures, too, and
normalised by all 60,000: 99.44, 99.43, 99.47. (The seeds 1 and 2, and these last three, were run apart, on one core
each; the row above, normalised by the training part as in all rows, was run apart on two.)
Writes to outputs/: choices, fitting and limits, each as .json and .png. Left out on purpose: choosing the best of many
settings for every row: all rows of `choices` share train.py's, but for what their name says (SGD also goes without
weight decay); those of `limits` have their own, DEEP.
"""

import json
import math
import sys
import time
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
from train import batches as epoch_batches, evaluate  # noqa: E402

# Shapes: N pictures, B batch, I inputs (784 pixels), K classes (10 digits), H height, W width

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
PARTS = ["choices", "fitting", "limits"]
# Each row keeps what the rows above it brought, but for what it puts in another's place, and has the epochs, rate and
# batch that suit it. A ladder has batch norm and noise of its own: `norm` and `dropout` don't concern it.
DEEP = {"widths": (1024, 1024, 1024), "norm": False, "dropout": 0.0, "straight": False, "one_size": False,
        "smooth": 0.0, "ladder": False, "members": 1, "distort": False, "label_smoothing": 0.0, "epochs": 12,
        "batch_size": 250, "lr": 2e-3, "all": False}  # all: the validation pictures are trained on, too
LIMITS = [
    ("three hidden layers of 1,024 units", {}),
    ("batch norm behind each of them", {"norm": True}),
    ("dropout 0.2", {"dropout": 0.2}),
    ("digits straightened", {"straight": True}),
    ("and brought to one size", {"one_size": True}),
    ("virtual adversarial training, not dropout, 20 epochs", {"smooth": 3.0, "dropout": 0.0, "epochs": 20}),
    ("a ladder network instead, 100 epochs",
     {"smooth": 0.0, "ladder": True, "widths": (1000, 500, 250, 250, 250), "epochs": 100, "lr": 3e-3}),
    ("trained on the validation pictures, too", {"all": True}),
    ("three layers again, digits distorted instead",
     {"all": False, "ladder": False, "widths": (1024, 1024, 1024), "one_size": False, "distort": True,
      "label_smoothing": 0.1, "batch_size": 500}),
    ("the mean of three such networks", {"members": 3}),
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


# ---------------------------------------------------------------------------------------------- how far an MLP can go
def straighten(x: Tensor, one_size: bool = False) -> Tensor:
    """Slanted digits made upright and centred, by their ink alone: (N, H, W) uint8 -> (N, H, W) float, 0 to 255.

    one_size: narrow and wide, low and high ones also come closer to each other.

    ## Ink as mass, with y down and x to the right: m is its sum, (cy, cx) its centre, and
    ##     slant = sum of ink (y - cy)(x - cx) / sum of ink (y - cy)^2
    ## the slope of the line x(y) that lies closest to it (least squares). Moving each row back by slant (y - cy) makes
    ## that line upright. It is no augmentation: each picture, test pictures too, is changed in the one way that it asks
    ## for, and a difference between writers that says nothing about the digit is gone (LeCun et al. 1998 "deslanted").
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
        ## the height and a seventh of the width, by powers below 1, so not all the way. A 1 ends as a broad smear: ugly
        ## to us, and unlike every other digit.
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
    and a bend (pixels; `bend` is the standard deviation of the shifts of a 3 x 3 grid of points, with a smooth surface
    laid through them).

    ## Elastic distortion, after Simard, Steinkraus & Platt (2003): the sheet of paper is rubber, pulled at random. What
    ## was a 3 stays one, but hardly a stroke stays where it was, and 55,000 pictures become as many as one likes.
    ## Distortions should be what a hand might do. A grid of 6 x 6 makes strokes tremble; 2 x 2 hardly bends them.
    ## Right of 15,000 pictures kept aside, after 100 epochs over the other 45,000 (seed 0, bend 1):
    ##     6 x 6  99.39 %     4 x 4  99.45 %     3 x 3  99.54 %     2 x 2  99.35 %
    """
    B, H, W = x.shape
    uniform = lambda *shape: 2 * torch.rand(*shape, device=x.device) - 1  # noqa: E731
    angle, wide, high, lean = turn * uniform(B), 1 + stretch * uniform(B), 1 + stretch * uniform(B), slant * uniform(B)
    A = torch.stack([wide * angle.cos(), lean - wide * angle.sin(), 2 * move / W * uniform(B),
                     high * angle.sin(), high * angle.cos(), 2 * move / H * uniform(B)], 1).view(B, 2, 3)
    where = F.affine_grid(A, [B, 1, H, W], align_corners=False)  # (B, H, W, 2)
    points = 2 * bend / W * torch.randn(B, 2, 3, 3, device=x.device)
    where = where + F.interpolate(points, size=(H, W), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    ## What lies beyond the edge is paper, too: "border" repeats the edge. Zeros would be grey, as x is normalised.
    return F.grid_sample(x[:, None], where, padding_mode="border", align_corners=False)[:, 0]


def smoothness(model: nn.Module, x: Tensor, logits: Tensor, size: float) -> Tensor:
    """How far a small change of x (B, I), about the worst, moves the answers: mean KL divergence, to add to the loss.

    ## The KL divergence says how far one distribution is from another, in nats; 0 where they agree.

    ## Virtual adversarial training (Miyato et al. 2018). Two pictures that differ by a little should be answered alike,
    ## above all along the direction r in which the network is most fickle:
    ##     KL(p(x) || p(x + r)),    r = size * g / |g|,    g = gradient of KL(p(x) || p(x + d)) with respect to d
    ## where d is a random direction: at d = 0 the divergence is least, and there is no slope to follow. One gradient
    ## gives a fair guess at r. The labels play no part in it, nor which pixel is whose neighbour: to an MLP the pixels
    ## are a list of 784 numbers. Dropout is off in its row: other silent units would move the answers, too.
    """
    def change(d: Tensor) -> Tensor:
        moved = model(x + d).log_softmax(1, dtype=answer.dtype)
        return F.kl_div(moved, answer, reduction="batchmean", log_target=True)

    answer = logits.detach().log_softmax(1)  # (B, K)
    d = F.normalize(torch.randn_like(x)).requires_grad_()  # (B, I), each row of length 1
    g, = torch.autograd.grad(change(d), d)
    return change(size * F.normalize(g))


class Ladder(nn.Module):
    """An MLP that also learns to find the clean picture behind a noisy one: pictures (B, H, W) -> logits (B, K).

    ## A label says little about a picture: which one of ten. The picture says far more about itself. A ladder network
    ## (Rasmus et al. 2015) learns from both. While it trains, noise is added to the pixels and to every layer on the
    ## way up. The digit has to be named in spite of it; and a decoder goes down again, layer by layer, and has to find
    ## the pixels without their noise:
    ##     up      z_0 = h_0 = x + noise                       z_l = batch norm(W_l h_(l-1)) + noise
    ##             h_l = ReLU(z_l + b_l)                       logits = gain (z_L + b_L)
    ##     down    u_L = batch norm(softmax(logits))           u_l = batch norm(V_l c_(l+1))
    ##             c_l = m + v (z_l - m),                      m and v a curve over u_l each
    ##     loss    cross-entropy + weight * mean (c_0 - x)^2
    ## Once it is trained, no noise is added, and the decoder has done its work.
    ## The rungs of the ladder: the decoder sees each z_l itself, not only what the top made of it. m is what the layers
    ## above expect there; v says how much to believe where z_l differs. Where exactly a stroke lies can cross over by
    ## the lowest rung, so that the upper layers are free to hold what a digit looks like as a whole: what helps to
    ## clean it helps to name it.
    ## The paper compares not only c_0 with the pixels, but every c_l with what a second, clean pass finds in its layer.
    ## Right of 15,000 pictures kept aside, after 100 epochs over the other 45,000 (one run each; standard error 0.06):
    ## all layers compared 99.39 %, the pixels alone 99.42 % in a sketch and 99.38 % as they are here; virtual
    ## adversarial training, 20 epochs without a ladder, 99.29 %.
    """

    ## The paper's noise of 0.3 on pixels from 0 to 1 is about 1 on normalised ones; its weight of 1,000 about 100.
    def __init__(self, sizes: tuple[int, ...], pixel_noise: float = 1.0, noise: float = 0.3, weight: float = 100.0):
        super().__init__()
        pairs = list(zip(sizes, sizes[1:]))
        self.noises, self.weight = [pixel_noise] + [noise] * len(pairs), weight
        self.up = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairs)
        self.norm = nn.ModuleList(nn.BatchNorm1d(b, affine=False) for _, b in pairs)
        self.bias = nn.ParameterList(torch.zeros(b) for _, b in pairs)
        self.gain = nn.Parameter(torch.ones(sizes[-1]))
        self.down = nn.ModuleList(nn.Linear(b, a, bias=False) for a, b in pairs)
        start = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])  # a1 ... a5 of a curve that is 0 everywhere
        self.curves = nn.ParameterList(start[:, None].repeat(2, 1, size) for size in sizes)  # for m and v, per unit

    def encode(self, x: Tensor, noisy: bool) -> tuple[Tensor, list[Tensor]]:
        """x (B, I) -> logits (B, K) and every layer's z, the pixels first: (B, I) ... (B, K)."""
        rough = lambda z, noise: z + noise * torch.randn_like(z) if noisy else z  # noqa: E731
        zs = [rough(x, self.noises[0])]
        h = zs[0]
        for layer, norm, bias, noise in zip(self.up, self.norm, self.bias, self.noises[1:]):
            zs.append(rough(norm(layer(h).float()), noise))
            h = F.relu(zs[-1] + bias)
        return self.gain * (zs[-1] + bias), zs

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x.flatten(1), noisy=False)[0]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Both losses together for pictures x (B, I) and their digits y (B,): ()."""
        logits, zs = self.encode(x, noisy=True)
        below = logits.softmax(1)  # (B, K): what goes down to the next layer
        for i in reversed(range(len(zs))):
            u = F.batch_norm(below.float(), None, None, training=True)
            m, v = (a1 * torch.sigmoid(a2 * u + a3) + a4 * u + a5 for a1, a2, a3, a4, a5 in self.curves[i])
            c = m + v * (zs[i] - m)  # as u and z_i: (B, units of layer i)
            below = self.down[i - 1](c) if i else c
        return F.cross_entropy(logits, y) + self.weight * F.mse_loss(c, x)


def fit_deep(recipe: dict, x: Tensor, y: Tensor, seed: int, dtype: torch.dtype) -> nn.Module:
    """Train a deep MLP on x (N, H, W), y (N,), as one row of LIMITS says, and return it."""
    utils.set_seed(seed)
    sizes, layers = (x[0].numel(), *recipe["widths"]), [nn.Flatten()]
    for a, b in zip(sizes, sizes[1:]):
        ## Batch norm (Ioffe & Szegedy 2015): each unit to mean 0, variance 1 over the batch, so that no layer has to
        ## follow the moods of the one below. Dropout (Srivastava et al. 2014): a share of the units is silent, others
        ## each time, so that none can rely on one other alone.
        layers += [nn.Linear(a, b), nn.BatchNorm1d(b) if recipe["norm"] else nn.Identity(), nn.ReLU(),
                   nn.Dropout(recipe["dropout"])]
    layers.append(nn.Linear(sizes[-1], 10))
    model = (Ladder((*sizes, 10)) if recipe["ladder"] else nn.Sequential(*layers)).to(x.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe["lr"], betas=(0.9, 0.98), fused=True)
    steps = recipe["epochs"] * len(y.split(recipe["batch_size"]))
    bar, step = utils.Progress(steps, "pictures"), 0
    for _ in range(recipe["epochs"]):
        for rows in torch.randperm(len(y), device=y.device).split(recipe["batch_size"]):
            a = (distort(x[rows]) if recipe["distort"] else x[rows]).flatten(1)  # (B, I)
            ## Up for a tenth of the steps (warm-up: Adam's averages are still poor), then down to zero.
            rise, fall = (step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps)
            optimizer.param_groups[0]["lr"] = recipe["lr"] * min(rise, fall)
            optimizer.zero_grad()
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                if recipe["ladder"]:
                    loss = model.loss(a, y[rows])
                else:
                    logits = model(a).float()  # (B, K)
                    loss = F.cross_entropy(logits, y[rows], label_smoothing=recipe["label_smoothing"])
                if recipe["smooth"]:
                    loss = loss + smoothness(model, a, logits, recipe["smooth"])
            loss.backward()
            optimizer.step()
            step += 1
            if step % 20 == 0:
                bar.update(step, f"loss {loss.item():.4f}", recipe["batch_size"])
    bar.clear()
    if recipe["ladder"]:
        ## Batch norm has kept the statistics of noisy layers; this replaces them by those of clean ones.
        torch.optim.swa_utils.update_bn(x.split(5000), model)
    return model.eval()


@torch.no_grad()
def probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """(N, K) for pictures x (N, H, W)."""
    return torch.cat([model(part).softmax(1) for part in x.split(5000)])


def main() -> None:
    utils.keep_memory()
    parser = utils.parser(__doc__)
    add = parser.add_argument
    add("--data", help="mnist or typeset; without it MNIST, or typeset if that is out of reach")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    add("--seeds", type=int, default=5, help="runs per row, with seeds 0, 1, 2, ...")
    add("--epochs", type=int, default=10, help="passes over the training pictures in each run; "
        "limits: 1.2, 2 and 10 times as many")
    add("--out", type=Path, default=Path(__file__).parent / "outputs", help="folder for tables and plots")
    args = parser.parse_args()
    utils.check(args, above_zero="seeds epochs")
    utils.check_writable(args.out)
    device = utils.pick_device(args.device)
    data = load_data(args.data)
    label = data.label
    y, val_y = data.train_y.to(device), data.val_y.to(device)
    tables = {"script": SCRIPT, "data": data.name, "stand_in": bool(data.stand_in), "device": device.type,
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
            mean, std = utils.mean_std(found)
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
        figure.suptitle(f"Underfitting, overfitting, and overfitting sooner ({label})")
        figure.tight_layout()
        utils.save_figure(figure, args.out / "fitting.png")

    def right(p: Tensor, labels: Tensor) -> float:
        return (p.argmax(1) == labels.to(device)).float().mean().item()

    if "limits" in args.parts:
        print(f"\n{label}: how far an MLP can go; accuracy on validation | test, seconds of training")
        dtype, rows, recipe = utils.pick_dtype(device), [], DEEP
        for name, change in LIMITS:
            recipe = recipe | change
            parts = [straighten(x, recipe["one_size"]) if recipe["straight"] else x.float()
                     for x in (data.train_x.to(device), data.val_x.to(device), data.test_x.to(device))]
            mean, std = parts[0].mean(), parts[0].std()
            x, val_x, test_x = ((part - mean) / std for part in parts)
            known = y
            if recipe["all"]:
                ## Once all is chosen, the validation pictures may teach, too: they have nothing left to judge. The
                ## published 99.43 % is of a ladder network that learned from all 60,000.
                x, known = torch.cat([x, val_x]), torch.cat([y, val_y])
            if change.keys() != {"members"}:  # otherwise the networks of the row above are members too
                members, seconds = [], 0.0
            for seed in range(len(members), recipe["members"]):
                begun = time.perf_counter()
                model = fit_deep(recipe | {"epochs": recipe["epochs"] * args.epochs // 10}, x, known, seed, dtype)
                seconds += time.perf_counter() - begun
                members.append((probabilities(model, val_x), probabilities(model, test_x)))
            ## The mean of several networks: their mistakes are partly chance, and chance cancels in the mean (Hansen &
            ## Salamon 1990).
            val_p, test_p = (torch.stack(part).mean(0) for part in zip(*members))
            found = [[None if recipe["all"] else right(v, data.val_y), right(t, data.test_y)]
                     for v, t in [(val_p, test_p), *members]]
            val, test = found[0]
            rows.append({"name": name, "val_accuracy": val, "test_accuracy": test, "seconds": seconds,
                         "members": found[1:]})
            shown = "-" if recipe["all"] else f"{val:.2%}"
            print(f"  {'+ ' * (len(rows) > 1) + name:56}{shown:>8} | {test:.2%}, {seconds:5.0f} s", flush=True)
            write("limits", rows)
        figure, axes = plt.subplots(figsize=(8, 0.36 * len(rows) + 1.4))
        for part, mark in (("val", "s"), ("test", "o")):
            wrong = [math.nan if row[f"{part}_accuracy"] is None else 1 - row[f"{part}_accuracy"] for row in rows]
            axes.plot(wrong, range(len(rows)), mark, label=part)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.invert_yaxis()
        axes.set(title=f"How far an MLP can go, step by step ({label})", xlabel="share of pictures named wrong")
        axes.legend()
        utils.save_figure(figure, args.out / "limits.png")
    print(f"\nwrote tables (.json) and plots (.png) to {args.out}")
    if data.stand_in:
        utils.notice(f"STAND-IN: these figures are for {data.name}, not for MNIST.")


if __name__ == "__main__":
    utils.run(main)
