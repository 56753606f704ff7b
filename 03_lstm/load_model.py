"""Use a trained forecaster: see where it is right and where it is wrong, and forecast what nobody has measured yet.

You learn here: to look at forecasts, not only at their mean error; how the error grows with the step; what residuals
tell (a bias, a spread, a pattern that was missed); what MSE, RMSE, MAE and R² each say; and how a forecast leaves the
scaled world and goes on where the file ends.

    python 03_lstm/load_model.py                                     after: python 03_lstm/train.py
    python 03_lstm/load_model.py --windows 0 1000 2000 --channels OT LUFL

You should see (ETTh1, 96 hours ahead, with a model of train.py whose test MSE is 0.357, seed 0): an MSE that grows from
0.120 one hour ahead to 0.401 at the last, and lies between 0.05 (OT) and 0.75 (MUFL); an R² of 0.68 over all channels,
and of 0.39 to 0.58 by channel; residuals of HUFL that still correlate at 24 hours (0.29): part of the day is missed.
Writes to outputs/: forecast.csv (beyond the end of the file), forecasts.png, future.png.
Left out on purpose: intervals around the forecast; the spread of the residuals by step is what they would be made of.
"""

import csv
import io
import math
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from load import Table, add_reading, autocorrelation, batch_of, how_to_read, prepare, read_series, split, windows
from train import load_forecaster, one_period_ago, repeat_last

# Shapes: B windows, T time steps looked back on, C channels, P predicted steps, N rows


@torch.inference_mode()
def predict(forecast: Callable[[Tensor], Tensor], part: Tensor, lookback: int, horizon: int) -> tuple[Tensor, Tensor]:
    """Forecasts and truth for every window of a part (N, C): (B, P, C) each, B = N - T - P + 1, on the CPU."""
    inputs, targets = windows(part, lookback, horizon)
    return torch.cat([forecast(x).cpu() for x in inputs.split(batch_of(part, lookback + horizon))]), targets.cpu()


def evaluate(y: Tensor, truth: Tensor) -> dict[str, float]:
    """The usual error measures of forecasts y against the truth, both of one shape.

    ##     MSE  = mean (y - truth)^2       an error of 2 counts four times an error of 1
    ##     RMSE = sqrt(MSE)                the same, in the unit of y
    ##     MAE  = mean |y - truth|         in the unit of y; an error of 2 counts twice an error of 1
    ##     R^2  = 1 - MSE / variance       1 is perfect, 0 is what the mean of the truth would reach
    ## R^2 compares with a mean that nobody knew beforehand: where a channel hardly moves while it is tested, an honest
    ## forecast comes out below zero. Over several channels at once it can be higher than over each by itself: it then
    ## also credits knowing that one channel lies above another.
    """
    error, truth = (y - truth).double(), truth.double()
    mse, variance = error.square().mean().item(), (truth - truth.mean()).square().mean().item()
    return {"MSE": mse, "RMSE": math.sqrt(mse), "MAE": error.abs().mean().item(),
            "R2": 1 - mse / variance if variance else 0.0}


# ---------------------------------------------------------------------------------------------- beyond the end
@torch.inference_mode()
def future(forecast: Callable[[Tensor], Tensor], table: Table, mean: Tensor, std: Tensor,
           lookback: int) -> tuple[list[datetime], Tensor]:
    """Forecast what follows the last row of a table: the dates, going on, and (P, C) in the file's units.

    ## The model reads scaled numbers and says scaled numbers. On the way in and out the scaler must be the one of its
    ## training, which is why the checkpoint carries it.
    """
    if len(table.values) < lookback or table.values[-lookback:].isnan().any():
        raise utils.InputError(f"{table.name} has {len(table.values)} rows, but a forecast needs "
                               f"{lookback} without holes.")
    x = ((table.values[-lookback:] - mean) / std).float()  # (T, C)
    y = forecast(x[None])[0].cpu().double() * std + mean  # (P, C)
    return [table.step.after(table.dates[-1], k + 1) for k in range(len(y))], y


def write_csv(path: Path, columns: list[str], dates: list[datetime], y: Tensor) -> None:
    """Write a forecast (P, C) in the form that load.py reads."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["date", *columns])
    rows.writerows([date, *row] for date, row in zip(dates, y.tolist()))
    utils.write_atomically(path, lambda file: file.write(text.getvalue().encode()))


# ---------------------------------------------------------------------------------------------- pictures
def draw_forecasts(test: Tensor, y: Tensor, lookback: int, chosen: list[int], channels: list[int], columns: list[str],
                   title: str, path: Path) -> None:
    """For each chosen window (row) and channel (column): the end of its input, the truth, and the forecast y (B, P, C).

    test (T + N, C): the part that the windows are of.
    """
    P = y.shape[1]
    shown = min(lookback, 2 * P)
    inputs, truth = windows(test, lookback, P)
    figure, axes = utils.pyplot().subplots(len(chosen), len(channels), figsize=(5.5 * len(channels), 2.3 * len(chosen)),
                                           squeeze=False, sharex=True, layout="constrained")
    for row, i in zip(axes, chosen):
        for a, j in zip(row, channels):
            a.plot(range(1 - shown, 1), inputs[i, -shown:, j], color="black", lw=0.9, label="input")
            a.plot(range(1, P + 1), truth[i, :, j], color="C0", lw=0.9, label="truth")
            a.plot(range(1, P + 1), y[i, :, j], color="C1", lw=1.5, label="forecast")
            a.set_title(f"{columns[j]}, window {i}: MSE {evaluate(y[i, :, j], truth[i, :, j])['MSE']:.2f}", fontsize=9)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"{title}, test, scaled")
    figure.supxlabel("rows from now")
    utils.write_atomically(path, figure.savefig)


def draw_future(table: Table, dates: list[datetime], y: Tensor, channels: list[int], title: str, path: Path) -> None:
    """The end of the file and, beyond it, the forecast y (P, C)."""
    figure, axes = utils.pyplot().subplots(len(channels), 1, figsize=(10, 2.3 * len(channels)), squeeze=False)
    shown = 2 * len(y)
    for a, j in zip(axes[:, 0], channels):
        a.plot(table.dates[-shown:], table.values[-shown:, j], color="black", lw=0.9, label="measured")
        a.plot(dates, y[:, j], color="C1", label="forecast")
        a.set_ylabel(table.columns[j])
    axes[0, 0].legend(fontsize=8)
    axes[0, 0].set_title(f"{title}: beyond the end of the file")
    utils.write_atomically(path, figure.savefig)


def main() -> None:
    parser = utils.parser(__doc__, __file__, "device")
    add = parser.add_argument
    add_reading(parser)
    add("--windows", type=int, nargs="+", help="test windows to draw, from 0; without it three, evenly spread")
    add("--channels", nargs="+", help="columns to draw; without it the first and the last")
    add("--model", type=Path, default=Path(__file__).parent / "outputs" / "model.pt", help="what train.py wrote")
    args = utils.parse_args(parser)
    model, saved = load_forecaster(args.model, args.device)
    forecast = lambda x: model(x.to(args.device))  # noqa: E731
    T, P, columns = saved["lookback"], saved["horizon"], saved["columns"]
    ## Read as it was for the training, but for what is asked for now; and only what the model knows.
    how = saved.get("reading", {}) | {name: value for name, value in how_to_read(args).items() if value}
    table = read_series(args.data or saved["source"], **how | {"columns": columns})
    if not table.stand_in:  # else read_series says so
        utils.stand_in_notice(saved["data"], saved["stand_in"])
    if table.columns != columns:
        raise utils.InputError(f"{table.name} has the columns {', '.join(table.columns)}, but the model knows "
                               f"{', '.join(columns)}; give a file that has those, in that order.")
    if unknown := [column for column in args.channels or () if column not in columns]:
        raise utils.InputError(f"--channels {unknown[0]}: there is {', '.join(columns)}.")
    data = prepare(table, T, P, saved["earlier"])  # for its checks, period and label
    period, label = data.period, data.label
    if table.name != saved["data"]:
        label += f", trained on {Path(saved['data']).name}" + ", stand-in" * bool(saved["stand_in"])
    if saved["earlier"]:
        label += f", {saved['earlier']:,} rows earlier"
    title = f"{saved['kind']}, {P} rows ahead, {label}"

    ## Scaled by the checkpoint's numbers, not by this file's: see `future`.
    mean, std = (torch.as_tensor(saved[name], dtype=torch.float64) for name in ("mean", "std"))  # (C,)
    _, val_end, test_end = (end - saved["earlier"] for end in split(table))
    test = ((table.values[val_end - T : test_end] - mean) / std).float()  # (T + N_test, C)
    y, truth = predict(forecast, test, T, P)  # (B, P, C) each
    B = len(y)
    chosen = args.windows or sorted({B // 6, B // 2, B * 5 // 6})
    if min(chosen) < 0 or max(chosen) >= B:
        raise utils.InputError(f"--windows {' '.join(map(str, chosen))}: there are windows 0 to {B - 1}.")
    channels = [columns.index(column) for column in args.channels or dict.fromkeys((columns[0], columns[-1]))]

    # how good
    print(f"{title}: {B:,} test windows\n{'':12}{'scaled:':>9}{'':27}{'units of the file:':>20}")
    print(f"{'channel':12}{'MSE':>9}{'RMSE':>9}{'MAE':>9}{'R2':>9}{'RMSE':>11}{'MAE':>9}")
    for j, column in enumerate(columns):
        figures = evaluate(y[..., j], truth[..., j])
        print(f"{column:12.12}" + "".join(f"{value:9.3f}" for value in figures.values())
              + f"{figures['RMSE'] * std[j]:11.3g}{figures['MAE'] * std[j]:9.3g}")
    print(f"{'all':12}" + "".join(f"{value:9.3f}" for value in evaluate(y, truth).values()))

    # where and when it is wrong
    forecasts = {saved["kind"]: y, "repeat last": predict(lambda x: repeat_last(x, P), test, T, P)[0]}
    if period <= T:
        forecasts["one period ago"] = predict(lambda x: one_period_ago(x, P, period), test, T, P)[0]
    errors = {name: (f - truth).square().mean((0, 2)) for name, f in forecasts.items()}  # (P,) each
    steps = [k for k in dict.fromkeys((1, 6, 24, 96, 192, 336, P)) if k <= P]
    print(f"\n{'MSE at step':28}" + "".join(f"{k:>9}" for k in steps))
    for name, error in errors.items():
        print(f"{name:28}" + "".join(f"{error[k - 1]:9.3f}" for k in steps))

    ## Residuals one step ahead: of a perfect forecaster they would have mean 0 and know nothing of each other. What is
    ## correlated could have been forecast; a peak at a day says that part of the daily pattern was missed. Further
    ## ahead, neighbours share most of the hours that they were wrong about, and correlate whatever the forecaster.
    residuals = truth - y  # (B, P, C)
    far = min(period, B - 1)
    r = autocorrelation(residuals[:, 0].double(), far)  # (far + 1, C)
    print(f"\n{'residuals, one step ahead':28}{'mean':>9}{'std':>9}{'in 2 std':>10}{'r[1]':>9}{f'r[{far}]':>9}")
    for j, column in enumerate(columns):
        e = residuals[:, 0, j]
        inside = ((e - e.mean()).abs() < 2 * e.std()).float().mean()
        print(f"{column:28.28}{e.mean():9.3f}{e.std():9.3f}{inside:10.1%}{r[min(1, far), j]:9.2f}{r[far, j]:9.2f}")

    # what comes next
    dates, ahead = future(forecast, table, mean, std, T)
    write_csv(args.out / "forecast.csv", columns, dates, ahead)
    print(f"\nthe file ends on {table.dates[-1]}; forecast.csv goes on to {dates[-1]}")

    draw_forecasts(test, y, T, chosen, channels, columns, title, args.out / "forecasts.png")
    draw_future(table, dates, ahead, channels, title, args.out / "future.png")
    print(f"wrote forecast.csv, forecasts.png and future.png to {args.out}")
    utils.stand_in_notice(saved["data"], saved["stand_in"] or table.stand_in)


if __name__ == "__main__":
    utils.run(main)
