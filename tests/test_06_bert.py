"""06_finetune/bert.py against transformers' BERT and DistilBERT: hidden states, heads, gradients, files both ways."""

import contextlib
import hashlib
import http.server
import json
import math
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import REAL, ROOT, chapter

import utils

weights, wordpiece, gpt2, bert = chapter("06_finetune", "weights", "wordpiece", "gpt2", "bert")
transformers = pytest.importorskip("transformers")
BERT = {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 52, "max_position_embeddings": 19, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
DISTIL = {"vocab_size": 37, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 52, "max_position_embeddings": 19}
SHAPES = {  # name: (family, what differs)
    "bert": ("bert", {}), "one layer, one head": ("bert", {"num_hidden_layers": 1, "num_attention_heads": 1}),
    "heads of one channel": ("bert", {"num_attention_heads": 24}), "narrow inside": ("bert", {"intermediate_size": 7}),
    "five layers": ("bert", {"num_hidden_layers": 5}), "epsilon 0.5": ("bert", {"layer_norm_eps": 0.5}),
    "three types": ("bert", {"type_vocab_size": 3}), "eleven tokens": ("bert", {"vocab_size": 11}),
    "distilbert": ("distilbert", {}), "distilbert, five layers": ("distilbert", {"n_layers": 5, "n_heads": 1}),
    "distilbert, sines": ("distilbert", {"sinusoidal_pos_embds": True, "hidden_dim": 9}),
}
LABELS = ["bad", "fair", "good"]


def make_theirs(family="bert", ending="Model", dropout=0.0, attention="sdpa", **changes):
    """transformers' model with random values everywhere: gains of 1 and biases of 0 hide mistakes."""
    name = bert.FAMILIES[family]
    if family == "bert":
        config = BERT | {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    else:
        config = DISTIL | {"dropout": dropout, "attention_dropout": dropout, "seq_classif_dropout": dropout,
                           "qa_dropout": dropout}
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    labels = labels if "Sequence" in ending else {}
    config = getattr(transformers, name + "Config")(**config | changes | labels, attn_implementation=attention)
    model = getattr(transformers, name + ending)(config).eval()
    generator = torch.Generator().manual_seed(0)
    for part, p in model.named_parameters():
        gain, table = p.dim() == 1 and part.endswith("weight"), "embeddings" in part
        torch.nn.init.normal_(p, float(gain), 0.3 if p.dim() == 1 or table else p.shape[1] ** -0.5, generator=generator)
    return model


def save(theirs, folder, vocab=False):
    """As transformers writes it; with a vocabulary of its size."""
    theirs.save_pretrained(folder)
    if vocab:
        names = [*wordpiece.SPECIAL, *"abcdefghijklmnopqrstuvwxyz"][: theirs.config.vocab_size]
        (folder / "vocab.txt").write_text("".join(name + "\n" for name in names))
    return folder


def read(folder, kind=bert.Bert, **changes):
    return bert.read_model(folder, bert.read_config(folder / "config.json") | {"dropout": 0.0} | changes, kind)


def a_batch(theirs, B=4):
    """ids, mask and types (B, T): texts of several lengths, in the last no padding."""
    c = theirs.config
    T, generator = c.max_position_embeddings, torch.Generator().manual_seed(1)
    ids = torch.randint(c.vocab_size, (B, T), generator=generator)
    lengths = torch.tensor([1, 2, T // 2, T])[:B]
    types = torch.randint(getattr(c, "type_vocab_size", 1), (B, T), generator=generator)
    return ids, torch.arange(T) < lengths[:, None], types


def inputs(theirs, ids, mask=None, types=None):
    """The same under transformers' names."""
    named = {"input_ids": ids, "attention_mask": None if mask is None else mask.long()}
    return named | ({"token_type_ids": types} if types is not None and theirs.config.model_type == "bert" else {})


@contextlib.contextmanager
def refused(*words):
    """One sentence, on one line, that holds each of the words."""
    with pytest.raises((utils.InputError, ConnectionError)) as caught:
        yield
    message = str(caught.value)
    assert message.endswith(".") and message.isprintable() and len(message) < 500, message
    for word in words:
        assert str(word) in message, message


def close(a, b, tolerance=1e-5):
    difference = (a - b).abs().max().item() if a.shape == b.shape else math.inf
    print(f"differ by {difference:.1e}, of {b.abs().max().item():.1f}")
    return difference <= tolerance  # False for nan


# ---------------------------------------------------------------------------------------------- the network
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_hidden_states_equal_transformers(tmp_path, shape):
    family, changes = SHAPES[shape]
    theirs = make_theirs(family, **changes)
    ours = read(save(theirs, tmp_path))
    ids, mask, types = a_batch(theirs)
    for more in ((), (mask,), (mask, types), (torch.ones_like(mask),)):
        expected = theirs(**inputs(theirs, ids, *more))
        hidden = ours(ids, *more)
        seen = mask if more else torch.ones_like(mask)
        assert expected.last_hidden_state.std() > 0.1
        assert close(hidden[seen], expected.last_hidden_state[seen])
        if family == "bert":
            assert close(ours.pool(hidden), expected.pooler_output)
    assert close(ours(ids[:, :1]), theirs(ids[:, :1]).last_hidden_state)
    if family == "bert":  # types count
        assert not close(ours(ids, None, 1 - types.clamp(max=1)), ours(ids, None, types), 1e-2)


@torch.no_grad()
def test_padding_changes_nothing():
    """A text alone, with padding, and beside longer ones: the same numbers, whatever the padding holds."""
    torch.manual_seed(0)
    model = bert.Bert({"model_type": "bert", "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50}).eval()
    rows = [torch.randint(50, (length,)) for length in (3, 9, 6)]
    ids, mask = wordpiece.pad([row.tolist() for row in rows], 0)
    other = torch.where(mask, ids, torch.randint(50, ids.shape))
    for batch in (ids, other):
        hidden = model(batch, mask)
        mean = bert.mean_pool(hidden, mask)
        for i, row in enumerate(rows):
            alone = model(row[None])
            assert close(hidden[i, : len(row)], alone[0], 1e-6) and close(mean[i], alone[0].mean(0), 1e-6)
            assert torch.equal(bert.mean_pool(alone), alone.mean(1))


@pytest.mark.parametrize("family", bert.FAMILIES)
@pytest.mark.parametrize("ending", bert.KINDS)
def test_heads_and_gradients_equal_transformers(tmp_path, family, ending):
    """Dropout included: both draw the same random numbers, if they ask for them in the same order."""
    theirs = make_theirs(family, ending, dropout=0.2, attention="eager")
    ours = read(save(theirs, tmp_path), bert.KINDS[ending], dropout=0.2)
    ids, mask, types = a_batch(theirs)
    ids = ids.clamp(min=1)  # to transformers token 0 is padding, whose row gets no gradient
    runs = {}
    for side, model in (("ours", ours), ("theirs", theirs)):
        for training in (False, True):
            model.train(training)
            torch.manual_seed(5)
            if side == "ours":
                out = model(ids, mask, types)
                out = (model.pool(out),) if ending == "Model" and family == "bert" else out
            else:
                out = model(**inputs(theirs, ids, mask, types))
                out = (out.logits if "Sequence" in ending else (out.start_logits, out.end_logits) if "Qu" in ending else
                       (out.pooler_output,) if family == "bert" else out.last_hidden_state)
            out = torch.stack(list(out) if isinstance(out, tuple) else [out])
            if "Question" in ending or (ending, family) == ("Model", "distilbert"):  # a row per token: not padding's
                out = out[:, mask]
            runs[side, training] = out
        (runs[side, True] * torch.linspace(-1, 1, runs[side, True].numel()).view_as(runs[side, True])).sum().backward()
    for training in (False, True):
        assert close(runs["ours", training], runs["theirs", training])
    assert not close(runs["ours", True], runs["ours", False], 0.05)
    found = dict(ours.named_parameters())
    assert found.keys() == dict(theirs.named_parameters()).keys()
    for name, p in theirs.named_parameters():
        assert close(found[name].grad, p.grad, 1e-4), name


def test_the_first_loss_of_a_new_head_is_that_of_guessing():
    torch.manual_seed(0)
    for family in bert.FAMILIES:
        model = bert.Classifier({"model_type": family, "n_layer": 2, "n_head": 2, "n_embd": 32, "labels": LABELS})
        ids = torch.randint(1000, (64, 10))
        loss = F.cross_entropy(model.eval()(ids), torch.randint(3, (64,)))
        assert loss.item() == pytest.approx(math.log(3), abs=0.05)
        assert model.encoder is getattr(model, family)


@torch.no_grad()
def test_too_long_a_text_and_uneven_heads_are_refused():
    config = {"model_type": "bert", "n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 9, "n_positions": 5}
    model = bert.Bert(config)
    model(torch.zeros(1, 5, dtype=torch.long))
    with refused("6 tokens are more than the 5 positions"):
        model(torch.zeros(1, 6, dtype=torch.long))
    with refused("n_embd 8 must be divisible by n_head 3"):
        bert.Bert(config | {"n_head": 3})


def test_a_network_without_values_draws_none(monkeypatch):
    """On the meta device randn and normal_ import torch._refs, which takes longer than all else in opening a model."""
    def fail(*_, **__):
        raise AssertionError

    monkeypatch.setattr(torch, "randn", fail)
    monkeypatch.setattr(torch.nn.init, "normal_", fail)
    with torch.device("meta"):
        for family in bert.FAMILIES:
            bert.Classifier({"model_type": family, "n_layer": 1, "n_head": 2, "n_embd": 8})
        gpt2.GPT2({"n_layer": 1, "n_head": 2, "n_embd": 8})


def test_sizes_are_those_of_the_published_models():
    expected = {"bert-base-uncased": 109_482_240, "distilbert-base-uncased": 66_362_880, "minilm": 22_713_216}
    for name, size in bert.SIZES.items():
        with torch.device("meta"):
            assert utils.count_parameters(bert.Bert(size)) == expected[name]
    with torch.device("meta"):  # what transformers makes of its defaults
        for name, kind, config in (("bert-base-uncased", transformers.BertModel, transformers.BertConfig),
                                   ("distilbert-base-uncased", transformers.DistilBertModel,
                                    transformers.DistilBertConfig)):
            assert expected[name] == kind(config()).num_parameters()


# ---------------------------------------------------------------------------------------------- the real MiniLM
@pytest.fixture(scope="module")
def minilm():
    theirs = transformers.BertModel.from_pretrained(REAL / "minilm", attn_implementation="eager").eval()
    fast = transformers.BertTokenizerFast(str(REAL / "minilm" / "vocab.txt"))
    return bert.load_bert(str(REAL / "minilm")), theirs, fast


@pytest.mark.real("minilm")
@torch.no_grad()
def test_minilm_s_hidden_states_and_embeddings_equal_the_reference(minilm):
    (ours, tokenizer, config), theirs, fast = minilm
    for texts in ([*bert.SENTENCES.splitlines(), "", "Caf\u00e9 na\u00efve, 2024: unbelievable!"], ["long " * 300]):
        batch = fast(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        ids, mask = wordpiece.pad([tokenizer.encode(text, 256).ids for text in texts], tokenizer.pad)
        assert torch.equal(ids, batch["input_ids"]) and torch.equal(mask.long(), batch["attention_mask"])
        expected = theirs(**batch).last_hidden_state
        assert close(ours(ids, mask)[mask], expected[mask], 1e-4)
        share = mask[:, :, None].float()
        mean = F.normalize((expected * share).sum(1) / share.sum(1), dim=-1)  # as on MiniLM's model card
        vectors = bert.embed(ours, tokenizer, texts, batch_size=5)
        assert close(vectors, mean, 1e-4) and close(vectors.norm(dim=-1), torch.ones(len(texts)), 1e-5)
        assert len(texts) == 1 or not close(vectors[0], vectors[1], 0.1)


@pytest.mark.real("minilm")
def test_minilm_finds_what_is_meant(minilm):
    (model, tokenizer, _), _, _ = minilm
    texts = bert.SENTENCES.splitlines()
    vectors = bert.embed(model, tokenizer, texts)
    for query, words in ((bert.QUERY, "doctor"), ("stock market", "Shares"), ("soccer", "striker"),
                         ("a boring movie", "dull"), ("how to make pastry", "dough")):
        best = (vectors @ bert.embed(model, tokenizer, [query])[0]).argmax()
        assert words in texts[best], (query, texts[best])


# ---------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("family", bert.FAMILIES)
@torch.no_grad()
def test_files_of_other_shapes_that_hold_the_same(tmp_path, family):
    """With and without prefix, TensorFlow's words for a norm, positions as a tensor, heads of other tasks, a pickle."""
    theirs = make_theirs(family)
    save(theirs, tmp_path)
    plain = dict(weights.open_weights(tmp_path))
    ids, mask, _ = a_batch(theirs)
    expected = read(tmp_path)(ids, mask)
    old = {name.replace("norm.weight", "norm.gamma").replace("Norm.weight", "Norm.gamma")
           .replace("norm.bias", "norm.beta").replace("Norm.bias", "Norm.beta"): t for name, t in plain.items()}
    others = {"cls.predictions.bias": torch.ones(37), "vocab_projector.weight": torch.ones(3, 3),
              "qa_outputs.weight": torch.ones(2, 24), "classifier.bias": torch.ones(5)}
    positions = {"embeddings.position_ids": torch.arange(19)[None]}
    for state in ({f"{family}.{name}": t for name, t in plain.items()}, old, plain | others | positions,
                  {f"{family}.{name}": t for name, t in (old | positions).items()} | others):
        weights.save_safetensors(state, tmp_path / "model.safetensors")
        assert torch.equal(read(tmp_path)(ids, mask), expected)
    (tmp_path / "model.safetensors").unlink()
    torch.save(old, tmp_path / "pytorch_model.bin")
    assert torch.equal(read(tmp_path)(ids, mask), expected)
    torch.save({name: t.bfloat16() for name, t in plain.items()}, tmp_path / "pytorch_model.bin")
    assert close(read(tmp_path)(ids, mask), expected, 0.3)


@pytest.mark.parametrize("family", bert.FAMILIES)
@pytest.mark.parametrize("ending", bert.KINDS)
@torch.no_grad()
def test_transformers_opens_the_folders_we_write(tmp_path, family, ending):
    theirs = make_theirs(family, ending)
    ours = read(save(theirs, tmp_path / "theirs"), bert.KINDS[ending])
    bert.save_model(ours, tmp_path / "ours")
    auto = getattr(transformers, "AutoModel" + ending.removeprefix("Model"))
    again, report = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(theirs)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    a, b = again.config.to_dict(), theirs.config.to_dict()
    for name in ("architectures", "_name_or_path", "dtype", "transformers_version", "position_embedding_type"):
        a.pop(name, None), b.pop(name, None)
    assert a == b
    assert bert.read_config(tmp_path / "ours" / "config.json") == bert.read_config(tmp_path / "theirs" / "config.json")
    again = read(tmp_path / "ours", bert.KINDS[ending])
    assert all(torch.equal(p, q) for p, q in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))


@pytest.mark.parametrize("family", bert.FAMILIES)
def test_a_head_or_pooler_that_is_not_in_the_file_is_new(tmp_path, family):
    theirs = make_theirs(family, "ForQuestionAnswering")  # no pooler in there
    save(theirs, tmp_path)
    assert read(tmp_path).config["pooler"] is False
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = read(tmp_path, bert.Classifier, labels=LABELS)
        drawn.append({name: p for name, p in model.named_parameters() if name.removeprefix(f"{family}.").startswith(
            bert.HEADS)})
        assert all((p == 0).all() for name, p in drawn[-1].items() if name.endswith("bias"))
    first, again, other = ([p.clone() for name, p in d.items() if name.endswith("weight")] for d in drawn)
    assert len(first) == 2 and all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
    for name, p in theirs.named_parameters():
        assert name.startswith("qa_outputs") or torch.equal(model.state_dict()[name], p)


def test_weights_are_mapped_and_files_stay_as_they_are(tmp_path):
    model = read(save(make_theirs(), tmp_path))
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    assert (tmp_path / "model.safetensors").read_bytes() == before


# ---------------------------------------------------------------------------------------------- refusals
def config_text(family="bert", **changes):
    return json.dumps({"model_type": family, **(BERT if family == "bert" else DISTIL), **changes})


@pytest.mark.parametrize("text, words", [
    (None, ["FileNotFoundError"]), ("", ["JSONDecodeError"]), ("[" * 100_000, ["RecursionError"]),
    ("[]", ["TypeError"]), ("null", ["TypeError"]), ("{}", ["KeyError: 'model_type'"]),
    (config_text(model_type="gpt2"), ["'gpt2'", "BERT or DistilBERT"]),
    (config_text(model_type="roberta"), ["'roberta'"]), (config_text(model_type=["bert"]), ["TypeError"]),
    (config_text(hidden_act="gelu_new"), ["hidden_act", "'gelu'"]),
    (config_text(hidden_act="relu"), ["hidden_act"]), (config_text("distilbert", activation="relu"), ["activation"]),
    (config_text(position_embedding_type="relative_key"), ["position_embedding_type"]),
    (config_text(is_decoder=True), ["is_decoder"]), (config_text(add_cross_attention=True), ["add_cross_attention"]),
    (config_text(layer_norm_eps=0), ["layer_norm_eps"]), (config_text(layer_norm_eps=math.nan), ["layer_norm_eps"]),
    (config_text(id2label={"0": "a", "2": "c"}), ["KeyError: '1'"]), (config_text(id2label=[7]), ["TypeError"]),
    (config_text(pruned_heads={"0": [1]}), ["pruned_heads"]), (config_text(pooling="max"), ["pooling is neither"]),
    (config_text(id2label={str(i): "" for i in range(2**16)}), ["65,536"]),
    (" " * 10_000_001, ["more than 10,000,000"]),
    ('{"model_type": "bert"}', ["hidden_size", "None"]), ('{"model_type": "distilbert"}', ["dim", "None"]),
    *[(config_text(**{name: value}), [name]) for name in set(BERT) - {"layer_norm_eps"}
      for value in ("2" * 999, 0, -1, True, 2.0, [1], 2**24)],
    *[(config_text("distilbert", **{name: value}), [name]) for name in DISTIL for value in ("2", 0, None)],
])
def test_configs_that_are_refused(tmp_path, text, words):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with refused(path, *words):
        bert.read_config(path)


SMALL = {"model_type": "bert", "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 29, "n_positions": 12,
         "n_inner": 20}


def without(name):
    return lambda state: {other: tensor for other, tensor in state.items() if other != name}


@pytest.mark.parametrize("edit, config, words", [
    (without("embeddings.LayerNorm.bias"), {}, ["'embeddings.LayerNorm.bias' is missing in the file and (16,) in a"]),
    (without("encoder.layer.1.attention.self.query.bias"), {}, ["'encoder.layer.1.attention.self.query.bias' is miss"]),
    (lambda state: state | {"encoder.layer.2.output.dense.bias": torch.ones(3)}, {}, ["(3,) in the file and missing"]),
    (lambda state: state | {"\x1b[2J" * 99: torch.ones(3)}, {}, ["\\x1b[2J", "and missing in"]),
    (lambda state: {f"bert.bert.{name}": t for name, t in state.items()}, {}, ["and missing in"]),
    (lambda state: {f"distilbert.{name}": t for name, t in state.items()}, {}, ["and missing in"]),
    (lambda state: state | {"embeddings.LayerNorm.bias": torch.ones(17)}, {}, ["LayerNorm.bias", "(17,)", "(16,)"]),
    (dict, {"n_layer": 1}, ["encoder.layer.1", "and missing in"]),
    (lambda state: state | {"embeddings.LayerNorm.bias": torch.zeros(16, dtype=torch.long)}, {}, ["is torch.int64"]),
    (lambda state: state | {"embeddings.LayerNorm.bias": torch.zeros(16, dtype=torch.uint8).view(
        torch.float4_e2m1fn_x2)}, {}, ["is torch.float4_e2m1fn_x2 in the file and (16,) in"]),
    (dict, {"n_layer": 3}, ["39 tensors, too few for 3 layers"]), (dict, {"n_layer": 2**23}, ["too few for 8388608"]),
    (dict, {"n_embd": 32}, ["is (16,) in the file and (32,) in"]),
    (dict, {"n_types": 3}, ["token_type_embeddings", "(2, 16)", "(3, 16)"]),
    (dict, {"model_type": "distilbert", "n_types": 0}, ["missing in"]),
])
def test_weights_that_are_refused(tmp_path, edit, config, words):
    path = tmp_path / "model.safetensors"
    weights.save_safetensors(edit(bert.Bert(SMALL).state_dict()), path)
    with refused(*words, path):
        bert.read_model(path, SMALL | config)


@pytest.mark.parametrize("family", bert.FAMILIES)
def test_a_head_of_other_classes_is_made_anew_aloud_or_refused(tmp_path, capsys, family):
    save(make_theirs(family, "ForSequenceClassification"), tmp_path, vocab=True)
    model, _, config = bert.load_bert(str(tmp_path), bert.Classifier)
    assert config["labels"] == LABELS and not capsys.readouterr().out
    new, _, config = bert.load_bert(str(tmp_path), bert.Classifier, labels=["no", "yes"])
    assert config["labels"] == ["no", "yes"] and new.classifier.weight.shape == (2, 24)
    assert "its head for 3 classes is left out; a new one for 2 is made" in capsys.readouterr().out
    for name, p in model.named_parameters():
        assert name.startswith("classifier.") or torch.equal(p, new.get_parameter(name))
    bert.load_bert(str(tmp_path))
    assert "classifier" in (out := capsys.readouterr().out) and "the head of another task, is left out" in out
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b"}}))
    with refused("'classifier.bias' is (3,) in the file and (2,) in"):  # its own config and weights
        bert.load_bert(str(tmp_path), bert.Classifier)


@torch.no_grad()
def test_transformers_names_two_classes_where_a_config_names_none(tmp_path):
    theirs = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT)).eval()
    save(theirs, tmp_path, vocab=True)
    assert "id2label" not in json.loads((tmp_path / "config.json").read_text())
    ours, _, config = bert.load_bert(str(tmp_path), bert.Classifier)
    assert dict(enumerate(config["labels"])) == theirs.config.id2label
    ids, mask, types = a_batch(theirs)
    assert close(ours(ids, mask, types), theirs(**inputs(theirs, ids, mask, types)).logits)


def test_a_compiled_model_s_names_and_a_name_that_stands_twice(tmp_path):
    state = bert.Bert(SMALL).state_dict()
    path = tmp_path / "model.safetensors"
    weights.save_safetensors({f"_orig_mod.bert.{name}": t for name, t in state.items()}, path)
    assert all(torch.equal(p, state[name]) for name, p in bert.read_model(path, SMALL).state_dict().items())
    weights.save_safetensors(state | {"bert.embeddings.LayerNorm.bias": torch.ones(16)}, path)
    with refused("embeddings.LayerNorm.bias' is in it twice"):
        bert.read_model(path, SMALL)


# ---------------------------------------------------------------------------------------------- sentence-transformers
TEXTS = ["a b c", "D e f g h i j k l m n o p q r s", "b", "a A"]
MEAN = {"word_embedding_dimension": 24, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False}
DENSE = {"in_features": 24, "out_features": 7, "bias": True,
         "activation_function": "torch.nn.modules.activation.Tanh"}


def write_json(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def sentence_folder(folder, pooling=MEAN, dense=None, normalize=False, inner="", **first):
    """As sentence-transformers writes it: modules.json, and a folder for each module. Returns transformers' model."""
    kinds = ["Transformer", "Pooling"] + ["Dense"] * bool(dense) + ["Normalize"] * normalize
    modules = [{"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else inner,
                "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)]
    save(theirs := make_theirs(), folder / inner, vocab=True)
    write_json(folder / "modules.json", modules)
    write_json(folder / "1_Pooling" / "config.json", pooling)
    if dense:
        write_json(folder / "2_Dense" / "config.json", dense)
        torch.manual_seed(0)
        state = {"linear.weight": 0.1 * torch.randn(dense["out_features"], dense["in_features"])}
        state |= {"linear.bias": torch.randn(dense["out_features"])} if dense["bias"] else {}
        torch.save(state, folder / "2_Dense" / "pytorch_model.bin")
    if first:
        write_json(folder / inner / "sentence_bert_config.json", first)
    return theirs


@pytest.mark.parametrize("pooling, names, dense, more", [
    (MEAN, ["mean"], None, {}),
    (MEAN | {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, ["cls"], None,
     {"max_seq_length": 9, "do_lower_case": False, "inner": "0_BERT"}),
    (MEAN | {"pooling_mode_mean_tokens": False}, ["mean"], DENSE, {"max_seq_length": None, "normalize": True}),
    ({"embedding_dimension": 24, "pooling_mode": "max", "include_prompt": True}, ["max"],
     DENSE | {"bias": False, "activation_function": "torch.nn.modules.linear.Identity"}, {"max_seq_length": 5}),
    ({"embedding_dimension": 24, "pooling_mode": ["mean", "cls", "max"]}, ["mean", "cls", "max"],
     DENSE | {"in_features": 72}, {"normalize": True, "do_lower_case": True})])
@torch.no_grad()
def test_sentence_vectors_are_made_as_the_folder_says(tmp_path, pooling, names, dense, more):
    """Oracle: transformers' hidden states, and PyTorch's own mean, max, Linear and Tanh, a text at a time."""
    theirs = sentence_folder(tmp_path, pooling, dense, **more)
    model, tokenizer, _ = bert.open_bert(tmp_path, "x")
    vectors, expected = bert.embed(model, tokenizer, TEXTS), []
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        longest = more.get("max_seq_length") or 19
        ids = ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]]
        hidden = theirs(torch.tensor([ids])).last_hidden_state[0]
        x = torch.cat([{"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.max(0).values}[name] for name in names])
        if dense:
            layer = torch.nn.Linear(dense["in_features"], 7, dense["bias"])
            layer.load_state_dict({name.removeprefix("linear."): t for name, t in
                                   torch.load(tmp_path / "2_Dense" / "pytorch_model.bin").items()})
            x = layer(x).tanh() if "Tanh" in dense["activation_function"] else layer(x)
        expected.append(F.normalize(x, dim=-1))
    assert close(vectors, torch.stack(expected)) and not close(vectors[:1], vectors[2:3], 0.01)
    assert bert.embed(model, tokenizer, []).shape == (0, len(expected[0]))
    assert bert.open_bert(tmp_path, "x", bert.Spans)[0].encoder.config["n_embd"] == 24


def test_a_prompt_and_lower_case_come_before_the_text(tmp_path):
    """The vocabulary has small letters alone; so the tokenizer is told to keep capitals, which become [UNK]."""
    sentence_folder(tmp_path, do_lower_case=True)
    write_json(tmp_path / "config_sentence_transformers.json",
               {"__version__": {"pytorch": "2"}, "prompts": {"query": "a b: ", "other": ""},
                "default_prompt_name": "query", "similarity_fn_name": "cosine"})
    write_json(tmp_path / "tokenizer_config.json", {"do_lower_case": False})
    model, tokenizer, _ = bert.open_bert(tmp_path, "x")
    one, other = bert.embed(model, tokenizer, ["C D"]), bert.embed(model, tokenizer, ["c d"])
    model.sentences = model.sentences._replace(prompt="", lowercase=False)
    assert torch.equal(one, other) and close(one, bert.embed(model, tokenizer, ["a b: c d"]))
    assert not close(one, bert.embed(model, tokenizer, ["C D"]), 0.01)


@torch.no_grad()
def test_added_tokens_stay_whole(tmp_path):
    theirs, text = make_theirs(), "[E1] a covid b"
    save(theirs, tmp_path, vocab=True)
    fast = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    fast.add_tokens(["[E1]", "covid"])
    fast.save_pretrained(tmp_path)
    model, tokenizer, _ = bert.open_bert(tmp_path, "x")
    ids = fast(text)["input_ids"]
    assert tokenizer.encode(text).ids == ids and ids[1] == 31 and ids[3] == 32
    mean = theirs(torch.tensor([ids])).last_hidden_state.mean(1)
    assert close(bert.embed(model, tokenizer, [text]), F.normalize(mean, dim=-1))


@pytest.mark.parametrize("file, edit, words", [
    ("modules.json", [], ["its modules are"]), ("modules.json", {"a": 1}, ["TypeError"]),
    ("modules.json", [{"type": "a.Transformer", "path": ""}] * 2, ["'Transformer, Transformer'"]),
    ("modules.json", [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1_Pooling"},
                      {"type": "a.LSTM", "path": "2_LSTM"}], ["Transformer, Pooling, LSTM"]),
    ("modules.json", [{"type": "a.Transformer", "path": "../secret"}, {"type": "a.Pooling", "path": "1"}],
     ["'../secret' is not the name of a folder in it"]),
    ("1_Pooling/config.json", MEAN | {"pooling_mode_mean_sqrt_len_tokens": True},
     ["config.json of Pooling says 'pooling_mode_mean_sqrt_len_tokens': True"]),
    ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, ["KeyError: 'lasttoken'"]),
    ("1_Pooling/config.json", MEAN | {"include_prompt": False}, ["'include_prompt': False"]),
    ("1_Pooling/config.json", MEAN | {"from_the_future": 1}, ["'from_the_future': 1"]),
    ("2_Dense/config.json", DENSE | {"use_residual": True}, ["'use_residual': True"]),
    ("2_Dense/config.json", DENSE | {"activation_function": "my.module.Tanh"}, ["activation_function is 'my.module"]),
    ("2_Dense/config.json", DENSE | {"activation_function": "torch.nn.modules.activation.Mish"}, ["'Mish'"]),
    ("2_Dense/config.json", DENSE | {"out_features": 8}, ["2_Dense holds (7, 24), (7,) where 24 numbers are made 8"]),
    ("sentence_bert_config.json", {"max_seq_length": "9"}, ["max_seq_length is '9'"]),
    ("sentence_bert_config.json", {"query_length": 9}, ["sentence_bert_config.json of Transformer says 'query_len"]),
    ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, ["'transformer_task': 'fill-mask'"]),
    ("config_sentence_transformers.json", {"default_prompt_name": "q", "prompts": {}}, ["KeyError: 'q'"]),
    ("config_sentence_transformers.json", {"truncate_dim": 4}, ["'truncate_dim': 4"]),
])
def test_what_a_sentence_folder_says_and_nothing_here_computes_is_named(tmp_path, file, edit, words):
    sentence_folder(tmp_path, dense=DENSE)
    write_json(tmp_path / file, edit)
    with refused(tmp_path, "sentence-transformers", *words):
        bert.open_bert(tmp_path, "x")


# ---------------------------------------------------------------------------------------------- which model
def test_load_bert_reads_a_folder_and_refuses_what_does_not_fit(tmp_path):
    save(make_theirs(), tmp_path, vocab=True)
    model, tokenizer, config = bert.load_bert(str(tmp_path), dropout=0.3)
    assert config["name"] == str(tmp_path) and model.dropout.p == 0.3 and len(tokenizer.names) == 31
    assert "stand_in" not in config and not model.training
    with refused("model nowhere is no folder", "minilm, bert-base-uncased"):
        bert.load_bert("nowhere")
    (tmp_path / "vocab.txt").write_text((tmp_path / "vocab.txt").read_text() + "".join(f"w{i}\n" for i in range(7)))
    with refused("38 tokens", "the model 37"):
        bert.load_bert(str(tmp_path))
    (tmp_path / "vocab.txt").unlink()
    with refused("vocab.txt"):
        bert.load_bert(str(tmp_path))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server in the hub's place with a tiny model for every name, and DATA_DIR in a folder of the test."""
    served, asked = {}, []
    for name, (place, files) in bert.FILES.items():
        family = "distilbert" if name.startswith("distil") else "bert"
        save(make_theirs(family), tmp_path / "made" / name, vocab=True)
        hashes = {}
        for file in (*files, "vocab.txt"):
            served["/" + place + file] = data = (tmp_path / "made" / name / file).read_bytes()
            hashes[file] = hashlib.sha256(data).hexdigest()
        monkeypatch.setattr(bert, "SHA256", hashes.pop("vocab.txt"))  # the same for all three
        monkeypatch.setitem(bert.FILES, name, (place, hashes))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            data = served.get(self.path)
            self.send_response(200 if data else 404)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(bert, "HUB", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(utils, "DATA_DIR", tmp_path / "data")
    yield served, asked
    server.shutdown()
    server.server_close()


def test_each_name_is_downloaded_once_and_checked(hub, tmp_path):
    served, asked = hub
    for name in (None, *bert.FILES):
        model, _, config = bert.load_bert(name)
        assert config["name"] == (name or "minilm")
        assert config["model_type"] == ("distilbert" if name and name.startswith("distil") else "bert")
        assert ("transformer" in dict(model.named_children())) == (config["model_type"] == "distilbert")
    assert len(asked) == len(set(asked)) == 9 and not list(tmp_path.rglob("*.part"))
    (tmp_path / "data" / "minilm" / "model.safetensors").unlink()
    wrong = next(path for path in served if "MiniLM" in path and path.endswith("safetensors"))
    served[wrong] = served[wrong][:-1] + b"x"
    with refused("wrong hash", "model.safetensors"):
        bert.load_bert("minilm")
    assert not (tmp_path / "data" / "minilm" / "model.safetensors").exists()


def test_the_stand_in_comes_only_where_minilm_can_t_be_reached(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bert, "STAND_IN", bert.STAND_IN | {"n_layer": 1, "n_embd": 32})
    monkeypatch.setattr(bert, "STAND_IN_VOCAB", 400)
    monkeypatch.setattr(bert, "STAND_IN_STEPS", 2)
    hub[0].clear()
    for name in bert.FILES:
        with refused("could not be downloaded", "--model stand-in"):
            bert.load_bert(name)
    assert "STAND-IN" not in capsys.readouterr().out
    model, tokenizer, config = bert.load_bert()
    out = capsys.readouterr().out
    assert "could not be downloaded" in out and out.count("STAND-IN") == 1 and config["name"] == "stand-in"
    assert config["stand_in"] == 2 and len(tokenizer.names) == 400
    folder = tmp_path / "data" / "bert-stand-in"
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "vocab.txt",
                                                        "tokenizer_config.json"}
    before = (folder / "model.safetensors").read_bytes()
    assert torch.equal(bert.load_bert("stand-in")[0].embeddings.LayerNorm.weight, model.embeddings.LayerNorm.weight)
    assert (folder / "model.safetensors").read_bytes() == before  # found, not made again
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    text = "If the condition is true, the body is executed."
    ids = torch.tensor([tokenizer.encode(text).ids])
    assert ids.tolist() == [transformers.BertTokenizerFast(str(folder / "vocab.txt"))(text)["input_ids"]]
    with torch.no_grad():
        assert close(model(ids), theirs(ids).last_hidden_state)
    weights_path = tmp_path / "data" / "minilm" / "model.safetensors"
    weights_path.parent.mkdir(exist_ok=True)
    shutil.copy(tmp_path / "made" / "minilm" / "model.safetensors", weights_path)
    with refused("config.json could not be downloaded"):  # half there is no reason to fall back
        bert.load_bert()
    weights_path.write_bytes(b"damaged")
    with refused("minilm", "not the expected file"):
        bert.load_bert()


def test_hide_asks_for_15_percent_of_the_words_and_keeps_the_rest():
    tokenizer = wordpiece.WordPiece([*wordpiece.SPECIAL, *"abcdefghijklmnop"])
    ids = torch.randint(5, 21, (400, 100), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = tokenizer.cls, tokenizer.sep
    seen, asked = bert.hide(ids, tokenizer, torch.Generator().manual_seed(1))
    assert not asked[:, [0, -1]].any() and torch.equal(seen[~asked], ids[~asked])
    share = lambda what: what.float().mean().item()  # noqa: E731
    assert share(asked[:, 1:-1]) == pytest.approx(0.15, abs=0.01)
    assert share(seen[asked] == tokenizer.mask) == pytest.approx(0.8 + 0.1 / 21, abs=0.03)
    assert share(seen[asked] == ids[asked]) == pytest.approx(0.1 + 0.1 / 21, abs=0.03)


# ---------------------------------------------------------------------------------------------- as a script
def run_main(monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["bert.py", *map(str, options)])
    try:
        utils.run(bert.main)
        status = 0
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out


def test_the_script_shows_padding_and_the_nearest_sentences(tmp_path, monkeypatch, capsys):
    save(make_theirs(max_position_embeddings=60), tmp_path, vocab=True)
    (tmp_path / "lines.txt").write_text("aa b\n\nc d e\nf f\ng g\n")
    options = ["--out", tmp_path, "--model", tmp_path, "--sentences", tmp_path / "lines.txt", "--query", "c d e"]
    status, out = run_main(monkeypatch, capsys, *options)
    assert status == 0 and out.count("[CLS]") == 2
    assert float(re.search(r"alone: the first one's vectors differ by (\S+)", out)[1]) < 1e-5
    assert re.findall(r"^ +(-?\d\.\d{3})  (.*)$", out, re.MULTILINE)[0] == ("1.000", "c d e")
    assert len(re.findall(r"^ +-?\d\.\d{3}  ", out, re.MULTILINE)) == 3
    for more, words in ((["--query", " "], "--query"), (["--sentences", tmp_path / "none"], "none"),
                        (["--model", tmp_path / "no"], "no folder")):
        status, _ = run_main(monkeypatch, capsys, *options, *more)
        assert status.startswith("error: ") and words in status and "\n" not in status


def test_the_models_can_be_imported_without_argparse_requests_and_matplotlib(tmp_path):
    """By a program of somebody else: nothing comes along that a model has no need of, and nothing global changes."""
    code = """
import sys, torch, torchvision
sys.path[:0] = sys.argv[1:]
for name in [name for name in sys.modules if name.split(".")[0] in ("argparse", "requests", "matplotlib")]:
    del sys.modules[name]
threads, seed = torch.get_num_threads(), torch.initial_seed()
import bert, bert_train, bert_classify, bert_qa
from bert import Bert, Classifier, Spans
print(sorted({name.split(".")[0] for name in sys.modules} & {"argparse", "requests", "matplotlib", "train", "gpt2"}))
assert (threads, seed) == (torch.get_num_threads(), torch.initial_seed())
try:
    Bert({"model_type": "bert", "n_layer": 1, "n_head": 3, "n_embd": 10})
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, ROOT, ROOT / "06_finetune"], capture_output=True, text=True)
    assert done.stdout == "[]\nn_embd 10 must be divisible by n_head 3; change one.\n", done.stdout + done.stderr
