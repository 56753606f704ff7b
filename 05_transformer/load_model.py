"""Use a trained character GPT: let it write, character by character, and look at what its attention heads look at.

You learn here: how sampling turns probabilities into text (greedy, temperature, top-p); why a cache of keys and
values makes it fast; how to read attention weights, and that the future gets none.

    python 05_transformer/load_model.py --prompt "ROMEO:" --temperature 0.8      after: python 05_transformer/train.py

You should see: text streaming at about 2,000 characters per second on one core of an AMD EPYC that ran other programs
besides (torch 2.15). train.py's generate, which has no cache, writes 93.
Writes: outputs/attention.png. Left out on purpose: beam search; top-k (06).
"""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from load import decode, encode
from train import GPT, SCRIPT, norm, rotary_tables, rotate

# Shapes: T time, C channels (n_embd), A heads, D channels per head (C = A * D), V vocabulary, S positions in the cache;
#         the batch is 1


def load_gpt(path: Path, device: torch.device | str = "cpu") -> tuple[GPT, dict]:
    """The model that train.py saved, ready to write, and the rest of its file: vocab, data, metrics.

    Raises utils.InputError where the file is missing, damaged, or another script's.
    """
    saved = utils.load_checkpoint(path, SCRIPT)
    model = GPT(**saved["config"])
    model.load_state_dict(saved["model"])
    return model.to(device).eval(), saved


# ---------------------------------------------------------------------------------------------- sampling
def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of characters that sum to probability p or more, (..., V) -> same (Holtzman et al. 2020).

    ## Most of the vocabulary is wrong at any place, each by a little. Sampled often enough, those little chances add up
    ## to a typo per line. Top-p sets all logits to -inf but those of the likeliest characters: few where the model is
    ## sure (after "q"), many where it is not (after a full stop).
    """
    values, order = logits.sort(descending=True)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # what the likelier ones sum to already; 0 for the first
    values = values.masked_fill(before >= p, -math.inf)
    return torch.empty_like(logits).scatter_(-1, order, values)


class Reader:
    """Reads a text one character at a time and remembers keys and values, so that nothing is computed twice.

    ## Without memory the whole window would pass through all layers for every new character, though the keys and values
    ## of the earlier ones can't have changed: the mask keeps them from seeing anything later. So they are kept
    ## (the KV cache), and only the new character is computed. There is one position now: matrices times vectors.
    """

    def __init__(self, model: GPT, length: int):
        """length: how many characters will be read at most."""
        self.model, self.t, A = model, 0, model.blocks[0].attention.n_head
        C = model.shift.numel()
        self.heads = 3, 1, A, 1, C // A
        self.before = torch.zeros_like(model.shift)  # (C,) embedding of the character before
        ## Finding a weight inside nested modules takes Python longer than adding two vectors: look them all up once.
        matrices = ((b.attention.qkv.weight, b.attention.out.weight, b.up.weight, b.down.weight) for b in model.blocks)
        self.layers = [(*four, model.shift.new_zeros(2, 1, A, model.block_size, C // A)) for four in matrices]
        tables = rotary_tables(length, C // A)  # (T, 1, 1, D) each
        self.cos, self.sin = (table[:, 0].to(model.shift.device) for table in tables)

    def read(self, i: int) -> Tensor:
        """Take in one character id; return the logits (V,) of the next, GPT.forward's. For where autograd is off."""
        model, t = self.model, self.t
        e = model.characters.weight[i]  # (C,)
        x = norm(torch.addcmul(e, model.shift, self.before))
        ## A ring: beyond block_size characters, the newest overwrites the oldest. The order within does not matter, for
        ## the keys carry their positions, and rotary positions only tell how far apart two of them are.
        place, known = t % model.block_size, min(t + 1, model.block_size)
        cos, sin = self.cos[t], self.sin[t]  # (1, D) each
        for w_qkv, w_out, w_up, w_down, kv in self.layers:  # kv (2, 1, A, block_size, D)
            qkv = torch.mv(w_qkv, norm(x)).view(self.heads)  # (3, 1, A, 1, D)
            qkv[:2] = rotate(norm(qkv[:2]), cos, sin)
            kv[:, :, :, place : place + 1] = qkv[1:]
            k, v = kv[:, :, :, :known].unbind()  # (1, A, S, D) each
            y = F.scaled_dot_product_attention(qkv[0], k, v)  # (1, A, 1, D)
            x = torch.addmv(x, w_out, y.view(-1))  # x + w_out y
            x = torch.addmv(x, w_down, torch.mv(w_up, norm(x)).relu_().square_())
        self.before, self.t = e, t + 1
        return torch.mv(model.head.weight, norm(x))


@torch.inference_mode()
def generate(model: GPT, ids: Tensor, length: int, temperature: float = 1.0, top_p: float | None = None,
             generator: torch.Generator | None = None) -> Iterator[int]:
    """Yield `length` new ids that continue ids (1, T), one at a time. temperature 0 is greedy: always the likeliest.

    Up to block_size characters, the cache makes no difference to train.py's generate but speed. Beyond, it forgets one
    character at a time and what it holds still knows of older ones, while there the window is all there is.
    """
    text = ids[0].tolist()
    reader = Reader(model, len(text) + length)
    for i in text[:-1]:
        reader.read(i)
    for _ in range(length):
        logits = reader.read(text[-1])  # (V,)
        if temperature < 1e-6:  # as good as 0, and dividing by it may overflow
            text.append(logits.argmax().item())
        else:
            logits = logits / temperature  # below 1: sharper, safer; above 1: flatter, wilder
            logits = logits if top_p is None else keep_top_p(logits, top_p)
            ## Of waiting times E / p_i, each E drawn from the exponential distribution, number i is the shortest with
            ## probability p_i. Such a race draws from p faster than torch.multinomial.
            p = logits.softmax(-1)
            text.append((p / torch.empty_like(p).exponential_(generator=generator)).argmax().item())
        yield text[-1]


# ---------------------------------------------------------------------------------------------- attention
@torch.inference_mode()
def attention_weights(model: GPT, ids: Tensor) -> Tensor:
    """Every head's weights for ids (1, T): (layers, A, T, T); row t is a distribution over what position t looks at."""
    for block in model.blocks:
        block.attention.keep_weights = True
    model(ids)
    return torch.cat([block.attention.weights.float() for block in model.blocks])


def main() -> None:
    parser = utils.parser(__doc__, __file__, "device", "seed")
    add = parser.add_argument
    add("--model", type=Path, default=Path(__file__).parent / "outputs" / "model.pt", help="what train.py wrote")
    add("--prompt", help="the text to continue; without it a newline, which asks for a new line")
    add("--length", type=utils.count, default=500, help="characters to write")
    add("--temperature", type=utils.number(float, "[0, inf)"), default=0.8, help="0: the likeliest; above 1: wilder")
    add("--top-p", type=utils.number(float, "(0, 1]"), help="draw from the likeliest that sum to p only")
    args = utils.parse_args(parser)
    if args.device.type == "cpu":
        torch.set_num_threads(1)  # one character is too little work to share

    model, saved = load_gpt(args.model, args.device)
    vocab = saved["vocab"]
    prompt = args.prompt if args.prompt else "\n" if "\n" in vocab else vocab[0]
    ids = encode(prompt, vocab)[None].to(args.device)  # (1, T)
    utils.stand_in_notice(saved["data"], saved["stand_in"])
    print(f"{utils.count_parameters(model):,} parameters, trained on {saved['data']}, validation loss "
          f"{saved['metrics']['val_loss']:.4f}\n")

    print(prompt, end="", flush=True)
    written, begun = [], time.perf_counter()
    generator = torch.Generator(args.device).manual_seed(args.seed)
    for i in generate(model, ids, args.length, args.temperature, args.top_p, generator):
        written.append(i)
        print(vocab[i], end="", flush=True)
    seconds = time.perf_counter() - begun
    print(f"\n\n{len(written) / seconds:,.0f} characters per second\n")

    ## The same text, read by the model in one pass, with all weights kept.
    window = torch.cat([ids, torch.tensor([written], device=args.device)], 1)[:, -model.block_size :]
    weights = attention_weights(model, window).cpu()  # (layers, A, T, T)
    assert not weights.triu(1).any(), "the causal mask leaks"
    layers, heads = weights.shape[:2]
    labels = [{"\n": "\\n", " ": "_"}.get(c, c) for c in decode(window[0, :40], vocab)]
    T = len(labels)
    figure, all_axes = utils.pyplot().subplots(layers, heads, figsize=(4 * heads, 4 * layers), squeeze=False)
    for i, axes in enumerate(all_axes.flat):
        axes.imshow(weights[i // heads, i % heads, :T, :T].numpy(), vmin=0, vmax=1)
        axes.set_title(f"layer {i // heads}, head {i % heads}")
        axes.set(xticks=range(T), yticks=range(T), xticklabels=labels, yticklabels=labels)
        axes.tick_params(labelsize=5)
        axes.grid(False)
    stand_in = ", stand-in" * bool(saved["stand_in"])
    figure.suptitle(f"Who (row) looks at what (column); dark is 0, yellow is 1 ({saved['data']}{stand_in})", y=0.91)
    utils.write_atomically(args.out / "attention.png", figure.savefig)
    print(f"\nwrote {args.out / 'attention.png'}")
    utils.stand_in_notice(saved["data"], saved["stand_in"])


if __name__ == "__main__":
    utils.run(main)
