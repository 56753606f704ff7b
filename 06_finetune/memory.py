"""What all training scripts of this chapter need besides a model: the memory they took, and the weights they trained.

    from memory import load_trainable, peak_memory, trainable_state
"""
import contextlib
import sys
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
from utils import InputError


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: of the GPU's memory, or of the machine's; 0 if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):  # Linux; getrusage's figure would be that of the process that started this one
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines.get("VmHWM", "0").split()[0]) * 1024  # KiB; some sandboxes lack the line
    with contextlib.suppress(ImportError):  # macOS; Windows has no such module
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 0


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint needs beside the base: every parameter in training by its name, not copied."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trainable(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put trainable_state's parameters back. Raises utils.InputError where they are another model's."""
    own = trainable_state(model)
    ## Compared before the first is copied, so that a refusal leaves the model as it was.
    if {name: p.shape for name, p in own.items()} != {name: p.shape for name, p in state.items()}:
        raise InputError("these trained parameters are of another model, or another version of it; start anew.")
    for name, parameter in own.items():
        parameter.copy_(state[name])
