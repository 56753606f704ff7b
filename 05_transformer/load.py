"""Text as numbers: what a character-level language model reads, and what it has to predict.

You learn here: how a text becomes a tensor of integers and back, why the targets are the inputs shifted by one, how
a text is split without leaking, and how well one can guess the next character with no model at all.

    python 05_transformer/load.py                        Tiny Shakespeare (downloaded once, 1.1 MB)
    python 05_transformer/load.py --data pydocs          the stand-in: the Python manual inside your Python
    python 05_transformer/load.py --data my_novel.txt    any UTF-8 text

You should see (Tiny Shakespeare): 1,115,394 characters, 65 distinct, split 1,003,854 / 111,540; 4.174 nats for
guessing uniformly, 3.347 by frequency and 2.482 by the character before, on the validation part. It takes two seconds.
Writes: outputs/characters.png. Left out on purpose: words and subwords; byte-pair encoding is chapter 06's.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils

# Shapes: B batch, T time (characters in a window), V vocabulary, N characters in a text

URLS = ["https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"]
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
UNKNOWN = "\ufffd"  # stands for every character that the training part never shows


# ---------------------------------------------------------------------------------------------- the text
class Data(NamedTuple):
    train: Tensor  # (N_train,) int64 character ids
    val: Tensor  # (N_val,)
    vocab: list[str]  # id -> character
    name: str  # "tinyshakespeare", "pydocs" or the file's name
    stand_in: str = ""  # the set that the text stands in for, "Tiny Shakespeare", or "" where it is no stand-in

    @property
    def label(self) -> str:
        return self.name + ", stand-in" * bool(self.stand_in)


def read_tinyshakespeare() -> str:
    """Raises ConnectionError where it can't be downloaded, utils.InputError where the file there is another."""
    return utils.download(URLS, utils.DATA_DIR / "tinyshakespeare.txt", SHA256).read_text(encoding="utf-8")


def read_pydocs() -> str:
    """The language manual that ships inside Python, help("if") and the like: 465,126 characters in Python 3.11."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_file(path: Path) -> str:
    """A text file of the reader's own. Raises utils.InputError where there is none, or where it is not UTF-8."""
    if not path.is_file():
        raise utils.InputError(f"{path} is no file; give a UTF-8 text file, or one of {', '.join(SETS)}.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise utils.InputError(f"{path} is not UTF-8 (byte {error.start}); convert it, say with iconv.") from error


SETS = {  # name -> how to read it, and what it stands in for; a text more is one function and one line
    "tinyshakespeare": (read_tinyshakespeare, ""),
    "pydocs": (read_pydocs, "Tiny Shakespeare"),
}


def encode(text: str, vocab: list[str]) -> Tensor:
    """Characters to ids: str of length N -> (N,) int64. Raises utils.InputError naming characters not in vocab."""
    index = {character: i for i, character in enumerate(vocab)}
    if strangers := sorted(set(text) - index.keys()):
        raise utils.InputError(f"the model never saw {', '.join(map(repr, strangers[:10]))} in training; leave it out.")
    return torch.tensor([index[character] for character in text], dtype=torch.int64)


def decode(ids: Tensor | list[int], vocab: list[str]) -> str:
    """Ids to characters: (N,) -> str of length N. The inverse of encode."""
    return "".join(vocab[i] for i in (ids.tolist() if isinstance(ids, Tensor) else ids))


def load_data(data: str | None = None, block_size: int = 1) -> Data:
    """Read, split and encode a text: the name of one of SETS, or a path; None: Tiny Shakespeare or its stand-in.

    Raises ConnectionError where a text asked for by name can't be downloaded, and utils.InputError where it can't be
    read, or a part is shorter than one window of block_size + 1.
    """
    if data is None:
        try:
            return load_data("tinyshakespeare", block_size)
        except ConnectionError as error:
            print(error)
            return load_data("pydocs", block_size)
    read, stand_in = SETS.get(data, (lambda: read_file(Path(data)), ""))
    text, name = read(), data if data in SETS else Path(data).name
    utils.stand_in_notice(name, stand_in)
    ## The split keeps the order: the first 90 % train, the last 10 % validate. A random split of windows would put
    ## neighbouring, overlapping pieces of one scene on both sides, and the validation loss would reward memory.
    n = int(0.9 * len(text))
    train_text, val_text = text[:n], text[n:]
    if min(len(train_text), len(val_text)) < block_size + 1:
        raise utils.InputError(f"{name} has {len(text):,} characters, too few for a context of {block_size}: its last "
                               f"tenth must hold {block_size + 1}; use a longer text or a smaller block_size.")
    ## The vocabulary comes from the training part alone, like everything else that is fitted. Where the validation
    ## part has other characters, one extra id stands for all of them; the model never learned it, and pays for each.
    vocab = sorted(set(train_text))
    if unseen := set(val_text) - set(vocab):
        vocab = [c for c in vocab if c != UNKNOWN] + [UNKNOWN]
        val_text = "".join(UNKNOWN if c in unseen else c for c in val_text)
    return Data(encode(train_text, vocab), encode(val_text, vocab), vocab, name, stand_in)


# ---------------------------------------------------------------------------------------------- windows
def batches(ids: Tensor, block_size: int, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, targets), (B, T) int64 each, for ever: (N,) cut into windows, shuffled anew for every pass.

    Raises utils.InputError where ids hold fewer than batch_size windows.

    ## The target at each position is the next character, so the targets are the inputs moved by one:
    ##     inputs   F i r s t _ C
    ##     targets  i r s t _ C i
    ## One window of T characters is therefore T exercises at once: predict from 1 character, from 2, ... from T.
    ##
    ## Within a pass no character comes twice, and few are left out (the ends, and a last batch that is not full);
    ## drawing windows at random places would show some three times and others never. Each pass starts at another
    ## offset, so that the cuts between windows, where there is little to look back on, fall on other characters.
    """
    if (len(ids) - block_size) // block_size < batch_size:
        raise utils.InputError(f"{len(ids):,} characters make fewer than {batch_size} windows of {block_size} "
                               "(batch_size, block_size); use a longer text or smaller numbers.")
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(block_size, (), generator=generator))
        starts = offset + block_size * torch.randperm((len(ids) - 1 - offset) // block_size, generator=generator)
        for rows in starts[: len(starts) // batch_size * batch_size].view(-1, batch_size, 1):  # (B, 1), on the CPU
            windows = ids[(rows + torch.arange(block_size + 1)).to(ids.device)]  # (B, T+1): one gather, no DataLoader
            yield windows[:, :-1], windows[:, 1:]


# ---------------------------------------------------------------------------------------------- baselines
def frequency_loss(train: Tensor, val: Tensor, n_vocab: int) -> float:
    """Nats per character on val when each character is predicted by its share of train (one is added to each count)."""
    counts = torch.bincount(train, minlength=n_vocab).double() + 1  # (V,)
    return -(counts / counts.sum()).log()[val].mean().item()


def bigram_log_probs(train: Tensor, n_vocab: int) -> Tensor:
    """Count pairs: (N,) -> (V, V); row a holds log p(next = b | current = a), with one added to each count.

    ## The added one (Laplace smoothing) matters: a pair that training never showed would get probability 0, and the
    ## first time validation shows it the loss would be infinite.
    """
    pairs = train[:-1] * n_vocab + train[1:]  # (N-1,) one number per pair
    counts = torch.bincount(pairs, minlength=n_vocab**2).view(n_vocab, n_vocab).double() + 1
    return (counts / counts.sum(1, keepdim=True)).log()


def bigram_loss(train: Tensor, val: Tensor, n_vocab: int) -> float:
    """Nats per character on val when each character is predicted from the one before it alone."""
    return -bigram_log_probs(train, n_vocab)[val[:-1], val[1:]].mean().item()


def main() -> None:
    parser = utils.parser(__doc__, __file__, "seed")
    add = parser.add_argument
    add("--data", help="tinyshakespeare, pydocs or a text file; without it the first, or pydocs if out of reach")
    add("--block-size", type=utils.count, default=32, help="characters in one window")
    args = utils.parse_args(parser)
    data = load_data(args.data, args.block_size)
    vocab = data.vocab
    print(f"{data.label}: {len(data.train) + len(data.val):,} characters, {len(vocab)} distinct; first 90 % train "
          f"{len(data.train):,}, last 10 % validation {len(data.val):,}\nvocabulary: {''.join(vocab)!r}\n\n"
          f"{decode(data.train[:200], vocab)}\n")
    # a batch, as train.py sees it
    inputs, targets = next(batches(data.train, args.block_size, 4, args.seed))
    print(f"one batch: inputs {tuple(inputs.shape)}, targets {tuple(targets.shape)}, {inputs.dtype}")
    for x, y in zip(inputs, targets):
        print(f"  input   {decode(x, vocab)!r}\n  target  {decode(y, vocab)!r}")
    print(f"  the first input as ids: {inputs[0, :12].tolist()} ...\n")

    ## Three losses that need counting only. What a model has learned shows as the distance to the third.
    parts = data.train, data.val, len(vocab)
    print(f"guessing uniformly:     {math.log(len(vocab)):.3f} nats per character (ln {len(vocab)})\n"
          f"guessing by frequency:  {frequency_loss(*parts):.3f} nats per character\n"
          f"by the one before:      {bigram_loss(*parts):.3f} nats per character (bigram)")

    counts = Counter(decode(data.train, vocab)).most_common(60)
    figure, axes = utils.pyplot().subplots(figsize=(11, 3))
    axes.bar([{" ": "␣", "\n": "\\n"}.get(c, c) for c, _ in counts], [k / len(data.train) for _, k in counts])
    axes.set(title=f"How often each character occurs ({data.label})", ylabel="share")
    utils.write_atomically(args.out / "characters.png", figure.savefig)
    print(f"\nwrote {args.out / 'characters.png'}")
    utils.stand_in_notice(data.name, data.stand_in)


if __name__ == "__main__":
    utils.run(main)
