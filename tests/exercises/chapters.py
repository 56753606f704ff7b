"""Two chapters in one program: `load` and `train` exist in all six, so what an earlier import left has to go first."""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def chapter(folder: str, *names: str):
    """Import scripts of a chapter by name, in that order: one module, or a list of them where several are named.

    ## A folder that starts with a digit is no package, so its scripts are found by path, and import each other by their
    ## plain names. What was imported from another chapter before stays usable: it only loses its place in sys.modules.
    """
    for name in ("reading", "load", "from_scratch", "train", "load_model", "experiment"):
        sys.modules.pop(name, None)
    sys.path.insert(0, str(ROOT / folder))  # before the other chapters
    try:
        modules = [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(ROOT / folder))
    return modules if len(names) > 1 else modules[0]
