"""06_finetune/wordpiece.py against transformers' BertTokenizer, the `tokenizers` trainer, and files that are wrong."""

import itertools
import os
import random
import re
import subprocess
import sys
import unicodedata

import pytest
import torch
from conftest import REAL, ROOT, call_main, chapter

import utils

bpe, wordpiece = chapter("06_finetune", "bpe", "wordpiece")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")  # comes with transformers
PYDOCS = bpe.read_text("pydocs")
SCRIPT = ROOT / "06_finetune" / "wordpiece.py"
STRINGS = 100_000
# Python's Unicode grows each year; tokenizers' did not since 2015 but for lower case, which is that of Rust.
KNOWN = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")]
# Nine in ten are letters without case, most of them Chinese or Korean: where time counts, every twentieth of those.
SOME = [c for i, c in enumerate(KNOWN) if unicodedata.category(c) != "Lo" or i % 20 == 0]
PRIVATE = ["\ue000", "\uf8ff", "\U000f0000", "\U0010fffd"]  # and 137,464 more, of one kind
EDGES = [chr(i) for i in (0x33FF, 0x4DC0, 0xF8FF, 0xFAFF, 0xFB00, 0x2A6DF, 0x2A6E0, 0x2B81F, 0x2B820, 0x2B91F, 0x2B920,
                          0x2CEAF, 0x2CEB0, 0x2FA1F, 0x2FA20)]  # of what counts as Chinese, assigned or not


def oracle(path, lowercase=True):
    return transformers.BertTokenizerFast(str(path), do_lower_case=lowercase)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A vocabulary learned from Python's manual: (ours, theirs, path)."""
    folder = tmp_path_factory.mktemp("small")
    wordpiece.WordPiece(wordpiece.train_wordpiece(PYDOCS[:100_000], 600)).save(folder)
    return wordpiece.WordPiece.load(folder), oracle(folder / "vocab.txt"), folder / "vocab.txt"


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A vocabulary in which each character is a piece, so that tokens show all that became of a text."""
    path = tmp_path_factory.mktemp("letters") / "vocab.txt"
    seen = sorted(set("".join(c + c.lower() + unicodedata.normalize("NFD", c) for c in SOME)) - {"\n", "\r"})
    path.write_text("".join(f"{c}\n" for c in [*wordpiece.SPECIAL, *seen, *("##" + c for c in seen)]), "utf-8")
    return wordpiece.WordPiece.load(path), oracle(path), path


@pytest.fixture(scope="module")
def minilm():
    path = REAL / "minilm" / "vocab.txt"
    return wordpiece.WordPiece.load(path), oracle(path), path


def same(ours, theirs, texts):
    """All texts get equal ids and offsets, without [CLS] and [SEP]."""
    for text, a in zip(texts, theirs.backend_tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
        ids, offsets = ours.encode_text(text)
        assert ids == a.ids, f"{text!r}: {ours.tokens(text)} is not {a.tokens}"
        assert offsets == a.offsets, f"{text!r}: {offsets} is not {a.offsets}"


# ---------------------------------------------------------------------------------------------- every code point
def rows(characters, form, n=500):
    return [" ".join(form.format(c) for c in characters[i : i + n]) for i in range(0, len(characters), n)]


def test_every_code_point(letters):
    """Between two letters each character shows its kind: it goes, parts the word, stands alone, or stays in it."""
    same(*letters[:2], rows(SOME + PRIVATE + EDGES, "a{}b"))
    same(*letters[:2], rows(sorted(set(KNOWN) - set(SOME)), "{}"))


def test_every_code_point_alone_and_with_capitals(letters):
    """A cased vocabulary keeps capitals and accents."""
    ours, theirs = wordpiece.WordPiece(letters[0].names, lowercase=False), oracle(letters[2], lowercase=False)
    same(ours, theirs, rows(SOME + PRIVATE, "{}"))
    same(ours, theirs, random_strings(2000, 5, KNOWN))


@pytest.mark.real("minilm/vocab.txt")
def test_every_code_point_with_berts_vocabulary(minilm):
    same(*minilm[:2], rows(KNOWN + PRIVATE, "{}b"))


def test_marks_in_a_row_are_sorted_as_the_oracle_sorts_them(letters):
    """Signs that have a place in the order of marks and yet stay: their offsets show the order."""
    stay = [c for c in KNOWN if unicodedata.combining(c) and unicodedata.category(c) != "Mn"]
    r, marks = random.Random(0), [c for c in KNOWN if unicodedata.category(c) == "Mn"] + ["\u00e9", "\u1ed9", "\uac01"]
    assert len(stay) > 20
    same(*letters[:2], ["a" + "".join(r.choices(stay + r.choices(marks, k=30), k=6)) + "b" for _ in range(5000)])


def test_the_tables_name_what_unicode_8_had_not():
    """The oracle's normalizer leaves every named character as it is, and cuts nowhere."""
    normalizer = tokenizers.normalizers.BertNormalizer(True, False, True, False)
    named = [c for c in map(chr, range(sys.maxunicode + 1)) if wordpiece.ORDINARY.match(c)]
    text = "a".join(named)  # a letter between two marks, or they would be sorted
    assert len(named) > 10_000 and normalizer.normalize_str(text) == text
    assert len(tokenizers.pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)) == 1


# ---------------------------------------------------------------------------------------------- random strings
def random_strings(n, seed, alphabet):
    """n strings of up to about 30 characters that look like nothing in particular, and like every pitfall at once."""
    r = random.Random(seed)
    marks = [c for c in alphabet if unicodedata.category(c)[0] == "M"]
    spaces = [" ", " ", "  ", "\n", "\t", "\r\n", "\x0b", "\x1c", "\x1f", "\x85", "\xa0", "\u200b", "\u180e", "\u3000"]
    words = ["the", "Hello", "na\u00efve", "\u4f60\u597d", "\u041f\u0440\u0438\u0432\u0435\u0442", "1984", "\u0130",
             "\u03a3\u03a3", "e\u0301", "\u0939\u093f\u0928\u094d\u0926\u0940", "\ud55c\uad6d\uc5b4", "\ufb01",
             "\u00df", "\u3042\u30ac", "\U0001f468\u200d\U0001f469", "\ufffd", "\x00", "\x7f", "\xad", "\u037e"]
    makers = [
        lambda: r.choice(spaces) * r.choice((1, 1, 2, 5)),
        lambda: r.choice(words),
        lambda: "".join(r.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ", k=r.randrange(1, 9))),
        lambda: "".join(r.choices("\u00c0\u00c9\u00ee\u00f5\u00fc\u00c7\u1e9e\u0174\u1ec7\u01d6", k=r.randrange(1, 4))),
        lambda: "".join(r.choices("0123456789", k=r.randrange(1, 6))),
        lambda: "".join(r.choices(alphabet, k=r.randrange(1, 4))),  # characters of every kind
        lambda: r.choice("aeo") + "".join(r.choices(marks, k=r.randrange(1, 4))),
        lambda: r.choice("!\"#$%&()*+,-./:;<=>?@[\\]^_`{|}~") * r.choice((1, 1, 3)),
        lambda: r.choice((*wordpiece.SPECIAL, "[sep]", "[MASK", "[[CLS]]", "##", "[MA\x00SK]")),
    ]
    weights = [6, 4, 6, 2, 2, 4, 2, 2, 1]
    strings = ["".join(make() for make in r.choices(makers, weights, k=r.randrange(7))) for _ in range(n)]
    for i in range(0, n, 100):  # around the length from which on a word is [UNK]
        strings[i] += "".join(r.choices("ab\u00e9\uac01\u0301", k=r.randrange(90, 120)))
    return strings


def test_random_strings(small, letters):
    texts = random_strings(STRINGS // 10, 0, KNOWN)
    same(*small[:2], texts[:5000])
    same(*letters[:2], texts[5000:])


@pytest.mark.real("minilm/vocab.txt")
def test_a_hundred_thousand_random_strings_with_berts_vocabulary(minilm):
    same(*minilm[:2], random_strings(STRINGS, 1, KNOWN))


def test_words_of_more_than_a_hundred_characters(small):
    words = ["a" * n for n in (99, 100, 101, 5000)] + ["\u00e9" * n for n in (50, 100, 101)]
    words += ["e\u0301" * n for n in (50, 100, 101)] + ["\uac01" * n for n in (33, 34)]  # three parts each
    same(*small[:2], [f"x {word}, y" for word in words])
    assert small[0].tokens("e\u0301" * 100) != ["[UNK]"] == small[0].tokens("e" * 101)


def test_the_longest_piece_first_is_not_the_best_cut():
    ours = wordpiece.WordPiece([*wordpiece.SPECIAL, "abc", "ab", "##cd", "##d", "x"])
    assert [ours.tokens(word) for word in ("abcd", "abc", "abcdd", "abce", "abx")] == [
        ["abc", "##d"], ["abc"], ["abc", "##d", "##d"], ["[UNK]"], ["[UNK]"]]
    assert wordpiece.WordPiece([*wordpiece.SPECIAL, "abc", "ab", "##cd"]).tokens("abcd") == ["[UNK]"]


def test_special_tokens_in_a_text_count_only_where_that_is_allowed(small):
    ours, theirs, _ = small
    text = "a [SEP] b[MASK]c [sep] [CLS][PAD] [UNK]"
    same(ours, theirs, [text, "[SEP]", "[SEP", ""])
    plain, offsets = ours.encode_text(text, special=False)
    assert not {ours.sep, ours.cls, ours.mask, ours.pad} & set(plain)
    theirs = oracle(small[2])
    theirs.backend_tokenizer.encode_special_tokens = True
    expected = theirs.backend_tokenizer.encode(text, add_special_tokens=False)
    assert (plain, offsets) == (expected.ids, expected.offsets)


# ---------------------------------------------------------------------------------------------- sequences
def as_encoding(theirs, *texts, **options):
    found = theirs(*texts, return_offsets_mapping=True, **options)
    return wordpiece.Encoding(found["input_ids"], found["token_type_ids"], found["offset_mapping"])


def test_pairs_and_truncation(small):
    ours, theirs, _ = small
    assert ours.encode("") == as_encoding(theirs, "")
    words = "one two three four five six seven".split()
    for n, m in itertools.product(range(1, 8, 2), repeat=2):
        a, b = " ".join(words[:n]), " ".join(words[:m])
        assert ours.join(ours.encode_text(a), ours.encode_text(b)) == as_encoding(theirs, a, b)
        for length in range(2, 30):
            assert ours.encode(a, length) == as_encoding(theirs, a, truncation=True, max_length=length)


def test_windows(small):
    ours, theirs, _ = small
    question = "which one?"
    n = len(ours.encode_text(question)[0])
    for words, room, stride in itertools.product((1, 5, 9, 10, 11, 40), (4, 10, 11), (0, 1, 3)):
        text = PYDOCS[: 7 * words]
        found = theirs(question, text, truncation="only_second", max_length=n + 3 + room, stride=stride,
                       return_overflowing_tokens=True, return_offsets_mapping=True)
        expected = [wordpiece.Encoding(*row) for row in zip(found["input_ids"], found["token_type_ids"],
                                                            found["offset_mapping"])]
        assert ours.windows(question, text, n + 3 + room, stride) == expected, (words, room, stride)
    for length, stride in ((n + 3, 0), (n + 8, 5), (20, -1)):
        with pytest.raises(utils.InputError, match="too few for windows"):
            ours.windows(question, PYDOCS[:100], length, stride)


def test_padding(small):
    ours, theirs, _ = small
    texts = ["one", "a longer one, for comparison", ""]
    ids, mask = wordpiece.pad([ours.encode(text).ids for text in texts], ours.pad)
    expected = theirs(texts, padding=True, return_tensors="pt")
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert torch.equal(ids, expected["input_ids"]) and torch.equal(mask.long(), expected["attention_mask"])


def test_offsets_are_the_text_itself(small):
    text = "Na\u00efve  tests\tof\u4f60\u597d, \u00c9tudes"
    assert "".join(text[start:end] for start, end in small[0].encode_text(text)[1]) == re.sub(r"\s", "", text)
    text = "e\u0301e\u0301"  # the mark between two letters belongs to the word, the one behind it to nothing
    assert [offsets[1] for offsets in small[0].encode_text(text)[1]][-1] == 3


def test_decode(small):
    ours, theirs, _ = small
    decoder = tokenizers.decoders.WordPiece(cleanup=False)
    r = random.Random(0)
    for _ in range(200):
        ids = r.choices(range(len(ours.names)), k=20)
        ids[0] = ours.cls
        assert ours.decode(ids) == decoder.decode([ours.names[i] for i in ids])


# ---------------------------------------------------------------------------------------------- real texts
@pytest.mark.real("minilm/vocab.txt")
@pytest.mark.real("sst2/train.tsv")
def test_sst2(minilm):
    ours, theirs, _ = minilm
    texts = []
    for name in ("train", "dev", "test"):
        lines = (REAL / "sst2" / f"{name}.tsv").read_text("utf-8").split("\n")
        texts += [line.rsplit("\t", 1)[0] for line in lines]
    assert len(texts) == 6920 + 872 + 1821
    same(ours, theirs, texts)
    found = theirs(texts[:500], truncation=True, max_length=20)
    assert [ours.encode(text, 20).ids for text in texts[:500]] == found["input_ids"]


def test_pydocs(small):
    same(*small[:2], [PYDOCS])


# ---------------------------------------------------------------------------------------------- learning
def their_pieces(text, n):
    """What Hugging Face's trainer makes of text beyond single characters: the first n merges."""
    theirs = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    theirs.normalizer = tokenizers.normalizers.BertNormalizer()
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()

    def train(size):
        theirs.train_from_iterator([text], tokenizers.trainers.WordPieceTrainer(
            vocab_size=size, min_frequency=2, special_tokens=list(wordpiece.SPECIAL), show_progress=False))
        return theirs.get_vocab()

    return set(train(len(train(1)) + n)) - set(train(1))


def test_training_learns_the_pieces_that_hugging_faces_trainer_learns():
    """Where no tie decides: of equally frequent pairs it takes the first by numbers that it gives by chance."""
    text = PYDOCS[:80_000]
    names = wordpiece.train_wordpiece(text, 5000)  # to the end
    single = [name for name in names if len(name.removeprefix("##")) == 1 or name in wordpiece.SPECIAL]
    assert names[: len(single)] == single and len(names) < 5000  # no pair is left that occurs twice
    for n in (30, 500):
        ours, theirs = set(names[len(single) : len(single) + n]), their_pieces(text, n)
        assert len(ours) == len(theirs) == n and len(ours & theirs) > 0.97 * n, (n, ours ^ theirs)


def test_training_against_counting_everything_anew():
    text = PYDOCS[:20_000]
    names = wordpiece.train_wordpiece(text, 250)
    base = [name for name in names if len(name.removeprefix("##")) == 1 or name in wordpiece.SPECIAL]
    words = [[("##" * (i > 0)) + c for i, c in enumerate(word)] for chunk in text.split()
             for word, _ in wordpiece.cut(chunk, True)]
    order, expected = {name: i for i, name in enumerate(base)}, []
    while len(order) < 250:
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], order[pair[0]], order[pair[1]]))
        new = best[0] + best[1][2:]
        expected.append(new)
        order.setdefault(new, len(order))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [new]
                i += 1
    assert names[len(base) :] == list(dict.fromkeys(expected))


def test_what_was_learned_can_write_every_word_of_its_text(small):
    names = wordpiece.train_wordpiece(PYDOCS[:20_000] + " \u4f60\u597d na\u00efve", 300)
    ours = wordpiece.WordPiece(names)
    assert len(names) == len(set(names)) == 300
    assert ours.unk not in ours.encode_text(PYDOCS[:20_000] + " \u4f60\u597d na\u00efve")[0]
    assert wordpiece.train_wordpiece("", 10) == list(wordpiece.SPECIAL)
    with pytest.raises(utils.InputError, match="vocab_size 10 must be at least 11: .* 4 .*, 2"):
        wordpiece.train_wordpiece("ab c !", 10)


# ---------------------------------------------------------------------------------------------- files that are wrong
@pytest.mark.parametrize("lines, words", [
    (None, "can't be read"), (b"\xff\xfe", "can't be read"), (b"", r"has no \[PAD\]"),
    ("\n".join(wordpiece.SPECIAL[:4]).encode(), r"has no \[MASK\]"), (b"<html>not found</html>", r"has no \[PAD\]"),
])
def test_wrong_files_get_one_sentence(tmp_path, lines, words):
    if lines is not None:
        (tmp_path / "vocab.txt").write_bytes(lines)
    with pytest.raises(utils.InputError, match=words) as raised:
        wordpiece.WordPiece.load(tmp_path)
    assert "\n" not in str(raised.value) and "vocab.txt" in str(raised.value) and str(raised.value).endswith(".")


def test_files_with_windows_line_ends_or_no_last_one(tmp_path):
    names = [*wordpiece.SPECIAL, "a", "\u4f60", "##b"]
    wordpiece.WordPiece(names).save(tmp_path)
    path = tmp_path / "vocab.txt"
    for data in (path.read_bytes(), path.read_bytes().replace(b"\n", b"\r\n"), path.read_bytes().rstrip()):
        path.write_bytes(data)
        ours = wordpiece.WordPiece.load(path)
        assert ours.names == names and oracle(path).get_vocab() == ours.vocab


def test_a_cased_vocabulary_is_known_by_its_config(tmp_path):
    names = [*wordpiece.SPECIAL, "a", "A", "\u00c9"]
    for lowercase in (True, False):
        wordpiece.WordPiece(names, lowercase).save(tmp_path)
        assert wordpiece.WordPiece.load(tmp_path).lowercase is lowercase
        theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
        assert wordpiece.WordPiece.load(tmp_path).encode("A \u00c9").ids == theirs("A \u00c9")["input_ids"]
    for text, words in (("{", "beside it can't be read"), ("7", "beside it can't be read"),
                        ('{"strip_accents": false}', "strip_accents or"),
                        ('{"do_lower_case": false, "strip_accents": true}', "strip_accents or"),
                        ('{"tokenize_chinese_chars": false}', "or tokenize_chinese_chars")):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(utils.InputError, match=f"tokenizer_config.json.*{words}"):
            wordpiece.WordPiece.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"strip_accents": null, "tokenize_chinese_chars": true}')
    assert wordpiece.WordPiece.load(tmp_path).lowercase
    (tmp_path / "tokenizer_config.json").unlink()
    assert wordpiece.WordPiece.load(tmp_path).lowercase


# ---------------------------------------------------------------------------------------------- as users run it
def test_the_script_learns_shows_and_counts(tmp_path):
    options = ["na\u00efve tests", "--pair", "of two", "--data", "pydocs", "--vocab-size", 400, "--out", tmp_path]
    out = subprocess.run([sys.executable, str(SCRIPT), *map(str, options)], capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}).stdout
    assert "pydocs: 400 tokens" in out and "'na\\xefve tests'" in out and "[SEP]" in out and "STAND-IN" not in out
    ids = oracle(tmp_path / "vocab.txt")("na\u00efve tests", "of two")["input_ids"]
    assert [int(row.split()[1]) for row in re.findall(r"^   \S+ +\d+ +[01] .*$", out, re.M)] == ids


@pytest.mark.parametrize("options, words", [
    (["--data", "/no/such/file"], "/no/such/file cannot be read"),
    (["--data", "EMPTY_FOLDER"], "vocab.txt or .* can't be read"),
    (["--data", "pydocs", "--vocab-size", 12], "vocab_size 12 must be at least"),
    (["--data", "pydocs", "--out", "/dev/null/x"], "cannot write"),
    (["--data", "LATIN"], "is not UTF-8"),
])
def test_bad_options_get_one_sentence(tmp_path, options, words):
    (tmp_path / "LATIN").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "EMPTY_FOLDER").mkdir()
    options = [{"LATIN": tmp_path / "LATIN", "EMPTY_FOLDER": tmp_path / "EMPTY_FOLDER"}.get(o, o)
               for o in options]
    with pytest.raises(utils.InputError, match=words):
        call_main(wordpiece, *options, *([] if "--out" in options else ["--out", tmp_path / "o"]))


def test_stand_in_only_where_the_real_vocabulary_is_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "DATA_DIR", tmp_path)
    monkeypatch.setattr(wordpiece, "URL", "http://127.0.0.1:9/")
    assert call_main(wordpiece, "--out", tmp_path / "o", "--vocab-size", 300).count("STAND-IN") == 2
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        call_main(wordpiece, "--data", "minilm")
    (tmp_path / "minilm").mkdir(exist_ok=True)
    (tmp_path / "minilm" / "vocab.txt").write_text("corrupt")
    with pytest.raises(utils.InputError, match="not the expected file"):
        call_main(wordpiece)


@pytest.mark.real("minilm/vocab.txt")
def test_the_header_says_what_the_script_prints(monkeypatch):
    monkeypatch.setattr(utils, "DATA_DIR", REAL)
    out = call_main(wordpiece)
    assert "minilm: 30,522 tokens" in out and "'tokenization'     token ##ization" in out
    assert re.search(r"'\u1230\u120b\u121d' +\[UNK\]", out)
    assert len(re.findall(r"^   \[UNK\]", out, re.M)) == 3
