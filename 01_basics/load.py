"""Handwritten digits as numbers: what MNIST is, and how a picture becomes something a network can multiply.

You learn here: that a picture is a table of bytes; how data is split so that a figure can be believed; what normalising
does, and on which part its two numbers are fitted; and that all of MNIST fits into memory as one tensor.

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

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont  # Pillow comes with torchvision
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.transforms.functional import pil_to_tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils

# Shapes: N pictures, I inputs (784 pixels), H height, W width (28 each), K classes (10 digits)
## (N, I) reads: a table of N rows and I columns; (N,) is a list of N numbers; () is a single number.

SHA256 = {  # of the pictures' bytes followed by the labels'
    "train": "d18cfd466eb143ac1097fde604dba9eec4116885869d04cc648b510949f9e88c",
    "test": "a0863a96c44e5666edbb30c4071ee79ca0514c621e6349c5967fc78e7305c891",
}
FONTS = {  # files of matplotlib's; an oblique is its upright font, slanted, so each family is in one part only
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
    name: str
    stand_in: str = ""  # the real set whose place it takes; empty for a real one

    @property
    def label(self) -> str:
        """What plots and tables call this set."""
        return self.name + ", stand-in" * bool(self.stand_in)

    @property
    def sizes(self) -> str:
        """How many pictures each part has."""
        return "{:,} pictures to train on, {:,} to validate, {:,} to test".format(*map(len, self[1:6:2]))

    @property
    def facts(self) -> dict:
        """What a model's file says of its data, so that other pictures are normalised in the same way."""
        return {"data": self.name, "stand_in": self.stand_in, "mean": self.mean, "std": self.std}


def with_statistics(*parts: Tensor, name: str, stand_in: str = "") -> Data:
    """Data of the six tensors, in its order; mean and std are those of the training pictures."""
    pixels = parts[0].double() / 255
    return Data(*parts, pixels.mean().item(), pixels.std().item(), name, stand_in)


# ---------------------------------------------------------------------------------------------- the real set
def read_mnist() -> Data:
    """MNIST (LeCun et al. 1998), downloaded if it is not there.

    Raises ConnectionError if no mirror answers; utils.InputError if the files, or what a mirror sent, are damaged.
    """
    folder = utils.DATA_DIR / "MNIST" / "raw"
    names = {name.removesuffix(".gz") for name, _ in MNIST.resources}
    missing = {name for name in names if not (folder / name).exists()}
    advice = f"delete {folder} to have it downloaded again."
    if missing == names:
        download_mnist(folder)
    elif missing:
        raise utils.InputError(f"{folder} lacks {', '.join(sorted(missing))}; {advice}")
    tensors = []
    for part in ("train", "test"):
        try:
            digits = MNIST(utils.DATA_DIR, train=part == "train")
        except (RuntimeError, ValueError, AssertionError) as error:
            raise utils.InputError(f"{folder} is damaged; {advice}") from error
        found = hashlib.sha256(digits.data.numpy().tobytes() + digits.targets.numpy().tobytes()).hexdigest()
        if found != SHA256[part]:
            raise utils.InputError(f"the {part} files in {folder} are not the original ones; {advice}")
        tensors += [digits.data, digits.targets]
    x, y, test_x, test_y = tensors
    ## The last 5,000 training pictures become the validation part. Validation picks: when to stop, which option is
    ## better. The test part is looked at once, at the end. Were it used for picking, its figure would be the best of
    ## many tries, and not what to expect on new digits.
    return with_statistics(x[:-5000], y[:-5000], x[-5000:], y[-5000:], test_x, test_y, name="mnist")


def download_mnist(folder: Path) -> None:
    """Download and unpack MNIST's four files; only a complete set gets the name `folder`."""
    temporary = utils.DATA_DIR / "mnist.part"
    shutil.rmtree(temporary, ignore_errors=True)
    socket.setdefaulttimeout(30)
    try:
        MNIST(temporary, download=True)
    except (RuntimeError, URLError, ConnectionError, TimeoutError) as error:
        if "corrupted" in str(error):
            raise utils.InputError("a mirror sent files that are not MNIST's; nothing was kept, so try again later "
                                   f"or put the original ones into {folder}.") from error
        raise ConnectionError(f"MNIST could not be downloaded; by hand: its four files, unpacked, from "
                              f"{MNIST.mirrors[0]}, into {folder}; offline: --data typeset.") from error
    finally:
        socket.setdefaulttimeout(None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    (temporary / "MNIST" / "raw").replace(folder)
    shutil.rmtree(temporary)


# ---------------------------------------------------------------------------------------------- the stand-in
def draw_digits() -> Data:
    """Typeset digits in MNIST's form; every part has fonts of its own."""
    return with_statistics(*typeset(10_000, "train", 1), *typeset(1_000, "val", 2), *typeset(1_000, "test", 3),
                           name="typeset", stand_in="MNIST")


def typeset(n: int, part: str, seed: int) -> tuple[Tensor, Tensor]:
    """n digits in a part's fonts, shifted, turned, scaled, slanted and noisy: (N, 28, 28) uint8 and labels (N,)."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    ## Each font's ten digits are drawn once, large. Everything else is done to the whole batch at once.
    glyphs = torch.stack([torch.stack([glyph(font, digit) for digit in range(10)]) for font in FONTS[part]])
    y = torch.randint(10, (n,), generator=g)
    x = glyphs[torch.randint(len(glyphs), (n,), generator=g), y][:, None]  # (N, 1, 56, 56)

    ## An affine map says which point of the source each pixel of the result shows: (u, v) = map (column, row, 1).
    angle, scale, slant = uniform(-0.25, 0.25), uniform(0.8, 1.25), uniform(-0.3, 0.3)
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 0, 1] = angle.cos() * scale, -angle.sin() * scale + slant
    affine[:, 1, 0], affine[:, 1, 1] = angle.sin() * scale, angle.cos() * scale
    affine[:, :, 2] = uniform(-0.2, 0.2, 2)
    x = F.grid_sample(x, F.affine_grid(affine, [n, 1, 28, 28], align_corners=False), align_corners=False)
    x = x * uniform(0.6, 1.0, 1, 1, 1) + 0.08 * torch.randn(x.shape, generator=g)
    return (x[:, 0].clamp(0, 1) * 255).to(torch.uint8), y


def glyph(font: str, digit: int, size: int = 56) -> Tensor:
    """One digit of one of matplotlib's fonts, centred: (size, size) float, 0 to 1."""
    import matplotlib
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    picture = Image.new("L", (size, size))
    ImageDraw.Draw(picture).text((size / 2, size / 2), str(digit), 255, ImageFont.truetype(str(file), 52), anchor="mm")
    return pil_to_tensor(picture)[0] / 255


# ---------------------------------------------------------------------------------------------- all of it
SETS = {"mnist": read_mnist, "typeset": draw_digits}


def load_data(data: str | None = None) -> Data:
    """The set named data; None is MNIST, or its stand-in if MNIST is out of reach.

    Raises ConnectionError if a set that was named is out of reach, utils.InputError if it is unknown or damaged.
    """
    if data not in (None, *SETS):
        raise utils.InputError(f"data {data} is not known; there are: {', '.join(SETS)}.")
    try:
        loaded = SETS[data or "mnist"]()
    except ConnectionError as error:
        if data:  # asked for by name: never replaced by something else
            raise
        print(error)
        loaded = draw_digits()
    utils.stand_in_notice(loaded.name, loaded.stand_in)
    return loaded


def normalise(x: Tensor, mean: float, std: float) -> Tensor:
    """Bytes to numbers around zero: (N, H, W) uint8 -> (N, H, W) float32.

    ##     x' = (x / 255 - mean) / std
    ## The usual initial weights and learning rates suit inputs of about size 1; experiment.py shows what happens
    ## without. The two numbers come from the training part alone: a network in use can't know either what tomorrow's
    ## pictures look like on average.
    """
    return (x.float() / 255 - mean) / std


def prepare(data: Data, device: torch.device | str = "cpu") -> list[tuple[Tensor, Tensor]]:
    """The parts train, validation and test as a network takes them: x (N, I) float32, y (N,) each, on the device."""
    return [(normalise(x, data.mean, data.std).flatten(1).to(device), y.to(device))
            for x, y in (data[:2], data[2:4], data[4:6])]


def baselines(data: Data) -> dict[str, float]:
    """What a network has to beat, as entries of metrics.json."""
    return {"majority_accuracy": majority_baseline(data), "linear_accuracy": linear_baseline(data)}


def majority_baseline(data: Data) -> float:
    """Test accuracy of always naming the digit that is most frequent in the training part."""
    return (data.test_y == data.train_y.bincount().argmax()).float().mean().item()


def linear_baseline(data: Data) -> float:
    """Test accuracy of softmax regression (logistic regression for K classes) on the pixels."""
    (x, y), _, (test_x, test_y) = prepare(data)
    model = torch.nn.Linear(x.shape[1], 10)
    torch.nn.init.zeros_(model.weight)
    ## L-BFGS looks at all pictures in every step. It fits best where, as here, there is a single valley to go down.
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=40, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(model(x), y)
        value.backward()
        return value

    optimizer.step(loss)
    return (model(test_x).argmax(1) == test_y).float().mean().item()


def as_characters(x: Tensor) -> str:
    """A picture (H, W) uint8 as text: two characters per pixel, darker for more ink."""
    return "\n".join("".join(" .:-=+*#%@"[v * 10 // 256] * 2 for v in row) for row in x.tolist())


def draw_samples(data: Data, path: Path) -> None:
    """Write a picture with twelve training digits of each class."""
    figure, axes = utils.pyplot().subplots(10, 12, figsize=(8, 7), subplot_kw={"xticks": [], "yticks": []})
    for k, row in enumerate(axes):
        of_k = (data.train_y == k).nonzero()[:, 0]
        for a, i in zip(row, of_k[torch.randperm(len(of_k))]):
            a.imshow(data.train_x[i].numpy(), cmap="gray_r", vmin=0, vmax=255)
    figure.suptitle(f"Training pictures ({data.label})")
    utils.write_atomically(path, figure.savefig)


def main() -> None:
    parser = utils.parser(__doc__, __file__, "seed")
    parser.add_argument("--data", help="mnist or typeset; without it MNIST, or typeset if that is out of reach")
    args = utils.parse_args(parser)
    torch.manual_seed(args.seed)
    data = load_data(args.data)
    print(f"{data.label}: {data.sizes}\none picture: {tuple(data.train_x[0].shape)} {data.train_x.dtype}; all training "
          f"pictures: {data.train_x.nbytes / 1e6:.0f} MB, one tensor in memory\n")
    print(f"the first one, a {data.train_y[0]}, its numbers as characters:\n{as_characters(data.train_x[0])}\n")
    print(f"{'digit':8}{'train':>8}{'val':>8}{'test':>8}")
    for k in range(10):
        print(f"{k:<8}" + "".join(f"{(y == k).sum():8,}" for y in (data.train_y, data.val_y, data.test_y)))
    print(f"\nalways naming the most frequent digit: {majority_baseline(data):.1%} of the test pictures; a linear "
          f"model on the pixels: {linear_baseline(data):.1%}; the loss of guessing, which from_scratch.py explains: "
          f"ln 10 = {math.log(10):.4f}\n\n{'pixels':24}{'mean':>8}{'std':>8}{'min':>8}{'max':>8}")
    for name, values in (("train, 0 to 1", data.train_x.float() / 255),
                         ("train, normalised", normalise(data.train_x, data.mean, data.std)),
                         ("test, by train's numbers", normalise(data.test_x, data.mean, data.std))):
        print(f"{name:24}" + "".join(f"{v:8.3f}" for v in (values.mean(), values.std(), values.min(), values.max())))
    print(f"{(data.train_x == 0).float().mean():.0%} of all pixels are 0: paper")
    draw_samples(data, args.out / "samples.png")
    print(f"\nwrote {args.out / 'samples.png'}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
