"""lora.py of chapter 06 against PEFT on transformers' models: values, gradients, files both ways; what it refuses."""

import copy
import json
import math
import re
import subprocess
import sys
import time
import warnings

import peft
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, chapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import utils

gpt2, lora, memory, peft_files, weights = chapter("06_finetune", "gpt2", "lora", "memory", "peft_files", "weights")
SMALL = {"vocab_size": 61, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
ALL = ["c_attn", "c_proj", "c_fc"]
IDS = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(0))
warnings.filterwarnings("ignore", module="peft|transformers")


def pair() -> tuple[nn.Module, nn.Module]:
    """Our GPT-2 and transformers' with the same random weights, none of them zero."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(**SMALL, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0,
                                        eos_token_id=0, attn_implementation="eager")).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    state = {name.removeprefix("transformer."): tensor.clone() for name, tensor in theirs.state_dict().items()}
    ours = gpt2.GPT2(SMALL).eval()
    ours.load_state_dict({name: state[name] for name in ours.state_dict()})
    return ours, theirs


def fill(model: nn.Module) -> nn.Module:
    """Random numbers instead of the zeros in B, as after training."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def adapted(targets: list[str], rank: int = 4, alpha: float = 8, dropout: float = 0.0) -> nn.Module:
    model = pair()[0]
    lora.add_lora(model, rank, alpha, dropout, targets)
    return fill(model)


def with_peft(base: nn.Module, task_type: str | None = "CAUSAL_LM", **options) -> peft.PeftModel:
    with warnings.catch_warnings(action="ignore"):
        return fill(peft.get_peft_model(base, peft.LoraConfig(task_type=task_type, **options)).eval())


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    equal = lambda a, b: a.dtype == b.dtype and torch.equal(a, b)  # noqa: E731
    return before.keys() == after.keys() and all(equal(before[name], after[name]) for name in before)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


# ---------------------------------------------------------------------------------------------- PEFT, both ways
@pytest.mark.parametrize(("rank", "targets", "rslora"), [
    (1, ["c_attn"], False), (8, ["c_attn"], True), (5, ALL, False), (16, ["h.1.mlp.c_proj", "attn.c_proj"], True)])
def test_peft_loads_what_we_wrote(tmp_path, rank, targets, rslora):
    ours, theirs = pair()
    base = ours(IDS)
    lora.install(ours, lora.build(ours, targets, rank, 12, 0.1, rslora))
    peft_files.save_adapter(fill(ours), tmp_path, "gpt2-small")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(theirs, tmp_path)
    assert not [w for w in seen if "keys" in str(w.message) or "fan_in" in str(w.message)]
    with torch.no_grad():
        assert close(ours(IDS), loaded(IDS).logits) and not close(ours(IDS), base, 0.01)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(("rank", "targets", "rslora"), [
    (1, ["c_attn"], False), (8, ["c_attn"], True), (5, ALL, False), (2, "all-linear", False), (2, None, False),
    (3, ["transformer.h.1.attn.c_attn"], False), (4, ["c_fc", "q_proj"], True)])
def test_we_load_what_peft_wrote(tmp_path, rank, targets, rslora):
    """PEFT writes "all-linear" out as names, replaces None by c_attn, and passes over targets that match nothing."""
    ours, theirs = pair()
    model = with_peft(theirs, r=rank, lora_alpha=6, lora_dropout=0.2, target_modules=targets, use_rslora=rslora,
                      init_lora_weights=rank % 2 == 0)
    model.save_pretrained(tmp_path / "theirs")
    config = peft_files.load_adapter(ours, tmp_path / "theirs")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (rank, 6, 0.2)
    assert not any(module.training for module in ours.modules())  # as the base
    with torch.no_grad():
        assert close(ours(IDS), model(IDS).logits)
    peft_files.save_adapter(ours, tmp_path / "ours", "name")
    a, b = (tmp_path / who / "adapter_model.safetensors" for who in ("ours", "theirs"))
    assert a.read_bytes() == b.read_bytes()
    mine, peft_s = (peft.LoraConfig.from_pretrained(tmp_path / who).to_dict() for who in ("ours", "theirs"))
    for name in ("base_model_name_or_path", "auto_mapping", "init_lora_weights"):
        mine.pop(name), peft_s.pop(name)
    peft_s["target_modules"] = {name for name in peft_s["target_modules"] if name != "q_proj"}
    assert mine == peft_s


@pytest.mark.parametrize(("cls", "prefix", "task_type"), [
    (BertModel, "", "FEATURE_EXTRACTION"), (BertForSequenceClassification, "bert.", None)])
def test_linear_layers_of_bert(tmp_path, cls, prefix, task_type):
    """BERT's layers are nn.Linear, so that our LoRA fits transformers' own; under "bert." ours lacks the head."""
    torch.manual_seed(0)
    theirs = cls(BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                            intermediate_size=48, max_position_embeddings=16)).eval()
    whole = copy.deepcopy(theirs)
    ours = whole.bert if prefix else whole
    model = with_peft(theirs, task_type, r=3, lora_alpha=9, target_modules=["query", "value", "output.dense"])
    model.save_pretrained(tmp_path / "theirs")
    peft_files.load_adapter(ours, tmp_path / "theirs", prefix)
    assert len(lora.adapters(ours)) == 8
    run = lambda model: model(IDS, torch.ones_like(IDS))[0]  # noqa: E731
    with torch.no_grad():
        assert close(run(whole), run(model))
        lora.merge(ours)
        assert close(run(whole), run(model))
    peft_files.save_adapter(ours, tmp_path / "ours", "bert", prefix, task_type)
    a, b = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    assert a["fan_in_fan_out"] is b["fan_in_fan_out"] is False and a["task_type"] == b["task_type"] == task_type
    assert load_file(tmp_path / "ours/adapter_model.safetensors").keys() == load_file(
        tmp_path / "theirs/adapter_model.safetensors").keys()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_as_pefts(tmp_path, dropout):
    """With dropout too: from the same seed the same inputs are dropped."""
    ours, theirs = pair()
    model = with_peft(theirs, r=4, lora_alpha=8, lora_dropout=dropout, target_modules=ALL)
    model.save_pretrained(tmp_path)
    peft_files.load_adapter(ours, tmp_path)
    logits = []
    for each in (ours, model):
        torch.manual_seed(1)
        y = each.train()(IDS)
        logits.append(y if each is ours else y.logits)
        F.cross_entropy(logits[-1].flatten(0, 1), IDS.flatten()).backward()
    assert close(*logits)
    theirs = {name.replace(".default.weight", ""): p.grad for name, p in model.named_parameters() if "lora_" in name}
    grads = {f"base_model.model.transformer.{name}": p.grad for name, p in ours.named_parameters() if "lora_" in name}
    assert theirs.keys() == grads.keys() and len(theirs) == 16
    assert all(close(grads[name], theirs[name], 1e-4) and theirs[name].any() for name in theirs)


def test_parameters_of_gpt2_as_pefts():
    with torch.device("meta"):
        ours, theirs = gpt2.GPT2(gpt2.SIZES["gpt2"]), GPT2LMHeadModel(GPT2Config())
    names = lora.add_lora(ours, 8, 16, 0.0, ["c_attn"])
    assert names == [f"h.{i}.attn.c_attn" for i in range(12)]
    trainable, total = utils.count_parameters(ours), sum(p.numel() for p in ours.parameters())
    assert (trainable, total, f"{trainable / total:.4%}") == (294_912, 124_734_720, "0.2364%")
    with warnings.catch_warnings(action="ignore"):
        model = peft.get_peft_model(theirs, peft.LoraConfig(r=8, target_modules=["c_attn"]), low_cpu_mem_usage=True)
    assert model.get_nb_trainable_parameters() == (trainable, total)


def test_first_values_as_pefts():
    """Uniform with the same bounds: kaiming_uniform_ with a = sqrt(5) is 1 / sqrt(n_in)."""
    torch.manual_seed(0)
    layer = lora.LoRA(gpt2.Conv1D(100, 50), 40, 8)
    torch.manual_seed(0)
    gpt2.Conv1D(100, 50)
    expected = nn.init.kaiming_uniform_(torch.empty(40, 100), a=math.sqrt(5))
    assert torch.allclose(layer.lora_A, expected) and layer.lora_A.abs().max() <= 0.1 and not layer.lora_B.any()


# ---------------------------------------------------------------------------------------------- training
def test_a_new_adapter_changes_nothing_and_a_has_no_gradient_at_first():
    model = pair()[0]
    before = model(IDS)
    names = lora.add_lora(model, 4, 8, 0.5, ALL)
    assert len(names) == 8 and names == list(lora.adapters(model))
    assert torch.equal(model(IDS), before) and torch.equal(model.train()(IDS), before)
    F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
    for layer in lora.adapters(model).values():
        assert not layer.lora_A.grad.any() and layer.lora_B.grad.any()


@pytest.mark.parametrize("kind", ["gpt2", "linear"])
def test_training_moves_a_and_b_and_nothing_else(kind):
    torch.manual_seed(0)
    model = pair()[0] if kind == "gpt2" else nn.Sequential(nn.Embedding(61, 32), nn.Linear(32, 61))
    lora.add_lora(model, 4, 8, 0.1, ALL if kind == "gpt2" else ["1"])
    before, losses = bits(model), []
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01, weight_decay=0.1)
    for _ in range(10):
        losses.append(F.cross_entropy(model.train()(IDS).flatten(0, 1), IDS.flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("lora_" in name), name
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {n for n in before if "lora_" in n}
    after, state = bits(model), copy.deepcopy(memory.trainable_state(model))
    assert state.keys() == {name for name in before if "lora_" in name}
    model.load_state_dict(before)
    model.load_state_dict(state, strict=False)
    assert same(after, bits(model))


def test_one_layer_by_the_formula():
    """y = x W + b + (alpha / r) x A^T B^T, for alpha of its own and both kinds of layer."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7)
    for base in (nn.Linear(7, 11), nn.Linear(7, 11, bias=False), gpt2.Conv1D(7, 11)):
        for rslora, scale in ((False, 1.5), (True, 3.0)):
            layer = fill(lora.LoRA(base, 4, 6, 0.0, rslora))
            expected = base(x) + scale * (x @ layer.lora_A.T @ layer.lora_B.T)
            assert close(layer(x), expected) and layer(x).shape == (2, 5, 11)


def test_dropout_is_of_the_low_rank_path_alone_and_off_in_evaluation():
    layer = fill(lora.LoRA(nn.Linear(64, 8), 2, 4, 0.5))
    x = torch.randn(3, 64)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer.train()(x), layer.base(x))


def test_less_is_kept_for_the_backward_pass_but_not_much():
    """As install says: activations stay, but for the inputs of frozen layers."""
    def kept(model):
        storages, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}
        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model.hidden(IDS.repeat(8, 1))
        assert y.requires_grad
        return sum(t.untyped_storage().nbytes() for at, t in storages.items() if at not in own)

    full = kept(gpt2.GPT2(SMALL))
    assert 0.4 * full < kept(adapted(["c_attn"])) < 0.9 * full


# ---------------------------------------------------------------------------------------------- merging
@torch.no_grad()
@pytest.mark.parametrize("targets", [["c_attn"], ALL])
def test_merge_and_unmerge(targets):
    model = adapted(targets, dropout=0.3)
    before, apart, keys = bits(model), model(IDS), pair()[0].state_dict().keys()
    lora.merge(model)
    merged, once = model(IDS), bits(model)
    assert close(merged, apart) and torch.equal(model.train()(IDS), merged)
    changed = {name for name in before if not torch.equal(before[name], once[name])}
    assert changed == {f"{name}.base.weight" for name in lora.adapters(model)}
    lora.merge(model)
    assert same(once, bits(model))
    plain = copy.deepcopy(model)
    lora.remove(plain)
    assert plain.state_dict().keys() == keys and torch.equal(plain(IDS), merged) and not lora.adapters(plain)
    for _ in range(2):
        lora.merge(model, undo=True)
        assert same(before, bits(model)) and torch.equal(model.eval()(IDS), apart)
    lora.remove(model)
    assert same(bits(model), bits(pair()[0])) and not any(p.requires_grad for p in model.parameters())


def test_merged_under_autocast_is_the_same():
    model, other = adapted(ALL), adapted(ALL)
    other.load_state_dict(model.state_dict())
    lora.merge(model)
    with torch.autocast("cpu", torch.bfloat16):
        lora.merge(other)
    assert same(bits(model), bits(other))


def test_unmerge_after_a_move():
    model = adapted(["c_attn"])
    before = bits(model)
    lora.merge(model)
    model.double()
    lora.merge(model, undo=True)
    assert same(bits(model), {name: tensor.double() for name, tensor in before.items()})


# ---------------------------------------------------------------------------------------------- bfloat16
@pytest.mark.parametrize("how", ["shrink", "all"])
def test_a_bfloat16_base(how):
    """shrink's base under autocast, and a model all in bfloat16 without it: near to float32, and trainable."""
    expected = adapted(ALL)
    model = pair()[0]
    model = gpt2.shrink(model.requires_grad_(False)) if how == "shrink" else model.bfloat16()
    lora.add_lora(model, 4, 8, 0.0, ALL)
    model.load_state_dict(memory.trainable_state(expected), strict=False)
    before = bits(model)
    layers = lora.adapters(model).values()
    assert all(p.dtype == torch.float32 for layer in layers for p in (layer.lora_A, layer.lora_B))
    assert all(layer.base.weight.dtype == torch.bfloat16 for layer in layers)
    x = expected.h[0].ln_1(torch.randn(5, 32))
    x, want = x.to(torch.float32 if how == "shrink" else torch.bfloat16), expected.h[0].attn.c_attn(x)
    layer = model.h[0].attn.c_attn
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "shrink"):
        y = layer(x)
        y.float().square().sum().backward()
        assert y.dtype == torch.bfloat16 and close(y.float(), want, 0.02)
        layer.merge()
        assert close(layer(x).float(), want, 0.02)
        layer.unmerge()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32 and layer.lora_B.grad.any()
    assert same(before, bits(model))


def test_a_small_update_is_lost_in_a_merged_bfloat16_weight_and_counts_apart():
    """As merge says: below 1/512 of the weight."""
    layer = lora.LoRA(nn.Linear(1, 1, bias=False, dtype=torch.bfloat16), 1, 1)
    x = torch.ones(1, 1)
    nn.init.ones_(layer.lora_A)
    for weight in torch.linspace(1, 2, 129)[:-1]:
        for part, lost in ((1 / 513, True), (1 / 128, False)):
            nn.init.constant_(layer.base.weight, weight)
            update = nn.init.constant_(layer.lora_B, part * weight)
            layer.merge()
            assert (layer.base.weight == weight) == lost
            layer.unmerge()
            assert F.linear(F.linear(x, layer.lora_A), update).item() == pytest.approx(part * weight.item())


# ---------------------------------------------------------------------------------------------- refusals
def refused(call, *parts: str) -> str:
    with pytest.raises(ValueError) as error:  # lora.py's own, or utils.InputError, which is one
        call()
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message and message.endswith(".") and ";" in message
    return message


@pytest.mark.parametrize(("options", "parts"), [
    ({"targets": ["c_atn"]}, ["'c_atn' is no", "choose from attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj."]),
    ({"targets": ["c_attn", "attn.c_fc"]}, ["'attn.c_fc' is no layer's name"]),
    ({"targets": ["_attn"]}, ["'_attn' is no layer's name"]),
    ({"targets": [""]}, ["'' is no layer's name"]),
    ({"targets": []}, ["'' is no layer's name"]),
    ({"targets": ["\x1b[31m" + "a" * 999]}, [r"'\x1b[31maaa"]),
    ({"targets": ["attn"]}, ["'attn' is h.0.attn, of type Attention, not Linear or Conv1D; choose from attn.c"]),
    ({"targets": ["c_attn", "wte"]}, ["'wte' is wte, of type Embedding, not"]),
    ({"targets": ["ln_f"]}, ["ln_f, of type LayerNorm"]),
    ({"rank": 0}, ["rank 0 is no number, or out of its range; usual: rank 8, alpha 16."]),
    ({"rank": -1}, ["rank -1"]),
    ({"rank": 2.0}, ["rank 2.0"]),
    ({"rank": True}, ["rank True"]),
    ({"rank": 33}, ["rank 33 is above the smaller side of h.0.attn.c_attn; choose 32 or less."]),
    ({"alpha": math.nan}, ["alpha nan is no number"]),
    ({"alpha": -math.inf}, ["alpha -inf"]),
    ({"alpha": 10**400}, ["alpha 1000"]),
    ({"alpha": 0}, ["alpha 0"]),
    ({"alpha": "16"}, ["alpha '16'"]),
    ({"dropout": 1.0}, ["dropout 1.0 is no number, or out of its range"]),
    ({"dropout": -0.1}, ["dropout -0.1"]),
    ({"dropout": math.nan}, ["dropout nan"]),
])
def test_what_add_lora_refuses(options, parts):
    model = pair()[0].requires_grad_(True)
    modules = dict(model.named_modules())
    options = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["c_attn"]} | options
    message = refused(lambda: lora.add_lora(model, **options), "LoRA", *parts)
    assert len(message) < 400 and "\x1b" not in message
    assert all(p.requires_grad for p in model.parameters()) and dict(model.named_modules()) == modules


def test_what_else_is_refused(tmp_path):
    model = adapted(["c_attn"], rank=32)  # the largest rank there is
    refused(lambda: lora.add_lora(model, 4, 8, 0.0, ["c_fc"]), "already has LoRA layers", "remove")
    peft_files.save_adapter(model, tmp_path, "gpt2")
    refused(lambda: peft_files.load_adapter(model, tmp_path), "already has LoRA layers")
    refused(lambda: peft_files.save_adapter(pair()[0], tmp_path, "gpt2"), "no LoRA layers to save", "add_lora")
    refused(lambda: lora.add_lora(nn.Sequential(nn.ReLU()), 4, 8, 0.0, ["0"]), "ReLU", "another model")
    (tmp_path / "file").touch()
    refused(lambda: peft_files.save_adapter(model, tmp_path / "file", "gpt2"), "cannot write")


@pytest.mark.parametrize(("options", "name"), [
    ({"bias": "all"}, "bias"), ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"lora_bias": True}, "lora_bias"), ({"trainable_token_indices": [1]}, "trainable_token_indices"),
])
def test_what_peft_wrote_and_we_do_not_support_is_named(tmp_path, options, name):
    model = with_peft(pair()[1], **{"r": 4, "target_modules": ["c_attn"], **options})
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(tmp_path)
    refused(lambda: peft_files.load_adapter(pair()[0], tmp_path), "adapter_config.json", f"{name!r} is ",
            "not supported")


# What PEFT can say of layers: options, names of the adapted layers' ends
FIRST, SECOND = "h.0.attn.c_attn", "h.1.attn.c_attn"
OPTIONS = [
    ({"rank_pattern": {"h.1.attn.c_attn": 2}, "alpha_pattern": {"c_fc": 3, r"h\.\d\.attn.c_attn": 5}}, 6),
    ({"rank_pattern": {"attn": 1, "c_.*": 3}, "use_rslora": True}, 6),
    ({"target_modules": r".*\.(c_attn|c_fc)"}, 4), ({"target_modules": r"transformer\.h\.[01]\.mlp.*proj"}, 2),
    ({"target_modules": "all-linear"}, 8), ({"layers_to_transform": [1]}, 3), ({"layers_to_transform": 0}, 3),
    ({"layers_to_transform": [0], "layers_pattern": "h"}, 3),
    ({"layers_to_transform": [0], "layers_pattern": ["x"]}, 0),
    ({"layers_to_transform": [0], "target_modules": ["transformer.h.1.mlp.c_fc", "c_attn"]}, 2),
    ({"exclude_modules": ["h.0.attn.c_attn", "c_fc"]}, 3), ({"exclude_modules": r".*\.0\..*"}, 3),
    ({"modules_to_save": ["ln_f", "h.1.mlp"]}, 4), ({"modules_to_save": ["f", "n_1"]}, 6), ({"bias": "lora_only"}, 6),
    ({"use_dora": True}, 6),
    ({"use_dora": True, "bias": "lora_only", "rank_pattern": {"c_fc": 2}, "use_rslora": True}, 6),
]


@pytest.mark.parametrize(("options", "n"), OPTIONS, ids=range(len(OPTIONS)))
def test_options_of_peft_are_obeyed_both_ways(tmp_path, options, n):
    """Theirs here and ours there: equal logits, tensors, and gradients of the same parameters."""
    ours, theirs = pair()
    options = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1,
               "target_modules": ["c_attn", "mlp.c_proj", "c_fc"]} | options
    if not n:
        with pytest.raises(ValueError, match="No modules were targeted|not found"):
            with_peft(theirs, **options)
        return
    model = with_peft(theirs, **options)
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_" not in name or "magnitude" in name:
            p.data += torch.randn_like(p) / 5
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(tmp_path / "theirs")
    if options["target_modules"] == "all-linear":  # PEFT writes names; the word alone is a setting of training tools
        path = tmp_path / "theirs" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": "all-linear"}))
    config = peft_files.load_adapter(ours, tmp_path / "theirs")
    layers, state = lora.adapters(ours), load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert len(layers) == n and not any(module.training for module in ours.modules())
    with torch.no_grad():
        expected = model(IDS).logits
        assert close(ours(IDS), expected) and not close(pair()[0](IDS), expected, 0.01)
    # what is trained, and its gradients
    for each in (ours, model):
        F.cross_entropy((each(IDS) if each is ours else each(IDS).logits).flatten(0, 1), IDS.flatten()).backward()
    grads = {re.sub(r"\.(modules_to_save|default|base_layer)\b|\.weight$", "", name): p.grad
             for name, p in model.named_parameters() if p.requires_grad}
    mine = {"base_model.model.transformer." + name.replace(".base.", ".").removesuffix(".weight"): p.grad
            for name, p in ours.named_parameters() if p.requires_grad}
    assert mine.keys() == grads.keys() and len(mine) >= 2 * n
    assert all(close(mine[name], grads[name], 1e-4) for name in mine)
    # ours, written and read by PEFT
    heads = tuple(name for name, module in ours.named_modules() if name and
                  f"transformer.{name}".endswith(tuple(config["modules_to_save"])))
    peft_files.save_adapter(ours, tmp_path / "ours", "name", heads=heads)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        again = peft.PeftModel.from_pretrained(pair()[1], tmp_path / "ours").eval()
    assert not [w for w in seen if "keys" in str(w.message)]
    mine = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert mine.keys() == state.keys() and all(torch.equal(mine[name], state[name]) for name in state)
    with torch.no_grad():
        assert close(again(IDS).logits, expected)
        lora.merge(ours)
        assert close(ours(IDS), expected)
        lora.remove(ours)
        assert close(ours(IDS), expected) and not lora.adapters(ours)


@pytest.mark.parametrize("base", [nn.Linear(7, 11), gpt2.Conv1D(7, 11), nn.Linear(7, 11, bias=False)])
def test_dora_begins_at_the_base_and_drops_as_peft(base):
    torch.manual_seed(0)
    x, layer = torch.randn(5, 7), peft_files.DoRA(base, 3, 6, 0.5)
    assert close(layer(x), base(x), 1e-6)
    same = copy.deepcopy(base)
    if lora.transposed(base):  # PEFT knows transformers' own
        same = Conv1D(11, 7)
        same.load_state_dict(base.state_dict())
    theirs = peft.tuners.lora.Linear(same, "default", peft.LoraConfig(
        r=3, lora_alpha=6, lora_dropout=0.5, use_dora=True, fan_in_fan_out=lora.transposed(base)), r=3, lora_alpha=6)
    fill(layer).train()
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            part = name.split(".")[0]
            p.data.copy_(getattr(layer, part))
    outputs = []
    for each in (layer, theirs.train()):
        torch.manual_seed(1)
        outputs.append(each(x))
    assert close(*outputs) and not close(outputs[0], base(x), 0.01)


def test_a_compiled_model_s_adapter_an_old_file_and_an_empty_one(tmp_path):
    ours, state = adapted(["c_attn"]), {}
    peft_files.save_adapter(ours, tmp_path, "gpt2")
    path, expected = tmp_path / "adapter_model.safetensors", ours(IDS)
    state = load_file(path)
    compiled = {name.replace("model.transformer", "model._orig_mod.transformer"): t for name, t in state.items()}
    for save in (lambda: save_file(compiled, path), lambda: torch.save(state, tmp_path / "adapter_model.bin")):
        path.unlink()
        save()
        model = pair()[0]
        peft_files.load_adapter(model, tmp_path)
        assert torch.equal(model(IDS), expected)
    save_file({}, path)
    untouched(tmp_path, "transformer.", "is an empty adapter: its file holds no tensor")
    save_file(state | {next(iter(compiled)): torch.ones(1)}, path)
    untouched(tmp_path, "transformer.", "another base")


def test_expressions_that_would_take_long_are_refused_and_the_worst_that_pass_are_quick():
    assert peft_files.quick([r".*\.(q|v)_proj", r"^(?!.*lm_head).*\.c_attn", r"layers\.\d+\.attn", "c_attn"])
    assert not peft_files.quick(["a"] * 1001)
    for slow in ("(a+)+b", "(a|a)*b", "(a?){40}", ".*.*.*.*b", "a" * 60_000, "(", "[", r"(.*)\1?.*.*"):
        assert not peft_files.quick([slow]), slow
    assert not peft_files.quick([".*.*.*b"] * 4)
    model = nn.ModuleList(nn.ModuleList([nn.Linear(2, 2)]) for _ in range(100))
    config = {"target_modules": "all-linear", "exclude_modules": None, "layers_pattern": None, "modules_to_save": [],
              "layers_to_transform": None, "r": 1, "lora_alpha": 1, "alpha_pattern": None,
              "rank_pattern": dict.fromkeys([".*.*.*b", ".*.*.*c", ".*.*.*d", *map(str, range(900))], 2)}
    assert peft_files.quick(list(config["rank_pattern"]))
    start = time.process_time()
    chosen = peft_files.choose(model, config, "base_model.model.encoder.layers.attention.")
    assert len(chosen) == 100 and time.process_time() - start < 10  # 0.03 s


EDITS = [
    (b"", "can't be read as JSON (JSONDecodeError)"), (b"\xff", "can't be read as JSON (UnicodeDecodeError)"),
    (b"[" * 100_000, "can't be read as JSON (RecursionError)"), (b"[1]", "'peft_type' is None"),
    (b"{}", "'peft_type' is None"),
    (None, "can't be read as JSON (FileNotFoundError)"), ({"peft_type": "LOHA"}, "'peft_type' is 'LOHA'"),
    ({"peft_type": ""}, "'peft_type' is ''"), ({"peft_type": ["LORA"]}, "'peft_type' is ['LORA']"),
    ({"target_modules": "c_attn"}, "lora_A.weight' is (4, 32) in the file and missing"),  # a whole name to PEFT
    ({"target_modules": "(.*)*x"}, "'target_modules' is '(.*)*x'"), ({"rank_pattern": {"(": 2}}, "'rank_pattern' is"),
    ({"rank_pattern": {"c_attn": "4"}}, "rank '4' is no number"), ({"rank_pattern": ["c_attn"]}, "'rank_pattern' is"),
    ({"alpha_pattern": {"c_attn": [1]}}, "alpha [1] is no number"), ({"exclude_modules": [1]}, "'exclude_modules' is"),
    ({"exclude_modules": {"a": 1}}, "'exclude_modules' is"), ({"layers_to_transform": "1"}, "'layers_to_transform' is"),
    ({"layers_to_transform": [True]}, "'layers_to_transform' is"),
    ({"modules_to_save": "ln_f"}, "'modules_to_save' is"),
    ({"modules_to_save": [""]}, "'modules_to_save' is"), ({"modules_to_save": ["wte"]}, "modules_to_save holds wte, a"),
    ({"modules_to_save": ["ln_f"]}, "ln_f.bias' is missing in the file"),
    ({"layers_pattern": 3}, "'layers_pattern' is"),
    ({"bias": "lora_only"}, "c_attn.bias' is missing in the file"), ({"bias": "all"}, "'bias' is 'all'"),
    ({"use_dora": True}, "lora_magnitude_vector' is missing in the file"), ({"use_dora": 2}, "'use_dora' is 2"),
    ({"target_modules": None}, "'target_modules' is None"), ({"target_modules": [1]}, "'target_modules' is [1]"),
    ({"target_modules": ["attn"]}, "h.0.attn, of type Attention"), ({"target_modules": []}, "'target_modules' is []"),
    ({"from_the_future": {"a": 1}}, "'from_the_future' is"), ({"target_parameters": ["a"]}, "'target_parameters' is"),
    ({"r": "8"}, "rank '8' is no number"), ({"r": 10**300}, "above the smaller side"),
    ({"r": None}, "rank None is no number"),
    ({"lora_alpha": math.nan}, "alpha nan is no number"), ({"lora_alpha": None}, "alpha None is no number"),
    ({"lora_dropout": 2}, "dropout 2 is no number"), ({"lora_dropout": None}, "dropout None is no number"),
    ({"target_modules": ["h.0.attn.c_attn"]}, "for another base: 'base_model.model.transformer.h.1.attn.c_attn."
     "lora_A.weight' is (4, 32) in the file and missing in this model"),
    ({"target_modules": ["c_attn", "mlp.c_fc"]}, "h.0.mlp.c_fc.lora_A.weight' is missing in the file and (4, 32) in"),
    ({"target_modules": ["query"]}, "is (4, 32) in the file and missing in this model"),
    ({"r": 5}, "h.0.attn.c_attn.lora_A.weight' is (4, 32) in the file and (5, 32) in this model"),
]


@pytest.mark.parametrize(("edit", "part"), EDITS, ids=range(len(EDITS)))
def test_a_bad_config_is_refused(tmp_path, edit, part):
    peft_files.save_adapter(adapted(["c_attn"]), tmp_path, "gpt2")
    path = tmp_path / "adapter_config.json"
    if edit is None:
        path.unlink()
    else:
        path.write_bytes(edit if isinstance(edit, bytes) else json.dumps(json.loads(path.read_text()) | edit).encode())
    untouched(tmp_path, "transformer.", part)


def untouched(folder, prefix: str, *parts: str) -> None:
    """Refused, and the model is as it was."""
    model = pair()[0].requires_grad_(True)
    before = bits(model)
    refused(lambda: peft_files.load_adapter(model, folder, prefix), *parts)
    assert same(before, bits(model)) and all(p.requires_grad for p in model.parameters()) and not lora.adapters(model)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    path, name = tmp_path / "adapter_model.safetensors", "base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"
    peft_files.save_adapter(adapted(["c_attn"]), tmp_path, "gpt2")
    good = load_file(path)
    peft_files.load_adapter(pair()[0], tmp_path)
    last = ("another base", "load it into the model that it was trained on")
    for bad, parts in [
        (good | {name: torch.zeros(96, 5)}, [f"{name!r} is (96, 5) in the file and (96, 4) in this model"]),
        (good | {name: torch.zeros(96 * 4)}, [f"{name!r} is (384,) in the file and (96, 4) in this model"]),
        (good | {name: torch.zeros(96, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, ["is torch.float4_e2m1fn"]),
        (good | {name: torch.zeros(96, 4, dtype=torch.long)}, [f"{name!r} is torch.int64 in the file and (96, 4)"]),
        ({n: t for n, t in good.items() if n != name}, [f"{name!r} is missing in the file and (96, 4) in this model"]),
        (good | {"\x1b[2J": torch.zeros(2)}, [r"'\x1b[2J' is (2,) in the file and missing in this model"]),
    ]:
        save_file(bad, path)
        untouched(tmp_path, "transformer.", *parts, *last)
    save_file(good, path)
    untouched(tmp_path, "", "'base_model.model.h.0.attn.c_attn.lora_A.weight' is missing in the file", *last)
    path.write_bytes(path.read_bytes()[:-1])
    untouched(tmp_path, "transformer.", "is refused")
    path.unlink()
    untouched(tmp_path, "transformer.", "adapter_model.safetensors is not there")


def test_an_adapter_in_bfloat16_is_loaded_as_float32(tmp_path):
    peft_files.save_adapter(adapted(["c_attn"]), tmp_path, "gpt2")
    path, model = tmp_path / "adapter_model.safetensors", pair()[0]
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    peft_files.load_adapter(model, tmp_path)
    stored = weights.open_weights(path)
    for name, parameter in peft_files.named_tensors(lora.adapters(model), "transformer.").items():
        assert parameter.dtype == torch.float32 and parameter.requires_grad
        assert torch.equal(parameter, stored[name].float())


# ---------------------------------------------------------------------------------------------- any torch model
LAYERS = ["linear1", "linear2", "self_attn.out_proj"]


def encoder(**options) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options.get("norm_first"))


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_encoder_sees_its_adapter_in_training_in_eval_and_merged(norm_first):
    """nn.TransformerEncoderLayer reads linear1's, linear2's and out_proj's weights itself, in eval() and always."""
    model, x = encoder(norm_first=norm_first), torch.randn(3, 7, 16)
    padding = torch.arange(7) >= torch.tensor([7, 4, 5])[:, None]
    before = model(x, src_key_padding_mask=padding)
    assert len(lora.add_lora(model, 4, 8, 0.0, LAYERS)) == 6
    assert torch.allclose(model(x, src_key_padding_mask=padding), before, atol=1e-5)
    fill(model)
    outputs = []
    for mode in ("train", "eval", "merged"):
        lora.merge(model) if mode == "merged" else None
        with torch.no_grad():
            y = model.train(mode == "train")(x, src_key_padding_mask=padding)
        outputs.append(y.masked_fill(padding[..., None], 0))
    assert all(torch.allclose(y, outputs[0], atol=1e-5) for y in outputs[1:])
    assert (outputs[0] - before.masked_fill(padding[..., None], 0)).abs().max() > 0.5  # the adapter is not nothing


def test_gradients_reach_every_adapter_of_a_transformer_encoder_as_if_its_weights_were_sums():
    """Also through out_proj, which nn.MultiheadAttention never calls. Oracle: autograd with W + s B A as the weight."""
    model, x, goal = encoder(), torch.randn(3, 7, 16), torch.randn(3, 7, 16)
    lora.add_lora(model, 4, 8, 0.0, LAYERS)
    (fill(model).train()(x) * goal).sum().backward()
    plain, pairs = encoder(), {}
    weights = dict(plain.named_parameters())
    for name, layer in lora.adapters(model).items():
        pairs[name] = [p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B)]
        weights[f"{name}.weight"] = weights[f"{name}.weight"].detach() + 2 * pairs[name][1] @ pairs[name][0]
    (torch.func.functional_call(plain.train(), weights, (x,)) * goal).sum().backward()
    for name, layer in lora.adapters(model).items():
        for ours, theirs in zip((layer.lora_A, layer.lora_B), pairs[name]):
            assert ours.grad.any() and close(ours.grad, theirs.grad, 1e-4)


def test_what_peft_does_with_a_transformer_encoder():
    """Seen with PEFT 0.21.2: the adapters act in train() and are left out in eval()."""
    x, outputs = torch.randn(3, 7, 16), {}
    model = with_peft(encoder(), None, r=4, lora_alpha=8, target_modules=["linear1", "linear2"])
    for mode in (True, False):
        with torch.no_grad():
            outputs[mode] = model.train(mode)(x)
    alone = encoder().eval()(x)
    if torch.allclose(outputs[False], outputs[True], atol=1e-4):
        pytest.skip(f"PEFT {peft.__version__} has learned to do it: lora.py's comment needs the new version")
    assert torch.allclose(outputs[False], alone, atol=1e-5) and not torch.allclose(outputs[True], alone, atol=0.1)


def test_a_weight_that_is_read_is_what_merging_would_leave():
    for base in (nn.Linear(7, 11), gpt2.Conv1D(7, 11), nn.Linear(7, 11, bias=False), nn.Linear(7, 11).bfloat16()):
        layer = fill(lora.LoRA(base, 4, 6))
        apart = layer.weight
        assert apart.shape == base.weight.shape and apart.dtype == base.weight.dtype and layer.bias is base.bias
        assert apart.requires_grad
        layer.merge()
        assert torch.equal(layer.weight, apart) and layer.weight is base.weight


def test_transformers_conv1d_is_one_too():
    ours, theirs = pair()
    names = lora.add_lora(theirs, 4, 8, 0.0, ["c_attn"])
    assert names == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    lora.add_lora(ours, 4, 8, 0.0, ["c_attn"])
    fill(ours)
    for a, b in zip(lora.adapters(ours).values(), lora.adapters(theirs).values()):
        b.load_state_dict({name: tensor.view(b.state_dict()[name].shape) for name, tensor in a.state_dict().items()})
    with torch.no_grad():
        assert close(ours(IDS), theirs(IDS).logits)


def test_a_convolution_is_named_and_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    refused(lambda: lora.add_lora(model, 1, 1, 0.0, ["0"]), "'0' is 0, of type Conv2d, not Linear or Conv1D")
    assert lora.add_lora(model, 1, 1, 0.0, ["2"]) == ["2"]


def test_what_was_trained_is_put_back_or_refused_whole():
    a, b = (adapted(["c_attn"], rank=rank) for rank in (4, 5))
    state, before = memory.trainable_state(a), bits(b)
    with pytest.raises(ValueError, match="another model"):
        memory.load_trainable(b, state)
    assert same(before, bits(b))
    c = adapted(["c_attn"])
    memory.load_trainable(c, state)
    assert same(bits(a), bits(c))


@pytest.mark.parametrize("name", ["lora", "peft_files", "memory", "weights", "bpe", "wordpiece"])
def test_a_file_comes_alone(name):
    """In a fresh process: lora.py brings torch and nothing else of ours; none options, requests or plots."""
    program = f"""if True:
        import sys, torch
        sys.path[:0] = [{str(ROOT / "06_finetune")!r}, {str(ROOT)!r}]
        loud = "argparse", "requests", "matplotlib", "torchvision"
        for name in list(sys.modules):
            if name.split(".")[0] in loud:
                del sys.modules[name]
        threads, before = torch.get_num_threads(), set(sys.modules)
        import {name}
        print(*(set(sys.modules) - before - {{"{name}"}}))
        assert torch.get_num_threads() == threads
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    new = set(done.stdout.split())
    assert not {module for module in new if module.split(".")[0] in ("argparse", "requests", "matplotlib")}
    assert name != "lora" or not new & {"utils", "gpt2", "weights", "json", "numpy"}


# ---------------------------------------------------------------------------------------------- the script
def test_the_script_shows_what_its_header_says(capsys):
    lora.main()
    out = capsys.readouterr().out
    row = re.search(r"^ +8 +12,288 +([\d.]+)% +([\d.]+)%$", out, re.MULTILINE)
    assert f"rank 8 misses {row[1]} %" in lora.__doc__ and f"and {row[2]} %" in lora.__doc__
    assert re.search(r"step 1: the gradient of A has length +0.00, that of B +\d", out)
    assert len((ROOT / "06_finetune" / "lora.py").read_text(encoding="utf-8").splitlines()) <= 200


def test_missing_share_is_that_of_the_best_approximation():
    torch.manual_seed(0)
    matrix = torch.randn(20, 20)
    U, S, V = torch.linalg.svd(matrix)
    for r in (1, 7, 19):
        nearest = U[:, :r] @ S[:r].diag() @ V[:r]
        share = (matrix - nearest).norm() / matrix.norm()
        assert lora.missing(matrix)[r - 1].item() == pytest.approx(share.item(), 1e-4)
