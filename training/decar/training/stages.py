"""Finished work that is not done twice, and directories that are never half written.

Knows fingerprints and renames, nothing about what a stage produces.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from decar.router.errors import TrainingError
from decar.training.run import marker_file


def fingerprint(*parts: Any) -> str:
    """16 hex digits of JSON-like ``parts`` (pydantic models and paths included)."""
    text = json.dumps(parts, sort_keys=True, default=_jsonable)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest(*files: Path) -> str:
    """16 hex digits of the contents of ``files``, in order."""
    total = hashlib.sha256()
    for file in files:
        total.update(bytes.fromhex(sha256(file)))
    return total.hexdigest()[:16]


def sha256(file: Path) -> str:
    """The SHA-256 of the contents of ``file``, as `sha256sum` prints it."""
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def _jsonable(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else str(value)


def write_atomically(file: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


@contextmanager
def replaced_directory(directory: Path, elsewhere: str = "set work_dir to another disk") -> Iterator[Path]:
    """A temporary sibling to fill; it takes the place of ``directory`` on success and vanishes on failure.

    Args:
        elsewhere: how the user has it written to another disk.

    Raises:
        TrainingError: the disk, or the user's share of it, is full.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Fixed names, so that the next run clears what a killed one left.
    temporary = directory.with_name(f".{directory.name}.tmp")
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if directory.exists():
            os.replace(directory, old)
        os.replace(temporary, directory)
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise TrainingError(
            f"no space is left for {directory}; free some or {elsewhere}. "
            "Nothing of it was kept, and the same command starts it again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def lock(file: Path, work: str, shared: bool = False) -> Iterator[None]:
    """Hold the lock ``file``, which is removed afterwards. The system takes it from a process that is killed.

    Args:
        work: what is done under it, for errors.
        shared: whether others may hold it who share it too.

    Raises:
        TrainingError: another process holds it.
    """
    is_new = not file.parent.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _locked(file, work, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    try:
        yield
    finally:
        with suppress(OSError):  # somebody else shares it, or the directory holds more
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()
            if is_new:
                file.parent.rmdir()
        os.close(descriptor)


def _locked(file: Path, work: str, kind: int) -> int:
    """A descriptor of ``file`` under a lock."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            # Whoever held it before may have removed the file that was opened here.
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise TrainingError(
                f"another decar-train is at work on {work}; wait until it has ended, or set another work_dir"
            ) from None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            return descriptor  # a file system without locks
        os.close(descriptor)


def is_full_disk(error: Exception) -> bool:
    """Whether ``error`` says that the disk, or the user's share of it, is full, in whichever library's words."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors gives the system's message, torch its archive's.
    return os.strerror(errno.ENOSPC) in str(error) or (
        isinstance(error, RuntimeError) and "inline_container.cc" in str(error)
    )


@dataclass(frozen=True)
class Stage:
    """One stage's output directory. It is done when its marker holds what the stage would depend on now.

    ``config`` and ``inputs`` are fingerprints: of the stage's part of the configuration, and of its input files.
    """

    directory: Path
    config: str
    inputs: str

    @property
    def is_done(self) -> bool:
        return read_marker(self.directory) == {"config": self.config, "inputs": self.inputs}

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A directory to fill, put in place with its marker on success."""
        with replaced_directory(self.directory) as temporary:
            yield temporary
            marker = {"config": self.config, "inputs": self.inputs}
            write_atomically(marker_file(temporary), json.dumps(marker) + "\n")


def read_marker(directory: Path) -> dict[str, str] | None:
    """The marker of a finished stage in ``directory``, or None."""
    try:
        data = json.loads(marker_file(directory).read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
