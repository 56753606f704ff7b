"""Memory over time, by hand: a plain recurrent network, why it forgets how to learn, and the LSTM, which need not.

You learn here: what a recurrent network computes; how the chain rule runs backwards through time; why a gradient that
passes 200 steps of a plain network is lost, and how one sum and a gate keep it alive; and that all of it agrees with
PyTorch's own. Then the LSTM made of these parts learns to forecast a day, against two forecasts that need no learning.

    python 03_lstm/from_scratch.py
    python 03_lstm/from_scratch.py --data station        offline

You should see (ETTh1, 96 hours -> the next 24 of all channels; two cores of an AMD EPYC with AVX512-BF16, no AMX, of
which this used one; torch 2.15; seeds 0, 1, 2): test MSE on scaled values 0.383 ± 0.007 (0.390, 0.382, 0.377), same
hour yesterday 0.424, repeat last 1.222; differences from PyTorch's of 2e-14 at most (float64).
Writes: outputs/from_scratch.png. Left out on purpose: several layers; encoder and decoder, train.py's --model seq2seq.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from load import load_data, windows

# Shapes: N rows, B batch (windows), T time steps looked back on, C channels, M hidden units, P predicted steps
## Time is the first dimension here, (T, B, ...), because the steps have to be taken one after another.


# ---------------------------------------------------------------------------------------------- a plain network
def rnn(x: Tensor, h: Tensor, W_x: Tensor, W_h: Tensor, b: Tensor) -> Tensor:
    """A plain recurrent network (Elman 1990): x (T, B, C), h (B, M), W_x (C, M), W_h (M, M), b (M,) -> hs (T, B, M).

    ##     h[t] = tanh(x[t] W_x + h[t-1] W_h + b)
    ## One and the same small network at every step. What it knows of the past is the M numbers in h, which it reads,
    ## changes and hands on.
    """
    hs = []
    for z_x in x @ W_x + b:  # (B, M): the input's part needs no earlier step, so it is one product for all of them
        h = (z_x + h @ W_h).tanh()
        hs.append(h)
    return torch.stack(hs)


def rnn_step_backward(dh: Tensor, h: Tensor, W_h: Tensor) -> tuple[Tensor, Tensor]:
    """One step back: from dh = dLoss/dh[t] to dz = dLoss/dz[t], z what tanh is applied to, and dLoss/dh[t-1]; (B, M).

    ##     dLoss/dz[t]   = dLoss/dh[t] * (1 - h[t]^2)                 (tanh' = 1 - tanh^2)
    ##     dLoss/dh[t-1] = dLoss/dz[t] W_h^T
    ## 200 steps back, that is 200 factors (1 - h^2) <= 1 and 200 times the same matrix. If the matrix shrinks most
    ## vectors, the gradient shrinks like 0.9^200 = 7e-10; if it stretches them, it explodes (Bengio et al. 1994).
    """
    dz = dh * (1 - h**2)
    return dz, dz @ W_h.mT


def rnn_backward(dhs: Tensor, x: Tensor, hs: Tensor, h0: Tensor, W_x: Tensor, W_h: Tensor) -> tuple[Tensor, ...]:
    """Backpropagation through time: dhs (T, B, M), the loss's gradient by every output -> dx, dh0, dW_x, dW_h, db."""
    dh, dzs = torch.zeros_like(h0), torch.empty_like(hs)
    for t in reversed(range(len(x))):
        ## h[t] is used twice, as output t and by step t + 1, so its gradient is a sum of two.
        dzs[t], dh = rnn_step_backward(dhs[t] + dh, hs[t], W_h)
    before = torch.cat([h0[None], hs[:-1]])  # (T, B, M): what each step read
    return dzs @ W_x.mT, dh, *weight_gradients(x, before, dzs)


def weight_gradients(x: Tensor, before: Tensor, dzs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dW_x, dW_h, db from what all steps read, x (T, B, C) and before (T, B, M), and dzs (T, B, M), or 4M for an LSTM.

    ## All steps use the same weights, so the gradient of a weight is the sum over the steps: one product over T and B.
    """
    dzs = dzs.flatten(0, 1)  # (T * B, M)
    return x.flatten(0, 1).mT @ dzs, before.flatten(0, 1).mT @ dzs, dzs.sum(0)


# ---------------------------------------------------------------------------------------------- the LSTM
def lstm_cell(z_x: Tensor, h: Tensor, c: Tensor, W_h: Tensor) -> tuple[Tensor, Tensor, tuple]:
    """One step of an LSTM: z_x = x W_x + b (B, 4M), h and c (B, M), W_h (M, 4M) -> h, c and what backward needs.

    ## The remedy (Hochreiter & Schmidhuber 1997): a second state c, the memory, which is not squeezed through a matrix
    ## and a tanh at every step but only added to. What is added, what is kept and what is shown is decided by gates:
    ## numbers from 0 to 1, computed from the input and the last output.
    ##     i = sigmoid(x W_xi + h W_hi + b_i)     input gate: how much of the candidate is written
    ##     f = sigmoid(x W_xf + h W_hf + b_f)     forget gate: how much of the memory stays (Gers et al. 2000)
    ##     g = tanh   (x W_xg + h W_hg + b_g)     candidate: what could be written
    ##     o = sigmoid(x W_xo + h W_ho + b_o)     output gate: how much of the memory is shown
    ##     c' = f * c + i * g
    ##     h' = o * tanh(c')
    """
    i, f, g, o = (z_x + h @ W_h).chunk(4, -1)  # (B, M) each: the four share one product
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    new_c = f * c + i * g
    shown = new_c.tanh()
    return o * shown, new_c, (i, f, g, o, c, shown)


def lstm_cell_backward(dh: Tensor, dc: Tensor, cache: tuple, W_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From dh, dc by the new states (B, M) to dz (B, 4M) and to dh, dc by the states before (B, M).

    ## Through h' = o * tanh(c'):       do = dh tanh(c')        dc += dh o (1 - tanh(c')^2)
    ## Through c' = f * c + i * g:      di = dc g     df = dc c     dg = dc i
    ##
    ##     dLoss/dc = dLoss/dc' * f
    ## is the heart of it. On the way back along the memory there is no matrix and no tanh', only the gate: 200 steps
    ## with f = 0.995 leave 37 % of the gradient, and what is worth remembering can open its gate that far.
    """
    i, f, g, o, c, shown = cache
    dc = dc + dh * o * (1 - shown**2)
    ## sigmoid' = sigmoid (1 - sigmoid), tanh' = 1 - tanh^2
    dz = torch.cat([dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g**2), dh * shown * o * (1 - o)], -1)
    return dz, dz @ W_h.mT, dc * f


def lstm(x: Tensor, h: Tensor, c: Tensor, W_x: Tensor, W_h: Tensor, b: Tensor) -> tuple[Tensor, Tensor, tuple]:
    """A sequence: x (T, B, C), h and c (B, M), W_x (C, 4M), W_h (M, 4M), b (4M,) -> hs (T, B, M), last c, cache."""
    hs, caches = [h], []
    for z_x in x @ W_x + b:  # (B, 4M)
        h, c, cache = lstm_cell(z_x, h, c, W_h)
        hs.append(h)
        caches.append(cache)
    hs = torch.stack(hs)  # (T + 1, B, M)
    return hs[1:], c, (x, hs[:-1], caches, W_x, W_h)


def lstm_backward(dhs: Tensor, dc: Tensor, cache: tuple) -> tuple[Tensor, ...]:
    """dhs (T, B, M), the gradient by every output, dc (B, M), by the last memory -> dx, dh0, dc0, dW_x, dW_h, db."""
    x, before, caches, W_x, W_h = cache
    dh, dzs = torch.zeros_like(dc), [None] * len(x)
    for t in reversed(range(len(x))):
        dzs[t], dh, dc = lstm_cell_backward(dhs[t] + dh, dc, caches[t], W_h)
    dzs = torch.stack(dzs)  # (T, B, 4M)
    return dzs @ W_x.mT, dh, dc, *weight_gradients(x, before, dzs)


# ---------------------------------------------------------------------------------------------- how far a gradient gets
def uniform(shape: tuple[int, ...], M: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """First weights of a network of M units, as PyTorch draws them: within 1 / sqrt(M)."""
    return (2 * torch.rand(shape, generator=generator, dtype=dtype) - 1) / M**0.5


def gradient_norms(x: Tensor, M: int, kind: str, change: float, generator: torch.Generator) -> Tensor:
    """Norm of the gradient of one number read from the last h, by the states k = 0, 1, ... T - 1 steps before: (T,).

    kind: "rnn", its recurrent weights multiplied by `change`; or "lstm", `change` added to its forget gates' biases.
    All other weights are as `uniform` draws them. An LSTM's norm is that of h and c together.
    """
    _, B, C = x.shape
    G = 4 * M if kind == "lstm" else M
    W_x, W_h, b = (uniform(shape, M, generator, x.dtype) for shape in ((C, G), (M, G), (G,)))
    h, dh = x.new_zeros(B, M), torch.randn(B, M, generator=generator, dtype=x.dtype)
    dh, dc = dh / dh.norm(dim=-1, keepdim=True), torch.zeros_like(h)
    norms = [1.0]
    if kind == "rnn":
        W_h = W_h * change
        for h in rnn(x, h, W_x, W_h, b).flip(0)[:-1]:
            dh = rnn_step_backward(dh, h, W_h)[1]
            norms.append(dh.norm(dim=-1).mean().item())
    else:
        b[M : 2 * M] += change
        caches = lstm(x, h, h, W_x, W_h, b)[2][2]
        for cache in caches[:0:-1]:
            _, dh, dc = lstm_cell_backward(dh, dc, cache, W_h)
            norms.append(torch.cat([dh, dc], -1).norm(dim=-1).mean().item())
    return torch.tensor(norms, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- a small forecaster
def init(C: int, M: int, P: int, forget_bias: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights of an LSTM of M units on C channels, and of the head, which turns its last h into P forecasts of each.

    ## The head starts at zero: before training the forecast is "no change", the first of the two baselines.
    ## A forget gate that starts at sigmoid(0) = 1/2 has lost nearly all after ten steps. With a positive bias it
    ## starts by remembering, and learns what to forget (Gers et al. 2000; Jozefowicz et al. 2015). How far it remembers
    ## is a matter of degree: a bias of 1 (gate 0.73) lets 1e-13 of a gradient through 200 steps, 5 (0.993) all of it.
    """
    w = {"W_x": uniform((C, 4 * M), M, generator), "W_h": uniform((M, 4 * M), M, generator), "b": torch.zeros(4 * M)}
    w["b"][M : 2 * M] = forget_bias
    return w | {"head": torch.zeros(M, P * C), "head_bias": torch.zeros(P * C)}


def forward(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, tuple]:
    """Windows x (B, T, C) -> forecasts (B, P, C), and what backward needs.

    ## What the network reads and what it says is relative to the last hour, so that the level of the series, which
    ## drifts (load.py prints how far), is not a thing to learn.
    """
    B, T, C = x.shape
    now = x[:, -1:]  # (B, 1, C)
    h = x.new_zeros(B, len(w["W_h"]))
    hs, _, cache = lstm((x - now).transpose(0, 1), h, h, w["W_x"], w["W_h"], w["b"])
    y = hs[-1] @ w["head"] + w["head_bias"]  # (B, P * C): only the last h, which has seen the whole window
    return now + y.view(B, -1, C), (hs, cache)


def loss_and_gradients(x: Tensor, targets: Tensor, w: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Mean squared error over windows x (B, T, C), targets (B, P, C), and its gradient by every weight."""
    y, (hs, cache) = forward(x, w)
    error = y - targets
    dy = (2 / error.numel() * error).flatten(1)  # (B, P * C)
    dhs = torch.zeros_like(hs)
    dhs[-1] = dy @ w["head"].mT
    _, _, _, dW_x, dW_h, db = lstm_backward(dhs, torch.zeros_like(hs[0]), cache)
    return error.square().mean().item(), {"W_x": dW_x, "W_h": dW_h, "b": db, "head": hs[-1].mT @ dy,
                                          "head_bias": dy.sum(0)}


def clip(gradients: dict[str, Tensor], longest: float = 1.0) -> None:
    """Shorten all gradients, together seen as one vector, to norm `longest` where it is longer (Pascanu et al. 2013).

    ## Gates keep gradients from vanishing, not from exploding: the path through h still has a matrix in it.
    """
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    for g in gradients.values():
        g *= min(1.0, longest / (norm + 1e-12))


# ---------------------------------------------------------------------------------------------- checks
def check_against_pytorch() -> dict[str, float]:
    """Largest absolute differences to nn.RNN, nn.LSTM and autograd, in float64."""
    g = torch.Generator().manual_seed(0)
    T, B, C, M, P = 12, 3, 4, 5, 6
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()  # noqa: E731
    x, h, c, dhs, dc = (draw(*shape) for shape in ((T, B, C), (B, M), (B, M), (T, B, M), (B, M)))
    differences = {}

    def compare(name: str, ours: tuple, theirs: tuple) -> None:
        differences[name] = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))

    def call(module: nn.Module, weights: tuple, *inputs: Tensor) -> tuple:
        """module's output with our weights: PyTorch keeps them transposed, and has a second bias, here zero."""
        names = [name for name, _ in module.named_parameters()]
        theirs = (weights[0].mT, weights[1].mT, weights[2], torch.zeros_like(weights[2]))
        return torch.func.functional_call(module, dict(zip(names, theirs)), inputs)

    weights = draw(C, M), draw(M, M), draw(M)
    with torch.no_grad():
        hs = rnn(x, h, *weights)
        gradients = rnn_backward(dhs, x, hs, h, *weights[:2])
    expected = call(nn.RNN(C, M), weights, x, h[None])[0]
    compare("plain network, forward", [hs], [expected])
    compare("plain network, backward", gradients, torch.autograd.grad(expected, [x, h, *weights], dhs))

    weights = draw(C, 4 * M), draw(M, 4 * M), draw(4 * M)
    with torch.no_grad():
        hs, last, cache = lstm(x, h, c, *weights)
        gradients = lstm_backward(dhs, dc, cache)
    expected, (_, expected_last) = call(nn.LSTM(C, M), weights, x, (h[None], c[None]))
    compare("LSTM, forward", [hs, last], [expected, expected_last[0]])
    compare("LSTM, backward", gradients,
            torch.autograd.grad([expected, expected_last], [x, h, c, *weights], [dhs, dc[None]]))

    w = {"W_x": weights[0], "W_h": weights[1], "b": weights[2], "head": draw(M, P * C), "head_bias": draw(P * C)}
    inputs, targets = draw(B, T, C), draw(B, P, C)
    with torch.no_grad():
        loss, gradients = loss_and_gradients(inputs, targets, w)
    now, zero = inputs[:, -1:], torch.zeros(1, B, M, dtype=torch.float64)
    hs = call(nn.LSTM(C, M), weights, (inputs - now).transpose(0, 1), (zero, zero))[0]
    expected = F.mse_loss(now + F.linear(hs[-1], w["head"].mT, w["head_bias"]).view(B, P, C), targets)
    compare("forecaster, loss", [loss], [expected])
    compare("forecaster, backward", [gradients[name] for name in w], torch.autograd.grad(expected, list(w.values())))
    return differences


# ---------------------------------------------------------------------------------------------- learning
def evaluate(forecast: Callable[[Tensor], Tensor], part: Tensor, lookback: int, horizon: int) -> float:
    """Mean squared error over every window of a part (N, C); forecast: (B, T, C) -> (B, P, C)."""
    inputs, targets = windows(part, lookback, horizon)
    batches = zip(inputs.split(512), targets.split(512))
    return sum((forecast(x) - y).square().mean((1, 2)).sum().item() for x, y in batches) / len(inputs)


@torch.no_grad()  # no autograd: every gradient here is our own
def main() -> None:
    parser = utils.parser(__doc__, __file__, "seed")
    add = parser.add_argument
    add("--data", help="etth1, station or a CSV file; without it ETTh1, or station if that is out of reach")
    add("--lookback", type=utils.count, default=96, help="rows that a forecast looks back on; each costs time")
    add("--horizon", type=utils.count, default=24, help="rows to forecast")
    add("--hidden", type=utils.count, default=64, help="units M of the LSTM: more learn more, and overfit sooner")
    add("--forget-bias", type=float, default=1.0, help="where the forget gates start: sigmoid of it")
    add("--epochs", type=utils.count, default=3, help="passes over the training windows")
    add("--batch-size", type=utils.count, default=64, help="windows per step")
    add("--lr", type=utils.positive, default=1e-2, help="Adam's step size at the start, falling linearly to zero")
    args = utils.parse_args(parser)
    torch.manual_seed(args.seed)
    g = torch.Generator().manual_seed(args.seed)

    data = load_data(args.data, args.lookback, args.horizon)
    T, P, C, M = args.lookback, args.horizon, len(data.columns), args.hidden

    ## Part one: 200 steps back, before any training, on real inputs.
    length = min(200, len(data.train) // 2)
    starts = torch.randint(len(data.train) - length, (32,), generator=g)
    x = data.train[starts + torch.arange(length)[:, None]].double()  # (200, 32, C)
    curves = {name: gradient_norms(x, M, kind, change, g) for name, kind, change in (
        ("plain network", "rnn", 1.0), ("plain network, recurrent weights x 6", "rnn", 6.0),
        ("LSTM, forget gates about 0.5 (bias 0)", "lstm", 0.0), ("LSTM, 0.73 (bias 1)", "lstm", 1.0),
        ("LSTM, 0.993 (bias 5)", "lstm", 5.0))}
    print(f"gradient norm, 1 at the last of {length} steps ({data.label}):")
    back = [k for k in (10, 50, 100, length - 1) if k < length]
    print(f"{'steps back':40}" + "".join(f"{k:>10}" for k in back))
    for name, norms in curves.items():
        print(f"{name:40}" + "".join(f"{norms[k]:10.0e}" for k in back))

    ## Part two: learning. The optimizer is PyTorch's; it does not care who computed the gradients.
    inputs, targets = windows(data.train, T, P)
    w = init(C, M, P, args.forget_bias, g)
    optimizer = torch.optim.Adam(w.values(), lr=args.lr)
    steps, begun, step = args.epochs * math.ceil(len(inputs) / args.batch_size), time.perf_counter(), 0
    print(f"\n{len(inputs):,} training windows, {T} rows -> {P} rows of {C} channels; "
          f"{sum(p.numel() for p in w.values()):,} weights")
    for _ in range(args.epochs):
        for rows in torch.randperm(len(inputs), generator=g).split(args.batch_size):
            loss, gradients = loss_and_gradients(inputs[rows], targets[rows], w)
            clip(gradients)
            for name in w:
                w[name].grad = gradients[name]
            optimizer.param_groups[0]["lr"] = args.lr * (1 - step / steps)
            optimizer.step()
            step += 1
            if not math.isfinite(loss):
                raise utils.InputError(f"the loss became {loss} at step {step}; use a smaller --lr.")
            utils.progress(step, steps, begun, f"loss {loss:.3f}", "windows", args.batch_size)
    seconds = time.perf_counter() - begun

    ## The two forecasts that anything learned has to beat.
    day = data.period
    forecasts = {"repeat last": lambda x: x[:, -1:].expand(-1, P, -1)}
    if day <= T:
        forecasts["same hour yesterday"] = lambda x: x[:, -day:].repeat(1, math.ceil(P / day), 1)[:, :P]
    forecasts["LSTM by hand"] = lambda x: forward(x, w)[0]
    print(f"\n{f'scaled MSE ({data.label})':32}{'validation':>12}{'test':>9}   (after {seconds:.0f} s of training)")
    for name, forecast in forecasts.items():
        print(f"{name:32}{evaluate(forecast, data.val, T, P):12.4f}{evaluate(forecast, data.test, T, P):9.4f}")
    print("\nagainst PyTorch, largest absolute difference in float64:")
    with torch.enable_grad():
        for name, error in check_against_pytorch().items():
            print(f"  {name:26} {error:.1e}")

    figure, axes = utils.pyplot().subplots()
    for name, norms in curves.items():
        axes.semilogy(norms.clamp(min=1e-30), label=name)
    axes.set(title=f"Gradient of one output by earlier states, untrained ({data.label})", xlabel="steps back",
             ylabel="norm", ylim=(1e-20, 1e10))
    axes.legend()
    utils.write_atomically(args.out / "from_scratch.png", figure.savefig)
    print(f"\nwrote {args.out / 'from_scratch.png'}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
