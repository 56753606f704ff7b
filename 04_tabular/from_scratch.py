"""What stands behind four calls of PyTorch that every network for tables makes, each written out with its gradient.

You learn here: that an embedding is a one-hot row times a matrix, and logistic regression an embedding one number wide;
what dropout does to a number and to its gradient; how to write the loss so that no exp overflows; what Adam computes,
why its averages need a correction, and what the W in AdamW changed.

    python 04_tabular/from_scratch.py

You should see (Adult; one core of an AMD EPYC with AVX512-BF16, no AMX; torch 2.15; seeds 0, 1, 2): errors against
PyTorch below 1e-14 (float64); then, on the test rows, accuracy / AUC of
    always the more frequent class    .7638 / .5000
    logistic regression               .8483 ± .0002 / .9033 ± .0001 (ten epochs; solved to the end, .8520 / .9053)
    MLP with embeddings               .8586 ± .0005 / .9117 ± .0004, after a few seconds of training
Writes: outputs/from_scratch.png. Left out on purpose: numeric embeddings and ensembles; they are train.py's.
"""

import math
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as functional
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils  # noqa: E402
from load import KNOWN, Part, fit_standard, load_data, majority_baseline, roc_auc, standardise  # noqa: E402

# Shapes: N rows, B batch, F numeric columns, K category columns, V values of all category columns together, D width of
#         an embedding, I inputs (F + K * D), M hidden units


# ---------------------------------------------------------------------------------------------- embedding
def embed(table: Tensor, index: Tensor) -> Tensor:
    """Row `index` of a table (V, D), for any number of indices: (...) int64 -> (..., D).

    ## A category has no size and no order; all one can say of it is which one it is. Written as numbers that is a
    ## one-hot row h: as many places as there are values, a 1 in the place of this value, 0 in all the others. Now
    ## multiply by a matrix E (V, D):
    ##     (h E)_d = sum_v h_v E_vd = E_id,   where i is the place of the 1
    ## All terms but one are zero times something. What is left is row i of E: D numbers that stand for this value.
    ## Instead of V * D products, one row is copied.
    """
    return table[index]


def embed_backward(dy: Tensor, index: Tensor, n_values: int) -> Tensor:
    """dLoss/dtable (V, D) from dy = dLoss/dy (..., D).

    ## From y = h E follows dE = h^T dy, one outer product per place where something was looked up, summed over all of
    ## them: the one-hot column h^T puts dy into row i and zeros into all others. So row i of dE is the sum of the dy
    ## of all places that held value i; and a value that did not occur gets no gradient.
    """
    D = dy.shape[-1]
    return torch.zeros(n_values, D, dtype=dy.dtype).index_add_(0, index.flatten(), dy.reshape(-1, D))


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

    ## Its weights on one-hot columns are a matrix (V, 1). So it is an embedding with D = 1, and the K numbers that a
    ## row looks up are added: z = x w + sum_k e[i_k] + b. Each value moves the score by a fixed amount, whatever stands
    ## in the other columns.
    """
    return {"e": torch.zeros(n_values, 1), "w": torch.zeros(n_numeric), "b": torch.zeros(1)}


def logistic_forward(w: dict[str, Tensor], x: Tensor, index: Tensor, p: float = 0.0,
                     generator: torch.Generator | None = None) -> tuple[Tensor, tuple]:
    """x (B, F), index (B, K) -> logits (B,) and what backward needs. p, generator: unused, so that both models fit."""
    return x @ w["w"] + embed(w["e"], index).sum((1, 2)) + w["b"], (x, index)


def logistic_backward(w: dict[str, Tensor], dz: Tensor, saved: tuple) -> dict[str, Tensor]:
    """Gradients of all weights from dz = dLoss/dlogits (B,)."""
    x, index = saved
    dy = dz[:, None, None].expand(*index.shape, 1)  # (B, K, 1): each of the K terms of the sum gets the same
    return {"e": embed_backward(dy, index, len(w["e"])), "w": x.T @ dz, "b": dz.sum(0, keepdim=True)}


def init_mlp(n_numeric: int, n_columns: int, n_values: int, n_embd: int, hidden: int,
             generator: torch.Generator) -> dict[str, Tensor]:
    """Random weights of an MLP: an embedding, one hidden layer, one logit.

    ## The K columns share one table: column k's values follow those of the columns before it. So K lookups are one.
    """
    I, M = n_numeric + n_columns * n_embd, hidden  # noqa: E741
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "e": normal(n_values, n_embd) * 0.3,
        "w1": normal(I, M) * (2 / I) ** 0.5,  # keeps the variance through a ReLU (chapter 01)
        "b1": torch.zeros(M),
        "w2": normal(M, 1) * 0.01,  # the first probabilities are all close to a half
        "b2": torch.zeros(1),
    }


def mlp_forward(w: dict[str, Tensor], x: Tensor, index: Tensor, p: float = 0.0,
                generator: torch.Generator | None = None) -> tuple[Tensor, tuple]:
    """x (B, F), index (B, K) -> logits (B,) and what backward needs. p: dropout; 0 in evaluation.

    ##     h = relu([x, e[i_1], ..., e[i_K]] W1 + b1),      z = dropout(h) W2 + b2
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
    V, D = w["e"].shape
    de = dinputs[:, inputs.shape[1] - index.shape[1] * D :].reshape(*index.shape, D)  # (B, K, D): not the numeric ones
    return {"e": embed_backward(de, index, V), "w1": inputs.T @ da, "b1": da.sum(0), "w2": h.T @ dz, "b2": dz.sum(0)}


# ---------------------------------------------------------------------------------------------- checks
def check_against_pytorch() -> dict[str, float]:
    """Largest absolute differences to torch.nn.functional, autograd and torch.optim, in float64."""
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    difference = lambda mine, theirs: (mine - theirs).abs().max().item()  # noqa: E731
    errors = {}

    table, index, dy = normal(7, 3), torch.randint(7, (5, 4), generator=g), normal(5, 4, 3)
    leaf = table.clone().requires_grad_()
    theirs = functional.embedding(index, leaf)
    theirs.backward(dy)
    one_hot = functional.one_hot(index, 7).double()  # (5, 4, 7)
    errors["embedding"] = difference(embed(table, index), theirs)
    errors["embedding as one-hot @ matrix"] = difference(embed(table, index), one_hot @ table)
    errors["embedding, gradient"] = difference(embed_backward(dy, index, 7), leaf.grad)

    z, y = normal(1000) * 100, torch.randint(2, (1000,), generator=g).double()
    leaf = z.clone().requires_grad_()
    theirs = functional.binary_cross_entropy_with_logits(leaf, y)
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
    inputs = torch.cat([x, functional.embedding(index, leaves["e"]).flatten(1)], 1)
    h = functional.relu(inputs @ leaves["w1"] + leaves["b1"]) * saved[-1]  # the same mask
    functional.binary_cross_entropy_with_logits((h @ leaves["w2"] + leaves["b2"])[:, 0], y).backward()
    errors["MLP, all gradients"] = max(difference(mine[name], leaves[name].grad) for name in w)
    return errors


# ---------------------------------------------------------------------------------------------- training
def inputs_of(part: Part, fitted: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Standardised numbers (N, F), indices (N, K) into the one table of all columns, targets (N,)."""
    return standardise(part.numeric, fitted), part.categories + offsets, part.target


def measure(z: Tensor, y: Tensor) -> tuple[float, float, float]:
    """(loss, accuracy, AUC) of logits z (N,)."""
    return bce_with_logits(z, y)[0].item(), ((z > 0) == (y == 1)).float().mean().item(), roc_auc(z, y)


def main() -> None:
    utils.keep_memory()
    parser = utils.parser(__doc__)
    add = parser.add_argument
    add("--data", help="adult, census or a CSV file; without it Adult, or census if that is out of reach")
    add("--target", help="for a CSV file: the column to predict, which has two values")
    add("--types", nargs="+", metavar="COLUMN=TYPE", help="numeric, category or ignore, where the guess is wrong")
    add("--seed", type=int, default=0, help="decides weights, batches and what dropout zeroes")
    add("--epochs", type=int, default=10, help="passes over the training rows; the learning rate ends at zero")
    add("--batch-size", type=int, default=256, help="rows per step")
    add("--lr", type=float, default=4e-3, help="AdamW's learning rate at the start")
    add("--weight-decay", type=float, default=0.1, help="share of every weight taken per step, times the learning rate")
    add("--n-embd", type=int, default=4, help="numbers per category value, D")
    add("--hidden", type=int, default=128, help="hidden units M")
    add("--dropout", type=float, default=0.3, help="share of hidden units zeroed")
    add("--out", type=Path, default=Path(__file__).parent / "outputs", help="folder for the plot")
    args = parser.parse_args()
    utils.check(args, above_zero="epochs batch_size lr n_embd hidden", shares="dropout")
    utils.check_writable(args.out)
    utils.set_seed(args.seed)

    print("against PyTorch, largest absolute difference in float64:")
    for name, error in check_against_pytorch().items():
        print(f"  {name:32}{error:.1e}")
    z, y = torch.tensor([-100.0, 0, 10, 20, 100]), torch.zeros(1)
    print("\na row with target 0, its loss in float32:\n  logit     " + "".join(f"{v:10.0f}" for v in z))
    print("  as typed  " + "".join(f"{v:10.4g}" for v in naive_bce(z, y)))
    print("  here      " + "".join(f"{bce_with_logits(v[None], y)[0]:10.4g}" for v in z) + "\n")

    data = load_data(args.data, args.target, args.types)
    label = data.name + ", stand-in" * data.stand_in
    sizes = torch.tensor([len(values) + KNOWN for values in data.schema["values"]], dtype=torch.int64)
    offsets, V = sizes.cumsum(0) - sizes, int(sizes.sum())  # where each column's values begin in the table
    fitted = fit_standard(data.train.numeric)
    parts = [inputs_of(part, fitted, offsets) for part in data[:3]]
    (x, index, target), val, test = parts
    N, n_numeric = x.shape
    generator = torch.Generator().manual_seed(args.seed)
    models = {
        "logistic regression": (init_logistic(n_numeric, V), logistic_forward, logistic_backward),
        "MLP with embeddings": (init_mlp(n_numeric, len(sizes), V, args.n_embd, args.hidden, generator), mlp_forward,
                                mlp_backward),
    }
    history, results = [{"epoch": epoch} for epoch in range(args.epochs + 1)], {}
    steps = args.epochs * math.ceil(N / args.batch_size)
    for name, (w, forward, backward) in models.items():
        state, step, begun, spent = {}, 0, time.perf_counter(), 0.0
        for epoch in range(args.epochs + 1):
            spent += time.perf_counter() - begun
            loss, accuracy, auc = measure(forward(w, *val[:2])[0], val[2])
            history[epoch][name] = auc
            if epoch in (0, args.epochs):
                print(f"{name}, epoch {epoch:2}: validation loss {loss:.4f}, accuracy {accuracy:.2%}, AUC {auc:.4f}")
            if not math.isfinite(loss):
                raise utils.InputError(f"the loss became {loss} in epoch {epoch}; start again with a smaller --lr.")
            if epoch == args.epochs:
                break
            begun = time.perf_counter()
            for rows in torch.randperm(N, generator=generator).split(args.batch_size):  # (B,)
                z, saved = forward(w, x[rows], index[rows], args.dropout, generator)
                _, dz = bce_with_logits(z, target[rows])
                lr = args.lr * (1 - step / steps)
                adam_step(w, backward(w, dz, saved), state, lr, weight_decay=args.weight_decay)
                step += 1
        results[name] = (*measure(forward(w, *test[:2])[0], test[2]), spent)

    print(f"\n{label + ', test rows':40}    loss  accuracy     AUC")
    ## The test rows are used here, once: they chose nothing, neither the epoch nor an option.
    share = target.mean().item()
    rate = torch.full_like(test[2], math.log(share / (1 - share)))  # the same logit for every row
    print(f"{'always the more frequent class':40}{bce_with_logits(rate, test[2])[0]:8.4f}"
          f"{majority_baseline(data):10.4f}  0.5000")
    for name, (loss, accuracy, auc, spent) in results.items():
        weights = sum(t.numel() for t in models[name][0].values())
        print(f"{name:40}{loss:8.4f}{accuracy:10.4f}  {auc:.4f}   {weights:,} weights, {spent:.1f} s of training")
    if data.best_auc:
        print(f"{'best possible: the known model':48}{data.best_accuracy:10.4f}  {data.best_auc:.4f}")

    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for name, style in zip(models, ("--", "-")):
        axes[0].plot([row["epoch"] for row in history[1:]], [row[name] for row in history[1:]], style, label=name)
    axes[0].set(title=f"AUC on the validation rows ({label})", xlabel="epoch", ylabel="AUC")
    axes[0].legend()
    z = torch.linspace(-30, 30, 1201)
    axes[1].plot(z, naive_bce(z, torch.zeros(1)), lw=4, alpha=0.5, label="as typed: -log(1 - p)")
    axes[1].plot(z, z.clamp(min=0) + (-z.abs()).exp().log1p(), "--", label="without overflow")
    axes[1].set(title="Loss of a row with target 0, float32", xlabel="logit", ylabel="nats")
    axes[1].legend()
    utils.save_figure(figure, args.out / "from_scratch.png")
    print(f"\nwrote {args.out / 'from_scratch.png'}")
    if data.stand_in:
        utils.notice(f"STAND-IN: these figures are for {data.name}, not for UCI Adult.")


if __name__ == "__main__":
    utils.run(main)
