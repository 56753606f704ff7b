"""Chapter 03 but for its training: against NumPy, scikit-learn, nn.LSTM and autograd."""

import itertools
import json
import math
import subprocess
import sys
from datetime import datetime, timedelta

import numpy as np
import pytest
import torch
from conftest import REAL, ROOT, call_main, chapter, refusal

import utils

load, from_scratch, train, load_model = chapter("03_lstm", "load", "from_scratch", "train", "load_model")


@pytest.fixture(scope="module")
def station():
    return load.read_series("station")


def table(n=200, step=timedelta(hours=1), **columns):
    """Lines of a good CSV file: the header and n rows of date, a (a wave) and b (a ramp)."""
    first = datetime(2020, 1, 1)
    columns = {"a": [f"{math.sin(t / 4):.5f}" for t in range(n)], "b": [str(t * 0.5) for t in range(n)], **columns}
    return [",".join(["date", *columns])] + [
        ",".join([str(first + t * step), *(column[t] for column in columns.values())]) for t in range(n)]


def write(path, lines, end="\n"):
    path.write_bytes(end.join(lines).encode() if isinstance(lines, list) else lines)
    return str(path)


# ---------------------------------------------------------------------------------------------- the split, the scaler
@pytest.mark.parametrize("lookback,horizon", [(336, 96), (720, 720), (24, 336), (1, 1)])
def test_the_split_is_that_of_the_papers(station, lookback, horizon):
    data = load.prepare(station, lookback, horizon)
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    raw = station.values.numpy()
    scaler = preprocessing.StandardScaler().fit(raw[:8640])
    expected = torch.from_numpy(scaler.transform(raw)).float()
    torch.testing.assert_close(data.train, expected[:8640])
    torch.testing.assert_close(data.val, expected[8640 - lookback : 11520])
    torch.testing.assert_close(data.test, expected[11520 - lookback : 14400])
    torch.testing.assert_close(data.mean, torch.from_numpy(scaler.mean_))
    torch.testing.assert_close(data.std, torch.from_numpy(scaler.scale_))
    for part, rows in ((data.train, 8640 - lookback), (data.val, 2880), (data.test, 2880)):
        inputs, targets = load.windows(part, lookback, horizon)
        assert len(inputs) == len(targets) == rows - horizon + 1
    assert len(data.dates) == len(set(data.dates)) == 14400 and data.dates == sorted(data.dates)


@pytest.mark.real("ETTh1.csv")
def test_etth1_itself(monkeypatch):
    monkeypatch.setattr(utils, "DATA_DIR", REAL)
    data = load.load_data(None, 336, 96)
    assert (data.name, data.stand_in, data.period) == ("etth1", "", 24)
    assert data.columns == load.COLUMNS == (REAL / "ETTh1.csv").read_text().splitlines()[0].split(",")[1:]
    raw = np.loadtxt(REAL / "ETTh1.csv", delimiter=",", skiprows=1, usecols=range(1, 8))
    assert raw.shape == (17420, 7)
    torch.testing.assert_close(data.test * data.std + data.mean, torch.from_numpy(raw[11184:14400]), rtol=1e-4,
                               atol=1e-4)
    assert data.dates[0] == "2016-07-01 00:00:00" and data.dates[11520] == "2017-10-24 00:00:00"
    oil = data.test[336:, 6].mean().item()
    assert -1.345 < oil < -1.335  # the header's claim


def test_windows_are_consecutive_rows_and_take_no_memory():
    part = torch.arange(30.0).view(15, 2)
    inputs, targets = load.windows(part, 4, 3)
    assert inputs.shape == (9, 4, 2) and targets.shape == (9, 3, 2)
    for i in range(9):
        assert torch.equal(inputs[i], part[i : i + 4]) and torch.equal(targets[i], part[i + 4 : i + 7])
    for side in (inputs, targets):
        assert side.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()


def test_autocorrelation_against_its_definition():
    rng = np.random.default_rng(0)
    x = np.sin(np.arange(300) / 3)[:, None] + rng.standard_normal((300, 2))
    r = load.autocorrelation(torch.from_numpy(x), 40)
    d = x - x.mean(0)
    for lag in (0, 1, 19, 40):
        np.testing.assert_allclose(r[lag], (d[lag:] * d[: len(d) - lag]).sum(0) / (d * d).sum(0), atol=1e-12)


# ---------------------------------------------------------------------------------------------- the stand-in
def test_station_is_the_same_at_every_run_and_of_etth1s_shape(station):
    torch.manual_seed(7)
    np.random.seed(7)
    again = load.read_series("station")
    assert torch.equal(station.values, again.values)
    assert station.values.shape == (17420, 7) and station.columns == load.COLUMNS and station.stand_in
    assert str(station.dates[0]) == "2016-07-01 00:00:00" and str(station.dates[-1]) == "2018-06-26 19:00:00"


def test_the_station_has_a_day_a_week_and_a_year_and_oil_that_lags(station):
    hour, day = torch.arange(17420) % 24, torch.tensor([date.weekday() for date in station.dates])
    middle, low, oil = (station.values[:, station.columns.index(name)] for name in ("MUFL", "LUFL", "OT"))
    r = load.autocorrelation(station.values[:8640], 24 * 7)
    assert (r[24] > r[12]).all() and r[24 * 7, 2] > r[24 * 3, 2]  # the middle load knows Saturdays
    assert middle[day < 5].mean() > 1.2 * middle[day > 4].mean() and low[day < 5].mean() < low[day > 4].mean()
    assert middle[hour == 12].mean() > middle[hour == 3].mean() + 3
    july, january = (torch.tensor([date.month == month for date in station.dates]) for month in (7, 1))
    assert oil[july].mean() > oil[january].mean() + 10 and middle[july].mean() < middle[january].mean()
    sums = station.values[:, 2] + station.values[:, 4] - station.values[:, 0]  # only noise is between them
    assert sums.mean().abs() < 0.05 and sums.std() < 1
    peak = lambda x: max(range(24), key=lambda h: x[hour == h].mean().item())  # noqa: E731
    assert 0 < peak(oil) - peak(middle) < 12


def test_follow_against_the_closed_form_of_a_step():
    x = np.concatenate([np.zeros(50), np.ones(50)])[:, None]
    y = load.follow(x, 5.0)
    rest = 0.8 ** np.arange(1, 50)
    np.testing.assert_allclose(y[1:50, 0], 0.5 * rest)  # from the mean down to 0
    np.testing.assert_allclose(1 - y[50:, 0], (1 - y[49, 0]) * 0.8 ** np.arange(1, 51))


def test_the_station_can_be_forecast_but_not_without_error(station):
    """Ridge regression on a week beats both simple forecasts, and stays above what the meters' noise alone costs."""
    linear = pytest.importorskip("sklearn.linear_model")
    data = load.prepare(station, 168, 24)
    (x, y), (x_test, y_test) = (load.windows(part, 168, 24) for part in (data.train, data.test))
    ridge = linear.Ridge(10.0).fit(x[::4].flatten(1), y[::4].flatten(1))
    error = np.square(ridge.predict(x_test.flatten(1)) - y_test.flatten(1).numpy()).mean()
    naive = (x_test[:, -1:] - y_test).square().mean(), (x_test[:, -24:] - y_test).square().mean()
    noise = (torch.tensor([0.6, 0.25, 0.5, 0.2, 0.15, 0.06, 0.4]) / data.std).square().mean()
    assert noise < error < 0.8 * min(naive)


def test_stand_in_only_where_the_real_set_is_out_of_reach(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils, "DATA_DIR", tmp_path)
    monkeypatch.setattr(load, "URLS", ["http://127.0.0.1:9/ETTh1.csv"])
    found = load.read_series(None)
    assert found.name == "station" and found.stand_in and "STAND-IN" in capsys.readouterr().out
    with pytest.raises(ConnectionError, match="etth1|ETTh1"):
        load.read_series("etth1")
    (tmp_path / "ETTh1.csv").write_text("corrupt")
    with pytest.raises(utils.InputError, match="not the expected file"):
        load.read_series(None)


# ---------------------------------------------------------------------------------------------- a file of one's own
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_good_file(tmp_path, end):
    lines = table(200, timedelta(days=1))
    lines[1:] = [line.replace(" 00:00:00", "") for line in lines[1:]]
    path = write(tmp_path / "x.csv", ("\ufeff" + end.join(lines) + end * 3).encode())
    data = load.load_data(path, 20, 10)
    assert [len(data.train), len(data.val), len(data.test)] == [120, 20 + 40, 20 + 40]
    assert (data.name, data.stand_in, data.period) == ("x.csv", "", 7)
    assert data.columns == ["a", "b"] and data.dates[199] == "2020-07-18 00:00:00"
    torch.testing.assert_close(data.train[:, 1].double() * data.std[1] + data.mean[1],
                               torch.arange(120).double() * 0.5,
                               rtol=1e-5, atol=1e-5)


def test_a_file_called_as_a_data_set_is_still_a_file(tmp_path, monkeypatch):
    """Borders belong to the data set, not to the name; ETTh1.csv by its path is a file like others."""
    write(tmp_path / "station", table(200))
    monkeypatch.chdir(tmp_path)
    data = load.load_data("./station", 20, 10)
    assert [len(data.train), len(data.val), len(data.test)] == [120, 60, 60] and not data.stand_in


def test_large_numbers_with_small_changes_keep_their_changes(tmp_path):
    """As of counters: what scales a file again, from a checkpoint, must not round to float32."""
    lines = [f"{line.split(',')[0]},{1e9 + math.sin(i)},1" if i else line for i, line in enumerate(table(200))]
    lines = [line if i == 0 else line[:-1] + str(i % 7) for i, line in enumerate(lines)]
    data = load.load_data(write(tmp_path / "x.csv", lines), 20, 10)
    values = load.read_table(tmp_path / "x.csv").values[:120]
    torch.testing.assert_close(((values - data.mean) / data.std).float(), data.train, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(data.train.std(0, correction=0), torch.ones(2))


def test_the_date_may_be_any_column_and_carry_a_zone(tmp_path):
    rows = [f"{t},2020-01-01T{t:02}:00:00+01:00,{-t}" for t in range(24)]
    found = load.read_table(tmp_path / write(tmp_path / "x.csv", ["\ufeffa,Timestamp,b", *rows]))
    assert found.columns == ["a", "b"] and found.values[5].tolist() == [5, -5]
    assert found.dates[1] - found.dates[0] == timedelta(hours=1)


def changed(line, new, n=200):
    lines = table(n)
    lines[line - 1] = new if isinstance(new, str) else new(lines[line - 1])
    return lines


def without(*numbers):
    return [line for number, line in enumerate(table(), 1) if number not in numbers]


def cell(column, text):
    return lambda line: ",".join([*line.split(",")[:column], text, *line.split(",")[column + 1 :]])


def changed_dates(form, days, step=1, n=12):
    """n rows whose days are all below 13, so that they may be months as well."""
    return ["date,a", *(f"{(datetime(2020, 1, 1) + timedelta(days=i)).strftime(form)},{i % 5}" for i in range(n))]


BAD = {
    "text": (changed(42, cell(2, "high")), "line 42, column 'b': 'high' is no number"),
    "underscore": (changed(42, cell(1, "1_000")), "line 42, column 'a': '1_000' is no number"),
    "after blank lines": (["", *table()[:9], "  ", *changed(42, cell(2, "high"))[9:]], "line 44, column 'b': 'high'"),
    "holes": ([line if i % 3 or not i else line.rsplit(",", 2)[0] + ",," for i, line in enumerate(table())],
              r"infinite: 132 \(a 66, b 66\), the first in line 4, column a: .* --fill"),
    "gaps": (without(*range(100, 190)), r"gaps .* one hour apart: 90 rows, the first before line 100 .* --fill"),
    "uneven": (changed(70, cell(0, "2020-01-03 20:30:00")), r"don't follow .* 1, the first in line 70 .*20:30"),
    "unsorted": (table()[:80] + table()[90:99] + table()[80:90] + table()[99:],
                 r"not sorted: .*: 1, the first in line 90 \(2020-01-04 07:00:00\)"),
    "duplicate": (table()[:30] + table()[29:], r"duplicate dates: 1, the first in line 31 \(2020-01-02 04:00:00\)"),
    "no date": (changed(12, cell(0, "7/1/2016 0:00")), "line 12, column date: '7/1/2016 0:00' is no date"),
    "zones": (changed(12, cell(0, "2020-01-01 10:00:00+00:00")), "some dates have a time zone"),
    "ragged": (changed(33, lambda line: line + ",1"), "line 33 has 4 cells, but line 1 names 3"),
    "too few": (table(60), r"60 rows, 36 / 12 / 12 .* lookback 30 \+ horizon 10"),
    "short test": (table(40), "40 rows, 24 / 8 / 8"),
    "nothing left": ([",".join(line.split(",")[:1] + ["7.5"]) if i else "date,c" for i, line in enumerate(table())],
                     "no column of changing numbers is left .'c': constant, 7.5"),
    "too large": (table(c=[f"{t}e300" for t in range(1, 201)]), "column c has numbers too large"),
    "too large later": (table(c=[str(t % 5) if t < 150 else "1e300" for t in range(200)]), "column c has .* too large"),
    "too small": (table(c=[f"{t}e-300" for t in range(1, 201)]), "column c has numbers too large or too small"),
    "no header": (table()[1:], "line 1 is no name"),
    "twice": (["date,a,a", *table()[1:]], "names 'a' 2 times"),
    "one column": ([line.split(",")[0] for line in table()], "has one column, 'date'"),
    "two ways": (changed_dates("%d/%m/%Y", 12, 31), "'01/01/2020', can be read as %d/%m/%Y and as %m/%d/%Y; say which"),
    "no dates": (["a,b", *(f"{i * i % 7},{i}" for i in range(90))], "no column holds dates.*--date-format"),
    "empty": ([""], "has 0 lines"),
    "header alone": (table()[:1], "has 1 lines"),
    "not UTF-8": (b"date,a\n\xff\xfe", "no CSV in UTF-8"),
    "binary": (b"date,a\n2020-01-01,\x00\n2020-01-02,1\n", "no CSV in UTF-8|is no number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_line_column_and_count(tmp_path, case):
    lines, message = BAD[case]
    with pytest.raises(utils.InputError, match=message) as error:
        load.load_data(write(tmp_path / "x.csv", lines), 30, 10)
    text = str(error.value)
    assert text.startswith("x.csv") and text.endswith(".") and "\n" not in text


def test_a_column_that_is_constant_while_training_is_left_out_unless_asked_for(tmp_path):
    path = write(tmp_path / "x.csv", table(c=["1"] * 120 + ["2"] * 80))
    assert load.load_data(path, 30, 10).columns == ["a", "b"]
    with pytest.raises(utils.InputError, match="column c is 1 in all 120"):
        load.load_data(path, 30, 10, columns=["a", "c"])


def test_earlier_moves_all_parts_and_fits_the_scaler_anew(tmp_path):
    path = write(tmp_path / "x.csv", table(200))
    now, then = load.load_data(path, 20, 10), load.load_data(path, 20, 10, earlier=40)
    unscale = lambda data, part: part * data.std + data.mean  # noqa: E731
    assert len(then.train) == len(now.train) - 40 and len(then.val) == len(now.val) and len(then.test) == len(now.test)
    both = torch.cat([unscale(now, now.train), unscale(now, now.val)[20:], unscale(now, now.test)[20:]])
    expected = both[len(then.train) - 20 : len(then.train) - 20 + len(then.val)]
    assert torch.allclose(unscale(then, then.val), expected, atol=1e-3)
    assert then.train.mean(0).abs().max() < 1e-5 and len(then.dates) == len(now.dates) - 40
    for earlier, words in ((110, "too few"), (500, "0 / 40 / 40")):
        with pytest.raises(utils.InputError, match=words):
            load.load_data(path, 20, 10, earlier=earlier)


def test_every_part_must_hold_a_window(tmp_path):
    path = write(tmp_path / "x.csv", table(60))
    load.load_data(path, 10, 12)
    with pytest.raises(utils.InputError, match="36 / 12 / 12"):
        load.load_data(path, 10, 13)


def test_paths_that_are_no_files(tmp_path):
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(utils.InputError, match="is no file; give a CSV file, or one of etth1, station"):
            load.read_series(str(path))


# ---------------------------------------------------------------------------------------------- from_scratch.py
def test_recurrence_by_hand_agrees_with_pytorch_and_autograd():
    errors = from_scratch.check_against_pytorch()
    assert len(errors) == 6 and max(errors.values()) < 1e-12, errors


def small_problem():
    g = torch.Generator().manual_seed(1)
    w = {name: t.double() for name, t in from_scratch.init(3, 5, 4, 1.0, g).items()}
    for name in ("head", "head_bias"):  # zeros would send no gradient back, and nothing would be checked
        w[name] = torch.randn(w[name].shape, generator=g, dtype=torch.float64)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return draw(6, 7, 3), draw(6, 4, 3), w


def test_gradients_by_hand_agree_with_finite_differences():
    x, y, w = small_problem()
    _, gradients = from_scratch.loss_and_gradients(x, y, w)
    for name, weight in w.items():
        flat = weight.view(-1)
        for i in range(0, len(flat), 1 + len(flat) // 7):
            flat[i] += 1e-6
            up = from_scratch.loss_and_gradients(x, y, w)[0]
            flat[i] -= 2e-6
            down = from_scratch.loss_and_gradients(x, y, w)[0]
            flat[i] += 1e-6
            assert gradients[name].reshape(-1)[i].item() == pytest.approx((up - down) / 2e-6, abs=1e-7), name


def test_the_forecast_before_training_repeats_the_last_row_and_follows_the_level():
    x = torch.randn(4, 7, 3)
    w = from_scratch.init(3, 5, 4, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(from_scratch.forward(x, w)[0], x[:, -1:].expand(-1, 4, -1))
    x, _, w = small_problem()
    torch.testing.assert_close(from_scratch.forward(x + 10, w)[0], from_scratch.forward(x, w)[0] + 10)


def test_clip_against_pytorch():
    for longest in (0.1, 1e6):
        ours = {"a": torch.randn(4, 5), "b": torch.randn(7)}
        leaves = [torch.nn.Parameter(torch.zeros_like(t)) for t in ours.values()]
        for leaf, t in zip(leaves, ours.values()):
            leaf.grad = t.clone()
        torch.nn.utils.clip_grad_norm_(leaves, longest)
        from_scratch.clip(ours, longest)
        for leaf, t in zip(leaves, ours.values()):
            torch.testing.assert_close(t, leaf.grad)


@pytest.mark.parametrize("kind,change", [("rnn", 1.5), ("lstm", 2.0)])
def test_gradient_norms_against_autograd(kind, change):
    T, B, C, M = 9, 3, 2, 4
    x = torch.randn(T, B, C, dtype=torch.float64)
    ours = from_scratch.gradient_norms(x, M, kind, change, torch.Generator().manual_seed(5))
    g, n = torch.Generator().manual_seed(5), 4 if kind == "lstm" else 1
    W_x, W_h, b = ((2 * torch.rand(*s, generator=g, dtype=x.dtype) - 1) / M**0.5
                   for s in ((C, n * M), (M, n * M), (n * M,)))
    v = torch.randn(B, M, generator=g, dtype=x.dtype)
    v = v / v.norm(dim=-1, keepdim=True)
    if kind == "rnn":
        cell = torch.nn.RNNCell(C, M).double()
        W_h = W_h * change
    else:
        cell = torch.nn.LSTMCell(C, M).double()
        b[M : 2 * M] += change
    with torch.no_grad():
        for p, value in zip(cell.parameters(), (W_x.mT, W_h.mT, b, torch.zeros_like(b))):
            p.copy_(value)
    state, states = torch.zeros(B, M, dtype=x.dtype), []
    state = (state, state) if kind == "lstm" else state
    for x_t in x:
        state = cell(x_t, state)
        state = (state[0] * 1, state[1] * 1) if kind == "lstm" else state  # h and c as two inputs of the next step
        states.append(state if kind == "lstm" else (state,))
    loss = (states[-1][0] * v).sum()
    for back in range(T):
        leaves = states[T - 1 - back]
        gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        norm = torch.cat([g for g in gradients if g is not None], -1).norm(dim=-1).mean().item()
        assert ours[back].item() == pytest.approx(norm, rel=1e-9), back


def test_plain_gradients_vanish_or_explode_and_open_forget_gates_keep_them(station):
    """What the picture shows, and what the docstrings of the two cells say."""
    x = load.prepare(station, 1, 1).train[: 200 * 8].view(8, 200, 7).transpose(0, 1).double()
    norm = lambda kind, change: from_scratch.gradient_norms(  # noqa: E731
        x, 64, kind, change, torch.Generator().manual_seed(0))[-1].item()
    assert norm("rnn", 1.0) < 1e-25 and norm("rnn", 6.0) > 1e10
    assert norm("rnn", 1.0) < norm("lstm", 0.0) < norm("lstm", 1.0) < 1e-6
    assert 1e-2 < norm("lstm", 5.0) < 1e2


# ---------------------------------------------------------------------------------------------- load_model.py
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small run of train.py on station: 48 hours -> 24 hours."""
    folder = tmp_path_factory.mktemp("trained")
    options = "--data station --model lstm --lookback 48 --horizon 24 --hidden 8 --epochs 1 --batch-size 512"
    call_main(train, *options.split(), "--device", "cpu", "--out", folder)
    return folder


def test_measures_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(50, 6, generator=g).cumsum(0)
    for noise in (0.3, 9.0):  # the second is worse than the mean
        y = truth + noise * torch.randn(50, 6, generator=g)
        found, a, b = load_model.evaluate(y, truth), truth.flatten().numpy(), y.flatten().numpy()
        assert found["MSE"] == pytest.approx(metrics.mean_squared_error(a, b), rel=1e-5)
        assert found["RMSE"] == pytest.approx(metrics.mean_squared_error(a, b) ** 0.5, rel=1e-5)
        assert found["MAE"] == pytest.approx(metrics.mean_absolute_error(a, b), rel=1e-5)
        assert found["R2"] == pytest.approx(metrics.r2_score(a, b), rel=1e-5, abs=1e-5)
    assert found["R2"] < 0


def test_predictions_are_those_that_train_evaluated(trained, station):
    model, saved = train.load_forecaster(trained / "model.pt")
    data = load.prepare(station, 48, 24)
    y, truth = load_model.predict(model, data.test, 48, 24)
    assert y.shape == truth.shape == (2880 - 24 + 1, 24, 7)
    with torch.no_grad():
        torch.testing.assert_close(y[1000], model(data.test[None, 1000:1048])[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(truth[1000], data.test[1048:1072])
    figures = json.loads((trained / "metrics.json").read_text())["metrics"]
    ours = load_model.evaluate(y, truth)
    for name in ("mse", "mae", "rmse", "r2"):
        assert ours[name.upper()] == pytest.approx(figures[f"test_{name}"], rel=1e-4)


def test_a_model_of_earlier_rows_is_judged_by_the_test_part_it_had(tmp_path):
    options = "--model lstm --lookback 12 --horizon 4 --hidden 4 --epochs 1 --earlier 60 --device cpu".split()
    call_main(train, "--data", write(tmp_path / "x.csv", table(400)), *options, "--out", tmp_path / "o")
    out = call_main(load_model, "--model", tmp_path / "o" / "model.pt", "--out", tmp_path, "--device",
               "cpu")
    figures = json.loads((tmp_path / "o" / "metrics.json").read_text())["metrics"]
    whole, = (line.split() for line in out.splitlines() if line.startswith("all "))
    assert "60 rows earlier" in out and float(whole[1]) == pytest.approx(figures["test_mse"], abs=6e-4)


def test_what_is_drawn_is_the_windows_that_were_chosen(trained, station, tmp_path, monkeypatch):
    figures = {}
    monkeypatch.setattr(utils, "write_atomically", lambda path, write, *content: figures.update(
        {path.name: getattr(write, "__self__", None)}))
    call_main(load_model, "--model", trained / "model.pt", "--out", tmp_path, "--device", "cpu",
         "--windows", 7, 900, "--channels", "MUFL", "OT")
    model, data = train.load_forecaster(trained / "model.pt")[0], load.prepare(station, 48, 24)
    for axes, (i, j) in zip(figures["forecasts.png"].axes, itertools.product((7, 900), (2, 6)), strict=True):
        before, truth, forecast = (torch.from_numpy(line.get_ydata()) for line in axes.lines)
        assert torch.equal(before, data.test[i : i + 48, j]) and torch.equal(truth, data.test[i + 48 : i + 72, j])
        with torch.no_grad():
            expected = model(data.test[None, i : i + 48])[0, :, j]
        torch.testing.assert_close(forecast, expected, rtol=1e-3, atol=1e-4)
    ahead = figures["future.png"].axes[0].lines[1]
    assert len(ahead.get_ydata()) == 24 and ahead.get_xdata()[0] == station.dates[-1] + timedelta(hours=1)


def test_forecast_goes_on_where_the_file_ends_scaled_by_the_checkpoint(trained, station, tmp_path):
    """On a file of another length, so of another scaler; and what is written can be appended to the file."""
    rows = zip(station.dates[:1000], station.values[:1000].tolist())
    lines = ["date," + ",".join(station.columns), *(",".join([str(date), *map(repr, row)]) for date, row in rows)]
    path = write(tmp_path / "mine.csv", lines + [""])
    out = call_main(load_model, "--model", trained / "model.pt", "--data", path, "--out", tmp_path,
               "--device", "cpu", "--windows", 0, 176, "--channels", "LUFL")
    assert "mine.csv, trained on station, stand-in" in out and "this run uses station in place of ETTh1" in out
    model, saved = train.load_forecaster(trained / "model.pt")
    mean, std = torch.tensor(saved["mean"]).double(), torch.tensor(saved["std"]).double()
    with torch.no_grad():
        expected = model(((station.values[952:1000] - mean) / std).float()[None])[0].double() * std + mean
    found = load.read_table(tmp_path / "forecast.csv")
    assert found.columns == station.columns and found.dates == station.dates[1000:1024]
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)
    with open(path, "a") as file:
        file.write((tmp_path / "forecast.csv").read_text().split("\n", 1)[1])
    assert len(load.read_table(tmp_path / "mine.csv").values) == 1024
    assert not list(tmp_path.glob("*.tmp"))


def test_a_forecast_is_written_with_all_its_digits_and_read_again(tmp_path):
    dates = [datetime(2024, 2, 27) + k * timedelta(days=1) for k in range(3)]
    values = torch.tensor([[123_469_017.25, -0.1], [2.5, 1e-9], [3.0, 1 / 3]], dtype=torch.float64)
    load_model.write_csv(tmp_path / "x.csv", ["a, b", "c"], dates, values)
    found = load.read_table(tmp_path / "x.csv")
    assert found.columns == ["a, b", "c"] and found.dates == dates and torch.equal(found.values, values)


def test_the_future_is_made_of_the_last_rows_alone(station):
    seen = []
    forecast = lambda x: seen.append(x) or x[:, -3:] + 1  # noqa: E731
    mean, std = torch.full((7,), 2.0).double(), torch.full((7,), 4.0).double()
    dates, y = load_model.future(forecast, station, mean, std, 10)
    torch.testing.assert_close(seen[0][0].double(), (station.values[-10:] - 2) / 4)
    torch.testing.assert_close(y, station.values[-3:] + 4, rtol=1e-5, atol=1e-5)  # one scaled unit is std
    assert dates[0] - station.dates[-1] == timedelta(hours=1) and len(dates) == 3


def test_load_model_as_a_script(trained, station, tmp_path):
    options = ("--model", trained / "model.pt", "--device", "cpu", "--out", tmp_path)
    out = call_main(load_model, *options)
    mse = json.loads((trained / "metrics.json").read_text())["metrics"]["test_mse"]
    everything = next(line for line in out.splitlines() if line.startswith("all "))
    assert float(everything.split()[1]) == pytest.approx(mse, abs=6e-4) and "STAND-IN" in out
    by_step = {line[:28].strip(): [float(v) for v in line[28:].split()] for line in out.splitlines()
               if line.startswith(("lstm  ", "repeat last"))}
    model, test = train.load_forecaster(trained / "model.pt")[0], load.prepare(station, 48, 24).test
    y, truth = load_model.predict(model, test, 48, 24)
    expected = ((y - truth) ** 2).mean(2).mean(0)[[0, 5, 23]].tolist()
    assert by_step["lstm"] == pytest.approx(expected, abs=6e-4)
    naive = (test[47:-24, None] - truth).square().mean((0, 2))[[0, 5, 23]].tolist()
    assert by_step["repeat last"] == pytest.approx(naive, abs=6e-4)
    oil = next(line.split() for line in out.splitlines() if line.startswith("OT "))
    degrees = (y - truth)[..., 6].abs().mean().item() * station.values[:8640, 6].std().item()
    assert float(oil[6]) == pytest.approx(degrees, rel=6e-3)  # MAE in the file's units
    for name in ("forecasts.png", "future.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    for more, message in ((("--windows", 0, 9999), "windows 0 to 2856"), (("--windows", -1), "windows 0 to 2856"),
                          (("--channels", "OT", "XY"), "--channels XY: there is HUFL"),
                          (("--data", write(tmp_path / "x.csv", table())), "has no column HUFL .*; it has a, b")):
        with pytest.raises(utils.InputError, match=message):
            call_main(load_model, *options, *more)


def test_models_that_are_none(trained, tmp_path):
    assert "python 03_lstm/train.py" in refusal(load_model, "--model", tmp_path / "no.pt", "--out", tmp_path)
    saved = utils.load_checkpoint(trained / "model.pt", train.SCRIPT)
    older = {name: value for name, value in saved.items() if name != "earlier"}  # of before --earlier was kept
    utils.write_atomically(tmp_path / "older.pt", torch.save, older | {"mean": torch.tensor(saved["mean"])})
    call_main(load_model, "--model", tmp_path / "older.pt", "--out", tmp_path)
    for change in ({"kind": "other"}, {"config": saved["config"] | {"hidden": 9}}, {"config": {}}):
        utils.write_atomically(tmp_path / "model.pt", torch.save, saved | change)
        with pytest.raises(utils.InputError, match="another version of the model"):
            call_main(load_model, "--model", tmp_path / "model.pt", "--out", tmp_path)


# ---------------------------------------------------------------------------------------------- the scripts
def test_load_as_a_script(tmp_path):
    out = call_main(load, "--data", "station", "--out", tmp_path)
    assert out.count("STAND-IN") == 2 and "2,785" in out and (tmp_path / "series.png").stat().st_size > 20_000
    path = write(tmp_path / "one.csv", [line.rsplit(",", 1)[0] for line in table(200, timedelta(hours=5))])
    options = ("--data", path, "--lookback", 20, "--horizon", 5, "--out", tmp_path)
    assert "every 1 rows" in call_main(load, *options)
    path = write(tmp_path / "bad.csv", BAD["text"][0])
    assert "column 'b'" in refusal(load, "--data", path, "--out", tmp_path)


def test_from_scratch_as_a_script(tmp_path):
    options = ("--data", "station", "--lookback", 24, "--horizon", 12, "--hidden", 16, "--epochs", 1,
               "--batch-size", 128)
    out = call_main(from_scratch, *options, "--out", tmp_path)
    figures = {line[:28].strip(): [float(v) for v in line[28:].split()[:2] if "." in v] for line in out.splitlines()
               if line.startswith(("repeat last", "LSTM by hand"))}
    assert figures["LSTM by hand"][0] < 0.8 * figures["repeat last"][0]  # it has learned
    assert "LSTM, backward" in out and (tmp_path / "from_scratch.png").stat().st_size > 20_000


def test_from_scratch_refuses_what_makes_no_sense(tmp_path):
    for option, value in (("--lookback", 0), ("--lr", -1), ("--seed", -1)):
        assert f"argument {option}: {value}" in refusal(from_scratch, option, value, "--out", tmp_path)


def test_the_forecasters_come_alone():
    """Another program takes SegmentGRU: nothing that parses options, fetches or draws comes along."""
    program = f"""if True:
        import sys, torch
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "03_lstm")!r}]
        loud = "argparse", "requests", "matplotlib"
        for name in list(sys.modules):
            if name.split(".")[0] in loud:
                del sys.modules[name]
        threads, state = torch.get_num_threads(), torch.get_rng_state()
        import load_model, train
        assert not [name for name in sys.modules if name.split(".")[0] in loud]
        assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
        net = train.SegmentGRU(channels=3, lookback=48, horizon=20, segment=12, hidden=16, dropout=0.0, norm="last")
        assert net(torch.zeros(2, 48, 3)).shape == (2, 20, 3)
        """
    subprocess.run([sys.executable, "-c", program], check=True)
