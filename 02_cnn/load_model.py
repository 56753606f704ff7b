"""Use a trained network: name pictures, count its mistakes, and look at what it looks at.

You learn here: precision, recall and F1, and how to read a confusion matrix; that a network can be sure and wrong; what
its first filters make of a picture; and Grad-CAM, which shows the places in a picture that a decision rests on.

    python 02_cnn/train.py                               first, to have a model
    python 02_cnn/load_model.py                          the test part of what train.py was trained on
    python 02_cnn/load_model.py --image my_cat.jpg       one picture of your own

You should see (train.py's default on CIFAR-10 as JPEG, seed 0): 89.9 % named correctly; F1 from 79.5 % (cat, most often
taken for a dog) to 95.2 % (automobile).
Writes to outputs/: confusion.png, feature_maps.png and grad_cam.png; with --image only the last.
Left out on purpose: calibration, detection and segmentation.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from load import draw_grid, load_data, read_picture
from train import SCRIPT, ResNet, Simple, build, predict

# Shapes: N pictures, B batch, C channels in, M channels out (filters), H height, W width, K classes


def load_network(path: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """The network that train.py saved, ready to name pictures, and the rest of its file: classes, data, dtype.

    Raises utils.InputError where the file is missing, damaged, or of another version's model.
    """
    saved = utils.load_checkpoint(Path(path), SCRIPT)
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
def parts_of(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The first convolution, and Grad-CAM's layer: the last of at least 7 x 7 places."""
    if isinstance(model, Simple):
        return model[1], model[11]
    if isinstance(model, ResNet):
        return model.stem, model.blocks[1]
    return model.body.conv1, model.body.layer3


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
        a, logits = outputs_of(parts_of(model)[1], model, x)  # (B, C, h, w), (B, K)
        gradient, = torch.autograd.grad(logits[torch.arange(len(x)), k].sum(), a)
    weight = gradient.mean((2, 3), keepdim=True) if average else gradient  # (B, C, 1, 1) or (B, C, h, w)
    cam = (weight * a).sum(1, keepdim=True).relu().detach()  # (B, 1, h, w)
    cam = F.interpolate(cam.float(), size=x.shape[2:], mode="bilinear")[:, 0]  # (B, H, W)
    return cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)


# ---------------------------------------------------------------------------------------------- drawing
def draw_grad_cam(path: Path, model: nn.Module, x: Tensor, k: Tensor, captions: list[str], title: str) -> None:
    """Draw pictures x (N, 3, H, W) uint8 in rows of eight, each row twice: below what speaks for classes k (N,) by
    Grad-CAM, then by HiResCAM. The captions (N) stand above."""
    device = next(model.parameters()).device
    columns, halves = min(8, len(x)), range(0, len(x), 8)
    figure, axes = utils.pyplot().subplots(2 * len(halves), columns, squeeze=False, layout="constrained",
                                           figsize=(max(6, 1.5 * columns), 3.8 * len(halves) + 0.4))
    for a in axes.flat:
        a.axis("off")
    for row, method in enumerate(["Grad-CAM", "HiResCAM"] * len(halves)):
        some = slice(row // 2 * 8, row // 2 * 8 + 8)
        maps = grad_cam(model, x[some].to(device), k[some].to(device), method == "Grad-CAM").cpu()
        for a, picture, heat, caption in zip(axes[row], x[some], maps, captions[some]):
            a.imshow(picture.permute(1, 2, 0))
            a.imshow(heat, cmap="inferno", alpha=0.55, vmin=0, vmax=1)
            a.set_title(f"{caption}\n{method}", fontsize=7)
    figure.suptitle(title)
    utils.write_atomically(path, figure.savefig)


def draw_confusion(path: Path, confusion: Tensor, classes: list[str], title: str) -> None:
    """Draw the matrix (K, K) with its counts; the colour is the share of the row."""
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    figure, axes = utils.pyplot().subplots(figsize=(1.5 + 0.6 * len(classes), 1.2 + 0.6 * len(classes)))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=2)  # dark blue would hide the counts
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    for (row, column), count in np.ndenumerate(confusion.numpy()):
        axes.text(column, row, count, ha="center", va="center", fontsize=8)
    axes.set(title=title, xlabel="named", ylabel="is")
    axes.grid(False)
    utils.write_atomically(path, figure.savefig)


def main() -> None:
    parser = utils.parser(__doc__, __file__, "device")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "outputs" / "model.pt",
                        help="what train.py wrote")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--data", help="cifar10, shapes or a folder, to use its test part; without it what the model was trained on")
    add("--image", type=Path, help="name this one picture instead")
    args = utils.parse_args(parser)
    model, saved = load_network(args.model, args.device)
    classes, dtype = saved["classes"], getattr(torch, saved["dtype"])
    if args.image:
        utils.stand_in_notice(saved["data"], saved["stand_in"])
        x = read_picture(args.image)[None]  # (1, 3, H, W)
        p = predict(model, x.to(args.device), torch.float32).softmax(-1).cpu()  # (1, K)
        for k in p[0].argsort(descending=True)[:3].tolist():
            print(f"{classes[k]:14}{p[0, k]:7.1%}")
        draw_grad_cam(args.out / "grad_cam.png", model, x, p.argmax(1), [f"{classes[p.argmax()]} {p.max():.0%}"],
                      f"{args.image.name} (trained on {saved['data']}{', stand-in' * bool(saved['stand_in'])})")
        print(f"wrote grad_cam.png to {args.out}")
        utils.stand_in_notice(saved["data"], saved["stand_in"])
        return

    data = load_data(args.data or saved["source"])
    if data.classes != classes:
        raise utils.InputError(f"{data.name} has other classes than the network learned: {', '.join(classes)}.")
    mixed = torch.randperm(len(data.test_y), generator=torch.Generator().manual_seed(0))  # folders come sorted by class
    x, y = data.test_x[mixed], data.test_y[mixed]
    sure, guess = predict(model, x.to(args.device), dtype).softmax(-1).cpu().max(-1)  # (N,) each
    confusion = confusion_matrix(y, guess, len(classes))
    precision, recall, f1 = precision_recall_f1(confusion)
    print(f"{saved['config']['model']} on the {len(y):,} test pictures of {data.name}: "
          f"{(guess == y).double().mean():.2%} named correctly\n")
    print(f"{'class':14}{'precision':>10}{'recall':>10}{'F1':>10}   most often taken for")
    count, other = (confusion - confusion.diag().diag()).max(1)  # (K,) each: mistakes alone
    for k, name in enumerate(classes):
        print(f"{name:14}{precision[k]:10.1%}{recall[k]:10.1%}{f1[k]:10.1%}   {classes[other[k]]} ({count[k]})")
    print(f"{'mean':14}{precision.mean():10.1%}{recall.mean():10.1%}{f1.mean():10.1%}")

    draw_confusion(args.out / "confusion.png", confusion, classes, f"Test pictures of {data.label}")
    ## The mistakes it was surest of teach most: wrong labels, odd pictures, and what it really goes by.
    wrong = (guess != y).nonzero()[:, 0]
    rows = torch.cat([(guess == y).nonzero()[:8, 0], wrong[sure[wrong].argsort(descending=True)][:8]])
    captions = [f"{classes[y[i]]}\n{classes[guess[i]]} {sure[i]:.0%}" for i in rows]
    draw_grad_cam(args.out / "grad_cam.png", model, x[rows], guess[rows], captions,
                  f"What its decision rests on: right ones, then its surest mistakes ({data.label})")
    maps, _ = outputs_of(parts_of(model)[0], model, x[:1].to(args.device))  # (1, M, h, w)
    draw_grid(args.out / "feature_maps.png", maps[0].detach().float().cpu()[:, None], 12,
              f"What the first filters make of one test picture, {classes[y[0]]} ({data.label})", normalize=True,
              scale_each=True, padding=1, pad_value=1.0)
    print(f"\nwrote confusion.png, grad_cam.png and feature_maps.png to {args.out}")
    utils.stand_in_notice(data.name, data.stand_in or saved["stand_in"])


if __name__ == "__main__":
    utils.run(main)
