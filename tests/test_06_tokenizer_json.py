"""06_finetune/tokenizer_json.py against the tokenizers library: each kind of tokenizer.json, and wrong files."""

import json
import random
import sys
import unicodedata

import pytest
from conftest import REAL, chapter

import utils

bpe, wordpiece, tokenizer_json = chapter("06_finetune", "bpe", "wordpiece", "tokenizer_json")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
AddedToken, Regex, decoders, models = tokenizers.AddedToken, tokenizers.Regex, tokenizers.decoders, tokenizers.models
normalizers, pre_tokenizers, processors = tokenizers.normalizers, tokenizers.pre_tokenizers, tokenizers.processors

STRINGS = 100_000
PYDOCS = bpe.read_text("pydocs")[:60_000]
ByteLevel, Split, Digits = pre_tokenizers.ByteLevel, pre_tokenizers.Split, pre_tokenizers.Digits
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN = LLAMA3.replace("{1,3}", "")
ADDED = [AddedToken("<|im_end|>", special=True, normalized=False), AddedToken("<|im_end|>\n", special=True),
         AddedToken("<tool>"), AddedToken("<mask>", special=True, lstrip=True, normalized=False),
         AddedToken("[r]", rstrip=True, normalized=False), AddedToken("cat", single_word=True), AddedToken("\u00e9x"),
         AddedToken("New York", normalized=False), AddedToken("NewTok"), AddedToken("  ", normalized=False)]


def split(form):
    return pre_tokenizers.Sequence([Split(Regex(form), "isolated"), ByteLevel(False, use_regex=False)])


def digits(alone):
    return pre_tokenizers.Sequence([Digits(alone), ByteLevel(False)])


# name: (pre-tokenizer, normalizer, ignore_merges)
KINDS = {"gpt2": (ByteLevel(False), None, False), "prefix space": (ByteLevel(True), None, False),
         "digits one by one": (digits(True), None, False), "digits": (digits(False), None, False),
         "gpt2 by split": (split(bpe.GPT2_CUTS), None, False), "llama3": (split(LLAMA3), None, True),
         "qwen2": (split(QWEN), normalizers.NFC(), False)}
CASES = [*KINDS, "bert", "bert cased", "bert with accents", "bert cased without accents"]


@pytest.fixture(scope="module")
def learned():
    foreign = " ".join(chr(i) for i in range(0xA1, 0x3000) if unicodedata.category(chr(i))[0] in "LNM") * 3
    return bpe.train_bpe(PYDOCS + foreign, 1500), wordpiece.train_wordpiece(PYDOCS, 600)


def make(name, learned):
    """The library's tokenizer of a kind, with added tokens."""
    if name in KINDS:
        (vocab, merges), (cutter, normalizer, whole) = learned[0], KINDS[name]
        theirs = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=whole))
        theirs.pre_tokenizer, theirs.decoder = cutter, decoders.ByteLevel()
        if normalizer:
            theirs.normalizer = normalizer
        theirs.add_special_tokens([bpe.END])
        if whole:
            theirs.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(f"{bpe.END} $A", f"{bpe.END} $A {bpe.END} $B",
                                              [(bpe.END, vocab[bpe.END])])])
    else:
        vocab = {token: i for i, token in enumerate(learned[1])}
        theirs = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        accents = {"bert with accents": False, "bert cased without accents": True}.get(name)
        theirs.normalizer = normalizers.BertNormalizer(True, True, accents, "cased" not in name)
        theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        theirs.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
        theirs.add_special_tokens(list(wordpiece.SPECIAL))
    added = ADDED if name in KINDS else [token for token in ADDED if token.content.strip() == token.content]
    theirs.add_tokens(added)
    return theirs


@pytest.fixture(params=CASES)
def pair(request, learned, tmp_path):
    """(ours, theirs) of each kind."""
    theirs = make(request.param, learned)
    theirs.save(str(tmp_path / "tokenizer.json"))
    return tokenizer_json.open_tokenizer(tmp_path), theirs


def same(ours, theirs, texts):
    for special in (True, False):
        theirs.encode_special_tokens = not special
        for text, there in zip(texts, theirs.encode_batch(texts), strict=True):
            here = ours.encode(text, special=special)
            if isinstance(here, wordpiece.Encoding):
                assert here.ids == there.ids, f"{text!r}: {ours.tokens(text, special)} is not {there.tokens}"
                assert here.offsets == there.offsets, f"{text!r}: {here.offsets} is not {there.offsets}"
            else:
                assert here == there.ids, f"{text!r}: {[ours.bytes[i] for i in here]} is not {there.tokens}"


def cut(text):
    return [text[a:b] for _, (a, b) in ByteLevel(False).pre_tokenize_str(text)]


def characters():
    """What this Python's Unicode has assigned; of letters and numbers those that the library knows."""
    return [c for c in map(chr, range(sys.maxunicode + 1))
            if (kind := unicodedata.category(c)) not in ("Cn", "Cs", "Co")
            and (kind[0] not in "LN" or 1 in (len(cut(f"a{c}")), len(cut(f"1{c}"))))]


def random_strings(n, seed, alphabet):
    r = random.Random(seed)
    spaces = [" ", " ", "  ", "\n", "\t", "\r\n", " \n ", "\x0b", "\x1c", "\x85", "\xa0", "\u200b", "\u3000"]
    endings = ["'s", "'T", "'re", "'VE", "'m", "'Ll", "'\u017f", "\u2019s", "''"]
    words = ["the", "Hello", "na\u00efve", "\u4f60\u597d", "\u041f\u0440\u0438", "1984", "3.14159", "\u0661\u0662",
             "e\u0301x", "\uac01\u11a8", "\u1112\u1161\u11ab", "_", "...", "\U0001f642", "\x00", "\u0130", "cat", "Cat"]
    tokens = [*(token.content for token in ADDED), "newtok", "N\u00e9wTok", "e\u0301x", "new york", "cat\u00b2",
              "<|im_end|>\n\n", bpe.END, "[SEP]", "[sep]", "<|im_end|"]
    makers = [lambda: r.choice(spaces) * r.choice((1, 1, 3)), lambda: r.choice(endings), lambda: r.choice(words),
              lambda: r.choice(tokens), lambda: "".join(r.choices("abcdeABCDE", k=r.randrange(1, 7))),
              lambda: "".join(r.choices("0123456789", k=r.randrange(1, 8))),
              lambda: "".join(r.choices(alphabet, k=r.randrange(1, 4))),
              lambda: r.choice("!\"#$%&()*+,-./:;<=>?@[\\]^_`{|}~") * r.choice((1, 1, 3))]
    return ["".join(make() for make in r.choices(makers, [6, 2, 3, 4, 5, 2, 3, 2], k=r.randrange(9))) for _ in range(n)]


ALPHABET = characters()


def test_random_strings_with_added_tokens_in_them(pair):
    same(*pair, random_strings(STRINGS // 100, 0, ALPHABET))


def test_every_mark_and_a_sample_of_all_characters(pair):
    marks = pair[1].normalizer is not None  # where no text is normalized, they are signs like others
    some = [c for i, c in enumerate(ALPHABET) if marks and unicodedata.category(c)[0] == "M" or i % 100 == 0]
    same(*pair, ["".join(f"a{c}1{c} {c}b cat{c}\u0301\u0323{c}cat " for c in some[i : i + 400])
                 for i in range(0, len(some), 400)])


def test_decoding_gives_the_text_back(learned, tmp_path):
    for name, text in (("llama3", "Hello \u00e9x<tool> \U0001f642 New York"), ("bert", "the cat newtok")):
        make(name, learned).save(str(tmp_path / "tokenizer.json"))
        ours = tokenizer_json.open_tokenizer(tmp_path)
        if name == "bert":
            assert ours.decode(ours.encode_text(text)[0]) == "the cat NewTok"
        else:
            assert ours.decode(ours.encode(text)) == bpe.END + text


def in_transformers(folder):
    return transformers.AutoTokenizer.from_pretrained(str(folder))


TEXTS = ["Hello World", "Caf\u00e9 [SEP]  it's", f"{bpe.END}x<pad> [MASK]", "", " a"]


@pytest.mark.parametrize("kind, config", [
    ("gpt2", {}), ("gpt2", {"add_prefix_space": True}), ("gpt2", {"add_bos_token": True}),
    ("gpt2", {"add_eos_token": True, "model_max_length": 77}), ("gpt2", {"pad_token": "<pad>"}),
    ("gpt2", {"added_tokens_decoder": {"400": {"content": "[SEP]", "special": False, "lstrip": True, "rstrip": False,
                                               "single_word": False, "normalized": True}}}),
    ("bert", {}), ("bert", {"do_lower_case": False}), ("bert", {"strip_accents": False, "model_max_length": 128}),
    ("bert", {"do_lower_case": False, "strip_accents": True})])
def test_a_folder_of_ours_with_settings_goes_through_transformers_and_back(kind, config, tmp_path):
    if kind == "gpt2":
        bpe.Tokenizer(*bpe.train_bpe(PYDOCS[:20_000], 400)).save(tmp_path / "ours")
        config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": bpe.END, "eos_token": bpe.END} | config
    else:
        wordpiece.WordPiece(wordpiece.train_wordpiece(PYDOCS[:20_000], 300)).save(tmp_path / "ours")
        config = {"tokenizer_class": "BertTokenizer"} | config
    (tmp_path / "ours" / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = in_transformers(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer_json.open_tokenizer(tmp_path / "theirs").save(tmp_path / "again")
    for folder in ("ours", "theirs", "again"):
        ours = tokenizer_json.open_tokenizer(tmp_path / folder)
        for text in TEXTS:
            ids = ours.encode(text)
            assert (ids if kind == "gpt2" else ids.ids) == theirs(text)["input_ids"], (folder, text)
        assert ours.max_length == config.get("model_max_length") and len(ours.vocab) == len(theirs)
        assert set(ours.added) >= set(theirs.all_special_tokens)
        if kind == "gpt2":
            assert ours.end == theirs.eos_token_id


def test_a_folder_as_transformers_wrote_it_before_4_34(tmp_path):
    bpe.Tokenizer(*bpe.train_bpe(PYDOCS[:20_000], 400)).save(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 401, "[SEP]": 400}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<pad>", "eos_token": "<|endoftext|>"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    ours, theirs = tokenizer_json.open_tokenizer(tmp_path), in_transformers(tmp_path)
    assert ours.added == {bpe.END: 399, "<pad>": 401, "[SEP]": 400}
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.encode(text, special=False) == theirs(text, split_special_tokens=True)["input_ids"]


def test_a_tokenizer_of_another_kind_does_not_outlive_the_one_that_is_written_over_it(learned, tmp_path):
    make("llama3", learned).save(str(tmp_path / "tokenizer.json"))
    bpe.Tokenizer(*bpe.train_bpe(PYDOCS[:2_000], 270)).save(tmp_path)
    assert len(tokenizer_json.open_tokenizer(tmp_path).vocab) == 270


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


def slow(pattern):
    return sequence({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})


@pytest.mark.parametrize("place, value, words", [
    ("merges", [["a", "zzzz"]], "has merges that name 'zzzz'"), ("merges", ["a b c"], "is not of the form"),
    ("merges", 7, "is not of the form"), ("vocab", {"a": 0, "b": 0}, "ids that are not 0, 1, 2"),
    ("vocab", {"a": 0, "b": 7}, "ids that are not 0, 1, 2"), ("vocab", [1], "is not of the form"),
    ("dropout", 0.1, "model BPE dropout 0.1"), ("byte_fallback", True, "byte_fallback true"),
    ("type", "Unigram", 'model type "Unigram"'), ("pre_tokenizer", slow("(a+)+$"), r"Split pattern .*\(a\+\)\+\$"),
    ("pre_tokenizer", {"type": "Metaspace\n"}, r"pre_tokenizer Metaspace\?"), ("pre_tokenizer", None, "tokenizer none"),
    ("pre_tokenizer", {"type": "ByteLevel", "use_regex": False}, "use_regex false"),
    ("normalizer", {"type": "NFKC"}, 'normalizer type "NFKC"'), ("decoder", {"type": "Fuse"}, 'decoder type "Fuse"'),
    ("post_processor", {"type": "RobertaProcessing"}, 'post_processor type "RobertaProcessing"'),
    ("added_tokens", [{"id": 0, "content": ""}], "added token without text"),
    ("added_tokens", [{"id": 5, "content": "!"}], "gives '!' two ids")])
def test_what_a_tokenizer_json_may_not_say_is_named(learned, tmp_path, place, value, words):
    spec = json.loads(make("gpt2", learned).to_str())
    spec["model"]["merges"] = [] if place == "vocab" else spec["model"]["merges"]
    (spec["model"] if place in ("merges", "vocab", "dropout", "byte_fallback", "type") else spec)[place] = value
    refused(tmp_path, json.dumps(spec), words)


def refused(folder, text, words, name="tokenizer.json"):
    (folder / name).write_text(text)
    with pytest.raises(utils.InputError, match=words) as error:
        tokenizer_json.open_tokenizer(folder)
    assert str(error.value).isprintable() and len(str(error.value)) < 500 and str(error.value).endswith(".")


@pytest.mark.parametrize("place, value, words", [
    ("max_input_chars_per_word", 50, "max_input_chars_per_word 50"), ("unk_token", "<unk>", 'unk_token "<unk>"'),
    ("normalizer", {"type": "BertNormalizer", "clean_text": False, "lowercase": True}, "clean_text false"),
    ("pre_tokenizer", {"type": "Whitespace"}, '"Whitespace"'), ("post_processor", None, r"\[CLS\] text \[SEP\]")])
def test_what_a_tokenizer_json_of_bert_may_not_say_is_named(learned, tmp_path, place, value, words):
    spec = json.loads(make("bert", learned).to_str())
    (spec if place in spec else spec["model"])[place] = value
    refused(tmp_path, json.dumps(spec), words)


@pytest.mark.parametrize("token", [{"content": "new york"}, {"content": "xyzzy", "rstrip": True}])
def test_a_normalized_token_of_bert_that_reaches_beyond_a_word_is_named(learned, tmp_path, token):
    spec = json.loads(make("bert", learned).to_str())
    last = max(*spec["model"]["vocab"].values(), *(entry["id"] for entry in spec["added_tokens"]))
    spec["added_tokens"].append({"id": last + 1, "normalized": True, "special": False} | token)
    refused(tmp_path, json.dumps(spec), f"has the token '{token['content']}' with white space")


@pytest.mark.parametrize("text", ["", "[1]", "7", "{}", '{"a":' * 50_000])
def test_what_is_no_tokenizer_json(tmp_path, text):
    refused(tmp_path, text, "tokenizer.json (can't be read|is not of the form)")


@pytest.mark.parametrize("config, words", [
    ("{", "config.json can't be read"), ('{"split_special_tokens": true}', "split_special_tokens true"),
    ('{"add_prefix_space": "no"}', 'add_prefix_space "no"'), ('{"model_max_length": "x"}', 'model_max_length "x"'),
    ('{"truncation_side": "left"}', "truncation_side"), ('{"added_tokens_decoder": [1]}', "is not of the form")])
def test_settings_that_are_not_known_are_named(learned, tmp_path, config, words):
    make("gpt2", learned).save(str(tmp_path / "tokenizer.json"))
    refused(tmp_path, config, words, "tokenizer_config.json")


def test_files_cut_short_or_far_too_large_are_refused_before_they_are_used(learned, tmp_path):
    text = make("gpt2", learned).to_str()
    refused(tmp_path, text[: len(text) // 2], "cut short")
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(200_000_000)  # a hole: it takes no room on the disk
    with pytest.raises(utils.InputError, match="has 200,000,000 bytes"):
        tokenizer_json.open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(utils.InputError, match="vocab.txt can't be read"):
        tokenizer_json.open_tokenizer(tmp_path)


@pytest.mark.real("gpt2/vocab.json")
@pytest.mark.real("tinyshakespeare.txt")
def test_gpt2s_and_berts_own_files_give_what_from_files_and_load_give():
    text = (REAL / "tinyshakespeare.txt").read_text("utf-8")[:100_000]
    files = (REAL / "gpt2" / "vocab.json", REAL / "gpt2" / "merges.txt")
    assert tokenizer_json.open_tokenizer(REAL / "gpt2").encode(text) == bpe.Tokenizer.from_files(*files).encode(text)
    theirs = wordpiece.WordPiece.load(REAL / "minilm").encode(text)
    assert tokenizer_json.open_tokenizer(REAL / "minilm").encode(text) == theirs
