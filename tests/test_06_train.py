"""Chapter 06, load, train, load_model and experiment, against transformers, peft, and what fine-tuning promises."""

import contextlib
import hashlib
import http.server
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import REAL, ROOT, call_main, chapter, digest, refusal, run_script, serving
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import utils

bpe, gpt2, weights, load, lora, train, load_model, experiment, llama = chapter(
    "06_finetune", "bpe", "gpt2", "weights", "load", "lora", "train", "load_model", "experiment", "llama"
)
FOLDER = ROOT / "06_finetune"
T = 32
STEPS = ["--steps", 40, "--eval-every", 10, "--device", "cpu"]
# Around random weights adapters have little to work with: all layers, a high learning rate. Dropout, to test resuming.
LORA = ["--lr", 3e-2, "--dropout", 0.1, "--lora-targets", "c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(script, *options, **more):
    return run_script(FOLDER / script, *options, **more)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(options that name a tiny GPT-2 and a short text, the GPT-2's folder, the text)."""
    folder = tmp_path_factory.mktemp("small")
    manual = bpe.read_text("pydocs")
    tokenizer = bpe.Tokenizer(*bpe.train_bpe(manual[:40_000], 400))
    torch.manual_seed(0)
    size = {"vocab_size": 400, "n_positions": 64, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = gpt2.GPT2(size)
    torch.nn.init.constant_(model.ln_f.weight, 8.0)  # scores far enough from zero for adapters to work with
    gpt2.save_model(model, folder / "base", tokenizer.vocab[bpe.END])
    tokenizer.save(folder / "base")
    (folder / "text.txt").write_text(manual[40_000:70_000])
    options = ["--model", folder / "base", "--data", folder / "text.txt", "--block-size", T, "--batch-size", 8]
    return options, folder / "base", folder / "text.txt"


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """Method -> (folder, what train.py printed), each run once."""
    made = {}
    for method, more in (("lora", LORA), ("full", ["--lr", 5e-3]), ("head", ["--lr", 5e-3])):
        out = tmp_path_factory.mktemp(method)
        made[method] = out, call_main(train, *small[0], *STEPS, "--method", method, *more, "--out", out)
    return made


# ---------------------------------------------------------------------------------------------- load.py
def test_batches_are_windows_with_targets_moved_by_one():
    ids = torch.arange(1000)
    stream = load.batches(ids, 10, 4, seed=1)
    seen = []
    for _ in range(24):  # a pass has at least 24 full batches
        x, y = next(stream)
        assert x.shape == (4, 10) and torch.equal(y, x + 1)
        seen += x.flatten().tolist()
    assert len(set(seen)) == len(seen)  # within a pass no token comes twice
    assert seen != sorted(seen)
    with pytest.raises(utils.InputError, match="use a longer text"):
        next(load.batches(torch.arange(50), 20, 4, 0))


def test_the_text_is_cut_in_order_and_before_encoding(small):
    tokenizer = bpe.Tokenizer.from_files(small[1] / "vocab.json", small[1] / "merges.txt")
    text = load.load_data(str(small[2]), tokenizer, T)
    whole = small[2].read_text()
    assert tokenizer.decode(text.train.tolist()) == whole[:27_000]
    assert tokenizer.decode(text.val.tolist()) == whole[27_000:] and text.val_characters == 3_000
    assert not text.stand_in and load.load_data("pydocs", tokenizer, T).stand_in


def test_evaluate_counts_every_token_once(small):
    model = gpt2.read_model(small[1], gpt2.read_config(small[1] / "config.json"))
    ids = torch.randint(400, (5 * T + 7,), generator=torch.Generator().manual_seed(0))
    reference = AutoModelForCausalLM.from_pretrained(small[1]).eval()
    total = 0.0
    for i in range(0, len(ids) - 1, T):
        x, y = ids[i : i + T][: len(ids) - 1 - i], ids[i + 1 : i + T + 1]
        with torch.no_grad():
            total += F.cross_entropy(reference(x[None]).logits[0], y, reduction="sum").item()
    assert train.evaluate(model, ids, T, torch.float32, batch_size=2) == pytest.approx(total / (len(ids) - 1), abs=1e-5)


def test_the_stand_in_is_made_of_gpt2s_own_files_and_only_out_of_reach(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils, "DATA_DIR", tmp_path)
    monkeypatch.setattr(load, "STAND_IN", load.STAND_IN | {"vocab_size": 400, "n_embd": 32})
    monkeypatch.setattr(load, "STAND_IN_STEPS", 2)
    monkeypatch.setattr(bpe, "read_text", lambda name, read=bpe.read_text: read(name)[:60_000])
    out = call_main(load, "--model", "stand-in", "--data", "pydocs", "--out", tmp_path / "out")
    folder = tmp_path / "gpt2-stand-in"
    assert {p.name for p in folder.iterdir()} == {"config.json", "merges.txt", "model.safetensors", "vocab.json"}
    assert "h.3.mlp.c_proj.weight" in out and "wpe.weight" in out and out.count("STAND-IN") == 4
    reference, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    before = digest(folder / "model.safetensors")
    base = load.find_base("stand-in")
    assert base.stand_in and digest(folder / "model.safetensors") == before  # found, not made again
    text = "Naïve text: x = [1, 2]\n\n  return"
    ids = base.tokenizer.encode(text)
    assert ids == tokenizer(text)["input_ids"]
    model = gpt2.read_model(base.path, base.config)
    with torch.no_grad():
        assert (model(torch.tensor([ids])) - reference(torch.tensor([ids])).logits).abs().max() < 1e-4

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network.")

    monkeypatch.setattr(utils, "download", unreachable)
    capsys.readouterr()
    assert load.find_base(None).name == "stand-in" and "STAND-IN" in capsys.readouterr().out
    text = load.load_data(None, base.tokenizer, T)
    assert (text.name, text.stand_in) == ("python", "Tiny Shakespeare")
    for ask in (lambda: load.find_base("gpt2"), lambda: load.load_data("tinyshakespeare", base.tokenizer, T)):
        with pytest.raises(ConnectionError, match="no network"):  # asked for by name: never replaced
            ask()


# ---------------------------------------------------------------------------------------------- train.py
def test_every_method_learns_and_leaves_everything(runs):
    for method, (out, text) in runs.items():
        metrics = json.loads((out / "metrics.json").read_text())["metrics"]
        assert metrics["val_loss"] < metrics["before_val_loss"] - 0.3, method
        assert metrics["before_val_loss"] == pytest.approx(math.log(400), abs=1.0)
        result = {"lora": "adapter"}.get(method, "model")
        assert {p.name for p in out.iterdir()} == {result, "checkpoint.pt", "history.png", "metrics.json"}
        assert "wrote adapter/ or model/" in text and metrics["peak_memory_bytes"] > 1e8


def test_what_is_frozen_stays_bit_identical(small, runs):
    before = weights.open_weights(small[1])
    head = weights.open_weights(runs["head"][0] / "model")
    changed = {name for name in before if not torch.equal(before[name], head[name])}
    assert changed == {name for name in before if name.startswith(("h.1.", "ln_f"))}
    full = weights.open_weights(runs["full"][0] / "model")
    assert all(not torch.equal(before[name], full[name]) for name in before)
    assert {p.name for p in (runs["lora"][0] / "adapter").iterdir()} == {"adapter_config.json",
                                                                        "adapter_model.safetensors"}


def test_results_open_in_transformers_and_peft_with_equal_logits(small, runs):
    ids = torch.randint(400, (2, 20), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(small[1])
    for method, (out, _) in runs.items():
        if method == "lora":
            reference = PeftModel.from_pretrained(base, out / "adapter").eval()
            ours = [load_model.load_model(str(out / "adapter"))[0],
                    load.load_result(load.find_base(str(small[1])), out, "lora")]
        else:
            reference = AutoModelForCausalLM.from_pretrained(out / "model").eval()
            ours = [load_model.load_model(str(out / "model"))[0]]
        for model in ours:
            with torch.no_grad():
                assert (model(ids) - reference(ids).logits).abs().max() < 1e-4, method


def test_the_result_gives_the_reported_loss_and_bits(small, runs):
    base = load.find_base(str(small[1]))
    text = load.load_data(str(small[2]), base.tokenizer, T)
    for method, (out, _) in runs.items():
        dtype = torch.load(out / "checkpoint.pt", weights_only=True)["options"]["dtype"]
        model = load.load_result(base, out, method)
        metrics = json.loads((out / "metrics.json").read_text())["metrics"]
        loss = train.evaluate(model, text.val, T, dtype)
        assert loss == pytest.approx(metrics["val_loss"], abs=5e-3)  # then the base may have been in bfloat16
        bits = metrics["val_loss"] * (len(text.val) - 1) / 3_000 / math.log(2)
        assert metrics["bits_per_character"] == pytest.approx(bits, abs=1e-6)


def test_parts_of_a_batch_and_checkpointing_change_nothing_but_memory(small, tmp_path):
    options = [*small[0], "--steps", 6, "--eval-every", 3, "--dtype", "float32", "--method", "full", "--device", "cpu"]
    histories = []
    for i, more in enumerate(([], ["--micro-batch-size", 3], ["--activation-checkpointing", "--micro-batch-size", 8])):
        call_main(train, *options, *more, "--out", tmp_path / str(i))
        histories.append(json.loads((tmp_path / str(i) / "metrics.json").read_text())["history"])
    for other in histories[1:]:
        for a, b in zip(histories[0], other, strict=True):
            assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-4)
            assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-4)


def stop_by_sigkill(options):
    """Kill a process of its own after step 20, at whatever it is doing then."""
    command = [sys.executable, "-u", str(FOLDER / "train.py"), *map(str, options)]
    one_core = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=one_core) as child:
        for line in child.stdout:
            if line.startswith("step    20"):
                child.kill()
    assert child.returncode == -9


def stop_by_ctrl_c(options):
    """Interrupt step 25 in this process; what is printed says how to go on."""
    def progress(step, *rest):
        if step >= 25:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end, \
            contextlib.redirect_stderr(io.StringIO()) as errors:
        patch.setattr(utils, "progress", progress)
        utils.run(lambda: call_main(train, *options), go_on="--resume")
    assert end.value.code == 130 and errors.getvalue().rstrip().endswith("--resume")


@pytest.mark.parametrize("stop", [stop_by_sigkill, stop_by_ctrl_c])
def test_a_stopped_run_resumes_bit_identically(small, runs, tmp_path, stop):
    options = [*small[0], *STEPS, "--method", "lora", *LORA, "--out", tmp_path]
    stop(options)
    steps = [row["step"] for row in utils.load_checkpoint(tmp_path / "checkpoint.pt", train.SCRIPT)["history"]]
    assert steps in ([10], [10, 20], [10, 20, 30])
    text = call_main(train, *options, "--resume")
    assert re.findall(r"(?m)^step +(\d+) ", text) == [str(step) for step in range(steps[-1] + 10, 41, 10)]
    name = "adapter/adapter_model.safetensors"
    assert digest(tmp_path / name) == digest(runs["lora"][0] / name)


def test_resume_refuses_other_options_and_other_text(small, runs, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(runs["lora"][0], out)
    before = digest(out / "checkpoint.pt")
    again = [*small[0], *STEPS, *LORA, "--resume", "--out", out]
    assert "is of a run with --lora-rank 8" in refusal(train, *again, "--lora-rank", 4)
    small[2].write_text(small[2].read_text() + "more " * 100)
    try:
        assert "is of a run with --data" in refusal(train, *again)
    finally:
        small[2].write_text(small[2].read_text()[:30_000])
    assert digest(out / "checkpoint.pt") == before
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    state["trained"].popitem()
    torch.save(state, out / "checkpoint.pt")
    assert "another version of it" in refusal(train, *again)


@pytest.mark.parametrize("known", [64, 300])
def test_without_block_size_windows_are_as_long_as_the_model_knows_but_at_most_256(small, tmp_path, known):
    folder = shutil.copytree(small[1], tmp_path / "base")
    size = {"vocab_size": 400, "n_positions": known, "n_layer": 1, "n_head": 2, "n_embd": 8}
    gpt2.save_model(gpt2.GPT2(size), folder, 399)
    options = ["--model", folder, "--data", small[2], "--batch-size", 2, "--steps", 2, "--device", "cpu"]
    text = call_main(train, *options, "--out", tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["options"]["block_size"] == min(known, 256)
    assert f"  {2 * 2 * min(known, 256):,} tokens" in text


def test_two_processes_learn_as_one_does(small, tmp_path):
    options = [*small[0], "--steps", 10, "--eval-every", 5, "--dtype", "bfloat16", "--micro-batch-size", 2, "--device",
               "cpu", "--lr", 5e-3]
    call_main(train, *options, "--out", tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29573"]
    run("train.py", *options, "--out", tmp_path / "two", launcher=torchrun)
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text())["history"] for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-2)
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-2)


def test_early_stopping_keeps_the_best(small, tmp_path):
    options = [*small[0], "--method", "full", "--steps", 400, "--eval-every", 10, "--lr", 2e-2, "--patience", 2,
               "--device", "cpu", "--out", tmp_path]
    text = call_main(train, *options)
    found = json.loads((tmp_path / "metrics.json").read_text())
    last, best = found["history"][-1]["step"], found["metrics"]["best_step"]
    assert last == best + 20 < 400 and f"full, step {best}" in text  # a short text, learned by heart
    assert found["metrics"]["val_loss"] == min(row["val_loss"] for row in found["history"])
    before = digest(tmp_path / "model" / "model.safetensors")
    assert "\nstep " not in call_main(train, *options, "--resume")  # it has ended, and stays so
    assert json.loads((tmp_path / "metrics.json").read_text())["history"] == found["history"]
    assert digest(tmp_path / "model" / "model.safetensors") == before


def test_one_batch_can_be_learned_by_heart(small):
    model = gpt2.read_model(small[1], gpt2.read_config(small[1] / "config.json"))
    x, y = torch.randint(400, (2, 4, T), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_schedule_rises_then_falls_to_a_tenth():
    factors = [train.schedule(step, 100, 10) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and max(factors) <= 1.0
    assert all(a > b for a, b in zip(factors[10:], factors[11:])) and 0.1 < factors[-1] < 0.11


@pytest.mark.parametrize("options, words", [
    (["--steps", 0], "--steps: 0 is not in [1, inf)"), (["--dropout", 1], "--dropout"),
    (["--lora-targets", "attention"], "attn.c_attn"), (["--lora-rank", 64], "rank 64 is above"),
    (["--method", "full", "--lora-rank", 8], "--lora-rank is for --method lora, not for full"),
    (["--block-size", 65], "64 positions"), (["--model", "nowhere"], "no folder"), (["--data", "no.txt"], "no.txt"),
    (["--device", "abacus"], "abacus"),
    (["--seed", -1], "--seed"), (["--batch-size", 5000], "use a longer text"),
])
def test_bad_input_gets_one_sentence(small, tmp_path, options, words):
    assert words in refusal(train, *small[0], *options, "--out", tmp_path)


def test_files_that_do_not_belong_together_are_refused(small, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(small[1], folder)
    bpe.Tokenizer(*bpe.train_bpe("some other text, short", 260)).save(folder)
    assert "its vocabulary has" in refusal(train, *small[0], "--model", folder, "--out", tmp_path)
    short = tmp_path / "short.txt"
    short.write_text("too short a text")
    assert "too few for windows" in refusal(train, *small[0], "--data", short, "--out", tmp_path)


def test_a_loss_that_becomes_nan_stops_the_run_and_loses_nothing(small, runs, tmp_path):
    shutil.copytree(runs["full"][0], tmp_path / "out")
    before = digest(tmp_path / "out" / "model" / "model.safetensors")
    options = [*small[0], "--method", "full", "--lr", 1e30, "--steps", 10, "--device", "cpu", "--dtype", "float32"]
    assert "make lr smaller" in refusal(train, *options, "--out", tmp_path / "out")
    assert digest(tmp_path / "out" / "model" / "model.safetensors") == before


# ---------------------------------------------------------------------------------------------- load_model.py
def test_load_model_writes_draws_and_saves(small, runs, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(runs["lora"][0], out)
    options = ["--out", out, "--prompt", "The ", "--length", 40, "--dtype", "float32", "--device", "cpu"]
    texts = [call_main(load_model, *options, *more) for more in (["--save", tmp_path / "merged"], ["--no-cache"],
                                                            ["--model", tmp_path / "merged"])]
    written = [re.search(r"The .*?(?=\n[\d.,]+ tokens per second)", text, re.S)[0] for text in texts]
    assert len(set(written)) == 1 and len(written[0]) > 20  # the same text with and without cache, and merged to disk
    assert (out / "attention.png").stat().st_size > 1000
    assert "tokens per second" in call_main(load_model, *options, "--temperature", 0)
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = weights.open_weights(small[1])
    merged = weights.open_weights(tmp_path / "merged")
    changed = {n for n in base if not torch.equal(base[n], merged[n])}
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert changed == {f"h.{i}.{name}.weight" for i in (0, 1) for name in layers}


def test_a_base_is_found_again_from_any_folder(small, monkeypatch):
    monkeypatch.chdir(small[1].parent)
    assert load.find_base("base").name == str(small[1].resolve())  # as an adapter's config will name it


def test_the_newest_result_is_taken(tmp_path):
    with pytest.raises(utils.InputError, match="neither adapter/ nor model/"):
        load_model.newest(tmp_path)
    for i, (name, file) in enumerate((("adapter", "adapter_config.json"), ("model", "config.json"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
        os.utime(tmp_path / name / file, (i + 1, i + 1))
        assert load_model.newest(tmp_path) == tmp_path / name
    os.utime(tmp_path / "adapter" / "adapter_config.json", (time.time(), time.time()))
    assert load_model.newest(tmp_path) == tmp_path / "adapter"


def test_load_model_refuses(runs, tmp_path):
    adapter = runs["lora"][0] / "adapter"
    options = ["--model", adapter, "--out", tmp_path]
    for more, words in ((["--top-k", 0], "--top-k"), (["--temperature", "nan"], "--temp"),
                        (["--layer", 2], "--layer 2"), (["--prompt", ""], "--prompt is")):
        assert words in refusal(load_model, *options, *more)
    whole = ["--model", runs["full"][0] / "model", "--base", "stand-in", "--out", tmp_path]
    assert "a base is for an adapter" in refusal(load_model, *whole)
    assert "neither adapter/ nor model/" in refusal(load_model, "--out", tmp_path)
    shutil.copytree(adapter, tmp_path / "far")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "far" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "far/away"}))
    assert "'far/away'" in refusal(load_model, "--model", tmp_path / "far", "--out", tmp_path)


# ---------------------------------------------------------------------------------------------- experiment.py
def in_process(options, out):
    """experiment.train without the seconds that a new process takes."""
    call_main(train, *options, "--out", out)
    return json.loads((out / "metrics.json").read_text())


def test_a_row_of_experiment_is_a_process_of_its_own_and_its_failure_is_told(small, tmp_path):
    with pytest.raises(utils.InputError, match="train.py .*--lora-rank 64.* failed: LoRA's rank 64 is above"):
        experiment.train([*small[0], "--lora-rank", 64, "--device", "cpu"], tmp_path)


def test_experiment_runs(small, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "train", in_process)
    options = [*small[0], "--steps", 4, "--seeds", 1, "--device", "cpu", "--out", tmp_path]
    text = call_main(experiment, *options, "--only", "scratch")
    found = json.loads((tmp_path / "experiment_scratch.json").read_text())
    assert [len(rows) for rows in found["tables"].values()] == [3] and "from scratch" in text
    for rows in found["tables"].values():
        for row in rows:
            assert math.isfinite(row["mean"]) and row["std"] == 0
    assert (tmp_path / "experiment_scratch.png").exists()
    assert [len(experiment.rows_of(part, 768)) for part in ("methods", "alpha", "targets")] == [8, 5, 6]
    assert list(experiment.rows_of("methods", 16))[-1] == "LoRA, rank 16"  # 64 does not fit


def test_windows_of_experiment_fit_the_model(small, tmp_path, monkeypatch):
    """Without --block-size the smaller of 256 and the model's positions, as in train.py."""
    seen = []
    monkeypatch.setattr(experiment, "train", lambda options, out: seen.append(options) or in_process(options, out))
    monkeypatch.setattr(experiment, "rows_of", lambda part, n_embd: {"one": ["--method", "head"]})
    call_main(experiment, *small[0][:4], "--steps", 1, "--seeds", 1, "--device", "cpu", "--only", "alpha",
              "--batch-size", 2, "--out", tmp_path)
    assert [options[options.index("--block-size") + 1] for options in seen] == ["64"]


# ---------------------------------------------------------------------------------------------- from Python
FROM_PYTHON = """import sys; sys.path.append("06_finetune")
from load_model import generate, load_model
model, base, _ = load_model("06_finetune/outputs/adapter")  # or .../model, or gpt2
ids = base.tokenizer.encode("ROMEO:", special=False)  # any text; of a long one the model sees the end
text = base.tokenizer.decode(ids + list(generate(model, ids, 100, 0.8, 50, base.tokenizer.end)))
"""


def test_a_model_from_python(runs, monkeypatch):
    """The README's five lines write a text that begins with the prompt, by base and adapter and by a whole model."""
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "```python" not in readme or FROM_PYTHON in readme
    monkeypatch.setitem(sys.modules, "load_model", load_model)
    for method in ("lora", "full"):
        names, folder = {}, runs[method][0] / ("adapter" if method == "lora" else "model")
        exec(FROM_PYTHON.replace("06_finetune/outputs/adapter", str(folder)), names)
        assert names["text"].startswith("ROMEO:") and len(names["text"]) > 40


def test_texts_in_the_encodings_of_windows_are_read_and_said(small, tmp_path, capsys):
    tokenizer, text, found = load.find_base(str(small[1])).tokenizer, "Caf\u00e9 \u2013 na\u00efve.\r\n" * 40, []
    for name in ("utf-8", "utf-16", "cp1252"):
        (tmp_path / "a.txt").write_bytes(text.encode(name))
        found.append(load.load_data(str(tmp_path / "a.txt"), tokenizer).train)
        assert (f"is read as {name}" in capsys.readouterr().out) == (name != "utf-8")
    assert all(torch.equal(some, found[0]) for some in found)


def test_a_folder_whose_table_is_filled_up_or_grew_by_a_token(small, tmp_path, capsys):
    """Rows without a token are said and never drawn; many of them, or a token without a row, are refused."""
    tokenizer, ids = load.find_base(str(small[1])).tokenizer, [1, 2, 3]
    for rows, words in ((401, "last 1 of 401 rows"), (448, "last 48 of 448 rows"), (400, ""), (399, None),
                        (1500, None)):
        torch.manual_seed(0)
        model = gpt2.GPT2({"vocab_size": rows, "n_positions": 64, "n_layer": 1, "n_head": 2, "n_embd": 32}).eval()
        model.wte.weight.data[400:] *= 20
        folder = tmp_path / str(rows)
        gpt2.save_model(model, folder, tokenizer.end)
        tokenizer.save(folder)
        capsys.readouterr()
        if words is None:
            with pytest.raises(utils.InputError, match=f"vocabulary has 400 tokens, and the model {rows:,};"):
                load.find_base(str(folder))
            continue
        base = load.find_base(str(folder))
        out = capsys.readouterr().out
        assert words in out and ("stand for no token, and are never drawn" in out) == bool(words)
        model = gpt2.read_model(base.path, base.config)
        assert max(gpt2.generate(model, ids, 40)) < 400 and model.wte.weight.shape == (rows, 32)
    (tmp_path / "401" / "added_tokens.json").write_text('{"[PAD]": 400}')  # as transformers 4 writes it
    (tmp_path / "401" / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    base = load.find_base(str(tmp_path / "401"))
    assert base.tokenizer.vocab["[PAD]"] == 400 and "n_tokens" not in base.config
    assert base.tokenizer.encode("a[PAD]")[-1] == 400


def test_the_model_comes_alone_and_speaks_of_arguments():
    """Another program takes GPT-2, or fine-tunes it: nothing that parses options, fetches or draws comes along."""
    program = f"""if True:
        import sys, torch
        sys.path[:0] = [{str(ROOT)!r}, {str(FOLDER)!r}]
        loud = "argparse", "requests", "matplotlib"
        for name in list(sys.modules):
            if name.split(".")[0] in loud:
                del sys.modules[name]
        threads, state = torch.get_num_threads(), torch.get_rng_state()
        import load_model, train, gpt2
        assert not [name for name in sys.modules if name.split(".")[0] in loud]
        assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
        try:
            gpt2.GPT2(dict(vocab_size=5, n_positions=8, n_layer=1, n_head=3, n_embd=8))
        except ValueError as error:
            assert "n_embd" in str(error) and "--" not in str(error)
        else:
            raise AssertionError
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------- SmolLM2 and relatives
@pytest.fixture(scope="module")
def tiny(small, tmp_path_factory):
    """As small: a tiny Llama as transformers writes it, in bfloat16 and with a tokenizer.json, like SmolLM2."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    vocab, merges = bpe.train_bpe(bpe.read_text("pydocs")[:40_000], 398)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([bpe.END, "<|im_start|>", "<|im_end|>"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.token_to_id("<|im_end|>")))
    torch.nn.init.constant_(model.model.norm.weight, 8.0)  # as in small
    model.bfloat16().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return ["--model", folder, *small[0][2:]], folder


ALL = ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def llama_runs(tiny, tmp_path_factory):
    made = {}
    for method, more in (("lora", ["--lora-targets", *ALL, "--dropout", 0.1, "--lr", 3e-2]), ("full", ["--lr", 5e-3]),
                         ("head", ["--lr", 1e-2])):
        out = tmp_path_factory.mktemp(method)
        made[method] = out, [*tiny[0], *STEPS, "--method", method, *more]
        call_main(train, *made[method][1], "--out", out)
    return made


def test_a_llama_is_fine_tuned_in_every_way_and_opens_in_transformers_and_peft(tiny, llama_runs):
    ids = torch.randint(400, (2, 20), generator=torch.Generator().manual_seed(0))
    before = weights.open_weights(tiny[1])
    for method, (out, _) in llama_runs.items():
        metrics = json.loads((out / "metrics.json").read_text())["metrics"]
        assert metrics["val_loss"] < metrics["before_val_loss"] - 0.3, method
        result = out / ("adapter" if method == "lora" else "model")
        base = AutoModelForCausalLM.from_pretrained(tiny[1], dtype=torch.float32)
        if method == "lora":
            reference = PeftModel.from_pretrained(base, result).eval()
        else:
            reference = AutoModelForCausalLM.from_pretrained(result).eval()
            after = weights.open_weights(result)
            changed = {name for name in before if not torch.equal(before[name].float(), after[name])}
            top = {"model.norm.weight"} | {name for name in before if name.startswith("model.layers.1.")}
            assert changed == (top if method == "head" else before.keys())
        tokenizer = AutoTokenizer.from_pretrained(tiny[1] if method == "lora" else result)
        found = load.find_base(str(tiny[1]))
        for model in (load_model.load_model(str(result))[0], load.load_result(found, out, method)):
            with torch.no_grad():
                assert (model(ids) - reference(ids).logits).abs().max() < 1e-4, method
        text = "if x == 1234:\n    return"
        assert found.tokenizer.encode(text) == tokenizer(text)["input_ids"]


def test_a_step_of_lora_on_a_llama_equals_peft(tiny, tmp_path):
    """The same A, the same batches, AdamW with the same rates: what is learned is the same, by ours and by theirs."""
    options = [*tiny[0], "--steps", 3, "--eval-every", 3, "--device", "cpu", "--dtype", "float32", "--warmup", 1]
    call_main(train, *options, "--out", tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny[1], dtype=torch.float32)
    peft = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])).train()
    ours = load.find_base(str(tiny[1]))
    torch.manual_seed(0)
    model = ours.read()
    train.freeze(model, "lora", 0.0, 8, 16.0, llama.TARGETS)
    theirs = {name.replace(".default", ""): p for name, p in peft.named_parameters() if p.requires_grad}
    for name, layer in lora.adapters(model).items():
        theirs[f"base_model.model.{name}.lora_A.weight"].data.copy_(layer.lora_A)
    text = load.load_data(str(tiny[0][3]), ours.tokenizer, T)
    optimizer = torch.optim.AdamW(theirs.values(), betas=(0.9, 0.99))
    for step, (x, y) in zip(range(3), load.batches(text.train, T, 8, 0)):
        optimizer.param_groups[0]["lr"] = 1e-3 * train.schedule(step, 3, 1)
        F.cross_entropy(peft(x).logits.flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found = weights.open_weights(tmp_path / "adapter" / "adapter_model.safetensors")
    assert found.keys() == theirs.keys() and len(found) == 8
    for name, tensor in found.items():
        assert (tensor - theirs[name]).abs().max() < 1e-4 and tensor.abs().max() > 1e-3, name


def test_a_llama_stopped_resumes_bit_identically_and_with_checkpointing_learns_the_same(tiny, llama_runs, tmp_path):
    out, options = llama_runs["lora"]
    stop_by_ctrl_c([*options, "--out", tmp_path])
    call_main(train, *options, "--out", tmp_path, "--resume")
    name = "adapter/adapter_model.safetensors"
    assert digest(tmp_path / name) == digest(out / name)
    histories = []
    for more in ([], ["--activation-checkpointing", "--micro-batch-size", 3]):
        call_main(train, *tiny[0], "--method", "full", "--steps", 3, "--dtype", "float32", "--device", "cpu", *more,
                  "--out", tmp_path)
        histories += json.loads((tmp_path / "metrics.json").read_text())["history"]
    assert histories[0]["val_loss"] == pytest.approx(histories[1]["val_loss"], abs=1e-4)


def test_load_model_writes_with_a_llama_draws_and_saves(tiny, llama_runs, tmp_path):
    options = ["--prompt", "The ", "--length", 70, "--dtype", "float32", "--device", "cpu", "--layer", 1]
    adapter, merged = llama_runs["lora"][0] / "adapter", tmp_path / "merged"
    texts = [call_main(load_model, *options, "--out", tmp_path, *more) for more in (
        ["--model", adapter, "--save", merged], ["--model", adapter, "--no-cache"], ["--model", merged])]
    written = [re.search(r"The .*?(?=\n[\d.,]+ tokens per second)", text, re.S)[0] for text in texts]
    assert len(set(written)) == 1 and len(written[0]) > 20
    assert (tmp_path / "attention.png").stat().st_size > 1000
    AutoModelForCausalLM.from_pretrained(merged)
    assert "tokens per second" in call_main(load_model, *options[:4], "--dtype", "bfloat16", "--device", "cpu",
                                            "--model", adapter, "--out", tmp_path)
    ids = torch.arange(20)[None]
    theirs = AutoModelForCausalLM.from_pretrained(merged, attn_implementation="eager")
    with torch.no_grad():
        expected = torch.cat(theirs(ids, output_attentions=True).attentions)
    found = load_model.attention_weights(load_model.load_model(str(merged))[0], ids)
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-5
    assert "layers 0 to 1" in refusal(load_model, *options, "--layer", 2, "--model", merged, "--out", tmp_path)
    assert load_model.load_model(str(adapter), str(tiny[1]))[1].module is llama


def test_what_does_not_suit_a_llama_gets_one_sentence(tiny, small, tmp_path):
    for options, words in (
            (["--lora-targets", "c_attn"], "'c_attn' is no layer's name; choose from self_attn.q_proj"),
            (["--method", "full", "--dropout", 0.1], "Llama has no dropout"),
            (["--block-size", 65], "max_position_embeddings"), (["--lora-rank", 17], "rank 17 is above")):
        assert words in refusal(train, *tiny[0], *options, "--out", tmp_path)
    assert "'q_proj' is no layer's name" in refusal(train, *small[0], "--lora-targets", "q_proj", "--out", tmp_path)
    folder, config = shutil.copytree(tiny[1], tmp_path / "other"), json.loads((tiny[1] / "config.json").read_text())
    for kind, words in (("mistral", "'mistral', and gpt2, llama, qwen2, qwen3 are known"), ([1], "[1]"), (None, "None"),
                        ("gpt2", "n_layer is None"), ("qwen3", "lacks layers.0.self_attn.q_norm.weight")):
        (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
        assert words in refusal(train, "--model", folder, *tiny[0][2:], "--out", tmp_path), kind
    gpt = json.loads((small[1] / "config.json").read_text()) | {"vocab_size": config["vocab_size"]}
    (folder / "config.json").write_text(json.dumps(gpt))
    assert "too few for 2 layers" in refusal(train, "--model", folder, *tiny[0][2:], "--out", tmp_path)


@pytest.fixture
def hub(tiny, tmp_path, monkeypatch):
    """A server in the hub's place that has the tiny Llama as SmolLM2, and an empty DATA_DIR; what it serves."""
    served = {"/" + name: (tiny[1] / name).read_bytes() for name in load.SMOLLM2_SHA256}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = served.get(self.path, b"")
            self.send_response(200 if data else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    monkeypatch.setattr(load, "SMOLLM2_SHA256",
                        {name: hashlib.sha256(served["/" + name]).hexdigest() for name in load.SMOLLM2_SHA256})
    monkeypatch.setattr(utils, "DATA_DIR", tmp_path)
    with serving(Handler) as address:
        monkeypatch.setattr(load, "SMOLLM2_URL", address)
        yield served


def test_smollm2_is_downloaded_once_and_another_in_its_place_is_named(hub, small, tmp_path, capsys):
    base, folder = load.find_base("smollm2"), tmp_path / "smollm2"
    assert {path.name for path in folder.iterdir()} == set(load.SMOLLM2_SHA256) and base.label == "smollm2"
    sent = dict(hub)
    hub.clear()
    assert load.find_base("smollm2").config == base.config  # from the disk
    train_it = ["--model", "smollm2", *small[0][2:], "--steps", 1, "--device", "cpu", "--out", tmp_path / "out"]
    named = []
    for change in (False, True):
        if change:
            (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>" }')
        capsys.readouterr()
        assert ("not the published weights" in call_main(train, *train_it)) == change
        named.append(json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text()))
        assert json.loads((tmp_path / "out" / "metrics.json").read_text())["model"].endswith("weights") == change
        _, found, what = load_model.load_model(str(tmp_path / "out" / "adapter"))
        assert found.name == "smollm2" and found.module is llama and ("not the published" in what) == change
    assert [config["base_model_name_or_path"] for config in named] == [load.SMOLLM2, str(folder)]
    (folder / "config.json").unlink()  # half there: never used
    with pytest.raises(utils.InputError, match="tokenizer_config.json is not the expected file"):
        load.find_base("smollm2")
    shutil.rmtree(folder)
    with pytest.raises(ConnectionError, match="--model stand-in"):
        load.find_base("smollm2")
    hub |= sent | {"/model.safetensors": b"other"}
    with pytest.raises(utils.InputError, match="wrong hash"):
        load.find_base("smollm2")
    assert not (folder / "config.json").exists()


@pytest.mark.real("smollm2/model.safetensors")
@pytest.mark.real("tinyshakespeare.txt")
def test_smollm2_on_tiny_shakespeare_has_the_loss_that_transformers_has():
    base = load.find_base("smollm2")
    ids = torch.tensor(base.tokenizer.encode((REAL / "tinyshakespeare.txt").read_text()[-1500:]))
    theirs, n = AutoModelForCausalLM.from_pretrained(REAL / "smollm2", dtype=torch.float32).eval(), len(ids) - 1
    with torch.no_grad():
        loss = sum(F.cross_entropy(theirs(ids[i : i + 256][: n - i][None]).logits[0], ids[i + 1 : i + 257],
                                   reduction="sum").item() for i in range(0, n, 256)) / n
    assert 300 < n < 512 and 3 < loss < 4.5
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        assert train.evaluate(base.read(dtype), ids, 256, dtype) == pytest.approx(loss, abs=tolerance)
