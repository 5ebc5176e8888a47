"""Clients' own environments, side by side in one folder: installed once, and asked for versions. Runs no check."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

from decar.server.vllm_adapter.versions import installed_version

from .clients import Client, Environment

INSTALLED_WITHIN_S = 1_800
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


class NotInstalled(Exception):
    """A client's packages cannot be had; says why, in the installer's words."""


def installed(folder: Path, environment: Environment) -> Path:
    """The environment's own program, its packages installed in ``folder``.

    Raises:
        NotInstalled: they cannot be.
    """
    if environment.kind == "own":
        return Path(sys.executable)
    program = Path("node") if environment.kind == "npm" else folder / "bin" / "python"
    wanted = hashlib.sha256(repr(environment).encode()).hexdigest()
    ready = folder / ".ready"
    if ready.exists() and ready.read_text() == wanted:
        return program
    folder.mkdir(parents=True, exist_ok=True)
    if environment.kind == "npm":
        (folder / "package.json").write_text(json.dumps({"private": True}))
        _install(["npm", "install", "--no-audit", "--no-fund", *environment.packages], folder)
    else:
        venv.create(folder, with_pip=environment.needs_torch, clear=True)
        pinned = []
        if environment.needs_torch:  # pip's own configuration may know a local wheel, as in tools/setup.sh
            pip = [str(program), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            pinned = [f"torch=={importlib.metadata.version('torch')}"]
            try:
                _install([*pip, *pinned], folder)
            except NotInstalled:
                _install([*pip, *pinned, "--index-url", TORCH_INDEX], folder)
        uv = str(_uv(folder.parent))
        _install(
            [uv, "pip", "install", "--quiet", "--python", str(program), *pinned, *environment.packages],
            folder,
        )
    ready.write_text(wanted)
    return program


def _uv(folder: Path) -> Path:
    """uv, which finds what fits together in seconds where pip takes minutes, and keeps one copy for all."""
    own = folder / "uv"
    if not (own / "bin" / "uv").exists():
        venv.create(own, with_pip=True, clear=True)
        _install([str(own / "bin" / "python"), "-m", "pip", "install", "--quiet", "uv"], own)
    return own / "bin" / "uv"


def _install(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=INSTALLED_WITHIN_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(str(error)) from None
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines()]
        errors = [line for line in lines if line.lower().startswith(("error", "npm err"))]
        raise NotInstalled((errors or lines or ["no reason given"])[-1])


def version_of(client: Client, environment: Environment, folder: Path, program: Path) -> str:
    """Of the client's package, as it is installed."""
    if client.package == "vllm":
        return installed_version() or ""
    if environment.kind == "npm":
        package: dict[str, str] = json.loads(
            (folder / "node_modules" / client.package / "package.json").read_text()
        )
        return package["version"]
    code = f"import importlib.metadata as m; print(m.version({client.package!r}))"
    done = subprocess.run(
        [program, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    return done.stdout.strip()
