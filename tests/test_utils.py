"""utils.py: downloads against a server that misbehaves, checkpoints against every way a file can be wrong."""

import argparse
import contextlib
import errno
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
import threading
import time
import zipfile

import kills
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
        start = int(wanted.split("=")[1].rstrip("-"))
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


def leave_part(tmp_path, content, seconds_ago=3600):
    """What a process that was stopped some time ago has left of its download."""
    (tmp_path / "new").mkdir()
    part = tmp_path / "new" / "file.123.part"
    part.write_bytes(content)
    os.utime(part, (time.time() - seconds_ago,) * 2)
    return part


def test_download_plain_and_not_again(server, tmp_path):
    path = fetch(server, tmp_path, "good")
    assert path.read_bytes() == BODY and not list(path.parent.glob("*.part"))
    fetch(server, tmp_path, "good")
    assert len(BadServer.log) == 1


def test_download_resumes_a_cut_connection(server, tmp_path):
    assert fetch(server, tmp_path, "cut").read_bytes() == BODY
    starts = [int(wanted[6:-1]) for _, wanted in BadServer.log]
    assert starts[0] == 0 and len(starts) >= 3 and all(a < b for a, b in zip(starts, starts[1:]))  # each try went on


def test_download_continues_a_part_from_an_earlier_run(server, tmp_path):
    leave_part(tmp_path, BODY[:1234])
    assert fetch(server, tmp_path, "good").read_bytes() == BODY
    assert BadServer.log == [("good", "bytes=1234-")]


def test_download_leaves_the_part_of_another_process_alone(server, tmp_path):
    part = leave_part(tmp_path, BODY[:1234], seconds_ago=0)
    assert fetch(server, tmp_path, "good").read_bytes() == BODY
    assert part.read_bytes() == BODY[:1234] and BadServer.log == [("good", "bytes=0-")]


def test_download_that_was_whole_but_not_yet_renamed(server, tmp_path):
    leave_part(tmp_path, BODY)
    assert fetch(server, tmp_path, "good").read_bytes() == BODY
    assert BadServer.log == [("good", f"bytes={len(BODY)}-")]


def test_download_when_range_is_ignored(server, tmp_path):
    leave_part(tmp_path, BODY[:1234])
    assert fetch(server, tmp_path, "norange").read_bytes() == BODY


@pytest.mark.parametrize("part", [b"x" * 5000, b"x" * 400_000], ids=["wrong bytes", "longer than the file"])
def test_download_with_a_bad_part_starts_over(server, tmp_path, part):
    leave_part(tmp_path, part)
    assert fetch(server, tmp_path, "good").read_bytes() == BODY


def test_download_of_unknown_length_draws_no_bar(server, tmp_path, capsys):
    assert fetch(server, tmp_path, "nolength").read_bytes() == BODY
    assert capsys.readouterr().out == ""


def test_download_goes_to_the_next_mirror(server, tmp_path):
    assert fetch(server, tmp_path, "403", "503", "wrong", "stall", "cut").read_bytes() == BODY
    kinds = [kind for kind, _ in BadServer.log]
    assert kinds.count("403") == kinds.count("wrong") == 1  # what is forbidden or wrong stays so
    assert kinds.count("503") > 1  # what is overloaded may pass


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
    utils.write_atomically(tmp_path / "a" / "c.pt", torch.save, STATE)
    back = utils.load_checkpoint(tmp_path / "a" / "c.pt", "x/train.py")
    assert torch.equal(back["model"]["w"], STATE["model"]["w"]) and back["step"] == 3
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["c.pt"]


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def test_checkpoint_refusals(tmp_path, monkeypatch):
    good = tmp_path / "good.pt"
    utils.write_atomically(good, torch.save, STATE)
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
    for name in ("evil_zip", "evil_pickle", "short", "text", "empty", "zip", "list", "other"):
        with pytest.raises(utils.InputError, match=f"{name}.pt is damaged, or not from x/train.py; make it with"):
            utils.load_checkpoint(tmp_path / f"{name}.pt", "x/train.py")
    with pytest.raises(utils.InputError, match="none.pt does not exist; make it with: python x/train.py"):
        utils.load_checkpoint(tmp_path / "none.pt", "x/train.py")
    assert not (tmp_path / "evil").exists()  # nothing ran


def test_write_keeps_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "file"
    utils.write_atomically(path, lambda file: file.write(b"old"))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(utils.InputError, match="No space left.*--out"):
        utils.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_device(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for write in (lambda: utils.write_atomically(path, lambda file: file.write(b"new")),
                  lambda: utils.write_atomically(path, torch.save, STATE),
                  lambda: utils.write_atomically(path, torch.save, {"w": torch.zeros(100_000)})):
        (tmp_path / f"file.{os.getpid()}.tmp").symlink_to("/dev/full")
        with pytest.raises(utils.InputError, match="cannot write .*No space left"):
            write()
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_kill_in_mid_save_leaves_a_whole_checkpoint(tmp_path):
    """A child saves without pause; kill -9 at random moments never leaves anything but a complete file."""
    path, program = tmp_path / "c.pt", tmp_path / "saves.py"
    program.write_text(
        f"import sys, torch\nsys.path.insert(0, {os.path.dirname(utils.__file__)!r})\nimport utils\n"
        "from pathlib import Path\n"
        "for i in range(10**9):\n"
        "    state = {'script': 's', 'w': torch.full((500_000,), float(i))}\n"
        "    utils.write_atomically(Path(sys.argv[1]), torch.save, state)\n"
        "    print(i, flush=True)\n"
    )
    for pause in (0.0, 0.003, 0.007, 0.013):
        log = tmp_path / f"log{pause}"
        child, printed = kills.script(log, program, path), log.with_name(f"{log.name}.out")
        while not (printed.exists() and printed.read_text().count("\n") > 1):
            assert not child.wait(0.001)
        time.sleep(pause)
        child.kill()
        w = utils.load_checkpoint(path, "s")["w"]
        assert (w == w[0]).all()


# ---------------------------------------------------------------------------------------------- the rest
@pytest.mark.parametrize("raised, code", [
    (utils.InputError("no such thing; do that."), "error: no such thing; do that."),
    (PermissionError(13, "Permission denied", "/x"), "error: [Errno 13] Permission denied: '/x'"),
    (ConnectionError("out of reach; do that."), "error: out of reach; do that."),
    (MemoryError(), "error: the device ran out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "error: the device ran out of memory"),
    (RuntimeError("shapes differ"), None), (ZeroDivisionError(), None),  # a bug is not hidden
])
def test_run_turns_errors_into_one_sentence(raised, code):
    def main():
        raise raised

    with pytest.raises(SystemExit if code else type(raised)) as stopped:
        utils.run(main)
    assert stopped.value.code.startswith(code) if code else stopped.value is raised


def test_a_cpu_without_memory_is_one_sentence_and_an_exit_status():
    """As a user sees it: in a process of its own, by the error that PyTorch itself raises."""
    program = "import utils\nutils.run(lambda: utils.torch.empty(2**50))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          cwd=os.path.dirname(utils.__file__))
    assert done.returncode == 1 and re.fullmatch("error: the device ran out of memory.*\n", done.stderr)


def test_progress_prints_a_few_plain_lines_when_piped(capsys):
    begun = time.perf_counter()
    for i in range(1, 10_001):
        utils.progress(i, 10_000, begun, f"loss {i}", "words", per=3)
    lines = capsys.readouterr().out.splitlines()
    assert 10 <= len(lines) <= 30 and lines[-1].startswith("100%")
    assert all(re.fullmatch(r" *\d+%  loss \d+  [\d,]+ words/s  ETA \d+:\d\d *", line) for line in lines)


def test_progress_stays_on_one_line_of_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    begun = time.perf_counter() - 119.7
    utils.progress(200, 400, begun, "x" * 20, "steps")  # 200 left at 200 in 119.7 s: two minutes, not 1:60
    utils.progress(400, 400, begun, "x" * 200, "steps")
    first, last, end = capsys.readouterr().out.split("\r")
    assert "ETA 2:00" in first and {len(first), len(last)} == {79} and not end


def parsed(monkeypatch, options, *words):
    monkeypatch.setattr(sys, "argv", ["s.py", *map(str, words)])
    return utils.parse_args(options)


def test_devices_and_dtypes(tmp_path, monkeypatch):
    options = utils.parser("What it does.", str(tmp_path / "s.py"), "device", "dtype")
    for words, device, dtypes in (("", None, (torch.float32, torch.bfloat16)),
                                  ("--device cpu --dtype bfloat16", "cpu", (torch.bfloat16,))):
        args = parsed(monkeypatch, options, *words.split())
        assert args.dtype in dtypes and (not device or args.device == torch.device(device))
    for name in ("abacus", "cuda:99"):
        with pytest.raises(utils.InputError, match=f"--device {name}: this machine has no such device"):
            parsed(monkeypatch, options, "--device", name)


def test_ctrl_c_prints_a_command_that_can_be_pasted(monkeypatch, capsys):
    def main():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["a/train.py", "--out", "my runs/1"])
    with pytest.raises(SystemExit) as stopped:
        utils.run(main, go_on="--resume")
    assert stopped.value.code == 130
    assert shlex.split(capsys.readouterr().err.split("python")[1]) == ["a/train.py", "--out", "my runs/1", "--resume"]


def test_count_parameters():
    layer = torch.nn.Linear(3, 5)
    both = torch.nn.Sequential(layer, layer)  # shared
    assert utils.count_parameters(both) == 20
    layer.bias.requires_grad_(False)
    assert utils.count_parameters(both) == 15


def test_metrics_and_plot(tmp_path):
    history = [{"step": 0, "val": 2.0, "seconds": 1.0}, {"step": 1, "train": 1.0, "seconds": 2.0}]
    args = argparse.Namespace(out=tmp_path, device=torch.device("cpu"), seed=3)
    data = argparse.Namespace(name="drawn", stand_in="MNIST")
    utils.save_metrics(args, "s.py", data, torch.nn.Linear(2, 3), {"loss": 1.0}, history, model="m")
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found.pop("versions")["torch"] == torch.__version__
    assert found == {"script": "s.py", "data": "drawn", "stand_in": True, "device": "cpu", "seed": 3, "seconds": 2.0,
                     "parameters": 9, "metrics": {"loss": 1.0}, "history": history, "model": "m"}
    utils.plot_history(tmp_path / "h.png", history, ["train", "val"], "title")
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")


def test_options_and_their_ranges(tmp_path, monkeypatch):
    options = utils.parser("What it does.\n\nMore of it.", str(tmp_path / "s.py"), "seed")
    for name, kind in (("--steps", utils.count), ("--lr", utils.positive), ("--dropout", utils.share),
                       ("--decay", utils.number(float, "[0, inf)")), ("--part", utils.number(float, "(0, 1]"))):
        options.add_argument(name, type=kind, default=0.5, help="a number")
    text = options.format_help()
    assert "What it does." in text and "More" not in text and "a number (default: 0.5)" in text
    args = parsed(monkeypatch, options, *"--steps 1 --lr 1e-9 --dropout 0 --decay 0 --part 1 --seed 7".split())
    assert (args.steps, args.lr, args.dropout, args.decay, args.part) == (1, 1e-9, 0, 0, 1)
    assert args.seed == 7 and args.out == tmp_path / "outputs" and args.out.is_dir() and not list(args.out.iterdir())
    for words, said in (("--steps 0", "0 is not in [1, inf)"), ("--lr 0", "0 is not in (0, inf)"),
                        ("--lr nan", "nan is not in (0, inf)"), ("--lr inf", "inf is not in (0, inf)"),
                        ("--dropout 1", "1 is not in [0, 1)"), ("--dropout=-0.1", "-0.1 is not in [0, 1)"),
                        ("--decay=-1", "-1 is not in [0, inf)"), ("--part 0", "0 is not in (0, 1]"),
                        ("--seed=-1", "-1 is not in [0, 4294967295]"), ("--steps 1.5", "invalid number value: '1.5'")):
        error = io.StringIO()
        with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(error):
            parsed(monkeypatch, options, *words.split())
        option = words.replace("=", " ").split()[0]
        assert stop.value.code == 2 and len(error.getvalue().splitlines()) == 2
        assert f"argument {option}: {said}" in error.getvalue()


def test_a_folder_that_cannot_be_written_is_named_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(utils.InputError, match="cannot write .*file.*choose another --out"):
        parsed(monkeypatch, utils.parser("What it does.", str(tmp_path / "s.py")), "--out", tmp_path / "file")


def test_a_run_goes_on_with_the_options_it_had(tmp_path):
    path = tmp_path / "checkpoint.pt"
    then = {"lr": 0.1, "data": None, "dtype": torch.bfloat16, "targets": ["a", "b"]}
    utils.write_atomically(path, torch.save, STATE | {"options": then})
    assert utils.load_checkpoint(path, "x/train.py", then | {"out": tmp_path})["step"] == 3
    for name, value in (("lr", 0.2), ("data", "my.csv"), ("dtype", torch.float32), ("targets", ["a"])):
        with pytest.raises(utils.InputError, match=f"is of a run with --{name} .*; go on with the same"):
            utils.load_checkpoint(path, "x/train.py", then | {name: value})


def test_the_notice_of_a_stand_in_is_a_box_and_of_a_real_set_nothing(capsys):
    utils.stand_in_notice("mnist", "")
    assert not capsys.readouterr().out
    utils.stand_in_notice("typeset", "MNIST")
    edge, line, end = capsys.readouterr().out.splitlines()
    assert edge == end == f"+{'-' * (len(line) - 2)}+" and "typeset in place of MNIST" in line
