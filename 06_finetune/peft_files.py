"""PEFT's adapter folders: what is in them, read into lora.py's layers and written from them.

You learn here: how little an adapter's folder holds, a table of names and a few settings; why what is not known in a
settings file has to be refused, and not passed over.

    from peft_files import load_adapter, save_adapter

A folder holds adapter_config.json and adapter_model.safetensors. Left out on purpose: a rank or alpha of their own for
some layers, biases, DoRA, PiSSA and other relatives; an adapter that needs one of these is refused by its setting.
"""
import json
import sys
from pathlib import Path

import torch.nn as nn

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from lora import LoRA, adapters, build, install, transposed
from weights import open_weights, save_safetensors

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
              "fan_in_fan_out": any(transposed(layer.base) for layer in layers.values()),
              "inference_mode": True, "init_lora_weights": True, "modules_to_save": list(heads) or None,
              "use_dora": False}
    data, path = json.dumps(config, indent=2, sort_keys=True).encode(), Path(folder) / "adapter_config.json"
    if path.exists() and path.read_bytes() != data:
        path.unlink()  # so that a kill between the two writes leaves no folder with new weights and an old config
    named = named_tensors(layers, prefix, {name: model.get_submodule(name) for name in heads})
    save_safetensors(named, Path(folder) / "adapter_model.safetensors", {"format": "pt"})
    utils.write_atomically(path, lambda file: file.write(data))


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
    was, as read_config and open_weights do, for settings that lora.build refuses, and for an adapter of another base,
    one that has other tensors than this model takes.
    """
    config = read_config(Path(folder) / "adapter_config.json", bool(heads))
    tensors = open_weights(Path(folder) / "adapter_model.safetensors")
    settings = (config[name] for name in ("target_modules", "r", "lora_alpha", "lora_dropout", "use_rslora"))
    try:
        layers = build(model, *settings, prefix)
    except ValueError as error:
        raise utils.InputError(f"{folder}: {error}") from error
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
