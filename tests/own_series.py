"""Chapter 03 on series that nobody tuned on: each file of a folder, by train.py's defaults.

    python tests/own_series.py --data ../shared/own                 all files that FOLDER/series.json names
    python tests/own_series.py --data ../shared/own --only day month

series.json is a list of {"name", "file", "lookback", "horizon"}; the two numbers may be missing. The figure is the
model's test MSE over that of the best of its own baselines: repeat last, one period ago, and NLinear, which learns from
the rows that the model learns from. pytest does not collect this file, but runs `main` on series that it makes itself.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]
import utils
from conftest import call_main, chapter

train = chapter("03_lstm", "train")
NAIVE = "repeat last", "one period ago", "NLinear"


def measure(path: Path, entry: dict, out: Path, more: list[str]) -> dict:
    """Train on one file: {"ratio", "best", "seconds", "epoch"}, or {"error"} where train.py refused."""
    sizes = [word for name in ("lookback", "horizon") if name in entry for word in (f"--{name}", str(entry[name]))]
    begun = time.perf_counter()
    try:
        call_main(train, "--data", path, "--device", "cpu", "--out", out, *sizes, *more)
    except utils.InputError as error:
        return {"error": str(error), "seconds": time.perf_counter() - begun}
    seconds = time.perf_counter() - begun  # without the imports
    metrics = json.loads((out / "metrics.json").read_text())["metrics"]
    mse, best = min((figures["mse"], name) for name, figures in metrics["others"].items() if name.startswith(NAIVE))
    return {"ratio": metrics["test_mse"] / mse, "best": best, "seconds": seconds, "epoch": metrics["best_epoch"],
            "blend": metrics["others"]["the blend of lines"]["mse"] / mse}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with series.json")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only the files whose names hold one of these words")
    args, more = parser.parse_known_args()  # other options go to train.py
    entries = [entry for entry in json.loads((args.data / "series.json").read_text())
               if not args.only or any(word in entry["name"] for word in args.only)]
    print(f"{'MSE / that of the best baseline':24}{'blend':>10}{'model':>8}{'epoch':>7}{'seconds':>9}  best baseline")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for entry in entries:
            path = args.data / entry["file"]
            row = measure(path if path.exists() else args.data / Path(entry["file"]).name, entry, Path(folder), more)
            rows.append(row)
            figures = row.get("error") or (f"{row['blend']:10.3f}{row['ratio']:8.3f}{row['epoch']:7}"
                                           f"{row['seconds']:9.1f}  {row['best']}")
            print(f"{entry['name']:31}{figures}", flush=True)
    ratios = [row["ratio"] for row in rows if "ratio" in row]
    mean = math.exp(sum(map(math.log, ratios)) / max(1, len(ratios)))
    print(f"trained: {len(ratios)} of {len(rows)}; geometric mean {mean:.3f}, "
          f"worst {max(ratios, default=math.nan):.3f}, longest {max(row['seconds'] for row in rows):.0f} s")


if __name__ == "__main__":
    main()
