"""Causal self-attention by hand: the forward pass, the backward pass, and what attention buys over counting pairs.

You learn here: the bigram model, which sees one character back; attention, which lets each position choose what to
look at; its gradient, derived line by line, without autograd; and that both agree with PyTorch's own.

    python 05_transformer/from_scratch.py

You should see (Tiny Shakespeare, 2 cores of an AMD EPYC, torch 2.15, seed 0): bigram 2.482 nats per character on the
validation part, one attention layer trained with the gradients below 2.10 after 31 s; errors against
scaled_dot_product_attention and autograd below 1e-12 (float64).
Writes: outputs/from_scratch.png. Left out on purpose: the MLP, norms, rotary positions and depth; they are train.py's.
"""

import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from load import batches, bigram_loss, load_data

# Shapes: B batch, T time, C channels (width of the model), A heads, D channels per head (C = A * D), V vocabulary


# ---------------------------------------------------------------------------------------------- one head
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal scaled dot-product attention: q, k, v (..., T, D) -> y (..., T, D) and the weights p (..., T, T).

    ## Each position asks a question (its query), offers a label (its key) and carries content (its value). The score
    ## of a pair is the dot product of question and label; softmax turns a row of scores into shares; the answer is
    ## the mix of the values in those shares.
    ##     S = Q K^T / sqrt(D)     P = softmax(S)     Y = P V          (Vaswani et al. 2017, equation 1)
    ## Why sqrt(D): the dot product of two random vectors of D unit-variance numbers has variance D. Undivided scores
    ## of that size would push softmax onto one key, where its gradient vanishes.
    """
    T, D = q.shape[-2:]
    s = q @ k.mT / math.sqrt(D)  # (..., T, T): row = who looks, column = what at
    ## The causal mask: position t may not look at t+1 and later, for those are what it has to predict. exp(-inf) is
    ## exactly 0, so the future gets no weight at all and sends back no gradient.
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    s = s.masked_fill(future, -math.inf)
    ## softmax(s) = softmax(s - m) for any m; with m the row's maximum no exp can overflow.
    e = (s - s.amax(-1, keepdim=True)).exp()
    p = e / e.sum(-1, keepdim=True)  # (..., T, T), each row sums to 1
    return p @ v, p


def attention_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a loss with respect to q, k, v, all (..., T, D), from dy = dLoss/dy (..., T, D) and the weights p.

    ## Walk the forward pass backwards. For a product A B with gradient G the rule is dA = G B^T and dB = A^T G.
    """
    dv = p.mT @ dy  # Y = P V                      (..., T, D)
    dp = dy @ v.mT  #                              (..., T, T)
    ## Softmax, within a row: dP_i/dS_j = P_i (1[i=j] - P_j). With g_i = dLoss/dP_i, the loss's derivative by S_j is
    ##     sum_i g_i P_i (1[i=j] - P_j)  =  P_j (g_j - sum_i g_i P_i)
    ## A masked weight has P_j = 0, so its score gets gradient 0: the mask needs no line of its own here.
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))  # (..., T, T)
    ds = ds / math.sqrt(q.shape[-1])
    return ds @ k, ds.mT @ q, dv  # S = Q K^T


# ---------------------------------------------------------------------------------------------- many heads
def multi_head(x: Tensor, w_qkv: Tensor, w_out: Tensor, n_head: int) -> tuple[Tensor, tuple]:
    """Multi-head causal attention: x (B, T, C), w_qkv (C, 3C), w_out (C, C) -> y (B, T, C) and what backward needs.

    ## One head computes one set of weights: it can follow the previous character or the start of the word, not both.
    ## A heads of D = C / A channels cost the same arithmetic and can follow A things (Vaswani et al. 2017, 3.2.2).
    """
    B, T, C = x.shape
    qkv = x @ w_qkv  # (B, T, 3C)
    q, k, v = qkv.view(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)  # each (B, A, T, D)
    heads, p = attention(q, k, v)  # (B, A, T, D), (B, A, T, T)
    joined = heads.transpose(1, 2).reshape(B, T, C)  # heads side by side again
    return joined @ w_out, (x, q, k, v, p, joined, w_qkv, w_out)


def multi_head_backward(dy: Tensor, cache: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """dy (B, T, C) -> dx (B, T, C), dw_qkv (C, 3C), dw_out (C, C)."""
    x, q, k, v, p, joined, w_qkv, w_out = cache
    B, T, C = x.shape
    A, D = q.shape[1], q.shape[3]
    ## A weight is used at every position of every sequence, so its gradient is summed over B and T: flatten both.
    dw_out = joined.reshape(-1, C).mT @ dy.reshape(-1, C)  # (C, C)
    dheads = (dy @ w_out.mT).view(B, T, A, D).transpose(1, 2)  # (B, A, T, D)
    dqkv = torch.stack(attention_backward(dheads, q, k, v, p))  # (3, B, A, T, D)
    dqkv = dqkv.permute(1, 3, 0, 2, 4).reshape(B, T, 3 * C)  # undo the permute of the forward pass
    return dqkv @ w_qkv.mT, x.reshape(-1, C).mT @ dqkv.reshape(-1, 3 * C), dw_out


# ---------------------------------------------------------------------------------------------- a whole small model
def init_model(n_vocab: int, block_size: int, n_embd: int) -> dict[str, Tensor]:
    """Random weights: character and position embeddings, attention, and a head that predicts the next character."""
    C = n_embd
    return {"characters": torch.randn(n_vocab, C) * 0.5, "positions": torch.randn(block_size, C) * 0.5,
            "w_qkv": torch.randn(C, 3 * C) * C**-0.5, "w_out": torch.randn(C, C) * C**-0.5,
            "head": torch.zeros(C, n_vocab)}


def forward(w: dict[str, Tensor], ids: Tensor, targets: Tensor, n_head: int) -> tuple[float, tuple]:
    """ids and targets (B, T) -> mean loss in nats, and what backward needs."""
    B, T = ids.shape
    x = w["characters"][ids] + w["positions"][:T]  # (B, T, C): attention itself has no sense of order
    y, cache = multi_head(x, w["w_qkv"], w["w_out"], n_head)
    h = x + y  # the residual path: the character itself stays visible beside what was looked up
    log_p = (h @ w["head"]).log_softmax(-1)  # (B, T, V)
    loss = -log_p.gather(2, targets[..., None]).mean()
    return loss.item(), (ids, targets, h, log_p, cache)


def backward(w: dict[str, Tensor], saved: tuple) -> dict[str, Tensor]:
    """Gradients of the mean loss with respect to every weight in w, same names and shapes."""
    ids, targets, h, log_p, cache = saved
    B, T, V = log_p.shape
    ## Cross-entropy through softmax has the plainest gradient there is: probability minus one-hot target.
    dlogits = (log_p.exp() - F.one_hot(targets, V)) / (B * T)  # (B, T, V); / (B T) because the loss is a mean
    dh = dlogits @ w["head"].mT  # (B, T, C)
    dx, dw_qkv, dw_out = multi_head_backward(dh, cache)
    dx = dx + dh  # h = x + y: the gradient flows both ways
    ## An embedding is a row picked by id. Its gradient is the sum over all places where that id stood.
    dcharacters = torch.zeros_like(w["characters"]).index_add_(0, ids.flatten(), dx.flatten(0, 1))
    dpositions = torch.zeros_like(w["positions"])
    dpositions[:T] = dx.sum(0)
    return {"characters": dcharacters, "positions": dpositions, "w_qkv": dw_qkv, "w_out": dw_out,
            "head": h.flatten(0, 1).mT @ dlogits.flatten(0, 1)}


# ---------------------------------------------------------------------------------------------- checks
def check_against_pytorch() -> dict[str, float]:
    """Largest absolute differences to scaled_dot_product_attention and to autograd, in float64."""
    torch.manual_seed(0)
    q, k, v, dy = (torch.randn(2, 3, 16, 8, dtype=torch.float64) for _ in range(4))  # (B, A, T, D)
    y, p = attention(q, k, v)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*leaves, is_causal=True)
    expected.backward(dy)
    errors = {"attention, forward": (y - expected).abs().max().item()}
    for name, mine, leaf in zip("qkv", attention_backward(dy, q, k, v, p), leaves):
        errors[f"attention, d{name}"] = (mine - leaf.grad).abs().max().item()

    w = {name: t.double() for name, t in init_model(11, 16, 24).items()}
    w["head"] = torch.randn_like(w["head"])  # a zero head would send no gradient back, and nothing would be checked
    ids, targets = torch.randint(11, (2, 4, 12))  # each (B, T)
    mine = backward(w, forward(w, ids, targets, 4)[1])
    leaves = {name: t.clone().requires_grad_() for name, t in w.items()}
    x = F.embedding(ids, leaves["characters"]) + leaves["positions"][:12]
    q, k, v = (x @ leaves["w_qkv"]).view(4, 12, 3, 4, 6).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(4, 12, 24) @ leaves["w_out"]
    F.cross_entropy(((x + y) @ leaves["head"]).flatten(0, 1), targets.flatten()).backward()
    for name in w:
        errors[f"model, d{name}"] = (mine[name] - leaves[name].grad).abs().max().item()
    return errors


def evaluate(w: dict[str, Tensor], ids: Tensor, block_size: int, n_head: int) -> float:
    """Mean loss over every character of ids but the first, in consecutive windows, the last one shorter."""
    windows = zip(ids[None, :-1].split(block_size, 1), ids[None, 1:].split(block_size, 1))  # (1, T) each
    return sum(forward(w, x, y, n_head)[0] * x.numel() for x, y in windows) / (len(ids) - 1)


def main() -> None:
    parser = utils.parser(__doc__, __file__, "seed")
    add = parser.add_argument
    add("--data", help="tinyshakespeare, pydocs or a text file; without it the first, or pydocs if out of reach")
    add("--steps", type=utils.count, default=1000, help="updates; more lower the loss a little further")
    add("--batch-size", type=utils.count, default=32, help="windows per step; larger is steadier")
    add("--block-size", type=utils.count, default=64, help="characters that attention can look back on")
    add("--n-embd", type=utils.count, default=128, help="width C")
    add("--n-head", type=utils.count, default=4, help="heads; each has n_embd / n_head channels")
    args = utils.parse_args(parser)
    if args.n_embd % args.n_head:
        raise utils.InputError(f"--n-embd {args.n_embd} must be divisible by --n-head {args.n_head}.")
    torch.manual_seed(args.seed)
    print("against PyTorch, largest absolute difference in float64:")
    for name, error in check_against_pytorch().items():
        print(f"  {name:20} {error:.1e}")

    data = load_data(args.data, args.block_size)
    V = len(data.vocab)
    ## The baseline that everything must beat looks one character back: a table of how often b follows a (load.py).
    bigram = bigram_loss(data.train, data.val, V)
    print(f"\nbigram model on {data.label}: {bigram:.4f} nats per character (uniform guessing: {math.log(V):.4f})\n")

    ## Now one layer of attention, trained with the gradients above. The optimizer is PyTorch's: Adam is chapter 04's
    ## lesson. It only needs a tensor and its gradient, and does not care who computed the gradient.
    w = init_model(V, args.block_size, args.n_embd)
    optimizer = torch.optim.Adam(w.values())
    history, begun = [], time.perf_counter()
    for step, (x, y) in zip(range(args.steps), batches(data.train, args.block_size, args.batch_size, args.seed)):
        loss, saved = forward(w, x, y, args.n_head)
        for name, gradient in backward(w, saved).items():
            w[name].grad = gradient
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / args.steps)
        optimizer.step()
        history.append({"step": step + 1, "train batches": loss, "bigram, validation": bigram})
        utils.progress(step + 1, args.steps, begun, f"loss {loss:.3f}", "steps")
    seconds = time.perf_counter() - begun
    final = evaluate(w, data.val, args.block_size, args.n_head)
    print(f"one attention layer, {sum(t.numel() for t in w.values()):,} weights: {final:.4f} nats per character after "
          f"{seconds:.0f} s of training; bigram {bigram:.4f}".ljust(79))

    utils.plot_history(args.out / "from_scratch.png", history, ["train batches", "bigram, validation"],
                       f"One layer of attention ({data.label})", y="loss, nats per character")
    print(f"wrote {args.out / 'from_scratch.png'}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
