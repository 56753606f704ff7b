"""What fine-tuning starts from: a pre-trained GPT-2, its vocabulary, and a text that it has not been trained on.

You learn here: what is in a pre-trained model's files, tensor by tensor; how a sentence becomes tokens; and, where
GPT-2 can't be downloaded, how such files come to be: a small GPT-2 is pre-trained on the spot.

    python 06_finetune/load.py                               GPT-2 (downloaded once, 550 MB) and Tiny Shakespeare
    python 06_finetune/load.py --model stand-in              the small one, pre-trained here on Python's manual
    python 06_finetune/load.py --model DIR --data a.txt      your own files
    python 06_finetune/load.py --model stand-in --steps 900  pre-train the stand-in anew

You should see: 52 tensors with 3,737,088 numbers in the stand-in; 498,553 and 57,389 tokens of Tiny Shakespeare in its
vocabulary of 2,000, and 301,966 and 36,059 in GPT-2's of 50,257. Pre-training the stand-in takes 150 s (two cores of an
AMD EPYC, torch 2.15, bfloat16) and ends at 4.36 nats per token of the manual's last tenth.
Writes: under DATA_DIR, what was downloaded or pre-trained; with --steps, outputs/pretraining.png. Left out
on purpose: several texts or documents; removing duplicates from them.
"""

import math
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import requests
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import bpe  # noqa: E402
import utils  # noqa: E402
from bpe import Tokenizer  # noqa: E402
from gpt2 import COMMON, GPT2, SIZES, loss_on, read_config, read_model, save_model  # noqa: E402
from weights import open_weights  # noqa: E402

# Shapes: B batch, T time (tokens in a window), V vocabulary, N tokens in a text

HUB = "https://huggingface.co/openai-community/"
GPT2_URL = HUB + "gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/model.safetensors"
GPT2_SHA256 = "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# The stand-in: GPT-2 in all but size
STAND_IN = {"vocab_size": 2000, "n_positions": 256, "n_layer": 4, "n_head": 4, "n_embd": 256}
STAND_IN_STEPS = 600
SENTENCE = "To be, or not to be: that is the question."


class Base(NamedTuple):
    path: Path  # of the weights: a file, or a folder with config.json
    config: dict  # of the network
    tokenizer: Tokenizer
    name: str  # by which find_base finds it again
    stand_in: bool

    def label(self) -> str:
        return self.name + ", stand-in" * (self.stand_in and self.name != "stand-in")


class Text(NamedTuple):
    train: Tensor  # (N,) int64 token ids: the first 90 % of the characters
    val: Tensor  # (N,): the last 10 %
    val_characters: int  # that val stands for
    name: str
    stand_in: bool


# ---------------------------------------------------------------------------------------------- the base model
def find_base(name: str | None = None) -> Base:
    """A pre-trained GPT-2: gpt2, gpt2-medium, gpt2-large, gpt2-xl, stand-in, or a folder; None is gpt2, or the stand-in
    where that can't be reached. Raises utils.InputError for what can't be had or doesn't fit together."""
    if name and name not in (*SIZES, "stand-in"):
        folder = Path(name)
        if not folder.is_dir():
            raise utils.InputError(f"--model {name} is no folder; give one with config.json, model.safetensors, "
                                   f"vocab.json and merges.txt, or {', '.join(SIZES)} or stand-in.")
        return _base(folder, read_config(folder / "config.json"), _tokenizer(folder), name)
    if name != "stand-in":
        weights_here = (utils.DATA_DIR / (name or "gpt2") / "model.safetensors").exists()
        try:
            path, tokenizer = _download(name or "gpt2"), bpe.load_gpt2()
            return _base(path, COMMON | SIZES[name or "gpt2"], tokenizer, name or "gpt2")
        except ConnectionError as error:
            if name or weights_here:  # asked for by name, or half there: never replaced by something else
                raise utils.InputError(f"{error} Use --model stand-in to work offline.") from error
            print(error)
    folder = utils.DATA_DIR / "gpt2-stand-in"
    if not (folder / "config.json").exists():
        pretrain(folder)
    config = read_config(folder / "config.json")
    utils.notice("STAND-IN: in place of GPT-2 this run uses a small one, pre-trained on Python's manual",
                 f"for {config.get('stand_in', 0)} steps. Its figures can't be compared with GPT-2's.")
    return _base(folder, config, _tokenizer(folder), "stand-in")


def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_files(folder / "vocab.json", folder / "merges.txt")


def _base(path: Path, config: dict, tokenizer: Tokenizer, name: str) -> Base:
    V = config["vocab_size"]
    if len(tokenizer.vocab) != V:
        raise utils.InputError(f"{name}: its vocabulary has {len(tokenizer.vocab):,} tokens, and the model {V:,}; take "
                               "vocab.json and merges.txt from where the weights are from.")
    return Base(path, config, tokenizer, name, "stand_in" in config)


def _download(name: str) -> Path:
    """The weights of one of the four sizes, from the hub. Raises ConnectionError where it can't be reached."""
    path = utils.DATA_DIR / name / "model.safetensors"
    if name == "gpt2":
        return utils.download([GPT2_URL], path, GPT2_SHA256)
    ## The hash of gpt2 stands above. For the larger ones we ask the hub for the hash that it keeps with the file: that
    ## finds a broken download, though not a hub that was broken into.
    if path.exists():
        return path  # it was verified when it came
    url = f"{HUB}{name}/resolve/main/model.safetensors"
    try:
        reply = requests.head(url, timeout=(10, 30), allow_redirects=False)
        reply.raise_for_status()
        sha256 = reply.headers["X-Linked-Etag"].strip('"')
    except (requests.RequestException, KeyError) as error:
        raise ConnectionError(f"{url} could not be asked for its hash ({type(error).__name__}).") from error
    return utils.download([url], path, sha256)


# ---------------------------------------------------------------------------------------------- the text
def read_text(name: str | None = None) -> tuple[str, str, bool]:
    """(text, name, stand_in) for tinyshakespeare, python, pydocs or a path; None is Tiny Shakespeare, or Python source
    where that can't be reached. Raises utils.InputError for a text that can't be had or read."""
    if name in (None, "tinyshakespeare"):
        try:
            path = utils.download([SHAKESPEARE], utils.DATA_DIR / "tinyshakespeare.txt", SHAKESPEARE_SHA256)
            return path.read_text(encoding="utf-8"), "tinyshakespeare", False
        except ConnectionError as error:
            if name:
                raise utils.InputError(f"{error} Use --data python to work offline.") from error
            print(error)
    if name in (None, "python"):
        utils.notice("STAND-IN: in place of Tiny Shakespeare this run uses `python`, source code of Python's own",
                     "library. Its figures are not Tiny Shakespeare's and can't be compared with them.")
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        return "\n\n".join(file.read_text(encoding="utf-8") for file in files[:60])[:1_000_000], "python", True
    text = bpe.read_text(name)
    if not text:
        raise utils.InputError(f"--data {name} is empty; give a text of some thousand characters at least.")
    return text, Path(name).name, name == "pydocs"


def load_text(name: str | None, tokenizer: Tokenizer, block_size: int) -> Text:
    """Read, split and encode. Raises utils.InputError where a part is shorter than one window of block_size + 1."""
    text, name, stand_in = read_text(name)
    ## In order, as in chapter 05: a random split of windows would put neighbouring lines on both sides. The text is cut
    ## before it is encoded, so that no token lies on both sides either.
    n = int(0.9 * len(text))
    train, val = (torch.tensor(tokenizer.encode(part, special=False)) for part in (text[:n], text[n:]))
    if min(len(train), len(val)) < block_size + 1:
        advice = "use a longer text" + " or a smaller --block-size" * (block_size > 1)
        raise utils.InputError(f"{name} has {len(train):,} tokens to train on and {len(val):,} to validate on, too few "
                               f"for windows of {block_size}; {advice}.")
    return Text(train, val, len(text) - n, name, stand_in)


def batches(ids: Tensor, block_size: int, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, targets), (B, T) int64 each, for ever: (N,) cut into windows, shuffled anew for every pass.

    The targets are the inputs moved by one: chapter 05 explains why. Raises utils.InputError for too few windows.
    """
    if (len(ids) - block_size) // block_size < batch_size:
        raise utils.InputError(f"{len(ids):,} tokens make fewer than {batch_size} windows of {block_size} "
                               "(--batch-size, --block-size); use a longer text or smaller numbers.")
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(block_size, (), generator=generator))  # other cuts in each pass
        starts = offset + block_size * torch.randperm((len(ids) - 1 - offset) // block_size, generator=generator)
        for rows in starts[: len(starts) // batch_size * batch_size].view(-1, batch_size, 1):  # (B, 1)
            windows = ids[(rows + torch.arange(block_size + 1)).to(ids.device)]  # (B, T+1)
            yield windows[:, :-1], windows[:, 1:]


def warn(base: Base, text: Text) -> None:
    """Print the notice at the end of a run in which a stand-in took the place of model or text."""
    pairs = ((base, "GPT-2"), (text, "Tiny Shakespeare"))
    names = [f"not {real}'s but {part.name}'s" for part, real in pairs if part.stand_in]
    if names:
        utils.notice(f"STAND-IN: these figures are {', and '.join(names)}.")


# ---------------------------------------------------------------------------------------------- the stand-in
def pretrain(folder: Path, steps: int = STAND_IN_STEPS, plot: Path | None = None) -> None:
    """Make a small GPT-2 from nothing and write it to folder, in the files that GPT-2 comes in.

    ## Pre-training is chapter 05's task, predict the next token of any text at hand, with the same windows and falling
    ## rate; but with GPT-2's network, with AdamW alone, and with dropout, for the manual is short and is read many
    ## times.
    """
    utils.check_writable(folder)  # now, and not after the training
    text = bpe.read_text("pydocs")
    n = int(0.9 * len(text))
    tokenizer = Tokenizer(*bpe.train_bpe(text[:n], STAND_IN["vocab_size"]))
    train, val = (torch.tensor(tokenizer.encode(part)) for part in (text[:n], text[n:]))
    dtype, T, B = utils.pick_dtype(torch.device("cpu")), STAND_IN["n_positions"], 8
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2(STAND_IN | {"vocab_size": len(tokenizer.vocab), "dropout": 0.1, "stand_in": steps})
        print(f"pre-training a GPT-2 with {utils.count_parameters(model):,} parameters on {len(train):,} tokens of "
              f"Python's manual ({dtype})")
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        history, losses, bar, begun = [], [], utils.Progress(steps, "tokens"), time.perf_counter()
        for step, (x, y) in zip(range(steps), batches(train, T, B, seed=0)):
            optimizer.param_groups[0]["lr"] = 2e-3 * min((step + 1) / 50, (steps - step) / steps)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = model(x)  # (B, T, V)
            loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.update(step + 1, f"loss {losses[-1]:.3f}", B * T)
            if (step + 1) % 100 == 0 or step + 1 == steps:
                history.append({"step": step + 1, "train_loss": sum(losses) / len(losses),
                                "val_loss": loss_on(model, val, T, dtype)})
                losses = []
    bar.clear()
    print(f"{time.perf_counter() - begun:.0f} s; validation loss {history[-1]['val_loss']:.3f} nats per token "
          f"(uniform {math.log(len(tokenizer.vocab)):.3f})")
    tokenizer.save(folder)
    save_model(model, folder, tokenizer.vocab[bpe.END])  # config.json comes last
    print(f"wrote model.safetensors, config.json, vocab.json and merges.txt to {folder}")
    if plot:
        utils.plot_history(plot, history, ["train_loss", "val_loss"], "Pre-training the stand-in (pydocs, stand-in)",
                           y="nats per token")


def main() -> None:
    utils.keep_memory()
    parser = utils.parser(__doc__)
    add = parser.add_argument
    add("--model", help=f"{', '.join(SIZES)}, stand-in, or a folder; without it gpt2, or the stand-in if that is out "
        "of reach")
    add("--data", help="tinyshakespeare, python, pydocs or a text file; without it the first, or python if that is "
        "out of reach")
    add("--sentence", default=SENTENCE, help="what to encode step by step")
    add("--steps", type=int, help=f"pre-train the stand-in anew, with so many steps (as it comes: {STAND_IN_STEPS})")
    add("--out", type=Path, default=Path(__file__).parent / "outputs", help="folder for the pre-training's plot")
    args = parser.parse_args()
    if args.steps is not None:
        if args.model != "stand-in" or args.steps < 1:
            raise utils.InputError("--steps must be at least 1, and goes with --model stand-in, which it makes anew.")
        utils.check_writable(args.out)
        pretrain(utils.DATA_DIR / "gpt2-stand-in", args.steps, args.out / "pretraining.png")
    if not args.sentence:
        raise utils.InputError("--sentence is empty; give one of a few words.")
    base = find_base(args.model)

    # the model: what is in its files
    weights, total = open_weights(base.path), 0
    print(f"\n{base.name}: {base.config}\n")
    for name, tensor in weights.items():
        print(f"  {name:28} {str(tensor.dtype).removeprefix('torch.'):8} {tuple(tensor.shape)}")
        total += tensor.numel()
    model = read_model(base.path, base.config)
    print(f"{len(weights)} tensors, {total:,} numbers; parameters of the network: {utils.count_parameters(model):,}\n")

    # a sentence: from characters to what the network reads
    bpe.show(base.tokenizer, args.sentence)
    ids = torch.tensor(base.tokenizer.encode(args.sentence, special=False))
    with torch.inference_mode():
        log_p = model(ids[None])[0].log_softmax(-1)  # (T, V)
    write = lambda i: repr(base.tokenizer.decode([int(i)]))  # noqa: E731
    print("\nwhat the model expects after each token, and what it gives to the one that comes:")
    for t in range(min(len(ids) - 1, 20)):
        likely = ", ".join(f"{write(i)} {p.exp():.0%}" for p, i in zip(*log_p[t].topk(3)))
        print(f"  {write(ids[t]):12} -> {likely:44} {write(ids[t + 1]):>12} {log_p[t, ids[t + 1]].exp():7.2%}")

    # the text
    text = load_text(args.data, base.tokenizer, 1)
    print(f"\n{text.name}: {len(text.train):,} tokens to train on, {len(text.val):,} to validate on, "
          f"{text.val_characters / len(text.val):.2f} characters per token\n")
    print(base.tokenizer.decode(text.train[:60].tolist()))
    warn(base, text)


if __name__ == "__main__":
    utils.run(main)
