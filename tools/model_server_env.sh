#!/usr/bin/env bash
# Prints the folder of a model server's Python environment, making it the first time: tools/model_server_env.sh NAME PYTHON
#
# Each server has an environment of its own: their requirements contradict ours. The folder lies outside the checkout,
# keyed by versions, and appears by one rename: a broken download leaves nothing behind that a later run would take for
# complete.
set -euo pipefail

case "${1:-}" in
    mlserver) packages=(mlserver==1.7.1 mlserver-sklearn==1.7.1) key=1.7.1 ;;
    triton) packages=(nvidia-pytriton==0.7.0) key=0.7.0 ;;
    *) echo "usage: tools/model_server_env.sh mlserver|triton PYTHON" >&2; exit 2 ;;
esac
name=$1 python=$2
cd "$(dirname "$0")/.."
tag=$("$python" -c 'import sys; print("py%d%d" % sys.version_info[:2])')
cache=${XDG_CACHE_HOME:-$HOME/.cache}/airflow-ai-provider/$name-$key-$tag
if [ ! -d "$cache" ]; then
    uv=.uv/bin/uv
    [ -x $uv ] || uv=$(command -v uv) || { echo "No uv here: run  make setup  first." >&2; exit 1; }
    mkdir -p "$(dirname "$cache")"
    fresh=$(mktemp -d "$cache.XXXXXX")
    trap 'rm -rf "$fresh"' EXIT
    echo "Filling an environment with ${packages[*]} ..." >&2
    export UV_PYTHON_DOWNLOADS=never # only the interpreter named above
    $uv venv --quiet --relocatable --python "$python" "$fresh/env" >&2
    $uv pip install --quiet --python "$fresh/env/bin/python" "${packages[@]}" >&2
    mv -T "$fresh/env" "$cache" 2>/dev/null || [ -d "$cache" ] # another run may have been first
fi
echo "$cache"
