"""Chapter 02 against PyTorch, torchvision and scikit-learn, and its scripts as users run them."""

import contextlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from conftest import REAL, ROOT, call_main, chapter, refusal, run_script
from PIL import Image

import utils

load, from_scratch, train, load_model, experiment = chapter(
    "02_cnn", "load", "from_scratch", "train", "load_model", "experiment"
)
FOLDER = ROOT / "02_cnn"


def make_folder(root, classes=("cat", "dog"), n=12, size=(32, 32), mode="RGB"):
    """train/CLASS/* and test/CLASS/* with random pictures."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                picture = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)
                picture.save(root / part / name / f"{i}.png")
    return root


# ---------------------------------------------------------------------------------------------- data
def test_shapes_need_more_than_single_pixels():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = load.draw_shapes(3000, 0)
    assert x.shape == (3000, 3, 32, 32) and x.dtype == torch.uint8 and torch.equal(y.bincount(), torch.full((10,), 300))
    assert torch.equal(load.draw_shapes(3000, 0)[0], x) and not torch.equal(load.draw_shapes(3000, 1)[0], x)
    pixels = F.avg_pool2d(x.float() / 255, 2).flatten(1).numpy()
    linear = linear_model.LogisticRegression(max_iter=100, tol=0.01).fit(pixels[:2500], y[:2500])
    assert linear.score(pixels[2500:], y[2500:]) < 0.6


def test_a_folder_is_read_converted_and_described(tmp_path, capsys):
    make_folder(tmp_path, size=(40, 20), mode="RGBA")
    Image.new("L", (32, 32), 77).save(tmp_path / "train" / "cat" / "grey.png")
    data = load.load_data(str(tmp_path))
    assert data.classes == ["cat", "dog"] and not data.stand_in and data.name == tmp_path.name
    assert len(data.train_y) + len(data.val_y) == 25 and len(data.val_y) == 2 and len(data.test_y) == 24
    every = torch.cat([data.train_x, data.val_x])
    assert every.shape == (25, 3, 32, 32) and (every == 77).all((1, 2, 3)).sum() == 1
    out = capsys.readouterr().out
    assert "every picture is RGB, 32 x 32 now; others were converted, cut to a square and resized" in out


def test_files_that_are_not_named_as_pictures_are_passed_over_aloud(tmp_path, capsys):
    make_folder(tmp_path)
    for name in ("photo.heic", "notes.txt", ".DS_Store"):
        (tmp_path / "train" / "dog" / name).write_bytes(b"whatever")
    assert len(load.load_data(str(tmp_path)).test_y) == 24
    out = capsys.readouterr().out
    assert "2 files are passed over" in out and "dog/notes.txt first" in out and out.count("passed over") == 1


def test_pictures_of_more_greys_and_with_holes_are_not_cut_off(tmp_path):
    ramp = np.linspace(0, 60_000, 32 * 32).reshape(32, 32)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    deep = load.read_picture(tmp_path / "deep.png")
    assert deep.min() == 0 and deep.max() == 255 and len(deep.unique()) > 250
    holes = np.zeros((32, 32, 4), np.uint8)
    holes[:16, :, 0], holes[:16, :, 3] = 200, 255  # red above; below black that nobody sees
    Image.fromarray(holes).save(tmp_path / "holes.png")
    seen = load.read_picture(tmp_path / "holes.png")
    assert seen[:, 0, 0].tolist() == [200, 0, 0] and seen[:, 31, 0].tolist() == [255, 255, 255]
    named = Image.new("RGB", (32, 32), (7, 7, 7))  # PNG may name one colour that is to be seen through
    named.putpixel((0, 0), (9, 9, 9))
    named.save(tmp_path / "named.png", transparency=(7, 7, 7))
    seen = load.read_picture(tmp_path / "named.png")
    assert seen[:, 0, 0].tolist() == [9, 9, 9] and seen[:, 31, 0].tolist() == [255, 255, 255]


def test_orientation_that_is_faulty_leaves_the_picture_as_it_lies(tmp_path):
    """Reported: one value of the wrong type in an EXIF block, and the whole folder ended in a traceback."""
    half = Image.new("RGB", (32, 32), (0, 0, 0))
    half.paste((250, 250, 250), (0, 0, 16, 32))  # left half bright
    turn, wrong = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0), struct.pack("<HHIf", 0x103, 11, 1, float("nan"))
    for name, entries, bright in (("turned", [turn], (0, slice(16))), ("faulty", [turn, wrong], (slice(16), 0))):
        block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + b"\0" * 4
        half.save(tmp_path / "phone.jpg", exif=block, quality=95)
        columns_or_rows = load.read_picture(tmp_path / "phone.jpg")[0].float()
        top, left = columns_or_rows[:12].mean(), columns_or_rows[:, :12].mean()
        assert (top > 200 and left < 150) if name == "turned" else (left > 200 and top < 150)
    whole = (tmp_path / "phone.jpg").read_bytes()
    (tmp_path / "phone.jpg").write_bytes(whole[: len(whole) - 60])  # pixels that are missing are not ignored with it
    with pytest.raises(utils.InputError, match="phone.jpg can't be read as a picture"):
        load.read_picture(tmp_path / "phone.jpg")


def test_whatever_pillow_raises_names_the_file(tmp_path, monkeypatch):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    for kind in (struct.error, IndexError, TypeError, KeyError, MemoryError):
        def fail(*_, kind=kind):
            raise kind("damaged")

        monkeypatch.setattr(Image.Image, "convert", fail)
        with pytest.raises(utils.InputError, match="a.png can't be read as a picture"):
            load.read_picture(tmp_path / "a.png")


@pytest.mark.parametrize("odd, seen", [(np.inf, 255), (-np.inf, 0), (np.nan, 0)])
def test_values_that_are_not_finite_leave_the_rest_of_a_float_picture_visible(tmp_path, odd, seen):
    grey = np.linspace(1000, 2000, 32 * 32, dtype=np.float32).reshape(32, 32)
    grey[5, 7] = odd
    Image.fromarray(grey).save(tmp_path / "depth.tif")
    x = load.read_picture(tmp_path / "depth.tif")[0]
    assert x[5, 7] == seen and x[0, 0] == 0 and x[31, 31] == 255 and len(x.unique()) > 250
    grey[:] = odd
    Image.fromarray(grey).save(tmp_path / "depth.tif")
    assert len(load.read_picture(tmp_path / "depth.tif").unique()) == 1
    wide = np.float32([-3e38, 3e38]).repeat(512).reshape(32, 32)
    Image.fromarray(wide).save(tmp_path / "depth.tif")
    assert load.read_picture(tmp_path / "depth.tif").unique().tolist() == [0, 255]


def test_hidden_files_and_folders_are_passed_over(tmp_path, capsys):
    """Jupyter's .ipynb_checkpoints, macOS's ._1.png; a folder that lies in a hidden one is read all the same."""
    root = make_folder(tmp_path / ".cache" / "pictures")
    plain = load.load_data(str(root))
    for part in ("train", "test"):
        for place in (".ipynb_checkpoints", "cat/.ipynb_checkpoints", "dog/more/.hidden/deep"):
            (root / part / place).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(root / part / place / "0.png")
            (root / part / place / "notes.txt").write_text("whatever")
        (root / part / "cat" / "._1.png").write_bytes(b"\0\5\x16\7")
    (root / "train" / ".empty").mkdir()
    again = load.load_data(str(root))
    assert again.classes == ["cat", "dog"] and "passed over" not in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(plain[:6], again[:6]))
    (root / "train" / "cat").rename(root / "train" / ".cat")
    (root / "train" / "dog").rename(root / "train" / ".dog")
    with pytest.raises(utils.InputError, match="Couldn't find any class folder in .*train; give a folder"):
        load.load_data(str(root))


def test_the_split_takes_every_training_picture_once(tmp_path):
    data = load.load_data(str(make_folder(tmp_path, n=20)))
    both = torch.cat([data.train_x, data.val_x]).flatten(1)
    assert len(both) == 40 and len(both.unique(dim=0)) == 40
    again = load.load_data(str(tmp_path))
    assert torch.equal(data.val_x, again.val_x)


def test_statistics_are_those_of_the_training_part_alone(tmp_path):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=g)
    mean, std = load.channel_statistics(x)
    exact = x.double() / 255
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(std.double(), exact.std((0, 2, 3), correction=0), atol=1e-6, rtol=0)
    data = load.load_data(str(make_folder(tmp_path)))
    exact = data.train_x.double() / 255
    torch.testing.assert_close(data.mean.double(), exact.mean((0, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(data.std.double(), exact.std((0, 2, 3), correction=0), atol=1e-6, rtol=0)


def one_class(root):
    make_folder(root, classes=("cat",))


def empty_class(root):
    make_folder(root)
    (root / "train" / "newt").mkdir()
    (root / "test" / "newt").mkdir()


def broken_picture(root):
    make_folder(root)
    (root / "train" / "cat" / "3.png").write_bytes((root / "train" / "cat" / "3.png").read_bytes()[:200])


def other_classes(root):
    make_folder(root)
    (root / "test" / "dog").rename(root / "test" / "wolf")


def no_test(root):
    make_folder(root)
    (root / "test").rename(root / "other")


@pytest.mark.parametrize("spoil, message", [
    (one_class, "the same classes, two at least"), (empty_class, "classes newt"),
    (broken_picture, "cat/3.png can't be read as a picture"), (other_classes, "only in one of them: dog, wolf"),
    (no_test, "test'; give a folder with pictures in train/CLASS"), (lambda root: None, "train'; give a folder")])
def test_bad_folders_are_named(tmp_path, spoil, message):
    spoil(tmp_path)
    with pytest.raises(utils.InputError, match=message):
        load.load_data(str(tmp_path))


def fake_archive(path):
    """An archive of the original's layout; its pictures are noise, so torchvision's checksums do not match."""
    with tarfile.open(path, "w:gz") as tar:
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = 10
            tar.addfile(info, io.BytesIO(b"0123456789"))


def test_a_damaged_cifar10_is_an_error_and_no_reason_to_fall_back(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "DATA_DIR", tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(utils.InputError, match="damaged or incomplete"):
        load.load_data()
    (tmp_path / "cifar-10-batches-py").rmdir()
    fake_archive(tmp_path / load.ARCHIVE)
    with pytest.raises(utils.InputError, match="not the expected file"):
        load.load_data()
    monkeypatch.setattr(load, "MD5", __import__("hashlib").md5((tmp_path / load.ARCHIVE).read_bytes()).hexdigest())
    with pytest.raises(utils.InputError, match="damaged or incomplete"):
        load.load_data()


def test_without_a_network_the_stand_in_takes_over_unless_the_real_set_was_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils, "DATA_DIR", tmp_path)
    monkeypatch.setattr(load, "URLS", ["http://127.0.0.1:9/x.tar.gz"])
    data = load.load_data()
    assert data.stand_in and data.name == "shapes" and "STAND-IN" in capsys.readouterr().out
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        load.load_data("cifar10")


def test_the_linear_model_has_a_hundred_steps_on_a_small_folder_too(monkeypatch):
    """Five passes over so few pictures would be five steps; where five passes are more than that, they stay five."""
    steps, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(step(self)))
    x, y = load.draw_shapes(700, 0)  # three steps a pass
    for n, options, expected in ((200, {}, 100), (700, {}, 102), (700, {"steps": 10}, 15)):
        data = load.Data(*[x[:n], y[:n]] * 3, load.SHAPES, *load.channel_statistics(x[:n]), "", "", "")
        steps.clear()
        load.linear_baseline(data, **options)
        assert len(steps) == 3 * expected  # for each of three learning rates


# ---------------------------------------------------------------------------------------------- augmentation
PICTURES = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def test_augmentation_against_torchvision():
    mirrored = torch.tensor([True, False, True, False, False, True])
    down, right = torch.tensor([[0, 1, -2, 3, -4, 4], [0, -1, 2, 4, -4, -3]])
    flipped, shifted = load.augment(PICTURES, 0, 0, mirrored), load.shift(PICTURES, down, right, 4)
    top, left = torch.tensor([[0, 5, 20, 28, -3, 31], [0, 7, 28, 28, -7, 3]])
    fill = torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None]
    holes = load.cutout(PICTURES, top, left, 8, fill)
    for i, x in enumerate(PICTURES):
        assert torch.equal(flipped[i], TF.hflip(x) if mirrored[i] else x)
        padded = TF.pad(x, 4, padding_mode="reflect")
        assert torch.equal(shifted[i], TF.crop(padded, 4 - int(down[i]), 4 - int(right[i]), 32, 32))
        t, le = max(0, int(top[i])), max(0, int(left[i]))
        h, w = int(top[i]) + 8 - t, int(left[i]) + 8 - le
        assert torch.equal(holes[i], TF.erase(x, t, le, h, w, fill.expand(3, 1, 1)))


def test_augment_is_random_and_off_at_zero():
    torch.manual_seed(0)
    many = PICTURES[:1].repeat(400, 1, 1, 1)
    plain = load.augment(many, 0, 0)
    same = (plain == many).flatten(1).all(1)
    assert 140 < same.sum() < 260  # half are mirrored
    assert torch.equal(plain[~same][0], many[0].flip(-1))
    assert len(load.augment(many, 2, 0).flatten(1).unique(dim=0)) == 50  # 2 x 5 x 5
    unmirrored = torch.zeros(400, dtype=torch.bool)
    assert torch.equal(load.augment(many, 0, 0, unmirrored), many)
    changed = (load.augment(many, 0, 8, unmirrored) != many).any(1).float().mean()
    assert 0.035 < changed < 0.05  # 64 pixels of 1,024 where all of the hole lies inside: (32 / 39)^2 / 16 on average


# ---------------------------------------------------------------------------------------------- from scratch
def test_from_scratch_agrees_with_pytorch():
    differences = from_scratch.check_against_pytorch()
    assert len(differences) == 8 and max(differences.values()) < 1e-12


def test_from_scratchs_network_in_use_is_pytorchs_in_eval_mode():
    g = torch.Generator().manual_seed(0)
    w = from_scratch.init(5, 8, (6, 7), g)
    w["head"], x = torch.randn(w["head"].shape, generator=g), torch.randn(4, 3, 8, 8, generator=g)
    running, h = {}, x
    for i, M in ((1, 6), (2, 7)):
        mean, variance = torch.randn(M, generator=g), torch.rand(M, generator=g) + 0.5
        w[f"gain{i}"], w[f"bias{i}"] = torch.randn(2, M, generator=g)
        running[i] = mean.view(1, M, 1, 1), (variance + 1e-5).rsqrt().view(1, M, 1, 1)
        h = F.batch_norm(F.conv2d(h, w[f"conv{i}"], w[f"b{i}"], padding=1), mean, variance, w[f"gain{i}"],
                         w[f"bias{i}"], training=False)
        h = F.max_pool2d(h.relu(), 2)
    torch.testing.assert_close(from_scratch.forward(x, w, running)[0], h.flatten(1) @ w["head"], atol=1e-4, rtol=1e-4)


def test_from_scratch_learns_more_than_a_linear_model(tmp_path):
    for i, (picture, k) in enumerate(zip(*load.draw_shapes(3000, 0))):
        if k < 3:
            folder = tmp_path / "data" / ("test" if i % 5 == 0 else "train") / load.SHAPES[k]
            folder.mkdir(parents=True, exist_ok=True)
            TF.to_pil_image(picture).save(folder / f"{i}.png")
    out = call_main(from_scratch, "--data", tmp_path / "data", "--epochs", 8, "--batch-size", 50, "--out", tmp_path)
    linear, ours = (float(out.split(name)[1].split("%")[0]) for name in ("linear model on the pixels", "this network"))
    assert ours > linear + 10 and (tmp_path / "from_scratch.png").stat().st_size > 1000


def test_im2col_is_unfold_and_col2im_its_transpose():
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    columns = from_scratch.im2col(x, 3)
    assert torch.equal(columns, F.unfold(x, 3, padding=1))
    back = from_scratch.col2im(columns, 3, 5, 7, 3)
    torch.testing.assert_close(back, F.fold(columns, (5, 7), 3, padding=1))


# ---------------------------------------------------------------------------------------------- models, training
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])


def config(model, **more):
    return dict(model=model, classes=10, head_only=False) | more


@pytest.mark.parametrize("name", ["simple", "resnet"])
def test_a_batch_can_be_overfitted(name):
    torch.manual_seed(0)
    model = {"simple": train.Simple, "resnet": train.ResNet}[name](10, MEAN, STD, widths=(32, 64, 64))
    optimizers = train.make_optimizers(model, 0.05, 0.1, 16)
    x, y = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8), torch.arange(16) % 10
    for _ in range(40):
        loss = F.cross_entropy(model(x), y, reduction="sum")
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert loss.item() / 16 < 0.3


@pytest.mark.parametrize("name", ["simple", "resnet", "transfer"])
def test_every_trained_parameter_has_exactly_one_optimizer(name):
    model = train.build(config(name, head_only=True), MEAN, STD)
    held = [p for o in train.make_optimizers(model, 1.0, 1.0, 8) for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_normalise_and_conv_against_torchvision_and_conv2d():
    x = PICTURES
    expected = TF.normalize(x.float() / 255, MEAN.tolist(), STD.tolist())
    torch.testing.assert_close(train.Normalise(MEAN, STD)(x), expected, atol=1e-6, rtol=1e-5)
    layer, reference = train.Conv(3, 5), torch.nn.Conv2d(3, 5, 3, padding=1, bias=False)
    reference.weight.data = layer.weight.data.view(5, 3, 3, 3)
    torch.testing.assert_close(layer(expected), reference(expected))


def test_the_head_is_a_mean_and_a_step_is_per_picture():
    """Twice the same pictures in a batch: twice the summed gradient, so twice the SGD step; Muon's has one length."""
    head, x = train.Head(8, 3), torch.randn(5, 8)
    torch.testing.assert_close(head(x), (x[:, None] * head.weight).mean(2))
    moved = []
    for rows in (PICTURES, torch.cat([PICTURES, PICTURES])):
        torch.manual_seed(0)
        model = train.Simple(10, MEAN, STD, dropout=0.0)
        before = [p.detach().clone() for p in (model[-1].weight, model[1].weight)]
        optimizers = train.make_optimizers(model, 0.05, 0.1, 6)
        F.cross_entropy(model(rows), torch.arange(len(rows)) % 6, reduction="sum").backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.0
            optimizer.step()
        moved.append([(p - old).norm().item() for p, old in zip((model[-1].weight, model[1].weight), before)])
    (head_once, conv_once), (head_twice, conv_twice) = moved
    assert head_twice == pytest.approx(2 * head_once, rel=0.01) and conv_twice == pytest.approx(conv_once, rel=0.1)


def test_behind_batch_norm_the_size_of_weights_changes_nothing():
    torch.manual_seed(0)
    conv, norm, x = train.Conv(3, 5), train.batch_norm(5), torch.randn(4, 3, 8, 8)
    assert conv.weight.norm(dim=1).square().mean().item() == pytest.approx(1, abs=1e-5)
    before, direction = norm(conv(x)), F.normalize(conv.weight.detach().flatten(), dim=0)
    conv.weight.data *= 7
    torch.testing.assert_close(norm(conv(x)), before, atol=1e-4, rtol=1e-4)
    conv.rescale()
    assert conv.weight.norm(dim=1).square().mean().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(F.normalize(conv.weight.detach().flatten(), dim=0), direction)


def test_the_stem_whitens():
    x, _ = load.draw_shapes(400, 0)
    model = train.ResNet(10, *load.channel_statistics(x))
    model.whiten(x)
    with torch.no_grad():
        out = model.stem(model.normalise(x))[:, :12]  # (N, 12, H-1, W-1); the other twelve are the negatives
    flat = out.transpose(0, 1).flatten(1).double()
    second = flat @ flat.T / flat.shape[1]
    off = second - torch.diag(second.diag())
    assert off.abs().max() < 0.01 and 0.5 < second.diag().min() and second.diag().max() < 1.01


def test_schedule_rises_then_falls():
    factors = [train.schedule(step, 1000) for step in range(1000)]
    top = factors.index(max(factors))
    assert 45 < top < 55 and max(factors) == pytest.approx(1, abs=0.01) and 0 < factors[-1] < 0.002
    assert all(a < b for a, b in zip(factors[:top], factors[1 : top + 1]))
    assert all(a > b for a, b in zip(factors[top:], factors[top + 1 :]))


def test_six_views_are_the_mean_of_six_predictions():
    torch.manual_seed(0)
    model = train.build(config("simple"), MEAN, STD)
    model(PICTURES)  # batch statistics
    views = [PICTURES, load.shift(PICTURES, *torch.ones(2, 6, dtype=torch.int64), 1),
             load.shift(PICTURES, *-torch.ones(2, 6, dtype=torch.int64), 1)]
    views += [TF.hflip(view) for view in views]
    model.eval()
    with torch.no_grad():
        expected = torch.stack([model(view) for view in views]).mean(0)
    torch.testing.assert_close(train.predict(model, PICTURES, torch.float32, tta=True), expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        expected = torch.stack([model(view) for view in views[:3]]).mean(0)
    three = train.predict(model, PICTURES, torch.float32, tta=True, flip=False)
    torch.testing.assert_close(three, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["simple", "resnet", "transfer"])
def test_pictures_that_are_no_bytes_are_refused(name):
    """A network that normalises by itself takes a picture of 0 .. 1 for black, and names it with confidence."""
    model = train.build(config(name), MEAN, STD).eval()
    dark = torch.tensor([0, 1], dtype=torch.uint8).repeat(3 * 512).view(1, 3, 32, 32)
    for x in (PICTURES[:1], PICTURES[:1].float(), dark, dark.float()):  # whole numbers may come as floats
        assert model(x).isfinite().all()
    scaled = PICTURES[:1] / 255
    for x in (scaled, TF.normalize(scaled, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])):
        with pytest.raises(utils.InputError, match="scaled already; give bytes, 0 to 255"):
            model(x)
    for x in (scaled, PICTURES.float(), PICTURES[0], PICTURES.permute(0, 2, 3, 1), PICTURES[:, :, :16], PICTURES[:, :1],
              PICTURES.numpy(), [1]):
        with pytest.raises(utils.InputError, match=r"a tensor of bytes, uint8 of \(N, 3, 32, 32\).*; this is") as error:
            train.predict(model, x, torch.float32)
        assert str(error.value).isprintable()
    assert "this is ndarray, uint8 of (6, 3, 32, 32)" in str(pytest.raises(
        utils.InputError, train.predict, model, PICTURES.numpy(), torch.float32).value)


def test_transfer_takes_torchvisions_weights_and_a_frozen_body_stays(tmp_path):
    torch.manual_seed(0)
    donor = torchvision.models.resnet18()
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    model = train.build(config("transfer", head_only=True), MEAN, STD)
    model.load(tmp_path / "w.pth")
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.equal(model.body.conv1.weight, donor.conv1.weight) and model.body.fc.out_features == 10
    optimizer, = train.make_optimizers(model, 1e-2, 1.0, 6)
    F.cross_entropy(model(PICTURES), torch.arange(6)).backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"body.fc.weight", "body.fc.bias"}


def test_weights_of_another_architecture_are_refused(tmp_path):
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "w.pth")
    model = train.build(config("transfer"), MEAN, STD)
    with pytest.raises(utils.InputError, match="holds no weights of resnet18"):
        model.load(tmp_path / "w.pth")
    torch.save({0: torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(utils.InputError, match="holds no weights of resnet18"):
        model.load(tmp_path / "w.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"code": os.getcwd}, tmp_path / "code.pth")  # what weights_only refuses to run
    for name in ("text.pth", "code.pth", "none.pth"):
        with pytest.raises(utils.InputError, match=f"{name} holds no weights of resnet18; fetch https") as error:
            model.load(tmp_path / name)
        assert "weights_only" not in str(error.value)


def test_weights_that_cannot_be_downloaded_are_a_clear_error(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", "/nowhere")
    with pytest.raises(utils.InputError, match="no weights could be downloaded .*fetch https.*as weights"):
        train.build(config("transfer"), MEAN, STD).load(None)


# ---------------------------------------------------------------------------------------------- use
def test_counting_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(0)
    y, guess = torch.randint(5, (200,), generator=g), torch.randint(4, (200,), generator=g)  # 4 is never named
    confusion = load_model.confusion_matrix(y, guess, 5)
    assert np.array_equal(confusion, metrics.confusion_matrix(y, guess))
    theirs = metrics.precision_recall_fscore_support(y, guess, zero_division=0)[:3]
    for ours, expected in zip(load_model.precision_recall_f1(confusion), theirs):
        np.testing.assert_allclose(ours, expected)


@pytest.mark.parametrize("name", ["simple", "resnet", "transfer"])
def test_grad_cam_against_its_definition(name):
    torch.manual_seed(0)
    model = train.build(config(name), MEAN, STD)
    model(PICTURES)
    model.eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05) if p.dim() > 1 else None
    k = torch.arange(6)
    maps, fine = (load_model.grad_cam(model, PICTURES, k, average) for average in (True, False))
    assert maps.shape == (6, 32, 32) and maps.min() >= 0 and maps.amax() <= 1
    ## picture by picture and channel by channel, with autograd on the layer's output put in by hand
    layer, kept = load_model.parts_of(model)[1], {}
    hook = layer.register_forward_hook(lambda m, i, o: kept.update(a=o) or o.retain_grad())
    for i in range(2):
        model.zero_grad()
        model(PICTURES[i : i + 1])[0, k[i]].backward()
        a, gradient = kept["a"][0], kept["a"].grad[0]
        for got, weight in ((maps, gradient.mean((1, 2))), (fine, gradient)):
            by_hand = sum(w * channel for w, channel in zip(weight, a)).clamp(min=0).detach()
            by_hand = F.interpolate(by_hand[None, None], size=(32, 32), mode="bilinear")[0, 0]
            torch.testing.assert_close(got[i], by_hand / by_hand.max().clamp(min=1e-12), atol=1e-3, rtol=1e-3)
    hook.remove()


# ---------------------------------------------------------------------------------------------- as users run them
def small(tmp_path):
    if not (tmp_path / "data").exists():
        make_folder(tmp_path / "data", n=40)
    return ["--data", tmp_path / "data", "--device", "cpu", "--batch-size", 20]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of train.py on drawn shapes of three classes, as a user starts it: (folder, what it printed, data)."""
    place = tmp_path_factory.mktemp("trained")
    for i, (picture, k) in enumerate(zip(*load.draw_shapes(900, 0))):
        if k < 3:
            folder = place / "data" / ("test" if i % 5 == 0 else "train") / load.SHAPES[k]
            folder.mkdir(parents=True, exist_ok=True)
            TF.to_pil_image(picture).save(folder / f"{i}.png")
    options = "--device cpu --batch-size 20 --model simple --epochs 8 --tta --dtype float32".split()
    out = run_script(FOLDER / "train.py", "--data", place / "data", *options, "--out", place / "o")
    return place / "o", out, load.load_data(str(place / "data"))


def test_train_learns_and_leaves_what_it_should(trained):
    folder, out, data = trained
    assert "most frequent class" in out and "mean over six views" in out
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["metrics"]["test_accuracy"] > 0.7 > metrics["metrics"]["majority_accuracy"]
    assert len(metrics["history"]) == 8 and (folder / "history.png").stat().st_size > 1000
    model, saved = load_model.load_network(folder / "model.pt")
    assert saved["classes"] == load.SHAPES[:3] == sorted(load.SHAPES[:3])
    accuracy = train.evaluate(model, data.test_x, data.test_y, torch.float32)[1]
    assert accuracy == pytest.approx(metrics["metrics"]["test_accuracy"], abs=1e-6)


def test_load_model_on_what_train_left(trained, tmp_path):
    model = ["--model", trained[0] / "model.pt", "--out", tmp_path]
    out = call_main(load_model, *model)
    assert "precision" in out and "crescent" not in out and load.SHAPES[0] in out
    for name in ("confusion", "feature_maps", "grad_cam"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    Image.new("RGB", (40, 32), (200, 0, 0)).save(tmp_path / "one.png")
    out = call_main(load_model, *model, "--image", tmp_path / "one.png")
    assert out.count("%") == 3 and "wrote grad_cam.png" in out
    (tmp_path / "one.png").write_text("no picture")
    assert "can't be read as a picture" in refusal(load_model, *model, "--image", tmp_path / "one.png")
    assert "not allowed with" in refusal(load_model, *model, "--image", tmp_path / "one.png", "--data", "shapes")
    assert "does not exist" in refusal(load_model, "--model", tmp_path / "none.pt", "--out", tmp_path)
    saved = torch.load(trained[0] / "model.pt", weights_only=True)
    saved["config"].pop("classes")
    torch.save(saved, tmp_path / "old.pt")
    assert "another version of the model" in refusal(load_model, "--model", tmp_path / "old.pt", "--out", tmp_path)


def test_the_weights_kept_are_the_best_by_validation_not_the_last(tmp_path):
    """On noise, validation goes up and down by chance."""
    call_main(train, *small(tmp_path), *"--model simple --epochs 8 --dtype float32".split(), "--out", tmp_path / "o")
    history = json.loads((tmp_path / "o" / "metrics.json").read_text())["history"]
    best = max(history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    model, saved = load_model.load_network(tmp_path / "o" / "model.pt")
    assert saved["metrics"]["epoch"] == best["epoch"] < 8
    data = load.load_data(str(tmp_path / "data"))
    loss = train.evaluate(model, data.val_x, data.val_y, torch.float32)[0]
    assert loss == pytest.approx(best["val_loss"], abs=1e-4) and abs(loss - history[-1]["val_loss"]) > 1e-3


def test_of_epochs_that_are_correct_equally_often_the_one_with_the_lowest_loss_is_kept(tmp_path, monkeypatch):
    losses = iter([9.0, 0.9, 0.7, 0.5, 0.5, 0.6, 0.0, 0.1])  # before training, six epochs, test
    accuracies = iter([0.0, 0.5, 0.8, 0.8, 0.8, 0.8, 0.7, 0.5])
    monkeypatch.setattr(train, "evaluate", lambda *_: (next(losses), next(accuracies)))
    monkeypatch.setattr(train, "linear_baseline", lambda data: 0.625)
    options = "--model simple --epochs 6 --dtype float32".split()
    out = call_main(train, *small(tmp_path), *options, "--out", tmp_path / "o")
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["metrics"]["best_epoch"] == 3
    assert load_model.load_network(tmp_path / "o" / "model.pt")[1]["metrics"]["epoch"] == 3
    assert "the linear model is better here, by 12.5%" in out and "24 steps are few" in out


def test_advice_names_the_better_baseline_and_is_silent_where_the_network_wins(capsys):
    train.advise(290, 290, {"the most frequent class": 0.4, "the linear model": 0.6}, 0.6)
    assert capsys.readouterr().out == ""
    train.advise(289, 290, {"the most frequent class": 0.7, "the linear model": 0.6}, 0.65)
    few, better = capsys.readouterr().out.splitlines()
    assert few.startswith("289 steps are few") and better.startswith("the most frequent class is better here, by 5.0%")


def draw_arrows(root, train, test=60):
    """Arrows that point left or right, at any place and in any two colours."""
    rng = np.random.default_rng(0)
    for part, n in (("train", train), ("test", test)):
        for i in range(n):
            name, end = ("left", "right")[i % 2], (4, 27)[i % 2]
            picture, y = np.empty((32, 32, 3), np.uint8), rng.integers(9, 23)
            picture[:], paint = rng.integers(0, 100, 3), rng.integers(150, 256, 3)
            picture[y, 4:28] = paint
            for step in range(6):
                picture[[y - step, y + step], end + step * (1 if name == "left" else -1)] = paint
            (root / part / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(root / part / name / f"{i}.png")
    return root


def test_arrows_are_learned_without_mirroring_alone(tmp_path):
    draw_arrows(tmp_path / "data", 120)
    options = "--device cpu --model simple --epochs 5 --batch-size 12 --dtype float32 --tta".split()
    found = {}
    for more in ([], ["--no-flip"]):
        out = call_main(train, "--data", tmp_path / "data", *options, *more, "--out", tmp_path / "o")
        found[bool(more)] = json.loads((tmp_path / "o" / "metrics.json").read_text())["metrics"]
        assert f"mean over {'three' if more else 'six'} views" in out
        assert ("the linear model is better here" in out) == (not more)
    assert found[True]["test_accuracy"] > 0.9 and found[True]["test_accuracy_three_views"] > 0.9
    assert found[False]["test_accuracy_six_views"] < 0.7  # an arrow and its mirror image have one answer


def test_the_size_of_a_run_follows_the_number_of_pictures():
    """On CIFAR-10 the presets to the letter; on fewer pictures as many steps at least; what is given stays."""
    for preset in train.PRESETS.values():
        full = preset["epochs"], preset["batch_size"]
        size = partial(load.run_size, epochs=full[0], batch_size=full[1], steps=preset["steps"])
        assert size(45_000) == size(50_000) == full
        for n in (9, 54, 162, 450, 1800, 9000, 30_000):
            epochs, batch_size = size(n)
            assert 32 <= batch_size <= full[1] and epochs >= full[0]
            steps = epochs * -(-n // batch_size)
            assert steps >= preset["steps"] and epochs * n <= max(steps * 32, full[0] * n)  # no more than these need
        assert size(450, given=(3, 7)) == (3, 7) and size(450, given=(3, None)) == (3, 32)
        assert size(450, given=(None, 225)) == (-(-preset["steps"] // 2), 225)
    assert load.run_size(45_000, 2, 100, 290) == (2, 100)  # from_scratch.py


def test_a_small_folder_gets_a_run_of_its_size_and_what_was_chosen_is_printed(tmp_path, monkeypatch):
    fit, steps = train.fit, []

    def few_epochs(model, optimizers, part, val, epochs, batch_size, *rest):
        steps.append((epochs, batch_size))
        return fit(model, optimizers, part, val, 1, batch_size, *rest)

    monkeypatch.setattr(train, "fit", few_epochs)
    data = ["--data", make_folder(tmp_path / "data", n=40), "--model", "simple", "--dtype", "float32"]
    out = call_main(train, *data, "--out", tmp_path / "o")
    assert steps == [(97, 32)]  # 72 pictures
    assert "97 epochs in batches of 32 (for 45,000 pictures: 16, 1,000), 291 steps" in out
    options = torch.load(tmp_path / "o" / "checkpoint.pt", weights_only=True)["options"]
    assert (options["epochs"], options["batch_size"]) == (97, 32)  # and so --resume goes on with the same


def test_without_flips_no_picture_is_mirrored(monkeypatch):
    """Not in an even epoch, and not in an odd one, whose pictures are turned around."""
    seen = []
    monkeypatch.setattr(train, "augment", lambda x, pad, cut, mirrored: seen.append(mirrored) or x)
    model = train.build(config("simple"), MEAN, STD)
    part = PICTURES, torch.arange(6)
    for flip in (False, True):
        seen.clear()
        optimizers = train.make_optimizers(model, 0.05, 0.1, 6)
        list(train.fit(model, optimizers, part, part, 2, 6, 0, torch.float32, flip=flip))
        assert [bool(mirrored.any()) for mirrored in seen] == [flip, flip]


def test_the_readmes_model_from_python(trained, tmp_path, monkeypatch):
    folder, _, data = trained
    for name in ("load", "train", "load_model"):  # of this chapter, and not of one that another test imported
        monkeypatch.setitem(sys.modules, name, globals()[name])
    code, = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(code.splitlines()) == 5
    TF.to_pil_image(data.test_x[0]).save(tmp_path / "my_cat.png")
    names = {}
    exec(code.replace("02_cnn/outputs", str(folder)).replace("my_cat.jpg", str(tmp_path / "my_cat.png")), names)
    assert torch.equal(names["x"][0], data.test_x[0]) and names["p"].shape == (1, 3)
    expected = load_model.predict(names["model"], data.test_x[:1], torch.float32).softmax(-1)
    torch.testing.assert_close(names["p"], expected)
    assert names["p"].sum().item() == pytest.approx(1, abs=1e-5) and names["saved"]["classes"] == data.classes


@pytest.mark.parametrize("model", ["simple", "resnet"])
def test_a_run_that_was_stopped_goes_on_bit_identically(tmp_path, monkeypatch, model):
    options = [*small(tmp_path), "--model", model, "--dtype", "float32", "--cutout", 6, "--epochs", 4, "--out"]
    monkeypatch.setattr(train, "ResNet", partial(train.ResNet, widths=(16, 32, 32)))  # Muon's steps take less time
    call_main(train, *options, tmp_path / "whole")

    def stop(model, *rest):
        stop.calls += 1
        if stop.calls == 4:  # before training, and after each epoch: in the third, before anything of it is saved
            raise KeyboardInterrupt
        return evaluate(model, *rest)

    evaluate, stop.calls = train.evaluate, 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "evaluate", stop)
        call_main(train, *options, tmp_path / "cut")
    out = call_main(train, *options, tmp_path / "cut", "--resume")
    assert "epoch   3" in out and "epoch   2" not in out
    whole, cut = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "cut"))
    assert all(torch.equal(whole["model"][k], cut["model"][k]) for k in whole["model"])
    assert [r["val_loss"] for r in whole["history"]] == [r["val_loss"] for r in cut["history"]]
    again = [*options, tmp_path / "cut", "--resume"]
    assert "of a run with --muon-lr" in refusal(train, *again, "--muon-lr", 0.5)
    make_folder(tmp_path / "data" / "train" / "cat" / "more", n=1)
    assert "not the set it was then" in refusal(train, *again)


def test_bad_options_are_one_sentence(tmp_path):
    cases = ((["--epochs", 0], "--epochs: 0 is not in [1, inf)"), (["--small", 2], "--small: 2 is not in [0, 1]"),
             (["--pad", 17], "--pad: 17 is not in [0, 16]"), ([*small(tmp_path), "--resume"], "does not exist"),
             (["--data", tmp_path / "none"], "give a folder with pictures in train/CLASS/*"),
             (["--model", "simple", "--head-only"], "--head-only and --weights are for --model transfer alone"))
    for options, message in cases:
        assert message in refusal(train, *options, "--out", tmp_path / "o")
    assert "weights" in refusal(train, *small(tmp_path), "--model", "transfer", "--weights", tmp_path / "x", "--out",
                                tmp_path / "o")
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        call_main(train, "--help")
    assert out.getvalue() == "" or "simple: epochs 16" in out.getvalue()


def test_a_loss_that_becomes_nan_stops_the_run(tmp_path):
    options = [*small(tmp_path), "--model", "simple", "--epochs", 8, "--out", tmp_path / "o"]
    assert "the loss became" in refusal(train, *options, "--lr", "1e37", "--muon-lr", "1e37")


def test_a_set_more_is_one_function_and_one_line(tmp_path, monkeypatch, capsys):
    x, y = load.draw_shapes(200, 5)
    monkeypatch.setitem(load.SETS, "doodles", (lambda: (x, y, x, y, load.SHAPES), "Photographs"))
    options = "--data doodles --model simple --epochs 1 --batch-size 90 --device cpu".split()
    out = call_main(train, *options, "--out", tmp_path)
    assert out.count("this run uses doodles in place of Photographs") == 2 and "doodles, stand-in: 180 pictures" in out
    assert json.loads((tmp_path / "metrics.json").read_text())["stand_in"] is True


def test_the_networks_come_alone_and_speak_of_arguments():
    """Another program takes ResNet: nothing that parses options, fetches or draws comes along."""
    program = f"""if True:
        import sys, torch, torchvision
        sys.path[:0] = [{str(ROOT)!r}, {str(FOLDER)!r}]
        loud = "argparse", "requests", "matplotlib"
        for name in list(sys.modules):
            if name.split(".")[0] in loud:
                del sys.modules[name]
        threads, state = torch.get_num_threads(), torch.get_rng_state()
        import load_model, train
        assert not [name for name in sys.modules if name.split(".")[0] in loud]
        assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
        model = train.ResNet(10, torch.zeros(3), torch.ones(3))
        assert model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 10)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_load_and_from_scratch_run_on_the_stand_in(tmp_path):
    out = call_main(load, "--data", "shapes", "--out", tmp_path)
    assert out.count("STAND-IN") == 2 and "9,000 pictures" in out and (tmp_path / "samples.png").stat().st_size > 1000


def test_experiment_makes_its_tables(tmp_path, monkeypatch):
    ingredients, depth = (experiment.TABLES[part][0] for part in ("ingredients", "depth"))
    monkeypatch.setitem(experiment.TABLES, "ingredients", (ingredients, 5, 50))  # two steps of fifty pictures
    monkeypatch.setitem(experiment.TABLES, "depth", (dict(list(depth.items())[:3]), 5, 50))
    make_folder(tmp_path / "data", n=40)
    options = "--device cpu --pictures 500 --dtype float32".split()
    options += ["--data", tmp_path / "data", "--out", tmp_path / "o"]
    for part, rows, seeds in (("ingredients", 15, 1), ("depth", 3, 2)):
        out = call_main(experiment, *options, "--seeds", seeds, "--only", part)
        found = json.loads((tmp_path / "o" / f"experiment_{part}.json").read_text())["rows"]
        assert len(found) == rows
        for row in found:
            assert row["name"] in out and len(row["accuracy"]) == seeds
            assert row["mean"] == pytest.approx(np.mean(row["accuracy"]))
            assert row["std"] == pytest.approx(np.std(row["accuracy"], ddof=1) if seeds > 1 else 0)
        assert (tmp_path / "o" / f"experiment_{part}.png").stat().st_size > 1000
    assert "--seeds: 0 is not in [1, inf)" in refusal(experiment, "--seeds", 0, "--out", tmp_path / "o")


def test_plain_and_residual_networks_have_the_same_weights_and_differ_by_the_skip():
    data = load.Data(*[None] * 6, ["a", "b"], MEAN, STD, "none", "none", "")
    torch.manual_seed(0)
    plain = experiment.deep(20, False, data)
    torch.manual_seed(0)
    residual = experiment.deep(20, True, data)
    weighted = [layer for layer in residual.modules() if isinstance(layer, (train.Conv, torch.nn.Linear))]
    assert len(weighted) == 20  # layers, as He et al. count them
    for a, b in zip(plain.parameters(), residual.parameters(), strict=True):
        assert torch.equal(a, b)
    stage, x = experiment.Stage(4, 4, 1, True), torch.rand(2, 4, 8, 8)
    stage.conv2.weight.data.zero_()  # g = 0: what is left is the skip
    assert torch.equal(stage(x), x) and not torch.equal(plain(PICTURES), residual(PICTURES))


@pytest.mark.real("cifar10-jpg")
def test_the_real_folder_has_ten_classes(tmp_path):
    for part, pictures in (("train", 5000), ("test", 1000)):
        for folder in (REAL / "cifar10-jpg" / part).iterdir():
            files = sorted(folder.iterdir())
            assert len(files) == pictures
            (tmp_path / part / folder.name).mkdir(parents=True)
            for file in files[::10]:  # to read all of them takes half a minute
                (tmp_path / part / folder.name / file.name).symlink_to(file)
    data = load.load_data(str(tmp_path))
    assert (len(data.train_y), len(data.val_y), len(data.test_y)) == (4500, 500, 1000)
    assert data.classes == "airplane automobile bird cat deer dog frog horse ship truck".split()
    assert data.test_y.bincount().tolist() == [100] * 10 and (data.train_y.bincount() > 420).all()
    means = torch.tensor([0.4914, 0.4822, 0.4465])  # of the original training pictures, as is often quoted
    torch.testing.assert_close(data.mean, means, atol=0.005, rtol=0)
