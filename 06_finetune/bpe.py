"""Byte-pair encoding: how GPT-2 turns any text into numbers below 50,257, and how such a vocabulary is learned.

You learn here: why tokens are neither characters nor words; how 256 bytes and a ranked list of 50,000 merges cover
every text there is; how the merges are found by counting; and why a text from a user must not contain <|endoftext|>.

    python 06_finetune/bpe.py "some text"                       GPT-2's own tokens (vocab.json, merges.txt: 1.5 MB)
    python 06_finetune/bpe.py --file data/tinyshakespeare.txt   count the tokens of a file
    python 06_finetune/bpe.py --data novel.txt                  learn a vocabulary from a text (pydocs: Python's manual)

You should see (one core of an AMD EPYC, Python 3.11): " tokenization" takes 11 merges to become " token", "ization";
Tiny Shakespeare 301,966 + 36,059 tokens in 0.4 to 0.7 s; --data pydocs 1,743 merges from 465,126 characters in 0.6 s.
Writes: with --data pydocs or a text, vocab.json and merges.txt in outputs/, which transformers' GPT2Tokenizer opens.
Left out on purpose: normalisation and dropout of merges; padding; offsets into the text.
"""

import functools
import json
import re
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils

# No tensors here: ids are lists of int. A piece is what the pattern cuts out, a token what has an id.

URL = "https://huggingface.co/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/"
SHA256 = {
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
END = "<|endoftext|>"  # stood between two documents in GPT-2's training; id 50256
SAMPLE = "Hello world! We're testing tokenization in 2024: na\u00efve \u4f60\u597d \U0001f642"

# Letters and numbers that Unicode 15.0 to 16.0 added, in hexadecimal: Python 3.11 to 3.13 do not know all of them. With
# these every text is cut as by tokenizers 0.23 (Unicode 16). A Python that knows newer ones may cut there elsewhere.
NEW_LETTERS = (
    "1c89-1c8a a7cb-a7cd a7da-a7dc 105c0-105f3 10d4a-10d65 10d6f-10d85 10ec2-10ec4 1123f-11240 11380-11389 1138b 1138e "
    "11390-113b5 113b7 113d1 113d3 11bc0-11be0 11f02 11f04-11f10 11f12-11f33 1342f 13441-13446 13460-143fa 16100-1611d "
    "16d40-16d6c 18cff 1b132 1b155 1df25-1df2a 1e030-1e06d 1e4d0-1e4eb 1e5d0-1e5ed 1e5f0 2b739 2ebf0-2ee5d 31350-323af"
)
NEW_NUMBERS = (
    "10d40-10d49 116d0-116e3 11bf0-11bf9 11f50-11f59 16130-16139 16d70-16d79 1ccf0-1ccf9 1d2c0-1d2d3 1e4f0-1e4f9 "
    "1e5f1-1e5fa"
)


# ---------------------------------------------------------------------------------------------- text to pieces
@functools.cache
def pattern() -> re.Pattern:
    """The expression that cuts a text into pieces; no merge ever crosses a cut. Made on first use, then kept.

    ## Without cuts the most frequent pairs would be of the kind "e " and ". T", and "dog", "dog." and "dog!" would be
    ## three unrelated tokens. GPT-2 (Radford et al. 2019, section 2.2; encoder.py of its code) cuts with
    ##     's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+
    ## in words: endings as in "we'll"; a run of letters, of numbers, or of anything else that is seen, each with the
    ## one space before it; white space. \\s+(?!\\S) leaves the last of several spaces to the word after it.
    ## Python's re has no \\p{L} (letters of any script) and \\p{N} (numbers). But unicodedata knows each character's
    ## category, two letters such as Lu or Nd, and a character class made of all ranges of L.. is just what \\p{L} is.
    """
    ## Planes 4 to 16 hold no letters: unassigned, tags, private use. Leaving them out saves three quarters of the time.
    categories = "".join(map(unicodedata.category, map(chr, range(0x40000))))  # two letters for each code point

    def ranges(kind: str, new: str) -> str:
        runs = [(run.start() // 2, run.end() // 2 - 1) for run in re.finditer(f"(?:{kind}.)+", categories)]
        runs += [(int(run.split("-")[0], 16), int(run.split("-")[-1], 16)) for run in new.split()]
        return "".join(f"{chr(first)}-{chr(last)}" for first, last in runs)

    L, N = ranges("L", NEW_LETTERS), ranges("N", NEW_NUMBERS)
    # Python's \s also holds \x1c to \x1f, the separators of old tape formats; Unicode's White_Space does not.
    S = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    return re.compile(rf"'s|'t|'re|'ve|'m|'ll|'d| ?[{L}]+| ?[{N}]+| ?[^{S}{L}{N}]+|[{S}]+(?![^{S}])|[{S}]+")


## Every text is bytes (UTF-8), and there are 256 of them, so nothing is ever unknown. To keep its files readable GPT-2
## writes each byte as a printable symbol: those that print stand for themselves, the other 68 become U+0100 onwards.
## A space is U+0120, "G" with a dot above: that is why GPT-2's tokens are full of it.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
SYMBOL = {**{byte: chr(byte) for byte in PRINTABLE}, **{byte: chr(256 + i) for i, byte in enumerate(OTHERS)}}
BYTE = {symbol: byte for byte, symbol in SYMBOL.items()}  # in GPT-2's order: a symbol's place here is its id


def utf8(piece: str) -> bytes:
    """The bytes of a piece. Raises utils.InputError for a lone surrogate, which has none."""
    try:
        return piece.encode()
    except UnicodeEncodeError as error:
        raise utils.InputError(f"the text holds U+{ord(piece[error.start]):04X}, half of a surrogate pair and no "
                               "character; read the text as UTF-8, or remove it.") from error


# ---------------------------------------------------------------------------------------------- pieces to tokens
class Tokenizer:
    """Encode and decode with a vocabulary {token: id} and merges [(left, right), ...], both in byte symbols.

    Raises utils.InputError where the two are no byte-level BPE vocabulary with <|endoftext|>, or do not fit each other.
    vocab_path and merges_path: what to call them in such messages.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], vocab_path: Path | str = "the vocabulary",
                 merges_path: Path | str = "the list of merges"):
        advice = "take both files from the same place, such as GPT-2's."
        numbers = isinstance(vocab, dict) and all(type(i) is int for i in vocab.values())
        if not numbers or sorted(vocab.values()) != list(range(len(vocab))):
            raise utils.InputError(f"{vocab_path} must map tokens to the ids 0, 1, 2 ..., each once; {advice}")
        missing = [symbol for symbol in [*BYTE, END] if symbol not in vocab]
        if missing:
            raise utils.InputError(f"{vocab_path} lacks {missing[0]!r}, which every byte-level BPE has; {advice}")
        for left, right in merges:
            stranger = next((token for token in (left, right, left + right) if token not in vocab), None)
            if stranger is not None:
                raise utils.InputError(f"{merges_path} merges {left!r} and {right!r}, but {vocab_path} lacks "
                                       f"{stranger!r}; {advice}")
        unmade = vocab.keys() - BYTE.keys() - {END} - {left + right for left, right in merges}
        if unmade:
            raise utils.InputError(f"{vocab_path} holds {len(unmade):,} tokens that no line of {merges_path} makes, "
                                   f"such as {min(unmade)!r}; {advice}")
        self.vocab, self.merges = vocab, merges
        self.byte_id = [vocab[SYMBOL[byte]] for byte in range(256)]
        self.rank = {(vocab[left], vocab[right]): rank for rank, (left, right) in enumerate(merges)}
        self.made = [vocab[left + right] for left, right in merges]  # rank of a merge -> id of what it makes
        self.bytes = {i: bytes(BYTE[symbol] for symbol in token) for token, i in vocab.items()}
        self.cache: dict[str, list[int]] = {}

    @classmethod
    def from_files(cls, vocab_path: Path | str, merges_path: Path | str) -> "Tokenizer":
        """Read GPT-2's two files. Raises utils.InputError for one that is missing, damaged, or unfit for the other."""
        texts = []
        for path in (vocab_path, merges_path):
            try:
                texts.append(Path(path).read_text(encoding="utf-8"))
            except OSError as error:
                raise utils.InputError(f"{path} cannot be read ({error.strerror}); put GPT-2's file there.") from error
            except UnicodeDecodeError as error:
                raise utils.InputError(f"{path} is not UTF-8 text; put GPT-2's file there.") from error
        try:
            vocab = json.loads(texts[0])
        except (ValueError, RecursionError) as error:
            raise utils.InputError(f"{vocab_path} is not JSON, or was cut short; put GPT-2's file there.") from error
        merges = []
        for number, line in enumerate(texts[1].split("\n"), 1):
            pair = tuple(line.split(" "))
            if line and not (number == 1 and line.startswith("#version")):  # "#" may also begin a merge
                if len(pair) != 2 or not all(pair):
                    raise utils.InputError(f"{merges_path}, line {number}: {line[:40]!r} is not two symbols with a "
                                           "space between them; put GPT-2's file there.")
                merges.append(pair)
        return cls(vocab, merges, vocab_path, merges_path)

    def save(self, folder: Path | str) -> None:
        """Write vocab.json and merges.txt in GPT-2's format, byte for byte the originals if those were read."""
        merges = "".join(line + "\n" for line in ["#version: 0.2", *map(" ".join, self.merges)])
        for name, text in ("vocab.json", json.dumps(self.vocab)), ("merges.txt", merges):
            utils.write_atomically(Path(folder) / name, lambda file: file.write(text.encode()))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Text to ids. Raises utils.InputError for a lone surrogate.

        special: whether <|endoftext|> in the text becomes its one id, as it does in transformers by default.

        ## With special=False it is seven ordinary tokens. Use that for text that others wrote: the one id tells the
        ## model that a document is over and what stood before no longer matters, which is not for strangers to say.
        """
        ids, find, cache = [], pattern().findall, self.cache
        for part, document in enumerate(text.split(END) if special else [text]):
            if part:
                ids.append(self.vocab[END])
            for piece in find(document):
                ## Text repeats itself: Tiny Shakespeare is 297,833 pieces, 15,057 of them different. Merge each once.
                known = cache.get(piece)
                if known is None:
                    known = cache[piece] = self.encode_piece(piece)
                ids += known
        if len(cache) > 1_000_000:
            cache.clear()  # a server would otherwise fill its memory in the end
        return ids

    def encode_piece(self, piece: str) -> list[int]:
        """Ids of one piece: its bytes, merged until no pair in it is in the list."""
        ids = [self.byte_id[byte] for byte in utf8(piece)]
        for _ in self.merge(ids):
            pass
        return [i for i in ids if i is not None]

    def merge(self, ids: list[int | None]) -> Iterator[int]:
        """Merge ids in place, one pair after another; a hole (None) is left beside each. Yields each merge's rank.

        ## The rule: of all neighbours, merge the pair that stands first in the list of merges (the leftmost, if it
        ## occurs twice), and begin again. So the text is put together in the order in which training found the pairs.
        ## Looking at all n pairs each time takes up to n^2 steps: 10^10 if the piece is a run of 100,000 letters. A
        ## heap hands out the lowest rank in log n steps instead, and `before` and `after` step over the holes.
        """
        n, rank = len(ids), self.rank
        before, after = list(range(-1, n - 1)), list(range(1, n + 1))
        heap = [(rank[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in rank]
        heapify(heap)
        while heap:
            lowest, i = heappop(heap)
            j = after[i]
            if j == n or rank.get((ids[i], ids[j])) != lowest:
                continue  # out of date: one of the two was merged with its other neighbour
            ids[i], ids[j] = self.made[lowest], None
            after[i] = after[j]
            if after[i] < n:
                before[after[i]] = i
            for k in (before[i], i):  # the merged token's new pairs: with what stands before it, and after it
                if k >= 0 and after[k] < n and (ids[k], ids[after[k]]) in rank:
                    heappush(heap, (rank[ids[k], ids[after[k]]], k))
            yield lowest

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for. Raises utils.InputError for an id that is not in the vocabulary."""
        try:
            return b"".join([self.bytes[int(i)] for i in ids])
        except KeyError as error:
            raise utils.InputError(f"token id {error} is not in the vocabulary of {len(self.vocab):,}; use the "
                                   "tokenizer files that belong to the model.") from error

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Ids to text; the inverse of encode. errors: as in bytes.decode.

        ## Any list of ids is bytes, but not all bytes are UTF-8: a character of three bytes may be two tokens, and a
        ## model may write the first without the second. Such a rest becomes U+FFFD, a question mark in a diamond.
        """
        return self.decode_bytes(ids).decode("utf-8", errors)


# ---------------------------------------------------------------------------------------------- learning the merges
def train_bpe(text: str, vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learn (vocab, merges) from a text: 256 bytes, merges, <|endoftext|> last; vocab_size in all, or fewer.

    Raises utils.InputError where vocab_size is below 257. Fewer: where no pair is left that occurs twice.
    Of equally frequent pairs the one with the smaller ids is merged first, as Hugging Face's trainer does it.

    ## Count all pairs of neighbours, make the most frequent a token of its own, replace it everywhere, repeat (Sennrich
    ## et al. 2016, algorithm 1). Two things make it fast: a word that occurs 1,000 times is one word with a weight of
    ## 1,000; and a merge changes the counts only in words that hold the pair, which `where` finds.
    """
    if vocab_size < 257:
        raise utils.InputError(f"vocab_size {vocab_size} must be at least 257: 256 bytes and {END}.")
    vocab = {symbol: i for i, symbol in enumerate(BYTE)}
    symbols, merges = list(vocab), []
    pieces = Counter(pattern().findall(text))
    words = [[vocab[SYMBOL[byte]] for byte in utf8(piece)] for piece in pieces]
    weights = list(pieces.values())
    counts, where = Counter(), defaultdict(set)  # pair -> how often; pair -> which words hold it, or once did
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += weights[w]
            where[pair].add(w)
    heap = [(-count, pair) for pair, count in counts.items()]  # smallest first: most frequent, then smallest ids
    heapify(heap)
    while heap and len(vocab) < vocab_size - 1:
        count, pair = heappop(heap)
        if -count != counts[pair]:
            continue  # out of date; the present count was pushed when it changed
        if -count < 2:
            break  # a pair that occurs once saves nothing elsewhere
        left, right = symbols[pair[0]], symbols[pair[1]]
        merges.append((left, right))
        new = vocab.setdefault(left + right, len(vocab))
        if new == len(symbols):  # else two ways lead to the same token
            symbols.append(left + right)
        changed = set()
        for w in where.pop(pair):
            old, words[w] = words[w], replace_pair(words[w], pair, new)
            for word, weight in ((old, -weights[w]), (words[w], weights[w])):  # all its pairs go, its new ones come
                for neighbours in zip(word, word[1:]):
                    counts[neighbours] += weight
                    where[neighbours].add(w)
                    changed.add(neighbours)
        for neighbours in changed:
            if counts[neighbours]:
                heappush(heap, (-counts[neighbours], neighbours))
    vocab[END] = len(vocab)
    return vocab, merges


def replace_pair(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """ids with each occurrence of pair, from the left, replaced by new."""
    out, i = [], 0
    while i < len(ids):
        found = tuple(ids[i : i + 2]) == pair
        out.append(new if found else ids[i])
        i += 1 + found
    return out


# ---------------------------------------------------------------------------------------------- which vocabulary
def load_gpt2() -> Tokenizer:
    """GPT-2's tokenizer, from DATA_DIR/gpt2. Downloads the two files if they are not there.

    Raises ConnectionError where they cannot be had, utils.InputError where what is there is not the original.
    """
    folder = utils.DATA_DIR / "gpt2"
    return Tokenizer.from_files(*(utils.download([URL + name], folder / name, SHA256[name]) for name in SHA256))


def read_text(path: str) -> str:
    """A UTF-8 text file, or `pydocs`, the manual inside Python. Raises utils.InputError for anything else."""
    if path == "pydocs":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return Path(path).read_bytes().decode("utf-8-sig")  # unlike read_text this leaves \r\n as it is
    except OSError as error:
        raise utils.InputError(f"{path} cannot be read ({error.strerror}); give a UTF-8 text file.") from error
    except UnicodeDecodeError as error:
        raise utils.InputError(f"{path} is not UTF-8 (byte {error.start}); convert it, say with iconv.") from error


def get_tokenizer(data: str | None, vocab_size: int, out: Path) -> tuple[Tokenizer, str]:
    """The tokenizer that --data asks for, and its name; one learned here is written to out."""
    if data and Path(data).is_dir():
        return Tokenizer.from_files(Path(data) / "vocab.json", Path(data) / "merges.txt"), data
    if data in (None, "gpt2"):
        try:
            return load_gpt2(), "gpt2"
        except ConnectionError as error:
            if data:  # asked for by name: never replaced by something else
                raise
            print(error)
        data = "pydocs"
        utils.stand_in_notice("a vocabulary learned from Python's manual", "GPT-2")
    text, start = read_text(data), time.perf_counter()
    tokenizer = Tokenizer(*train_bpe(text, vocab_size))
    seconds = time.perf_counter() - start
    tokenizer.save(out)
    print(f"learned {len(tokenizer.merges):,} merges from {len(text):,} characters in {seconds:.1f} s, the first:",
          ", ".join(repr(tokenizer.decode([256 + i])) for i in range(min(12, len(tokenizer.vocab) - 257))))
    print(f"wrote {out / 'vocab.json'} and {out / 'merges.txt'}\n")
    return tokenizer, data


def show(tokenizer: Tokenizer, text: str) -> None:
    """Print every step from text to ids and back."""
    write = lambda some: "".join(SYMBOL[byte] for byte in some)  # noqa: E731
    row = lambda ids: " ".join(write(tokenizer.bytes[i]) for i in ids if i is not None)  # noqa: E731

    print(f"{text!r}\n\n1. cut into pieces, as bytes written in symbols, and 2. merged into tokens with ids:")
    pieces = pattern().findall(text)
    for piece in pieces:
        ids = tokenizer.encode_piece(piece)
        print(f"   {piece!r:18} {write(utf8(piece)):18} {row(ids):20} {ids}")
    longest = max(pieces, key=len, default="")
    print(f"\n   {longest!r}, merge by merge (the pair that stands first in merges.txt goes first):")
    ids = [tokenizer.byte_id[byte] for byte in utf8(longest)]
    for rank in tokenizer.merge(ids):
        print(f"   merge {rank:6,}: {row(ids)}")
    ids = tokenizer.encode(text)
    back = tokenizer.decode(ids)
    print(f"\n3. {len(text)} characters, {len(utf8(text))} bytes, {len(ids)} tokens: {ids}")
    print(f"4. decoded: {'the same text' if back == text else repr(back)}\n")
    print(f"{END} as a token: {tokenizer.encode(END)}, as plain text: {tokenizer.encode(END, special=False)}")
    broken = tokenizer.byte_id[0xE4]
    print(f"the first byte of a three-byte character, alone: id {broken}, decoded {tokenizer.decode([broken])!r}")


def main() -> None:
    parser = utils.parser(__doc__, __file__)
    add = parser.add_argument
    add("text", nargs="?", default=SAMPLE, help="what to encode")
    add("--file", help="count the tokens of this text file (or pydocs), first 90 %% and last 10 %%")
    add("--data", help="gpt2, a folder with vocab.json and merges.txt, or what to learn a vocabulary from: pydocs or a "
        "text file; without it gpt2, or pydocs if that is out of reach")
    add("--vocab-size", type=utils.count, default=2000, help="tokens to learn; more make a text shorter, and a model's "
        "embedding larger")
    args = utils.parse_args(parser)

    tokenizer, name = get_tokenizer(args.data, args.vocab_size, args.out)
    print(f"{name}: {len(tokenizer.vocab):,} tokens, {len(tokenizer.merges):,} merges\n")
    if not args.file:
        show(tokenizer, args.text)
    else:
        text, start = read_text(args.file), time.perf_counter()
        n = int(0.9 * len(text))
        counts = [len(tokenizer.encode(part)) for part in (text[:n], text[n:])]
        seconds, each = time.perf_counter() - start, len(text) / max(1, sum(counts))
        print(f"{args.file}: {len(text):,} characters, {counts[0]:,} tokens in the first 90 % and {counts[1]:,} in the "
              f"last 10 %, {each:.2f} characters per token; {seconds:.2f} s")
    if args.data is None and name != "gpt2":
        utils.stand_in_notice("a vocabulary learned from Python's manual", "GPT-2")


if __name__ == "__main__":
    utils.run(main)
