"""What BERT's two scripts share: the choice of what is trained, the loop, the files and the options.

You learn here: how one loop serves three methods (every weight, the head alone, LoRA); why a new head needs a learning
rate of its own; why batches of texts of much the same length save half the work.

    python 06_finetune/bert_classify.py     a class for each text
    python 06_finetune/bert_qa.py           the answer to a question, found in a text

What to see, and what is written, is told in those two. Left out on purpose: several processes, and sums of gradients
over parts of a batch; train.py, which teaches GPT-2, has both.
"""
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from bert import FILES, find_bert, open_bert, save_model
from lora import LoRA, add_lora, remove
from memory import load_trainable, peak_memory, trainable_state
from peft_files import load_adapter, save_adapter
from wordpiece import WordPiece

# Shapes: N texts (or windows of texts)


class Data(NamedTuple):
    """A data set in three parts: a list of questions each, or texts with their classes."""
    train: Any
    val: Any
    test: Any
    name: str
    stand_in: str = ""  # the real set whose place it takes; empty for a real one
    labels: list[str] = []  # what the classes are called, where there are any

    @property
    def label(self) -> str:
        """What plots and tables call this set."""
        return self.name + ", stand-in" * bool(self.stand_in)


# ---------------------------------------------------------------------------------------------- model
def heads(model: nn.Module) -> tuple[str, ...]:
    """The modules that pre-training has not made fit for the task, and that every method trains whole."""
    names = ("bert.pooler.dense", "pre_classifier", "classifier", "qa_outputs")
    return tuple(name for name, _ in model.named_modules() if name in names)


def prepare(args, data: Data, kind: type, targets: dict[str, list[str]], **more
            ) -> tuple[nn.Module, WordPiece, Path, Data]:
    """(model, tokenizer, folder, data): args.model with a new head, ready for args.method.

    kind, more: see bert.open_bert; targets: a family's layers that get adapters without --lora-targets. args.model and
    args.data get their names where they were left open, and the new data knows of a model that is a stand-in.

    ## full: every weight. head: the head alone, on a frozen encoder, which shows how far its old knowledge goes.
    ## (Dropout stays on inside, so that a text looks a little different every time.) lora: the head, and small matrices
    ## beside the frozen ones (lora.py).
    """
    torch.manual_seed(args.seed)
    folder, args.model = find_bert(args.model)
    model, tokenizer, config = open_bert(folder, args.model, kind, dropout=args.dropout, **more)
    model.requires_grad_(args.method == "full")
    if args.method == "lora":
        try:
            add_lora(model, args.lora_rank, args.lora_alpha, 0.0, args.lora_targets or targets[config["model_type"]])
        except ValueError as error:
            raise utils.InputError(str(error)) from error
    for name in heads(model):
        if isinstance(model.get_submodule(name), LoRA):
            raise utils.InputError(f"--lora-targets takes in {name}, which is trained whole; leave it out.")
        model.get_submodule(name).requires_grad_()
    if args.method == "lora":  # not with `head`, which writes the frozen weights out again
        shrink(model, args.dtype)
    args.data = args.data or data.name
    if "stand_in" in config:
        data = data._replace(stand_in=f"MiniLM{f' on {data.stand_in}' if data.stand_in else ''}")
    return model.to(args.device), tokenizer, folder, data


def shrink(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen matrices in dtype, and the tables, of which a batch reads only a few rows, as they are.

    ## A frozen matrix need not be more precise than what it is multiplied with.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
            layer.weight.data = layer.weight.data.to(dtype)


# ---------------------------------------------------------------------------------------------- the loop
def batches(lengths: list[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Every row number once, in batches of much the same length, which come in a random order.

    ## A batch is as long as its longest text. Shuffled, half of what SST-2's batches of 32 hold is padding; sorted by
    ## length, 5 %. But then every pass would have the same batches, and the short texts first. So lengths get a little
    ## noise before the sorting, and the batches are shuffled after it.
    """
    order = (torch.tensor(lengths) + 3 * torch.rand(len(lengths), generator=generator)).argsort().split(batch_size)
    return [order[i].tolist() for i in torch.randperm(len(order), generator=generator).tolist()]


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate: up in a line, then down in a line to zero (Devlin et al. 2019, appendix A.2)."""
    return (step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup)


def make_optimizer(model: nn.Module, lr: float, head_lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW: the head has a rate of its own, and vectors (biases, norms) and tables are not decayed.

    ## The head starts at random and has far to go. What lies under it is good as it is, and should move only a little.
    """
    new, groups = heads(model), {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = weight_decay if p.dim() > 1 and "embeddings" not in name else 0.0
            groups.setdefault((head_lr if name.startswith(new) else lr, decay), []).append(p)
    return torch.optim.AdamW([{"params": some, "lr": peak, "peak": peak, "weight_decay": decay}
                              for (peak, decay), some in groups.items()], fused=p.device.type in ("cpu", "cuda"))


def fit(args, script: str, task: str, goal: str, model: nn.Module, tokenizer: WordPiece, lengths: list[int],
        backward: Callable[[list[int]], Tensor], evaluate: Callable[[], dict[str, float]], line: str,
        **more) -> tuple[list[dict], dict]:
    """Train as the options args say, from the start or from where a stopped run saved last: (history, metrics).

    lengths: tokens of each of the N rows. backward: gets row numbers, adds the gradients of their loss to those of the
    parameters, and returns that loss (). After each epoch evaluate() gives figures; `line` is printed with them, and
    checkpoint.pt is written, with `more` in it. Where the figure `goal` is the best so far, save_result writes the
    result. Training stops early by args.patience. Raises utils.InputError when loss or weights become nan.

    ## On a few hundred texts many epochs have the same accuracy. Of equals the one with the lowest val_loss is kept: it
    ## is surer of what it gets right. And an epoch that equals the best is no reason to stop.
    """
    options = {name: value for name, value in vars(args).items()
               if name not in ("out", "device", "resume", "texts", "question", "context")}
    path, history, best = args.out / "checkpoint.pt", [], {"epoch": 0, goal: -1.0}
    optimizer = make_optimizer(model, args.lr, args.head_lr, args.weight_decay)
    if args.resume:
        saved = utils.load_checkpoint(path, script, options)
        if saved["lengths"] != lengths:
            raise utils.InputError(f"{path} is of a run on other texts; start anew without --resume.")
        load_trainable(model, saved["trained"])
        optimizer.load_state_dict(saved["optimizer"])
        history, best = saved["history"], saved["best"]
        torch.set_rng_state(saved["random_state"])
        print(f"resumed after epoch {len(history)} and {history[-1]['seconds']:.0f} s of training")
    trained = [p for p in model.parameters() if p.requires_grad]
    n, whole = utils.count_parameters(model), sum(p.numel() for p in model.parameters())
    generator, per_epoch = torch.Generator().manual_seed(args.seed), math.ceil(len(lengths) / args.batch_size)
    first, steps = len(history) * per_epoch, args.epochs * per_epoch
    start, seconds = time.perf_counter(), history[-1]["seconds"] if history else 0.0
    print(f"{args.method}: {n:,} trained parameters of {whole:,} ({n / whole:.4%}); {args.dtype} on "
          f"{args.device.type}; {steps:,} steps\n")
    for epoch in range(args.epochs):
        order = batches(lengths, args.batch_size, generator)
        if epoch < len(history):
            continue  # seen before the run was stopped; drawn again so that the draws after them stay the same
        if epoch - max((row["epoch"] for row in history if row[goal] == best[goal]), default=0) >= args.patience:
            break  # early stopping
        begun, losses = time.perf_counter(), []
        model.train()
        for step, rows in enumerate(order, epoch * per_epoch):
            loss = backward(rows)
            nn.utils.clip_grad_norm_(trained, args.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, steps, int(args.warmup * steps))
            optimizer.step()
            optimizer.zero_grad()  # now: an evaluation has no need of gradients, and large models have large ones
            losses.append(loss)
            if not loss.is_cuda or step % 10 == 0:  # looking at the loss makes a GPU wait
                utils.progress(step + 1 - first, steps - first, start, f"loss {loss:.3f}", "texts", args.batch_size)
        train_loss = torch.stack(losses).mean().item()  # waits for a GPU to finish
        seconds += time.perf_counter() - begun
        row = {"step": step + 1, "seconds": seconds, "epoch": epoch + 1, "train_loss": train_loss} | evaluate()
        if not math.isfinite(sum(row.values())) or not all(p.isfinite().all() for p in trained):
            raise utils.InputError(f"loss or weights became nan in epoch {epoch + 1}, of which nothing was saved; "
                                   "start again with a smaller --lr.")
        history.append(row)
        print(f"epoch {{epoch:2}}  {{seconds:4.0f}} s  train {{train_loss:.4f}}  {line}".format(**row).ljust(79),
              flush=True)
        if row[goal] > best[goal] or row[goal] == best[goal] and row["val_loss"] < best["val_loss"]:
            best = row
            save_result(model, tokenizer, args, task)  # before the checkpoint: if a kill comes between, this is redone
        utils.write_atomically(path, torch.save, {
            "script": script, "options": options, "torch": str(torch.__version__), "lengths": lengths,
            "history": history, "best": best, "trained": trainable_state(model), "optimizer": optimizer.state_dict(),
            "random_state": torch.get_rng_state(), **more})  # of the CPU: on a GPU dropout goes on with other numbers
    return history, {"best_epoch": best["epoch"], "trained_parameters": n, "peak_memory_bytes": peak_memory(args.device)
                     } | {name: value for name, value in best.items() if name.startswith("val_")}


# ---------------------------------------------------------------------------------------------- files
def save_result(model: nn.Module, tokenizer: WordPiece, args, task: str) -> None:
    """Write --out/adapter, or a whole model to --out/model. task: as PEFT names it.

    ## PEFT, asked for a sequence classifier (SEQ_CLS), trains the head whole and keeps it with the adapter, under
    ## modules_to_save. An adapter without its head would be of no use. So ours holds it too, and with --pooling cls,
    ## the only one that PEFT knows, either reads the other's.
    """
    if args.method == "lora":
        save_adapter(model, args.out / "adapter", model.config["name"], "", task, heads(model))
    else:
        tokenizer.save(args.out / "model")
        save_model(model, args.out / "model")


def load_result(folder: Path, options: dict, out: Path, kind: type, labels: list[str] | None = None
                ) -> tuple[nn.Module, WordPiece]:
    """(model, tokenizer) that save_result wrote, from its files: an adapter on the base in folder, or the whole."""
    if options["method"] != "lora":
        return open_bert(out / "model", "", kind)[:2]
    model, tokenizer, _ = open_bert(folder, options["model"], kind, labels, pooling=options.get("pooling"))
    load_adapter(model, out / "adapter", "")
    return model.eval(), tokenizer


def load_trained(out: Path, script: str, kind: type) -> tuple[nn.Module, WordPiece, dict]:
    """(model, tokenizer, checkpoint) of the run in the folder out, on the CPU."""
    saved = utils.load_checkpoint(out / "checkpoint.pt", script)
    options = saved["options"]
    folder = find_bert(options["model"])[0] if options["method"] == "lora" else out
    model, tokenizer = load_result(folder, options, out, kind, saved.get("labels"))
    print("{method}, {model}, learned from {data}:".format(**options))
    return model, tokenizer, saved


def report(args, script: str, data: Data, model: nn.Module, history: list[dict], metrics: dict, curves: list[str],
           y: str, *files: str) -> None:
    """Write metrics.json and history.png, and print what was written."""
    remove(model)  # the adapters: metrics.json counts the parameters of the model that they adapt
    utils.save_metrics(args, script, data, model.requires_grad_(), metrics, history, model=args.model)
    utils.plot_history(args.out / "history.png", history, curves, f"{args.method}: {args.model}, on {data.label}",
                       "epoch", y)
    files = ("adapter/" if args.method == "lora" else "model/", "checkpoint.pt", *files, "metrics.json", "history.png")
    print(f"\nwrote {', '.join(files)} to {args.out}")
    utils.stand_in_notice(f"{args.model} on {data.name}", data.stand_in)


# ---------------------------------------------------------------------------------------------- options
def load_set(sets: dict[str, Callable[[], Data]], name: str | None) -> Data:
    """What sets[name] returns; without a name the first of sets, or the last, its stand-in, if it is out of reach."""
    try:
        data = sets[name or next(iter(sets))]()
    except ConnectionError as error:
        if name:
            raise
        print(error)
        data = list(sets.values())[-1]()
    utils.stand_in_notice(data.name, data.stand_in)
    return data


def place(text: str) -> str:
    """A type for argparse: a name stays as it is, and a path that exists becomes absolute, to be found again."""
    known = (*FILES, "stand-in", "sst2", "squad", "templates")
    return text if text in known or not Path(text).exists() else str(Path(text).resolve())


def new_parser(doc: str, script: str, recipes: dict[str, dict], things: str, targets: str, **defaults):
    """A parser with the options that both scripts have, which speak of `things` and of LoRA's usual targets.

    recipes: method -> the values of options that are not given and differ by method, see parse.
    """
    parser = utils.parser(doc, script, "device", "seed", "dtype", "resume")
    add = parser.add_argument

    def by_method(text: str, name: str) -> str:
        values = [f"{recipe[name]:g} ({method})" for method, recipe in recipes.items() if name in recipe]
        return f"{text}; without it {', '.join(values)}"

    add("--method", choices=recipes, help="full: every weight; lora: adapters and the head; head: the head alone")
    add("--model", type=place, help=f"{', '.join(FILES)}, stand-in, or a folder with config.json, model.safetensors "
        "and tokenizer.json or vocab.txt; without it minilm, or the stand-in if that is out of reach")
    add("--limit", type=utils.count, help=f"learn from so many {things}, drawn at random")
    add("--epochs", type=utils.count, help=by_method(f"passes over the training {things}", "epochs"))
    add("--batch-size", type=utils.count, help="rows per step; larger is steadier, and learns less per row")
    add("--lora-rank", type=utils.count, help=by_method("rank of each change; parameters grow with it", "lora_rank"))
    add("--lora-alpha", type=utils.positive, help=by_method("the change counts alpha / rank times", "lora_alpha"))
    add("--lora-targets", nargs="+", help="layers that get adapters, by the end of their names, as query value, or "
        f"q_lin v_lin in DistilBERT; without it {targets}")
    add("--dropout", type=utils.share, default=0.1, help="share of activations zeroed while training")
    add("--lr", type=utils.positive, help=by_method("AdamW's peak learning rate", "lr"))
    add("--head-lr", type=utils.positive, help=by_method("the head's", "head_lr"))
    add("--weight-decay", type=utils.number(float, "[0, inf)"), default=0.01,
        help="each step takes lr times this of every trained matrix, but no table's")
    add("--warmup", type=utils.share, default=0.1, help="share of the steps in which the learning rate rises from zero")
    add("--grad-clip", type=utils.positive, default=1.0, help="a longer gradient is cut to this (Pascanu et al. 2013)")
    add("--patience", type=utils.count, default=2, help="stop after so many epochs worse than the best")
    parser.set_defaults(**defaults)
    return parser


def parse(parser, recipes: dict[str, dict]):
    """The values of all options. Raises utils.InputError for one of LoRA's without LoRA."""
    parser.set_defaults(**recipes[parser.parse_args().method])
    args = utils.parse_args(parser)
    if args.method != "lora" and (args.lora_rank or args.lora_alpha or args.lora_targets):
        raise utils.InputError("--lora-rank, --lora-alpha and --lora-targets are for --method lora, not for "
                               f"{args.method}; leave them out.")
    return args
