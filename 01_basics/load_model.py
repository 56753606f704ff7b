"""Using what was trained: load it safely, predict, look at its mistakes, and read your own handwriting.

You learn here: what a checkpoint should hold, and why a pickled model should not be opened; what eval() and no_grad()
change; how scores become a prediction; and why a photograph first has to be made to look like the training pictures.

    python 01_basics/train.py                              first, to have a model
    python 01_basics/load_model.py                         all of the above on the test part
    python 01_basics/load_model.py --image my_digit.jpg    one digit, drawn or written by you, evenly lit

You should see (MNIST, after train.py with seed 0): a pickled model refused; 98.2 % of the test pictures correct in eval
mode, 87.6 % where dropout in the middle is left on; 181 of 10,000 wrong.
Writes to outputs/: mistakes.png, confusion.png. Left out on purpose: digits in a scene.
"""
import io
import pickle
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError  # Pillow comes with torchvision
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from load import as_characters, load_data, normalise
from train import SCRIPT, SimpleNN

# Shapes: N pictures, I inputs (784 pixels), K classes (10 digits), H height, W width


# ---------------------------------------------------------------------------------------------- a stranger's picture
def read_image(path: Path) -> Tensor:
    """A picture of one digit, of any size, colour and mode, as MNIST would have it: (28, 28) uint8, ink 255.

    ## LeCun et al. 1998 scaled every digit to fit a box of 20 x 20 pixels, grey at the edges, and put its centre of
    ## mass into the centre of 28 x 28. A network reads best what looks like its training pictures.
    Raises utils.InputError if path is no picture, or if the picture is blank or shows several digits.
    """
    if not path.is_file():
        raise utils.InputError(f"{path}: no such file; give a JPEG or PNG file.")
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)  # a phone notes which way is up, and does not turn the pixels
            if picture.mode in ("RGBA", "LA", "PA", "P"):
                ## White paper shows through transparent pixels, so ink on nothing has to be dark.
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
            if picture.mode[0] not in "IF":  # those have more than 256 greys; "L" would cut them off
                picture = picture.convert("L")
            grey = pil_to_tensor(picture)[0].float()  # (H, W)
            if picture.mode[0] in "IF":
                grey = (grey - grey.min()) / (grey.max() - grey.min()).clamp(min=1e-6) * 255
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise utils.InputError(f"{path} can't be read as a picture; give a JPEG or PNG file.") from error
    grey = resize(grey, min(1, 280 / max(grey.shape)))  # ten times what is needed

    ## Ink is what differs from the paper, darker or lighter. The median of the border is the paper.
    ink = (grey - edges(grey).median()).abs()  # (H, W)
    if ink.max() < 0.15 * 255:
        raise utils.InputError(f"{path} looks blank; give one clear digit, dark on light or light on dark.")
    ink = (ink / ink.max() - 0.2).clamp(min=0) / 0.8  # the paper's grain and shades fall below 0.2
    if (ink > 0.3).float().mean() > 0.5:
        raise utils.InputError(f"{path} shows no digit on paper of one shade; cut off frames and dark edges, "
                               "and light it evenly.")
    ink = keep_digit(ink, path)

    rows, columns = (torch.where((ink > 0.3).any(axis))[0] for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    ink = resize(ink, 20 / max(ink.shape))
    ## Centre of mass: the mean of the pixels' coordinates, weighted by their ink.
    top, left = (round(13.5 - ((ink.sum(1 - axis) * torch.arange(ink.shape[axis])).sum() / ink.sum()).item())
                 for axis in (0, 1))
    top, left = (max(0, min(28 - side, start)) for side, start in zip(ink.shape, (top, left)))
    out = torch.zeros(28, 28)
    out[top : top + ink.shape[0], left : left + ink.shape[1]] = ink / ink.max()
    return (out * 255).round().to(torch.uint8)


def resize(x: Tensor, scale: float) -> Tensor:
    """x (H, W) with both sides times scale, at least one pixel each."""
    size = [max(1, round(side * scale)) for side in x.shape]
    return F.interpolate(x[None, None], size, mode="bilinear", antialias=True)[0, 0]


def edges(x: Tensor) -> Tensor:
    """The numbers along the border of x (H, W), (2 H + 2 W,)."""
    return torch.cat([x[0], x[-1], x[:, 0], x[:, -1]])


def keep_digit(ink: Tensor, path: Path) -> Tensor:
    """ink (H, W), without specks. Raises utils.InputError if two things stand side by side, each as high as a digit.

    ## Pixels that touch get one label. Each starts with a number of its own and takes the largest of its neighbours'
    ## numbers, again and again, until nothing changes.
    """
    mask = ink > 0.3
    label = torch.where(mask, torch.arange(1, ink.numel() + 1).view(ink.shape), 0).float()  # exact below 2^24
    while True:
        grown = F.max_pool2d(label[None], 5, stride=1, padding=2)[0] * mask  # over gaps of a pixel, too
        if torch.equal(grown, label):
            break
        label = grown
    ## What touches the border is the edge of the paper or of a table, unless there is nothing else but specks.
    edge = edges(label).unique()
    inside = label[mask & ~torch.isin(label, edge)].unique(return_counts=True)[1]
    if len(inside) and inside.max() > max(9, 0.0005 * label.numel()):
        label = torch.where(torch.isin(label, edge), 0.0, label)
    numbers, counts = label[label > 0].unique(return_counts=True)
    kept = torch.isin(label, numbers[counts >= 0.1 * counts.max()])  # the rest are specks
    ## Between two digits there are columns without ink, and on both sides of them something about equally high. What
    ## lies above the rest, such as the upper stroke of a 5, shares its columns.
    columns = F.max_pool1d(kept.any(0).float()[None], 3, stride=1, padding=1)[0]  # (W,), small gaps closed
    group = (columns.diff(prepend=torch.zeros(1)) > 0).cumsum(0)  # (W,): 1 from the first thing on, 2 from the next
    heights = torch.stack([kept[:, group == k].any(1).sum() for k in range(1, group.max() + 1)])
    if (heights > 0.4 * heights.max()).sum() > 1:
        raise utils.InputError(f"{path} shows several things as large as a digit; cut out one of them.")
    return torch.where(kept, ink, 0.0)


# ---------------------------------------------------------------------------------------------- lessons
def load_network(path: Path) -> tuple[SimpleNN, dict]:
    """The network that train.py wrote to path, in eval mode, and all else that the file holds.

    Raises utils.InputError for any other file.
    """
    saved = utils.load_checkpoint(path, SCRIPT)
    model = SimpleNN(**saved["config"])
    model.load_state_dict(saved["model"])
    return model.eval(), saved


def show_loading(model: nn.Module) -> None:
    """Print what a state_dict is, and that a pickled model is refused before anything in it runs."""
    print("a state_dict is names and numbers:", {name: tuple(v.shape) for name, v in model.state_dict().items()})
    ## torch.save(model) pickles the object. Pickle is a small programming language: a file says which functions to call
    ## with which arguments, and unpickling calls them. So the author of the file decides what runs on your machine. It
    ## also breaks whenever the class is renamed or moved. weights_only=True allows tensors and plain values alone.
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    try:
        torch.load(whole, weights_only=True)
    except pickle.UnpicklingError as error:
        print(f"the whole model, pickled, is refused ({type(error).__name__}): it asks to import and call "
              f"{type(model).__module__}.{type(model).__name__}\n")


def show_modes(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Print what eval() and no_grad() change, on pictures x (N, I) with labels y (N,)."""
    ## Dropout zeroes a random half of the hidden units in training, so that none can rely on another. In use all of
    ## them should speak. SimpleNN has none; here it is put in between, to see what forgetting eval() does.
    dropped = nn.Sequential(model.hidden, nn.ReLU(), nn.Dropout(0.5), model.out)
    torch.manual_seed(0)
    with torch.no_grad():
        first, again, evaluated = ((dropped.train(training)(x).argmax(1) == y).float().mean().item()
                                   for training in (True, True, False))
    print(f"with dropout 0.5 in the middle: in train mode {first:.2%}, asked again {again:.2%}; after eval() "
          f"{evaluated:.2%}, always")
    ## With gradients on, every operation keeps what its derivative needs, until backward() or as long as its result
    ## lives. Only tensors that would otherwise be gone are counted: neither the weights nor x.
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        model(x)
    there_anyway = {t.data_ptr() for t in (x, *model.parameters())}
    extra = sum(size for place, size in kept.items() if place not in there_anyway)
    print(f"one forward pass over {len(x):,} pictures keeps {extra / 1e6:.0f} MB for a backward pass that never comes; "
          "under no_grad() it keeps nothing\n")


def show_prediction(logits: Tensor) -> None:
    """Print one picture's scores, (K,), as probabilities and as a prediction.

    ##     p_k = exp(l_k) / sum_j exp(l_j)
    ## Only differences count: a lead of 2.3 is ten times the probability. The largest logit stays the largest, so a
    ## prediction needs no softmax. A high p is no promise: the network must name a digit, even for a picture of a cat.
    """
    p = logits.softmax(0)
    print("digit        " + "".join(f"{k:>9}" for k in range(10)))
    print("logit        " + "".join(f"{v:9.2f}" for v in logits.tolist()))
    print("probability  " + "".join(f"{v:9.2%}" for v in p.tolist()) + f"   -> {p.argmax().item()}\n")


# ---------------------------------------------------------------------------------------------- pictures
def draw_confusion(confusion: Tensor, label: str, path: Path) -> None:
    """Draw how often each true digit (rows of confusion (K, K)) was called what (columns)."""
    figure, axes = utils.pyplot().subplots(figsize=(6, 5.4))
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.sqrt().numpy(), cmap="Blues", vmin=0, vmax=2)  # never dark: the numbers are black
    for i, j in confusion.nonzero().tolist():
        axes.text(j, i, confusion[i, j].item(), ha="center", va="center", fontsize=7)
    axes.set(xticks=range(10), yticks=range(10), xlabel="said", ylabel="true",
             title=f"Confusion matrix ({label}, test)")
    axes.grid(False)
    utils.write_atomically(path, figure.savefig)


def draw_mistakes(x: Tensor, y: Tensor, p: Tensor, label: str, path: Path) -> None:
    """Draw the 24 worst mistakes among pictures x (N, H, W) with digits y (N,) and probabilities p (N, K)."""
    ## Looking at the test part is fine. Changing the recipe because of what you see there is not: that would be picking
    ## by the test, and its figure would no longer be one for new digits.
    ## The worst mistakes are those where the correct digit got the least: the largest losses.
    said = p.argmax(1)
    wrong = (said != y).nonzero()[:, 0]
    wrong = wrong[p[wrong, y[wrong]].argsort()]
    figure, axes = utils.pyplot().subplots(3, 8, figsize=(9, 4.6), subplot_kw={"xticks": [], "yticks": []})
    for a, i in zip(axes.flat, wrong.tolist()):
        a.imshow(x[i].numpy(), cmap="gray_r", vmin=0, vmax=255)
        a.set_title(f"a {y[i]}, said {said[i]}\n({p[i, said[i]]:.0%})", fontsize=8)
    figure.suptitle(f"The worst mistakes ({label}, test)")
    figure.tight_layout()
    utils.write_atomically(path, figure.savefig)


def main() -> None:
    parser = utils.parser(__doc__, __file__)
    parser.add_argument("--image", type=Path, help="read this picture of one digit instead")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "outputs" / "model.pt",
                        help="what train.py wrote")
    args = utils.parse_args(parser)
    model, saved = load_network(args.model)
    if args.image:
        x = read_image(args.image)
        print(f"what the network sees of {args.image}:\n{as_characters(x)}\n")
        with torch.no_grad():
            show_prediction(model(normalise(x[None], saved["mean"], saved["std"]).flatten(1))[0])
        utils.stand_in_notice(saved["data"], saved["stand_in"])
        return

    data = load_data(saved["data"])
    x = normalise(data.test_x, saved["mean"], saved["std"]).flatten(1)  # (N, I)
    y = data.test_y
    show_loading(model)
    show_modes(model, x, y)
    with torch.no_grad():
        logits = model(x)  # (N, K)
    print(f"the first test picture, a {y[0]}:")
    show_prediction(logits[0])

    said = logits.argmax(1)
    wrong = (said != y).sum().item()
    print(f"{data.label}: {1 - wrong / len(y):.2%} of {len(y):,} test pictures correct, {wrong} wrong")
    confusion = torch.bincount(y * 10 + said, minlength=100).view(10, 10)  # rows: true, columns: said
    pairs = (confusion * (1 - torch.eye(10, dtype=torch.long))).flatten().topk(3)
    print("most often: " + ", ".join(f"{n} times a {i // 10} was called {i % 10}"
                                     for n, i in zip(pairs.values.tolist(), pairs.indices.tolist())))
    draw_confusion(confusion, data.label, args.out / "confusion.png")
    draw_mistakes(data.test_x, y, logits.softmax(1), data.label, args.out / "mistakes.png")
    print(f"\nwrote confusion.png and mistakes.png to {args.out}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
