"""Exercise: store chapter 05's GPT in 8, 6, 4 or 3 bits per weight, and see what it costs in loss and buys in bytes.

    python 05_transformer/train.py --steps 300 --eval-every 300        first, to have a model
    python tests/exercises/quantise.py

You should see (Tiny Shakespeare, the model above, seed 0; one core of an AMD EPYC, torch 2.15), nats per character on
validation:
    float32                        7,184,490 bytes    1.7138
    8 bits, a scale per row        1,834,420 bytes    1.7139        a scale per matrix: 1.7136
    6 bits, a scale per row        1,385,844 bytes    1.7151        a scale per matrix: 1.7156
    4 bits, a scale per row          937,204 bytes    1.7253        a scale per matrix: 1.7526
    3 bits, a scale per row          712,884 bytes    1.8296
With int8 times int8 in its linear layers the model has 1.7139, too. The first layer of an MLP takes, for 2,048
positions, 10.8 ms in float32, 11.2 from int8 turned into floats, 3.2 multiplied as int8; for one position,
as in writing, 0.02 ms, 0.04 and 0.04.
Learned: at 8 bits the loss does not move, and by the third digit at 6; a quarter of the bytes is free. A scale per row
pays from 4 bits down. Fewer bytes are faster only where the hardware multiplies them as they are, and many at once.
Writes: quantised.pt, the 8-bit model, to --out. Left out on purpose: calibration (GPTQ, AWQ), which chooses the
rounding by what it does to activations, and training with quantised weights.
"""

import io
import sys
import timeit
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "05_transformer")]
import utils
from load import load_data
from load_model import load_gpt
from train import GPT, evaluate

# Shapes: M outputs (rows of a weight), C inputs, N rows of activations

SCRIPT = "tests/exercises/quantise.py"


# ---------------------------------------------------------------------------------------------- weights to integers
def quantise(w: Tensor, bits: int, per_row: bool = True) -> tuple[Tensor, Tensor]:
    """w (M, C) float -> q (M, C) int8 and scale (M, 1), or (1, 1) for one scale for the whole matrix.

    ##     L = 2^(bits-1) - 1        s = max|w| / L        q = round(w / s), from -L to L        w is about s q
    ## Symmetric: 0 stays exactly 0, and one level (-L - 1) is not used. Rounding to nearest is off by s / 2 at most.
    ## The largest weight decides s, and one outlier makes all that share its scale coarse: hence a scale per row. That
    ## costs 4 bytes for C weights, and no work later, since every output has one row, and so one scale.
    """
    levels = 2 ** (bits - 1) - 1
    largest = w.abs().amax(1, keepdim=True) if per_row else w.abs().amax().view(1, 1)
    scale = (largest / levels).clamp(min=1e-12)  # a row of zeros has no largest weight to divide by
    return (w / scale).round().to(torch.int8), scale


def pack(q: Tensor, bits: int) -> Tensor:
    """q int8 of any shape, -L to L -> its bits one after the other, (ceil(numel * bits / 8),) uint8.

    ## The smallest type has 8 bits: a 4-bit weight kept in an int8 saves nothing over an 8-bit one.
    """
    unsigned = (q.flatten().to(torch.int16) + 2 ** (bits - 1)).numpy().astype(np.uint8)  # 1 .. 2^bits - 1
    table = np.unpackbits(unsigned[:, None], axis=1)[:, 8 - bits :]  # (numel, bits), the highest bit first
    return torch.from_numpy(np.packbits(table))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of pack: -> int8 of the given shape."""
    numel = int(np.prod(shape))
    table = np.unpackbits(packed.numpy(), count=numel * bits).reshape(numel, bits)
    unsigned = np.packbits(np.pad(table, ((0, 0), (8 - bits, 0))), axis=1).astype(np.int16)
    return torch.from_numpy((unsigned - 2 ** (bits - 1)).astype(np.int8)).view(shape)


def pack_state(state: dict[str, Tensor], bits: int, per_row: bool = True) -> dict:
    """A state_dict with every matrix as (packed bits, scale, shape); vectors stay as they are."""
    packed = {}
    for name, w in state.items():
        q, scale = quantise(w, bits, per_row) if w.ndim == 2 else (None, None)
        packed[name] = w if q is None else {"bits": bits, "q": pack(q, bits), "scale": scale, "shape": tuple(w.shape)}
    return packed


def unpack_state(packed: dict) -> dict[str, Tensor]:
    """Back to a state_dict of floats that the GPT loads: each matrix as s q."""
    return {name: unpack(v["q"], v["bits"], v["shape"]).float() * v["scale"] if isinstance(v, dict) else v
            for name, v in packed.items()}


def file_size(state: dict) -> int:
    """Bytes that torch.save makes of it."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.tell()


# ---------------------------------------------------------------------------------------------- computing with integers
class Int8Linear(nn.Module):
    """nn.Linear without bias that keeps its weight in int8: (..., C) -> (..., M).

    ## Two ways to multiply. `dequantise` makes floats of the weights first, each time: the memory is saved, the
    ## arithmetic is not. With integers=True the activations are rounded to int8 as well, one scale s_x per position:
    ##     y = s_x s_w (q_x q_w^T)        products of int8, summed in int32, and only then scaled
    ## (LLM.int8, Dettmers et al. 2022, without its float path for outliers.)
    """

    def __init__(self, linear: nn.Linear, integers: bool):
        super().__init__()
        self.q, self.scale = quantise(linear.weight.detach(), 8)  # (M, C) int8, (M, 1)
        self.integers = integers

    def forward(self, x: Tensor) -> Tensor:
        if not self.integers:
            return F.linear(x, self.q.to(x.dtype)) * self.scale.T  # the scale per output can wait until after the sum
        q_x, s_x = quantise(x.flatten(0, -2), 8)  # (N, C) int8, (N, 1)
        return (torch._int_mm(q_x, self.q.T) * s_x * self.scale.T).view(*x.shape[:-1], -1)


def with_int8_layers(model: GPT, integers: bool) -> GPT:
    """Replace every nn.Linear of the model, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child, integers))
    return model


@torch.inference_mode()
def milliseconds(layers: dict[str, nn.Module], x: Tensor, rounds: int = 30) -> dict[str, float]:
    """Median time of layer(x) for each layer. They take turns, so that a busy machine slows all of them alike."""
    times = {name: [] for name in layers}
    for name, layer in list(layers.items()) * (rounds + 3):  # the first three warm up
        times[name].append(timeit.timeit(lambda: layer(x), number=10) / 10 * 1e3)
    return {name: float(np.median(values[3:])) for name, values in times.items()}


def main() -> None:
    parser = utils.parser(__doc__, __file__)
    add = parser.add_argument
    add("--model", type=Path, default=ROOT / "05_transformer" / "outputs" / "model.pt", help="what 05's train.py wrote")
    add("--data", help="tinyshakespeare, pydocs or a text file; without it, what the model was trained on")
    add("--rounds", type=int, default=30, help="how often each layer is timed; 0 leaves the timing out")
    args = utils.parse_args(parser)
    model, saved = load_gpt(args.model, "cpu")
    data = load_data(args.data or saved["data"], model.block_size)
    if data.vocab != saved["vocab"]:
        raise utils.InputError(f"{args.model} was trained on another text than {data.name}; name it with --data.")
    state = {name: w.clone() for name, w in model.state_dict().items()}
    loss = lambda: evaluate(model, data.val, model.block_size)  # noqa: E731  nats per character, all of validation

    before, size = loss(), file_size(state)
    matrices = sum(w.numel() for w in state.values() if w.ndim == 2)
    print(f"{data.label}: {matrices:,} of {sum(w.numel() for w in state.values()):,} "
          f"weights are in matrices\n\n{'weights':24}{'bytes':>12}{'share':>8}{'validation loss':>18}{'change':>10}\n"
          f"{'float32':24}{size:12,}{1:8.1%}{before:18.4f}")
    for bits, per_row in ((8, True), (8, False), (6, True), (6, False), (4, True), (4, False), (3, True)):
        packed = pack_state(state, bits, per_row)
        model.load_state_dict(unpack_state(packed))
        after = loss()
        name = f"{bits} bits, a scale per {'row' if per_row else 'matrix'}"
        print(f"{name:24}{file_size(packed):12,}{file_size(packed) / size:8.1%}{after:18.4f}{after - before:+10.4f}",
              flush=True)
    packed = pack_state(state, 8)
    utils.write_atomically(args.out / "quantised.pt", torch.save, {
        "script": SCRIPT, "config": saved["config"], "vocab": saved["vocab"], "data": saved["data"], "model": packed})

    integers = hasattr(torch, "_int_mm")
    for name, on in (("from int8, as floats", False), ("int8 times int8", True)):
        if integers or not on:
            model, _ = load_gpt(args.model, "cpu")
            with_int8_layers(model, on)
            print(f"{'linear layers ' + name:54}{loss():26.4f}")  # the embedding stays float32 here
    if args.rounds:
        print("\nmilliseconds per layer, median          float32   from int8, as floats   int8 times int8")
        model, _ = load_gpt(args.model, "cpu")
        for name, linear in (("queries, keys, values", model.blocks[0].attention.qkv), ("up", model.blocks[0].up)):
            layers = {"float": linear, "floats": Int8Linear(linear, False)}
            layers |= {"int8": Int8Linear(linear, True)} if integers else {}
            for positions in (1, 256, 2048):
                x = torch.randn(1, positions, linear.in_features)
                t = milliseconds(layers, x, args.rounds)
                print(f"{name:24}{positions:5} positions{t['float']:12.4f}{t['floats']:23.4f}"
                      f"{t.get('int8', float('nan')):18.4f}", flush=True)
    print(f"\nwrote {args.out / 'quantised.pt'}")


if __name__ == "__main__":
    utils.run(main)
