"""Engines as actors of Ray's, one for each expert, on the host that it is to be on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from decar.server.cluster.hosts import ClusterHosts
from decar.server.cluster.nodes import options_of
from decar.server.protocol.channels import GONE_S
from decar.server.vllm_adapter.actor import ActorManager, ActorProcess, begin
from decar.server.vllm_adapter.engine import Site, dealt_cores

_FOR_ENGINES = ("VLLM_", "HF_", "HUGGING_FACE_", "NCCL_", "TRITON_")
_NOT_FOR_ENGINES = ("RAY_", "VLLM_RPC_BASE_PATH")
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")
"""Whoever may ask the cluster may read an actor's environment."""


class Actors:
    """A `Launcher` of actors.

    Args:
        ranks: [K] of each expert's place.
        before: the environment as the user has set it for the gateway.
        mirrored: see `Plane`.
    """

    def __init__(
        self, hosts: ClusterHosts, ranks: Sequence[int], before: Mapping[str, str], mirrored: np.ndarray
    ):
        self._hosts, self._ranks, self._before, self._mirrored = hosts, ranks, before, mirrored
        self._starts = itertools.count(1)

    def site(self, expert: int) -> Site:
        host = self._hosts.ready(expert)
        there = self._hosts.experts_on(expert)
        cores = dealt_cores(host.facts.cores, [self._ranks[other] for other in there])
        return Site(host.spec, cores[there.index(expert)], host.facts.pid, own_environment=True)

    def launch(self, expert: int, config: Any, log_stats: bool) -> tuple[dict[str, str], ActorManager]:
        host = self._hosts.ready(expert)
        self._hosts.check(expert, host, Path(config.model_config.model), self._ranks[expert])
        (hears_here, speaks_here), (hears, speaks) = self._hosts.open(expert, next(self._starts), host)
        environment = {**_environment_for_actors(self._before), "VLLM_RPC_BASE_PATH": host.facts.folder}
        options = options_of(host.node, self._ranks[expert], environment)
        actor, pid, run = begin(config, hears, speaks, log_stats, options)
        process = ActorProcess(
            config.additional_config.name,
            pid,
            self._hosts.files(expert),
            partial(self._hosts.end, expert, pid, actor),
        )
        manager = ActorManager(process, run, lambda: float(self._mirrored[expert]), GONE_S)
        try:
            self._hosts.started(expert, pid)
        except BaseException:
            manager.shutdown()
            raise
        manager.watch_until_heard(hears_here)
        return {"input_address": hears_here, "output_address": speaks_here}, manager


def _environment_for_actors(before: Mapping[str, str]) -> dict[str, str]:
    """What decar and vLLM have set since, and what a user sets for vLLM and what it computes with."""
    return {
        name: value
        for name, value in os.environ.items()
        if (before.get(name) != value or name.startswith(_FOR_ENGINES))
        and not name.startswith(_NOT_FOR_ENGINES)
        and not any(word in name for word in _SECRET)
    }
