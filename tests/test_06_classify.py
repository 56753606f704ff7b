"""06_finetune/bert_classify.py against scikit-learn, transformers and PEFT, and what fine-tuning promises."""

import functools
import contextlib
import csv
import hashlib
import http.server
import itertools
import json
import math
import os
import re
import shutil
import sys
import warnings

import peft
import pytest
import sklearn.linear_model
import sklearn.metrics
import torch
import torch.nn.functional as F
from conftest import REAL, ROOT, call_main, chapter, digest, refusal, serving
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

import utils

weights, wordpiece, bert, lora, peft_files, shared, classify = chapter(
    "06_finetune", "weights", "wordpiece", "bert", "lora", "peft_files", "bert_train", "bert_classify")
SCRIPT = ROOT / "06_finetune" / "bert_classify.py"
WORDS = "the a film plot cast music it is was and so very quite rather more than less of in this that story end".split()
GOOD, BAD = "fine great warm bright".split(), "poor weak cold grim".split()
COMMON = ["--epochs", 4, "--patience", 4, "--batch-size", 16, "--lr", 3e-3, "--head-lr", 3e-3, "--device", "cpu",
          "--dtype", "float32", "--adversarial", 0.02]
CLS = ["--pooling", "cls", "--adversarial", 0]
METHODS = {"full": [], "head": ["--dropout", 0.0], "lora": ["--lora-rank", 4, "--lora-targets", "dense", "value"],
           "lora cls": CLS, "lora distil": CLS, "full cls": CLS}
warnings.filterwarnings("ignore", module="peft|transformers")


def sentences(n, seed):
    """Sentences of 2 to 12 words that hold one good or one bad word, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    pick = lambda words: words[torch.randint(len(words), (), generator=generator)]  # noqa: E731
    rows = []
    for _ in range(n):
        label = int(torch.randint(2, (), generator=generator))
        words = [pick(WORDS) for _ in range(int(torch.randint(1, 12, (), generator=generator)))]
        words.insert(int(torch.randint(len(words) + 1, (), generator=generator)), pick(GOOD if label else BAD))
        rows.append((" ".join(words), label))
    return rows


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Folders: two encoders with random weights, one of each family, and a set of reviews that one word decides."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = wordpiece.WordPiece([*wordpiece.SPECIAL, *WORDS, *GOOD, *BAD, *"bcdefghijklmnopqrstuvwxyz"])
    for family in bert.FAMILIES:
        torch.manual_seed(0)
        model = bert.Bert({"model_type": family, "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 20,
                           "vocab_size": len(tokenizer.names)})
        for p in model.parameters():
            if p.dim() == 2:
                p.data *= 5  # signals that travel
        bert.save_model(model, folder / family)
        tokenizer.save(folder / family)
    (folder / "data").mkdir()
    for seed, (file, n) in enumerate((("train", 160), ("dev", 60), ("test", 60))):
        (folder / "data" / f"{file}.tsv").write_text("".join(f"{text}\t{y}\n" for text, y in sentences(n, seed)))
    return folder


def call(*options):
    return call_main(classify, *options)


def refused(*options):
    message = refusal(classify, *options)
    assert ";" in message or "must be" in message, message
    return message


def options_of(small, method):
    family = "distilbert" if "distil" in method else "bert"
    return ["--method", method.split()[0], "--model", small / family, "--data", small / "data", *COMMON,
            *METHODS[method]]


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """method -> (folder, what was printed), each trained once, when it is first asked for."""
    @functools.cache
    def run(method):
        out = tmp_path_factory.mktemp("run")
        return out, call(*options_of(small, method), "--out", out)

    return run


# ---------------------------------------------------------------------------------------------- figures
@pytest.mark.parametrize("K", [2, 3, 5])
def test_evaluate_equals_scikit_learn(K):
    generator = torch.Generator().manual_seed(K)
    for n in (1, 5, 200):
        y = torch.randint(K, (n,), generator=generator)
        for predicted in (torch.randint(K, (n,), generator=generator), torch.zeros(n).long(), y.clone(), 1 - y % 2):
            found = classify.evaluate(predicted, y, K)
            expected = sklearn.metrics.confusion_matrix(y, predicted, labels=range(K))
            assert found["confusion"] == expected.tolist()
            assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(y, predicted), abs=1e-12)
            more = {"zero_division": 0, "labels": range(K)}
            one = sklearn.metrics.precision_recall_fscore_support(
                y, predicted, average="binary" if K == 2 else "macro", **(more if K > 2 else {"zero_division": 0}))
            for i, name in enumerate(("precision", "recall", "f1")):
                assert found[name] == pytest.approx(one[i], abs=1e-12), name


@pytest.mark.parametrize("K", [2, 3])
def test_bag_of_words_is_scikit_learn_s_logistic_regression(K):
    """Of four penalties the best by validation. With two classes there it is one vector that is penalised, not two."""
    generator, V = torch.Generator().manual_seed(0), 20
    teacher = torch.randn(V, K, generator=generator)
    data = []
    for n in (150, 60, 40):
        rows = [torch.randint(V, (length,), generator=generator).tolist() for length in [1, 3, 7, 9, 12] * (n // 5)]
        X = torch.stack([torch.bincount(torch.tensor(row), minlength=V) for row in rows]).clamp(max=1).float()
        y = torch.multinomial((X @ teacher).softmax(-1), 1, generator=generator)[:, 0]
        data.append((rows, y, X.numpy()))
    val, test = classify.bag_of_words([part[:2] for part in data], V, K)
    reached = []
    for penalty in (0.3, 1.0, 3.0, 10.0):
        model = sklearn.linear_model.LogisticRegression(C=(1 if K > 2 else 2) / penalty, fit_intercept=False, tol=1e-8,
                                                        max_iter=10_000).fit(data[0][2], data[0][1])
        reached.append((model.score(data[1][2], data[1][1]), model))
    best = max(reached, key=lambda pair: pair[0])[1]  # the first of equals
    for log_p, part in ((val, data[1]), (test, data[2])):
        assert torch.allclose(log_p.exp(), torch.tensor(best.predict_proba(part[2])).float(), atol=2e-3)


def test_batches_hold_every_row_once_and_texts_of_a_length():
    lengths = torch.randint(3, 60, (205,), generator=torch.Generator().manual_seed(0)).tolist()
    generator = torch.Generator().manual_seed(1)
    passes = [shared.batches(lengths, 16, generator) for _ in range(3)]
    for rows in passes:
        assert sorted(sum(rows, [])) == list(range(205)) and sorted(map(len, rows)) == [13] + [16] * 12
        assert sum(max(lengths[i] for i in some) * len(some) for some in rows) < 1.1 * sum(lengths)
        firsts = [lengths[some[0]] for some in rows]
        assert firsts != sorted(firsts)  # not the short ones first
    assert passes[0] != passes[1] and {frozenset(some) for some in passes[0]} != {frozenset(some) for some in passes[1]}
    assert shared.batches(lengths, 16, torch.Generator().manual_seed(1)) == passes[0]
    assert shared.batches(lengths, 16, torch.Generator().manual_seed(2)) != passes[0]


def test_predict_equals_transformers_one_text_at_a_time(small, runs):
    out, _ = runs("full cls")
    model, tokenizer, config = bert.load_bert(str(out / "model"), bert.Classifier)
    theirs = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    rows = [tokenizer.encode(text).ids for text, _ in sentences(30, 9)]
    found = classify.predict(model.train(), rows, tokenizer.pad, torch.float32, batch_size=7)
    with torch.no_grad():
        expected = torch.cat([theirs(torch.tensor([row])).logits for row in rows]).log_softmax(-1)
    assert torch.allclose(found, expected, atol=1e-5)
    assert theirs.config.id2label == {0: "0", 1: "1"} == dict(enumerate(config["labels"]))
    assert torch.allclose(classify.predict(model, rows, tokenizer.pad, torch.bfloat16), found, atol=0.2)


def test_schedule_rises_then_falls_to_zero():
    factors = [shared.schedule(step, 100, 10) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == max(factors) == 1 and 0 < factors[-1] < 0.02
    assert all(a > b for a, b in zip(factors[10:], factors[11:])) and shared.schedule(0, 5, 0) == 1


# ---------------------------------------------------------------------------------------------- data
def test_tables_are_read_as_they_are(tmp_path):
    rows = {"train": 'caf\u00e9 "quoted" , it \'s\t1\nno\ttab in text\t0\n', "dev": "so so\t0\n", "test": "fine\t1"}
    for file, text in rows.items():
        (tmp_path / f"{file}.tsv").write_text(text)
    data = classify.load_data(str(tmp_path))
    assert data.train.texts == ['caf\u00e9 "quoted" , it \'s', "no\ttab in text"] and data.train.y.tolist() == [1, 0]
    assert (data.val.texts, data.test.texts) == (["so so"], ["fine"]) and data.labels == ["0", "1"]
    other = shutil.copytree(tmp_path, tmp_path / "sst2")
    assert classify.load_data(str(other)).labels == ["0", "1"]  # the name alone makes no SST-2
    (tmp_path / "dev.tsv").write_bytes(b"so so\t0\r\nand so\t1\r\n")  # from Windows
    assert classify.load_data(str(tmp_path)).val.texts == ["so so", "and so"]
    (tmp_path / "test.tsv").write_text("fine\t2\n")
    with pytest.raises(utils.InputError, match="test.tsv, line 1: no text of class '2' is there to learn from"):
        classify.load_data(str(tmp_path))
    (tmp_path / "test.tsv").write_text("fine\t1\n")
    (tmp_path / "dev.tsv").write_text("good\t1\nno label\t\n\t1\n")
    assert classify.load_data(str(tmp_path)).val.texts == ["good"]
    for bad, words in (("no tab", "line 2: no tab is cut into 1"), ("text\tx", "line 2: no text of class 'x'"),
                       ("text\t-1", "line 2"), ("text\t9999999999", "line 2"), ("text\t\u0661", "line 2")):
        (tmp_path / "dev.tsv").write_text(f"good\t1\n{bad}\n")
        with pytest.raises(utils.InputError, match=words):
            classify.load_data(str(tmp_path))
    (tmp_path / "dev.tsv").write_bytes(b"\x81\t1\n")
    with pytest.raises(utils.InputError, match="dev.tsv is not UTF-8 .byte 0.; convert it"):
        classify.load_data(str(tmp_path))
    (tmp_path / "dev.tsv").write_text("\n\n")
    with pytest.raises(utils.InputError, match="dev.tsv, line 1"):
        classify.load_data(str(tmp_path))
    (tmp_path / "dev.tsv").unlink()
    with pytest.raises(utils.InputError, match="dev.tsv cannot be read"):
        classify.load_data(str(tmp_path))


@pytest.mark.parametrize("lines, labels, y", [
    ("sentence\tlabel\na fine film\t1\na poor film\t0\n", ["0", "1"], [1, 0]),  # as in GLUE
    ("a\t1\nb\t-1\n", ["-1", "1"], [1, 0]), ("a\t1.0\nb\t0.0\n", ["0.0", "1.0"], [1, 0]),
    ("a\t2\nb\t10\n", ["2", "10"], [0, 1]), ("a\t1\nb\t2\n", ["1", "2"], [0, 1]),
    ("1\ta fine film\n0\ta poor one\n", ["0", "1"], [1, 0]),
    ("good\tpos\nso bad\tneg\nfine\tpos\n", ["neg", "pos"], [1, 0, 1]),
    ("\"a\" film\tpos\n\"b\tneg\nc\"\tpos\n", ["neg", "pos"], [1, 0, 1]),
])
def test_tables_like_sst2_take_any_labels(tmp_path, lines, labels, y):
    for file in ("train", "dev", "test"):
        (tmp_path / f"{file}.tsv").write_text(lines)
    data = classify.load_data(str(tmp_path))
    assert data.labels == labels and data.train.y.tolist() == y == data.test.y.tolist()
    assert data.train.texts == [max(line.split("\t"), key=lambda cell: (cell not in labels, len(cell)))
                                for line in lines.rstrip("\n").split("\n")][-len(y):]


# A header and how texts and labels are to be found: text, label, rest of the row; columns; separator
TABLES = {
    "pandas": (["", "text", "label"], lambda i, text, y: [str(i), text, str(y)], [], ","),
    "words": (["Sentiment", "Review"], lambda i, text, y: [("ham", "spam")[y], text], [], ";"),
    "by content": (["id", "said", "verdict"], lambda i, text, y: [f"{i:09}", text, ("no", "yes")[y]], [], "\t"),
    "named": (["a", "b", "c"], lambda i, text, y: [str(y), text + " and more", text], ["c", "a"], ","),
    "no header": (None, lambda i, text, y: [text, ("bad", "good")[y]], [], ","),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_and_split(tmp_path, name):
    header, row, asked, separator = TABLES[name]
    texts = [f'film {i}, "quoted"; {"ab"[i % 2]}\nand on' if separator == "," else f"film {i} {'ab'[i % 2]}"
             for i in range(40)]
    path = tmp_path / "mine.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([header] * bool(header) + [row(i, text, i % 2) for i, text in enumerate(texts)])
    data = classify.load_data(str(path), *asked)
    assert data.name == "mine.csv" and [len(part.texts) for part in data[:3]] == [32, 4, 4]
    assert sorted(sum((part.texts for part in data[:3]), [])) == sorted(texts)
    for part in data[:3]:
        assert part.y.tolist() == [texts.index(text) % 2 for text in part.texts]
    assert data.labels == sorted({row(i, "", i)[-1 if name != "words" else 0] for i in (0, 1)}
                                 if name != "named" else "01")
    assert classify.load_data(str(path), *asked).test.texts == data.test.texts
    if header:
        for part in ("train", "dev", "test"):
            shutil.copy(path, tmp_path / f"{part}.csv")
        assert classify.load_data(str(tmp_path), *asked).val.texts == texts


def test_a_table_s_real_fault_is_named(tmp_path, capsys):
    path = tmp_path / "mine.csv"
    rows = [f"this is text {i},{'ab'[i % 2]},{'cd'[i // 2 % 2]},{i}" for i in range(12)]

    def refusal_of(content, *asked):
        path.write_text(content)
        with pytest.raises(utils.InputError) as raised:
            classify.load_data(str(path), *asked)
        return str(raised.value)

    table = "\n".join(["words,one,two,three", *rows])
    assert "of the columns words, one, two, three one must hold" in refusal_of(table)  # one or two?
    assert "columns words, one, two, three" in refusal_of(table, None, "four")
    assert "line 4: no text of class 'rare' is there" in refusal_of("text,label\na b,x\nc d,y\nso so,rare\n" + (
        "a b,x\nc d,y\n" * 3))
    assert "mine.csv, line 3: three is cut into 1 cells" in refusal_of("text,label\na b,x\nthree\n")
    assert "at least two classes" in refusal_of("text,label\n" + "a b,x\n" * 9)
    assert "mine.csv, line 1" in refusal_of("") and "mine.csv, line 1" in refusal_of("lines\nof text\n")
    path.write_text(table.replace(",b,", ",,"))
    capsys.readouterr()
    with pytest.raises(utils.InputError, match="at least two classes"):
        classify.load_data(str(path), None, "one")
    assert "texts in column words, labels in one; 6 of 12 rows" in capsys.readouterr().out
    with pytest.raises(utils.InputError, match="--text and --label are for a table, and templates is none"):
        classify.load_data("templates", "words")


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    for part, kind in itertools.product(("train", "test"), ("neg", "pos", ".ipynb_checkpoints")):
        (tmp_path / part / kind).mkdir(parents=True)
        for i in range(9):
            (tmp_path / part / kind / f"{i}_1.txt").write_text(f"a {kind} film {i}")
        (tmp_path / part / kind / "._0_1.txt").write_bytes(b"\0\5\x16\7\xff")
    data = classify.load_data(str(tmp_path))
    assert data.labels == ["neg", "pos"] and [len(part.texts) for part in data[:3]] == [16, 2, 18]


def test_imdb_s_folders(tmp_path):
    for part, kind, n in (("train", "pos", 12), ("train", "neg", 13), ("train", "unsup", 9), ("test", "pos", 3),
                          ("test", "neg", 2)):
        (tmp_path / part / kind).mkdir(parents=True)
        for i in range(n):
            (tmp_path / part / kind / f"{i}_7.txt").write_text(f"{part} {kind}<br /><br />{i}")
    (tmp_path / "train" / "labeledBow.feat").write_text("0 9:1")
    data = classify.load_data(str(tmp_path))
    assert data.labels == ["neg", "pos"] and [len(part.texts) for part in data[:3]] == [22, 3, 5]
    assert sorted(data.train.texts + data.val.texts) == sorted(
        f"train {kind}  {i}" for kind, n in (("pos", 12), ("neg", 13)) for i in range(n))
    for part in data[:3]:
        assert [f" {data.labels[y]} " in text for text, y in zip(part.texts, part.y)] == [True] * len(part.texts)
    assert not data.stand_in and classify.load_data(str(tmp_path)).val.texts == data.val.texts
    shutil.rmtree(tmp_path / "test" / "pos")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(utils.InputError, match="at least two classes"):
            classify.load_data(str(folder))


def test_template_reviews_are_disjoint_and_no_count_of_words_decides():
    data = classify.template_reviews()
    texts = [part.texts for part in data[:3]]
    assert [len(some) for some in texts] == [3000, 500, 500] and len(set(sum(texts, []))) == 4000
    assert data.stand_in and classify.template_reviews().test.texts == texts[2]
    good, bad = classify.GOOD.split(","), classify.BAD.split(",")
    for part in data[:3]:
        assert 0.45 < part.y.float().mean() < 0.55
        for text, y in zip(part.texts, part.y.tolist()):  # the rule, read backwards
            side = re.fullmatch(r"although (?P<a>.*) ; (?P<b>.*)|(?P<c>.*) ; (?:although|even if) (?P<d>.*)|"
                                r"(?P<e>.*) ; but (?P<f>.*)", text)
            main = (side["b"] or side["c"] or side["f"]) if side else text
            negated = re.search(r"\bnot\b|\bnever\b|anything but|nobody|nothing", main) is not None
            praise = any(re.search(rf"\b{word}\b", main) for word in good)
            assert praise != any(re.search(rf"\b{word}\b", main) for word in bad)
            assert y == (praise != negated), text
    vocab = {}
    rows = [[[vocab.setdefault(word, len(vocab)) for word in text.split()] for text in some] for some in texts]
    _, log_p = classify.bag_of_words([(r, part.y) for r, part in zip(rows, data[:3])], len(vocab), 2)
    assert (log_p.argmax(-1) == data.test.y).float().mean() < 0.65
    # what one word gives away
    labels = {word: [] for word in vocab}
    for text, label in zip(texts[0], data.train.y.tolist()):
        for word in set(text.split()):
            labels[word].append(label)
    assert all(0.3 < sum(y) / len(y) < 0.7 for y in labels.values() if len(y) >= 100)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server in GitHub's place with a small SST-2, and an empty DATA_DIR."""
    served, files = {}, {}
    for i, file in enumerate(classify.SST2_SHA256):
        served["/" + file] = "".join(f"{text}\t{y}\n" for text, y in sentences(20, i)).encode()
        files[file] = hashlib.sha256(served["/" + file]).hexdigest()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = served.get(self.path)
            self.send_response(200 if data else 404)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

    monkeypatch.setattr(classify, "SST2_SHA256", files)
    monkeypatch.setattr(utils, "DATA_DIR", tmp_path)
    with serving(Handler) as address:
        monkeypatch.setattr(classify, "SST2", address)
        yield served


def test_sst2_is_downloaded_and_templates_come_only_where_it_can_t_be(server, tmp_path, capsys):
    data = classify.load_data()
    assert data.name == "sst2" and not data.stand_in and len(data.train.texts) == 20
    assert "STAND-IN" not in capsys.readouterr().out
    server.clear()
    assert classify.load_data("sst2").train.texts == data.train.texts  # from the disk
    (tmp_path / "sst2" / "test.tsv").unlink()
    with pytest.raises(utils.InputError, match="--data templates"):  # half there
        classify.load_data()
    (tmp_path / "sst2" / "dev.tsv").write_text("other\t1\n")
    with pytest.raises(utils.InputError, match="dev.tsv is not the expected file"):
        classify.load_data()
    shutil.rmtree(tmp_path / "sst2")
    with pytest.raises(ConnectionError, match="--data templates"):
        classify.load_data("sst2")
    data = classify.load_data()
    assert data.stand_in and data.name == "templates" and capsys.readouterr().out.count("STAND-IN") == 1


@pytest.mark.real("sst2")
def test_sst2_is_what_the_comments_say(monkeypatch):
    monkeypatch.setattr(utils, "DATA_DIR", REAL)
    data = classify.load_data("sst2")
    assert [len(part.texts) for part in data[:3]] == [6920, 872, 1821] and data.labels == ["negative", "positive"]
    lengths = [len(text.split()) for text in data.train.texts]
    padding = lambda rows: 1 - sum(lengths) / sum(max(lengths[i] for i in some) * len(some) for some in rows)  # noqa: E731
    shuffled = torch.randperm(6920, generator=torch.Generator().manual_seed(0)).split(32)
    assert 0.45 < padding([some.tolist() for some in shuffled]) < 0.55
    assert padding(shared.batches(lengths, 32, torch.Generator().manual_seed(0))) < 0.06


# ---------------------------------------------------------------------------------------------- training
def test_each_method_learns_and_says_so(small, runs):
    for method in METHODS:
        out, text = runs(method)
        found = json.loads((out / "metrics.json").read_text())
        metrics, history = found["metrics"], found["history"]
        result = "adapter" if method.startswith("lora") else "model"
        assert {path.name for path in out.iterdir()} == {result, "checkpoint.pt", "metrics.json", "history.png"}
        assert f"wrote {result}/" in text and [row["epoch"] for row in history] == [1, 2, 3, 4]
        assert history[-1]["train_loss"] < history[0]["train_loss"], method
        assert metrics["val_accuracy"] == max(row["val_accuracy"] for row in history)
        tests = metrics["test"]
        assert list(tests) == ["majority class", "bag of words", method.split()[0]]
        assert tests["bag of words"]["accuracy"] > 0.9 > 0.65 > tests["majority class"]["accuracy"]
        if method.startswith("full"):
            assert tests["full"]["accuracy"] > 0.85, method
        if method == "lora":  # the encoder is random; by [CLS] four epochs are too few for adapters
            assert tests["lora"]["accuracy"] > 0.7 > tests["majority class"]["accuracy"]
        before = re.search(r"before training: validation loss ([\d.]+); guessing uniformly, ln 2: 0.6931", text)[1]
        assert float(before) == pytest.approx(math.log(2), abs=0.15)
        assert sum(map(sum, tests[method.split()[0]]["confusion"])) == 60
        assert metrics["trained_parameters"] == sum(
            p.numel() for p in torch.load(out / "checkpoint.pt", weights_only=True)["trained"].values())


def test_what_is_frozen_stays_bit_identical(small, runs):
    before = weights.open_weights(small / "bert")
    for method in ("full", "head"):
        after = weights.open_weights(runs(method)[0] / "model")
        changed = {name for name in before if not name.startswith("pooler.")
                   and not torch.equal(before[name], after["bert." + name])}
        encoder = {name for name in before if not name.startswith("pooler.")}
        assert changed == (encoder if method == "full" else set()), method
    after = weights.open_weights(runs("full cls")[0] / "model")
    assert not torch.equal(before["pooler.dense.weight"], after["bert.pooler.dense.weight"])
    for method in ("lora", "lora cls", "lora distil"):
        trained = torch.load(runs(method)[0] / "checkpoint.pt", weights_only=True)["trained"]
        new = (".lora_", "classifier", "bert.pooler")
        assert trained and all(any(part in name for part in new) for name in trained)
        assert {path.name for path in (runs(method)[0] / "adapter").iterdir()} == {"adapter_config.json",
                                                                                   "adapter_model.safetensors"}


def with_peft(folder, adapter=None, **options):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    if adapter:
        return peft.PeftModel.from_pretrained(model, adapter).eval()
    return peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **options)).eval()


@pytest.mark.parametrize("method, family", [("lora cls", "bert"), ("lora distil", "distilbert")])
def test_peft_reads_our_adapter_and_head(small, runs, method, family):
    out = runs(method)[0]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        theirs = with_peft(small / family, out / "adapter")
    assert not [w for w in seen if "keys" in str(w.message)]
    _, tokenizer, _ = bert.load_bert(str(small / family))
    rows = [tokenizer.encode(text).ids for text, _ in sentences(30, 9)]
    ids, mask = wordpiece.pad(rows, tokenizer.pad)
    options = torch.load(out / "checkpoint.pt", weights_only=True)["options"]
    ours, _ = shared.load_result(small / family, options, out, bert.Classifier, ["negative", "positive"])
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long()).logits
        assert torch.allclose(ours(ids, mask), expected, atol=1e-6) and expected.std() > 0.005
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and set(config["target_modules"]) == (
        set(classify.ALL_MATRICES[family]))


@pytest.mark.parametrize("family, targets, heads", [
    ("bert", ["query", "value"], None), ("bert", ["attention.output.dense", "key"], ["pooler.dense"]),
    ("distilbert", ["q_lin", "v_lin"], ["pre_classifier"]), ("distilbert", ["out_lin", "lin1"], None)])
def test_we_read_peft_s_adapter_and_head(small, tmp_path, family, targets, heads):
    """PEFT names classifier and score, and takes what ends so: in DistilBERT pre_classifier too."""
    torch.manual_seed(3)
    theirs = with_peft(small / family, r=3, lora_alpha=6, target_modules=targets, modules_to_save=heads)
    for name, p in theirs.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    if not heads:  # PEFT 0.10 wrote the head, and its name nowhere
        path = tmp_path / "theirs" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": None}))
    ours, tokenizer, _ = bert.load_bert(str(small / family), bert.Classifier, labels=["no", "yes"], pooling="cls")
    names = ["classifier", *(["pre_classifier"] if family == "distilbert" else ["bert.pooler.dense"] if heads else [])]
    config = peft_files.load_adapter(ours, tmp_path / "theirs", "")
    ids, mask = wordpiece.pad([tokenizer.encode(text).ids for text, _ in sentences(9, 4)], tokenizer.pad)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long()).logits
        assert torch.allclose(ours.eval()(ids, mask), expected, atol=1e-5) and expected.std() > 0.1
    assert all(ours.get_submodule(name).weight.requires_grad for name in names)
    peft_files.save_adapter(ours, tmp_path / "ours", config["base_model_name_or_path"], "", "SEQ_CLS", tuple(names))
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    again = with_peft(small / family, tmp_path / "ours")
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids, attention_mask=mask.long()).logits, expected, atol=1e-6)


def test_an_adapter_with_another_head_is_refused(small, runs, tmp_path):
    out = runs("lora cls")[0]
    shutil.copytree(out / "adapter", tmp_path / "adapter")
    model = bert.load_bert(str(small / "bert"), bert.Classifier, labels=["a", "b", "c"], pooling="cls")[0]
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(utils.InputError, match=r"classifier.bias' is \(2,\) in the file and \(3,\) in this model"):
        peft_files.load_adapter(model, tmp_path / "adapter", "")
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()) and not lora.adapters(model)


@torch.no_grad()
def test_with_mean_pooling_transformers_opens_the_encoder(small, runs):
    """Its classifiers read [CLS], so that it is given the encoder alone; the mean and our head do the rest."""
    out = runs("full")[0]
    theirs = AutoModel.from_pretrained(out / "model").eval()
    model, tokenizer, config = bert.load_bert(str(out / "model"), bert.Classifier)
    assert config["pooling"] == "mean"
    ids, mask = wordpiece.pad([tokenizer.encode(text).ids for text, _ in sentences(9, 4)], tokenizer.pad)
    hidden = theirs(ids, attention_mask=mask.long()).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    assert torch.allclose(model(ids, mask), F.linear(mean, model.classifier.weight, model.classifier.bias), atol=1e-5)


def test_reported_figures_are_those_of_the_files(small, runs):
    for method in ("lora", "full cls", "lora distil"):
        out, text = runs(method)
        saved = torch.load(out / "checkpoint.pt", weights_only=True)
        model, tokenizer = shared.load_result(small / ("distilbert" if "distil" in method else "bert"),
                                              saved["options"], out, bert.Classifier, saved["labels"])
        rows = [line.split("\t") for line in (small / "data" / "test.tsv").read_text().splitlines()]
        right = sum(int(model(torch.tensor([tokenizer.encode(text).ids])).argmax()) == int(y) for text, y in rows)
        name = method.split()[0]
        found = json.loads((out / "metrics.json").read_text())["metrics"]["test"][name]
        assert found["accuracy"] == pytest.approx(right / 60)
        assert f"{found['accuracy']:.2%}" in text and "most confident mistakes" in text
        mistakes = text.split("most confident mistakes:\n")[1].split("\n\n")[0].splitlines()
        assert len(mistakes) == min(5, 60 - right)
        shares = [float(line.split("%")[0]) for line in mistakes]
        assert shares == sorted(shares, reverse=True) and all(share >= 50 for share in shares)


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("method", ["lora cls", "full"])
def test_a_stopped_run_resumes_bit_identically(small, runs, tmp_path, method):
    """Stopped in the middle of the third epoch, as by a kill: what was saved last is the end of the second."""
    options = [*options_of(small, method), "--out", tmp_path]
    step, steps = torch.optim.AdamW.step, itertools.count(1)

    def stop(self):
        step(self)
        if next(steps) == 27:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(torch.optim.AdamW, "step", stop)
        call(*options)
    saved = utils.load_checkpoint(tmp_path / "checkpoint.pt", classify.SCRIPT)
    assert [row["step"] for row in saved["history"]] == [10, 20]
    assert "is of a run with --lr 0.003; go on with the same" in refused(*options, "--resume", "--lr", 1e-3)
    train, text = small / "data" / "train.tsv", (small / "data" / "train.tsv").read_text()
    train.write_text(text + "a film\t1\n")
    try:
        assert "is of a run on other texts" in refused(*options, "--resume")
    finally:
        train.write_text(text)
    assert "resumed after epoch 2" in call(*options, "--resume")
    path = "adapter/adapter_model.safetensors" if method.startswith("lora") else "model/model.safetensors"
    assert digest(tmp_path / path) == digest(runs(method)[0] / path)
    a, b = (json.loads((folder / "metrics.json").read_text())["history"] for folder in (tmp_path, runs(method)[0]))
    assert [row | {"seconds": 0} for row in a] == [row | {"seconds": 0} for row in b]


def test_early_stopping_keeps_the_best(small, tmp_path):
    options = ["--epochs", 40, "--patience", 2, "--lr", 1e-2, "--limit", 80, "--out", tmp_path]
    call(*options_of(small, "full cls"), *options)
    found = json.loads((tmp_path / "metrics.json").read_text())
    best, history = found["metrics"]["best_epoch"], found["history"]
    assert history[-1]["epoch"] == best + 2 < 40
    assert history[best - 1]["val_accuracy"] == max(row["val_accuracy"] for row in history)


@pytest.mark.parametrize("rows, best", [  # (accuracy, loss) of each epoch
    ([(0.5, 0.7), (0.9, 0.5), (0.9, 0.3), (0.9, 0.4), (0.8, 0.2), (0.7, 0.1)], 3),  # two worse ones end it
    ([(0.9, 0.3)] + [(0.9, 0.4)] * 6 + [(0.9, 0.2)], 8),
    ([(0.9, 0.3), (0.5, 0.2), (0.9, 0.4), (0.5, 0.1), (0.5, 0.1)], 1),
])
def test_of_equal_epochs_the_lower_loss_wins_and_none_counts_against_patience(small, tmp_path, rows, best):
    said = iter(rows)
    fit = shared.fit

    def scripted(*given, **more):
        evaluate = lambda: dict(zip(("val_accuracy", "val_loss"), next(said)))  # noqa: E731
        return fit(*given[:8], evaluate, *given[9:], **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify, "fit", scripted)
        call(*options_of(small, "head"), "--epochs", 20 if best != 8 else 8, "--patience", 2, "--limit", 16, "--out",
             tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert len(found["history"]) == len(rows) and found["metrics"]["best_epoch"] == best
    assert found["metrics"]["val_loss"] == rows[best - 1][1]


def test_the_adversarial_push_is_of_the_length_asked_for_and_raises_the_loss(small, tmp_path):
    seen, forward = [], bert.Classifier.forward

    def spy(self, ids, mask=None, types=None, push=None):
        out = forward(self, ids, mask, types, push)
        if push is not None:
            seen.append((push.detach(), mask, out.detach()))
        return out

    losses = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bert.Classifier, "forward", spy)
        entropy = F.cross_entropy
        patch.setattr(F, "cross_entropy", lambda *a, **k: losses.append(entropy(*a, **k)) or losses[-1])
        options = ["--epochs", 1, "--dropout", 0.0, "--adversarial", 0.7]
        call(*options_of(small, "lora"), *options, "--out", tmp_path)
    assert len(seen) == 20
    for (zero, _, _), (push, mask, _) in zip(seen[::2], seen[1::2]):
        assert not zero.any() and push.norm(dim=(1, 2)).allclose(torch.tensor(0.7)) and not push[~mask].any()
    pairs = list(zip(losses[:20:2], losses[1:20:2]))
    assert all(away > at for at, away in pairs)


def test_one_batch_can_be_learned_by_heart(small):
    model, tokenizer, _ = bert.load_bert(str(small / "distilbert"), bert.Classifier, labels=["a", "b"], dropout=0.0)
    rows = sentences(16, 5)
    ids, mask = wordpiece.pad([tokenizer.encode(text).ids for text, _ in rows], tokenizer.pad)
    y = torch.randint(2, (16,), generator=torch.Generator().manual_seed(0))  # whatever the texts say
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(60):
        loss = F.cross_entropy(model(ids, mask), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


# ---------------------------------------------------------------------------------------------- use, and misuse
def test_a_text_from_the_command_line_gets_a_label(runs):
    for method in ("full", "lora cls"):
        out = runs(method)[0]
        lines = call("a great plot", "it is a GRIM film", "--out", out).splitlines()[1:]
        found = [re.fullmatch(r" *(0|1) +([\d.]+)%  (.*)", line) for line in lines]
        assert [match[3] for match in found] == ["a great plot", "it is a GRIM film"]
        assert all(50 <= float(match[2]) <= 100 for match in found)
        if method == "full":
            assert [match[1] for match in found] == ["1", "0"]


def test_a_run_with_stand_ins_says_so(small, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "DATA_DIR", tmp_path / "data")
    shutil.copytree(small / "bert", tmp_path / "data" / "bert-stand-in")
    out = call("--model", "stand-in", "--data", "templates", "--method", "head", "--epochs", 1, "--limit", 100,
               "--device", "cpu", "--out", tmp_path / "out")
    assert out.count("STAND-IN") == 3 and "in place of SST-2" in out
    assert "stand-in, on templates, stand-in: 100 / 500 / 500 texts" in out
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["stand_in"] is True
    assert "STAND-IN" in call("so what", "--out", tmp_path / "out")


@pytest.mark.parametrize("options, words", [
    (["--lora-targets", "attention"], "attention"), (["--model", "nowhere"], "no folder"),
    (["--lora-targets", "query", "classifier"], "side of classifier"), (["--lora-rank", 64], "rank 64"),
    (["--data", "no"], "at least two classes"), (["--device", "abacus"], "abacus"), (["--resume"], "does not exist"),
    (["--lora-targets", "query", "--method", "head"], "are for --method lora, not for head"),
    (["--lr", 1e30, "--method", "full", "--epochs", 1], "smaller --lr"),
])
def test_bad_input_gets_one_sentence(small, tmp_path, options, words):
    assert words in refused("--model", small / "bert", "--data", small / "data", *options, "--out", tmp_path)


def test_a_table_of_one_s_own_from_training_to_use(small, tmp_path):
    rows = sentences(80, 3)
    (tmp_path / "mail.csv").write_text("kind,words\n" + "".join(f"{('bad', 'good')[y]},{text}\n" for text, y in rows))
    options = ["--method", "full", "--model", small / "bert", *COMMON, "--data", tmp_path / "mail.csv", "--epochs", 1]
    text = call(*options, "--text", "words", "--label", "kind", "--out", tmp_path / "out")
    assert re.search(r"on mail.csv: 6\d / \d / \d texts, good: [45]", text)
    assert re.search(r"(?m)^ +(bad|good) +[\d.]+%  so warm$", call("so warm", "--out", tmp_path / "out"))


def test_lines_on_standard_input_start_no_training(small, tmp_path, monkeypatch):
    """A pipe that holds text, one that is empty or still open, and /dev/null."""
    options = [*options_of(small, "head"), "--epochs", 1, "--limit", 16, "--out", tmp_path]
    for content, closed in ((b"a fine film\n", True), (b"a fine film\n", False), (b"", True), (b"", False)):
        read, write = os.pipe()
        os.write(write, content)
        if closed:
            os.close(write)
        with open(read) as pipe:
            monkeypatch.setattr(sys, "stdin", pipe)
            with contextlib.suppress(FileNotFoundError):
                (tmp_path / "checkpoint.pt").unlink()
            if content:
                assert "standard input holds text" in refused(*options)
            else:
                call(*options)
            assert (tmp_path / "checkpoint.pt").exists() == (not content)
        if not closed:
            os.close(write)
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert not classify.text_waits()
    monkeypatch.setattr(sys, "stdin", None)  # as under pythonw
    assert not classify.text_waits()


def test_a_text_to_classify_needs_a_model(tmp_path):
    assert "does not exist; make it with: python 06_finetune/bert_classify.py" in refused("a film", "--out", tmp_path)


@pytest.mark.parametrize("options", ["--epochs 0", "--dropout 1", "--weight-decay -1", "--warmup 1", "--max-length 2",
                                     "--adversarial -1", "--seed -1", "--head-lr 0", "--lora-alpha nan"])
def test_numbers_out_of_range_are_refused_by_argparse(options, tmp_path, capsys):
    name, value = options.split()
    with pytest.raises(SystemExit):
        call(name, value, "--out", tmp_path)
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {name}: {value} is not in " in error


# ---------------------------------------------------------------------------------------------- from Python
FROM_PYTHON = """import sys; sys.path.append("06_finetune")
from bert_classify import SCRIPT, Classifier, Path, load_trained, predict, torch
model, tokenizer, saved = load_trained(Path("06_finetune/outputs/classify"), SCRIPT, Classifier)
rows = [tokenizer.encode(text, saved["options"]["max_length"], special=False).ids for text in ["not bad", "dull"]]
p = predict(model, rows, tokenizer.pad, torch.float32).exp()  # (N, K), in the order of saved["labels"]
"""


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_from_python(small, runs, method, monkeypatch):
    """The README's five lines say what main() says of the same texts."""
    readme = (ROOT / "06_finetune" / "README.md").read_text(encoding="utf-8")
    assert "```python" not in readme or FROM_PYTHON in readme
    monkeypatch.setitem(sys.modules, "bert_classify", classify)
    names, out = {}, runs(method)[0]
    exec(FROM_PYTHON.replace("06_finetune/outputs/classify", str(out)), names)
    assert names["p"].shape == (2, 2) and torch.allclose(names["p"].sum(1), torch.ones(2))
    said = call_main(classify, "not bad", "dull", "--out", out)
    for text, p in zip(("not bad", "dull"), names["p"]):
        assert f"{names['saved']['labels'][p.argmax()]:>12} {p.max():6.1%}  {text}" in said


def test_tables_in_the_encodings_of_windows_are_read_and_said(tmp_path, capsys):
    text = "".join(f"caf\u00e9 \u2013 {i}\t{'gut' if i % 2 else 'schlecht'}\n" for i in range(20))
    parts = []
    for name in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
        (tmp_path / "a.tsv").write_bytes(text.encode(name))
        parts.append(classify.load_data(str(tmp_path / "a.tsv")).train.texts)
        assert (f"is read as {name}" in capsys.readouterr().out) == (name in ("utf-16", "cp1252"))
    assert all(part == parts[0] for part in parts) and "caf\u00e9 \u2013" in parts[0][0]
    for data in (b"\x89PNG\r\n\x1a\n\0", "caf\u00e9".encode("utf-16")[:-1], "caf\u00e9 ".encode("latin-1") + b"\x9d"):
        (tmp_path / "a.tsv").write_bytes(data)
        with pytest.raises(utils.InputError, match=r"is not UTF-8 .byte \d+.; convert it"):
            classify.load_data(str(tmp_path / "a.tsv"))
