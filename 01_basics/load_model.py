"""Using what was trained: load it safely, predict, look at its mistakes, and read your own handwriting.

You learn here: what a checkpoint should hold and why a pickled model should not be opened; what eval() and no_grad()
change, in numbers; how scores become probabilities and a prediction; and why a photograph has to be made to look like
the training pictures first.

    python 01_basics/train.py                              first, to have a model
    python 01_basics/load_model.py                         all of the above on the test part
    python 01_basics/load_model.py --image my_digit.jpg    one digit, drawn or written by you, evenly lit

You should see (MNIST, after train.py with seed 0): a pickled model refused; 98.2 % of the test pictures right in eval
mode, 87.6 % where dropout in the middle is left on; 181 of 10,000 wrong.
Writes to outputs/: mistakes.png, confusion.png; with --image: image.png. Left out on purpose: digits in a scene.
"""

import io
import pickle
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError  # Pillow comes with torchvision
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils  # noqa: E402
from load import as_characters, load_data, normalise  # noqa: E402
from train import SCRIPT, SimpleNN  # noqa: E402

# Shapes: N pictures, I inputs (784 pixels), K classes (10 digits), H height, W width


# ---------------------------------------------------------------------------------------------- a stranger's picture
def read_image(path: Path) -> Tensor:
    """A picture of one digit, of any size, colour and mode, as MNIST would have it: (28, 28) uint8, ink 255.

    ## LeCun et al. 1998 scaled every digit to fit a box of 20 x 20 pixels, grey at the edges, and put its centre of
    ## mass into the centre of 28 x 28. A network reads best what looks like its lessons.
    Raises utils.InputError for what is no picture, is blank, or shows several digits.
    """
    if not path.is_file():
        raise utils.InputError(f"--image {path}: no such file; give a JPEG or PNG file.")
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)  # a phone writes down which way is up, instead of turning
            if picture.mode in ("RGBA", "LA", "PA", "P"):
                ## What is transparent shows paper: white, or black where the ink is light.
                picture = picture.convert("RGBA")
                visible = pil_to_tensor(picture)[:3, pil_to_tensor(picture)[3] > 127].float()
                paper = "black" if visible.numel() and visible.mean() > 200 else "white"
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, paper), picture)
            if picture.mode[0] not in "IF":  # those have more than 256 greys; "L" would cut them off
                picture = picture.convert("L")
            grey = pil_to_tensor(picture)[0].float()  # (H, W)
            if picture.mode[0] in "IF":
                grey = (grey - grey.min()) / (grey.max() - grey.min()).clamp(min=1e-6) * 255
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise utils.InputError(f"--image {path} can't be read as a picture; give a JPEG or PNG file.") from error
    shrink = max(1, max(grey.shape) / 280)  # ten times what is needed
    size = [max(1, round(side / shrink)) for side in grey.shape]
    grey = F.interpolate(grey[None, None], size, mode="bilinear", antialias=True)[0, 0]

    ## Ink is what differs from the paper, darker or lighter; the paper is what most of the border shows.
    border = torch.cat([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = (grey - border.median()).abs()  # (H, W)
    ink = (ink / ink.max().clamp(min=1e-6) - 0.2).clamp(min=0) / 0.8  # the paper's grain and shades fall below 0.2
    if (grey - border.median()).abs().max() < 0.15 * 255:
        raise utils.InputError(f"--image {path} looks blank; give one clear digit, dark on light or light on dark.")
    if (ink > 0.3).float().mean() > 0.5:
        raise utils.InputError(f"--image {path} shows no digit on paper of one shade; cut off frames and dark edges, "
                               "and light it evenly.")
    ink = keep_digit(ink, path)

    rows, columns = (torch.where((ink > 0.3).any(axis))[0] for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = 20 / max(ink.shape)
    size = [max(1, round(side * scale)) for side in ink.shape]
    ink = F.interpolate(ink[None, None], size, mode="bilinear", antialias=True)[0, 0]
    ink = ink / ink.max()
    ## Centre of mass: the mean of the pixels' coordinates, weighted by their ink.
    top, left = (round(13.5 - ((ink.sum(1 - axis) * torch.arange(ink.shape[axis])).sum() / ink.sum()).item())
                 for axis in (0, 1))
    top, left = (max(0, min(28 - side, start)) for side, start in zip(ink.shape, (top, left)))
    out = torch.zeros(28, 28)
    out[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return (out * 255).round().to(torch.uint8)


def keep_digit(ink: Tensor, path: Path) -> Tensor:
    """ink (H, W), without specks. Raises utils.InputError where more than one thing is as large as a digit.

    ## Pixels that touch get one label: each starts with a number of its own and takes the largest of its neighbours'
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
    edge = torch.cat([label[0], label[-1], label[:, 0], label[:, -1]]).unique()
    inside = label[mask & ~torch.isin(label, edge)].unique(return_counts=True)[1]
    if len(inside) and inside.max() > max(9, 0.0005 * label.numel()):
        label = torch.where(torch.isin(label, edge), 0.0, label)
    numbers, counts = label[label > 0].unique(return_counts=True)
    numbers = numbers[counts >= 0.1 * counts.max()]  # the rest are specks
    boxes = []  # (left, right, top, bottom)
    for number in numbers:
        rows, columns = torch.where(label == number)
        boxes.append([columns.min().item(), columns.max().item(), rows.min().item(), rows.max().item()])
    ## Digits stand side by side, or above each other; then each is about as high as the other, and higher than wide.
    ## What hangs above the rest without being that is the upper stroke of a 5.
    boxes.sort()
    digits = boxes[:1]
    for box in boxes[1:]:
        last = digits[-1]
        heights = [b[3] - b[2] + 1 for b in (box, last)]
        widths = [b[1] - b[0] + 1 for b in (box, last)]
        beside = box[0] > last[1] and min(heights) > 0.4 * max(heights)
        above = ((box[2] > last[3] or last[2] > box[3]) and min(heights) > 0.4 * max(heights)
                 and all(h > w for h, w in zip(heights, widths)))
        if beside or above:
            digits.append(box)
        else:
            digits[-1] = [last[0], max(last[1], box[1]), min(last[2], box[2]), max(last[3], box[3])]
    if len(digits) > 1:
        raise utils.InputError(f"--image {path} shows {len(digits)} things as large as a digit; cut out one of them.")
    return torch.where(torch.isin(label, numbers), ink, 0.0)


# ---------------------------------------------------------------------------------------------- lessons
def show_loading(model: nn.Module) -> None:
    """Print what a state_dict is, and that a pickled model is refused, before anything in it runs."""
    print("a state_dict is names and numbers, nothing else:")
    for name, value in model.state_dict().items():
        print(f"    {name:16}{tuple(value.shape)!s:14}{value.dtype}")
    ## torch.save(model) pickles the object. Pickle is a small programming language: a file says which functions to call
    ## with which arguments, and unpickling calls them. So whoever wrote the file decides what runs on your machine. It
    ## also breaks whenever the class is renamed or moved. weights_only=True allows tensors and plain values alone.
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    try:
        torch.load(whole, weights_only=True)
        print("a pickled model was opened, which this version of torch should not have done\n")
    except pickle.UnpicklingError as error:
        print(f"the whole model, pickled, is refused ({type(error).__name__}): it asks to import and call "
              f"{type(model).__module__}.{type(model).__name__}\n")


def show_modes(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Print what eval() and no_grad() change, on pictures x (N, I) with labels y (N,)."""
    ## Dropout zeroes a random half of the hidden units in training, so that none can rely on another. In use all of
    ## them should speak. SimpleNN has none; here it is put in between, to see what forgetting eval() does.
    dropped = nn.Sequential(model.hidden, nn.ReLU(), nn.Dropout(0.5), model.out)
    right = lambda: (dropped(x).argmax(1) == y).float().mean().item()  # noqa: E731
    torch.manual_seed(0)
    with torch.no_grad():
        dropped.train()
        forgotten = [right(), right()]
        dropped.eval()
        print(f"with dropout 0.5 in the middle: in train mode {forgotten[0]:.2%}, asked again {forgotten[1]:.2%}; "
              f"after eval() {right():.2%}, always")
    ## With gradients on, every operation keeps what its derivative needs, until backward() or for as long as its result
    ## lives. Counted are tensors that would otherwise be gone: not the weights, and not x.
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        model(x)
    for t in (x, *model.parameters()):
        kept.pop(t.data_ptr(), None)
    with torch.no_grad():
        logits = model(x)
    seconds = {}
    for enabled in (True, False) * 5:
        with torch.set_grad_enabled(enabled):
            begun = time.perf_counter()
            model(x)[0, 0].item()  # waits for a GPU
            seconds[enabled] = min(seconds.get(enabled, 9.0), time.perf_counter() - begun)
    print(f"one forward pass over {len(x):,} pictures: {seconds[True] * 1e3:.1f} ms and "
          f"{sum(kept.values()) / 1e6:.0f} MB kept for a backward pass that never comes; under no_grad() "
          f"{seconds[False] * 1e3:.1f} ms and 0 MB "
          f"(requires_grad: {logits.requires_grad})\n")


def show_prediction(logits: Tensor) -> None:
    """Print one picture's scores, (K,), as probabilities and as a prediction.

    ##     p_k = exp(l_k) / sum_j exp(l_j)
    ## Only differences count: a lead of 2.3 is ten times the probability. The largest logit stays the largest, so
    ## that a prediction needs no softmax. A high p is no promise: the network must name a digit, even
    ## for a picture of a cat.
    """
    p = logits.softmax(0)
    print("digit        " + "".join(f"{k:>9}" for k in range(10)))
    print("logit        " + "".join(f"{v:9.2f}" for v in logits.tolist()))
    print("probability  " + "".join(f"{v:9.2%}" for v in p.tolist()) + f"   -> {p.argmax().item()}\n")


def main() -> None:
    parser = utils.parser(__doc__)
    add = parser.add_argument
    add("--data", help="mnist or typeset; without it, what the model was trained on")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--image", type=Path, help="read this picture of one digit instead")
    folder = Path(__file__).parent / "outputs"
    add("--model", type=Path, default=folder / "model.pt", help="what train.py wrote")
    add("--out", type=Path, default=folder, help="folder for the plots")
    args = parser.parse_args()
    utils.check_writable(args.out)
    device = utils.pick_device(args.device)
    saved = utils.load_checkpoint(args.model, SCRIPT, device)
    model = utils.rebuild(lambda: SimpleNN(**saved["config"]), saved, args.model).to(device)
    trained_on = saved["data"] + ", stand-in" * saved["stand_in"]
    if saved["stand_in"] and (args.image or args.data not in (None, saved["data"])):  # else load_data says so
        utils.notice(f"STAND-IN: this network was trained on {saved['data']}, not on MNIST.")
    model.eval()

    if args.image:
        x = read_image(args.image)
        print(f"what the network sees of {args.image}:\n{as_characters(x)}\n")
        with torch.no_grad():
            logits = model(normalise(x[None], saved["mean"], saved["std"]).flatten(1).to(device))[0].cpu()
        show_prediction(logits)
        figure, axes = plt.subplots(1, 2, figsize=(7, 3))
        axes[0].imshow(x, cmap="gray_r", vmin=0, vmax=255)
        axes[0].axis("off")
        axes[1].bar(range(10), logits.softmax(0))
        axes[1].set(xticks=range(10), xlabel="digit", ylabel="probability")
        figure.suptitle(f"What the network saw, and what it thinks (trained on {trained_on})")
        utils.save_figure(figure, args.out / "image.png")
        print(f"wrote {args.out / 'image.png'}")
        if saved["stand_in"]:
            utils.notice(f"STAND-IN: this network was trained on {saved['data']}, not on MNIST.")
        return

    data = load_data(args.data or saved["data"])
    label = data.name + ", stand-in" * data.stand_in
    if saved["data"] != data.name:
        label += f", trained on {trained_on}"
    x, y = normalise(data.test_x, saved["mean"], saved["std"]).flatten(1).to(device), data.test_y.to(device)
    show_loading(model)
    show_modes(model, x, y)
    with torch.no_grad():
        logits = model(x)  # (N, K)
    print(f"the first test picture, a {y[0]}:")
    show_prediction(logits[0].cpu())

    p = logits.softmax(1).cpu()  # (N, K)
    y, predicted = y.cpu(), p.argmax(1)
    right = predicted == y
    print(f"{label}: {right.float().mean():.2%} of {len(y):,} test pictures right, {(~right).sum()} wrong")
    confusion = torch.bincount(y * 10 + predicted, minlength=100).view(10, 10)  # rows: true, columns: said
    print("true \\ said" + "".join(f"{k:6}" for k in range(10)) + "   found")
    for k, row in enumerate(confusion):
        print(f"{k:11}" + "".join(f"{n:6}" for n in row.tolist()) + f"{row[k] / row.sum().clamp(min=1):9.1%}")
    pairs = (confusion * (1 - torch.eye(10, dtype=torch.long))).flatten().topk(3)
    print("most often: " + ", ".join(f"{n} times a {i // 10} was called {i % 10}"
                                     for n, i in zip(pairs.values.tolist(), pairs.indices.tolist())))

    figure, axes = plt.subplots(figsize=(6, 5.4))
    axes.imshow((confusion / confusion.sum(1, keepdim=True).clamp(min=1)).sqrt(), cmap="Blues", vmin=0, vmax=1)
    for i in range(10):
        for j in range(10):
            if confusion[i, j]:
                axes.text(j, i, confusion[i, j].item(), ha="center", va="center", fontsize=7,
                          color="white" if i == j else "black")
    axes.set(xticks=range(10), yticks=range(10), xlabel="said", ylabel="true",
             title=f"Confusion matrix ({label}, test)")
    axes.grid(False)
    utils.save_figure(figure, args.out / "confusion.png")
    ## Looking at the test part is fine. Changing the recipe because of what you see there is not: that would be picking
    ## by the test, and its figure would no longer be one for new digits.
    ## The worst mistakes are those where the right digit got the least: the largest losses.
    wrong = (~right).nonzero()[:, 0]
    wrong = wrong[p[wrong, y[wrong]].argsort()][:24]
    figure, axes = plt.subplots(3, 8, figsize=(9, 4.6))
    for a in axes.flat:
        a.axis("off")
    for a, i in zip(axes.flat, wrong.tolist()):
        a.imshow(data.test_x[i], cmap="gray_r", vmin=0, vmax=255)
        a.set_title(f"a {y[i]}, said {predicted[i]}\n({p[i, predicted[i]]:.0%})", fontsize=8)
    figure.suptitle(f"The worst mistakes ({label}, test)")
    figure.tight_layout()
    utils.save_figure(figure, args.out / "mistakes.png")
    print(f"\nwrote confusion.png and mistakes.png to {args.out}")
    if data.stand_in:
        utils.notice(f"STAND-IN: these figures are for {data.name}, not for MNIST.")


if __name__ == "__main__":
    utils.run(main)
