#!/usr/bin/env bash
# Install mindpeft with its test extra into a virtual environment ($VENV, default .venv) and run the tests;
# arguments are pytest's.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet -e '.[test]'
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m ruff format --check .

failed=0
run() {
    OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -n 2 "$@" || failed=1
}
if [ $# -gt 0 ]; then
    run "$@"
else # in parts: MindSpore keeps what it compiled until the process ends, gigabytes of it
    run tests --ignore=tests/parity --ignore=tests/tuners
    run tests/parity
    run tests/tuners
fi
exit "$failed"
