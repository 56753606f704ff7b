"""06_finetune/bpe.py against transformers' GPT-2 tokenizer, the `tokenizers` trainer, and files that are wrong."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import unicodedata

import pytest
from conftest import REAL, ROOT, call_main, chapter

import utils

bpe = chapter("06_finetune", "bpe")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")  # comes with transformers
PYDOCS = bpe.read_text("pydocs")
SCRIPT = ROOT / "06_finetune" / "bpe.py"
STRINGS = 100_000


def oracles(folder):
    """transformers' tokenizers on folder's two files: two classes in version 4, one since version 5."""
    classes = {transformers.GPT2Tokenizer, transformers.GPT2TokenizerFast}
    return [c(str(folder / "vocab.json"), str(folder / "merges.txt")) for c in classes]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A vocabulary learned from Python's manual and from some text of other scripts: (ours, theirs, folder)."""
    folder = tmp_path_factory.mktemp("trained")
    foreign = " ".join(chr(i) for i in range(0xA1, 0x3000) if unicodedata.category(chr(i))[0] in "LNM") * 3
    bpe.Tokenizer(*bpe.train_bpe(PYDOCS[:200_000] + foreign, 2000)).save(folder)
    return bpe.Tokenizer.from_files(folder / "vocab.json", folder / "merges.txt"), oracles(folder), folder


@pytest.fixture(scope="module")
def gpt2():
    folder = REAL / "gpt2"
    return bpe.Tokenizer.from_files(folder / "vocab.json", folder / "merges.txt"), oracles(folder), folder


def same_tokens(ours, theirs, texts):
    """All texts get equal ids, from each oracle, and come back as they were."""
    mine = [ours.encode(text) for text in texts]
    for oracle in theirs:
        for text, a, b in zip(texts, mine, oracle(texts, return_attention_mask=False)["input_ids"], strict=True):
            assert a == b, f"{text!r}: {a} is not {b}"
    for text, ids in zip(texts, mine):
        assert ours.decode(ids, errors="strict") == text


# ---------------------------------------------------------------------------------------------- every code point
def cut(text):
    """The oracle's pieces."""
    pieces = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in pieces]


def known(c):
    """Whether the oracle's Unicode has c as a letter or a number: it stays in one piece with another one before it."""
    return 1 in (len(cut(f"a{c}")), len(cut(f"1{c}")))


def comparable_characters():
    """Every code point that this Python's Unicode has assigned; of letters and numbers those that the oracle knows."""
    kinds = {chr(i): unicodedata.category(chr(i)) for i in range(sys.maxunicode + 1)}
    new = {c for c, kind in kinds.items() if kind[0] in "LN" and unicodedata.ucd_3_2_0.category(c) == "Cn"}
    return [c for c, kind in kinds.items() if kind not in ("Cn", "Cs") and (c not in new or known(c))]


def among_others(characters):
    """Strings in which a wrong class of a character moves a cut.

    Letters stay with the a, numbers with the 1, all other things but white space with the space.
    """
    return ["".join(f"a{c}1{c} {c}b " for c in characters[i : i + 2000]) for i in range(0, len(characters), 2000)]


def without_private_use(characters):
    return [c for c in characters if unicodedata.category(c) != "Co"]  # 137,468, all of one class


def test_every_code_point_is_cut_as_the_oracle_cuts_it():
    """Pieces show what tokens may hide: rare characters are single bytes in any case, wherever the cut is."""
    characters = comparable_characters()
    assert len(characters) > 280_000
    for row in among_others(characters):
        assert bpe.pattern().findall(row) == cut(row)


def test_every_code_point(trained):
    ours, theirs, _ = trained
    same_tokens(ours, theirs, without_private_use(comparable_characters()))


@pytest.mark.real("gpt2/vocab.json")
def test_every_code_point_with_gpt2s_vocabulary(gpt2):
    characters = comparable_characters()
    same_tokens(*gpt2[:2], characters)
    same_tokens(*gpt2[:2], among_others(without_private_use(characters)))


def test_no_letters_beyond_the_planes_that_are_looked_at():
    assert not any(unicodedata.category(chr(i))[0] in "LN" for i in range(0x40000, sys.maxunicode + 1))


def test_the_cuts_are_those_of_gpt2s_own_expression():
    regex = pytest.importorskip("regex")  # what GPT-2's code uses; its Unicode may be newer, so only old characters
    theirs = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")
    known = [c for c in comparable_characters() if unicodedata.ucd_3_2_0.category(c) != "Cn"]
    for text in [PYDOCS, "".join(known), *random_strings(5000, seed=1, alphabet=known)]:
        assert bpe.pattern().findall(text) == theirs.findall(text)
        assert "".join(bpe.pattern().findall(text)) == text


# ---------------------------------------------------------------------------------------------- random strings
def random_strings(n, seed, alphabet):
    """n strings of up to about 40 characters that look like nothing in particular, and like every pitfall at once."""
    r = random.Random(seed)
    spaces = [" ", " ", "  ", "\n", "\t", "\r\n", "\x0b", "\x1c", "\x1f", "\x85", "\xa0", "\u200b", "\u180e", "\u3000"]
    endings = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "\u2019s", "' s", "''", "'"]
    words = ["the", "Hello", "na\u00efve", "\u4f60\u597d", "\u041f\u0440\u0438\u0432\u0435\u0442", "1984", "3.14",
             "\u0661\u0662", "\u00bd", "\u2167", "e\u0301", "\u0939\u093f\u0928\u094d\u0926\u0940", "_", "--", "...",
             "\U0001f642", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\ufffd", "\x00"]
    makers = [
        lambda: r.choice(spaces) * r.choice((1, 1, 2, 5)),
        lambda: r.choice(endings),
        lambda: r.choice(words),
        lambda: "".join(r.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ", k=r.randrange(1, 9))),
        lambda: "".join(r.choices("0123456789", k=r.randrange(1, 6))),
        lambda: "".join(r.choices(alphabet, k=r.randrange(1, 4))),  # characters of every kind
        lambda: r.choice("!\"#$%&()*+,-./:;<=>?@[\\]^_`{|}~") * r.choice((1, 1, 3)),
        lambda: r.choice(("<|endoftext|>", "<|endoftext", "<|", "|>")),
    ]
    weights = [6, 2, 4, 6, 2, 4, 2, 1]
    return ["".join(make() for make in r.choices(makers, weights, k=r.randrange(10))) for _ in range(n)]


def test_random_strings(trained):
    same_tokens(*trained[:2], random_strings(STRINGS // 10, 0, comparable_characters()))


@pytest.mark.real("gpt2/vocab.json")
def test_a_hundred_thousand_random_strings_with_gpt2s_vocabulary(gpt2):
    same_tokens(*gpt2[:2], random_strings(STRINGS, 0, comparable_characters()))


def test_long_pieces_are_merged_as_the_oracle_does_it_and_in_no_time(trained, monkeypatch):
    r, ours, looks = random.Random(0), trained[0], 0
    texts = ["".join(r.choices(letters, k=20_000)) for letters in ("a", "-", "ab", "etaoinshr", "0123456789", " ")]
    same_tokens(*trained[:2], texts)

    class Counting(dict):
        def get(self, pair):
            nonlocal looks
            looks += 1
            return super().get(pair)

    monkeypatch.setattr(ours, "rank", Counting(ours.rank))
    counts = []
    for text in (texts[3][:2_000], texts[3]):
        looks = 0
        ours.encode_piece(text)
        counts.append(looks)
    assert 0 < 9 * counts[0] < counts[1] < 11 * counts[0]  # ten times as long, ten times as many


def test_merging_is_the_plain_rule_best_pair_first_leftmost_first(trained):
    ours = trained[0]
    for piece in random.Random(0).sample(sorted(set(bpe.pattern().findall(PYDOCS))), 300):
        ids = [ours.byte_id[byte] for byte in piece.encode()]
        while pairs := [pair for pair in zip(ids, ids[1:]) if pair in ours.rank]:
            best = min(pairs, key=ours.rank.get)
            i = list(zip(ids, ids[1:])).index(best)
            ids[i : i + 2] = [ours.made[ours.rank[best]]]
        assert ours.encode_piece(piece) == ids


# ---------------------------------------------------------------------------------------------- real texts
@pytest.mark.real("gpt2/vocab.json")
@pytest.mark.real("tinyshakespeare.txt")
def test_tiny_shakespeare(gpt2):
    ours, theirs, _ = gpt2
    text = (REAL / "tinyshakespeare.txt").read_text(encoding="utf-8")
    parts = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    assert [len(ours.encode(part)) for part in parts] == [301_966, 36_059]
    assert (len(bpe.pattern().findall(text)), len(set(bpe.pattern().findall(text)))) == (297_833, 15_057)
    same_tokens(ours, theirs, list(parts))


def test_pydocs(trained):
    same_tokens(*trained[:2], [PYDOCS])


@pytest.mark.real("gpt2/vocab.json")
def test_gpt2s_files_are_written_as_they_were_read_and_are_the_ones_named(gpt2, tmp_path):
    ours, _, folder = gpt2
    ours.save(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == bpe.SHA256[name]
    assert (len(ours.vocab), len(ours.merges), ours.vocab[bpe.END]) == (50257, 50000, 50256)


# ---------------------------------------------------------------------------------------------- special token, bytes
def test_endoftext_is_one_token_only_where_that_is_allowed(trained):
    ours, theirs, _ = trained
    text = f"{bpe.END}a  {bpe.END} b{bpe.END}{bpe.END}<|endoftext|"
    same_tokens(ours, theirs, [text, bpe.END, "", f"{bpe.END}\n\n"])
    end = ours.vocab[bpe.END]
    assert end == len(ours.vocab) - 1 and ours.encode(text).count(end) == 4
    plain = ours.encode(text, special=False)
    assert end not in plain and ours.decode(plain) == text
    without = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*map(str, (trained[2] / "vocab.json",
                                                                             trained[2] / "merges.txt"))))
    without.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert plain == without.encode(text).ids


def test_every_byte_has_its_symbol_and_its_id(trained):
    ours = trained[0]
    assert list(bpe.BYTE) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert bpe.SYMBOL[ord(" ")] == "\u0120" and len(bpe.OTHERS) == 68
    assert [ours.decode_bytes([ours.byte_id[byte]]) for byte in range(256)] == [bytes([byte]) for byte in range(256)]


def test_invalid_bytes_are_decoded_as_the_oracle_does_it(trained):
    ours, theirs, _ = trained
    r = random.Random(0)
    bad = [b"\xe4", b"\xe4\xbd", b"\xe4\xbdA", b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x80a"]
    bad += [bytes(r.choices([*range(256), *range(0x80, 0xF8)], k=r.randrange(1, 12))) for _ in range(3000)]
    for some in bad:
        ids = [ours.byte_id[byte] for byte in some]
        assert ours.decode_bytes(ids) == some
        for oracle in theirs:
            assert ours.decode(ids) == oracle.decode(ids, clean_up_tokenization_spaces=False)
    ids = [ours.byte_id[0xE4], ours.vocab[bpe.END], ours.byte_id[0xBD]]  # the rest of a character comes too late
    assert ours.decode(ids) == f"\ufffd{bpe.END}\ufffd"
    with pytest.raises(UnicodeDecodeError):
        ours.decode(ids, errors="strict")
    for _ in range(300):  # any tokens at all
        ids = r.choices(range(len(ours.vocab)), k=20)
        for oracle in theirs:
            assert ours.decode(ids) == oracle.decode(ids, clean_up_tokenization_spaces=False)


def test_what_cannot_be_encoded_or_decoded_is_said(trained):
    ours = trained[0]
    for text in ("\ud800", "a \udcff b", "\ud83d\ude42"):
        with pytest.raises(utils.InputError, match="U\\+D[89C]"):
            ours.encode(text)
        with pytest.raises(utils.InputError, match="surrogate"):
            bpe.train_bpe(text, 300)
    for i in (-1, len(ours.vocab)):
        with pytest.raises(utils.InputError, match=f"token id {i} is not in the vocabulary"):
            ours.decode([i])


# ---------------------------------------------------------------------------------------------- learning merges
def their_merges(text, vocab_size):
    """What Hugging Face's trainer learns from text, with the same cuts."""
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, initial_alphabet=alphabet, special_tokens=[bpe.END],
        show_progress=False))
    merges = json.loads(theirs.to_str())["model"]["merges"]
    return [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in merges]


@pytest.mark.parametrize("size", [257, 300, 4000])
def test_training_learns_the_merges_that_hugging_faces_trainer_learns(size):
    vocab, merges = bpe.train_bpe(PYDOCS, size)
    assert merges == their_merges(PYDOCS, size)
    assert len(vocab) == size and list(vocab) == [*bpe.BYTE, *map("".join, merges), bpe.END]


def test_training_to_the_end_on_small_texts_and_with_many_ties():
    r = random.Random(0)
    for _ in range(50):
        text = "".join(r.choices("ab  c", k=300))
        vocab, merges = bpe.train_bpe(text, 600)
        assert merges == their_merges(text, 600)
        assert bpe.Tokenizer(vocab, merges).decode(bpe.Tokenizer(vocab, merges).encode(text)) == text
    assert bpe.train_bpe("", 300)[1] == [] and bpe.train_bpe("abc", 300)[1] == []  # no pair twice
    with pytest.raises(utils.InputError, match="vocab_size 256"):
        bpe.train_bpe("abc", 256)


def test_training_against_counting_everything_anew():
    """The textbook's few lines, without bookkeeping, on the rule for ties: most frequent, then smallest ids."""
    text = PYDOCS[:20_000]
    words = [[bpe.SYMBOL[byte] for byte in piece.encode()] for piece in bpe.pattern().findall(text)]
    order, expected = {symbol: i for i, symbol in enumerate(bpe.BYTE)}, []
    for _ in range(60):
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], order[pair[0]], order[pair[1]]))
        expected.append(best)
        order["".join(best)] = len(order)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    assert bpe.train_bpe(text, 257 + 60)[1] == expected


def test_transformers_opens_a_folder_that_was_saved(trained):
    ours, _, folder = trained
    theirs = transformers.GPT2TokenizerFast.from_pretrained(str(folder))
    assert theirs(PYDOCS[:5000])["input_ids"] == ours.encode(PYDOCS[:5000])
    assert theirs.eos_token_id == ours.vocab[bpe.END]


# ---------------------------------------------------------------------------------------------- files that are wrong
def spoil(name, folder):
    """Write a vocabulary that is wrong in one way into folder."""
    vocab, merges = bpe.train_bpe(PYDOCS[:20_000], 400)
    other_merges = bpe.train_bpe(PYDOCS[-20_000:], 400)[1]
    tables = {
        "list": [1, 2],
        "number": 7,
        "no byte": {token: i for i, token in enumerate(token for token in vocab if token != "\u0120")},
        "no end": {token: i for token, i in vocab.items() if token != bpe.END},
        "twice": {**vocab, "a": 0},
        "gap": {**vocab, bpe.END: 5000},
        "texts": {token: str(i) for token, i in vocab.items()},
        "booleans": {**vocab, "!": False},
        "other tokens": {**vocab, "\u4e2d": 400},
    }
    lines = {
        "other merges": [" ".join(pair) for pair in other_merges],
        "short merges": [" ".join(pair) for pair in merges[:-20]],
        "three": ["a b c", *map(" ".join, merges)],
        "one": [*map(" ".join, merges), "abc"],
        "blank": [*map(" ".join, merges), "a "],
        "no merges": [],
    }
    text = json.dumps(tables.get(name, vocab))
    texts = {"no json": "<html>not found</html>", "empty": "", "short": text[:-100], "nested": "[" * 100_000}
    text = texts.get(name, text)
    (folder / "vocab.json").write_bytes(b"\xff\xfe" if name == "binary" else text.encode())
    written = "\n".join(["#version: 0.2", *lines.get(name, map(" ".join, merges)), ""])
    (folder / "merges.txt").write_bytes(b"\xff\xfe" if name == "binary merges" else written.encode())
    if name.startswith("missing"):
        (folder / name.split()[1]).unlink()


@pytest.mark.parametrize("name, words", {
    "list": r"vocab.json must map tokens to the ids",
    "number": r"vocab.json must map tokens to the ids",
    "twice": r"vocab.json must map tokens to the ids",
    "gap": r"vocab.json must map tokens to the ids",
    "texts": r"vocab.json must map tokens to the ids",
    "booleans": r"vocab.json must map tokens to the ids",
    "no byte": r"vocab.json and .*merges.txt don't fit each other: '\u0120' is in one of them only",
    "no end": r"don't fit each other: '<\|endoftext\|>' is in one of them only",
    "other tokens": r"don't fit each other: '\u4e2d'",
    "other merges": r"don't fit each other",
    "short merges": r"don't fit each other",
    "no merges": r"don't fit each other",
    "three": r"merges.txt, line 2: 'a b c' is not two symbols",
    "one": r"merges.txt, line 145: 'abc' is not two symbols",
    "blank": r"merges.txt, line 145: 'a ' is not two symbols",
    "no json": r"vocab.json is not JSON",
    "empty": r"vocab.json is not JSON",
    "short": r"vocab.json is not JSON",
    "nested": r"vocab.json is not JSON",
    "binary": r"vocab.json is not UTF-8",
    "binary merges": r"merges.txt is not UTF-8",
    "missing vocab.json": r"vocab.json cannot be read \(No such file",
    "missing merges.txt": r"merges.txt cannot be read \(No such file",
}.items())
def test_wrong_files_get_one_sentence(tmp_path, name, words):
    spoil(name, tmp_path)
    with pytest.raises(utils.InputError, match=words) as raised:
        bpe.Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    message = str(raised.value)
    assert "\n" not in message and message.endswith(".") and re.search("; (take|give|convert) ", message)


def test_files_with_windows_line_ends_and_a_merge_that_begins_like_a_comment(tmp_path):
    vocab, merges = bpe.train_bpe("## ##! ##! " * 9, 300)
    assert ("#", "#") in merges
    bpe.Tokenizer(vocab, merges).save(tmp_path)
    path = tmp_path / "merges.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert bpe.Tokenizer.from_files(tmp_path / "vocab.json", path).merges == merges


# ---------------------------------------------------------------------------------------------- as users run it
def test_the_script_learns_shows_and_counts(tmp_path):
    options = ["na\u00efve tests", "--data", "pydocs", "--vocab-size", 500, "--out", tmp_path]
    out = subprocess.run([sys.executable, str(SCRIPT), *map(str, options)], capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONIOENCODING": "ascii"}).stdout  # a terminal without the symbols
    assert "learned 243 merges" in out and "the same text" in out and "merge by merge" in out and "STAND-IN" not in out
    assert "'na\\xefve'" in out
    theirs = oracles(tmp_path)[0]
    assert str(theirs("na\u00efve tests")["input_ids"]) in out
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(utils.InputError, match="take both files from the same place"):
        call_main(bpe, "--data", tmp_path)


@pytest.mark.parametrize("options, words", [
    (["--data", "/no/such/file"], "/no/such/file cannot be read"),
    (["--data", "LATIN"], "is not UTF-8"),
    (["--data", "EMPTY_FOLDER"], "vocab.json cannot be read"),
    (["--data", "pydocs", "--vocab-size", 12], "vocab_size 12 must be at least 257"),
    (["--data", "pydocs", "--out", "/dev/null/x"], "cannot write"),
    (["\udcff", "--data", "pydocs", "--vocab-size", 300], "U\\+DCFF"),
])
def test_bad_options_get_one_sentence(tmp_path, options, words):
    (tmp_path / "LATIN").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "EMPTY_FOLDER").mkdir()
    options = [tmp_path / o if o in ("LATIN", "EMPTY_FOLDER") else o for o in options]
    with pytest.raises(utils.InputError, match=words):
        call_main(bpe, *options, *([] if "--out" in options else ["--out", tmp_path / "o"]))


def test_stand_in_only_where_gpt2s_files_are_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "DATA_DIR", tmp_path)
    monkeypatch.setattr(bpe, "URL", "http://127.0.0.1:9/")
    assert call_main(bpe, "--out", tmp_path / "o", "--vocab-size", 300).count("STAND-IN") == 2
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        call_main(bpe, "--data", "gpt2")
    (tmp_path / "gpt2").mkdir(exist_ok=True)
    (tmp_path / "gpt2" / "vocab.json").write_text("corrupt")
    with pytest.raises(utils.InputError, match="not the expected file"):
        call_main(bpe)


@pytest.mark.real("gpt2/vocab.json")
def test_the_header_says_what_the_script_prints(monkeypatch):
    monkeypatch.setattr(utils, "DATA_DIR", REAL)
    out = call_main(bpe)
    assert len(re.findall(r"^   merge ", out, re.M)) == 11 and "[11241, 1634]" in out
    assert "as a token: [50256], as plain text: [27, 91, 437, 1659, 5239, 91, 29]" in out
