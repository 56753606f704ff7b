"""An electricity transformer, hour by hour: a table of measurements as windows that a forecaster can learn from.

You learn here: how to look at a time series (a day, a week, a year, autocorrelation); why it is split by time and never
at random; what a window is; and what no forecaster can know, which a simulation lets you compute.

    python 03_lstm/load.py                       ETTh1 (downloaded once, 2.6 MB)
    python 03_lstm/load.py --data station        the stand-in: a simulated transformer
    python 03_lstm/load.py --data my.csv         a date column and numeric columns, rows at equal distances

You should see (ETTh1): 17,420 hours of 7 channels, of which 8,640 / 2,880 / 2,880 are used; the oil's mean over the
test part lies 1.34 standard deviations below that over the training part, where meters once stood still for 73 hours.
Writes to outputs/: series.png, autocorrelation.png, window.png. Left out on purpose: calendar features (hour, weekday);
the models of train.py see the numbers alone, as those do that they are compared with.
"""

import csv
import math
import sys
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils

# Shapes: N rows (hours), C channels (columns), B windows, T time steps looked back on (lookback), P predicted steps
#         (horizon); the simulated transformer has 6 hidden states

URLS = ["https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv"]
SHA256 = "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"
## High, middle and low useful and useless load (Zhou et al. 2021; probably active and reactive power on three levels of
## voltage, which the authors don't say), and the temperature of the transformer's oil, which must not get too hot.
COLUMNS = ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
ENDS = (8_640, 11_520, 14_400)  # the papers' borders: 12, 4 and 4 months of 30 days; what comes later stays unused
MISSING = {"", "-", "?", "na", "n/a", "nan", "nil", "none", "null"}  # ways to write that there is no number


class Table(NamedTuple):
    values: Tensor  # (N, C) float64, in the file's units
    columns: list[str]
    dates: list[datetime]  # N of them, equally far apart
    name: str  # "etth1", "station" or the file's name
    source: str  # what read_series takes to read it again: one of SETS, or the file's path
    stand_in: str = ""  # the series in whose place it stands, such as "ETTh1"
    ends: tuple[int, int, int] | None = None  # rows at which training, validation and test end; None: 60, 80, 100 %


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
    noise_floor: float | None  # station only: test MSE, scaled, of the best possible forecast over P steps
    period: int  # rows after which a pattern is expected to come back: 24 where a row is an hour

    @property
    def label(self) -> str:
        return self.name + ", stand-in" * bool(self.stand_in)


# ---------------------------------------------------------------------------------------------- the stand-in
## The simulated transformer is a sum of two parts: `known`, a function of date and hour, and a random part that hangs
## on six hidden states. The states follow a linear equation,
##     x[t+1] = A x[t] + w[t+1]             (w: fresh randomness, of mean zero whatever came before)
##     y[t]   = known[t] + G^T x[t] + e[t]  (e: measuring noise, white: of mean zero whatever came before or after)
## which makes the best possible forecast computable: see `oracle_errors`.
STATES = ["weather", "switched load", "middle demand", "low demand", "reactive", "oil"]
MEMORY = np.array([60.0, 500.0, 8.0, 16.0, 30.0])  # hours after which 1/e of a disturbance is left; the oil's follows
SPREAD = np.array([3.5, 1.6, 0.9, 0.35, 0.45])  # standard deviation of each state: degrees, then units of load
OIL_MEMORY, HEATING = 5.0, 1.1  # hours; degrees per unit of load
NOISE = np.array([0.6, 0.25, 0.5, 0.2, 0.15, 0.06, 0.4])  # of each channel's meter


def station_equations() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A (6, 6), how the states move on; Q (6, 6), the covariance of w; G (6, C), how the channels read the states."""
    decay = np.exp(-1 / MEMORY)
    ## Oil warms and cools slowly towards a temperature set by weather and load:
    ##     oil[t+1] = a oil[t] + (1 - a) (weather + HEATING * load)[t+1],    a = exp(-1 / OIL_MEMORY)
    a = math.exp(-1 / OIL_MEMORY)
    pull = (1 - a) * np.array([1.0, HEATING, HEATING, HEATING, 0.0])
    A = np.zeros((6, 6))
    A[:5, :5] = np.diag(decay)
    A[5] = [*(pull * decay), a]
    into = np.vstack([np.eye(5), pull])  # (6, 5): a fresh disturbance reaches the oil at once, by its share
    ## A state of variance s^2 that keeps the share d of itself needs fresh variance s^2 (1 - d^2) to stay as it is.
    Q = into @ np.diag(SPREAD**2 * (1 - decay**2)) @ into.T
    G = np.zeros((6, 7))
    G[:, 2] = [-0.10, 1.0, 1.0, 0.0, 0.0, 0.0]  # MUFL: colder than usual means more heating
    G[:, 4] = [-0.03, 0.0, 0.0, 1.0, 0.0, 0.0]  # LUFL
    G[:, 3] = 0.12 * G[:, 2] + [0, 0, 0, 0, 1.0, 0]  # MULL
    G[:, 5] = 0.2 * G[:, 4] + [0, 0, 0, 0, 0.1, 0]  # LULL
    G[:, 0], G[:, 1] = G[:, 2] + G[:, 4], G[:, 3] + G[:, 5]  # what goes in at high voltage comes out at the two others
    G[5, 6] = 1.0  # OT
    return A, Q, G


def station(n: int = 17_420, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[datetime]]:
    """Simulate n hours: y (N, C) the measurements, known (N, C), x (N, 6) the hidden states, and the dates."""
    rng = np.random.default_rng(seed)
    dates = [datetime(2016, 7, 1) + timedelta(hours=t) for t in range(n)]
    t = np.arange(n)
    hour, weekend = t % 24, np.array([date.weekday() >= 5 for date in dates])
    wave = lambda period, peak: np.cos(2 * np.pi * (t - peak) / period)  # noqa: E731
    bump = lambda at, width: np.exp(-0.5 * (((hour - at + 12) % 24 - 12) / width) ** 2)  # noqa: E731
    warmth = wave(24 * 365.25, 24 * 20)  # 1 in the third week of July, -1 in January
    ## Daily: people get up, cook at noon and in the evening. Weekly: on two days of seven firms rest. Yearly: heating.
    middle = (4.0 + 5.0 * bump(11, 3) + 4.0 * bump(20, 2.5)) * (1 - 0.3 * weekend) - 2.0 * warmth
    low = (1.5 + 0.8 * bump(8, 2) + 1.6 * bump(20, 3)) * (1 + 0.15 * weekend) - 0.4 * warmth
    air = 14 + 11 * warmth + 4.0 * wave(24, 15)  # degrees
    A, _, G = station_equations()

    decay, x = np.diag(A)[:5], np.zeros((n, 6))
    fresh = rng.standard_normal((n, 5)) * SPREAD * np.sqrt(1 - decay**2)
    ## Switched load does not wander, it jumps: with chance 1 - d per hour the feeders are connected anew and the level
    ## is drawn afresh, else it stays. It is d times the old level on average, so the linear equation holds for it, too.
    jumps, levels = rng.random(n) >= decay[1], rng.standard_normal(n) * SPREAD[1]
    oil = np.zeros(n)  # of the known part
    state, warm = np.append(SPREAD * rng.standard_normal(5), 0.0), air[0] + HEATING * (middle + low)[0]
    a = A[5, 5]
    for i in range(n):
        before, state = state, A @ state
        state[:5] += fresh[i]
        state[1] = levels[i] if jumps[i] else before[1]
        state[5] = a * before[5] + (1 - a) * (state[0] + HEATING * state[1:4].sum())
        warm = a * warm + (1 - a) * (air[i] + HEATING * (middle[i] + low[i]))
        x[i], oil[i] = state, warm
    known = np.stack([middle + low, 0.12 * middle + 0.2 * low, middle, 0.12 * middle, low, 0.2 * low, oil], 1)
    return known + x @ G + rng.standard_normal((n, 7)) * NOISE, known, x, dates


def expected_floor(horizon: int) -> np.ndarray:
    """Variance of what can't be known `step` hours ahead, by step and channel: (P, C), in the station's units.

    ## What has been drawn by time t is known to the best forecaster; what is drawn later is known to nobody. After one
    ## step that is w[t+1], after two A w[t+1] + w[t+2], and so on. The covariance of such a sum grows by
    ##     V[1] = Q,   V[step+1] = A V[step] A^T + Q         and the channels' variance is  diag(G^T V G) + noise^2
    ## For a single state of memory m this is s^2 (1 - exp(-2 step / m)): nothing at first, everything at last.
    """
    A, Q, G = station_equations()
    V, variances = np.zeros_like(Q), []
    for _ in range(horizon):
        V = A @ V @ A.T + Q
        variances.append(np.diag(G.T @ V @ G) + NOISE**2)
    return np.stack(variances)


def oracle_errors(y: np.ndarray, known: np.ndarray, x: np.ndarray, starts: range, horizon: int) -> np.ndarray:
    """Mean squared error of the best possible forecast from each of the starts: (P, C), by step and channel.

    starts: the rows t whose next `horizon` rows are forecast.

    ## The oracle knows the equations, the calendar and the hidden states at row t, but not the future's randomness,
    ## whose mean is zero. Of all forecasts the mean has the smallest expected squared error, and here it is
    ##     E[y[t+step]] = known[t+step] + G^T A^step x[t]
    ## Its expected error is expected_floor. Its actual error on the very windows of the test part is the fairer mark:
    ## it shares the luck of that part. A forecaster that only sees the measurements must guess the states as well.
    """
    A, _, G = station_equations()
    at, best, errors = np.arange(starts.start, starts.stop), x[starts.start : starts.stop], []
    for step in range(1, horizon + 1):
        best = best @ A.T  # (B, 6): the states expected one step further on
        errors.append((((y - known)[at + step] - best @ G) ** 2).mean(0))
    return np.stack(errors)


# ---------------------------------------------------------------------------------------------- reading a file
def read_table(path: Path, name: str | None = None) -> Table:
    """Read a CSV file: a header, one column of ISO dates, else numbers, separated by commas.

    The date column is the one called date, time, datetime or timestamp, else the first. Raises utils.InputError, with
    line and column or count, for whatever a forecaster could silently learn nonsense from.
    """
    name = name or path.name
    rows, lines = [], []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                if "".join(row).strip():  # blank lines carry nothing
                    rows.append(row)
                    lines.append(reader.line_num)
    except (UnicodeDecodeError, csv.Error) as error:
        raise utils.InputError(f"{name} is no CSV in UTF-8 ({error}); convert it, for example with iconv.") from error
    if len(rows) < 3:
        raise utils.InputError(f"{name} has {len(rows)} lines; give a header and some hundred rows at least.")
    header, rows, lines = [cell.strip() for cell in rows[0]], rows[1:], lines[1:]
    if len(header) < 2:
        raise utils.InputError(
            f"{name} has one column, {header[0]!r}; give a date column and numeric columns, separated by commas."
        )
    for column, count in Counter(header).items():
        if is_number(column):
            raise utils.InputError(f"{name}: {column!r} in line 1 is no name; the first line has to name the columns.")
        if count > 1:
            raise utils.InputError(f"{name}: line 1 names {column!r} {count} times; give every column its own name.")
    for row, line in zip(rows, lines):
        if len(row) != len(header):
            raise utils.InputError(
                f"{name}: line {line} has {len(row)} cells, but line 1 names {len(header)} columns; correct the line."
            )

    # dates
    named = [j for j, column in enumerate(header) if column.lower() in ("date", "time", "datetime", "timestamp")]
    place = named[0] if named else 0
    columns, dates = header[:place] + header[place + 1 :], []
    for row, line in zip(rows, lines):
        try:
            dates.append(datetime.fromisoformat(row[place].strip()))
        except ValueError as error:
            raise utils.InputError(
                f"{name}: line {line}, column {header[place]}: {row[place]!r} is no date; "
                "write it like 2016-07-01 00:00:00."
            ) from error
    if len({date.tzinfo is None for date in dates}) > 1:
        raise utils.InputError(f"{name}: some dates have a time zone and others have none; write all in the same way.")
    check_dates(dates, lines, name)

    # numbers
    values, missing = np.empty((len(rows), len(columns))), []
    for i, (row, line) in enumerate(zip(rows, lines)):
        for j, cell in enumerate(row[:place] + row[place + 1 :]):
            if not is_number(cell):
                raise utils.InputError(
                    f"{name}: line {line}, column {columns[j]!r}: {cell!r} is no number; correct it or drop the column."
                )
            values[i, j] = math.nan if cell.strip().lower() in MISSING else float(cell)
            if not math.isfinite(values[i, j]):
                missing.append((line, columns[j]))
    if missing:
        ## Filling holes is a choice with consequences: a straight line through a missing day teaches the model that
        ## such days exist. So it is left to the one who knows the data.
        counts = Counter(column for _, column in missing)
        raise utils.InputError(
            f"{name}: cells that are empty, NaN or infinite: {len(missing):,} ("
            f"{', '.join(f'{column} {count:,}' for column, count in counts.items())}), the first in line "
            f"{missing[0][0]}, column {missing[0][1]}; fill them or cut them out."
        )
    return Table(torch.from_numpy(values), columns, dates, name, str(path.resolve()))


def is_number(cell: str) -> bool:
    """Whether a cell holds a number, or one of the ways to say that there is none."""
    try:
        return cell.strip().lower() in MISSING or "_" not in cell and isinstance(float(cell), float)
    except ValueError:
        return False


def check_dates(dates: list[datetime], lines: list[int], name: str) -> None:
    """Raise utils.InputError unless the dates rise in equal steps. lines: where in the file each of them stands."""
    steps = [after - before for before, after in zip(dates, dates[1:])]
    usual = Counter(steps).most_common(1)[0][0]
    where = lambda places: f"line {lines[places[0] + 1]} ({dates[places[0] + 1]})"  # noqa: E731
    if back := [i for i, step in enumerate(steps) if step < timedelta(0)]:
        raise utils.InputError(
            f"{name} is not sorted: rows with an earlier date than the row before: {len(back):,}, the first in "
            f"{where(back)}; sort the rows by date."
        )
    if same := [i for i, step in enumerate(steps) if not step]:
        raise utils.InputError(
            f"{name}: duplicate dates: {len(same):,}, the first in {where(same)}; keep one row for each date."
        )
    if odd := [i for i, step in enumerate(steps) if step % usual]:
        raise utils.InputError(
            f"{name}: rows that don't follow the one before by {usual}, as most do, or a multiple of it: {len(odd):,}, "
            f"the first in {where(odd)}; bring all rows to equal distances."
        )
    if gaps := [i for i, step in enumerate(steps) if step > usual]:
        lost = sum(steps[i] // usual - 1 for i in gaps)
        raise utils.InputError(
            f"{name}: gaps in the dates: {len(gaps):,} (rows missing at one per {usual}: {lost:,}), the first before "
            f"{where(gaps)}; fill them, or cut the file there."
        )


def read_etth1() -> Table:
    """Raises ConnectionError where it can't be downloaded, utils.InputError where the file there is another."""
    path = utils.download(URLS, utils.DATA_DIR / "ETTh1.csv", SHA256)
    return read_table(path, "etth1")._replace(ends=ENDS, source="etth1")


def read_station() -> Table:
    """The stand-in: the simulated transformer, the same each time."""
    y, _, _, dates = station()
    return Table(torch.from_numpy(y), COLUMNS, dates, "station", "station", "ETTh1", ENDS)


SETS = {"etth1": read_etth1, "station": read_station}  # a series more is one function and one line


def read_series(data: str | None = None) -> Table:
    """All rows of one of SETS, or of a CSV file; None: ETTh1, and the stand-in where that is out of reach.

    Raises ConnectionError where a series asked for by name can't be downloaded, and utils.InputError for a path that is
    missing or a folder, and as read_table does.
    """
    if data is None:
        try:
            return read_series("etth1")
        except ConnectionError as error:
            print(f"{error} Working offline with --data station.")
            return read_series("station")
    if data not in SETS and not Path(data).is_file():
        what = "is a folder; give one CSV file" if Path(data).is_dir() else "does not exist; give a CSV file"
        raise utils.InputError(f"{data} {what}, or one of {', '.join(SETS)}.")
    table = SETS[data]() if data in SETS else read_table(Path(data))
    utils.stand_in_notice(table.name, table.stand_in)
    return table


# ---------------------------------------------------------------------------------------------- series to tensors
def split(table: Table) -> tuple[int, int, int]:
    """Rows at which the training, validation and test part end.

    ## In order of time, for that is how a forecaster is used: it learns from the past. A random split would put
    ## windows into the test part that share nearly all of their hours with windows of the training part.
    """
    N = len(table.values)
    return table.ends or (int(0.6 * N), int(0.8 * N), N)


def load_data(data: str | None = None, lookback: int = 336, horizon: int = 96, earlier: int = 0) -> Data:
    """Read (read_series), split and scale (prepare)."""
    return prepare(read_series(data), lookback, horizon, earlier)


def prepare(table: Table, lookback: int, horizon: int, earlier: int = 0) -> Data:
    """Split and scale. Raises utils.InputError where a part can't hold a window, and for a constant column.

    earlier: all three parts end so many rows earlier, and the training part is so much shorter.

    ## Four months of validation are one season. A choice that holds from several starting points, and each time learns
    ## from what lies before and is judged by what comes next, is worth more than one that was best once (rolling
    ## origins, Tashman 2000). And the test part stays out of it.
    """
    if earlier < 0:
        raise utils.InputError(f"earlier {earlier} must be at least 0.")
    train_end, val_end, test_end = (end - earlier for end in split(table))
    N_train, N_val, N_test = train_end, val_end - train_end, test_end - val_end
    if N_train < lookback + horizon or min(N_val, N_test) < horizon:
        raise utils.InputError(
            f"{table.name} has {len(table.values):,} rows, {max(N_train, 0):,} / {N_val:,} / {N_test:,} of them to "
            f"train, validate and test: too few for lookback {lookback} + horizon {horizon} in the first, or for the "
            "horizon in the others; give more rows or smaller numbers."
        )
    ## Scaled, all channels count alike in the loss, whatever their units. The two numbers come from the training rows:
    ## how warm the oil will be next year is part of the question.
    raw = table.values[:test_end]
    mean, std = raw[:train_end].mean(0), raw[:train_end].std(0, correction=0)  # (C,)
    for j, column in enumerate(table.columns):
        if (raw[:train_end, j] == raw[0, j]).all():
            raise utils.InputError(
                f"{table.name}: column {column} is {raw[0, j]:g} in all {N_train:,} training rows, constant; remove it."
            )
        if not (std[j].isfinite() and std[j] > 0):
            raise utils.InputError(f"{table.name}: column {column} has numbers too large or too small to square; use "
                                   "another unit.")
    scaled = ((raw - mean) / std).float()  # (N, C)
    for j, column in enumerate(table.columns):
        if not scaled[:, j].isfinite().all():
            raise utils.InputError(f"{table.name}: column {column} has numbers after its training rows that are too "
                                   "large beside those; correct them.")
    return Data(
        train=scaled[:train_end], val=scaled[train_end - lookback : val_end], test=scaled[val_end - lookback :],
        mean=mean, std=std, columns=table.columns, dates=[str(date) for date in table.dates[:test_end]],
        name=table.name, source=table.source, stand_in=table.stand_in, period=period(table.dates),
        noise_floor=(noise_floor(horizon, std.numpy()).mean().item()
                     if table.stand_in and not earlier else None),
    )


def noise_floor(horizon: int, std: np.ndarray) -> np.ndarray:
    """Of station's test part: the oracle's mean squared error over all its windows, scaled, (P, C)."""
    y, known, x, _ = station()
    return oracle_errors(y, known, x, range(11_520 - 1, 14_400 - horizon), horizon) / std**2


def period(dates: list[datetime]) -> int:
    """Rows in a day; where a row is a day or longer, rows in a week, and 1 where that is no whole number either."""
    step = dates[1] - dates[0]
    cycle = timedelta(days=1) if step < timedelta(days=1) else timedelta(weeks=1)
    return 1 if cycle % step else cycle // step


def windows(part: Tensor, lookback: int, horizon: int) -> tuple[Tensor, Tensor]:
    """Every window of a part (N, C), one per row: inputs (B, T, C) and targets (B, P, C), B = N - T - P + 1.

    Both are views: 8,209 windows of 432 hours take no more memory than the 8,640 hours they are made of.
    """
    both = part.unfold(0, lookback + horizon, 1).mT  # (B, T + P, C): stride 1 over rows
    return both[:, :lookback], both[:, lookback:]


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


def longest_run(x: Tensor) -> int:
    """Length of the longest stretch of equal neighbours in x (N,): where a meter stood still, or was filled in."""
    changes = (x[1:] != x[:-1]).nonzero()[:, 0] + 1  # rows that begin a new stretch
    return torch.diff(changes, prepend=torch.tensor([0]), append=torch.tensor([len(x)])).max().item()


# ---------------------------------------------------------------------------------------------- pictures
def draw_series(table: Table, label: str, day: int, path: Path) -> None:
    """A day, a week and all of it (one mean per day), with the split. day: rows in a day, or what stands for one."""
    train_end, val_end, test_end = split(table)
    few, names = table.values[:, -7:], table.columns[-7:]
    figure, axes = utils.pyplot().subplots(3, 1, figsize=(11, 9))
    start = next((i for i, date in enumerate(table.dates) if date.weekday() == 0), 0)  # a Monday
    for a, n in ((axes[0], day), (axes[1], 7 * day)):
        rows = slice(start, start + n + 1)
        a.plot(table.dates[rows], few[rows], label=names)
        a.set(title=f"{n:,} rows from {table.dates[start]} ({label})")
    N = len(few) // day * day
    axes[2].plot(table.dates[:N:day], few[:N].view(-1, day, few.shape[1]).mean(1), lw=0.9)
    axes[2].set(title=f"All {len(few):,} rows, each point the mean of {day} ({label})")
    for first, last, part in ((0, train_end, "train"), (train_end, val_end, "validation"), (val_end, test_end, "test")):
        axes[2].axvline(table.dates[first], color="black", ls="--", lw=0.8)
        axes[2].text(table.dates[(first + last) // 2], 1.0, part, transform=axes[2].get_xaxis_transform(), ha="center",
                     va="top")
    axes[2].axvline(table.dates[test_end - 1], color="black", ls="--", lw=0.8)
    axes[0].legend(ncols=7, fontsize=8)
    figure.tight_layout()
    utils.write_atomically(path, figure.savefig)


def draw_autocorrelation(r: Tensor, data: Data, label: str, path: Path) -> None:
    """r (lags + 1, C)."""
    figure, axes = utils.pyplot().subplots(figsize=(11, 4))
    axes.plot(r[:, -7:], label=data.columns[-7:])
    for lag in range(data.period, len(r), data.period):
        axes.axvline(lag, color="black", lw=0.4, ls=":")
    axes.set(title=f"Autocorrelation of the training rows ({label}); dotted: every {data.period} rows",
             xlabel="lag (rows)", ylabel="correlation")
    axes.legend(ncols=7, fontsize=8)
    utils.write_atomically(path, figure.savefig)


def draw_window(x: Tensor, y: Tensor, data: Data, label: str, path: Path) -> None:
    """One window: x (T, C) and y (P, C)."""
    T, P, shown = len(x), len(y), range(len(data.columns))[-7:]
    figure, axes = utils.pyplot().subplots(len(shown), 1, figsize=(11, 1 + len(shown)), sharex=True, squeeze=False)
    for a, j in zip(axes[:, 0], shown):
        a.plot(range(1 - T, 1), x[:, j], lw=0.9)
        a.plot(range(1, P + 1), y[:, j], lw=0.9)
        a.axvspan(0.5, P + 0.5, color="black", alpha=0.08, lw=0)
        a.set_ylabel(data.columns[j])
    axes[0, 0].set_title(f"One training window, scaled ({label}): from the white part a model has to tell the grey one")
    axes[-1, 0].set_xlabel("rows from now")
    utils.write_atomically(path, figure.savefig)


def main() -> None:
    parser = utils.parser(__doc__, __file__, "seed")
    add = parser.add_argument
    add("--data", help="etth1, station or a CSV file, of which 60 / 20 / 20 %% train, validate and test; without it "
        "ETTh1, or station if that is out of reach")
    add("--lookback", type=utils.count, default=336, help="rows that a forecast may look back on")
    add("--horizon", type=utils.count, default=96, help="rows to forecast")
    args = utils.parse_args(parser)
    torch.manual_seed(args.seed)
    table = read_series(args.data)
    data = prepare(table, args.lookback, args.horizon)
    label = data.label
    train_end, val_end, test_end = split(table)

    print(f"{label}: {len(table.values):,} rows of {len(data.columns)} channels, one row per "
          f"{table.dates[1] - table.dates[0]}, so a pattern may come back every {data.period} rows")
    print(f"{'':12}{'rows':>16}{'from':>22}{'to':>22}{'windows':>10}")
    for part, first, last, tensor in (("train", 0, train_end, data.train), ("validation", train_end, val_end, data.val),
                                      ("test", val_end, test_end, data.test)):
        count = len(windows(tensor, args.lookback, args.horizon)[0])
        print(f"{part:12}{f'{first:,}-{last - 1:,}':>16}{data.dates[first]:>22}{data.dates[last - 1]:>22}{count:10,}")
    print(f"unused: {len(table.values) - test_end:,} rows\n")

    ## Mean and std of the training rows scale all parts. Scaled, a part that looks like the training part has mean 0
    ## and std 1. Where it has not, the series drifts, and a model that has learned levels by heart starts every
    ## forecast from the wrong one.
    print(f"{'':12}{'training rows, in the units of the file':>54}{'scaled: validation':>22}{'test':>11}\n"
          f"{'channel':12}{'mean':>9}{'std':>9}{'min':>9}{'max':>9}{f'r[{data.period}]':>9}{'frozen':>9}"
          f"{'mean':>14}{'std':>8}{'mean':>9}{'std':>8}")
    r = autocorrelation(data.train.double(), min(len(data.train) - 1, 8 * data.period))  # (lags + 1, C)
    raw, val, test = table.values[:train_end], data.val[args.lookback :], data.test[args.lookback :]
    for j, column in enumerate(data.columns):
        print(f"{column:12.12}" + "".join(f"{f(raw[:, j]).item():9.3g}" for f in (torch.mean, torch.std, min, max))
              + f"{r[min(data.period, len(r) - 1), j]:9.2f}{longest_run(raw[:, j]):9}"
              f"{val[:, j].mean():14.2f}{val[:, j].std():8.2f}{test[:, j].mean():9.2f}{test[:, j].std():8.2f}")
    print(f"r[{data.period}]: correlation of rows {data.period} apart; frozen: rows of the longest "
          "stretch of one and the same number\n")

    # one window (train.py's default looks back further)
    inputs, targets = windows(data.train, args.lookback, args.horizon)
    i = int(torch.randint(len(inputs), ()))
    print(f"training windows: inputs {tuple(inputs.shape)}, targets {tuple(targets.shape)}, {inputs.dtype}, all "
          f"views of one tensor of {data.train.nbytes / 1e6:.2f} MB\n"
          f"window {i}, its last two rows of input and its first row of target:")
    print(f"{'':20}" + "".join(f"{column:>9.8}" for column in data.columns))
    last = i + args.lookback - 1
    for t in range(max(i, last - 1), last + 2):
        row = inputs[i, t - i] if t <= last else targets[i, 0]
        print(f"{data.dates[t]:20}" + "".join(f"{value:9.3f}" for value in row.tolist()))
    if data.noise_floor is not None:
        expected = expected_floor(args.horizon) / data.std.numpy() ** 2  # (P, C)
        print(f"\nnoise floor: {data.noise_floor:.4f}, the test MSE (scaled, horizon {args.horizon}) of the best "
              "possible forecast, which knows the\nequations and the hidden states; over many years it would be "
              f"{expected.mean():.4f} ({expected[0].mean():.4f} one step ahead, {expected[-1].mean():.4f} at the last)")

    draw_series(table, label, data.period, args.out / "series.png")
    draw_autocorrelation(r, data, label, args.out / "autocorrelation.png")
    draw_window(inputs[i], targets[i], data, label, args.out / "window.png")
    print(f"\nwrote series.png, autocorrelation.png and window.png to {args.out}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
