"""GPT-2 by hand, named as in its weight files: the network, its memory of what was read, and the writing of text.

You learn here: what OpenAI's weight files expect of a network, down to each tensor's name; why a cache of keys and
values makes writing fast; how a token is drawn from scores.

    python 06_finetune/gpt2.py    the four sizes, and a text through a random network, shape by shape

You should see: gpt2 124,439,808, gpt2-medium 354,823,168, gpt2-large 774,030,080, gpt2-xl 1,557,611,200 parameters; and
that reading a text at once and token by token gives the same scores, to 1e-6.
Writes: nothing; `save_model` writes folders that transformers opens. Left out on purpose: beam search; batches of
texts of different lengths; GPT-2's relatives with other attention or activation functions, which are refused.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from weights import bare_names, is_float, open_weights, read_json, save_safetensors

# Shapes: B batch, T time (new tokens), S positions that can be seen (S >= T), C channels (n_embd), A attention heads,
#         D channels per head (C = A * D), V vocabulary, N tokens in a text

SIZES = {  # Radford et al. 2019, table 2; the heads are in OpenAI's hparams.json
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
COMMON = {"vocab_size": 50257, "n_positions": 1024, "layer_norm_epsilon": 1e-5}  # the same in all four
PREFIX, TARGETS = "transformer.", ["c_attn"]  # before names in transformers; what makes queries and values, for LoRA


# ---------------------------------------------------------------------------------------------- the network
def normal(rows: int, columns: int, std: float) -> Tensor:
    """(rows, columns) normal random numbers; on the meta device, which has shapes alone, none.

    ## There randn first imports much of PyTorch's compiler (torch._refs). Opening a model would be mostly that.
    """
    empty = torch.empty(rows, columns)
    return empty if empty.is_meta else torch.randn(rows, columns) * std


class Conv1D(nn.Module):
    """y = x W + b: (..., n_in) -> (..., n_out).

    ## A linear layer. OpenAI wrote it as a convolution of width 1, and so its weight is (n_in, n_out), where nn.Linear
    ## has (n_out, n_in): loaded into nn.Linear, the square ones would fit, and compute nonsense.
    """

    def __init__(self, n_in: int, n_out: int, std: float = 0.02):
        super().__init__()
        self.weight = nn.Parameter(normal(n_in, n_out, std))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


class Attention(nn.Module):
    """Multi-head causal self-attention: (B, T, C) -> (B, T, C). Chapter 05 derives it step by step."""

    def __init__(self, n_embd: int, n_head: int, n_layer: int, dropout: float):
        super().__init__()
        self.n_head = n_head
        self.c_attn = Conv1D(n_embd, 3 * n_embd)  # queries, keys and values in one product
        ## Each block adds to the sum that runs through the network, twice. Starting with these weights smaller by
        ## sqrt(number of terms) keeps the sum's variance the same in a deep network (Radford et al. 2019, section 2.3).
        self.c_proj = Conv1D(n_embd, n_embd, 0.02 / math.sqrt(2 * n_layer))
        self.dropout = nn.Dropout(dropout)
        self.keep_weights, self.weights = False, None  # load_model.py turns this on to draw them

    def forward(self, x: Tensor, kv: Tensor | None, t: int) -> Tensor:
        """kv (2, B, A, n_positions, D): keys and values of the t tokens before x, to which those of x are added."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, A, T, D) each
        if kv is not None:
            kv[:, :, :, t : t + T] = torch.stack([k, v])
            k, v = kv[:, :, :, : t + T].to(q.dtype)  # (B, A, S, D) each, S = t + T
        S, p = k.shape[2], self.dropout.p if self.training else 0.0
        if q.is_cuda and not self.keep_weights and (T == S or T == 1):
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=T > 1)  # one fused kernel
        else:
            ##     y = softmax(q k^T / sqrt(D) + mask) v        (Vaswani et al. 2017, equation 1)
            ## Spelled out; on a CPU that is no slower than the fused kernel (benchmark.py --rows attention).
            future = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device).triu(S - T + 1)
            weights = torch.add(future, q @ k.mT, alpha=q.shape[-1] ** -0.5).softmax(-1)  # (B, A, T, S)
            self.weights = weights.detach() if self.keep_weights else None
            y = self.dropout(weights).to(v.dtype) @ v  # (B, A, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two layers with GELU between them, on each position alone: (B, T, C) -> (B, T, 4C) -> (B, T, C)."""

    def __init__(self, n_embd: int, n_layer: int):
        super().__init__()
        self.c_fc = Conv1D(n_embd, 4 * n_embd)
        self.c_proj = Conv1D(4 * n_embd, n_embd, 0.02 / math.sqrt(2 * n_layer))

    def forward(self, x: Tensor) -> Tensor:
        ## GELU(x) = x Phi(x), with Phi the normal distribution (Hendrycks & Gimpel 2016). GPT-2 was trained with its
        ## approximation by tanh: the exact one differs by up to 5e-4 at each unit, and every layer adds to that.
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, then MLP, each normalised before and added after: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: dict):
        super().__init__()
        C, epsilon = config["n_embd"], config["layer_norm_epsilon"]
        self.ln_1 = nn.LayerNorm(C, epsilon)
        self.attn = Attention(C, config["n_head"], config["n_layer"], config["dropout"])
        self.ln_2 = nn.LayerNorm(C, epsilon)
        self.mlp = MLP(C, config["n_layer"])
        self.dropout = nn.Dropout(config["dropout"])

    def forward(self, x: Tensor, kv: Tensor | None = None, t: int = 0) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x), kv, t))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class Cache:
    """Keys and values of all that a model (GPT2 or Llama) has read so far, for texts of up to n tokens, or n_positions.

    ## Without it the whole text would pass through all layers for every new token, though the keys and values of the
    ## earlier ones can't have changed: no position sees a later one. So they are kept, and only the new token computed.
    """

    def __init__(self, model: nn.Module, B: int = 1, n: int | None = None):
        c, w = model.config, next(model.parameters())  # the table of tokens
        heads, D = c.get("n_kv_head", c["n_head"]), c.get("head_size", c["n_embd"] // c["n_head"])
        shape = c["n_layer"], 2, B, heads, n or c["n_positions"], D
        self.kv = torch.empty(shape, dtype=w.dtype, device=w.device)  # memory is taken when it is written
        self.length = 0  # tokens read


class GPT2(nn.Module):
    """Radford et al. 2019: token ids (B, T) -> logits (B, T, V), the scores of each position's next token.

    config: vocab_size, n_positions, n_embd, n_layer, n_head, layer_norm_epsilon and, while training, dropout; n_tokens
    where later rows of the table only fill it up to a round number, and are never drawn. Weights may be float32, or
    bfloat16 for the matrices; torch.autocast outside decides in what precision they are multiplied.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = COMMON | {"dropout": 0.0} | config
        c = self.config
        if c["n_embd"] % c["n_head"]:
            raise utils.InputError(f"n_embd {c['n_embd']} must be divisible by n_head {c['n_head']}.")
        V, n, C = c["vocab_size"], c["n_positions"], c["n_embd"]
        self.wte = nn.Embedding.from_pretrained(normal(V, C, 0.02), freeze=False)  # tokens; the last layer too
        self.wpe = nn.Embedding.from_pretrained(normal(n, C, 0.01), freeze=False)  # positions
        self.h = nn.ModuleList(Block(c) for _ in range(c["n_layer"]))
        self.ln_f = nn.LayerNorm(C, c["layer_norm_epsilon"])
        self.dropout = nn.Dropout(c["dropout"])
        self.checkpointing = False

    def hidden(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """What the last block says of each token: ids (B, T) -> (B, T, C). With a cache, ids go on where it ends."""
        t, T = cache.length if cache else 0, ids.shape[1]
        n = cache.kv.shape[4] if cache else self.config["n_positions"]
        if t + T > n:
            raise utils.InputError(f"{t + T} tokens are more than the {n} positions of this model or its cache; "
                                   "shorten the text (or make block_size smaller).")
        positions = torch.arange(t, t + T, device=ids.device)
        ## The sum that runs through the network stays in float32, whatever the matrices are in: it collects 2 n_layer
        ## small terms, and bfloat16 has two to three digits.
        x = self.dropout((self.wte(ids) + self.wpe(positions)).float())  # (B, T, C)
        for i, block in enumerate(self.h):
            if self.checkpointing and self.training:
                ## Activation checkpointing (Chen et al. 2016): keep a block's input alone, and compute the inside again
                ## in the backward pass. Memory for activations falls to one block's and the other blocks' inputs; a
                ## step takes one more forward pass.
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache.kv[i] if cache else None, t)
        if cache:
            cache.length += T
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., V) from hidden (..., C), with the token embedding as last layer (Press & Wolf 2017)."""
        return F.linear(hidden, self.wte.weight)

    def scores(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Scores of what comes after ids (1, T): (V,), or fewer where the last rows of the table stand for no token."""
        return self.logits(self.hidden(ids, cache)[0, -1])[: self.config.get("n_tokens")]

    top = property(lambda self: [self.h[-1], self.ln_f])  # the last block and the norm after it

    def forward(self, ids: Tensor, cache: Cache | None = None, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), or, with targets (B, T), the mean loss in nats per token, ()."""
        if targets is None:
            return self.logits(self.hidden(ids, cache))
        ## The scores are by far the largest tensor: 50,257 numbers for each token, 0.2 GB for 1,024 of them; softmax
        ## and gradients are as large again. So they are made a window at a time, and again in the backward pass.
        parts = zip(self.hidden(ids, cache).split(1), targets.split(1))
        return sum(checkpoint(self.loss, *part, use_reentrant=False) for part in parts) / targets.numel()

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Summed loss of hidden (B, T, C) with targets (B, T), in float32: -log of what the targets were given."""
        return F.cross_entropy(self.logits(hidden).float().flatten(0, 1), targets.flatten(), reduction="sum")


def shrink(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Keep the frozen weights of all but LayerNorm in dtype: half the memory, and nothing to convert at each step.
    Returns the model.

    ## Not for weights that are trained: an update below 1/512 of its weight would be rounded away.
    """
    for layer in model.modules():
        w = layer._parameters.get("weight")
        if w is not None and not w.requires_grad and not isinstance(layer, nn.LayerNorm):
            w.data = w.data.to(dtype)
    for p in model.parameters():
        if p.dtype != dtype and not p.requires_grad:
            p.data = p.data.clone()  # the last small views of the file's memory map: now it can be closed
    return model


# ---------------------------------------------------------------------------------------------- files
# Names in transformers of the one function that MLP computes, but for rounding
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
HEADS = ("score.", "classifier.", "qa_outputs.", "multiple_choice_head.")  # of transformers' classifiers on GPT-2


def read_settings(path: Path) -> dict:
    """What a model's config.json says. Raises utils.InputError for what is no JSON."""
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise utils.InputError(f"{path} can't be read as JSON ({type(error).__name__}); a model's folder holds "
                               "config.json, model.safetensors and the tokenizer's files.") from error
    return found if isinstance(found, dict) else {}


def read_config(path: Path) -> dict:
    """Our config from a config.json of GPT-2's. Raises utils.InputError for another kind of model."""
    found = read_settings(path)

    def check(name: str, right: bool, expected: str) -> None:
        if not right:
            raise utils.InputError(f"{path}: {name} is {found.get(name)!r:.60}, and this GPT-2 needs {expected}; take "
                                   "another model.")

    check("activation_function", found.get("activation_function", "gelu_new") in TANH_GELU, "'gelu_new'")
    fixed = {"model_type": "gpt2", "scale_attn_weights": True,
             "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True}
    for name, value in fixed.items():
        check(name, found.get(name, None if name == "model_type" else value) == value, repr(value))
    config = COMMON | {name: found.get(name) for name in ("n_layer", "n_head", "n_embd")}
    config |= {name: found[name] for name in COMMON if name in found}
    for name, value in config.items():
        kinds, what = ((int, float), "") if name == "layer_norm_epsilon" else ((int,), "whole ")
        # Products of three of them have to fit into 64 bits.
        check(name, type(value) in kinds and 0 < value < 2**24, f"a positive {what}number below 2^24")
    check("n_inner", found.get("n_inner") in (None, 4 * config["n_embd"]), "4 n_embd")
    ## load.py's stand-in tells in its config how long it was trained, and what is fine-tuned from it keeps that.
    return config | {name: found[name] for name in ("stand_in",) if name in found}


def read_model(path: Path, config: dict, dtype: torch.dtype = torch.float32) -> GPT2:
    """GPT-2 with the weights of a file or folder, the matrices in dtype, all else in float32. Raises utils.InputError
    for tensors that don't fit.

    ## The network is built without memory (the meta device) and then takes the file's tensors as they are: those are
    ## views of a memory map, so that nothing is read or copied before it is used. Copied is only what has to be
    ## converted, or lies at an odd address: as all of the published file of the smallest GPT-2.
    """
    weights, layers = open_weights(path), config["n_layer"]

    def refuse(fault: str) -> None:
        raise utils.InputError(f"{path} {fault}; take the weights that belong to the config.")

    if 12 * layers > len(weights):  # 12 tensors each; asked first, as a config may claim a million layers
        refuse(f"holds {len(weights)} tensors, too few for {layers} layers")
    with torch.device("meta"):
        model = GPT2(config)
    ## transformers saves the same tensors under "transformer.", and older files hold each layer's causal mask.
    found = bare_names(weights, PREFIX, path)
    masks = {f"h.{i}.attn.{name}" for i in range(layers) for name in ("bias", "masked_bias")}
    found = {short: name for short, name in found.items() if short not in masks}
    ## lm_head.weight is wte.weight once more. A writer that leaves out doubles (safetensors' save_model) keeps the name
    ## that comes first in the alphabet.
    head = found.pop("lm_head.weight", None)
    table = found.setdefault("wte.weight", head) if head else None
    if head and table != head and (weights[head].dtype != weights[table].dtype
                                   or not torch.equal(weights[head], weights[table])):
        refuse(f"holds {head} other than {table}, and this GPT-2 has one table for both")
    for short in [short for short in found if short.startswith(HEADS)]:
        print(f"{path}: {found.pop(short)!r:.80} is another task's head, and is left out")
    needed = model.state_dict()
    for short in needed | found:
        if short not in found:
            refuse(f"lacks {short}, which a GPT-2 of {layers} layers needs")
        if short not in needed:
            refuse(f"holds {found[short]!r:.80}, for which a GPT-2 of {layers} layers has no use")
        given, shape = weights[found[short]], tuple(needed[short].shape)
        if given.shape != shape or not is_float(given):
            refuse(f"holds {found[short]}, {tuple(given.shape)} of {given.dtype}, where {shape} of floats is needed")
    model.load_state_dict({short: weights[found[short]].to(dtype if t.dim() > 1 else torch.float32)
                           for short, t in needed.items()}, assign=True)
    return model.requires_grad_().eval()


def save_model(model: GPT2, folder: Path, end: int | None) -> None:
    """Write model.safetensors and config.json as GPT-2's are, so that transformers' from_pretrained reads them too.

    end: the id of <|endoftext|>, if there is one. The vocabulary's files come from Tokenizer.save.
    """
    c = {name: value for name, value in model.config.items() if name not in ("dropout", "n_tokens")}
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new", **c,
              "n_ctx": c["n_positions"], "bos_token_id": end, "eos_token_id": end}
    save_folder(model, folder, config)


def save_folder(model: nn.Module, folder: Path, config: dict) -> None:
    """Write model.safetensors and config.json."""
    data, path = json.dumps(config, indent=1).encode(), folder / "config.json"
    if path.exists() and path.read_bytes() != data:
        path.unlink()  # so that a kill between the two writes leaves no folder with new weights and an old config
    save_safetensors(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    utils.write_atomically(path, lambda file: file.write(data))


# ---------------------------------------------------------------------------------------------- writing text
def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set each row's logits below its k-th largest to -inf: (..., V) -> (..., V) (Fan et al. 2018)."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None = None) -> int:
    """One token id from logits (V,). temperature 0 is greedy: always the likeliest."""
    if temperature < 1e-6:  # as good as 0, and dividing by it may overflow
        return logits.argmax().item()
    logits = logits / temperature  # below 1: sharper, safer; above 1: flatter, wilder
    logits = logits if top_k is None else keep_top_k(logits, top_k)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).item()


@torch.inference_mode()
def generate(model: nn.Module, ids: list[int], length: int, temperature: float = 1.0, top_k: int | None = None,
             stop: int | None = None, cache: bool = True, generator: torch.Generator | None = None) -> Iterator[int]:
    """Yield up to `length` ids with which a GPT2 or Llama continues ids (at least one), until `stop` is drawn.

    The cache changes the speed and, by rounding, the last digits of the scores.

    ## Positions end at n_positions. When they are used up, the later half of the text becomes the whole memory and
    ## moves to position 0: once in n_positions / 2 tokens, half a text is read again.
    """
    n, device = model.config["n_positions"], next(model.parameters()).device
    text, memory = list(ids), None
    start = max(0, len(text) - n)
    for _ in range(length):
        if len(text) - start > n:
            start, memory = len(text) - max(1, n // 2), None
        if cache and memory is None:
            memory = Cache(model, n=min(n, len(text) - start + length))
        new = text[start + (memory.length if cache else 0) :]
        scores = model.scores(torch.tensor([new], device=device), memory)  # (V,), or fewer
        text.append(draw(scores.float(), temperature, top_k, generator))
        if text[-1] == stop:
            return
        yield text[-1]


# ---------------------------------------------------------------------------------------------- as a script
def main() -> None:
    utils.parser(__doc__, __file__).parse_args()
    print(f"{'':12} layers  heads  channels     parameters   float32")
    for name, size in SIZES.items():
        with torch.device("meta"):
            n = utils.count_parameters(GPT2(size))
        print(f"{name:12}{size['n_layer']:7}{size['n_head']:7}{size['n_embd']:10}{n:15,}{n * 4 / 1e9:7.2f} GB")

    torch.manual_seed(0)
    small = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 1000, "n_positions": 64}
    model = GPT2(small).eval()
    B, T = 2, 10
    ids = torch.randint(1000, (B, T))
    print(f"\na small network with random weights: {B} texts of {T} tokens, {tuple(ids.shape)}")
    show = lambda name: lambda _, x, y: print(f"  {name:16}{tuple(x[0].shape)!s:14} -> {tuple(y.shape)}")  # noqa: E731
    hooks = [layer.register_forward_hook(show(name)) for name, layer in model.named_modules()
             if name and (not name.startswith("h.") or name.startswith("h.0.")) and not isinstance(layer, nn.Dropout)]
    with torch.inference_mode():
        whole = model(ids)
        for hook in hooks:
            hook.remove()
        memory = Cache(model, B)
        steps = torch.cat([model(ids[:, i : i + 1], memory) for i in range(T)], 1)
    print(f"  {'logits':16}{'':14} -> {tuple(whole.shape)}")
    print(f"\nread at once and token by token, with the cache: the scores differ by {(whole - steps).abs().max():.1e}")


if __name__ == "__main__":
    utils.run(main)
