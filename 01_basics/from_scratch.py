"""A neural network with nothing hidden: forward pass, loss, backward pass and update, each written out.

You learn here: what a layer computes, what the loss measures, how the chain rule finds out which way every one of
101,770 numbers should move, and that nothing else is needed to read handwriting.

    python 01_basics/from_scratch.py

You should see (MNIST, seed 0): differences to autograd below 1e-15, then 97.73 % of the test pictures correct after
3.6 s of training.
Writes: outputs/first_layer.png. Left out on purpose: autograd, nn.Module and optimizers; train.py has them.
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
from load import baselines, load_data, prepare

# Shapes: N pictures, B batch, I inputs (784 pixels), M hidden units (128), K classes (10 digits)


# ---------------------------------------------------------------------------------------------- the network
def init(sizes: tuple[int, int, int], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Weights and biases [W1 (I, M), b1 (M,), W2 (M, K), b2 (K,)] for sizes (I, M, K).

    ## Equal weights would stay equal, because every hidden unit would get the same gradient. So they start at random.
    ## Their size keeps the variance of what passes through: a sum over I inputs has I times the variance of one
    ## product, and ReLU halves it, hence sqrt(2 / I) (He et al. 2015). The last layer starts small: large random scores
    ## would be confident nonsense.
    """
    inputs, hidden, classes = sizes
    W1 = torch.randn(inputs, hidden, generator=generator, dtype=dtype) * (2 / inputs) ** 0.5
    W2 = torch.randn(hidden, classes, generator=generator, dtype=dtype) * 0.01
    return [W1, torch.zeros(hidden, dtype=dtype), W2, torch.zeros(classes, dtype=dtype)]


def forward(x: Tensor, params: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits (B, K), a score for each digit, any real number, for inputs x (B, I); and what `backward` will need.

    ##     z = x W1 + b1,   h = max(z, 0),   logits = h W2 + b2
    ## Each hidden unit is a weighted sum of all pixels. Without the max between them, two layers would be one: x W1 W2
    ## is x times a single matrix.
    """
    W1, b1, W2, b2 = params
    z = x @ W1 + b1  # (B, M)
    h = z.clamp(min=0)  # (B, M): ReLU
    return h @ W2 + b2, (x, z, h)


def cross_entropy(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss in nats, (), and the probabilities (B, K), of logits (B, K) with labels y (B,).

    ##     p_k = exp(l_k) / sum_j exp(l_j)            softmax: positive numbers that sum to 1
    ##     loss = -log p_y                            0 if sure and correct; large if sure and wrong
    ## A nat is the unit of a natural logarithm: giving the correct digit a probability of one half costs 0.69 nats.
    ## exp(90) is more than float32 can hold. Subtracting the largest logit first changes no ratio, and so no p.
    """
    shifted = logits - logits.amax(1, keepdim=True)  # (B, K)
    log_p = shifted - shifted.exp().sum(1, keepdim=True).log()  # (B, K)
    return -log_p[torch.arange(len(y)), y].mean(), log_p.exp()


def backward(p: Tensor, y: Tensor, params: list[Tensor], cache: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the mean loss with respect to [W1, b1, W2, b2], each of its parameter's shape.

    ## The chain rule, from the loss back to the weights. A gradient has the shape of what it belongs to, and says how
    ## much the loss grows per unit of growth there.
    """
    _, _, W2, _ = params
    x, z, h = cache
    ##     d loss / d logits = (p - onehot(y)) / B
    ## One picture's loss is log(sum_j exp(l_j)) - l_y. Its slope in l_k is exp(l_k) / sum_j exp(l_j) = p_k, less 1
    ## where k = y: what was said, minus what is correct. The mean over the batch divides by B.
    d_logits = p.clone()  # (B, K)
    d_logits[torch.arange(len(y)), y] -= 1
    d_logits /= len(y)
    ## logits = h W2 + b2. W2[m, k] is multiplied by h[b, m] in each row b: its gradient is the sum of their products.
    dW2, db2 = h.T @ d_logits, d_logits.sum(0)  # (M, K), (K,)
    ## h[b, m] enters every score k with weight W2[m, k], so it collects what comes back along each of them.
    dh = d_logits @ W2.T  # (B, M)
    ## ReLU lets the gradient through where it let the value through, and nothing where it put a zero.
    dz = dh * (z > 0)  # (B, M)
    dW1, db1 = x.T @ dz, dz.sum(0)  # (I, M), (M,)
    return [dW1, db1, dW2, db2]


# ---------------------------------------------------------------------------------------------- checks
def check_against_pytorch() -> dict[str, float]:
    """Largest difference of our gradients to autograd's and, along one direction, to finite differences; in float64."""
    generator = torch.Generator().manual_seed(0)
    params = init((784, 128, 10), generator, torch.float64)
    x = torch.randn(32, 784, generator=generator, dtype=torch.float64)
    y = torch.randint(10, (32,), generator=generator)
    logits, cache = forward(x, params)
    loss, p = cross_entropy(logits, y)
    grads = backward(p, y, params, cache)

    leaves = [p.clone().requires_grad_() for p in params]
    theirs = F.cross_entropy(F.linear(F.linear(x, leaves[0].T, leaves[1]).relu(), leaves[2].T, leaves[3]), y)
    theirs.backward()
    differences = {"loss, PyTorch's": (loss - theirs).abs().item(),
                   "gradients, autograd's": max((a - b.grad).abs().max().item() for a, b in zip(grads, leaves))}
    ## What a gradient means, taken literally: move all weights a little along some direction v, and look at what the
    ## loss does. Each weight adds its own share, the product of its slope and its part of v:
    ##     sum of dL/dw v  ~  (L(w + e v) - L(w - e v)) / 2e
    direction, e = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params], 1e-6
    up, down = (cross_entropy(forward(x, [p + step * v for p, v in zip(params, direction)])[0], y)[0]
                for step in (e, -e))
    expected = sum((grad * v).sum() for grad, v in zip(grads, direction))
    return differences | {"gradients, finite differences": ((up - down) / (2 * e) - expected).abs().item()}


# ---------------------------------------------------------------------------------------------- the loop
def evaluate(params: list[Tensor], x: Tensor, y: Tensor) -> tuple[float, float]:
    """(mean loss in nats, share of correct answers) on all of x (N, I), y (N,)."""
    logits, _ = forward(x, params)
    return cross_entropy(logits, y)[0].item(), (logits.argmax(1) == y).float().mean().item()


def fit(params: list[Tensor], train: tuple[Tensor, Tensor], epochs: int, batch_size: int, lr: float,
        generator: torch.Generator) -> Iterator[tuple[float, float]]:
    """Change params step by step; after each epoch yield its mean loss and the seconds of training so far."""
    all_x, all_y = train  # (N, I), (N,)
    per_epoch, seconds, step = len(all_y.split(batch_size)), 0.0, 0
    for _ in range(epochs):
        begun, total = time.perf_counter(), 0.0
        ## A random order: were all sevens together, the network would forget the rest while it learns them. Sorted by
        ## digit it ends at 54 %; whether the order is a new one in every pass makes no difference here (experiment.py).
        for rows in torch.randperm(len(all_y), generator=generator).split(batch_size):
            x, y = all_x[rows], all_y[rows]  # (B, I), (B,)
            logits, cache = forward(x, params)
            loss, p = cross_entropy(logits, y)
            grads = backward(p, y, params, cache)
            ## Stochastic gradient descent: each number takes a step against its gradient, downhill. A batch's gradient
            ## is only an estimate, and its noise keeps long steps from settling. So the steps shrink to nothing.
            rate = lr * (1 - step / (epochs * per_epoch))
            for param, grad in zip(params, grads):
                param -= rate * grad  # changes the tensor itself, which the list holds
            total += loss
            step += 1
        train_loss = total.item() / per_epoch  # waits for a GPU to finish
        seconds += time.perf_counter() - begun
        if not math.isfinite(train_loss):
            raise utils.InputError(f"the loss became {train_loss}; start again with a smaller lr.")
        yield train_loss, seconds


def main() -> None:
    parser = utils.parser(__doc__, __file__, "seed")
    add = parser.add_argument
    add("--data", help="mnist or typeset; without it MNIST, or typeset if that is out of reach")
    add("--epochs", type=utils.count, default=10, help="passes over the training pictures")
    add("--batch-size", type=utils.count, default=64, help="pictures per step; smaller: more and rougher steps")
    add("--lr", type=utils.positive, default=0.1, help="learning rate: how far each step goes; too large: loss grows")
    args = utils.parse_args(parser)
    torch.manual_seed(args.seed)
    print("against PyTorch, largest absolute difference in float64:")
    for name, difference in check_against_pytorch().items():
        print(f"    {name:32}{difference:.1e}")
        assert difference < 1e-5, name

    data = load_data(args.data)
    train, val, test = prepare(data)  # (x (N, I), y (N,)) each
    generator = torch.Generator().manual_seed(args.seed)
    params = init((784, 128, 10), generator)
    loss, accuracy = evaluate(params, *val)
    print(f"\n{data.label}: {data.sizes}; {sum(p.numel() for p in params):,} parameters; before training: validation "
          f"loss {loss:.3f} (guessing: ln 10 = 2.303), accuracy {accuracy:.1%}\n")
    for epoch, (loss, seconds) in enumerate(fit(params, train, args.epochs, args.batch_size, args.lr, generator), 1):
        accuracy = evaluate(params, *val)[1]
        print(f"epoch {epoch:2}  {seconds:5.1f} s  train {loss:.4f}  validation accuracy {accuracy:.2%}", flush=True)
    print("\ntest accuracy: most frequent digit {majority_accuracy:.2%}, linear model {linear_accuracy:.2%}, by hand "
          "{0:.2%}; {1:.1f} s of training".format(evaluate(params, *test)[1], seconds, **baselines(data)))

    ## What the first 32 hidden units weigh, laid out as the pixels are.
    figure, axes = utils.pyplot().subplots(4, 8, figsize=(8, 4.4), subplot_kw={"xticks": [], "yticks": []})
    for a, w in zip(axes.flat, params[0].T.numpy()):  # (I,)
        a.imshow(w.reshape(28, 28), cmap="RdBu", vmin=-abs(w).max(), vmax=abs(w).max())
    figure.suptitle(f"What 32 hidden units look for ({data.label})\nblue: ink here speaks for it, red: against it")
    utils.write_atomically(args.out / "first_layer.png", figure.savefig)
    print(f"wrote {args.out / 'first_layer.png'}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
