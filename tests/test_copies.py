"""A chapter's folder and utils.py, taken elsewhere: all its scripts still run, wherever they are and from anywhere.

Each chapter is copied, with nothing but utils.py beside it, below a folder whose name has spaces and a letter that is
not ASCII; nobody may write to the copy; no network is in reach; the scripts start in another folder, and write where
--out and DATA_DIR say. So a reader who copies a chapter gets all that it needs, and a system administrator can install
the repository once for everyone.
"""

import os
import shutil
import subprocess
import sys

import kills
import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
# What each script of a chapter is given, in the order in which a reader runs them. {data}: of kills.make_stand_ins;
# TRAIN: kills.TRAINING's options. Without --data, the real set is out of reach, and the stand-in takes its place.
SCRIPTS = {
    "01_basics": {
        "load.py": "--out {out}", "from_scratch.py": "--data typeset --epochs 1 --out {out}",
        "train.py": "TRAIN", "load_model.py": "--model {out}/model.pt --out {out}",
        "experiment.py": "--data typeset --only tanh --seeds 1 --epochs 1 --out {out}"},
    "02_cnn": {
        "load.py": "--out {out}", "from_scratch.py": "--data {data}/pictures --epochs 1 --out {out}",
        "train.py": "TRAIN", "load_model.py": "--model {out}/model.pt --out {out}",
        "experiment.py": "--data {data}/pictures --only depth --seeds 1 --pictures 500 --out {out}"},
    "03_lstm": {
        "load.py": "--out {out}",
        "from_scratch.py": "--data {data}/series.csv --lookback 12 --horizon 4 --hidden 8 --epochs 1 --out {out}",
        "train.py": "TRAIN", "load_model.py": "--model {out}/model.pt --out {out}",
        "experiment.py": "--data {data}/series.csv --horizon 4 --hidden 8 --epochs 1 --seeds 1 --only lookback "
                         "--out {out}"},
    "04_tabular": {
        "load.py": "--out {out}", "from_scratch.py": "--data census --epochs 1 --hidden 16 --out {out}",
        "train.py": "TRAIN", "load_model.py": "--model {out}/model.pt --repeats 1 --out {out}",
        "experiment.py": "--data census --only dropout --seeds 1 --epochs 1 --out {out}"},
    "05_transformer": {
        "load.py": "--out {out}",
        "from_scratch.py": "--data {data}/text.txt --steps 5 --n-embd 32 --batch-size 4 --out {out}",
        "train.py": "TRAIN", "load_model.py": "--model {out}/model.pt --length 20 --out {out}",
        "experiment.py": "--data {data}/text.txt --seeds 1 --seconds 0.1 --characters 2048 --only QK "
                         "--out {out}"},
    "06_finetune": {
        "weights.py": "{data}/gpt2-stand-in", "bpe.py": "--data {data}/text.txt --vocab-size 300 --out {out}",
        "wordpiece.py": "--data {data}/text.txt --vocab-size 300 --out {out}", "gpt2.py": "",
        "bert.py": "--out {out}", "load.py": "--out {out}", "lora.py": "", "train.py": "TRAIN",
        "load_model.py": "--length 10 --out {out}", "bert_classify.py": "TRAIN", "bert_qa.py": "TRAIN",
        "experiment.py": "--model {data}/gpt2-stand-in --data {data}/text.txt --only scratch --seeds 1 --steps 2 "
                         "--block-size 32 --out {out}"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return kills.make_stand_ins(tmp_path_factory.mktemp("stand_ins"))


def copy(folder, chapter):
    shutil.copytree(ROOT / chapter, folder / chapter, ignore=shutil.ignore_patterns("__pycache__", "outputs"))
    shutil.copy(ROOT / "utils.py", folder)
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.mark.parametrize("chapter", SCRIPTS)
def test_a_chapter_runs_alone_from_anywhere_without_writing_to_where_it_is(chapter, data, tmp_path):
    place, here, out = tmp_path / "a copy für all", tmp_path / "here", tmp_path / "my outputs"
    here.mkdir()
    for model in ("gpt2-stand-in", "bert-stand-in"):  # else they are pre-trained now, for minutes
        shutil.copytree(data / model, tmp_path / "my data" / model)
    names = copy(place, chapter)
    scripts = {path.name for path in (place / chapter).glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert scripts == SCRIPTS[chapter].keys()
    for path in [place, *place.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        for name, options in SCRIPTS[chapter].items():
            words = [word.format(data=data, out=out) for word in options.split(" ") if word]
            if options == "TRAIN":
                words = [*kills.options_of(f"{chapter}/{name}", data), "--out", str(out)]
            said = kills.script(tmp_path / "log", place / chapter / name, *words, folder=here,
                                environment={"DATA_DIR": str(tmp_path / "my data")},
                                powerless=sys.platform == "linux" and not os.geteuid()).end()
            assert "Traceback" not in said and (tmp_path / "log.out").read_text(encoding="utf-8")
            assert name != "load.py" or said.count("STAND-IN") >= 2
    finally:
        for path in [place, *place.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert sorted(path.relative_to(place) for path in place.rglob("*")) == names
    assert not list(here.iterdir()) and {path.suffix for path in out.rglob("*")} >= {".png", ".json"}


def test_as_a_user_types_it(tmp_path):
    """`python "a copy/01_basics/train.py"`: a real process, from a folder that has nothing to do with it."""
    copy(tmp_path / "a copy", "01_basics")
    (tmp_path / "here").mkdir()
    done = subprocess.run([sys.executable, "../a copy/01_basics/load.py", "--data", "typeset", "--out", "out"],
                          cwd=tmp_path / "here", capture_output=True, text=True,
                          env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["out"]
