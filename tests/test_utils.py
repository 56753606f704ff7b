"""utils.py: downloads against a server that misbehaves, checkpoints against every way a file can be wrong."""

import argparse
import errno
import hashlib
import http.server
import json
import math
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
import torch

import utils

BODY = os.urandom(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


class BadServer(http.server.BaseHTTPRequestHandler):
    """The first part of the path says how to misbehave; `log` keeps (path, Range header)."""

    log: list = []

    def do_GET(self):
        kind = self.path.split("/")[1]
        wanted = self.headers.get("Range")
        assert self.headers["Accept-Encoding"] == "identity"
        self.log.append((kind, wanted))
        start = int(wanted.split("=")[1].rstrip("-")) if wanted else 0
        if kind in ("403", "503"):
            self.send_error(int(kind))
            return
        if kind == "wrong":
            self.reply(200, b"<html>please log in</html>")
        elif kind == "norange":
            self.reply(200, BODY)
        elif start >= len(BODY):
            self.send_error(416)
        elif kind == "cut":  # promises everything, sends 100 kB, hangs up
            self.reply(206 if wanted else 200, BODY[start:], send=100_000)
        elif kind == "stall":
            self.reply(200, BODY, send=50_000, wait=3)
        elif kind == "nolength":
            self.reply(200, BODY, length=False)
        else:
            self.reply(206 if wanted else 200, BODY[start:])

    def reply(self, status, body, send=None, wait=0, length=True):
        self.send_response(status)
        if length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:send])
        self.wfile.flush()
        time.sleep(wait)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    BadServer.log = []
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), BadServer)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def fetch(server, tmp_path, *kinds, timeout=(2, 1)):
    return utils.download([f"{server}/{kind}/file" for kind in kinds], tmp_path / "new" / "file", SHA256, timeout)


def test_download_plain_and_not_again(server, tmp_path):
    path = fetch(server, tmp_path, "good")
    assert path.read_bytes() == BODY and not list(path.parent.glob("*.part"))
    fetch(server, tmp_path, "good")
    assert len(BadServer.log) == 1


def test_download_resumes_a_cut_connection(server, tmp_path):
    assert fetch(server, tmp_path, "cut").read_bytes() == BODY
    starts = [int(wanted[6:-1]) if wanted else 0 for _, wanted in BadServer.log]
    assert starts[0] == 0 and len(starts) >= 3 and all(a < b for a, b in zip(starts, starts[1:]))  # each try went on


def test_download_continues_a_part_from_an_earlier_run(server, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file.part").write_bytes(BODY[:1234])
    assert fetch(server, tmp_path, "good").read_bytes() == BODY
    assert BadServer.log == [("good", "bytes=1234-")]


def test_download_that_was_whole_but_not_yet_renamed(server, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file.part").write_bytes(BODY)
    assert fetch(server, tmp_path, "good").read_bytes() == BODY
    assert BadServer.log == [("good", f"bytes={len(BODY)}-")]


def test_download_when_range_is_ignored(server, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file.part").write_bytes(BODY[:1234])
    assert fetch(server, tmp_path, "norange").read_bytes() == BODY


@pytest.mark.parametrize("part", [b"x" * 5000, b"x" * 400_000], ids=["wrong bytes", "longer than the file"])
def test_download_with_a_bad_part_starts_over(server, tmp_path, part):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file.part").write_bytes(part)
    assert fetch(server, tmp_path, "good").read_bytes() == BODY


def test_download_of_unknown_length_draws_no_bar(server, tmp_path, capsys):
    assert fetch(server, tmp_path, "nolength").read_bytes() == BODY
    assert capsys.readouterr().out == ""


def test_download_goes_to_the_next_mirror(server, tmp_path):
    assert fetch(server, tmp_path, "403", "503", "wrong", "stall", "good").read_bytes() == BODY
    assert [kind for kind, _ in BadServer.log].count("403") == 1  # forbidden stays forbidden
    assert [kind for kind, _ in BadServer.log].count("503") > 1  # overloaded may pass


@pytest.mark.parametrize("kind", ["403", "503", "stall"])
def test_download_unreachable(server, tmp_path, kind):
    with pytest.raises(ConnectionError, match="could not be downloaded .*new.file"):  # and where to put it by hand
        fetch(server, tmp_path, kind, timeout=(1, 0.3))
    assert not (tmp_path / "new" / "file").exists()


def test_download_nobody_listens(tmp_path):
    with pytest.raises(ConnectionError):
        fetch("http://127.0.0.1:9", tmp_path, "good")


def test_download_wrong_body_is_an_error_and_leaves_nothing(server, tmp_path):
    with pytest.raises(utils.InputError, match="wrong hash"):
        fetch(server, tmp_path, "wrong")
    assert not list((tmp_path / "new").iterdir())


def test_download_never_replaces_a_file_with_another_hash(server, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_bytes(b"mine")
    with pytest.raises(utils.InputError, match="not the expected file"):
        fetch(server, tmp_path, "good")
    assert (tmp_path / "new" / "file").read_bytes() == b"mine" and not BadServer.log


# ---------------------------------------------------------------------------------------------- checkpoints
STATE = {"script": "x/train.py", "model": {"w": torch.arange(1000.0)}, "step": 3}


def test_checkpoint_round_trip(tmp_path):
    utils.save_checkpoint(tmp_path / "a" / "c.pt", STATE)
    back = utils.load_checkpoint(tmp_path / "a" / "c.pt", "x/train.py")
    assert torch.equal(back["model"]["w"], STATE["model"]["w"]) and back["step"] == 3
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["c.pt"]


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def test_checkpoint_refusals(tmp_path, monkeypatch):
    good = tmp_path / "good.pt"
    utils.save_checkpoint(good, STATE)
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    torch.save({"script": "x/train.py", "model": Evil()}, tmp_path / "evil_zip.pt")
    (tmp_path / "evil_pickle.pt").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "short.pt").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as file:
        file.writestr("hello", "x")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({**STATE, "script": "y/train.py"}, tmp_path / "other.pt")
    expected = {
        "evil_zip": "carries code",
        "evil_pickle": "not a checkpoint",
        "short": "cut short",
        "text": "not a checkpoint",
        "empty": "not a checkpoint",
        "zip": "damaged",
        "list": "another program",
        "other": "y/train.py",
        "none": "does not exist",
    }
    for name, message in expected.items():
        with pytest.raises(utils.InputError, match=message):
            utils.load_checkpoint(tmp_path / f"{name}.pt", "x/train.py")
    assert not (tmp_path / "evil").exists()  # nothing ran


def test_write_keeps_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "file"
    utils.write_atomically(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(utils.InputError, match="No space left.*--out"):
        utils.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_device(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for write in (lambda: utils.write_atomically(path, b"new"), lambda: utils.save_checkpoint(path, STATE),
                  lambda: utils.save_checkpoint(path, {"w": torch.zeros(100_000)})):
        (tmp_path / f"file.{os.getpid()}.tmp").symlink_to("/dev/full")
        with pytest.raises(utils.InputError, match="cannot write .*No space left"):
            write()
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_error_that_is_no_disks_keeps_its_traceback(tmp_path):
    def fail(_):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        utils.write_atomically(tmp_path / "file", fail)
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_is_cleared_away_in_time(tmp_path):
    for name in ("file.1.tmp", "file.2.tmp", "other.1.tmp"):
        (tmp_path / name).write_bytes(b"half")
    for name in ("file.1.tmp", "other.1.tmp"):
        os.utime(tmp_path / name, (time.time() - 4000,) * 2)
    utils.write_atomically(tmp_path / "file", b"new")
    assert {p.name for p in tmp_path.iterdir()} == {"file", "file.2.tmp", "other.1.tmp"}  # 2 may be alive


def test_kill_in_mid_save_leaves_a_whole_checkpoint(tmp_path):
    """A child saves without pause; kill -9 at random moments never leaves anything but a complete file."""
    code = (
        "import sys, torch, utils\n"
        "for i in range(10**9):\n"
        "    utils.save_checkpoint(sys.argv[1], {'script': 's', 'w': torch.full((500_000,), float(i))})\n"
        "    print(i, flush=True)\n"
    )
    path = tmp_path / "c.pt"
    for pause in (0.0, 0.003, 0.007, 0.013):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(utils.__file__).rsplit("/", 1)[0]},
        )
        child.stdout.readline()
        child.stdout.readline()
        time.sleep(pause)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        w = utils.load_checkpoint(path, "s")["w"]
        assert (w == w[0]).all()


# ---------------------------------------------------------------------------------------------- the rest
@pytest.mark.parametrize(
    "raised, code, words",
    [
        ("utils.InputError('no such thing; do that.')", 1, "error: no such thing; do that."),
        ("KeyboardInterrupt('go on with --resume.')", 130, "stopped. go on with --resume."),
        ("PermissionError(13, 'Permission denied', '/x')", 1, "error: /x: Permission denied"),
        ("utils.torch.OutOfMemoryError('CUDA out of memory')", 1, "error: the device ran out of memory"),
        ("utils.torch.empty(2**50)", 1, "error: the device ran out of memory"),  # as a CPU says it
        ("RuntimeError('shapes differ')", 1, "Traceback"),
        ("ZeroDivisionError()", 1, "Traceback"),  # a bug is not hidden
    ],
)
def test_run_turns_errors_into_one_sentence(raised, code, words):
    program = f"import utils\ndef main(): raise {raised}\nutils.run(main)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=os.path.dirname(utils.__file__)
    )
    assert done.returncode == code and words in done.stderr
    assert ("Traceback" in done.stderr) == (words == "Traceback")


def test_progress_prints_a_few_plain_lines_when_piped(capsys):
    bar = utils.Progress(10_000, "steps")
    for i in range(10_000):
        bar.update(i + 1, f"loss {i}")
    lines = capsys.readouterr().out.splitlines()
    assert 10 <= len(lines) <= 30 and lines[-1].startswith("100%")
    assert all(re.search(r"\d%  loss \d+  [\d,]+ steps/s  ETA \d+:\d\d", line) for line in lines)


def test_progress_stays_on_one_line_of_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for columns, width in ((80, 79), (300, 100)):
        monkeypatch.setenv("COLUMNS", str(columns))
        bar = utils.Progress(200, "steps")
        bar.begun -= 119.7  # 200 steps left of 400, at 200 in 119.7 s: two minutes, not 1:60
        bar.total = 400
        bar.update(200, "x" * 20)
        bar.update(400, "x" * 200)
        bar.clear()
        out = capsys.readouterr().out
        first, last, blank, end = out.split("\r")[1:]
        assert "ETA 2:00" in first and {len(first), len(last), len(blank)} == {width} and not blank.strip() and not end


def test_devices():
    assert utils.pick_device("cpu").type == utils.pick_device("cpu:0").type == "cpu"
    with pytest.raises(utils.InputError, match="--device cpu:1"):
        utils.pick_device("cpu:1")
    with pytest.raises(utils.InputError, match="--device abacus"):
        utils.pick_device("abacus")


def test_the_command_that_goes_on_can_be_pasted():
    assert shlex.split(utils.go_on("a/b.py", "my runs/1"))[-2:] == ["--out", "my runs/1"]
    assert utils.go_on("a/b.py", "runs/1") == "python a/b.py --resume --out runs/1"


def test_count_parameters():
    layer = torch.nn.Linear(3, 5)
    both = torch.nn.Sequential(layer, layer)  # shared
    assert utils.count_parameters(both) == 20
    layer.bias.requires_grad_(False)
    assert utils.count_parameters(both) == 15


def test_metrics_and_plot(tmp_path):
    history = [{"step": 0, "val": 2.0}, {"step": 1, "train": 1.0}]
    utils.save_metrics(tmp_path / "m.json", script="s", metrics={"loss": 1.0}, history=history)
    assert json.loads((tmp_path / "m.json").read_text())["versions"]["torch"] == torch.__version__
    utils.plot_history(tmp_path / "h.png", history, ["train", "val"], "title")
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_finds_its_data_from_anywhere_and_keeps_its_options(tmp_path, monkeypatch):
    (tmp_path / "my.csv").touch()
    (tmp_path / "etth1").touch()
    monkeypatch.chdir(tmp_path)
    place = utils.name_or_path("etth1", "station")
    assert place("etth1") == "etth1" and place("my.csv") == str(tmp_path / "my.csv") and place("no.csv") == "no.csv"
    saved = {"data": str(tmp_path / "my.csv"), "lr": 0.1, "tta": True, "out": "then", "device": "cuda", "compile": True}
    now = dict(data=None, lr=0.5, tta=False, out=tmp_path, device="cpu", compile=False)
    assert utils.resume(argparse.Namespace(**now, resume=False), {}, "s.py") is None
    args = argparse.Namespace(**now, resume=True)
    with pytest.raises(utils.InputError, match="checkpoint.pt does not exist; make it with: python s.py"):
        utils.resume(args, {}, "s.py")
    utils.save_checkpoint(tmp_path / "checkpoint.pt", {"script": "s.py", "options": saved, "step": 7})
    assert utils.resume(args, {"data": place("my.csv"), "tta": False}, "s.py", free=("tta",))["step"] == 7
    assert (args.data, args.lr) == (saved["data"], 0.1)
    assert (args.tta, args.out, args.device, args.compile) == (False, tmp_path, "cpu", False)
    utils.resume(args, {"lr": "auto"}, "s.py", free=("tta",))  # as --dtype auto, which the run has settled
    assert args.lr == 0.1
    assert utils.plain(args)["out"] == str(tmp_path) and utils.plain(args)["lr"] == 0.1
    for given in ({"lr": 0.2}, {"data": "etth1"}):
        with pytest.raises(utils.InputError, match="--resume goes on with a run that had"):
            utils.resume(args, given, "s.py", free=("tta",))
    with pytest.raises(utils.InputError, match="--tta True, not --tta False"):
        utils.resume(args, {"tta": False}, "s.py")


def test_options_given_and_their_ranges(monkeypatch):
    parser = utils.parser("What it does.\n\nMore of it.")
    for name in ("--lr", "--decay", "--dropout"):
        parser.add_argument(name, type=float, help="a number")
    parser.add_argument("--flag", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("words", nargs="*")
    parser.set_defaults(lr=0.1, dropout=0.0)
    monkeypatch.setattr(sys, "argv", ["s.py", "--decay", "0", "--no-flag"])
    args, given = utils.parse(parser)
    assert (args.lr, args.decay, args.dropout, args.flag, args.words) == (0.1, 0.0, 0.0, False, [])
    assert given == {"decay": 0.0, "flag": False}
    text = parser.format_help()
    assert "What it does." in text and "More" not in text and "a number (default: 0.1)" in text and "None" not in text
    ranges = dict(above_zero="lr", not_negative="decay", shares="dropout")
    utils.check(args, **ranges)
    args.decay = None  # not given, and without a default
    utils.check(args, **ranges)
    for name, value, message in (("lr", 0.0, "greater than zero"), ("lr", math.nan, "greater than zero"),
                                 ("decay", -1.0, "at least 0"), ("dropout", 1.0, "at least 0 and less than 1"),
                                 ("dropout", -0.1, "at least 0 and less than 1")):
        with pytest.raises(utils.InputError, match=f"--{name} {value} must be {message}"):
            utils.check(argparse.Namespace(**(vars(args) | {name: value})), **ranges)


def test_weights_of_another_model_are_an_error():
    one, other = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
    saved = {"script": "s.py", "model": {name: p + 1 for name, p in one.state_dict().items()}}
    utils.load_weights(one, saved, "c.pt")
    assert torch.equal(one.weight, saved["model"]["weight"])
    with pytest.raises(utils.InputError, match="c.pt is of another model than s.py builds; .* python s.py"):
        utils.load_weights(other, saved, "c.pt")


@pytest.mark.parametrize("config", [{"in_features": 2, "widths": 3}, {"in_features": 2}, {"out_features": "many"}])
def test_a_model_whose_options_are_those_of_another_version_is_refused(config):
    saved = {"model": torch.nn.Linear(2, 3).state_dict(), "config": config, "script": "s.py"}
    with pytest.raises(utils.InputError, match="c.pt is of another model than s.py builds; .* python s.py"):
        utils.rebuild(lambda: torch.nn.Linear(**saved["config"]), saved, "c.pt")


def test_a_model_is_rebuilt_from_its_options_with_its_weights():
    layer = torch.nn.Linear(2, 3)
    saved = {"model": layer.state_dict(), "config": {"in_features": 2, "out_features": 3}, "script": "s.py"}
    again = utils.rebuild(lambda: torch.nn.Linear(**saved["config"]), saved, "c.pt")
    assert torch.equal(again.weight, layer.weight) and torch.equal(again.bias, layer.bias)


def test_signals_leave_a_note_until_they_are_restored():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    caught, restore = utils.catch_signals()
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    assert caught == [signal.SIGINT, signal.SIGTERM]
    restore()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_mean_and_standard_deviation_are_numpys():
    values = [1.0, 2.0, 4.0, 8.5]
    assert utils.mean_std(values) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert utils.mean_std([3.0]) == (3.0, 0.0)
