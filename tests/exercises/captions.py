"""Exercise: captions for pictures: chapter 02's convolutions look, chapter 05's GPT writes what they saw.

    python tests/exercises/captions.py

A scene of 64 x 64 holds one to three of chapter 02's drawn shapes in its four quarters, some of them without colour,
and its caption names them in reading order: "a star top left, a grey ring bottom right".

You should see (FIGURES)
Learned: FIGURES
Writes: captions.png, metrics.json to --out. Left out on purpose: photographs; beam search; a pre-trained half.
"""

import argparse
import importlib.util
import sys
import time
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
import utils  # noqa: E402


def chapter(folder: str, name: str):
    """Import a chapter's script under a name of its own, as every chapter has a `train` and a `load`."""
    sys.path.insert(0, str(ROOT / folder))
    others = {module: sys.modules.pop(module, None) for module in ("load", "train")}
    try:
        spec = importlib.util.spec_from_file_location(f"{name}_of_{folder}", ROOT / folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)  # its own `from load import ...` finds the chapter's load
        return module
    finally:
        sys.path.remove(str(ROOT / folder))
        for other, before in others.items():
            sys.modules.pop(other, None)
            if before:
                sys.modules[other] = before


cnn, pictures, gpt = chapter("02_cnn", "train"), chapter("02_cnn", "load"), chapter("05_transformer", "train")

# Shapes: B batch, H height, W width, C channels, M prefix vectors, T characters of a caption, V vocabulary

SCRIPT = "tests/exercises/captions.py"
PLACES = ["top left", "top right", "bottom left", "bottom right"]
END = "\n"
## The whole alphabet of the captions. END ends each of them, and fills up the shorter ones of a batch.
VOCAB = sorted(set(END + "a grey, " + "".join(pictures.SHAPES + PLACES)))


# ---------------------------------------------------------------------------------------------- scenes
def scenes(tiles: Tensor, labels: Tensor, n: int, g: torch.Generator) -> tuple[Tensor, list[str]]:
    """n scenes (n, 3, 64, 64) uint8 and their captions, from chapter 02's pictures (N, 3, 32, 32) and labels (N,).

    ## The caption is made from how the scene was drawn, so that it is right without anybody having looked.
    """
    S = pictures.SIZE
    count = torch.randint(1, 4, (n, 1), generator=g)
    filled = torch.rand(n, 4, generator=g).argsort(1).argsort(1) < count  # (n, 4): `count` of the four, at random
    grey = torch.rand(n, 4, generator=g) < 0.5
    which = torch.randint(len(labels), (n, 4), generator=g)
    cells = tiles[which].float()  # (n, 4, 3, S, S)
    cells = torch.where(grey[:, :, None, None, None], cells.mean(2, keepdim=True), cells)
    ## An empty quarter: one colour, or one grey, with the same noise as the rest.
    empty = 255 * torch.rand(n, 4, 3, 1, 1, generator=g)
    empty = torch.where(grey[:, :, None, None, None], empty[:, :, :1], empty)
    empty = empty + 15 * torch.randn(n, 4, 1, S, S, generator=g)
    cells = torch.where(filled[:, :, None, None, None], cells, empty).clamp(0, 255)
    x = cells.view(n, 2, 2, 3, S, S).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, 2 * S, 2 * S)
    names = [[pictures.SHAPES[k] for k in row] for row in labels[which].tolist()]
    captions = [", ".join(f"a {'grey ' * a}{name} {place}" for a, name, place, there in zip(*row) if there)
                for row in zip(grey.tolist(), names, [PLACES] * n, filled.tolist())]
    return x.to(torch.uint8), captions


def encode(captions: list[str]) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) int64: END, then the caption; the caption, then END. Behind it targets are -100."""
    T = max(map(len, captions)) + 1
    index = {c: i for i, c in enumerate(VOCAB)}
    ids = torch.tensor([[index[c] for c in (END + text).ljust(T + 1, END)] for text in captions])  # (B, T + 1)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    for row, text in zip(targets, captions):
        row[len(text) + 1 :] = -100  # cross_entropy passes over these
    return inputs, targets


def parse(caption: str) -> dict[str, tuple[bool, str]] | None:
    """The inverse of what `scenes` writes: {place: (grey, shape)}; None where it is no such caption."""
    found = {}
    for part in caption.split(", "):
        words = part.split(" ")
        place, grey = " ".join(words[-2:]), words[1:2] == ["grey"]
        if words[0] != "a" or len(words) != 4 + grey or place not in PLACES or words[-3] not in pictures.SHAPES:
            return None
        found[place] = (grey, words[-3])
    return found


# ---------------------------------------------------------------------------------------------- model
class Captioner(nn.Module):
    """Pictures (B, 3, H, W) uint8 and characters (B, T) -> logits (B, T, V). blind: it is not shown the picture."""

    def __init__(self, mean: Tensor, std: Tensor, n_layer: int = 2, n_head: int = 3, n_embd: int = 96, block_size=120,
                 blind: bool = False):
        super().__init__()
        self.blind, layers, C = blind, [cnn.Normalise(mean, std)], 3
        for M in (32, 64, 128, 128):  # 02's Simple, one convolution deeper, without its last pooling and its head
            layers += [cnn.Conv(C, M), cnn.batch_norm(M), nn.ReLU(), nn.MaxPool2d(2)]
            C = M
        self.encoder = nn.Sequential(*layers)
        self.prefix = nn.Linear(C, n_embd, bias=False)
        self.gpt = gpt.GPT(len(VOCAB), block_size, n_layer, n_head, n_embd, 0.0)

    def look(self, x: Tensor) -> Tensor:
        """(B, 3, 64, 64) uint8 -> prefix vectors (B, 16, C), one for each cell of a grid of 4 x 4.

        ## A single vector for the whole picture would have to hold every shape and its place at once. As one vector per
        ## cell the picture becomes a text of 16 "characters", and attention can look up the one it is writing about.
        """
        if self.blind:  # as many vectors, with nothing in them
            return torch.zeros(len(x), 16, self.prefix.out_features)
        h = self.encoder(x)  # (B, C, 4, 4)
        return gpt.norm(self.prefix(h.flatten(2).mT))  # (B, 16, C)

    def forward(self, prefix: Tensor, ids: Tensor) -> Tensor:
        """prefix (B, M, C) from `look`, ids (B, T) -> logits (B, T, V): GPT.forward with vectors before the text."""
        e = self.gpt.characters(ids)  # (B, T, C)
        x = gpt.norm(e + self.gpt.shift * F.pad(e, (0, 0, 1, 0))[:, :-1])
        x = torch.cat([prefix, x], 1)  # (B, M + T, C)
        ## The causal mask may stay: the text comes after the picture and sees all of it. That the cells of the picture
        ## see only those before them is no loss, as the convolutions have looked at the neighbours already.
        cos, sin = (table[: x.shape[1]] for table in (self.gpt.cos, self.gpt.sin))
        for block in self.gpt.blocks:
            x = block(x, cos, sin)
        return self.gpt.head(gpt.norm(x[:, prefix.shape[1] :])).float()

    def loss(self, x: Tensor, captions: list[str]) -> Tensor:
        """Mean nats per character of the captions."""
        inputs, targets = encode(captions)
        return F.cross_entropy(self(self.look(x), inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def write(model: Captioner, x: Tensor, longest: int = 100) -> list[str]:
    """Greedy captions for pictures x (B, 3, 64, 64): always the likeliest character, until all have ended."""
    model.eval()
    prefix, ids, end = model.look(x), encode([""] * len(x))[0], VOCAB.index(END)
    while ids.shape[1] <= longest:
        ids = torch.cat([ids, model(prefix, ids)[:, -1].argmax(-1, keepdim=True)], 1)
        if (ids[:, 1:] == end).any(1).all():
            break
    model.train()
    return ["".join(VOCAB[i] for i in row[1:]).split(END)[0] for row in ids.tolist()]


def grade(said: list[str], true: list[str]) -> dict[str, float]:
    """Share of captions that are right to the letter, and of each kind of fact in them."""
    a, b = [parse(text) or {} for text in said], [parse(text) for text in true]
    things = [(p.get(place), thing) for p, q in zip(a, b) for place, thing in q.items()]  # every shape that is there
    share = lambda hits: sum(hits) / len(hits)  # noqa: E731
    return {"exact": share([s == t for s, t in zip(said, true)]),
            "count": share([len(p) == len(q) for p, q in zip(a, b)]),
            "places": share([p.keys() == q.keys() for p, q in zip(a, b)]),
            "shape": share([p is not None and p[1] == q[1] for p, q in things]),
            "grey": share([p is not None and p[0] == q[0] for p, q in things])}


def train(model: Captioner, tiles: Tensor, labels: Tensor, steps: int, batch_size: int, seed: int) -> float:
    """Every batch shows new scenes of the same tiles. Returns the seconds of a core that it took."""
    g, begun = torch.Generator().manual_seed(seed), time.process_time()
    optimizers = gpt.make_optimizers(model.gpt, 2e-3, 0.02, 0.1)  # 05's: Muon inside the blocks, AdamW outside
    convs = [layer for layer in model.modules() if isinstance(layer, cnn.Conv)]
    biases = [layer.bias for layer in model.encoder if isinstance(layer, nn.BatchNorm2d)]
    optimizers += [torch.optim.Muon([conv.weight for conv in convs], lr=0.1, momentum=0.6, weight_decay=0.0),
                   torch.optim.AdamW([model.prefix.weight, *biases], lr=2e-3, weight_decay=0.0)]
    peaks, bar = [optimizer.param_groups[0]["lr"] for optimizer in optimizers], utils.Progress(steps, "scenes")
    model.train()
    for step in range(steps):
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * gpt.schedule(step, steps, 20)
        loss = model.loss(*scenes(tiles, labels, batch_size, g))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for conv in convs:
            conv.rescale()
        bar.update(step + 1, f"loss {loss.item():.4f}", batch_size)
    bar.clear()
    return time.process_time() - begun


def main() -> None:
    utils.keep_memory()
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=1000, help="updates")
    add("--batch-size", type=int, default=32, help="scenes per step")
    add("--tiles", type=int, default=10_000, help="drawn shapes that the training scenes are put together from")
    add("--scenes", type=int, default=1000, help="unseen scenes, of other tiles, to write captions for")
    add("--test", action="store_true", help="grade on the test tiles: once, when all is decided; else on validation's")
    add("--seed", type=int, default=0, help="decides weights and scenes")
    add("--out", type=Path, default=Path(__file__).parent / "outputs", help="folder for what is written")
    args = parser.parse_args()
    for name in ("steps", "batch_size", "tiles", "scenes"):
        if not getattr(args, name) > 0:
            raise utils.InputError(f"--{name.replace('_', '-')} {getattr(args, name)} must be greater than zero.")
    utils.check_writable(args.out)
    utils.set_seed(args.seed)
    ## Three parts, as everywhere: tiles that one part shows are in no other.
    tiles, labels = pictures.draw_shapes(args.tiles, 1)
    mean, std = pictures.channel_statistics(tiles)
    part, seed = ("test", 2) if args.test else ("validation", 3)
    x, true = scenes(*pictures.draw_shapes(2000, seed), args.scenes, torch.Generator().manual_seed(seed))
    seen = scenes(tiles, labels, 10_000, torch.Generator().manual_seed(args.seed))[1]
    commonest = Counter(seen).most_common(1)[0][0]
    print(f"a scene {tuple(x[0].shape)}, its caption: {true[0]!r}\n{len(VOCAB)} characters; of 10,000 captions "
          f"{len(set(seen)):,} are different; {len(set(true) - set(seen)) / len(set(true)):.0%} of the {part} part's "
          "are none of those\n")

    rows, metrics = {"most frequent caption": [commonest] * len(true)}, {}
    for name, blind in (("the GPT, blind", True), ("with the picture", False)):
        utils.set_seed(args.seed)
        model = Captioner(mean, std, blind=blind)
        seconds = train(model, tiles, labels, args.steps, args.batch_size, args.seed)
        model.eval()
        with torch.no_grad():
            chunks = [(x[i : i + 100], true[i : i + 100]) for i in range(0, len(x), 100)]
            lengths = [sum(len(text) + 1 for text in texts) for _, texts in chunks]
            loss = sum(model.loss(*chunk).item() * n for chunk, n in zip(chunks, lengths)) / sum(lengths)
        ## Blind, it writes the same for every scene: once is enough.
        seen_by = [x[:1]] if blind else [some for some, _ in chunks]
        rows[name] = [text for some in seen_by for text in write(model, some)] * (len(x) if blind else 1)
        metrics |= {f"{name}, nats per character": loss, f"{name}, seconds of a core": seconds}
        print(f"{name}: {utils.count_parameters(model):,} parameters, {seconds:.0f} s of a core, {loss:.4f} nats per "
              f"character ({part})", flush=True)
    print(f"\n{'shapes, stand-in, ' + part:28}{'exact':>9}{'count':>9}{'places':>9}{'shape':>9}{'grey':>9}")
    for name, said in rows.items():
        grades = grade(said, true)
        metrics |= {f"{name}, {fact}": share for fact, share in grades.items()}
        print(f"{name:28}" + "".join(f"{share:9.1%}" for share in grades.values()))

    figure, axes = plt.subplots(2, 4, figsize=(15, 7))
    for a, picture, text, right in zip(axes.flat, x, rows["with the picture"], true):
        a.imshow(picture.permute(1, 2, 0))
        a.set_title(text.replace(", ", ",\n") + ("" if text == right else f"\n(is: {right})"), fontsize=8)
        a.axis("off")
    figure.suptitle("what the network wrote (shapes, stand-in)")
    figure.tight_layout()
    utils.save_figure(figure, args.out / "captions.png")
    utils.save_metrics(args.out / "metrics.json", script=SCRIPT, data="shapes", stand_in=True, device="cpu",
                       seed=args.seed, seconds=metrics["with the picture, seconds of a core"],
                       parameters=utils.count_parameters(model), metrics=metrics, history=[])
    print(f"\nwrote captions.png and metrics.json to {args.out}")


if __name__ == "__main__":
    utils.run(main)
