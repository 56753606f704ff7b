"""Makes utils importable, gives each worker process one core, and skips `real` tests where their data is missing.

pytest.ini starts as many workers as there are cores (pytest-xdist), a test file each. Two workers of two threads on two
cores would wait for each other most of the time, hence one thread each; scripts that a test starts inherit it.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def chapter(folder: str, *names: str):
    """Import a chapter's scripts by path, in the order given; a folder that starts with a digit is no package."""
    for other in ("load", "from_scratch", "train", "load_model", "experiment"):
        sys.modules.pop(other, None)  # another chapter's
    sys.path.insert(0, str(ROOT / folder))
    try:
        modules = [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(ROOT / folder))
    return modules[0] if len(modules) == 1 else modules


REAL = Path(os.environ.get("DATA_DIR", ROOT / "data"))


def pytest_configure(config):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the first import of torch; benchmark.py keeps all cores
    config.addinivalue_line("markers", "real(file): runs only where DATA_DIR holds this real data file")


def pytest_runtest_setup(item):
    for mark in item.iter_markers("real"):
        if not (REAL / mark.args[0]).exists():
            pytest.skip(f"{REAL / mark.args[0]} is not there")
