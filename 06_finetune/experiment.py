"""Full fine-tuning against LoRA, rank by rank, and both against training from scratch, on one text.

You learn here: what each way of fine-tuning costs in parameters, memory and time, and what it reaches; which of LoRA's
numbers matter; what pre-training was worth; and what BLEU, a score for text against text, sees of all that.

    python 06_finetune/experiment.py                       all tables (GPT-2 if it can be had, else the stand-in)
    python 06_finetune/experiment.py --only scratch        some of: methods alpha targets scratch bleu

You should see (the stand-in on Tiny Shakespeare, two seeds, nats per token): full 3.74 ± 0.03, last block 4.18, LoRA
4.81 at rank 1 and 4.58 at rank 64, from scratch 3.81. All tables stand in this chapter's README.md.
Each run is train.py itself, started anew, since memory is counted by the process. Writes to outputs/: experiment.json
and .png, with --only experiment_PART.json and, but for bleu, .png. Left out: a search for each row's best learning
rate; what BLEU lacks, synonyms above all, and later scores have."""
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from gpt2 import GPT2, read_model, save_model
from load import MODELS, TEXTS, Base, Data, find_base, load_data, load_result
from train import LR, sample

SCRIPT = "06_finetune/experiment.py"
TRAIN = Path(__file__).parent / "train.py"
RANKS, ALPHAS = (1, 2, 4, 8, 16, 64), (4, 8, 16, 32, 64)
TARGETS = (["c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"], ["c_attn", "attn.c_proj"],
           ["c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])


def rows_of(part: str, n_embd: int) -> dict[str, list[str]]:
    """Name -> train.py's options, for each row of a table; ranks that the base is too small for are left out.

    No options are train.py's defaults, LoRA of rank 8 with alpha 16 for c_attn, which stand in every table.
    """
    full = ["--method", "full"]
    if part == "methods":
        ranks = {f"LoRA, rank {r}": [] if r == 8 else ["--lora-rank", str(r)] for r in RANKS if r <= n_embd}
        return {"full": full, "last block alone": ["--method", "head"]} | ranks
    if part == "alpha":
        return {f"rank 8, alpha {a}": [] if a == 16 else ["--lora-alpha", str(a)] for a in ALPHAS}
    if part == "targets":
        return {" + ".join(names): [] if names == ["c_attn"] else ["--lora-targets", *names] for names in TARGETS}
    return {"fine-tuned, full": full, "fine-tuned, LoRA": [],
            "from scratch": [*full, "--lr", "2e-3", "--model", "SCRATCH"]}


def from_scratch(base: Base, folder: Path, seed: int) -> None:
    """Write a network of the base's shape that has learned nothing, in GPT-2's files.

    ## So that the peer is fair, it has all that the base has but its training: the shape, the vocabulary, the same
    ## text, the same number of steps, and train.py itself with the learning rate that pre-trains the stand-in.
    """
    torch.manual_seed(seed)
    base.tokenizer.save(folder)
    save_model(GPT2(base.config), folder, base.tokenizer.end)


def train(options: list, out: Path) -> dict:
    """Run train.py and return its metrics.json. Raises utils.InputError with its last words where it failed."""
    done = subprocess.run([sys.executable, *map(str, [TRAIN, *options, "--out", out])], capture_output=True,
                          encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no message"]
        raise utils.InputError(f"train.py {' '.join(map(str, options))} failed: {words[-1].removeprefix('error: ')}")
    return json.loads((out / "metrics.json").read_text())


# ---------------------------------------------------------------------------------------------- BLEU
def n_grams(words: list[str], n: int) -> Counter:
    """How often each run of n words occurs."""
    return Counter(zip(*(words[i:] for i in range(n))))


def bleu(candidates: list[list[str]], references: list[list[list[str]]], n: int = 4) -> dict:
    """BLEU of texts as lists of words, each with one or more references, over all together (Papineni et al. 2002).

    Returns bleu, precisions p_1 to p_n, and brevity penalty, all from 0 to 1.

    ##     p_n = (n-grams of the candidates that a reference has) / (n-grams of the candidates)
    ## where an n-gram counts at most as often as it stands in one reference (clipping): else "the the the" is perfect.
    ## Precision alone would praise a candidate of one safe word. Recall is not defined where references differ, and so
    ## a candidate text of c words is punished for being shorter than r, the references' length closest to it:
    ##     BP = 1 if c > r, else e^(1 - r/c)        BLEU = BP * (p_1 p_2 .. p_n)^(1/n)        (section 2.3)
    ## Sums are taken over the whole collection before dividing: in a single sentence p_4 is often zero, and
    ## with it the score.
    """
    right, all_of, c, r = [0] * n, [0] * n, 0, 0
    for candidate, truths in zip(candidates, references, strict=True):
        c += len(candidate)
        r += min((abs(len(truth) - len(candidate)), len(truth)) for truth in truths)[1]  # of equals the shorter one
        for i in range(n):
            counts, most = n_grams(candidate, i + 1), Counter()
            for truth in truths:
                most |= n_grams(truth, i + 1)  # the larger count of each
            right[i] += (counts & most).total()  # the smaller count of each
            all_of[i] += counts.total()
    p = [a / b if b else 0.0 for a, b in zip(right, all_of)]
    penalty = 1.0 if c > r else math.exp(1 - r / c) if c else 0.0
    return {"bleu": penalty * math.exp(sum(map(math.log, p)) / n) if all(p) else 0.0, "precisions": p,
            "brevity_penalty": penalty}


def to_words(text: str) -> list[str]:
    """Words and signs in lower case: BLEU compares words, and has no opinion on how a text is cut into them."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def passages_of(text: Data, base: Base, n: int, prompt: int, length: int) -> list[tuple[str, str]]:
    """(prompt, true continuation) from n places of the validation text, evenly spread, as `prompt` and `length` tokens.

    Raises utils.InputError where the text is too short for one.
    """
    n = min(n, len(text.val) // (prompt + length))
    if n < 2:
        raise utils.InputError(f"{text.name} has {len(text.val):,} tokens to validate on, too few for two passages of "
                               f"{prompt + length}; use a longer text.")
    starts = [i * (len(text.val) - prompt - length) // (n - 1) for i in range(n)]
    decode = lambda a, b: base.tokenizer.decode(text.val[a:b].tolist())  # noqa: E731
    return [(decode(i, i + prompt), decode(i + prompt, i + prompt + length)) for i in starts]


def compare_texts(base: Base, text: Data, device: torch.device, dtype: torch.dtype, seeds: int, n: int, common: list,
                  out: Path) -> list[dict]:
    """Let the model continue n held-out passages, before and after fine-tuning, and print the BLEU of each.

    ## Four rows need no model. Shuffled, the right words have a p_1 of 1 and little beyond: order is what the longer
    ## n-grams are for. What another passage goes on with, or a copy of the prompt, has the vocabulary and nothing else:
    ## a score below these says nothing.
    """
    prompt, length = min(64, base.config["n_positions"] // 2), 32
    passages = passages_of(text, base, n, prompt, length)
    truths = [to_words(truth) for _, truth in passages]
    shuffled = [random.Random(i).sample(truth, len(truth)) for i, truth in enumerate(truths)]
    copied = [to_words(base.tokenizer.decode(base.tokenizer.encode(start, special=False)[-length:]))
              for start, _ in passages]
    found = {"the true continuation": [truths], "its words, shuffled": [shuffled],
             "another passage's continuation": [truths[1:] + truths[:1]], "the prompt's end, again": [copied]}

    def write(model: GPT2, seed: int) -> list[list[str]]:
        model.requires_grad_(False).to(device)
        texts = [sample(model, base, length, dtype, seed * 10_000 + i, start) for i, (start, _) in enumerate(passages)]
        return [to_words(text[len(start) :]) for text, (start, _) in zip(texts, passages)]

    for seed in range(seeds):
        found.setdefault("before fine-tuning", []).append(write(read_model(base.path, base.config), seed))
        for name, method in (("LoRA, rank 8", "lora"), ("last block alone", "head"), ("full", "full")):
            train([*common, "--method", method, "--seed", seed], out)
            found.setdefault(name, []).append(write(load_result(base, out, method), seed))
    print(f"bleu: {len(passages)} held-out passages, {prompt} tokens to read and {length} to write; one reference each")
    print(f"{'':34}{'BLEU':>6}{'':10}{'p_1':>6}{'p_2':>7}{'p_3':>7}{'p_4':>7}   brevity penalty")
    rows = []
    for name, runs in found.items():
        scores = [bleu(texts, [[truth] for truth in truths]) for texts in runs]
        row = {"name": name, "bleu": [100 * score["bleu"] for score in scores],
               **mean_and_std([100 * score["bleu"] for score in scores]),
               "precisions": np.mean([score["precisions"] for score in scores], 0).tolist(),
               "brevity_penalty": float(np.mean([score["brevity_penalty"] for score in scores]))}
        rows.append(row)
        spread = f" ± {row['std']:.2f}" if len(scores) > 1 else ""
        print(f"  {name:32}{row['mean']:6.2f}{spread:8}" + "".join(f"{p:7.1%}" for p in row["precisions"])
              + f"{row['brevity_penalty']:11.3f}")
    return rows


# ---------------------------------------------------------------------------------------------- tables
def mean_and_std(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation of a sample; 0 for one value."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


def summary(name: str, options: list[str], runs: list[dict]) -> dict:
    """Print and return a table's row, from train.py's metrics.json for each seed."""
    losses, bits, memory = ([run["metrics"][key] for run in runs]
                            for key in ("val_loss", "bits_per_character", "peak_memory_bytes"))
    row = {"name": name, "options": options, "losses": losses, **mean_and_std(losses),
           "bits_per_character": float(np.mean(bits)), "peak_memory_bytes": max(memory),
           "trained_parameters": runs[0]["metrics"]["trained_parameters"],
           "seconds": float(np.median([run["seconds"] for run in runs]))}
    spread = f" ± {row['std']:.4f}" if len(losses) > 1 else ""
    print(f"  {name:46}{row['trained_parameters']:12,}  {row['mean']:.4f}{spread:10}  {row['bits_per_character']:9.4f}"
          f"  {row['peak_memory_bytes'] / 1e9:5.2f} GB{row['seconds']:9.1f}", flush=True)
    return row


def draw_tables(tables: dict, label: str, path: Path) -> None:
    """One panel per table: validation loss of each row, mean and spread."""
    heights = [len(rows) for rows in tables.values()]
    figure, axes = utils.pyplot().subplots(len(tables), 1, squeeze=False, height_ratios=heights,
                                           figsize=(8, 0.36 * sum(heights) + 1.1 * len(tables)))
    for a, (part, rows) in zip(axes[:, 0], tables.items()):
        a.errorbar([row["mean"] for row in rows], range(len(rows)), xerr=[row["std"] for row in rows], fmt="o")
        a.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
        a.invert_yaxis()
        a.set_title(f"{part} ({label})", fontsize=10)
    axes[-1, 0].set_xlabel("validation loss, nats per token")
    figure.tight_layout()
    utils.write_atomically(path, figure.savefig)


PARTS = ["methods", "alpha", "targets", "scratch", "bleu"]


def main() -> None:
    parser = utils.parser(__doc__, __file__, "device", "dtype")
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="which tables to make")
    add("--model", help=MODELS)
    add("--data", help=TEXTS)
    add("--seeds", type=utils.count, default=3, help="runs per row, with seeds 0, 1, 2, ...")
    add("--steps", type=utils.count, default=300, help="updates in each run")
    add("--batch-size", type=utils.count, default=4, help="windows per step")
    add("--block-size", type=utils.count, help="tokens in a window; without it 256, or the model's n_positions if less")
    add("--passages", type=utils.number(int, "[2, inf)"), default=100, help="held-out passages to continue (bleu)")
    args = utils.parse_args(parser)
    base = find_base(args.model)  # made or downloaded here, once
    args.block_size = args.block_size or min(256, base.config["n_positions"])
    text = load_data(args.data, base.tokenizer, 1)
    label = f"{base.label}, on {text.label}"
    print(f"{label}; {args.steps} steps; mean ± std of {args.seeds} seeds\n")
    common = ["--model", base.name, *(["--data", args.data] if args.data else []), *(
        f"--steps {args.steps} --eval-every {max(1, args.steps // 3)} --patience 100 --batch-size {args.batch_size} "
        f"--micro-batch-size {args.batch_size} --block-size {args.block_size} --device {args.device} "
        f"--dtype {str(args.dtype)[6:]}").split()]
    tables, done = {}, {}  # part -> rows; options -> what came of them: some rows stand in two tables
    stem = "experiment" if args.only == PARTS else "experiment_" + "_".join(args.only)

    def record(part: str, *rows: dict) -> None:
        """Put rows into a table, and all tables so far into the file: the next row may take an hour."""
        tables.setdefault(part, []).extend(rows)
        words = json.dumps({"script": SCRIPT, "model": base.name, "data": text.name, "tables": tables, "lr": LR,
                            "stand_in": bool(base.stand_in or text.stand_in), "steps": args.steps,
                            "torch": str(torch.__version__)}, indent=1)
        utils.write_atomically(args.out / f"{stem}.json", lambda file: file.write(words.encode()))

    if args.only != ["bleu"]:
        print(f"{'':48}{'trained':>12}  {'loss':^17}  {'bits per':>9}  {'memory':>8}{'seconds':>9}\n"
              f"{'':48}{'parameters':>12}  {'nats per token':^17}  {'character':>9}  {'at most':>8}{'per run':>9}")
    with tempfile.TemporaryDirectory() as folder:
        scratch, out = Path(folder) / "scratch", Path(folder) / "out"
        for part in args.only:
            if part == "bleu":
                record(part, *compare_texts(base, text, args.device, args.dtype, args.seeds, args.passages, common,
                                            out))
                continue
            print(part)
            for name, options in rows_of(part, base.config["n_embd"]).items():
                runs = done.setdefault(tuple(options), [])
                for seed in range(len(runs), args.seeds):
                    if "SCRATCH" in options:
                        from_scratch(base, scratch, seed)
                    own = [str(scratch) if word == "SCRATCH" else word for word in options]
                    runs.append(train([*common, *own, "--seed", seed], out))
                record(part, summary(name, options, runs))
    if losses := {part: rows for part, rows in tables.items() if part != "bleu"}:
        draw_tables(losses, label, args.out / f"{stem}.png")
    print(f"\nwrote {stem}.json and a picture of what is in it to {args.out}")
    base.notice()
    utils.stand_in_notice(text.name, text.stand_in)


if __name__ == "__main__":
    utils.run(main)
