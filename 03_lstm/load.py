"""An electricity transformer, hour by hour: a table of measurements as windows that a forecaster can learn from.

You learn here: how to look at a time series (a day, a week, a year, autocorrelation); why it is split by time and never
at random; and what a window is.

    python 03_lstm/load.py                       ETTh1 (downloaded once, 2.6 MB)
    python 03_lstm/load.py --data station        the stand-in: a simulated transformer
    python 03_lstm/load.py --data my.csv         your own: reading.py finds out how it is written

You should see (ETTh1): 17,420 hours of 7 channels, of which 8,640 / 2,880 / 2,880 are used; the oil's mean over the
test part lies 1.34 standard deviations below that over the training part.
Writes to outputs/: series.png. Left out on purpose: calendar features (hour, weekday). The models of train.py see the
numbers alone, as do those that they are compared with.
"""

import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from reading import Table, read_table

# Shapes: N rows (hours), C channels (columns), B windows, T time steps looked back on (lookback), P predicted steps
#         (horizon)

URLS = ["https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv"]
SHA256 = "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"
## High, middle and low useful and useless load (Zhou et al. 2021; probably active and reactive power on three levels of
## voltage, which the authors don't say), and the temperature of the transformer's oil, which must not get too hot.
COLUMNS = ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
ENDS = (8_640, 11_520, 14_400)  # the papers' borders: 12, 4 and 4 months of 30 days; what comes later stays unused


class Data(NamedTuple):
    train: Tensor  # (N_train, C) float32, scaled: (raw - mean) / std
    val: Tensor  # (T + N_val, C): reaches back one lookback, for its first input
    test: Tensor  # (T + N_test, C): likewise
    mean: Tensor  # (C,) float64, of the training rows
    std: Tensor  # (C,) float64
    columns: list[str]
    dates: list[str]  # ISO, of all rows used: train, val, test in order, without repetition
    name: str
    source: str
    stand_in: str
    period: int  # rows after which a pattern is expected to come back: 24 where a row is an hour
    ends: tuple[int, int, int] | None  # of the papers' split, None for a file's

    @property
    def label(self) -> str:
        return self.name + ", stand-in" * bool(self.stand_in)


# ---------------------------------------------------------------------------------------------- the stand-in
def follow(x: np.ndarray, hours: np.ndarray | float) -> np.ndarray:
    """What goes 1 / hours of the way to x (N, ...) in every hour, from the mean of x on: (N, ...)."""
    y = [x.mean(0)]
    for target in x[1:]:
        y.append(y[-1] + (target - y[-1]) / hours)
    return np.stack(y)


def read_station() -> Table:
    """The stand-in for ETTh1: a simulated transformer, the same each time.

    ## There is a day, a week and a year to learn. On top, weather and loads wander and come back; oil follows both with
    ## a lag of some hours; and every meter has a noise of its own, which nobody can forecast.
    """
    rng, t = np.random.default_rng(0), np.arange(17_420)
    dates = [datetime(2016, 7, 1) + timedelta(hours=hours) for hours in range(len(t))]
    weekend = np.array([date.weekday() >= 5 for date in dates])
    wave = lambda period, peak: np.cos(2 * np.pi * (t - peak) / period)  # noqa: E731
    warmth = wave(24 * 365.25, 24 * 20)  # 1 in the third week of July, -1 in January
    ## White noise, followed slowly, wanders. The root brings it back to a standard deviation of 1.
    hours = np.array([60.0, 48.0, 16.0, 30.0])
    wander = follow(rng.standard_normal((len(t), 4)), hours) * np.sqrt(2 * hours - 1) * [3.5, 1.2, 0.35, 0.45]

    ## Daily: people get up, cook at noon and in the evening. Weekly: firms rest on two days of seven. Yearly: heating.
    air = 14 + 11 * warmth + 4 * wave(24, 15) + wander[:, 0]  # degrees
    middle = (6 + 3 * wave(24, 14) + 2 * wave(12, 9)) * (1 - 0.3 * weekend) - 2 * warmth + wander[:, 1]
    low = (2 + 0.8 * wave(24, 20) + 0.4 * wave(12, 8)) * (1 + 0.15 * weekend) - 0.4 * warmth + wander[:, 2]
    useless = 0.12 * middle + wander[:, 3]
    oil = follow(air + 1.1 * (middle + low), 5.0)
    values = np.stack([middle + low, useless + 0.2 * low, middle, useless, low, 0.2 * low, oil], 1)  # as in COLUMNS
    values += rng.standard_normal(values.shape) * [0.6, 0.25, 0.5, 0.2, 0.15, 0.06, 0.4]
    return Table(torch.from_numpy(values), COLUMNS, dates, "station", "station", "ETTh1", ENDS)


# ---------------------------------------------------------------------------------------------- a series by its name
def read_etth1() -> Table:
    """Raises ConnectionError where it can't be downloaded, utils.InputError where the file there is another."""
    path = utils.download(URLS, utils.DATA_DIR / "ETTh1.csv", SHA256)
    return read_table(path, "etth1")._replace(ends=ENDS, source="etth1", said=())


SETS = {"etth1": read_etth1, "station": read_station}  # a series more is one function and one line


def read_series(data: str | None = None, **reading) -> Table:
    """All rows of one of SETS, or of a text file; None: ETTh1, and the stand-in where that is out of reach.

    reading: what read_table takes, for files alone. Raises ConnectionError where a series asked for by name can't be
    downloaded, and utils.InputError where there is no such file, and as read_table does.
    """
    if data is None:
        try:
            return read_series("etth1")
        except ConnectionError as error:
            print(f"{error} Working offline with --data station.")
            return read_series("station")
    if data not in SETS and not Path(data).is_file():
        raise utils.InputError(f"{data} is no file; give a CSV file, or one of {', '.join(SETS)}.")
    if data not in SETS and Path(data).stat().st_size > 2e6:
        print(f"reading {data}, {Path(data).stat().st_size / 1e6:.0f} MB", flush=True)
    table = SETS[data]() if data in SETS else read_table(Path(data), **reading)
    print("\n".join(table.said), end="\n" * bool(table.said))
    utils.stand_in_notice(table.name, table.stand_in)
    return table


def add_reading(parser) -> None:
    """The options that say how a file is to be read."""
    add = parser.add_argument
    add("--data", help="etth1, station or a text file, split 60 / 20 / 20 %%; without it ETTh1, else station")
    add("--columns", nargs="+", help="of a file: the columns to forecast; without it all that hold changing numbers")
    add("--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="of a file: only the rows that have this value")
    add("--date-format", help="of a file: how its dates are written, such as %%d/%%m/%%Y; without it, found out")
    add("--fill", action="store_true", help="of a file: fill holes, even more than a quarter of a column")
    add("--period", type=utils.count, help="of a file: rows of a pattern; without it a day, week or year")


def how_to_read(args) -> dict:
    """What the options of add_reading say, as read_series takes it."""
    return {name: vars(args)[name] for name in ("columns", "where", "date_format", "fill", "period")}


# ---------------------------------------------------------------------------------------------- series to tensors
def split(table: Table) -> tuple[int, int, int]:
    """Rows at which the training, validation and test part end.

    ## In order of time, for that is how a forecaster is used: it learns from the past. A random split would put
    ## windows into the test part that share nearly all of their hours with windows of the training part.
    """
    N = len(table.values)
    return table.ends or (int(0.6 * N), int(0.8 * N), N)


def sizes(table: Table, lookback: int | None, horizon: int | None, longest: int = 336) -> tuple[int, int]:
    """Lookback and horizon: as given, or from the length, in whole periods; at most `longest` and 96 rows.

    ## Half of the validation part to forecast, so that it holds some windows that differ; a third of the rest to look
    ## back on, so that the training part does.
    """
    train_end, val_end, test_end = split(table)
    whole = lambda n: max(1, n - n % table.period if n > table.period else n)  # noqa: E731
    P = horizon or min(96, whole(min(val_end - train_end, test_end - val_end) // 2))
    return lookback or whole(min(longest, (train_end - P) // 3)), P


def load_data(data: str | None = None, lookback: int = 336, horizon: int = 96, earlier: int = 0, **reading) -> Data:
    """Read (read_series), split and scale (prepare)."""
    return prepare(read_series(data, **reading), lookback, horizon, earlier)


def prepare(table: Table, lookback: int, horizon: int, earlier: int = 0) -> Data:
    """Split and scale. Raises utils.InputError where a part can't hold a window, and for a constant column.

    earlier: all three parts end so many rows earlier, and the training part is so much shorter.

    ## Four months of validation are one season. A choice that holds from several starting points, and each time learns
    ## from what lies before and is judged by what comes next, is worth more than one that was best once (rolling
    ## origins, Tashman 2000). And the test part stays out of it.
    """
    train_end, val_end, test_end = (end - earlier for end in split(table))
    N_train, N_val, N_test = train_end, val_end - train_end, test_end - val_end
    if N_train < lookback + horizon or min(N_val, N_test) < horizon:
        P = max(1, min(horizon, N_val, N_test, N_train - 1))
        raise utils.InputError(
            f"{table.name} has {len(table.values):,} rows, {max(N_train, 0):,} / {N_val:,} / {N_test:,} of them to "
            f"train, validate and test: too few for lookback {lookback} + horizon {horizon} in the first, or for the "
            f"horizon in the others; the largest that fit: --lookback {max(1, min(lookback, N_train - P))} "
            f"--horizon {P}.")
    ## Scaled, all channels count alike in the loss, whatever their units. The two numbers come from the training rows:
    ## how warm the oil will be next year is part of the question.
    raw = table.values[:test_end]
    mean, std = raw[:train_end].mean(0), raw[:train_end].std(0, correction=0)  # (C,)
    scaled = ((raw - mean) / std).float()  # (N, C)
    for j, column in enumerate(table.columns):
        if (raw[:train_end, j] == raw[0, j]).all():
            raise utils.InputError(f"{table.name}: column {column} is {raw[0, j]:g} in all {N_train:,} training rows, "
                                   "constant; choose others by --columns.")
        if not (std[j].isfinite() and scaled[:, j].isfinite().all()):
            raise utils.InputError(f"{table.name}: column {column} has numbers too large or too small to compute with, "
                                   "beside those of the training rows; correct them or use another unit.")
    return Data(
        train=scaled[:train_end], val=scaled[train_end - lookback : val_end], test=scaled[val_end - lookback :],
        mean=mean, std=std, columns=table.columns, dates=[str(date) for date in table.dates[:test_end]],
        name=table.name, source=table.source, stand_in=table.stand_in, period=table.period,
        ends=table.ends)


def windows(part: Tensor, lookback: int, horizon: int) -> tuple[Tensor, Tensor]:
    """Every window of a part (N, C), one per row: inputs (B, T, C) and targets (B, P, C), B = N - T - P + 1.

    Both are views: 8,209 windows of 432 hours take no more memory than the 8,640 hours they are made of.
    """
    both = part.unfold(0, lookback + horizon, 1).mT  # (B, T + P, C): stride 1 over rows
    return both[:, :lookback], both[:, lookback:]


def batch_of(part: Tensor, rows: int, most: int = 512) -> int:
    """How many windows of so many rows of a part (N, C) to evaluate at once: of 862 channels fewer than of 7."""
    return max(1, min(most, 2**22 // (rows * part.shape[1])))


def autocorrelation(x: Tensor, lags: int) -> Tensor:
    """Correlation of each channel with itself `lag` rows earlier: (N, C) -> (lags + 1, C), 1 at lag 0.

    ##     r[lag] = sum_t (x[t] - m) (x[t-lag] - m) / sum_t (x[t] - m)^2
    ## A peak at 24 says: what happened yesterday at this hour is happening again.
    """
    x = x - x.mean(0)
    N = len(x)
    ## Such a sum for every lag is a convolution of the series with itself, which a Fourier transform makes a product;
    ## zeros up to twice the length keep the end from meeting the beginning.
    power = torch.fft.rfft(x, n=2 * N, dim=0).abs() ** 2
    r = torch.fft.irfft(power, n=2 * N, dim=0)[: lags + 1]
    return r / r[0]


def draw(table: Table, data: Data, r: Tensor, path: Path) -> None:
    """A day, a week and all of it (one mean per day), with the split; and r (lags + 1, C), its autocorrelation."""
    few, day = table.values[:, -7:], data.period  # a day of hours, a week of days
    figure, axes = utils.pyplot().subplots(4, 1, figsize=(11, 12), layout="constrained")
    start = next((i for i, date in enumerate(table.dates) if date.weekday() == 0), 0)  # a Monday
    for a, n in zip(axes, (day, 7 * day)):
        rows = slice(start, start + n + 1)
        a.plot(table.dates[rows], few[rows], label=table.columns[-7:])
        a.set(title=f"{n:,} rows from {table.dates[start]} ({data.label})")
    N = len(few) // day * day
    axes[2].plot(table.dates[:N:day], few[:N].view(-1, day, few.shape[1]).mean(1), lw=0.9)
    axes[2].set(title=f"All rows, each point the mean of {day}; dashed: training, validation and test part end")
    for end in split(table):
        axes[2].axvline(table.dates[end - 1], color="black", ls="--", lw=0.8)
    axes[3].plot(r[:, -7:])
    axes[3].set(title="Autocorrelation of the training rows", xlabel="lag (rows)", xticks=range(0, len(r), day))
    axes[0].legend(ncols=7, fontsize=8)
    utils.write_atomically(path, figure.savefig)


def main() -> None:
    parser = utils.parser(__doc__, __file__, "seed")
    add_reading(parser)
    parser.add_argument("--lookback", type=utils.count, help="rows to look back on; without it at most 336")
    parser.add_argument("--horizon", type=utils.count, help="rows to forecast; without it at most 96")
    args = utils.parse_args(parser)
    torch.manual_seed(args.seed)
    table = read_series(args.data, **how_to_read(args))
    T, P = sizes(table, args.lookback, args.horizon)
    data = prepare(table, T, P)
    train_end, val_end, test_end = split(table)

    print(f"{data.label}: {len(table.values):,} rows of {len(data.columns)} channels, one row per "
          f"{table.step.name}, so a pattern may come back every {data.period} rows")
    print(f"{'':12}{'rows':>16}{'from':>22}{'to':>22}{'windows':>10}")
    for part, first, last, tensor in (("train", 0, train_end, data.train), ("validation", train_end, val_end, data.val),
                                      ("test", val_end, test_end, data.test)):
        print(f"{part:12}{f'{first:,}-{last - 1:,}':>16}{data.dates[first]:>22}{data.dates[last - 1]:>22}"
              f"{len(windows(tensor, T, P)[0]):10,}")
    print(f"unused: {len(table.values) - test_end:,} rows\n")

    ## Mean and std of the training rows scale all parts. Scaled, a part that looks like the training part has mean 0
    ## and std 1. Where it has not, the series drifts, and a model that has learned levels by heart starts every
    ## forecast from the wrong one.
    print(f"{'':12}{'training rows, in the units of the file':>45}{'scaled: validation':>22}{'test':>11}\n"
          f"{'channel':12}{'mean':>9}{'std':>9}{'min':>9}{'max':>9}{f'r[{data.period}]':>9}"
          f"{'mean':>14}{'std':>8}{'mean':>9}{'std':>8}")
    r = autocorrelation(data.train.double(), min(len(data.train) - 1, 8 * data.period))  # (lags + 1, C)
    raw, val, test = table.values[:train_end], data.val[T:], data.test[T:]
    for j, column in enumerate(data.columns):
        print(f"{column:12.12}" + "".join(f"{f(raw[:, j]).item():9.3g}" for f in (torch.mean, torch.std, min, max))
              + f"{r[min(data.period, len(r) - 1), j]:9.2f}"
              f"{val[:, j].mean():14.2f}{val[:, j].std():8.2f}{test[:, j].mean():9.2f}{test[:, j].std():8.2f}")
    print(f"r[{data.period}]: correlation of rows {data.period} apart\n")

    # one window (train.py's default looks back further)
    inputs, targets = windows(data.train, T, P)
    i = int(torch.randint(len(inputs), ()))
    print(f"training windows: inputs {tuple(inputs.shape)}, targets {tuple(targets.shape)}, {inputs.dtype}, all "
          f"views of one tensor of {data.train.nbytes / 1e6:.2f} MB\n"
          f"window {i}, its last two rows of input and its first row of target:")
    print(f"{'':20}" + "".join(f"{column:>9.8}" for column in data.columns))
    for t in range(max(i, i + T - 2), i + T + 1):
        print(f"{data.dates[t]:20}" + "".join(f"{value:9.3f}" for value in data.train[t].tolist()))

    draw(table, data, r, args.out / "series.png")
    print(f"\nwrote series.png to {args.out}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
