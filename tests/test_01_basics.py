"""Chapter 01 against PyTorch, torchvision, scikit-learn and MNIST itself, and its scripts as users run them."""

import gzip
import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REAL, ROOT, call_main, chapter, refusal, run_script, serving
from PIL import Image
from torchvision.datasets import MNIST
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

import utils

load, from_scratch, train, load_model, experiment = chapter(
    "01_basics", "load", "from_scratch", "train", "load_model", "experiment"
)
FOLDER = ROOT / "01_basics"
draw_all_digits = load.draw_digits


@pytest.fixture(autouse=True, scope="module")
def few_digits():
    """A stand-in of a sixth of its size, drawn once, wherever a test or a script asks for it."""
    data = load.with_statistics(*load.typeset(1600, "train", 1), *load.typeset(300, "val", 2),
                                *load.typeset(300, "test", 3), name="typeset", stand_in="MNIST")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "draw_digits", lambda: data)
        patch.setitem(load.SETS, "typeset", lambda: data)
        yield data


# ---------------------------------------------------------------------------------------------- data
def test_typeset_fonts_are_disjoint_and_the_digits_are_what_they_say():
    fonts = sum(load.FONTS.values(), [])
    assert len(fonts) == len(set(fonts))
    data = draw_all_digits()
    assert [len(data.train_y), len(data.val_y), len(data.test_y)] == [10_000, 1_000, 1_000]
    assert (data.name, data.stand_in, data.label) == ("typeset", "MNIST", "typeset, stand-in")
    x, y = load.typeset(1000, "train", 1)
    assert x.shape == (1000, 28, 28) and x.dtype == torch.uint8 and y.bincount().min() > 70
    again, other = load.typeset(1000, "train", 1)[0], load.typeset(1000, "train", 2)[0]
    assert torch.equal(x, again) and not torch.equal(x, other)
    # a nearest-neighbour judge that knows nothing of fonts: most of the new digits look like the old ones
    neighbors = pytest.importorskip("sklearn.neighbors")
    judge = neighbors.KNeighborsClassifier(3).fit(x.flatten(1).numpy(), y)
    test_x, test_y = load.typeset(300, "test", 3)
    assert judge.score(test_x.flatten(1).numpy(), test_y) > 0.5


def test_the_split_and_its_statistics_come_from_train_alone(monkeypatch, tmp_path):
    g = torch.Generator().manual_seed(0)
    x, test_x = (torch.randint(0, 256, (n, 28, 28), generator=g, dtype=torch.uint8) for n in (60_000, 10_000))
    class Raw:  # what torchvision reads
        def __init__(self, folder, train):
            self.data, self.targets = (x, torch.arange(60_000)) if train else (test_x, torch.arange(10_000))

    Raw.resources = MNIST.resources
    monkeypatch.setattr(load, "MNIST", Raw)
    monkeypatch.setattr(utils, "DATA_DIR", tmp_path)
    (tmp_path / "MNIST").mkdir()  # so that nothing is downloaded
    hashes = [hashlib.sha256(a.numpy().tobytes() + torch.arange(len(a)).numpy().tobytes()) for a in (x, test_x)]
    monkeypatch.setattr(load, "SHA256", dict(zip(("train", "test"), (h.hexdigest() for h in hashes))))
    data = load.load_data("mnist")
    assert data.label == "mnist" and not data.stand_in
    assert [len(data.train_y), len(data.val_y), len(data.test_y)] == [55_000, 5_000, 10_000]
    assert torch.equal(torch.cat([data.train_y, data.val_y]), torch.arange(60_000))
    pixels = x[:55_000].numpy() / 255
    assert data.mean == pytest.approx(pixels.mean()) and data.std == pytest.approx(pixels.std(), rel=1e-6)
    normal = load.normalise(data.train_x[:1000], data.mean, data.std)
    assert torch.allclose(normal, (torch.from_numpy(pixels[:1000]).float() - data.mean) / data.std, atol=1e-5)


def write_idx(folder, name, array):
    """A file of MNIST's format: two zero bytes, type (8: bytes), number of dimensions, sizes, numbers."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(header + array.tobytes())


def test_mnist_that_is_damaged_or_incomplete_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "DATA_DIR", tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    rng = np.random.default_rng(0)
    names = [name.removesuffix(".gz") for name, _ in MNIST.resources]
    for name in names:
        shape = (20, 28, 28) if "images" in name else (20,)
        write_idx(raw, name, rng.integers(0, 10, shape, dtype=np.uint8))
    def refused(data=None):
        with pytest.raises(utils.InputError, match="train files are damaged, missing or not the original.*delete"):
            load.load_data(data)

    refused()  # whole files, of other pictures
    (raw / names[0]).write_bytes((raw / names[0]).read_bytes()[:5000])
    refused()
    (raw / names[1]).unlink()
    refused("mnist")


def test_without_a_network_the_stand_in_takes_over_unless_mnist_was_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils, "DATA_DIR", tmp_path)
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    data = load.load_data()
    assert data.label == "typeset, stand-in" and "STAND-IN" in capsys.readouterr().out
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        load.load_data("mnist")
    with pytest.raises(utils.InputError, match="data letters.*mnist, typeset"):
        load.load_data("letters")


def test_mnist_is_downloaded_from_a_mirror(tmp_path, monkeypatch):
    """Unpacked by torchvision, from files served here; the hashes are those of these files."""
    import functools
    import http.server

    rng = np.random.default_rng(0)
    resources = []
    for name, _ in MNIST.resources:
        stem = name.removesuffix(".gz")
        write_idx(tmp_path / "www", stem, rng.integers(0, 10, (20, 28, 28) if "images" in name else (20,), np.uint8))
        with gzip.open(tmp_path / "www" / name, "wb") as file:
            file.write((tmp_path / "www" / stem).read_bytes())
        resources.append((name, hashlib.md5((tmp_path / "www" / name).read_bytes()).hexdigest()))

    class Handler(http.server.SimpleHTTPRequestHandler):
        __init__ = functools.partialmethod(http.server.SimpleHTTPRequestHandler.__init__,
                                           directory=str(tmp_path / "www"))

    with serving(Handler) as address:
        monkeypatch.setattr(MNIST, "mirrors", [address])
        monkeypatch.setattr(MNIST, "resources", resources)
        monkeypatch.setattr(utils, "DATA_DIR", tmp_path / "data")
        with pytest.raises(utils.InputError, match="not the original"):  # it came, and is not MNIST
            load.read_mnist()
        monkeypatch.setattr(utils, "DATA_DIR", tmp_path / "other")
        monkeypatch.setattr(MNIST, "resources", [(name, "0" * 32) for name, _ in resources])
        with pytest.raises(utils.InputError, match="wrong hash"):
            load.load_data()
        assert not (tmp_path / "other" / "MNIST").exists()
    assert (tmp_path / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte").exists()


def test_a_file_can_be_taken_away(tmp_path):
    """Imported from another program, each script brings none of these along, changes no setting, and prints nothing."""
    code = """if True:
        import random, sys, torch, torchvision, torchvision.datasets, torchvision.transforms.functional
        sys.path[:0] = sys.argv[1:]
        heavy = ("argparse", "requests", "matplotlib", "matplotlib.pyplot")
        before = torch.get_rng_state(), random.getstate(), torch.get_num_threads(), torch.get_default_dtype()
        for name in ("load", "train", "from_scratch", "load_model", "experiment"):
            for module in heavy:
                sys.modules.pop(module, None)
            __import__(name)
            assert not set(heavy) & set(sys.modules), (name, set(heavy) & set(sys.modules))
        after = torch.get_rng_state(), random.getstate(), torch.get_num_threads(), torch.get_default_dtype()
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]"""
    done = subprocess.run([sys.executable, "-c", code, FOLDER, ROOT], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not done.stdout, done.stderr


# ---------------------------------------------------------------------------------------------- by hand
def test_from_scratch_agrees_with_autograd_and_finite_differences():
    differences = from_scratch.check_against_pytorch()
    assert len(differences) == 3 and max(differences.values()) < 1e-8


def test_cross_entropy_by_hand_survives_large_scores():
    logits, y = torch.tensor([[1000.0, 0.0, -1000.0]]), torch.tensor([1])
    loss, p = from_scratch.cross_entropy(logits, y)
    assert loss == F.cross_entropy(logits, y) and torch.equal(p, logits.softmax(1))


def test_from_scratch_learns(tmp_path):
    out = call_main(from_scratch, "--data", "typeset", "--epochs", 8, "--out", tmp_path)
    assert out.count("STAND-IN") == 2 and float(out.split("by hand ")[1].split("%")[0]) > 75
    assert (tmp_path / "first_layer.png").stat().st_size > 1000
    assert "smaller lr" in refusal(from_scratch, "--data", "typeset", "--epochs", 1, "--lr", 1e9, "--out", tmp_path)


# ---------------------------------------------------------------------------------------------- model and loop
def test_the_model_has_the_size_it_says_and_is_two_linear_layers():
    model, x = train.SimpleNN(), torch.randn(3, 784)
    assert utils.count_parameters(model) == 101_770
    W1, b1, W2, b2 = model.parameters()
    by_hand, _ = from_scratch.forward(x, [W1.T, b1, W2.T, b2])
    assert torch.allclose(model(x), by_hand, atol=1e-6)
    three = experiment.build((256, 128))
    assert utils.count_parameters(three) == 235_146


def test_an_epoch_shows_every_picture_once_with_its_label():
    x, y = torch.arange(1000.0)[:, None], torch.arange(1000)
    parts = list(train.batches(x, y, 64, 5))
    seen_x, seen_y = torch.cat([a for a, _ in parts])[:, 0], torch.cat([b for _, b in parts])
    assert torch.equal(seen_x.long(), seen_y) and torch.equal(seen_y.sort()[0], y) and not torch.equal(seen_y, y)
    assert not torch.equal(seen_y, torch.cat([b for _, b in train.batches(x, y, 64, 6)]))


def test_gradients_add_up_unless_they_are_cleared():
    """What train.py says of zero_grad, forward, backward and step."""
    torch.manual_seed(0)
    model, x, y = train.SimpleNN(), torch.randn(8, 784), torch.arange(8)
    optimizer = torch.optim.Adam(model.parameters())
    before = [p.clone() for p in model.parameters()]
    F.cross_entropy(model(x), y).backward()
    once = [p.grad.clone() for p in model.parameters()]
    F.cross_entropy(model(x), y).backward()
    assert all(torch.allclose(p.grad, 2 * g) for p, g in zip(model.parameters(), once))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))  # backward changes no weight
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):  # the record is freed
        loss.backward()


def test_a_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    model, x, y = train.SimpleNN(), torch.randn(64, 784), torch.randint(10, (64,))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert train.evaluate(model, x, y)[1] == 1.0 and train.evaluate(model, x, y)[0] < 0.01


def test_a_linear_model_that_wins_is_said(tmp_path):
    text = call_main(train, "--data", "typeset", "--epochs", 1, "--lr", 1e-6, "--out", tmp_path)
    assert "the linear model is better here: use it, or try more --epochs" in text


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few_digits):
    out = tmp_path_factory.mktemp("trained")
    printed = call_main(train, "--data", "typeset", "--epochs", 6, "--batch-size", 16, "--out", out)
    return out, printed


def test_train_learns_and_leaves_what_it_should(trained, few_digits):
    out, printed = trained
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["metrics"]["test_accuracy"] > 0.8 > 0.3 > metrics["metrics"]["majority_accuracy"]
    assert metrics["stand_in"] is True and metrics["data"] == "typeset" and len(metrics["history"]) == 6
    assert metrics["parameters"] == 101_770 and printed.count("STAND-IN") == 2
    assert {p.name for p in out.iterdir()} == {"model.pt", "metrics.json", "history.png"}
    best = max(metrics["history"], key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert metrics["metrics"]["epoch"] == best["epoch"] and metrics["metrics"]["val_accuracy"] == best["val_accuracy"]
    model, saved = load_model.load_network(out / "model.pt")
    assert saved["stand_in"] == "MNIST"
    x = load.normalise(few_digits.test_x, saved["mean"], saved["std"]).flatten(1)
    assert train.evaluate(model, x, few_digits.test_y)[1] == pytest.approx(metrics["metrics"]["test_accuracy"])


def test_of_epochs_that_are_correct_equally_often_the_one_with_the_lowest_loss_is_kept(tmp_path, monkeypatch):
    losses = iter([9.0, 0.9, 0.7, 0.5, 0.5, 0.6, 0.0, 0.1])  # before training, six epochs, test
    accuracies = iter([0.0, 0.5, 0.8, 0.8, 0.8, 0.8, 0.7, 0.5])
    monkeypatch.setattr(train, "evaluate", lambda *_: (next(losses), next(accuracies)))
    call_main(train, "--data", "typeset", "--epochs", 6, "--hidden", 4, "--out", tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"]["epoch"] == 3
    assert torch.load(tmp_path / "model.pt")["metrics"]["epoch"] == 3


def test_fit_pauses_after_each_epoch_and_repeats_itself(few_digits):
    (x, y), val, _ = load.prepare(few_digits)
    rows = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = train.SimpleNN(hidden=8)
        for row in train.fit(model, (x[:200], y[:200]), val, 2, 64, 1e-3, 0.1, seed):
            assert train.evaluate(model, *val) == (row.pop("val_loss"), row.pop("val_accuracy"))
            del row["seconds"]
            rows.append(row)
    assert rows[:2] == rows[2:4] != rows[4:] and [row["step"] for row in rows[:2]] == [4, 8]


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--epochs", 0], "--epochs: 0"), (["--lr", "nan"], "--lr: nan"), (["--weight-decay", -1], "--weight-decay: -1"),
     (["--seed", 2**40], "--seed")],
)
def test_options_out_of_range_are_named(tmp_path, capsys, options, words):
    with pytest.raises(SystemExit, match="2"):
        call_main(train, *options, "--out", tmp_path)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--data", "nowhere"], "data nowhere"), (["--device", "tpu"], "--device"),
     (["--data", "typeset", "--lr", 1e30], "smaller lr")],
)
def test_bad_input_gets_one_sentence(tmp_path, options, words):
    assert words in refusal(train, *options, "--out", tmp_path)
    assert not (tmp_path / "model.pt").exists()


def test_bad_input_in_a_real_process(tmp_path):
    assert "data nowhere" in run_script(FOLDER / "train.py", "--data", "nowhere", "--out", tmp_path, code=1)


# ---------------------------------------------------------------------------------------------- the model in use
def test_load_model_runs_and_counts_as_scikit_learn_does(trained, few_digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "train", train)  # pickle looks there; another chapter's train may have its place
    metrics = pytest.importorskip("sklearn.metrics")
    out, _ = trained
    draw, drawn = load_model.draw_confusion, []
    monkeypatch.setattr(load_model, "draw_confusion", lambda *args: drawn.append(args[0]) or draw(*args))
    printed = call_main(load_model, "--model", out / "model.pt", "--out", tmp_path)
    for name in ("confusion.png", "mistakes.png"):
        assert (tmp_path / name).stat().st_size > 1000
    model, saved = load_model.load_network(out / "model.pt")
    data = few_digits
    said = model(load.normalise(data.test_x, saved["mean"], saved["std"]).flatten(1)).argmax(1)
    theirs = metrics.confusion_matrix(data.test_y, said)
    assert np.array_equal(drawn[0].numpy(), theirs)
    assert f"{metrics.accuracy_score(data.test_y, said):.2%} of 300" in printed and "is refused" in printed
    # train mode with dropout is worse, and no_grad keeps nothing
    worse, again, right = map(float, re.findall(r"([\d.]+)%", printed.split("dropout 0.5")[1])[:3])
    assert max(worse, again) < right


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16"])
@pytest.mark.parametrize("dark_on_light", [True, False])
def test_a_picture_of_any_kind_comes_out_as_mnist_has_it(tmp_path, mode, dark_on_light):
    """Digits of the stand-in, enlarged and pasted somewhere: what comes out is centred by mass, 20 pixels long, and the
    same ink as what went in."""
    glyph = load.glyph("DejaVuSans", 4, 200)  # (200, 200), 0 to 1
    canvas = torch.zeros(420, 300)
    canvas[150:350, 30:230] = glyph
    grey = (235 - 200 * canvas if dark_on_light else 20 + 200 * canvas).to(torch.uint8).numpy()
    picture = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    picture.save(tmp_path / "four.png")
    x = load_model.read_image(tmp_path / "four.png").double() / 255
    rows, columns = (torch.where((x > 0.3).any(axis))[0] for axis in (1, 0))
    assert rows[-1] - rows[0] + 1 in (19, 20, 21)
    for axis in (0, 1):
        center = (x.sum(1 - axis) * torch.arange(28)).sum() / x.sum()
        assert abs(center - 13.5) <= 0.75
    rows, columns = (torch.where((glyph > 0.3).any(axis))[0] for axis in (1, 0))
    cut = glyph[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert abs(cut.shape[1] / cut.shape[0] - (x > 0.3).any(0).sum() / (x > 0.3).any(1).sum()) < 0.1


def two_digits():
    glyphs = torch.cat([load.glyph("DejaVuSans", digit, 60) for digit in (4, 2)], 1)
    return Image.fromarray((255 - 255 * glyphs).to(torch.uint8).numpy())


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (lambda: None, "no such file"),
        (lambda: b"not a picture", "can't be read"),
        (lambda: Image.new("RGB", (300, 200), "white"), "blank"),
        (lambda: Image.new("RGBA", (30, 20), (0, 0, 0, 0)), "blank"),
        (lambda: Image.new("L", (1, 1), 7), "blank"),
        (two_digits, "several things"),
        (lambda: Image.fromarray(np.pad(np.full((90, 90), 250, np.uint8), 5)), "one shade"),
    ],
)
def test_pictures_that_are_no_digit_are_named(tmp_path, picture, words):
    path = tmp_path / "odd.png"
    made = picture()
    if isinstance(made, bytes):
        path.write_bytes(made)
    elif made is not None:
        made.save(path)
    with pytest.raises(utils.InputError, match=words):
        load_model.read_image(path)


def test_ink_on_nothing_and_an_edge_in_view(tmp_path):
    glyph = load.glyph("DejaVuSans", 3, 200).numpy()
    ink = np.zeros((200, 200, 4), np.uint8)
    ink[..., 3] = glyph * 255  # black where there is ink, transparent elsewhere
    Image.fromarray(ink).save(tmp_path / "ink.png")
    dark = (255 - 255 * glyph).astype(np.uint8)
    Image.fromarray(dark).save(tmp_path / "dark.png")
    dark[:, :6] = 0  # the table beside the paper
    Image.fromarray(dark).save(tmp_path / "edge.png")
    ink, dark, edge = (load_model.read_image(tmp_path / f"{name}.png") for name in ("ink", "dark", "edge"))
    assert (ink.int() - dark.int()).abs().max() < 20 and torch.equal(edge, dark)


def test_parts_of_one_digit_are_no_digits(tmp_path):
    paper = np.full((200, 200), 255, np.uint8)
    paper[30:50, 60:140] = 0  # the upper stroke of a five, apart from the rest
    paper[60:170, 60:80] = paper[100:120, 60:130] = paper[150:170, 60:130] = paper[100:170, 115:130] = 0
    Image.fromarray(paper).save(tmp_path / "five.png")
    rows = load_model.read_image(tmp_path / "five.png").any(1).nonzero()
    assert rows.max() - rows.min() + 1 == 20  # all of it, scaled to its usual height


def test_a_digit_cut_off_at_the_border_is_read_and_not_the_speck_beside_it(tmp_path):
    paper = np.full((120, 120), 255, np.uint8)
    paper[:100, 50:62] = 0  # a one that begins at the upper edge
    Image.fromarray(paper).save(tmp_path / "clean.png")
    paper[110:113, 10:12] = 0
    Image.fromarray(paper).save(tmp_path / "speck.png")
    assert torch.equal(*(load_model.read_image(tmp_path / f"{name}.png") for name in ("clean", "speck")))


def test_a_linear_model_against_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = load.typeset(1500, "train", 5)
    data = load.Data(x[:1000], y[:1000], x[:9], y[:9], x[1000:], y[1000:], 0.12, 0.25, "typeset", "MNIST")
    flat = [load.normalise(part, 0.12, 0.25).flatten(1).numpy() for part in (x[:1000], x[1000:])]
    theirs = linear_model.LogisticRegression(C=1e3, max_iter=40).fit(flat[0], y[:1000]).score(flat[1], y[1000:])
    found = load.baselines(data)
    assert found["linear_accuracy"] == pytest.approx(theirs, abs=0.05)
    assert found["majority_accuracy"] == pytest.approx((y[1000:] == y[:1000].mode()[0]).float().mean())


def test_a_users_digit_is_read(trained, tmp_path):
    out, _ = trained
    glyph = 255 - 255 * load.glyph("DejaVuSans", 7, 300)
    Image.fromarray(glyph.to(torch.uint8).numpy()).save(tmp_path / "seven.png")
    options = ["--model", out / "model.pt", "--out", tmp_path]
    printed = call_main(load_model, *options, "--image", tmp_path / "seven.png")
    assert printed.count("@@") > 10 and "-> " in printed
    assert printed.count("STAND-IN") == 1 and "no such file" in refusal(load_model, *options, "--image", "x")


def test_another_chapters_checkpoint_is_refused(tmp_path):
    torch.save({"script": "05_transformer/train.py"}, tmp_path / "model.pt")
    words = refusal(load_model, "--model", tmp_path / "model.pt", "--out", tmp_path)
    assert "not from 01_basics/train.py" in words


# ---------------------------------------------------------------------------------------------- how far an MLP can go
def test_straightened_digits_stand_upright_in_the_middle():
    x, _ = load.typeset(50, "train", 3)
    x[x < 60] = 0  # no noise: what bilinear sampling loses at the edges would count as ink
    leaning = TF.affine(x[:, None], 0, [2, -1], 1.0, [20, 0], interpolation=InterpolationMode.BILINEAR)[:, 0]
    upright = experiment.straighten(leaning)
    assert upright.shape == (50, 28, 28) and upright.min() >= 0 and upright.max() <= 255
    where = np.indices((28, 28)).reshape(2, -1)
    lean = lambda x: [abs(np.cov(where, aweights=ink.flatten().double().numpy())[0, 1]) for ink in x]  # noqa: E731
    assert np.mean(lean(upright)) < 0.1 * np.mean(lean(leaning))
    centres = [np.average(where, axis=1, weights=ink.flatten().double().numpy()) for ink in upright]
    assert np.abs(np.array(centres) - 13.5).max() < 0.3
    for one_size in (False, True):
        blank = experiment.straighten(torch.zeros(1, 28, 28, dtype=torch.uint8), one_size)
        assert blank.isfinite().all()


def test_one_size_brings_spreads_together_by_the_stated_powers():
    """Twice as wide before: 2 ** 0.3 times as wide after; as high: 2 ** 0.5 times; both towards 28 / 7 and 28 / 5."""
    rows, columns = torch.meshgrid(torch.arange(28.0) - 13.5, torch.arange(28.0) - 13.5, indexing="ij")
    blob = lambda high, wide: 255 * torch.exp(-((rows / high) ** 2 + (columns / wide) ** 2) / 2)  # noqa: E731
    spread = lambda x: [((x * d**2).sum() / x.sum()).sqrt().item() for d in (rows, columns)]  # noqa: E731
    found = experiment.straighten(torch.stack([blob(4, 2), blob(2, 4), blob(4, 4)]), one_size=True)
    for x, (high, wide) in zip(found, [(4, 2), (2, 4), (4, 4)]):
        expected = [high * (28 / 5 / high) ** 0.5, wide * (28 / 7 / wide) ** 0.7]
        assert spread(x) == pytest.approx(expected, rel=0.04)


def test_distortions_against_torchvision():
    x = F.pad(load.typeset(1, "train", 0)[0][:, 2:-2, 2:-2].float(), (2, 2, 2, 2))  # torchvision has 0 beyond the edge
    paper = torch.full((20, 28, 28), -0.42)  # what is moved in from beyond the edge is background, normalised or not
    torch.testing.assert_close(experiment.distort(paper), paper)
    still = dict(turn=0.0, stretch=0.0, slant=0.0, move=0.0, bend=0.0)
    torch.testing.assert_close(experiment.distort(x, **still), x, atol=1e-3, rtol=0)

    torch.manual_seed(5)
    turned = experiment.distort(x, **still | {"turn": 0.5})
    torch.manual_seed(5)
    degrees = np.rad2deg(0.5 * (2 * torch.rand(1).item() - 1))
    expected = TF.rotate(x, degrees, interpolation=InterpolationMode.BILINEAR)
    torch.testing.assert_close(turned, expected, atol=0.05, rtol=0)

    torch.manual_seed(6)
    bent = experiment.distort(x, **still | {"bend": 2.0})
    torch.manual_seed(6)
    for _ in range(6):
        torch.rand(1)  # turn, two stretches, slant, two moves
    points = torch.randn(1, 2, 3, 3) * 2.0 * 2 / 28
    field = F.interpolate(points, size=28, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    torch.testing.assert_close(bent, TF.elastic_transform(x[None], field)[0], atol=0.05, rtol=0)
    assert (bent - x).abs().mean() > 1


def test_load_runs(tmp_path):
    assert call_main(load, "--data", "typeset", "--out", tmp_path).count("STAND-IN") == 2
    assert (tmp_path / "samples.png").stat().st_size > 1000


def test_experiment_runs(tmp_path, monkeypatch):
    trained, fit_deep = [], experiment.fit_deep
    monkeypatch.setattr(experiment, "fit_deep", lambda *options: trained.append(fit_deep(*options)))
    *_, (_, distorted), _ = experiment.LIMITS
    monkeypatch.setitem(distorted, "epochs", 30)  # three, by --epochs 1, for each of four networks
    printed = call_main(experiment, "--data", "typeset", "--seeds", 1, "--epochs", 1, "--out", tmp_path)
    assert printed.count("STAND-IN") == 2 and "lowest validation loss" in printed
    tables = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in experiment.PARTS}
    for part, (rows, _, _) in experiment.PARTS.items():
        assert [row["name"] for row in tables[part]["rows"]] == [row[0] for row in rows]
        assert tables[part]["stand_in"] == "MNIST"
    for name in ("choices", "fitting_1", "fitting_2", "fitting_3", "limits"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    found = {row["name"]: row["mean"] for row in tables["choices"]["rows"]}
    assert found["sorted by digit"] < found["the same order in every epoch"]  # what shuffling is for
    *_, distorted, mean = limits = tables["limits"]["rows"]
    assert all(0.2 < row["test_accuracy"] <= 1 for row in limits)
    assert len(mean["members"]) == 3 and mean["members"][0] == distorted["members"][0]  # of seed 0
    assert len(trained) == len(limits) + 2


def test_experiment_runs_chosen_rows_alone(tmp_path):
    options = ["--data", "typeset", "--seeds", 2, "--epochs", 1, "--out", tmp_path]
    call_main(experiment, *options, "--only", "momentum", "tanh")
    rows = json.loads((tmp_path / "choices.json").read_text())["rows"]
    assert [row["name"][:4] for row in rows] == ["tanh", "SGD,"]
    assert rows[0]["mean"] == pytest.approx(np.mean(rows[0]["accuracy"])) and len(rows[0]["accuracy"]) == 2
    assert rows[0]["std"] == pytest.approx(np.std(rows[0]["accuracy"], ddof=1))
    assert {path.name for path in tmp_path.iterdir()} == {"choices.json", "choices.png"}
    assert "--only nothing" in refusal(experiment, *options, "--only", "nothing")


@pytest.mark.real("MNIST/raw/train-images-idx3-ubyte")
def test_real_mnist(monkeypatch, tmp_path):
    monkeypatch.setattr(utils, "DATA_DIR", REAL)
    data = load.load_data("mnist")
    assert [len(data.train_y), len(data.val_y), len(data.test_y)] == [55_000, 5_000, 10_000]
    # the published mean and standard deviation of all 60,000 are 0.1307 and 0.3081
    assert data.mean == pytest.approx(0.1307, abs=5e-4) and data.std == pytest.approx(0.3081, abs=5e-4)
    # a real digit, printed large and dark on light, comes back as it was
    close = 0
    for i in range(20):
        picture = Image.fromarray(255 - data.test_x[i].numpy()).resize((280, 280), Image.BICUBIC)
        picture.save(tmp_path / "digit.png")
        x = load_model.read_image(tmp_path / "digit.png").float()
        shifts = [x.roll((down, right), (0, 1)) for down in (-1, 0, 1) for right in (-1, 0, 1)]  # centred to a pixel
        close += max(F.cosine_similarity(s.flatten(), data.test_x[i].float().flatten(), 0) for s in shifts) > 0.85
    assert close >= 17
