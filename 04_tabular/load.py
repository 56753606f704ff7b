"""A table as numbers: columns of different kinds, missing values, and what may be learned from which rows.

You learn here: how a word becomes an index, and why missing and never-seen values have indices of their own; what
scaling does to skewed numbers; why all of it is fitted on the training rows alone; and what the best possible is.

    python 04_tabular/load.py                                      UCI Adult (downloaded once, 6 MB)
    python 04_tabular/load.py --data census                        the stand-in: a simulated census, offline
    python 04_tabular/load.py --data my.csv --target COLUMN        a CSV file of yours, to predict one of two values
    python 04_tabular/load.py --data my.csv --target COLUMN --types zip=category id=ignore

You should see (Adult): 26,048 / 6,513 / 16,281 rows, 24.1 % of the training rows above 50K; logistic regression with
accuracy .8520 and AUC .9053. On the census .8678 and .8941, where the best possible are .8934 and .9309.
Writes: outputs/columns.png. Left out on purpose: dates and free text, and targets of more than two values.
"""
import csv
import io
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils

# Shapes: N rows, F numeric columns, L columns that are looked up (categories), J bins of a numeric column, V values of
#         one column (with the two extra), I inputs side by side

URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/adult/"
SHA256 = {
    "adult.data": "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
    "adult.test": "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05",
}
COLUMNS = ("age workclass fnlwgt education education-num marital-status occupation relationship race sex capital-gain "
           "capital-loss hours-per-week native-country income").split()  # Adult's files name none
MISSING = {"", "?", "na", "n/a", "nan", "null"}  # in upper or lower case
NO_VALUE, UNSEEN, KNOWN = 0, 1, 2  # indices in a category column: missing, not in train, the first value of train
SPLIT_SEED = 0  # the same rows validate whatever --seed a training run has
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
## Such as 1,234.5 and 1.234,5 and 1'234; a decimal comma, 3,5, can't be told from a separator and is one as well.
SEPARATED = re.compile(r"[+-]?(\d+(,\d+)+(\.\d+)?|\d{1,3}([. '\u2019\u00a0\u202f]\d{3})+([.,]\d+)?)", re.ASCII)


class Table(NamedTuple):
    """A table as it was read: words only. Each function in SETS returns one, and so does read_csv."""
    columns: dict[str, list[str]]  # name -> one value per row
    lines: list[str]  # where each row stands, for messages: "line 7"
    target: str  # the column to predict
    name: str
    source: str  # what load_data takes: a name in SETS or a path
    stand_in: str = ""  # the real set that it takes the place of
    n_test: int = 0  # the last so many rows are for testing; 0: the set has no such rows, so they are drawn
    p: np.ndarray | None = None  # (N,) the probability that drew each target, where it is known


class Part(NamedTuple):
    numeric: Tensor  # (N, F) float32, as in the table; a missing number is the column's median in train
    categories: Tensor  # (N, L) int64: 0 missing, 1 not in train, 2 ... the values of train
    target: Tensor  # (N,) float32, 1 for the positive value


class Data(NamedTuple):
    train: Part
    val: Part
    test: Part
    schema: dict  # plain Python, saved with a model: numeric, median, categorical, values, target, negative, positive
    name: str  # "adult", "census" or the file's name
    source: str
    stand_in: str = ""
    best_auc: float | None = None  # of the census: what its own model reaches on the test part; nothing does better
    best_accuracy: float | None = None

    @property
    def label(self) -> str:
        """The name for titles and tables."""
        return self.name + ", stand-in" * bool(self.stand_in)


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
    return Table(dict(zip(COLUMNS, map(list, zip(*rows)))), lines, COLUMNS[-1], "adult", "adult",
                 n_test=sum(line.endswith(name) for line in lines))


def read_csv(path: Path, target: str | None) -> Table:
    """A CSV file with a header, separated by commas, semicolons or tabs. Raises utils.InputError naming the line."""
    def bad(line: int, what: str) -> utils.InputError:
        return utils.InputError(f"{path}, line {line}: {what}")

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise utils.InputError(f"--data {path}: {what}; give a CSV file, {' or '.join(SETS)}.")
    raw, rows, begins = path.read_bytes(), [], 1
    try:
        text = raw.decode("utf-8-sig")
        delimiter = max(",;\t", key=text.lstrip().partition("\n")[0].count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        for row in reader:
            row = [value.strip() for value in row]
            if row not in ([], [""]):  # not an empty line
                rows.append((begins, row))
            begins = reader.line_num + 1  # a quoted value may run over several lines
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise bad(line, "not UTF-8; convert the file, for example with iconv.") from error
    except csv.Error as error:
        raise bad(reader.line_num, f"{error}; is a quote missing there?") from error
    if len(rows) < 2:
        raise utils.InputError(f"{path} has no rows; a header and some hundred rows are needed.")
    (first, names), *rows = rows
    for name in names:
        if name in ("", "?") or like_number(name) or names.count(name) > 1:
            raise bad(first, f"{name!r} is no name, or two columns have it; the file must begin with a header that "
                             "gives each column a name of its own.")
    for line, row in rows:
        if len(row) != len(names):
            raise bad(line, f"{len(row)} value{'s' * (len(row) > 1)}, but the header names {len(names)} columns; a "
                            "value that contains the separator needs quotes around it.")
    columns = dict(zip(names, map(list, zip(*(row for _, row in rows)))))
    return Table(columns, [f"line {line}" for line, _ in rows], target, path.name, str(path.resolve()))


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
    return Table(dict(zip(COLUMNS, words)), [f"row {i}" for i in range(1, n + 1)], COLUMNS[-1], "census", "census",
                 "UCI Adult", n * 2 // 5, p)


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
def is_missing(value: str) -> bool:
    """Whether a value, as it is written, stands for none."""
    return value.lower() in MISSING


def is_number(value: str) -> bool:
    """Whether a value can be read as a number, one that float32 can hold."""
    return bool(NUMBER.fullmatch(value)) and abs(float(value)) < 1e30


def like_number(value: str) -> bool:
    """Whether a value is meant as a number, be it too large or with separators that can't be read for sure."""
    return bool(NUMBER.fullmatch(value) or SEPARATED.fullmatch(value))


def column_types(table: Table, types: Sequence[str] = ()) -> dict[str, str]:
    """{column: "numeric" or "category"}, without target and ignored ones. types: those to set, as "zip=category".

    ## A column of nothing but numbers is taken as one of numbers. A computer can't know better: a postcode is
    ## written as a number but is none, because the mean of two postcodes means nothing. Only you know; --types says it.
    Raises utils.InputError, naming the line, where a column can't be of the type asked for.
    """
    others = [name for name in table.columns if name != table.target]
    asked = dict(item.rpartition("=")[::2] for item in types)
    for name, kind in asked.items():
        if name not in others or kind not in ("numeric", "category", "ignore"):
            raise utils.InputError(f"--types {name + '=' * bool(name) + kind}: write COLUMN=numeric, COLUMN=category "
                                   f"or COLUMN=ignore; there are the columns {', '.join(others)}.")
    found = {}
    for name in others:
        column, kind = table.columns[name], asked.get(name)
        there = [i for i, value in enumerate(column) if not is_missing(value)]
        odd = [i for i in there if not is_number(column[i])]
        found[name] = kind or ("numeric" if all(like_number(column[i]) for i in there) else "category")
        if odd and found[name] == "numeric":
            value = column[odd[0]]
            what = "too large for a 32-bit number" if NUMBER.fullmatch(value) else "no plain number"
            raise utils.InputError(f"column {name}, {table.lines[odd[0]]}: {value!r} is {what}; write it with digits "
                                   "and one decimal point, without separators, or have the column read as words, "
                                   f"--types {name}=category, or not at all, {name}=ignore.")
        if kind is None and 0 < len(odd) < 0.1 * len(there):
            print(f"column {name} holds numbers, but {column[odd[0]]!r} on {table.lines[odd[0]]}: so it counts as one "
                  "of categories; empty such places to have a column of numbers")
    found = {name: kind for name, kind in found.items() if kind != "ignore"}
    if not found:
        raise utils.InputError(f"no column is left to predict {table.target} from; ignore fewer with --types.")
    return found


def target_values(table: Table) -> tuple[str, str]:
    """(negative, positive): the target's two values, the later one in alphabetical order positive, as scikit-learn has
    it: 1, yes, true, >50K. Raises utils.InputError, naming the line, where there are not two, of ten rows each."""
    if table.target not in table.columns:
        why = "--target is missing" if table.target is None else f"--target {table.target}: no such column"
        raise utils.InputError(f"{why}; the first line of {table.name} names {', '.join(table.columns)}.")
    column = table.columns[table.target]
    counts, missing = Counter(column), any(map(is_missing, column))
    if len(counts) == 2 and min(counts.values()) >= 10 and not missing:
        return tuple(sorted(counts))
    first = dict(zip(column[::-1], table.lines[::-1]))  # value -> the line where it comes first
    some = sorted(counts, key=lambda value: not is_missing(value))[:4]
    listed = ", ".join(f"{value!r} in {counts[value]} (the first on {first[value]})" for value in some)
    raise utils.InputError(f"the target {table.target} needs two values, each in 10 rows or more, and none missing; "
                           f"it has {len(counts)}: {listed}; remove rows, or make two groups of the values.")


def fit_schema(table: Table, kinds: dict[str, str], fit: Tensor) -> dict:
    """All that a row needs to become numbers, from the rows `fit` (indices) alone: values per column, medians.

    Raises utils.InputError for a column that has no value in these rows."""
    schema = {"numeric": [], "median": [], "categorical": [], "values": [], "target": table.target,
              **dict(zip(("negative", "positive"), target_values(table)))}
    for name, kind in kinds.items():
        column = table.columns[name]
        there = [column[i] for i in fit.tolist() if not is_missing(column[i])]
        if not there:
            first = next((line for value, line in zip(column, table.lines) if not is_missing(value)), "no line at all")
            raise utils.InputError(f"column {name} has no value among the training rows (its first is on {first}); "
                                   f"remove it, or add --types {name}=ignore.")
        if kind == "numeric":
            schema["numeric"].append(name)
            schema["median"].append(np.median(np.array(there, dtype=float)).item())
        else:
            schema["categorical"].append(name)
            schema["values"].append([value for value, _ in Counter(sorted(there)).most_common()])  # equals by alphabet
    return schema


def encode(columns: dict[str, list[str]], schema: dict) -> Part:
    """Words to numbers, by a schema fitted before. columns: name -> one value per row, the target's among them.

    ## A category becomes its place in the list of the training rows' values. Two places are kept free in front: 0 for
    ## "no answer", which is an answer of its own (who does not name an employer often has none), and 1 for a value that
    ## training never showed. Without it, the first Scot in the test rows would stop the program.
    """
    numeric = [[median if is_missing(v) else float(v) for v in columns[name]]
               for name, median in zip(schema["numeric"], schema["median"])]
    categories = []
    for name, values in zip(schema["categorical"], schema["values"]):
        index = {value: i for i, value in enumerate(values, KNOWN)}
        categories.append([NO_VALUE if is_missing(v) else index.get(v, UNSEEN) for v in columns[name]])
    target = torch.tensor([float(v == schema["positive"]) for v in columns[schema["target"]]])
    N = len(target)
    return Part(torch.tensor(numeric, dtype=torch.float32).view(-1, N).T.contiguous(),  # (N, F)
                torch.tensor(categories, dtype=torch.int64).view(-1, N).T.contiguous(), target)  # (N, L), (N,)


def encode_row(values: dict[str, str], schema: dict) -> Part:
    """One row, described as {column: value}; what is left out is missing. Its target, (1,), is NaN: nobody knows it.

    Raises utils.InputError for a column that does not exist and for a number that is none. A category that training
    never showed becomes UNSEEN.
    """
    names = schema["numeric"] + schema["categorical"]
    row = dict.fromkeys([*names, schema["target"]], [""])
    for name, value in values.items():
        row[name] = [value.strip()]
        if name not in names:
            raise utils.InputError(f"there is no column {name!r}; there are {', '.join(names)}.")
        if name in schema["numeric"] and not is_missing(value.strip()) and not is_number(value.strip()):
            raise utils.InputError(f"{name}={value}: {name} needs a number, digits and at most one decimal point.")
    return encode(row, schema)._replace(target=torch.full((1,), math.nan))


def words_of(schema: dict, k: int) -> list[str]:
    """What the indices 0, 1, 2, ... of the k-th category column mean."""
    return ["(missing)", "(unseen)", *schema["values"][k]]


# ---------------------------------------------------------------------------------------------- all of it
def stratified(target: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (N - n,) and (n,) of the rows of two parts, in the table's order; both classes are shared out evenly.

    ## Drawn without regard to the class, a small part may by chance hold more positives than the other; then a figure
    ## would move for no better reason. So each class is shuffled and divided by itself.
    """
    generator = torch.Generator().manual_seed(seed)
    n_ones = round(n * target.sum().item() / len(target))
    second = torch.zeros(len(target), dtype=torch.bool)
    for value, count in ((1, n_ones), (0, n - n_ones)):
        rows = (target == value).nonzero()[:, 0]
        second[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return (~second).nonzero()[:, 0], second.nonzero()[:, 0]


def load_data(data: str | None = None, target: str | None = None, types: Sequence[str] | None = None) -> Data:
    """Read `adult`, `census` or a CSV file; None is Adult, and the census where that can't be reached.

    target: which column to predict, for a CSV file. types: ["zip=category", "id=ignore", ...], see column_types.
    Raises utils.InputError, naming column and line, for whatever can't be used.
    """
    return to_data(read_table(data, target), types or [])


def to_data(table: Table, types: Sequence[str] = ()) -> Data:
    """Split a table into three parts and turn it into numbers.

    ## The model learns from the first part, the second picks among models and says when to stop, the third is looked at
    ## once. Everything fitted, be it a list of values or a mean, comes from the first alone: in use, too, a model meets
    ## rows that took no part in fitting anything.
    """
    negative, positive = target_values(table)
    kinds = column_types(table, types)
    y = torch.tensor([float(value == positive) for value in table.columns[table.target]])  # (N,)
    if table.n_test:
        rest, tested = torch.arange(len(y)).split([len(y) - table.n_test, table.n_test])
    else:
        rest, tested = stratified(y, math.ceil(0.2 * len(y)), SPLIT_SEED)
        print("types, as inferred" + " and as asked for" * bool(types) + " (change them with --types):")
        for kind in ("numeric", "category"):
            print(f"  {kind:10}{', '.join(column for column in kinds if kinds[column] == kind) or 'none'}")
        print(f"target {table.target}: positive is {positive!r}, negative {negative!r}")
    train, val = (rest[i] for i in stratified(y[rest], math.ceil(0.2 * len(rest)), SPLIT_SEED))
    schema = fit_schema(table, kinds, train)
    everything = encode(table.columns, schema)
    for name, indices in zip(schema["categorical"], everything.categories.T):
        found = (indices == UNSEEN).nonzero()[:, 0].tolist()
        if found:
            print(f"{table.lines[found[0]]}: {name} {table.columns[name][found[0]]!r} is in no training row; it counts "
                  "as unseen" + f", and so do {len(found) - 1:,} values further down" * (len(found) > 1))
    parts = [Part(*(tensor[rows] for tensor in everything)) for rows in (train, val, tested)]
    data = Data(*parts, schema, table.name, table.source, table.stand_in)
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
    """Test accuracy of always naming the class that is more frequent in the training part."""
    return (data.test.target == (data.train.target.mean() > 0.5).float()).float().mean().item()


def one_hot(part: Part, schema: dict, fitted: Tensor) -> Tensor:
    """Standardised numbers and, for each category column, V places of which one is 1: (N, I) float32."""
    sizes = [len(values) + KNOWN for values in schema["values"]]
    columns = [torch.eye(V)[column] for column, V in zip(part.categories.T, sizes)]  # (N, V) each
    return torch.cat([standardise(part.numeric, fitted), *columns], 1)


def logistic_baseline(data: Data, penalty: float = 1.0) -> Tensor:
    """Logits (N,) of the test rows by logistic regression on one-hot columns: the linear model that others must beat.

    ## The probability is p = sigmoid(x w), the loss  sum of -log p(right class) + penalty |w|^2 / 2.  Its gradient and
    ## its second derivative are
    ##     g = X^T (p - y) + penalty w         H = X^T diag(p (1 - p)) X + penalty
    ## and Newton's step, w - H^-1 g, goes to where the parabola with that slope and bend has its bottom. There is only
    ## one valley, and some nine steps lead to its floor. H has I^2 entries: ten thousand for a hundred inputs, but
    ## for the weights of a network far too many; those have to do with g (from_scratch.py).
    """
    fitted = fit_standard(data.train.numeric)
    x, test = (torch.cat([one_hot(part, data.schema, fitted), torch.ones(len(part.target), 1)], 1).double()
               for part in (data.train, data.test))  # (N, I); the last column is 1 for all, its weight the bias
    y, w = data.train.target.double(), torch.zeros(x.shape[1], dtype=torch.float64)
    ridge = torch.full_like(w, penalty)
    ridge[-1] = 1e-6  # how frequent the positive class is should not be shrunk
    for _ in range(20):
        p = (x @ w).sigmoid()  # (N,)
        g = x.T @ (p - y) + ridge * w
        step = torch.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + ridge.diag(), g)
        w = w - step
        if step.abs().max() < 1e-8:
            break
    return test @ w


def draw_columns(data: Data, limit: int = 16):
    """A figure: for each column, how the training rows of either class are spread over its values."""
    schema, train = data.schema, data.train
    names = (schema["numeric"] + schema["categorical"])[:limit]
    height = math.ceil(len(names) / 4)
    figure = utils.pyplot().figure(figsize=(15, 3.2 * height))
    ones = (train.target == 1).numpy()
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
        classes = [x[~ones], x[ones]]
        a.hist(classes, edges, weights=[np.full(len(c), 1 / len(c)) for c in classes],
               label=[schema["negative"], schema["positive"]], **style)
    figure.legend(*a.get_legend_handles_labels(), title=schema["target"], loc="lower right", fontsize=12)
    figure.suptitle(f"Each column by itself: the share of its class in the training rows ({data.label})")
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------------- main
def add_options(parser) -> None:
    """Give an ArgumentParser the three options that load_data takes."""
    add = parser.add_argument
    add("--data", help=f"{', '.join(SETS)} or a CSV file; without it adult, or census if that is out of reach")
    add("--target", help="for a CSV file: the column to predict, which has two values")
    add("--types", nargs="+", metavar="COLUMN=TYPE", help="numeric, category or ignore, where the guess is wrong")


def main() -> None:
    parser = utils.parser(__doc__, __file__)
    add_options(parser)
    args = utils.parse_args(parser)
    data = load_data(args.data, args.target, args.types)
    schema, train = data.schema, data.train
    print(f"{data.label}: {len(train.target):,} rows to train on, {len(data.val.target):,} to validate, "
          f"{len(data.test.target):,} to test")
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
          f"  categories  {train.categories[0].tolist()}, a {int(train.target[0])}")
    if schema["numeric"]:
        print(f"\n{'the test rows':24}{'standardised, range':>26}{'std':>8}{'quantiles, range':>26}{'std':>8}")
        scaled = (standardise(data.test.numeric, fit_standard(train.numeric)),
                  to_normal(data.test.numeric, fit_quantiles(train.numeric)))
        for name, *columns in zip(schema["numeric"], *(x.T for x in scaled)):
            print(f"{name:24}" + "".join(f"{f'{x.min():.2f} to {x.max():.2f}':>26}{x.std():8.2f}" for x in columns))

    logits = logistic_baseline(data)
    accuracy = ((logits > 0) == (data.test.target == 1)).float().mean().item()
    print(f"\n{'on the test rows':36}accuracy     AUC")
    print(f"{'always the more frequent class':36}{majority_baseline(data):8.4f}  0.5000")
    print(f"{'logistic regression':36}{accuracy:8.4f}  {roc_auc(logits, data.test.target):.4f}")
    if data.best_auc:
        print(f"{'best possible: the known model':36}{data.best_accuracy:8.4f}  {data.best_auc:.4f}")
    utils.write_atomically(args.out / "columns.png", draw_columns(data).savefig)
    print(f"\nwrote {args.out / 'columns.png'}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
