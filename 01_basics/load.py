"""Handwritten digits as numbers: what MNIST is, and how a picture becomes something a network can multiply.

You learn here: that a picture is a table of bytes; how data is split so that a figure can be believed; what normalising
does and on which part its two numbers are fitted; and that MNIST's 55,000 training pictures are one tensor of 43 MB,
small enough to stay in memory.

    python 01_basics/load.py                     MNIST (downloaded once, 12 MB)
    python 01_basics/load.py --data typeset      the stand-in: digits drawn with the fonts that ship with matplotlib

You should see (MNIST): 55,000 / 5,000 / 10,000 pictures of 28 x 28 pixels; mean 0.13 and standard deviation 0.31.
Writes: outputs/samples.png. Left out on purpose: a DataLoader, which is for data that does not fit into memory.
"""

import hashlib
import math
import shutil
import socket
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import matplotlib
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont  # Pillow comes with torchvision
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.transforms.functional import pil_to_tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils  # noqa: E402

# Shapes: N pictures, I inputs (784 pixels), H height, W width (28 each), K classes (10 digits)
## (N, I) reads: a table of N rows and I columns; (N,) is a list of N numbers; () is a single number.

SHA256 = {  # of the pictures' bytes followed by the labels'
    "train": "d18cfd466eb143ac1097fde604dba9eec4116885869d04cc648b510949f9e88c",
    "test": "a0863a96c44e5666edbb30c4071ee79ca0514c621e6349c5967fc78e7305c891",
}
FONTS = {  # files of matplotlib's; no family is in two parts: an oblique is its upright, slanted, as is done below too
    "train": ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono",
              "DejaVuSansMono-Bold", "cmr10", "cmb10", "cmss10", "cmtt10", "cmti10"],
    "val": ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"],
    "test": ["DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"],
}


class Data(NamedTuple):
    train_x: Tensor  # (N, H, W) uint8, 0 is the paper, 255 the ink
    train_y: Tensor  # (N,) int64, the digit
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: float  # of all training pixels, scaled to 0 .. 1
    std: float
    name: str  # "mnist" or "typeset"
    stand_in: bool


# ---------------------------------------------------------------------------------------------- the real set
def read_mnist() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test pictures (N, 28, 28) uint8 and labels (N,). Downloads the four files if they are not there.

    Raises ConnectionError where no mirror answers, utils.InputError where what is there, or what a mirror sent, is
    damaged or incomplete.
    """
    folder = utils.DATA_DIR / "MNIST" / "raw"
    names = [name.removesuffix(".gz") for name, _ in MNIST.resources]
    there = [name for name in names if (folder / name).exists()]
    advice = f"delete {folder} to have it downloaded again."
    if 0 < len(there) < len(names):
        raise utils.InputError(f"{folder} lacks {', '.join(sorted(set(names) - set(there)))}; {advice}")
    if not there:
        temporary = utils.DATA_DIR / "mnist.part"
        shutil.rmtree(temporary, ignore_errors=True)
        socket.setdefaulttimeout(30)
        try:
            MNIST(temporary, download=True)
        except (RuntimeError, URLError, ConnectionError, TimeoutError) as error:
            if "corrupted" in str(error):
                raise utils.InputError("a mirror sent files that are not MNIST's; nothing was kept, so try again later "
                                       "or put the right ones into " + str(folder)) from error
            raise ConnectionError("MNIST could not be downloaded; by hand: its four files, unpacked, from "
                                  f"{MNIST.mirrors[0]}, into {folder}.") from error
        finally:
            socket.setdefaulttimeout(None)
        folder.parent.mkdir(parents=True, exist_ok=True)
        (temporary / "MNIST" / "raw").replace(folder)  # only a complete folder gets the name
        shutil.rmtree(temporary)
    tensors = []
    for part, train in (("train", True), ("test", False)):
        try:
            digits = MNIST(utils.DATA_DIR, train=train)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise utils.InputError(f"{folder} is damaged; {advice}") from error
        found = hashlib.sha256(digits.data.numpy().tobytes() + digits.targets.numpy().tobytes()).hexdigest()
        if found != SHA256[part]:
            raise utils.InputError(f"the {part} files in {folder} are not the original ones; {advice}")
        tensors += [digits.data, digits.targets]
    return tuple(tensors)


# ---------------------------------------------------------------------------------------------- the stand-in
def typeset(n: int, part: str, seed: int) -> tuple[Tensor, Tensor]:
    """n digits in the fonts of a part, shifted, turned, scaled, slanted and noisy: (n, 28, 28) uint8 and labels (n,).

    Each font's ten digits are drawn once, large; all else is done to the whole batch at once.
    """
    g = torch.Generator().manual_seed(seed)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(n, *shape, generator=g)  # noqa: E731
    glyphs = torch.stack([torch.stack([glyph(font, digit) for digit in range(10)]) for font in FONTS[part]])
    y = torch.randint(10, (n,), generator=g)
    x = glyphs[torch.randint(len(glyphs), (n,), generator=g), y][:, None]  # (n, 1, 56, 56)

    ## An affine map says which point of the source each pixel of the result shows: (u, v) = A (column, row, 1).
    angle, scale, slant = uniform(-0.25, 0.25), uniform(0.8, 1.25), uniform(-0.3, 0.3)
    A = torch.zeros(n, 2, 3)
    A[:, 0, 0], A[:, 0, 1] = angle.cos() * scale, -angle.sin() * scale + slant
    A[:, 1, 0], A[:, 1, 1] = angle.sin() * scale, angle.cos() * scale
    A[:, :, 2] = uniform(-0.2, 0.2, 2)
    x = F.grid_sample(x, F.affine_grid(A, [n, 1, 28, 28], align_corners=False), align_corners=False)
    x = x * uniform(0.6, 1.0, 1, 1, 1) + 0.08 * torch.randn(x.shape, generator=g)
    return (x[:, 0].clamp(0, 1) * 255).to(torch.uint8), y


def glyph(font: str, digit: int, size: int = 56) -> Tensor:
    """One digit of one of matplotlib's fonts, centred: (size, size) float, 0 to 1."""
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    picture = Image.new("L", (size, size))
    ImageDraw.Draw(picture).text((size / 2, size / 2), str(digit), 255, ImageFont.truetype(str(file), 52), anchor="mm")
    return pil_to_tensor(picture)[0] / 255


# ---------------------------------------------------------------------------------------------- all of it
def load_data(data: str | None = None) -> Data:
    """Read `mnist` or make `typeset`; None is MNIST, and the stand-in where that can't be reached."""
    name = data or "mnist"
    if name not in ("mnist", "typeset"):
        raise utils.InputError(f"--data {name}: there is mnist, and its stand-in, typeset.")
    if name == "mnist":
        try:
            x, y, test_x, test_y = read_mnist()
            ## The last 5,000 training pictures become the validation part. Validation picks (when to stop, which option
            ## is better); the test part is looked at once, at the end. Were it used for picking, its figure would be
            ## the best of many tries, not what to expect on new digits.
            parts = x[:-5000], y[:-5000], x[-5000:], y[-5000:], test_x, test_y
        except ConnectionError as error:
            if data:  # asked for by name: never replaced by something else
                raise utils.InputError(f"{error} Use --data typeset to work offline.") from error
            print(error)
            name = "typeset"
    if name == "typeset":
        utils.notice("STAND-IN: this run uses `typeset`, digits drawn with the fonts that ship with matplotlib.",
                     "Its figures are not MNIST's and can't be compared with them.")
        parts = (*typeset(10_000, "train", 1), *typeset(1_000, "val", 2), *typeset(1_000, "test", 3))
    pixels = parts[0].double() / 255
    return Data(*parts, pixels.mean().item(), pixels.std().item(), name, name == "typeset")


def normalise(x: Tensor, mean: float, std: float) -> Tensor:
    """Bytes to numbers around zero: (N, H, W) uint8 -> (N, H, W) float32.

    ##     x' = (x / 255 - mean) / std
    ## With inputs of about size 1 the usual initial weights and learning rates fit; experiment.py shows what happens
    ## without. The two numbers come from the training part alone: what the test
    ## pictures look like on average is something that a network in use can't know either.
    """
    return (x.float() / 255 - mean) / std


def linear_baseline(data: Data) -> float:
    """Test accuracy of softmax regression (logistic regression for K classes) on the pixels, for a network to beat."""
    x = normalise(data.train_x, data.mean, data.std).flatten(1)  # (N, I)
    model = torch.nn.Linear(x.shape[1], 10)
    torch.nn.init.zeros_(model.weight)
    ## L-BFGS looks at all pictures in every step, and fits best where, as here, there is a single valley to go down.
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=40, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(model(x), data.train_y)
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        said = model(normalise(data.test_x, data.mean, data.std).flatten(1)).argmax(1)
    return (said == data.test_y).float().mean().item()


def majority_baseline(data: Data) -> float:
    """Test accuracy of always naming the digit that is most frequent in the training part."""
    return (data.test_y == data.train_y.bincount().argmax()).float().mean().item()


def as_characters(x: Tensor) -> str:
    """A picture (H, W) uint8 as text: one character per pixel, darker for more ink."""
    return "\n".join("".join(" .:-=+*#%@"[v * 10 // 256] * 2 for v in row) for row in x.tolist())


def main() -> None:
    parser = utils.parser(__doc__)
    add = parser.add_argument
    add("--data", help="mnist or typeset; without it MNIST, or typeset if that is out of reach")
    add("--seed", type=int, default=0, help="which samples are drawn")
    add("--out", type=Path, default=Path(__file__).parent / "outputs", help="folder for the plot")
    args = parser.parse_args()
    utils.check_writable(args.out)
    utils.set_seed(args.seed)
    data = load_data(args.data)
    label = data.name + ", stand-in" * data.stand_in

    print(f"{label}: {len(data.train_y):,} pictures to train on, {len(data.val_y):,} to validate, "
          f"{len(data.test_y):,} to test\none picture: {tuple(data.train_x[0].shape)} {data.train_x.dtype}; all "
          f"training pictures: {data.train_x.nbytes / 1e6:.0f} MB, one tensor in memory\n")
    print(f"the first one, a {data.train_y[0]}, its numbers as characters:\n{as_characters(data.train_x[0])}\n")
    print(f"{'digit':8}{'train':>8}{'val':>8}{'test':>8}")
    for k in range(10):
        print(f"{k:<8}" + "".join(f"{(y == k).sum():8,}" for y in (data.train_y, data.val_y, data.test_y)))
    print(f"\nalways naming the most frequent digit: {majority_baseline(data):.1%} of the test pictures; a linear "
          f"model on the pixels: {linear_baseline(data):.1%}; the loss of guessing, which from_scratch.py explains: "
          f"ln 10 = {math.log(10):.4f}\n\n{'pixels':24}{'mean':>8}{'std':>8}{'min':>8}{'max':>8}")
    x = normalise(data.train_x, data.mean, data.std)
    test = normalise(data.test_x, data.mean, data.std)
    for name, values in (("train, 0 to 1", data.train_x.float() / 255), ("train, normalised", x),
                         ("test, by train's numbers", test)):
        print(f"{name:24}" + "".join(f"{v:8.3f}" for v in (values.mean(), values.std(), values.min(), values.max())))
    print(f"{(data.train_x == 0).float().mean():.0%} of all pixels are 0: paper")

    figure, axes = plt.subplots(10, 12, figsize=(8, 7))
    for k, row in enumerate(axes):
        of_k = (data.train_y == k).nonzero()[:, 0]
        for a, i in zip(row, of_k[torch.randperm(len(of_k))]):
            a.imshow(data.train_x[i], cmap="gray_r", vmin=0, vmax=255)
        for a in row:
            a.axis("off")
    figure.suptitle(f"Training pictures ({label})")
    utils.save_figure(figure, args.out / "samples.png")
    print(f"\nwrote {args.out / 'samples.png'}")
    if data.stand_in:
        utils.notice(f"STAND-IN: these figures are for {data.name}, not for MNIST.")


if __name__ == "__main__":
    utils.run(main)
