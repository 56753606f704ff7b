"""Chapter 04, load.py, from_scratch.py, load_model.py, against scikit-learn, autograd, F and torch.optim."""

import csv
import hashlib
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REAL, ROOT, call_main, chapter, refusal

import utils

load, from_scratch, train, load_model = chapter("04_tabular", "load", "from_scratch", "train", "load_model")
FOLDER = ROOT / "04_tabular"


@pytest.fixture(scope="module")
def census():
    """The stand-in, encoded."""
    return load.load_data("census")


def shop(n=200, seed=0):
    """Header and rows of a small table: a number with gaps, a category with gaps, a code, and a target, yes or no."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        price = "" if rng.random() < 0.1 else f"{rng.normal(10, 3):.2f}"
        color = "?" if rng.random() < 0.1 else str(rng.choice(["red", "green", "blue"]))
        rows.append([price, color, f"{rng.integers(100, 105):05d}", "yes" if rng.random() < 0.3 else "no"])
    return ["price", "color", "zip", "sold"], rows


def write(path, header, rows, delimiter=",", end="\n"):
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=end).writerows([header, *rows])
    path.write_bytes(text.getvalue().encode())
    return str(path)


# ---------------------------------------------------------------------------------------------- Adult
NUMERIC = ["age", "fnlwgt", "education-num", "capital-gain", "capital-loss", "hours-per-week"]
ADULT_ROW = "39, State-gov, 77516, Bachelors, 13, Never-married, Sales, Not-in-family, White, Male, 2, 0, 40, ?, "


def fake_adult(folder, monkeypatch):
    """Two files like Adult's, with hashes of their own."""
    folder.mkdir(exist_ok=True)
    rows = (ADULT_ROW.replace("?", "Peru" if i % 3 else "?") + (">50K" if i % 4 == 0 else "<=50K") for i in range(40))
    texts = {"adult.data": "\n".join(rows) + "\n\n",
             "adult.test": "|1x3 Cross validator\n"
             + (ADULT_ROW.replace("?", "Cuba") + "<=50K.\n" + ADULT_ROW + ">50K.\n") * 5 + "\n"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    monkeypatch.setattr(load, "SHA256", hashes)
    monkeypatch.setattr(utils, "DATA_DIR", folder)
    monkeypatch.setattr(load, "URL", "http://127.0.0.1:9/")


def test_adults_two_files_have_no_header_a_remark_and_trailing_dots(tmp_path, monkeypatch):
    fake_adult(tmp_path, monkeypatch)
    data = load.load_data()
    assert [len(part.target) for part in data[:3]] == [32, 8, 10] and data.name == "adult" and not data.stand_in
    assert (data.schema["negative"], data.schema["positive"]) == ("<=50K", ">50K")
    assert data.test.target.tolist() == [0, 1] * 5 and data.train.target.sum() == 8 and data.val.target.sum() == 2
    assert data.schema["numeric"] == NUMERIC and len(data.schema["categorical"]) == 8
    country = data.schema["categorical"].index("native-country")
    assert data.test.categories[:, country].tolist() == [load.UNSEEN, load.NO_VALUE] * 5


def test_stand_in_only_where_adult_is_out_of_reach(tmp_path, monkeypatch, capsys):
    fake_adult(tmp_path, monkeypatch)
    whole = (tmp_path / "adult.test").read_bytes()
    (tmp_path / "adult.test").write_bytes(whole[:-5])
    with pytest.raises(utils.InputError, match="adult.test is not the expected file"):
        load.load_data()
    (tmp_path / "adult.test").unlink()
    with pytest.raises(utils.InputError, match="holds adult.data alone"):  # half a set is no reason to fall back
        load.load_data()
    (tmp_path / "adult.data").unlink()
    with pytest.raises(ConnectionError, match="--data census"):  # asked for by name
        load.load_data("adult")
    assert "STAND-IN" not in capsys.readouterr().out
    data = load.load_data()
    assert data.name == "census" and data.stand_in == "UCI Adult" and data.label == "census, stand-in"
    assert "STAND-IN" in capsys.readouterr().out


@pytest.mark.real("adult.data")
def test_the_real_files_split_as_the_papers_do(monkeypatch):
    monkeypatch.setattr(utils, "DATA_DIR", REAL)
    data = load.load_data("adult")
    assert [len(part.target) for part in data[:3]] == [26_048, 6_513, 16_281]
    assert data.train.target.sum() + data.val.target.sum() == 7841 and data.test.target.sum() == 3846
    assert len(data.schema["numeric"]) == 6 and len(data.schema["categorical"]) == 8
    for column, count in (("workclass", 8), ("education", 16), ("sex", 2), ("race", 5), ("occupation", 14)):
        assert len(data.schema["values"][data.schema["categorical"].index(column)]) == count
    assert 0.852 - 0.003 < ((load.linear_baseline(data)[:, 0] > 0) == (data.test.target == 1)).float().mean() < 0.856


# ---------------------------------------------------------------------------------------------- CSV files
@pytest.mark.parametrize("delimiter, end, start", [(",", "\n", ""), (";", "\r\n", ""), ("\t", "\n", "\ufeff")])
def test_csv_dialects_give_the_same_numbers(tmp_path, delimiter, end, start):
    header, rows = shop()
    rows[3][1] = "red, or, perhaps; green"  # quoted by the writer where it has to be
    expected = load.load_data(write(tmp_path / "a.csv", header, rows), "sold")
    path = tmp_path / "b.csv"
    write(path, header, rows, delimiter, end)
    path.write_bytes(start.encode() + path.read_bytes() + (end + "  " + end).encode())  # empty lines
    found = load.load_data(str(path), "sold")
    for a, b in zip(expected[:3], found[:3]):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert found.schema == expected.schema and found.name == "b.csv"


def test_types_are_inferred_said_and_overridable(tmp_path, capsys):
    path = write(tmp_path / "a.csv", *shop())
    data = load.load_data(path, "sold")
    out = capsys.readouterr().out
    assert "numeric   price, zip" in out and "category  color" in out and "positive is 'yes'" in out
    assert data.schema["numeric"] == ["price", "zip"] and data.schema["categorical"] == ["color", "price given"]
    data = load.load_data(path, "sold", ["zip=category", "color=ignore"])
    assert data.schema["numeric"] == ["price"] and data.schema["categorical"] == ["zip", "price given"]
    assert sorted(data.schema["values"][0]) == ["00100", "00101", "00102", "00103", "00104"]
    header, rows = shop()
    rows[7][0] = "cheap"
    load.load_data(write(tmp_path / "a.csv", header, rows), "sold")
    assert "'cheap' on line 9" in capsys.readouterr().out  # one word turns a column of numbers into categories


def bad(change):
    """A function that writes a small table with one mistake made by change(header, rows)."""

    def make(folder):
        header, rows = shop()
        change(header, rows)
        return write(folder / "bad.csv", header, rows)

    return make


def put(row, column, value):
    return bad(lambda header, rows: rows[row].__setitem__(column, value))


def column(k, value):
    return bad(lambda header, rows: [row.__setitem__(k, value(i)) for i, row in enumerate(rows)])


fine = bad(lambda *_: None)
BAD = {  # name: (what makes the file, further options, words of the message)
    "no header": (bad(lambda header, rows: header.__setitem__(slice(None), rows[1])), ["sold"], "line 1: '"),
    "header without a name": (bad(lambda header, rows: header.__setitem__(1, "")), ["sold"], "line 1: '' is no name"),
    "one name twice": (bad(lambda header, rows: header.__setitem__(0, "zip")), ["sold"],
                       "line 1: 'zip' is no name, or two columns have it"),
    "a short row": (bad(lambda header, rows: rows[4].pop()), ["sold"], "line 6: 3 values, but the header names 4"),
    "a long row": (bad(lambda header, rows: rows[5].append("x")), ["sold"], "line 7: 5 values"),
    "a row after a long value": (bad(lambda header, rows: (rows[0].__setitem__(1, "a\nb"), rows[1].pop())), ["sold"],
                                 "line 4: 3 values"),
    "a short row over two lines": (bad(lambda header, rows: rows.insert(2, ["1", "a\nb"])), ["sold"],
                                   "line 4: 2 values"),
    "target with one value": (column(3, lambda i: "yes"), ["sold"], "1 values, 'yes' in 200 (the first on line 2)"),
    "rare classes": (column(3, lambda i: "abc"[min(i, 2)]), ["sold"],
                     "has 3 values, 'a' in 1 (the first on line 2), 'b' in 1 (the first on line 3); it needs"),
    "free text as target": (column(3, lambda i: f"word {i}"), ["sold"], "has 200 values"),
    "no number": (fine, ["sold", [], "numbers"], "--task numbers: 'no' on line 2 is no number"),
    "no such positive": (fine, ["sold", [], None, "maybe"], "--positive maybe: the target has the values no, yes"),
    "target nearly always one": (column(3, lambda i: "yes" if i in (5, 9) else "no"), ["sold"],
                                 "'yes' in 2 (the first on line 7)"),
    "no target": (fine, [None], "--target is missing; the first line of"),
    "another target": (fine, ["bought"], "--target bought: no such column"),
    "all missing": (column(0, lambda i: ["", "NA", "nan", "?"][i % 4]), ["sold", ["price=numeric"]],
                    "column price has no value among the training rows (its first is on no line at all)"),
    "decimal comma among points": (put(3, 0, "3,5"), ["sold", ["price=numeric"]],
                                   "column price, line 5: '3,5' is no number"),
    "numeric by force": (fine, ["sold", ["color=numeric"]], "is no number"),
    "date by force": (fine, ["sold", ["color=date"]], "is no"),
    "too large": (put(3, 0, "1e400"), ["sold", ["price=numeric"]], "column price, line 5: '1e400' is no number"),
    "type of no column": (fine, ["sold", ["size=ignore"]], "--types size=ignore: write"),
    "type of the target": (fine, ["sold", ["sold=ignore"]], "there are the columns price, color, zip."),
    "no type": (fine, ["sold", ["zip"]], "--types zip: write COLUMN=numeric"),
    "nothing left": (fine, ["sold", ["price=ignore", "color=ignore", "zip=ignore"]], "no column is left"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_csv_files_get_one_sentence_that_names_the_line(tmp_path, name):
    make, options, words = BAD[name]
    path = make(tmp_path)
    with pytest.raises(utils.InputError) as error:
        load.load_data(path, *options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_column_without_a_value_in_the_training_rows(tmp_path):
    header, rows = shop()
    y = torch.tensor([float(row[3] == "yes") for row in rows])
    i = load.stratified(y, 40, load.SPLIT_SEED)[1][7].item()
    for k, row in enumerate(rows):
        row[0] = "5" if k == i else ""
    with pytest.raises(utils.InputError, match=f"price has no value among .* first is on line {i + 2}\\)"):
        load.load_data(write(tmp_path / "a.csv", header, rows), "sold")


@pytest.mark.parametrize("content, words", [
    (b"", "has no rows"), (b"a,b\n", "has no rows"),
    (b'a,b\n1,"2\n3,4\n', "is a quote missing"), (b"\x89PNG\r\n\x1a\n\x00\x00", "is no text"),
    (b'a,b\n1,"2"x\n', "line 2"),
])
def test_files_that_are_no_tables(tmp_path, content, words):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(utils.InputError, match=words):
        load.load_data(str(tmp_path / "a.csv"), "b")


# ---------------------------------------------------------------------------------------------- files of people
def columns_of(tmp_path, data: bytes, target="y"):
    (tmp_path / "a.csv").write_bytes(data)
    return load.read_csv(tmp_path / "a.csv", target).columns


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_separators_and_encodings(tmp_path, capsys, delimiter, encoding):
    rows = [["name", "x", "y"], ["Zo\u00eb", "1.5", "a"], ["Bj\u00f6rk", "2", "b"]]
    text = "\n".join(delimiter.join(row) for row in rows)
    assert columns_of(tmp_path, text.encode(encoding)) == {
        "name": ["Zo\u00eb", "Bj\u00f6rk"], "x": ["1.5", "2"], "y": ["a", "b"]}
    assert ("read as cp1252" in capsys.readouterr().out) == (encoding == "cp1252")


@pytest.mark.parametrize("first", ['"",x,y', "Unnamed: 0,x,y", "x,y"])
def test_an_index_without_a_name_is_dropped_and_said(tmp_path, capsys, first):
    assert columns_of(tmp_path, f"{first}\n0,5,a\n1,6,b\n".encode()) == {"x": ["5", "6"], "y": ["a", "b"]}
    assert "the first column has no name: an index, left out" in capsys.readouterr().out


@pytest.mark.parametrize("delimiter, cells, expected", [
    (",", ['"$3,625.00"', "$12.50", "-$1"], ["3625.00", "12.50", "-1"]), (",", ["12 %", "7%"], ["12", "7"]),
    (",", ["\u22125", "3"], ["-5", "3"]), (";", ["1.234,5", "0,25", "7"], ["1234.5", "0.25", "7"]),
    (";", ["3,625", "0,125"], ["3.625", "0.125"]), (",", ['"3,625"', '"12,000"'], ["3625", "12000"]),
    (",", ["1'234.50", "2"], ["1234.50", "2"]), (",", ["1 234", "5"], ["1234", "5"]),
    (",", ["None", "1.5", "NULL"], ["", "1.5", ""]), (",", ["NA", "ZA", "?"], ["", "ZA", ""]),
    (",", ["NA", "ZA", '""'], ["NA", "ZA", ""]), (",", ["555 1234", "x"], ["555 1234", "x"]),
])
def test_numbers_and_gaps_as_they_are_written(tmp_path, delimiter, cells, expected):
    text = f"v{delimiter}y\n" + "".join(f"{cell}{delimiter}a\n" for cell in cells)
    assert columns_of(tmp_path, text.encode())["v"] == expected


def test_dates_become_numbers_and_parts(tmp_path):
    for form, first, second in (("ISO", "2020-02-29 06:30", "2021-12-31"), ("%d.%m.%Y", "29.02.2020", "31.12.2021"),
                                ("%m/%d/%Y", "02/29/2020", "12/31/2021"), ("%d/%m/%Y", "29/02/2020", "31/12/2021")):
        path = write(tmp_path / "a.csv", ["when", "y"], [[first, "yes"], [second, "no"]] * 30)
        data = load.load_data(path, "y")
        schema = data.schema
        assert schema["dates"] == {"when": form}
        row = dict(zip(schema["numeric"], load.encode({"when": [first]}, schema).numeric[0].tolist()))
        assert (row["when month"], row["when weekday"]) == (2, 5)  # a Saturday
        assert row["when in days"] == pytest.approx(18_321, abs=1.6)  # since 1970, by this place's clock
        assert ("when hour" in row) == (form == "ISO")


def test_what_names_a_row_is_left_out_and_said(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = [[i, 7, f"text number {i}", f"{1000 + 17 * i}", rng.choice(["a", "b"]), rng.normal(),
             "yes" if i > 50 else "no"] for i in range(100)]
    path = write(tmp_path / "a.csv", ["row", "same", "text", "patient_id", "kind", "x", "y"], rows)
    data = load.load_data(path, "y")
    assert data.schema["numeric"] == ["x"] and data.schema["categorical"] == ["kind"]
    out = capsys.readouterr().out
    for words in ("row: a number for each row; --types row=category keeps it", "same: constant", "text: free text",
                  "patient_id: a number"):
        assert f"left out  {words}" in out
    assert load.load_data(path, "y", ["row=numeric"]).schema["numeric"] == ["row", "x"]


def test_targets_are_recognised_and_rows_without_one_dropped(tmp_path, capsys):
    def target(values, *more):
        return load.load_data(write(tmp_path / "a.csv", ["x", "y"], [[i % 7, v] for i, v in enumerate(values)]), "y",
                              None, *more)

    data = target(["5", "10"] * 20 + ["", "NA"])
    assert (data.schema["task"], data.schema["positive"]) == ("binary", "10")
    assert "2 rows have no y and are left out" in capsys.readouterr().out
    assert target(["5", "10"] * 20, None, "5").schema["positive"] == "5"
    data = target(["red"] * 3 + ["green"] * 30 + ["blue"] * 9)
    assert data.schema["classes"] == ["blue", "green", "red"] and data.schema["task"] == "classes"
    assert all(2 in part.target for part in data[:3])  # three rows: one in each part
    data = target([f"{i / 7:.3f}" for i in range(60)])
    assert data.schema["task"] == "numbers"
    y = np.array([i / 7 for i in range(60)])
    assert data.schema["scale"] == pytest.approx(y.std(), rel=0.3)
    back = torch.cat([part.target for part in data[:3]]) * data.schema["scale"] + data.schema["center"]
    assert sorted(back.tolist()) == pytest.approx(y.tolist(), abs=1e-3)
    assert target(["1", "2", "3"] * 20).schema["task"] == "classes"
    assert target(["1", "2", "3"] * 20, "numbers").schema["task"] == "numbers"


def test_a_model_from_python_and_new_rows_without_a_target(tmp_path):
    """The five lines of the README, for all three kinds of target."""
    rng = np.random.default_rng(0)
    for kind, make in (("binary", lambda x: "yes" if x > 0 else "no"),
                       ("classes", lambda x: "abc"[int(x > 0) + int(x > 1)]),
                       ("numbers", lambda x: f"{100 + 10 * x:.3f}")):
        rows = [[f"{x:.4f}", rng.choice(["red", "green"]), make(x)] for x in rng.normal(size=300)]
        path = write(tmp_path / "a.csv", ["x", "color", "y"], rows)
        call_main(train, "--data", path, "--target", "y", "--members", 5, "--epochs", 10, "--out", tmp_path)
        write(tmp_path / "new.csv", ["color", "id", "x"], [["red", 1, "-1.5"], ["violet", 2, "1.6"]])
        assert "wrote" in call_main(load_model, "--model", tmp_path / "model.pt", "--score", tmp_path / "new.csv",
                                    "--out", tmp_path / f"{kind}.csv")
        found = list(csv.reader((tmp_path / f"{kind}.csv").open()))
        assert found[0][0] == "y" and len(found) == 3

        model, saved = load_model.load_tabular(tmp_path / "model.pt")
        assert load_model.score(model, saved["schema"], tmp_path / "new.csv") == found
        part = load.encode({"x": ["-1.5", "1.6"], "color": ["red", "violet"]}, saved["schema"])
        p = load_model.predict(model, part, saved["schema"]["task"])
        if kind == "numbers":
            assert float(found[1][0]) < 95 < 105 < float(found[2][0])
            assert (p * saved["schema"]["scale"] + saved["schema"]["center"]).tolist() == pytest.approx(
                [float(row[0]) for row in found[1:]], abs=1e-4)
        else:
            assert [row[0] for row in found[1:]] == (["no", "yes"] if kind == "binary" else ["a", "c"])
            assert sum(map(float, found[1][1:])) == pytest.approx(1, abs=1e-5)
        assert "what moved it" in call_main(load_model, "--model", tmp_path / "model.pt", "--out", tmp_path, "--person",
                                            "x=1.2, color=red, or so")
    write(tmp_path / "new.csv", ["color", "x"], [["red", "cheap"]])
    assert "line 2: 'cheap' in column x is no number" in refusal(
        load_model, "--model", tmp_path / "model.pt", "--score", tmp_path / "new.csv", "--out", tmp_path)
    write(tmp_path / "new.csv", ["color"], [["red"]])
    assert "lacks the column x" in refusal(
        load_model, "--model", tmp_path / "model.pt", "--score", tmp_path / "new.csv", "--out", tmp_path)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(utils.InputError, match="no such file"):
        load.load_data(str(tmp_path / "a.csv"), "b")
    with pytest.raises(utils.InputError, match="is a folder"):
        load.load_data(str(tmp_path), "b")
    with pytest.raises(utils.InputError, match="belongs to a CSV file"):
        load.load_data("census", "sex")


# ---------------------------------------------------------------------------------------------- columns to numbers
def test_category_maps_and_medians_against_sklearn_fitted_on_train_alone(tmp_path):
    preprocessing, impute = pytest.importorskip("sklearn.preprocessing"), pytest.importorskip("sklearn.impute")
    header, rows = shop()
    rows[150][1] = "violet"  # among the rows that fit nothing
    table = load.read_csv(Path(write(tmp_path / "a.csv", header, rows)), "sold")
    schema = load.fit_schema(table, load.column_types(table), torch.arange(100), load.fit_target(table))
    part, rows = load.encode(table.columns, schema), np.array(rows)
    theirs = preprocessing.OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1).fit(rows[:100, 1:2])
    theirs = theirs.transform(rows[:, 1:2])[:, 0]
    mine = part.categories[:, 0].numpy()
    assert len(set(zip(mine, theirs))) == len(set(mine)) == len(set(theirs)) == 5  # one to one: ?, violet, 3 colours
    assert mine[150] == load.UNSEEN and (mine == load.NO_VALUE).tolist() == (rows[:, 1] == "?").tolist()
    assert mine[mine >= load.KNOWN].min() == 2 and mine.max() == 4
    numbers = np.where(rows[:, 0] == "", "nan", rows[:, 0]).astype(float)[:, None]
    theirs = impute.SimpleImputer(strategy="median").fit(numbers[:100]).transform(numbers)[:, 0]
    assert part.numeric[:, 0].tolist() == pytest.approx(theirs.tolist(), rel=1e-12)
    assert schema["categorical"] == ["color", "price given"]  # prices are missing here and there
    assert (part.categories[:, 1] == load.NO_VALUE).tolist() == (rows[:, 0] == "").tolist()
    assert part.target.tolist() == [float(row[3] == "yes") for row in rows]


def test_rows_to_validate_and_test_on_change_nothing_that_is_fitted(tmp_path):
    header, rows = shop()
    before = load.load_data(write(tmp_path / "a.csv", header, rows), "sold", ["zip=category"])
    y = torch.tensor([float(row[3] == "yes") for row in rows])
    rest, tested = load.stratified(y, 40, load.SPLIT_SEED)
    val = rest[load.stratified(y[rest], 32, load.SPLIT_SEED)[1]]
    for i in [*tested.tolist(), *val.tolist()]:
        rows[i][:3] = ["1e6", f"never seen {i % 2}", "99999"]
    after = load.load_data(write(tmp_path / "a.csv", header, rows), "sold", ["zip=category"])
    assert after.schema == before.schema and all(torch.equal(a, b) for a, b in zip(after.train, before.train))
    for part in (after.val, after.test):
        assert (part.categories[:, :2] == load.UNSEEN).all() and (part.numeric == 1e6).all()
    assert len(after.val.target) == 32 and len(after.test.target) == 40


def test_a_category_never_seen_is_said_with_its_line(tmp_path, capsys):
    header, rows = shop()
    y = torch.tensor([float(row[3] == "yes") for row in rows])
    i = load.stratified(y, 40, load.SPLIT_SEED)[1][7].item()  # a row to test on
    rows[i][1] = "ultraviolet"
    load.load_data(write(tmp_path / "a.csv", header, rows), "sold")
    assert (f"line {i + 2}: color 'ultraviolet' is in no training row, "
            f"or in too few; it counts as unseen\n") in capsys.readouterr().out
    for k in range(200):
        rows[k][1] = f"color {k}"
    data = load.load_data(write(tmp_path / "a.csv", header, rows), "sold", ["color=category"])
    assert ("is in no training row, "
            "or in too few; it counts as unseen, and so do 199 values further down") in capsys.readouterr().out
    assert (torch.cat([data.val.categories, data.test.categories])[:, 0] == load.UNSEEN).all()


def test_one_described_row_is_encoded_as_the_table_is(census):
    schema = census.schema
    columns = load.census(50, 3).columns
    part = load.encode(columns, schema)
    for i, row in enumerate(zip(*columns.values())):
        values = dict(zip(load.COLUMNS[:-1], row))
        if i % 2:
            values = {name: value for name, value in values.items() if value}  # left out is missing
        one = load.encode_row(values, schema)
        assert torch.equal(one.numeric[0], part.numeric[i]) and torch.equal(one.categories[0], part.categories[i])
    nothing = load.encode_row({}, schema)
    assert not nothing.categories.any() and nothing.numeric[0].tolist() == schema["median"]
    k = schema["categorical"].index("occupation")
    assert load.encode_row({"occupation": "Astronaut"}, schema).categories[0, k] == load.UNSEEN
    assert nothing.target.isnan().all()
    with pytest.raises(utils.InputError, match="no column 'shoe-size'; there are age"):
        load.encode_row({"shoe-size": "43"}, schema)
    for wrong in ("forty", "1,234", "inf", "1_0"):
        with pytest.raises(utils.InputError, match="age needs a number"):
            load.encode_row({"age": wrong}, schema)


def test_split_is_stratified_disjoint_complete_and_fixed():
    y = (torch.rand(1003, generator=torch.Generator().manual_seed(0)) < 0.24).float()
    a, b = load.stratified(y, 201, 0)
    assert len(b) == 201 and torch.equal(torch.cat([a, b]).sort().values, torch.arange(1003))
    assert torch.equal(a, a.sort().values) and torch.equal(b, b.sort().values)
    assert abs(y[b].sum() - 201 * y.mean()) <= 0.5  # as even as whole rows allow
    again, other = load.stratified(y, 201, 0)[1], load.stratified(y, 201, 1)[1]
    assert torch.equal(b, again) and not torch.equal(b, other)
    torch.manual_seed(5)
    assert torch.equal(b, load.stratified(y, 201, 0)[1])  # whatever seed a training run has set
    assert abs(b.float().mean() - 501) < 60  # from everywhere in the table


# ---------------------------------------------------------------------------------------------- transforms
def columns_of_all_kinds(n, seed):
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, generator=g)
    zeros = torch.where(torch.rand(n, generator=g) < 0.8, 0.0, normal.exp())
    ties = torch.randint(10, (n,), generator=g).float()
    return torch.stack([normal, normal.exp() * 1e4, zeros, -zeros, ties, torch.full((n,), 3.0)], 1)


def test_standardise_against_sklearn():
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    train, test = columns_of_all_kinds(500, 0), columns_of_all_kinds(200, 1)
    theirs = preprocessing.StandardScaler().fit(train.double().numpy()).transform(test.double().numpy())
    torch.testing.assert_close(load.standardise(test, load.fit_standard(train)), torch.from_numpy(theirs).float())


@pytest.mark.parametrize("n, quantiles", [(3000, 1000), (300, 1000), (3000, 10)])
def test_quantile_transform_against_sklearn(n, quantiles):
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    train, test = columns_of_all_kinds(n, 0), columns_of_all_kinds(500, 1)  # also beyond the range of train
    theirs = preprocessing.QuantileTransformer(n_quantiles=min(n, quantiles), output_distribution="normal",
                                               subsample=None).fit(train.double().numpy())
    for x in (train, test):
        expected = torch.from_numpy(theirs.transform(x.double().numpy())).float()
        mine = load.to_normal(x, load.fit_quantiles(train, quantiles))
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


def test_piecewise_linear_encoding_is_a_thermometer():
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    train, test = columns_of_all_kinds(2000, 0), columns_of_all_kinds(300, 1)
    bins = load.fit_bins(train, 16)
    code = load.piecewise_linear(test, bins)
    assert code.shape == (300, 6, 16)
    for f, edges in enumerate(bins):
        n = len(edges) - 1
        rebuilt = edges[0] + code[:, f, :n].double() @ edges.diff()  # nothing is lost, also beyond the last edges
        torch.testing.assert_close(rebuilt.float(), test[:, f], atol=1e-3, rtol=1e-4)
        assert not code[:, f, n:].any() and (code[:, f, 1 : n - 1] >= 0).all() and (code[:, f, : n - 1] <= 1).all()
        assert n < 2 or (code[:, f, : n - 1] >= code[:, f, 1:n]).logical_or(code[:, f, 1:n] <= 0).all()
    assert len(bins[5]) == 2 and not load.piecewise_linear(train, bins)[:, 5].any()  # the constant column says nothing
    judge = preprocessing.KBinsDiscretizer(16, encode="ordinal", strategy="quantile",
                                           quantile_method="linear").fit(train[:, :2].double().numpy())
    which = torch.from_numpy(judge.transform(test[:, :2].double().numpy()))
    assert torch.equal((code[:, :2, :-1] >= 1).sum(2).double(), which)  # full bins before the one that x is in


# ---------------------------------------------------------------------------------------------- measures, baselines
def test_auc_against_sklearn_with_ties_and_without():
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(0)
    y = (torch.rand(500, generator=g) < 0.3).float()
    for score in (torch.randn(500, generator=g) + y, (3 * torch.randn(500, generator=g) + y).round(), torch.zeros(500)):
        assert load.roc_auc(score, y) == pytest.approx(metrics.roc_auc_score(y, score), abs=1e-12)
    assert np.isnan(load.roc_auc(score, torch.ones(500)))


def test_baselines_against_sklearn(census):
    linear, dummy = pytest.importorskip("sklearn.linear_model"), pytest.importorskip("sklearn.dummy")
    small = census._replace(train=load.Part(*(t[:2000] for t in census.train)))
    fitted = load.fit_standard(small.train.numeric)
    sizes = [len(values) + 2 for values in census.schema["values"]]
    x, test = (load.one_hot(part, sizes, fitted).numpy() for part in (small.rest, small.test))
    assert x.shape[1] == 6 + sum(sizes) + 1
    assert (x[:, 6:-1].sum(1) == 8).all() and (x[:, -1] == 1).all()
    theirs = linear.LogisticRegression(tol=1e-10, max_iter=2000).fit(x[:, :-1], small.rest.target.numpy())
    assert load.linear_baseline(small)[:, 0].tolist() == pytest.approx(
        theirs.decision_function(test[:, :-1]).tolist(), abs=1e-3)
    one = torch.eye(5, dtype=torch.float64)
    assert load.one_hot(load.Part(torch.zeros(4, 0, dtype=torch.float64), torch.tensor([[0], [1], [2], [9]]),
                                  torch.zeros(4)), [12], torch.zeros(2, 0), most=3)[:, :-1].tolist() == [
        one[0].tolist(), one[1].tolist(), one[2].tolist(), one[1].tolist()]  # beyond the three most frequent: unseen
    majority = dummy.DummyClassifier(strategy="most_frequent").fit(x, small.rest.target.numpy())
    assert load.majority_baseline(small) == pytest.approx(majority.score(test, small.test.target.numpy()))


# ---------------------------------------------------------------------------------------------- the census
def test_census_is_what_it_says(census):
    assert [len(part.target) for part in census[:3]] == [12_000, 3_000, 10_000] and census.stand_in
    assert census.schema["numeric"] == NUMERIC
    assert len(census.schema["categorical"]) == 8
    columns, again, other = (load.census(300, seed).columns for seed in (1, 1, 2))
    assert columns == again and columns != other
    assert list(columns) == load.COLUMNS and all(len(column) == 300 for column in columns.values())
    by_name = {name: np.array(column) for name, column in columns.items()}
    assert (by_name["age"].astype(int) >= 17).all() and "" in by_name["workclass"]
    assert set(by_name["sex"][by_name["relationship"] == "Husband"]) == {"Male"}
    for degree, years in zip(by_name["education"], by_name["education-num"]):
        assert load.EDUCATION[int(years) - 1] == degree


def test_census_probabilities_are_those_of_its_incomes():
    table = load.census(60_000, 7)
    p, y = table.p, np.array(table.columns["income"]) == ">50K"
    for low, high in zip(np.linspace(0, 0.9, 10), np.linspace(0.1, 1, 10)):
        here = (p >= low) & (p < high)
        error = (p[here] * (1 - p[here])).sum() ** 0.5
        assert here.sum() > 500 and abs(y[here].sum() - p[here].sum()) < 4 * error  # four standard deviations
    ## p must be a function of what the table shows: equal rows, equal p. Weight, race, country do not count.
    seen, shared = {}, 0
    keep = [name for name in load.COLUMNS[:-1] if name not in ("fnlwgt", "race", "native-country", "sex")]
    for key, value in zip(zip(*(table.columns[name] for name in keep)), p):
        shared += key in seen
        assert seen.setdefault(key, value) == pytest.approx(value, abs=1e-12)
    assert shared > 1000 and any("" in key for key in seen)


def test_nothing_does_better_than_the_known_model(census):
    ensemble = pytest.importorskip("sklearn.ensemble")
    x, test = (torch.cat([part.numeric, part.categories.float()], 1).numpy() for part in (census.train, census.test))
    trees = ensemble.HistGradientBoostingClassifier(categorical_features=list(range(6, 14)), random_state=0)
    score = trees.fit(x, census.train.target.numpy()).decision_function(test)
    auc = load.roc_auc(torch.from_numpy(score), census.test.target)
    linear = load.roc_auc(load.linear_baseline(census)[:, 0], census.test.target)
    assert 0.85 < linear < auc - 0.01 and auc < census.best_auc  # trees find more than a line, and less than all
    accuracy = ((score > 0) == (census.test.target.numpy() == 1)).mean()
    assert load.majority_baseline(census) + 0.05 < accuracy < census.best_accuracy
    p, y = torch.from_numpy(load.census().p[15_000:]), census.test.target
    assert census.best_auc == pytest.approx(load.roc_auc(p, y))
    assert census.best_accuracy == pytest.approx(((p > 0.5) == (y == 1)).double().mean().item())
    g = torch.Generator().manual_seed(0)
    for size in (0.1, 0.3, 1.0):  # any other order of the rows loses
        worse = [load.roc_auc(p.logit() + size * torch.randn(len(p), generator=g, dtype=torch.float64), y)
                 for _ in range(5)]
        assert np.mean(worse) < census.best_auc


# ---------------------------------------------------------------------------------------------- from_scratch.py
def test_all_is_equal_to_pytorch():
    errors = from_scratch.check_against_pytorch()
    assert len(errors) == 9 and max(errors.values()) < 1e-13, errors


def test_a_value_that_did_not_occur_gets_no_gradient_and_one_that_did_twice_gets_both():
    dy = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    gradient = from_scratch.embed_backward(dy, torch.tensor([2, 0, 2]), 4)
    assert gradient.tolist() == [[3, 4], [0, 0], [6, 8], [0, 0]]


def test_dropout_zeroes_the_share_keeps_the_mean_and_sends_back_through_its_mask():
    g = torch.Generator().manual_seed(0)
    x = torch.ones(200_000)
    y, m = from_scratch.dropout(x, 0.3, g)
    assert (y == 0).float().mean() == pytest.approx(0.3, abs=0.005) and y.mean() == pytest.approx(1, abs=0.01)
    assert y.unique().tolist() == [0, pytest.approx(1 / 0.7)]
    reference = F.dropout(x, 0.3)  # another draw, the same distribution
    assert reference.mean() == pytest.approx(y.mean().item(), abs=0.01)
    assert reference.std() == pytest.approx(y.std().item(), abs=0.01)
    assert torch.equal(from_scratch.dropout(x, 0.0)[0], x)
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    y, m = from_scratch.dropout(x, 0.5, g)
    dy = torch.randn(50, dtype=torch.float64)
    y.backward(dy)
    torch.testing.assert_close(from_scratch.dropout_backward(dy, m), x.grad)
    assert not torch.equal(m, from_scratch.dropout(x, 0.5, g)[1])  # another mask each time


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_without_overflow_against_pytorch_and_where_the_typed_formula_breaks(dtype):
    z = torch.tensor([-1e5, -1000, -100, -20, -1, 0, 1, 20, 100, 1000, 1e5], dtype=dtype)
    for y in (torch.zeros_like(z), torch.ones_like(z), torch.full_like(z, 0.3)):  # soft targets as well
        leaf = z.clone().requires_grad_()
        theirs = F.binary_cross_entropy_with_logits(leaf, y)
        theirs.backward()
        loss, dz = from_scratch.bce_with_logits(z, y)
        torch.testing.assert_close(loss, theirs)
        torch.testing.assert_close(dz, leaf.grad)
        each = torch.stack([from_scratch.bce_with_logits(a[None], b[None])[0] for a, b in zip(z, y)])
        torch.testing.assert_close(each, F.binary_cross_entropy_with_logits(z, y, reduction="none"))
        assert each.isfinite().all() and not from_scratch.naive_bce(z, y).isfinite().all()
    near = torch.linspace(-5, 5, 11, dtype=dtype)
    torch.testing.assert_close(from_scratch.naive_bce(near, near.sign().clamp(min=0)).mean(),
                               from_scratch.bce_with_logits(near, near.sign().clamp(min=0))[0])


@pytest.mark.parametrize("decay, decoupled", [(0.0, True), (0.1, True), (0.1, False)])
def test_a_hundred_steps_of_adam_on_several_tensors(decay, decoupled):
    torch.manual_seed(0)
    weights = {"a": torch.randn(5, 3), "b": torch.randn(4) * 100}
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    theirs, state = kind(leaves.values(), lr=0.03, betas=(0.8, 0.99), eps=1e-6, weight_decay=decay), {}
    for step in range(100):
        gradients = {name: torch.randn_like(w) * 10.0 ** (step % 7 - 4) for name, w in weights.items()}
        gradients["a"][0] = 0  # a category that never comes
        from_scratch.adam_step(weights, gradients, state, 0.03, 0.8, 0.99, 1e-6, decay, decoupled)
        for name, leaf in leaves.items():
            leaf.grad = gradients[name].clone()
        theirs.step()
    for name, w in weights.items():
        torch.testing.assert_close(w, leaves[name].detach(), atol=1e-5, rtol=1e-5)
    assert state["t"] == 100


@pytest.mark.parametrize("model", ["logistic", "mlp"])
def test_gradients_of_both_models_against_finite_differences(model):
    g = torch.Generator().manual_seed(0)
    x, index = torch.randn(6, 3, generator=g).double(), torch.randint(9, (6, 4), generator=g)
    y = torch.tensor([0.0, 1, 1, 0, 1, 0]).double()
    if model == "mlp":
        w, forward, backward = (from_scratch.init_mlp(3, 4, 9, 2, 8, g), from_scratch.mlp_forward,
                                from_scratch.mlp_backward)
    else:
        w, forward, backward = (from_scratch.init_logistic(3, 9), from_scratch.logistic_forward,
                                from_scratch.logistic_backward)
    w = {name: t.double() + 0.1 * torch.randn(t.shape, generator=g).double() for name, t in w.items()}

    def loss():
        z, saved = forward(w, x, index, 0.3, torch.Generator().manual_seed(1))  # the same mask every time
        value, dz = from_scratch.bce_with_logits(z, y)
        return value.item(), dz, saved

    _, dz, saved = loss()
    gradients = backward(w, dz, saved)
    assert gradients.keys() == w.keys()
    for name, t in w.items():
        assert gradients[name].shape == t.shape
        for i in range(t.numel()):
            flat, old = t.view(-1), t.view(-1)[i].item()
            flat[i] = old + 1e-6
            up = loss()[0]
            flat[i] = old - 1e-6
            down = loss()[0]
            flat[i] = old
            assert gradients[name].reshape(-1)[i] == pytest.approx((up - down) / 2e-6, abs=1e-7), (name, i)


def test_one_batch_can_be_overfitted():
    g = torch.Generator().manual_seed(0)
    x, index, y = torch.randn(32, 3, generator=g), torch.randint(20, (32, 4), generator=g), torch.arange(32.0) % 2
    w, state = from_scratch.init_mlp(3, 4, 20, 4, 64, g), {}
    for _ in range(200):
        z, saved = from_scratch.mlp_forward(w, x, index)
        loss, dz = from_scratch.bce_with_logits(z, y)
        from_scratch.adam_step(w, from_scratch.mlp_backward(w, dz, saved), state, 0.01)
    assert loss < 0.01


# ---------------------------------------------------------------------------------------------- load_model.py: curves
def guesses(n=1000, ties=False):
    """Probabilities that sort the targets well but not perfectly."""
    g = torch.Generator().manual_seed(0)
    y = (torch.rand(n, generator=g) < 0.3).float()
    p = (1.5 * torch.randn(n, generator=g, dtype=torch.float64) + 2 * y - 1).sigmoid()
    return (p * 20).round() / 20 if ties else p, y


@pytest.mark.parametrize("ties", [False, True])
def test_curves_against_sklearn(ties):
    metrics, curves = pytest.importorskip("sklearn.metrics"), pytest.importorskip("sklearn.calibration")
    p, y = guesses(ties=ties)
    close = lambda mine, theirs: np.testing.assert_allclose(mine.numpy(), theirs, atol=1e-12)  # noqa: E731
    fpr, tpr, _ = metrics.roc_curve(y, p, drop_intermediate=False)
    for mine, theirs in zip(load_model.roc_curve(p, y), (fpr, tpr)):
        close(mine, theirs)
    assert torch.trapezoid(*load_model.roc_curve(p, y)[::-1]).item() == pytest.approx(load.roc_auc(p, y))
    precision, recall, thresholds = metrics.precision_recall_curve(y, p)
    for mine, theirs in zip(load_model.precision_recall(p, y), (precision[:-1], recall[:-1], thresholds)):
        close(mine, theirs[::-1])
    assert load_model.average_precision(p, y) == pytest.approx(metrics.average_precision_score(y, p))
    mean, share, count = load_model.calibration(p, y, 8)
    theirs = curves.calibration_curve(y, p, n_bins=8)
    close(share, theirs[0])
    close(mean, theirs[1])
    assert count.sum() == len(y) and len(count) == 8
    near = p[p > 0.9]
    assert len(load_model.calibration(near, y[p > 0.9], 8)[0]) == 1  # empty bins are left out


def test_calibration_error_tells_a_scale_that_auc_does_not():
    g = torch.Generator().manual_seed(0)
    p = torch.rand(200_000, generator=g, dtype=torch.float64)
    y = (torch.rand(len(p), generator=g) < p).float()
    assert load_model.calibration_error(p, y) < 0.01
    assert load_model.calibration_error(p / 2, y) == pytest.approx(0.25, abs=0.01)
    assert load.roc_auc(p / 2, y) == load.roc_auc(p, y)


@pytest.mark.parametrize("ties", [False, True])
def test_threshold_has_the_best_f1_of_all(ties):
    metrics = pytest.importorskip("sklearn.metrics")
    p, y = guesses(200, ties)
    found = metrics.f1_score(y, p > load_model.best_threshold(p, y))
    tried = [metrics.f1_score(y, p > t) for t in [*p.tolist(), -1.0]]
    assert found == pytest.approx(max(tried), abs=1e-12) and found > metrics.f1_score(y, p > 0.5)
    assert 0 < load_model.best_threshold(torch.tensor([0.4, 0.6]).double(), torch.ones(2)) < 0.4  # everyone is named


# ---------------------------------------------------------------------------------------------- load_model.py: columns
@pytest.fixture(scope="module")
def table():
    """A table of 2,000 rows: three numbers, one of them also there as a word, and two columns of categories."""
    g = torch.Generator().manual_seed(0)
    size = torch.randint(1, 5, (2000,), generator=g)
    numeric = torch.stack([torch.randn(2000, generator=g), size, torch.randn(2000, generator=g) * 9], 1).double()
    color = torch.randint(2, 5, (2000,), generator=g)
    color[:100] = load.NO_VALUE
    part = load.Part(numeric, torch.stack([size + 1, color, (color > 2) + 2], 1), torch.zeros(2000))
    part = part._replace(target=(torch.rand(2000, generator=g) < numeric[:, 0].sigmoid()).float())
    schema = {"numeric": ["x", "size", "noise"], "median": [0.0, 2.0, 0.0], "categorical": ["name", "color", "dark"],
              "values": [["S", "M", "L", "XL"], ["red", "green", "blue"], ["no", "yes"]], "target": "sold",
              "dates": {}, "gaps": [], "task": "binary", "classes": ["no", "yes"], "negative": "no", "positive": "yes"}
    return load.Data(part, part, part, torch.zeros(4000).long(), schema, "shop.csv", "shop.csv")


def test_matrix_and_part_are_inverse(table):
    matrix = load_model.to_matrix(table.train)
    back = load_model.to_part(matrix, table.schema)
    assert torch.equal(back.numeric, table.train.numeric) and torch.equal(back.categories, table.train.categories)
    assert matrix.shape == (2000, 6) and back.categories.dtype == torch.int64


def test_columns_that_tell_each_other_are_tied_and_only_those(table, census):
    matrix = load_model.to_matrix(table.train)
    assert load_model.tied_columns(matrix) == [[0], [1, 3], [2], [4], [5]]  # dark follows from color, and not back
    matrix[7, 3] = 5 - matrix[7, 3] + 2  # one exception
    assert [1, 3] not in load_model.tied_columns(matrix)
    assert load_model.tied_columns(load_model.to_matrix(census.train)) == [
        [0], [1], [2, 7], [3], [4], [5], [6], [8], [9], [10], [11], [12], [13]]  # education-num and education


def test_permutation_importance_against_sklearn(table, monkeypatch):
    inspection, base = pytest.importorskip("sklearn.inspection"), pytest.importorskip("sklearn.base")

    def predict(model, part, task):  # looks at x and color, and is lost where name and size don't fit
        strange = part.categories[:, 0] != part.numeric[:, 1] + 1
        return (2 * part.numeric[:, 0] + 0.3 * part.categories[:, 1] - 9 * strange).double().sigmoid()

    monkeypatch.setattr(load_model, "predict", predict)
    groups = [[0], [1, 3], [2], [4], [5]]
    lost = load_model.permutation_importance(None, table.train, table.schema, groups, 20, 0)
    assert lost.shape == (5, 20) and not lost[[1, 2, 4]].any()  # name and size move together

    class Model(base.ClassifierMixin, base.BaseEstimator):
        classes_ = np.array([0, 1])

        def fit(self, x, y):
            return self

        def predict_proba(self, x):
            p = predict(None, load_model.to_part(torch.from_numpy(x), table.schema), "binary").numpy()
            return np.stack([1 - p, p], 1)

    theirs = inspection.permutation_importance(Model(), load_model.to_matrix(table.train).numpy(),
                                               table.train.target.numpy(), scoring="roc_auc", n_repeats=20)
    assert theirs.importances_mean[1] > 0.05  # not so in scikit-learn, which takes each column by itself
    for g, group in enumerate(groups):
        if len(group) > 1:
            continue
        error = 5 * (theirs.importances_std[group[0]] ** 2 / 20 * 2) ** 0.5 + 1e-12
        assert lost[g].mean().item() == pytest.approx(theirs.importances_mean[group[0]], abs=error)
    assert lost[0].mean() > 0.1


def test_pca_against_sklearn():
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = torch.randn(12, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    judge = decomposition.PCA(2).fit(x.numpy())
    places, shares = load_model.pca(x)
    theirs = torch.from_numpy(judge.transform(x.numpy()))
    torch.testing.assert_close(places.abs(), theirs.abs())  # a direction may point either way
    assert (places * theirs).sum(0).abs().tolist() == pytest.approx((theirs**2).sum(0).tolist())
    assert shares.tolist() == pytest.approx(judge.explained_variance_ratio_.tolist())


def test_figures_by_group_against_sklearn(table):
    metrics = pytest.importorskip("sklearn.metrics")
    p = torch.rand(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups = load_model.by_group(p, table.test, table.schema, "color", 0.4)
    assert list(groups) == ["(missing)", "red", "green", "blue"] and groups["(missing)"]["rows"] == 100
    assert sum(group["rows"] for group in groups.values()) == 2000
    rows = (table.test.categories[:, 1] == 3).numpy()
    y, said = table.test.target.numpy()[rows], p.numpy()[rows] > 0.4
    green = groups["green"]
    assert green["positive"] == pytest.approx(y.mean()) and green["named"] == pytest.approx(said.mean())
    assert green["accuracy"] == pytest.approx(metrics.accuracy_score(y, said))
    assert green["recall"] == pytest.approx(metrics.recall_score(y, said))
    assert green["auc"] == pytest.approx(metrics.roc_auc_score(y, p.numpy()[rows]))


# ---------------------------------------------------------------------------------------------- load_model.py: a person
def test_what_is_said_of_a_person(table, capsys):
    groups = load_model.tied_columns(load_model.to_matrix(table.train))
    read = lambda text: load_model.read_person(text, table, groups)  # noqa: E731
    person = read("x=0.5, name=L, color=?")
    assert person.given == [[0], [1, 3], [4]] and person.words == {0: "0.5", 3: "L", 4: "?", 1: "3"}
    assert person.row.tolist() == [0.5, 3, 0, 4, load.NO_VALUE, load.NO_VALUE]
    assert "size=3 follows from name" in capsys.readouterr().out
    person = read("size=2,dark=?, x = ")  # x and dark are never missing in training: nothing is known of them
    assert person.given == [[1, 3]] and person.words[3] == "M"
    assert "name=M follows from size" in capsys.readouterr().out
    ours = table._replace(train=table.train._replace(categories=table.train.categories.clone()))
    ours.train.categories[ours.train.numeric[:, 1] == 3] = load.NO_VALUE  # now size=3 goes with no name, and no colour
    read_ours = lambda text: load_model.read_person(text, ours, [[1, 3]])  # noqa: E731
    assert read_ours("size=3").words[3] == "(missing)"
    assert "name=(missing) follows from size" in capsys.readouterr().out
    person = read("name=XXXL, x=1e6")
    assert person.given == [[0], [3]] and person.row[3] == load.UNSEEN
    out = capsys.readouterr().out
    assert "name=XXXL was in no training row" in out and "x=1e6 lies outside what training saw, -" in out
    for text, words in (("x", "'x' is no COLUMN=VALUE"), ("x=1, x=2", "x is given twice"), ("", "'' is no COLUMN"),
                        ("y=1", "no column 'y'; there are x, size"), ("x=red", "x needs a number")):
        with pytest.raises(utils.InputError, match=words):
            read(text)


def test_what_is_not_known_of_a_person_comes_from_the_rows_most_like_it(table):
    matrix = load_model.to_matrix(table.train)
    person = load_model.Person(matrix[500], [[4], [0]], {4: "", 0: ""})
    rows = load_model.fill_in(person, table, 3000, torch.Generator().manual_seed(0), nearest=50)
    assert (rows[:, [0, 4]] == matrix[500, [0, 4]]).all()
    share = torch.tensor([(matrix[:, 0] < x).double().mean() for x in matrix[:, 0]])
    distance = (share - share[500]).abs() + (matrix[:, 4] != matrix[500, 4])
    near = distance.argsort()[:50]
    assert {tuple(row) for row in rows[:, 1:4].tolist()} == {tuple(row) for row in matrix[near][:, 1:4].tolist()}
    assert len(rows[:, 2].unique()) == 50  # all of them, in turn


def contributions(table, monkeypatch, f, row, groups, samples=4000):
    """load_model.contributions for a model that is the function f of the matrix."""
    return load_model.contributions(f, row.expand(samples, -1).clone(), groups, table,
                                    torch.Generator().manual_seed(0))


def test_shares_of_a_sum_are_its_terms_and_always_sum_to_the_difference(table, monkeypatch):
    matrix = load_model.to_matrix(table.train)
    groups, row, w = [[0], [1, 3], [2], [4], [5]], matrix[3], torch.tensor([0.3, -0.2, 0.05, 0.1, 0.0, 1.0]).double()
    p, mean, shares, alone = contributions(table, monkeypatch, lambda m: m @ w, row, groups)
    expected = [((row - matrix.mean(0)) * w)[group].sum().item() for group in groups]
    assert p == pytest.approx((row @ w).item()) and p - mean == pytest.approx(shares.sum().item())
    assert shares.tolist() == pytest.approx(expected, abs=0.05) and torch.allclose(shares, alone)
    f = lambda m: (m @ w).sigmoid() * (m[:, 4] + m[:, 0].cos())  # noqa: E731
    p, mean, shares, alone = contributions(table, monkeypatch, f, row, groups, 50)
    assert p - mean == pytest.approx(shares.sum().item()) and not torch.allclose(shares, alone, atol=1e-3)


def test_shares_against_shapleys_formula_over_all_subsets(table, monkeypatch):
    matrix = load_model.to_matrix(table.train)
    groups, row = [[0], [1, 3], [2, 4, 5]], matrix[11]
    f = lambda m: (m[:, 0] * m[:, 1] + 0.1 * m[:, 2] * (m[:, 4] - m[:, 0])).sigmoid()  # noqa: E731
    _, _, shares, alone = contributions(table, monkeypatch, f, row, groups, 20_000)

    def value(known):  # mean over all training rows, with what is known put in
        rows = matrix.clone()
        for g in known:
            rows[:, groups[g]] = row[groups[g]]
        return f(rows).mean().item()

    for g in range(3):
        others, total = [o for o in range(3) if o != g], 0.0
        for n, weight in ((0, 1 / 3), (1, 1 / 6), (2, 1 / 3)):
            total += weight * sum(value((*some, g)) - value(some) for some in itertools.combinations(others, n))
        assert shares[g].item() == pytest.approx(total, abs=0.015)
        assert alone[g].item() == pytest.approx(value(range(3)) - value(others), abs=0.015)


def test_of_two_values_that_say_the_same_each_gets_half_and_alone_neither_shows(table, monkeypatch):
    matrix = load_model.to_matrix(table.train)
    row = matrix[(matrix[:, 4] == 2).nonzero()[0, 0]].clone()  # red; not dark
    f = lambda m: ((m[:, 4] == 2) | (m[:, 2] > 1000)).double()  # noqa: E731
    row[2] = 2000  # no training row has as much noise
    p, mean, shares, alone = contributions(table, monkeypatch, f, row, [[0], [1, 3], [2], [4], [5]])
    assert p == 1 and mean == pytest.approx((matrix[:, 4] == 2).double().mean().item(), abs=0.03)
    assert shares[2].item() == pytest.approx(shares[3].item(), abs=0.03) and shares[2] > 0.25
    assert not alone.any()  # take one away, and the other still says it


# ---------------------------------------------------------------------------------------------- load_model.py: as used
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model of the census, and what train.py printed."""
    out = tmp_path_factory.mktemp("trained")
    call_main(train, "--data", "census", "--members", 5, "--hidden", 16, "--epochs", 1, "--lr", 0.01, "--device", "cpu",
              "--out", out)
    return out


def test_the_saved_model_gives_the_reported_figures_and_knows_its_columns(trained, census):
    model, saved = load_model.load_tabular(trained / "model.pt")
    assert saved["schema"] == census.schema
    p = load_model.predict(model, census.test, "binary")
    assert load.roc_auc(p, census.test.target) == pytest.approx(saved["metrics"]["test_auc"], abs=1e-9)
    k = census.schema["categorical"].index("occupation")
    places = load_model.value_embeddings(model, k, len(census.schema["values"][k])).clone()
    assert places.shape[0] == len(census.schema["values"][k])
    with torch.no_grad():  # move one value's embedding: only rows of that value change
        model.table[int(model.first[k]) + load.KNOWN + 3] += 1
    moved = load_model.predict(model, census.test, "binary") != p
    assert torch.equal(moved, census.test.categories[:, k] == load.KNOWN + 3)
    assert (load_model.value_embeddings(model, k, len(places)) != places).any(1).nonzero().tolist() == [[3]]


def test_load_model_shows_all_and_refuses_what_it_must(trained, tmp_path, capsys):
    model = ["--model", trained / "model.pt", "--out", tmp_path]
    out = call_main(load_model, *model, "--repeats", 1)
    assert "best F1 on val" in out and "came true" in out and out.count("STAND-IN") == 2
    for word in ("Female", "Amer-Indian-Eskimo", "education-num and education"):
        assert word in out
    person = call_main(load_model, *model, "--person", "age=45, education=Masters, relationship=Wife")
    assert "education-num=14 follows from education" in person and "not said, and averaged" in person
    p, mean = (float(part.split("%")[0].split()[-1]) for part in person.split("probability of")[1].split(";")[:2])
    total = float(person.split("all together")[1].split("%")[0])
    assert p - mean == pytest.approx(total, abs=0.21)  # three roundings
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "embeddings.png", "importance.png",
                                                                "person.png"]
    assert "no column 'shoe'" in refusal(load_model, *model, "--person", "shoe=43")
    assert "--by age: no such category column" in refusal(load_model, *model, "--by", "age")
    assert "does not exist" in refusal(load_model, *model, "--model", tmp_path / "none.pt")
    path = write(tmp_path / "a.csv", *shop())
    assert "lacks columns that the model was trained on; give census" in refusal(load_model, *model, "--data", path)
    with pytest.raises(SystemExit):
        call_main(load_model, *model, "--repeats", 0)
    assert "--repeats: 0 is not in [1, inf)" in capsys.readouterr().err
    old = utils.load_checkpoint(trained / "model.pt", train.SCRIPT)
    del old["config"]["exact"]  # as a version of train.py before this one might have written it
    utils.write_atomically(tmp_path / "old.pt", torch.save, old)
    assert "another version of train.py" in refusal(load_model, *model, "--model", tmp_path / "old.pt")


def test_a_model_of_a_csv_file_needs_that_file(tmp_path):
    header, rows = shop(300)
    path = write(tmp_path / "a.csv", header, rows)
    call_main(train, "--data", path, "--target", "sold", "--types", "zip=category", "price=ignore", "--members", 5,
              "--epochs", 1, "--device", "cpu", "--out", tmp_path)
    options = ["--model", tmp_path / "model.pt", "--out", tmp_path, "--repeats", 1]
    out = call_main(load_model, *options, "--data", path, "--by", "color", "zip")
    assert "00103" in out and "(missing)" in out
    find = lambda *more: call_main(load_model, *options, *more, "--person", "zip=00103, color=?")  # noqa: E731
    assert "probability of sold yes" in find("--data", path)
    assert "color=?" in find()  # found where it was
    moved = tmp_path / "moved.csv"
    os.rename(path, moved)
    assert "say with --data where a.csv is" in refusal(load_model, *options)
    assert "color=?" in find("--data", moved)
    other = write(tmp_path / "b.csv", *shop(300, seed=1))
    message = refusal(load_model, *options, "--data", other)
    assert "is not the table that the model was trained on; give a.csv" in message


# ---------------------------------------------------------------------------------------------- as users run them
def test_load_and_from_scratch_run(tmp_path):
    out = call_main(load, "--data", "census", "--out", tmp_path)
    assert "best possible" in out and out.count("STAND-IN") == 2 and (tmp_path / "columns.png").stat().st_size > 1000
    out = call_main(from_scratch, "--data", "census", "--epochs", 2, "--out", tmp_path)
    lines = {line[:40].strip(): line[40:].split() for line in out.splitlines()}
    majority, logistic, mlp = (lines[name] for name in ("always the more frequent class", "logistic regression",
                                                        "MLP with embeddings"))
    assert float(majority[1]) < float(logistic[1]) < float(mlp[1]) - 0.01  # accuracy
    assert 0.8 < float(logistic[2]) < float(mlp[2]) < float(lines["best possible: the known model"][-1])  # AUC
    assert (tmp_path / "from_scratch.png").stat().st_size > 1000 and out.count("STAND-IN") == 2


def test_a_csv_file_from_the_command_line(tmp_path, capsys):
    path = write(tmp_path / "a.csv", *shop(60))
    options = ["--data", path, "--target", "sold", "--types", "zip=category", "--out", tmp_path]
    assert "positive is 'yes'" in call_main(load, *options)
    assert "a.csv, test rows" in call_main(from_scratch, *options, "--epochs", 2)
    for name, value, range in (("--lr", 0, "(0, inf)"), ("--dropout", 1, "[0, 1)")):
        with pytest.raises(SystemExit):
            call_main(from_scratch, *options, name, value)
        assert f"{name}: {value} is not in {range}" in capsys.readouterr().err
    assert "the loss became" in refusal(from_scratch, *options, "--lr", 1e30)
    assert "--target is missing" in refusal(load, "--data", path)


@pytest.mark.parametrize("kind", ["numeric", "category"])
def test_tables_of_one_kind_of_column_alone(tmp_path, kind):
    path = write(tmp_path / "a.csv", *shop(100))
    types = ["color=ignore"] if kind == "numeric" else ["price=ignore", "zip=category"]
    data = load.load_data(path, "sold", types)
    assert data.train.numeric.shape[1] == 2 * (kind == "numeric")
    assert data.train.categories.shape[1] == 1 + (kind == "category")  # "price given" where price is
    for module in (load, from_scratch):
        options = ["--epochs", 1] if module is from_scratch else []
        assert "sold" in call_main(module, "--data", path, "--target", "sold", "--types", *types, "--out", tmp_path,
                                   *options)


IMPORT = """
import sys
import torch  # torch itself imports argparse
unwanted = ("argparse", "requests", "matplotlib")
for name in unwanted:
    sys.modules.pop(name, None)
state = lambda: (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), sys.excepthook)
before = state()
import train, load, from_scratch, load_model, experiment
assert state() == before
print([name for name in unwanted if name in sys.modules])
"""


def test_files_can_be_taken_away(tmp_path):
    """Copied elsewhere with utils.py and imported, they bring no package for options, downloads or pictures along."""
    (tmp_path / "utils.py").write_bytes((ROOT / "utils.py").read_bytes())
    (tmp_path / "net").mkdir()
    for path in FOLDER.glob("*.py"):
        (tmp_path / "net" / path.name).write_bytes(path.read_bytes())
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=tmp_path / "net", capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
