"""Using a model of a table: new rows, one person's probability and what moved it, and what to ask before trusting it.

You learn here: how a probability becomes a decision, and which rows choose its threshold; what ROC, precision-recall
and calibration curves show; which columns a model needs; which values it takes to be alike; how to share out a
probability among the values that made it; and that one accuracy can be several, by group.

    python 04_tabular/train.py                             first, to have a model
    python 04_tabular/load_model.py                        all of the above, on the test rows
    python 04_tabular/load_model.py --person "age=39, education=Bachelors, occupation=Sales, relationship=Husband"
    python 04_tabular/load_model.py --score new.csv --out scores.csv       predictions for rows without a target

You should see (Adult, the default model): accuracy .876 and F1 .72 at threshold 0.5; accuracy .845 for men and .939 for
women; marital-status and capital-gain moving AUC most; 73 % for the person above.
Writes to outputs/: curves.png, importance.png, embeddings.png; with --person: person.png. Left out on purpose: making
a model fair; this only shows where it is not.
"""
import csv
import io
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from load import KNOWN, NO_VALUE, SETS, UNSEEN, Data, Part, encode, encode_row, inputs_of, linear_baseline
from load import read_table, roc_auc, to_data, words_of
from reading import NUMBER, date_formats, read_csv
from train import SCRIPT, TabularNet, combine, evaluate, predict

# Shapes: N rows, F numeric columns, L columns that are looked up (the category columns), V values of one of them, E
#         members, C width of an embedding


def load_tabular(path: Path, device: torch.device | str = "cpu") -> tuple[TabularNet, dict]:
    """Rebuild the model that train.py saved; also return the checkpoint, for its schema and data name."""
    saved = utils.load_checkpoint(path, SCRIPT)
    try:
        model = TabularNet(**saved["config"])
        model.load_state_dict(saved["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise utils.InputError(f"{path} is of another version of train.py; make it anew: python {SCRIPT}") from error
    return model.to(device).eval(), saved


def data_of(saved: dict, path: str | None) -> Data:
    """The table the model was trained on, split as it was then. Raises utils.InputError where it is another one.

    The columns' types come from the model's schema, whatever was asked for or inferred at training time.
    """
    name, schema = path or saved["source"], saved["schema"]
    if name not in SETS and not Path(name).exists():
        raise utils.InputError(f"{name}: no such file; say with --data where {saved['data']} is, the table that the "
                               "model was trained on.")
    table = read_table(name, None if name in SETS else schema["target"])
    kinds = inputs_of(schema)
    if not {*kinds, schema["target"]} <= {*table.columns}:
        raise utils.InputError(f"--data {name} lacks columns that the model was trained on; give {saved['data']}.")
    data = to_data(table, [f"{c}={kinds.get(c, 'ignore')}" for c in table.columns if c != table.target],
                   "numbers" if schema["task"] == "numbers" else "classes", schema.get("positive"))
    if data.schema != schema:
        raise utils.InputError(f"--data {name} is not the table that the model was trained on; give {saved['data']} as "
                               "it was then.")
    return data


def score(model: TabularNet, schema: dict, path: Path) -> list[list[str]]:
    """The predictions for a CSV file's rows, as the rows of another: its header, then for each row the value that is
    most likely and the probability of each, or the number. Columns are found by name, in any order; a target is not
    needed. Raises utils.InputError, naming the line, for what the model can't read."""
    table = read_csv(path, None)
    for name, kind in inputs_of(schema).items():
        if name not in table.columns:
            raise utils.InputError(f"{path} lacks the column {name}, which the model reads.")
        column = table.columns[name]
        fits = {"numeric": NUMBER.fullmatch, "date": lambda v: schema["dates"][name] in date_formats({v}),
                "category": lambda v: True}[kind]
        if odd := next((value for value in column if value and not fits(value)), None):
            raise utils.InputError(f"{path}, {table.lines[column.index(odd)]}: {odd!r} in column {name} is no "
                                   f"{'number' if kind == 'numeric' else 'date as in training'}.")
    p = predict(model, encode(table.columns | {schema["target"]: [""] * len(table.lines)}, schema), schema["task"])
    if schema["task"] == "numbers":
        return [[schema["target"]], *([f"{value:.9g}"] for value in (p * schema["scale"] + schema["center"]).tolist())]
    p, classes = torch.stack([1 - p, p], 1) if p.dim() == 1 else p, schema["classes"]
    return [[schema["target"], *(f"probability of {value}" for value in classes)],
            *([classes[row.argmax()], *(f"{value:.6f}" for value in row.tolist())] for row in p)]


# ---------------------------------------------------------------------------------------------- columns
def to_matrix(part: Part) -> Tensor:
    """All columns side by side, (N, F + L) float64: the numbers, then the categories' indices."""
    return torch.cat([part.numeric.double(), part.categories.double()], 1)


def to_part(matrix: Tensor, schema: dict) -> Part:
    """The inverse of to_matrix, without targets."""
    n = len(schema["numeric"])
    return Part(matrix[:, :n].contiguous(), matrix[:, n:].long(), torch.full((len(matrix),), torch.nan))


def tied_columns(matrix: Tensor) -> list[list[int]]:
    """The columns of a matrix (N, F + L) in groups: one is with another where each tells exactly what the other is.

    ## Adult has education twice, as a word and as a number of school years. To change one and leave the other makes a
    ## person who can't exist, and a model may say anything of such a person. So they are moved together. Values that
    ## hardly ever come twice prove nothing: of a number different in each row, any column would seem to follow.
    """
    codes = [column.unique(return_inverse=True)[1] for column in matrix.T]
    sizes = [int(code.max()) + 1 for code in codes]
    groups = {}  # first column -> all that are with it
    for c, (code, size) in enumerate(zip(codes, sizes)):
        same = (first for first in groups if 1 < size == sizes[first] < len(matrix) / 2
                and len((codes[first] * size + code).unique()) == size)
        groups.setdefault(next(same, c), []).append(c)
    return list(groups.values())


# ---------------------------------------------------------------------------------------------- curves
def counts_by_threshold(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thresholds, every probability that occurs, falling; and how many positives and negatives are at or above
    each. All curves below are made of these three, of one length."""
    order = p.argsort(descending=True)
    p, y = p[order], y[order].double()
    last = torch.cat([p.diff() != 0, torch.tensor([True])])  # of equal probabilities, all pass or none
    return p[last], y.cumsum(0)[last], (1 - y).cumsum(0)[last]


def roc_curve(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """False positive rates and true positive rates, from no row named to all rows named: one more than thresholds.

    ##     true positive rate  = TP / all positives       false positive rate = FP / all negatives
    ## Lower the threshold step by step: each positive row that passes is a step up, each negative one a step to the
    ## right. A model that guesses walks along the diagonal. The area below the walk is the AUC.
    """
    _, tp, fp = counts_by_threshold(p, y)
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.cat([zero, fp / fp[-1]]), torch.cat([zero, tp / tp[-1]])


def precision_recall(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and thresholds, of one length; thresholds falling.

    ##     precision = TP / (TP + FP)       recall = TP / all positives
    ## Where positives are rare, a small false positive rate may still be more rows than there are positives. The ROC
    ## curve does not show it; precision does.
    """
    thresholds, tp, fp = counts_by_threshold(p, y)
    return tp / (tp + fp), tp / tp[-1], thresholds


def average_precision(p: Tensor, y: Tensor) -> float:
    """sum_n (R_n - R_(n-1)) P_n: the mean precision over all recalls, the area below the curve drawn as steps."""
    precision, recall, _ = precision_recall(p, y)
    return (recall.diff(prepend=torch.zeros(1, dtype=torch.float64)) * precision).sum().item()


def calibration(p: Tensor, y: Tensor, bins: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Of the rows whose probability falls into each of `bins` equal bins: mean probability, share of positives, count.

    ## A probability of 80 % should come true four times in five. AUC can't tell: halve all probabilities, and the order
    ## of the rows is the same. Empty bins are left out.
    """
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    which = torch.searchsorted(edges[1:-1], p.double())  # (N,)
    count = which.bincount(minlength=bins)
    mean, share = (which.bincount(values.double(), minlength=bins)[count > 0] / count[count > 0] for values in (p, y))
    return mean, share, count[count > 0]


def calibration_error(p: Tensor, y: Tensor, bins: int = 10) -> float:
    """The distance between probability and share of positives, as a mean over rows (Naeini et al. 2015)."""
    mean, share, count = calibration(p, y, bins)
    return ((mean - share).abs() * count).sum().item() / len(p)


def best_threshold(p: Tensor, y: Tensor) -> float:
    """The threshold with the highest F1, 2 TP / (2 TP + FP + FN), half-way to the next lower probability.

    ## One half is best for accuracy, where the probabilities are right: it takes both mistakes to cost the same. F1
    ## looks at the positives alone and wants more of them named. The threshold is a number fitted to data like any
    ## other: chosen on the test rows, it would fit their chance, and their figure would be too good. So validation
    ## chooses it.
    """
    thresholds, tp, fp = counts_by_threshold(p, y)
    best = int((2 * tp / (tp + fp + tp[-1])).argmax())  # TP + FN is all positives
    return (thresholds[best : best + 2].sum() / 2).item()  # below the lowest threshold lies 0


# ---------------------------------------------------------------------------------------------- what the model needs
def permutation_importance(model: TabularNet, part: Part, schema: dict, groups: list[list[int]], repeats: int,
                           seed: int) -> Tensor:
    """How much AUC, or R^2 of numbers, is lost on part when a group of columns is shuffled: (groups, repeats) (Breiman
    2001).

    ## Shuffled, a column still has the values it had, but at other rows: whatever it told about its row is gone. What
    ## AUC that costs is how much the model relies on it. Not how much there is to know in it: where two columns tell
    ## nearly the same, as marital status and relationship do, the model may get by with the other one.
    """
    matrix, generator = to_matrix(part), torch.Generator().manual_seed(seed)
    task, figure = schema["task"], "r2" if schema["task"] == "numbers" else "auc"
    before, begun = evaluate(predict(model, part, task), part.target, task)[figure], time.perf_counter()
    lost = torch.zeros(len(groups), repeats)
    for i in range(lost.numel()):
        columns, shuffled = groups[i // repeats], matrix.clone()
        shuffled[:, columns] = matrix[torch.randperm(len(matrix), generator=generator)][:, columns]
        p = predict(model, to_part(shuffled, schema), task)
        lost.view(-1)[i] = before - evaluate(p, part.target, task)[figure]
        utils.progress(i + 1, lost.numel(), begun, "importance", "shuffles")
    return lost


def pca(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (V, I) seen from where they lie furthest apart: (V, 2), and each of the two directions' share of variance.

    ## Centred, x = U S W^T, the singular value decomposition with its usual letters: the rows of W^T are directions at
    ## right angles, ordered by how far the rows of x spread along them, and S^2 says how far. The places along the
    ## first two are x W_2 = U_2 S_2.
    """
    x = torch.nn.functional.pad(x, (0, max(0, 2 - x.shape[1])))  # of one number wide, the second direction is empty
    U, S, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return (U * S)[:, :2], S[:2].square() / S.square().sum().clamp(min=1e-30)


def value_embeddings(model: TabularNet, k: int, n_values: int) -> Tensor:
    """What all members learned of category column k's values: (V, E C), without the places for missing and unseen.

    ## Each member's embedding has axes of its own: only distances within one mean something. Side by side, the squared
    ## distance of two values is the sum of their squared distances in all members.
    """
    first = int(model.first[k]) + KNOWN
    return model.table[first : first + n_values].detach().flatten(1).cpu()


def by_group(p: Tensor, part: Part, schema: dict, column: str, threshold: float) -> dict[str, dict[str, float]]:
    """For each value of a category column: number of rows, share of positives, share named, and evaluate's figures."""
    k, out = schema["categorical"].index(column), {}
    for i, word in enumerate(words_of(schema, k)):
        rows = part.categories[:, k] == i
        y, here = part.target[rows], p[rows]
        if len(y):
            out[word] = {"rows": len(y), "positive": y.mean().item(),
                         "named": (here > threshold).double().mean().item(), **evaluate(here, y, threshold=threshold)}
    return out


# ---------------------------------------------------------------------------------------------- one person
class Person(NamedTuple):
    row: Tensor  # (F + L,) as in to_matrix
    given: list[list[int]]  # the known columns, those that are moved together in one group
    words: dict[int, str]  # column -> what was said of it


def read_person(text: str, data: Data, groups: list[list[int]]) -> Person:
    """A description such as "age=39, sex=Female". Raises utils.InputError for what the table has no place for."""
    schema, values, words = data.schema, {}, {}
    names, n = schema["numeric"] + schema["categorical"], len(schema["numeric"])
    for item in re.split(r",(?=[^,=]+=)", text):  # a comma that no other column's name follows is part of a value
        name, _, value = (part.strip() for part in item.partition("="))
        if "=" not in item or name in values:
            what = f"{name} is given twice" if name in values else f"{item.strip()!r} is no COLUMN=VALUE"
            raise utils.InputError(f"--person: {what}; name each column once and separate them by commas.")
        values[name] = value
    said = {name: "" if value == "?" else value for name, value in values.items()}
    row, train = to_matrix(encode_row(said, schema))[0], to_matrix(data.train)  # encode_row refuses unknown columns
    for name, value in values.items():
        if name not in names:
            raise utils.InputError(f"--person: {name} is a date, which can't be described here; leave it out.")
        c = names.index(name)
        seen = train[:, c]
        if value in ("", "?") and (c < n or not (seen == NO_VALUE).any()):
            continue  # in training everybody answered, so what silence means was never learned
        words[c] = value
        if c < n and not seen.min() <= row[c] <= seen.max():
            print(f"{name}={value} lies outside what training saw, {seen.min():g} to {seen.max():g}")
        elif c >= n and row[c] == UNSEEN:
            print(f"{name}={value} was in no training row; it counts as unseen")
    for group in groups:  # what follows from what was said
        known = [c for c in group if c in words]
        same = train[(train[:, known] == row[known]).all(1)]
        for c in group:
            if known and c not in words and len(same):
                row[c] = same[0, c]
                words[c] = f"{row[c]:g}" if c < n else words_of(schema, c - n)[int(row[c])]
                print(f"{names[c]}={words[c]} follows from {names[known[0]]}")
    return Person(row, [known for group in groups if (known := [c for c in group if c in words])], words)


def fill_in(person: Person, data: Data, samples: int, generator: torch.Generator, nearest: int = 200) -> Tensor:
    """The person `samples` times, (samples, F + L); what is not known of them comes from training rows like them.

    ## Any row will not do: a husband whose marital status is drawn from all rows would be unmarried every other time.
    ## So draw from the nearest rows, by what is known: a category differs by 1 or by 0, a number by the share of the
    ## training rows between the two.
    """
    train, n = to_matrix(data.train), len(data.schema["numeric"])
    distance = 1e-6 * torch.rand(len(train), generator=generator)  # decides among equals
    for c in (group[0] for group in person.given):
        if c < n:
            column = train[:, c].contiguous()
            between = torch.searchsorted(column.sort().values, torch.cat([column, person.row[c : c + 1]]))
            distance += (between[:-1] - between[-1]).abs() / len(train)
        else:
            distance += train[:, c] != person.row[c]
    near = distance.argsort()[:nearest]
    rows = train[near[torch.randint(len(near), (samples,), generator=generator)]]  # (samples, F + L)
    known = [c for group in person.given for c in group]
    rows[:, known] = person.row[known]
    return rows


def contributions(answer: Callable[[Tensor], Tensor], rows: Tensor, groups: list[list[int]], data: Data,
                  generator: torch.Generator) -> tuple[float, float, Tensor, Tensor]:
    """What moved the mean answer to rows (samples, F + L), each a person, from that to as many random training rows.
    answer: rows (N, F + L) -> probability or number of each, (N,).

    Returns both means, each group of columns' share of the difference, and by how much the probability falls where
    one group alone is replaced. groups: all columns, each in one of them.

    ## The simple way is the last one: replace one value by those of the training rows and see what changes. It misses
    ## what two values do together: take away "married", and "husband" still says it; take away "husband", and "married"
    ## does. Each alone changes little. So start from a training row and put in the person's values one after the other;
    ## each takes credit for the step it makes. The credit depends on the order: the mean over random orders is the
    ## Shapley value (Strumbelj & Kononenko 2014). The steps of a walk lead from its first probability to its last, and
    ## so the shares sum to the difference exactly. Both say what moved the model, not what would move an income.
    """
    train, (samples, width), steps = to_matrix(data.train), rows.shape, len(groups)
    start = train[torch.randint(len(train), (samples,), generator=generator)]  # (samples, width)
    mask = torch.zeros(steps, width, dtype=torch.bool)  # which columns belong to group g
    for g, group in enumerate(groups):
        mask[g, group] = True
    order = torch.rand(samples, steps, generator=generator).argsort(1)  # which group comes when
    put = torch.cat([torch.zeros(samples, 1, width), mask[order].cumsum(1)], 1) > 0  # (samples, steps + 1, width)
    walks = torch.where(put, rows[:, None], start[:, None])
    p = answer(walks.flatten(0, 1)).view(samples, steps + 1)
    shares = torch.zeros(samples, steps, dtype=p.dtype).scatter_(1, order, p.diff(dim=1)).mean(0)
    without = torch.where(mask, start[:, None], rows[:, None])  # (samples, steps, width)
    alone = p[:, -1:] - answer(without.flatten(0, 1)).view(samples, steps)
    return p[:, -1].mean().item(), p[:, 0].mean().item(), shares, alone.mean(0)


def show_person(model: TabularNet, data: Data, text: str, threshold: float, out: Path, seed: int) -> None:
    """Print and draw one person's probability, or number, and what moved it."""
    schema, names = data.schema, data.schema["numeric"] + data.schema["categorical"]
    person = read_person(text, data, tied_columns(to_matrix(data.train)))
    unknown = [c for c in range(len(names)) if c not in person.words]
    words = [" and ".join(f"{names[c]}={person.words[c]}" for c in group) for group in person.given]
    words += ["all that was not said, as in rows like this"] * bool(unknown)
    generator = torch.Generator().manual_seed(seed)
    rows = fill_in(person, data, 1000, generator)
    task, k = schema["task"], -1

    def answer(matrix: Tensor) -> Tensor:
        p = predict(model, to_part(matrix, schema), task)
        return p * schema["scale"] + schema["center"] if task == "numbers" else p[:, k] if task == "classes" else p

    if task == "classes":
        k = int(predict(model, to_part(rows, schema), task).mean(0).argmax())  # the class that is most likely
    p, mean, shares, alone = contributions(answer, rows, person.given + [unknown] * bool(unknown), data, generator)
    what = schema["target"] if task == "numbers" else f"probability of {schema['target']} {schema['classes'][k]}"
    form = ".4g" if task == "numbers" else ".1%"
    print(f"\n{what}: {p:{form}}; of a row of training on average {mean:{form}}")
    if task == "binary":
        print(f"above {threshold:.2f} (best F1 on validation) counts as {schema['positive']}: here "
              f"{schema['positive' if p > threshold else 'negative']}")
    if unknown:
        print(f"not said, and averaged over rows like this: {', '.join(names[c] for c in unknown)}")
    print(f"\n{'what moved it':52}{'share':>9}{'replaced alone':>17}")
    order = shares.abs().argsort(descending=True).tolist()
    for g in order:
        print(f"{words[g]:52}{shares[g]:+9{form}}{alone[g]:+17{form}}")
    print(f"{'all together':52}{shares.sum():+9{form}}")
    steps = shares[order].numpy()
    begins = mean + steps.cumsum(0) - steps  # each bar begins where the one above it ended
    title = f"What moved it ({data.label})"
    figure, axes = draw_bars([words[g] for g in order], steps, title, what, begins)
    axes.axvline(mean, color="black", lw=1, ls=":", label=f"average row {mean:{form}}")
    axes.axvline(p, color="black", lw=1, label=f"this one {p:{form}}")
    axes.legend(fontsize=8)
    utils.write_atomically(out / "person.png", figure.savefig)
    print(f"\nwrote {out / 'person.png'}")


# ---------------------------------------------------------------------------------------------- pictures
def draw_curves(curves: dict[str, Tensor], y: Tensor, threshold: float, title: str):
    """ROC, precision-recall and calibration of several models: probabilities (N,) each."""
    figure, (roc, pr, said) = utils.pyplot().subplots(1, 3, figsize=(15, 4.5))
    for (name, p), style in zip(curves.items(), ("-", "--")):
        precision, recall, _ = precision_recall(p, y)
        roc.plot(*roc_curve(p, y), style, label=f"{name}, AUC {roc_auc(p, y):.4f}")
        pr.plot(recall, precision, style, label=f"{name}, mean {average_precision(p, y):.4f}")
        said.plot(*calibration(p, y)[:2], style, marker="o", label=f"{name}, error {calibration_error(p, y):.4f}")
    named, true = curves["network"] > threshold, y == 1
    spot = dict(marker="o", color="black", ls="", label=f"threshold {threshold:.2f}")
    recall = named[true].double().mean()
    roc.plot(named[~true].double().mean(), recall, **spot)
    pr.plot(recall, y[named].mean(), **spot)  # no dot where no row is named: the mean of nothing is nan
    guessing = dict(slope=0, ls=":", color="grey", label="guessing")
    roc.axline((0, 0), **guessing | {"slope": 1})
    pr.axline((0, y.mean().item()), **guessing)
    said.axline((0, 0), **guessing | {"slope": 1, "label": "as said"})
    roc.set(title="ROC", xlabel="false positive rate", ylabel="true positive rate")
    pr.set(title="Precision and recall", xlabel="recall", ylabel="precision")
    said.set(title="Calibration", xlabel="probability, mean in the bin", ylabel="share of positives")
    for axes in (roc, pr, said):
        axes.legend(fontsize=8)
    figure.suptitle(title)
    return figure


def draw_embeddings(model: TabularNet, data: Data, title: str, at_least: int = 50):
    """The values of the six largest category columns in two dimensions, those of at least so many training rows."""
    schema = data.schema
    shown = sorted(range(len(schema["values"])), key=lambda k: -len(schema["values"][k]))[:6]
    figure = utils.pyplot().figure(figsize=(15, 9.2))
    for place, k in enumerate((k for k in shown if len(schema["values"][k]) > 2), 1):
        a = figure.add_subplot(2, 3, place)
        values, column = schema["values"][k], data.train.categories[:, k]
        counts = column.bincount(minlength=len(values) + KNOWN)[KNOWN:]
        often = (counts >= min(at_least, counts.sort(descending=True).values[2])).nonzero()[:, 0]
        places, shares = pca(value_embeddings(model, k, len(values))[often])  # (V, 2)
        rate = [data.train.target[column == i].mean().item() for i in (often + KNOWN).tolist()]  # of two values: share
        dots = a.scatter(*places.T, c=rate, cmap="viridis", s=25)
        figure.colorbar(dots, ax=a, label=f"share of {schema['positive']}" if "positive" in schema else "mean target")
        a.set_title(f"{schema['categorical'][k]} ({shares.sum():.0%} of the variance)", fontsize=10)
        a.margins(0.15)
        for n, i in enumerate(places[:, 1].argsort().tolist()):  # names below and above their dots, in turn
            a.annotate(values[often[i]][:18], places[i].tolist(), (0, (-10, 4)[n % 2]), textcoords="offset points",
                       ha="center", fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def draw_bars(words: list[str], values: np.ndarray, title: str, x: str, begins: np.ndarray | float = 0.0):
    """A figure and its axes: a bar for each word, from top to bottom, that goes from begins to begins + value."""
    figure, axes = utils.pyplot().subplots(figsize=(8, 1.2 + 0.35 * len(words)))
    axes.use_sticky_edges = False  # bars keep away from the frame
    axes.barh(words, values, left=begins, color=["C0" if value > 0 else "C1" for value in values])
    axes.invert_yaxis()
    axes.set(title=title, xlabel=x)
    return figure, axes


def show_binary(data: Data, p: Tensor, threshold: float, columns: list[str], out: Path) -> None:
    """Print and draw what only a target of two values has: thresholds, calibration, curves, and figures by group."""
    y, schema = data.test.target, data.schema
    ## The threshold comes from validation; the figures beside it from the test rows, which chose nothing.
    for name, t in (("threshold 0.50", 0.5), (f"threshold {threshold:.2f}, best F1 on val", threshold)):
        print(f"{name:32}" + "".join(f"{value:10.4f}" for value in evaluate(p, y, threshold=t).values()))
    print(f"\nprobabilities and how often they came true; off by {calibration_error(p, y):.4f} on average")
    for name, values, form in zip(("said", "came true", "rows"), calibration(p, y), ("8.1%", "8.1%", "8,")):
        print(f"  {name:9}" + "".join(f"{value:{form}}" for value in values))
    curves = {"network": p, "logistic regression": linear_baseline(data)[:, 0].sigmoid()}
    figure = draw_curves(curves, y, threshold, f"Test rows ({data.label})")
    utils.write_atomically(out / "curves.png", figure.savefig)
    ## One accuracy for all may be two: a group of few positives is easy to judge. What is missed shows in recall.
    ## Where the columns "named" and "positive" differ, a group is said to have more positives, or fewer, than it has;
    ## where recall alone is lower, more of the group's positives go unseen. Unless every guess is right, these can't
    ## all be equal while groups differ in their share of positives (Kleinberg et al. 2017): which one should be is no
    ## question of statistics.
    shown = ("accuracy", "precision", "recall", "auc")
    for name in columns:
        print(f"\n{name:24}{'rows':>8}{'positive':>10}{'named':>10}" + "".join(f"{m:>10}" for m in shown) +
              "   (test, threshold 0.50)")
        for value, figures in by_group(p, data.test, schema, name, 0.5).items():
            print(f"{value:24}{figures['rows']:8,}{figures['positive']:10.1%}{figures['named']:10.1%}" +
                  "".join(f"{figures[m]:10.4f}" for m in shown))


def main() -> None:
    parser = utils.parser(__doc__, __file__, "device", "seed")
    add = parser.add_argument
    add("--model", type=Path, default=Path(__file__).parent / "outputs" / "model.pt", help="what train.py wrote")
    add("--data", help="the table it was trained on, where that is a CSV file of yours")
    add("--score", type=Path, help="a CSV file of new rows: write their predictions to scores.csv, or --out FILE.csv")
    add("--person", help='one row, as "age=39, sex=Female"; what is left out is averaged over rows like it')
    add("--by", nargs="+", metavar="COLUMN", help="category columns to show figures by; without it sex and race")
    add("--repeats", type=utils.count, default=3, help="shuffles of each column; more make its mean importance surer")
    args = utils.parse_args(parser)
    model, saved = load_tabular(args.model, args.device)
    if args.score:
        rows = io.StringIO()
        csv.writer(rows, lineterminator="\n").writerows(score(model, saved["schema"], args.score))
        path = args.out if args.out.suffix else args.out / "scores.csv"
        utils.write_atomically(path, lambda file: file.write(rows.getvalue().encode()))
        print(f"wrote {path}")
        return utils.stand_in_notice(saved["data"], saved["stand_in"])
    data = data_of(saved, args.data)
    schema, task, y = data.schema, data.schema["task"], data.test.target
    columns = args.by or [name for name in ("sex", "race") if name in schema["categorical"]]
    if wrong := [name for name in columns if name not in schema["categorical"]]:
        raise utils.InputError(f"--by {wrong[0]}: no such category column; there are "
                               f"{', '.join(schema['categorical'])}.")
    ## What each row of validation gets from the members that did not learn from it chooses the threshold.
    threshold = best_threshold(combine(saved["held_out"], task), data.rest.target) if task == "binary" else 0.5
    if args.person is not None:
        show_person(model, data, args.person, threshold, args.out, args.seed)
        return utils.stand_in_notice(data.name, data.stand_in)

    p = predict(model, data.test, task)
    figures = evaluate(p, y, task)
    print(f"\n{f'test ({data.label})':32}" + "".join(f"{name:>10}" for name in figures))
    if task == "binary":
        show_binary(data, p, threshold, columns, args.out)
    else:
        unit = {"rmse": schema.get("scale"), "mae": schema.get("scale")}
        print(f"{'all members':32}" + "".join(f"{value * unit.get(name, 1):10.4g}" for name, value in figures.items()))

    names, groups = schema["numeric"] + schema["categorical"], tied_columns(to_matrix(data.train))
    lost = permutation_importance(model, data.test, schema, groups, args.repeats, args.seed)  # (groups, repeats)
    order, what = lost.mean(1).argsort(descending=True), "R^2" if task == "numbers" else "AUC"
    lost, words = lost[order], [" and ".join(names[c] for c in groups[g]) for g in order]
    print(f"\n{what + ' lost when shuffled (test)':40}{'mean':>8}{'std':>9}")
    for word, each in zip(words, lost):
        print(f"{word:40}{each.mean():8.4f}{each.std() if args.repeats > 1 else 0.0:9.4f}")
    title = f"{what} lost when a column is shuffled ({data.label}, test)"
    figure, axes = draw_bars(words, lost.mean(1).numpy(), title, f"{what}; a dot is one shuffle")
    axes.plot(lost, range(len(words)), ".", color="black", ms=4)
    utils.write_atomically(args.out / "importance.png", figure.savefig)
    if any(len(values) > 2 for values in schema["values"]):
        title = f"Embeddings in two dimensions; values close together are alike to the model ({data.label})"
        utils.write_atomically(args.out / "embeddings.png", draw_embeddings(model, data, title).savefig)
    print(f"\nwrote the pictures to {args.out}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
