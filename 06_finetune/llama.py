"""Llama by hand, named as in its weight files, and its relatives SmolLM2, Qwen 2.5 and Qwen 3.

You learn here: what changed in language models since GPT-2. It is little: this file has the functions of gpt2.py in the
same order, or takes them from there, and each change has a section with its paper and what it buys.

    from llama import generate, read_model; model = read_model(Path("data/smollm2"))

Left out: sliding windows, YaRN, quantised weights (refused). `save_model` writes folders that transformers opens."""
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from gpt2 import GPT2, Cache, generate as generate, read_settings, save_folder
from weights import bare_names, open_weights

# Shapes: B batch, T time (new tokens), S positions that can be seen (S >= T), C channels, D channels per head, V words,
#         A heads of queries, G heads of keys and values (A is a multiple of G), H inner channels of the MLP

NAMES = {"vocab_size": "vocab_size", "n_positions": "max_position_embeddings", "n_layer": "num_hidden_layers",
         "n_embd": "hidden_size", "n_inner": "intermediate_size", "n_head": "num_attention_heads",
         "n_kv_head": "num_key_value_heads", "head_size": "head_dim"}  # ours: what config.json calls it
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # in transformers
LLAMA3 = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]  # of the rope_type
PREFIX, TARGETS = "", ["q_proj", "v_proj"]  # as in gpt2.py


# ---------------------------------------------------------------------------------------------- RMSNorm
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight: (..., C) -> (..., C), computed in float32, returned in weight's dtype.

    ## Zhang & Sennrich 2019, equation 4: LayerNorm without the mean that it subtracts and the bias that it adds. What
    ## helps training is the fixed length. The linear layers lost their biases too; Qwen 2.5 keeps those of q, k and v.
    """

    def __init__(self, n: int, epsilon: float):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(n)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)).to(self.weight.dtype) * self.weight


# ---------------------------------------------------------------------------------------------- rotary positions
## GPT-2 learns a vector for each position, and has none for position 1,025. Su et al. 2021 (RoFormer, section 3.2) turn
## queries and keys instead: two channels are a point in a plane, turned by position * theta^(-2i / D). The product of
## points turned by m and by n depends on n - m alone. So scores tell distances, and there is nothing to learn.
def frequencies(config: dict) -> Tensor:
    """Radians per position of each plane, fast to slow: (D / 2,), float32, on the CPU."""
    D, s = config["head_size"], config["scaling"]
    f = 1 / config["theta"] ** (torch.arange(0, D, 2, device="cpu").float() / D)
    if s is None:
        return f
    ## Llama 3.1 learned 8,192 positions, then 131,072 (Grattafiori et al. 2024). For that, planes that turn less than
    ## once (low_freq_factor) in 8,192 positions got slower by factor: they would reach angles never seen. Those that
    ## turn four times (high_freq_factor) or more stay as they are, and a ramp lies between.
    turns = s["original_max_position_embeddings"] * f / (2 * torch.pi)
    stay = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return (1 - stay) * f / s["factor"] + stay * f


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the planes of x (B, heads, T, D) by cos and sin (T, D); the first half of sin has its sign changed.

    ## The paper pairs neighbours; the files' channels are ordered so that i and i + D/2 are a plane:
    ##     x_i' = x_i cos - x_(i+D/2) sin        x_(i+D/2)' = x_(i+D/2) cos + x_i sin
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


# ---------------------------------------------------------------------------------------------- grouped queries
class Attention(nn.Module):
    """Causal self-attention in which A / G heads of queries share a head of keys and values: (B, T, C) -> (B, T, C).

    ## Ainslie et al. 2023. Each new token reads the keys and values of the whole text. With G heads of them for A heads
    ## of queries, the cache is smaller by G / A: SmolLM2's takes 22.5 KiB per token in bfloat16, not 67.5. G = A is
    ## GPT-2's attention, and G = 1 that of Shazeer 2019.
    """

    def __init__(self, c: dict):
        super().__init__()
        C, D, bias = c["n_embd"], c["head_size"], c["model_type"] == "qwen2"
        self.D, q, kv = D, c["n_head"] * D, c["n_kv_head"] * D
        self.q_proj, self.k_proj = nn.Linear(C, q, bias), nn.Linear(C, kv, bias)
        self.v_proj, self.o_proj = nn.Linear(C, kv, bias), nn.Linear(q, C, False)
        ## In large models scores can grow without limit; normalised queries and keys can't (Dehghani et al. 2023).
        norm = (lambda: RMSNorm(D, c["epsilon"])) if c["model_type"] == "qwen3" else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()
        self.keep_weights, self.weights = False, None  # to draw them

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], kv: Tensor | None, t: int) -> Tensor:
        """kv (2, B, G, n, D): keys and values of the t tokens before x, to which those of x are added."""
        B, T, _ = x.shape
        q, k, v = (layer(x).view(B, T, -1, self.D) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotate(x.transpose(1, 2), *turn).to(v.dtype) for x in (self.q_norm(q), self.k_norm(k)))
        v = v.transpose(1, 2)  # (B, G, T, D), as k; q is (B, A, T, D)
        if kv is not None:
            kv[:, :, :, t : t + T] = torch.stack([k, v])  # keys as turned: nobody has to turn them again
            k, v = kv[:, :, :, : t + T].to(q.dtype)  # (B, G, S, D) each, S = t + T
        G, seen = k.shape[1], lambda: torch.ones(T, t + T, dtype=torch.bool, device=x.device).tril(t)  # (T, S)
        if self.keep_weights or q.requires_grad and q.dtype == torch.bfloat16 and not q.is_cuda:
            ## Spelled out to look at the weights, and, as in gpt2.py, where a CPU learns in bfloat16.
            weights = q.unflatten(1, (G, -1)) @ k.unsqueeze(2).mT * self.D**-0.5  # (B, G, A / G, T, S)
            weights = weights.masked_fill(~seen(), -torch.inf).softmax(-1)
            self.weights = weights.detach().flatten(1, 2) if self.keep_weights else None  # (B, A, T, S)
            y = (weights @ v.unsqueeze(2)).flatten(1, 2)  # (B, A, T, D)
        elif T == 1:  # the queries of a group are like A / G tokens that see the same, so no key is repeated
            y = F.scaled_dot_product_attention(q.view(B, G, -1, self.D), k, v).view(B, -1, 1, self.D)
        else:
            y = F.scaled_dot_product_attention(q, k, v, seen() if t else None, is_causal=not t, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


# ---------------------------------------------------------------------------------------------- SwiGLU
class MLP(nn.Module):
    """W_down (silu(W_gate x) * W_up x), with silu(x) = x sigmoid(x): (B, T, C) -> (B, T, H) -> (B, T, C).

    ## Shazeer 2020, equation 6. GPT-2's GELU bends each inner channel by itself; here one product decides how much of
    ## the other passes. With three matrices, H = 8/3 C makes as many weights as two and 4 C, and the loss is lower.
    """

    def __init__(self, C: int, H: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(C, H, False), nn.Linear(C, H, False)
        self.down_proj = nn.Linear(H, C, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# ---------------------------------------------------------------------------------------------- the network
class Block(nn.Module):
    """Attention, then MLP, each normalised before and added after: (B, T, C) -> (B, T, C)."""

    def __init__(self, c: dict):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(c["n_embd"], c["epsilon"]), Attention(c)
        self.post_attention_layernorm, self.mlp = RMSNorm(c["n_embd"], c["epsilon"]), MLP(c["n_embd"], c["n_inner"])

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], kv: Tensor | None = None, t: int = 0) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, kv, t)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Touvron et al. 2023: token ids (B, T) -> logits (B, T, V), the scores of each position's next token.

    config: what read_config returns, and n_tokens where later rows of the table only fill it up, and are never drawn.
    Weights may be float32, bfloat16 or float16; where they are not all the same, torch.autocast is needed.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = c = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding.from_pretrained(torch.empty(c["vocab_size"], c["n_embd"]), freeze=False),
            "layers": nn.ModuleList(Block(c) for _ in range(c["n_layer"])), "norm": RMSNorm(c["n_embd"], c["epsilon"])})
        self.lm_head = None if c["tied"] else nn.Linear(c["n_embd"], c["vocab_size"], False)  # large models' own
        self.frequencies = frequencies(c)  # no buffer, which model.to(torch.bfloat16) would round
        self.checkpointing = False

    def hidden(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """What the last block says of each token: ids (B, T) -> (B, T, C). With a cache, ids go on where it ends."""
        t, T, table = cache.length if cache else 0, ids.shape[1], self.model.embed_tokens.weight
        n = cache.kv.shape[4] if cache else self.config["n_positions"]
        if t + T > n:
            raise utils.InputError(f"{t + T} tokens are more than the {n} positions of this model or its cache "
                                   "(max_position_embeddings); shorten the text (or make block_size smaller).")
        if ids.device.type == "cpu" and ids.numel() and ids.max() >= len(table):
            raise utils.InputError(f"Token {ids.max()} is beyond the {len(table)} of this model (vocab_size); take the "
                                   "tokenizer of its own folder.")
        angles = torch.outer(torch.arange(t, t + T, device=ids.device), self.frequencies.to(ids.device))  # (T, D / 2)
        cos, sin = angles.cos().to(table.dtype), angles.sin().to(table.dtype)
        turn = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)  # (T, D) each, for all layers
        x = self.model.embed_tokens(ids).float()  # (B, T, C), in float32 whatever the weights are: see gpt2.py
        for i, block in enumerate(self.model.layers):
            if self.checkpointing and self.training:
                x = checkpoint(block, x, turn, use_reentrant=False)
            else:
                x = block(x, turn, cache.kv[i] if cache else None, t)
        if cache:
            cache.length += T
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., V) from hidden (..., C)."""
        return self.lm_head(hidden) if self.lm_head else F.linear(hidden, self.model.embed_tokens.weight)

    forward, loss = GPT2.forward, GPT2.loss
    top = property(lambda self: [self.model.layers[-1], self.model.norm])  # as in gpt2.py

    def scores(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """As GPT2.scores: (1, T) -> (V,). A single token is multiplied by PyTorch's own product, not oneDNN's."""
        onednn = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = onednn and ids.shape[1] > 1
        try:
            return GPT2.scores(self, ids, cache)
        finally:
            torch.backends.mkldnn.enabled = onednn


# ---------------------------------------------------------------------------------------------- files
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "attention_dropout": 0,
         "partial_rotary_factor": 1, "use_sliding_window": False}
# What changes no score: records, settings of training and drawing; any other that is false or empty does not either.
HARMLESS = (r"_\w+|\w+_token_id|\w+_version|architectures|(torch_)?dtype|initializer_range|use_cache|is_llama_config|"
            r"transformers\.js_config|max_length|do_sample|temperature|top_[kp]|id2label|label2id|tokenizer_class")


def read_config(path: Path) -> dict:
    """Our config from a config.json of Llama's or Qwen's. Raises utils.InputError for another kind of model."""
    found = {name: value for name, value in read_settings(path).items() if value is not None}

    def check(name: str, right: bool, expected: str) -> None:
        if not right:
            raise utils.InputError(f"{path}: {name!a:.60} is {found.get(name)!r:.60}, and this network needs {expected}"
                                   "; take another model.")

    kind, A, C = (found.get(name) for name in ("model_type", "num_attention_heads", "hidden_size"))
    check("model_type", kind in list(CLASSES), f"one of {', '.join(CLASSES)}")
    for name in ("rope_scaling", "rope_parameters"):  # transformers 4 writes the first and rope_theta, 5 the second
        check(name, isinstance(found.get(name, {}), dict), "an object")
        for key, value in found.pop(name, {}).items():
            key = "rope_type" if key == "type" else key
            check(key, found.setdefault(key, value) == value, f"to be as in {name}")
    width = C // A if type(A) is type(C) is int and A > 0 and C % A == 0 else None
    found = {"rope_type": "default", "rope_theta": 1e4, "tie_word_embeddings": False, "num_key_value_heads":
             A if kind == "llama" else None, "head_dim": 128 if kind == "qwen3" else width} | found
    scaling = LLAMA3 if found["rope_type"] == "llama3" else []
    fixed = FIXED | {"rope_type": "llama3" if scaling else "default"}
    for name, value in fixed.items():
        check(name, found.get(name, value) == value, repr(value))
    for name in NAMES.values():
        check(name, type(found.get(name)) is int and 0 < found[name] < 2**24, "a positive whole number below 2^24")
    for name in ("rope_theta", "rms_norm_eps", *scaling):
        check(name, type(found.get(name)) in (int, float) and 0 < found[name] < 2**63, "a positive number")
    check("num_key_value_heads", A % found["num_key_value_heads"] == 0, f"a divisor of the {A} heads")
    check("head_dim", found["head_dim"] % 2 == 0 and A * found["head_dim"] < 2**24, "an even number, or a smaller one")
    check("low_freq_factor", not scaling or found["low_freq_factor"] < found["high_freq_factor"], "a smaller number")
    check("tie_word_embeddings", type(found["tie_word_embeddings"]) is bool, "true or false")
    known = {*fixed, *NAMES.values(), *scaling, "model_type", "rope_theta", "rms_norm_eps", "tie_word_embeddings"}
    known |= {"max_window_layers", "sliding_window"} if kind != "llama" else set()  # of windows that FIXED turns off
    for name, value in found.items():
        full = name == "layer_types" and isinstance(value, list) and all(x == "full_attention" for x in value)
        check(name, full or not value or name in known or re.fullmatch(HARMLESS, name), "to know what that does")
    return {ours: found[name] for ours, name in NAMES.items()} | {
        "model_type": kind, "tied": found["tie_word_embeddings"], "theta": found["rope_theta"],
        "epsilon": found["rms_norm_eps"], "scaling": {name: found[name] for name in LLAMA3} if scaling else None}


def read_model(path: Path, config: dict | None = None, dtype: torch.dtype | None = None) -> Llama:
    """Llama with the weights of a file or folder, as views of the mapped file, or converted where dtype is another than
    its own. config: without it the folder's. Raises utils.InputError for tensors that don't fit."""
    config, weights = config or read_config(path / "config.json"), open_weights(path)
    layers, kind = config["n_layer"], f"{config['n_layer']} layers of {config['model_type']}"

    def refuse(fault: str) -> None:
        raise utils.InputError(f"{path} {fault}; take the weights that belong to the config.")

    if 9 * layers > len(weights):  # asked first, as a config may claim a million layers
        refuse(f"holds {len(weights)} tensors, too few for {layers} layers")
    with torch.device("meta"):
        model = Llama(config)
    found = {short: name for short, name in bare_names(weights, "model.", path).items()
             if not short.endswith("rotary_emb.inv_freq")}  # older files hold each layer's frequencies
    if config["tied"] and (head := found.pop("lm_head.weight", None)):
        table = found.setdefault("embed_tokens.weight", head)
        if table != head and not torch.equal(weights[head], weights[table]):
            refuse(f"holds {head} other than {table}, and tie_word_embeddings says that they are one")
    needed = {name.removeprefix("model."): (name, tuple(t.shape)) for name, t in model.state_dict().items()}
    for short in needed | found:
        if short not in found:
            refuse(f"lacks {short}, which {kind} need")
        if short not in needed:
            refuse(f"holds {found[short]!r:.80}, for which {kind} have no use")
        given, shape = weights[found[short]], needed[short][1]
        if given.shape != shape or given.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            refuse(f"holds {short}, {tuple(given.shape)} of {given.dtype}, where {shape} of 16 or 32 bits is needed")
    dtype = dtype or weights[found["embed_tokens.weight"]].dtype
    model.load_state_dict({name: weights[found[short]].to(dtype) for short, (name, _) in needed.items()}, assign=True)
    return model.requires_grad_().eval()


def save_model(model: Llama, folder: Path, end: int | None) -> None:
    """Write model.safetensors and config.json, which transformers' from_pretrained reads too; end: the id of a text's
    end, if there is one."""
    c, dtype = model.config, model.model.embed_tokens.weight.dtype
    save_folder(model, folder, {
        "architectures": [CLASSES[c["model_type"]]], "model_type": c["model_type"], "eos_token_id": end,
        **{name: c[ours] for ours, name in NAMES.items()}, "rope_theta": c["theta"], "rms_norm_eps": c["epsilon"],
        "rope_scaling": c["scaling"] and {"rope_type": "llama3", **c["scaling"]}, "tie_word_embeddings": c["tied"],
        "torch_dtype": str(dtype)[6:]})
