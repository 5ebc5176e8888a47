"""Starting and stopping: from an ensemble directory to a listening server, in order, and nothing else.

Check the directory, take the port, clean up after a predecessor, make the plane, start K engines side by side, warm
every path, and only then listen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import socket
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from decar.router import Ensemble, Reading
from decar.router.errors import StartError
from decar.router.manifest import MAX_EXPERTS
from decar.server.placement import CPU_KV_BYTES, Place, check_memory, exchanged, place, visible_gpus
from decar.server.protocol.machine import check_memory_order
from decar.server.protocol.plane import (
    DIRECTORY,
    Plane,
    make_folder,
    prompt_unit,
    remove_all_of,
    remove_stale,
)
from decar.server.vllm_adapter.versions import check_version

if TYPE_CHECKING:
    from decar.server.gateway.ensemble import EnsembleClient
    from decar.server.gateway.seats import Seats
    from decar.server.gateway.supervisor import Supervisor
    from decar.server.vllm_adapter.engine import EnginePlan
    from decar.server.vllm_adapter.failures import Failures

logger = logging.getLogger("decar")


def serve(
    directory: Path,
    flags: Sequence[str],
    placement: str | None = None,
    allow_untested_vllm: bool = False,
    min_experts: int = 1,
    engine_timeout_s: float = 30.0,
    shutdown_timeout_s: float = 30.0,
    max_queued: int | None = None,
    admin_key: str | None = None,
    reload_timeout_s: float = 30.0,
    max_experts: int | None = None,
    ui: bool = True,
) -> None:
    """Serve the ensemble in ``directory`` until SIGINT or SIGTERM, and the requests that run then to their end.

    Args:
        flags: vLLM's own server and engine flags, given to every engine.
        placement: "EXPERT=GPU,..."; None leaves it to decar.
        allow_untested_vllm: go on with a vLLM of any version.
        min_experts: how many have to live for /health to say that the ensemble is served.
        engine_timeout_s: an engine that does not finish a step for so long is ended, and started again.
        shutdown_timeout_s: for requests that run when the server is told to stop.
        max_queued: how many requests may wait before more are refused; None: four for each slot.
        admin_key: shows paths and processes to whoever gives it, and reloads; None: nobody sees them.
        reload_timeout_s: how long running answers are waited for before an expert is exchanged.
        max_experts: how many there is room for, those included that a reload may add; None: for those that there are.
        ui: offer the page at /.

    Raises:
        EnsembleError: the directory cannot be served.
        StartError: processor, vLLM's version, flags, port, memory or an engine.
    """
    check_memory_order()
    check_version(allow_untested_vllm)
    reading = Reading.of(directory)
    ensemble = reading.ensemble
    if not 1 <= min_experts <= len(ensemble.experts):
        raise StartError(f"--min-experts is {min_experts}; {ensemble.name!r} has {len(ensemble.experts)}")
    max_experts = max_experts or len(ensemble.experts)
    if not len(ensemble.experts) <= max_experts <= MAX_EXPERTS:
        raise StartError(
            f"--max-experts is {max_experts}; {ensemble.name!r} has {len(ensemble.experts)}, and more than "
            f"{MAX_EXPERTS} cannot be served together"
        )

    from decar.server.vllm_adapter.arguments import parse_flags, prepare_environment

    prepare_environment()  # before anything imports vLLM

    import uvloop

    from decar.server.gateway.request import model_ids
    from decar.server.vllm_adapter.app import bound_socket

    args = parse_flags(flags, str(ensemble.directory), model_ids(ensemble))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
    with bound_socket(args) as sock:
        for name in remove_stale():
            logger.warning("removed %s of a server that is gone", DIRECTORY / name)
        sockets = make_folder()
        os.environ.setdefault("VLLM_RPC_BASE_PATH", str(sockets))
        try:
            running = _running_ensemble(
                ensemble, args, placement, min_experts, engine_timeout_s, max_queued, max_experts
            )
            uvloop.run(
                _serve(running, reading, args, sock, shutdown_timeout_s, admin_key, reload_timeout_s, ui)
            )
        finally:
            remove_all_of(sockets.name)


async def _serve(
    running: AbstractAsyncContextManager[tuple[EnsembleClient, Supervisor, Engines]],
    reading: Reading,
    args: Namespace,
    sock: socket.socket,
    shutdown_timeout_s: float,
    admin_key: str | None,
    reload_timeout_s: float,
    ui: bool,
) -> None:
    from decar.server.gateway.api import extend
    from decar.server.gateway.gate import Gate
    from decar.server.gateway.http_server import BoundedHttpProtocol
    from decar.server.gateway.reload import Reloader
    from decar.server.gateway.request import asks_for_counts, model_ids
    from decar.server.gateway.signals import told_to_stop
    from decar.server.vllm_adapter.app import api_keys, listen, name_models, openai_app

    async with running as (client, supervisor, engines):
        gate = Gate()
        keys = api_keys(args, admin_key)
        app = await openai_app(client, args, asks_for_counts)
        reloader = Reloader(
            client,
            supervisor,
            reading,
            read=partial(Reading.of, reading.ensemble.directory),
            plan=engines.of,
            plans=engines.starter.plans,
            tell=lambda ensemble: name_models(app, model_ids(ensemble)),
            patience_s=reload_timeout_s,
        )
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, reloader.reload_soon)
        extend(app, client, gate, reloader, keys, admin_key, ui)

        async def until_drained() -> None:
            await told_to_stop(partial(_end_now, client.plane.spec.name))
            logger.info("told to stop: %d requests have %.0f s left", gate.running, shutdown_timeout_s)
            loop.remove_signal_handler(signal.SIGHUP)
            supervisor.stop()
            await gate.drain(shutdown_timeout_s)

        host, port = sock.getsockname()[:2]
        print(f"decar: {client.ensemble.name} listens on http://{host}:{port}/v1", flush=True)
        await listen(app, args, sock, BoundedHttpProtocol, until_drained())


def _end_now(name: str) -> NoReturn:
    """End all processes, and remove all that this one has made, ``name`` included."""
    for child in multiprocessing.active_children():
        child.kill()
    remove_all_of(name)
    os._exit(1)


@contextlib.asynccontextmanager
async def _running_ensemble(
    ensemble: Ensemble,
    args: Namespace,
    placement: str | None,
    min_experts: int,
    engine_timeout_s: float,
    max_queued: int | None,
    max_experts: int,
) -> AsyncIterator[tuple[EnsembleClient, Supervisor, Engines]]:
    """The gateway, who keeps its engines alive, and those, warm; stopped, with their memory given back, on the way
    out."""
    from decar.server.gateway.admission import check_tokenizer
    from decar.server.gateway.supervisor import Supervisor
    from decar.server.gateway.warm_up import warm_up
    from decar.server.vllm_adapter.app import image_prompt, keep_environment
    from decar.server.vllm_adapter.arguments import engine_config, row_dtype
    from decar.server.vllm_adapter.failures import Failures

    experts = range(len(ensemble.experts))
    configs = [engine_config(ensemble, expert, args, CPU_KV_BYTES) for expert in experts]
    places = _placed(ensemble, configs, placement, max_experts)
    failures = Failures()
    plane = Plane.create(
        experts=max_experts,
        slots=configs[0].scheduler_config.max_num_seqs,
        vocab_size=ensemble.vocab_size,
        positions=configs[0].model_config.max_model_len,
        prompt_unit=prompt_unit(
            configs[0].model_config.max_model_len, [config.cache_config.block_size for config in configs]
        ),
        device_dtype=None if places[0].gpu is None else row_dtype(configs),
    )
    plane.alive[len(experts) :] = 0
    started: list[Any] = []
    try:
        engines = Engines(args, configs, places, plane, failures)
        client = _client(ensemble, await engines.starter.start_all(started), plane, min_experts, max_queued)
        client.health.watch()
        if args.tokenizer is not None:
            check_tokenizer(client.renderer.get_tokenizer(), ensemble.vocab_size)
        image = image_prompt(client)
        try:
            await warm_up(client, image)
        except Exception as error:
            reason = failures.told(ensemble.expert_names) or _blamed(client, error)
            raise StartError(
                f"the warm-up failed: {reason} (the log above has the traceback); mend that expert, leave it out, or "
                "serve the ensemble on another machine"
            ) from error
        keep_environment()
        supervisor = Supervisor(client, engines.starter.start, image, engine_timeout_s)
        supervisor.watch()
        started.clear()  # they are the client's now, which lets go of those that die
        try:
            yield client, supervisor, engines
        finally:
            supervisor.stop()
            client.shutdown(timeout=0)
    finally:
        failures.close()
        for engine in started:
            engine.client.shutdown(timeout=0)
        for child in multiprocessing.active_children():
            child.kill()
        plane.unlink()


class Engines:
    """What the engines of an ensemble are started with, on ``plane``, and those of one that takes its place.

    Args:
        configs: vLLM's, one per expert.
        places: the experts', and those that later ones may have.
    """

    def __init__(
        self,
        args: Namespace,
        configs: Sequence[Any],
        places: Sequence[Place],
        plane: Plane,
        failures: Failures,
    ):
        from decar.server.vllm_adapter.engine import Starter

        self._args, self._served, self._places, self._spec = args, configs[0], places, plane.spec
        plans = [*_plans(configs, places[: len(configs)]), *[None] * (len(places) - len(configs))]
        self.starter = Starter(plans, plane.spec, failures, args.disable_log_stats)

    def of(self, ensemble: Ensemble, seats: Seats) -> list[EnginePlan]:
        """Of ``ensemble``'s experts, each to take the place of whoever is at its seat.

        Raises:
            StartError: one of them cannot.
        """
        from decar.server.vllm_adapter.arguments import engine_config, refuse_other_steps

        places = exchanged([self._places[seat] for seat in seats.of], ensemble)
        args = Namespace(**{**vars(self._args), "max_model_len": self._spec.positions})
        configs = [engine_config(ensemble, k, args, CPU_KV_BYTES) for k in range(len(places))]
        for config, placed in zip(configs, places, strict=True):
            refuse_other_steps(self._served, config, placed.expert, self._spec)
        _give_memory(configs, places)
        return _plans(configs, places)


def _plans(configs: Sequence[Any], places: Sequence[Place]) -> list[EnginePlan]:
    from decar.server.vllm_adapter.engine import EnginePlan

    return [
        EnginePlan(placed.expert, config, placed.devices)
        for config, placed in zip(configs, places, strict=True)
    ]


def _blamed(client: EnsembleClient, error: Exception) -> str:
    """Whose engine has ended without a word (killed, say), and else what went wrong here."""
    from decar.server.vllm_adapter.failures import reason_of

    dead = [repr(expert.name) for expert in client.experts if expert.engine.client.errored]
    return f"the engine of expert {', '.join(dead)} has ended" if dead else reason_of(error)


def _placed(
    ensemble: Ensemble, configs: Sequence[Any], placement: str | None, max_experts: int
) -> list[Place]:
    """Decide where each engine runs, and where later ones may; tell those that there are the KV size that goes with it.

    Raises:
        StartError: the experts do not fit.
    """
    from decar.server.protocol.transport import buffer_bytes
    from decar.server.vllm_adapter.arguments import on_cpu, row_dtype

    cache = configs[0].cache_config
    gpus = [] if on_cpu() else visible_gpus()
    slots = configs[0].scheduler_config.max_num_seqs
    places = place(
        ensemble,
        gpus,
        placement,
        cache.kv_cache_memory_bytes,
        rows_bytes=buffer_bytes(slots, ensemble.vocab_size, row_dtype(configs)),
        utilisation=cache.gpu_memory_utilization,
        seats=max_experts,
    )
    taken = places[: len(configs)]
    _give_memory(configs, taken)
    for placed in taken:
        if placed.gpu is not None:
            logger.info("expert %s: GPU %d (%s)", placed.expert, placed.gpu, gpus[placed.gpu].name)
    if not gpus and cache.kv_cache_memory_bytes is not None:
        check_memory(taken)
    return places


def _give_memory(configs: Sequence[Any], places: Sequence[Place]) -> None:
    from decar.server.vllm_adapter.arguments import give_memory

    for config, placed in zip(configs, places, strict=True):
        if placed.gpu is not None:
            total_bytes = visible_gpus()[placed.gpu].total_bytes
            give_memory(config, placed.kv_bytes, placed.needed_bytes / total_bytes)


def _client(
    ensemble: Ensemble, engines: Sequence[Any], plane: Plane, min_experts: int, max_queued: int | None
) -> EnsembleClient:
    """The gateway over ``engines``, made of its parts."""
    from decar.server.gateway.core_policy import start_all_threads
    from decar.server.gateway.ensemble import EnsembleClient
    from decar.server.metrics import EnsembleMetrics
    from decar.server.protocol.cores import GatewayThread
    from decar.server.vllm_adapter.relay import Relay

    start_all_threads(engines)
    free = plane.spec.experts - len(engines)
    thread = GatewayThread([engine.cores for engine in engines] + [set()] * free)
    return EnsembleClient(
        ensemble,
        engines,
        plane,
        relay=Relay(engines, plane.blocks, thread),
        thread=thread,
        metrics=EnsembleMetrics(plane),
        min_experts=min_experts,
        max_queued=max_queued,
    )


def raise_on_sigterm() -> None:
    """Until the server handles signals itself, SIGTERM ends a start the way SIGINT does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
