"""Chapter 03, reading.py: dates, separators, holes and steps as people's files have them."""

import calendar
import math
import re
from datetime import datetime, timedelta

import pytest
import torch
from conftest import chapter

import utils

reading, load = chapter("03_lstm", "reading", "load")
MONTHS = [datetime(1949 + m // 12, 1 + m % 12, 1) for m in range(100)]
QUARTERS = MONTHS[::3]
HOURS = [datetime(2010, 1, 1) + timedelta(hours=i) for i in range(100)]
DAYS = [datetime(2015, 12, 20) + timedelta(days=i) for i in range(80)]
WEEKS = [datetime(2019, 1, 7) + timedelta(weeks=i) for i in range(60)]
YEARS = [datetime(year, 1, 1) for year in range(1900, 1960)]


def end(date):
    return date.replace(day=calendar.monthrange(date.year, date.month)[1])


def quarter(date):
    return f"{date.year}Q{1 + date.month // 3}"


def read(tmp_path, dates, header="date,a", separator=",", cells=lambda i: f"{math.sin(i):.3f}", **options):
    text = "\n".join([header, *(f'"{date}"{separator}{cells(i)}' for i, date in enumerate(dates))])
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    return reading.read_table(tmp_path / "x.csv", **options)


# ---------------------------------------------------------------------------------------------- dates
FORMS = {
    "2010/01/01": (DAYS, "%Y/%m/%d"), "31.12.2016": (DAYS, "%d.%m.%Y"), "12/31/2016": (DAYS, "%m/%d/%Y"),
    "31/12/2016": (DAYS, "%d/%m/%Y"), "12/31/16": (DAYS, "%m/%d/%y"), "01:00 PM": (HOURS, "%m/%d/%Y %I:%M %p"),
    "13:00": (HOURS, "%d.%m.%Y %H:%M"), "ISO": (HOURS, "%Y-%m-%dT%H:%M:%S"), "1949-01": (MONTHS, "%Y-%m"),
    "1974Q1": (QUARTERS, quarter), "1970 Q1": (QUARTERS, lambda d: quarter(d).replace("Q", " Q")),
    "Q1 1970": (QUARTERS, lambda d: " ".join(reversed(quarter(d).replace("Q", " Q").split()))),
    "2019-W01": (WEEKS, "%G-W%V"), "Jan-1-1995": (MONTHS, lambda d: f"{d:%b}-{d.day}-{d.year}"),
    "Jan 1995": (MONTHS, "%b %Y"), "19580329": (DAYS, "%Y%m%d"), "195803": (MONTHS, "%Y%m"), "1700": (YEARS, "%Y"),
    "1949.083": (MONTHS, lambda d: f"{d.year + (d.month - 1) / 12:.3f}".rstrip("0").rstrip(".")),
    "1960.25": (QUARTERS, lambda d: f"{d.year + (d.month - 1) / 12}"),
    "seconds": (HOURS, lambda d: int((d - datetime(1970, 1, 1)).total_seconds())),
    "milliseconds": (HOURS, lambda d: int(1000 * (d - datetime(1970, 1, 1)).total_seconds())),
    "seconds.0": (HOURS, lambda d: (d - datetime(1970, 1, 1)).total_seconds()), "hour": (HOURS, "%Y%m%d%H"),
    "nanoseconds": (HOURS, lambda d: int((d - datetime(1970, 1, 1)).total_seconds()) * 10**9),
    "1960-M01": (MONTHS, "%Y-M%m"), "1960H1": (MONTHS[::6], lambda d: f"{d.year}H{1 + d.month // 7}"),
    "FY1960": (YEARS, "FY%Y"), "UTC": (HOURS, "%Y-%m-%d %H:%M:%S UTC"), "Q1-1974": (
        QUARTERS, lambda d: "-".join(reversed(quarter(d).replace("Q", " Q").split()))),
    "first days, by what follows": (MONTHS, "%d/%m/%Y"), "midnight": (HOURS, lambda d: d if d.hour else d.date()),
}


@pytest.mark.parametrize("form", FORMS)
def test_dates_in_every_usual_form(tmp_path, form):
    dates, write = FORMS[form]
    found = read(tmp_path, [f"{date:{write}}" if isinstance(write, str) else write(date) for date in dates])
    assert found.dates == dates and found.columns == ["a"]
    again = read(tmp_path, [f"{date:{write}}" if isinstance(write, str) else write(date) for date in dates][::-1])
    assert again.dates == dates and "newest first: turned round" in again.said
    torch.testing.assert_close(again.values, found.values.flip(0))


def test_dates_that_may_be_two_things_are_asked_for(tmp_path):
    cells = [f"{date:%d/%m/%Y}" for date in (datetime(2020, 3, 1) + timedelta(days=i) for i in range(12))]
    with pytest.raises(utils.InputError, match="'01/03/2020', can be read as %d/%m/%Y and as %m/%d/%Y; say which"):
        read(tmp_path, cells)
    assert read(tmp_path, cells, date_format="%d/%m/%Y").step.name == "day"
    assert read(tmp_path, cells, date_format="%m/%d/%Y").step.name == "month"


def test_the_date_column_is_found_by_what_it_holds(tmp_path):
    rows = [f"{1944 + i},{i},{date.date()},ok" for i, date in enumerate(DAYS)]
    (tmp_path / "x.csv").write_text("\n".join(["people,b,when,state", *rows]))
    found = reading.read_table(tmp_path / "x.csv")
    assert found.columns == ["people", "b"] and found.dates == DAYS and "'state' (text)" in found.said[1]


PAIRS = {
    "date,hour,a": lambda d: f"{d.date()},{d.hour}", "hour,date,a": lambda d: f"{d.hour},{d:%d.%m.%Y}",
    "date,hour ending,a": lambda d: f"{d.date()},{d.hour + 1}", "Date,Time,a": lambda d: f"{d:%d-%b-%Y},{d:%H:%M}",
    "day,time,a": lambda d: f"{d:%Y%m%d},{d:%I:%M:%S %p}", "date,clock,a": lambda d: f"{d.date()},{d:%H.%M.%S}",
    "year,month,day,hour,a": lambda d: f"{d.year},{d.month},{d.day},{d.hour}",
    "hour,day,month,year,a": lambda d: f"{d.hour},{d:%d,%b},{d.year}",
}


@pytest.mark.parametrize("header", PAIRS)
def test_date_and_hour_in_columns_of_their_own(tmp_path, header):
    (tmp_path / "x.csv").write_text("\n".join([header, *(f"{PAIRS[header](d)},{i % 7}" for i, d in enumerate(HOURS))]))
    found = reading.read_table(tmp_path / "x.csv")
    assert found.dates == HOURS and found.columns == ["a"] and found.step.name == "hour"
    assert " + " in found.said[0]


def test_year_and_quarter_or_month_in_columns_of_their_own(tmp_path):
    for header, dates, write in (("year,quarter,a", QUARTERS, lambda d: f"{d.year}.0,{1 + d.month // 3}.0"),
                                 ("a,year,month", MONTHS, lambda d: f"{d.day},{d.year},{d.month}")):
        rows = [f"{write(d)},{i * i % 7}" if header[0] == "y" else f"{i * i % 7},{d.year},{d.month}"
                for i, d in enumerate(dates)]
        (tmp_path / "x.csv").write_text("\n".join([header, *rows]))
        found = reading.read_table(tmp_path / "x.csv")
        assert found.dates == dates and found.columns == ["a"]


def test_numbers_of_shops_are_no_hours(tmp_path):
    rows = [f"{date.date()},{shop},{i}" for i, date in enumerate(DAYS) for shop in range(1, 6)]
    (tmp_path / "x.csv").write_text("\n".join(["date,shop,a", *rows]))
    with pytest.raises(utils.InputError, match="5 series below each other, told apart by column shop"):
        reading.read_table(tmp_path / "x.csv")


# ---------------------------------------------------------------------------------------------- steps
STEPS = [(HOURS, "hour", 24), ([HOURS[0] + i * timedelta(minutes=30) for i in range(400)], "half an hour", 48),
         (DAYS, "day", 7), ([date for date in DAYS if date.weekday() < 5], "business day", 5), (WEEKS, "week", 52),
         (MONTHS, "month", 12), ([end(date) for date in MONTHS], "month", 12), (QUARTERS, "quarter", 4),
         ([end(date + timedelta(days=62)) for date in QUARTERS], "quarter", 4), (YEARS, "year", 1),
         ([end(date.replace(month=12)) for date in YEARS], "year", 1),
         ([HOURS[0] + i * timedelta(seconds=15) for i in range(600)], "0:00:15", 4)]


@pytest.mark.parametrize("dates,name,period", STEPS)
def test_steps_have_a_period_and_go_on_as_they_were(tmp_path, dates, name, period):
    found = read(tmp_path, dates[:-20])
    assert (found.step.name, found.period) == (name, period) and found.dates == dates[:-20]
    assert [found.step.after(found.dates[-1], k) for k in range(1, 21)] == dates[-20:]
    assert read(tmp_path, dates, period=3).period == 3


# ---------------------------------------------------------------------------------------------- cells and columns
NUMBERS = {"1.5": 1.5, "1,234.5": 1234.5, "1,234,567": 1234567, "$3,625.00": 3625, "12 %": 12, "\u22122": -2,
           "1e3": 1000, "n/a": math.nan, "(101.5)": -101.5, "1\u202f000": 1000}


def test_numbers_as_people_write_them():
    for cell, value in NUMBERS.items():
        assert reading.number(cell) == value or math.isnan(value) and math.isnan(reading.number(cell))
    assert reading.number("1.234,5", ",") == 1234.5 and reading.number("47,8", ",") == 47.8
    for cell in ("1_000", "high", "1,5"):
        with pytest.raises(ValueError):
            reading.number(cell)


@pytest.mark.parametrize("separator,decimal", [(",", "."), (";", ","), (";", "."), ("\t", ","), ("|", "."), (" ", ".")])
def test_separators_and_decimal_commas_are_recognised(tmp_path, separator, decimal):
    found = read(tmp_path, DAYS, f"date{separator}a{separator}b", separator,
                 lambda i: f"{i / 8}{separator}{-i / 4}".replace(".", decimal))
    assert found.values.tolist() == [[i / 8, -i / 4] for i in range(80)]
    assert f"separator {separator!r}" in found.said[0] and ("decimal ','" in found.said[0]) == (decimal == ",")


def test_lines_above_the_header_are_passed_over_and_said(tmp_path):
    for above in ("# exported\n# unit: MW, GW\n", "Sales of all shops\n\n"):
        (tmp_path / "x.csv").write_text(above + "date,a\n" + "\n".join(f"{d.date()},{i}" for i, d in enumerate(DAYS)))
        found = reading.read_table(tmp_path / "x.csv")
        assert found.dates == DAYS and found.columns == ["a"] and "passed over: 2 lines above the header" in found.said
    (tmp_path / "x.csv").write_text("# exported\ndate,a\n2020-01-01,1\n2020-01-02\n2020-01-03,2\n2020-01-04,5")
    with pytest.raises(utils.InputError, match="line 4 has 1 cells"):
        reading.read_table(tmp_path / "x.csv")


def test_a_large_file_is_announced_before_it_is_read(tmp_path, capsys):
    start = datetime(2020, 1, 1)
    rows = [f"{start + timedelta(minutes=i)}{f',{i % 97}.4567' * 8}" for i in range(30_000)]
    (tmp_path / "x.csv").write_text("\n".join(["date,a,b,c,d,e,f,g,h", *rows]))
    table = load.read_series(str(tmp_path / "x.csv"))
    assert table.values.shape == (30_000, 8) and table.values[1, 0] == 1.4567
    assert re.match(r"reading .*x\.csv, 2 MB\n", capsys.readouterr().out)


def test_row_names_texts_and_empty_columns_are_left_out_and_columns_choose(tmp_path):
    lines = [f"{i},{date.date()},{i % 7},{i % 5},x,," for i, date in enumerate(DAYS)]
    (tmp_path / "x.csv").write_text("\n".join([",date,a,b,c,d,", *lines]))
    found = reading.read_table(tmp_path / "x.csv")
    assert found.columns == ["a", "b"] and "'c' (text)" in found.said[1] and "'d' (empty)" in found.said[1]
    assert reading.read_table(tmp_path / "x.csv", columns=["b"]).columns == ["b"]
    for columns, words in ((["z"], "no column z"), (["d"], "'d': empty"), (["c"], "'c': 'x' is no number")):
        with pytest.raises(utils.InputError, match=words):
            reading.read_table(tmp_path / "x.csv", columns=columns)
    (tmp_path / "r.csv").write_text('"date" "v"\n' + "\n".join(f'"{i}" "{d.date()}" {i}' for i, d in enumerate(DAYS)))
    assert reading.read_table(tmp_path / "r.csv").columns == ["v"]  # R's write.table: one name less than columns


def test_of_several_series_below_each_other_one_is_taken(tmp_path):
    lines = [f"{city},{date.date()},{i * k % 7}" for k, city in enumerate(("Bonn", "Ulm"), 1)
             for i, date in enumerate(DAYS)]
    (tmp_path / "x.csv").write_text("\n".join(["city,date,a", *lines]))
    with pytest.raises(utils.InputError, match="holds 2 series .* by column city; .* --where 'city=Bonn'"):
        reading.read_table(tmp_path / "x.csv")
    found = reading.read_table(tmp_path / "x.csv", where=["city=Ulm"])
    assert found.columns == ["a"] and found.values[:, 0].tolist() == [2 * i % 7 for i in range(80)]
    for where, words in (("city=Rom", "has Bonn, Ulm"), ("town=Ulm", "has city, date, a")):
        with pytest.raises(utils.InputError, match=words):
            reading.read_table(tmp_path / "x.csv", where=[where])


# ---------------------------------------------------------------------------------------------- holes
def test_few_holes_are_filled_and_said(tmp_path):
    """Two missing dates and two cells: on a line while training, and later by the value before."""
    gone = {10, 11, 70}
    cells = lambda i: "" if DAYS[i] == DAYS[20] else str(2 * i)  # noqa: E731
    (tmp_path / "x.csv").write_text("\n".join(["date,a", *(f"{d.date()},{cells(i)}" for i, d in enumerate(DAYS)
                                                          if i not in gone)]))
    found = reading.read_table(tmp_path / "x.csv")
    expected = [2.0 * i if i != 70 else 138.0 for i in range(80)]
    assert found.values[:, 0].tolist() == expected and found.dates == DAYS
    said, = (line for line in found.said if line.startswith("FILLED"))
    assert "3 rows, the first before line 12" in said and "1 (a 1), the first in line 20, column a" in said


def test_many_holes_are_refused_unless_they_are_to_be_filled(tmp_path):
    cells = lambda i: "NA" if i % 3 else str(i)  # noqa: E731
    with pytest.raises(utils.InputError, match=r"53 \(a 53\), the first in line 3, column a: .* --fill"):
        read(tmp_path, DAYS, cells=cells)
    found = read(tmp_path, DAYS, cells=cells, fill=True)
    assert found.values[:48, 0].tolist() == pytest.approx(list(range(46)) + [45, 45], abs=3)
    assert not found.values.isnan().any()


def test_holidays_are_holes_among_business_days(tmp_path):
    dates = [date for date in DAYS if date.weekday() < 5 and (date.month, date.day) not in ((12, 25), (1, 1))]
    found = read(tmp_path, dates)
    assert found.step.name == "business day" and len(found.dates) == len(dates) + 2
    assert any("gaps in the dates, else one business day apart: 2 rows" in line for line in found.said)


# ---------------------------------------------------------------------------------------------- sizes
def test_default_sizes_follow_the_length_in_whole_periods(tmp_path):
    table = read(tmp_path, MONTHS)  # 60 / 20 / 20
    assert load.sizes(table, None, None) == (12, 10) and load.sizes(table, 7, None) == (7, 10)
    for rows, period, expected in ((144, 12, (24, 12)), (1000, 24, (168, 96)), (10**5, 24, (336, 96)), (9, 1, (1, 1))):
        longer = table._replace(values=torch.zeros(rows, 1), period=period)
        T, P = load.sizes(longer, None, None)
        assert (T, P) == expected
    station = load.read_series("station")
    assert load.sizes(station, None, None, 720) == (720, 96)


def test_what_does_not_fit_names_what_would(tmp_path):
    table = read(tmp_path, MONTHS, cells=lambda i: str(i * i % 17))
    for T, P in ((60, 12), (12, 30), (300, 300)):
        with pytest.raises(utils.InputError, match=r"largest that fit: --lookback (\d+) --horizon (\d+)") as error:
            load.prepare(table, T, P)
        words = str(error.value).rstrip(".").split()
        T, P = int(words[-3]), int(words[-1])
        load.prepare(table, T, P)
        for larger in ((T + 1, P), (T, P + 1)):
            if larger[0] <= 300 and P < 20:
                with pytest.raises(utils.InputError):
                    load.prepare(table, *larger)
