"""Convolution, pooling and batch normalisation in bare tensor arithmetic, forward and backward, and a CNN made of them.

You learn here: what a convolution computes, first as loops, then as one matrix product; how its gradient follows from
the product's; where max-pooling sends its gradient; why the gradient of batch normalisation has three terms; and that
all of it agrees with PyTorch's own. Then a network of these parts learns, against a linear model on the same pixels.

    python 02_cnn/from_scratch.py
    python 02_cnn/from_scratch.py --data shapes          offline, on drawn shapes

You should see (CIFAR-10 as JPEG, two cores of an AMD EPYC, seed 0): differences from PyTorch's of 3e-14 at most, and
64.8 % of the test pictures named correctly after 105 s; a linear model on the pixels 39.5 %.
Writes: outputs/from_scratch.png (the first layer's filters). Left out on purpose: strided and dilated convolutions.
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
from load import Data, draw_grid, linear_baseline, load_data, majority_baseline, run_size

# Shapes: N pictures, B batch, C channels in, M channels out (filters), H height, W width, K classes,
#         side: of a filter, in pixels


# ---------------------------------------------------------------------------------------------- convolution
def conv_loops(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Convolution by its definition: x (B, C, H, W), w (M, C, side, side) with side odd, b (M,) -> y (B, M, H, W).

    ##     y[n, o, i, j] = b[o] + sum over c, di, dj of w[o, c, di, dj] x[n, c, i + di - side//2, j + dj - side//2]
    ## At every place the same small filter is laid over the picture and the products are summed. Two beliefs about
    ## pictures are built in: what matters is near (side is small), and it means the same wherever it stands (w does not
    ## depend on i, j). A linear layer on 32 x 32 pixels believes neither, and has to learn each place anew.
    """
    B, C, H, W = x.shape
    M, _, side, _ = w.shape
    x = F.pad(x, (side // 2,) * 4)  # zeros around it, so that the output is as large as the input
    y = torch.empty(B, M, H, W, dtype=x.dtype)
    for n in range(B):
        for o in range(M):
            for i in range(H):
                for j in range(W):
                    y[n, o, i, j] = (w[o] * x[n, :, i : i + side, j : j + side]).sum() + b[o]
    return y


def im2col(x: Tensor, side: int) -> Tensor:
    """For every place, the side x side patch around it as a column: x (B, C, H, W) -> (B, C * side * side, H * W).

    ## With the patches as columns, a convolution is one matrix product, and a matrix product is what a processor does
    ## best. The price is memory: side * side copies of every pixel.
    """
    B, C, H, W = x.shape
    x = F.pad(x, (side // 2,) * 4)
    patches = [x[:, :, di : di + H, dj : dj + W] for di in range(side) for dj in range(side)]  # (B, C, H, W) each
    return torch.stack(patches, 2).view(B, C * side * side, H * W)


def col2im(columns: Tensor, C: int, H: int, W: int, side: int) -> Tensor:
    """The transpose of im2col: add (B, C * side * side, H * W) to the pixels it came from, -> (B, C, H, W).

    ## A pixel was copied into side * side patches; its gradient is the sum of the gradients of all its copies.
    """
    patches = columns.view(-1, C, side * side, H, W)
    x = columns.new_zeros(len(columns), C, H + side - 1, W + side - 1)
    for place in range(side * side):
        di, dj = divmod(place, side)
        x[:, :, di : di + H, dj : dj + W] += patches[:, :, place]
    return x[:, :, side // 2 : side // 2 + H, side // 2 : side // 2 + W]


def conv(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, tuple]:
    """conv_loops as one matrix product (Chellapilla et al. 2006); also returns what the backward pass needs."""
    B, _, H, W = x.shape
    columns = im2col(x, w.shape[-1])  # (B, C * side * side, H * W)
    y = w.flatten(1) @ columns + b[:, None]  # (M, C * side * side) @ (B, C * side * side, H * W) -> (B, M, H * W)
    return y.view(B, -1, H, W), (columns, w)


def conv_backward(dy: Tensor, cache: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """dy (B, M, H, W) -> dx (B, C, H, W), dw (M, C, side, side), db (M,).

    ## The forward pass is Y = F X + b with X = im2col(x), so the rules are those of any matrix product:
    ##     dF = dY X^T (summed over the batch),  dX = F^T dY,  dx = col2im(dX),  db = dY summed over batch and places
    """
    columns, w = cache
    M, C, side, _ = w.shape
    H, W = dy.shape[2:]
    dy = dy.flatten(2)  # (B, M, H * W)
    dw = (dy @ columns.mT).sum(0).view(w.shape)
    return col2im(w.flatten(1).T @ dy, C, H, W, side), dw, dy.sum((0, 2))


# ---------------------------------------------------------------------------------------------- pooling, normalisation
def max_pool(x: Tensor) -> tuple[Tensor, tuple]:
    """The largest of each 2 x 2 pixels: (B, C, H, W) with even sides -> (B, C, H/2, W/2), and what backward needs.

    ## After pooling, a filter of the same 3 x 3 pixels sees twice as far, and it matters less where exactly something
    ## stood.
    """
    B, C, H, W = x.shape
    fours = x.view(B, C, H // 2, 2, W // 2, 2).transpose(3, 4).reshape(B, C, H // 2, W // 2, 4)
    y, winner = fours.max(-1)
    return y, (winner, x.shape)


def max_pool_backward(dy: Tensor, cache: tuple) -> Tensor:
    """dy (B, C, H/2, W/2) -> dx (B, C, H, W): the winner gets all of it; changing a loser a little changes nothing."""
    winner, (B, C, H, W) = cache
    fours = dy.new_zeros(*dy.shape, 4).scatter_(-1, winner[..., None], dy[..., None])
    return fours.view(B, C, H // 2, W // 2, 2, 2).transpose(3, 4).reshape(B, C, H, W)


def batch_norm(x: Tensor, gain: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, tuple]:
    """Batch normalisation (Ioffe & Szegedy 2015): x (B, C, H, W), gain and bias (C,) -> same shape, and a cache.

    ##     z = (x - mean) / sqrt(variance + eps)    mean and variance of a channel over the batch and all places
    ##     y = gain z + bias
    ## Every layer then gets inputs of one scale, whatever the layers below do, and a larger learning rate is safe.
    """
    mean = x.mean((0, 2, 3), keepdim=True)  # (1, C, 1, 1)
    scale = ((x - mean).square().mean((0, 2, 3), keepdim=True) + eps).rsqrt()
    z = (x - mean) * scale
    return gain[:, None, None] * z + bias[:, None, None], (z, scale, gain, mean)


def batch_norm_backward(dy: Tensor, cache: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """dy (B, C, H, W) -> dx (B, C, H, W), dgain (C,), dbias (C,).

    ##     dx = gain / sqrt(variance + eps) (dy - mean(dy) - z mean(dy z))
    ## The first term is the gradient if mean and variance were constants. They are not: raising one x raises the mean
    ## for all (second term) and stretches the variance for all (third). What is left neither shifts nor scales a
    ## channel as a whole, for the normalisation would undo both.
    """
    z, scale, gain, _ = cache
    over = (0, 2, 3)
    dx = gain[:, None, None] * scale * (dy - dy.mean(over, keepdim=True) - z * (dy * z).mean(over, keepdim=True))
    return dx, (dy * z).sum(over), dy.sum(over)


# ---------------------------------------------------------------------------------------------- a network of them
def init(K: int, side: int, widths: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Weights of conv-norm-ReLU-pool twice, then linear.

    conv (M, C, 3, 3), its bias b (M,), the norm's gain and bias (M,); head (M * side/4 * side/4, K), head_bias (K,).
    The convolutions' are normal with variance 2 / inputs (He et al. 2015, "Delving Deep into Rectifiers"). The last
    layer starts at zero, so that the first loss is ln K.
    """
    w, C = {}, 3
    for i, M in enumerate(widths, 1):
        w[f"conv{i}"] = torch.randn(M, C, 3, 3, generator=generator) * math.sqrt(2 / (9 * C))
        w[f"b{i}"], w[f"gain{i}"], w[f"bias{i}"] = torch.zeros(M), torch.ones(M), torch.zeros(M)
        C = M
    return w | {"head": torch.zeros(C * (side // 4) ** 2, K), "head_bias": torch.zeros(K)}


def forward(x: Tensor, w: dict[str, Tensor], running: dict | None = None) -> tuple[Tensor, list]:
    """x (B, 3, H, W) -> logits (B, K) and the caches of all layers.

    ## In training a batch is normalised by its own mean and variance. Afterwards a picture's class must not depend on
    ## which others happen to stand beside it: `running` holds averages over the last steps of the mean and of
    ## 1 / sqrt(variance + eps), which are used instead. (nn.BatchNorm2d averages mean and variance.)
    """
    caches = []
    for i in (1, 2):
        x, conv_cache = conv(x, w[f"conv{i}"], w[f"b{i}"])
        if running:
            mean, scale = running[i]
            x, norm_cache = w[f"gain{i}"][:, None, None] * (x - mean) * scale + w[f"bias{i}"][:, None, None], None
        else:
            x, norm_cache = batch_norm(x, w[f"gain{i}"], w[f"bias{i}"])
        x, pool_cache = max_pool(x.relu())
        caches.append((conv_cache, norm_cache, pool_cache))
    h = x.flatten(1)  # (B, M * H/4 * W/4)
    return h @ w["head"] + w["head_bias"], [*caches, (h, x.shape)]


def loss_and_gradients(x: Tensor, y: Tensor, w: dict[str, Tensor]) -> tuple[float, dict[str, Tensor], dict]:
    """Mean cross-entropy of pictures x (B, 3, H, W) with labels y (B,), its gradient for every weight, and the
    (mean, 1 / standard deviation) that each batch normalisation found."""
    logits, caches = forward(x, w)
    statistics = {i: (norm_cache[3], norm_cache[1]) for i, (_, norm_cache, _) in enumerate(caches[:2], 1)}
    log_p = logits.log_softmax(-1)  # (B, K)
    ## The gradient of the mean cross-entropy with respect to the logits: (p - one-hot(y)) / B.
    dlogits = log_p.exp()
    dlogits[torch.arange(len(y)), y] -= 1
    dlogits /= len(y)
    h, shape = caches[-1]
    gradients = {"head": h.T @ dlogits, "head_bias": dlogits.sum(0)}
    dx = (dlogits @ w["head"].T).view(shape)
    for i in (2, 1):
        conv_cache, norm_cache, pool_cache = caches[i - 1]
        dx = max_pool_backward(dx, pool_cache)
        z, _, gain, _ = norm_cache
        dx = dx * (gain[:, None, None] * z + w[f"bias{i}"][:, None, None] > 0)  # ReLU passes what was above zero
        dx, gradients[f"gain{i}"], gradients[f"bias{i}"] = batch_norm_backward(dx, norm_cache)
        dx, gradients[f"conv{i}"], gradients[f"b{i}"] = conv_backward(dx, conv_cache)
    return -log_p[torch.arange(len(y)), y].mean().item(), gradients, statistics


# ---------------------------------------------------------------------------------------------- checks
def check_against_pytorch() -> dict[str, float]:
    """Largest absolute difference to PyTorch's own functions and to autograd, in float64."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    worst = lambda ours, theirs: max((a - b).abs().max().item() for a, b in zip(ours, theirs))  # noqa: E731
    x, w, b, gain, bias = leaves = [draw(*s).requires_grad_() for s in ((3, 4, 6, 8), (5, 4, 3, 3), (5,), (4,), (4,))]
    differences = {"convolution as loops": worst([conv_loops(x, w, b)], [F.conv2d(x, w, b, padding=1)])}
    pool_gradient = lambda dy, cache: (max_pool_backward(dy, cache),)  # noqa: E731
    for name, ours, back, theirs, inputs in (
            ("convolution", conv, conv_backward, lambda x, w, b: F.conv2d(x, w, b, padding=1), (x, w, b)),
            ("max-pooling", max_pool, pool_gradient, lambda x: F.max_pool2d(x, 2), (x,)),
            ("batch normalisation", batch_norm, batch_norm_backward,
             lambda x, g, b: F.batch_norm(x, None, None, g, b, training=True), (x, gain, bias))):
        with torch.no_grad():
            y, cache = ours(*inputs)
            dy = draw(*y.shape)
            gradients = back(dy, cache)
        expected = theirs(*inputs)
        differences[f"{name}, forward"] = worst([y], [expected])
        differences[f"{name}, backward"] = worst(gradients, torch.autograd.grad(expected, inputs, dy))
    weights = {k: v.double() for k, v in init(5, 8, (6, 7), g).items()}
    weights["head"] = draw(*weights["head"].shape)
    x, y = draw(4, 3, 8, 8), torch.tensor([0, 4, 2, 2])
    _, gradients, _ = loss_and_gradients(x, y, weights)
    leaves = [v.requires_grad_() for v in weights.values()]
    ## Each part of the forward pass has been compared by now, so here autograd goes through our own.
    expected = torch.autograd.grad(F.cross_entropy(forward(x, weights)[0], y), leaves)
    return differences | {"the whole network, backward": worst([gradients[k] for k in weights], expected)}


# ---------------------------------------------------------------------------------------------- learning
def normalise(x: Tensor, data: Data) -> Tensor:
    """Bytes (B, 3, H, W) to mean 0 and variance 1 per channel, batch by batch: floats need four times the memory."""
    return (x.float() / 255 - data.mean[:, None, None]) / data.std[:, None, None]


def accuracy(data: Data, w: dict[str, Tensor], running: dict) -> float:
    """Share of the test pictures whose largest logit is the label's."""
    pairs = zip(data.test_x.split(250), data.test_y.split(250))
    return sum((forward(normalise(x, data), w, running)[0].argmax(-1) == y).sum().item()
               for x, y in pairs) / len(data.test_y)


@torch.no_grad()  # no autograd: every gradient here is our own
def main() -> None:
    parser = utils.parser(__doc__, __file__, "seed")
    add = parser.add_argument
    add("--data", help="cifar10, shapes or a folder; without it CIFAR-10, or shapes if that is out of reach")
    add("--epochs", type=utils.count, help="passes over the training pictures: 2, or more where these are few")
    add("--batch-size", type=utils.count, help="pictures per step: 100, or fewer where there are few in all")
    add("--lr", type=utils.positive, default=0.01, help="peak learning rate, falling linearly to zero")
    args = utils.parse_args(parser)
    torch.manual_seed(args.seed)
    with torch.enable_grad():
        print("against PyTorch, largest absolute difference in float64:")
        for name, error in check_against_pytorch().items():
            print(f"  {name:32} {error:.1e}")

    data = load_data(args.data)
    x, y, K = data.train_x, data.train_y, len(data.classes)
    args.epochs, args.batch_size = run_size(len(y), 2, 100, 290, (args.epochs, args.batch_size))
    with torch.enable_grad():
        linear = linear_baseline(data)

    g = torch.Generator().manual_seed(args.seed)
    w = init(K, x.shape[-1], (32, 64), g)
    velocity, running = {name: torch.zeros_like(p) for name, p in w.items()}, None
    print(f"\n{data.label}: {len(y):,} pictures, {args.epochs} epochs in batches of {args.batch_size}; "
          f"{sum(p.numel() for p in w.values()):,} weights; loss before training "
          f"{loss_and_gradients(normalise(x[:500], data), y[:500], w)[0]:.4f}, ln {K} = {math.log(K):.4f}")
    steps, begun, step = args.epochs * math.ceil(len(y) / args.batch_size), time.perf_counter(), 0
    for _ in range(args.epochs):
        for rows in torch.randperm(len(y), generator=g).split(args.batch_size):
            loss, gradients, statistics = loss_and_gradients(normalise(x[rows], data), y[rows], w)
            running = running or statistics
            for i in running:  # each new batch counts a tenth
                running[i] = tuple(torch.lerp(old, new, 0.1) for old, new in zip(running[i], statistics[i]))
            lr = args.lr * (1 - step / steps)
            for name in w:  # momentum: v <- 0.9 v + gradient, w <- w - lr v
                velocity[name].mul_(0.9).add_(gradients[name])
                w[name] -= lr * velocity[name]
            step += 1
            if not math.isfinite(loss):
                raise utils.InputError(f"the loss became {loss} at step {step}; use a smaller --lr.")
            utils.progress(step, steps, begun, f"loss {loss:.3f}", "pictures", args.batch_size)
    seconds = time.perf_counter() - begun
    print(f"\ntest accuracy ({data.label}): most frequent class {majority_baseline(data):.1%}, "
          f"linear model on the pixels {linear:.1%}, this network {accuracy(data, w, running):.1%} after "
          f"{seconds:.0f} s")

    draw_grid(args.out / "from_scratch.png", w["conv1"], 8,
              f"The 32 filters of the first convolution, 3 x 3 pixels, in colour ({data.label})", normalize=True,
              scale_each=True, padding=1, pad_value=1.0)
    print(f"wrote {args.out / 'from_scratch.png'}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
