#!/usr/bin/env bash
# Get Chromium, for the tests of the playground, where none is there. Nothing else needs it; without it they are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}

say() { printf '== %s\n' "$*"; }
there() { "$venv/bin/python" -c 'import sys; from tests.browser import found; sys.exit(found() is None)'; }
debian() { [ "$(. /etc/os-release 2>/dev/null && echo "${ID:-}")" = debian ]; }  # Ubuntu's package is an empty snap

there && exit
if debian && [ "$(id -u)" = 0 ]; then
    say "installing Debian's Chromium"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends chromium; } >/dev/null || true
fi
if ! there; then
    say "installing playwright's Chromium"
    "$venv/bin/python" -m playwright install chromium || true
fi
there || say "no Chromium: the playground's tests are skipped. Install the package chromium, or Google Chrome, as root"
