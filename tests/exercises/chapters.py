"""What the exercises share: a way to import the scripts of several chapters at once."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def chapter(folder: str, name: str):
    """Import a chapter's script under a name of its own, as every chapter has a `train` and a `load`."""
    sys.path.insert(0, str(ROOT / folder))
    others = {module: sys.modules.pop(module, None) for module in ("load", "train")}
    try:
        spec = importlib.util.spec_from_file_location(f"{name}_of_{folder}", ROOT / folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)  # its own `from load import ...` finds the chapter's load
        return module
    finally:
        sys.path.remove(str(ROOT / folder))
        for other, before in others.items():
            sys.modules.pop(other, None)
            if before:
                sys.modules[other] = before
