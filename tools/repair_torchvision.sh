#!/usr/bin/env bash
# Make torchvision importable in a virtual environment whose torch is a CPU build, or take it out.
# What PyPI has of it and its like is built for CUDA: beside a CPU torch it breaks whoever imports it.
set -euo pipefail
python=${1:?a virtual environment}/bin/python

imports() { "$python" -c "import $1" >/dev/null 2>&1; }
remove() { "$python" -m pip --disable-pip-version-check uninstall --quiet --yes "$1" 2>/dev/null || true; }

for package in torchaudio torchcodec; do
    imports $package || remove $package
done
if ! imports torchvision; then
    packages=$("$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    cp "$(dirname "$0")/torchvision_without_operators.py" "$packages/"
    echo "import torchvision_without_operators" >"$packages/torchvision_without_operators.pth"
    # Without torchvision text works, and images do not.
    imports torchvision || remove torchvision
fi
