"""Chapter 04, train.py and experiment.py, against scikit-learn, numpy, torch.nn's own layers, and as users run them."""

import copy
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
SMALL = ["--data", "census", "--members", "5", "--hidden", "16", "--n-embd", "4", "--lr", "0.01", "--device", "cpu"]
TASKS = {"binary": 1, "classes": 3, "numbers": 1}  # outputs
FIGURES = {"binary": ["accuracy", "precision", "recall", "f1", "auc", "log_loss"],
           "classes": ["accuracy", "f1", "auc", "log_loss"], "numbers": ["rmse", "mae", "r2"]}
FACTORS = np.linspace(0.1, 1, 10)  # shrink tries these and 0
E = 6  # members of small_net: 0 and 5 validate on the same fold


def small_net(start=False, **changes):
    """Two numeric columns, one of them looked up too, and two of categories; random weights everywhere, the linear
    models' included. start: the head is at zero, as TabularNet has it before training."""
    torch.manual_seed(0)
    config = dict(bins=[[0.0, 1.0, 3.0], [-1.0, 0.0, 1.0, 2.0, 4.0]], exact=[[0.5, 2.0], []], sizes=[4, 3], outputs=1,
                  members=E, n_embd=4, hidden=16, n_layer=2, dropout=0.0) | changes
    model = train.TabularNet(**{"inputs": len(config["bins"]) + sum(config["sizes"]) + 1} | config)
    assert not model.head.weight.any() and not model.head.bias.any() and not model.linear.any()
    model.linear.normal_(std=0.3)
    if not start:
        torch.nn.init.normal_(model.head.weight, std=0.3)
        torch.nn.init.normal_(model.head.bias, std=0.3)
    return model


def small_part(N=64, seed=0, task="binary"):
    g = torch.Generator().manual_seed(seed)
    numeric = torch.stack([torch.tensor([0.5, 2.0, 2.5])[torch.randint(3, (N,), generator=g)],
                           torch.randn(N, generator=g) * 2], 1).double()
    categories = torch.stack([torch.randint(4, (N,), generator=g), torch.randint(3, (N,), generator=g)], 1)
    target = {"binary": lambda: (torch.rand(N, generator=g) < 0.4).float(),
              "classes": lambda: torch.randint(3, (N,), generator=g).float(),
              "numbers": lambda: torch.randn(N, generator=g)}[task]()
    return load.Part(numeric, categories, target)


def folds(N=64):
    return torch.arange(N) % load.FOLDS


def plain_loss(z, y, task, reduction="mean"):
    """torch's own losses of one member: z (N, K), y (N,)."""
    if task == "numbers":
        return F.mse_loss(z[:, 0], y, reduction=reduction)
    if task == "binary":
        return F.binary_cross_entropy_with_logits(z[:, 0], y, reduction=reduction)
    return F.cross_entropy(z, y.long(), reduction=reduction)


def small_table(task, N=200, seed=0, signal=1.0, missing=0.1):
    """Columns of words of a table of a user's: two or three numeric ones, one or two of words, cells missing in all of
    them, and "y", which has a linear part and one that no line can follow; none at all at signal 0."""
    rng = np.random.default_rng(seed)
    x, words = rng.normal(size=(N, 2 + seed % 2)), rng.integers(0, 3 + seed % 3, size=(N, 1 + seed % 2))
    score = signal * (x[:, 0] + 1.5 * np.abs(x[:, 1]) - 1.2 + 0.8 * (words[:, 0] == 1)) + 0.5 * rng.normal(size=N)
    y = {"binary": np.where(score > 0, "yes", "no"), "classes": np.array(["low", "mid", "high"])[
        np.digitize(score, np.quantile(score, [0.4, 0.75]))], "numbers": np.char.mod("%.4f", 100 + 20 * score)}[task]
    columns = {f"x {k}": [f"{v:.3f}" for v in column] for k, column in enumerate(x.T)}
    columns |= {f"word{k}": [["red", "green, dark", "blü", "d", "e"][v] for v in column]
                for k, column in enumerate(words.T)}
    for column in columns.values():
        for i in (rng.random(N) < missing).nonzero()[0]:
            column[i] = ""
    return columns | {"y": y.tolist()}


def small_data(task, **options):
    columns = small_table(task, **options)
    lines = [f"line {i}" for i in range(2, 2 + len(columns["y"]))]
    data = load.to_data(load.Table(columns, lines, "y", "small.csv", "small.csv"))
    assert data.schema["task"] == task
    return data


def write_csv(path, columns):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([list(columns), *zip(*columns.values())])
    return path


def net_for(data, **changes):
    """train.py's network for a table, small and without dropout."""
    torch.manual_seed(0)
    return train.TabularNet(**train.fit_columns(data, 8, 256) | dict(members=E, n_embd=4, hidden=16, n_layer=1,
                                                                     dropout=0.0) | changes)


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
        mine = train.evaluate(torch.from_numpy(p), torch.from_numpy(y * 1.0), threshold=threshold)
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


def test_evaluate_of_classes_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    y = rng.choice(4, 300, p=[0.5, 0.3, 0.15, 0.05])
    sure = np.eye(4)[y] * 0.97 + 0.0075
    for p in (rng.dirichlet(np.ones(4), 300), rng.dirichlet(np.ones(4), 300) * 0.6 + 0.4 * np.eye(4)[y], sure,
              np.full((300, 4), [0.5, 0.3, 0.15, 0.05])):  # the last names one class alone
        mine = train.evaluate(torch.from_numpy(p), torch.from_numpy(y).float(), "classes")
        named = p.argmax(1)
        theirs = {"accuracy": metrics.accuracy_score(y, named),
                  "f1": metrics.f1_score(y, named, average="macro", zero_division=0),
                  "auc": metrics.roc_auc_score(y, p, multi_class="ovr", average="macro"),
                  "log_loss": metrics.log_loss(y, p)}
        assert mine == pytest.approx(theirs, abs=1e-7) and list(mine) == FIGURES["classes"]
    few, p = np.where(y == 3, 0, y), rng.dirichlet(np.ones(4), 300)  # no row of the last class ...
    unnamed = p * [1, 1, 1, 0.01]  # ... and none that is said to be
    for p in (p, unnamed / unnamed.sum(1, keepdims=True)):
        mine, named = train.evaluate(torch.from_numpy(p), torch.from_numpy(few).float(), "classes"), p.argmax(1)
        assert mine["auc"] == pytest.approx(np.mean([metrics.roc_auc_score(few == k, p[:, k]) for k in range(3)]))
        assert mine["f1"] == pytest.approx(metrics.f1_score(few, named, average="macro", zero_division=0))
        assert mine["log_loss"] == pytest.approx(metrics.log_loss(few, p, labels=range(4)))
    assert 3 not in named


def test_evaluate_of_numbers_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    y = rng.normal(size=300).astype(np.float32) * 3 + 5
    for p in (y + rng.normal(size=300), rng.normal(size=300) * 9, np.full(300, 5.0), y.astype(float)):
        mine = train.evaluate(torch.from_numpy(p), torch.from_numpy(y), "numbers")
        theirs = {"rmse": metrics.root_mean_squared_error(y, p), "mae": metrics.mean_absolute_error(y, p),
                  "r2": metrics.r2_score(y.astype(float), p)}
        assert mine == pytest.approx(theirs, abs=1e-9) and list(mine) == FIGURES["numbers"]


@pytest.mark.parametrize("task, K", TASKS.items())
def test_losses_are_those_of_torch(task, K):
    z, y = torch.randn(E, 50, K) * 3, small_part(50, task=task).target
    mine = train.losses(z, y, task)
    assert mine.shape == (E, 50)
    for e in range(E):
        torch.testing.assert_close(mine[e], plain_loss(z[e], y, task, "none"))


@pytest.mark.parametrize("task, K", TASKS.items())
def test_the_mean_of_members_is_of_probabilities_and_no_worse_than_its_members(task, K):
    z, y = torch.randn(5, 200, K) * 3, small_part(200, task=task).target
    p = train.combine(z, task)
    theirs = {"binary": lambda z: (1 / (1 + (-z).exp()))[:, 0], "numbers": lambda z: z[:, 0],
              "classes": lambda z: z.exp() / z.exp().sum(1, keepdim=True)}[task]
    torch.testing.assert_close(p, torch.stack([theirs(member) for member in z.double()]).sum(0) / 5)
    loss = "rmse" if task == "numbers" else "log_loss"
    losses = [train.evaluate(train.combine(member[None], task), y, task)[loss] for member in z]
    power = 2 if task == "numbers" else 1  # the loss of numbers is the square
    assert train.evaluate(p, y, task)[loss] ** power < sum(loss**power for loss in losses) / 5


# ---------------------------------------------------------------------------------------------- the linear model
def scikit_linear(task, x, y):
    """Weights (I, K) and outputs (N, K) of scikit-learn's linear model; the last column of x is 1."""
    linear = pytest.importorskip("sklearn.linear_model")
    model = (linear.Ridge(alpha=1, solver="cholesky") if task == "numbers" else
             linear.LogisticRegression(C=1, tol=1e-9, max_iter=20_000))
    model.fit(x[:, :-1], y)
    w = np.concatenate([np.atleast_2d(model.coef_).T, np.atleast_1d(model.intercept_)[None]])  # (I, K)
    return w - w.mean(1, keepdims=True) if task == "classes" else w  # a number added to all classes changes nothing


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_linear_model_against_scikit_learn(task, seed):
    data = small_data(task, N=400, seed=seed)
    sizes = [len(values) + load.KNOWN for values in data.schema["values"]]
    standard, rest = load.fit_standard(data.train.numeric), data.rest
    x, new = (load.one_hot(part, sizes, standard) for part in (rest, data.test))
    theirs = scikit_linear(task, x.numpy(), rest.target.numpy())
    mine = load.fit_linear(x, rest.target, data.schema)
    assert mine.shape == theirs.shape
    if task == "classes":
        mine = mine - mine.mean(1, keepdim=True)
    np.testing.assert_allclose(mine.numpy(), theirs, atol=1e-3)
    scores = train.combine(load.linear_baseline(data)[None], task)
    np.testing.assert_allclose(scores, train.combine(torch.from_numpy(new.numpy() @ theirs)[None], task), atol=1e-3)


@pytest.mark.parametrize("task, K", TASKS.items())
def test_each_fold_has_a_linear_model_that_did_not_see_it(task, K):
    data = small_data(task, N=300)
    model, rest = net_for(data), data.rest
    model.solve(data, apart=True)
    line = model.encode(rest)[2]  # (N, FOLDS, K)
    x = load.one_hot(rest, model.sizes, load.fit_standard(data.train.numeric)).numpy()
    assert line.shape == (len(rest.target), load.FOLDS, K) and line.dtype == torch.float32
    for fold in range(load.FOLDS):
        rows = (data.fold != fold).numpy()
        assert 0 < rows.sum() < len(rows)
        theirs = torch.from_numpy(x @ scikit_linear(task, x[rows], rest.target.numpy()[rows]))
        np.testing.assert_allclose(train.combine(line[None, :, fold], task), train.combine(theirs[None], task),
                                   atol=1e-3)
    before = model.linear.clone()
    y = torch.where(data.fold == 2, 1 - rest.target if task != "classes" else (rest.target + 1) % 3, rest.target)
    N = len(data.val.target)
    model.solve(data._replace(val=data.val._replace(target=y[:N]), train=data.train._replace(target=y[N:])), True)
    same = [torch.equal(a, b) for a, b in zip(model.linear, before)]
    assert same == [False, False, True, False, False]


@pytest.mark.parametrize("task", TASKS)
def test_before_training_the_networks_are_the_linear_model(task):
    data = small_data(task)
    model = net_for(data, n_layer=2, hidden=32)
    model.solve(data, apart=False)
    torch.testing.assert_close(train.predict(model, data.test, task),
                               train.combine(load.linear_baseline(data)[None], task), atol=1e-5, rtol=1e-5)
    model.solve(data, apart=True)
    outputs = train.member_outputs(model, model.encode(data.test))
    assert all(torch.equal(outputs[e], model.encode(data.test)[2][:, e % load.FOLDS]) for e in range(E))
    assert torch.equal(outputs[0], outputs[5]) and not torch.equal(outputs[0], outputs[1])


# ---------------------------------------------------------------------------------------------- the model
@pytest.mark.parametrize("K", [1, 3])
def test_each_member_against_layers_of_torch_nn(K):
    model, part = small_net(outputs=K).eval(), small_part()
    model.standard.copy_(torch.tensor([[1.0, -0.5], [2.0, 3.0]]))
    bins, index, line = model.encode(part)
    outputs = model(bins, index, line)
    assert outputs.shape == (E, 64, K)
    x = torch.cat([(part.numeric - torch.tensor([1.0, -0.5])) / torch.tensor([2.0, 3.0]),
                   F.one_hot(part.categories[:, 0], 4), F.one_hot(part.categories[:, 1], 3), torch.ones(64, 1)], 1)
    for e in range(E):
        columns = [F.one_hot(index[:, k], len(model.table)).float() @ model.table[:, e] for k in range(index.shape[1])]
        columns += [bins[:, f] @ model.slopes[f, :, e] + model.offsets[f, 0, e] for f in range(2)]
        layers = []
        for layer in [*model.layers, model.head]:
            _, I, M = layer.weight.shape  # noqa: E741
            linear = torch.nn.Linear(I, M)
            linear.weight.data, linear.bias.data = layer.weight[e].T, layer.bias[e, 0]
            layers += [linear, torch.nn.ReLU()]
        theirs = torch.nn.Sequential(*layers[:-1])(torch.cat(columns, 1))
        theirs = theirs + (x @ model.linear[e % 5]).float()
        torch.testing.assert_close(outputs[e], theirs, atol=1e-5, rtol=1e-5)


def member(parameter, name, e):
    """The part of a parameter that belongs to member e alone."""
    return parameter.select({"table": 1, "slopes": 2, "offsets": 2}.get(name, 0), e)


def test_the_loss_of_one_member_touches_nothing_of_the_others():
    model = small_net()
    model(*model.encode(small_part()))[1].square().sum().backward()
    for name, parameter in model.named_parameters():
        for e in range(E):
            assert member(parameter.grad, name, e).any() == (e == 1), name


@pytest.mark.parametrize("task, K", TASKS.items())
def test_members_trained_together_become_what_each_becomes_alone(task, K):
    together, alone = small_net(start=True, outputs=K), small_net(start=True, outputs=K, members=1)
    for (name, p), q in zip(together.named_parameters(), alone.parameters(), strict=True):
        q.data = member(p, name, 1).detach().clone().view_as(q)
    alone.linear.copy_(together.linear.roll(-1, 0))  # member 1 validates on fold 1; the only one, on what it calls 0
    part, fold = small_part(task=task), folds()
    rows, single = (list(train.fit(model, part, f, task, 5, 16, 0.01, 0.1, 5, 7)) for model, f in (
        (together, fold), (alone, (fold - 1) % 5)))
    assert len(rows) == len(single) == 6
    for (name, p), q in zip(together.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(member(p, name, 1), q.view_as(member(p, name, 1)), atol=1e-4, rtol=1e-3)


def test_a_numeric_embedding_is_the_curve_through_its_edges():
    """With slopes set to the rises between edges, each embedding is numpy's linear interpolation between them."""
    model = small_net(sizes=[], exact=[[], []], n_layer=0)
    edges = model.bins[1].numpy()
    heights = np.array([2.0, -1.0, 0.5, 3.0, 1.0])
    with torch.no_grad():
        model.linear.zero_()
        model.slopes.zero_()
        model.slopes[1, :, 0, 2] = torch.from_numpy(np.diff(heights)).float()
        model.offsets[1, 0, 0, 2] = heights[0]
        model.head.weight.zero_()
        model.head.weight[0, 4 + 2] = 1  # F = 2 columns of D = 4: reads number 2 of column 1
        model.head.bias.zero_()
        x = torch.linspace(-1, 4, 101)
        part = load.Part(torch.stack([torch.zeros(101), x], 1).double(), torch.zeros(101, 0, dtype=torch.int64), x)
        out = model(*model.encode(part))
    torch.testing.assert_close(out[0, :, 0].numpy(), np.interp(x.numpy(), edges, heights).astype(np.float32),
                               atol=1e-5, rtol=1e-5)
    assert not out[1].any()


def test_encode_gives_every_value_a_row_of_its_own_column():
    model = small_net()
    numeric = torch.tensor([[0.5, 0.0], [2.0, 0.0], [0.6, 0.0], [99.0, 0.0], [-1.0, 0.0]]).double()
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
    assert config["outputs"] == 1 and config["inputs"] == len(names) + sum(config["sizes"]) + 1
    levels = np.linspace(0, 1, 11)
    weight = census.train.numeric[:, names.index("fnlwgt")].double().numpy()
    assert config["bins"][names.index("age")] == np.unique(np.quantile(values.astype(float), levels)).tolist()
    assert config["bins"][names.index("fnlwgt")] == np.unique(np.quantile(weight, levels)).tolist()
    assert train.fit_columns(census, 10, 0)["exact"] == [[]] * len(names)


def test_a_network_has_an_output_for_each_class():
    assert {task: train.fit_columns(small_data(task), 10, 256)["outputs"] for task in TASKS} == TASKS


def test_tables_of_words_alone_and_of_numbers_alone():
    words = load.Part(torch.zeros(5, 0).double(), torch.randint(3, (5, 2)), torch.zeros(5))
    numbers = load.Part(torch.randn(5, 2).double(), torch.zeros(5, 0, dtype=torch.int64), torch.zeros(5))
    for part, change in ((words, dict(bins=[], exact=[], sizes=[3, 3])), (numbers, dict(sizes=[], exact=[[], []]))):
        model = small_net(**change)
        assert model(*model.encode(part)).shape == (E, 5, 1)


@pytest.mark.parametrize("task, K", TASKS.items())
def test_evaluation_is_in_pieces_and_without_dropout(task, K):
    model, part = small_net(dropout=0.5, outputs=K), small_part(N=5000)
    inputs = model.encode(part)
    pieces = train.member_outputs(model, inputs)
    assert not model.training and pieces.shape == (E, 5000, K)
    torch.testing.assert_close(pieces, model.eval()(*inputs))
    assert not torch.equal(model.train()(*inputs), model(*inputs))  # with dropout, never the same twice
    torch.testing.assert_close(train.predict(model, part, task), train.combine(pieces, task))


@pytest.mark.parametrize("task, K", TASKS.items())
def test_one_batch_can_be_learned_by_heart(task, K):
    model, part = small_net(hidden=64, outputs=K, start=True), small_part(N=32)
    inputs = model.encode(part)
    target = small_part(N=32, seed=5, task=task).target  # no rule, only memory helps
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(300):
        loss = train.losses(model(*inputs), target, task).mean()
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


@pytest.mark.parametrize("steps", [3, 40, 1000])
def test_the_learning_rate_rises_for_a_twentieth_of_the_steps_and_falls_to_nothing(steps):
    mine = np.array([train.schedule(step, steps) for step in range(steps)])
    at = np.arange(steps)
    rise, fall = np.interp(at + 1, [0, steps / 20], [0, 1]), np.interp(at, [0, steps], [1, 0])
    np.testing.assert_allclose(mine, np.minimum(rise, fall), atol=1e-12)
    assert (mine > 0).all() and mine[-1] == pytest.approx(1 / steps, rel=1e-9)
    assert abs(mine.argmax() + 1 - steps / 20) <= 1 + steps / 400


@pytest.mark.parametrize("task, K", TASKS.items())
def test_fit_yields_after_each_epoch_what_the_model_then_is(task, K):
    """The loss is the mean over the rows that a member learns from, and the figures are of those that it does not."""
    part, fold, model = small_part(100, task=task), folds(100), small_net(start=True, outputs=K)
    rows, held = [], [fold == e % 5 for e in range(E)]
    for row in train.fit(model, part, fold, task, 3, 32, 0.01, 0.1, 3, 0):
        rows.append(row)
        z = train.member_outputs(model, model.encode(part))
        theirs = [plain_loss(z[e][held[e]], part.target[held[e]], task).item() for e in range(E)]
        assert row["val_loss"] == pytest.approx(sum(theirs) / E, rel=1e-5)
    assert [row["step"] for row in rows] == [0, 4, 8, 12] and [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert "train_loss" not in rows[0] and rows[0]["seconds"] < 0.01 and rows[0]["improved"] == E
    assert rows[3]["train_loss"] < rows[1]["train_loss"]
    still = small_net(outputs=K)
    *_, last = train.fit(still, part, fold, task, 1, 100, 1e-12, 0.0, 1, 0)  # a rate too small to move anything
    z = still(*still.encode(part))
    theirs = sum(plain_loss(z[e][~held[e]], part.target[~held[e]], task).item() for e in range(E)) / E
    assert last["train_loss"] == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("task, K", TASKS.items())
def test_fit_takes_the_steps_of_a_plain_loop_and_keeps_the_best_epoch_of_each_member(task, K):
    """With all rows in one batch, as often as there are epochs; each member by itself, on torch's own losses."""
    part, fold, epochs = small_part(task=task), folds(), 40
    mine, theirs = (small_net(start=True, outputs=K) for _ in range(2))
    rows = list(train.fit(mine, part, fold, task, epochs, 64, 0.01, 0.1, epochs, 0))
    assert len(rows) == epochs + 1
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: train.schedule(step, epochs))
    held, y, inputs = [fold == e % 5 for e in range(E)], part.target, theirs.encode(part)
    best, kept = [math.inf] * E, [None] * E  # kept: (epoch, weights)
    for epoch, row in enumerate(rows):
        if epoch:
            z = theirs(*inputs)
            loss = sum(plain_loss(z[e][~held[e]], y[~held[e]], task) for e in range(E))
            assert loss.item() / E == pytest.approx(row["train_loss"], abs=1e-4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if epoch < epochs:
                scheduler.step()
        z = theirs(*inputs)
        val = [plain_loss(z[e][held[e]], y[held[e]], task).item() for e in range(E)]
        assert sum(val) / E == pytest.approx(row["val_loss"], abs=1e-4)
        better = [e for e in range(E) if val[e] < best[e]]
        assert row["improved"] == len(better)
        for e in better:
            best[e], kept[e] = val[e], (epoch, {n: member(p, n, e).detach().clone()
                                                for n, p in theirs.named_parameters()})
    assert len({epoch for epoch, _ in kept}) > 1  # or it would not show that each has its own
    for name, p in mine.named_parameters():
        for e in range(E):
            torch.testing.assert_close(member(p, name, e), kept[e][1][name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("task, K", TASKS.items())
def test_no_member_learns_from_the_targets_of_its_own_fold(task, K):
    """The weights after each epoch, to the last bit; which epoch is kept is what the fold is there to decide."""
    part, fold = small_part(task=task), folds()
    y = {"binary": 1 - part.target, "classes": (part.target + 1) % 3, "numbers": 5 - part.target}[task]
    other = part._replace(target=torch.where(fold == 0, y, part.target))
    runs = []
    for rows in (part, other):
        model = small_net(start=True, outputs=K, dropout=0.1)
        runs.append([{n: p.detach().clone() for n, p in model.named_parameters()}
                     for _ in train.fit(model, rows, fold, task, 4, 16, 0.01, 0.1, 4, 0)])
    for epoch, (one, two) in enumerate(zip(*runs, strict=True)):
        for e in range(E):
            same = all(torch.equal(member(one[name], name, e), member(two[name], name, e)) for name in one)
            assert same == (e % 5 == 0 or epoch == 0), (epoch, e)
    assert not any(torch.equal(member(runs[0][0][n], n, 0), member(runs[0][4][n], n, 0)) for n in ("table", "slopes"))


def test_fit_ends_when_no_member_becomes_better():
    part, model, epochs = small_part(), small_net(start=True), 60
    rows = list(train.fit(model, part, folds(), "binary", epochs, 16, 0.02, 0.0, 4, 0))
    assert len(rows) <= epochs  # these targets have no rule
    last = max(row["epoch"] for row in rows if row["improved"])
    assert rows[-1]["epoch"] - last == 4
    assert len(list(train.fit(small_net(start=True), part, folds(), "binary", 3, 16, 0.02, 0.0, 99, 0))) == 4


def test_held_out_outputs_are_of_members_that_did_not_learn_from_the_row():
    model, part, fold = small_net(outputs=3), small_part(), torch.randint(5, (64,))
    z, mine = train.member_outputs(model, model.encode(part)).numpy(), train.held_out(model, part, fold)
    assert mine.shape == (1, 64, 3)
    for n in range(64):
        theirs = np.mean([z[e, n] for e in range(E) if e % 5 == fold[n]], axis=0)
        np.testing.assert_allclose(mine[0, n].numpy(), theirs, atol=1e-6)


def shrink_plainly(line, added, y, task):
    """As shrink says, one factor after the other, for line and added (N, K): what is gained counts less one row on
    which the networks are as wrong as on any, and must be below 0 by two standard errors."""
    def change(z, y):
        return (plain_loss(z, y, task, "none") - plain_loss(line, y, task, "none")).numpy()

    sums = {0.0: (0.0, 0.0)}
    for factor in FACTORS:
        z, K = line + factor * added, line.shape[1]
        if task == "numbers":  # the truth as far from the line as it is, against the side to which the networks move
            far = (line[:, 0] - y).abs()
            worst = ((far + (factor * added[:, 0]).abs()) ** 2 - far**2).max().item()
        else:
            worst = max(change(z, torch.full_like(y, k)).max() for k in range(max(2, K)))
        got = change(z, y)
        sums[factor] = (got.mean() + worst / len(got), np.std(got, ddof=1) / np.sqrt(len(got)))
    factor = min(sums, key=lambda f: sums[f][0])
    return factor if sums[factor][0] + 2 * sums[factor][1] < 0 else 0.0


@pytest.mark.parametrize("task, K", TASKS.items())
@pytest.mark.parametrize("true", [0.0, 0.3, 1.0, 2.0, -1.0])
def test_shrink_finds_the_share_that_the_targets_were_drawn_with(task, K, true):
    N, generator = 4000, torch.Generator().manual_seed(3)
    part, fold, model = small_part(N), torch.randint(5, (N,), generator=generator), small_net(outputs=K)
    with torch.no_grad():
        model.head.weight.mul_(5)  # so that what it adds counts for something
    line = model.encode(part)[2][torch.arange(N), fold]
    added = train.held_out(model, part, fold)[0] - line
    z = line + true * added
    y = {"binary": lambda: torch.bernoulli(z[:, 0].sigmoid(), generator=generator),
         "classes": lambda: torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0].float(),
         "numbers": lambda: z[:, 0] + 0.3 * torch.randn(N, generator=generator)}[task]().detach()
    before, head = copy.deepcopy(model), model.head.weight.detach().clone()
    factor, held = train.shrink(model, part._replace(target=y), fold, task)
    assert factor == pytest.approx(shrink_plainly(line, added, y, task), abs=1e-6)
    assert (factor == 0) == (true <= 0)  # in doubt it is less, not more
    assert min(max(true, 0), 1) - 0.31 < factor < max(true, 0) + 0.11
    torch.testing.assert_close(model.head.weight, factor * head)
    assert all(torch.equal(p, q) for (name, p), q in zip(model.named_parameters(), before.parameters())
               if "head" not in name)
    torch.testing.assert_close(held, train.held_out(model, part, fold), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_a_table_of_noise_the_answer_is_the_linear_model(task, seed):
    data = small_data(task, N=250, seed=seed, signal=0.0)
    model = net_for(data)
    model.solve(data, apart=True)
    for _ in train.fit(model, data.rest, data.fold, task, 10, 32, 0.01, 0.1, 10, seed):
        pass
    factor, held = train.shrink(model, data.rest, data.fold, task)
    line = model.encode(data.rest)[2][torch.arange(len(data.fold)), data.fold]
    assert factor == 0 and torch.equal(held[0], line)
    model.solve(data, apart=False)
    torch.testing.assert_close(train.predict(model, data.test, task),
                               train.combine(load.linear_baseline(data)[None], task), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- as users run them
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One small run, with dropout, for several tests to look at."""
    out = tmp_path_factory.mktemp("trained")
    return out, run_script(FOLDER / "train.py", *SMALL, "--epochs", 4, "--out", out)


def test_train_learns_and_leaves_everything(trained, census):
    out, text = trained
    written = json.loads((out / "metrics.json").read_text())
    metrics = written["metrics"]
    assert written["stand_in"] is True and written["data"] == "census"
    assert [row["epoch"] for row in written["history"]] == [0, 1, 2, 3, 4]
    assert sorted(p.name for p in out.iterdir()) == ["history.png", "metrics.json", "model.pt"]
    assert metrics["linear_model"]["auc"] + 0.01 < metrics["test_auc"]
    assert metrics["majority"]["auc"] == 0.5 and metrics["majority"]["accuracy"] < metrics["test_accuracy"]
    assert metrics["one_member"]["log_loss"] >= metrics["test_log_loss"]
    best = float(re.search(r"model behind the data +0\.\d+ +(0\.\d+)", text)[1])
    assert metrics["test_auc"] < best < 1
    share = census.rest.target.double().mean().item()
    same = float(re.search(r"the same answer for everyone has loss ([\d.]+)", text)[1])
    assert same == pytest.approx(-share * math.log(share) - (1 - share) * math.log(1 - share), abs=1e-4)
    assert metrics["val_loss"] == min(row["val_loss"] for row in written["history"]) < same
    assert 0.5 < float(re.search(r"share in the answer, as validation has it: ([\d.]+)", text)[1]) <= 1
    assert text.count("STAND-IN") == 2  # one notice at the start, one at the end


def test_saved_model_gives_the_reported_figures_and_scikit_learns(trained, census):
    saved = utils.load_checkpoint(trained[0] / "model.pt", train.SCRIPT)
    model = train.TabularNet(**saved["config"])
    model.load_state_dict(saved["model"])
    assert saved["schema"] == census.schema
    metrics = json.loads((trained[0] / "metrics.json").read_text())["metrics"]
    assert saved["metrics"] == metrics
    p, y = train.predict(model, census.test, "binary").numpy(), census.test.target.numpy()
    assert train.evaluate(torch.from_numpy(p), census.test.target) == pytest.approx(
        {name: metrics[f"test_{name}"] for name in FIGURES["binary"]}, abs=1e-6)
    sklearn = pytest.importorskip("sklearn.metrics")
    assert metrics["test_auc"] == pytest.approx(sklearn.roc_auc_score(y, p), abs=1e-6)
    assert metrics["test_log_loss"] == pytest.approx(sklearn.log_loss(y, p), abs=1e-6)
    assert metrics["test_accuracy"] == pytest.approx(sklearn.accuracy_score(y, p > 0.5), abs=1e-4)
    ## What the validating members said of each row, for a threshold: as good as the answer for rows of the test part.
    held = train.combine(saved["held_out"], "binary").numpy()
    assert held.shape == census.rest.target.shape
    assert sklearn.log_loss(census.rest.target, held) == pytest.approx(metrics["test_log_loss"], abs=0.03)


@pytest.mark.parametrize("task", TASKS)
def test_a_table_with_nothing_to_learn_ends_early_and_as_the_linear_model(tmp_path, task):
    path = write_csv(tmp_path / "coins.csv", small_table(task, N=400, signal=0.0))
    text = call_main(train, "--data", path, "--target", "y", "--members", 5, "--hidden", 32, "--epochs", 40,
                     "--batch-size", 32, "--patience", 2, "--lr", 0.01, "--device", "cpu", "--out", tmp_path)
    written = json.loads((tmp_path / "metrics.json").read_text())
    history, metrics = written["history"], written["metrics"]
    last = max(row["epoch"] for row in history if row["improved"])
    assert len(history) < 41 and history[-1]["epoch"] - last == 2
    assert "as validation has it: 0.0" in text and "STAND-IN" not in text
    for row in ("linear_model", "one_member"):
        assert metrics[row] == pytest.approx({name: metrics[f"test_{name}"] for name in FIGURES[task]}, abs=1e-4)
    saved = utils.load_checkpoint(tmp_path / "model.pt", train.SCRIPT)
    assert not saved["model"]["head.weight"].any() and not saved["model"]["head.bias"].any()
    assert saved["source"] == str(path) and saved["stand_in"] == "" and saved["metrics"] == metrics


@pytest.mark.parametrize("k", range(15))
def test_small_tables_of_ones_own(tmp_path, k):
    """Two values, several and numbers in turn, from 80 rows to 360, with missing cells: what train.py does by default,
    with smaller networks to be quick."""
    task = list(TASKS)[k % 3]
    columns = small_table(task, N=80 + 20 * k, seed=k, signal=2.0, missing=[0.0, 0.05, 0.2][k % 5 % 3])
    if k % 2:
        columns["y"][3] = ""  # a row without a target is left out
    text = call_main(train, "--data", write_csv(tmp_path / "t.csv", columns), "--target", "y", "--members", 5,
                     "--hidden", 16, "--epochs", 12, "--device", "cpu", "--out", tmp_path)
    written = json.loads((tmp_path / "metrics.json").read_text())
    metrics = written["metrics"]
    for row in (metrics["linear_model"], metrics["one_member"], metrics["majority"],
                ours := {name: metrics[f"test_{name}"] for name in FIGURES[task]}):
        assert list(row) == FIGURES[task] and all(map(math.isfinite, row.values()))
    loss = FIGURES[task][0 if task == "numbers" else -1]
    assert ours[loss] < 1.15 * metrics["linear_model"][loss]
    assert ("1 rows have no y" in text) == bool(k % 2) and "nan" not in text.replace("train nan", "")
    saved = utils.load_checkpoint(tmp_path / "model.pt", train.SCRIPT)
    model, data = train.TabularNet(**saved["config"]), load.load_data(saved["source"], "y")
    model.load_state_dict(saved["model"])
    figures = train.evaluate(train.predict(model, data.test, task), data.test.target, task)
    unit = {"rmse": data.schema.get("scale"), "mae": data.schema.get("scale")}
    assert {name: value * unit.get(name, 1) for name, value in figures.items()} == pytest.approx(ours, rel=1e-5)
    assert saved["schema"] == data.schema and saved["held_out"].shape == (1, len(data.fold), TASKS[task])


@pytest.mark.parametrize("task", TASKS)
def test_what_no_line_can_follow_is_learned_on_top_of_the_linear_model(tmp_path, task):
    path = write_csv(tmp_path / "t.csv", small_table(task, N=1000, signal=2.0, missing=0.02))
    text = call_main(train, "--data", path, "--target", "y", "--members", 5, "--hidden", 32, "--device", "cpu",
                     "--out", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    loss, score = ("rmse", "r2") if task == "numbers" else ("log_loss", "auc")
    assert metrics[f"test_{loss}"] < 0.85 * metrics["linear_model"][loss] < 0.85 * metrics["majority"][loss]
    assert metrics[f"test_{score}"] > metrics["linear_model"][score] + 0.03
    assert float(re.search(r"as validation has it: ([\d.]+)", text)[1]) >= 0.5


def test_the_script_for_ones_own_tables_runs_a_sample_beside_its_peers(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setitem(sys.modules, "catboost", None)  # it may be there, and takes half a minute
    import own_tables

    write_csv(tmp_path / "t.csv", small_table("classes", N=60, signal=2.0, missing=0.02))
    (tmp_path / "tables.json").write_text(json.dumps([{"name": "sample", "file": "t.csv", "target": "y"}]))
    own_tables.compare(tmp_path, write=tmp_path / "rows.json")
    row, text = json.loads((tmp_path / "rows.json").read_text())["sample"], capsys.readouterr().out
    assert row["ratio"] < 1.1 and all(0 < row[score] <= 1 for score in ("network", "linear", "HistGradientBoosting"))
    assert f"{row['HistGradientBoosting']:13.4f}" in text and "1 tables; loss beside the linear model's: at" in text


def test_figures_of_numbers_are_in_the_units_of_the_table(tmp_path):
    """A target a thousand times as large has an error a thousand times as large, and the same R^2."""
    runs = []
    for factor in (1, 1000):
        columns = small_table("numbers", N=150)
        columns["y"] = [f"{float(v) * factor:.4f}" for v in columns["y"]]
        call_main(train, "--data", write_csv(tmp_path / "t.csv", columns), "--target", "y", "--members", 5, "--epochs",
                  4, "--hidden", 16, "--device", "cpu", "--out", tmp_path)
        runs.append(json.loads((tmp_path / "metrics.json").read_text())["metrics"])
    for name, factor in (("rmse", 1000), ("mae", 1000), ("r2", 1)):
        assert runs[1][f"test_{name}"] == pytest.approx(factor * runs[0][f"test_{name}"], rel=1e-3)
        assert runs[1]["linear_model"][name] == pytest.approx(factor * runs[0]["linear_model"][name], rel=1e-3)
    spread = np.std([float(v) for v in small_table("numbers", N=150)["y"]])
    assert runs[0]["test_rmse"] < spread and runs[0]["majority"]["rmse"] == pytest.approx(spread, rel=0.3)


@pytest.mark.parametrize("options, words", [
    (["--device", "abacus"], "--device abacus"),
    (["--data", "/no/such/file.csv", "--target", "y"], "no such file"),
    (["--data", "census", "--target", "age"], "--target age belongs to a CSV file"),
    (["--out", "/dev/null/x"], "cannot write"),
])
def test_bad_options_get_one_sentence(tmp_path, options, words):
    assert words in refusal(train, *SMALL, "--out", tmp_path / "o", *options)


@pytest.mark.parametrize("name, value, interval", [
    ("--epochs", 0, "[1, inf)"), ("--members", 4, "[5, inf)"), ("--n-embd", 0, "[1, inf)"),
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


def test_the_experiment_starts_from_what_train_uses(monkeypatch, tmp_path):
    """train.py chooses some options by the number of rows: what reaches fit, and the network that does, count."""
    data = load.to_data(load.census(35_000))  # as many rows as from which on the options are those for Adult
    monkeypatch.setattr(train, "load_data", lambda *_: data)
    monkeypatch.setattr(train, "fit", lambda *arguments: sys.exit(arguments))
    with pytest.raises(SystemExit) as stop:
        call_main(train, "--data", "census", "--device", "cpu", "--out", tmp_path)
    model, part, fold, task, *loop = stop.value.code
    assert task == "binary" and len(part.target) == len(fold) == len(data.rest.target) >= 20_000
    assert loop[:4] == [experiment.BASE[name] for name in experiment.LOOP] and loop[5] == 0
    recipe = experiment.BASE | {"members": 15}
    mine = experiment.AnyNet(recipe, data)
    assert {n: p.shape for n, p in mine.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert mine.dropout.p == model.dropout.p and all(map(torch.equal, mine.bins, model.bins))
    assert all(map(torch.equal, mine.exact, model.exact)) and experiment.BASE["start"] == "linear model"
    same_weights(mine, model)
    few = load.Part(*(tensor[:500] for tensor in data.val))
    assert model.linear.any() and torch.equal(mine.linear, model.linear)
    torch.testing.assert_close(mine.eval()(*mine.encode(few)), model.eval()(*model.encode(few)), atol=1e-3, rtol=1e-4)


def test_a_network_can_start_from_nothing(census):
    few = load.Part(*(tensor[:50] for tensor in census.val))
    for start, zero in (("nothing", True), ("linear model", False)):
        model = experiment.AnyNet(experiment.BASE | {"start": start}, census)
        model.linear.normal_()
        assert model(*model.encode(few)).any() != zero


def test_one_hot_columns_can_do_what_embeddings_do(census):
    """An embedding, then a linear layer, is one linear layer on one-hot columns: the product of the two matrices."""
    recipe = experiment.BASE | {"dropout": 0.0, "members": 2, "exact": 0}
    embedded = experiment.AnyNet(recipe, census)
    one_hot = experiment.AnyNet(recipe | {"categories": "one-hot"}, census)
    same_weights(copy.deepcopy(embedded), embedded)  # a head of zeros would hide all
    embedded.linear.normal_()
    one_hot.linear.copy_(embedded.linear)
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
    assert torch.equal(raw[:, :, 0], x.float())
    torch.testing.assert_close(standardised[:, :, 0].double(), (x.double() - x.double().mean(0)) / x.double().std(0),
                               atol=1e-3, rtol=1e-3)
    for f in range(x.shape[1]):  # order stays
        order = x[:, f].argsort()
        assert (quantile[order, f, 0].diff() >= 0).all()
    model = experiment.AnyNet(experiment.BASE | {"numbers": "periodic", "exact": 0}, census)
    bins, index, _ = model.encode(load.Part(*(tensor[:3] for tensor in census.train)))
    inputs, E, D = model.embed(bins, index), experiment.BASE["members"], experiment.BASE["n_embd"]
    f, e, n = 3, 1, 2
    angle = 2 * math.pi * model.frequencies[f, :, e] * bins[n, f, 0]
    waves = torch.cat([angle.cos(), angle.sin()])  # (32,)
    expected = F.relu(waves @ model.slopes[f, :, e] + model.offsets[f, 0, e])
    assert len(inputs) == E
    torch.testing.assert_close(inputs[e, n].view(-1, D)[index.shape[1] + f], expected)


def test_experiment_runs(tmp_path):
    path = write_csv(tmp_path / "t.csv", small_table("binary", N=300))
    options = ["--data", path, "--target", "y", "--out", tmp_path]
    out = call_main(experiment, *options, "--seeds", 2, "--epochs", 1, "--device", "cpu")
    assert "wrote experiment.json" in out and (tmp_path / "experiment.png").stat().st_size > 1000
    results = json.loads((tmp_path / "experiment.json").read_text())
    assert len(results["rows"]) == len(experiment.CHANGES)
    for row in results["rows"]:
        for name in ("auc", "log_loss", "accuracy", "one_fold_auc"):
            assert len(row[name]) == 2 and all(0 <= value < 100 for value in row[name])


def test_experiment_names_its_rows_where_none_is_meant(tmp_path):
    assert "no row" in refusal(experiment, "--data", "census", "--only", "xyz", "--out", tmp_path)


def test_experiment_on_classes_and_on_numbers(tmp_path):
    rows = {task: ["--data", write_csv(tmp_path / f"{task}.csv", small_table(task)), "--target", "y", "--only",
                   "as it is", "--seeds", 1, "--epochs", 2, "--device", "cpu", "--out", tmp_path]
            for task in ("classes", "numbers")}
    call_main(experiment, *rows["classes"])
    row, = json.loads((tmp_path / "experiment.json").read_text())["rows"]
    assert 0.5 < row["auc"][0] < 1
    assert "y is a number" in refusal(experiment, *rows["numbers"])


def test_the_experiment_judges_rows_by_members_that_did_not_learn_from_them():
    """Its figures against scikit-learn's, of the same outputs of the same network."""
    metrics = pytest.importorskip("sklearn.metrics")
    data = small_data("binary", N=300)
    recipe = experiment.BASE | {"members": 10, "epochs": 2, "batch_size": 64}
    figures, one = experiment.train_once(recipe, data, torch.device("cpu"), 3)
    torch.manual_seed(3)
    model, y = experiment.AnyNet(recipe, data), data.rest.target
    model.solve(data, apart=True)
    for _ in train.fit(model, data.rest, data.fold, "binary", 2, 64, recipe["lr"], recipe["weight_decay"], 2, 3):
        pass
    z = train.member_outputs(model, model.encode(data.rest))[:, :, 0]
    p = torch.stack([z[data.fold[n] + torch.tensor([0, 5]), n].mean() for n in range(len(y))]).sigmoid().numpy()
    assert figures["auc"] == pytest.approx(metrics.roc_auc_score(y, p), abs=1e-6)
    assert figures["log_loss"] == pytest.approx(metrics.log_loss(y, p), abs=1e-6)
    each = [metrics.roc_auc_score(y[data.fold == f], p[data.fold == f]) for f in range(5)]
    assert one == pytest.approx(np.mean(each), abs=1e-6)


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
    call_main(train, "--data", "adult", "--members", 5, "--epochs", 2, "--out", tmp_path, "--device", "cpu")
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["stand_in"] is False
    assert written["metrics"]["test_auc"] > written["metrics"]["linear_model"]["auc"] + 0.005
