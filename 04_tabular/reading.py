"""A file as people have it, made a table: separators, decimal commas, missing values, dates, types, and the target.

You learn here: how little a CSV file says about itself, and what has to be guessed, said aloud, and open to correction.
load.py makes numbers of what is read here; this file knows no tensors.

Left out on purpose: spreadsheets and databases (export the table as CSV); dates with a zone; several header lines.
"""
import csv
import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

import utils

MISSING = {"", "?", "-", ".", "na", "n/a", "#n/a", "<na>", "nan", "null", "none", "nil"}  # in upper or lower case
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
DATES = ("%d.%m.%Y", "%d.%m.%Y %H:%M", "%d.%m.%Y %H:%M:%S", "%Y/%m/%d", "%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S",
         "%m/%d/%Y", "%m/%d/%Y %H:%M", "%d/%m/%Y", "%d/%m/%Y %H:%M")  # besides ISO; a day above 12 tells apart


class Table(NamedTuple):
    """A table as it was read: words only."""
    columns: dict[str, list[str]]  # name -> one value per row, "" where there is none; numbers as Python writes them
    lines: list[str]  # where each row stands, for messages: "line 7"
    target: str  # the column to predict
    name: str
    source: str  # what load.py's load_data takes: a name in its SETS, or a path
    stand_in: str = ""  # the real set that it takes the place of
    n_test: int = 0  # the last so many rows are for testing; 0: the set has no such rows, so they are drawn
    p: np.ndarray | None = None  # (N,) the probability that drew each target, where it is known
    own: bool = False  # a file of somebody's own: what was found in it is printed


# ---------------------------------------------------------------------------------------------- the file
def read_csv(path: Path, target: str | None) -> Table:
    """A table with a header, separated by comma, semicolon, tab or pipe. Raises utils.InputError naming the line."""
    def bad(line: int, what: str) -> utils.InputError:
        return utils.InputError(f"{path}, line {line}: {what}")

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise utils.InputError(f"{path}: {what}; give a CSV file with a header.")
    raw, rows, begins = path.read_bytes(), [], 1
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        if b"\0" in raw:
            raise utils.InputError(f"{path} is no text; export the table as CSV.") from error
        encoding, text = "cp1252", raw.decode("cp1252", "replace")
        print(f"{path.name} is not UTF-8; read as cp1252, the encoding of Windows in western Europe")
    first = text.lstrip().partition("\n")[0]
    delimiter = max(",;\t|", key=first.count)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        for row in reader:
            row = [value.strip() for value in row]
            if row not in ([], [""]):  # not an empty line
                rows.append((begins, row))
            begins = reader.line_num + 1  # a quoted value may run over several lines
    except csv.Error as error:
        raise bad(reader.line_num, f"{error}; is a quote missing there?") from error
    if len(rows) < 2:
        raise utils.InputError(f"{path} has no rows; a header and some hundred rows are needed.")
    (first, names), *rows = rows
    if {len(row) for _, row in rows} == {len(names) + 1}:
        names = ["", *names]  # as R's write.table has it: the rows' names have no name
    for name in names[1:] + names[:1] * bool(names[0]):
        if name in ("", "?") or NUMBER.fullmatch(name) or names.count(name) > 1:
            raise bad(first, f"{name!r} is no name, or two columns have it; the file must begin with a header that "
                             "gives each column a name of its own.")
    for line, row in rows:
        if len(row) != len(names):
            raise bad(line, f"{len(row)} value{'s' * (len(row) > 1)}, but the header names {len(names)} columns; a "
                            "value that contains the separator needs quotes around it.")
    columns = dict(zip(names, map(list, zip(*(row for _, row in rows)))))
    if names[0] in ("", "Unnamed: 0"):
        del columns[names[0]]
        print("the first column has no name: an index, left out")
    print(f"{path.name}: {len(rows):,} rows, {len(columns)} columns, separated by {delimiter!r}, {encoding}")
    return Table(clean(columns), [f"line {line}" for line, _ in rows], target, path.name, str(path.resolve()), own=True)


def clean(columns: dict[str, list[str]]) -> dict[str, list[str]]:
    """Columns as read -> with "" for what is missing, and numbers as Python writes them: "$3,625.00" as "3625.00".

    ## NA may be Namibia. So in a column of words that has empty cells besides, those are what is missing. And 3,625 may
    ## be a whole number or a broken one: what most numbers of the file have before their decimals decides for all.
    """
    cells = [value for column in columns.values() for value in column if "," in value or "." in value]
    commas = sum(bool(re.fullmatch(r"[+-]?(0,\d+|\d+,(\d{1,2}|\d{4,}))", value)) for value in cells)
    points = sum(bool(re.fullmatch(r"[+-]?\d*\.\d+", value)) for value in cells)
    decimal, group = ",." if commas > points else ".,"
    if decimal == ",":
        print("numbers have decimal commas, such as 3,5")
    grouped = re.compile(rf"[+-]?\d{{1,3}}([{group}' \u2019\u00a0\u202f]\d{{3}})+({re.escape(decimal)}\d+)?")

    def plain(value: str) -> str:
        value = re.sub("[$\u20ac\u00a3%]", "", value.replace("\u2212", "-")).strip()
        if grouped.fullmatch(value):
            value = re.sub(rf"[{group}' \u2019\u00a0\u202f]", "", value)
        return value.replace(decimal, ".")

    out = {}
    for name, column in columns.items():
        change = {value: plain(value) for value in set(column) if value.lower() not in MISSING}
        if not all(map(NUMBER.fullmatch, change.values())):
            change = {value: value for value in set(column) if value and ("" in column or value.lower() not in MISSING)}
        out[name] = [change.get(value, "") for value in column]
    return out


# ---------------------------------------------------------------------------------------------- columns
def date_formats(values: set[str]) -> list[str]:
    """How all of the values may be written as dates: "ISO" or one of DATES; two where no day is above 12."""
    def fits(form: str) -> bool:
        try:
            return all(to_date(value, form) for value in values)
        except ValueError:
            return False
    return list(filter(fits, ("ISO", *DATES)))


def to_date(value: str, form: str) -> datetime:
    return datetime.fromisoformat(value) if form == "ISO" else datetime.strptime(value, form)


def column_types(table: Table, types: Sequence[str] = ()) -> dict[str, str]:
    """{column: "numeric", "category" or "date"}, without the target and what is left out; prints all that it decides.

    types: those to set, as "zip=category" or "id=ignore".

    ## A column of nothing but numbers is taken as one of numbers. A computer can't know better: a postcode is
    ## written as a number but is none, because the mean of two postcodes means nothing. Only you know; --types says it.
    ## What names a row, such as a number in the file's order, is no use for rows to come. It is left out: where the
    ## file is sorted by the target, it would tell all, and a figure would be too good to be true.
    Raises utils.InputError, naming the line, where a column can't be of the type asked for.
    """
    others = [name for name in table.columns if name != table.target]
    asked = dict(item.rpartition("=")[::2] for item in types)
    for name, kind in asked.items():
        if name not in others or kind not in ("numeric", "category", "date", "ignore"):
            raise utils.InputError(f"--types {name + '=' * bool(name) + kind}: write COLUMN=numeric, category, date "
                                   f"or ignore; there are the columns {', '.join(others)[:500]}.")
    found, left_out = {}, {}
    for name in others:
        column = table.columns[name]
        there = [value for value in column if value]
        values, N = set(there), len(there)
        odd = [value for value in there if not NUMBER.fullmatch(value) or not math.isfinite(float(value))]
        forms = date_formats(values) if odd and (asked.get(name, "date") == "date") else []
        kind = asked.get(name) or ("date" if forms else "category" if odd else "numeric")
        if len(forms) > 1 and kind == "date":
            print(f"column {name}: {there[0]} may begin with the month or the day; the month is assumed")
        if kind == "numeric" and odd or kind == "date" and not forms:
            raise utils.InputError(f"column {name}, {table.lines[column.index(odd[0] if odd else there[0])]}: "
                                   f"{(odd or there)[0]!r} is no {'number' if odd else 'date'}; have the column read "
                                   f"as words, --types {name}=category, or not at all, {name}=ignore.")
        if name not in asked and 0 < len(odd) < 0.1 * N and not forms:
            print(f"column {name} holds numbers, but {odd[0]!r} on {table.lines[column.index(odd[0])]}: so it counts "
                  "as one of categories; empty such places to have a column of numbers")
        if name not in asked and table.own:
            numbers = [float(value) for value in values] if kind == "numeric" else []
            named = re.search("(^|[^a-z])(id|key|uuid)$", name.lower()) and len(values) > 0.9 * N
            row = named or numbers and len(values) == N and max(numbers) - min(numbers) < 1.5 * N
            if len(values) + (N < len(column)) < 2:
                left_out[name] = "constant" if values else "empty"
            elif row and N > 20 and all(map(float.is_integer, numbers)):
                left_out[name] = "a number for each row"
            elif kind == "category" and len(values) > max(20, 0.5 * N):
                left_out[name] = "free text, or a name for each row"
        if name not in left_out and kind != "ignore":
            found[name] = kind
    if not found:
        raise utils.InputError(f"no column is left to predict {table.target} from; --types COLUMN=category keeps "
                               f"one of {', '.join(others)[:500]}.")
    if table.own:
        print("types" + " and as asked for" * bool(types) + " (change them with --types COLUMN=TYPE):")
        for kind in ("numeric", "category", "date"):
            print(f"  {kind:10}{', '.join(name for name in found if found[name] == kind) or 'none'}"[:1000])
        for name, why in left_out.items():
            print(f"  left out  {name}: {why}; --types {name}=category keeps it")
    return found


def fit_target(table: Table, task: str | None = None, positive: str | None = None) -> dict:
    """What is to be predicted: {"target": column, "task": "binary", "classes" or "numbers", "classes": its values}.

    Of two values the later one is positive, of numbers 10 after 5, as scikit-learn has it; `positive` chooses another.
    Raises utils.InputError, naming the line, for a target that can't be learned.
    """
    if table.target not in table.columns:
        why = "--target is missing" if table.target is None else f"--target {table.target}: no such column"
        raise utils.InputError(f"{why}; the first line of {table.name} names {', '.join(table.columns)[:500]}.")
    column = table.columns[table.target]
    counts = Counter(value for value in column if value)
    numeric = all(NUMBER.fullmatch(value) and math.isfinite(float(value)) for value in counts)
    values = sorted(counts, key=float if numeric else str)
    if task is None:
        whole = numeric and all(float(value).is_integer() for value in values)
        task = "numbers" if numeric and len(values) > (10 if whole else 2) else "classes"
    if task == "numbers" and not numeric:
        odd = next(value for value in column if value and not NUMBER.fullmatch(value))
        raise utils.InputError(f"--task numbers: {odd!r} on {table.lines[column.index(odd)]} is no number.")
    rare = [value for value in values if counts[value] < 3]
    if len(values) < 2 or task == "classes" and (rare or len(values) > 100):
        some = ", ".join(f"{value!r} in {counts[value]} (the first on {table.lines[column.index(value)]})"
                         for value in (rare or values)[:4])
        raise utils.InputError(f"the target {table.target} has {len(values)} values, {some}; it needs two or more, at "
                               "most 100, of three rows each: remove rows, make groups of values, or, for many "
                               "different numbers, add --task numbers.")
    if positive is not None:
        if task == "numbers" or len(values) != 2 or positive not in values:
            raise utils.InputError(f"--positive {positive}: the target has the values {', '.join(values[:10])}; name "
                                   "one of two.")
        values = [value for value in values if value != positive] + [positive]
    task = "binary" if task == "classes" and len(values) == 2 else task
    found = {"target": table.target, "task": task, "classes": [] if task == "numbers" else values}
    return found | ({"negative": values[0], "positive": values[1]} if task == "binary" else {})
