"""PEFT's adapter folders: what is in them, read into lora.py's layers and written from them.

You learn here: how little an adapter's folder holds, a table of names and a few settings; why what is not known in a
settings file has to be refused, and not passed over; and how DoRA learns the length of a row apart from its direction.

    from peft_files import load_adapter, save_adapter

A folder holds adapter_config.json and adapter_model.safetensors. Left out on purpose: embeddings, PiSSA and other
relatives; an adapter that needs one of these is refused by its setting.
"""
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch.nn as nn
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from lora import LoRA, adapters, build, install, matches, transposed
from weights import is_float, open_weights, read_json, save_safetensors

# Options that read_config passes: they are read, or leave y as it is (the kind of layer tells fan_in_fan_out) ...
FREE = {"r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "base_model_name_or_path",
        "revision", "task_type", "inference_mode", "peft_version", "auto_mapping", "megatron_core", "qalora_group_size"}
# ... or have one of these values; initialisations that change the base's weights (PiSSA, OLoRA ...) are not among them.
HARMLESS = {"peft_type": ["LORA"], "bias": ["none", "lora_only"], "init_lora_weights": [True, "gaussian", "orthogonal"],
            "use_rslora": [True], "use_dora": [True]}
# What names layers: a regular expression, a list of ends of names, or expressions with a number for each
RULES = {"target_modules": (str, list), "exclude_modules": (str, list), "layers_pattern": (str, list),
         "modules_to_save": list, "rank_pattern": dict, "alpha_pattern": dict}
# Modules that PEFT saves whole for a task, whether a config names them or, as PEFT 0.10's, does not
HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


class DoRA(LoRA):
    """LoRA whose rows have learned lengths (Liu et al. 2024, equation 5): (..., I) -> (..., M).

    ##     W' = m (W + s B A) / |W + s B A|        m (M,), and |.| the length of each row
    ## Full fine-tuning changes a row's direction and its length in other proportions than LoRA does (section 3.2). m
    ## starts as |W|, so that W' is W. The lengths below the line are constants in the backward pass (section 4.3).
    """

    def __init__(self, base: nn.Module, *settings):
        super().__init__(base, *settings)
        self.axis = 0 if transposed(base) else 1  # of a row's numbers: GPT-2's weight is (I, M)
        self.lora_magnitude_vector = nn.Parameter(base.weight.detach().float().norm(dim=self.axis))

    @property
    def weight(self) -> Tensor:
        W = super().weight
        if self.original is not None:
            return W
        return W * (self.lora_magnitude_vector / W.detach().float().norm(dim=self.axis)).unsqueeze(self.axis).to(W)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.original is not None:
            return y
        change = self.weight - self.base.weight
        return y + (self.dropout(x) @ (change if self.axis == 0 else change.T).to(x.dtype))


def named_tensors(layers: dict[str, LoRA], prefix: str, heads: dict[str, nn.Module] | None = None, bias: str = "none"
                  ) -> dict[str, nn.Parameter]:
    """Name in adapter_model.safetensors -> A, B, DoRA's m, with bias "lora_only" a layer's bias, a head's parameter."""
    named = {f"{name}.{part}.weight": getattr(layer, part)
             for name, layer in layers.items() for part in ("lora_A", "lora_B")}
    named |= {f"{name}.lora_magnitude_vector": layer.lora_magnitude_vector
              for name, layer in layers.items() if isinstance(layer, DoRA)}
    if bias == "lora_only":
        named |= {f"{name}.base_layer.bias": layer.bias for name, layer in layers.items() if layer.bias is not None}
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
    layer = next(iter(layers.values()))  # all have the same settings, but for rank and alpha
    (r, _), = Counter(layer.rank for layer in layers.values()).most_common(1)
    (alpha, _), = Counter(layer.alpha for layer in layers.values()).most_common(1)
    targets = {layer.target for layer in layers.values()}
    ## Names that end so. Where that would take in more (or where they were chosen by a regular expression), all names.
    taken = {name for name, _ in model.named_modules() if any(matches(prefix + name, target) for target in targets)}
    bias = any(layer.bias is not None and layer.bias.requires_grad for layer in layers.values())
    config = {"peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": base_name,
              "target_modules": sorted(targets if taken == layers.keys() else [prefix + name for name in layers]),
              "r": r, "rank_pattern": {prefix + name: layer.rank for name, layer in layers.items() if layer.rank != r},
              "lora_alpha": alpha, "alpha_pattern": {
                  prefix + name: layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
              "lora_dropout": layer.dropout.p, "use_rslora": layer.rslora, "use_dora": isinstance(layer, DoRA),
              "bias": "lora_only" if bias else "none", "modules_to_save": list(heads) or None, "inference_mode": True,
              "fan_in_fan_out": any(transposed(layer.base) for layer in layers.values()), "init_lora_weights": True}
    data, path = json.dumps(config, indent=2, sort_keys=True).encode(), Path(folder) / "adapter_config.json"
    if path.exists() and path.read_bytes() != data:
        path.unlink()  # so that a kill between the two writes leaves no folder with new weights and an old config
    named = named_tensors(layers, prefix, {name: model.get_submodule(name) for name in heads}, config["bias"])
    save_safetensors(named, Path(folder) / "adapter_model.safetensors", {"format": "pt"})
    utils.write_atomically(path, lambda file: file.write(data))


def read_config(path: Path) -> dict:
    """adapter_config.json, with PEFT's defaults. Raises utils.InputError for what load_adapter would have to ignore.

    ## PEFT has dozens of options, and gains more. A list of those to refuse would soon have holes. So whatever is
    ## neither known nor off is refused: better no model than a wrong one.
    """
    try:
        config = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise utils.InputError(f"{path} can't be read as JSON ({type(error).__name__}); an adapter's folder holds "
                               "adapter_config.json and adapter_model.safetensors.") from error
    defaults = {"peft_type": None, "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "bias": "none",
                "use_dora": False, **dict.fromkeys((*RULES, "layers_to_transform"))}
    config = {**defaults, **(config if isinstance(config, dict) else {})}

    def known(name: str, value: Any) -> bool:
        if name == "target_modules" and not value or name == "peft_type":
            return value == "LORA"
        if name == "layers_to_transform" and value not in (None, []):
            return all(type(i) is int for i in (value if isinstance(value, list) else [value]))
        if name in RULES and value:
            strings = [value] if isinstance(value, str) else list(value) if isinstance(value, list | dict) else [None]
            names = isinstance(value, list) and name != "layers_pattern"  # and not expressions
            return isinstance(value, RULES[name]) and len(strings) < 10_000 and all(
                isinstance(some, str) and some for some in strings) and (names or quick(strings))
        return name in FREE or not value or repr(value) in map(repr, HARMLESS.get(name, []))

    for name, value in config.items():
        if not known(name, value):
            raise utils.InputError(f"{path}: {name!r:.80} is {value!r:.80}, which is not supported here; use PEFT for "
                                   "it, or take another adapter.")
    config["modules_to_save"] = [*(config["modules_to_save"] or []), *HEADS.get(str(config.get("task_type")), [])]
    return config


def quick(patterns: list[str]) -> bool:
    """Whether these are regular expressions that are soon done with the names of all layers.

    ## (a+)+b takes 2^n steps on n letters a. Three repetitions, none of them of a bracket, take n^3 at most.
    """
    whole = "\n".join(patterns)
    if len(patterns) > 1000 or len(whole) > 50_000 or re.search(r"\)[*+?{]", whole):
        return False
    try:
        counts = [len(re.findall(r"[*+{]|(?<![(*+?}])\?", re.compile(pattern).pattern)) for pattern in patterns]
    except (RecursionError, OverflowError, re.error):
        return False
    return max(counts) <= 3 and sum(counts) <= 10


def choose(model: nn.Module, config: dict, prefix: str) -> dict[str, tuple[str, int, float]]:
    """Name -> (target, rank, alpha) of each layer that gets an adapter, by PEFT's rules (its tuners_utils.py)."""
    def hit(ends: list[str], rule: str | frozenset) -> str | None:
        if isinstance(rule, str):
            return rule if re.fullmatch(rule, ends[0]) else None
        return next((end for end in ends if end in rule), None)

    targets, others = (rule if isinstance(rule, str) else frozenset(rule or ())
                       for rule in (config["target_modules"], config["exclude_modules"]))
    layers, indices = config["layers_pattern"] or "[^.]*", config["layers_to_transform"]
    layers = re.compile(rf"(?:^|.*?\.)(?:{layers if isinstance(layers, str) else '|'.join(layers)})\.(\d+)\.")
    indices = {indices} if isinstance(indices, int) else set(indices or ())
    patterns = [([(re.compile(key), value) for key, value in (config[name] or {}).items()], config[usual])
                for name, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))]
    chosen = {}
    for name, module in model.named_modules():
        parts = (prefix + name).split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts))]  # the whole name first
        target = hit(ends, targets)
        if targets == "all-linear":
            target = ends[0] if isinstance(module, nn.Linear) or transposed(module) else None
        if not name or target is None or hit(ends, others) or any(
                f".{head}." in f".{ends[0]}." for head in config["modules_to_save"]):
            continue
        if indices and isinstance(targets, frozenset) and ends[0] not in targets:
            layer = layers.match(ends[0])
            if not layer or int(layer[1]) not in indices:
                continue
        rank, alpha = (next((value for rule, value in rules if any(map(rule.fullmatch, ends))), usual)
                       for rules, usual in patterns)
        chosen[name] = target, rank, alpha
    return chosen


def load_adapter(model: nn.Module, folder: Path | str, prefix: str = "transformer.") -> dict:
    """Add the adapter in folder, PEFT's or ours, to a base model, for use or for more training. Returns its config.

    prefix: see save_adapter; the heads are those that the config names. Raises utils.InputError, with the model as it
    was, as read_config and open_weights do, for settings that lora.build refuses, and for an adapter of another base,
    one that has other tensors than this model takes.
    """
    folder = Path(folder)
    config, path, old = (folder / name for name in ("adapter_config.json", "adapter_model.safetensors",
                                                    "adapter_model.bin"))
    config, tensors = read_config(config), open_weights(old if old.exists() and not path.exists() else path)
    if not tensors:
        raise utils.InputError(f"{folder} is an empty adapter: its file holds no tensor; have it written anew.")
    layers, heads, bias = {}, {}, config["bias"]
    try:
        for name, (target, rank, alpha) in choose(model, config, prefix).items():
            layers |= build(model, {name: target}, rank, alpha, config["lora_dropout"], config["use_rslora"],
                            DoRA if config["use_dora"] else LoRA)
    except ValueError as error:
        raise utils.InputError(f"{folder}: {error}") from error
    for name, module in model.named_modules():
        if name and (prefix + name).endswith(tuple(config["modules_to_save"])):  # no dot needed, as in PEFT
            if isinstance(module, nn.Embedding):  # GPT-2's also makes the scores, which PEFT leaves as they were
                raise utils.InputError(f"{folder}: modules_to_save holds {name}, a table, which is not supported here; "
                                       "use PEFT for it.")
            heads[name] = module
    ours = named_tensors(layers, prefix, heads, bias)
    ## torch.compile puts its word before a name; up to PEFT 0.6 a bias had no layer of its own around it.
    found = {name.replace("_orig_mod.", "").replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}
    wanted = {name.replace(".base_layer.", "."): parameter for name, parameter in ours.items()}
    for name in sorted(wanted.keys() | found.keys()):
        here, there = (tuple(some[name].shape) if name in some else "missing" for some in (wanted, found))
        if here == there and not is_float(found[name]):
            there = found[name].dtype
        if here != there or len(found) < len(tensors):
            raise utils.InputError(f"{folder} is an adapter for another base: {name!r:.200} is {there} in the file and "
                                   f"{here} in this model; load it into the model that it was trained on.")
    for name, parameter in wanted.items():
        parameter.data.copy_(found[name])
    install(model, layers)
    for module in heads.values():
        module.requires_grad_()
    for layer in layers.values() if bias == "lora_only" else ():
        layer.base.requires_grad_()
        layer.base.weight.requires_grad_(False)
    return config
