"""Exercise: a vision transformer from chapter 05's blocks, trained on chapter 02's pictures beside its convolutions.

    python tests/exercises/vit.py --data data/cifar10-jpg                     both networks, six minutes of a core each
    python tests/exercises/vit.py --data shapes --seconds 60                  the stand-in

You should see the share of pictures named right beside SimpleCNN's, which had the same time (seed 0, bfloat16, one core
of an AMD EPYC that other programs shared, torch 2.15):
    cifar10-jpg, --seconds 300 --test: vit 71.0 % of the test pictures (4.2 epochs), simple 81.1 % (9.7 epochs)
    shapes, --seconds 15, on validation: vit 17.8 % (0.9 epochs), simple 75.7 % (2.2 epochs)
Learned: with few pictures a convolution's prior decides. It knows before the first step that what lies side by side
belongs together, and that a corner is a corner everywhere; the ViT has to find both in the data, and saw 0.4 times as
many pictures in the same time.
Writes: metrics.json to --out. Left out on purpose: pre-training on more pictures, which is where a ViT catches up.
"""

import math
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]
import utils
from chapters import chapter

cnn, pictures, gpt = chapter("02_cnn", "train"), chapter("02_cnn", "load"), chapter("05_transformer", "train")

# Shapes: B batch, H height, W width, P side of a patch, T patches (tokens), C channels, D channels per head, K classes

SCRIPT = "tests/exercises/vit.py"
P = 4


# ---------------------------------------------------------------------------------------------- model
def attend_to_all(q: Tensor, k: Tensor, v: Tensor, keep_weights: bool = True) -> tuple[Tensor, Tensor | None]:
    """05's `attend` without the causal mask: q, k, v (B, H, T, D) -> y (B, H, T, D) and the weights (B, H, T, T)."""
    if q.is_cuda and not keep_weights:
        return F.scaled_dot_product_attention(q, k, v), None
    p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return p.to(v.dtype) @ v, p


## The one thing that must change. A character may not see the next one, as it has to predict it; a patch of a picture
## has nothing to predict, and needs those to its right and below as much as the others. 05's Attention looks `attend`
## up in its module each time it is called. `gpt` is a copy of that module that nobody else holds, so putting another
## function there changes the blocks made here and no others.
gpt.attend = attend_to_all


def rotary_2d(side: int, D: int) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, 1, 1, D) each, for 05's `rotate`: half of the angles count rows, the other half columns.

    ## Counted along the text, the patch below would be as far away as eight to the right. With two angles per patch, a
    ## score knows how far up and how far left. 05's slowest angles are for texts of thousands of characters; over
    ## eight rows they would stand still, hence 100 in the place of 10,000.
    """
    frequency = 100.0 ** -(torch.arange(0, D, 4) / D)  # (D/4,)
    row, column = torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij")  # (side, side) each
    angle = torch.cat([row.reshape(-1, 1) * frequency, column.reshape(-1, 1) * frequency], 1)  # (T, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1)[:, None, None], torch.cat([-sin, sin], -1)[:, None, None]


class ViT(nn.Module):
    """A picture as a sequence of patches (Dosovitskiy et al. 2021): (B, 3, H, W) uint8 -> (B, K)."""

    def __init__(self, classes: int, mean: Tensor, std: Tensor, n_layer: int = 4, n_head: int = 3, n_embd: int = 96,
                 positions: str = "rotary"):
        super().__init__()
        if n_embd % (4 * n_head):
            raise utils.InputError(f"n_embd {n_embd} must be divisible by four times n_head {n_head}.")
        side, D = pictures.SIZE // P, n_embd // n_head
        self.normalise = cnn.Normalise(mean, std)
        self.patch = nn.Linear(3 * P * P, n_embd, bias=False)
        self.position = nn.Parameter(torch.zeros(side * side, n_embd), requires_grad=positions == "learned")
        self.blocks = nn.ModuleList(gpt.Block(n_embd, n_head, 0.0) for _ in range(n_layer))
        self.head = nn.Linear(n_embd, classes, bias=False)
        ## 05's first weights. The patches are many numbers of size 1 each, and take the usual 1 / sqrt(inputs).
        for name, matrix in self.blocks.named_parameters():
            adds = name.endswith(("attention.out.weight", "down.weight"))
            nn.init.normal_(matrix, std=0.02 / math.sqrt(2 * n_layer) if adds else 0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        if positions == "learned":
            nn.init.normal_(self.position, std=0.02)
        ## Turned by an angle of 0 nothing turns: so rotary positions are switched off without touching 05's block.
        still = torch.ones(1, 1, 1, D), torch.zeros(1, 1, 1, D)
        tables = rotary_2d(side, D) if positions == "rotary" else still
        for name, table in zip(("cos", "sin"), tables):
            self.register_buffer(name, table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        ## pixel_unshuffle makes of each P x P square one place with all its numbers as channels. One linear layer on
        ## those is a convolution with stride P; it is the only thing here that knows what a neighbour is.
        x = F.pixel_unshuffle(self.normalise(x), P).flatten(2).mT  # (B, T, 3 P P)
        x = gpt.norm(self.patch(x) + self.position)  # (B, T, C)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(gpt.norm(x).mean(1))  # (B, K): no patch is more important than another, so the mean of all


# ---------------------------------------------------------------------------------------------- training
def used() -> float:
    """Seconds of a core that this process has used; what other programs do at the same time does not count."""
    return time.process_time()


def fit(name: str, model: nn.Module, optimizers: list, data, seconds: float, batch_size: int, dtype: torch.dtype,
        seed: int, small: float) -> tuple[int, list[dict]]:
    """Chapter 02's loop for so many seconds of a core; return the number of pictures seen, and the history.

    The schedule goes by time, and not by steps: it ends at zero when the time is used up, however fast this machine is.
    """
    torch.manual_seed(seed)
    convs = [layer for layer in model.modules() if isinstance(layer, cnn.Conv)]
    n, seen, spent, history = len(data.train_y), 0, 0.0, []
    mirrored_first = torch.rand(n) < 0.5
    order, start, done = torch.randperm(n), time.perf_counter(), 0
    model.train()
    while spent < seconds:
        begun = used()
        epoch, place = divmod(seen, n)
        if place == 0:
            order = torch.randperm(n)
        rows = order[place : place + batch_size]
        x = pictures.augment(data.train_x[rows], 2, 0, mirrored_first[rows] ^ (epoch % 2 == 1))  # (B, 3, H, W) uint8
        if spent < small * seconds:
            x = F.interpolate(x.float(), scale_factor=0.75, mode="bilinear", antialias=True)
        cnn.set_rates(optimizers, cnn.schedule(int(1000 * spent / seconds), 1000))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(x).float()  # (B, K)
        loss = F.cross_entropy(logits, data.train_y[rows], label_smoothing=0.2)
        ## 02's learning rates are for a sum over the batch, 05's for a mean.
        (loss * len(rows) if convs else loss).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for conv in convs:
            conv.rescale()
        seen += len(rows)
        spent += used() - begun
        if (share := min(100, int(100 * spent / seconds))) > done:
            done = share
            utils.progress(done, 100, start, f"{name}: loss {loss.item():.3f}", "pictures", seen / done)
        if seen % n == 0 or spent >= seconds:
            val_loss, val_accuracy = cnn.evaluate(model, data.val_x, data.val_y, dtype)
            model.train()
            history.append({"step": seen, "seconds": spent, f"{name}_val_loss": val_loss,
                            f"{name}_val_accuracy": val_accuracy})
    return seen, history


def main() -> None:
    parser = utils.parser(__doc__, __file__, "device", "dtype", "seed")
    add = parser.add_argument
    add("--data", help="cifar10, shapes or a folder with train/CLASS/* and test/CLASS/*; without it CIFAR-10, or "
        "shapes if it is out of reach")
    add("--models", nargs="+", choices=["vit", "simple"], default=["vit", "simple"], help="what to train")
    add("--seconds", type=utils.positive, default=360, help="seconds of a core to train each of them for")
    add("--positions", choices=["rotary", "learned", "none"], default="rotary", help="how a patch knows its place")
    add("--n-layer", type=utils.count, default=4, help="blocks")
    add("--n-head", type=utils.count, default=3, help="attention heads per block")
    add("--n-embd", type=utils.count, default=96, help="width C")
    add("--batch-size", type=utils.count, default=100, help="the ViT's pictures per step; the CNN has chapter 02's")
    add("--lr", type=utils.positive, default=2e-3, help="AdamW's, for patches, positions and head")
    add("--muon-lr", type=utils.positive, default=0.02, help="Muon's, for the matrices in the blocks")
    add("--weight-decay", type=float, default=0.1, help="Muon's")
    add("--test", action="store_true", help="also name the test accuracy: once, when all is decided")
    args = utils.parse_args(parser)
    data = pictures.load_data(args.data)
    metrics, history, counts = {}, [], {}
    for name in args.models:
        torch.manual_seed(args.seed)
        if name == "vit":
            model = ViT(len(data.classes), data.mean, data.std, args.n_layer, args.n_head, args.n_embd, args.positions)
            optimizers = gpt.make_optimizers(model, args.lr, args.muon_lr, args.weight_decay)
            batch_size, small = args.batch_size, 0.0
        else:
            recipe = cnn.PRESETS["simple"]
            model = cnn.Simple(len(data.classes), data.mean, data.std).to(memory_format=torch.channels_last)
            batch_size, small = recipe["batch_size"], recipe["small"]
            optimizers = cnn.make_optimizers(model, recipe["lr"], recipe["muon_lr"], batch_size)
        counts[name] = utils.count_parameters(model)
        seen, rows = fit(name, model, optimizers, data, args.seconds, batch_size, args.dtype, args.seed, small)
        history += rows
        metrics[f"{name}_val_accuracy"] = rows[-1][f"{name}_val_accuracy"]
        line = (f"{name:8}{counts[name]:10,} parameters  {seen / len(data.train_y):6.1f} epochs in "
                f"{rows[-1]['seconds']:.0f} s of a core  {data.label}: validation "
                f"{metrics[f'{name}_val_accuracy']:.2%}")
        if args.test:
            ## The last weights, whatever validation said on the way: nothing is picked, and the test part used once.
            metrics[f"{name}_test_accuracy"] = cnn.evaluate(model, data.test_x, data.test_y, args.dtype)[1]
            line += f", test {metrics[f'{name}_test_accuracy']:.2%}"
        print(line.ljust(79), flush=True)
    utils.save_metrics(args, SCRIPT, data, model, metrics, history, parameters=counts)
    print(f"wrote {args.out / 'metrics.json'}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
