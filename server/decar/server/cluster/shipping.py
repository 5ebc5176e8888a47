"""Checkpoints that are brought to hosts that lack them, through Ray's object store. Knows files, and no engines."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from decar.router.errors import StartError
from decar.server.placement import gib

if TYPE_CHECKING:
    from decar.server.cluster.host import Host, Stamp
    from decar.server.cluster.nodes import Cluster

logger = logging.getLogger("decar")

PART_BYTES = 16 << 20
"""Which a link of 10 Mb/s carries in the time that a host has for an answer."""
_SAID_EVERY = 10
"""Per cent."""

Told = Callable[[str], None]
"""Is told, in words, how far it is."""


def files_of(checkpoint: Path) -> dict[str, Stamp]:
    """The files of a checkpoint, by name; hidden ones are none of it."""
    return {
        path.name: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(checkpoint.iterdir())
        if path.is_file() and not path.name.startswith(".")
    }


def ship(cluster: Cluster, host: Host, node: str, checkpoint: Path, told: Told) -> None:
    """Bring what a host lacks of a checkpoint to the same path there, and what has been brought and is another by now.
    Whatever else is there is left as it is.

    Args:
        node: its name.

    Raises:
        StartError: it cannot be written there, or the host does not answer.
    """
    directory, files = str(checkpoint.resolve()), files_of(checkpoint)
    absent = host.absent(directory, files)
    if not absent:
        return
    attempt = secrets.token_hex(4)
    whole, done, said = sum(files[name][0] for name in absent), 0, 0
    logger.info("copying %s of %s to node %r", gib(whole, 2), directory, node)
    for name in absent:
        stamp = files[name]
        with (checkpoint / name).open("rb") as file:
            last = False
            while not last:
                offset, part = file.tell(), file.read(PART_BYTES)
                last = offset + len(part) >= stamp[0]
                if not part and not last:
                    raise StartError(f"{checkpoint / name} has become shorter while it was copied")
                host.receive(
                    f"{directory}/{name}", attempt, offset, cluster.put(part), stamp if last else None
                )
                done += len(part)
                told(f"copying weights to {node}: {gib(done, 2)} of {gib(whole, 2)}")
                if 100 * done >= whole * (said + _SAID_EVERY):
                    said = 100 * done // max(whole, 1)
                    logger.info("copied %d %% of %s to node %r", said, directory, node)
