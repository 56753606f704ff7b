"""Chapter 03, train.py and experiment.py, against scikit-learn, nn.GRU, nn.LSTM, and as users run them."""

import sys
import json
import math
import re
from datetime import datetime, timedelta

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import REAL, ROOT, call_main, chapter, refusal

import utils

load, train, experiment, load_model = chapter("03_lstm", "load", "train", "experiment", "load_model")
T, P, C = 48, 20, 3
SEGMENT = dict(channels=C, lookback=T, horizon=P, segment=12, hidden=16, dropout=0.0, norms=["last", "revin"],
               line="nlinear")
SMALL = ["--horizon", "24", "--lookback", "48", "--segment", "24", "--hidden", "16", "--batch-size", "64",
         "--lr", "0.01", "--device", "cpu"]


def small(kind, **changes):
    torch.manual_seed(0)
    if kind == "segment":
        return train.build(kind, SEGMENT | changes)
    return train.build(kind, dict(channels=C, horizon=P, hidden=16, dropout=0.0, norm="last") | changes)


KINDS = ["segment", "lstm", "seq2seq"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A CSV file with a daily wave, 900 hours of two columns: --data for everything that trains here."""
    path = tmp_path_factory.mktemp("table") / "waves.csv"
    rng, first = np.random.default_rng(0), datetime(2020, 1, 1)
    lines = ["date,load,heat"]
    for t in range(900):
        wave = math.sin(2 * math.pi * t / 24)
        lines.append(f"{first + timedelta(hours=t)},{5 + 2 * wave + 0.2 * rng.standard_normal():.4f},"
                     f"{20 - wave + 0.1 * rng.standard_normal():.4f}")
    path.write_text("\n".join(lines))
    return path


# ---------------------------------------------------------------------------------------------- measures
def test_evaluate_against_scikit_learn_counts_every_window():
    metrics = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(0)
    part = torch.randn(700, C) * torch.tensor([1.0, 2.0, 0.5]) + 3
    calls = []

    def forecast(x):
        calls.append(x)
        return x[:, :P] * 0.5 + 1

    ours = train.evaluate(forecast, part, T, P)
    truth, said = [], []
    for i in range(700 - T - P + 1):  # by the definition of a window, and more than one batch with a remainder
        truth.append(part[i + T : i + T + P])
        said.append(part[i : i + P] * 0.5 + 1)
    truth, said = torch.stack(truth).flatten().numpy(), torch.stack(said).flatten().numpy()
    assert sum(map(len, calls)) == 633 and len({len(x) for x in calls}) > 1
    assert ours["mse"] == pytest.approx(metrics.mean_squared_error(truth, said), rel=1e-6)
    assert ours["rmse"] == pytest.approx(metrics.root_mean_squared_error(truth, said), rel=1e-6)
    assert ours["mae"] == pytest.approx(metrics.mean_absolute_error(truth, said), rel=1e-6)
    assert ours["r2"] == pytest.approx(metrics.r2_score(truth, said), rel=1e-5)
    assert train.evaluate(lambda x: part[:P].expand(len(x), -1, -1) * 0 + 3, torch.full((99, C), 3.0), T, P)["mse"] == 0


# ---------------------------------------------------------------------------------------------- baselines
def test_naive_baselines_say_what_their_names_say():
    hours = torch.arange(200.0)
    series = torch.stack([hours, hours % 24, -hours], 1)
    x, y = train.windows(series, T, P + 30)
    assert torch.equal(train.repeat_last(x, P + 30)[:, 7], x[:, -1])
    yesterday = train.one_period_ago(x, P + 30, 24)
    assert torch.equal(yesterday[..., 1], y[..., 1])  # what comes back every day is known
    for step in (0, 5, 23, 24, 49):  # beyond a day: the last day that was seen, again
        assert torch.equal(yesterday[:, step, 0], x[:, T - 24 + step % 24, 0])


def test_nlinear_is_the_least_squares_solution():
    linear = pytest.importorskip("sklearn.linear_model")
    torch.manual_seed(0)
    series = torch.randn(600, C).cumsum(0) * 0.1 + torch.sin(torch.arange(600) / 4)[:, None]  # it wanders and swings
    line = train.NLinear(T, P).fit(series)
    x, y = load.windows(series.double(), T, P)
    last = x[:, -1:]
    flat = lambda side: (side - last).mT.reshape(-1, side.shape[1]).numpy()  # noqa: E731
    theirs = linear.LinearRegression().fit(flat(x)[:, :-1], flat(y))  # without the last value, which is always 0
    np.testing.assert_allclose(line.weight[: T - 1].numpy(), theirs.coef_.T, atol=2e-4)
    np.testing.assert_allclose(line.weight[T].numpy(), theirs.intercept_, atol=1e-4)
    expected = torch.from_numpy(theirs.predict(flat(x)[:, :-1])).view(len(x), C, P).mT + last
    torch.testing.assert_close(line(x.float()), expected.float(), atol=1e-3, rtol=1e-3)
    long, _ = load.windows(series, 2 * T, P)
    torch.testing.assert_close(line(long), line(long[:, -T:]))  # it takes the newest of a longer window


def test_moments_are_the_sums_over_all_windows():
    series = torch.randn(90, C)
    for n in (1, 2, 40, 90):
        windows = series.double().unfold(0, n, 1).reshape(-1, n)
        windows = torch.cat([windows, torch.ones(len(windows), 1, dtype=torch.float64)], 1)
        torch.testing.assert_close(train.moments(series, n), windows.T @ windows)


@pytest.mark.parametrize("penalty", [1e-3, 1.0])
@pytest.mark.parametrize("level", ["none", "last"])
def test_ridge_against_scikit_learn(penalty, level):
    linear = pytest.importorskip("sklearn.linear_model")
    series = (torch.randn(300, C) + torch.sin(torch.arange(300) / 4)[:, None]).double()
    x, y = (side.mT.reshape(-1, side.shape[1]) for side in load.windows(series, T, P))
    seen = x[:, -12:]  # it looks at the last 12 of T rows
    last = seen[:, -1:] if level == "last" else 0 * seen[:, -1:]
    inputs = torch.cat([seen - last, torch.ones(len(seen), 1)], 1)
    alpha = penalty / 12 * (seen - last).square().sum().item()
    theirs = linear.Ridge(alpha, fit_intercept=False).fit(inputs.numpy(), (y - last).numpy())
    ours = torch.cat([x, torch.ones(len(x), 1)], 1) @ train.ridge(train.moments(series, T + P), T, 12, level, penalty)
    np.testing.assert_allclose(ours, theirs.predict(inputs.numpy()) + last.numpy(), atol=1e-4)
    assert train.ridge(train.moments(series, T + P), T, 12, level, penalty)[: T - 12].abs().max() == 0


def test_candidates_contain_both_naive_forecasts():
    series = torch.randn(200, C)
    found, x = train.candidates(train.moments(series, T + P), T, 12), load.windows(series, T, P)[0]
    assert found.shape == (2 + 2 * 2 * len(train.PENALTIES), T + 1, P)
    for A, naive in zip(found, (train.repeat_last(x, P), train.one_period_ago(x, P, 12))):
        torch.testing.assert_close((x.mT @ A[:T].float()).mT, naive)


def test_mix_takes_what_makes_the_mean_better():
    truth = torch.randn(4000, dtype=torch.float64)
    noise = torch.randn(3, 4000, dtype=torch.float64) * torch.tensor([[1.0], [1.0], [3.0]])
    shares = train.mix(noise @ noise.T / len(truth))
    assert shares.sum().item() == pytest.approx(1) and shares[0] == pytest.approx(0.5, abs=0.1) and shares[2] <= 0.05
    assert (shares @ noise).square().mean() < 0.6 * noise[0].square().mean()


def test_a_blend_beats_its_parts_and_is_solved_again_for_all_rows():
    """A season that wanders, on which the last value, a year ago and lines are each half right."""
    g = torch.Generator().manual_seed(0)
    t = torch.arange(300.0)[:, None]
    series = 2 * torch.sin(t * 2 * math.pi / 12) + 0.2 * torch.randn(300, 1, generator=g).cumsum(0) \
        + 0.5 * torch.randn(300, 1, generator=g)
    line = train.NLinear(24, 6)
    again = line.blend(series[:240], 180, 12)
    assert not torch.equal(line.weight, again)
    test = series[240 - 24 :]
    mse = lambda f: train.evaluate(f, test, 24, 6)["mse"]  # noqa: E731
    first = mse(line)
    line.weight.copy_(again)
    simple = [mse(lambda x: train.repeat_last(x, 6)), mse(lambda x: train.one_period_ago(x, 6, 12)),
              mse(train.NLinear(24, 6).fit(series[:180]))]
    assert max(first, mse(line)) < min(simple)


def test_a_net_on_a_blend_starts_at_it_and_learns_what_it_leaves():
    model = small("segment", line="blend", norms=["revin"])
    model.line.weight.normal_(0, 0.1)
    x = torch.randn(4, T, C)
    torch.testing.assert_close(model(x), model.line(x))
    nn.init.normal_(model.nets[0].out.weight)
    assert (model(x) - model.line(x)).abs().max() > 0.01
    model.eval()
    torch.testing.assert_close(model(x), (model.line(x) + model.nets[0](x)) / 2)


@pytest.mark.real("ETTh1.csv")
@pytest.mark.parametrize("horizon,published", [(96, 0.374), (192, 0.408), (336, 0.429), (720, 0.440)])
def test_nlinear_on_etth1_is_better_than_published(monkeypatch, horizon, published):
    monkeypatch.setattr(utils, "DATA_DIR", REAL)
    data = load.load_data("etth1", train.LINEAR_LOOKBACK, horizon)
    line = train.NLinear(train.LINEAR_LOOKBACK, horizon).fit(data.train)
    assert published - 0.02 < train.evaluate(line, data.test, train.LINEAR_LOOKBACK, horizon)["mse"] < published


# ---------------------------------------------------------------------------------------------- models
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("horizon", [1, 12, 20])
def test_shapes_and_that_a_window_is_forecast_by_itself(kind, horizon):
    model = small(kind, horizon=horizon).eval()
    x = torch.randn(5, T, C)
    y = model(x)
    assert y.shape == (5, horizon, C) and y.dtype == torch.float32
    torch.testing.assert_close(model(x[2:3])[0], y[2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["none", "last", "mean", "revin"])
def test_a_window_on_another_level_gets_the_same_forecast_on_that_level(kind, norm):
    model = small(kind, **({"norms": [norm], "line": "none"} if kind == "segment" else {"norm": norm})).eval()
    x = torch.randn(4, T, C)
    up, wide = model(x + 7) - 7, model(x * 3) / 3
    if norm == "none":
        assert (up - model(x)).abs().max() > 0.1
    else:
        torch.testing.assert_close(up, model(x), atol=1e-4, rtol=1e-4)
    assert torch.allclose(wide, model(x), atol=1e-2) == (norm == "revin")
    assert model(torch.ones(2, T, C)).isfinite().all()  # a meter that stands still


def test_one_channel_knows_nothing_of_the_others_in_segments_and_all_of_them_in_the_hourly_nets():
    x = torch.randn(4, T, C)
    other = x.clone()
    other[..., 0] += torch.randn(4, T)
    for kind in KINDS:
        model = small(kind).eval()
        same = torch.allclose(model(x)[..., 1:], model(other)[..., 1:], atol=1e-6)
        assert same == (kind == "segment")


@pytest.mark.parametrize("horizon", [12, 20, 60])
def test_segment_gru_is_nn_gru_asked_the_long_way(horizon):
    net = small("segment", horizon=horizon).nets[0].eval()
    x = torch.randn(4, T + 5, C)  # five rows more than whole segments: the oldest are dropped
    level = x[:, -1:]
    z = (x - level)[:, 5:].mT.reshape(4 * C, T // 12, 12)
    gru = nn.GRU(16, 16, batch_first=True)
    gru.load_state_dict(net.rnn.state_dict())
    _, h = gru(torch.relu(net.embed(z)))  # (1, B C, M)
    Q, said = math.ceil(horizon / 12), []
    for q in range(Q):
        asked = torch.cat([net.place[q].expand(C, 8), net.channel], 1).repeat(4, 1)[:, None]  # (B C, 1, M)
        said.append(net.out(gru(asked, h)[0][:, 0]))
    expected = torch.cat(said, 1)[:, :horizon].view(4, C, horizon).mT + level
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-4)


def test_the_forecast_of_segments_is_the_mean_of_its_members():
    model = small("segment").eval()
    x = torch.randn(4, T, C)
    model.line.fit(torch.randn(300, C).cumsum(0))
    assert len(model.nets) == 2
    torch.testing.assert_close(model(x), (model.nets[0](x) + model.nets[1](x) + model.line(x)) / 3)
    alone = small("segment", norms=["last"], line="none").eval()
    torch.testing.assert_close(alone(x), alone.nets[0](x))


def test_the_line_is_solved_before_training_saved_with_the_model_and_never_trained():
    model = small("segment")
    model.line.fit(torch.randn(300, C).cumsum(0))
    solved = model.line.weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, T, C)).square().mean().backward()
    optimizer.step()
    assert torch.equal(model.line.weight, solved) and solved.abs().max() > 0
    other = small("segment")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.line.weight, solved)


def test_segment_in_bfloat16_is_close_to_float32():
    model = small("segment", hidden=64).eval()
    x = torch.randn(4, T, C)
    exact = model(x)
    train.set_dtype(model, torch.bfloat16)
    assert model(x).dtype == torch.float32 and 0 < (model(x) - exact).abs().mean() < 0.02


def test_dropout_is_one_mask_for_all_segments_of_a_forecast():
    net = small("segment", dropout=0.5, norms=["none"], line="none", horizon=48).nets[0].train()
    net.place.data[:] = net.place[:1]  # the four segments to predict become one and the same question
    y = net(torch.randn(6, T, C)).view(6, 4, 12, C)
    torch.testing.assert_close(y[:, 0], y[:, 3])
    assert not torch.allclose(net(torch.zeros(2, T, C))[0], net(torch.zeros(2, T, C))[1])


def test_direct_lstm_is_nn_lstm_and_a_linear_layer():
    model = small("lstm").eval()
    x = torch.randn(4, T, C)
    lstm = nn.LSTM(C, 16, batch_first=True)
    lstm.load_state_dict(model.rnn.state_dict())
    h = lstm(x - x[:, -1:])[0][:, -1]
    torch.testing.assert_close(model(x), model.out(h).view(4, P, C) + x[:, -1:])


# ---------------------------------------------------------------------------------------------- teacher forcing, leaks
def test_teacher_forcing_with_its_own_words_changes_nothing():
    model = small("seq2seq").eval()
    x = torch.randn(4, T, C)
    torch.testing.assert_close(model(x, model(x)), model(x), atol=1e-5, rtol=1e-4)


def test_a_taught_step_sees_only_the_steps_before_it():
    model = small("seq2seq").eval()
    x, y = torch.randn(4, T, C), torch.randn(4, P, C)
    other = y.clone()
    other[:, 9:] = torch.randn(4, P - 9, C)
    before, after = model(x, y), model(x, other)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_no_forecast_changes_with_what_came_after_the_window():
    torch.manual_seed(0)
    part = torch.randn(300, C)
    later = part.clone()
    later[200:] = torch.randn(100, C)
    models = [small(kind).eval() for kind in KINDS] + [train.NLinear(T, P).fit(part[:200])]
    models += [lambda x: train.repeat_last(x, P), lambda x: train.one_period_ago(x, P, 24)]
    for model in models:
        seen = []
        for series in (part, later):
            said = []
            train.evaluate(lambda x: said.append(model(x)) or said[-1], series, T, P)
            seen.append(torch.cat(said))
        assert torch.equal(seen[0][: 200 - T + 1], seen[1][: 200 - T + 1])  # their last input row is row 199 or earlier
        assert not torch.equal(seen[0][200 - T + 24], seen[1][200 - T + 24])  # a day on, all of them must have noticed


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_can_be_learned_by_heart(kind):
    model = small(kind, hidden=64)
    x, y = torch.randn(4, T, C), torch.randn(4, P, C)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    first = (model(x) - y).abs().mean().item()
    for _ in range(400):
        f = model.nets[0](x) if kind == "segment" else model(x, y) if kind == "seq2seq" else model(x)
        loss = (f - y).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    f = model.nets[0](x) if kind == "segment" else model(x)
    assert (f - y).abs().mean().item() < 0.15 * first


def test_schedule_and_batches():
    factors = [train.schedule(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 50) and max(factors) > 0.99 and factors[-1] < 1e-4
    assert all(a > b for a, b in zip(factors[50:], factors[51:]))
    generator = torch.Generator().manual_seed(5)
    passes = [torch.cat(train.batches(100, 32, generator)) for _ in range(2)]
    assert all(torch.equal(p.sort()[0], torch.arange(100)) for p in passes) and not torch.equal(*passes)


# ---------------------------------------------------------------------------------------------- as users run it
@pytest.fixture(scope="module")
def trained(tmp_path_factory, table):
    """One small run for several tests to look at."""
    out = tmp_path_factory.mktemp("trained")
    return out, call_main(train, "--data", table, *SMALL, "--epochs", 8, "--out", out)


def test_train_learns_and_leaves_what_it_should(trained, table):
    out, printed = trained
    metrics = json.loads((out / "metrics.json").read_text())
    assert {p.name for p in out.iterdir()} == {"model.pt", "metrics.json", "history.png"}
    others = metrics["metrics"]["others"]
    assert list(others)[:3] == ["repeat last", "one period ago", "NLinear (48)"]
    assert metrics["metrics"]["test_mse"] < 0.2 < others["repeat last"]["mse"]
    assert len(metrics["history"]) == min(8, metrics["metrics"]["best_epoch"] + 5)  # patience
    assert metrics["stand_in"] is False and "STAND-IN" not in printed
    windows = 540 - 48 - 24 + 1, 180 - 24 + 1
    assert f"{windows[0]:,} windows to train on, {windows[1]} to validate, {windows[1]} to test" in printed

    # the saved model gives the reported figures, by scikit-learn's own sums
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    model, saved = train.load_forecaster(out / "model.pt")
    data = load.load_data(str(table), 48, 24)
    assert saved["columns"] == data.columns and saved["mean"] == data.mean.tolist() and saved["earlier"] == 0
    x, y = load.windows(data.test, 48, 24)
    with torch.no_grad():
        f = model(x).flatten().numpy()
    for name, theirs in (("mse", "mean_squared_error"), ("mae", "mean_absolute_error"), ("r2", "r2_score")):
        assert metrics["metrics"][f"test_{name}"] == pytest.approx(
            getattr(sklearn_metrics, theirs)(y.flatten().numpy(), f), rel=1e-4)
    line = train.NLinear(48, 24).fit(torch.cat([data.train, data.val[48:]]))  # of the rows that the model learned from
    assert others["NLinear (48)"]["mse"] == pytest.approx(train.evaluate(line, data.test, 48, 24)["mse"], rel=1e-4)
    columns = re.search(r"test, 24 rows ahead.*\n(.*)\n", printed)
    assert columns[1].startswith("repeat last")


def test_early_stopping_keeps_the_best_and_the_stand_in_is_named(tmp_path):
    out = call_main(train, "--data", "station", "--model", "seq2seq", "--horizon", 2, "--lookback", 4, "--hidden", 4,
              "--batch-size", 4096, "--epochs", 4, "--lr", 0.5, "--patience", 1, "--out", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    values = [row["val_mse"] for row in metrics["history"]]
    best = values.index(min(values))
    assert metrics["metrics"]["best_epoch"] == best + 1 and len(values) == min(best + 2, 4)
    assert metrics["stand_in"] is True and metrics["data"] == "station" and out.count("STAND-IN") == 2


def test_the_kept_weights_are_the_best_or_the_last(table, tmp_path, monkeypatch):
    """With validation errors made up, so that the second epoch is the best whatever is learned."""
    real, weights = train.evaluate, []
    for keep, expected in (("best", 2), ("last", 4)):
        errors = iter([9.0, 9.0, 3.0, 1.0, 2.0, 2.5])  # before training the model and its level; then four epochs
        monkeypatch.setattr(train, "evaluate", lambda *a, e=errors, **k: real(*a, **k) | {"mse": next(e, 5.0)})
        call_main(train, "--data", table, *SMALL, "--epochs", 4, "--keep", keep, "--out", tmp_path / keep)
        monkeypatch.setattr(train, "evaluate", real)
        saved = utils.load_checkpoint(tmp_path / keep / "model.pt", train.SCRIPT)
        assert saved["metrics"]["epoch"] == expected
        weights.append(saved["model"])
    assert not all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_before_training_nothing_is_dropped(table, tmp_path):
    said = [call_main(train, "--data", table, *SMALL, "--epochs", 1, "--dropout", dropout, "--dtype", "float32",
                   "--out", tmp_path) for dropout in (0, 0.9)]
    assert len({re.search("before training: .*", text)[0] for text in said}) == 1


def test_a_member_learns_as_if_it_were_alone(table, tmp_path):
    for norms in (["last"], ["last", "revin"]):
        call_main(train, "--data", table, *SMALL, "--epochs", 1, "--norm", *norms, "--no-linear", "--dropout", 0,
               "--grad-clip", 0.01, "--dtype", "float32", "--out", tmp_path / str(len(norms)))
    alone, beside = (utils.load_checkpoint(tmp_path / n / "model.pt", train.SCRIPT)["model"] for n in "12")
    assert all(torch.allclose(alone[name], beside[name], atol=1e-6) for name in alone)


def test_a_long_gradient_is_cut(table, tmp_path):
    """AdamW divides by the gradient's size, but for its epsilon, 1e-8: cut to far less, no weight moves."""
    for clip in (1.0, 1e-16):
        call_main(train, "--data", table, *SMALL, "--epochs", 1, "--keep", "last", "--grad-clip", clip,
                  "--out", tmp_path / str(clip))
    moved, still = (utils.load_checkpoint(tmp_path / str(clip) / "model.pt", train.SCRIPT)["model"]
                    for clip in (1.0, 1e-16))
    torch.manual_seed(0)
    config = utils.load_checkpoint(tmp_path / "1.0" / "model.pt", train.SCRIPT)["config"]
    for name, p in train.build("segment", config).named_parameters():
        assert torch.allclose(p, still[name], atol=1e-5) and not torch.allclose(p, moved[name], atol=1e-3), name


def test_a_loss_that_becomes_nan_stops_the_run_and_loses_nothing(table, tmp_path):
    options = ["--data", table, *SMALL, "--epochs", 1, "--out", tmp_path]
    call_main(train, *options)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert "the loss became" in refusal(train, *options, "--lr", "1e38")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--epochs", 0], "--epochs: 0"),
        (["--horizon", 0], "--horizon: 0"),
        (["--lookback", -1], "--lookback: -1"),
        (["--lr", "nan"], "--lr"),
        (["--dropout", 1], "--dropout: 1"),
        (["--weight-decay", -1], "--weight-decay"),
        (["--teacher-forcing", 2], "--teacher-forcing: 2"),
        (["--teacher-forcing", 1], "for --model seq2seq"),
        (["--model", "lstm", "--segment", 24], "for --model segment"),
        (["--model", "lstm", "--dtype", "bfloat16"], "for --model segment, not for lstm"),
        (["--model", "lstm", "--norm", "last", "mean"], "takes one"),
        (["--data", "TABLE", "--lookback", 48, "--segment", 49], "segment 49"),
        (["--data", "TABLE", "--lookback", 48, "--hidden", 7], "hidden 7"),
        (["--data", "TABLE", "--horizon", 500], "too few"),
        (["--data", "nowhere"], "nowhere"),
        (["--device", "tpu"], "--device"),
        (["--out", "/dev/null/x"], "cannot write"),
    ],
)
def test_bad_input_gets_one_sentence(table, tmp_path, options, words):
    options = [table if option == "TABLE" else option for option in options]
    options += [] if "--out" in options else ["--out", tmp_path]
    assert words in refusal(train, *options)
    assert not (tmp_path / "model.pt").exists()


# ---------------------------------------------------------------------------------------------- people's own series
def write_series(folder):
    """Four short series: a season that grows, a random walk, two waves with noise, and years; and their list."""
    rng, list_ = np.random.default_rng(1), []
    t = np.arange(160)
    series = {"season": (np.exp(t / 80) * (10 + 3 * np.sin(t * math.pi / 6)) + rng.standard_normal(160) * 0.3,
                         lambda t: f"{1990 + t // 12}-{1 + t % 12:02}"),
              "walk": (np.random.default_rng(3).standard_normal(160).cumsum() + 50,
                       lambda t: f"{datetime(2020, 1, 1) + timedelta(days=t):%d.%m.%Y}"),
              "waves": (np.sin(t * math.pi / 2) + np.sin(t / 5) + rng.standard_normal(160) * 0.3,
                        lambda t: f"{1970 + t // 4}Q{1 + t % 4}"),
              "years": (np.sin(t / 3) + rng.standard_normal(160) * 0.3, lambda t: f"{1800 + t}")}
    for name, (values, date) in series.items():
        lines = [f"{date(i)};{value:.3f}".replace(".", ",") if name == "waves" else f"{date(i)},{value:.3f}"
                 for i, value in enumerate(values)]
        (folder / f"{name}.csv").write_text("\n".join(["date;a" if name == "waves" else "date,a", *lines]))
        list_.append({"name": name, "file": f"{name}.csv", "lookback": 24, "horizon": 6})
    (folder / "series.json").write_text(json.dumps(list_))


def test_own_series_a_sample_is_no_worse_than_its_baselines(tmp_path, monkeypatch, capsys):
    import own_series

    write_series(tmp_path)
    monkeypatch.setattr("sys.argv", ["own_series.py", "--data", str(tmp_path), "--epochs", "10"])
    own_series.main()
    out = capsys.readouterr().out
    ratios = {line.split()[0]: float(line.split()[2]) for line in out.splitlines()[1:5]}
    assert "trained: 4 of 4" in out and max(ratios.values()) < 1.2, out
    assert math.exp(np.mean(np.log(list(ratios.values())))) < 0.92, out


def test_defaults_follow_the_size(tmp_path):
    write_series(tmp_path)
    out = call_main(train, "--data", tmp_path / "season.csv", "--device", "cpu", "--out", tmp_path / "o")
    assert "each 24 rows -> 12 rows" in out
    steps = int(re.search(r"([\d,]+) steps", out)[1].replace(",", ""))
    assert 650 <= steps < 750 and "one per month; period 12 rows" in out
    few = call_main(train, "--data", tmp_path / "season.csv", "--device", "cpu", "--epochs", 1, "--out", tmp_path / "o")
    assert re.search(r"\d+ steps are few for a net; try more --epochs", few)


def test_many_channels_take_fewer_steps_and_long_files_no_longer_epochs(monkeypatch):
    steps = {}
    for channels, windows in ((7, 7825), (862, 1417), (8, 120_000)):
        monkeypatch.setattr(sys, "argv", ["train.py"])
        args = train.parse_options()
        args.lookback, args.horizon = 720, 96
        steps[channels] = train.settle(args, windows, channels, True), args.per_epoch
    assert steps == {7: (735, 245), 862: (304, 304), 8: (650, 650)}


def test_an_epoch_of_few_steps_sees_so_many_windows():
    model, seen = small("lstm"), []
    forward = model.forward
    model.forward = lambda x: seen.append(len(x)) or forward(x)
    part = torch.randn(300, C)
    for _ in train.fit(model.train(), part, part[: T + P], T, P, 2, 8, 1e-3, 0, per_epoch=5):
        pass
    assert seen.count(8) == 10 and len(seen) == 12  # and one window to validate, twice


def test_a_file_of_few_rows_has_a_blend():
    """A lookback of one row below its own level is always 0, and a constant series has no spread."""
    for series in (torch.randn(24, 1), torch.zeros(24, 1)):
        line = train.NLinear(6, 3)
        again = line.blend(series, 18, 12)
        assert line.weight.isfinite().all() and again.isfinite().all()


def test_what_loses_or_adds_nothing_is_said(capsys):
    train.advise(3, 700, (0.9, "repeat last"), 1.0)
    assert capsys.readouterr().out.startswith("repeat last is better here, by 10.0%; use it, or try")
    train.advise(0, 700, (2.0, "repeat last"), 1.0)
    assert "it is the model" in capsys.readouterr().out
    train.advise(3, 700, (2.0, "repeat last"), 1.0)
    assert capsys.readouterr().out == ""


def test_the_readmes_model_from_python(tmp_path, monkeypatch):
    write_series(tmp_path)
    call_main(train, "--data", tmp_path / "season.csv", "--device", "cpu", "--epochs", 1, "--out", tmp_path / "outputs")
    for name in ("load", "train", "load_model"):  # of this chapter, and not of one that another test imported
        monkeypatch.setitem(sys.modules, name, globals()[name])
    code, = re.findall(r"```python\n(.*?)```", (ROOT / "03_lstm" / "README.md").read_text(), re.S)
    names = {}
    code = code.replace("03_lstm/outputs", str(tmp_path / "outputs"))
    exec(code.replace("my.csv", str(tmp_path / "season.csv")), names)
    assert len(names["dates"]) == len(names["y"]) == 12 and names["dates"][0] == datetime(2003, 5, 1)
    short = names["table"]._replace(values=names["table"].values[:5])
    with pytest.raises(utils.InputError, match="5 rows, but a forecast needs"):
        load_model.future(names["model"], short, names["mean"], names["std"], names["saved"]["lookback"])


# ---------------------------------------------------------------------------------------------- the experiment
def test_the_experiments_base_row_is_trains_net():
    recipe = experiment.BASE | dict(lookback=T, segment=12, hidden=16, dropout=0.0)
    ours = experiment.make(recipe, C, P).eval()
    theirs = small("segment", norms=["last"], line="none").nets[0].eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, T, C)
    assert torch.equal(ours(x), theirs(x))
    # asked the long way, by the branch that the other cells take
    ours.recipe = recipe | {"cell": "gru, long"}
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name,change", experiment.CHANGES)
def test_every_row_of_the_experiment_forecasts(name, change):
    recipe = experiment.BASE | {"hidden": 16} | change
    model = experiment.make(recipe, C, 100)
    x = torch.randn(2, recipe["lookback"], C)
    y = model(x)
    assert y.shape == (2, 100, C)
    y.abs().mean().backward()
    used = [p.grad is not None for n, p in model.named_parameters() if recipe["steps"] == "direct" or "rnn" in n]
    assert all(used)
    if recipe["cell"] != "hours" and recipe["lookback"] // recipe["segment"] <= 30:  # untrained, more steps forget all
        far = x.clone()
        far[:, 0] += 1
        assert not torch.equal(model.eval()(x), model(far))  # it looks back all the way


def test_a_recursive_forecast_of_more_segments_begins_with_that_of_fewer():
    recipe = experiment.BASE | dict(lookback=T, segment=12, hidden=16, steps="recursive")
    long, short = (experiment.make(recipe, C, horizon).eval() for horizon in (60, 24))
    short.load_state_dict({k: v if k != "place" else v[:2] for k, v in long.state_dict().items()})
    x = torch.randn(4, T, C)
    torch.testing.assert_close(long(x)[:, :24], short(x))


def test_all_rows_are_judged_on_the_same_hours(monkeypatch, table):
    data, seen = load.load_data(str(table), 96, 24), []
    for module in (train, experiment):  # fit judges validation, measure the test part
        monkeypatch.setattr(module, "evaluate", lambda model, part, T, P: seen.append(part[T:]) or {"mse": 0.0})
    for lookback in (24, 96):
        recipe = experiment.BASE | dict(lookback=lookback, segment=24, hidden=4)
        experiment.measure(recipe, data, 96, 24, 1, 0, torch.device("cpu"), torch.float32)
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3]) and len(seen[0]) == len(seen[1]) == 180


def test_experiment_runs(tmp_path, table):
    out = call_main(experiment, "--data", table, "--only", "lookback 24", "lookback 96", "--seeds", 2, "--epochs", 1,
              "--horizon", 24, "--hidden", 8, "--device", "cpu", "--out", tmp_path)
    rows = json.loads((tmp_path / "experiment.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["lookback 24, segment 24", "lookback 96"]
    assert rows[0]["runs"][0]["test_mse"] != rows[0]["runs"][1]["test_mse"]
    for row in rows:
        mean = np.mean([r["val_mse"] for r in row["runs"]])
        assert f"{mean:.4f} ±" in out
    assert (tmp_path / "experiment.png").stat().st_size > 1000


def test_the_experiment_refuses_rows_that_do_not_exist(tmp_path, table):
    assert "--only nothing" in refusal(experiment, "--data", table, "--only", "nothing", "--out", tmp_path)
