"""06_finetune/llama.py against transformers' Llama, Qwen 2 and Qwen 3: scores, gradients, texts, files both ways."""

import contextlib
import hashlib
import importlib
import json
import math
import re
import sys

import pytest
import torch
from conftest import REAL, chapter

import utils

weights, lora, llama = chapter("06_finetune", "weights", "lora", "llama")
transformers = pytest.importorskip("transformers")
COMMON = {"vocab_size": 29, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
          "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 48, "bos_token_id": None,
          "eos_token_id": None}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 200.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
SHAPES = {
    "llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 30.0}}),
    "llama, tied, one head of keys": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama, no groups, wide heads": ("Llama", {"num_key_value_heads": 6, "head_dim": 10, "rms_norm_eps": 0.3}),
    "llama 3": ("Llama", {"head_dim": 16, "rope_parameters": LLAMA3}),
    "qwen 2": ("Qwen2", {"tie_word_embeddings": True, "num_hidden_layers": 3}),
    "qwen 2, untied, two channels a head": ("Qwen2", {"num_attention_heads": 12, "num_key_value_heads": 4}),
    "qwen 3": ("Qwen3", {"head_dim": 6}), "qwen 3, tied": ("Qwen3", {"head_dim": 14, "tie_word_embeddings": True})}
# What read_config says of models on the hub, and their parameters
SIZES = {name: dict(zip(("model_type", "tied", "theta", "scaling", "epsilon", *llama.NAMES), values))
         for name, *values in (
    ("SmolLM2-135M", "llama", True, 1e5, None, 1e-5, 49152, 8192, 30, 576, 1536, 9, 3, 64),
    ("Llama-2-7B", "llama", False, 1e4, None, 1e-5, 32000, 4096, 32, 4096, 11008, 32, 32, 128),
    ("Llama-3.2-1B", "llama", True, 5e5, {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                          "original_max_position_embeddings": 8192},
     1e-5, 128256, 131072, 16, 2048, 8192, 32, 8, 64),
    ("Qwen2.5-0.5B", "qwen2", True, 1e6, None, 1e-6, 151936, 32768, 24, 896, 4864, 14, 2, 64),
    ("Qwen3-0.6B", "qwen3", True, 1e6, None, 1e-6, 151936, 40960, 28, 1024, 3072, 16, 8, 128))}
PARAMETERS = dict(zip(SIZES, (134515008, 6738415616, 1235814400, 494032768, 596049920)))


def make_theirs(shape, attention="sdpa", **changes):
    """transformers' network with random values everywhere: gains of 1 and biases of 0 would hide mistakes."""
    family, own = SHAPES[shape]
    config = getattr(transformers, family + "Config")(**COMMON | own | changes, attn_implementation=attention)
    torch.manual_seed(1)  # with others some texts repeat one token for ever
    model = getattr(transformers, family + "ForCausalLM")(config).eval()
    for name, p in model.named_parameters():
        std = 0.3 if p.dim() == 1 else 0.6 if "embed" in name else 1.5 * p.shape[1] ** -0.5
        torch.nn.init.normal_(p, float("norm" in name), std)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Theirs and ours by shape, ours read from the folder that theirs wrote; made once each."""
    made = {}

    def get(shape):
        if shape not in made:
            theirs, folder = make_theirs(shape), tmp_path_factory.mktemp("llama")
            theirs.save_pretrained(folder)
            made[shape] = llama.read_model(folder), theirs
        return made[shape]

    return get


def some_ids(model, B=3, T=20, seed=1):
    return torch.randint(model.config["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=2e-5):
    difference = (a - b).abs().max().item() if a.shape == b.shape else math.inf
    print(f"differ by {difference:.1e}, of {b.abs().max().item():.1f}")
    return difference <= tolerance  # False for nan


@torch.no_grad()
def read_in_pieces(model, ids, sizes):
    cache, logits = llama.Cache(model, len(ids)), []
    for piece in ids.split(sizes, 1):
        logits.append(model(piece, cache))
    assert cache.length == ids.shape[1]
    return torch.cat(logits, 1)


# ---------------------------------------------------------------------------------------------- the network
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_scores_equal_transformers_with_and_without_cache(pair, shape):
    ours, theirs = pair(shape)
    ids = some_ids(ours, T=48)
    expected = theirs(ids, output_hidden_states=True)
    assert expected.logits.std() > 0.5
    assert close(ours.hidden(ids), expected.hidden_states[-1]) and close(ours(ids), expected.logits)
    assert close(ours(ids[:, :1]), expected.logits[:, :1])
    for sizes in ([48], [1] * 48, [3, 1, 1, 43], [2, 2, 44]):
        assert close(read_in_pieces(ours, ids, sizes), expected.logits), sizes


@pytest.mark.parametrize("shape", ["llama, tied, one head of keys", "qwen 2", "qwen 3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_transformers(pair, shape, checkpointing):
    ours, theirs = pair(shape)
    ids = some_ids(ours)
    ours.train().checkpointing = checkpointing
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == other.keys()
    loss, expected = ours(ids[:, :-1], targets=ids[:, 1:]), theirs(ids, labels=ids).loss
    assert close(loss, expected, 1e-5)
    gradients = torch.autograd.grad(expected, [other[name] for name in mine])
    for name, gradient, found in zip(mine, gradients, torch.autograd.grad(loss, list(mine.values()))):
        assert close(found, gradient) and (gradient.abs().max() > 1e-5 or name.endswith("k_proj.bias")), name
    ours.eval().checkpointing = False


def test_nothing_leaks_from_the_future(pair):
    ours, _ = pair("llama 3")
    ids = some_ids(ours, B=1, T=8)
    with torch.no_grad():
        before = ours(ids)
        for t in range(8):
            changed = ids.clone()
            changed[0, t] = (ids[0, t] + 1) % 29
            after = ours(changed)
            assert torch.equal(after[:, :t], before[:, :t]) and not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("shape", ["llama", "qwen 3"])
@torch.no_grad()
def test_attention_weights_equal_transformers(pair, shape):
    ours, ids = pair(shape)[0], some_ids(pair(shape)[0])
    theirs = make_theirs(shape, "eager")
    plain, expected = ours(ids), theirs(ids, output_attentions=True).attentions
    layers = [block.self_attn for block in ours.model.layers]
    for layer in layers:
        assert layer.weights is None
        layer.keep_weights = True
    assert close(ours(ids), plain)
    for layer, other in zip(layers, expected, strict=True):
        assert close(layer.weights, other, 1e-5) and not layer.weights.requires_grad
    assert close(read_in_pieces(ours, ids, [14, 5, 1]), plain)
    for layer, other in zip(layers, expected):
        assert close(layer.weights, other[:, :, -1:], 1e-5)
        layer.keep_weights = False


@pytest.mark.parametrize("T", [1, 9])
def test_learning_in_bfloat16_is_spelled_out_and_computes_the_same(T):
    """On a CPU, with gradients, attention takes another path than without."""
    model = llama.Llama(SIZES["SmolLM2-135M"] | {"n_layer": 1, "vocab_size": 50}).eval()
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.bfloat16()
    ids = torch.randint(50, (2, T))
    fused = model.requires_grad_(False)(ids)
    assert close(model.requires_grad_()(ids).float(), fused.float(), 0.02 * fused.abs().max().item())


@pytest.mark.parametrize("shape", ["llama", "qwen 2", "qwen 3"])
def test_autocast_computes_what_float32_does_and_nearly_its_gradients(pair, shape):
    """As train.py does: weights in float32, matrix products in bfloat16; with a cache too."""
    ours, _ = pair(shape)
    ids = some_ids(ours)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = ours(ids[:, :-1], targets=ids[:, 1:])
            pieces = read_in_pieces(ours, ids, [9, 1, 10])
        gradients = torch.autograd.grad(loss, list(ours.parameters()))
        found.append((torch.cat([g.flatten() for g in gradients]), loss, pieces))
    (g, loss, pieces), (h, other, rounded) = found
    assert torch.cosine_similarity(g, h, 0) > 0.97 and close(other, loss, 0.03) and h.dtype == torch.float32
    assert torch.cosine_similarity(pieces.flatten(), rounded.float().flatten(), 0) > 0.99


def test_a_score_depends_on_the_distance_of_two_tokens_alone():
    config = SIZES["Llama-3.2-1B"]
    f, torch_seed = llama.frequencies(config).double(), torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64, generator=torch_seed, dtype=torch.float64)

    def turned(x, position):
        cos, sin = (position * f).cos(), (position * f).sin()
        return llama.rotate(x, torch.cat([cos, cos]), torch.cat([-sin, sin]))

    scores = [(turned(q, t + 7) * turned(k, t)).sum() for t in (0, 1, 100, 5000)]
    assert all(close(score, scores[0], 1e-9) for score in scores) and turned(q, 3).norm().sub(q.norm()).abs() < 1e-9
    assert not close((turned(q, 8) * k).sum(), scores[0], 1e-3)


@pytest.mark.parametrize("name", SIZES)
def test_frequencies_and_parameters_of_the_published_sizes_equal_transformers(name):
    c = SIZES[name]
    family = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[c["model_type"]]
    config = getattr(transformers, family + "Config")(
        **{theirs: c[ours] for ours, theirs in llama.NAMES.items()}, tie_word_embeddings=c["tied"],
        rope_parameters={"rope_type": "llama3" if c["scaling"] else "default", "rope_theta": c["theta"]} |
        (c["scaling"] or {}))
    with torch.device("meta"):
        ours, theirs = llama.Llama(c), getattr(transformers, family + "ForCausalLM")(config)
    assert ours.state_dict().keys() | {"lm_head.weight"} == theirs.state_dict().keys()
    assert utils.count_parameters(ours) == theirs.num_parameters() == PARAMETERS[name]
    module = importlib.import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    rotary = getattr(module, family + "RotaryEmbedding")(config)
    assert torch.allclose(ours.frequencies, rotary.inv_freq, rtol=1e-6, atol=0)


def test_what_a_model_does_not_know_is_refused(pair):
    ours, _ = pair("qwen 2")
    with refused("49 tokens", "48 positions", "max_position_embeddings"):
        ours(torch.zeros(1, 49, dtype=torch.long))
    cache = llama.Cache(ours, n=8)
    ids = some_ids(ours, B=1, T=8)
    with torch.no_grad():
        ours(ids[:, :5], cache)
        for bad in (ids[:, :4], torch.tensor([[29]])):
            with refused("8 positions" if bad.shape[1] > 1 else "vocab_size"):
                ours(bad, cache)
        assert close(ours(ids[:, 5:], cache), ours(ids)[:, 5:])  # the cache is as it was
    with refused("Token 50256", "the 29 of this model", "tokenizer"):
        list(llama.generate(ours, [5, 50256], 3))


# ---------------------------------------------------------------------------------------------- LoRA
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.8)])
def test_lora_on_all_seven_matrices_trains_and_merges(pair, tmp_path, dtype, tolerance):
    pair("qwen 2")[1].save_pretrained(tmp_path)
    model = llama.read_model(tmp_path, None, dtype)
    ids, before = some_ids(model), model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    targets = ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert len(lora.add_lora(model, 4, 8, 0.0, targets)) == 7 * 3
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    start, optimizer = model(ids[:, :-1], targets=ids[:, 1:]), torch.optim.AdamW(trained, lr=0.02)
    for _ in range(10):
        optimizer.zero_grad()
        loss = model.train()(ids[:, :-1], targets=ids[:, 1:])
        loss.backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in trained) and loss < start - 0.3
    with torch.no_grad():
        trained, evaluated = model(ids), model.eval()(ids)
        lora.merge(model)
        merged = model(ids)
        lora.remove(model)
    assert torch.equal(trained, evaluated) and close(merged, evaluated, tolerance)
    assert torch.equal(model(ids), merged) and not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)


# ---------------------------------------------------------------------------------------------- files
@contextlib.contextmanager
def refused(*words):
    """One sentence, on one line, that holds each of the words."""
    with pytest.raises(utils.InputError) as caught:
        yield
    message = str(caught.value)
    assert message.endswith(".") and message.isprintable() and len(message) < 500, message
    assert not re.search(r"[.!?] [A-Z]", message), message
    for word in words:
        assert str(word) in message, message


def config_text(shape="llama 3", **changes):
    return json.dumps(make_config(shape) | changes)


def make_config(shape):
    family, own = SHAPES[shape]
    return getattr(transformers, family + "Config")(**COMMON | own).to_diff_dict()


ROPE = {"rope_parameters": None, "rope_theta": 1e4}  # what transformers before 5 writes, instead


@pytest.mark.parametrize("text, words", [
    (None, ["can't be read as JSON"]), (b"\xff", ["can't be read as JSON"]), (b"[" * 10**5, ["can't be read"]),
    ("[]", ["model_type"]), (config_text(model_type="mistral"), ["model_type", "mistral"]),
    (config_text(model_type=["llama"]), ["model_type"]), (config_text(model_type="gpt2"), ["model_type", "gpt2"]),
    (config_text(hidden_act="gelu"), ["hidden_act", "gelu"]), (config_text(attention_bias=True), ["attention_bias"]),
    (config_text(mlp_bias=True), ["mlp_bias"]), (config_text(pretraining_tp=2), ["pretraining_tp", "2"]),
    (config_text(partial_rotary_factor=0.5), ["partial_rotary_factor"]),
    (config_text(sliding_window=16), ["sliding_window", "16"]),
    (config_text("qwen 2", use_sliding_window=True), ["use_sliding_window"]),
    (config_text("qwen 3", attention_bias=True), ["attention_bias"]),
    (config_text("qwen 2", layer_types=["full_attention", "sliding_attention"]), ["layer_types", "sliding"]),
    (config_text("qwen 2", layer_types="full"), ["layer_types"]),
    (config_text(quantization_config={"quant_method": "fp8"}), ["quantization_config"]),
    (config_text(rope_interleaved=True), ["rope_interleaved"]), (config_text(logits_scaling=8.0), ["logits_scaling"]),
    (config_text(**{"x\x1b[2J" * 100: 1}), ["x\\x1b"]),
    (config_text(rope_parameters={"rope_type": "yarn", "factor": 4.0}), ["rope_type", "yarn"]),
    (config_text(**ROPE, rope_scaling={"type": "linear", "factor": 2.0}), ["rope_type", "linear"]),
    (config_text(**ROPE, rope_scaling={"type": "dynamic", "factor": 2.0}), ["rope_type", "dynamic"]),
    (config_text(**ROPE, rope_scaling=[2]), ["rope_scaling", "an object"]),
    (config_text(**ROPE, rope_scaling={"type": "llama3", "rope_type": "default"}), ["rope_type", "rope_scaling"]),
    (config_text(rope_theta=5.0), ["rope_theta", "rope_parameters"]),
    (config_text(rope_parameters=LLAMA3 | {"partial_rotary_factor": 0.5}), ["partial_rotary_factor"]),
    (config_text(rope_parameters=LLAMA3 | {"mrope_section": [1, 2]}), ["mrope_section"]),
    (config_text(rope_parameters=LLAMA3 | {"factor": None}), ["factor"]),
    (config_text(rope_parameters=LLAMA3 | {"factor": -1}), ["factor", "-1"]),
    (config_text(rope_parameters=LLAMA3 | {"low_freq_factor": 4.0}), ["low_freq_factor"]),
    (config_text(rope_parameters=[[]]), ["rope_parameters"]), (config_text(rms_norm_eps="1"), ["rms_norm_eps"]),
    (config_text(rms_norm_eps=math.nan), ["rms_norm_eps", "nan"]), (config_text(num_key_value_heads=4), ["divisor"]),
    (config_text(head_dim=5), ["head_dim", "5"]), (config_text(head_dim=2**23), ["head_dim"]),
    (config_text(head_dim=None, hidden_size=25), ["head_dim"]), (config_text(tie_word_embeddings="no"), ["tie_word"]),
    ('{"model_type": "qwen3"}', ["vocab_size"]),
    *[(config_text(**{name: value}), [name]) for name in llama.NAMES.values() for value in ("2", -1, 2.0, [1], 2**24)],
])
def test_configs_that_are_refused(tmp_path, text, words):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused(path, *words):
        llama.read_config(path)


def test_configs_that_are_taken(tmp_path):
    """Those of the hub, as far as they differ from what transformers 5 writes."""
    path = tmp_path / "config.json"
    size = {theirs: SIZES["SmolLM2-135M"][ours] for ours, theirs in llama.NAMES.items() if ours != "head_size"}
    hub = {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
           "eos_token_id": [2, 3], "hidden_act": "silu", "initializer_range": 0.04, "is_llama_config": True,
           "mlp_bias": False, "model_type": "llama", "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
           "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
           "torch_dtype": "bfloat16", "transformers.js_config": {"dtype": "q4"}, "transformers_version": "4.42.3",
           "use_cache": True, "_name_or_path": "x"} | size
    path.write_text(json.dumps(hub))
    assert llama.read_config(path) == SIZES["SmolLM2-135M"]
    path.write_text(json.dumps(hub | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32768,
                                      "max_window_layers": 21, "use_mrope": False, "num_attention_heads": 18,
                                      "layer_types": ["full_attention"] * 30}))
    assert llama.read_config(path) == SIZES["SmolLM2-135M"] | {"model_type": "qwen2", "n_head": 18,
                                                                     "head_size": 32}
    old = {name: value for name, value in hub.items() if name not in (
        "num_key_value_heads", "rope_theta", "rope_scaling", "tie_word_embeddings", "attention_bias", "mlp_bias")}
    path.write_text(json.dumps(old))  # the first Llama's
    assert llama.read_config(path) == SIZES["SmolLM2-135M"] | {"n_kv_head": 9, "theta": 1e4, "tied": False}
    meta = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
            "original_max_position_embeddings": 8192}
    path.write_text(json.dumps(hub | {"rope_scaling": meta}))
    assert llama.read_config(path)["scaling"] == SIZES["Llama-3.2-1B"]["scaling"]
    path.write_text(json.dumps({n: v for n, v in make_config("qwen 3").items() if n != "head_dim"}))
    assert llama.read_config(path)["head_size"] == transformers.Qwen3Config().head_dim  # 128, whatever the width


@pytest.mark.parametrize("shape", SHAPES)
def test_we_and_transformers_open_what_each_other_writes(pair, tmp_path, shape):
    ours, theirs = pair(shape)
    llama.save_model(ours, tmp_path, 7)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    ids = some_ids(ours)
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, theirs(ids).logits) and opened.config.eos_token_id == 7
    assert llama.read_config(tmp_path / "config.json") == ours.config


def bare(theirs, folder):
    weights.save_safetensors({n.removeprefix("model."): t for n, t in theirs.state_dict().items()} | {
        "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, folder / "model.safetensors")


WAYS = {"shards": lambda theirs, folder: theirs.save_pretrained(folder, max_shard_size=4000),
        "no prefix, with frequencies": bare,
        "compiled": lambda theirs, folder: weights.save_safetensors(
            {f"_orig_mod.{name}": t for name, t in theirs.state_dict().items()}, folder / "model.safetensors"),
        "only the head of two tied": lambda theirs, folder: weights.save_safetensors(
            {n: t for n, t in theirs.state_dict().items() if "embed" not in n}, folder / "model.safetensors"),
        "pytorch_model.bin": lambda theirs, folder: torch.save(theirs.state_dict(), folder / "pytorch_model.bin"),
        "bfloat16": lambda theirs, folder: theirs.save_pretrained(folder)}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_ways_to_store_a_model(tmp_path, way):
    theirs = make_theirs("qwen 3, tied", dtype=torch.float32)
    theirs = theirs.bfloat16() if way == "bfloat16" else theirs
    theirs.config.save_pretrained(tmp_path)
    WAYS[way](theirs, tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == (way == "shards")
    ours, ids = llama.read_model(tmp_path), torch.arange(20)[None]
    assert {p.dtype for p in ours.parameters()} == {theirs.dtype}  # as stored
    ours = llama.read_model(tmp_path, llama.read_config(tmp_path / "config.json"), torch.float32)
    if way == "bfloat16":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert close(ours(ids), theirs(ids).logits)


def test_tensors_stay_in_the_mapped_file_and_it_does_not_change(tmp_path, monkeypatch):
    make_theirs("qwen 2").bfloat16().save_pretrained(tmp_path)
    before = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).digest()
    opened = weights.open_weights(tmp_path)
    monkeypatch.setattr(llama, "open_weights", lambda path: opened)
    model = llama.read_model(tmp_path)
    assert all(opened[name].data_ptr() == p.data_ptr() for name, p in model.named_parameters())
    ids = some_ids(model)
    model(ids, targets=ids).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).digest() == before


def change(**changes):
    return lambda state: state | {name.replace("__", "."): tensor for name, tensor in changes.items()}


@pytest.mark.parametrize("edit, config, words", [
    (lambda s: {n: t for n, t in s.items() if n != "model.layers.1.self_attn.k_proj.bias"}, {},
     ["lacks layers.1.self_attn.k_proj.bias", "3 layers of qwen2"]),
    (change(lm_head__weight=torch.ones(29, 24)), {}, ["lm_head.weight other than", "tie_word_embeddings"]),
    (dict, {"tied": False}, ["lacks lm_head.weight"]), (dict, {"n_layer": 2}, ["holds 'model.layers.2."]),
    (dict, {"n_layer": 2**24 - 1}, ["38 tensors"]), (dict, {"vocab_size": 30}, ["(29, 24)", "(30, 24)"]),
    (dict, {"model_type": "llama"}, ["_proj.bias'", "no use"]), (dict, {"model_type": "qwen3"}, ["lacks", "q_norm"]),
    (dict, {"n_kv_head": 3}, ["k_proj", "(8, 24)", "(12, 24)"]), (dict, {"n_inner": 21}, ["mlp"]),
    (dict, {"n_embd": 2**24 - 1, "vocab_size": 2**24 - 1, "n_inner": 2**24 - 1}, ["embed_tokens", "16777215"]),
    (lambda s: s | {"model.norm.weight": torch.ones(24).int()}, {}, ["norm.weight", "int32"]),
    (lambda s: s | {"model.norm.weight": torch.ones(24).to(torch.float8_e4m3fn)}, {}, ["norm.weight", "float8"]),
    (lambda s: s | {"norm.weight": torch.ones(24)}, {}, ["norm.weight' is in it twice"]),
    (lambda s: s | {"score.weight": torch.ones(2, 24)}, {}, ["score.weight", "no use"]),
    (lambda s: s | {"\x1b[2J" * 100: torch.ones(2, 24)}, {}, ["\\x1b[2J", "no use"]),
])
def test_weights_that_are_refused(pair, tmp_path, edit, config, words):
    ours, _ = pair("qwen 2")
    weights.save_safetensors(edit(ours.state_dict()), tmp_path / "model.safetensors")
    with refused(tmp_path, *words):
        llama.read_model(tmp_path, ours.config | config)


def test_a_missing_shard_is_named(tmp_path):
    theirs = make_theirs("llama")
    theirs.save_pretrained(tmp_path, max_shard_size=4000)
    shard = sorted(tmp_path.glob("*-of-*"))[1]
    shard.unlink()
    with refused(shard, "is not there"):
        llama.read_model(tmp_path)


# ---------------------------------------------------------------------------------------------- writing text
def their_greedy(theirs, ids, length):
    ids = torch.tensor([ids])
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length,
                          eos_token_id=-1, pad_token_id=0)  # no token ends a text
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_texts_equal_transformers(pair, shape):
    ours, theirs = pair(shape)
    for prompt in ([3], [1, 2, 3, 4, 5]):
        length = 48 - len(prompt)
        expected = their_greedy(theirs, prompt, length)
        assert len(set(expected)) > 2
        assert list(llama.generate(ours, prompt, length, temperature=0)) == expected
        assert list(llama.generate(ours, prompt, length, temperature=0, cache=False)) == expected
        stop = expected[5]
        assert list(llama.generate(ours, prompt, 20, 0, stop=stop)) == expected[: expected.index(stop)]


def test_a_text_longer_than_the_positions_goes_on_from_its_later_half(pair):
    """As with GPT-2: what is forgotten is forgotten by transformers too, which reads the same half anew."""
    ours, theirs = pair("llama")
    prompt = some_ids(ours, B=1, T=60)[0].tolist()
    expected = their_greedy(theirs, prompt[-48:], 1)  # of a long prompt its end
    text = prompt + expected
    expected += their_greedy(theirs, text[-24:], 25)
    text = prompt + expected
    expected += their_greedy(theirs, text[-24:], 4)
    for cache in (True, False):
        assert list(llama.generate(ours, prompt, 30, temperature=0, cache=cache)) == expected
    assert list(llama.generate(ours, [1], 0)) == [] and len(list(llama.generate(ours, [1] * 40, 9))) == 9


def test_sampling_follows_the_generator_and_leaves_torch_as_it_was(pair):
    ours, _ = pair("qwen 3")
    texts = [list(llama.generate(ours, [5], 20, 1.2, 9, cache=cache, generator=torch.Generator().manual_seed(seed)))
             for seed, cache in ((3, True), (3, False), (4, True))]
    assert texts[0] == texts[1] != texts[2]
    assert torch.backends.mkldnn.enabled
    ours.config["n_tokens"] = 4
    assert max(llama.generate(ours, [1], 30)) < 4
    del ours.config["n_tokens"]
    with refused("vocab_size"):
        list(llama.generate(ours, [99], 3))
    assert torch.backends.mkldnn.enabled


# ---------------------------------------------------------------------------------------------- real weights
@pytest.mark.real("smollm2/model.safetensors")
@torch.no_grad()
def test_smollm2_scores_and_200_greedy_tokens_equal_transformers():
    """Both in float32. A text is greedy if every token is the likeliest after those before it, by their scores."""
    folder, prompt = REAL / "smollm2", [504, 3575, 282, 4649, 314]
    ours = llama.read_model(folder, None, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert ours.config | {"epsilon": 1e-5} == SIZES["SmolLM2-135M"]
    new = list(llama.generate(ours, prompt, 200, temperature=0))
    ids = torch.tensor([prompt + new])
    logits = theirs(ids).logits
    assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == new and len(set(new)) > 50
    ids[0, 100:] = torch.randint(49152, (105,), generator=torch.Generator().manual_seed(0))  # and what nobody says
    logits = theirs(ids).logits
    assert close(ours(ids), logits, 1e-4) and close(read_in_pieces(ours, ids, [100, 1, 1, 103]), logits, 1e-4)


# ---------------------------------------------------------------------------------------------- claims
def test_groups_make_the_cache_as_small_as_it_is_said_to_be():
    with torch.device("meta"):
        one, all_heads = (llama.Cache(llama.Llama(SIZES["SmolLM2-135M"] | change).bfloat16(), n=1).kv.nbytes / 1024
                          for change in ({"n_layer": 30}, {"n_kv_head": 9}))
    assert f"{one} KiB per token in bfloat16, not {all_heads}" in " ".join(llama.Attention.__doc__.split())


def test_it_is_imported_without_argparse_requests_and_matplotlib(monkeypatch):
    for name in ("llama", "gpt2", "weights", "utils"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("argparse", "requests", "matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)  # now an import of it fails
    fresh = chapter("06_finetune", "llama")
    assert fresh is not llama and fresh.Llama
