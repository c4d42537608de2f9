#!/usr/bin/env bash
# Prints the folder that holds the Apicurio registry, fetching it through Maven the first time (109 MB).
#
# 3.0.9 is the last line that runs on Java 17. The folder lies outside the checkout, keyed by version, and appears by
# one rename: a broken download leaves nothing behind that a later run would take for complete.
set -euo pipefail

version=3.0.9
cache=${XDG_CACHE_HOME:-$HOME/.cache}/airflow-ai-provider/apicurio-$version
if [ ! -d "$cache" ]; then
    command -v mvn >/dev/null || { echo "The registry comes through Maven: run  apt-get install -y maven  first." >&2; exit 1; }
    mkdir -p "$(dirname "$cache")"
    fresh=$(mktemp -d "$cache.XXXXXX")
    trap 'rm -rf "$fresh"' EXIT
    echo "Fetching the Apicurio registry $version through Maven ..." >&2
    artifact=io.apicurio:apicurio-registry-app:$version:tar.gz:all
    mvn -q -B dependency:get -Dtransitive=false -Dartifact="$artifact" >&2
    mvn -q -B dependency:copy -Dartifact="$artifact" -DoutputDirectory="$fresh" >&2
    mkdir "$fresh/app"
    tar -xzf "$fresh"/apicurio-registry-app-*.tar.gz -C "$fresh/app"
    mv -T "$fresh/app" "$cache" 2>/dev/null || [ -d "$cache" ] # another run may have been first
fi
echo "$cache"
