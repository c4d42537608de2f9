#!/usr/bin/env bash
# Makes sure that the servers of the integration tests can run: PostgreSQL, Java 17, Maven (Debian package names).
#
# Installs what is missing when it may (root and apt-get), otherwise says the one command to run and fails.
# No daemon is started by the installation: the tests start their own on free ports.
set -euo pipefail

missing=()
compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || command -v postgres >/dev/null || missing+=(postgresql)
command -v java >/dev/null || missing+=(openjdk-17-jre-headless)
command -v mvn >/dev/null || missing+=(maven)
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "The integration tests need: ${missing[*]}. Run:  sudo apt-get install -y --no-install-recommends ${missing[*]}" >&2
    exit 1
fi

policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
echo "Installing ${missing[*]} ..."
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
