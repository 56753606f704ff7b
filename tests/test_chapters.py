"""What DESIGN asks of every chapter alike."""

import json
import subprocess
import sys

import pytest
import results
from conftest import ROOT

CHAPTERS = sorted(path.name for path in ROOT.glob("[0-9][0-9]_*"))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_without_their_teaching_comments_the_scripts_still_run(tmp_path, chapter):
    """`grep -v '^ *##'` leaves lean programs: all of a chapter's scripts answer --help, in one process to save time."""
    (tmp_path / chapter).mkdir()
    scripts = [path.name for path in (ROOT / chapter).glob("*.py")]
    for path in [*(ROOT / chapter).glob("*.py"), ROOT / "utils.py"]:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        lean = [line for line in lines if not line.lstrip().startswith("##")]
        assert len(lean) < len(lines)
        (tmp_path / path.relative_to(ROOT)).write_text("".join(lean), encoding="utf-8")
    program = """if True:
        import contextlib, io, runpy, sys
        folder, *scripts = sys.argv[1:]
        sys.path.insert(0, folder)
        for script in scripts:
            sys.argv = [f"{folder}/{script}", "--help"]
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
                runpy.run_path(sys.argv[0], run_name="__main__")
            assert "--help" in out.getvalue() and "(default: None)" not in out.getvalue(), script
    """
    command = [sys.executable, "-c", program, str(tmp_path / chapter), *scripts]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_and_the_workflow_name_the_same_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    install, test = next(line for line in readme.splitlines() if line.endswith("pytest tests")).split(" && ")
    first = next(line for line in readme.splitlines() if line.startswith("pip install")).split(" && ")[1]
    for command in (install, test, first):
        assert f"run: {command}" in workflow


def test_the_readme_s_table_of_results_is_what_the_scripts_wrote():
    found = results.table(json.loads(results.RESULTS.read_text(encoding="utf-8")))
    assert len(found.splitlines()) > 10 and found in (ROOT / "README.md").read_text(encoding="utf-8")


def test_results_are_means_and_spreads_of_metrics():
    runs = [{"metrics": {"a b (1)": {"x": x}, "same": 0.5}} for x in (0.1, 0.2, 0.6)]
    assert results.fill("x {a b (1).x:.2%}, y {same:.3f} nats", runs) == "x 30.00 ± 26.46 %, y 0.500 nats"
