"""LoRA by hand: adapt a large model by training a small addition to some of its matrices (Hu et al. 2021).

You learn here: what a matrix of low rank can and can't be; why one half of the addition starts at zero and the other
doesn't; what merging it into the weights buys, and what keeping it apart buys; what is in PEFT's adapter files.

    python 06_finetune/lora.py                 two matrices and one layer, in a few seconds

You should see: the nearest matrix of rank 8 misses 98.0 % of a random 768 x 768 matrix, and 9.8 % of one that is of
rank 8 but for noise; an output unchanged by a new adapter; A's first gradient zero; merged and apart the same to 1e-5.
Writes: nothing; `save_adapter` writes folders that PEFT opens, and `load_adapter` opens those that PEFT writes.
Left out on purpose: embeddings and convolutions; several adapters at once; a rank or alpha of their own for some
layers; DoRA, PiSSA and other relatives. An adapter that needs one of these is refused.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils  # noqa: E402
from gpt2 import Conv1D  # noqa: E402
from weights import open_weights, save_safetensors  # noqa: E402

# Shapes: n_in, n_out a layer's inputs and outputs, r rank. W is (n_out, n_in) in nn.Linear, (n_in, n_out) in Conv1D.

## Fine-tuning changes a matrix W by some D of the same size. LoRA learns D as a product of two thin matrices:
##     W + D = W + (alpha / r) B A        B (n_out, r), A (r, n_in)        (Hu et al. 2021, section 4.1)
## The product reads r directions of its input and writes r directions of its output: its rank is at most r. That this
## is enough is a bet on D, not a law. main() prints both sides of it: a random matrix has no good approximation of low
## rank, one in which few directions matter has. Fine-tuning seems to be of the second kind: it works even in a random
## subspace of few dimensions (Aghajanyan et al. 2020), as a trained model has most of what a new task needs.


# ---------------------------------------------------------------------------------------------- one layer
class LoRA(nn.Module):
    """A frozen Linear or Conv1D, and beside it what is learned: (..., n_in) -> (..., n_out). add_lora makes these.

    lora_A (r, n_in) and lora_B (n_out, r) are float32 whatever the base is in: training needs the digits.

    ## B starts at zero, and so training starts from the very model that was given. A must not be zero too. With
    ## y = W x + s B A x, s the scale and g the gradient of y, the two gradients are
    ##     of B: s g (A x)^T        of A: s (B^T g) x^T
    ## and each has the other matrix as a factor. If both were zero, both gradients would be, for ever. As it is, A's is
    ## zero in the first step alone: then B has moved.
    ##
    ## B A is a sum of r products. It is divided by r so that the learning rate need not be searched anew for another r;
    ## alpha then does much what a learning rate does (section 4.1). For large r that is too much, and sqrt(r) the right
    ## divisor (rsLoRA, Kalajdzievski 2023).
    """

    def __init__(self, base: nn.Linear | Conv1D, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        n_in, n_out = sizes(base)
        self.base, self.rank, self.alpha, self.rslora = base, rank, alpha, rslora
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = nn.Dropout(dropout)  # of the low-rank path alone
        self.original = None  # the base's weight, while merged
        new, bound = {"device": base.weight.device, "dtype": torch.float32}, 1 / math.sqrt(n_in)
        self.lora_A = nn.Parameter(torch.empty(rank, n_in, **new).uniform_(-bound, bound))  # as in nn.Linear
        self.lora_B = nn.Parameter(torch.zeros(n_out, rank, **new))
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.original is not None:
            return y
        ## From right to left: B (A x) takes r (n_in + n_out) multiplications for each x, D x would take n_in n_out. In
        ## a bfloat16 model the thin matrices change their type, not the wide x.
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return y + F.linear(self.scale * F.linear(self.dropout(x), A), B)  # (..., n_in) -> (..., r) -> (..., n_out)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the product to the base's weight, which forward then uses alone. A second call does nothing.

        ## Merged, a layer is as fast as without LoRA, and can be saved as an ordinary weight. Apart, one base in memory
        ## serves many tasks: each has an A and a B of its own, small enough to swap between two requests. A bfloat16
        ## weight has two to three digits: an update below 1/512 of it is rounded away when merged, and counts when
        ## apart.
        """
        if self.original is None:
            W = self.base.weight
            with torch.autocast(W.device.type, enabled=False):
                D = self.scale * self.lora_B @ self.lora_A  # (n_out, n_in)
            self.original, W.data = W.data, (W + (D.T if isinstance(self.base, Conv1D) else D)).to(W.dtype)

    def unmerge(self) -> None:
        """Give the base its own weight back, bit for bit. A second call does nothing.

        ## Subtracting the product again would leave rounding errors. So merge keeps the original: while merged, the
        ## weight takes its memory twice.
        """
        if self.original is not None:
            self.base.weight.data = self.original.to(self.base.weight)  # the model may have been moved meanwhile
            self.original = None


def sizes(layer: nn.Linear | Conv1D) -> tuple[int, int]:
    """(n_in, n_out)."""
    return tuple(layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1])


# ---------------------------------------------------------------------------------------------- a whole model
def matches(name: str, target: str) -> bool:
    """PEFT's rule for a list of targets: a target is the whole dotted name, or the end of it after a dot."""
    return name == target or name.endswith("." + target)


def build(model: nn.Module, targets: list[str], rank: int, alpha: float, dropout: float, rslora: bool = False,
          prefix: str = "") -> dict[str, LoRA]:
    """Name -> LoRA for each layer that, with prefix before its name, a target matches. The model stays as it is.

    Raises utils.InputError for numbers out of range, and for matches that are neither Linear nor Conv1D.
    """
    if adapters(model):
        raise utils.InputError("the model already has LoRA layers; call remove first, or start from the base again.")
    if type(rank) is not int or rank < 1:
        raise utils.InputError(f"LoRA's rank {rank!r:.40} must be a whole number of at least 1; 8 is a usual one.")
    if type(alpha) not in (int, float) or not 0 < abs(alpha) < 1e38:
        raise utils.InputError(f"LoRA's alpha {alpha!r:.40} must be a finite number other than 0; 16 is a usual one.")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise utils.InputError(f"LoRA's dropout {dropout!r:.40} must be at least 0 and less than 1; choose another.")
    layers = {}
    for name, module in model.named_modules():
        target = next((target for target in targets if name and matches(prefix + name, target)), None)
        if target is None:
            continue
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise utils.InputError(f"LoRA target {target!r:.200} is {name}, of type {type(module).__name__}, not "
                                   f"Linear or Conv1D; choose from {candidates(model)}.")
        if rank > min(sizes(module)):
            raise utils.InputError(f"LoRA's rank {rank!r:.40} is above the smaller side of {name}, which is "
                                   f"{' x '.join(map(str, sizes(module)))}; choose {min(sizes(module))} or less.")
        layers[name] = LoRA(module, rank, alpha, dropout, rslora)
        layers[name].target = target  # for adapter_config.json
    return layers


def candidates(model: nn.Module) -> str:
    """What can be a target, once each: the last two parts of the names of all Linear and Conv1D layers."""
    names = [name.split(".")[-2:] for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return ", ".join(dict.fromkeys(map(".".join, names))) or "another model, as this has no such layers"


def install(model: nn.Module, layers: dict[str, LoRA]) -> None:
    """Freeze the whole model and put the LoRA layers in place.

    ## A weight that Adam trains takes four numbers: itself, its gradient, and two averages of that. Frozen, it takes
    ## one, which may be bfloat16; and of a layer's three matrix products in a step, the one for the weight's gradient
    ## falls away. Activations stay, but for the inputs of frozen layers: gradients still pass through every layer down
    ## to the first adapter.
    """
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, layer)


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float, targets: list[str]) -> list[str]:
    """Freeze model, put a LoRA around each Linear and Conv1D that a target matches, and return their names.

    To train something else besides, say a new head, call requires_grad_() on it afterwards; to convert the model to
    another dtype, do it before. Raises utils.InputError, with the model as it was, for a target that is the name of no
    layer, and as build does.
    """
    for target in targets or [""]:
        if not any(matches(name, target) for name, _ in model.named_modules() if name):
            raise utils.InputError(f"LoRA target {target!r:.200} is no layer's name; choose from {candidates(model)}.")
    layers = build(model, targets, rank, alpha, dropout)
    install(model, layers)
    return list(layers)


def adapters(model: nn.Module) -> dict[str, LoRA]:
    """Name -> LoRA, for all there are."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRA)}


def merge(model: nn.Module) -> None:
    """Add every adapter to its weight: see LoRA.merge."""
    for layer in adapters(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Give every base its own weight back: see LoRA.unmerge."""
    for layer in adapters(model).values():
        layer.unmerge()


def remove(model: nn.Module) -> None:
    """Leave the base layers alone, frozen still: with what was learned if merged, else as they were.

    The names in model.state_dict() are then those of the weight files again.
    """
    for name, layer in adapters(model).items():
        model.set_submodule(name, layer.base)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint needs beside the base: every parameter in training by its name, not copied."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_options(args: argparse.Namespace, given: dict) -> None:
    """Raise InputError for an adapter's option beside another --method, which would pass over it."""
    for name in ("lora_rank", "lora_alpha", "lora_targets"):
        if name in given and args.method != "lora" and not args.resume:
            raise utils.InputError(f"--{name.replace('_', '-')} is for --method lora, not for {args.method}; leave it "
                                   "out.")


def load_trainable(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Put trainable_state's parameters back; if those of the checkpoint at path are another model's: InputError."""
    own = trainable_state(model)
    if {name: p.shape for name, p in own.items()} != {name: p.shape for name, p in state.items()}:
        raise utils.InputError(f"{path} is of another model than this script builds; start anew without --resume.")
    for name, parameter in own.items():
        parameter.copy_(state[name])


# ---------------------------------------------------------------------------------------------- PEFT's files
# Options that read_config passes: they are read, or leave y as it is (the kind of layer tells fan_in_fan_out) ...
FREE = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "fan_in_fan_out", "base_model_name_or_path",
        "revision", "task_type", "inference_mode", "peft_version", "auto_mapping", "megatron_core", "qalora_group_size"}
# ... or have one of these values; initialisations that change the base's weights (PiSSA, OLoRA ...) are not among them.
HARMLESS = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, "gaussian", "orthogonal"]}


def named_tensors(layers: dict[str, LoRA], prefix: str, heads: dict[str, nn.Module] | None = None
                  ) -> dict[str, nn.Parameter]:
    """Name in adapter_model.safetensors -> A or B, or a head's parameter."""
    named = {f"{name}.{part}.weight": getattr(layer, part)
             for name, layer in layers.items() for part in ("lora_A", "lora_B")}
    named |= {f"{name}.{part}": p for name, head in (heads or {}).items() for part, p in head.named_parameters()}
    return {f"base_model.model.{prefix}{name}": p for name, p in named.items()}


def save_adapter(model: nn.Module, folder: Path | str, base_name: str, prefix: str = "transformer.",
                 task_type: str | None = "CAUSAL_LM", heads: tuple[str, ...] = ()) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT does. Raises utils.InputError without adapters.

    prefix: what transformers has before this model's names: "transformer." in GPT2LMHeadModel, "bert." in
    BertForSequenceClassification, "" in BertModel. task_type: PEFT's word, as "CAUSAL_LM" or "SEQ_CLS", or None.
    heads: names of modules that were trained whole, and are written whole; PEFT calls them modules_to_save.

    ## An adapter knows its base by name alone. On another of the same shape it loads, and computes nonsense.
    """
    layers = adapters(model)
    if not layers:
        raise utils.InputError("the model has no LoRA layers to save; call add_lora first.")
    layer = next(iter(layers.values()))  # all have the same settings
    config = {"peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": base_name,
              "target_modules": sorted({layer.target for layer in layers.values()}), "r": layer.rank,
              "lora_alpha": layer.alpha, "lora_dropout": layer.dropout.p, "use_rslora": layer.rslora, "bias": "none",
              "fan_in_fan_out": any(isinstance(layer.base, Conv1D) for layer in layers.values()),
              "inference_mode": True, "init_lora_weights": True, "modules_to_save": list(heads) or None,
              "use_dora": False}
    data, path = json.dumps(config, indent=2, sort_keys=True).encode(), Path(folder) / "adapter_config.json"
    if path.exists() and path.read_bytes() != data:
        path.unlink()  # a kill between the two writes shall leave no folder with new weights and an old config
    named = named_tensors(layers, prefix, {name: model.get_submodule(name) for name in heads})
    save_safetensors(named, Path(folder) / "adapter_model.safetensors", {"format": "pt"})
    utils.write_atomically(path, data)


def read_config(path: Path, heads: bool = False) -> dict:
    """adapter_config.json, with PEFT's defaults. Raises utils.InputError for what load_adapter would have to ignore.

    heads: whether the model has some, so that modules_to_save may name them.

    ## PEFT has dozens of options, and gains more. A list of those to refuse would soon have holes. So whatever is
    ## neither known nor off is refused: better no model than a wrong one.
    """
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise utils.InputError(f"{path} can't be read as JSON ({type(error).__name__}); an adapter's folder holds "
                               "adapter_config.json and adapter_model.safetensors.") from error
    defaults = {"peft_type": None, "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}
    config = {**defaults, "target_modules": None, **(config if isinstance(config, dict) else {})}
    targets = config["target_modules"]
    ## A list holds names. A string is a regular expression to PEFT: "c_attn" alone matches none of GPT-2's layers.
    names = isinstance(targets, list) and targets and all(isinstance(target, str) for target in targets)
    for name, value in config.items():
        off = not value and name != "peft_type" or name == "modules_to_save" and heads and isinstance(value, list)
        if not (name in FREE or off or value in HARMLESS.get(name, [])) or name == "target_modules" and not names:
            raise utils.InputError(f"{path}: {name!r:.80} is {value!r:.80}, which is not supported here; use PEFT for "
                                   "it, or take another adapter.")
    return config


def load_adapter(model: nn.Module, folder: Path | str, prefix: str = "transformer.", heads: tuple[str, ...] = ()
                 ) -> dict:
    """Add the adapter in folder, PEFT's or ours, to a base model, for use or for more training. Returns its config.

    prefix, heads: see save_adapter; the heads come from the file too. Raises utils.InputError, with the model as it
    was, as read_config, open_weights and build do, and for an adapter of another base, one that has other tensors than
    this model takes.
    """
    config = read_config(Path(folder) / "adapter_config.json", bool(heads))
    tensors = open_weights(Path(folder) / "adapter_model.safetensors")
    settings = (config[name] for name in ("target_modules", "r", "lora_alpha", "lora_dropout", "use_rslora"))
    layers = build(model, *settings, prefix)
    modules = {name: model.get_submodule(name) for name in heads}
    ours = named_tensors(layers, prefix, modules)
    for name in sorted(ours.keys() | tensors.keys()):
        here, there = (tuple(some[name].shape) if name in some else "missing" for some in (ours, tensors))
        if here == there and not tensors[name].is_floating_point():
            there = tensors[name].dtype
        if here != there:
            raise utils.InputError(f"{folder} is an adapter for another base: {name!r:.200} is {there} in the file and "
                                   f"{here} in this model; load it into the model that it was trained on.")
    for name, parameter in ours.items():
        parameter.data.copy_(tensors[name])
    install(model, layers)
    for head in modules.values():
        head.requires_grad_()
    return config


# ---------------------------------------------------------------------------------------------- as a script
def missing(matrix: Tensor) -> Tensor:
    """|matrix - nearest of rank r| / |matrix|, |.| the root of the sum of squares, for r = 1, 2 ...: (n, n) -> (n,).

    ## The nearest keeps the r largest singular values; the others are what is missing (Eckart & Young 1936).
    """
    kept = torch.linalg.svdvals(matrix.double()).square().cumsum(0)
    return (1 - kept / kept[-1]).sqrt()


def main() -> None:
    utils.parser(__doc__).parse_args()
    torch.manual_seed(0)
    n = 768
    low, random = torch.randn(n, 8) @ torch.randn(8, n), torch.randn(n, n)
    a, b = missing(random), missing(low / low.norm() + 0.1 * random / random.norm())
    print(f"what the nearest matrix of rank r misses of two of {n} x {n}, and how many parameters it takes\n\n rank  "
          "parameters  of all   random  rank 8 + noise")
    for r in (1, 2, 4, 8, 16, 32, 64, 128, 256, 384):
        print(f"{r:5}{2 * n * r:12,}{2 * r / n:8.1%}{a[r - 1]:9.1%}{b[r - 1]:16.1%}")

    model, x = nn.Sequential(Conv1D(n, 3 * n)), torch.randn(64, n)  # as GPT-2's c_attn; x (64, n_in)
    before, full = model(x).detach(), utils.count_parameters(model)
    goal = before + x @ torch.randn(n, 3 * n) / n
    add_lora(model, rank=8, alpha=16, dropout=0.0, targets=["0"])
    print(f"\none layer, {n} -> {3 * n}: {utils.count_parameters(model):,} parameters to train instead of {full:,}\n"
          f"a new adapter changes its output by {(model(x) - before).abs().max():.1e}")
    layer = model[0]
    for step in (1, 2, 3):
        grads = torch.autograd.grad(F.mse_loss(model(x), goal, reduction="sum"), [layer.lora_A, layer.lora_B])
        print(f"step {step}: the gradient of A has length {grads[0].norm():7.2f}, that of B {grads[1].norm():7.2f}")
        with torch.no_grad():
            layer.lora_A -= 1e-3 * grads[0]
            layer.lora_B -= 1e-3 * grads[1]
    apart = model(x).detach()
    merge(model)
    print(f"merged and apart differ by {(model(x) - apart).abs().max():.1e}, outputs go up to {apart.abs().max():.1f}")


if __name__ == "__main__":
    utils.run(main)
