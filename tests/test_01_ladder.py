"""The exercise ladder.py against PyTorch's MLP, closed forms and itself, on chapter 01's stand-in."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import call_main

import ladder

load = ladder.load


def test_smoothness_finds_the_worst_direction():
    """With two classes and a linear model, the KL for a small r is p (1 - p) (r . (w1 - w0))^2 / 2."""
    torch.manual_seed(0)
    model, x, size = torch.nn.Linear(6, 2).double(), torch.randn(5, 6).double(), 1e-3
    logits = model(x)
    p = logits.softmax(1)
    w = model.weight[1] - model.weight[0]
    expected = (p[:, 0] * p[:, 1] * size**2 * w.square().sum() / 2).mean().item()
    found = ladder.smoothness(model, x, logits, size).item()
    assert found == pytest.approx(expected, rel=0.05)


def test_ladder_without_noise_is_the_usual_mlp():
    torch.manual_seed(0)
    net = ladder.Ladder((6, 5, 4, 3))
    layers = []
    for up, bias in zip(net.up, net.bias):
        torch.nn.init.normal_(bias)
        norm = torch.nn.BatchNorm1d(len(bias))
        norm.bias = bias
        layers += [up, norm, torch.nn.ReLU()]
    usual = torch.nn.Sequential(*layers[:-1])
    x, y = torch.randn(50, 6), torch.randint(0, 3, (50,))
    torch.testing.assert_close(net(x), usual(x))  # by the batch's own statistics
    torch.optim.swa_utils.update_bn([x[:20], x[20:]], net)
    torch.optim.swa_utils.update_bn([x[:20], x[20:]], usual)
    torch.testing.assert_close(net.eval()(x), usual.eval()(x))
    quiet = ladder.Ladder((6, 5, 4, 3), pixel_noise=0.0, noise=0.0, weight=0.0)
    quiet.load_state_dict(net.state_dict())
    torch.testing.assert_close(quiet.loss(x, y), F.cross_entropy(usual.train()(x), y))


def test_ladder_can_clean_as_well_as_wiener():
    """Of values N(mean, s^2) under noise of sigma the best guess has an error of s^2 sigma^2 / (s^2 + sigma^2)."""
    torch.manual_seed(0)
    mean, s, sigma = 3.0, 2.0, 1.5
    x, y = mean + s * torch.randn(200_000, 4), torch.zeros(200_000, dtype=torch.int64)
    net = ladder.Ladder((4, 3), pixel_noise=sigma, weight=7.0)
    with torch.no_grad():
        m, v = net.curves[0]  # a1 ... a5, for each of the four
        m[4], v[4] = mean, s**2 / (s**2 + sigma**2)
    loss = net.loss(x, y)
    blind = ladder.Ladder((4, 3), pixel_noise=sigma, weight=0.0)
    blind.load_state_dict(net.state_dict())
    cleaning = (loss - blind.loss(x, y)) / 7
    assert cleaning.item() == pytest.approx(s**2 * sigma**2 / (s**2 + sigma**2), rel=0.01)
    loss.backward()
    slopes = net.curves[0].grad[:, 4]
    assert slopes.abs().max() < 0.1  # neither another mean nor another trust would be better
    with torch.no_grad():
        v[4] += 0.2
    assert net.loss(x, y) > loss + 0.1


def test_every_row_learns_and_only_the_last_sees_the_validation_pictures(tmp_path, monkeypatch):
    data = load.with_statistics(*load.typeset(1000, "train", 1), *load.typeset(200, "val", 2),
                                *load.typeset(200, "test", 3), name="typeset", stand_in="MNIST")
    monkeypatch.setitem(load.SETS, "typeset", lambda: data)
    out = call_main(ladder, "--data", "typeset", "--epochs", 3, "--dtype", "float32", "--out", tmp_path)
    assert out.count("STAND-IN") == 2
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["step"] for row in found["history"]] == [3 * 4, 3 * 4, 3 * 5] and found["stand_in"] is True
    assert all(found["metrics"][f"{name}_test_accuracy"] > 0.6 for name in ladder.ROWS)
    assert found["metrics"]["all_val_accuracy"] is None and found["metrics"]["ladder_val_accuracy"] > 0.5
