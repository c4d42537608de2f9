#!/usr/bin/env bash
# Writes constraints.txt: the versions, over all extras, that the tests ran with. Needs an environment's .uv (make setup).
#
# onnx-gpu is left out: its wheel installs the same module as onnx. The resolution is universal from 3.11 up, so a
# package that resolves differently on a newer Python carries a marker. No index, no path and no date get into the file.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -x .uv/bin/uv ] || { echo "No .uv/bin/uv here: run  make setup  first." >&2; exit 1; }
fresh=$(mktemp)
trap 'rm -f "$fresh"' EXIT
.uv/bin/uv pip compile --quiet --universal --python-version 3.11 --upgrade \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links --no-emit-package airflow-ai-provider \
    --extra bench --output-file "$fresh" setup.cfg
if grep -nE '://|file:|^-|@ ' "$fresh"; then
    echo "The lines above name a place instead of a version: constraints.txt is left as it was." >&2
    exit 1
fi
cp "$fresh" constraints.txt
echo "constraints.txt: $(wc -l <constraints.txt) packages"
