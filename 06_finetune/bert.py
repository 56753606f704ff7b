"""BERT by hand, named as in its weight files: the encoder of BERT, MiniLM and DistilBERT, and two heads.

You learn here: how an encoder differs from chapter 05's decoder; how texts of different lengths share a batch; what two
families of weight files call the same parts; what a head is, and what a vector for a whole sentence is good for.

    python 06_finetune/bert.py                     MiniLM (91 MB, downloaded once): sentences to vectors, nearest first
    python 06_finetune/bert.py --query "I am ill"  your own query; --sentences FILE: your own sentences, one per line
    python 06_finetune/bert.py --model stand-in    a small one, pre-trained here on Python's manual

You should see (MiniLM): a sentence gets the same vectors alone and beside a longer one, to 1e-5; of eight sentences
the one about a doctor is nearest to "I have the flu" (cosine 0.350), with which it shares no word.
Writes: under DATA_DIR, what was downloaded or pre-trained.
Left out on purpose: the heads of pre-training; relatives with other activations or positions, which are refused.
"""
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from bpe import read_own, read_text
from sentences import POOLINGS, Sentences, mean_pool, read_modules, read_sentences
from tokenizer_json import open_tokenizer
from weights import bare_names, is_float, open_weights, read_json, save_safetensors
from wordpiece import SHA256, WordPiece, pad, train_wordpiece

# Shapes: B batch, T time (tokens, padding included), C channels (n_embd), A attention heads, D channels per head
#         (C = A * D), K classes, N texts

## Devlin et al. 2019, section 3; Sanh et al. 2019, section 2. `minilm` is all-MiniLM-L6-v2: every other layer of the 12
## of Wang et al. 2020, then trained on a billion pairs of sentences, so that those of like meaning get like vectors (by
## its model card). Without that, means of vectors make a poor search.
SIZES = {
    "bert-base-uncased": {"model_type": "bert", "n_layer": 12, "n_head": 12, "n_embd": 768},
    "distilbert-base-uncased": {"model_type": "distilbert", "n_layer": 6, "n_head": 12, "n_embd": 768},
    "minilm": {"model_type": "bert", "n_layer": 6, "n_head": 12, "n_embd": 384},
}
COMMON = {"vocab_size": 30522, "n_positions": 512, "layer_norm_epsilon": 1e-12, "dropout": 0.1}  # the same in all three

## The two families call the same parts differently: role -> name. Modules get the names of the files, so that weights
## load as they are, and LoRA's targets are those that PEFT knows: `query` and `value`, `q_lin` and `v_lin`.
NAMES = {
    "bert": {"layers": "encoder.layer",
             "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
             "out": "attention.output.dense", "norm_1": "attention.output.LayerNorm",
             "wide": "intermediate.dense", "narrow": "output.dense", "norm_2": "output.LayerNorm"},
    "distilbert": {"layers": "transformer.layer",
                   "query": "attention.q_lin", "key": "attention.k_lin", "value": "attention.v_lin",
                   "out": "attention.out_lin", "norm_1": "sa_layer_norm",
                   "wide": "ffn.lin1", "narrow": "ffn.lin2", "norm_2": "output_layer_norm"},
}


# ---------------------------------------------------------------------------------------------- the network
def put(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Give parent a module under a dotted name, with plain modules for what stands between the dots."""
    *path, last = name.split(".")
    for part in path:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent._modules[part]
    parent.add_module(last, module)


def new_linear(n_in: int, n_out: int) -> nn.Linear:
    """A linear layer that begins as BERT's do."""
    layer = nn.Linear(n_in, n_out)
    if not layer.weight.is_meta:  # there are shapes alone, and normal_ would import much
        nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return layer


class Layer(nn.Module):
    """Self-attention, then two linear layers, each added to its input and then normalised: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: dict):
        super().__init__()
        self.n_head, self.names = config["n_head"], NAMES[config["model_type"]]
        C, wide, epsilon = config["n_embd"], config["n_inner"], config["layer_norm_epsilon"]
        for role in ("query", "key", "value", "out"):
            put(self, self.names[role], new_linear(C, C))
        put(self, self.names["norm_1"], nn.LayerNorm(C, epsilon))
        put(self, self.names["wide"], new_linear(C, wide))
        put(self, self.names["narrow"], new_linear(wide, C))
        put(self, self.names["norm_2"], nn.LayerNorm(C, epsilon))
        self.dropout = nn.Dropout(config["dropout"])

    def part(self, role: str) -> nn.Module:
        """The module that NAMES gives this role."""
        return self.get_submodule(self.names[role])

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """padding (B, 1, 1, T): what is added to every score of a key; 0 for a token, hugely negative for padding."""
        B, T, C = x.shape
        ## Under autocast each of the three products would convert x for itself, and keep a copy for the backward pass.
        device = x.device.type
        h = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        q, k, v = (self.part(role)(h).view(B, T, self.n_head, -1).transpose(1, 2)  # (B, A, T, D) each
                   for role in ("query", "key", "value"))
        ##     y = softmax(q k^T / sqrt(D) + padding) v        (Vaswani et al. 2017, equation 1)
        ## As in chapter 05, but for the mask: a decoder hides the future, an encoder shows all tokens to all tokens.
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, A, T, T)
        if padding is not None:
            scores = scores + padding.to(scores.dtype)
        y = self.dropout(scores.softmax(-1)).to(v.dtype) @ v  # (B, A, T, D)
        y = self.part("out")(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        if self.names is NAMES["bert"]:  # and not in DistilBERT
            y = self.dropout(y)
        x = self.part("norm_1")(x + y)
        y = self.part("narrow")(F.gelu(self.part("wide")(x)))  # GELU as it is, not GPT-2's approximation
        return self.part("norm_2")(x + self.dropout(y))


class Bert(nn.Module):
    """Devlin et al. 2019, and DistilBERT: token ids (B, T) -> hidden (B, T, C), each token in the light of all others.

    config: model_type (bert, distilbert), vocab_size, n_positions, n_embd, n_layer, n_head, layer_norm_epsilon,
    dropout; n_inner (4 n_embd if it is missing); n_types (2; 0 in DistilBERT); pooler (whether there is one).
    """

    def __init__(self, config: dict):
        super().__init__()
        distil = config["model_type"] == "distilbert"
        c = COMMON | {"n_inner": 4 * config["n_embd"], "n_types": 0 if distil else 2, "pooler": not distil} | config
        self.config, self.names, self.sentences = c, NAMES[c["model_type"]], Sentences(c["n_embd"])
        if c["n_embd"] % c["n_head"]:
            raise utils.InputError(f"n_embd {c['n_embd']} must be divisible by n_head {c['n_head']}; change one.")
        C = c["n_embd"]
        tables = {"word_embeddings": c["vocab_size"], "position_embeddings": c["n_positions"],
                  "token_type_embeddings": c["n_types"]}
        for name, rows in tables.items():
            if rows:
                table = torch.empty(rows, C)
                table = table if table.is_meta else 0.02 * torch.randn(rows, C)
                put(self, f"embeddings.{name}", nn.Embedding.from_pretrained(table, freeze=False))
        put(self, "embeddings.LayerNorm", nn.LayerNorm(C, c["layer_norm_epsilon"]))
        put(self, self.names["layers"], nn.ModuleList(Layer(c) for _ in range(c["n_layer"])))
        if c["pooler"]:
            put(self, "pooler.dense", new_linear(C, C))
        self.dropout = nn.Dropout(c["dropout"])

    def forward(self, ids: Tensor, mask: Tensor | None = None, types: Tensor | None = None,
                push: Tensor | None = None) -> Tensor:
        """Hidden (B, T, C). mask (B, T): True for tokens, False for padding. types (B, T): 0 first text, 1 second.

        push (B, T, C): added to the tokens' vectors; bert_classify.py finds what it says at a small distance from them.
        """
        e, T = self.embeddings, ids.shape[1]
        if T > self.config["n_positions"]:
            raise utils.InputError(f"{T} tokens are more than the {self.config['n_positions']} positions of this "
                                   "model; shorten the text.")
        x = e.word_embeddings(ids) + e.position_embeddings.weight[:T]  # (B, T, C)
        x = x if push is None else x + push
        if self.config["n_types"]:
            x = x + (e.token_type_embeddings.weight[0] if types is None else e.token_type_embeddings(types))
        x = self.dropout(e.LayerNorm(x.float()))
        padding = None
        if mask is not None and not mask.all():
            padding = torch.zeros(mask.shape, device=ids.device).masked_fill(~mask, torch.finfo(x.dtype).min)
            padding = padding[:, None, None]  # (B, 1, 1, T)
        for layer in self.get_submodule(self.names["layers"]):
            x = layer(x, padding)
        return x

    def pool(self, hidden: Tensor) -> Tensor:
        """(B, T, C) -> (B, C): the first token, [CLS], through one more layer where there is one.

        ## Pre-training asked BERT whether two texts follow each other, and the pooler is the layer that answered.
        """
        first = hidden[:, 0]  # (B, C)
        return self.pooler.dense(first).tanh() if self.config["pooler"] else first


# ---------------------------------------------------------------------------------------------- heads
## What pre-training leaves is an encoder. A task adds a head, one or two small layers that read its output; they start
## at random, and all of it is trained together (Devlin et al. 2019, section 3.2).
class Head(nn.Module):
    """An encoder under its family's name, as in transformers' files; what follows adds layers on top."""

    def __init__(self, config: dict):
        super().__init__()
        self.add_module(config["model_type"], Bert(config))
        self.config = self.encoder.config

    @property
    def encoder(self) -> Bert:
        """The Bert under the head, whichever name its family has."""
        return next(self.children())


class Classifier(Head):
    """One score per class for each text: ids (B, T) -> (B, K). Named as transformers' ...ForSequenceClassification.

    config: Bert's; labels, the K names of the classes, two if they are missing, as in transformers; pooling, what the
    head reads: "cls", as in transformers, or "mean", which transformers' classifiers don't have.
    """

    def __init__(self, config: dict):
        config = {"pooling": "cls", "labels": ["LABEL_0", "LABEL_1"]} | config
        super().__init__(config | {"pooler": config["model_type"] == "bert" and config["pooling"] == "cls"})
        C = self.config["n_embd"]
        if config["model_type"] == "distilbert":  # which has no pooler of its own
            self.pre_classifier = new_linear(C, C)
        self.classifier = new_linear(C, len(config["labels"]))
        self.dropout = nn.Dropout(self.config["dropout"])

    def forward(self, ids: Tensor, mask: Tensor | None = None, types: Tensor | None = None,
                push: Tensor | None = None) -> Tensor:
        hidden = self.encoder(ids, mask, types, push)
        x = self.encoder.pool(hidden) if self.config["pooling"] == "cls" else mean_pool(hidden, mask)  # (B, C)
        if self.config["model_type"] == "distilbert":
            x = self.pre_classifier(x).relu()
        return self.classifier(self.dropout(x)).float()


class Spans(Head):
    """For each token, a score for being the first of the answer, and one for being the last: (B, T) -> 2 x (B, T).

    Named as transformers' ...ForQuestionAnswering; padding and the question get scores too, which mean nothing.
    """

    def __init__(self, config: dict):
        super().__init__(config | {"pooler": False})
        self.qa_outputs = new_linear(self.config["n_embd"], 2)
        self.dropout = nn.Dropout(self.config["dropout"] if config["model_type"] == "distilbert" else 0.0)

    def forward(self, ids: Tensor, mask: Tensor | None = None, types: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.qa_outputs(self.dropout(self.encoder(ids, mask, types))).float().unbind(-1)


# ---------------------------------------------------------------------------------------------- files
# Our name -> what config.json calls it, for each family
FIELDS = {
    "bert": {"vocab_size": "vocab_size", "n_positions": "max_position_embeddings", "n_types": "type_vocab_size",
             "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
             "n_inner": "intermediate_size", "layer_norm_epsilon": "layer_norm_eps"},
    "distilbert": {"vocab_size": "vocab_size", "n_positions": "max_position_embeddings", "n_embd": "dim",
                   "n_layer": "n_layers", "n_head": "n_heads", "n_inner": "hidden_dim"},
}
# What other values of these would change, nothing here computes; "gelu_python" is "gelu", slower
FIXED = {"bert": {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False,
                  "add_cross_attention": False}, "distilbert": {"activation": "gelu"}}
DROPOUTS = {"bert": ["hidden_dropout_prob", "attention_probs_dropout_prob"],
            "distilbert": ["dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"]}
KINDS = {"Model": Bert, "ForSequenceClassification": Classifier, "ForQuestionAnswering": Spans}
FAMILIES = {"bert": "Bert", "distilbert": "DistilBert"}
# Heads of other tasks, which a file may hold besides: pre-training's, and those above.
TASKS = ("pre_classifier.", "classifier.", "qa_outputs.")
HEADS = ("cls.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.", "pooler.", *TASKS)


def read_config(path: Path) -> dict:
    """Our config from a config.json of BERT's or DistilBERT's. Raises utils.InputError for another kind of model."""
    try:
        found = read_json(path)
        family = found["model_type"]
        for name, value in (FIXED[family] | {"pruned_heads": {}}).items():
            if found.get(name, value) not in (value, None, "gelu_python" if value == "gelu" else value):
                raise ValueError(f"{name} is {found[name]!r:.60} and not {value!r}")
        config = {"model_type": family} | COMMON | {"n_types": 2 * (family == "bert")}
        for name, theirs in FIELDS[family].items():
            config[name] = value = found.get(theirs, config.get(name))
            if type(value) is not (float if name == "layer_norm_epsilon" else int) or not 0 < value < 2**24:
                raise ValueError(f"{theirs} is {value!r:.60}")
        if labels := found.get("id2label"):
            config["labels"] = [str(labels[str(i)]) for i in range(len(labels))]
        if found.get("pooling", "cls") not in ("cls", "mean") or len(config.get("labels", "")) >= 2**16:
            raise ValueError("pooling is neither cls nor mean, or id2label has 65,536 classes or more")
        return config | {name: found[name] for name in ("stand_in", "pooling") if name in found}
    except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise utils.InputError(f"{path} is no config.json of a BERT or DistilBERT that is computed here "
                               f"({type(error).__name__}: {error!s:.99}); take another model.") from error


def read_model(path: Path, config: dict, kind: type = Bert, relabel: bool = False) -> nn.Module:
    """A Bert, Classifier or Spans with the weights of a file or folder, in float32; a head that is not there is new.

    relabel: so is a Classifier's for another number of classes; a line says so, and names heads that are not used.
    Raises utils.InputError for tensors that don't fit. Nothing is copied: see gpt2.read_model.
    """
    weights, prefix, n_layer = open_weights(path), f"{config['model_type']}.", config["n_layer"]
    if 16 * n_layer > len(weights):  # 16 tensors each; asked first, as a config may claim a million layers
        raise utils.InputError(f"{path} holds {len(weights)} tensors, too few for {n_layer} layers; take the weights "
                               "that belong to the config.")
    ## The same tensor may stand under "bert.", where a head was saved with it, and BERT's own files, which come from
    ## TensorFlow, say gamma and beta for a norm's weight and bias.
    found = {name.replace(".gamma", ".weight").replace(".beta", ".bias"): weights[full]
             for name, full in bare_names(weights, prefix, path).items()}
    found.pop("embeddings.position_ids", None)  # 0, 1, 2 ...
    if kind is Bert:
        config = config | {"pooler": any(name.startswith("pooler.") for name in found)}
    with torch.device("meta"):
        model = kind(config)
    wanted = {name.removeprefix(prefix): (name, tensor.shape) for name, tensor in model.state_dict().items()}
    if kind is Classifier and relabel and (n := found.get("classifier.bias", torch.empty(0)).numel()) not in (
            0, len(config["labels"])):
        print(f"{path}: its head for {n} classes is left out; a new one for {len(config['labels'])} is made")
        found = {name: tensor for name, tensor in found.items() if not name.startswith("classifier.")}
    if others := {name.split(".")[0] for name in found.keys() - wanted.keys() if name.startswith(TASKS)}:
        print(f"{path}: {', '.join(sorted(others))}, the head of another task, is left out")
    for name in found | wanted:
        theirs = tuple(found[name].shape) if name in found else "missing"
        ours = tuple(wanted[name][1]) if name in wanted else "missing"
        theirs = found[name].dtype if theirs == ours and not is_float(found[name]) else theirs
        if theirs != ours and not ("missing" in (theirs, ours) and name.startswith(HEADS)):
            raise utils.InputError(f"{path}: {name!r:.80} is {theirs} in the file and {ours} in a model of this "
                                   "config; take the weights that belong to the config.")
    state = {}
    for name, (full, shape) in wanted.items():
        if name in found:
            state[full] = found[name].float()
        else:  # of a head
            state[full] = torch.zeros(shape) if len(shape) == 1 else 0.02 * torch.randn(shape)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_().eval()


def save_model(model: nn.Module, folder: Path) -> None:
    """Write model.safetensors and config.json so that transformers' from_pretrained reads them, and read_model too.

    The vocabulary's file comes from WordPiece.save.
    """
    c, ending = model.config, next(ending for ending, kind in KINDS.items() if kind is type(model))
    family = c["model_type"]
    config = {"architectures": [FAMILIES[family] + ending], "model_type": family, "pad_token_id": 0, **FIXED[family],
              **{theirs: c[name] for name, theirs in FIELDS[family].items()},
              **dict.fromkeys(DROPOUTS[family], c["dropout"])}
    if "labels" in c:
        config["id2label"] = dict(enumerate(c["labels"]))
        config["label2id"] = {label: i for i, label in enumerate(c["labels"])}
    if "stand_in" in c:
        config["stand_in"] = c["stand_in"]
    if c.get("pooling") == "mean" and type(model) is Classifier:  # transformers has no such head, and opens the encoder
        config |= {"architectures": [FAMILIES[family] + "Model"], "pooling": "mean"}
    data, path = json.dumps(config, indent=1).encode(), folder / "config.json"
    if path.exists() and path.read_bytes() != data:
        path.unlink()  # so that a kill between the two writes leaves no new weights with an old config
    save_safetensors(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    utils.write_atomically(path, lambda file: file.write(data))


# ---------------------------------------------------------------------------------------------- which model
HUB = "https://huggingface.co/"
## MiniLM's hashes were computed from its files. The files of the other two were never at hand where this was written:
## their hashes are those that other public projects pin for these commits. If one is wrong, the correct file is
## refused, but no wrong file is used.
FILES = {  # name: (folder on the hub, {file: sha256}); wordpiece.py's vocab.txt belongs to all three
    "minilm": ("sentence-transformers/all-MiniLM-L6-v2/resolve/main/", {
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"}),
    "bert-base-uncased": ("google-bert/bert-base-uncased/resolve/86b5e0934494bd15c9632b12f734a8a67f723594/", {
        "model.safetensors": "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3",
        "config.json": "7160e1553ad2ca51d8c1cb066be533db31826e12d173824c1bb0cb1a4f187d20"}),
    "distilbert-base-uncased": (
        "distilbert/distilbert-base-uncased/resolve/12040accade4e8a0f71eabdb258fecc2e7e948be/", {
            "model.safetensors": "5e3f1108e3cb34ee048634875d8482665b65ac713291a7e32396fb18f6ff0063",
            "config.json": "69c94b0222d5d1f4b0ad027ca7416cdafb98378cbbb8305d0bf47c9365c60c83"}),
}
# The stand-in: BERT in all but size
STAND_IN = {"model_type": "bert", "n_positions": 256, "n_layer": 4, "n_head": 4, "n_embd": 256}
STAND_IN_VOCAB, STAND_IN_STEPS = 3000, 600


def load_bert(name: str | None = None, kind: type = Bert, **options) -> tuple[nn.Module, WordPiece, dict]:
    """find_bert, and open_bert what it found: (model, tokenizer, config) by name."""
    return open_bert(*find_bert(name), kind, **options)


def open_bert(folder: Path, name: str, kind: type = Bert, labels: list[str] | None = None, dropout: float = 0.1,
              pooling: str | None = None) -> tuple[nn.Module, WordPiece, dict]:
    """(model, tokenizer, config) from a folder with config.json, weights, and tokenizer.json or vocab.txt.

    kind: Bert, Classifier or Spans. A head that the files do not hold is drawn from torch's generator. labels and
    pooling: a Classifier's; without them those in config.json, if there are any. config also has name and, for the
    stand-in and what comes from it, stand_in. Raises utils.InputError for what doesn't fit together.
    """
    modules = read_modules(folder)
    inner = modules[0][1]
    config, tokenizer = read_config(inner / "config.json"), open_tokenizer(inner)
    n, rows = len(tokenizer.vocab), config["vocab_size"]
    ## DistilBERT's vocabulary and BERT's have 30,522 lines; some models round the table up, and never use the rest.
    if not isinstance(tokenizer, WordPiece) or n > rows:
        raise utils.InputError(f"{name}: its vocabulary has {n:,} tokens, and the model {rows:,}; take vocab.txt or "
                               "tokenizer.json from where the weights are from.")
    sentences = read_sentences(folder, modules, config["n_embd"], config["n_positions"], tokenizer.max_length)
    config |= {"dropout": dropout, "name": name}
    config |= {key: value for key, value in (("labels", labels), ("pooling", pooling)) if value}
    model = read_model(inner, config, kind, labels is not None)
    if kind is Bert:
        model.sentences = sentences
    return model, tokenizer, model.config


def download_all(place: str, folder: Path, files: dict[str, str], offline: str) -> list[Path]:
    """The paths of files (name -> sha256), downloaded from place to folder where they are missing.

    Raises ConnectionError, which names `offline`, what to do without a network; utils.InputError if the first file is
    there, as a set that is half there is damaged, and no reason for a stand-in.
    """
    try:
        return [utils.download([place + file], folder / file, sha256) for file, sha256 in files.items()]
    except ConnectionError as error:
        kind = utils.InputError if (folder / next(iter(files))).exists() else ConnectionError
        raise kind(f"{error} To work offline: {offline}.") from error


def find_bert(name: str | None = None) -> tuple[Path, str]:
    """(folder, name) of a name in FILES, stand-in, or a folder; None is minilm, or the stand-in if it is out of reach.

    Raises utils.InputError for files that are not what they should be, ConnectionError for a named model that can't be
    downloaded.
    """
    if name not in (None, "stand-in", *FILES):
        if not Path(name).is_dir():
            raise utils.InputError(f"model {name} is no folder; give one with config.json, model.safetensors and "
                                   f"tokenizer.json or vocab.txt, or {', '.join(FILES)} or stand-in.")
        return Path(name), name
    if name != "stand-in":
        folder, (place, files) = utils.DATA_DIR / (name or "minilm"), FILES[name or "minilm"]
        try:
            download_all(HUB + place, folder, files | {"vocab.txt": SHA256}, "--model stand-in")
            return folder, name or "minilm"
        except ConnectionError as error:
            if name:
                raise
            print(error)
    folder = utils.DATA_DIR / "bert-stand-in"
    if not (folder / "config.json").exists():
        pretrain(folder)
    utils.stand_in_notice("a small BERT, pre-trained on Python's manual,", "MiniLM")
    return folder, "stand-in"


# ---------------------------------------------------------------------------------------------- the stand-in
def hide(ids: Tensor, tokenizer: WordPiece, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(what the network sees, which tokens it has to guess) of ids (B, T): masked language modelling.

    ## GPT-2 guesses the next token, and so may see only what comes before. BERT sees both sides, and is given words to
    ## guess by hiding them: 15 % of all. Of these, 80 % become [MASK]. But no text in use has [MASK] in it. So 10 %
    ## become a random token and 10 % stay, and any token may be a wrong one (Devlin et al. 2019, section 3.1).
    """
    draw = torch.rand(ids.shape, generator=generator)
    asked = (draw < 0.15) & (ids != tokenizer.cls) & (ids != tokenizer.sep)
    seen = ids.masked_fill(asked & (draw < 0.12), tokenizer.mask)  # 0.12 is 80 % of 0.15, 0.135 are 90 %
    others = torch.randint(len(tokenizer.names), ids.shape, generator=generator)
    return torch.where(asked & (draw >= 0.12) & (draw < 0.135), others, seen), asked


def pretrain(folder: Path) -> None:
    """Make a small BERT from nothing and write it to folder, in the files that BERT comes in."""
    text = read_text("pydocs")
    n, T, B, steps = int(0.9 * len(text)), 128, 16, STAND_IN_STEPS
    tokenizer = WordPiece(train_wordpiece(text[:n], STAND_IN_VOCAB))
    tokenizer.save(folder)  # fails now, and not after the training, where nothing can be written
    train, val = (torch.tensor(tokenizer.encode_text(part, special=False)[0]) for part in (text[:n], text[n:]))
    dtype, generator = utils.pick_dtype(torch.device("cpu")), torch.Generator().manual_seed(0)

    def guess(ids: Tensor, starts: Tensor, generator: torch.Generator) -> Tensor:  # the loss
        inner = ids[starts[:, None] + torch.arange(T - 2)]
        ids = F.pad(F.pad(inner, (1, 0), value=tokenizer.cls), (0, 1), value=tokenizer.sep)  # (B, T)
        seen, asked = hide(ids, tokenizer, generator)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            hidden = model(seen)[asked]  # (hidden tokens, C): nothing else needs scores
            logits = F.linear(hidden, model.embeddings.word_embeddings.weight, bias)
        return F.cross_entropy(logits.float(), ids[asked])

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Bert(STAND_IN | {"vocab_size": len(tokenizer.names), "dropout": 0.0, "stand_in": steps})
    bias = nn.Parameter(torch.zeros(len(tokenizer.names)))
    print(f"pre-training a BERT with {utils.count_parameters(model):,} parameters on {len(train):,} tokens of "
          f"Python's manual ({dtype})")
    optimizer = torch.optim.AdamW([*model.parameters(), bias], lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01,
                                  fused=True)
    begun = time.perf_counter()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min((step + 1) / 60, (steps - step) / steps)
        loss = guess(train, torch.randint(len(train) - T, (B,), generator=generator), generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        utils.progress(step + 1, steps, begun, f"loss {loss:.3f}", "tokens", B * T)
    with torch.no_grad():
        val_loss = guess(val, torch.arange(0, len(val) - T, T - 2), torch.Generator().manual_seed(1))
    save_model(model, folder)  # config.json comes last: a folder that has it is complete
    print(f"{time.perf_counter() - begun:.0f} s; validation loss {val_loss:.3f} nats per hidden token "
          f"(uniform {math.log(len(tokenizer.names)):.3f})\nwrote weights, config.json and vocab.txt to {folder}")


# ---------------------------------------------------------------------------------------------- sentences as vectors
def by_length(rows: list, batch_size: int) -> list[list[int]]:
    """The numbers of all rows, batch by batch.

    ## Sorted by length, a batch holds texts of a kind, and hardly any padding.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@torch.inference_mode()
def embed(model: Bert, tokenizer: WordPiece, texts: list[str], batch_size: int = 32) -> Tensor:
    """A vector of length 1 for each text: (N, C), or (N, model.sentences.size); texts are cut where the model says.

    ## The cosine of the angle between two of them says how much the texts have in common; as both have length 1, it is
    ## their dot product.
    """
    size, pooling, steps, longest, lowercase, prompt = model.sentences
    texts = ["".join(map(str.lower, prompt + text)) if lowercase else prompt + text for text in texts]
    rows = [tokenizer.encode(text, min(longest, model.config["n_positions"]), special=False).ids for text in texts]
    vectors = torch.empty(len(texts), size)
    for some in by_length(rows, batch_size):
        ids, mask = pad([rows[i] for i in some], tokenizer.pad)
        hidden = model(ids, mask)  # (B, T, C)
        x = torch.cat([POOLINGS[name](hidden, mask) for name in pooling], -1)
        for step in steps:
            x = step(x)
        vectors[some] = F.normalize(x, dim=-1)
    return vectors


SENTENCES = """The cat sleeps on the warm windowsill.
My doctor told me to stay in bed for a week.
Shares fell sharply after the central bank raised rates.
Let the dough rest for an hour before baking.
The striker scored twice in the final minutes.
All flights were cancelled because of the storm.
The laptop crashes whenever I open the browser.
The film was so dull that I left before the end."""
QUERY = "I have the flu"


def main() -> None:
    parser = utils.parser(__doc__, __file__)
    add = parser.add_argument
    add("--model", help=f"{', '.join(FILES)}, stand-in, or a folder; without it minilm, or the stand-in if that is out "
        "of reach")
    add("--query", default=QUERY, help="the sentence to look for")
    add("--sentences", help="a text file, one sentence per line; without it eight of our own")
    args = utils.parse_args(parser)
    texts = [line for line in (read_own(args.sentences) if args.sentences else SENTENCES).splitlines() if line.strip()]
    if not args.query.strip() or not texts:
        raise utils.InputError("--query and --sentences must hold some words.")
    model, tokenizer, config = load_bert(args.model)
    rows = sorted((tokenizer.encode(text, config["n_positions"], special=False).ids
                   for text in (args.query, texts[0])), key=len)  # the shorter one gets the padding
    ids, mask = pad(rows, tokenizer.pad)
    print(f"{config['name']}: two sentences in one batch, {tuple(ids.shape)}, of {mask.sum(1).tolist()} tokens:\n  "
          + "\n  ".join(" ".join(tokenizer.names[i] for i in row) for row in ids.tolist()))
    with torch.inference_mode():
        hidden, alone = model(ids, mask), model(ids[:1, : len(rows[0])])  # (2, T, C), (1, T, C)
    print(f"beside a longer sentence and alone: the first one's vectors differ by "
          f"{(hidden[0, : len(rows[0])] - alone[0]).abs().max():.1e}\n")

    ## Semantic search is no more than this: one vector for each text, and the largest dot products with the query's.
    vectors = embed(model, tokenizer, texts)  # (N, C)
    scores = vectors @ embed(model, tokenizer, [args.query])[0]  # (N,)
    print(f"nearest to {args.query!r}:")
    for score, i in zip(*(part.tolist() for part in scores.topk(min(3, len(texts))))):
        print(f"  {score:6.3f}  {texts[i]}")
    utils.stand_in_notice("a small BERT", "MiniLM" if "stand_in" in config else "")


if __name__ == "__main__":
    utils.run(main)
