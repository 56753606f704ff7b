"""Chapter 05 against oracles: PyTorch's attention, autograd, transformers' rotary positions and samplers."""

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import REAL, ROOT, call_main, chapter, refusal, run_script

import utils

load, from_scratch, train, load_model, experiment = chapter(
    "05_transformer", "load", "from_scratch", "train", "load_model", "experiment"
)
FOLDER = ROOT / "05_transformer"
SMALL = "--data pydocs --n-layer 2 --n-embd 32 --n-head 2 --block-size 32 --batch-size 4 --device cpu".split()


def small_gpt(**changes):
    torch.manual_seed(0)
    model = train.GPT(**{**dict(vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.0), **changes})
    for p in model.parameters():  # zero-initialised matrices would hide everything that flows through them
        torch.nn.init.normal_(p, std=0.3)
    return model


# ---------------------------------------------------------------------------------------------- load.py
def test_encode_and_decode_are_inverse_and_name_strangers():
    vocab = sorted(set("hello world"))
    assert load.decode(load.encode("hello world", vocab), vocab) == "hello world"
    with pytest.raises(utils.InputError, match="'!', 'z'"):
        load.encode("z!", vocab)


def test_batches_are_windows_with_targets_moved_by_one():
    ids = torch.arange(1000)
    stream = load.batches(ids, 8, 4, seed=0)
    passes = [[next(stream) for _ in range(31)] for _ in range(40)]  # (1000 - 1 - offset) // 8 windows, 31 full batches
    starts = []
    for batches in passes:
        x, y = (torch.cat(side) for side in zip(*batches))
        assert x.shape == y.shape == (124, 8) and torch.equal(x + 1, y)
        assert torch.equal(x[:, :1] + torch.arange(8), x)  # consecutive characters
        assert len(x.unique()) == x.numel()  # none comes twice in a pass
        assert (x[1:, 0] < x[:-1, 0]).any()  # shuffled
        starts.append(x[0, 0].item() % 8)
    assert len(set(starts)) == 8  # every offset occurs, so every character is seen in every place of a window
    x, y = passes[0][0]
    assert torch.equal(x, next(load.batches(ids, 8, 4, seed=0))[0])
    assert not torch.equal(x, next(load.batches(ids, 8, 4, seed=1))[0])
    with pytest.raises(utils.InputError, match="fewer than 4 windows of 300"):
        next(load.batches(ids, 300, 4, seed=0))


def test_split_keeps_order_and_vocabulary_is_of_train_alone(tmp_path):
    (tmp_path / "t.txt").write_text("ab" * 450 + "az" * 50, encoding="utf-8")
    data = load.load_data(str(tmp_path / "t.txt"), 8)
    assert (len(data.train), len(data.val)) == (900, 100)
    assert data.vocab == ["a", "b", load.UNKNOWN] and data.val.unique().tolist() == [0, 2]
    assert data.name == "t.txt" and not data.stand_in


def test_bigram_against_counting_by_hand():
    torch.manual_seed(0)
    train_ids, val_ids = torch.randint(5, (300,)), torch.randint(5, (50,))
    counts = [[1] * 5 for _ in range(5)]
    for a, b in zip(train_ids.tolist(), train_ids[1:].tolist()):
        counts[a][b] += 1
    losses = [-math.log(counts[a][b] / sum(counts[a])) for a, b in zip(val_ids.tolist(), val_ids[1:].tolist())]
    assert load.bigram_loss(train_ids, val_ids, 5) == pytest.approx(sum(losses) / len(losses), abs=1e-9)
    assert load.bigram_log_probs(train_ids, 5).exp().sum(1).tolist() == pytest.approx([1.0] * 5)


def test_stand_in_only_where_the_real_text_is_out_of_reach(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils, "DATA_DIR", tmp_path)
    monkeypatch.setattr(load, "URLS", ["http://127.0.0.1:9/input.txt"])
    data = load.load_data(None, 32)
    assert data.name == "pydocs" and data.stand_in and "STAND-IN" in capsys.readouterr().out
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        load.load_data("tinyshakespeare", 32)
    (tmp_path / "tinyshakespeare.txt").write_text("corrupt")
    with pytest.raises(utils.InputError, match="not the expected file"):
        load.load_data(None, 32)


@pytest.mark.real("tinyshakespeare.txt")
def test_real_text(monkeypatch):
    monkeypatch.setattr(utils, "DATA_DIR", REAL)
    data = load.load_data(None, 128)
    assert (len(data.train), len(data.val), len(data.vocab)) == (1_003_854, 111_540, 65) and not data.stand_in
    assert load.frequency_loss(data.train, data.val, 65) == pytest.approx(3.347, abs=5e-4)
    assert load.bigram_loss(data.train, data.val, 65) == pytest.approx(2.482, abs=5e-4)


# ---------------------------------------------------------------------------------------------- from_scratch.py
def test_attention_by_hand_agrees_with_pytorch_and_autograd():
    errors = from_scratch.check_against_pytorch()
    assert len(errors) == 9 and max(errors.values()) < 1e-12, errors


def test_gradients_by_hand_agree_with_finite_differences():
    torch.manual_seed(1)
    w = {name: t.double() for name, t in from_scratch.init_model(7, 8, 12).items()}
    w["head"] = torch.randn_like(w["head"])
    ids, targets = torch.randint(7, (2, 2, 8))
    gradients = from_scratch.backward(w, from_scratch.forward(w, ids, targets, 3)[1])
    for name, weight in w.items():
        i = tuple(torch.randint(n, ()).item() for n in weight.shape)
        weight[i] += 1e-6
        up = from_scratch.forward(w, ids, targets, 3)[0]
        weight[i] -= 2e-6
        down = from_scratch.forward(w, ids, targets, 3)[0]
        weight[i] += 1e-6
        assert gradients[name][i].item() == pytest.approx((up - down) / 2e-6, abs=1e-7), name


def test_attention_by_hand_leaks_nothing():
    q, k, v = torch.randn(3, 2, 10, 4)
    y, p = from_scratch.attention(q, k, v)
    assert not p.triu(1).any()
    k[:, 6:], v[:, 6:] = torch.randn(2, 2, 4, 4)
    assert torch.equal(from_scratch.attention(q, k, v)[0][:, :6], y[:, :6])


# ---------------------------------------------------------------------------------------------- the model
def test_norm_against_nn_layernorm():
    x = torch.randn(3, 5, 16) * 4 + 2
    torch.testing.assert_close(train.norm(x), torch.nn.LayerNorm(16, elementwise_affine=False)(x))


def test_rotary_positions_against_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = torch.randn(2, 2, 12, 3, 8)  # (B, T, A, D) each
    cos, sin = train.rotary_tables(12, 8)
    mine = train.rotate(torch.stack([q, k], 2), cos, sin)
    angle = torch.arange(12)[:, None] * 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    angle = torch.cat([angle, angle], -1)[None]
    theirs = llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), angle.cos(), angle.sin())
    for i in (0, 1):
        torch.testing.assert_close(mine[:, :, i].transpose(1, 2), theirs[i])


def test_rotary_scores_depend_on_distance_alone():
    cos, sin = train.rotary_tables(64, 8)
    q, k = torch.randn(2, 1, 1, 1, 1, 8).expand(2, 1, 64, 2, 1, 8)
    q, k = train.rotate(q, cos, sin)[0, :, 0, 0], train.rotate(k, cos, sin)[0, :, 0, 0]  # (T, D) each
    scores = q @ k.T
    torch.testing.assert_close(scores[:-1, :-1], scores[1:, 1:], atol=1e-4, rtol=1e-4)


def test_attention_layer_against_the_fused_kernel():
    torch.manual_seed(0)
    layer = train.Attention(24, 3)
    x = torch.randn(2, 10, 24)
    cos, sin = train.rotary_tables(10, 8)
    q, k, v = layer.qkv(x).view(2, 10, 3, 3, 8).unbind(2)
    q, k = (train.rotate(train.norm(t)[:, :, None], cos, sin)[:, :, 0].transpose(1, 2) for t in (q, k))
    expected = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)
    torch.testing.assert_close(layer(x, cos, sin), layer.out(expected.transpose(1, 2).reshape(2, 10, 24)))


def test_loss_before_training_is_close_to_ln_of_the_vocabulary():
    model = train.GPT(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.0)
    ids = torch.randint(65, (2, 17))
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(math.log(65), abs=0.1)


def test_the_model_sees_nothing_of_the_future():
    model = small_gpt().eval()
    ids = torch.randint(11, (2, 16))
    before = model(ids)
    ids[:, 9:] = (ids[:, 9:] + 1) % 11
    after = model(ids)
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.allclose(before[:, 9:], after[:, 9:])


def test_one_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    model = train.GPT(vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.0)
    optimizers = train.make_optimizers(model, 2e-3, 0.02, 0.0)
    x, y = torch.randint(11, (2, 4, 16))
    for _ in range(150):
        loss = model(x, y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert loss.item() < 0.1


def test_every_parameter_has_exactly_one_optimizer():
    model = small_gpt()
    held = [p for o in train.make_optimizers(model, 1.0, 1.0, 0.0) for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))


def test_bfloat16_is_close_to_float32():
    model = small_gpt().eval()
    ids = torch.randint(11, (2, 16))
    exact = model(ids).log_softmax(-1)
    model.dtype = torch.bfloat16
    rough = model(ids)
    assert rough.dtype == torch.float32 and 0 < (rough.log_softmax(-1) - exact).abs().mean() < 0.05


def test_evaluate_counts_every_character_once():
    model = small_gpt()
    ids = torch.randint(11, (16 * 700 + 6,))  # more than one chunk, and a remainder
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            x, y = ids[start : start + 16][: len(ids) - 1 - start], ids[start + 1 : start + 17]
            losses.append(F.cross_entropy(model(x[None])[0], y, reduction="none"))
    losses = torch.cat(losses)
    assert len(losses) == len(ids) - 1
    assert train.evaluate(model, ids, 16) == pytest.approx(losses.mean().item(), abs=1e-5)


def test_schedule_rises_then_falls():
    factors = [train.schedule(step, 1000, 20) for step in range(1000)]
    assert factors[0] == 1 / 20 and max(factors) == pytest.approx(1, abs=0.03) and 0.02 <= factors[-1] < 0.022
    assert all(a > b for a, b in zip(factors[20:], factors[21:]))


# ---------------------------------------------------------------------------------------------- generation, attention
def test_reading_one_by_one_gives_the_same_logits():
    model = small_gpt().eval()
    ids = torch.randint(11, (1, 16))
    reader = load_model.Reader(model, 16)
    logits = torch.stack([reader.read(i) for i in ids[0].tolist()])
    torch.testing.assert_close(logits, model(ids)[0], atol=1e-5, rtol=1e-4)


def test_beyond_the_context_a_reader_of_one_layer_sees_exactly_the_last_window():
    model = small_gpt(n_layer=1).eval()  # with one layer, nothing older can be known through what is remembered
    model.shift.data.zero_()
    ids = torch.randint(11, (1, 50))
    reader = load_model.Reader(model, 50)
    for t, i in enumerate(ids[0].tolist()):
        window = ids[:, max(0, t - 15) : t + 1]
        torch.testing.assert_close(reader.read(i), model(window)[0, -1], atol=1e-5, rtol=1e-4)


def test_generation_with_and_without_cache_agrees_and_goes_past_the_context():
    model = small_gpt().eval()
    start = torch.tensor([[3]])
    ids = start
    for i in load_model.generate(model, start, 15, temperature=0):  # greedy, each time from the whole text
        assert i == model(ids)[0, -1].argmax().item()
        ids = torch.cat([ids, torch.tensor([[i]])], 1)
    assert ids.shape == (1, 16)
    long = list(load_model.generate(model, start, 100, generator=torch.Generator().manual_seed(0)))
    assert len(long) == 100 and len(set(long)) > 3
    longer_than_context = torch.zeros(1, 50, dtype=torch.int64)
    assert len(list(load_model.generate(model, longer_than_context, 20))) == 20


def test_drawn_characters_are_as_frequent_as_the_model_believes():
    model = small_gpt().eval()
    start, generator = torch.tensor([[3]]), torch.Generator().manual_seed(0)
    for weights in (dict(temperature=0.7), dict(top_p=0.6)):
        with torch.no_grad():
            logits = model(start)[0, -1] / weights.get("temperature", 1)
        kept = load_model.keep_top_p(logits, weights.get("top_p", 0.999999))
        assert kept.isinf().any() == ("top_p" in weights)
        draws = [next(load_model.generate(model, start, 1, **weights, generator=generator)) for _ in range(4000)]
        share = torch.bincount(torch.tensor(draws), minlength=11) / len(draws)
        assert (share - kept.softmax(-1)).abs().max() < 0.04  # five standard deviations
        assert not share[kept.isinf()].any()


def test_top_p_against_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    logits = torch.randn(50, 65, dtype=torch.float64) * 3
    for p in (0.1, 0.5, 0.9, 0.999):
        theirs = transformers.TopPLogitsWarper(p)(None, logits.clone())
        assert torch.equal(load_model.keep_top_p(logits, p).isinf(), theirs.isinf())


def test_attention_weights_are_distributions_over_the_past():
    model = small_gpt().eval()
    w = load_model.attention_weights(model, torch.randint(11, (1, 16)))
    assert w.shape == (2, 2, 16, 16) and not w.triu(1).any()
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 2, 16))


# ---------------------------------------------------------------------------------------------- as users run them
def test_load_and_from_scratch_run(tmp_path):
    assert "input" in call_main(load, "--data", "pydocs", "--out", tmp_path)
    small = ["--data", "pydocs", "--steps", 15, "--n-embd", 32, "--batch-size", 8]
    out = call_main(from_scratch, *small, "--out", tmp_path)
    assert "bigram model" in out
    assert (tmp_path / "characters.png").stat().st_size > 1000 and (tmp_path / "from_scratch.png").stat().st_size > 1000


RUN = [*SMALL, "--steps", 150, "--eval-every", 30, "--dropout", 0.1, "--dtype", "float32"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One small run that is never stopped, with dropout, for several tests to look at."""
    out = tmp_path_factory.mktemp("trained")
    return out, run_script(FOLDER / "train.py", *RUN, "--out", out)


def test_train_learns_and_leaves_everything(trained):
    out, text = trained
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["metrics"]["val_loss"] < metrics["metrics"]["uniform_val_loss"] - 1.5
    assert metrics["stand_in"] is True and metrics["data"] == "pydocs" and len(metrics["history"]) == 5
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.pt", "history.png", "metrics.json", "model.pt"]
    first = float(re.search(r"before training:  loss ([\d.]+)", text)[1])
    assert first == pytest.approx(metrics["metrics"]["uniform_val_loss"], abs=0.1)
    assert text.count("STAND-IN") == 2  # one notice at the start, one at the end
    assert [row["step"] for row in metrics["history"]] == [30, 60, 90, 120, 150]


def test_saved_model_gives_the_reported_loss(trained):
    model, saved = load_model.load_gpt(trained[0] / "model.pt", "cpu")
    data = load.load_data("pydocs", 32)
    assert saved["vocab"] == data.vocab
    assert train.evaluate(model, data.val, 32) == pytest.approx(saved["metrics"]["val_loss"], abs=1e-6)


def same_run(a, b):
    a, b = (utils.load_checkpoint(folder / "checkpoint.pt", train.SCRIPT) for folder in (a, b))
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
    for name in ("train_loss", "val_loss"):
        assert [row[name] for row in a["history"]] == [row[name] for row in b["history"]]


def test_a_run_stopped_by_ctrl_c_and_then_killed_ends_bit_identically(trained, tmp_path, monkeypatch, capsys):
    command, saves = [str(FOLDER / "train.py"), *map(str, RUN), "--out", str(tmp_path)], []
    save = utils.write_atomically

    def save_then_stop(path, *content):  # Ctrl-C, right after the second save
        save(path, *content)
        saves.append(path.name)
        if saves.count("checkpoint.pt") == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(utils, "write_atomically", save_then_stop)
        patch.setattr(sys, "argv", command)
        utils.run(train.main, go_on="--resume")
    assert stopped.value.code == 130 and capsys.readouterr().err.rstrip().endswith("--resume")

    child = subprocess.Popen([sys.executable, "-u", *command, "--resume"], stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if line.startswith("step    90"):
            break
    child.kill()
    child.communicate(timeout=60)
    steps = [row["step"] for row in utils.load_checkpoint(tmp_path / "checkpoint.pt", train.SCRIPT)["history"]]
    assert child.returncode == -9 or steps[-1] == 150  # else it was done before the signal came
    text = call_main(train, *RUN, "--out", tmp_path, "--resume")
    assert re.findall(r"(?m)^step +(\d+) ", text) == [str(step) for step in range(steps[-1] + 30, 151, 30)]
    same_run(trained[0], tmp_path)


def test_a_run_that_had_stopped_early_stays_as_it_was(tmp_path):
    """--resume may come between the last save and the report, and must not train on."""
    options = [*SMALL, "--steps", 100, "--eval-every", 10, "--patience", 2, "--lr", 1, "--muon-lr", 1, "--dtype",
               "float32", "--out", tmp_path]
    call_main(train, *options)
    before = json.loads((tmp_path / "metrics.json").read_text())
    (tmp_path / "metrics.json").unlink()
    call_main(train, *options, "--resume")
    after = json.loads((tmp_path / "metrics.json").read_text())
    assert before["history"] == after["history"] and before["metrics"] == after["metrics"]
    assert after["history"][-1]["step"] - after["metrics"]["best_step"] == 20 and after["history"][-1]["step"] < 100


def test_resume_refuses_other_options_and_other_text(trained, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 100)
    before = (trained[0] / "checkpoint.pt").read_bytes()
    again = ["--out", trained[0], "--resume"]
    assert "a run with --n-embd 32; go on with the same" in refusal(train, *RUN, "--n-embd", 64, *again)
    assert "a run with --data pydocs" in refusal(train, *RUN, "--data", text, *again)
    assert (trained[0] / "checkpoint.pt").read_bytes() == before
    small = ["--data", text, *SMALL[2:], "--steps", 2, "--dtype", "float32", "--out", tmp_path / "o"]
    assert "the bigram model is better here: try more --steps" in call_main(train, *small)
    text.write_text("abcdefghi" * 100)
    assert "not the text it was" in refusal(train, *small, "--resume")


def test_two_processes_learn_as_one_does(tmp_path):
    options = [*SMALL, "--steps", 40, "--eval-every", 10, "--dropout", 0, "--dtype", "float32"]
    call_main(train, *options, "--out", tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29571"]
    text = run_script(FOLDER / "train.py", *options, "--out", tmp_path / "two", launcher=torchrun)
    assert text.count("step    10 ") == text.count("it writes:\n") == 1  # one of them prints
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text())["history"] for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=5e-3)
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=5e-3)


def test_load_model_runs_and_refuses(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of this process: other tests run in it, too
    model = ["--model", trained[0] / "model.pt", "--out", tmp_path]
    writing = [*model, "--prompt", "The ", "--length", 80, "--top-p", 0.9]
    out, again = call_main(load_model, *writing), call_main(load_model, *writing)
    assert "characters per second" in out and (tmp_path / "attention.png").stat().st_size > 1000
    written = [re.search(r"The .*?(?=\n\n[\d,]+ characters per second)", text, re.S)[0] for text in (out, again)]
    assert written[0] == written[1] and len(written[0]) == 84  # the seed decides
    assert "'\u4e2d'" in refusal(load_model, *model, "--prompt", "\u4e2d")
    assert "does not exist" in refusal(load_model, "--model", tmp_path / "none.pt")
    assert "argument --temperature: -1 is not in [0, inf)" in refusal(load_model, *model, "--temperature", -1)


@pytest.mark.parametrize("options, words", [
    ("--data /no/such/file", "/no/such/file is no file; give a UTF-8 text file, or one of tinyshakespeare, pydocs"),
    (f"--data {FOLDER}", "is no file"),
    ("--data EMPTY", "EMPTY has 0 characters, too few"),
    ("--data SHORT", "too few for a context of 256"),
    ("--data LATIN", "is not UTF-8"),
    ("--data pydocs --n-embd 50 --n-head 4", "n_embd 50 must be divisible by n_head 4"),
    ("--data pydocs --steps 0", "argument --steps: 0 is not in [1, inf)"),
    ("--data pydocs --dropout 1", "argument --dropout: 1 is not in [0, 1)"),
    ("--data pydocs --device abacus", "--device abacus"),
    ("--data pydocs --out /dev/null/x", "cannot write"),
    ("--resume", "does not exist"),
])
def test_bad_input_gets_one_sentence(tmp_path, monkeypatch, options, words):
    (tmp_path / "EMPTY").touch()
    (tmp_path / "SHORT").write_text("short " * 20)
    (tmp_path / "LATIN").write_bytes("caf\xe9 ".encode("latin-1") * 1000)
    monkeypatch.chdir(tmp_path)
    assert words in refusal(train, "--out", tmp_path / "o", *options.split())


def test_a_user_sees_one_line_and_an_exit_status(tmp_path):
    assert "is no file" in run_script(FOLDER / "train.py", "--data", "/no/such/file", "--out", tmp_path, code=1)


def test_a_loss_that_becomes_nan_stops_the_run_and_loses_nothing(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "o")
    before = {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()}
    options = [*SMALL, "--steps", 20, "--eval-every", 10, "--out", tmp_path / "o"]
    assert "the loss became nan" in refusal(train, *options, "--lr", "1e38", "--muon-lr", "1e38")
    assert {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()} == before


def test_the_model_comes_alone_and_speaks_of_arguments():
    """Another program takes GPT: nothing that parses options, fetches or draws comes along, and nothing is changed."""
    program = f"""if True:
        import random, sys, torch, torchvision
        sys.path[:0] = [{str(ROOT)!r}, {str(FOLDER)!r}]
        loud = "argparse", "requests", "matplotlib"
        for name in list(sys.modules):
            if name.split(".")[0] in loud:
                del sys.modules[name]
        threads, state = torch.get_num_threads(), torch.get_rng_state()
        import experiment, from_scratch, load_model, train
        assert not [name for name in sys.modules if name.split(".")[0] in loud]
        assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
        try:
            train.GPT(vocab_size=5, block_size=8, n_layer=1, n_head=3, n_embd=8, dropout=0.0)
        except ValueError as error:
            assert "n_embd 8 must be divisible by n_head 3" in str(error) and "--" not in str(error)
        else:
            raise AssertionError
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_the_experiment_keeps_is_what_train_uses():
    recipe = dict(experiment.BASE)
    for _, _, change, kept in experiment.CHANGES:
        recipe |= change if kept else {}
    preset = train.PRESETS["small"]
    shared = recipe.keys() & preset.keys()
    assert shared >= {"block_size", "dropout"} and all(recipe[name] == preset[name] for name in shared)
    config = {k: preset[k] for k in ("block_size", "n_layer", "n_head", "n_embd", "dropout")}
    ours, any_gpt = train.GPT(13, **config).eval(), experiment.AnyGPT(13, recipe).eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.1)
    any_gpt.load_state_dict(ours.state_dict())
    x, y = torch.randint(13, (2, 2, preset["block_size"]))
    assert any_gpt(x, y).item() == pytest.approx(ours(x, y).item(), abs=1e-5)
    theirs = [type(optimizer) for optimizer in experiment.any_optimizers(any_gpt, recipe)]
    assert theirs == [type(optimizer) for optimizer in train.make_optimizers(ours, 1.0, 1.0, 0.0)]


def test_experiment_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "SIZES", {"n_layer": 1, "n_head": 2, "n_embd": 32})
    (tmp_path / "text.txt").write_text(load.read_pydocs()[:20_000], encoding="utf-8")
    out = call_main(experiment, "--data", tmp_path / "text.txt", "--seeds", 1, "--seconds", 0.1, "--characters", 2048,
                    "--device", "cpu", "--dtype", "float32", "--out", tmp_path)
    assert "2019" in out and (tmp_path / "experiment.png").stat().st_size > 1000
    results = json.loads((tmp_path / "experiment.json").read_text())
    assert len(results["rows"]) == len(experiment.CHANGES) + 1
    assert "no row's name holds that" in refusal(experiment, "--only", "teapot", "--out", tmp_path)


@pytest.mark.real("tinyshakespeare.txt")
def test_hash_of_the_real_text_is_the_one_the_script_names():
    assert hashlib.sha256((REAL / "tinyshakespeare.txt").read_bytes()).hexdigest() == load.SHA256
