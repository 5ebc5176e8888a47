"""Where and by which command numbers were made: kept beside every one of them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("decar", "numpy", "scikit-learn", "torch", "transformers")


def environment() -> dict[str, Any]:
    """Hardware, versions, date (UTC) and command."""
    cpu = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": versions,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
    }


def command(overrides: Iterable[str] = ()) -> str:
    """This process's command, quoted for a shell, with further ``overrides`` for ``--set``."""
    further = [word for override in overrides for word in ("--set", override)]
    return shlex.join(["decar-train", *sys.argv[1:], *further])
