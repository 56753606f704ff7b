"""What each choice for a table is worth: one change at a time, or two that belong together; five seeds.

You learn here: which choices matter for a table and which hardly do; that how a number enters the network can matter
more than the network; and how much is gained by members that are only averaged.

    python 04_tabular/experiment.py                              everything
    python 04_tabular/experiment.py --only dropout member        only rows with one of these words in their name

You should see (UCI Adult, five minutes on two CPU cores; all figures are of the validation rows, the test part is not
used): numbers fed in raw reach an AUC of 79 ± 3 %, standardised 91.49 ± 0.03 %, looked up as well 93.13 ± 0.02 %. What
leaves numbers as they come in moves it by 0.6 points at most. The whole table is in this folder's README.md.
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
from load import Data, Part, add_options, fit_quantiles, fit_standard, load_data, standardise, to_normal
from train import MemberLinear, TabularNet, evaluate, fit, fit_columns, member_logits, probabilities

# Shapes: N rows, B batch, F numeric columns, J bins of one, L columns that are looked up, V rows of the table of
#         embeddings, C width of an embedding, E members, I inputs of a layer

SCRIPT = "04_tabular/experiment.py"
BASE = {"categories": "embedded", "numbers": "piecewise", "exact": 256, "bins": 48, "n_embd": 8, "hidden": 128,
        "n_layer": 1, "dropout": 0.1, "members": 4, "epochs": 8, "batch_size": 512, "lr": 5e-3, "weight_decay": 0.3}
CHANGES = [  # each set alone, against BASE
    ("as it is, 4 members", {}),
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
    ("16 members", {"members": 16}),
]
NET = ("members", "n_embd", "hidden", "n_layer", "dropout")  # what TabularNet takes; fit takes the next four
LOOP = ("epochs", "batch_size", "lr", "weight_decay")
WAVES, SPREAD = 16, 0.5  # frequencies per column, and the standard deviation that they start with


# ---------------------------------------------------------------------------------------------- one model, all switches
class AnyNet(TabularNet):
    """train.py's networks, with ways in for categories and numbers as switches."""

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

    def encode(self, part: Part) -> tuple[Tensor, Tensor]:
        bins, index = super().encode(part)
        if self.recipe["numbers"] in self.ways_in:
            bins = self.ways_in[self.recipe["numbers"]](part.numeric)[:, :, None].to(index.device)  # (N, F, 1)
        return bins, index

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
def train_once(recipe: dict, data: Data, device: torch.device, seed: int) -> Tensor:
    """Train one recipe from the start, without early stopping: logits (E, N) of the validation rows after the end."""
    torch.manual_seed(seed)
    model = AnyNet(recipe, data).to(device)
    for _ in fit(model, data.train, data.val, *(recipe[name] for name in LOOP), seed):
        pass  # its figures after each epoch are not needed here
    return member_logits(model, model.encode(data.val)).cpu()


def deviation(values: Sequence[float]) -> float:
    """Their standard deviation; 0 of one value alone."""
    return np.std(values, ddof=1) if len(values) > 1 else 0.0


def draw(rows: list[dict], label: str):
    """A figure of 100 % less the AUC of each row, for all members and for one."""
    figure, axes = utils.pyplot().subplots(figsize=(8, 0.35 * len(rows) + 1.4))
    together, alone = (100 - 100 * np.array([row[key] for row in rows]) for key in ("auc", "one_member_auc"))
    names, spread = [row["name"] for row in rows], [deviation(values) for values in together]
    axes.errorbar(together.mean(1), names, xerr=spread, fmt="o", label="all members")  # together: (rows, seeds)
    axes.plot(alone.mean(1), names, "x", label="one member")
    axes.invert_yaxis()
    axes.set(title=f"One change at a time ({label})", xlabel="100 % less validation AUC (log scale): left is better",
             xscale="log")  # or one bad row would press all others together
    axes.legend()
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
                               f"{'; '.join(name for name, _ in CHANGES)}.")
    data = load_data(args.data, args.target, args.types)
    y = data.val.target
    print(f"{data.label}; {args.device.type}; validation rows, mean ± std of {args.seeds} seeds, {args.epochs} epochs\n"
          f"{'':38}AUC, %               log loss             accuracy, %      one member's AUC, %")
    rows, by_members = [], []
    for name, change in chosen:
        recipe = BASE | change | {"epochs": args.epochs}
        results = {"auc": [], "log_loss": [], "accuracy": [], "one_member_auc": []}
        for seed in range(args.seeds):
            logits = train_once(recipe, data, args.device, seed)
            figures = evaluate(probabilities(logits), y)
            figures["one_member_auc"] = np.mean([evaluate(z.double().sigmoid(), y)["auc"] for z in logits])
            for key, values in results.items():
                values.append(float(figures[key]))
            ## Members are independent. So the first e of 16 are what a run of e members would have given.
            if recipe["members"] == 16:
                by_members.append([evaluate(probabilities(logits[:e]), y)["auc"] for e in range(1, 17)])
        rows.append({"name": name, "recipe": recipe, **results})
        texts = [f"{scale * np.mean(v):9.{digits}f} ± {scale * deviation(v):.{digits}f}"
                 for scale, digits, v in zip((100, 1, 100, 100), (2, 4, 2, 2), results.values())]
        print(f"{name:36}" + "".join(f"{text:21}" for text in texts), flush=True)
        table = {"script": SCRIPT, "data": data.name, "stand_in": bool(data.stand_in), "device": args.device.type,
                 "torch": str(torch.__version__), "rows": rows, "auc_by_members": by_members}
        text = json.dumps(table, indent=1).encode()
        utils.write_atomically(args.out / "experiment.json", lambda file: file.write(text))
    if by_members:
        means = 100 * np.mean(by_members, axis=0)[[0, 1, 3, 7, 15]]
        print("AUC, %, of the first 1, 2, 4, 8, 16 of 16 members: " + ", ".join(f"{mean:.2f}" for mean in means))
    utils.write_atomically(args.out / "experiment.png", draw(rows, data.label).savefig)
    print(f"\nwrote experiment.json and experiment.png to {args.out}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
