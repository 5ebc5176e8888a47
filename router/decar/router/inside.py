"""Whether what an ensemble directory names lies inside of it. Knows paths, not what the files are for."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

from decar.router.errors import EnsembleError


def inside(directory: Path, named: str) -> Path:
    """The file or folder ``named`` in ``directory``, with every link followed.

    Raises:
        EnsembleError: it lies outside, or no path can be called that.
    """
    try:
        path = (directory / named).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a NUL
        raise EnsembleError(f"{named!r} is no path ({error}); name a folder inside the directory") from None
    if not path.is_relative_to(directory.resolve()):
        raise EnsembleError(f"path {named!r} leaves the ensemble directory; copy it inside")
    return path


def check_file_name(name: object) -> str:
    """
    Raises:
        EnsembleError: ``name`` is not that of a file in the folder that names it, or in one below.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise EnsembleError(f"{name!r} is no file name; export the expert again")
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts:
        raise EnsembleError(f"{name!r} leaves the expert's folder; copy the file inside")
    return name


def links_out(directory: Path) -> list[str]:
    """A line for each link anywhere in ``directory`` that leads out of it."""
    root = directory.resolve()
    found = []
    for parent, folders, files in os.walk(directory):
        for path in (Path(parent, name) for name in sorted([*folders, *files])):
            if path.is_symlink() and _leaves(path, root):
                found.append(
                    f"{path} is a link to {os.readlink(path)}, which leaves the ensemble directory; "
                    "copy what it leads to inside"
                )
    return found


def _leaves(link: Path, root: Path) -> bool:
    try:
        return not link.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # a loop of links leads nowhere
        return False
