"""What each choice for a table is worth: one change at a time, or two that belong together; five seeds.

You learn here: which choices matter for a table and which hardly do; that how a number enters the network can matter
more than the network; and how much is gained by members that are only averaged.

    python 04_tabular/experiment.py                              everything
    python 04_tabular/experiment.py --rows dropout member        only rows whose names hold one of these words

Every figure is of the validation rows; the test part is not used here at all.

You should see (UCI Adult; seeds 0 to 4; torch 2.15; two cores of an AMD EPYC, half of the rows on each, five minutes),
mean ± standard deviation, log loss in nats, the others in %:
                                         AUC             log loss           accuracy        one member's AUC
    as it is, 4 members                  93.19 ± 0.01    0.2690 ± 0.0002    88.02 ± 0.08    93.16 ± 0.01
    one-hot instead of embeddings        93.12 ± 0.02    0.2714 ± 0.0004    87.78 ± 0.06    93.10 ± 0.02
    embeddings of 2 numbers              93.04 ± 0.03    0.2723 ± 0.0005    87.91 ± 0.07    92.96 ± 0.03
    embeddings of 4 numbers              93.13 ± 0.01    0.2701 ± 0.0002    87.98 ± 0.09    93.08 ± 0.01
    embeddings of 16 numbers             93.21 ± 0.02    0.2687 ± 0.0003    88.00 ± 0.11    93.19 ± 0.02
    numbers raw                          79.24 ± 2.95    0.4478 ± 0.0218    80.95 ± 0.86    76.71 ± 2.58
    numbers standardised                 91.49 ± 0.03    0.3058 ± 0.0004    86.38 ± 0.03    91.47 ± 0.03
    numbers quantile-transformed         91.22 ± 0.06    0.3106 ± 0.0012    86.09 ± 0.13    91.19 ± 0.07
    numbers periodic                     92.13 ± 0.02    0.2911 ± 0.0002    86.97 ± 0.04    92.09 ± 0.02
    numbers piecewise linear             91.74 ± 0.02    0.2992 ± 0.0003    86.61 ± 0.08    91.70 ± 0.02
    numbers standardised, and looked up  93.13 ± 0.02    0.2700 ± 0.0004    87.76 ± 0.09    93.10 ± 0.02
    dropout 0                            93.20 ± 0.01    0.2689 ± 0.0002    88.02 ± 0.06    93.17 ± 0.01
    dropout 0.2                          93.18 ± 0.01    0.2692 ± 0.0002    88.00 ± 0.10    93.15 ± 0.01
    dropout 0.3                          93.18 ± 0.01    0.2693 ± 0.0002    87.95 ± 0.08    93.15 ± 0.01
    dropout 0.5                          93.16 ± 0.01    0.2696 ± 0.0003    88.02 ± 0.12    93.13 ± 0.01
    width 32                             93.11 ± 0.01    0.2706 ± 0.0003    87.90 ± 0.07    93.09 ± 0.01
    width 512                            93.22 ± 0.02    0.2688 ± 0.0004    87.93 ± 0.10    93.16 ± 0.02
    width 256, dropout 0.5               93.20 ± 0.01    0.2690 ± 0.0002    88.02 ± 0.09    93.16 ± 0.01
    no hidden layer                      92.62 ± 0.05    0.2819 ± 0.0012    87.62 ± 0.08    92.61 ± 0.06
    2 hidden layers                      93.17 ± 0.01    0.2699 ± 0.0003    87.82 ± 0.06    93.09 ± 0.02
    3 hidden layers                      93.18 ± 0.02    0.2700 ± 0.0005    87.79 ± 0.08    93.06 ± 0.03
    2 hidden layers, dropout 0.3         93.19 ± 0.02    0.2695 ± 0.0004    87.89 ± 0.04    93.12 ± 0.02
    16 members                           93.19 ± 0.01    0.2690 ± 0.0002    88.01 ± 0.06    93.15 ± 0.01
In the rows `numbers ...` nothing is looked up, unless they say so. How numbers come in decides. Raw, the largest
(weights of up to 1.5 million) drown the rest; once they are scaled, looking them up is worth more than any other choice
here. Sixteen members, train.py's number, are no better than four.
Writes to outputs/: experiment.json, experiment.png. Left out on purpose: tuning the learning rate of every row.
"""

import json
import math
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils  # noqa: E402
from load import Data, Part, fit_quantiles, fit_standard, load_data, standardise, to_normal  # noqa: E402
from train import MemberLinear, TabularNet, batches, fit_columns, measures, member_logits, probabilities  # noqa: E402

# Shapes: N rows, B batch, F numeric columns, J bins of one, P frequencies, K columns looked up, V values of all of them
#         together, D width of an embedding, E members

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
P, SPREAD = 16, 0.5  # frequencies per column, and the standard deviation that they start with


# ---------------------------------------------------------------------------------------------- one model, all switches
class AnyNet(TabularNet):
    """train.py's networks, with ways in for categories and numbers as switches."""

    def __init__(self, recipe: dict, data: Data):
        config = fit_columns(data, recipe["bins"], recipe["exact"])
        numeric = data.train.numeric
        if recipe["numbers"] != "piecewise":
            config["bins"] = [[0.0, 1.0]] * numeric.shape[1]  # one slope: y = slope * x + offset
        super().__init__(**config, **{name: recipe[name] for name in ("members", "n_embd", "hidden", "n_layer",
                                                                      "dropout")})
        self.recipe = recipe
        self.standard, self.quantiles = fit_standard(numeric), fit_quantiles(numeric)
        E, D, V = recipe["members"], recipe["n_embd"], len(self.table)
        if recipe["numbers"] == "periodic":
            self.frequencies = nn.Parameter(torch.randn(numeric.shape[1], P, E) * SPREAD)
            bound = (2 * P) ** -0.5
            self.slopes = nn.Parameter(torch.empty(numeric.shape[1], 2 * P, E, D).uniform_(-bound, bound))
        if recipe["categories"] == "one-hot":
            del self.table
            self.V = V
            first = self.layers[0] if recipe["n_layer"] else self.head
            first = MemberLinear(E, V + numeric.shape[1] * D, first.weight.shape[2])
            if recipe["n_layer"]:
                self.layers[0] = first
            else:
                self.head = first

    def encode(self, part: Part) -> tuple[Tensor, Tensor]:
        bins, index = super().encode(part)
        if self.recipe["numbers"] in ("standardised", "periodic"):
            bins = standardise(part.numeric, self.standard)[:, :, None]  # (N, F, 1)
        elif self.recipe["numbers"] == "quantile":
            bins = to_normal(part.numeric, self.quantiles)[:, :, None]
        elif self.recipe["numbers"] == "raw":
            bins = part.numeric[:, :, None]
        return bins, index

    def embed(self, bins: Tensor, index: Tensor) -> Tensor:
        """(B, F, J) and (B, K) -> inputs of the first layer, (E, B, I)."""
        if self.recipe["numbers"] == "periodic":
            ## Gorishniy et al. 2022, equation 2: cos and sin of x at several frequencies, which are trained like any
            ## weight, then a linear layer and a ReLU for each column. High frequencies tell close numbers apart.
            angle = 2 * math.pi * bins[..., None] * self.frequencies  # (B, F, P, E)
            waves = torch.cat([angle.cos(), angle.sin()], 2)  # (B, F, 2 P, E)
            curves = torch.einsum("bfpe,fped->ebfd", waves, self.slopes)
        else:
            curves = torch.einsum("bft,fted->ebfd", bins, self.slopes)
        curves = curves + self.offsets.permute(2, 1, 0, 3)  # (E, B, F, D)
        curves = F.relu(curves) if self.recipe["numbers"] == "periodic" else curves
        if self.recipe["categories"] == "one-hot":
            one_hot = torch.zeros(len(index), self.V, device=index.device).scatter_(1, index, 1.0)  # (B, V)
            looked_up = one_hot.expand(len(curves), -1, -1)
        else:
            looked_up = self.table[index].permute(2, 0, 1, 3).flatten(2)  # (B, K, E, D) -> (E, B, K D)
        return torch.cat([looked_up, curves.flatten(2)], 2)


# ---------------------------------------------------------------------------------------------- one run
def run(recipe: dict, data: Data, device: torch.device, seed: int) -> Tensor:
    """Train one recipe from the start, without early stopping: logits (E, N) of the validation rows after the end."""
    utils.set_seed(seed)
    model = AnyNet(recipe, data).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["lr"], weight_decay=recipe["weight_decay"], fused=True)
    bins, index, target = (tensor.to(device) for tensor in (*model.encode(data.train), data.train.target))
    steps = recipe["epochs"] * math.ceil(len(target) / recipe["batch_size"])
    for step, rows in zip(range(steps), batches(len(target), recipe["batch_size"], seed)):
        optimizer.param_groups[0]["lr"] = recipe["lr"] * (1 - step / steps)
        z = model(bins[rows], index[rows])  # (E, B)
        loss = F.binary_cross_entropy_with_logits(z, target[rows].expand_as(z), reduction="none").mean(1)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return member_logits(model, tuple(tensor.to(device) for tensor in model.encode(data.val))).cpu()


def main() -> None:
    utils.keep_memory()
    parser = utils.parser(__doc__)
    add = parser.add_argument
    add("--data", help="adult, census or a CSV file; without it Adult, or census if that is out of reach")
    add("--target", help="for a CSV file: the column to predict, which has two values")
    add("--types", nargs="+", metavar="COLUMN=TYPE", help="numeric, category or ignore, where the guess is wrong")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--seeds", type=int, default=5, help="runs per row, with seeds 0, 1, 2, ...")
    add("--epochs", type=int, default=BASE["epochs"], help="passes over the training rows in each run")
    add("--rows", nargs="+", metavar="WORD", help="only the rows whose names hold one of these words; without it all")
    add("--out", type=Path, default=Path(__file__).parent / "outputs", help="folder for table and plot")
    args = parser.parse_args()
    chosen = [row for row in CHANGES if not args.rows or any(word in row[0] for word in args.rows)]
    if not chosen:
        raise utils.InputError(f"--rows {' '.join(args.rows)}: no row's name holds that; there is: "
                               f"{'; '.join(name for name, _ in CHANGES)}.")
    utils.check(args, above_zero="seeds epochs")
    utils.check_writable(args.out)
    device = utils.pick_device(args.device)
    data = load_data(args.data, args.target, args.types)
    label = data.name + ", stand-in" * data.stand_in
    print(f"{label}; {device.type}; validation rows, mean ± std of {args.seeds} seeds, {args.epochs} epochs\n"
          f"{'':38}AUC, %               log loss             accuracy, %      one member's AUC, %")

    rows, by_members = [], []
    for name, change in chosen:
        recipe = BASE | change | {"epochs": args.epochs}
        results = {"auc": [], "log_loss": [], "accuracy": [], "one_member_auc": []}
        for seed in range(args.seeds):
            logits = run(recipe, data, device, seed)
            if not logits.isfinite().all():
                raise utils.InputError(f"the logits of {name!r}, seed {seed}, became {logits.sum().item()}; what came "
                                       f"before is in {args.out}.")
            whole = measures(probabilities(logits), data.val.target)
            single = [measures(z.double().sigmoid(), data.val.target)["auc"] for z in logits]
            for key in ("auc", "log_loss", "accuracy"):
                results[key].append(whole[key])
            results["one_member_auc"].append(statistics.mean(single))
            ## Members are independent. So the first e of 16 are what a run of e members would have given.
            if recipe["members"] == 16:
                by_members.append([measures(probabilities(logits[:e]), data.val.target)["auc"] for e in range(1, 17)])
        rows.append({"name": name, "recipe": recipe, **results})
        texts = [f"{scale * mean:9.{digits}f} ± {scale * std:.{digits}f}" for scale, digits, (mean, std) in zip(
            (100, 1, 100, 100), (2, 4, 2, 2), map(utils.mean_std, results.values()))]
        print(f"{name:36}" + "".join(f"{text:21}" for text in texts), flush=True)
        table = {"script": SCRIPT, "data": data.name, "stand_in": data.stand_in, "device": device.type,
                 "torch": str(torch.__version__), "rows": rows, "auc_by_members": by_members}
        utils.write_atomically(args.out / "experiment.json", json.dumps(table, indent=1).encode())
    if by_members:
        means = [100 * statistics.mean(column) for column in zip(*by_members)]
        print("AUC, %, of the first 1, 2, 4, 8, 16 of 16 members: "
              + ", ".join(f"{means[e - 1]:.2f}" for e in (1, 2, 4, 8, 16)))

    figure, axes = plt.subplots(figsize=(8, 0.35 * len(rows) + 1.4))
    for i, row in enumerate(rows):
        mean, std = utils.mean_std([100 - 100 * auc for auc in row["auc"]])
        axes.errorbar(mean, i, xerr=std, fmt="o", color=utils.COLORS[0], label="all members" if i == 0 else None)
        axes.plot(100 - 100 * statistics.mean(row["one_member_auc"]), i, "x", color=utils.COLORS[1],
                  label="one member" if i == 0 else None)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")  # or one bad row would press all others together
    axes.set(title=f"One change at a time ({label})", xlabel="100 % less validation AUC (log scale): left is better")
    axes.legend()
    utils.save_figure(figure, args.out / "experiment.png")
    print(f"\nwrote experiment.json and experiment.png to {args.out}")
    if data.stand_in:
        utils.notice(f"STAND-IN: these figures are for {data.name}, not for UCI Adult.")


if __name__ == "__main__":
    utils.run(main)
