"""An MLP with embeddings for every column, sixteen of them in one, and the loop that trains it beyond boosted trees.

You learn here: what an embedding makes of a word and of a number; why averaging several networks helps, and how to
train them as one; and which figures tell how good a yes-or-no prediction is.

    python 04_tabular/train.py                                     UCI Adult
    python 04_tabular/train.py --data my.csv --target COLUMN       any table with a column of two values
    python 04_tabular/train.py --members 1                         a single network

You should see (UCI Adult, test rows, one CPU core, five seeds): accuracy .8752 ± .0003 and AUC .9297 ± .0001 after
some 15 s of training; logistic regression .8520 and .9053. tests/benchmark.py sets boosted trees beside it.
Writes to outputs/: model.pt (the best epoch's weights), metrics.json, history.png. Left out on purpose: attention over
columns (FT-Transformer), retrieval of similar rows, a search over options.
"""
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from load import KNOWN, NO_VALUE, UNSEEN, Data, Part, add_options, fit_bins, load_data, logistic_baseline
from load import piecewise_linear, roc_auc

# Shapes: N rows, B batch, F numeric columns, J bins of one, L columns that are looked up, V rows of the table of
#         embeddings, C width of an embedding, E members (networks side by side), I inputs of a layer, M hidden units

SCRIPT = "04_tabular/train.py"


# ---------------------------------------------------------------------------------------------- model
class MemberLinear(nn.Module):
    """E linear layers in one, each with weights of its own: (E, B, I) -> (E, B, M).

    ## baddbmm multiplies E pairs of matrices in one call, y_e = x_e W_e + b_e. One after the other, so many small
    ## products would spend more time on being started than on multiplying.
    """

    def __init__(self, members: int, inputs: int, outputs: int):
        super().__init__()
        bound = inputs**-0.5  # as nn.Linear has it
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class TabularNet(nn.Module):
    """E networks over one table. Of each: an embedding of C numbers per column, then an MLP, then one logit.

    ## A word becomes a row of a table of trained numbers (from_scratch.py): "Sales" can come to lie close to "Tech
    ## support" and far from "Priv house serv", and what is learned of one helps with the other.
    ##
    ## A number becomes C numbers too, each a curve over it with kinks at the edges of its bins (Gorishniy et al. 2022).
    ## Fed in as it is, a number can only be multiplied; a bend, as in income over age, is up to later layers, and they
    ## are slow to make sharp ones. Boosted trees cut anywhere at once, and that is much of why they are hard to beat.
    ##
    ## Some numbers are also names. In adult.data 69 people have a capital gain of 5013, and none of them earns more
    ## than 50K; 97 have 5178, and all of them do. A curve would need a step at every such place. So where a column has
    ## few distinct values, each that occurs at least twice also gets a row of the table. experiment.py measures this.
    ##
    ## Every member has weights of its own everywhere, embeddings included. TabM (Gorishniy et al. 2024), from which
    ## the idea is taken, lets members share most weights.
    """

    def __init__(self, bins: list[list[float]], exact: list[list[float]], sizes: list[int], members: int, n_embd: int,
                 hidden: int, n_layer: int, dropout: float):
        """bins: for each numeric column the edges of its bins. exact: those of its values that are looked up, sorted.
        sizes: for each category column the number of its indices. fit_columns makes all three."""
        super().__init__()
        self.bins = [torch.tensor(edges, dtype=torch.float64) for edges in bins]
        self.exact = [torch.tensor(values, dtype=torch.float32) for values in exact]
        rows = [*sizes, *(len(values) + KNOWN for values in exact if values)]  # rows of the table that a column needs
        first = torch.tensor([0, *rows], dtype=torch.int64).cumsum(0)[:-1]
        self.register_buffer("first", first, persistent=False)  # (L,) where each column's rows begin
        E, C, J = members, n_embd, max((len(edges) - 1 for edges in bins), default=0)
        self.table = nn.Parameter(torch.randn(sum(rows), E, C) * 0.3)  # (V, E, C)
        self.slopes = nn.Parameter(torch.randn(len(bins), J, E, C) * 0.3)  # (F, J, E, C)
        self.offsets = nn.Parameter(torch.zeros(len(bins), 1, E, C))
        ## What training never shows is never trained, and a random row would be a random opinion. The mean is 0.
        with torch.no_grad():
            self.table[self.first + UNSEEN] = 0
        widths = [(len(rows) + len(bins)) * C] + [hidden] * n_layer
        self.layers = nn.ModuleList(MemberLinear(E, a, b) for a, b in zip(widths, widths[1:]))
        self.head = MemberLinear(E, widths[-1], 1)
        self.dropout = nn.Dropout(dropout)

    @torch.no_grad()
    def zero_missing(self, part: Part) -> None:
        """Set a missing value's embedding to 0 in category columns where no row of part, the training rows, has one."""
        for first, column in zip(self.first, part.categories.T):
            if not (column == NO_VALUE).any():
                self.table[first + NO_VALUE] = 0

    def encode(self, part: Part) -> tuple[Tensor, Tensor]:
        """Raw columns -> bins (N, F, J) float32 and row numbers of the table (N, L): done once, before training."""
        index = [part.categories]
        for column, values in zip(part.numeric.T, self.exact):
            if len(values):
                place = torch.searchsorted(values, column.contiguous()).clamp(max=len(values) - 1)
                index.append(torch.where(values[place] == column, place + KNOWN, UNSEEN)[:, None])
        bins = piecewise_linear(part.numeric, self.bins) if self.bins else torch.zeros(len(part.numeric), 0, 0)
        return bins.to(self.first.device), torch.cat(index, 1).to(self.first.device) + self.first

    def embed(self, bins: Tensor, index: Tensor) -> Tensor:
        """(B, F, J) and (B, L) -> (E, B, I): for each member the embeddings of all columns, side by side."""
        B, (V, E, C) = len(index), self.table.shape
        looked_up = F.embedding(index, self.table.view(V, E * C))  # (B, L, E C)
        curves = torch.baddbmm(self.offsets.flatten(2), bins.transpose(0, 1), self.slopes.flatten(2))  # (F, B, E C)
        x = torch.cat([looked_up, curves.transpose(0, 1)], 1)  # (B, L + F, E C)
        return x.view(B, -1, E, C).permute(2, 0, 1, 3).reshape(E, B, -1)  # (E, B, I), I = (L + F) C

    def forward(self, bins: Tensor, index: Tensor) -> Tensor:
        """(B, F, J) and (B, L) -> logits (E, B)."""
        x = self.embed(bins, index)
        for layer in self.layers:
            x = self.dropout(F.relu(layer(x)))  # (E, B, M)
        return self.head(x)[:, :, 0]


def fit_columns(data: Data, bins: int, exact: int) -> dict:
    """bins, exact and sizes of TabularNet, from the training rows: at most so many bins; values looked up in columns
    that have at most `exact` of them.

    ## Edges that share out the rows evenly would be of no use to a column like capital gain: 92 % of the rows are 0,
    ## and so are nearly all of the edges. There the edges share out the distinct values instead.
    """
    config = {"bins": [], "exact": [], "sizes": [len(values) + KNOWN for values in data.schema["values"]]}
    for column in data.train.numeric.T:
        values, counts = column.unique(return_counts=True)
        few = len(values) <= exact
        config["bins"].append(fit_bins((values if few else column)[:, None], bins)[0].tolist())
        config["exact"].append(values[counts > 1].tolist() if few else [])
    return config


# ---------------------------------------------------------------------------------------------- the loop
@torch.no_grad()
def member_logits(model: TabularNet, inputs: tuple[Tensor, Tensor]) -> Tensor:
    """Logits (E, N) of encoded rows: all of them, in pieces that fit into the memory."""
    model.eval()
    return torch.cat([model(*piece) for piece in zip(*(tensor.split(4096) for tensor in inputs))], 1)


def probabilities(logits: Tensor) -> Tensor:
    """Logits (E, N) -> one probability per row, (N,): the mean of the members' probabilities, in float64 on the CPU.

    ## E networks that start from different weights make different mistakes, and some of them cancel. In numbers: the
    ## loss is -log p, a convex function, so that the loss of the mean is never above the mean of the losses (Jensen).
    """
    return logits.cpu().double().sigmoid().mean(0)  # .cpu(): Apple's GPUs have no float64


def predict(model: TabularNet, part: Part) -> Tensor:
    """Probability of the positive value for each row of part, (N,) float64 on the CPU."""
    return probabilities(member_logits(model, model.encode(part)))


def evaluate(p: Tensor, target: Tensor, threshold: float = 0.5) -> dict[str, float]:
    """Six figures from probabilities p (N,) and targets (N,), 0 or 1; a row counts as positive where p > threshold.

    ##                         predicted positive      predicted negative
    ##     is positive         TP, true positives      FN, false negatives
    ##     is negative         FP, false positives     TN, true negatives
    ## Accuracy alone misleads where one class is frequent: three of four people here earn less than 50K, and a program
    ## that says so of everyone is right three times in four. Precision asks how many of those named are right; recall,
    ## how many of those to be named are found. F1 is their harmonic mean, low where either is low. All four depend on
    ## the threshold. AUC doesn't: it is the share of pairs in the right order. Log loss asks whether 80 % means 80 %.
    """
    named, true = p > threshold, target == 1
    tp, fp, fn = ((a & b).sum().item() for a, b in ((named, true), (named, ~true), (~named, true)))
    right = torch.where(true, p, 1 - p).double().clamp(min=torch.finfo(torch.float64).eps)  # given to what came true
    return {"accuracy": 1 - (fp + fn) / len(p),
            "precision": tp / (tp + fp) if tp + fp else 0.0,  # nobody named: a matter of taste, 0 as in scikit-learn
            "recall": tp / (tp + fn) if tp + fn else 0.0,
            "f1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0,
            "auc": roc_auc(p, target), "log_loss": -right.log().mean().item()}


def batches(columns: Sequence[Tensor], batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
    """Yield all N rows of the columns, (N, ...) each, once and in a random order, B at a time: (B, ...) each."""
    for rows in torch.randperm(len(columns[0]), generator=generator).split(batch_size):  # (B,)
        yield tuple(column[rows] for column in columns)


def fit(model: TabularNet, train: Part, val: Part, epochs: int, batch_size: int, lr: float, weight_decay: float,
        seed: int) -> Iterator[dict]:
    """Train on the rows of train; pause after each epoch and yield its figures, to be printed and saved.

    seed decides the order of the rows; what dropout zeroes comes from torch's own generator."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    columns, val_inputs = (*model.encode(train), train.target.to(model.first.device)), model.encode(val)
    generator, per_epoch, seconds = torch.Generator().manual_seed(seed), math.ceil(len(train.target) / batch_size), 0.0
    for epoch in range(epochs):
        begun, losses = time.perf_counter(), []
        model.train()
        for step, (bins, index, target) in enumerate(batches(columns, batch_size, generator), epoch * per_epoch):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / (epochs * per_epoch))
            optimizer.zero_grad()
            z = model(bins, index)  # (E, B)
            ## Each member is held to the targets by itself. The loss of their mean probability would be another thing:
            ## it asks only for the crowd to be right, and lets members lean on each other's mistakes. The mean over
            ## rows is summed over members, so that each gets the gradient it would get alone.
            loss = F.binary_cross_entropy_with_logits(z, target.expand_as(z), reduction="none").mean(1)  # (E,)
            loss.sum().backward()
            optimizer.step()
            losses.append(loss.detach().mean() * len(target))
        train_loss = torch.stack(losses).sum().item() / len(train.target)  # waits for a GPU to finish
        seconds += time.perf_counter() - begun
        if not math.isfinite(train_loss):
            raise utils.InputError(f"the loss became {train_loss} in epoch {epoch + 1}; start again with a smaller lr.")
        figures = evaluate(probabilities(member_logits(model, val_inputs)), val.target)
        yield {"step": step + 1, "epoch": epoch + 1, "seconds": seconds, "train_loss": train_loss,
               "val_loss": figures["log_loss"], "val_auc": figures["auc"], "val_accuracy": figures["accuracy"]}


# ---------------------------------------------------------------------------------------------- main
def main() -> None:
    parser = utils.parser(__doc__, __file__, "device", "seed")  # adds --device, --seed and --out
    add_options(parser)  # --data, --target and --types
    add = parser.add_argument
    add("--epochs", type=utils.count, default=8, help="passes over the training rows; the learning rate ends at zero")
    add("--batch-size", type=utils.count, default=512, help="rows per step; larger: fewer steps, smoother gradients")
    add("--lr", type=utils.positive, default=5e-3, help="AdamW's learning rate at the start")
    add("--weight-decay", type=utils.number(float, "[0, inf)"), default=0.3,
        help="share of every weight taken per step, times the rate")
    add("--members", type=utils.count, default=16, help="networks trained side by side, to average their probabilities")
    add("--n-embd", type=utils.count, default=8, help="width C of each column's embedding; a linear model's is 1")
    add("--hidden", type=utils.count, default=128, help="units per hidden layer of one member")
    add("--n-layer", type=utils.number(int, "[0, inf)"), default=1,
        help="hidden layers; without any, columns can't act together")
    add("--dropout", type=utils.share, default=0.1, help="share of hidden units zeroed; more: less overfitting, slower")
    add("--bins", type=utils.count, default=48, help="bins per numeric column, the kinks that its curve may have")
    add("--exact", type=utils.number(int, "[0, inf)"), default=256,
        help="numeric columns of at most so many values get embeddings for them too")
    add("--patience", type=utils.count, default=3, help="epochs without a better AUC that end the run (early stopping)")
    args = utils.parse_args(parser)
    data = load_data(args.data, args.target, args.types)
    torch.manual_seed(args.seed)
    config = fit_columns(data, args.bins, args.exact) | {
        name: vars(args)[name] for name in ("members", "n_embd", "hidden", "n_layer", "dropout")}
    model = TabularNet(**config).to(args.device)
    model.zero_missing(data.train)
    schema, rows, share = data.schema, len(data.train.target), data.train.target.mean().item()
    ## Nothing learned yet, all probabilities should be near a half: loss ln 2. The second figure is what one gets for
    ## naming the same probability for everyone, the share of positives. Training has to go below it at once.
    one = Part(*(column[:1] for column in data.train))
    before = evaluate(predict(model, data.val), data.val.target)["log_loss"]
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    print(f"{data.label}: {rows:,} rows to train on, {len(data.val.target):,} to validate, "
          f"{len(data.test.target):,} to test; {schema['target']} is {schema['positive']} in {share:.1%}\n"
          f"{utils.count_parameters(model):,} parameters in {args.members} members; {args.device.type}; "
          f"{args.epochs * math.ceil(rows / args.batch_size):,} steps\n"
          f"a row: {one.numeric[0].tolist()} {one.categories[0].tolist()}, rows of the embedding "
          f"{model.encode(one)[1][0].tolist()}, {one.target[0]:.0f}\n"
          f"before training: loss {before:.4f} (ln 2 = {math.log(2):.4f}; the same for everyone: {entropy:.4f})\n")
    history, best = [], {"epoch": 0, "val_auc": -math.inf}
    for row in fit(model, data.train, data.val, args.epochs, args.batch_size, args.lr, args.weight_decay, args.seed):
        history.append(row)
        print("epoch {epoch:2}  {seconds:4.0f} s  train {train_loss:.4f}  validation {val_loss:.4f}, "
              "AUC {val_auc:.4f}, accuracy {val_accuracy:.2%}".format(**row), flush=True)
        if row["val_auc"] > best["val_auc"]:
            best = row
            utils.write_atomically(args.out / "model.pt", torch.save, {
                "script": SCRIPT, "config": config, "schema": schema, "data": data.name, "source": data.source,
                "stand_in": data.stand_in, "torch": str(torch.__version__), "metrics": best,
                "model": model.state_dict()})
        if row["epoch"] - best["epoch"] >= args.patience:
            break  # early stopping

    model.load_state_dict(utils.load_checkpoint(args.out / "model.pt", SCRIPT)["model"])  # the best, maybe not the last
    ## The test part is used here, once. It chose nothing: not the epoch, not an option.
    y, logits = data.test.target, member_logits(model, model.encode(data.test)).cpu()
    each = [evaluate(z.double().sigmoid(), y) for z in logits]
    table = {"majority class": evaluate(torch.full(y.shape, share), y),
             "logistic regression": evaluate(logistic_baseline(data).sigmoid(), y),
             "one member, on average": {name: sum(figures[name] for figures in each) / len(each) for name in each[0]},
             f"all {args.members}, epoch {best['epoch']}": evaluate(probabilities(logits), y)}
    print(f"\n{f'test ({data.label})':28}" + "".join(f"{name:>10}" for name in each[0]))
    for name, figures in table.items():
        print(f"{name:28}" + "".join(f"{value:10.4f}" for value in figures.values()))
    if data.best_auc:
        print(f"{'the model behind the data':28}{data.best_accuracy:10.4f}{data.best_auc:40.4f}")
    print(f"{history[-1]['seconds']:.0f} s of training")
    majority, logistic, single, ours = table.values()
    utils.save_metrics(args, SCRIPT, data, model, {f"test_{name}": value for name, value in ours.items()} | {
        "val_auc": best["val_auc"], "best_epoch": best["epoch"], "majority": majority, "logistic_regression": logistic,
        "one_member": single}, history)
    utils.plot_history(args.out / "history.png", history, ["train_loss", "val_loss"],
                       f"{args.members} networks with embeddings on {data.label}", "epoch", "log loss, nats")
    utils.stand_in_notice(data.name, data.stand_in)


## Try this. Each was run once (UCI Adult, seed 0, one core); as it is: test accuracy .8756, AUC .9297 in about 14 s.
##   --exact 0               .8625  .9145   numbers as curves alone: a capital gain of 5178 is no longer like no other
##   --exact 0 --bins 1      .8542  .9074   numbers as straight lines: hardly better than logistic regression
##   --members 1             .8745  .9290   in 2 s: most of it is there; the mean of many is worth the last step
##   --batch-size 8192       .8501  .8999   as many passes, but 32 steps instead of 408: too few to get there
##   --n-layer 3 --hidden 512 --epochs 20 --members 4    .8716  .9288   it learns rows by heart: the training loss goes
##                           on falling, validation AUC is best after epoch 5, and early stopping ends the run after 8

if __name__ == "__main__":
    utils.run(main)
