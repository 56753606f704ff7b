"""Folders that other programs and versions write, opened by chapter 06 and compared: prints a Markdown table.

    python tests/folders_table.py                a few minutes: each version is installed in a folder of its own first
    python tests/folders_table.py --keep DIR     keep what was installed and written, and use it again

A writer runs in a process of its own, with its version before all others on Python's path and this Python's torch. It
writes a folder, and beside it the scores that it computes itself; chapter 06 opens the folder and computes them too.
What can't be installed or run here is said. pytest does not collect this file.
"""
import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
OLD = ["transformers==4.40.0", "tokenizers==0.19.1", "huggingface-hub==0.36.2", "accelerate==0.30.0", "regex"]
NEW = ["transformers==5.24.0"]  # what it needs besides is there, if tests/requirements.txt is installed
WRITERS = [  # what is written, by what
    *(("GPT-2", with_) for with_ in (OLD, NEW)), *(("GPT-2 and [PAD]", with_) for with_ in (OLD, NEW)),
    *(("BERT classifier", with_) for with_ in (OLD, NEW)), *(("DistilBERT", with_) for with_ in (OLD, NEW)),
    *((kind, [f"peft=={version}", *with_])
      for kind in ("LoRA", "LoRA SEQ_CLS", "LoRA patterns", "LoRA regex", "DoRA SEQ_CLS")
      for version, with_ in (("0.3.0", OLD), ("0.10.0", OLD), ("0.21.2", NEW))),
    *((kind, [f"sentence-transformers=={version}", *with_]) for kind in ("[CLS], Dense", "mean and max")
      for version, with_ in (("2.7.0", OLD), ("6.2.0", NEW))),
    ("save_model", ["safetensors==0.4.5", *OLD]), ("save_model", ["safetensors==0.8.0", *NEW]),
    ("torch.save", OLD), ("torch.save, old form", NEW)]
TEXT = "The king was ill, and nobody knew why. It's 1603 again!"
LORA = {"LoRA patterns": {"rank_pattern": {"h.1.attn.c_attn": 2}, "alpha_pattern": {"h.0.attn.c_attn": 3}},
        "LoRA regex": {"target_modules": r".*\.1\.attn\.c_attn"}, "DoRA SEQ_CLS": {"use_dora": True}}


# ---------------------------------------------------------------------------------------------- the writer's process
def write(kind: str, folder: Path) -> None:
    """Write `kind` to folder, and expected.pt beside it, with whatever versions are on Python's path."""
    import tokenizers
    import transformers as t

    torch.manual_seed(0)
    base = folder.with_name(folder.name + "-base")
    base.mkdir(parents=True)
    family = "bert" if kind in ("BERT classifier", "[CLS], Dense", "mean and max") or "SEQ" in kind else \
        "distilbert" if kind == "DistilBERT" else "gpt2"
    if family == "gpt2":
        bpe = tokenizers.ByteLevelBPETokenizer()
        bpe.train_from_iterator([TEXT * 3], vocab_size=300, special_tokens=["<|endoftext|>"])
        bpe.save_model(str(base))
        config = t.GPT2Config(vocab_size=bpe.get_vocab_size(), n_layer=2, n_head=2, n_embd=32, n_positions=64,
                              bos_token_id=0, eos_token_id=0)
    else:
        words = [*"[PAD] [UNK] [CLS] [SEP] [MASK]".split(), *sorted(set(TEXT.lower().split())), *"abcdefghinrstuw'.,!"]
        (base / "vocab.txt").write_text("\n".join(words) + "\n")
        labels = {"id2label": {0: "no", 1: "yes", 2: "so"}, "label2id": {"no": 0, "yes": 1, "so": 2}}
        config = t.DistilBertConfig(vocab_size=len(words), n_layers=2, n_heads=2, dim=32, hidden_dim=64,
                                    max_position_embeddings=64) if family == "distilbert" else t.BertConfig(
            vocab_size=len(words), num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=64,
            max_position_embeddings=64, **labels)
    config.save_pretrained(base)
    tokenizer = t.AutoTokenizer.from_pretrained(str(base))
    name = {"gpt2": "GPT2LMHeadModel", "distilbert": "DistilBertModel"}.get(
        family, "BertForSequenceClassification" if "classifier" in kind or "SEQ" in kind else "BertModel")
    model = getattr(t, name)(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if kind == "GPT-2 and [PAD]":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.resize_token_embeddings(len(tokenizer))
    if "DoRA" in kind or "LoRA" in kind:
        import peft

        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        options = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0,
                   "task_type": "SEQ_CLS" if "SEQ" in kind else "CAUSAL_LM",
                   "target_modules": ["query", "value"] if "SEQ" in kind else ["c_attn"]} | LORA.get(kind, {})
        model = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.3)
        model.save_pretrained(str(folder))
    elif "[CLS]" in kind or "mean" in kind:
        from sentence_transformers import SentenceTransformer, models

        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        first = models.Transformer(str(base), max_seq_length=12)
        chosen = {"pooling_mode_cls_token": "CLS" in kind, "pooling_mode_mean_tokens": "mean" in kind,
                  "pooling_mode_max_tokens": "max" in kind}
        last = [models.Dense(32, 8), models.Normalize()] if "CLS" in kind else []
        model = SentenceTransformer(modules=[first, models.Pooling(32, **chosen), *last], device="cpu")
        model.save(str(folder))
        expected = torch.nn.functional.normalize(torch.as_tensor(model.encode([TEXT, "ill"])), dim=-1)
        return torch.save({"scores": expected}, folder / "expected.pt")
    else:
        folder.mkdir()
        tokenizer.save_pretrained(folder)
        if kind == "save_model":
            import safetensors.torch
            config.save_pretrained(folder)
            safetensors.torch.save_model(model, str(folder / "model.safetensors"))
        elif "torch.save" in kind:
            config.save_pretrained(folder)
            torch.save(model.state_dict(), folder / "pytorch_model.bin",
                       _use_new_zipfile_serialization="old" not in kind)
        else:
            model.save_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.save({"ids": ids, "scores": model(input_ids=ids)[0]}, folder / "expected.pt")


# ---------------------------------------------------------------------------------------------- chapter 06
@torch.inference_mode()
def difference(kind: str, folder: Path) -> float:
    """The largest difference between the scores of folder's writer and those computed here from the same text."""
    sys.path[:0] = [str(ROOT / "06_finetune"), str(ROOT)]
    import bert
    from gpt2 import read_model
    from load import find_base
    from peft_files import load_adapter

    expected, adapter = torch.load(folder / "expected.pt", weights_only=True), "LoRA" in kind or "DoRA" in kind
    if "[CLS]" in kind or "mean" in kind:
        ours = bert.embed(*bert.open_bert(folder, "x")[:2], [TEXT, "ill"])
        return (ours - expected["scores"]).abs().max().item()
    where = folder.with_name(folder.name + "-base") if adapter else folder
    if "BERT" in kind or "SEQ" in kind:
        model, tokenizer, _ = bert.open_bert(where, "x", bert.Bert if "Distil" in kind else bert.Classifier)
        ids = tokenizer.encode(TEXT).ids
    else:
        base = find_base(str(where))
        model, ids = read_model(base.path, base.config), base.tokenizer.encode(TEXT)
    if adapter:
        load_adapter(model, folder, "" if "SEQ" in kind else "transformer.")
    assert ids == expected["ids"][0].tolist(), "other ids"
    return (model.eval()(torch.tensor([ids])) - expected["scores"]).abs().max().item()


def install(packages: list[str], place: Path) -> Path:
    """A folder with the packages, without what they ask for: torch is this Python's. Raises CalledProcessError."""
    folder = place / "-".join(packages[0].split("=="))
    if not folder.exists():
        part = folder.with_suffix(".part")
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", str(part), "--no-deps", *packages],
                       check=True, capture_output=True, text=True)
        part.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", type=Path, help="a folder for what is installed and written")
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)  # a writer's process
    args = parser.parse_args()
    if args.write:
        return write(args.write[0], Path(args.write[1]))
    print("| written by | what | opened here | differs by |\n|---|---|---|---|")
    with contextlib.ExitStack() as stack:
        place = (args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        place.mkdir(exist_ok=True, parents=True)
        for i, (kind, packages) in enumerate(WRITERS):
            by = " and ".join(package.replace("==", " ") for package in packages if package.startswith(
                ("transformers", "peft", "sentence", "safetensors")))
            folder = place / f"{i}"
            if "torch.save" in kind:
                by = f"torch {torch.__version__.split('+')[0]} and {by}"
            with contextlib.redirect_stdout(io.StringIO()) as said:
                try:
                    path = os.pathsep.join(map(str, [install(packages, place)]))
                    if not (folder / "expected.pt").exists():
                        subprocess.run(["rm", "-rf", str(folder), f"{folder}-base"], check=True)
                        env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
                        subprocess.run([sys.executable, __file__, "--write", kind, str(folder)], check=True, text=True,
                                       capture_output=True, env=env)
                    found = difference(kind, folder)
                    row = ("yes" if found < 1e-5 else "**wrong**", f"{found:.0e}")
                except subprocess.CalledProcessError as error:
                    row = ("not written here", (error.stderr or "").strip().splitlines()[-1][-120:])
                except (ValueError, AssertionError) as error:
                    row = ("refused", f"{error}".replace(str(place), "")[:200])
            notes = [line.replace(str(place), "") for line in said.getvalue().splitlines()]
            print(f"| {by} | {kind} | {row[0]} | {'; '.join([row[1], *notes])} |", flush=True)


if __name__ == "__main__":
    main()
