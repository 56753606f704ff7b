"""From the vectors of tokens to one vector for a whole text: pooling, and the folders of sentence-transformers.

You learn here: three ways to make one vector of many; why a folder's settings have to be obeyed, or refused by name.

    from sentences import read_modules, read_sentences    bert.open_bert calls both

Left out on purpose: modules other than Transformer, Pooling, Dense and Normalize; weighted means; several prompts.
"""
import functools
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from weights import open_weights, read_json

# Shapes: B batch, T time (tokens, padding included), C channels


def mean_pool(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, T, C) -> (B, C): the mean over tokens, padding left out.

    ## MiniLM's sentence vectors are made like this (Reimers & Gurevych 2019, section 3). [CLS] says something about a
    ## whole text where training asked it to: BERT's did, whether one text follows another; MiniLM's asked the mean.
    """
    if mask is None:
        return hidden.mean(1)
    share = mask / mask.sum(1, keepdim=True)  # (B, T), sums to 1 over a text's tokens
    return (hidden * share[:, :, None]).sum(1)


def max_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, T, C) -> (B, C): each channel's largest value over tokens, padding left out."""
    return hidden.masked_fill(~mask[:, :, None], -math.inf).amax(1)


class Sentences(NamedTuple):
    """How the vectors of tokens become one vector for each text: as for MiniLM, where a folder says nothing else."""
    size: int  # numbers in it
    pooling: tuple[str, ...] = ("mean",)  # names in POOLINGS; of several, the results stand one after the other
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()  # what follows the pooling
    max_length: int = 256  # tokens that are read
    lowercase: bool = False
    prompt: str = ""  # stands before each text


POOLINGS = {"cls": lambda hidden, mask: hidden[:, 0], "max": max_pool, "mean": mean_pool}
ACTIVATIONS = {"Tanh": torch.tanh, "Identity": lambda x: x, "ReLU": F.relu, "GELU": F.gelu, "Sigmoid": torch.sigmoid}
## sentence-transformers keeps a model of several modules in one folder: modules.json names them and their own folders.
## The same weights with another pooling give other vectors. So what stands in none of these lists is refused, unless it
## is off.
ANY = object()  # the value is read below, or changes no vector
FORWARD = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
NAMES = dict.fromkeys(("module_input_name", "module_output_name"), "sentence_embedding")
SETTINGS = {  # kind of module -> its settings, and their only value that is computed here
    "all": dict.fromkeys(("__version__", "model_type", "prompts", "default_prompt_name", "similarity_fn_name"), ANY),
    "Transformer": {"max_seq_length": ANY, "do_lower_case": ANY, "unpad_inputs": ANY, "modality_config": FORWARD,
                    "transformer_task": "feature-extraction", "module_output_name": "token_embeddings"},
    "Pooling": {"word_embedding_dimension": ANY, "embedding_dimension": ANY, "include_prompt": True,
                "pooling_mode": ANY, "pooling_mode_cls_token": ANY, "pooling_mode_max_tokens": ANY,
                "pooling_mode_mean_tokens": ANY},
    "Dense": {"in_features": ANY, "out_features": ANY, "bias": ANY, "activation_function": ANY, **NAMES},
    "Normalize": NAMES,
}


def refusing(reader: Callable) -> Callable:
    """A reader of a folder that names what it does not understand in a utils.InputError."""
    @functools.wraps(reader)
    def read(folder: Path, *args):
        try:
            return reader(folder, *args)
        except utils.InputError:
            raise
        except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
            raise utils.InputError(f"{folder} is a model of sentence-transformers that is not computed here "
                                   f"({type(error).__name__}: {error!s:.150}); take another model.") from error
    return read


def read_settings(path: Path, kind: str) -> dict:
    """A file of settings, {} where there is none. Raises ValueError for what is not in SETTINGS."""
    found = read_json(path) if path.exists() else {}
    for name, value in found.items():
        known = SETTINGS[kind].get(name)
        if value != known and known is not ANY and (value or known is True):
            raise ValueError(f"{path.name} of {kind} says {name!r:.60}: {value!r:.60}")
    return found


@refusing
def read_modules(folder: Path) -> list[tuple[str, Path]]:
    """(kind, folder) of each module that modules.json names, or, where there is none, of the first alone."""
    if not (folder / "modules.json").exists():
        return [("Transformer", folder)]
    modules = [(module["type"].rpartition(".")[2], module["path"]) for module in read_json(folder / "modules.json")]
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Dense", "Normalize"}:
        raise ValueError(f"its modules are {', '.join(kinds)!r:.99}")
    for _, place in modules:
        if not re.fullmatch(r"[\w -]*", place):  # from a stranger, as the rest
            raise ValueError(f"{place!r:.60} is not the name of a folder in it")
    return [(kind, folder / place) for kind, place in modules]


@refusing
def read_sentences(folder: Path, modules: list[tuple[str, Path]], n_embd: int, n_positions: int,
                   max_length: int | None = None) -> Sentences:
    """How a folder makes vectors of texts. modules: from read_modules; max_length: the tokenizer's, if it has one.

    Raises utils.InputError for settings that are not computed here, and for what can't be read or does not fit.
    """
    first = read_settings(modules[0][1] / "sentence_bert_config.json", "Transformer")
    said = read_settings(folder / "config_sentence_transformers.json", "all")
    longest = first.get("max_seq_length") or max_length or (n_positions if modules[1:] else 256)
    prompt = said["prompts"][said["default_prompt_name"]] if said.get("default_prompt_name") else ""
    if type(longest) is not int or longest < 3 or type(prompt) is not str:
        raise ValueError(f"max_seq_length is {longest!r:.60}, and the prompt {prompt!r:.60}")
    size, pooling, steps = n_embd, ("mean",), []
    for kind, part in modules[1:]:
        found = read_settings(part / "config.json", kind)
        if kind == "Pooling":
            ends = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens"}
            given = found.get("pooling_mode") or [
                name for name, end in ends.items() if found.get(f"pooling_mode_{end}")] or "mean"
            pooling = (given,) if isinstance(given, str) else tuple(given)
            size *= len([POOLINGS[name] for name in pooling])
        elif kind == "Normalize":
            steps.append(functools.partial(F.normalize, dim=-1))
        else:
            ##     y = act(W x + b)
            tensors, act = open_weights(part), found["activation_function"]
            W, b = tensors.pop("linear.weight").float(), tensors.pop("linear.bias", None)
            b = torch.zeros(len(W)) if b is None else b.float()
            if tensors or W.shape != (found["out_features"], size) or b.shape != W.shape[:1]:
                raise ValueError(f"{part.name} holds {tuple(W.shape)}, {tuple(b.shape)} where {size} numbers are made "
                                 f"{found['out_features']!r:.60}")
            if not act.startswith("torch.nn.modules."):
                raise ValueError(f"activation_function is {act!r:.60}")
            steps += [functools.partial(F.linear, weight=W, bias=b), ACTIVATIONS[act.rpartition(".")[2]]]
            size = len(W)
    return Sentences(size, pooling, tuple(steps), longest, bool(first.get("do_lower_case")), prompt)
