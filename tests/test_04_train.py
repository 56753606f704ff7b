"""Chapter 04, train.py and experiment.py, against scikit-learn, numpy, torch.nn's own layers, and as users run them."""

import csv
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REAL, ROOT, call_main, chapter, refusal, run_script

import utils

load, train, experiment = chapter("04_tabular", "load", "train", "experiment")
FOLDER = ROOT / "04_tabular"
SMALL = ["--data", "census", "--members", "2", "--hidden", "16", "--n-embd", "4", "--lr", "0.01", "--device", "cpu"]


def small_net(**changes):
    """Two numeric columns, one of them looked up too, and two of categories; random weights everywhere."""
    torch.manual_seed(0)
    config = dict(bins=[[0.0, 1.0, 3.0], [-1.0, 0.0, 1.0, 2.0, 4.0]], exact=[[0.5, 2.0], []], sizes=[4, 3], members=3,
                  n_embd=4, hidden=16, n_layer=2, dropout=0.0)
    return train.TabularNet(**config | changes)


def small_part(N=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    numeric = torch.stack([torch.tensor([0.5, 2.0, 2.5])[torch.randint(3, (N,), generator=g)],
                           torch.randn(N, generator=g) * 2], 1)
    categories = torch.stack([torch.randint(4, (N,), generator=g), torch.randint(3, (N,), generator=g)], 1)
    return load.Part(numeric, categories, (torch.rand(N, generator=g) < 0.4).float())


@pytest.fixture(scope="module")
def census():
    return load.load_data("census")


# ---------------------------------------------------------------------------------------------- evaluate
@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_evaluate_against_scikit_learn(threshold):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    y = rng.random(500) < 0.3
    for p in (rng.random(500), np.round(rng.random(500) * 0.6 + 0.3 * y, 1),  # many ties, some at the threshold
              np.full(500, 0.2), np.full(500, 0.9), y * 0.98 + 0.01, y * 1.0, 1.0 - y):
        mine = train.evaluate(torch.from_numpy(p), torch.from_numpy(y * 1.0), threshold)
        named = p > threshold
        theirs = {"accuracy": metrics.accuracy_score(y, named),
                  "precision": metrics.precision_score(y, named, zero_division=0),
                  "recall": metrics.recall_score(y, named), "f1": metrics.f1_score(y, named),
                  "auc": metrics.roc_auc_score(y, p), "log_loss": metrics.log_loss(y, p)}
        assert mine == pytest.approx(theirs, abs=1e-12)


def test_evaluate_of_one_class_and_of_certainty():
    figures = train.evaluate(torch.tensor([0.9, 0.8]), torch.ones(2))
    assert math.isnan(figures["auc"]) and figures["accuracy"] == figures["recall"] == 1
    wrong = train.evaluate(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
    assert wrong["accuracy"] == wrong["f1"] == wrong["auc"] == 0 and 30 < wrong["log_loss"] < math.inf


def test_the_mean_of_members_is_of_probabilities_and_no_worse_than_its_members():
    logits, y = torch.randn(5, 200) * 3, (torch.rand(200) < 0.5).float()
    p = train.probabilities(logits)
    torch.testing.assert_close(p, torch.stack([1 / (1 + (-z).exp()) for z in logits.double()]).sum(0) / 5)
    losses = [train.evaluate(z.double().sigmoid(), y)["log_loss"] for z in logits]
    assert train.evaluate(p, y)["log_loss"] < sum(losses) / 5


# ---------------------------------------------------------------------------------------------- the model
def test_each_member_against_layers_of_torch_nn():
    model, part = small_net().eval(), small_part()
    bins, index = model.encode(part)
    logits = model(bins, index)
    for e in range(3):
        columns = [F.one_hot(index[:, k], len(model.table)).float() @ model.table[:, e] for k in range(index.shape[1])]
        columns += [bins[:, f] @ model.slopes[f, :, e] + model.offsets[f, 0, e] for f in range(2)]
        layers = []
        for layer in [*model.layers, model.head]:
            E, I, M = layer.weight.shape  # noqa: E741
            linear = torch.nn.Linear(I, M)
            linear.weight.data, linear.bias.data = layer.weight[e].T, layer.bias[e, 0]
            layers += [linear, torch.nn.ReLU()]
        theirs = torch.nn.Sequential(*layers[:-1])(torch.cat(columns, 1))[:, 0]
        torch.testing.assert_close(logits[e], theirs, atol=1e-5, rtol=1e-5)


def member(parameter, name, e):
    """The part of a parameter that belongs to member e alone."""
    return parameter.select({"table": 1, "slopes": 2, "offsets": 2}.get(name, 0), e)


def test_the_loss_of_one_member_touches_nothing_of_the_others():
    model = small_net()
    model(*model.encode(small_part()))[1].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert member(parameter.grad, name, 1).any(), name
        assert not member(parameter.grad, name, 0).any() and not member(parameter.grad, name, 2).any(), name


def test_members_trained_together_become_what_each_becomes_alone():
    together, part = small_net(), small_part()
    alone = small_net(members=1)
    for (name, p), q in zip(together.named_parameters(), alone.parameters(), strict=True):
        q.data = member(p, name, 1).detach().clone().view_as(q)
    for model in (together, alone):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(20):
            z = model(*model.encode(part))
            loss = F.binary_cross_entropy_with_logits(z, part.target.expand_as(z), reduction="none").mean(1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for (name, p), q in zip(together.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(member(p, name, 1), q.view_as(member(p, name, 1)), atol=1e-4, rtol=1e-3)


def test_a_numeric_embedding_is_the_curve_through_its_edges():
    """With slopes set to the rises between edges, each embedding is numpy's linear interpolation between them."""
    model = small_net(sizes=[], exact=[[], []], n_layer=0)
    edges = model.bins[1].numpy()
    heights = np.array([2.0, -1.0, 0.5, 3.0, 1.0])
    with torch.no_grad():
        model.slopes.zero_()
        model.slopes[1, :, 0, 2] = torch.from_numpy(np.diff(heights)).float()
        model.offsets[1, 0, 0, 2] = heights[0]
        model.head.weight.zero_()
        model.head.weight[0, 4 + 2] = 1  # F = 2 columns of D = 4: reads number 2 of column 1
        model.head.bias.zero_()
        x = torch.linspace(-1, 4, 101)
        part = load.Part(torch.stack([torch.zeros(101), x], 1), torch.zeros(101, 0, dtype=torch.int64), x)
        out = model(*model.encode(part))
    torch.testing.assert_close(out[0].numpy(), np.interp(x.numpy(), edges, heights).astype(np.float32), atol=1e-5,
                               rtol=1e-5)
    assert not out[1].any()


def test_encode_gives_every_value_a_row_of_its_own_column():
    model = small_net()
    numeric = torch.tensor([[0.5, 0.0], [2.0, 0.0], [0.6, 0.0], [99.0, 0.0], [-1.0, 0.0]])
    categories = torch.tensor([[0, 0], [1, 1], [3, 2], [0, 0], [0, 0]])
    index = model.encode(load.Part(numeric, categories, torch.zeros(5)))[1]
    assert index.tolist() == [[0, 4, 9], [1, 5, 10], [3, 6, 8], [0, 4, 8], [0, 4, 8]]  # 7 + UNSEEN where not known
    assert len(model.table) == 4 + 3 + 4
    unseen = model.table[[1, 5, 8]]
    assert not unseen.any() and model.table[[0, 2, 3, 4, 6, 7, 9, 10]].any(2).all()


def test_columns_are_fitted_on_train_alone_and_rare_numbers_share_a_row(census):
    config = train.fit_columns(census, 10, 256)
    strange = load.Part(*(tensor * 7 + 3 for tensor in census.val))
    assert train.fit_columns(census._replace(val=strange, test=strange), 10, 256) == config
    names = census.schema["numeric"]
    age = census.train.numeric[:, names.index("age")]
    values, counts = np.unique(age.numpy(), return_counts=True)
    assert config["exact"][names.index("age")] == values[counts > 1].tolist()
    assert config["exact"][names.index("fnlwgt")] == []  # nearly as many values as rows
    assert config["sizes"] == [len(values) + 2 for values in census.schema["values"]]
    levels = np.linspace(0, 1, 11)
    weight = census.train.numeric[:, names.index("fnlwgt")].double().numpy()
    assert config["bins"][names.index("age")] == np.unique(np.quantile(values.astype(float), levels)).tolist()
    assert config["bins"][names.index("fnlwgt")] == np.unique(np.quantile(weight, levels)).tolist()
    assert train.fit_columns(census, 10, 0)["exact"] == [[]] * len(names)


def test_tables_of_words_alone_and_of_numbers_alone():
    words = load.Part(torch.zeros(5, 0), torch.randint(3, (5, 2)), torch.zeros(5))
    numbers = load.Part(torch.randn(5, 2), torch.zeros(5, 0, dtype=torch.int64), torch.zeros(5))
    for part, change in ((words, dict(bins=[], exact=[], sizes=[3, 3])), (numbers, dict(sizes=[], exact=[[], []]))):
        model = small_net(**change)
        assert model(*model.encode(part)).shape == (3, 5)


def test_evaluation_is_in_pieces_and_without_dropout():
    model, part = small_net(dropout=0.5), small_part(N=5000)
    inputs = model.encode(part)
    pieces = train.member_logits(model, inputs)
    assert not model.training and pieces.shape == (3, 5000)
    torch.testing.assert_close(pieces, model.eval()(*inputs))
    assert not torch.equal(model.train()(*inputs), model(*inputs))  # with dropout, never the same twice
    torch.testing.assert_close(train.predict(model, part), train.probabilities(pieces))


def test_loss_before_training_is_close_to_ln_2(census):
    model = train.TabularNet(**train.fit_columns(census, 48, 256), members=4, n_embd=8, hidden=64, n_layer=2,
                             dropout=0.0)
    assert train.evaluate(train.predict(model, census.val), census.val.target)["log_loss"] == pytest.approx(
        math.log(2), abs=0.06)


def test_one_batch_can_be_learned_by_heart():
    model, part = small_net(hidden=64), small_part(N=32)
    inputs = model.encode(part)
    target = (torch.rand(32, generator=torch.Generator().manual_seed(5)) < 0.5).float()  # no rule, only memory helps
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(300):
        z = model(*inputs)
        loss = F.binary_cross_entropy_with_logits(z, target.expand_as(z))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_batches_hold_every_row_once_in_a_new_order():
    rows, generator = torch.arange(1000), torch.Generator().manual_seed(0)
    first, second = (list(train.batches((rows, -rows), 128, generator)) for _ in range(2))
    assert [len(a) for a, _ in first] == [128] * 7 + [104] and all(torch.equal(a, -b) for a, b in first)
    first, second = (torch.cat([a for a, _ in part]) for part in (first, second))
    assert torch.equal(first.sort().values, rows) and torch.equal(second.sort().values, rows)
    assert not torch.equal(first, rows) and not torch.equal(first, second)
    again, other = (next(train.batches((rows,), 128, torch.Generator().manual_seed(seed)))[0] for seed in (0, 1))
    assert torch.equal(first[:128], again) and not torch.equal(first[:128], other)


def test_what_training_never_shows_starts_at_zero():
    model, part = small_net(), small_part()
    part = part._replace(categories=part.categories.clamp(min=torch.tensor([0, 1])))  # only the first lacks values
    model.zero_missing(part)
    assert not model.table[4 + load.NO_VALUE].any() and model.table[load.NO_VALUE].any()


def test_fit_yields_after_each_epoch_what_the_model_then_is():
    """The learning rate falls to nothing, the loss is the mean over rows, and the figures are of all rows of val."""
    part, val, model = small_part(100), small_part(40, seed=1), small_net()
    rows = []
    for row in train.fit(model, part, val, 3, 32, 0.01, 0.1, 0):
        rows.append(row)
        figures = train.evaluate(train.predict(model, val), val.target)
        assert (row["val_auc"], row["val_loss"]) == (figures["auc"], figures["log_loss"])
    assert [row["step"] for row in rows] == [4, 8, 12] and rows[2]["train_loss"] < rows[0]["train_loss"]
    still = small_net()
    first = next(train.fit(still, part, val, 1, 32, 1e-12, 0.0, 0))["train_loss"]  # a rate too small to move anything
    z = still(*still.encode(part))  # (E, N)
    assert first == pytest.approx(F.binary_cross_entropy_with_logits(z, part.target.expand_as(z)).item(), abs=1e-5)


def test_fit_takes_the_steps_of_a_plain_loop():
    """With all rows in one batch, as often as there are epochs, at a learning rate that falls to nothing."""
    part, mine, theirs = small_part(), small_net(), small_net()
    losses = [row["train_loss"] for row in train.fit(mine, part, part, 5, 64, 0.01, 0.1, 0)]
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=5)
    for expected in losses:
        z = theirs(*theirs.encode(part))
        loss = sum(F.binary_cross_entropy_with_logits(member, part.target) for member in z)
        assert loss.item() / 3 == pytest.approx(expected, abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3, msg=name)


# ---------------------------------------------------------------------------------------------- as users run them
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One small run, with dropout, for several tests to look at."""
    out = tmp_path_factory.mktemp("trained")
    return out, run_script(FOLDER / "train.py", *SMALL, "--epochs", 4, "--out", out)


def test_train_learns_and_leaves_everything(trained):
    out, text = trained
    written = json.loads((out / "metrics.json").read_text())
    metrics = written["metrics"]
    assert written["stand_in"] is True and written["data"] == "census" and len(written["history"]) == 4
    assert sorted(p.name for p in out.iterdir()) == ["history.png", "metrics.json", "model.pt"]
    assert metrics["logistic_regression"]["auc"] + 0.01 < metrics["test_auc"]
    assert metrics["majority"]["auc"] == 0.5 and metrics["majority"]["accuracy"] < metrics["test_accuracy"]
    assert metrics["one_member"]["log_loss"] >= metrics["test_log_loss"]
    best = float(re.search(r"model behind the data +0\.\d+ +(0\.\d+)", text)[1])
    assert metrics["test_auc"] < best < 1
    first = float(re.search(r"before training: loss ([\d.]+)", text)[1])
    assert first == pytest.approx(math.log(2), abs=0.2)
    assert text.count("STAND-IN") == 2  # one notice at the start, one at the end


def test_saved_model_gives_the_reported_figures_and_scikit_learns(trained, census):
    saved = utils.load_checkpoint(trained[0] / "model.pt", train.SCRIPT)
    model = train.TabularNet(**saved["config"])
    model.load_state_dict(saved["model"])
    assert saved["schema"] == census.schema
    assert train.evaluate(train.predict(model, census.val), census.val.target)["auc"] == pytest.approx(
        saved["metrics"]["val_auc"], abs=1e-6)
    p, y = train.predict(model, census.test).numpy(), census.test.target.numpy()
    metrics = json.loads((trained[0] / "metrics.json").read_text())["metrics"]
    sklearn = pytest.importorskip("sklearn.metrics")
    assert metrics["test_auc"] == pytest.approx(sklearn.roc_auc_score(y, p), abs=1e-6)
    assert metrics["test_log_loss"] == pytest.approx(sklearn.log_loss(y, p), abs=1e-6)
    assert metrics["test_accuracy"] == pytest.approx(sklearn.accuracy_score(y, p > 0.5), abs=1e-4)


def test_early_stopping_on_a_table_with_nothing_to_learn(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "coins.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["x", "word", "coin"], *(
            [f"{rng.normal():.3f}", rng.choice(["a", "b"]), rng.choice(["heads", "tails"])] for _ in range(400))])
    text = call_main(train, "--data", path, "--target", "coin", "--members", 2, "--hidden", 32, "--epochs", 40,
                     "--batch-size", 32, "--patience", 2, "--lr", 0.01, "--out", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    aucs = [row["val_auc"] for row in metrics["history"]]
    assert len(aucs) < 40 and len(aucs) - 1 - aucs.index(max(aucs)) == 2
    saved = utils.load_checkpoint(tmp_path / "model.pt", train.SCRIPT)
    assert saved["metrics"]["epoch"] == metrics["metrics"]["best_epoch"] == aucs.index(max(aucs)) + 1
    assert 0.3 < metrics["metrics"]["test_auc"] < 0.7 and "STAND-IN" not in text
    assert saved["source"] == str(path) and saved["stand_in"] == ""


@pytest.mark.parametrize("options, words", [
    (["--device", "abacus"], "--device abacus"),
    (["--data", "/no/such/file.csv", "--target", "y"], "no such file"),
    (["--data", "census", "--target", "age"], "--target age belongs to a CSV file"),
    (["--out", "/dev/null/x"], "cannot write"),
])
def test_bad_options_get_one_sentence(tmp_path, options, words):
    assert words in refusal(train, *SMALL, "--out", tmp_path / "o", *options)


@pytest.mark.parametrize("name, value, interval", [
    ("--epochs", 0, "[1, inf)"), ("--members", -1, "[1, inf)"), ("--n-embd", 0, "[1, inf)"),
    ("--lr", "nan", "(0, inf)"), ("--dropout", 1, "[0, 1)"), ("--n-layer", -1, "[0, inf)"), ("--exact", -1, "[0, inf)"),
    ("--seed", -1, "[0, 4294967295]"), ("--patience", 0, "[1, inf)")])
def test_values_out_of_range(capsys, name, value, interval):
    with pytest.raises(SystemExit):
        call_main(train, *SMALL, name, value)
    assert f"{name}: {value} is not in {interval}" in capsys.readouterr().err


def test_a_loss_that_becomes_nan_stops_the_run_and_loses_nothing(tmp_path):
    call_main(train, *SMALL, "--epochs", 1, "--out", tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert "the loss became" in refusal(train, *SMALL, "--epochs", 1, "--lr", "1e38", "--out", tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# ---------------------------------------------------------------------------------------------- experiment.py
def same_weights(model, other):
    """Copy all weights of other into model, with larger numbers: first weights are small and would hide mistakes."""
    for p in other.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.load_state_dict(other.state_dict())


def test_the_experiment_starts_from_what_train_uses(census, monkeypatch):
    monkeypatch.setattr(utils, "parse_args", lambda parser: sys.exit(parser.parse_args()))
    with pytest.raises(SystemExit) as stop:
        call_main(train)
    options = vars(stop.value.code)
    shared = experiment.BASE.keys() & options.keys()
    assert len(shared) == len(experiment.BASE) - 2  # but for categories and numbers
    assert {name for name in shared if experiment.BASE[name] != options[name]} <= {"members"}
    recipe = experiment.BASE | {"dropout": 0.0}
    config = {name: recipe[name] for name in ("members", "n_embd", "hidden", "n_layer", "dropout")}
    theirs = train.TabularNet(**train.fit_columns(census, recipe["bins"], recipe["exact"]), **config)
    mine = experiment.AnyNet(recipe, census)
    same_weights(mine, theirs)
    torch.testing.assert_close(mine(*mine.encode(census.val)), theirs(*theirs.encode(census.val)), atol=1e-3, rtol=1e-4)


def test_one_hot_columns_can_do_what_embeddings_do(census):
    """An embedding, then a linear layer, is one linear layer on one-hot columns: the product of the two matrices."""
    recipe = experiment.BASE | {"dropout": 0.0, "members": 2, "exact": 0}
    embedded = experiment.AnyNet(recipe, census)
    one_hot = experiment.AnyNet(recipe | {"categories": "one-hot"}, census)
    D, W = recipe["n_embd"], embedded.layers[0].weight  # (E, I, M)
    with torch.no_grad():
        for name, p in one_hot.named_parameters():
            if not name.startswith("layers.0.weight"):
                p.copy_(embedded.state_dict()[name])
        bounds = [*embedded.first.tolist(), len(embedded.table)]
        K = len(bounds) - 1
        for e in range(2):
            rows = [embedded.table[bounds[k] : bounds[k + 1], e] @ W[e, k * D : (k + 1) * D] for k in range(K)]
            one_hot.layers[0].weight[e] = torch.cat([*rows, W[e, K * D :]])
        part = load.Part(*(tensor[:200] for tensor in census.val))
        torch.testing.assert_close(one_hot(*one_hot.encode(part)), embedded(*embedded.encode(part)), atol=1e-4,
                                   rtol=1e-4)


def test_ways_in_for_numbers(census):
    x = census.train.numeric
    kinds = ("raw", "standardised", "quantile")
    nets = (experiment.AnyNet(experiment.BASE | {"numbers": kind}, census) for kind in kinds)
    raw, standardised, quantile = (net.encode(census.train)[0] for net in nets)
    assert torch.equal(raw[:, :, 0], x)
    torch.testing.assert_close(standardised[:, :, 0].double(), (x.double() - x.double().mean(0)) / x.double().std(0),
                               atol=1e-3, rtol=1e-3)
    for f in range(x.shape[1]):  # order stays
        order = x[:, f].argsort()
        assert (quantile[order, f, 0].diff() >= 0).all()
    model = experiment.AnyNet(experiment.BASE | {"numbers": "periodic", "exact": 0}, census)
    bins, index = model.encode(load.Part(*(tensor[:3] for tensor in census.train)))
    inputs, E, D = model.embed(bins, index), experiment.BASE["members"], experiment.BASE["n_embd"]
    f, e, n = 3, 1, 2
    angle = 2 * math.pi * model.frequencies[f, :, e] * bins[n, f, 0]
    waves = torch.cat([angle.cos(), angle.sin()])  # (32,)
    expected = F.relu(waves @ model.slopes[f, :, e] + model.offsets[f, 0, e])
    assert len(inputs) == E
    torch.testing.assert_close(inputs[e, n].view(-1, D)[index.shape[1] + f], expected)


def test_experiment_runs(tmp_path):
    path = tmp_path / "t.csv"
    rng = np.random.default_rng(0)
    rows = [[f"{x:.2f}", w, int(x + (w == "a") + rng.normal() > 0)] for x, w in zip(rng.normal(size=300), "abc" * 100)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["x", "word", "y"], *rows])
    options = ["--data", path, "--target", "y", "--out", tmp_path]
    out = call_main(experiment, *options, "--seeds", 2, "--epochs", 1, "--device", "cpu")
    assert "16 of 16 members" in out and (tmp_path / "experiment.png").stat().st_size > 1000
    results = json.loads((tmp_path / "experiment.json").read_text())
    assert len(results["rows"]) == len(experiment.CHANGES)
    assert all(len(row["auc"]) == 2 and 0 <= min(row["auc"]) for row in results["rows"])
    assert results["auc_by_members"][1][-1] == pytest.approx(results["rows"][-1]["auc"][1], abs=1e-12)
    assert "no row" in refusal(experiment, *options, "--only", "xyz")


@pytest.mark.real("adult.data")
def test_what_train_says_of_capital_gains_in_adult_is_so(monkeypatch):
    monkeypatch.setattr(utils, "DATA_DIR", REAL)
    table = load.read_adult()
    n_train = len(table.lines) - table.n_test  # the rows of adult.data
    gains, incomes = (table.columns[name][:n_train] for name in ("capital-gain", "income"))
    for gain, n, rich in (("5013", 69, 0), ("5178", 97, 97)):
        found = [income for income, g in zip(incomes, gains) if g == gain]
        assert (len(found), found.count(">50K")) == (n, rich)
    assert round(100 * gains.count("0") / n_train) == 92


@pytest.mark.real("adult.data")
def test_one_pass_over_adult_beats_logistic_regression(monkeypatch, tmp_path):
    monkeypatch.setattr(utils, "DATA_DIR", REAL)
    call_main(train, "--data", "adult", "--members", 2, "--epochs", 2, "--out", tmp_path, "--device", "cpu")
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["stand_in"] is False
    assert written["metrics"]["test_auc"] > written["metrics"]["logistic_regression"]["auc"] + 0.005
