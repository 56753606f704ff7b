"""What stands behind four calls of PyTorch that every network for tables makes, each written out with its gradient.

You learn here: that an embedding is a one-hot row times a matrix, and logistic regression an embedding one number wide;
what dropout does to a number and to its gradient; how to write the loss so that no exp overflows; what Adam computes,
why its averages need a correction, and what the W in AdamW changed.

    python 04_tabular/from_scratch.py

You should see: errors against PyTorch below 1e-14 (float64); then, on the test rows of UCI Adult (three seeds), a
logistic regression with AUC .9033 ± .0001 and an MLP with .9117 ± .0004, after a few seconds on one CPU core.
Writes: outputs/from_scratch.png. Left out on purpose: numeric embeddings and ensembles; they are train.py's.
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
from load import KNOWN, add_options, fit_standard, load_data, majority_baseline, roc_auc, standardise

# Shapes: N rows, B batch, F numeric columns, L columns that are looked up, V rows of the table of embeddings, C width
#         of an embedding, I inputs of a layer (F + L * C), M hidden units


# ---------------------------------------------------------------------------------------------- embedding
def embed(table: Tensor, index: Tensor) -> Tensor:
    """Row `index` of a table (V, C), for any number of indices: (...) int64 -> (..., C).

    ## A category has no size and no order; all one can say of it is which one it is. Written as numbers that is a
    ## one-hot row h: as many places as there are values, a 1 in the place of this value, 0 in all the others. Now
    ## multiply by a matrix W (V, C):
    ##     (h W)_c = sum_v h_v W_vc = W_ic,   where i is the place of the 1
    ## All terms but one are zero times something. What is left is row i of W: C numbers that stand for this value.
    ## Instead of V * C products, one row is copied.
    """
    return table[index]


def embed_backward(dy: Tensor, index: Tensor, n_values: int) -> Tensor:
    """dLoss/dtable (V, C) from dy = dLoss/dy (..., C).

    ## From y = h W follows dW = h^T dy, one outer product per place where something was looked up, summed over all of
    ## them: the one-hot column h^T puts dy into row i and zeros into all others. So row i of dW is the sum of the dy
    ## of all places that held value i; and a value that did not occur gets no gradient.
    """
    C = dy.shape[-1]
    return torch.zeros(n_values, C, dtype=dy.dtype).index_add_(0, index.flatten(), dy.reshape(-1, C))


# ---------------------------------------------------------------------------------------------- dropout
def dropout(x: Tensor, p: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Zero each number with probability p, and enlarge the others: x -> y and the mask m, all of one shape.

    ##     y = m * x,    m = 1 / (1 - p) with probability 1 - p, else 0       (Srivastava et al. 2014)
    ## A unit that can't rely on its neighbours being there has to be of use by itself; and as every step trains another
    ## thinned network, the whole is something like their mean. Why 1 / (1 - p): the mean of m is
    ##     (1 - p) * 1 / (1 - p)  +  p * 0  =  1
    ## so that each y is x on average, and when dropout is switched off for use, nothing has to be rescaled. The
    ## original scaled the trained network instead; this is called inverted dropout. Evaluation calls no dropout.
    """
    m = (torch.rand(x.shape, generator=generator, dtype=x.dtype) >= p).to(x.dtype) / (1 - p)
    return x * m, m


def dropout_backward(dy: Tensor, m: Tensor) -> Tensor:
    """dx = m * dy: y = m x is a product with a constant. The same mask: what was not there can't have had an effect."""
    return dy * m


# ---------------------------------------------------------------------------------------------- loss
def bce_with_logits(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean binary cross-entropy in nats, (), and its gradient dz (N,), from logits z (N,) and targets y (N,), 0 or 1.

    ## The network's number z is any real number; the probability of a 1 is p = sigmoid(z) = 1 / (1 + e^-z). The loss is
    ## -log of the probability given to what came true: -log p where y = 1, and -log(1 - p) where y = 0:
    ##     l = -y log p - (1 - y) log(1 - p)
    ## Typed in like this it breaks: with z = 20, float32 rounds p to 1, and log(1 - p) is -inf. So p must not be
    ## computed on the way. With log p = -log(1 + e^-z) and log(1 - p) = log(e^-z / (1 + e^-z)) = -z - log(1 + e^-z):
    ##     l = y log(1 + e^-z) + (1 - y) (z + log(1 + e^-z))  =  z - y z + log(1 + e^-z)
    ## Now e^-z overflows for z below -88. log(1 + e^-z) = log(e^0 + e^-z) is a log of a sum of exps, and from such a
    ## sum one may take out the largest term: log(e^a + e^b) = m + log(e^(a-m) + e^(b-m)), m = max(a, b). Here m =
    ## max(0, -z) leaves 1 for the larger term and e^-|z| for the smaller one:
    ##     log(1 + e^-z) = max(0, -z) + log(1 + e^-|z|)
    ## and because z + max(0, -z) = max(z, 0),
    ##     l = max(z, 0) - y z + log(1 + e^-|z|)
    ## No exp of a positive number is left. log1p(x) is log(1 + x) that keeps an x too small to change 1.
    """
    small = (-z.abs()).exp()  # (N,) from 0 to 1
    loss = z.clamp(min=0) - y * z + small.log1p()
    ## The slope: dl/dz = 1 - y - e^-z / (1 + e^-z) = p - y. Probability minus target, as with softmax; it stays
    ## between -1 and 1 however wrong the row. Of the two ways to write p, 1 / (1 + e^-z) and e^z / (1 + e^z), each side
    ## of 0 takes the one whose exp can't overflow.
    p = torch.where(z >= 0, 1, small) / (1 + small)
    return loss.mean(), (p - y) / len(z)


def naive_bce(z: Tensor, y: Tensor) -> Tensor:
    """The formula as typed in, (N,), to see where it breaks."""
    p = 1 / (1 + (-z).exp())
    return -y * p.log() - (1 - y) * (1 - p).log()


# ---------------------------------------------------------------------------------------------- optimizers
def adam_step(weights: dict[str, Tensor], gradients: dict[str, Tensor], state: dict, lr: float, beta1: float = 0.9,
              beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0, decoupled: bool = True) -> None:
    """One step of Adam (Kingma & Ba 2015, algorithm 1), in place. state: an empty dict before the first step.

    With weight_decay and decoupled it is AdamW (Loshchilov & Hutter 2019, algorithm 2), without decoupled their "Adam
    with L2 regularisation", which is torch.optim.Adam's weight_decay.

    ## Plain gradient descent gives all weights one rate. But a weight of a common category gets a gradient in every
    ## batch and one of a rare category hardly ever: a rate that suits one is wrong for the other. Adam keeps two
    ## running averages per number:
    ##     m = beta1 m + (1 - beta1) g            of the gradient: a direction, smoothed over some ten steps
    ##     v = beta2 v + (1 - beta2) g^2          of its square: how large gradients are here, over some thousand
    ##     w = w - lr m' / (sqrt(v') + eps)
    ## A number whose gradients are small but agree has m' / sqrt(v') near 1 and moves by lr; one whose gradients change
    ## their sign all the time has m' near 0. A loss 1000 times larger scales m' and sqrt(v') alike: the steps stay as
    ## they are, but for eps, which only keeps 0 / 0 away.
    ##
    ## What are m' and v'? Both averages start at 0 and are too small at first. Written out, after t steps
    ##     m = (1 - beta1) (g_t + beta1 g_(t-1) + ... + beta1^(t-1) g_1)
    ## and those weights sum to (1 - beta1) (1 + beta1 + ... + beta1^(t-1)) = 1 - beta1^t, by the sum of a geometric
    ## series. An average has weights that sum to 1, so divide by it: m' = m / (1 - beta1^t), and v' likewise. Without,
    ## the first step would be (1 - beta1) / sqrt(1 - beta2) = 3.2 times too long.
    ##
    ## Weight decay pulls weights towards 0, so that none is large without a reason. As a penalty in the loss,
    ## weight_decay |w|^2 / 2, it adds weight_decay * w to the gradient, and Adam divides that by sqrt(v') with all the
    ## rest: weights with large gradients are hardly pulled. AdamW takes lr * weight_decay of each weight, apart from
    ## the gradient, from all of them the same share.
    """
    t = state["t"] = state.get("t", 0) + 1
    for name, w in weights.items():
        g = gradients[name]
        m, v = state.setdefault(name, (torch.zeros_like(w), torch.zeros_like(w)))
        if decoupled:
            w *= 1 - lr * weight_decay
        else:
            g = g + weight_decay * w
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).add_(g * g, alpha=1 - beta2)
        w -= lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)


# ---------------------------------------------------------------------------------------------- two models
def init_logistic(n_numeric: int, n_values: int) -> dict[str, Tensor]:
    """Logistic regression: a weight per numeric column, one per value of each category column, and a bias.

    ## Its weights on one-hot columns are a matrix (V, 1). So it is an embedding with C = 1, and the L numbers that a
    ## row looks up are added: z = x w + sum_k e[i_k] + b. Each value moves the score by a fixed amount, whatever stands
    ## in the other columns.
    """
    return {"e": torch.zeros(n_values, 1), "w": torch.zeros(n_numeric), "b": torch.zeros(1)}


def logistic_forward(w: dict[str, Tensor], x: Tensor, index: Tensor, p: float = 0.0,
                     generator: torch.Generator | None = None) -> tuple[Tensor, tuple]:
    """x (B, F), index (B, L) -> logits (B,) and what backward needs. p, generator: unused, so that both models fit."""
    return x @ w["w"] + embed(w["e"], index).sum((1, 2)) + w["b"], (x, index)


def logistic_backward(w: dict[str, Tensor], dz: Tensor, saved: tuple) -> dict[str, Tensor]:
    """Gradients of all weights from dz = dLoss/dlogits (B,)."""
    x, index = saved
    dy = dz[:, None, None].expand(*index.shape, 1)  # (B, L, 1): each of the L terms of the sum gets the same
    return {"e": embed_backward(dy, index, len(w["e"])), "w": x.T @ dz, "b": dz.sum(0, keepdim=True)}


def init_mlp(n_numeric: int, n_columns: int, n_values: int, n_embd: int, hidden: int,
             generator: torch.Generator) -> dict[str, Tensor]:
    """Random weights of an MLP: an embedding, one hidden layer, one logit.

    ## The L columns share one table: column k's values follow those of the columns before it. So L lookups are one.
    """
    inputs = n_numeric + n_columns * n_embd  # I
    shapes = (n_values, n_embd), (inputs, hidden), (hidden, 1)
    e, w1, w2 = (torch.randn(shape, generator=generator) for shape in shapes)
    return {"e": e * 0.3, "b1": torch.zeros(hidden), "b2": torch.zeros(1),
            "w1": w1 * (2 / inputs) ** 0.5,  # keeps the variance through a ReLU (chapter 01)
            "w2": w2 * 0.01}  # the first probabilities are all close to a half


def mlp_forward(w: dict[str, Tensor], x: Tensor, index: Tensor, p: float = 0.0,
                generator: torch.Generator | None = None) -> tuple[Tensor, tuple]:
    """x (B, F), index (B, L) -> logits (B,) and what backward needs. p: dropout; 0 in evaluation.

    ##     h = relu([x, e[i_1], ..., e[i_L]] W1 + b1),      z = dropout(h) W2 + b2
    ## A hidden unit sees all columns before its ReLU, and so can say "married and with a degree", which no sum can.
    """
    B = len(x)
    inputs = torch.cat([x, embed(w["e"], index).view(B, -1)], 1)  # (B, I)
    a = inputs @ w["w1"] + w["b1"]  # (B, M)
    h, m = dropout(a.clamp(min=0), p, generator)
    return (h @ w["w2"] + w["b2"])[:, 0], (inputs, index, a, h, m)


def mlp_backward(w: dict[str, Tensor], dz: Tensor, saved: tuple) -> dict[str, Tensor]:
    """Gradients of all weights from dz = dLoss/dlogits (B,): the forward pass, line by line from its end."""
    inputs, index, a, h, m = saved
    dz = dz[:, None]  # (B, 1)
    da = dropout_backward(dz @ w["w2"].T, m) * (a > 0)  # (B, M): where the ReLU gave 0, nothing comes through
    dinputs = da @ w["w1"].T  # (B, I)
    V, C = w["e"].shape
    de = dinputs[:, inputs.shape[1] - index.shape[1] * C :].reshape(*index.shape, C)  # (B, L, C): not the numeric ones
    return {"e": embed_backward(de, index, V), "w1": inputs.T @ da, "b1": da.sum(0), "w2": h.T @ dz, "b2": dz.sum(0)}


# ---------------------------------------------------------------------------------------------- checks
def check_against_pytorch() -> dict[str, float]:
    """Largest absolute differences to torch.nn.functional, autograd and torch.optim, in float64."""
    g = torch.Generator().manual_seed(0)
    errors = {}

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def difference(mine, theirs):
        return (mine - theirs).abs().max().item()

    table, index, dy = normal(7, 3), torch.randint(7, (5, 4), generator=g), normal(5, 4, 3)
    leaf = table.clone().requires_grad_()
    theirs = F.embedding(index, leaf)
    theirs.backward(dy)
    one_hot = F.one_hot(index, 7).double()  # (5, 4, 7)
    errors["embedding"] = difference(embed(table, index), theirs)
    errors["embedding as one-hot @ matrix"] = difference(embed(table, index), one_hot @ table)
    errors["embedding, gradient"] = difference(embed_backward(dy, index, 7), leaf.grad)

    z, y = normal(1000) * 100, torch.randint(2, (1000,), generator=g).double()
    leaf = z.clone().requires_grad_()
    theirs = F.binary_cross_entropy_with_logits(leaf, y)
    theirs.backward()
    loss, dz = bce_with_logits(z, y)
    errors["loss"], errors["loss, gradient"] = difference(loss, theirs), difference(dz, leaf.grad)

    for name, optimizer, decay in (("Adam", torch.optim.Adam, 0.0), ("Adam with L2", torch.optim.Adam, 0.1),
                                   ("AdamW", torch.optim.AdamW, 0.1)):
        mine, state, leaf = {"w": table.clone()}, {}, table.clone().requires_grad_()
        theirs, scale = optimizer([leaf], lr=0.01, weight_decay=decay), normal(7, 3).exp()
        for _ in range(100):  # down a bowl that is steep one way and flat another
            adam_step(mine, {"w": scale * mine["w"].cos()}, state, 0.01, weight_decay=decay,
                      decoupled=optimizer is torch.optim.AdamW)
            leaf.grad = scale * leaf.detach().cos()
            theirs.step()
        errors[f"{name}, 100 steps"] = difference(mine["w"], leaf.detach())

    w = {name: t.double() for name, t in init_mlp(3, 4, 7, 2, 16, g).items()}
    x, y = normal(5, 3), y[:5]
    z, saved = mlp_forward(w, x, index, 0.5, g)
    mine = mlp_backward(w, bce_with_logits(z, y)[1], saved)
    leaves = {name: t.clone().requires_grad_() for name, t in w.items()}
    inputs = torch.cat([x, F.embedding(index, leaves["e"]).flatten(1)], 1)
    h = F.relu(inputs @ leaves["w1"] + leaves["b1"]) * saved[-1]  # the same mask
    F.binary_cross_entropy_with_logits((h @ leaves["w2"] + leaves["b2"])[:, 0], y).backward()
    errors["MLP, all gradients"] = max(difference(mine[name], leaves[name].grad) for name in w)
    return errors


# ---------------------------------------------------------------------------------------------- training
def evaluate(z: Tensor, y: Tensor) -> tuple[float, float, float]:
    """(loss, accuracy, AUC) of logits z (N,)."""
    return bce_with_logits(z, y)[0].item(), ((z > 0) == (y == 1)).float().mean().item(), roc_auc(z, y)


def fit(model: tuple, train: tuple, val: tuple, epochs: int, batch_size: int, lr: float, weight_decay: float,
        p: float, generator: torch.Generator) -> Iterator[tuple[float, float, float]]:
    """Train model (weights, forward, backward); yield evaluate's figures before the first epoch and after each.

    train, val: numbers (N, F), indices (N, L), targets (N,). p: dropout. Raises utils.InputError for a loss of NaN."""
    (w, forward, backward), (x, index, target), state, step = model, train, {}, 0
    steps = epochs * math.ceil(len(target) / batch_size)
    yield evaluate(forward(w, *val[:2])[0], val[2])
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(target), generator=generator).split(batch_size):  # (B,)
            z, saved = forward(w, x[rows], index[rows], p, generator)
            _, dz = bce_with_logits(z, target[rows])
            adam_step(w, backward(w, dz, saved), state, lr * (1 - step / steps), weight_decay=weight_decay)
            step += 1
        figures = evaluate(forward(w, *val[:2])[0], val[2])
        if not math.isfinite(figures[0]):
            raise utils.InputError(f"the loss became {figures[0]} in epoch {epoch}; start again with a smaller lr.")
        yield figures


def draw(curves: dict[str, list[float]], label: str):
    """A figure: validation AUC after each epoch, and the loss written in two ways."""
    figure, axes = utils.pyplot().subplots(1, 2, figsize=(11, 4))
    for (name, aucs), style in zip(curves.items(), ("--", "-")):
        axes[0].plot(range(1, len(aucs)), aucs[1:], style, label=name)
    axes[0].set(title=f"AUC on the validation rows ({label})", xlabel="epoch", ylabel="AUC")
    z = torch.linspace(-30, 30, 1201)
    axes[1].plot(z, naive_bce(z, torch.zeros(1)), lw=4, alpha=0.5, label="as typed: -log(1 - p)")
    axes[1].plot(z, z.clamp(min=0) + (-z.abs()).exp().log1p(), "--", label="without overflow")
    axes[1].set(title="Loss of a row with target 0, float32", xlabel="logit", ylabel="nats")
    for a in axes:
        a.legend()
    return figure


def main() -> None:
    parser = utils.parser(__doc__, __file__, "seed")
    add_options(parser)
    add = parser.add_argument
    add("--epochs", type=utils.count, default=10, help="passes over the training rows; the learning rate ends at zero")
    add("--batch-size", type=utils.count, default=256, help="rows per step")
    add("--lr", type=utils.positive, default=4e-3, help="AdamW's learning rate at the start")
    add("--weight-decay", type=float, default=0.1, help="share of every weight taken per step, times the learning rate")
    add("--n-embd", type=utils.count, default=4, help="width of a category's embedding")
    add("--hidden", type=utils.count, default=128, help="hidden units")
    add("--dropout", type=utils.share, default=0.3, help="share of hidden units zeroed")
    args = utils.parse_args(parser)

    print("against PyTorch, largest absolute difference in float64:")
    for name, error in check_against_pytorch().items():
        print(f"  {name:32}{error:.1e}")
    z, y = torch.tensor([-100.0, 0, 10, 20, 100]), torch.zeros(1)
    print("\na row with target 0, its loss in float32:\n  logit     " + "".join(f"{v:10.0f}" for v in z))
    print("  as typed  " + "".join(f"{v:10.4g}" for v in naive_bce(z, y)))
    print("  here      " + "".join(f"{bce_with_logits(v[None], y)[0]:10.4g}" for v in z) + "\n")

    data = load_data(args.data, args.target, args.types, args.task, args.positive)
    if data.schema["task"] != "binary":
        raise utils.InputError(f"{data.schema['target']} does not have two values, and this script knows no others.")
    sizes = torch.tensor([len(values) + KNOWN for values in data.schema["values"]], dtype=torch.int64)
    offsets, V = sizes.cumsum(0) - sizes, int(sizes.sum())  # where each column's values begin in the table
    fitted, n_numeric = fit_standard(data.train.numeric), data.train.numeric.shape[1]
    train, val, test = ((standardise(part.numeric, fitted), part.categories + offsets, part.target)
                        for part in data[:3])  # (N, F), (N, L), (N,)
    generator = torch.Generator().manual_seed(args.seed)
    mlp = init_mlp(n_numeric, len(sizes), V, args.n_embd, args.hidden, generator)
    models = {"logistic regression": (init_logistic(n_numeric, V), logistic_forward, logistic_backward),
              "MLP with embeddings": (mlp, mlp_forward, mlp_backward)}
    share = data.train.target.mean().item()
    rate = torch.full_like(data.test.target, math.log(share / (1 - share)))  # the same logit for every row
    results = [f"{'always the more frequent class':40}{bce_with_logits(rate, test[2])[0]:8.4f}"
               f"{majority_baseline(data):10.4f}  0.5000"]
    curves = {}
    for name, model in models.items():
        begun = time.perf_counter()
        rows = list(fit(model, train, val, args.epochs, args.batch_size, args.lr, args.weight_decay, args.dropout,
                        generator))
        spent, curves[name] = time.perf_counter() - begun, [auc for _, _, auc in rows]
        for epoch, (loss, accuracy, auc) in ((0, rows[0]), (args.epochs, rows[-1])):
            print(f"{name}, epoch {epoch:2}: validation loss {loss:.4f}, accuracy {accuracy:.2%}, AUC {auc:.4f}")
        ## The test rows are used here, once: they chose nothing, neither the epoch nor an option.
        loss, accuracy, auc = evaluate(model[1](model[0], *test[:2])[0], test[2])
        results.append(f"{name:40}{loss:8.4f}{accuracy:10.4f}  {auc:.4f}   "
                       f"{sum(w.numel() for w in model[0].values()):,} weights, {spent:.1f} s with validation")
    if data.best_auc:
        results.append(f"{'best possible: the known model':48}{data.best_accuracy:10.4f}  {data.best_auc:.4f}")
    print(f"\n{data.label + ', test rows':40}    loss  accuracy     AUC", *results, sep="\n")
    utils.write_atomically(args.out / "from_scratch.png", draw(curves, data.label).savefig)
    print(f"\nwrote {args.out / 'from_scratch.png'}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
