"""Use a trained network: name pictures, count its mistakes, and look at what it looks at.

You learn here: precision, recall and F1, and how to read a confusion matrix; that a network can be sure and wrong; what
its first filters respond to; and Grad-CAM, which shows the places in a picture that a decision rests on.

    python 02_cnn/train.py                               first, to have a model
    python 02_cnn/load_model.py                          the test part of what train.py was trained on
    python 02_cnn/load_model.py --image my_cat.jpg       one picture of your own

You should see (train.py's default on CIFAR-10 as JPEG, seed 0): 89.9 % named correctly; F1 from 79.5 % (cat, most often
taken for a dog) to 95.2 % (automobile).
Writes to outputs/: predictions.png, confusion.png, mistakes.png, filters.png, feature_maps.png, grad_cam.png; with
--image only the last.
Left out on purpose: calibration, detection and segmentation.
"""

import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from load import CHANGED, grid, load_data, read_picture
from train import SCRIPT, ResNet, Simple, build, predict

# Shapes: N pictures, B batch, C channels in, M channels out (filters), H height, W width, K classes


def load_network(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """The network that train.py saved, ready to name pictures, and the rest of its file: classes, data, dtype.

    Raises utils.InputError where the file is missing, damaged, or of another version's model.
    """
    saved = utils.load_checkpoint(path, SCRIPT)
    try:
        model = build(saved["config"], saved["mean"], saved["std"])
        model.load_state_dict(saved["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise utils.InputError(f"{path} is of another version of the model; make it anew: python {SCRIPT}") from error
    return model.to(device).eval(), saved


# ---------------------------------------------------------------------------------------------- counting
def confusion_matrix(y: Tensor, guess: Tensor, K: int) -> Tensor:
    """Counts (K, K): row k, column j is how many pictures of class k were named j. y and guess are (N,)."""
    return torch.bincount(y * K + guess, minlength=K * K).view(K, K)


def precision_recall_f1(confusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(K,) each, from a confusion matrix (K, K); 0 where a class was never named or never occurs.

    ## Of all pictures named cat, how many are cats: precision. Of all cats, how many were named so: recall. Either
    ## alone is easy (name one sure cat; name everything cat), so F1 takes their harmonic mean, 2 p r / (p + r), which
    ## is small where either is.
    """
    right = confusion.diag().double()
    precision = right / confusion.sum(0).clamp(min=1)  # over a column: all that were named k
    recall = right / confusion.sum(1).clamp(min=1)  # over a row: all that are k
    return precision, recall, 2 * precision * recall / (precision + recall).clamp(min=1e-12)


# ---------------------------------------------------------------------------------------------- looking inside
def parts_of(model: nn.Module) -> tuple[nn.Module, Tensor, nn.Module]:
    """First convolution, its filters (M, 3, side, side), and Grad-CAM's layer: the last of at least 7 x 7 places."""
    if isinstance(model, Simple):
        return model[1], model[1].weight.view(-1, 3, 3, 3), model[11]
    if isinstance(model, ResNet):
        return model.stem, model.stem.weight, model.blocks[1]
    return model.body.conv1, model.body.conv1.weight, model.body.layer3


def outputs_of(layer: nn.Module, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What `layer` gives while model reads pictures x (B, 3, H, W): ((B, C, h, w), logits (B, K)), with gradients."""
    caught = []
    hook = layer.register_forward_hook(lambda module, inputs, output: caught.append(output))
    ## A fresh leaf, so that gradients are kept even where all weights are frozen.
    logits = model(x.float().requires_grad_())
    hook.remove()
    return caught[0], logits


def grad_cam(model: nn.Module, x: Tensor, k: Tensor, average: bool = True) -> Tensor:
    """Where the logits of classes k (B,) come from in pictures x (B, 3, H, W): maps (B, H, W) from 0 to 1.

    ##     weight_c = mean over places of d logit_k / d A_c        (Selvaraju et al. 2017, equation 1)
    ##     map = ReLU(sum over c of weight_c A_c)                  (equation 2)
    ## A is a late layer, whose channels already stand for parts of things and still know where these are. A channel
    ## counts by how much more of it would raise the logit; the ReLU leaves out what speaks for other classes.
    ##
    ## The mean gives a channel one weight for all places. Where the network looks at the strongest place alone, as the
    ## maximum at the end of simple and resnet does, that weight is wrong at the others, and a map can even be empty.
    ## Without `average` each place keeps its own weight, d logit_k / d A_c there (HiResCAM, Draelos and Carin 2020).
    """
    with torch.enable_grad():
        a, logits = outputs_of(parts_of(model)[2], model, x)  # (B, C, h, w), (B, K)
        gradient, = torch.autograd.grad(logits[torch.arange(len(x)), k].sum(), a)
    weight = gradient.mean((2, 3), keepdim=True) if average else gradient  # (B, C, 1, 1) or (B, C, h, w)
    cam = (weight * a).sum(1, keepdim=True).relu().detach()  # (B, 1, h, w)
    cam = F.interpolate(cam.float(), size=x.shape[2:], mode="bilinear")[:, 0]  # (B, H, W)
    return cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)


def stretch(x: Tensor) -> Tensor:
    """Each of (N, C, H, W) to the range 0 to 1, for drawing."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return (x - low) / (high - low).clamp(min=1e-12)


# ---------------------------------------------------------------------------------------------- drawing
def draw_pictures(path: Path, x: Tensor, captions: list[str], title: str, maps: Tensor | None = None) -> None:
    """Draw pictures x (N, 3, H, W) uint8 with a line above each; maps (N, H, W) are laid over them."""
    columns = min(8, len(x))
    rows = -(-len(x) // columns)
    figure, axes = utils.pyplot().subplots(rows, columns, squeeze=False,
                                         figsize=(max(6.0, 1.5 * columns), 1.85 * rows + 0.4))
    for a in axes.flat:
        a.axis("off")
    for i, (a, caption) in enumerate(zip(axes.flat, captions)):
        a.imshow(x[i].permute(1, 2, 0))
        if maps is not None:
            a.imshow(maps[i], cmap="inferno", alpha=0.55, vmin=0, vmax=1)
        a.set_title(caption, fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    utils.write_atomically(path, figure.savefig)


def draw_confusion(path: Path, confusion: Tensor, classes: list[str], title: str) -> None:
    """Draw the matrix (K, K) with its counts; the colour is the share of the row."""
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    figure, axes = utils.pyplot().subplots(figsize=(1.5 + 0.6 * len(classes), 1.2 + 0.6 * len(classes)))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    for row in range(len(classes)):
        for column in range(len(classes)):
            axes.text(column, row, int(confusion[row, column]), ha="center", va="center", fontsize=8,
                      color="white" if share[row, column] > 0.5 else "black")
    axes.set(title=title, xlabel="named", ylabel="is")
    axes.grid(False)
    utils.write_atomically(path, figure.savefig)


def main() -> None:
    parser = utils.parser(__doc__, __file__, "device")
    add = parser.add_argument
    add("--model", type=Path, default=Path(__file__).parent / "outputs" / "model.pt", help="what train.py wrote")
    add("--data", help="cifar10, shapes or a folder, to use its test part; without it what the model was trained on")
    add("--image", type=Path, help="name this one picture instead")
    args = utils.parse_args(parser)
    if args.image and args.data:
        raise utils.InputError("--image names one picture, --data a whole set; leave one of them out.")
    device = args.device
    model, saved = load_network(args.model, device)
    classes, dtype = saved["classes"], getattr(torch, saved["dtype"])
    K, label = len(classes), saved["data"] + ", stand-in" * bool(saved["stand_in"])
    if args.image or args.data not in (None, saved["data"]):  # else load_data says so
        utils.stand_in_notice(saved["data"], saved["stand_in"])
    if args.image:
        picture, notes = read_picture(args.image)
        x = picture[None]  # (1, 3, H, W)
        if notes:
            print(f"{args.image.name} is {' and '.join(notes)}: it has been {' and '.join(CHANGED[n] for n in notes)}")
        p = predict(model, x.to(device), torch.float32).softmax(-1)[0].cpu()  # (K,)
        for k in p.argsort(descending=True)[:3].tolist():
            print(f"{classes[k]:14}{p[k]:7.1%}")
        k = p.argmax()
        cams = [grad_cam(model, x.to(device), k[None].to(device), average).cpu() for average in (True, False)]
        draw_pictures(args.out / "grad_cam.png", x.repeat(3, 1, 1, 1),
                      [args.image.name, f"{classes[k]} {p[k]:.0%}\nGrad-CAM", "HiResCAM"],
                      f"What speaks for {classes[k]} (trained on {label})",
                      torch.cat([torch.full_like(cams[0], torch.nan), *cams]))  # nan is not drawn
        print(f"wrote grad_cam.png to {args.out}")
        utils.stand_in_notice(saved["data"], saved["stand_in"])
        return

    data = load_data(args.data or saved["source"])
    if data.classes != classes:
        raise utils.InputError(f"{data.name} has other classes than the network learned: {', '.join(classes)}.")
    label = data.label
    mixed = torch.randperm(len(data.test_y), generator=torch.Generator().manual_seed(0))  # folders come sorted by class
    x, y = data.test_x[mixed], data.test_y[mixed]
    p = predict(model, x.to(device), dtype).softmax(-1).cpu()  # (N, K)
    sure, guess = p.max(-1)  # (N,) each
    confusion = confusion_matrix(y, guess, K)
    precision, recall, f1 = precision_recall_f1(confusion)
    print(f"{saved['config']['model']} on the {len(y):,} test pictures of {data.name}: "
          f"{(guess == y).double().mean():.2%} named correctly\n")
    print(f"{'class':14}{'precision':>10}{'recall':>10}{'F1':>10}   most often taken for")
    for k, name in enumerate(classes):
        wrong = confusion[k].clone()
        wrong[k] = 0
        print(f"{name:14}{precision[k]:10.1%}{recall[k]:10.1%}{f1[k]:10.1%}   "
              + (f"{classes[wrong.argmax()]} ({wrong.max()})" if wrong.any() else "nothing else"))
    print(f"{'mean':14}{precision.mean():10.1%}{recall.mean():10.1%}{f1.mean():10.1%}")

    def captions(rows):
        return [f"{classes[y[i]]}\n{classes[guess[i]]} {sure[i]:.0%}" for i in rows]

    draw_confusion(args.out / "confusion.png", confusion, classes, f"Test pictures of {label}")
    few = torch.arange(min(24, len(y)))
    draw_pictures(args.out / "predictions.png", x[few], captions(few), f"What it is, what it was named ({label})")
    ## The mistakes it was surest of teach most: wrong labels, odd pictures, and what it really goes by.
    wrong = (guess != y).nonzero()[:, 0]
    wrong = wrong[sure[wrong].argsort(descending=True)][:24]
    if len(wrong):
        draw_pictures(args.out / "mistakes.png", x[wrong], captions(wrong), f"Its surest mistakes ({label})")
    rows, texts, cams = [], [], []
    for some in ((guess == y).nonzero()[:8, 0], wrong[:8]):  # right ones, then wrong ones
        for average, method in ((True, "Grad-CAM"), (False, "HiResCAM")):
            if len(some):
                rows.append(x[some])
                texts += [f"{text}\n{method}" for text in captions(some)]
                cams.append(grad_cam(model, x[some].to(device), guess[some].to(device), average).cpu())
    draw_pictures(args.out / "grad_cam.png", torch.cat(rows), texts,
                  f"What its decision rests on, by two methods ({label})", torch.cat(cams))

    first, filters, _ = parts_of(model)
    maps, _ = outputs_of(first, model, x[:1].to(device))  # (1, M, h, w)
    for name, pictures, title in (
            ("filters.png", stretch(filters.detach().float().cpu()), "The filters of the first convolution"),
            ("feature_maps.png", stretch(maps[0].detach().float().cpu()[:, None]).repeat(1, 3, 1, 1),
             f"What these filters make of predictions.png's first picture ({classes[y[0]]})")):
        figure, axes = utils.pyplot().subplots(figsize=(9, 9 * -(-len(pictures) // 12) / 12 + 0.6))
        axes.imshow(grid(F.pad(pictures, (0, 1, 0, 1), value=1.0), 12))  # a white line between two
        axes.axis("off")
        axes.set_title(f"{title} ({label})")
        utils.write_atomically(args.out / name, figure.savefig)
    print(f"\nwrote predictions, confusion, {'mistakes, ' * bool(len(wrong))}filters, feature_maps and grad_cam (.png) "
          f"to {args.out}")
    utils.stand_in_notice(data.name, data.stand_in or saved["stand_in"])


if __name__ == "__main__":
    utils.run(main)
