#!/usr/bin/env bash
# Makes or updates a Python environment: tools/bootstrap.sh EXTRA ENVDIR   (PYTHON= chooses the interpreter)
#
# An existing ENVDIR is filled in place and never deleted. Nothing is done when its stamp says that it was made from
# the same setup.cfg and constraints.txt.
set -euo pipefail

if [ $# -ne 2 ]; then
    echo "usage: tools/bootstrap.sh EXTRA ENVDIR" >&2
    exit 2
fi
extra=$1
cd "$(dirname "$0")/.."
env_dir=$2

stamp="$env_dir/.stamp-$extra"
want=$(cat setup.cfg constraints.txt | sha256sum | cut -d' ' -f1)
if [ -x "$env_dir/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
    exit 0
fi

# A version manager's shim may be on PATH and still refuse to run: ask each candidate, do not trust its name.
python=""
for candidate in ${PYTHON:+"$PYTHON"} python3 python3.11 python3.12 python3.13; do
    if found=$("$candidate" -c 'import sys; sys.version_info >= (3, 11) or sys.exit(1); print(sys.executable)' 2>/dev/null); then
        python=$found
        break
    elif [ -n "${PYTHON:-}" ]; then
        echo "PYTHON=$PYTHON does not run or is older than 3.11: name another interpreter." >&2
        exit 1
    fi
done
if [ -z "$python" ]; then
    echo "No Python 3.11 or newer found on PATH: install one, or name it with PYTHON=/path/to/python3." >&2
    exit 1
fi

export UV_PYTHON_DOWNLOADS=never # only the interpreter named above, never one fetched behind the user's back
if [ ! -x .uv/bin/uv ]; then
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "This Python has no venv module: run  apt-get install -y python3-venv  and try again." >&2
        exit 1
    fi
    "$python" -m venv .uv
    .uv/bin/python -m pip install --quiet 'uv>=0.8'
fi

if ! "$env_dir/bin/python" -c '' 2>/dev/null; then
    .uv/bin/uv venv --quiet --allow-existing --python "$python" "$env_dir"
fi
echo "Filling $env_dir with airflow-ai-provider[$extra] ..."
.uv/bin/uv pip install --quiet --python "$env_dir/bin/python" -c constraints.txt -e ".[$extra]"
echo "$want" >"$stamp"
