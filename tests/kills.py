"""kill -9 at random moments, then --resume: does a training script end where one that was never stopped ends?

    python tests/kills.py                              50 kills over all training scripts with --resume
    python tests/kills.py --kills 8 --chapter 05_transformer

Each script runs once undisturbed, on its stand-in, with small options. Then it runs again, and is killed at a random
moment within the time that the first run took; resumed, killed, resumed, until it ends. Its weights then have to equal
those of the first run bit for bit, and so does the history in metrics.json, except for the seconds. A kill may come
before the first checkpoint: then --resume has to say so in one sentence, and the run starts anew. Exit status 1 if
anything differs. tests/test_robustness.py makes a few kills of its own and uses the runs below.

The processes are forked from one that has imported the packages, which takes longer than such a run. A process that
is still importing writes nothing.
"""

import argparse
import ctypes
import hashlib
import json
import math
import multiprocessing
import os
import random
import runpy
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # utils.py is not imported: a child may have to take another copy of it

# Script -> small options. {data} is what make_stand_ins makes. Dropout and several saves, so that there is something
# to get wrong; float32, for the time that decides "auto" differs from run to run.
TRAINING = {
    "01_basics/train.py": "--data typeset --hidden 16 --epochs 4",
    "02_cnn/train.py": "--data {data}/pictures --model simple --batch-size 20 --epochs 4 --dtype float32",
    "03_lstm/train.py": "--data {data}/series.csv --horizon 6 --lookback 24 --segment 12 --hidden 16 --batch-size 64 "
                        "--lr 0.01 --dropout 0.1 --epochs 6 --dtype float32",
    "04_tabular/train.py": "--data census --members 5 --hidden 16 --n-embd 4 --lr 0.01 --epochs 5 --batch-size 512",
    "05_transformer/train.py": "--data {data}/text.txt --n-layer 2 --n-embd 32 --n-head 2 --block-size 32 "
                               "--batch-size 4 --dropout 0.1 --steps 80 --eval-every 20 --dtype float32",
    "06_finetune/train.py": "--model {data}/gpt2-stand-in --data {data}/text.txt --block-size 32 --batch-size 8 "
                            "--dropout 0.1 --steps 60 --eval-every 10 --lr 0.03 --dtype float32",
    "06_finetune/bert_classify.py": "--model {data}/bert-stand-in --data {data}/reviews --epochs 5 --patience 5 "
                                    "--method full --dtype float32",
    "06_finetune/bert_qa.py": "--model {data}/bert-stand-in --data {data}/squad.json --epochs 5 --patience 5 "
                              "--method lora --max-length 64 --stride 16 --max-answer 4 --dtype float32",
}
RESUMABLE = [name for name in TRAINING if name[:2] in ("02", "05", "06")]  # the others' default runs take seconds
CHAPTERS = sorted({script.split("/")[0] for script in RESUMABLE})
PHASES = ("before the first", "between saves", "in a save", "in the report")


# ---------------------------------------------------------------------------------------------- processes
def _powerless() -> None:
    """Let permission bits bind this process even if it is root's: give up all of root's privileges (Linux)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3; this process
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def _child(function, arguments: list, folder: str, environment: dict, log: str, max_bytes: int, powerless: bool):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    os.chdir(folder)
    ours = [path for path in sys.path if path == "" or Path(path) in (ROOT, ROOT / "tests")]
    sys.path[:] = [path for path in sys.path if path not in ours]
    if max_bytes:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))  # Python ignores the signal: write fails
    if powerless:
        _powerless()
    function(*arguments)


def _script(path: str, options: list[str]) -> None:
    sys.path.insert(0, str(Path(path).parent))
    sys.argv = [path, *options]
    runpy.run_path(path, run_name="__main__")


class Run:
    """A process of its own, forked where torch is imported already; its output goes to files beside `log`.

    environment: what is added to it; max_bytes: no file can grow longer, as on a disk that is full there; powerless:
    permission bits bind it although this be root. The network is out of reach.
    """

    context = None

    def __init__(self, log: Path, function, *arguments, folder: Path | None = None, environment: dict | None = None,
                 max_bytes: int = 0, powerless: bool = False):
        if not Run.context:
            Run.context = multiprocessing.get_context("forkserver")
            Run.context.set_forkserver_preload(["torch", "torchvision", "matplotlib.pyplot", "requests", "numpy"])
        nowhere = "http://127.0.0.1:9"
        environment = {"http_proxy": nowhere, "https_proxy": nowhere, "no_proxy": ""} | (environment or {})
        self.log = Path(log)
        self.process = Run.context.Process(target=_child, args=(
            function, arguments, str(folder or self.log.parent), environment, str(log), max_bytes, powerless))
        self.process.start()

    def wait(self, seconds: float | None = 300) -> bool:
        """Has it ended, after `seconds` at most?"""
        self.process.join(seconds)
        return self.process.exitcode is not None

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def end(self, code: int = 0) -> str:
        """Wait, check the exit status, and that any other than 0 comes with one sentence; return all that it said."""
        if not self.wait():
            self.kill()
            raise AssertionError(f"{self.log} was not done after five minutes")
        out, error = (Path(f"{self.log}.{name}").read_text(encoding="utf-8") for name in ("out", "err"))
        said = f"exit status {self.process.exitcode}\n{out}\n{error}"
        assert self.process.exitcode == code, said
        if code:
            assert error.startswith("error: ") and len(error.strip().splitlines()) == 1, said
        return out + error


def script(log: Path, path: Path | str, *options, **kwargs) -> Run:
    """Start a script (by its path, from the repository's root if it is relative) as a Run."""
    return Run(log, _script, str(ROOT / path), [str(option) for option in options], **kwargs)


# ---------------------------------------------------------------------------------------------- stand-ins, quickly
def _make_stand_ins(folder: str) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "06_finetune")]
    import bert
    import bpe
    import gpt2
    import numpy as np
    import torch
    import wordpiece
    from PIL import Image
    folder, numbers = Path(folder), np.random.default_rng(0)

    for i in range(160):  # pictures: a little red or a little blue
        path = folder / "pictures" / ("train" if i < 120 else "test") / ("red", "blue")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 200, (32, 32, 3))
        pixels[..., 2 * (i % 2)] += 50
        Image.fromarray(pixels.astype(np.uint8)).save(path)

    hours = np.arange("2020-01-01T00", "2020-03-01T00", dtype="datetime64[h]")
    day = np.sin(np.arange(len(hours)) * 2 * np.pi / 24)
    rows = (f"{str(hour).replace('T', ' ')}:00:00,{a:.3f},{b:.3f}" for hour, a, b in zip(
        hours, day + 0.3 * numbers.normal(size=len(hours)), 2 * day + 0.5 * numbers.normal(size=len(hours))))
    (folder / "series.csv").write_text("\n".join(["date,load,heat", *rows]) + "\n")

    manual = bpe.read_text("pydocs")
    (folder / "text.txt").write_text(manual[40_000:60_000], encoding="utf-8")
    torch.manual_seed(0)
    tokenizer = bpe.Tokenizer(*bpe.train_bpe(manual[:20_000], 300))
    size = {"n_layer": 2, "n_head": 2, "n_embd": 32, "stand_in": 1}
    model = gpt2.GPT2(size | {"vocab_size": len(tokenizer.vocab), "n_positions": 256})
    tokenizer.save(folder / "gpt2-stand-in")
    gpt2.save_model(model, folder / "gpt2-stand-in", tokenizer.vocab[bpe.END])

    words = wordpiece.WordPiece(wordpiece.train_wordpiece(manual[:20_000], 300))
    model = bert.Bert(size | {"model_type": "bert", "vocab_size": len(words.names), "n_positions": 256})
    words.save(folder / "bert-stand-in")
    bert.save_model(model, folder / "bert-stand-in")

    (folder / "reviews").mkdir()
    for name, n in (("train", 200), ("dev", 50), ("test", 50)):
        rows = [f"a {('weak', 'fine')[i % 2]} film with {numbers.integers(1000)} songs\t{i % 2}" for i in range(n)]
        (folder / "reviews" / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    articles = [{"title": "", "paragraphs": [{"context": f"the {color} film ran {i} weeks in town", "qas": [
        {"id": f"{i}", "question": "what film", "answers": [{"text": color, "answer_start": 4}]}]}]}
        for i, color in enumerate(["red", "green", "blue", "brown"] * 40)]
    (folder / "squad.json").write_text(json.dumps({"version": "1.1", "data": articles}))


def make_stand_ins(folder: Path) -> Path:
    """Make, as data/ in folder, what TRAINING's options name, and untrained models in the place of 06's stand-ins."""
    (folder / "data").mkdir(parents=True)
    Run(folder / "stand_ins", _make_stand_ins, str(folder / "data")).end()
    return folder / "data"


# ---------------------------------------------------------------------------------------------- runs
def options_of(name: str, data: Path) -> list[str]:
    """TRAINING's options of a script, with the paths filled in."""
    return [word.format(data=data) for word in TRAINING[name].split()] + ["--device", "cpu"]


def result(folder: Path) -> tuple:
    """(weights as (name, digest), history and figures of metrics.json without times): equal means the same run."""
    import torch
    weights = {}
    if (folder / "model.pt").exists():
        for name, tensor in torch.load(folder / "model.pt", weights_only=True)["model"].items():
            weights[name] = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
    for path in sorted([*folder.glob("adapter/*"), *folder.glob("model/*")]):
        if path.suffix == ".tmp":
            continue  # what a killed save has left; it is cleared away after an hour
        weights[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    history = [{name: value for name, value in row.items() if name != "seconds"} for row in found["history"]]
    figures = {name: value for name, value in found["metrics"].items() if name != "peak_memory_bytes"}
    assert weights and history
    return weights, history, figures


def unfinished(folder: Path) -> set:
    """What saves that were cut short have left in folder."""
    return {(path, path.stat().st_mtime_ns) for path in folder.rglob("*.tmp")}


def kill_and_resume(name: str, data: Path, whole: Path, seconds: float, folder: Path, kills: int,
                    chance: random.Random) -> tuple[Counter, int]:
    """Kill runs of a script `kills` times in all; (in which phases, how many ended). AssertionError where one ends
    otherwise than `whole`, the run that took `seconds` undisturbed."""
    import torch
    expected, phases, ended = result(whole), Counter(), 0
    while phases.total() < kills or not ended:
        out = folder / f"run{ended}"
        out.mkdir(parents=True)
        for attempt in range(10**6):
            options, log = [*options_of(name, data), "--out", out], folder / f"run{ended}_{attempt}"
            if (out / "checkpoint.pt").exists():
                options.append("--resume")
            elif attempt:
                said = script(log, name, *options, "--resume").end(1)
                assert "checkpoint.pt does not exist; make it with: python" in said, said
            left = unfinished(out)
            run = script(log, name, *options)
            if phases.total() == kills or run.wait(chance.uniform(0, seconds)):
                run.end()
                break
            run.kill()
            if unfinished(out) - left:
                phases["in a save"] += 1
            elif not (out / "checkpoint.pt").exists():
                phases["before the first"] += 1
            else:
                rows = len(torch.load(out / "checkpoint.pt", weights_only=True)["history"])
                phases["in the report" if rows == len(expected[1]) else "between saves"] += 1
        found = result(out)
        for what, a, b in zip(("weights", "history", "figures"), expected, found):
            named = "" if what == "history" else ", ".join(key for key in {**a, **b} if a.get(key) != b.get(key))
            assert a == b, f"{name}, killed and resumed, ends with other {what} ({named}); its last log is {log}"
        ended += 1
    return phases, ended


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all, shared evenly by the scripts")
    parser.add_argument("--chapter", nargs="+", choices=CHAPTERS, default=CHAPTERS, help="whose scripts are killed")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments, as shares of a run's time")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    names = [name for name in RESUMABLE if name.split("/")[0] in args.chapter]
    print(f"{'':30}" + "".join(f"{word:>18}" for word in ("kills", *PHASES, "runs that ended")))
    failed, total = False, Counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = make_stand_ins(folder)
        for i, name in enumerate(names):
            kills = math.ceil((args.kills - i) / len(names))
            place = folder / name.replace("/", "_")
            place.mkdir()
            begun = time.perf_counter()
            script(place / "whole", name, *options_of(name, data), "--out", place / "whole").end()
            seconds = time.perf_counter() - begun
            try:
                phases, ended = kill_and_resume(name, data, place / "whole", seconds, place / "killed", kills,
                                                random.Random(f"{args.seed} {name}"))
            except AssertionError as error:
                failed = True
                print(f"{name:30}  FAILED: {error}", flush=True)
                continue
            total += phases
            counts = (kills, *(phases[phase] for phase in PHASES), ended)
            print(f"{name:30}" + "".join(f"{n:18}" for n in counts) + f"   identical, {seconds:.1f} s each", flush=True)
    print(f"{'':30}" + "".join(f"{n:18}" for n in (total.total(), *(total[phase] for phase in PHASES))))
    sys.exit(failed)


if __name__ == "__main__":
    main()
