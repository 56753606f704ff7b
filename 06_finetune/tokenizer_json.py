"""The tokenizer of a model's folder, whoever wrote it: tokenizer.json, or GPT-2's two files, or BERT's one.

You learn here: what a tokenizer is made of besides its vocabulary. The tokenizers library writes five steps into one
file: a normalizer changes the text, a pre-tokenizer cuts it, the model makes tokens of the pieces, a post-processor
puts tokens around them, a decoder goes back. Added tokens are found before all that.

    open_tokenizer("folder")    a bpe.Tokenizer (GPT-2, Llama 3, Qwen 2, SmolLM2) or a wordpiece.WordPiece (BERT)

What a file says is obeyed or refused by name, never passed over: a setting of which nobody knows yields wrong ids, and
a model with wrong ids answers as fluently as ever.
Left out on purpose: SentencePiece (Unigram, byte_fallback) and every cut that stands not below. A pattern from a file
is compared, never run, because one can be written that takes hours on a short text.
"""

import functools
import json
import re
import sys
import unicodedata
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import utils
from bpe import END, GPT2_CUTS, Added, Tokenizer, read_files
from wordpiece import CLS, LONGEST, ORDERED, ORDINARY, SEP, SPECIAL, UNK, WordPiece, read_names

LARGEST = 25_000_000  # bytes; Llama 3's 128,256 tokens take 17 million
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json",
         "added_tokens.json")
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

## Llama 3 and Qwen 2 differ from GPT-2 where text is no English prose: a sign may begin a word, line ends stick to the
## signs before them, and of long numbers three digits (Qwen: one) make a piece, so that sums line up.
LLAMA3_CUTS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
CUTS = [GPT2_CUTS, LLAMA3_CUTS, LLAMA3_CUTS.replace("{1,3}", "")]
# Digits on their own, one by one or as they come, then GPT-2's cuts in what is between: in one expression.
DIGIT_CUTS = {alone: r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}" + "+" * (not alone) +
              r"| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+" for alone in (True, False)}


class Refused(Exception):
    """Says why a file is of no use, in words that go on from its name."""


def check(part: dict, place: str, **known: list | tuple | None) -> None:
    """Raise Refused for a setting in part that has none of its known values (None: any will do) or is not known."""
    for key, value in part.items():
        if key not in known or known[key] is not None and value not in known[key]:
            kind = "" if key == "type" else f" {part.get('type', '')!s:.40}"
            raise Refused(f"says {place}{kind} {key:.40} {json.dumps(value):.100}, which is not known here; take "
                          "another model")


def steps(part: dict | None) -> list[dict]:
    """The steps of a normalizer, pre-tokenizer, post-processor or decoder: none, one, or those of a Sequence."""
    if part and part["type"] == "Sequence":
        return [step for key, parts in part.items() if key != "type" for one in parts for step in steps(one)]
    return [part] if part else []


# ---------------------------------------------------------------------------------------------- what files say
def read_json(path: Path) -> dict:
    """An object from a JSON file. Raises utils.InputError."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, RecursionError, TypeError, ValueError) as error:
        raise utils.InputError(f"{path} can't be read as JSON, or was cut short ({type(error).__name__}); download it "
                               "again.") from error


def entries(spec: dict, config: dict) -> list[dict]:
    """What tokenizer.json, then tokenizer_config.json say of tokens to be found in a text; id None: not said."""
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    named = [*map(config.get, ROLES), *(extra.values() if isinstance(extra, dict) else extra)]
    return [*(spec.get("added_tokens") or []),
            *({**entry, "id": int(i)} for i, entry in config.get("added_tokens_decoder", {}).items()),
            *((token if isinstance(token, dict) else {"content": token}) | {"special": True, "id": None}
              for token in named if token)]


def tokens(spec: dict, config: dict) -> tuple[dict[str, Added], dict[str, int]]:
    """The tokens to be found in a text, and the ids of all tokens.

    ## A named token that has no id yet gets the next one, as in transformers. So [PAD] in a GPT-2's settings is 50257.
    """
    vocab, added = spec["model"]["vocab"], {}
    for entry in entries(spec, config):
        token, i = entry["content"], entry["id"]
        if not token or not isinstance(token, str):
            raise Refused("has an added token without text; download it again")
        if i is not None or token not in added:
            i = vocab.get(token, len(vocab.keys() | added.keys())) if i is None else i
            added[token] = Added(i, *(bool(entry.get(flag)) for flag in Added._fields[1:]))
    ids = vocab | {token: some.id for token, some in added.items()}
    moved = next((token for token in added if token in vocab and vocab[token] != ids[token]), None)
    if moved is not None:
        raise Refused(f"gives {moved[:40]!r} two ids; download it again")
    if not all(type(i) is int for i in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
        raise Refused("has ids that are not 0, 1, 2 ..., each once; download it again")
    return added, ids


def template(parts: list[dict]) -> tuple[list[int], list[int]]:
    """The ids that a post-processor puts before a text and after it."""
    before, after = [], []
    for part in parts:
        if part["type"] == "TemplateProcessing":
            rows = [part["special_tokens"][item["SpecialToken"]["id"]]["ids"] if "SpecialToken" in item else None
                    for item in part["single"]]
            at = rows.index(None)
            before, after = sum(rows[:at], []), sum(rows[at + 1 :], [])
        elif part["type"] == "BertProcessing":
            before, after = [part["cls"][1]], [part["sep"][1]]
        else:
            check(part, "post_processor", type=["ByteLevel"], add_prefix_space=None, trim_offsets=None, use_regex=None)
    return before, after


def nfc(text: str) -> str:
    """Text in which a letter and its accents are one character where Unicode has one, by the reference's tables."""
    ## The library's tables are those of Unicode 9; wordpiece.py knows which characters came later.
    parts = re.split(f"((?!{ORDERED.pattern}){ORDINARY.pattern})", text)
    return "".join(part if i % 2 else unicodedata.normalize("NFC", part) for i, part in enumerate(parts))


# ---------------------------------------------------------------------------------------------- the two kinds
def open_bpe(spec: dict, config: dict) -> Tokenizer:
    """Byte-level BPE from what tokenizer.json says and what tokenizer_config.json says otherwise."""
    model = spec["model"]
    check(model, "model", type=["BPE"], vocab=None, merges=None, dropout=(None, 0), unk_token=None,
          continuing_subword_prefix=(None, ""), end_of_word_suffix=(None, ""), fuse_unk=None, byte_fallback=[False],
          ignore_merges=(False, True))
    cutters = steps(spec.get("pre_tokenizer"))
    kinds = [step["type"] for step in cutters]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"], ["Digits", "ByteLevel"]):
        raise Refused(f"says pre_tokenizer {', '.join(map(str, kinds)) or 'none':.100}, which is not known here; take "
                      "another model")
    prefix = {key: config[key] for key in ["add_prefix_space"] if key in config}
    last = {"use_regex": True, "add_prefix_space": True} | cutters[-1] | prefix
    check(last, "pre_tokenizer", type=None, trim_offsets=None, use_regex=[kinds[0] != "Split"],
          add_prefix_space=(False, True)[: 1 + (len(kinds) == 1)])
    cuts = GPT2_CUTS
    if len(cutters) == 2:
        check(cutters[0], "pre_tokenizer", type=None, pattern=[{"Regex": cuts} for cuts in CUTS], behavior=["Isolated"],
              invert=[False], individual_digits=(False, True))
        cuts = DIGIT_CUTS[cutters[0]["individual_digits"]] if kinds[0] == "Digits" else cutters[0]["pattern"]["Regex"]
    for step in steps(spec.get("normalizer")):
        check(step, "normalizer", type=["NFC"])
    for step in steps(spec.get("decoder")):
        check(step, "decoder", type=["ByteLevel"], add_prefix_space=None, trim_offsets=None, use_regex=None)
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    added, ids = tokens(spec, config)
    role = {key: ids[token["content"] if isinstance(token, dict) else token] for key in ROLES
            if (token := config.get(key))}
    role = {key: ids[END] for key in ("bos_token", "eos_token") if END in ids} | role  # as in GPT-2
    before, after = template(steps(spec.get("post_processor")))
    check({key: config[key] for key in ("add_bos_token", "add_eos_token") if key in config}, "setting",
          add_bos_token=(False, True), add_eos_token=(False, True))
    if "add_bos_token" in config or "add_eos_token" in config:
        before = [role["bos_token"]] if config.get("add_bos_token") else []
        after = [role["eos_token"]] if config.get("add_eos_token") else []
    try:
        tokenizer = Tokenizer(model["vocab"], merges, added, cuts, nfc if spec.get("normalizer") else None,
                              last["add_prefix_space"], before, after, model.get("ignore_merges", False))
    except KeyError as error:
        name = str(error)[:40]
        raise Refused(f"has merges that name {name}, which its vocabulary lacks; download it again") from error
    tokenizer.end = role.get("eos_token")
    return tokenizer


def open_wordpiece(spec: dict, config: dict) -> WordPiece:
    """WordPiece from what tokenizer.json says and what tokenizer_config.json says otherwise."""
    check(spec["model"], "model", type=["WordPiece"], vocab=None, unk_token=[UNK], continuing_subword_prefix=["##"],
          max_input_chars_per_word=[LONGEST])
    normalizer = {"strip_accents": None} | spec["normalizer"] | {there: config[here] for there, here in (
        ("lowercase", "do_lower_case"), ("strip_accents", "strip_accents"),
        ("handle_chinese_chars", "tokenize_chinese_chars")) if here in config}
    check(normalizer, "normalizer", type=["BertNormalizer"], clean_text=[True], handle_chinese_chars=[True],
          strip_accents=(None, True, False), lowercase=(True, False))
    check(spec["pre_tokenizer"], "pre_tokenizer", type=["BertPreTokenizer"])
    for step in steps(spec.get("decoder")):
        check(step, "decoder", type=["WordPiece"], prefix=["##"], cleanup=None)
    added, ids = tokens(spec, config)
    wide = next((name for name, some in added.items()
                 if some.normalized and (some.lstrip or some.rstrip or len(name.split()) != 1)), None)
    if wide is not None:
        raise Refused(f"has the token {wide[:40]!r} with white space in it or around it, looked for in normalized "
                      "text, which is not known here; take another model")
    tokenizer = WordPiece(sorted(ids, key=ids.get), normalizer["lowercase"], normalizer["strip_accents"], added)
    tokenizer.made_of = spec["model"]["vocab"]
    if template(steps(spec["post_processor"])) != ([tokenizer.cls], [tokenizer.sep]):
        raise Refused("says post_processor other than [CLS] text [SEP], which is not known here; take another model")
    return tokenizer


def open_tokenizer(folder: Path | str) -> Tokenizer | WordPiece:
    """The tokenizer in a model's folder: tokenizer.json, or else vocab.json with merges.txt, or else vocab.txt.

    What tokenizer_config.json beside it says goes first. The result's `save` writes the files that were read. Raises
    utils.InputError for a file that can't be read, contradicts itself, or has a setting that is not known here.
    """
    folder, config = Path(folder), {}
    names = [name for name in FILES if (folder / name).is_file()]
    path = folder / next((name for name in names if name in FILES[:2]), "vocab.txt")
    where = f"{path} or tokenizer_config.json" if "tokenizer_config.json" in names else path
    try:
        for name in names:
            if (size := (folder / name).stat().st_size) > LARGEST:
                raise utils.InputError(f"{folder / name} has {size:,} bytes, more than any tokenizer known here; take "
                                       "another model.")
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if name in names:
                config |= {key: value for key, value in read_json(folder / name).items()
                           if value is not None or key == "strip_accents"}
        if "added_tokens.json" in names and "added_tokens_decoder" not in config:  # transformers before 4.34
            special = {entry["content"] for entry in entries({}, config)}
            config["added_tokens_decoder"] = {
                i: {"content": token, "special": token in special, "normalized": token not in special}
                for token, i in read_json(folder / "added_tokens.json").items()}
        spec = read_json(path) if path.name == "tokenizer.json" else read_old(path, config)
        check({key: config[key] for key in ("split_special_tokens", "truncation_side") if key in config}, "setting",
              split_special_tokens=[False], truncation_side=["right"])
        kind = spec["model"].get("type") or ("BPE" if "merges" in spec["model"] else "WordPiece")
        check({"type": kind}, "model", type=["BPE", "WordPiece"])
        tokenizer = (open_bpe if kind == "BPE" else open_wordpiece)(spec, config)
        longest = config.get("model_max_length", 1e30)
        if type(longest) not in (int, float) or not longest >= 1:
            check({"model_max_length": longest}, "setting")
        tokenizer.max_length = int(longest) if longest < 1e9 else None
        read = {name: (folder / name).read_bytes() for name in names}
    except Refused as error:
        said = "".join(c if c.isprintable() else "?" for c in str(error))
        raise utils.InputError(f"{where} {said}.") from error
    except utils.InputError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {ascii(str(error)[:60])}"
        raise utils.InputError(f"{where} is not of the form that the tokenizers library writes ({what}); download it "
                               "again.") from error
    tokenizer.save = functools.partial(save, read)
    return tokenizer


def save(files: dict[str, bytes], folder: Path | str) -> None:
    """Write a tokenizer's files to a folder, and take away what another one left there."""
    for name in FILES:
        if name in files:
            utils.write_atomically(Path(folder) / name, lambda file: file.write(files[name]))
        else:
            (Path(folder) / name).unlink(missing_ok=True)


def read_old(path: Path, config: dict) -> dict:
    """GPT-2's two files or BERT's vocab.txt as a tokenizer.json would say it."""
    if path.name == "vocab.txt":
        vocab = {name: i for i, name in enumerate(read_names(path))}
        cls, sep = ([name, vocab.get(name)] for name in (CLS, SEP))
        special = [{"content": name, "id": vocab[name], "special": True} for name in SPECIAL if name in vocab]
        return {"model": {"vocab": vocab}, "pre_tokenizer": {"type": "BertPreTokenizer"},
                "normalizer": {"type": "BertNormalizer", "lowercase": True},
                "post_processor": {"type": "BertProcessing", "cls": cls, "sep": sep}, "added_tokens": special}
    vocab, merges = read_files(path, path.with_name("merges.txt"), {entry["content"] for entry in entries({}, config)})
    return {"model": {"vocab": vocab, "merges": merges},
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
            "added_tokens": [{"content": END, "id": vocab[END], "special": True}] if END in vocab else []}
