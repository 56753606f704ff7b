"""How much there is to read: prints what DESIGN limits, from the files themselves.

    python tests/lines.py                 this tree
    python tests/lines.py PATH            another checkout, for a comparison

A line of code is one that is not blank, not a comment, and not part of a docstring. The main functions of two scripts
share a line where both have it, white space at its ends apart. In a train.py, model and loop are what stands between
the rulers `model` and `main`, or, where there are no rulers, every class and function but main; and, in main itself,
the loop over what `fit` yields, which prints, keeps the best and stops early.
"""

import ast
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAIRS = [("06_finetune/bert_classify.py", "06_finetune/bert_qa.py"),
         ("05_transformer/train.py", "06_finetune/train.py"), ("03_lstm/train.py", "04_tabular/train.py")]


def product(root: Path) -> list[Path]:
    """The chapters' scripts and utils.py."""
    return [*sorted(root.glob("[0-9][0-9]_*/*.py")), root / "utils.py"]


def code_lines(text: str) -> set[int]:
    """The numbers, from 1, of the lines of code in a program."""
    strings = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, False) is not None:
            strings.update(range(body[0].lineno, body[0].end_lineno + 1))
    return {i for i, line in enumerate(text.splitlines(), 1)
            if line.strip() and not line.strip().startswith("#") and i not in strings}


def main_lines(path: Path) -> list[str]:
    """The lines of main(), stripped, without the blank ones; empty where a file has no main."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            return [line.strip() for line in lines[node.lineno - 1 : node.end_lineno]]
    return []


def common(a: Path, b: Path) -> int:
    """How many lines the two mains have in common, comments included, blank lines not."""
    return (Counter(filter(None, main_lines(a))) & Counter(filter(None, main_lines(b)))).total()


def lesson(path: Path) -> tuple[int, int]:
    """(lines of code in model and loop, lines of code in all) of a train.py."""
    text = path.read_text(encoding="utf-8")
    code, lines = code_lines(text), text.splitlines()
    rulers = [i for i, line in enumerate(lines, 1) if line.startswith("# -----")]
    first = next((i for i in rulers if lines[i - 1].endswith(" model")), None)
    last = next((i for i in rulers if lines[i - 1].endswith(" main")), None)
    loops = {i for node in ast.walk(ast.parse(text)) if isinstance(node, ast.For) and isinstance(node.iter, ast.Call)
             and getattr(node.iter.func, "id", "") == "fit" for i in range(node.lineno, node.end_lineno + 1)}
    if first and last:
        return sum(first < i < last or i in loops for i in code), len(code)
    inside = [node for node in ast.parse(text).body
              if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name != "main"]
    return sum(any(node.lineno - len(node.decorator_list) <= i <= node.end_lineno for node in inside) for i in code), \
        len(code)


def figures(root: Path = ROOT) -> dict[str, float | int | str]:
    """Name of a figure -> its value, for the tree at root."""
    files = product(root)
    mains = {str(path.relative_to(root)): len(main_lines(path)) for path in files}
    longest = max(mains, key=mains.get)
    table = {"code lines of the product": sum(len(code_lines(p.read_text(encoding="utf-8"))) for p in files),
             "utils.py, all lines": len((root / "utils.py").read_text(encoding="utf-8").splitlines()),
             f"longest main() ({longest})": mains[longest],
             "01_basics/train.py, all lines": len((root / "01_basics/train.py").read_text("utf-8").splitlines())}
    for path in sorted(root.glob("[0-9][0-9]_*/train.py")):
        part, whole = lesson(path)
        table[f"{path.parent.name}/train.py, share of model and loop"] = f"{part / whole:.0%} of {whole}"
    for a, b in PAIRS:
        table[f"equal lines in the mains of {a} and {b}"] = common(root / a, root / b)
    tests = [path for path in root.glob("tests/**/*.py") if path.name != "lines.py"]
    table["noqa: E402"] = sum(path.read_text(encoding="utf-8").count("noqa: E402") for path in files + tests)
    return table


def main() -> None:
    for name, value in figures(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT).items():
        print(f"{name:86}{value:>10}")


if __name__ == "__main__":
    main()
