"""Makes utils importable, gives each worker process one core, and skips `real` tests where their data is missing.

pytest.ini starts as many workers as there are cores (pytest-xdist), a test file each. Two workers of two threads on two
cores would wait for each other most of the time, hence one thread each; scripts that a test starts inherit it. Files
that take long go first: were one of them the last, all workers but one would have nothing to do meanwhile.
"""

import contextlib
import hashlib
import http.server
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "exercises")]
from chapters import chapter  # noqa: F401  (tests take it from here)


def run_script(path, *options, code=0, launcher=(), env=None, **kwargs):
    """Run a script as a user does: return what it prints. A failure has to be one sentence, and no traceback."""
    done = subprocess.run([*(launcher or [sys.executable]), str(path), *map(str, options)], capture_output=True,
                          text=True, timeout=300, env={**os.environ, **(env or {})}, **kwargs)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if code not in (0, 2):  # 2 is argparse's, with the options that there are
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stdout + done.stderr


@contextlib.contextmanager
def serving(handler):
    """A server on this machine that answers by an http.server handler class, quietly; its address."""
    quiet = type("Quiet", (handler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def call_main(module, *options):
    """What a script's main prints, without the seconds that a new process takes."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", [module.__file__, *map(str, options)])
        module.main()
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")  # a script's process ends instead
    return out.getvalue()


def refusal(module, *options):
    """What a script's main says of bad input: one sentence on one line, its own or argparse's."""
    import utils

    with pytest.raises((utils.InputError, ConnectionError, SystemExit)) as error, \
            contextlib.redirect_stderr(io.StringIO()) as err:
        call_main(module, *options)
    if isinstance(error.value, SystemExit):  # argparse has printed "usage: ..." and the error
        assert error.value.code == 2 and len(err.getvalue().splitlines()) == 2, err.getvalue()
    message = err.getvalue().splitlines()[-1] if isinstance(error.value, SystemExit) else str(error.value)
    assert message.isprintable() and len(message) < 500, message
    return message


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


REAL = Path(os.environ.get("DATA_DIR", ROOT / "data"))


def pytest_configure(config):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the first import of torch; benchmark.py keeps all cores
    config.addinivalue_line("markers", "real(file): runs only where DATA_DIR holds this real data file")


LONG = ["robustness", "02_cnn", "copies", "06_bpe", "06_train", "05_transformer", "chapters", "01_basics", "utils"]


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_runtest_setup(item):
    for mark in item.iter_markers("real"):
        if not (REAL / mark.args[0]).exists():
            pytest.skip(f"{REAL / mark.args[0]} is not there")
