"""A table as numbers: columns of different kinds, missing values, and what may be learned from which rows.

You learn here: how a word becomes an index, and why missing and never-seen values have indices of their own; what
scaling does to skewed numbers; why all of it is fitted on the training rows alone; and what the best possible is.

    python 04_tabular/load.py                                      UCI Adult (downloaded once, 6 MB)
    python 04_tabular/load.py --data census                        the stand-in: a simulated census, offline
    python 04_tabular/load.py --data my.csv --target COLUMN        a table of yours: two values, several, or numbers
    python 04_tabular/load.py --data my.csv --target COLUMN --types zip=category id=ignore

You should see (Adult): 26,048 / 6,513 / 16,281 rows, 24.1 % of the training rows above 50K; logistic regression with
accuracy .8533 and AUC .9054. On the census .8678 and .8941, where the best possible are .8934 and .9309.
Writes: outputs/columns.png. Left out on purpose: words inside free text; several tables that belong together.
"""
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from reading import NUMBER, Table, clean, column_types, date_formats, fit_target, read_csv, to_date

# Shapes: N rows, F numeric columns, L columns that are looked up (categories), J bins of a numeric column, V values of
#         one column (with the two extra), I inputs side by side, K classes

URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/adult/"
SHA256 = {
    "adult.data": "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
    "adult.test": "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05",
}
COLUMNS = ("age workclass fnlwgt education education-num marital-status occupation relationship race sex capital-gain "
           "capital-loss hours-per-week native-country income").split()  # Adult's files name none
NO_VALUE, UNSEEN, KNOWN = 0, 1, 2  # indices in a category column: missing, not in train, the first value of train
RARE = 20  # in a column of so many values or more, those in fewer rows count as unseen: too few to learn from
SPLIT_SEED = 0  # the same rows validate whatever --seed a training run has
FOLDS = 5  # the rows that are not for testing fall into so many parts, each of them to validate some networks on
## A clock is more than one number: what happens at eight in the morning does so every day.
CLOCK = {"in days": lambda date: date.timestamp() / 86400, "month": lambda date: date.month,
         "weekday": lambda date: date.weekday(), "hour": lambda date: date.hour + date.minute / 60}


class Part(NamedTuple):
    numeric: Tensor  # (N, F) float64, as in the table; a missing number is the column's median in train
    categories: Tensor  # (N, L) int64: 0 missing, 1 not in train, 2 ... the values of train
    target: Tensor  # (N,) float32: of two values 1 for the positive one; numbers in deviations from train's mean


class Data(NamedTuple):
    train: Part
    val: Part
    test: Part
    fold: Tensor  # (N_train + N_val,) int64: 0 for the rows of val, 1 to FOLDS - 1 for those of train
    schema: dict  # plain Python, saved with a model: all that fit_schema finds out
    name: str  # "adult", "census" or the file's name
    source: str
    stand_in: str = ""
    best_auc: float | None = None  # of the census: what its own model reaches on the test part; nothing does better
    best_accuracy: float | None = None

    @property
    def label(self) -> str:
        """The name for titles and tables."""
        return self.name + ", stand-in" * bool(self.stand_in)

    @property
    def rest(self) -> Part:
        """The rows of val and train, in this order, to which fold belongs."""
        return Part(*map(torch.cat, zip(self.val, self.train)))


# ---------------------------------------------------------------------------------------------- reading
def read_adult() -> Table:
    """UCI Adult. Its two files are downloaded where they are not there; the second is the test part.

    Raises ConnectionError where neither file is there and UCI does not answer; utils.InputError where one is missing,
    or is not the original.
    """
    there = [name for name in SHA256 if (utils.DATA_DIR / name).exists()]
    rows, lines = [], []
    for name, sha256 in SHA256.items():
        try:
            path = utils.download([URL + name], utils.DATA_DIR / name, sha256)
        except ConnectionError as error:
            if there:  # half a data set is a mistake, and no reason to use another one
                raise utils.InputError(f"{utils.DATA_DIR} holds {there[0]} alone: {error} Put it there too.") from error
            raise
        for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), 1):
            if line and line[0] != "|":  # adult.test begins with a remark, and both files end with an empty line
                rows.append(line.removesuffix(".").split(", "))  # adult.test ends each row with a dot
                lines.append(f"line {number} of {name}")
    return Table(clean(dict(zip(COLUMNS, map(list, zip(*rows))))), lines, COLUMNS[-1], "adult", "adult",
                 n_test=sum(line.endswith(name) for line in lines))


# ---------------------------------------------------------------------------------------------- the stand-in
EDUCATION = ("Preschool 1st-4th 5th-6th 7th-8th 9th 10th 11th 12th HS-grad Some-college Assoc-voc Assoc-acdm Bachelors "
             "Masters Prof-school Doctorate").split()  # education-num 1 ... 16
OCCUPATIONS = {  # name: (share, school years it is usual after, share of men, how much it adds to the score)
    "Exec-managerial": (13, 12, 0.72, 0.9), "Prof-specialty": (13, 14, 0.63, 0.6), "Craft-repair": (13, 9, 0.95, 0.1),
    "Adm-clerical": (12, 10, 0.33, 0.0), "Sales": (11, 10.5, 0.65, 0.3), "Other-service": (11, 8, 0.45, -0.9),
    "Machine-op-inspct": (6, 8, 0.73, -0.4), "Transport-moving": (5, 8.5, 0.95, -0.1),
    "Handlers-cleaners": (4, 8, 0.88, -0.8), "Farming-fishing": (3, 8, 0.93, -1.1),
    "Tech-support": (3, 11.5, 0.63, 0.6), "Protective-serv": (2, 10, 0.88, 0.6), "Priv-house-serv": (0.5, 7, 0.06, -2),
}
COUNTRIES = {"United-States": 900, "Mexico": 20, "Philippines": 6, "Germany": 5, "Canada": 4, "Puerto-Rico": 4,
             "El-Salvador": 3, "India": 3, "Cuba": 3, "England": 3, "China": 2, "Jamaica": 2, "Vietnam": 2, "Italy": 2,
             "Japan": 2, "Poland": 2, "Haiti": 1, "Iran": 1, "Peru": 1, "Greece": 1, "Scotland": 0.1}


def census(n: int = 25_000, seed: int = 1) -> Table:
    """n simulated people with Adult's columns, and the probability with which each one's income was drawn.

    ## Income is a coin with probability p(row), and p is a formula in what the table shows, after some values have been
    ## blanked out. So p is all there is to know about the coin: no model, however large, can sort rows better than p
    ## does (Neyman & Pearson 1933). Its AUC on the test rows is the best possible one, up to the chance in the coins.
    ## The formula has what a table may have: a hump over age, a gain that helps within certain limits only, values
    ## that count for more together than alone. Weight, race, country and sex are not in it. Sex goes with
    ## occupation and relationship, though, and so a model without the other columns would find it of use.
    """
    rng = np.random.default_rng(seed)

    def draw(*weights) -> np.ndarray:
        """An index (n,) for each row, with probabilities in proportion to the weights, numbers or (n,) each."""
        w = np.cumsum([np.broadcast_to(weight, n) for weight in weights], axis=0)  # (V, n)
        return (w < rng.random(n) * w[-1]).sum(0)

    def word(names: str, index: np.ndarray, blank: np.ndarray | bool = False) -> np.ndarray:
        """The index-th of the names, or a question mark where blank."""
        return np.where(blank, "?", np.array(names.split())[index])

    male = rng.random(n) < 0.67
    age = np.floor(17 + 73 * rng.beta(1.4, 3.3, n))
    years = 1 + draw(0.2, 0.5, 1, 2, 1.6, 2.9, 3.6, 1.3, 32, 22, 4.2, 3.3, 16.4, 5.3 * (age > 23), 1.8 * (age > 24),
                     1.3 * (age > 26))
    race = draw(85.4, 9.6, 3.1, 1.0, 0.8)
    country = draw(*COUNTRIES.values())
    ripe = 1 / (1 + np.exp((26 - age) / 4))  # how usual it is to have married by that age
    marital = draw(1 - 0.95 * ripe, np.where(male, 0.9, 0.2) * ripe, 0.17 * ripe, 0.04 * ripe, 0.02 * ripe,
                   0.001 * (age - 16) * ripe)
    married = marital == 1
    alone = draw(3 * (marital == 0) * (age < 30), 4, 2.5 * (marital > 1) + 0.5)  # own child, not in family, unmarried
    kin = np.where(married, np.where(male, 0, 1), 2 + alone)
    job = draw(*(share * np.exp(-((years - usual) / 2.5) ** 2 / 2) * np.where(male, men, 1 - men)
                 for share, usual, men, _ in OCCUPATIONS.values()))
    employer = draw(70, 8 + 3 * (job == 5), 7, 4 + 5 * (job == 1), 3.6 * (job < 2) + 2, 3)
    self_employed = (employer == 1) | (employer == 4)
    hours = np.where(rng.random(n) < 0.47, 40, 40 + 12 * rng.standard_normal(n) + 4 * male + 5 * self_employed
                     - 12 * (age < 22)).clip(1, 99).round()
    gain = np.where(rng.random(n) < 0.05 + 0.05 * (years > 12), np.exp(8.6 + 0.9 * rng.standard_normal(n)), 0)
    gain = gain.clip(0, 99_999).round()
    loss = np.where((gain == 0) & (rng.random(n) < 0.05), 1870 + 350 * rng.standard_normal(n), 0).clip(0).round()
    weight = np.exp(12 + 0.5 * rng.standard_normal(n)).round()
    no_job, no_country = rng.random(n) < 0.056, rng.random(n) < 0.018  # what the person did not answer

    adds = np.append([adds for *_, adds in OCCUPATIONS.values()], -0.4)[np.where(no_job, -1, job)]
    score = -4.1 + 0.22 * (years - 10) + 1.9 * np.exp(-((age - 47) / 13) ** 2) + adds
    score = score + married * (1.6 + 0.16 * (years - 10)) + 0.8 * np.tanh((hours - 40) / 10)
    score = score + self_employed * ~no_job * np.where(hours > 45, 0.5, -0.7)
    score = score + 3.5 * (gain > 7000) - 1.5 * ((gain > 0) & (gain < 4000)) + 2.5 * (abs(loss - 1900) < 90)
    p = 1 / (1 + np.exp(-1.6 * score - 0.9))
    rich = rng.random(n) < p

    columns = [
        age, word("Private Self-emp-not-inc Local-gov State-gov Self-emp-inc Federal-gov", employer, no_job), weight,
        np.array(EDUCATION)[years - 1], years,
        word("Never-married Married-civ-spouse Divorced Separated Married-spouse-absent Widowed", marital),
        word(" ".join(OCCUPATIONS), job, no_job), word("Husband Wife Own-child Not-in-family Unmarried", kin),
        word("White Black Asian-Pac-Islander Amer-Indian-Eskimo Other", race), np.where(male, "Male", "Female"), gain,
        loss, hours, word(" ".join(COUNTRIES), country, no_country), np.where(rich, ">50K", "<=50K")]
    words = [c.tolist() if c.dtype.kind == "U" else [f"{value:.0f}" for value in c] for c in columns]
    return Table(clean(dict(zip(COLUMNS, words))), [f"row {i}" for i in range(1, n + 1)], COLUMNS[-1], "census",
                 "census", "UCI Adult", n * 2 // 5, p)


SETS = {"adult": read_adult, "census": census}  # a data set is one function and one line here


def read_table(data: str | None = None, target: str | None = None) -> Table:
    """One of SETS, or a CSV file with the column `target`; None is Adult, or the census where that is out of reach.

    Raises ConnectionError where a set that was asked for by name is out of reach; utils.InputError for a bad file.
    """
    name = data or "adult"
    if name in SETS and target:
        raise utils.InputError(f"--target {target} belongs to a CSV file; {name} has a target of its own.")
    try:
        table = SETS[name]() if name in SETS else read_csv(Path(name), target)
    except ConnectionError as error:
        if data:  # asked for by name: never replaced by something else
            raise ConnectionError(f"{error} Use --data census to work offline.") from error
        print(error)
        table = census()
    utils.stand_in_notice(table.name, table.stand_in)
    return table


# ---------------------------------------------------------------------------------------------- columns
def derive(columns: dict[str, list[str]], schema: dict) -> dict[str, list[str]]:
    """The columns and those that are made of them: parts of dates, and whether a number is given."""
    out = dict(columns)
    for name, form in schema["dates"].items():
        dates = [to_date(value, form) if value else None for value in columns[name]]
        out |= {f"{name} {part}": ["" if date is None else f"{make(date):.9g}" if part != "in days" else
                                   repr(make(date)) for date in dates] for part, make in CLOCK.items()}
    return out | {f"{name} given": ["yes" * bool(value) for value in out[name]] for name in schema["gaps"]}


def fit_schema(table: Table, kinds: dict[str, str], fit: Tensor, target: dict) -> dict:
    """All that a row needs to become numbers, from the rows `fit` (indices) alone: values per column, medians.

    ## Whether a number is missing may tell as much as the number: who was never asked, was not ill. So where numbers
    ## are missing, a column of its own says so; the number itself becomes the median, which is nothing special.
    Raises utils.InputError for a column that has no value in these rows."""
    schema = {"numeric": [], "median": [], "categorical": [], "values": [], "dates": {}, "gaps": [], **target}
    schema["dates"] = {name: date_formats(set(table.columns[name]) - {""})[0] for name, kind in kinds.items()
                       if kind == "date"}
    columns, fit = derive(table.columns, schema), fit.tolist()
    kinds = {name: kind for name, kind in kinds.items() if kind != "date"}
    for name in columns.keys() - table.columns.keys():
        if len({columns[name][i] for i in fit} - {""}) > 1:
            kinds[name] = "numeric"
    kinds = dict(sorted(kinds.items(), key=lambda item: list(columns).index(item[0])))
    schema["gaps"] = [name for name, kind in kinds.items()
                      if kind == "numeric" and 0 < sum(not columns[name][i] for i in fit) < len(fit)]
    columns = derive(table.columns, schema)
    for name in [*kinds, *(f"{name} given" for name in schema["gaps"])]:
        column = columns[name]
        there = [column[i] for i in fit if column[i]]
        if not there:
            first = next((line for value, line in zip(column, table.lines) if value), "no line at all")
            raise utils.InputError(f"column {name} has no value among the training rows (its first is on {first}); "
                                   f"remove it, or add --types {name}=ignore.")
        if kinds.get(name) == "numeric":
            schema["numeric"].append(name)
            schema["median"].append(np.median(np.array(there, dtype=float)).item())
        else:
            schema["categorical"].append(name)
            counts = Counter(sorted(there)).most_common()  # equals by alphabet
            schema["values"].append([value for value, count in counts
                                     if count >= RARE or len(set(there)) < RARE])
    if schema["task"] == "numbers":
        numbers = np.array([table.columns[schema["target"]][i] for i in fit], dtype=float)
        schema |= {"center": numbers.mean().item(), "scale": numbers.std().item() or 1.0}
    return schema


def encode(columns: dict[str, list[str]], schema: dict) -> Part:
    """Words to numbers, by a schema fitted before. columns: name -> one value per row; without a target it is NaN.

    ## A category becomes its place in the list of the training rows' values. Two places are kept free in front: 0 for
    ## "no answer", which is an answer of its own (who does not name an employer often has none), and 1 for a value that
    ## training never showed. Without it, the first Scot in the test rows would stop the program.
    """
    columns, N = derive(columns, schema), len(next(iter(columns.values())))
    numeric = [[median if v == "" else float(v) for v in columns[name]]
               for name, median in zip(schema["numeric"], schema["median"])]
    categories = []
    for name, values in zip(schema["categorical"], schema["values"]):
        index = {"": NO_VALUE} | {value: i for i, value in enumerate(values, KNOWN)}
        categories.append([index.get(v, UNSEEN) for v in columns[name]])
    target, unknown = columns.get(schema["target"], [""] * N), math.nan
    if schema["task"] == "numbers":
        y = [(float(v) - schema["center"]) / schema["scale"] if v else unknown for v in target]
    else:
        index = {value: float(i) for i, value in enumerate(schema["classes"])}
        y = [index.get(v, unknown) for v in target]
    return Part(torch.tensor(numeric, dtype=torch.float64).view(-1, N).T.contiguous(),  # (N, F)
                torch.tensor(categories, dtype=torch.int64).view(-1, N).T.contiguous(),  # (N, L)
                torch.tensor(y, dtype=torch.float32))  # (N,)


def inputs_of(schema: dict) -> dict[str, str]:
    """The columns of the table that a model reads: name -> "numeric", "category" or "date"."""
    made = {f"{name} {part}" for name in schema["dates"] for part in CLOCK}
    made |= {f"{name} given" for name in schema["gaps"]}
    kinds = dict.fromkeys(schema["numeric"], "numeric") | dict.fromkeys(schema["categorical"], "category")
    return {name: kind for name, kind in kinds.items() if name not in made} | dict.fromkeys(schema["dates"], "date")


def encode_row(values: dict[str, str], schema: dict) -> Part:
    """One row, described as {column: value}; what is left out is missing. Raises utils.InputError for a column that
    does not exist and for a number that is none. A category that training never showed becomes UNSEEN."""
    names = list(inputs_of(schema))
    for name, value in values.items():
        if name not in names:
            raise utils.InputError(f"there is no column {name!r}; there are {', '.join(names)[:500]}.")
        if name in schema["numeric"] and value and not NUMBER.fullmatch(value):
            raise utils.InputError(f"{name}={value}: {name} needs a number, digits and at most one decimal point.")
    return encode({name: [values.get(name, "")] for name in names}, schema)


def words_of(schema: dict, k: int) -> list[str]:
    """What the indices 0, 1, 2, ... of the k-th category column mean."""
    return ["(missing)", "(unseen)", *schema["values"][k]]


# ---------------------------------------------------------------------------------------------- all of it
def stratified(target: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the rows of two parts, the second of about n rows, in the table's order; every class is shared out
    evenly, and has a row in either part.

    ## Drawn without regard to the class, a small part may by chance hold more positives than the other; then a figure
    ## would move for no better reason. So each class is shuffled and divided by itself.
    """
    generator = torch.Generator().manual_seed(seed)
    second = torch.zeros(len(target), dtype=torch.bool)
    for value in target.unique().flip(0):
        rows = (target == value).nonzero()[:, 0]
        count = max(1, round(n * len(rows) / len(target)))
        second[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return (~second).nonzero()[:, 0], second.nonzero()[:, 0]


def load_data(data: str | None = None, target: str | None = None, types: Sequence[str] | None = None,
              task: str | None = None, positive: str | None = None) -> Data:
    """Read `adult`, `census` or a CSV file; None is Adult, and the census where that can't be reached.

    target: which column to predict, for a CSV file. types: ["zip=category", "id=ignore", ...], see column_types.
    task, positive: see fit_target. Raises utils.InputError, naming column and line, for whatever can't be used.
    """
    return to_data(read_table(data, target), types or [], task, positive)


def to_data(table: Table, types: Sequence[str] = (), task: str | None = None, positive: str | None = None) -> Data:
    """Split a table into three parts and turn it into numbers.

    ## The model learns from the first part, the second picks among models and says when to stop, the third is looked at
    ## once. Everything fitted, be it a list of values or a mean, comes from the first alone: in use, too, a model meets
    ## rows that took no part in fitting anything.
    """
    fitted = fit_target(table, task, positive)
    known = [i for i, value in enumerate(table.columns[table.target]) if value]
    if lost := len(table.lines) - len(known):
        print(f"{lost:,} rows have no {table.target} and are left out")
        table = table._replace(lines=[table.lines[i] for i in known],
                               columns={name: [c[i] for i in known] for name, c in table.columns.items()})
    kinds = column_types(table, types)
    column, classes = table.columns[table.target], fitted["classes"]
    y = torch.tensor([classes.index(value) if classes else 0 for value in column])  # (N,)
    if table.n_test:
        rest, tested = torch.arange(len(y)).split([len(y) - table.n_test, table.n_test])
    else:
        rest, tested = stratified(y, math.ceil(0.2 * len(y)), SPLIT_SEED)
        counts = ", ".join(f"{value!r} {column.count(value):,} times" for value in classes[:10])
        positive = f"; positive is {classes[1]!r}" if len(classes) == 2 else ""
        print(f"target {table.target}: {counts or 'a number'}{positive}")
    train, val = (rest[i] for i in stratified(y[rest], math.ceil(0.2 * len(rest)), SPLIT_SEED))
    schema = fit_schema(table, kinds, train, fitted)
    everything = encode(table.columns, schema)
    unseen = {name: indices.tolist().index(UNSEEN) for name, indices in zip(schema["categorical"],
              everything.categories.T) if (indices == UNSEEN).any()}
    for name, i in list(unseen.items())[:10]:
        count = (everything.categories[:, schema["categorical"].index(name)] == UNSEEN).sum()
        print(f"{table.lines[i]}: {name} {table.columns[name][i]!r} is in no training row, or in too few; it counts as "
              "unseen" +
              f", and so do {count - 1:,} values further down" * (count > 1).item())
    ## The training rows are dealt out, each class by itself, as the cards of a game.
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(train), generator=generator)
    order = order[y[train][order].argsort(stable=True)]
    fold = torch.empty_like(order).scatter_(0, order, 1 + torch.arange(len(order)) % (FOLDS - 1))
    if len(fold.unique()) < FOLDS - 1:
        raise utils.InputError(f"{table.name} has {len(y)} rows with a target, too few to learn from; give 20 or more.")
    parts = [Part(*(tensor[rows] for tensor in everything)) for rows in (train, val, tested)]
    data = Data(*parts, torch.cat([torch.zeros_like(val), fold]), schema, table.name, table.source, table.stand_in)
    if table.p is None:
        return data
    p, y = torch.from_numpy(table.p[tested.numpy()]), data.test.target
    return data._replace(best_auc=roc_auc(p, y), best_accuracy=((p > 0.5) == (y == 1)).float().mean().item())


# ---------------------------------------------------------------------------------------------- numbers
def fit_standard(x: Tensor) -> Tensor:
    """Mean and standard deviation (2, F) of the training rows x (N, F), for standardise. A constant has deviation 1."""
    mean = x.double().mean(0)
    std = (x.double() - mean).square().mean(0).sqrt()
    return torch.stack([mean, torch.where(std < 1e-12, 1.0, std)])


def standardise(x: Tensor, fitted: Tensor) -> Tensor:
    """x' = (x - mean) / std, per column: (N, F) -> (N, F) float32. Changes position and scale, and keeps the shape."""
    return ((x.double() - fitted[0]) / fitted[1]).float()


def fit_quantiles(x: Tensor, n: int = 1000) -> Tensor:
    """min(n, N) quantiles (rows, F) of the training rows x (N, F), from the smallest value to the largest."""
    levels = np.linspace(0, 1, min(n, len(x)))
    return torch.from_numpy(np.percentile(x.double().numpy(), 100 * levels, axis=0))  # rounds as scikit-learn does


def to_normal(x: Tensor, quantiles: Tensor) -> Tensor:
    """The quantile transform: (N, F) -> (N, F) float32, in which the training rows are normally distributed.

    ##     u = F(x), the share of training rows below x        x' = Phi^-1(u), Phi the normal distribution function
    ## Only the order of the values counts, so a gain of 99,999 is no further out than the largest of any other column.
    ## Where many rows share a value, F jumps there; u is the middle between F just below and just above the value. At
    ## and beyond the smallest and largest value u would be 0 and 1 and x' infinite: u stops at 1e-7 and 1 - 1e-7. As
    ## scikit-learn's QuantileTransformer has it, this comes before the middle of the jump: a column of mostly zeros,
    ## where 0 is the smallest value, has all its zeros at -5.2.
    """
    levels = np.linspace(0, 1, len(quantiles))
    out = np.empty(x.shape)
    for f, (column, q) in enumerate(zip(x.double().numpy().T, quantiles.numpy().T)):
        above = np.interp(column, q, levels)  # np.interp takes the last of equal quantiles ...
        below = -np.interp(-column, -q[::-1], -levels[::-1])  # ... and seen from the other side, the first
        u = (above + below) / 2
        out[:, f] = np.where(column <= q[0], 0, np.where(column >= q[-1], 1, u))
    return torch.special.ndtri(torch.from_numpy(out).clamp(1e-7, 1 - 1e-7)).float()


def fit_bins(x: Tensor, n: int = 48) -> list[Tensor]:
    """For each column of the training rows x (N, F) the edges of at most n bins that hold about equally many rows."""
    edges = [torch.from_numpy(np.unique(np.quantile(c, np.linspace(0, 1, n + 1)))) for c in x.double().numpy().T]
    return [e if len(e) > 1 else torch.cat([e, e + 1]) for e in edges]  # a constant column has one bin


def piecewise_linear(x: Tensor, bins: list[Tensor]) -> Tensor:
    """The piecewise linear encoding (Gorishniy et al. 2022, equation 1): (N, F) -> (N, F, J), J the most bins of any.

    ##     x_t = (x - b_(t-1)) / (b_t - b_(t-1)), cut to 0 ... 1; but x_1 is not cut below, and x_T not above
    ## It reads like a thermometer: bins below x are 1, those above are 0, the one x is in says how far it is filled. A
    ## linear layer on this is a curve with a kink at each edge; on x alone it would be a straight line. Columns with
    ## fewer than J bins have zeros behind their last.
    """
    out = torch.zeros(*x.shape, max(len(edges) for edges in bins) - 1)
    for f, edges in enumerate(bins):
        share = (x[:, f : f + 1].double() - edges[:-1]) / edges.diff()  # (N, bins of this column)
        low, high = torch.zeros(len(edges) - 1), torch.ones(len(edges) - 1)
        low[0], high[-1] = -math.inf, math.inf
        out[:, f, : len(edges) - 1] = share.float().clamp(low, high)
    return out


# ---------------------------------------------------------------------------------------------- baselines
def roc_auc(score: Tensor, target: Tensor) -> float:
    """The share of pairs of a positive and a negative row in which the positive has the higher score; a tie is half.

    score, target (N,), target 0 or 1. Sorting does it without looking at all pairs (Mann & Whitney 1947): the ranks of
    the n positive rows among all N sum to n (n + 1) / 2, plus one for each pair won.
    """
    _, place, counts = score.unique(return_inverse=True, return_counts=True)  # sorted
    rank = counts.cumsum(0) - (counts - 1) / 2  # equal scores share the mean of their ranks, from 1
    ones = target == 1
    n, pairs = ones.sum().item(), (ones.sum() * (~ones).sum()).item()
    return (rank.double()[place][ones].sum().item() - n * (n + 1) / 2) / pairs if pairs else math.nan


def majority_baseline(data: Data) -> float:
    """Test accuracy of always naming the class that is most frequent in the training part."""
    return (data.test.target == data.train.target.mode().values).float().mean().item()


def one_hot(part: Part, sizes: list[int], fitted: Tensor, most: int = 100) -> Tensor:
    """Standardised numbers, for each category column V places of which one is 1, and a 1: (N, I) float64.

    sizes: indices of each column. Only those of the `most` frequent values have a place; others count as unseen."""
    columns = []
    for column, V in zip(part.categories.T, (min(size, most + KNOWN) for size in sizes)):
        columns.append(torch.eye(V, dtype=torch.float64)[torch.where(column < V, column, UNSEEN)])  # (N, V)
    return torch.cat([standardise(part.numeric, fitted).double(), *columns, torch.ones(len(part.target), 1)], 1)


def fit_linear(x: Tensor, target: Tensor, schema: dict, penalty: float = 1.0) -> Tensor:
    """Weights (I, K) of the linear model that others must beat, for x (N, I), whose last column is 1.

    ## Two values: the probability is p = sigmoid(x w), the loss  sum of -log p(right class) + penalty |w|^2 / 2.  Its
    ## gradient and its second derivative are
    ##     g = X^T (p - y) + penalty w         H = X^T diag(p (1 - p)) X + penalty
    ## and Newton's step, w - H^-1 g, goes to where the parabola with that slope and bend has its bottom. There is only
    ## one valley, and some nine steps lead to its floor. H has I^2 entries: ten thousand for a hundred inputs, but
    ## for the weights of a network far too many; those have to do with g (from_scratch.py).
    ## Numbers: with the squared error, H = X^T X + penalty is the same everywhere, and a single step is all it takes.
    ## Several classes: p = softmax(x W), and K times as many weights; LBFGS guesses H from the gradients it has seen.
    """
    ridge = torch.full((x.shape[1],), penalty, dtype=torch.float64)
    ridge[-1] = 1e-6  # how frequent a class is should not be shrunk
    y = target.double()
    if schema["task"] == "classes":
        w = torch.zeros(x.shape[1], len(schema["classes"]), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=200, tolerance_change=1e-9, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ w, target.long(), reduction="sum") + (ridge[:, None] * w * w).sum() / 2
            loss.backward()
            return loss
        optimizer.step(closure)
        return w.detach()
    w = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(20 if schema["task"] == "binary" else 1):
        p = (x @ w).sigmoid() if schema["task"] == "binary" else x @ w  # (N,)
        bend = p * (1 - p) if schema["task"] == "binary" else torch.ones_like(p)
        step = torch.linalg.solve((x * bend[:, None]).T @ x + ridge.diag(), x.T @ (p - y) + ridge * w)
        w = w - step
        if step.abs().max() < 1e-8:
            break
    return w[:, None]


def linear_baseline(data: Data) -> Tensor:
    """Scores (N, K) of the test rows by fit_linear, from the rows of train and val: logits, or numbers."""
    fitted, rest = fit_standard(data.train.numeric), data.rest
    sizes = [len(values) + KNOWN for values in data.schema["values"]]
    return one_hot(data.test, sizes, fitted) @ fit_linear(one_hot(rest, sizes, fitted), rest.target, data.schema)


def draw_columns(data: Data, limit: int = 16):
    """A figure: for each column, how the training rows of either class are spread over its values."""
    schema, train = data.schema, data.train
    names = (schema["numeric"] + schema["categorical"])[:limit]
    height = math.ceil(len(names) / 4)
    figure = utils.pyplot().figure(figsize=(15, 3.2 * height))
    if schema["task"] == "numbers":
        middle = train.target.median()
        groups = {"below the median": train.target < middle, "from it on": train.target >= middle}
    else:
        groups = {value: train.target == k for k, value in enumerate(schema["classes"][:6])}
    for place, name in enumerate(names, 1):
        a = figure.add_subplot(height, 4, place)
        a.set_title(name, fontsize=10)
        if name in schema["numeric"]:
            x = train.numeric[:, schema["numeric"].index(name)].numpy()
            few = x.max() - x.min() <= 100 and (x == x.round()).all()  # integers: a bar for each, or some would get two
            edges = np.arange(x.min() - 0.5, x.max() + 1) if few else 30
            style = dict(histtype="stepfilled", alpha=0.6, log=bool((x == 0).mean() > 0.5))
        else:
            k = schema["categorical"].index(name)
            words = words_of(schema, k)
            often = [i for i, _ in Counter(train.categories[:, k].tolist()).most_common(10)]
            x = np.array([often.index(i) if i in often else 10 for i in train.categories[:, k].tolist()])
            edges = np.arange(len(often) + 1) - 0.5
            style = dict(orientation="horizontal")
            a.set_yticks(range(len(often)), [words[i][:22] for i in often], fontsize=7)
            a.invert_yaxis()
        parts = [x[mask.numpy()] for mask in groups.values()]
        a.hist(parts, edges, weights=[np.full(len(part), 1 / max(1, len(part))) for part in parts], label=list(groups),
               **style)
    figure.legend(*a.get_legend_handles_labels(), title=schema["target"], loc="lower right", fontsize=12)
    figure.suptitle(f"Each column by itself: the share of its class in the training rows ({data.label})")
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------------- main
def add_options(parser) -> None:
    """Give an ArgumentParser the options that load_data takes."""
    add = parser.add_argument
    add("--data", help=f"{', '.join(SETS)} or a CSV file; without it adult, or census if that is out of reach")
    add("--target", help="for a CSV file: the column to predict")
    add("--types", nargs="+", metavar="COLUMN=TYPE", help="numeric, category, date or ignore, where the guess is wrong")
    add("--task", choices=["classes", "numbers"], help="what the target is, where the guess is wrong")
    add("--positive", help="of a target with two values the one that is looked for; without it the later one")


def main() -> None:
    parser = utils.parser(__doc__, __file__)
    add_options(parser)
    args = utils.parse_args(parser)
    data = load_data(args.data, args.target, args.types, args.task, args.positive)
    schema, train = data.schema, data.train
    print(f"{data.label}: {len(train.target):,} rows to train on, {len(data.val.target):,} to validate, "
          f"{len(data.test.target):,} to test")
    if schema["task"] == "binary":
        shares = [f"{part.target.mean():.1%} of {name}" for name, part in zip(Data._fields, data[:3])]
        print(f"{schema['target']} is {schema['positive']} in {', '.join(shares)}")
    print(f"\n{'numeric column':24}{'min':>12}{'median':>12}{'mean':>12}{'max':>12}{'zeros':>8}   (training rows)")
    for name, x in zip(schema["numeric"], train.numeric.T):
        zeros = (x == 0).float().mean()
        print(f"{name:24}{x.min():12.7g}{x.median():12.7g}{x.mean():12.7g}{x.max():12.7g}{zeros:8.1%}")
    print(f"\n{'category column':24}{'values':>10}{'missing':>10}{'unseen, val + test':>20}   most frequent")
    others = torch.cat([data.val.categories, data.test.categories])
    for name, values, column, other in zip(schema["categorical"], schema["values"], train.categories.T, others.T):
        unseen = (other == UNSEEN).sum().item()
        frequent = ", ".join(f"{v} {(column == i).float().mean():.0%}" for i, v in enumerate(values[:3], KNOWN))
        print(f"{name:24}{len(values):10}{(column == NO_VALUE).float().mean():10.1%}{unseen:20}   {frequent}")

    print(f"\nthe first training row as numbers:\n  numeric     {train.numeric[0].tolist()}\n"
          f"  categories  {train.categories[0].tolist()}, target {train.target[0]:g}")
    if schema["numeric"]:
        print(f"\n{'the test rows':24}{'standardised, range':>26}{'std':>8}{'quantiles, range':>26}{'std':>8}")
        scaled = (standardise(data.test.numeric, fit_standard(train.numeric)),
                  to_normal(data.test.numeric, fit_quantiles(train.numeric)))
        for name, *columns in zip(schema["numeric"], *(x.T for x in scaled)):
            print(f"{name:24}" + "".join(f"{f'{x.min():.2f} to {x.max():.2f}':>26}{x.std():8.2f}" for x in columns))

    scores, y = linear_baseline(data), data.test.target
    if schema["task"] == "numbers":
        print(f"\non the test rows, R^2 (1: perfect; 0: as good as their mean): linear regression "
              f"{1 - (scores[:, 0] - y).square().mean() / (y - y.mean()).square().mean():.4f}")
    else:
        binary = schema["task"] == "binary"
        accuracy = ((scores[:, 0] > 0 if binary else scores.argmax(1)) == y).float().mean().item()
        print(f"\n{'on the test rows':36}accuracy     AUC")
        print(f"{'always the most frequent class':36}{majority_baseline(data):8.4f}  0.5000")
        print(f"{'logistic regression':36}{accuracy:8.4f}" + (f"  {roc_auc(scores[:, 0], y):.4f}" if binary else ""))
        if data.best_auc:
            print(f"{'best possible: the known model':36}{data.best_accuracy:8.4f}  {data.best_auc:.4f}")
    utils.write_atomically(args.out / "columns.png", draw_columns(data).savefig)
    print(f"\nwrote {args.out / 'columns.png'}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
