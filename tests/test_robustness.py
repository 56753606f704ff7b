"""What can happen to a run from outside: kill -9, a full disk, a folder that can't be written, no network, a twin.

Processes and small runs are those of kills.py, whose own command makes fifty kills; here are three.
"""

import hashlib
import http.server
import json
import os
import random
import shutil
import sys
import threading
import time

import kills
import pytest
import torch
from conftest import ROOT

CHAPTERS = [name for name in kills.TRAINING if name.endswith("/train.py")]
everywhere = pytest.mark.parametrize("name", CHAPTERS)
resumable = pytest.mark.parametrize("name", [name for name in CHAPTERS if name in kills.RESUMABLE])
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return kills.make_stand_ins(tmp_path_factory.mktemp("stand_ins"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Name of a script -> (folder of its run that nothing disturbed, how many seconds it took); each is run once."""
    made = {}

    def get(name):
        if name not in made:
            folder, begun = tmp_path_factory.mktemp("whole") / "out", time.perf_counter()
            kills.script(folder.parent / "log", name, *kills.options_of(name, data), "--out", folder).end()
            made[name] = folder, time.perf_counter() - begun
        return made[name]

    return get


def digests(folder):
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------- kill -9
@resumable
def test_killed_at_a_random_moment_and_resumed_it_ends_bit_identically(name, data, whole, tmp_path):
    kills.kill_and_resume(name, data, *whole(name), tmp_path / "killed", 1, random.Random())


# ---------------------------------------------------------------------------------------------- what can't be written
@resumable
def test_a_disk_that_fills_up_in_a_save_costs_nothing(name, data, whole, tmp_path):
    """No file can grow to the checkpoint's size: a limit that needs no privileges, and fails in the midst of a write as
    a full disk does."""
    out, log = tmp_path / "out", tmp_path / "log"
    run = kills.script(log, name, *kills.options_of(name, data), "--out", out)
    while not (out / "checkpoint.pt").exists() and not run.wait(0.01):
        pass
    run.kill()
    rows = len(torch.load(out / "checkpoint.pt", weights_only=True)["history"])
    assert rows < len(kills.result(whole(name)[0])[1])
    for left in out.rglob("*.tmp"):  # by the kill
        left.unlink()
    before = digests(out)
    limit = int(0.9 * (out / "checkpoint.pt").stat().st_size)
    again = [*kills.options_of(name, data), "--out", out, "--resume"]
    said = kills.script(log, name, *again, max_bytes=limit).end(1)
    assert "cannot write" in said and "checkpoint.pt" in said and "free some space" in said
    after = digests(out)
    written = {str(path) for path in after if after[path] != before.get(path)}  # smaller, and before the checkpoint:
    assert before.keys() <= after.keys()
    assert written <= {"model.pt", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"}
    for path in out.glob("*.pt"):
        torch.load(path, weights_only=True)
    kills.script(log, name, *again).end()
    assert kills.result(out) == kills.result(whole(name)[0])


@pytest.mark.parametrize("name", kills.TRAINING)
def test_an_output_that_can_t_be_written_is_named_before_any_work(name, data, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o555)
    options = kills.options_of(name, data)
    cases = [(tmp_path / "file", False), (tmp_path / "file" / "below", False)]
    if sys.platform == "linux" or os.geteuid():
        cases += [(tmp_path / "locked", True), (tmp_path / "locked" / "below", True)]
    for out, powerless in cases:
        said = kills.script(tmp_path / "log", name, *options, "--out", out,
                            powerless=powerless and not os.geteuid()).end(1)
        assert f"cannot write {out}" in said and "choose another --out" in said
        assert not (tmp_path / "log.out").read_text()
    assert not list((tmp_path / "locked").iterdir()) and not (tmp_path / "file").read_bytes()


# ---------------------------------------------------------------------------------------------- no network
NAMED = {  # what --data (or --model) names when it means the real thing
    "01_basics/train.py": ["--data mnist"], "02_cnn/train.py": ["--data cifar10"], "03_lstm/train.py": ["--data etth1"],
    "04_tabular/train.py": ["--data adult"], "05_transformer/train.py": ["--data tinyshakespeare"],
    "06_finetune/train.py": ["--data tinyshakespeare", "--model gpt2"],
    "06_finetune/bert_classify.py": ["--data sst2", "--model minilm"],
    "06_finetune/bert_qa.py": ["--data squad", "--model minilm"]}
SHORT = {
    "01_basics/train.py": "--epochs 1", "02_cnn/train.py": "--model simple --small 1 --batch-size 1000 --epochs 1",
    "03_lstm/train.py": "--horizon 2 --lookback 4 --segment 2 --hidden 4 --batch-size 4096 --epochs 1",
    "04_tabular/train.py": "--members 5 --hidden 8 --n-embd 2 --epochs 1 --batch-size 2048",
    "05_transformer/train.py": "--n-layer 1 --n-embd 16 --n-head 1 --batch-size 2 --steps 5",
    "06_finetune/train.py": "--steps 2 --batch-size 1",
    "06_finetune/bert_classify.py": "--method head --epochs 1 --batch-size 256",
    "06_finetune/bert_qa.py": "--method head --epochs 1 --limit 20 --max-length 64 --stride 16"}


@pytest.mark.parametrize("name", kills.TRAINING)
def test_offline_the_stand_in_takes_over_and_says_so_unless_the_real_thing_was_named(name, data, tmp_path):
    place = tmp_path / "DATA"
    for model in ("gpt2-stand-in", "bert-stand-in"):  # else they are pre-trained now, for minutes
        shutil.copytree(data / model, place / model)
    place = {"DATA_DIR": str(place)}
    options = [*SHORT[name].split(), "--device", "cpu", "--out", tmp_path / "out"]
    for real in NAMED[name]:
        rest = ["--model", "stand-in"] if name.startswith("06") and "--data" in real else []
        said = kills.script(tmp_path / "log", name, *options, *real.split(), *rest, environment=place).end(1)
        assert "could not be downloaded" in said and ("by hand" in said or "fetch it elsewhere" in said)
        assert not list((tmp_path / "out").iterdir())
    kills.script(tmp_path / "log", name, *options, environment=place).end()
    lines = (tmp_path / "log.out").read_text(encoding="utf-8").splitlines()
    notices = [i for i, line in enumerate(lines) if line.startswith("| STAND-IN")]
    started = next(i for i, line in enumerate(lines) if "before training" in line)
    assert len(notices) >= 2 and notices[0] < started and notices[-1] >= len(lines) - 4
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["stand_in"] is True


# ---------------------------------------------------------------------------------------------- two at once
@everywhere
def test_two_runs_at_once_into_one_folder_leave_whole_files_of_one_or_the_other(name, data, whole, tmp_path):
    options, out = kills.options_of(name, data), tmp_path / "out"
    runs = [kills.script(tmp_path / f"log{seed}", name, *options, "--seed", seed, "--out", out) for seed in (1, 0)]
    for run in runs:
        run.end()
    assert not list(out.rglob("*.tmp"))
    weights, history, _ = kills.result(out)
    alone = kills.result(whole(name)[0])
    if weights != alone[0] or history != alone[1]:  # seldom: seed 0 began later
        kills.script(tmp_path / "log", name, *options, "--seed", 1, "--out", tmp_path / "one").end()
        other = kills.result(tmp_path / "one")
        assert alone[0] != other[0] and weights in (alone[0], other[0]) and history in (alone[1], other[1])
    for path in out.glob("*.pt"):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("first", [0, 100_000], ids=["from the start", "the second in mid-download"])
def test_two_processes_that_download_one_file_both_get_it(tmp_path, first):
    body, arrived, ranges = os.urandom(500_000), threading.Event(), []

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            ranges.append(wanted)
            start = int(wanted.split("=")[1].rstrip("-")) if wanted else 0
            if len(ranges) == 2:
                arrived.set()
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            if len(ranges) == 1:
                self.wfile.write(body[:first])
                self.wfile.flush()
                asked.set()
                arrived.wait(60)  # the rest when both are here
                start = first
            for i in range(start, len(body), 50_000):
                self.wfile.write(body[i : i + 50_000])
                time.sleep(0.01)

        def log_message(self, *_):
            pass

    program = tmp_path / "fetch.py"
    program.write_text("import sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[1])\nimport utils\n"
                       "utils.run(lambda: utils.download([sys.argv[2]], Path(sys.argv[3]), sys.argv[4]))\n")
    asked, path = threading.Event(), tmp_path / "new" / "file"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        arguments = [ROOT, f"http://127.0.0.1:{server.server_port}/file", path, hashlib.sha256(body).hexdigest()]
        here = {"no_proxy": "127.0.0.1"}
        one = kills.script(tmp_path / "one", program, *arguments, environment=here)
        assert asked.wait(60)
        while first and not (path.parent.exists() and any(part.stat().st_size for part in path.parent.iterdir())):
            time.sleep(0.01)
        two = kills.script(tmp_path / "two", program, *arguments, environment=here)
        one.end()
        two.end()
        server.shutdown()
    assert path.read_bytes() == body and list(path.parent.iterdir()) == [path]
    assert len(ranges) <= 4
