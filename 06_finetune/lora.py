"""LoRA by hand: adapt a large model by training a small addition to some of its matrices (Hu et al. 2021).

You learn here: what a matrix of low rank can be; why one half of the addition starts at zero and the other does not;
what merging it into the weights buys, and what keeping it apart buys. For any torch model, with torch alone.

    python 06_finetune/lora.py                 two matrices and one layer, in a few seconds

You should see: the nearest matrix of rank 8 misses 98.0 % of a random 768 x 768 matrix, and 9.8 % of one that is of
rank 8 but for noise; A's first gradient zero. Left out: embeddings, convolutions, several adapters at once, DoRA.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# Shapes: I, M a layer's inputs and outputs, R rank. A and B are the paper's two matrices.
## Fine-tuning changes a matrix W by some D of the same size. LoRA learns D as a product of two thin matrices:
##     W + D = W + (alpha / R) B A        B (M, R), A (R, I)        (Hu et al. 2021, section 4.1)
## It reads R directions of its input and writes R of its output. That this is enough is a bet: a random matrix has no
## good approximation of low rank, one in which few directions matter has (main() prints both). Fine-tuning seems to be
## of the second kind, as it works even in a random subspace of few dimensions (Aghajanyan et al. 2020).


def transposed(layer: nn.Module) -> bool:
    """Whether weight is (I, M), as in GPT-2's Conv1D (ours and transformers'), and not (M, I), as in nn.Linear."""
    return type(layer).__name__ == "Conv1D"


class LoRA(nn.Module):
    """A frozen Linear or Conv1D, and beside it what is learned: (..., I) -> (..., M). add_lora makes these.

    lora_A (R, I) and lora_B (M, R) are float32 whatever the base is in: training needs the digits.

    ## B starts at zero, so that training starts from the very model that was given. A must not be zero too. With
    ## y = W x + s B A x, s the scale and g the gradient of y, the two gradients are
    ##     of B: s g (A x)^T        of A: s (B^T g) x^T
    ## Each has the other matrix as a factor: were both zero, both gradients would stay zero for ever. As it is, A's is
    ## zero in the first step alone: then B has moved.
    ## B A, a sum of R products, is divided by R so that the learning rate suits every R (section 4.1). For large R that
    ## is too much, and sqrt(R) the right divisor (rsLoRA, Kalajdzievski 2023).
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        n_in, n_out = base.weight.shape if transposed(base) else base.weight.shape[::-1]
        self.base, self.rank, self.alpha, self.rslora = base, rank, alpha, rslora
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = nn.Dropout(dropout)  # of the low-rank path alone
        self.original = None  # the base's weight, while merged
        new, bound = {"device": base.weight.device, "dtype": torch.float32}, 1 / math.sqrt(n_in)
        self.lora_A = nn.Parameter(torch.empty(rank, n_in, **new).uniform_(-bound, bound))  # as in nn.Linear
        self.lora_B = nn.Parameter(torch.zeros(n_out, rank, **new))
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """W + s B A in the base's layout and dtype; merged, the base's own.

        ## Some modules never call a layer, but read its weight: nn.MultiheadAttention its out_proj, always, and
        ## nn.TransformerEncoderLayer its linear1 and linear2, in a fast path for eval() without gradients. They see the
        ## adapter here, though not its dropout. PEFT 0.21.2 shows them the base's weight: what it learned then acts in
        ## training, and is silently left out in eval().
        """
        if self.original is not None:
            return self.base.weight
        with torch.autocast(self.base.weight.device.type, enabled=False):
            D = self.scale * self.lora_B @ self.lora_A  # (M, I)
        return (self.base.weight + (D.T if transposed(self.base) else D)).to(self.base.weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.original is not None:
            return y
        ## From right to left: B (A x) takes R (I + M) multiplications for each x, D x would take I M. In a bfloat16
        ## model the thin matrices change their type, not the wide x.
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return y + F.linear(self.scale * F.linear(self.dropout(x), A), B)  # (..., I) -> (..., R) -> (..., M)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the product to the base's weight, which forward then uses alone. A second call does nothing.

        ## Merged, a layer is as fast as without LoRA, and saved as an ordinary weight. Apart, one base in memory serves
        ## many tasks. In a bfloat16 weight an update below 1/512 of it is rounded away when merged, and counts apart.
        """
        if self.original is None:
            self.original, self.base.weight.data = self.base.weight.data, self.weight

    def unmerge(self) -> None:
        """Give the base its own weight back, bit for bit: subtracting would leave rounding errors."""
        if self.original is not None:
            self.base.weight.data = self.original.to(self.base.weight)  # the model may have been moved meanwhile
            self.original = None


def matches(name: str, target: str) -> bool:
    """PEFT's rule for a list of targets: a target is the whole dotted name, or the end of it after a dot."""
    return name == target or name.endswith("." + target)


def build(model: nn.Module, targets: list[str] | dict[str, str], rank: int, alpha: float, dropout: float,
          rslora: bool = False, kind: type = LoRA) -> dict[str, LoRA]:
    """Name -> LoRA (or kind) for each layer that a target matches, or that a dict of name -> target has; the model
    stays as it is. Raises ValueError for numbers out of range, and for matches that are neither Linear nor Conv1D."""
    if adapters(model):
        raise ValueError("the model already has LoRA layers; call remove first, or start from the base again.")
    for name, value, kinds, low, high in (("rank", rank, (int,), 0, math.inf), ("alpha", alpha, (int, float), 0, 1e38),
                                          ("dropout", dropout, (int, float), -1e-9, 1)):
        if type(value) not in kinds or not low < abs(value) < high or value < 0 and name != "alpha":
            raise ValueError(f"LoRA's {name} {value!r:.40} is no number, or out of its range; usual: rank 8, alpha 16.")
    layers = {}
    for name, module in model.named_modules():
        target = targets.get(name) if isinstance(targets, dict) else next(
            (target for target in targets if name and matches(name, target)), None)
        if target is None:
            continue
        if not (isinstance(module, nn.Linear) or transposed(module)):
            raise ValueError(f"LoRA target {target!r:.200} is {name}, of type {type(module).__name__}, not Linear or "
                             f"Conv1D; choose from {candidates(model)}.")
        if rank > min(module.weight.shape):
            raise ValueError(f"LoRA's rank {rank!r:.40} is above the smaller side of {name}; choose "
                             f"{min(module.weight.shape)} or less.")
        layers[name] = kind(module, rank, alpha, dropout, rslora)
        layers[name].target = target  # for adapter_config.json
    return layers


def candidates(model: nn.Module) -> str:
    """What can be a target, once each: the last two parts of the names of all Linear and Conv1D layers."""
    names = [name.split(".")[-2:] for name, m in model.named_modules() if isinstance(m, nn.Linear) or transposed(m)]
    return ", ".join(dict.fromkeys(map(".".join, names))) or "another model, as this has no such layers"


def install(model: nn.Module, layers: dict[str, LoRA]) -> None:
    """Freeze the whole model and put the LoRA layers in place."""
    ## A weight that Adam trains takes four numbers: itself, its gradient, and two averages of that. Frozen, it takes
    ## one, which may be bfloat16. Most activations stay: gradients pass through all that follows an adapter.
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float, targets: list[str]) -> list[str]:
    """Freeze model, put LoRA around each Linear and Conv1D that a target matches, and return their names. What else is
    to be trained gets requires_grad_() afterwards. Raises ValueError as build does, and for one that is no name."""
    for target in targets or [""]:
        if not any(matches(name, target) for name, _ in model.named_modules() if name):
            raise ValueError(f"LoRA target {target!r:.200} is no layer's name; choose from {candidates(model)}.")
    layers = build(model, targets, rank, alpha, dropout)
    install(model, layers)
    return list(layers)


def adapters(model: nn.Module) -> dict[str, LoRA]:
    """Name -> LoRA, for all there are."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRA)}


def merge(model: nn.Module, undo: bool = False) -> None:
    """Add every adapter to its weight, or give every base its own weight back: see LoRA.merge and LoRA.unmerge."""
    for layer in adapters(model).values():
        layer.unmerge() if undo else layer.merge()


def remove(model: nn.Module) -> None:
    """Leave the base layers, frozen still, under their own names: with what was learned if merged."""
    for name, layer in adapters(model).items():
        model.set_submodule(name, layer.base)


def missing(matrix: Tensor) -> Tensor:
    """|matrix - nearest of rank r| / |matrix|, Frobenius, for r = 1, 2 ...: (n, n) -> (n,). Eckart & Young 1936."""
    kept = torch.linalg.svdvals(matrix.double()).square().cumsum(0)
    return (1 - kept / kept[-1]).sqrt()


def main() -> None:
    torch.manual_seed(0)
    low, random = torch.randn(768, 8) @ torch.randn(8, 768), torch.randn(768, 768)
    a, b = missing(random), missing(low / low.norm() + 0.1 * random / random.norm())
    print(" rank  parameters   random  rank 8 + noise      the share that the nearest matrix of that rank misses")
    for r in (1, 2, 4, 8, 16, 32, 64, 128, 256, 384):
        print(f"{r:5}{2 * 768 * r:12,}{a[r - 1]:9.1%}{b[r - 1]:16.1%}")
    model, x, y = nn.Sequential(nn.Linear(768, 768)), torch.randn(64, 768), torch.randn(64, 768)
    add_lora(model, rank=8, alpha=16, dropout=0.0, targets=["0"])
    for step in (1, 2, 3):
        grads = torch.autograd.grad(F.mse_loss(model(x), y, reduction="sum"), [model[0].lora_A, model[0].lora_B])
        print(f"step {step}: the gradient of A has length {grads[0].norm():8.2f}, that of B {grads[1].norm():8.2f}")
        for parameter, grad in zip((model[0].lora_A, model[0].lora_B), grads):
            parameter.data -= 1e-4 * grad


if __name__ == "__main__":
    main()
