"""What each choice for a table is worth: one change at a time, or two that belong together; five seeds.

You learn here: which choices matter for a table and which hardly do; that how a number enters the network can matter
more than the network; and how much is gained by members that are only averaged.

    python 04_tabular/experiment.py                              everything
    python 04_tabular/experiment.py --only dropout member        only rows with one of these words in their name

You should see (UCI Adult, one seed; each row judged by the members that did not learn from it, the test part not used):
an AUC of 93.1 % as it is, 93.0 % with one-hot columns, 91.7 % where no number is looked up; raw numbers, without the
linear model to begin at, 64 %. This folder's README.md holds an older table.
Writes to outputs/: experiment.json, experiment.png. Left out on purpose: tuning the learning rate of every row.
"""
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from load import FOLDS, Data, Part, add_options, fit_quantiles, fit_standard, load_data, standardise, to_normal
from train import MemberLinear, TabularNet, combine, evaluate, fit, fit_columns, held_out

# Shapes: N rows, B batch, F numeric columns, J bins of one, L columns that are looked up, V rows of the table of
#         embeddings, C width of an embedding, E members, I inputs of a layer

SCRIPT = "04_tabular/experiment.py"
BASE = {"categories": "embedded", "numbers": "piecewise", "exact": 256, "bins": 48, "n_embd": 8, "hidden": 128,
        "n_layer": 1, "dropout": 0.1, "members": 5, "epochs": 7, "batch_size": 512, "lr": 5e-3, "weight_decay": 0.3,
        "start": "linear model"}
CHANGES = [  # each set alone, against BASE
    ("as it is, 5 members", {}),
    ("not from the linear model", {"start": "nothing"}),
    ("not from the linear model, numbers raw", {"start": "nothing", "numbers": "raw", "exact": 0}),
    ("one-hot instead of embeddings", {"categories": "one-hot"}),
    ("embeddings of 2 numbers", {"n_embd": 2}),
    ("embeddings of 4 numbers", {"n_embd": 4}),
    ("embeddings of 16 numbers", {"n_embd": 16}),
    ("numbers raw", {"numbers": "raw", "exact": 0}),
    ("numbers standardised", {"numbers": "standardised", "exact": 0}),
    ("numbers quantile-transformed", {"numbers": "quantile", "exact": 0}),
    ("numbers periodic", {"numbers": "periodic", "exact": 0}),
    ("numbers piecewise linear", {"numbers": "piecewise", "exact": 0}),
    ("numbers standardised, and looked up", {"numbers": "standardised"}),
    ("dropout 0", {"dropout": 0.0}),
    ("dropout 0.2", {"dropout": 0.2}),
    ("dropout 0.3", {"dropout": 0.3}),
    ("dropout 0.5", {"dropout": 0.5}),
    ("width 32", {"hidden": 32}),
    ("width 512", {"hidden": 512}),
    ("width 256, dropout 0.5", {"hidden": 256, "dropout": 0.5}),
    ("no hidden layer", {"n_layer": 0}),
    ("2 hidden layers", {"n_layer": 2}),
    ("3 hidden layers", {"n_layer": 3}),
    ("2 hidden layers, dropout 0.3", {"n_layer": 2, "dropout": 0.3}),
    ("15 members", {"members": 15}),
]
NET = ("members", "n_embd", "hidden", "n_layer", "dropout")  # what TabularNet takes; fit takes the next four
LOOP = ("epochs", "batch_size", "lr", "weight_decay")
WAVES, SPREAD = 16, 0.5  # frequencies per column, and the standard deviation that they start with


# ---------------------------------------------------------------------------------------------- one model, all switches
class AnyNet(TabularNet):
    """train.py's networks, with ways in for categories and numbers as switches."""

    MEMBERS = TabularNet.MEMBERS | {"frequencies": 2}

    def __init__(self, recipe: dict, data: Data):
        config, numeric = fit_columns(data, recipe["bins"], recipe["exact"]), data.train.numeric
        if recipe["numbers"] != "piecewise":
            config["bins"] = [[0.0, 1.0]] * numeric.shape[1]  # one slope: y = slope * x + offset
        super().__init__(**config, **{name: recipe[name] for name in NET})
        self.recipe, (self.V, E, C), n_numeric = recipe, self.table.shape, numeric.shape[1]
        standard, quantiles = fit_standard(numeric), fit_quantiles(numeric)
        self.ways_in = {"raw": lambda x: x, "standardised": lambda x: standardise(x, standard),
                        "periodic": lambda x: standardise(x, standard), "quantile": lambda x: to_normal(x, quantiles)}
        if recipe["numbers"] == "periodic":
            self.frequencies = nn.Parameter(torch.randn(n_numeric, WAVES, E) * SPREAD)
            bound = (2 * WAVES) ** -0.5
            self.slopes = nn.Parameter(torch.empty(n_numeric, 2 * WAVES, E, C).uniform_(-bound, bound))
        if recipe["categories"] == "one-hot":
            del self.table
            layers = [*self.layers, self.head]
            layers[0] = MemberLinear(E, self.V + n_numeric * C, layers[0].weight.shape[2])
            self.layers, self.head = nn.ModuleList(layers[:-1]), layers[-1]

    def encode(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        bins, index, line = super().encode(part)
        if self.recipe["numbers"] in self.ways_in:
            bins = self.ways_in[self.recipe["numbers"]](part.numeric).float()[:, :, None].to(index.device)  # (N, F, 1)
        return bins, index, line * (self.recipe["start"] == "linear model")

    def embed(self, bins: Tensor, index: Tensor) -> Tensor:
        """(B, F, J) and (B, L) -> inputs of the first layer, (E, B, I)."""
        offsets = self.offsets.permute(2, 1, 0, 3)  # (E, 1, F, C)
        if self.recipe["numbers"] == "periodic":
            ## Gorishniy et al. 2022, equation 2: cos and sin of x at several frequencies, which are trained like any
            ## weight, then a linear layer and a ReLU for each column. High frequencies tell close numbers apart.
            angle = 2 * math.pi * bins[..., None] * self.frequencies  # (B, F, 16, E)
            waves = torch.cat([angle.cos(), angle.sin()], 2)  # (B, F, 32, E)
            curves = F.relu(torch.einsum("bfwe,fwec->ebfc", waves, self.slopes) + offsets)
        else:
            curves = torch.einsum("bfj,fjec->ebfc", bins, self.slopes) + offsets
        if self.recipe["categories"] == "one-hot":
            one_hot = torch.zeros(len(index), self.V, device=index.device).scatter_(1, index, 1.0)  # (B, V)
            looked_up = one_hot.expand(len(curves), -1, -1)
        else:
            looked_up = self.table[index].permute(2, 0, 1, 3).flatten(2)  # (B, L, E, C) -> (E, B, L C)
        return torch.cat([looked_up, curves.flatten(2)], 2)


# ---------------------------------------------------------------------------------------------- one run
def train_once(recipe: dict, data: Data, device: torch.device, seed: int) -> tuple[dict, float]:
    """Train one recipe from the start: figures of all members on the rows that they did not learn from, and the mean
    AUC of one fold. Each member keeps the epoch that was best on its fold."""
    torch.manual_seed(seed)
    model, rest, task = AnyNet(recipe, data).to(device), data.rest, data.schema["task"]
    model.solve(data, apart=True)
    for _ in fit(model, rest, data.fold, task, *(recipe[name] for name in LOOP), recipe["epochs"], seed):
        pass  # its figures after each epoch are not needed here
    z = held_out(model, rest, data.fold)
    each = [evaluate(combine(z[:, rows], task), rest.target[rows], task)["auc"]
            for rows in (data.fold == f for f in range(FOLDS))]
    return evaluate(combine(z, task), rest.target, task), float(np.mean(each))


def deviation(values: Sequence[float]) -> float:
    """Their standard deviation; 0 of one value alone."""
    return np.std(values, ddof=1) if len(values) > 1 else 0.0


def draw(rows: list[dict], label: str):
    """A figure of 100 % less the AUC of each row."""
    figure, axes = utils.pyplot().subplots(figsize=(8, 0.35 * len(rows) + 1.4))
    together = 100 - 100 * np.array([row["auc"] for row in rows])
    names, spread = [row["name"] for row in rows], [deviation(values) for values in together]
    axes.errorbar(together.mean(1), names, xerr=spread, fmt="o")  # together: (rows, seeds)
    axes.invert_yaxis()
    axes.set(title=f"One change at a time ({label})", xlabel="100 % less validation AUC (log scale): left is better",
             xscale="log")  # or one bad row would press all others together
    return figure


def main() -> None:
    parser = utils.parser(__doc__, __file__, "device")
    add_options(parser)
    add = parser.add_argument
    add("--seeds", type=utils.count, default=5, help="runs per row, with seeds 0, 1, 2, ...")
    add("--epochs", type=utils.count, default=BASE["epochs"], help="passes over the training rows in each run")
    add("--only", nargs="+", metavar="WORD", help="only rows with one of these words in their name; without it all")
    args = utils.parse_args(parser)
    chosen = [row for row in CHANGES if not args.only or any(word in row[0] for word in args.only)]
    if not chosen:
        raise utils.InputError(f"--only {' '.join(args.only)}: in no row's name: "
                               f"{'; '.join(name for name, _ in CHANGES)[:400]}.")
    data = load_data(args.data, args.target, args.types, args.task, args.positive)
    if data.schema["task"] == "numbers":
        raise utils.InputError(f"{data.schema['target']} is a number; this script compares classifiers.")
    print(f"{data.label}; {args.device.type}; validation, mean ± std of {args.seeds} seeds, {args.epochs} epochs\n"
          f"{'':40}AUC, %               log loss             accuracy, %      one fold's AUC, %")
    rows = []
    for name, change in chosen:
        recipe = BASE | change | {"epochs": args.epochs}
        results = {"auc": [], "log_loss": [], "accuracy": [], "one_fold_auc": []}
        for seed in range(args.seeds):
            figures, one = train_once(recipe, data, args.device, seed)
            for key, value in (figures | {"one_fold_auc": one}).items():
                if key in results:
                    results[key].append(value)
        rows.append({"name": name, "recipe": recipe, **results})
        texts = [f"{scale * np.mean(v):9.{digits}f} ± {scale * deviation(v):.{digits}f}"
                 for scale, digits, v in zip((100, 1, 100, 100), (2, 4, 2, 2), results.values())]
        print(f"{name:38}" + "".join(f"{text:21}" for text in texts), flush=True)
        table = {"script": SCRIPT, "data": data.name, "stand_in": bool(data.stand_in), "device": args.device.type,
                 "torch": str(torch.__version__), "rows": rows}
        text = json.dumps(table, indent=1).encode()
        utils.write_atomically(args.out / "experiment.json", lambda file: file.write(text))
    utils.write_atomically(args.out / "experiment.png", draw(rows, data.label).savefig)
    print(f"\nwrote experiment.json and experiment.png to {args.out}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
