"""What fine-tuning starts from: a pre-trained model, its vocabulary, and a text that it has not been trained on.

You learn here: what is in a pre-trained model's files, tensor by tensor; how a sentence becomes tokens; and, where
GPT-2 can't be downloaded, how such files come to be: a small GPT-2 is pre-trained on the spot.

    python 06_finetune/load.py                               GPT-2 (downloaded once, 550 MB) and Tiny Shakespeare
    python 06_finetune/load.py --model smollm2               a Llama with 134,515,008 parameters (270 MB)
    python 06_finetune/load.py --model stand-in              the small one, pre-trained here on Python's manual
    python 06_finetune/load.py --model DIR --data a.txt      your own files

You should see: 52 tensors with 3,737,088 numbers in the stand-in; 498,553 and 57,389 tokens of Tiny Shakespeare in its
vocabulary of 2,000, and 301,966 and 36,059 in GPT-2's of 50,257. Pre-training takes 150 s on two CPU cores and ends at
4.36 nats per token of the manual's last tenth. Writes: under DATA_DIR, what was downloaded or pre-trained. Left out:
several texts or documents; removing duplicates from them."""
import math
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import bpe
import gpt2
import llama
import utils
from bpe import Tokenizer
from gpt2 import COMMON, GPT2, SIZES, save_model
from peft_files import load_adapter, save_adapter
from tokenizer_json import open_tokenizer
from weights import open_weights

# Shapes: B batch, T time (tokens in a window), V vocabulary, N tokens in a text

GPT2_URL = bpe.URL + "model.safetensors"
GPT2_SHA256 = "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_URL = f"https://huggingface.co/{SMOLLM2}/resolve/12fd25f77366fa6b3b4b768ec3050bf629380bac/"
## These files were never at hand where this was written: their hashes are those that several other public projects pin
## for this commit. If one is wrong, the correct file is refused, but no wrong file is used.
SMOLLM2_SHA256 = {"model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
                  "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
                  "tokenizer_config.json": "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
                  "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a"}
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# The stand-in: GPT-2 in all but size. To pre-train it anew, delete its folder.
STAND_IN = {"vocab_size": 2000, "n_positions": 256, "n_layer": 4, "n_head": 4, "n_embd": 256}
STAND_IN_STEPS = 600
SENTENCE = "To be, or not to be: that is the question."  # what main() encodes step by step


class Base(NamedTuple):
    path: Path  # of the weights: a file, or a folder with config.json
    module: ModuleType  # gpt2 or llama, which knows the network
    config: dict  # of the network
    tokenizer: Tokenizer
    name: str  # by which find_base finds it again
    stand_in: str = ""  # "GPT-2" where it is one pre-trained here, or was fine-tuned from that
    note: str = ""  # what has to be said beside its figures

    @property
    def label(self) -> str:
        return self.name + ", stand-in" * bool(self.stand_in and self.name != "stand-in") + self.note

    def read(self, dtype: torch.dtype = torch.float32, path: Path | None = None) -> nn.Module:
        """The network, with the base's weights, or with those at path, its matrices in dtype."""
        return self.module.read_model(path or self.path, self.config, dtype)

    def notice(self) -> None:
        """Say in a box that this is no GPT-2, where it is none."""
        utils.stand_in_notice(f"{self.name}, pre-trained on Python's manual,", self.stand_in)


class Data(NamedTuple):
    train: Tensor  # (N,) int64 token ids: the first 90 % of the characters
    val: Tensor  # (N,): the last 10 %
    val_characters: int  # that val stands for
    name: str
    stand_in: str = ""  # the text in whose place it stands, "Tiny Shakespeare"

    @property
    def label(self) -> str:
        return self.name + ", stand-in" * bool(self.stand_in)


# ---------------------------------------------------------------------------------------------- models
MODELS = ("gpt2, smollm2, stand-in, or a folder with config.json, model.safetensors and tokenizer.json (or vocab.json "
          "and merges.txt) of any size; without it gpt2, or the stand-in if that is out of reach")


def find_smollm2(folder: Path) -> str:
    """Download what is missing in folder, and return what has to be said where a whole model other than the published
    lies there, such as one in a smaller format unpacked again. Raises ConnectionError and utils.InputError."""
    try:
        for name, sha256 in SMOLLM2_SHA256.items():
            utils.download([SMOLLM2_URL + name], folder / name, sha256)
    except utils.InputError:
        if not (folder / "config.json").exists():  # downloaded last
            raise
        print(f"smollm2: {folder} holds other files than those published (a hash differs), and is used as it is")
        return ", not the published weights"
    except ConnectionError as error:
        raise ConnectionError(f"{error} Offline: --model stand-in.") from error
    return ""


def open_config(path: Path) -> tuple[ModuleType, dict]:
    """The module that knows the network of a config.json, and the network's config. Raises utils.InputError."""
    kind = gpt2.read_settings(path).get("model_type")
    if kind not in ["gpt2", *llama.CLASSES]:
        raise utils.InputError(f"{path}: model_type is {kind!r:.60}, and gpt2, {', '.join(llama.CLASSES)} are known; "
                               "take another model.")
    module = gpt2 if kind == "gpt2" else llama
    return module, module.read_config(path)


def find_base(name: str | None = None) -> Base:
    """A pre-trained model: gpt2, smollm2, stand-in, or a folder; None is gpt2, or the stand-in if that is out of reach.

    Raises ConnectionError, and utils.InputError for what doesn't fit together."""
    note = ""
    if name in (None, "gpt2"):
        path = utils.DATA_DIR / "gpt2" / "model.safetensors"
        here = path.exists()
        try:
            utils.download([GPT2_URL], path, GPT2_SHA256)
            module, config, tokenizer = gpt2, COMMON | SIZES["gpt2"], bpe.load_gpt2()
        except ConnectionError as error:
            if name or here:  # asked for by name, or half there: never replaced by something else
                raise ConnectionError(f"{error} Offline: --model stand-in.") from error
            print(error)
            return find_base("stand-in")
    else:
        path = {"stand-in": utils.DATA_DIR / "gpt2-stand-in", "smollm2": utils.DATA_DIR / "smollm2"}.get(
            name, Path(name).resolve())
        if name == "stand-in" and not (path / "config.json").exists():
            pretrain(path)
        if name == "smollm2":
            note = find_smollm2(path)
        if not path.is_dir():
            raise utils.InputError(f"{name} is no folder; give one with config.json, model.safetensors and "
                                   "tokenizer.json (or vocab.json and merges.txt), or gpt2, smollm2, or stand-in.")
        name = name if name in ("stand-in", "smollm2") else str(path)  # absolute: an adapter's config names its base
        (module, config), tokenizer = open_config(path / "config.json"), open_tokenizer(path)
    n, rows = len(tokenizer.vocab), config["vocab_size"]
    ## Some tables are filled up to a round number, as 50,304: such sizes are fast on a GPU. No text has those rows. But
    ## where many are left over, the tokenizer is likely that of other weights.
    if not isinstance(tokenizer, Tokenizer) or not n <= rows < n + (1024 if rows % 128 == 0 else 64):
        raise utils.InputError(f"{name}: its vocabulary has {n:,} tokens, and the model {rows:,}; take the tokenizer's "
                               "files of these weights.")
    if n < rows:
        print(f"{name}: the table's last {rows - n} of {rows:,} rows stand for no token, and are never drawn")
        config["n_tokens"] = n
    base = Base(path, module, config, tokenizer, name or "gpt2", "GPT-2" if "stand_in" in config else "", note)
    base.notice()
    return base


def save_result(model: nn.Module, base: Base, out: Path, method: str) -> None:
    """Write what train.py's method has trained: out/adapter, or a whole model to out/model."""
    if method == "lora":  # PEFT looks for the base at this name on the hub, or in this folder
        name = base.name if base.name != "smollm2" else str(base.path.resolve()) if base.note else SMOLLM2
        save_adapter(model, out / "adapter", name, base.module.PREFIX)
    else:
        base.tokenizer.save(out / "model")
        base.module.save_model(model, out / "model", base.tokenizer.end)


def load_result(base: Base, out: Path, method: str) -> nn.Module:
    """The model that save_result wrote, from its files: base and adapter, or the whole."""
    model = base.read(path=None if method == "lora" else out / "model")
    if method == "lora":
        load_adapter(model, out / "adapter", base.module.PREFIX)
    return model.eval()


# ---------------------------------------------------------------------------------------------- the text
def read_tinyshakespeare() -> str:
    """Raises ConnectionError where it can't be downloaded, utils.InputError where the file there is another."""
    try:
        path = utils.download([SHAKESPEARE], utils.DATA_DIR / "tinyshakespeare.txt", SHAKESPEARE_SHA256)
    except ConnectionError as error:
        raise ConnectionError(f"{error} Offline: --data python.") from error
    return path.read_text(encoding="utf-8")


def read_python() -> str:
    """A million characters of source code of Python's own library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files[:60])[:1_000_000]


SETS = {  # name -> how to read it, and what it stands in for; a text more is one function and one line
    "tinyshakespeare": (read_tinyshakespeare, ""),
    "python": (read_python, "Tiny Shakespeare"),
    "pydocs": (lambda: bpe.read_text("pydocs"), "Tiny Shakespeare"),
}
TEXTS = f"{', '.join(SETS)} or a text file; without it the first, or python if that is out of reach"


def load_data(data: str | None, tokenizer: Tokenizer, block_size: int = 1) -> Data:
    """Read, split and encode a text: one of SETS by name, or a path; None: Tiny Shakespeare or its stand-in.

    Raises ConnectionError where a text asked for by name can't be downloaded, and utils.InputError where it can't be
    read, or a part is shorter than one window of block_size + 1.
    """
    if data is None:
        try:
            return load_data("tinyshakespeare", tokenizer, block_size)
        except ConnectionError as error:
            print(error)
            return load_data("python", tokenizer, block_size)
    read, stand_in = SETS.get(data, (lambda: bpe.read_own(data), ""))
    text, name = read(), Path(data).name
    utils.stand_in_notice(name, stand_in)
    if not text:
        raise utils.InputError(f"{data} is empty; give a text of some thousand characters at least.")
    ## In order, as in chapter 05: a random split of windows would put neighbouring lines on both sides. The text is cut
    ## before it is encoded, so that no token lies on both sides either.
    n = int(0.9 * len(text))
    train, val = (torch.tensor(tokenizer.encode(part, special=False)) for part in (text[:n], text[n:]))
    if min(len(train), len(val)) < block_size + 1:
        raise utils.InputError(f"{name} has {len(train):,} tokens to train on and {len(val):,} to validate on, too few "
                               f"for windows of {block_size}; use a longer text (or a smaller block_size).")
    return Data(train, val, len(text) - n, name, stand_in)


def batches(ids: Tensor, block_size: int, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, targets), (B, T) int64 each, for ever: (N,) cut into windows, shuffled anew for every pass.

    The targets are the inputs moved by one: chapter 05 explains why. Raises utils.InputError for too few windows.
    """
    if (len(ids) - block_size) // block_size < batch_size:
        raise utils.InputError(f"{len(ids):,} tokens make fewer than {batch_size} windows of {block_size} "
                               "(batch_size, block_size); use a longer text or smaller numbers.")
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(block_size, (), generator=generator))  # other cuts in each pass
        starts = offset + block_size * torch.randperm((len(ids) - 1 - offset) // block_size, generator=generator)
        for rows in starts[: len(starts) // batch_size * batch_size].view(-1, batch_size, 1):  # (B, 1)
            windows = ids[(rows + torch.arange(block_size + 1)).to(ids.device)]  # (B, T+1)
            yield windows[:, :-1], windows[:, 1:]


# ---------------------------------------------------------------------------------------------- the stand-in
def pretrain(folder: Path) -> None:
    """Make a small GPT-2 from nothing and write it to folder, in the files that GPT-2 comes in.

    ## Pre-training is chapter 05's task, predict the next token of any text at hand, with the same windows and falling
    ## rate; but with GPT-2's network, with AdamW alone, and with dropout, for the manual is short and is read many
    ## times.
    """
    text, T, B, lr, steps = bpe.read_text("pydocs"), STAND_IN["n_positions"], 8, 2e-3, STAND_IN_STEPS
    n, dtype = int(0.9 * len(text)), utils.pick_dtype(torch.device("cpu"))
    tokenizer = Tokenizer(*bpe.train_bpe(text[:n], STAND_IN["vocab_size"]))
    train, val = (torch.tensor(tokenizer.encode(part)) for part in (text[:n], text[n:]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2(STAND_IN | {"vocab_size": len(tokenizer.vocab), "dropout": 0.1, "stand_in": steps})
        print(f"pre-training a GPT-2 with {utils.count_parameters(model):,} parameters on {len(train):,} tokens of "
              f"Python's manual ({dtype})")
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        begun = time.perf_counter()
        for step, (x, y) in zip(range(steps), batches(train, T, B, seed=0)):
            optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 50, (steps - step) / steps)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = model(x)  # (B, T, V)
            loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            utils.progress(step + 1, steps, begun, f"loss {loss.item():.3f}", "tokens", B * T)
    n = (len(val) - 1) // T * T
    with torch.inference_mode():
        loss = model.eval()(val[:n].view(-1, T), targets=val[1 : n + 1].view(-1, T))
    print(f"{time.perf_counter() - begun:.0f} s; validation loss {loss:.3f} nats per token "
          f"(uniform {math.log(len(tokenizer.vocab)):.3f})")
    tokenizer.save(folder)
    save_model(model, folder, tokenizer.end)  # config.json comes last
    print(f"wrote model.safetensors, config.json, vocab.json and merges.txt to {folder}")


def main() -> None:
    parser = utils.parser(__doc__, __file__)
    add = parser.add_argument
    add("--model", help=MODELS)
    add("--data", help=TEXTS)
    args = utils.parse_args(parser)
    base = find_base(args.model)

    # the model: what is in its files
    weights, model = open_weights(base.path), base.read()
    print(f"\n{base.name}: {base.config}\n")
    for name, tensor in weights.items():
        print(f"  {name:{max(map(len, weights))}} {str(tensor.dtype).removeprefix('torch.'):8} {tuple(tensor.shape)}")
    print(f"{len(weights)} tensors, {sum(tensor.numel() for tensor in weights.values()):,} numbers; parameters of the "
          f"network: {utils.count_parameters(model):,}\n")

    # a sentence: from characters to what the network reads
    bpe.show(base.tokenizer, SENTENCE)
    ids = torch.tensor(base.tokenizer.encode(SENTENCE))
    with torch.inference_mode():
        log_p = model(ids[None])[0].log_softmax(-1)  # (T, V)
    write = lambda i: repr(base.tokenizer.decode([int(i)]))  # noqa: E731
    print("\nwhat the model expects after each token, and what it gives to the one that comes:")
    for t in range(len(ids) - 1):
        likely = ", ".join(f"{write(i)} {p.exp():.0%}" for p, i in zip(*log_p[t].topk(3)))
        print(f"  {write(ids[t]):12} -> {likely:44} {write(ids[t + 1]):>12} {log_p[t, ids[t + 1]].exp():7.2%}")

    # the text
    text = load_data(args.data, base.tokenizer, 1)
    print(f"\n{text.name}: {len(text.train):,} tokens to train on, {len(text.val):,} to validate on, "
          f"{text.val_characters / len(text.val):.2f} characters per token\n")
    print(base.tokenizer.decode(text.train[:60].tolist()))
    base.notice()
    utils.stand_in_notice(text.name, text.stand_in)


if __name__ == "__main__":
    utils.run(main)
