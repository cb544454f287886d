#!/usr/bin/env bash
# Install mindpeft with its test extra into a virtual environment ($VENV, default .venv) and run the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet -e '.[test]'
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m ruff format --check .
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -n 2 "$@"
