#!/usr/bin/env bash
# torch 2.13.0: on the meta device nn.Linear is made at once, and nn.Embedding imports torch's compiler first.
#
# The meta device is for modules without values: sizes alone, to be filled from a file. nn.Linear there costs nothing:
# the uniform_ of its weights imports no module. nn.Embedding draws its rows by normal_, and torch then imports its
# Python decompositions, and with them sympy, torch._dynamo and hundreds of other modules. A sum of two tensors does the
# same. A program that opens a model of 264 MB in 0.04 s waits a second more for that (chapter 06 makes its empty
# tables with torch.empty instead).
#
# Seen with Python 3.11, torch 2.13.0 and 2.14.1: nn.Linear 0 new modules, nn.Embedding 823 and 892, among them
# sympy and torch._dynamo. Fails when nn.Linear begins to import modules, or nn.Embedding no longer does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$folder/look.py" <<'PYTHON'
import sys

import torch

counts = {}
for kind in (torch.nn.Linear, torch.nn.Embedding):
    before = set(sys.modules)
    kind(4, 4, device="meta")
    counts[kind.__name__] = len(set(sys.modules) - before)
print(torch.__version__, counts, "sympy" in sys.modules, "torch._dynamo" in sys.modules)
assert counts["Linear"] == 0 and counts["Embedding"] > 300 and "sympy" in sys.modules
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
