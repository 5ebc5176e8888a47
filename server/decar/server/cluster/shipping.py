"""Checkpoints that are brought to hosts that lack them, through Ray's object store. Knows files, and no engines."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from decar.server.placement import gib

if TYPE_CHECKING:
    from decar.server.cluster.host import Host
    from decar.server.cluster.nodes import Cluster

logger = logging.getLogger("decar")

PART_BYTES = 16 << 20
"""Which a link of 10 Mb/s carries in the time that a host has for an answer."""
_SAID_EVERY = 10
"""Per cent."""

Told = Callable[[str], None]
"""Is told, in words, how far it is."""


def sizes_of(checkpoint: Path) -> dict[str, int]:
    """The files of a checkpoint, by name, in bytes."""
    return {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir()) if path.is_file()}


def ship(cluster: Cluster, host: Host, node: str, checkpoint: Path, told: Told) -> None:
    """Bring what a host lacks of a checkpoint to the same path there. What is there already is left as it is.

    Args:
        node: its name.

    Raises:
        StartError: it cannot be written there, or the host does not answer.
    """
    directory, sizes = str(checkpoint.resolve()), sizes_of(checkpoint)
    absent = host.absent(directory, sizes)
    if not absent:
        return
    whole, done, said = sum(sizes[name] for name in absent), 0, 0
    logger.info("copying %s of %s to node %r", gib(whole, 2), directory, node)
    for name in absent:
        with (checkpoint / name).open("rb") as file:
            while True:
                offset, part = file.tell(), file.read(PART_BYTES)
                last = offset + len(part) >= sizes[name]
                host.receive(f"{directory}/{name}", offset, cluster.put(part), last)
                done += len(part)
                told(f"copying weights to {node}: {gib(done, 2)} of {gib(whole, 2)}")
                if 100 * done >= whole * (said + _SAID_EVERY):
                    said = 100 * done // max(whole, 1)
                    logger.info("copied %d %% of %s to node %r", said, directory, node)
                if last:
                    break
