#!/usr/bin/env bash
# PEFT 0.21.2: a name in modules_to_save also takes every module whose name ends with it, without a dot between.
#
# target_modules are compared as whole parts of a dotted name. modules_to_save are not: "classifier" also takes
# DistilBERT's "pre_classifier". With task_type SEQ_CLS, which adds "classifier" and "score" by itself, that layer of
# dim x dim weights is copied, trained whole and saved, though nobody named it. Who reads the adapter by the config's
# names alone misses half of the head, or refuses the file as holding too much (chapter 06 matches as PEFT does).
#
# Seen with Python 3.11, peft 0.21.2, transformers 5.24.0, torch 2.13.0: modules_to_save is ["classifier", "score"], and
# both pre_classifier.weight and classifier.weight require gradients and stand in the adapter's file; the targets
# ["lin1"] do not take a layer called "xlin1". Fails when either changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2
cat > "$folder/look.py" <<'PYTHON'
import sys

import peft
import torch
import transformers
from safetensors import safe_open

config = transformers.DistilBertConfig(vocab_size=30, n_layers=1, n_heads=2, dim=8, hidden_dim=16, num_labels=2)
model = transformers.DistilBertForSequenceClassification(config)
model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_lin"], r=2))
model.save_pretrained(sys.argv[1])
with safe_open(sys.argv[1] + "/adapter_model.safetensors", "pt") as file:
    heads = sorted(name.removeprefix("base_model.model.") for name in file.keys() if "lora" not in name)
trained = sorted(name for name, p in model.named_parameters() if p.requires_grad and "classifier" in name)
saved = list(model.peft_config["default"].modules_to_save)
print(peft.__version__, saved, heads, trained, sep="\n")
assert saved == ["classifier", "score"]
assert heads == ["classifier.bias", "classifier.weight", "pre_classifier.bias", "pre_classifier.weight"]
assert any("pre_classifier" in name for name in trained)


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin1, self.xlin1 = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)


two = peft.get_peft_model(Two(), peft.LoraConfig(target_modules=["lin1"], r=2))
taken = sorted({name.split(".")[2] for name, _ in two.named_parameters() if "lora" in name})
print("target_modules ['lin1'] takes", taken)
assert taken == ["lin1"]
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder/adapter"
