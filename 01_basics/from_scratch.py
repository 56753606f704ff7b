"""A neural network with nothing hidden: forward pass, loss, backward pass and update, each written out.

You learn here: what a layer computes, what the loss measures, how the chain rule finds out which way every one of
101,770 numbers should move, and that nothing else is needed to read handwriting.

    python 01_basics/from_scratch.py

You should see (MNIST, seed 0): differences to autograd below 1e-15, then 97.73 % of the test pictures right after
3.6 s of training (two cores of an AMD EPYC, torch 2.15).
Writes: outputs/first_layer.png. Left out on purpose: autograd, nn.Module and optimizers; train.py has them.
"""

import math
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils  # noqa: E402
from load import linear_baseline, load_data, majority_baseline, normalise  # noqa: E402

# Shapes: N pictures, B batch, I inputs (784 pixels), M hidden units (128), K classes (10 digits)


# ---------------------------------------------------------------------------------------------- the network
def init(sizes: tuple[int, int, int], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Weights and biases [W1 (I, M), b1 (M,), W2 (M, K), b2 (K,)] for sizes (I, M, K).

    ## All weights equal would stay equal: every hidden unit would get the same gradient. So they start at random. Their
    ## size keeps the variance of what passes through: a sum over I inputs has I times the variance of one product, and
    ## ReLU halves it, hence sqrt(2 / I) (He et al. 2015). The last layer starts small: large scores at random would be
    ## confident nonsense.
    """
    I, M, K = sizes  # noqa: E741
    W1 = torch.randn(I, M, generator=generator, dtype=dtype) * (2 / I) ** 0.5
    W2 = torch.randn(M, K, generator=generator, dtype=dtype) * 0.01
    return [W1, torch.zeros(M, dtype=dtype), W2, torch.zeros(K, dtype=dtype)]


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
    ##     loss = -log p_y                            0 if sure and right; large if sure and wrong
    ## A nat is the unit of a natural logarithm: 0.69 nats is the loss of one who gives the truth an even chance.
    ## exp(90) is more than float32 can hold. Subtracting the largest logit first changes no ratio, so no p.
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
    ## where k = y: what was said, minus what was right. The mean over the batch divides by B.
    d_logits = p.clone()  # (B, K)
    d_logits[torch.arange(len(y)), y] -= 1
    d_logits /= len(y)
    ## logits = h W2 + b2. W2[m, k] is multiplied by h[b, m] in each row b: its gradient is the sum of their products.
    dW2, db2 = h.T @ d_logits, d_logits.sum(0)  # (M, K), (K,)
    ## h[b, m] enters every score k with weight W2[m, k]: it collects what comes back along each.
    dh = d_logits @ W2.T  # (B, M)
    ## ReLU lets the gradient through where it let the value through, and nothing where it put a zero.
    dz = dh * (z > 0)  # (B, M)
    dW1, db1 = x.T @ dz, dz.sum(0)  # (I, M), (M,)
    return [dW1, db1, dW2, db2]


# ---------------------------------------------------------------------------------------------- checks
def check_against_pytorch(device: torch.device) -> dict[str, float]:
    """Largest difference of our gradients to autograd's and, at 40 weights, to finite differences; in float64."""
    generator = torch.Generator().manual_seed(0)
    params = [p.to(device) for p in init((784, 128, 10), generator, torch.float64)]
    x = torch.randn(32, 784, generator=generator, dtype=torch.float64).to(device)
    y = torch.randint(10, (32,), generator=generator).to(device)
    logits, cache = forward(x, params)
    loss, p = cross_entropy(logits, y)
    grads = backward(p, y, params, cache)

    leaves = [p.clone().requires_grad_() for p in params]
    theirs = F.cross_entropy(F.linear(F.linear(x, leaves[0].T, leaves[1]).relu(), leaves[2].T, leaves[3]), y)
    theirs.backward()
    differences = {"loss, PyTorch's": (loss - theirs).abs().item(),
                   "gradients, autograd's": max((a - b.grad).abs().max().item() for a, b in zip(grads, leaves))}
    ## What a gradient means, taken by its word: move one weight by a little, and look at what the loss does.
    ##     dL/dw ~ (L(w + e) - L(w - e)) / 2e
    worst, e = 0.0, 1e-6
    for param, grad in zip(params, grads):
        for i in torch.randint(param.numel(), (10,), generator=generator).tolist():
            losses = []
            for sign in (1, -1):
                param.view(-1)[i] += sign * e
                losses.append(cross_entropy(forward(x, params)[0], y)[0])
                param.view(-1)[i] -= sign * e
            worst = max(worst, ((losses[0] - losses[1]) / (2 * e) - grad.reshape(-1)[i]).abs().item())
    return differences | {"gradients, finite differences": worst}


def accuracy(x: Tensor, y: Tensor, params: list[Tensor]) -> float:
    """Share of pictures x (N, I) named as y (N,) says."""
    return (forward(x, params)[0].argmax(1) == y).float().mean().item()


def main() -> None:
    utils.keep_memory()
    parser = utils.parser(__doc__)
    add = parser.add_argument
    add("--data", help="mnist or typeset; without it MNIST, or typeset if that is out of reach")
    add("--device", default="auto", help="auto, cpu, cuda or mps (whose lack of float64 leaves out the checks)")
    add("--seed", type=int, default=0, help="decides weights and batches")
    add("--epochs", type=int, default=10, help="passes over the training pictures")
    add("--batch-size", type=int, default=64, help="pictures per step; smaller: more steps, each by a rougher gradient")
    add("--lr", type=float, default=0.1, help="learning rate: how far each step goes; too large and the loss grows")
    add("--out", type=Path, default=Path(__file__).parent / "outputs", help="folder for the plot")
    args = parser.parse_args()
    utils.check(args, above_zero="epochs batch_size lr")
    utils.check_writable(args.out)
    utils.set_seed(args.seed)
    device = utils.pick_device(args.device)
    if device.type != "mps":  # which has no float64
        print("against PyTorch, largest absolute difference in float64:")
        for name, difference in check_against_pytorch(device).items():
            print(f"    {name:32}{difference:.1e}")
            assert difference < 1e-5, name

    data = load_data(args.data)
    label = data.name + ", stand-in" * data.stand_in
    train_x, val_x, test_x = (normalise(x, data.mean, data.std).flatten(1).to(device)  # (N, I)
                              for x in (data.train_x, data.val_x, data.test_x))
    train_y, val_y, test_y = (y.to(device) for y in (data.train_y, data.val_y, data.test_y))
    generator = torch.Generator().manual_seed(args.seed)
    params = [p.to(device) for p in init((train_x.shape[1], 128, 10), generator)]
    first, _ = cross_entropy(forward(val_x, params)[0], val_y)
    print(f"\n{label}: {len(train_y):,} pictures; {sum(p.numel() for p in params):,} parameters; before training: "
          f"validation loss {first:.3f} (guessing: ln 10 = 2.303), accuracy {accuracy(val_x, val_y, params):.1%}\n")

    # ------------------------------------------------------------------------------------------ the loop
    seconds, steps = 0.0, args.epochs * len(train_y.split(args.batch_size))
    done = 0
    for epoch in range(args.epochs):
        begun, total = time.perf_counter(), 0.0
        ## A random order: were all sevens together, the network would forget the rest while it learns them. Sorted by
        ## digit it ends at 54 %; whether the order is a new one in every pass makes no difference here (experiment.py).
        order = torch.randperm(len(train_y), generator=generator).to(device)
        for rows in order.split(args.batch_size):
            x, y = train_x[rows], train_y[rows]  # (B, I), (B,)
            logits, cache = forward(x, params)
            loss, p = cross_entropy(logits, y)
            grads = backward(p, y, params, cache)
            ## Stochastic gradient descent: each number takes a step against its gradient, downhill. The step shrinks to
            ## nothing over the run, for a batch's gradient is only an estimate, and its noise keeps long steps from
            ## settling.
            lr = args.lr * (1 - done / steps)
            for param, grad in zip(params, grads):
                param -= lr * grad  # changes the tensor itself, which the list holds
            total += loss
            done += 1
        total = total.item() / len(order.split(args.batch_size))  # waits for a GPU to finish
        seconds += time.perf_counter() - begun
        print(f"epoch {epoch + 1:2}  {seconds:5.1f} s  train {total:.4f}  "
              f"validation accuracy {accuracy(val_x, val_y, params):.2%}", flush=True)
        if not math.isfinite(total):
            raise utils.InputError("the loss is no longer a number; start again with a smaller --lr.")

    print(f"\ntest accuracy ({label}): most frequent digit {majority_baseline(data):.2%}, linear model "
          f"{linear_baseline(data):.2%}, 784-128-10 by hand "
          f"{accuracy(test_x, test_y, params):.2%}; {seconds:.1f} s of training")

    figure, axes = plt.subplots(4, 8, figsize=(8, 4.4))
    for a, w in zip(axes.flat, params[0].T.cpu()):  # (I,)
        a.imshow(w.view(28, 28), cmap="RdBu", vmin=-w.abs().max(), vmax=w.abs().max())
        a.axis("off")
    figure.suptitle(f"What 32 of the hidden units look for ({label})\nblue: ink here speaks for it, red: against it")
    utils.save_figure(figure, args.out / "first_layer.png")
    print(f"wrote {args.out / 'first_layer.png'}")
    if data.stand_in:
        utils.notice(f"STAND-IN: these figures are for {data.name}, not for MNIST.")


if __name__ == "__main__":
    utils.run(main)
