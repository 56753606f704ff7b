"""06_finetune/gpt2.py against transformers' GPT-2: scores, gradients, texts, files in both directions, samplers."""

import contextlib
import hashlib
import json
import math
import re
import sys

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import ROOT, chapter

import utils

weights, bpe, gpt2 = chapter("06_finetune", "weights", "bpe", "gpt2")
transformers = pytest.importorskip("transformers")
SCRIPT = ROOT / "06_finetune" / "gpt2.py"
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 29, "n_positions": 12, "layer_norm_epsilon": 1e-5}
SHAPES = {"one layer, one head": {"n_layer": 1, "n_head": 1}, "three heads of 16": {"n_head": 3, "n_embd": 48},
          "seven positions": {"n_positions": 7}, "eleven tokens": {"vocab_size": 11},
          "a head of one channel": {"n_head": 16}, "five layers": {"n_layer": 5},
          "epsilon 0.5": {"layer_norm_epsilon": 0.5}}


def make_theirs(dropout=0.0, attention="sdpa", lively=False, **changes):
    """transformers' GPT-2 with random values everywhere: gains of 1, biases of 0 and timid matrices hide mistakes.

    lively: less of what is the same everywhere or makes a token follow itself, for greedy texts of many tokens.
    """
    config = transformers.GPT2Config(**SMALL | changes, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
                                     bos_token_id=None, eos_token_id=None, attn_implementation=attention)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        gain, embedding = p.dim() == 1 and name.endswith("weight"), "wte" in name or "wpe" in name
        std = 0.3 if p.dim() == 1 or embedding else len(p) ** -0.5
        if lively:
            std *= 0.3 if name.endswith("bias") else 3 if "wpe" in name else 2 if p.dim() == 2 and not embedding else 1
        torch.nn.init.normal_(p, float(gain), std, generator=generator)
    return model


def make_ours(theirs):
    """The same weights, in the same memory, in a network of ours."""
    c = theirs.config
    config = {name: getattr(c, name) for name in SMALL} | {"dropout": c.resid_pdrop}
    with torch.device("meta"):
        ours = gpt2.GPT2(config)
    state = {name.removeprefix("transformer."): p for name, p in theirs.state_dict().items() if "lm_head" not in name}
    ours.load_state_dict(state, assign=True)
    return ours.eval()


def make_pair(**changes):
    theirs = make_theirs(**changes)
    return make_ours(theirs), theirs


def some_ids(model, B=3, T=None, seed=1):
    c = model.config
    return torch.randint(c["vocab_size"], (B, T or c["n_positions"]), generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-5):
    """Equal shapes and, to float32's rounding, equal numbers; prints the largest difference."""
    difference = (a - b).abs().max().item() if a.shape == b.shape else math.inf
    print(f"differ by {difference:.1e}, of {b.abs().max().item():.1f}")
    return difference <= tolerance  # False for nan


@torch.no_grad()
def read_in_pieces(model, ids, sizes):
    cache, logits = gpt2.Cache(model, len(ids)), []
    for piece in ids.split(sizes, 1):
        logits.append(model(piece, cache))
    assert cache.length == ids.shape[1]
    return torch.cat(logits, 1)


# ---------------------------------------------------------------------------------------------- the network
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_scores_equal_transformers_with_and_without_cache(shape):
    ours, theirs = make_pair(**SHAPES[shape])
    ids = some_ids(ours)
    T, hidden = ids.shape[1], ours.hidden(ids)
    expected = theirs(ids, output_hidden_states=True)
    assert expected.logits.std() > 0.5  # not all alike
    assert close(hidden, expected.hidden_states[-1]) and close(ours.logits(hidden), expected.logits)
    assert close(ours(ids), expected.logits) and close(ours(ids[:, :1]), expected.logits[:, :1])
    for sizes in ([T], [1] * T, [3, 1, 1, T - 5], [1, T - 1], [2, 2, T - 4]):
        assert close(read_in_pieces(ours, ids, sizes), expected.logits), sizes


@pytest.fixture(scope="module")
def large():
    return make_pair(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, n_positions=1024)


@torch.no_grad()
def test_scores_equal_transformers_at_the_size_of_gpt2(large):
    ours, theirs = large
    assert utils.count_parameters(ours) == theirs.num_parameters() == 124_439_808
    ids = some_ids(ours, B=2, T=6)
    expected = theirs(ids).logits
    assert expected.std() > 5  # as large as a trained model's
    assert close(ours(ids), expected, 1e-4) and close(read_in_pieces(ours, ids, [3, 1, 2]), expected, 1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_transformers(checkpointing):
    ours, theirs = make_pair(n_layer=3)
    ours.train().checkpointing = checkpointing
    ids = some_ids(ours)
    logits = ours(ids)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs.train()(ids, labels=ids).loss.backward()
    expected = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert expected[name].abs().max() > 1e-5 or name.endswith("c_attn.bias"), name
        assert close(p.grad, expected[name]), name
    ours.eval()
    assert close(read_in_pieces(ours, ids, [4, 8]), logits)  # checkpointing is of training, and leaves the cache alone


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_falls_where_and_as_often_as_in_transformers(checkpointing):
    """Both draw the same random numbers, if they ask for them in the same order: then whole runs agree."""
    ours, theirs = make_pair(dropout=0.2, attention="eager")
    ids = some_ids(ours)
    expected = theirs(ids).logits
    assert close(ours(ids), expected)  # in eval mode none
    ours.train().checkpointing = checkpointing
    theirs.train()
    torch.manual_seed(5)
    dropped = theirs(ids, labels=ids)
    dropped.loss.backward()
    assert not close(dropped.logits, expected, 0.1)
    torch.manual_seed(5)
    logits = ours(ids)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert close(logits, dropped.logits)
    gradients = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        assert close(p.grad, gradients[name]), name  # checkpointing drops the same again in the backward pass


def test_checkpointing_keeps_the_blocks_inputs_alone_and_computes_twice():
    def kept(n_layer, checkpointing):
        """Floats kept for the backward pass, and how often an MLP ran, one training step of n_layer blocks."""
        ours = make_ours(make_theirs(n_layer=n_layer, dropout=0.1))
        ours.train().checkpointing = checkpointing
        own, storages, runs = {p.untyped_storage().data_ptr() for p in ours.parameters()}, {}, []
        ours.h[0].mlp.register_forward_hook(lambda *_: runs.append(1))

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is used again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = ours(some_ids(ours)).sum()
        size = sum(t.untyped_storage().nbytes() // 4 for at, t in storages.items() if at not in own)
        loss.backward()
        return size, len(runs)

    BTC = 3 * SMALL["n_positions"] * SMALL["n_embd"]
    assert kept(4, True)[0] - kept(3, True)[0] == BTC and kept(4, False)[0] - kept(3, False)[0] > 15 * BTC
    assert kept(1, True)[1] == 2 and kept(1, False)[1] == 1


def test_nothing_leaks_from_the_future():
    ours, _ = make_pair()
    ids = some_ids(ours, B=1)
    with torch.no_grad():
        before = ours(ids)
        for t in range(ids.shape[1]):
            changed = ids.clone()
            changed[0, t] = (ids[0, t] + 1) % SMALL["vocab_size"]
            after = ours(changed)
            assert torch.equal(after[:, :t], before[:, :t])
            assert ((after[0, t:] - before[0, t:]).abs().max(-1).values > 1e-4).all()  # and all that follows sees it


@torch.no_grad()
def test_attention_weights_equal_transformers():
    ours, theirs = make_pair(attention="eager")
    ids = some_ids(ours)
    expected = theirs(ids, output_attentions=True).attentions
    plain = ours(ids)
    assert all(block.attn.weights is None for block in ours.h)
    for block in ours.h:
        block.attn.keep_weights = True
    with torch.enable_grad():
        assert torch.equal(ours(ids), plain)
    for block, theirs_of_layer in zip(ours.h, expected, strict=True):
        kept = block.attn.weights  # (B, A, T, S)
        assert close(kept, theirs_of_layer, 1e-6) and close(kept.sum(-1), torch.ones(kept.shape[:-1]), 1e-6)
        assert (kept.triu(1) == 0).all() and not kept.requires_grad
    read_in_pieces(ours, ids, [4, 3, 5])
    for block, theirs_of_layer in zip(ours.h, expected):
        assert close(block.attn.weights, theirs_of_layer[:, :, -5:], 1e-6)  # of the new tokens, over all


def test_too_long_a_text_is_refused_and_leaves_the_cache_as_it_was():
    ours, _ = make_pair()
    n = SMALL["n_positions"]
    with pytest.raises(utils.InputError, match="13 tokens are more than the 12 positions"):
        ours(torch.zeros(1, n + 1, dtype=torch.long))
    cache = gpt2.Cache(ours)
    ids = some_ids(ours, B=1)
    with torch.no_grad():
        ours(ids[:, :9], cache)
        with pytest.raises(utils.InputError, match="13 tokens"):
            ours(ids[:, :4], cache)
        assert close(ours(ids[:, 9:], cache), ours(ids)[:, 9:])


def test_the_weights_begin_as_the_comments_say():
    torch.manual_seed(0)
    model = gpt2.GPT2({"n_layer": 8, "n_head": 4, "n_embd": 128, "vocab_size": 500, "n_positions": 100})
    for name, p in model.named_parameters():
        std = 0.01 if "wpe" in name else 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(std, rel=0.05) and abs(p.mean().item()) < std / 20, name
        else:
            assert (p == float(name.endswith("weight"))).all(), name
    ids = some_ids(model, B=4)
    assert F.cross_entropy(model(ids).mT, ids.roll(1, 1)).item() == pytest.approx(math.log(500), abs=0.1)
    x = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    difference = (F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max()
    assert 4e-4 < difference < 5e-4 and "up to 5e-4" in SCRIPT.read_text(encoding="utf-8")
    with pytest.raises(utils.InputError, match="n_embd 16 must be divisible by n_head 3"):
        gpt2.GPT2(SMALL | {"n_head": 3})


# ---------------------------------------------------------------------------------------------- shrink
def test_shrink_halves_frozen_matrices_alone():
    ours, _ = make_pair(n_embd=64)
    ids = some_ids(ours)
    with torch.no_grad():
        expected = ours(ids)
    trained = {"h.0.attn.c_attn.weight", "wpe.weight", "ln_f.weight", "h.1.mlp.c_fc.bias"}
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for name, p in ours.named_parameters():
        p.requires_grad_(name in trained)
    assert gpt2.shrink(ours) is ours
    for name, p in ours.named_parameters():
        small = p.dim() == 2 and name not in trained
        assert p.dtype == (torch.bfloat16 if small else torch.float32), name
        assert torch.equal(p, before[name].to(p.dtype)) and p.requires_grad == (name in trained), name
    with torch.autocast("cpu", torch.bfloat16):
        logits = ours(ids)
        in_pieces = read_in_pieces(ours, ids, [5, 1, 6])
        F.cross_entropy(logits.float().mT, ids).backward()
    for found in (logits.detach(), in_pieces):
        assert found.isfinite().all() and (found - expected).std() < 0.03 * expected.std()
    assert {name for name, p in ours.named_parameters() if p.grad is not None} == trained
    torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1).step()
    for name, p in ours.named_parameters():
        assert torch.equal(p, before[name].to(p.dtype)) == (name not in trained), name
    gpt2.shrink(ours.requires_grad_(False), torch.float16)
    assert ours.wte.weight.dtype == ours.h[0].attn.c_attn.weight.dtype == torch.float16
    sums = []  # what goes through the network stays in float32
    for layer in (*(block.ln_1 for block in ours.h), *(block.ln_2 for block in ours.h), ours.ln_f):
        layer.register_forward_pre_hook(lambda _, x: sums.append(x[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        ours(ids)
    assert sums == [torch.float32] * 5


# ---------------------------------------------------------------------------------------------- files
@pytest.fixture(scope="module")
def tokenizer():
    return bpe.Tokenizer(*bpe.train_bpe(bpe.read_text("pydocs")[:20_000], 300))


@torch.no_grad()
def test_transformers_opens_the_folders_we_write(tmp_path, tokenizer):
    ours, _ = make_pair(vocab_size=len(tokenizer.vocab), n_positions=40, layer_norm_epsilon=0.01)
    end = tokenizer.vocab["<|endoftext|>"]
    tokenizer.save(tmp_path)
    gpt2.save_model(ours, tmp_path, end)
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and {"missing_keys", "unexpected_keys", "mismatched_keys"} <= report.keys(), report
    assert theirs.dtype == torch.float32 and theirs.config.eos_token_id == theirs.generation_config.eos_token_id == end
    assert {name: getattr(theirs.config, name) for name in SMALL} | {"dropout": 0.0} == ours.config
    ids = some_ids(ours)
    assert close(ours(ids), theirs.eval()(ids).logits)
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(auto.eval()(ids).logits, theirs(ids).logits)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The with statement,\n  and naïve code."
    assert their_tokenizer(text)["input_ids"] == tokenizer.encode(text)
    again = gpt2.read_model(tmp_path, gpt2.read_config(tmp_path / "config.json"))
    assert again.config == ours.config and again.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values()))
    assert all(p.requires_grad for p in again.parameters()) and not again.training
    # the mapped file's name goes to the new one, and the old stays mapped
    gpt2.save_model(again, tmp_path, end)
    assert torch.equal(again(ids), ours(ids))
    assert torch.equal(gpt2.read_model(tmp_path, ours.config)(ids), ours(ids))


def write_original(theirs, folder):
    """The layout of OpenAI's model on the hub: no prefix, masks, and tensors that begin at an odd byte."""
    tensors, n = theirs.transformer.state_dict(), theirs.config.n_positions
    for i in range(theirs.config.n_layer):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, n, n).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(header).encode()
    header += b" " * ((3 - len(header)) % 4)
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)


def write_head_too(theirs, folder):
    weights.save_safetensors(theirs.state_dict(), folder / "model.safetensors")  # with lm_head.weight


WAYS = {
    "save_pretrained": lambda theirs, folder: theirs.save_pretrained(folder),
    "without the head": lambda theirs, folder: theirs.transformer.save_pretrained(folder),
    "shards": lambda theirs, folder: theirs.save_pretrained(folder, max_shard_size="8KB"),
    "bfloat16": lambda theirs, folder: theirs.bfloat16().save_pretrained(folder),
    "float16": lambda theirs, folder: theirs.half().save_pretrained(folder),
    "float64": lambda theirs, folder: theirs.double().save_pretrained(folder),
    "original": write_original,
    "head too": write_head_too,
    "one of two tied names": lambda theirs, folder: safetensors.torch.save_model(theirs, folder / "model.safetensors"),
    "compiled": lambda theirs, folder: weights.save_safetensors(
        {f"_orig_mod.{name}": t for name, t in theirs.state_dict().items()}, folder / "model.safetensors"),
    "a classifier's": lambda theirs, folder: weights.save_safetensors(
        {f"transformer.{name}": t for name, t in theirs.transformer.state_dict().items()}
        | {"score.weight": torch.ones(2, 16)}, folder / "model.safetensors"),
    "pytorch_model.bin": lambda theirs, folder: torch.save(theirs.state_dict(), folder / "pytorch_model.bin"),
    "old pytorch_model.bin": lambda theirs, folder: torch.save(theirs.transformer.state_dict(), folder /
                                                              "pytorch_model.bin", _use_new_zipfile_serialization=False)
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_we_open_what_transformers_writes(tmp_path, capsys, way):
    theirs = make_theirs(layer_norm_epsilon=0.01)
    theirs.config.save_pretrained(tmp_path)
    WAYS[way](theirs, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert ("model.safetensors.index.json" in names) == (way == "shards")
    if not way.endswith(".bin"):
        stored = weights.open_weights(tmp_path)
        assert ("wte.weight" in stored) == (way in ("without the head", "original"))
        assert {t.dtype for t in stored.values()} == {theirs.dtype}
    config = gpt2.read_config(tmp_path / "config.json")
    assert config == SMALL | {"layer_norm_epsilon": 0.01}
    ours = gpt2.read_model(tmp_path, config)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert ("'score.weight' is another task's head, and is left out" in capsys.readouterr().out) == ("class" in way)
    ids = some_ids(ours)
    assert close(ours(ids), theirs.float()(ids).logits)
    file = sorted(name for name in names if name.startswith(("model", "pytorch")))[-1]  # a file as well as its folder
    assert torch.equal(gpt2.read_model(tmp_path / file, config)(ids), ours(ids))


@pytest.mark.parametrize("way", ["save_pretrained", "shards", "head too", "original", "bfloat16"])
def test_tensors_stay_in_the_mapped_file_and_it_does_not_change(tmp_path, monkeypatch, way):
    WAYS[way](make_theirs(), tmp_path)
    hashes = {path: hashlib.sha256(path.read_bytes()).digest() for path in tmp_path.iterdir()}
    opened = weights.open_weights(tmp_path)
    monkeypatch.setattr(gpt2, "open_weights", lambda path: opened)
    model = gpt2.read_model(tmp_path, SMALL)
    stored = {name.removeprefix("transformer."): name for name in opened}
    mapped = [opened[stored[name]].data_ptr() == p.data_ptr() for name, p in model.named_parameters()]
    assert all(mapped) if way != "bfloat16" else not any(mapped)  # converted
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    F.cross_entropy(model(some_ids(model)).mT, some_ids(model)).backward()
    torch.optim.AdamW(model.parameters(), lr=0.01).step()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(hashlib.sha256(path.read_bytes()).digest() == value for path, value in hashes.items())
    monkeypatch.undo()
    again = gpt2.read_model(tmp_path, SMALL)
    assert all(torch.equal(p, before[name]) for name, p in again.named_parameters())


def test_the_published_file_of_gpt2_is_not_aligned():
    """Its size is in DESIGN; with the masks, 160 tensors of float32, it leaves the header an odd number of bytes."""
    header = 548_105_171 - 8 - 4 * (124_439_808 + 12 * 1024 * 1024)
    assert 60 < header / 160 < 120 and (8 + header) % 4


# ---------------------------------------------------------------------------------------------- refusals
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


def config_text(**changes):
    return json.dumps({"model_type": "gpt2", **SMALL, **changes})


@pytest.mark.parametrize("text, words", [
    (None, ["FileNotFoundError", "config.json"]),
    ("", ["JSONDecodeError"]),
    ("{", ["JSONDecodeError"]),
    ("[" * 100_000, ["RecursionError"]),
    (b"\xff\xfe{", ["UnicodeDecodeError"]),
    ('{"n_layer": ' + "9" * 10_000 + "}", ["ValueError"]),
    ("[]", ["model_type", "None"]),
    ("{}", ["model_type", "None"]),
    ("null", ["model_type", "None"]),
    (config_text(model_type="bert"), ["model_type", "'bert'", "'gpt2'"]),
    (config_text(model_type="x\n" * 10_000), ["model_type"]),
    (config_text(model_type=["gpt2"]), ["model_type"]),
    (config_text(activation_function="gelu"), ["activation_function", "'gelu'", "'gelu_new'"]),
    (config_text(scale_attn_weights=False), ["scale_attn_weights"]),
    (config_text(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx"]),
    (config_text(add_cross_attention=True), ["add_cross_attention"]),
    (config_text(tie_word_embeddings=False), ["tie_word_embeddings"]),
    (config_text(n_inner=65), ["n_inner", "65"]),
    (config_text(n_inner="64" * 10_000), ["n_inner"]),
    (config_text(n_inner=None, n_embd=None), ["n_embd", "None"]),
    (config_text(n_embd={}), ["n_embd", "{}"]),
    ('{"model_type": "gpt2"}', ["n_layer", "None"]),
    *[(config_text(**{name: value}), [name, "positive whole number"])
      for name in set(SMALL) - {"layer_norm_epsilon"}
      for value in ("2", 0, -1, True, 2.0, None, [1], 2**31 - 1, 2**24, 10**400, "x" * 10_000)],
    *[(config_text(layer_norm_epsilon=value), ["layer_norm_epsilon", "positive number"])
      for value in ("1e-5", 0, -1e-5, True, None, math.nan, math.inf)],
])
def test_configs_that_are_refused(tmp_path, text, words):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused(path, *words):
        gpt2.read_config(path)


def test_configs_that_are_taken(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(config_text(n_inner=64, activation_function="gelu_new", n_ctx=12, attn_pdrop=0.1))
    assert gpt2.read_config(path) == SMALL
    path.write_text('{"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "layer_norm_epsilon": 1}')
    assert gpt2.read_config(path) == gpt2.COMMON | gpt2.SIZES["gpt2"] | {"layer_norm_epsilon": 1}


def test_an_activation_is_taken_under_each_of_its_names_and_no_other(tmp_path):
    """Oracle: transformers' own functions by name. The largest difference between the five is rounding."""
    x, path = torch.linspace(-8, 8, 10_001), tmp_path / "config.json"
    for name in transformers.activations.ACT2FN:
        same = (transformers.activations.ACT2FN[name](x) - F.gelu(x, approximate="tanh")).abs().max() < 1e-5 \
            if "gelu" in name and "10" not in name else False
        assert same == (name in gpt2.TANH_GELU), name
        path.write_text(config_text(activation_function=name))
        if same:
            assert gpt2.read_config(path) == SMALL
        else:
            with refused("activation_function", repr(name)):
                gpt2.read_config(path)


def test_rows_that_only_fill_the_table_up_are_never_drawn(tmp_path):
    ours = make_ours(make_theirs())
    ours.wte.weight.data[25:] *= 9  # the likeliest, were they asked
    drawn = list(gpt2.generate(ours, [1], 60))
    assert max(drawn) >= 25
    ours.config["n_tokens"] = 25
    for temperature in (0, 1):
        assert max(gpt2.generate(ours, [1], 60, temperature)) < 25
    gpt2.save_model(ours, tmp_path, 0)
    assert gpt2.read_config(tmp_path / "config.json") == SMALL


def change(**changes):
    return lambda state: state | changes


def without(name):
    return lambda state: {other: tensor for other, tensor in state.items() if other != name}


@pytest.mark.parametrize("edit, config, words", [
    (without("wpe.weight"), {}, ["lacks wpe.weight"]),
    (change(**{"lm_head.weight": torch.ones(29, 16)}), {}, ["lm_head.weight other than wte.weight", "one table"]),
    (change(**{"transformer.ln_f.bias": torch.ones(16)}), {}, ["ln_f.bias' is in it twice"]),
    (without("ln_f.bias"), {}, ["lacks ln_f.bias"]),
    (without("h.1.mlp.c_proj.bias"), {}, ["lacks h.1.mlp.c_proj.bias", "2 layers"]),
    (change(**{"h.2.ln_1.bias": torch.ones(16)}), {}, ["holds 'h.2.ln_1.bias'", "no use"]),
    (change(**{"h.2.attn.bias": torch.ones(16)}), {}, ["holds 'h.2.attn.bias'", "no use"]),
    (change(**{"\x1b[2J" * 100: torch.ones(16)}), {}, ["\\x1b[2J", "no use"]),
    (lambda state: {f"transformer.transformer.{name}": t for name, t in state.items()}, {}, ["lacks wte.weight"]),
    (lambda state: {f"h.{name}": t for name, t in state.items()}, {}, ["lacks wte.weight"]),
    (change(**{"ln_f.bias": torch.ones(17)}), {}, ["ln_f.bias", "(17,)", "(16,)"]),
    (change(**{"ln_f.bias": torch.ones(16).int()}), {}, ["ln_f.bias", "int32"]),
    (change(**{"ln_f.bias": torch.ones(16).to(torch.complex64)}), {}, ["ln_f.bias", "complex64"]),
    (lambda state: state | {"h.0.attn.c_attn.weight": state["h.0.attn.c_attn.weight"].T}, {},
     ["h.0.attn.c_attn.weight", "(48, 16)", "(16, 48)"]),
    (dict, {"n_layer": 1}, ["holds 'h.1.", "1 layers"]),
    (dict, {"n_layer": 3}, ["28 tensors", "3 layers"]),
    (dict, {"n_layer": 2**24 - 1}, ["28 tensors", "16777215 layers"]),  # and answers before it has built any
    (dict, {"n_embd": 32}, ["wte.weight", "(29, 16)", "(29, 32)"]),
    (dict, {"n_embd": 2**24 - 1, "n_head": 1, "vocab_size": 2**24 - 1}, ["wte.weight", "16777215"]),
    (dict, {"n_positions": 13}, ["wpe.weight", "(12, 16)", "(13, 16)"]),
    (dict, {"vocab_size": 50257}, ["wte.weight", "50257"]),
    (dict, {"n_head": 3}, ["n_embd 16", "n_head 3"]),
])
def test_weights_that_are_refused(tmp_path, edit, config, words):
    path = tmp_path / "model.safetensors"
    weights.save_safetensors(edit(gpt2.GPT2(SMALL).state_dict()), path)
    with refused(*words, *([path] if "n_head" not in config or len(config) > 1 else [])):
        gpt2.read_model(path, SMALL | config)


def test_an_empty_folder_is_refused(tmp_path):
    with refused(tmp_path, "model.safetensors"):
        gpt2.read_model(tmp_path, SMALL)


# ---------------------------------------------------------------------------------------------- writing text
def their_greedy(theirs, ids, length):
    ids = torch.tensor([ids])
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length,
                          use_cache=True, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("shape", ["one layer, one head", "three heads of 16", "eleven tokens"])
def test_greedy_texts_equal_transformers(shape):
    ours, theirs = make_pair(**SHAPES[shape], n_positions=40, lively=True)
    for prompt in ([3], [1, 2, 3, 4, 5], [7] * 20):
        length = 40 - len(prompt)
        expected = their_greedy(theirs, prompt, length)
        assert len(expected) == length and len(set(expected)) > 2
        assert list(gpt2.generate(ours, prompt, length, temperature=0)) == expected
        assert list(gpt2.generate(ours, prompt, length, temperature=0, cache=False)) == expected


def test_greedy_text_equals_transformers_at_the_size_of_gpt2(large):
    ours, theirs = large
    prompt = [15496, 11, 995]
    expected = their_greedy(theirs, prompt, 4)
    assert len(expected) == 4 and list(gpt2.generate(ours, prompt, 4, temperature=0)) == expected


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12])
def test_texts_longer_than_the_positions(monkeypatch, n):
    """Every token is the one that transformers finds likeliest after what the model then remembers."""
    ours, theirs = make_pair(n_positions=n, lively=True)
    read, hidden = [], ours.hidden

    def spy(ids, cache=None):
        read.append(ids.shape[1])
        return hidden(ids, cache)

    monkeypatch.setattr(ours, "hidden", spy)
    for prompt in ([5], list(range(n)), list(range(n + 1)), list(range(2 * n + 3))):
        read.clear()
        found = list(gpt2.generate(ours, prompt, 30, temperature=0))
        with_cache = read.copy()
        read.clear()
        assert list(gpt2.generate(ours, prompt, 30, temperature=0, cache=False)) == found and len(found) == 30
        assert len(set(found)) > 2 or n < 12
        for i, length in enumerate(read):  # without a cache all that is remembered is read each time
            window = (prompt + found)[: len(prompt) + i][-length:]
            with torch.no_grad():
                assert theirs(torch.tensor([window])).logits[0, -1].argmax() == found[i]
        assert read[0] == with_cache[0] == min(n, len(prompt))
        for before, now, new in zip(read, read[1:], with_cache[1:]):
            assert (now, new) == ((before + 1, 1) if before < n else (max(1, n // 2),) * 2)
        # once in n_positions / 2 tokens, half a text is read again
        assert sum(new > 1 for new in with_cache[1:]) <= 30 / (n / 2) + 1

    def sampled(cache):
        generator = torch.Generator().manual_seed(3)
        return list(gpt2.generate(ours, [5], 30, 0.9, top_k=9, cache=cache, generator=generator))

    assert sampled(True) == sampled(False)


def test_stop_ends_a_text_and_is_not_part_of_it():
    ours, _ = make_pair(n_positions=40, lively=True)
    whole = list(gpt2.generate(ours, [1, 2, 3], 30, temperature=0))
    assert len(set(whole)) > 5
    for stop in set(whole):
        assert list(gpt2.generate(ours, [1, 2, 3], 30, temperature=0, stop=stop)) == whole[: whole.index(stop)]
    assert list(gpt2.generate(ours, [1, 2, 3], 30, temperature=0, stop=99)) == whole
    assert list(gpt2.generate(ours, [1, 2, 3], 0)) == []
    prompt = [1, 2]
    stream = gpt2.generate(ours, prompt, 5, generator=torch.Generator().manual_seed(0))
    assert next(stream) in range(29) and prompt == [1, 2]  # one at a time, and the caller's list stays as it is


def random_logits():
    """Rows without ties, with ties, all equal, with one sure token, with tokens that are out already."""
    torch.manual_seed(0)
    out = torch.randn(10, 50, dtype=torch.float64)
    out[:, ::3] = -math.inf
    sure = torch.zeros(1, 50, dtype=torch.float64)
    sure[0, 7] = 100
    return torch.cat([torch.randn(20, 50, dtype=torch.float64) * 3, torch.randint(4, (20, 50)).double(),
                      torch.zeros(1, 50, dtype=torch.float64), sure, out])


@pytest.mark.parametrize("k", [1, 2, 5, 49, 50, 51, 1000])
def test_keep_top_k_equals_transformers(k):
    logits = random_logits()
    before = logits.clone()
    expected = transformers.TopKLogitsWarper(k)(None, logits)
    assert torch.equal(gpt2.keep_top_k(logits, k), expected) and torch.equal(logits, before)
    assert torch.equal(gpt2.keep_top_k(logits[3], k), expected[3])


@pytest.mark.parametrize("temperature, k", [(1.0, None), (0.7, None), (1.8, 6), (1.3, 9), (0.9, 1000)])
def test_draw_draws_from_transformers_distribution(monkeypatch, temperature, k):
    seen = []
    monkeypatch.setattr(torch, "multinomial", lambda given, n, generator: seen.append(given) or given.argmax()[None])
    for logits in random_logits()[:20]:
        expected = transformers.TemperatureLogitsWarper(temperature)(None, logits[None])
        expected = transformers.TopKLogitsWarper(k)(None, expected) if k else expected
        assert gpt2.draw(logits, temperature, k) == logits.argmax()
        assert close(seen[-1][None], expected.softmax(-1), 1e-12)
        assert gpt2.draw(logits, 0, k) == logits.argmax()
    assert len(seen) == 20  # none at temperature 0


def test_frequencies_of_draw_follow_the_softmax():
    logits, n = torch.tensor([1.0, -1.0, 0.0, 2.0, -math.inf]), 2000
    generator = torch.Generator().manual_seed(0)
    for temperature, top_k in ((1.0, None), (2.0, None), (2.0, 3)):
        chances = (logits / temperature).softmax(-1)
        if top_k:  # which leaves 3, 0 and 2
            chances[1] = 0
        chances = chances / chances.sum()
        counts = torch.zeros(5)
        for _ in range(n):
            counts[gpt2.draw(logits, temperature, top_k, generator)] += 1
        assert (counts[chances == 0] == 0).all()
        assert ((counts / n - chances).abs() < 5 * (chances * (1 - chances) / n).sqrt() + 1e-9).all()
    draws = [[gpt2.draw(logits, 1.0, None, torch.Generator().manual_seed(seed)) for seed in range(20)]] * 2
    assert draws[0] == draws[1] and len(set(draws[0])) > 1


# ---------------------------------------------------------------------------------------------- as a script
def run_main(monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["gpt2.py", *map(str, options)])
    try:
        utils.run(gpt2.main)
        status = 0
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out


def test_script_shows_the_sizes_and_that_the_cache_changes_nothing(monkeypatch, capsys):
    status, out = run_main(monkeypatch, capsys)
    sizes = re.findall(r"^(gpt2\S*) .* ([\d,]+) +\d\.\d\d GB$", out, re.MULTILINE)
    assert status == 0 and [name for name, _ in sizes] == list(gpt2.SIZES)
    doc = " ".join(gpt2.__doc__.split())
    assert ", ".join(f"{name} {count}" for name, count in sizes) + " parameters" in doc
    assert 0 <= float(re.search(r"differ by (\S+)$", out)[1]) < 1e-6 and "to 1e-6" in doc
    assert re.search(r"h\.0\.attn\.c_attn +\(2, 10, 64\) +-> \(2, 10, 192\)", out) and "(2, 10, 1000)" in out
    status, out = run_main(monkeypatch, capsys, "--help")
    assert status == 0 and "usage" in out
