"""The ensemble directory: built of copies of checkpoints' files beside its place, and moved there when it is whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from decar.router.errors import EnsembleError
from decar.router.files import TrainedRouter, router_folder, write_router
from decar.router.manifest import MANIFEST_NAME, Ensemble, ExpertEntry, Manifest, RouterEntry, write_manifest
from decar.training.new.checkpoints import Checkpoint
from decar.training.run import expert_path
from decar.training.stages import replaced_directory

_BLOCK_BYTES = 16 << 20

Progress = Callable[[int, int], None]


def check_target(target: Path, force: bool) -> None:
    """
    Raises:
        EnsembleError: something is at ``target`` that must not be replaced.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise EnsembleError(f"{target} exists and is no directory; move it away or choose another name")
    if not any(target.iterdir()):
        return
    if not (target / MANIFEST_NAME).is_file():
        raise EnsembleError(f"{target} exists and is no ensemble; move it away or choose another name")
    if not force:
        raise EnsembleError(f"{target} exists; give --force to replace it, or choose another name")


def size_bytes(checkpoints: Sequence[Checkpoint]) -> int:
    """Of all that is to be copied."""
    return sum(
        (checkpoint.folder / file).stat().st_size for checkpoint in checkpoints for file in checkpoint.files
    )


def check_space(target: Path, needed_bytes: int) -> None:
    """
    Raises:
        EnsembleError: the disk has less room.
    """
    disk = next(parent for parent in target.resolve().parents if parent.is_dir())
    free = shutil.disk_usage(disk).free
    if needed_bytes > free:
        raise EnsembleError(
            f"{target} would take {needed_bytes / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free there; free "
            "some, give a path on another disk, or give --hard-links where the checkpoints are on the same disk"
        )


def write_ensemble(
    target: Path,
    checkpoints: Sequence[Checkpoint],
    priors: Sequence[float],
    kind: RouterEntry,
    router: TrainedRouter[str] | None,
    hard_links: bool,
    progress: Progress = lambda done, total: None,
) -> Ensemble:
    """Write the ensemble to ``target``, in place of what is there, and read it back.

    Args:
        hard_links: files are the checkpoints' own, under a second name, instead of copies.
        progress: is called with the bytes copied, and of all.

    Raises:
        EnsembleError: files cannot be linked, or what was written cannot be served.
        TrainingError: the disk is full.
    """
    entries = tuple(
        ExpertEntry(name=checkpoint.name, path=expert_path(checkpoint.name), prior=prior)
        for checkpoint, prior in zip(checkpoints, priors, strict=True)
    )
    total, done = size_bytes(checkpoints), 0
    with replaced_directory(target, "give a path on another disk") as directory:
        for checkpoint in checkpoints:
            for file in checkpoint.files:
                source, copy = checkpoint.folder / file, directory / expert_path(checkpoint.name) / file
                copy.parent.mkdir(parents=True, exist_ok=True)
                if hard_links:
                    _link(source, copy)
                    done += source.stat().st_size
                    progress(done, total)
                else:
                    done = _copy(source, copy, done, total, progress)
        router_folder(directory).mkdir()
        if router is not None:
            write_router(router, router_folder(directory))
        write_manifest(directory, Manifest(name=target.name, experts=entries, router=kind))
        Ensemble.load(directory)
    return Ensemble.load(target)


def _copy(source: Path, copy: Path, done: int, total: int, progress: Progress) -> int:
    """Contents alone, whose copy anybody may read whom the umask lets: who serves may be another user."""
    with source.open("rb") as read, copy.open("xb") as write:
        while block := read.read(_BLOCK_BYTES):
            write.write(block)
            done += len(block)
            progress(done, total)
    return done


def _link(source: Path, copy: Path) -> None:
    try:
        os.link(source.resolve(), copy)  # the Hub's cache has links, and what they lead to is wanted
    except OSError as error:
        reason = "it is on another disk" if error.errno == errno.EXDEV else error.strerror
        raise EnsembleError(
            f"{source} cannot be linked into the ensemble ({reason}); leave out --hard-links to copy it"
        ) from None
