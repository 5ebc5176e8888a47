"""What the plane needs of a processor. Knows nothing else."""

from __future__ import annotations

import platform

from decar.router.errors import StartError

ORDERED = frozenset({"x86_64", "AMD64"})
"""Machines whose cores see each other's writes in the order of writing. Engines rely on it: data first, stamp after.
Elsewhere a stamp may be seen before its row, and an answer would be wrong without a word."""


def check_memory_order() -> None:
    """
    Raises:
        StartError: the plane does not fit this machine.
    """
    machine = platform.machine()
    if machine not in ORDERED:
        raise StartError(
            f"this machine's processor is {machine or 'unknown'}, and engines exchange rows in an order that only "
            "x86-64 keeps: serve the ensemble on an x86-64 machine"
        )
