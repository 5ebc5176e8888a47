"""The two kinds of ensembles: what serving one differs in from serving the other. Chosen once, by the manifest.

Knows how engines and the gateway of each are made, and not when. K experts.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from decar.router import Ensemble
from decar.router.errors import StartError
from decar.server.placement import CPU_KV_BYTES

if TYPE_CHECKING:
    from decar.server.gateway.ensemble import EnsembleClient
    from decar.server.gateway.flow import FlowEnsemble
    from decar.server.hosts import Planes
    from decar.server.protocol.cores import GatewayThread


class Kind(Protocol):
    """How experts of one kind are served. Its methods are called when vLLM may be imported, but for `refuse`."""

    def refuse(self, ray: str | None, simulated_hosts: int, wire_rows: int) -> None:
        """
        Raises:
            StartError: one of these flags is not for this kind.
        """
        ...

    def engine_config(self, ensemble: Ensemble, expert: int, args: Namespace) -> Any:
        """vLLM's, of one expert's engine.

        Raises:
            StartError: it cannot be served.
        """
        ...

    def slots(self, configs: Sequence[Any], vocab_size: int) -> int:
        """How many slots the plane needs."""
        ...

    def rows_on_device(self) -> bool:
        """Whether rows may lie where a GPU has computed them."""
        ...

    def client(
        self,
        ensemble: Ensemble,
        engines: Sequence[Any],
        planes: Planes,
        thread: GatewayThread,
        min_experts: int,
        max_queued: int | None,
    ) -> EnsembleClient | FlowEnsemble:
        """The gateway over ``engines``, made of its parts."""
        ...

    async def warm_up(self, client: Any, image: Any | None, expert: int | None = None) -> None:
        """As `decar.server.gateway.warm_up.warm_up`."""
        ...


def kind_of(ensemble: Ensemble) -> Kind:
    return FlowKind() if ensemble.manifest.kind == "flow" else AutoregressiveKind()


class AutoregressiveKind:
    """Experts generate a token after the others, in lockstep."""

    def refuse(self, ray: str | None, simulated_hosts: int, wire_rows: int) -> None:
        """Nothing."""

    def engine_config(self, ensemble: Ensemble, expert: int, args: Namespace) -> Any:
        from decar.server.vllm_adapter.arguments import engine_config

        return engine_config(ensemble, expert, args, CPU_KV_BYTES)

    def slots(self, configs: Sequence[Any], vocab_size: int) -> int:
        return int(configs[0].scheduler_config.max_num_seqs)

    def rows_on_device(self) -> bool:
        return True

    def client(
        self,
        ensemble: Ensemble,
        engines: Sequence[Any],
        planes: Planes,
        thread: GatewayThread,
        min_experts: int,
        max_queued: int | None,
    ) -> EnsembleClient:
        from decar.server.gateway.ensemble import EnsembleClient
        from decar.server.metrics import EnsembleMetrics
        from decar.server.vllm_adapter.relay import Relay

        plane = planes.gateways
        return EnsembleClient(
            ensemble,
            engines,
            plane,
            relay=Relay(engines, plane.blocks, thread),
            thread=thread,
            metrics=EnsembleMetrics(plane),
            min_experts=min_experts,
            max_queued=max_queued,
            hosts=planes.hosts.of,
        )

    async def warm_up(self, client: Any, image: Any | None, expert: int | None = None) -> None:
        from decar.server.gateway.warm_up import warm_up

        await warm_up(client, image, expert)


class FlowKind:
    """Experts reveal masked tokens, in rounds."""

    def refuse(self, ray: str | None, simulated_hosts: int, wire_rows: int) -> None:
        for flag, given in (
            ("--ray", ray is not None),
            ("--simulated-hosts", simulated_hosts > 1),
            ("--wire-rows", wire_rows > 0),
        ):
            if given:
                raise StartError(
                    f"{flag} is not offered for a flow ensemble, whose experts are on the gateway's host: leave it out"
                )

    def engine_config(self, ensemble: Ensemble, expert: int, args: Namespace) -> Any:
        from decar.server.vllm_adapter.arguments import flow_engine_config

        return flow_engine_config(ensemble, expert, args)

    def slots(self, configs: Sequence[Any], vocab_size: int) -> int:
        """Each has two entries for rows, which are any positions' here."""
        from decar.server.protocol.flow import entries_of

        first = configs[0]
        answers = first.scheduler_config.max_num_seqs
        return entries_of(answers, first.model_config.max_model_len, vocab_size) // 2

    def rows_on_device(self) -> bool:
        return False  # the gateway mixes them, which computes on no GPU

    def client(
        self,
        ensemble: Ensemble,
        engines: Sequence[Any],
        planes: Planes,
        thread: GatewayThread,
        min_experts: int,
        max_queued: int | None,
    ) -> FlowEnsemble:
        from decar.server.gateway.flow import FlowEnsemble
        from decar.server.metrics import FlowMetrics
        from decar.server.vllm_adapter.virtual import VirtualEngine

        first = engines[0].client
        return FlowEnsemble(
            ensemble,
            engines,
            planes.gateways,
            begin=VirtualEngine(first).begin,
            slots=first.vllm_config.scheduler_config.max_num_seqs,
            thread=thread,
            metrics=FlowMetrics(planes.gateways),
            min_experts=min_experts,
            max_queued=max_queued,
        )

    async def warm_up(self, client: Any, image: Any | None, expert: int | None = None) -> None:
        from decar.server.gateway.warm_up import warm_up_flow

        await warm_up_flow(client, expert)
