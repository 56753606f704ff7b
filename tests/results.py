"""The README's table of results: runs what it names, keeps each run's metrics.json, and prints the table from them.

    python tests/results.py                          the table, from tests/results.json
    python tests/results.py --run                    first run what is missing there (about two hours on two cores)
    python tests/results.py --run --rows 01 03       only the commands whose folder begins with 01 or 03
    python tests/results.py --run --again --rows 04  run them again, and forget what was there

Nothing in the table is typed in. tests/results.json holds the metrics.json of every run without its history, as the
scripts wrote them; tests/test_chapters.py holds the README's table to it. Each command is run as it stands in the
table, with `--seed` and `--out` added, one after another, with nothing else running on the machine.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "results.json"

# command, seeds, what is shown: words with the figures to fill in, each a path into "metrics" and a format
FORECAST = "test MSE {test_mse:.4f}; NLinear {others.NLinear (336).mse:.3f}, one period ago " \
           "{others.one period ago.mse:.3f}"
SENTIMENT = "test accuracy {{test.{0}.accuracy:.2%}}; bag of words {{test.bag of words.accuracy:.2%}}"
TEXT = "{bits_per_character:.3f} bits per character; before {before_bits_per_character:.2f}"
COMMANDS = [
    ("01_basics/train.py --data mnist", 3, "test accuracy {test_accuracy:.2%}; linear {linear_accuracy:.2%}"),
    ("01_basics/train.py --data typeset", 3, "test accuracy {test_accuracy:.2%}; linear {linear_accuracy:.2%}"),
    ("02_cnn/train.py --data data/cifar10-jpg --model simple --tta", 3,
     "test accuracy {test_accuracy:.2%}, {test_accuracy_six_views:.2%} over six views; linear {linear_accuracy:.2%}"),
    ("02_cnn/train.py --data data/cifar10-jpg --model resnet --tta", 3,
     "test accuracy {test_accuracy:.2%}, {test_accuracy_six_views:.2%} over six views; linear {linear_accuracy:.2%}"),
    *((f"03_lstm/train.py --data etth1 --horizon {h}", 3, FORECAST) for h in (96, 192, 336, 720)),
    ("04_tabular/train.py --data adult", 5, "test accuracy {test_accuracy:.4f}, AUC {test_auc:.4f}; logistic "
                                            "regression {linear_model.accuracy:.4f}, "
                                            "{linear_model.auc:.4f}"),
    ("05_transformer/train.py --data tinyshakespeare", 3, "validation loss {val_loss:.3f} nats; bigram "
                                                          "{bigram_val_loss:.3f}"),
    *((f"06_finetune/train.py --model stand-in --data tinyshakespeare --method {m}", 3, TEXT)
      for m in ("lora", "full", "head")),
    *((f"06_finetune/bert_classify.py --model minilm --data sst2 --method {m}", 3, SENTIMENT.format(m))
      for m in ("full", "lora", "head")),
    ("06_finetune/bert_qa.py --model minilm --data templates", 3,
     "in %: exact match {test.full.em:.1f}, F1 {test.full.f1:.1f}; word overlap {test.word overlap.em:.1f}, "
     "{test.word overlap.f1:.1f}"),
]


def lookup(metrics: dict, path: str) -> float:
    """The figure at a path of names with dots between; names may hold blanks and brackets, but no dots."""
    for name in path.split("."):
        metrics = metrics[name]
    return metrics


def spread(values: list[float], form: str) -> str:
    """Mean ± standard deviation (of a sample) in a format, or the one value where all are the same."""
    percent = form.endswith("%")
    values = [100 * v if percent else v for v in values]
    digits = "." + form.strip(".%f") + "f"
    mean, deviation = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean:{digits}}" + (f" ± {deviation:{digits}}" if deviation else "") + " %" * percent


def fill(words: str, runs: list[dict]) -> str:
    out = ""
    for part in words.split("{"):
        path, colon, rest = part.partition(":")
        form, _, text = rest.partition("}")
        out += spread([lookup(run["metrics"], path) for run in runs], form) + text if "}" in rest else part
    return out


def table(results: dict) -> str:
    """The README's rows: real data first, then what is a stand-in's."""
    rows = {False: [], True: []}
    for command, _, words in COMMANDS:
        runs = [results[key] for key in sorted(results) if key.rpartition(" --seed ")[0] == command]
        if not runs:
            continue
        seeds = ", ".join(str(run["seed"]) for run in runs)
        seconds = statistics.median(run["seconds"] for run in runs)
        rows[runs[0]["stand_in"]].append(
            f"| `python {command}` | {fill(words, runs)} | {seeds} | {seconds:.0f} s |")
    head = "| command | figure; beside it a baseline | seeds | training time, median |\n|---|---|---|---|\n"
    return "\n\n".join(head.replace("command", name, 1) + "\n".join(rows[key])
                       for key, name in ((False, "real data: command"), (True, "a stand-in: command")) if rows[key])


def cpu() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else f"{platform.processor()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description="The README's table of results, from the scripts' own metrics.json.")
    parser.add_argument("--run", action="store_true", help="run what is missing in tests/results.json")
    parser.add_argument("--again", action="store_true", help="with --run: also what is there already")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep what the runs write, a folder for each")
    parser.add_argument("--rows", nargs="+", default=[""], metavar="WORD", help="only commands that begin with a WORD")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    chosen = [(command, seed) for command, seeds, _ in COMMANDS for seed in range(seeds)
              if any(command.startswith(word) for word in args.rows)]
    for command, seed in chosen if args.run else []:
        key = f"{command} --seed {seed}"
        if key in results and not args.again:
            continue
        print("+ python", key, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            out = args.keep.resolve() / "".join(c if c.isalnum() else "_" for c in key) if args.keep else Path(folder)
            command = [sys.executable, *key.split(), "--out", str(out)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
            if done.returncode:
                sys.exit(f"error: that run ended with status {done.returncode}; what ran before it is kept.")
            results[key] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        del results[key]["history"]
        results[key]["cpu"] = cpu()
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
