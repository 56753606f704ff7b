"""Handwritten digits as numbers: what MNIST is, and how a picture becomes something a network can multiply.

You learn here: that a picture is a table of bytes; how data is split so that a figure can be believed; what normalising
does, and on which part its two numbers are fitted; and that all of MNIST fits into memory as one tensor.

    python 01_basics/load.py                     MNIST (downloaded once, 12 MB)
    python 01_basics/load.py --data typeset      the stand-in: digits drawn with the fonts that ship with matplotlib

You should see (MNIST): 55,000 / 5,000 / 10,000 pictures of 28 x 28 pixels; mean 0.13 and standard deviation 0.31.
Writes: outputs/samples.png. Left out on purpose: a DataLoader, which is for data that does not fit into memory.
"""
import hashlib
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont  # Pillow comes with torchvision
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

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
    folder, part = utils.DATA_DIR / "MNIST", utils.DATA_DIR / "MNIST.part"
    if not folder.exists():  # only a complete set gets this name
        for name, md5 in MNIST.resources:
            utils.download([mirror + name for mirror in MNIST.mirrors], part / "MNIST" / "raw" / name, md5)
        MNIST(part, download=True)  # finds the files, and unpacks them
        (part / "MNIST").replace(folder)
        part.rmdir()
    tensors = []
    for name, sha256 in SHA256.items():
        try:
            digits = MNIST(utils.DATA_DIR, train=name == "train")
            found = hashlib.sha256(digits.data.numpy().tobytes() + digits.targets.numpy().tobytes()).hexdigest()
            if found != sha256:
                raise ValueError("not the original files")
        except (RuntimeError, ValueError, AssertionError) as error:
            raise utils.InputError(f"{folder}: the {name} files are damaged, missing or not the original ones; delete "
                                   "the folder to have it downloaded again.") from error
        tensors += [digits.data, digits.targets]
    x, y, test_x, test_y = tensors
    ## The last 5,000 training pictures become the validation part. Validation picks: when to stop, which option is
    ## better. The test part is looked at once, at the end. Were it used for picking, its figure would be the best of
    ## many tries, and not what to expect on new digits.
    return with_statistics(x[:-5000], y[:-5000], x[-5000:], y[-5000:], test_x, test_y, name="mnist")


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
    angle, scale, slant, shift = uniform(-0.25, 0.25), uniform(0.8, 1.25), uniform(-0.3, 0.3), uniform(-0.2, 0.2, 2)
    affine = torch.stack([angle.cos() * scale, slant - angle.sin() * scale, shift[:, 0],
                          angle.sin() * scale, angle.cos() * scale, shift[:, 1]], 1).view(n, 2, 3)
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
    """What a network has to beat, as entries of metrics.json: the test accuracies of two simpler ways.

    majority: always naming the digit that is most frequent in the training part. linear: softmax regression (logistic
    regression for K classes) on the pixels.
    """
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
    said = {"majority": y.bincount().argmax(), "linear": model(test_x).argmax(1)}
    return {f"{name}_accuracy": (digits == test_y).float().mean().item() for name, digits in said.items()}


def as_characters(x: Tensor) -> str:
    """A picture (H, W) uint8 as text: two characters per pixel, darker for more ink."""
    return "\n".join("".join(" .:-=+*#%@"[v * 10 // 256] * 2 for v in row) for row in x.tolist())


def main() -> None:
    parser = utils.parser(__doc__, __file__, "seed")
    parser.add_argument("--data", help="mnist or typeset; without it MNIST, or typeset if that is out of reach")
    args = utils.parse_args(parser)
    torch.manual_seed(args.seed)
    data = load_data(args.data)
    x = data.train_x
    print(f"{data.label}: {data.sizes}\none picture: {tuple(x[0].shape)} {x.dtype}; all training pictures: "
          f"{x.nbytes / 1e6:.0f} MB, one tensor in memory\n\nthe first one, a {data.train_y[0]}, its numbers as "
          f"characters:\n{as_characters(x[0])}\n\ntraining pictures of 0 to 9: {data.train_y.bincount().tolist()}")
    print("correct on the test part: {majority_accuracy:.1%} by always naming the most frequent digit, "
          "{linear_accuracy:.1%} by a linear model on the pixels".format(**baselines(data)))
    print(f"pixels, 0 to 1:    mean {data.mean:.3f}, std {data.std:.3f}; {(x == 0).float().mean():.0%} are 0: paper")
    for part, (values, _) in zip(("training", "validation", "test"), prepare(data)):
        print(f"{part}, normalised: mean {values.mean():.3f}, std {values.std():.3f}, at most {values.max():.3f}")

    ## Twelve training pictures of each digit, as one picture.
    rows = torch.cat([(data.train_y == k).nonzero()[:12, 0] for k in range(10)])
    figure, axes = utils.pyplot().subplots(figsize=(8, 7))
    axes.imshow(make_grid(x[rows, None], nrow=12)[0].numpy(), cmap="gray_r")
    axes.set(title=f"Training pictures ({data.label})", xticks=[], yticks=[])
    utils.write_atomically(args.out / "samples.png", figure.savefig)
    print(f"\nwrote {args.out / 'samples.png'}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
