"""How people write series down: separators, decimal commas, dates of all kinds, holes, several series in one file.

You learn here: to let a file's content say what it is, and to refuse where it could be two things.

    from reading import read_table; table = read_table(Path("my.csv"))

Left out on purpose: Excel's own files, dates without a constant step.
"""

import calendar
import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils

# Shapes: N rows, C channels (columns)

MISSING = {"", "-", "--", ".", "?", "na", "n/a", "#n/a", "nan", "nil", "none", "null"}  # there is no number
DATE_NAMES = {"date", "time", "datetime", "timestamp", "datum", "ds"}  # preferred where several columns hold dates
ROW_NAMES = {"", "index", "id", "no", "row", "rownames", "unnamed: 0", "x"}  # of columns that may count the rows
FEW = 0.25  # share of a column that is filled without being asked
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
DAYS = ("%Y-%m-%d %Y/%m/%d %Y.%m.%d %d.%m.%Y %d/%m/%Y %m/%d/%Y %d-%m-%Y %m-%d-%Y %d.%m.%y %d/%m/%y %m/%d/%y "
        "%b-%d-%Y %Y-%b-%d %d-%b-%Y %d-%b-%y %d/%b/%Y").split() + [
    "%d %b %Y", "%d %B %Y", "%b %d %Y", "%b %d, %Y", "%B %d, %Y", "%a %b %d %Y"]
CLOCKS = ["", " %H:%M", " %H:%M:%S", "T%H:%M:%S", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p", " %I:%M%p", " %H"]
MONTHS = ["FY%Y", "%Y-M%m", "%Y-%m", "%Y/%m", "%YM%m", "%Y:%m", "%m/%Y", "%m.%Y", "%m-%Y", "%b %Y", "%b-%Y", "%B %Y",
          "%Y %b", "%Y-%b", "%b-%y", "%b %y"]
PARTS = ("year", "month", "quarter", "day")  # names of columns that hold parts of a date
CLOCK = re.compile(r"([01]?\d|2[0-4])(?:[:.](\d\d))?(?:[:.](\d\d))?(?:\.0)?(?: ?([ap])\.?m\.?)?", re.I)  # such as 1 PM
TAIL = re.compile(r"\.0+$| (UTC|GMT)$")  # of a date; says nothing
DIGITS = {4: "%Y", 6: "%Y%m", 8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}


class Step(NamedTuple):
    """What lies between two rows. A month is no number of days, and a business day may be three days long."""
    unit: str  # "time", "weekdays" or "months"
    size: timedelta | int  # of "months": how many
    day: int = 1  # of "months": the day on which all rows lie, 31 for month ends

    @property
    def name(self) -> str:
        if self.unit == "months":
            return {1: "month", 3: "quarter", 12: "year"}.get(self.size, f"{self.size} months")
        names = {HOUR / 60: "minute", HOUR / 2: "half an hour", HOUR: "hour", DAY: "day", 7 * DAY: "week"}
        return "business day" if self.unit == "weekdays" else names.get(self.size, str(self.size))

    def count(self, date: datetime) -> float:
        """Steps from a fixed beginning to a date; no whole number where the date lies between two steps."""
        if self.unit == "months":
            off = min(self.day, calendar.monthrange(date.year, date.month)[1]) != date.day
            return (12 * date.year + date.month - 1) / self.size + 0.5 * off
        if self.unit == "weekdays":
            return 5 * (date.toordinal() // 7) + (date.toordinal() - 1) % 7 if date.weekday() < 5 else 0.5
        return (date - datetime(1970, 1, 1, tzinfo=date.tzinfo and timezone.utc)) / self.size

    def after(self, date: datetime, k: int) -> datetime:
        """The date k steps later: a month end stays a month end, and a Friday is followed by a Monday."""
        if self.unit == "time":
            return date + k * self.size
        if self.unit == "weekdays":
            weeks, day = divmod(date.weekday() + k, 5)
            return date + timedelta(days=7 * weeks + day - date.weekday())
        year, month = divmod(12 * date.year + date.month - 1 + k * self.size, 12)
        return date.replace(year=year, month=month + 1, day=min(self.day, calendar.monthrange(year, month + 1)[1]))

    def period(self, rows: int) -> int:
        """Rows after which a pattern is expected back: a day, week or year; an hour or minute in few rows."""
        if self.unit == "weekdays":
            return 5
        if self.unit == "months":
            return 12 // self.size if 12 % self.size == 0 else 1
        cycles = [7 * DAY if self.size < 7 * DAY else 364 * DAY]
        if self.size < DAY:
            cycles = [cycle for cycle in (DAY, HOUR, HOUR / 60) if cycle / self.size <= rows / 3]
        return next((cycle // self.size for cycle in cycles if not cycle % self.size), 1)


class Table(NamedTuple):
    values: Tensor  # (N, C) float64, in the file's units
    columns: list[str]
    dates: list[datetime]  # N of them, one step apart
    name: str  # "etth1", "station" or the file's name
    source: str  # what read_series takes to read it again: one of SETS, or the file's path
    stand_in: str = ""  # the series in whose place it stands, such as "ETTh1"
    ends: tuple[int, int, int] | None = None  # rows at which training, validation and test end; None: 60, 80, 100 %
    step: Step = Step("time", HOUR)
    period: int = 24  # rows after which a pattern is expected to come back
    said: tuple[str, ...] = ()  # what was understood of the file, in sentences


# ---------------------------------------------------------------------------------------------- dates
def find_step(dates: list[datetime]) -> Step:
    """The step that most rows are apart. dates: rising."""
    usual = Counter(after - before for before, after in zip(dates, dates[1:])).most_common(1)[0][0]
    day = max(date.day for date in dates)
    if usual >= 28 * DAY and all(date.day == min(day, calendar.monthrange(date.year, date.month)[1]) for date in dates):
        months = [12 * date.year + date.month for date in dates]
        return Step("months", Counter(np.diff(months).tolist()).most_common(1)[0][0], 31 if {
            date.day for date in dates} - {28, 29, 30, 31} == set() and day > 28 else day)
    weekdays = usual == DAY and len(dates) > 10 and all(date.weekday() < 5 for date in dates)
    return Step("weekdays" if weekdays else "time", usual)


def regular(dates: list[datetime]) -> bool:
    """Whether dates, sorted, follow each other in equal steps with few gaps. Dates that are read wrongly seldom do."""
    dates = sorted(set(dates))
    step = find_step(dates) if len(dates) > 2 else Step("time", DAY)
    counts = np.array([step.count(date) for date in dates])
    return counts[-1] - counts[0] < 1.25 * len(dates) and bool((np.diff(counts) % 1 < 1e-6).all())


def decimal_years(years: list[float]) -> list[datetime]:
    """R's own way: 1949.083 is February 1949, 1960.25 the second quarter."""
    parts = round(1 / min(abs(b - a) for a, b in zip(years, years[1:]) if a != b))  # rows in a year
    if parts in (1, 2, 3, 4, 6, 12):
        months = [round(year * parts) * 12 // parts for year in years]
        return [datetime(month // 12, month % 12 + 1, 1) for month in months]
    return [datetime(int(year), 1, 1) + timedelta(days=round(year % 1 * (365 + calendar.isleap(int(year)))))
            for year in years]


def readers(cell: str) -> Iterator[tuple[str, Callable[[str], datetime]]]:
    """Ways to read a date that fit one cell, by name. Of several, the rest of the column decides."""
    form = lambda name: (name, lambda cell: datetime.strptime(cell, name))  # noqa: E731
    if cell.isdecimal():
        if 8 < len(cell) < 20 and len(cell) != 14:
            power = (len(cell) - 9) // 3
            yield (f"{('', 'milli', 'micro', 'nano')[power]}seconds since 1970",
                   lambda cell: datetime(1970, 1, 1) + timedelta(seconds=int(cell) / 1000**power))
        yield from [form(DIGITS[len(cell)])] if len(cell) in DIGITS else []
    elif part := re.fullmatch(r"\d{4}[ :./-]?([QH])[1-4]|([QH])[1-4][ :./-]?\d{4}", cell, re.I):
        months = 3 if (part[1] or part[2]) in "Qq" else 6
        def first_day(cell: str) -> datetime:
            number, year = sorted(map(int, re.findall(r"\d+", cell)))
            return datetime(year, months * (number - 1) + 1, 1)
        yield "quarters" if months == 3 else "half years", first_day
    elif re.fullmatch(r"\d{4}[ -]?W\d\d?(-\d)?", cell):
        yield "weeks", lambda cell: datetime.fromisocalendar(*(*map(int, re.findall(r"\d+", cell)), 1)[:3])
    else:
        for name, way in [("ISO 8601", datetime.fromisoformat), *map(form, [
                day + clock for clock in CLOCKS for day in DAYS] + MONTHS)]:
            try:
                yield name, way if way(cell) else way
            except ValueError:
                pass


def read_dates(cells: list[str], form: str | None = None) -> dict[str, list[datetime]]:
    """All different ways to read a column as dates, by name; empty where there is none. form: as for strptime."""
    ## The longest cell as well: 2010-01-01 may stand for midnight among cells that have a time.
    ways = dict([(form, lambda cell: datetime.strptime(cell, form))] if form else [
        way for cell in (max(cells, key=len), cells[-1]) for way in readers(cell)])
    found = {}
    for name, way in ways.items():
        try:
            dates = [way(cell) for cell in cells]
        except (ValueError, OverflowError):
            continue
        if dates not in found.values():
            found[name] = dates
        if name == "ISO 8601":
            break  # other forms would say the same
    if not found and len(cells) > 2 and all(re.fullmatch(r"(1[5-9]|20)\d\d(\.\d*)?", cell) for cell in cells):
        found = {"decimal years": decimal_years(list(map(float, cells)))} if len(set(cells)) > 1 else {}
    return found


def pick_dates(header: list[str], columns: list[list[str]], lines: list[int], name: str,
               form: str | None) -> tuple[int, str, list[datetime]]:
    """The column of dates, how it was read, and its dates. Raises utils.InputError where there is none, or two ways."""
    numeric = None
    for j in sorted(range(len(header)), key=lambda j: header[j].lower() not in DATE_NAMES):
        cells = columns[j]
        if not all(cells) or not read_dates([TAIL.sub("", cell) for cell in cells[:3] + cells[-3:]], form):
            continue
        cells = [TAIL.sub("", cell) for cell in cells]
        plain = header[j].lower() not in DATE_NAMES and cells[0].replace(".", "").isdecimal()
        ways = read_dates(cells, form)
        if len({date.tzinfo is None for dates in ways.values() for date in dates}) > 1:
            raise utils.InputError(f"{name}: some dates have a time zone and others have none; write all in one way.")
        ## 1944 people are no year, and 1262304000 euros no second: numbers have to follow each other as dates do.
        good = {way: dates for way, dates in ways.items() if regular(dates)}
        ways = good if plain else good or ways
        if len(ways) > 1:
            raise utils.InputError(f"{name}: column {header[j]!r}, {cells[0]!r}, can be read as {' and as '.join(ways)}"
                                   f"; say which by --date-format {next(iter(ways))!r}.")
        for way, dates in ways.items():
            if not plain:
                return j, way, dates
            numeric = numeric or (j, way, dates)
    if numeric:
        return numeric
    j = next((j for j, column in enumerate(header) if column.lower() in DATE_NAMES), 0)
    for line, cell in zip(lines, columns[j] if read_dates(columns[j][:1], form) else []):
        if not read_dates([cell, columns[j][0]], form):
            raise utils.InputError(f"{name}: line {line}, column {header[j]}: {cell!r} is no date like the others; "
                                   "correct it, or name their form by --date-format, for example %d/%m/%Y.")
    raise utils.InputError(f"{name}: no column holds dates in one form, {header[j]!r} begins with "
                           f"{columns[j][0]!r}; name the form by --date-format, such as %d/%m/%Y.")


def add_parts(header: list[str], columns: list[list[str]], place: int,
              dates: list[datetime]) -> tuple[int, list[datetime]]:
    """Dates with the month, day and hour that other columns hold. Such columns leave header and columns, which change.

    place: of the column that dates were read from; its new place is returned. What names no other dates stays as it is.
    """
    names, taken = [name.lower() for name in header], [place]
    parts = [names.index(name) for name in PARTS if name in names]
    if names[place] == "year" and len(parts) > 1:
        written = ["-".join("Q" * (names[j] == "quarter") + cell.removesuffix(".0").zfill(1 + (names[j] != "quarter"))
                            for j, cell in zip(parts, row)) for row in zip(*(columns[j] for j in parts))]
        for dates in list(read_dates(written).values())[:1]:
            taken = parts
    for j, column in enumerate(columns) if len(set(dates)) < len(dates) else ():
        found = [CLOCK.fullmatch(cell) for cell in column] if j not in taken else [None]
        if all(found):
            ## Hours from 1 to 24 name the end of each: the first lasts from 0:00 to 1:00.
            first = min(int(match[1]) for match in found) == 1 and max(int(match[1]) for match in found) == 24
            later = [date + timedelta(
                hours=int(h) % (12 if half else 99) + 12 * ((half or "").lower() == "p") - first,
                minutes=int(m or 0), seconds=int(s or 0)) for date, (h, m, s, half) in zip(dates, (
                    match.groups() for match in found))]
            ordered = later in (sorted(later), sorted(later, reverse=True))
            if ordered and regular(later) and 10 * len(set(later)) > 9 * len(dates):
                dates, taken = later, [*taken, j]
                break
    header[place] = " + ".join(header[j] for j in taken)
    for j in sorted(set(taken) - {place}, reverse=True):
        del header[j], columns[j]
    return place - sum(j < place for j in taken), dates


# ---------------------------------------------------------------------------------------------- numbers
ABOVE = re.compile(r'#.*\n|\s*|[^,;\t|"]* [^,;\t|"]*\n')  # a comment, an empty line, or words
THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?")


def number(cell: str, decimal: str = ".") -> float:
    """The number in a cell; NaN where it says that there is none. Raises ValueError for anything else."""
    try:
        if "_" not in cell and (decimal == "." or "." not in cell):  # as nearly all cells are; the rest takes time
            return float(cell.replace(decimal, "."))
    except ValueError:
        pass
    cell = re.sub(r"[\s$€£%]", "", cell).lower().replace("\u2212", "-")  # U+2212 is the typographer's minus
    if cell in MISSING:
        return float("nan")
    cell = cell.translate(str.maketrans(",.", ".,")) if decimal == "," else cell
    cell = f"-{cell[1:-1]}" if cell[0] + cell[-1] == "()" else cell  # as accountants write
    cell = cell.replace(",", "") if THOUSANDS.fullmatch(cell) else cell
    return float(cell.replace("_", "?"))  # 1_000 is a number in Python alone


def numbers(cells: tuple[str, ...], decimal: str) -> tuple[np.ndarray, list[int]]:
    """(N,) float64, NaN where a cell holds no number; and the rows of cells that hold something else."""
    values, wrong = np.full(len(cells), np.nan), []
    for i, cell in enumerate(cells):
        try:
            values[i] = number(cell, decimal)
        except ValueError:
            wrong.append(i)
    return np.where(np.isfinite(values), values, np.nan), wrong


# ---------------------------------------------------------------------------------------------- the file
def read_cells(path: Path, name: str) -> tuple[list[str], dict[int, list[str]], str, int]:
    """Header, rows by their line in the file, the separator, and lines above the header, which are comments or titles.

    Raises utils.InputError for what is no such table.
    """
    try:
        text = path.read_bytes()
        text = text.decode("utf-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        lines = text.splitlines(keepends=True)
        above = next((i for i, line in enumerate(lines[:50]) if not ABOVE.fullmatch(line)), 0) if any(
            map(re.compile("[,;\t|]").search, lines[:50])) else 0
        first = [line for line in lines[above : above + 50] if line.strip()]
        def columns(separator: str) -> int:  # 0 where the lines differ, but for a header that lacks the row names
            width, *others = map(len, csv.reader(first, delimiter=separator)) if len(first) > 1 else (0, 0)
            return width * (Counter(others).most_common(1)[0][0] in (width, width + 1))
        separator = max(",;\t| ", key=columns)
        reader = csv.reader(io.StringIO("".join(lines[above:]), newline=""), delimiter=separator, skipinitialspace=True)
        rows = {above + reader.line_num: row for row in reader if "".join(row).strip()}  # blank lines carry nothing
    except (UnicodeDecodeError, csv.Error) as error:
        raise utils.InputError(f"{name} is no CSV in UTF-8 ({error}); convert it, for example with iconv.") from error
    if len(rows) < 3:
        raise utils.InputError(f"{name} has {len(rows)} lines; give a header and some hundred rows at least.")
    header = [cell.strip() for cell in rows.pop(next(iter(rows)))]
    if len(header) < 2:
        raise utils.InputError(f"{name} has one column, {header[0]!r}; give a date column and numeric columns, "
                               "separated by commas, semicolons or tabs.")
    if Counter(map(len, rows.values())).most_common(1)[0][0] == len(header) + 1:
        header.insert(0, "")  # R's write.table gives its row names no name
    for column, count in Counter(header).items():
        if column and not any(map(str.isalpha, column)):
            raise utils.InputError(f"{name}: {column!r} in line 1 is no name; the first line has to name the columns.")
        if column and count > 1:
            raise utils.InputError(f"{name}: line 1 names {column!r} {count} times; give every column its own name.")
    for line, row in rows.items():
        if len(row) != len(header):
            raise utils.InputError(f"{name}: line {line} has {len(row)} cells, but line 1 names {len(header)} columns; "
                                   "correct the line.")
    return header, rows, separator, above


def read_table(path: Path, name: str | None = None, *, columns: list[str] | None = None, where: list[str] = (),
               date_format: str | None = None, fill: bool = False, period: int | None = None) -> Table:
    """Read a text file of one column of dates and some of numbers: see 03_lstm/README.md for what is understood.

    columns: those to keep, in this order; where: rows to keep, as column=value; fill: holes of any size. Raises
    utils.InputError, with line and column or count, for whatever a forecaster could silently learn nonsense from.
    """
    name = name or path.name
    header, rows, separator, above = read_cells(path, name)
    for condition in where:
        column, _, value = condition.partition("=")
        there = Counter(row[header.index(column)].strip() for row in rows.values()) if column in header else header
        if column not in header or not there[value]:
            raise utils.InputError(f"--where {condition}: {name} has {', '.join(list(there)[:9])}.")
        rows = {line: row for line, row in rows.items() if row[header.index(column)].strip() == value}
    cells, lines = [[cell.strip() for cell in column] for column in zip(*rows.values())], list(rows)
    place, way, dates = pick_dates(header, cells, lines, name, date_format)
    if len(set(dates)) < len(dates):
        place, dates = add_parts(header, cells, place, dates)
    said = [f"{name}: separator {separator!r}, dates in column {header[place]!r} read as {way}"]
    said += [f"passed over: {above} lines above the header"] if above else []
    if dates[0] > dates[-1] and sorted(dates, reverse=True) == dates:
        for column in (dates, lines, *cells):
            column.reverse()
        said.append("newest first: turned round")
    check_dates(dates, lines, name, {header[j]: column for j, column in enumerate(cells) if j != place})

    ## A column of numbers is one in which most cells are numbers; then the others are mistakes, and are named.
    commas = [cell for j, column in enumerate(cells) if j != place for cell in column[:200]
              if re.fullmatch(r"-?[\d.\s]*,\d+", cell)]
    decimal = "," if commas and (separator != "," or not all(map(THOUSANDS.fullmatch, commas))) else "."
    said[0] += f", decimal {decimal!r}" if decimal == "," else ""
    kept, dropped = {}, {}
    if unknown := [column for column in columns or () if column not in header or column == header[place]]:
        raise utils.InputError(f"{name} has no column {unknown[0]} of numbers; it has "
                               f"{', '.join(header[:place] + header[place + 1 :])}.")
    for j, column in enumerate(header):
        if j == place or columns and column not in columns:
            continue
        values, wrong = numbers(cells[j], decimal)
        empty, early = np.isnan(values), values[: int(0.6 * len(values))]
        if empty.all() and not wrong:
            dropped[column] = "empty"
        elif not columns and 2 * len(wrong) > (~empty).sum() + len(wrong):
            dropped[column] = "text"
        elif wrong:
            raise utils.InputError(f"{name}: line {lines[wrong[0]]}, column {column!r}: {cells[j][wrong[0]]!r} is no "
                                   f"number ({len(wrong):,} such cells); correct it or choose --columns.")
        elif not columns and (not column or column.lower() in ROW_NAMES and (abs(np.diff(values)) == 1).all()):
            dropped[column] = "it numbers the rows" if column else "it has no name"
        elif not columns and len(early) > 2 and len(np.unique(early[~np.isnan(early)])) < 2:
            dropped[column] = f"constant, {early[0]:g}, in the first 60 % of rows"
        else:
            kept[column] = values
    if not kept or set(columns or ()) - set(kept):
        raise utils.InputError(f"{name}: no column of changing numbers is left ("
                               f"{', '.join(f'{c!r}: {why}' for c, why in dropped.items())}); name one by --columns.")
    said += ["left out: " + ", ".join(f"{column!r} ({why})" for column, why in dropped.items())] if dropped else []
    columns = list(columns or kept)
    values = np.stack([kept[column] for column in columns], 1)  # (N, C)
    step, dates, values, filled = fill_holes(dates, lines, values, columns, name, fill)
    said += [f"FILLED: {filled}"] if filled else []
    period = period or step.period(len(dates))
    said.append(f"{len(dates):,} rows of {len(columns)} columns, from {dates[0]} to {dates[-1]}, one per {step.name}; "
                f"period {period} rows")
    return Table(torch.from_numpy(values), columns, dates, name, str(path.resolve()), step=step, period=period,
                 said=tuple(said))


def check_dates(dates: list[datetime], lines: list[int], name: str, others: dict[str, list[str]]) -> None:
    """Raise utils.InputError unless the dates rise. others: what may tell several series apart, (N,) cells each."""
    for column, cells in others.items() if len(set(dates)) < len(dates) else ():
        if 3 * len(values := list(dict.fromkeys(cells))) <= len(dates) == len(set(zip(cells, dates))):
            raise utils.InputError(f"{name} holds {len(values)} series below each other, told apart by column "
                                   f"{column}; take one, for example --where '{column}={values[0]}'.")
    for what, wrong in (
            ("not sorted: dates before the one above", [i for i in range(1, len(dates)) if dates[i] < dates[i - 1]]),
            ("duplicate dates", [i for i in range(1, len(dates)) if dates[i] == dates[i - 1]])):
        if wrong:
            raise utils.InputError(f"{name}: {what}: {len(wrong):,}, the first in line {lines[wrong[0]]} "
                                   f"({dates[wrong[0]]}); keep one row for each date, in order, or choose --where.")


def fill_holes(dates: list[datetime], lines: list[int], values: np.ndarray, columns: list[str], name: str,
               fill: bool) -> tuple[Step, list[datetime], np.ndarray, str]:
    """The step, dates without gaps, values (N, C) without holes, and a sentence on what was filled.

    ## A straight line through a missing day teaches that such days exist, so many holes are refused unless asked for.
    ## A line between two rows knows the later one. From the validation rows on, nobody could have known it: there the
    ## value before stays.
    """
    step = find_step(dates)
    counts = np.array([step.count(date) for date in dates]) - step.count(dates[0])
    where = counts.round().astype(int)
    if len(off := np.flatnonzero((abs(counts - where) > 1e-6) | (np.diff(where, prepend=-1) < 1))):
        raise utils.InputError(f"{name}: dates that don't follow the one before by one {step.name}, as most do: "
                               f"{len(off):,}, the first in line {lines[off[0]]} ({dates[off[0]]}); bring all rows to "
                               "equal distances.")
    N = where[-1] + 1
    if N > 10 * len(dates) + 1000:
        raise utils.InputError(f"{name}: one row per {step.name} would be {N:,} rows, but there are {len(dates):,}.")
    whole = np.full((N, len(columns)), np.nan)
    whole[where] = values
    holes, gaps = np.isnan(whole), N - len(dates)
    empty = holes.sum(0) - gaps  # (C,) cells
    parts = []
    if gaps:
        i = int(np.flatnonzero(np.diff(where) > 1)[0]) + 1
        parts.append(f"gaps in the dates, else one {step.name} apart: {gaps:,} rows, the first before line {lines[i]} "
                     f"({dates[i]})")
    if empty.any():
        i, j = np.argwhere(np.isnan(values))[0]
        counted = ", ".join(f"{column} {count:,}" for column, count in zip(columns, empty) if count)
        parts.append(f"cells that are empty, NaN or infinite: {empty.sum():,} ({counted}), the first in line "
                     f"{lines[i]}, column {columns[j]}")
    if parts and holes.mean(0).max() >= FEW and not fill:
        raise utils.InputError(f"{name}: {'; '.join(parts)}: too many to pass over; cut them out, choose --columns, or "
                               "have them filled by --fill.")
    end = max(int(0.6 * N), 1)
    for column, hole in zip(whole.T, holes.T):
        known = np.flatnonzero(~hole)
        column[hole] = np.interp(np.flatnonzero(hole), known, column[known])
        for i in np.flatnonzero(hole[end:]) + end:
            column[i] = column[i - 1]
    return step, [step.after(dates[0], k) for k in range(N)] if gaps else dates, whole, "; ".join(parts)
