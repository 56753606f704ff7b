"""Chapter 04 on tables of one's own: every file of a folder by default, beside its linear model and boosted trees.

    ../shared/cases/own-data/export /tmp/own; python tests/own_tables.py /tmp/own             all files, with peers
    python tests/own_tables.py /tmp/own --only iris taxi --no-peers                           some, the network alone

The folder holds tables.json, a list of {"name", "file", "target"}. Tables below 1,000 rows are shuffled four times. All
get the rows for testing that train.py sets aside, and all others to learn from. Score: AUC of two values, mean AUC of
each class against the rest, or R^2; loss: log loss or mean squared error, beside that of train.py's linear model.
catboost is not in tests/requirements.txt (`pip install catboost`); where it is missing, its column is empty.
tests/benchmark.py has the same peers on UCI Adult (`--rows boosting`) and these tables (`--rows tables --own FOLDER`).
"""
import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
sys.path.append(str(ROOT / "tests"))
from conftest import call_main, chapter

load, train = chapter("04_tabular", "load", "train")


def shuffled(path: Path, seed: int, folder: Path) -> Path:
    """The file with its rows in another order; seed 0 is the file itself."""
    if seed == 0:
        return path
    with open(path, "rb") as file:
        lines = file.read().splitlines(keepends=True)  # none of the handed files has line breaks in values
    random.Random(seed).shuffle(rows := [line.rstrip(b"\r\n") for line in lines[1:]])
    (folder / path.name).write_bytes(lines[0] + b"\n".join(rows) + b"\n")
    return folder / path.name


def ours(seed: int, out: Path, *options: str) -> tuple[dict, float]:
    """train.py by default: its metrics.json, and seconds of the whole run without the imports."""
    begun = time.perf_counter()
    call_main(train, *options, "--seed", seed, "--out", out)
    return json.loads((out / "metrics.json").read_text()), time.perf_counter() - begun


def peers(data: str, target: str | None, seed: int) -> dict[str, dict]:
    """Figures of boosted trees with default settings on the same rows: {peer: evaluate's and "seconds" of training}.

    Missing numbers are missing to them, too. They get the same parts of dates.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    with contextlib.redirect_stdout(io.StringIO()):
        data = load.load_data(data, target)
    schema, task = data.schema, data.schema["task"]
    names = schema["categorical"]
    words = [k for k, name in enumerate(names) if name.removesuffix(" given") not in schema["gaps"]]
    x = []
    for part in (data.rest, data.test):
        numbers = part.numeric.numpy().copy()
        for name in schema["gaps"]:
            numbers[part.categories[:, names.index(f"{name} given")] == load.NO_VALUE,
                    schema["numeric"].index(name)] = np.nan
        x.append((numbers, part.categories[:, words].numpy()))
    F, few = x[0][0].shape[1], [x[0][1][:, k].max() < 255 for k in range(len(words))]
    y = data.rest.target.numpy()
    kinds = {"HistGradientBoosting": (HistGradientBoostingClassifier, HistGradientBoostingRegressor)}
    with contextlib.suppress(ImportError):
        from catboost import CatBoostClassifier, CatBoostRegressor
        kinds["CatBoost"] = (CatBoostClassifier, CatBoostRegressor)
    scores = {}
    for name, kind in kinds.items():
        if name == "CatBoost":
            import pandas
            table = [pandas.concat([pandas.DataFrame(a), pandas.DataFrame(b, columns=[f"c{k}" for k in words])], axis=1)
                     .rename(columns=str) for a, b in x]
            peer = kind[task == "numbers"](random_seed=seed, verbose=0, allow_writing_files=False,
                                           cat_features=[f"c{k}" for k in words], thread_count=torch.get_num_threads())
        else:
            table = [np.concatenate(part, 1) for part in x]
            peer = kind[task == "numbers"](random_state=seed, categorical_features=[False] * F + few)
        begun = time.perf_counter()
        peer.fit(table[0], y)
        seconds = time.perf_counter() - begun
        if task == "numbers":
            p = torch.from_numpy(peer.predict(table[1]))
        else:
            p = torch.zeros(len(x[1][0]), len(schema["classes"]), dtype=torch.float64)
            p[:, torch.from_numpy(peer.classes_).long()] = torch.from_numpy(peer.predict_proba(table[1]))
            p = p[:, 1] if task == "binary" else p
        scores[name] = train.evaluate(p, data.test.target, task) | {"seconds": seconds}
    return scores


def compare(folder: Path, only: list[str] | None = None, with_peers: bool = True, write: Path | None = None) -> None:
    """Run the tables and print a row each, and their means; write: a JSON file for the rows."""
    rows, names = {}, ("network", "linear", "HistGradientBoosting", "CatBoost")
    print(f"{'table':14}{'rows':>7}" + "".join(f"{name[:12]:>13}" for name in names) + "   loss/linear  seconds")
    for table in json.loads((folder / "tables.json").read_text()):
        if only and table["name"] not in only:
            continue
        runs = []
        with tempfile.TemporaryDirectory() as scratch:
            with open(folder / table["file"], "rb") as file:
                n = sum(1 for _ in file) - 1
            for seed in range(4 if n < 1000 else 1):
                path = shuffled(folder / table["file"], seed, Path(scratch))
                written, seconds = ours(seed, Path(scratch), "--data", str(path), "--target", table["target"])
                m = written["metrics"]
                key, loss, power = ("r2", "rmse", 2) if "test_r2" in m else ("auc", "log_loss", 1)
                others = peers(str(path), table["target"], seed) if with_peers else {}
                runs.append({"network": m[f"test_{key}"], "linear": m["linear_model"][key], "seconds": seconds,
                             "loss": m[f"test_{loss}"] ** power, "linear_loss": m["linear_model"][loss] ** power}
                            | {name: figures[key] for name, figures in others.items()})
        row = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
        rows[table["name"]] = row | {"ratio": row["loss"] / row["linear_loss"]}
        print(f"{table['name']:14}{n:7,}" + "".join(f"{row.get(name, np.nan):13.4f}" for name in names)
              + f"{rows[table['name']]['ratio']:14.3f}{row['seconds']:9.1f}", flush=True)
        if write:
            write.write_text(json.dumps(rows, indent=1))
    ratios = [row["ratio"] for row in rows.values()]
    means = [np.mean([row.get(name, np.nan) for row in rows.values()]) for name in names]
    print(f"{'mean':21}" + "".join(f"{mean:13.4f}" for mean in means)
          + f"\n{len(rows)} tables; loss beside the linear model's: at most {max(ratios):.3f}, below 1 in "
          f"{np.mean([ratio < 0.9995 for ratio in ratios]):.0%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", help="names of tables")
    parser.add_argument("--no-peers", action="store_true", help="leave the peers out")
    parser.add_argument("--write", type=Path, help="a JSON file for the rows")
    args = parser.parse_args()
    compare(args.folder, args.only, not args.no_peers, args.write)
