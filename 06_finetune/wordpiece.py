"""WordPiece: how BERT turns a text into tokens, and how each token keeps its place in the text.

You learn here: what BERT throws away before it reads; how a word that is not in the vocabulary is put together from
pieces that are; what two texts in one sequence, padding, and a text that is too long look like to the network.

    python 06_finetune/wordpiece.py "some text"                    the tokens of BERT, DistilBERT and MiniLM (uncased)
    python 06_finetune/wordpiece.py "a question" --pair "a text"   two texts in one sequence
    python 06_finetune/wordpiece.py --data novel.txt               learn a vocabulary from a text (pydocs: the manual)

You should see: "Tokenization" as "token", "##ization", and a word in Ethiopic script as [UNK].
Writes: with --data pydocs or a text, vocab.txt and tokenizer_config.json to outputs/, for transformers' BertTokenizer.
Left out on purpose: finding out that a vocabulary has capitals, which tokenizer_config.json or lowercase=False says.
"""

import functools
import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from bpe import Added, AddedTokens, read_text, replace_pair

# Shapes: B batch, T time (tokens in the longest sequence). A chunk is what stands between white space, a word what BERT
# cuts chunks into, a piece what has an id.

URL = "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/resolve/main/vocab.txt"
SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
## Five tokens are no text. [CLS] opens a sequence, and what the network says there stands for all of it. [SEP] ends a
## text. [PAD] fills up the shorter sequences of a batch. [MASK] hid the words that BERT had to guess in pre-training.
## [UNK] stands for a word that no pieces make.
SPECIAL = PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
LONGEST = 100  # characters: a longer word is [UNK], as in BERT's code
SAMPLE = "Tokenization isn't magic: na\u00efve caf\u00e9s, unbelievably, \u4f60\u597d \u1230\u120b\u121d!"


# ---------------------------------------------------------------------------------------------- text to words
SPACES = r"\t\n\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
CHUNK, ASCII_WORD = re.compile(f"[^{SPACES}]+"), re.compile("[A-Za-z0-9]+|.")


def any_of(table: str) -> re.Pattern:
    """A pattern for one character from a table of code points in hexadecimal."""
    runs = [[chr(int(end, 16)) for end in run.split("-")] for run in table.split()]
    return re.compile("[" + "".join(f"{run[0]}-{run[-1]}" for run in runs) + "]")


# The tables below were made with Unicode 18, for the tokens of tokenizers 0.23. A Python that knows more marks or
# punctuation may cut a text elsewhere. No hole in BERT's own code at 2B820, but in the library of today.
CHINESE = any_of("3400-4dbf 4e00-9fff f900-faff 20000-2a6df 2a700-2b81f 2b920-2ceaf 2f800-2fa1f")
## Unicode says what is a mark and what is punctuation, and says it of more characters each year. The tokenizers library
## has kept to the tables of Unicode 8 (2015), in which these ranges hold nothing but letters and holes. Python goes
## with the times, so they are named here; so are four characters that have changed their kind.
ORDINARY = any_of("""5c8-5c9 61d 7fd 890-8e2 9fd-9fe a76 afa-aff b53-b55 c04-c3c c77 c84 d00 d3b-d3c d81 eba ece 1715
180f-1886 1abf-1af0 1b4e-1b4f 1b7d-1b7f 1df6-1dfb 2e43-2e63 a82c a8c5 a8ff a9bd 105c9-105e4 10d24-10f89 11070-11074
110c2-110cd 111cf 1123e-11241 1133b 11383-1145e 11660-1166c 116b9 1182f-11fff 12ff1-1612f 16d68-16f4f 16fe2-16ff1
1cf00-1d128 1d250-1d281 1e000-1e6f5 1e944-1e95f""")
ORDERED = any_of("8d4-8e1 1dfb 11442 11446 11c3f 1e000-1e02a 1e944-1e94a")  # its table of marks' order is Unicode 9's
CHANGED = {"\u166d": "punctuation", "\U000111c9": "punctuation", "\u1734": "mark", "\U0001171e": "mark"}


@functools.cache
def kind(c: str) -> str:
    """What BERT takes a character for: "none" (it goes), "mark", "punctuation", "chinese", or "" for all others.

    ## Every symbol of ASCII counts as punctuation, also $ and ^, which Unicode files under other signs. Chinese is
    ## written without spaces, so each of its characters is a word of its own; Japanese syllables and Korean are not.
    """
    category = unicodedata.category(c)
    if c in CHANGED or c in "\t\n\r" or ORDINARY.match(c):
        return CHANGED.get(c, "")
    if category in ("Cc", "Cf", "Co") or c == "\ufffd":  # control, format, private use; "here a character was lost"
        return "none"
    if category[0] == "P" or c.isascii() and c.isprintable() and not c.isalnum() and c != " ":
        return "punctuation"
    return "chinese" if CHINESE.match(c) else "mark" if category == "Mn" else ""


@functools.cache
def decompose(c: str) -> list[tuple[str, int]]:
    """The parts that Unicode makes of c (NFD), each with the class by which marks are sorted; 0: it stays in place."""
    parts = c if ORDINARY.match(c) else unicodedata.normalize("NFD", c)
    return [(part, 0 if ORDINARY.match(part) and not ORDERED.match(part) else unicodedata.combining(part))
            for part in parts]


def strip_accents(spots: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Without accents and other marks: (character, place) for each that stays.

    ## Unicode's decomposition (NFD) writes a letter with an accent as the letter and a mark after it. Then marks go.
    ## Marks in a row are sorted by their class, and the library counts places off in the new order. That shows only
    ## where a sorted sign is no mark and stays, as with musical notes; but offsets are to be equal there too.
    """
    parts, stays = [], 0  # (count of signs so far that stay in place, class, character, whether it is a further part)
    for c, _ in spots:
        for i, (part, order) in enumerate(decompose(c)):
            stays += order == 0
            parts.append((stays, order, part, i > 0))
    parts.sort(key=lambda part: part[:2])  # equals keep their order
    places, place, kept = iter(spots), 0, []
    for _, _, c, further in parts:
        place = place if further else next(places)[1]
        if kind(c) != "mark":
            kept.append((c, place))
    return kept


def normalized(chunk: str, lowercase: bool, strip: bool) -> list[tuple[str, int]]:
    """The characters that BERT sees, each with its place in the chunk; Chinese ones between spaces.

    ## BERT read its texts without capitals and accents: "The", "the" and "THE" are one word to learn instead of three,
    ## and what a search engine's users type has neither. What is lost with them: "Polish" and "polish" are the same.
    """
    spots = []
    for place, c in enumerate(chunk):
        if kind(c) != "none":
            spots += [(" ", place), (c, place), (" ", place)] if kind(c) == "chinese" else [(c, place)]
    if strip and not chunk.isascii():
        spots = strip_accents(spots)
    return [(small, place) for c, place in spots for small in c.lower()] if lowercase else spots


def words(spots: Iterable[tuple[str, int]]) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield the words among characters with their places: punctuation stands alone, a space ends a word."""
    word, places = "", []
    for c, place in spots:
        alone = c == " " or kind(c) == "punctuation"
        if alone and word:
            yield word, places
            word, places = "", []
        if not alone:
            word += c
            places.append(place)
        elif c != " ":
            yield c, [place]
    if word:
        yield word, places


def cut(chunk: str, lowercase: bool, strip: bool | None = None) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield BERT's words, each with its characters' places in the chunk. strip: accents go, None: where capitals go."""
    if chunk.isascii() and chunk.isprintable():  # the same in a third of the time
        for match in ASCII_WORD.finditer(chunk.lower() if lowercase else chunk):
            yield match[0], range(*match.span())
    else:
        yield from words(normalized(chunk, lowercase, lowercase if strip is None else strip))


# ---------------------------------------------------------------------------------------------- words to tokens
class Encoding(NamedTuple):
    ids: list[int]
    types: list[int]  # 0: [CLS], the first text and its [SEP]; 1: the second text and its [SEP]
    offsets: list[tuple[int, int]]  # which characters of its text, [start, end), a token stands for; (0, 0): none


class WordPiece:
    """Encode with the tokens of a vocab.txt, in the order of their ids.

    added: those to find in the text as they are; None: the special ones. strip: whether accents go; None: where
    capitals go. Raises utils.InputError where the special ones are not all among the names.
    """

    def __init__(self, names: list[str], lowercase: bool = True, strip: bool | None = None,
                 added: dict[str, Added] | None = None):
        self.names, self.lowercase, self.strip = names, lowercase, lowercase if strip is None else strip
        self.max_length: int | None = None  # how many tokens the model was made for, None: not known
        self.vocab = self.made_of = {name: i for i, name in enumerate(names)}  # words are made of all, or of fewer
        for name in SPECIAL:
            if name not in self.vocab:
                raise utils.InputError(f"the vocabulary has no {name}, which every one of BERT's has; take vocab.txt "
                                       "from where the model's weights are from.")
        self.pad, self.unk, self.cls, self.sep, self.mask = (self.vocab[name] for name in SPECIAL)
        self.longest = max(map(len, names))
        added = {name: Added(self.vocab[name]) for name in SPECIAL} if added is None else added
        self.added = {name: some.id for name, some in added.items()}  # token -> id
        self.raw = AddedTokens({name: some for name, some in added.items() if not some.normalized})
        self.normal = AddedTokens({"".join(c for c, _ in normalized(name, lowercase, self.strip)): some
                                   for name, some in added.items() if some.normalized})
        ## Words repeat themselves, so each chunk is cut once and remembered. Without the limit a server would fill its
        ## memory in the end.
        self.remembered = functools.lru_cache(1_000_000)(self.encode_chunk)

    @classmethod
    def load(cls, path: Path | str) -> "WordPiece":
        """Read vocab.txt, given by its path or its folder's. Raises utils.InputError where it can't be used.

        Whether capitals and accents go, tokenizer_config.json beside it says; they do if there is none.
        """
        path = Path(path) / "vocab.txt" if Path(path).is_dir() else Path(path)
        config, config_path = {}, path.with_name("tokenizer_config.json")
        try:
            names = read_names(path)
            if config_path.exists():
                config = dict(json.loads(config_path.read_bytes()))
        except (OSError, RecursionError, TypeError, ValueError) as error:
            raise utils.InputError(f"{path} or the tokenizer_config.json beside it can't be read "
                                   f"({type(error).__name__}); put the model's own there.") from error
        lowercase = config.get("do_lower_case") is not False
        ## In BERT accents go where capitals go, and each Chinese character is a word. A model may have it otherwise.
        if config.get("strip_accents") not in (None, lowercase) or not config.get("tokenize_chinese_chars", True):
            raise utils.InputError(f"{config_path}: strip_accents or tokenize_chinese_chars is not as in BERT, which "
                                   "is not supported here; take another model.")
        return cls(names, lowercase)

    def save(self, folder: Path | str) -> None:
        """Write vocab.txt, and in tokenizer_config.json whether capitals go."""
        config = {"tokenizer_class": "BertTokenizer", "do_lower_case": self.lowercase,
                  **({} if self.strip == self.lowercase else {"strip_accents": self.strip})}
        lines = "".join(name + "\n" for name in self.names)
        for name in ("tokenizer.json", "special_tokens_map.json", "added_tokens.json"):
            (Path(folder) / name).unlink(missing_ok=True)  # what another tokenizer left there would count for this one
        for name, text in ("vocab.txt", lines), ("tokenizer_config.json", json.dumps(config)):
            utils.write_atomically(Path(folder) / name, lambda file: file.write(text.encode()))

    def pieces(self, word: str) -> list[tuple[int, int]]:
        """(id, length in characters) for each piece of a word.

        ## Take the longest piece that the word begins with, then the longest that goes on from there (written with ##),
        ## until the word is used up. Where nothing fits, the whole word is [UNK], not the rest of it: pieces of a word
        ## that can't be finished would be noise. A greedy search misses what a better one would find: with the pieces
        ## "abc", "ab" and "##cd", the word "abcd" is [UNK].
        """
        found, start = [], 0
        while start < len(word) <= LONGEST:
            for end in range(min(len(word), start + self.longest), start, -1):
                i = self.made_of.get("##" * (start > 0) + word[start:end])
                if i is not None:
                    break
            else:
                return [(self.unk, len(word))]
            found.append((i, end - start))
            start = end
        return found or [(self.unk, len(word))]

    def encode_chunk(self, chunk: str, special: bool = True) -> tuple[list[int], list[tuple[int, int]] | None]:
        """(ids, offsets in the chunk) of a text without white space; None: one token for all of it, as most have.

        ## Lower-casing and decomposing change a text's length, so no token's own length says where it came from. The
        ## places do: they went along with the characters through all changes.
        """
        ids, offsets = [], []

        def add(found: Iterable[tuple[str, Sequence[int]]]) -> None:
            for word, places in found:
                start = 0
                for i, length in self.pieces(word):
                    ids.append(i)
                    offsets.append((places[start], places[start + length - 1] + 1))
                    start += length

        if self.normal.tokens:
            spots = normalized(chunk, self.lowercase, self.strip)
            for start, end, i in self.normal.split("".join(c for c, _ in spots), special):
                if i is None:
                    add(words(spots[start:end]))
                else:
                    ids.append(i)
                    offsets.append((spots[start][1], spots[end - 1][1] + 1))
        else:
            add(cut(chunk, self.lowercase, self.strip))
        return ids, None if offsets == [(0, len(chunk))] else offsets

    def encode_text(self, text: str, special: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, offsets) of a text, without [CLS] and [SEP]; see encode."""
        ids, offsets, remembered = [], [], self.remembered
        for start, end, i in self.raw.split(text, special):
            if i is not None:
                ids.append(i)
                offsets.append((start, end))
                continue
            for match in CHUNK.finditer(text, start, end):
                found, places = remembered(match[0], special)
                ids += found
                if places is None:
                    offsets.append(match.span())
                else:
                    at = match.start()
                    offsets += [(at + a, at + b) for a, b in places]
        return ids, offsets

    def tokens(self, text: str, special: bool = True) -> list[str]:
        """The pieces as they stand in vocab.txt, without [CLS] and [SEP]."""
        return [self.names[i] for i in self.encode_text(text, special)[0]]

    def encode(self, text: str, max_length: int | None = None, special: bool = True) -> Encoding:
        """[CLS] text [SEP], cut to max_length tokens in all.

        special: whether the text "[SEP]" becomes the token, as in transformers by default. Use special=False for what
        others wrote: where a text ends is not for strangers to say.
        """
        ids, offsets = self.encode_text(text, special)
        room = None if max_length is None else max(0, max_length - 2)
        return self.join((ids[:room], offsets[:room]))

    def windows(self, text: str, pair: str, max_length: int, stride: int, special: bool = True) -> list[Encoding]:
        """[CLS] text [SEP] a part of pair [SEP], in as many windows as it takes, of max_length tokens at most.

        stride: how many tokens each window has in common with the next. Raises utils.InputError where text leaves too
        little room.

        ## For question answering nothing may be cut off: the answer could be there. Windows overlap, so that an answer
        ## on a border is whole in one of them, if it is no longer than what they share.
        """
        first, second = self.encode_text(text, special), self.encode_text(pair, special)
        room = max_length - 3 - len(first[0])
        if stride < 0 or room <= stride:
            raise utils.InputError(f"{len(first[0])} tokens leave {max(room, 0)} of {max_length} for the second text, "
                                   f"too few for windows that share {stride}; shorten the first, or change the "
                                   "numbers.")
        n = len(second[0])
        starts = range(0, max(n - stride, 1), room - stride)  # up to the first window that reaches the end
        return [self.join(first, (second[0][i : i + room], second[1][i : i + room])) for i in starts]

    def join(self, first: tuple[list[int], list], second: tuple[list[int], list] | None = None) -> Encoding:
        """[CLS] first [SEP], or [CLS] first [SEP] second [SEP], of (ids, offsets) each."""
        ids, offsets = [self.cls, *first[0], self.sep], [(0, 0), *first[1], (0, 0)]
        types = [0] * len(ids)
        if second is not None:
            ids, offsets = [*ids, *second[0], self.sep], [*offsets, *second[1], (0, 0)]
            types += [1] * (len(ids) - len(types))
        return Encoding(ids, types, offsets)

    def decode(self, ids: Iterable[int]) -> str:
        """Tokens with spaces between words: not the text, for that is lost.

        ## Where the very characters matter, as in an answer, cut them out of the text at the tokens' offsets.
        """
        return " ".join(self.names[i] for i in ids).replace(" ##", "")


def pad(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Lists of ids as one tensor: ids (B, T) int64, and mask (B, T) bool, True where there is a token.

    ## A tensor is rectangular, texts are not. The mask tells attention where to look away.
    """
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_id)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]  # (B, T), (B, T)


# ---------------------------------------------------------------------------------------------- learning a vocabulary
def train_wordpiece(text: str, vocab_size: int, lowercase: bool = True) -> list[str]:
    """Learn the lines of a vocab.txt from a text: the special tokens, its characters, and what they are merged to.

    At most vocab_size of them; fewer where no pair is left that occurs twice. Raises utils.InputError where vocab_size
    is too small for the characters.

    ## Pieces are merged as in byte-pair encoding (bpe.py): count all pairs of neighbours in all words, make the most
    ## frequent one a piece of its own, replace it everywhere, repeat. So does Hugging Face's trainer for WordPiece. The
    ## original one (Schuster & Nakajima 2012, section 3) takes the pair that makes the text likeliest instead; Google
    ## has not published its code for BERT, and Hugging Face's course guesses at a score for it,
    ##     count(ab) / (count(a) count(b)),
    ## which prefers pairs whose halves hardly occur alone. What is learned here is the list of pieces alone: encoding
    ## goes by the longest piece and knows no order of merges.
    """
    counts, where, weights = Counter(), defaultdict(set), Counter()
    for chunk, n in Counter(CHUNK.findall(text)).items():
        for word, _ in cut(chunk, lowercase):
            weights[word] += n
    alone, joined = (sorted(set("".join(word for word in weights if len(word) >= n))) for n in (1, 2))
    names = [*SPECIAL, *alone, *("##" + letter for letter in joined)]
    if vocab_size < len(names):
        raise utils.InputError(f"vocab_size {vocab_size} must be at least {len(names)}: this text has {len(alone)} "
                               f"different characters, {len(joined)} of them inside words.")
    ids = {name: i for i, name in enumerate(names)}
    words = [[ids["##" * (i > 0) + letter] for i, letter in enumerate(word)] for word in weights]
    weights = list(weights.values())

    def count(w: int, sign: int) -> None:
        for pair in zip(words[w], words[w][1:]):
            counts[pair] += sign * weights[w]
            where[pair].add(w)

    for w in range(len(words)):
        count(w, 1)
    while len(names) < vocab_size and counts:
        most = max(counts.values())
        if most < 2:
            break
        pair = min(pair for pair, n in counts.items() if n == most)  # of equals the one with the smaller ids
        new = names[pair[0]] + names[pair[1]].removeprefix("##")
        if new not in ids:  # else two ways lead to the same piece
            ids[new] = len(names)
            names.append(new)
        for w in where.pop(pair):  # the words that hold the pair, or once did
            count(w, -1)
            words[w] = replace_pair(words[w], pair, ids[new])
            count(w, 1)
        del counts[pair]
    return names


# ---------------------------------------------------------------------------------------------- which vocabulary
def read_names(path: Path | str) -> list[str]:
    """The lines of a vocab.txt. Raises utils.InputError where it can't be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise utils.InputError(f"{path} can't be read ({type(error).__name__}); put the model's own there.") from error


def get_tokenizer(data: str | None, vocab_size: int, out: Path) -> tuple[WordPiece, str, str]:
    """The tokenizer that --data asks for, its name, and what it stands in for; one learned here is written to out."""
    if data and (Path(data).is_dir() or Path(data).name == "vocab.txt"):
        return WordPiece.load(data), data, ""
    if data in (None, "minilm"):
        try:
            path = utils.download([URL], utils.DATA_DIR / "minilm" / "vocab.txt", SHA256)
            return WordPiece.load(path), "minilm", ""
        except ConnectionError as error:
            if data:  # asked for by name: never replaced by something else
                raise
            print(error)
    tokenizer = WordPiece(train_wordpiece(read_text(data or "pydocs"), vocab_size))
    tokenizer.save(out)
    print(f"wrote {out / 'vocab.txt'}; the last tokens learned: {', '.join(tokenizer.names[-8:])}")
    return tokenizer, data or "pydocs", "" if data else "BERT"


def main() -> None:
    parser = utils.parser(__doc__, __file__)
    add = parser.add_argument
    add("text", nargs="?", default=SAMPLE, help="what to encode")
    add("--pair", help="a second text for the same sequence")
    add("--data", help="minilm, a folder with vocab.txt or that file, or what to learn a vocabulary from: pydocs or a "
        "text file; without it minilm, or pydocs if that is out of reach")
    add("--vocab-size", type=utils.count, default=2000, help="tokens to learn, with --data pydocs or a text; more make "
        "a text shorter, and a model's embedding larger")
    args = utils.parse_args(parser)
    tokenizer, name, stand_in = get_tokenizer(args.data, args.vocab_size, args.out)
    notice = "a vocabulary learned from Python's manual"
    utils.stand_in_notice(notice, stand_in)
    print(f"{name}: {len(tokenizer.names):,} tokens, {'without' if tokenizer.lowercase else 'with'} capitals\n")
    print(f"{args.text!r}\n\n1. cut into words, and 2. each word into the longest pieces that fit, with ids:")
    for chunk in CHUNK.findall(args.text):
        for word, _ in cut(chunk, tokenizer.lowercase):
            ids = [i for i, _ in tokenizer.pieces(word)]
            print(f"   {word!r:18} {' '.join(tokenizer.names[i] for i in ids):28} {ids}")
    texts = [text for text in (args.text, args.pair) if text is not None]
    encoding = tokenizer.join(*(tokenizer.encode_text(text, special=False) for text in texts))
    print("\n3. with the special tokens: id, which text, and the characters that each token stands for")
    for i, which, (start, end) in zip(*encoding):
        print(f"   {tokenizer.names[i]:14} {i:6} {which:3} {texts[which][start:end]!r}")
    print(f"\n4. decoded: {tokenizer.decode(encoding.ids)}")
    utils.stand_in_notice(notice, stand_in)


if __name__ == "__main__":
    utils.run(main)
