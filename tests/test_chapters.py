"""What DESIGN asks of every chapter alike."""

import json
import subprocess
import sys

import lines
import results
from conftest import ROOT

# Of code: 7,803 when issue 23 was done; since then reading people's own files and tables (+ 890), folders of today with
# their tokenizers (+ 600) and Llama's family (+ 200). More needs a reason as good.
LINES = 9520


def test_without_their_teaching_comments_the_scripts_still_run(tmp_path):
    """`grep -v '^ *##'` leaves lean programs: every script answers --help, in one process to save time."""
    scripts = []
    for path in [*ROOT.glob("[0-9][0-9]_*/*.py"), ROOT / "utils.py"]:
        text, to = path.read_text(encoding="utf-8"), tmp_path / path.relative_to(ROOT)
        to.parent.mkdir(exist_ok=True)
        to.write_text("".join(line for line in text.splitlines(keepends=True) if not line.lstrip().startswith("##")),
                      encoding="utf-8")
        scripts += [str(to)] * ("    utils.run(main" in text)
    program = """if True:
        import contextlib, io, os, runpy, sys
        begin = sys.path[:]
        for script in sys.argv[1:]:
            sys.argv, sys.path[:] = [script, "--help"], [os.path.dirname(script), *begin]
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
                runpy.run_path(script, run_name="__main__")
            assert "--help" in out.getvalue() and "(default: None)" not in out.getvalue(), script
            root = os.path.dirname(os.path.dirname(script))  # the next chapter has a `load` of its own
            for name, module in list(sys.modules.items()):
                if (getattr(module, "__file__", None) or "").startswith(root):
                    del sys.modules[name]
    """
    assert len(scripts) > 30
    done = subprocess.run([sys.executable, "-c", program, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_is_not_more_to_read_than_design_allows():
    found = lines.figures()
    assert found["utils.py, all lines"] <= 230 and found["01_basics/train.py, all lines"] <= 135
    assert found["noqa: " + "E402"] == 0
    assert all(length <= 110 for name, length in found.items() if name.startswith("longest main()"))
    assert found["code lines of the product"] <= LINES
    assert all(shared <= 25 for name, shared in found.items() if name.startswith("equal lines"))


def test_all_six_chapters_fit_into_one_program(tmp_path):
    """By the README's own lines; then each model computes, and is the one of its chapter."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    snippet, = [part for part in readme.split("```") if part.startswith("python\nimport importlib")]
    program = snippet.removeprefix("python\n") + """
import torch
found = {folder: chapter(folder, *names.split()) for folder, names in {
    "01_basics": "load train", "02_cnn": "load train", "03_lstm": "load train", "04_tabular": "load train",
    "05_transformer": "load train", "06_finetune": "load train gpt2 llama lora bert"}.items()}
for folder, modules in found.items():
    assert all(f"/{folder}/" in module.__file__.replace("\\\\", "/") for module in modules), folder
assert len({module for modules in found.values() for module in modules}) == 16
assert not loud & sys.modules.keys()
pictures = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
assert cnn.ResNet(10, torch.zeros(3), torch.ones(3))(pictures).shape == (2, 10)
lstm = forecast.LSTMForecaster(channels=3, horizon=20, hidden=16, dropout=0.0, norm="last")
assert lstm(torch.zeros(2, 48, 3)).shape == (2, 20, 3)
"""
    first = "import torch, torchvision, sys\nloud = {'argparse', 'matplotlib', 'requests'}\n"
    first += "for name in loud & sys.modules.keys(): del sys.modules[name]\n"  # torch may have brought them
    subprocess.run([sys.executable, "-c", first + program], cwd=ROOT, check=True)


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
