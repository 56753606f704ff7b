"""Byte-pair encoding: how GPT-2 turns any text into numbers below 50,257, and how such a vocabulary is learned.

You learn here: why tokens are neither characters nor words; how 256 bytes and a ranked list of 50,000 merges cover
every text there is; how the merges are found by counting; and why a text from a user must not contain <|endoftext|>.

    python 06_finetune/bpe.py "some text"         GPT-2's own tokens (vocab.json, merges.txt: 1.5 MB)
    python 06_finetune/bpe.py --data novel.txt    learn a vocabulary from a text (pydocs: Python's manual)

You should see (one core of an AMD EPYC, Python 3.11): " tokenization" takes 11 merges to become " token", "ization";
--data pydocs 1,743 merges from 465,126 characters in 0.6 s.
Writes: with --data pydocs or a text, vocab.json and merges.txt in outputs/, which transformers' GPT2Tokenizer opens.
Left out on purpose: normalisation and dropout of merges; padding; offsets into the text. Letters that Unicode gained
after this Python was made are cut as signs; others may cut them as letters.
"""

import contextlib
import functools
import json
import re
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from heapq import heapify, heappop, heappush
from itertools import chain
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils

# No tensors here: ids are lists of int. A piece is what the pattern cuts out, a token what has an id.

URL = "https://huggingface.co/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/"
SHA256 = {"vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
          "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"}
END = "<|endoftext|>"  # stood between two documents in GPT-2's training; id 50256
LEARNED = "a vocabulary learned from Python's manual"  # the stand-in
SAMPLE = "Hello world! We're testing tokenization in 2024: na\u00efve \u4f60\u597d \U0001f642"



# ---------------------------------------------------------------------------------------------- text to pieces
GPT2_CUTS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Python's \s and isspace also hold \x1c to \x1f, the separators of old tape formats; Unicode's White_Space does not.
WHITE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f")


@functools.cache
def pattern(cuts: str = GPT2_CUTS) -> re.Pattern:
    """The expression that cuts a text into pieces; no merge ever crosses a cut. Made on first use, then kept.

    ## Without cuts the most frequent pairs would be of the kind "e " and ". T", and "dog", "dog." and "dog!" would be
    ## three unrelated tokens. GPT-2 (Radford et al. 2019, section 2.2; encoder.py of its code) cuts into words: endings
    ## as in "we'll"; a run of letters, of numbers, or of anything else that is seen, each with the one space before it;
    ## white space. \\s+(?!\\S) leaves the last of several spaces to the word after it.
    ## Python's re has no \\p{L} (letters of any script) and \\p{N} (numbers). But unicodedata knows each character's
    ## category, two letters such as Lu or Nd, and a character class made of all ranges of L.. is just what \\p{L} is.
    """
    ## Planes 4 to 16 hold no letters: unassigned, tags, private use. Leaving them out saves three quarters of the time.
    categories = "".join(map(unicodedata.category, map(chr, range(0x40000))))  # two letters for each code point
    cuts = re.sub(r"(\[.*?])|(\\p{.}|\\s)", lambda some: some[1] or f"[{some[2]}]", cuts.replace(r"\S", r"[^\s]"))
    for kind in "LN":
        cuts = cuts.replace(rf"\p{{{kind}}}", "".join(f"{chr(run.start() // 2)}-{chr(run.end() // 2 - 1)}"
                                                      for run in re.finditer(f"(?:{kind}.)+", categories)))
    return re.compile(cuts.replace(r"\s", WHITE))


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


# ---------------------------------------------------------------------------------------------- added tokens
class Added(NamedTuple):
    """A token that is looked for in the text itself: nothing cuts it, and no merge makes it."""

    id: int
    special: bool = True  # it tells the model something, as <|endoftext|> does
    lstrip: bool = False  # it takes the white space before it along
    rstrip: bool = False  # and the white space after it
    single_word: bool = False  # no letter, digit or _ may touch it
    normalized: bool = False  # it is looked for in the normalized text


# Letters in circles and squares, and joiners: no letters by category, but in Unicode's own \w.
OTHER_LETTERS = re.compile("[\u200c\u200d\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]")


def in_word(c: str) -> bool:
    """Whether c is one of the characters that words are made of; an empty string is not."""
    return c != "" and bool(re.match("[LM]|Nd|Nl|Pc", unicodedata.category(c)) or OTHER_LETTERS.match(c))


class AddedTokens:
    """Finds added tokens in a text: the leftmost first, and of those that begin at the same place the longest."""

    def __init__(self, tokens: dict[str, Added]):
        self.tokens = tokens
        self.find = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    def split(self, text: str, special: bool = True) -> Iterator[tuple[int, int, int | None]]:
        """Yield (start, end, id) for each token, (start, end, None) for text between them. special: see encode."""
        done = 0
        for match in self.find.finditer(text) if self.tokens else ():
            (start, end), token = match.span(), self.tokens[match[0]]
            if token.special and not special or token.single_word and (
                    in_word(text[start - 1 : start]) or in_word(text[end : end + 1])):
                continue
            while token.lstrip and start > done and text[start - 1] in WHITE:
                start -= 1
            while token.rstrip and end < len(text) and text[end] in WHITE:
                end += 1
            if done < start:
                yield done, start, None
            yield start, end, token.id
            done = end
        if done < len(text):
            yield done, len(text), None


# ---------------------------------------------------------------------------------------------- pieces to tokens
class Tokenizer:
    """Encode and decode with a vocabulary {token: id} and merges [(left, right), ...], both in byte symbols.

    added: tokens to find in the text; None: <|endoftext|>, if the vocabulary has it. The rest is for GPT-2's relatives.
    cuts: see pattern. normalize: what happens to a text first. prefix_space: whether a text gets a space before it.
    before, after: ids around each text. whole: whether a piece that is a token is not merged from its bytes.
    Raises KeyError for a merge of what is not in the vocabulary.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], added: dict[str, Added] | None = None,
                 cuts: str = GPT2_CUTS, normalize: Callable[[str], str] | None = None, prefix_space: bool = False,
                 before: Iterable[int] = (), after: Iterable[int] = (), whole: bool = False):
        if added is None:
            added = {END: Added(vocab[END])} if END in vocab else {}
        self.added = {token: some.id for token, some in added.items()}  # token -> id
        self.made_of, self.vocab, self.merges = vocab, vocab | self.added, merges  # no merge makes an added token
        self.cuts, self.normalize, self.prefix_space, self.whole = cuts, normalize, prefix_space, whole
        self.before, self.after = list(before), list(after)
        self.end = self.vocab.get(END)  # id of what stands between documents, None: nothing does
        self.max_length: int | None = None  # how many tokens the model was made for, None: not known
        self.raw = AddedTokens({token: some for token, some in added.items() if not some.normalized})
        self.normal = AddedTokens({normalize(token) if normalize else token: some
                                   for token, some in added.items() if some.normalized})
        self.byte_id = [vocab.get(SYMBOL[byte]) for byte in range(256)]
        self.rank = {(vocab[left], vocab[right]): rank for rank, (left, right) in enumerate(merges)}
        self.made = [vocab[left + right] for left, right in merges]  # rank of a merge -> id of what it makes
        ## Text repeats itself: Tiny Shakespeare is 297,833 pieces, 15,057 of them different. Merge each once.
        self.remembered = functools.lru_cache(1_000_000)(self.encode_piece)

    @functools.cached_property
    def bytes(self) -> dict[int, bytes]:
        """The bytes of each id; an added token's are those of its text."""
        symbols, known = {ord(symbol): byte for symbol, byte in BYTE.items()}, {}
        for token, i in self.vocab.items():
            own = token in self.added or not BYTE.keys() >= set(token)
            known[i] = token.encode() if own else token.translate(symbols).encode("latin-1")
        return known

    @classmethod
    def from_files(cls, vocab_path: Path | str, merges_path: Path | str) -> "Tokenizer":
        """Read GPT-2's two files; see read_files."""
        return cls(*read_files(vocab_path, merges_path))

    def save(self, folder: Path | str) -> None:
        """Write vocab.json and merges.txt in GPT-2's format, byte for byte the originals if those were read."""
        merges = "".join(line + "\n" for line in ["#version: 0.2", *map(" ".join, self.merges)])
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            (Path(folder) / name).unlink(missing_ok=True)  # what another tokenizer left there would count for this one
        for name, text in ("vocab.json", json.dumps(self.vocab)), ("merges.txt", merges):
            utils.write_atomically(Path(folder) / name, lambda file: file.write(text.encode()))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Text to ids. Raises utils.InputError for a lone surrogate.

        special: whether <|endoftext|> in the text becomes its one id, as it does in transformers by default.

        ## With special=False it is seven ordinary tokens. Use that for text that others wrote: the one id tells the
        ## model that a document is over and what stood before no longer matters, which is not for strangers to say.
        """
        ids, find = list(self.before), pattern(self.cuts).findall
        for part, i in self.parts(text, special):
            if i is not None:
                ids.append(i)
            else:
                ids += chain.from_iterable(map(self.remembered, find(part)))
        return ids + self.after

    def parts(self, text: str, special: bool) -> Iterator[tuple[str, int | None]]:
        """Yield each added token with its id, and each text between two of them, normalized, with None."""
        for start, end, i in self.raw.split(text, special):
            part = text[start:end]
            if i is not None or not (self.normalize or self.normal.tokens or self.prefix_space):
                yield part, i
                continue
            part = self.normalize(part) if self.normalize else part
            for a, b, j in self.normal.split(part, special):
                space = self.prefix_space and j is None and part[a] != " "
                yield " " * space + part[a:b], j

    def encode_piece(self, piece: str) -> list[int]:
        """Ids of one piece: its bytes, merged until no pair in it is in the list."""
        data = utf8(piece)
        if self.whole and (known := self.made_of.get("".join(SYMBOL[byte] for byte in data))) is not None:
            return [known]
        ids = [self.byte_id[byte] for byte in data if self.byte_id[byte] is not None]  # as others do, when one has none
        for _ in self.merge(ids):
            pass
        return [i for i in ids if i is not None]

    def merge(self, ids: list[int | None]) -> Iterator[int]:
        """Merge ids in place, one pair after another; a hole (None) is left beside each. Yields each merge's rank.

        ## The rule: of all neighbours, merge the pair that stands first in the list of merges (the leftmost, if it
        ## occurs twice), and begin again. So the text is put together in the order in which training found the pairs.
        ## Looking at all n pairs each time takes up to n^2 steps. A heap hands out the lowest rank in log n steps
        ## instead, and `before` and `after` step over the holes.
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


# ---------------------------------------------------------------------------------------------- files
def read_files(vocab_path: Path | str, merges_path: Path | str, named: Iterable[str] = ()
               ) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocab, merges) from GPT-2's two files. Raises utils.InputError for one that is damaged or unfit for the other.

    named: the tokens that no merge makes; by default <|endoftext|>, which then has to be there.
    """
    advice = "take both files from the same place, such as GPT-2's."
    text, merges = read_text(vocab_path), []
    try:
        vocab = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise utils.InputError(f"{vocab_path} is not JSON, or was cut short; {advice}") from error
    for number, line in enumerate(read_text(merges_path).splitlines(), 1):
        pair = tuple(line.split(" "))
        if line and not (number == 1 and line.startswith("#version")):  # "#" may also begin a merge
            if len(pair) != 2 or not all(pair):
                raise utils.InputError(f"{merges_path}, line {number}: {line[:40]!r} is not two symbols with a "
                                       f"space between them; {advice}")
            merges.append(pair)
    numbers = isinstance(vocab, dict) and all(type(i) is int for i in vocab.values())
    if not numbers or sorted(vocab.values()) != list(range(len(vocab))):
        raise utils.InputError(f"{vocab_path} must map tokens to the ids 0, 1, 2 ..., each once; {advice}")
    needed = {*BYTE, *map("".join, merges), *([] if named else [END])}
    wrong = needed - vocab.keys() | vocab.keys() - needed - {END, *named}
    wrong |= {symbol for pair in merges for symbol in pair} - needed
    if wrong:
        raise utils.InputError(f"{vocab_path} and {merges_path} don't fit each other: {min(wrong)!r} is in one of "
                               f"them only; {advice[:-1]}, or name an added token in tokenizer_config.json.")
    return vocab, merges


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


def read_text(path: Path | str) -> str:
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


def read_own(path: Path | str) -> str:
    """read_text for what people bring along: UTF-16 with its mark is read too, and cp1252, which is said.

    ## cp1252, Windows' older encoding for western Europe, has a character for nearly every byte. So a file that is not
    ## UTF-8 and holds no control characters is most likely of that kind.
    """
    try:
        return read_text(path)
    except utils.InputError as error:
        if not isinstance(error.__cause__, UnicodeDecodeError):
            raise
        data = error.__cause__.object
        name = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
        if name == "cp1252" and re.search(rb"[\0-\x08\x0e-\x1f\x81\x8d\x8f\x90\x9d]", data):
            raise
        with contextlib.suppress(UnicodeDecodeError):
            text = data.decode(name)
            print(f"{path} is not UTF-8 (byte {error.__cause__.start}), and is read as {name}")
            return text
        raise


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
        utils.stand_in_notice(LEARNED, "GPT-2")
    text, start = read_text(data), time.perf_counter()
    tokenizer = Tokenizer(*train_bpe(text, vocab_size))
    seconds = time.perf_counter() - start
    tokenizer.save(out)
    print(f"learned {len(tokenizer.merges):,} merges from {len(text):,} characters in {seconds:.1f} s, the first:",
          ", ".join(repr(tokenizer.decode([256 + i])) for i in range(min(12, len(tokenizer.merges)))))
    print(f"wrote {out / 'vocab.json'} and {out / 'merges.txt'}\n")
    return tokenizer, data


def show(tokenizer: Tokenizer, text: str) -> None:
    """Print every step from text to ids and back."""
    write = lambda some: "".join(SYMBOL[byte] for byte in some)  # noqa: E731
    row = lambda ids: " ".join(write(tokenizer.bytes[i]) for i in ids)  # noqa: E731

    print(f"{text!r}\n\n1. cut into pieces, as bytes written in symbols, and 2. merged into tokens with ids:")
    pieces = pattern(tokenizer.cuts).findall(text)
    for piece in pieces:
        ids = tokenizer.encode_piece(piece)
        print(f"   {piece!r:18} {write(utf8(piece)):18} {row(ids):20} {ids}")
    longest = max(pieces, key=len, default="")
    print(f"\n   {longest!r}, merge by merge (the pair that stands first in merges.txt goes first):")
    ids = [tokenizer.byte_id[byte] for byte in utf8(longest)]
    for rank in tokenizer.merge(ids):
        print(f"   merge {rank:6,}: {row(i for i in ids if i is not None)}")
    ids = tokenizer.encode(text)
    back = tokenizer.decode(ids)
    print(f"\n3. {len(text)} characters, {len(utf8(text))} bytes, {len(ids)} tokens: {ids}")
    print(f"4. decoded: {'the same text' if back == text else repr(back)}\n")
    print(f"{END} as a token: {tokenizer.encode(END)}, as plain text: {tokenizer.encode(END, special=False)}")


def main() -> None:
    parser = utils.parser(__doc__, __file__)
    add = parser.add_argument
    add("text", nargs="?", default=SAMPLE, help="what to encode")
    add("--data", help="gpt2, a folder with vocab.json and merges.txt, or what to learn a vocabulary from: pydocs or a "
        "text file; without it gpt2, or pydocs if that is out of reach")
    add("--vocab-size", type=utils.count, default=2000, help="tokens to learn; more make a text shorter, and a model's "
        "embedding larger")
    args = utils.parse_args(parser)

    tokenizer, name = get_tokenizer(args.data, args.vocab_size, args.out)
    print(f"{name}: {len(tokenizer.vocab):,} tokens, {len(tokenizer.merges):,} merges\n")
    show(tokenizer, args.text)
    if args.data is None and name != "gpt2":
        utils.stand_in_notice(LEARNED, "GPT-2")


if __name__ == "__main__":
    utils.run(main)
