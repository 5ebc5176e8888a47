"""Starting and stopping: from an ensemble directory to a listening server, in order, and nothing else.

Check the directory and the flags, take the port, and only then import vLLM; clean up after a predecessor, make the
plane, start K engines side by side, warm every path, and only then listen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import secrets
import signal
import socket
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil

from decar.router import Ensemble, Reading
from decar.router.errors import StartError
from decar.router.manifest import MAX_EXPERTS
from decar.server.kinds import Kind, kind_of
from decar.server.mps import mps
from decar.server.placement import (
    Place,
    check_memory,
    exchanged,
    place,
    refuse_nodes,
    visible_gpus,
)
from decar.server.port import base_url, bound_socket
from decar.server.protocol.machine import check_memory_order
from decar.server.protocol.runtime import DIRECTORY, Record, make_folder, remove_all_of, remove_stale
from decar.server.terminal import Start, Terminal, default_log, terminal_of
from decar.server.vllm_adapter.versions import check_version, installed_version, is_cpu_build

if TYPE_CHECKING:
    from decar.server.cluster.nodes import Cluster, Held, Plan
    from decar.server.gateway.ensemble import EnsembleClient
    from decar.server.gateway.flow import FlowEnsemble
    from decar.server.gateway.seats import Seats
    from decar.server.gateway.supervisor import Supervisor
    from decar.server.hosts import Planes
    from decar.server.protocol.cores import GatewayThread
    from decar.server.protocol.mirror import Hosts
    from decar.server.protocol.plane import Plane
    from decar.server.vllm_adapter.engine import EnginePlan, Launcher
    from decar.server.vllm_adapter.failures import Failures, Progress
    from decar.server.vllm_adapter.fork_server import ForkServer

logger = logging.getLogger("decar")

_GONE_WITHIN_S = 5.0
"""A process that is killed gives back some GB first."""


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
    simulated_hosts: int = 1,
    wire_rows: int = 0,
    ray: str | None = None,
    ship_weights: bool = False,
    log_file: Path | None = None,
    verbose: bool = False,
    own_flags: Iterable[str] = (),
    ui: bool = True,
    use_mps: bool = True,
) -> None:
    """Serve the ensemble in ``directory`` until SIGINT or SIGTERM, and the requests that run then to their end.

    Args:
        flags: vLLM's own server and engine flags, given to every engine.
        placement: "EXPERT=GPU,...", "EXPERT=GPU+GPU" for one on several; with ``ray``, "EXPERT=node:NAME,..." or
            "EXPERT=gpu:N@NAME,..."; None leaves it to decar.
        allow_untested_vllm: go on with a vLLM of any version.
        min_experts: how many have to live for /health to say that the ensemble is served.
        engine_timeout_s: an engine that does not finish a step for so long is ended, and started again.
        shutdown_timeout_s: for requests that run when the server is told to stop.
        max_queued: how many requests may wait before more are refused; None: four for each slot.
        admin_key: shows paths and processes to whoever gives it, and reloads; None: nobody sees them.
        reload_timeout_s: how long running answers are waited for before an expert is exchanged.
        max_experts: how many there is room for, those included that a reload may add; None: for those that there are.
        simulated_hosts: experts are dealt out over so many parts of this machine, which share no memory.
        wire_rows: how many logits of a row go to another host; 0: all.
        ray: the address of a Ray cluster whose nodes have the engines; "auto": the one that this machine is part of.
        ship_weights: nodes that lack an expert's weights are brought them.
        log_file: vLLM's log is added to it; None: to a file of its own, see `default_log`.
        verbose: vLLM's log goes to standard output instead.
        own_flags: of decar itself, which a user may have meant by one that is none.
        ui: offer the page at /.
        use_mps: have CUDA's MPS daemon where engines share a GPU.

    Raises:
        EnsembleError: the directory cannot be served.
        StartError: processor, vLLM's version, flags, port, memory or an engine.
    """
    check_memory_order()
    check_version(allow_untested_vllm)
    if str(directory).startswith("-"):
        raise StartError(f"the ensemble directory comes first, as in `decar serve DIR {directory} ...`")
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

    if simulated_hosts > len(ensemble.experts):
        raise StartError(
            f"--simulated-hosts is {simulated_hosts}; {ensemble.name!r} has {len(ensemble.experts)} experts"
        )
    if simulated_hosts > 1 and ray is not None:
        raise StartError(
            "--simulated-hosts is to try without other hosts what --ray does with them: leave one out"
        )
    if ship_weights and ray is None:
        raise StartError("--ship-weights is for the nodes of a Ray cluster: add --ray, or leave it out")
    if placement is not None and ray is None:
        refuse_nodes(placement)

    kind_of(ensemble).refuse(ray, simulated_hosts, wire_rows)
    given = _checked(flags, own_flags)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to reload
    with contextlib.ExitStack() as stack:
        sock = None
        if "config" not in given:  # a file with flags, which vLLM reads
            sock = stack.enter_context(bound_socket(given.host, int(given.port)))
        port = os.getpid() if sock is None else sock.getsockname()[1]
        log = None if verbose else log_file or default_log(ensemble.name, port)
        terminal = stack.enter_context(terminal_of(log, append=log_file is not None))
        names, manifest = ", ".join(ensemble.expert_names), ensemble.manifest
        terminal.say(
            f"{ensemble.name}: experts {names}; router {manifest.router.kind}, rule {manifest.mixing.rule}"
        )
        if log is not None:
            terminal.say(f"vLLM {installed_version()} writes its log to {log} (--verbose: here)")
        for name in remove_stale():
            logger.warning("removed %s of a server that is gone", DIRECTORY / name)
        folder = make_folder()
        stack.callback(remove_stale)  # what engines have made that are gone by then
        stack.callback(remove_all_of, folder.name)
        os.environ.setdefault("VLLM_RPC_BASE_PATH", str(folder))
        record = Record(
            name=ensemble.name,
            directory=str(ensemble.directory.resolve()),
            url="" if sock is None else base_url(sock, "ssl_certfile" in given),
            pid=os.getpid(),
            started=time.time(),
            experts=len(ensemble.experts),
            log=None if log is None else str(log.resolve()),
        )
        record.write(folder)
        start = stack.enter_context(terminal.starting(ensemble.expert_names))
        cluster, plan = None, None
        held: list[Held] = []
        if ray is not None:
            from decar.server.cluster.gpus import check_gateway, hold
            from decar.server.cluster.nodes import Cluster, plan_on

            start.phase("joining the Ray cluster")
            on_gpus = not is_cpu_build()
            if on_gpus:
                check_gateway()
            cluster = Cluster(ray)
            stack.callback(cluster.close)
            ranks = int(getattr(given, "tensor_parallel_size", 1))
            plan = plan_on(cluster.nodes(), ensemble, placement, ranks, max_experts, on_gpus)
            held = hold(cluster, plan) if on_gpus else []
            for name, host in zip(ensemble.expert_names, plan.of, strict=False):
                logger.info("expert %s: node %s", name, plan.nodes[host].name)
        start.phase("importing vLLM")
        before = dict(os.environ)

        from decar.server.vllm_adapter.arguments import parse_flags, prepare_environment
        from decar.server.vllm_adapter.fork_server import ForkServer

        prepare_environment()  # before anything imports vLLM
        fork_server = ForkServer(folder)
        if cluster is None:
            fork_server.start_early()

        import uvloop

        from decar.server.gateway.request import model_ids
        from decar.server.hosts import dealt
        from decar.server.vllm_adapter.app import allow_many_files

        args = parse_flags(flags, str(ensemble.directory), model_ids(ensemble))
        if sock is None:
            sock = stack.enter_context(bound_socket(args.host, args.port))
        allow_many_files()
        record = replace(record, url=base_url(sock, bool(args.ssl_certfile)))
        running = _running_ensemble(
            ensemble,
            args,
            placement,
            min_experts,
            engine_timeout_s,
            max_queued,
            Spread(dealt(max_experts, simulated_hosts), wire_rows, cluster, plan, held, ship_weights, before),
            folder,
            fork_server,
            terminal,
            start,
            use_mps,
        )

        def listening() -> None:
            replace(record, state="ready").write(folder)
            terminal.announce(f"{ensemble.name} listens on {record.url}/v1")

        uvloop.run(
            _serve(
                running, reading, args, sock, listening, shutdown_timeout_s, admin_key, reload_timeout_s, ui
            )
        )


@dataclass(frozen=True)
class Spread:
    """Over which hosts an ensemble is served.

    Attributes:
        simulated: parts of this machine, where there is no cluster.
        wire_rows: how many logits of a row go to another host; 0: all.
        cluster, plan: Ray's, and what is to be where; None: it is served on this machine alone.
        held: the GPUs of each host of the plan; []: its engines compute on CPUs.
        ship_weights: nodes that lack weights are brought them.
        before: the environment as the user has set it.
    """

    simulated: Hosts
    wire_rows: int
    cluster: Cluster | None
    plan: Plan | None
    held: Sequence[Held]
    ship_weights: bool
    before: Mapping[str, str]

    @property
    def shares_devices(self) -> bool:
        """Whether engines can map each other's GPU memory; else rows lie in host memory. Ray's engines are shown their
        own GPUs alone."""
        return self.cluster is None and len(self.simulated.all) == 1


def _checked(flags: Sequence[str], own_flags: Iterable[str]) -> Namespace:
    """What is set of vLLM's flags, as far as that can be told before vLLM is imported; host and port always.

    Raises:
        StartError: one of them is wrong.
    """
    from decar.server.vllm_adapter.arguments import DEFAULT_HOST, refuse_reserved_early
    from decar.server.vllm_adapter.flags import check_flags, described_flags, known_flags

    known = known_flags()
    if known is None:
        logger.info("asking vLLM %s for its flags, which every version is asked once", installed_version())
        known = described_flags()
    given = check_flags(flags, known, own_flags)
    refuse_reserved_early(given, known)
    defaults = {flag.dest: flag.default for flag in known}
    given.host = getattr(given, "host", None) or DEFAULT_HOST
    given.port = getattr(given, "port", defaults["port"])
    return given


async def _serve(
    running: AbstractAsyncContextManager[tuple[EnsembleClient | FlowEnsemble, Supervisor, Engines]],
    reading: Reading,
    args: Namespace,
    sock: socket.socket,
    listening: Callable[[], None],
    shutdown_timeout_s: float,
    admin_key: str | None,
    reload_timeout_s: float,
    ui: bool,
) -> None:
    from decar.server.gateway.api import extend
    from decar.server.gateway.errors import anthropic_error_event
    from decar.server.gateway.gate import Gate
    from decar.server.gateway.http_server import BoundedHttpProtocol
    from decar.server.gateway.reload import Reloader
    from decar.server.gateway.request import asks_for_counts, model_asked_for, model_ids
    from decar.server.gateway.signals import told_to_stop
    from decar.server.vllm_adapter.app import api_keys, listen, name_models, openai_app
    from decar.server.vllm_adapter.tracing import tracer_of

    async with running as (client, supervisor, engines):
        gate = Gate()
        keys = api_keys(args, admin_key)
        app = await openai_app(client, args, asks_for_counts, model_asked_for, anthropic_error_event)
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
        extend(app, client, gate, reloader, keys, admin_key, tracer_of(args), ui)

        async def until_drained() -> None:
            await told_to_stop(partial(_end_now, client.plane.spec.name))
            logger.info("told to stop: %d requests have %.0f s left", gate.running, shutdown_timeout_s)
            loop.remove_signal_handler(signal.SIGHUP)
            supervisor.stop()
            await gate.drain(shutdown_timeout_s)

        await listen(app, args, sock, BoundedHttpProtocol, until_drained(), listening)


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
    spread: Spread,
    folder: Path,
    fork_server: ForkServer,
    terminal: Terminal,
    start: Start,
    use_mps: bool,
) -> AsyncIterator[tuple[EnsembleClient | FlowEnsemble, Supervisor, Engines]]:
    """The gateway, who keeps its engines alive, and those, warm; stopped, with their memory given back, on the way
    out."""
    from decar.server.gateway.supervisor import Supervisor
    from decar.server.hosts import planes_in, planes_on
    from decar.server.protocol.mirror import Hosts
    from decar.server.protocol.plane import Plane, prompt_unit
    from decar.server.vllm_adapter.app import keep_environment
    from decar.server.vllm_adapter.arguments import on_cpu, row_dtype
    from decar.server.vllm_adapter.engine import OwnProcesses
    from decar.server.vllm_adapter.failures import Failures, Progress
    from decar.server.vllm_adapter.fork_server import fork_engines

    experts, kind = range(len(ensemble.experts)), kind_of(ensemble)
    configs = [kind.engine_config(ensemble, expert, args) for expert in experts]
    cluster = spread.cluster
    hosts = Hosts(spread.plan.of) if spread.plan else spread.simulated
    places = _placed(ensemble, configs, placement, len(hosts.of), args, spread)
    failures, progress = Failures(), Progress()
    if on_cpu() and cluster is None:
        fork_server.use()
        fork_engines()
    else:
        fork_server.end()

    shape = {
        "experts": len(hosts.of),
        "slots": kind.slots(configs, ensemble.vocab_size),
        "vocab_size": ensemble.vocab_size,
        "positions": configs[0].model_config.max_model_len,
        "prompt_unit": prompt_unit(
            configs[0].model_config.max_model_len, [config.cache_config.block_size for config in configs]
        ),
        "device_dtype": (
            row_dtype(configs) if places[0].gpus and spread.shares_devices and kind.rows_on_device() else None
        ),
        "wire_rows": spread.wire_rows,
        "hosts": hosts.of if len(hosts.all) > 1 else (),
    }

    def make_plane(bell: str) -> Plane:
        plane = Plane.create(**shape, bell=bell)
        plane.alive[len(experts) :] = 0
        return plane

    with contextlib.ExitStack() as stack:
        launcher: Launcher
        if spread.cluster is None or spread.plan is None:
            planes = stack.enter_context(planes_on(hosts, make_plane, folder))
            pipes = stack.enter_context(
                mps([placed.gpus for placed in places[: len(experts)]], folder, use_mps)
            )
            launcher = OwnProcesses(planes.of, [placed.ranks for placed in places[: len(experts)]], pipes)
        else:
            from decar.server.cluster.actors import Actors
            from decar.server.cluster.hosts import ClusterHosts

            start.phase("beginning on other hosts")
            key = secrets.token_bytes(32)
            ship = progress.tell if spread.ship_weights else None
            given = [held.given for held in spread.held]
            there = ClusterHosts(spread.cluster, spread.plan, shape, key, given, ship)
            planes = stack.enter_context(planes_in(there, key, make_plane, folder))
            ranks = [placed.ranks for placed in places]
            launcher = Actors(there, ranks, spread.before, planes.gateways.mirrored)
        started: list[Any] = []
        try:
            engines = Engines(kind, args, configs, places, planes, launcher, failures, progress)
            start.heard = progress.heard
            try:
                client, image = await _warm(
                    kind,
                    ensemble,
                    args,
                    engines,
                    planes,
                    started,
                    start,
                    failures,
                    min_experts,
                    max_queued,
                )
            except StartError:
                start.done()
                terminal.show_end_of_log(failures.of(ensemble.expert_names))
                raise
            start.done()
            progress.close()
            keep_environment()
            supervisor = Supervisor(
                client, engines.starter.start, partial(kind.warm_up, client, image), engine_timeout_s
            )
            supervisor.watch()
            started.clear()  # they are the client's now, which lets go of those that die
            try:
                yield client, supervisor, engines
            finally:
                supervisor.stop()
                with _ended():
                    client.shutdown(timeout=0)
        finally:
            failures.close()
            progress.close()
            with _ended():
                for engine in started:
                    engine.client.shutdown(timeout=0)


@contextlib.contextmanager
def _ended() -> Iterator[None]:
    """What is told to end within ends: engines with their ranks, which are theirs to start, and gone before what they
    have made is removed."""
    from decar.server.hosts import MIRROR

    def engines() -> list[BaseProcess]:
        return [child for child in multiprocessing.active_children() if not child.name.startswith(MIRROR)]

    processes = []
    for child in engines():
        with contextlib.suppress(psutil.NoSuchProcess):
            engine = psutil.Process(child.pid)
            processes += [engine, *engine.children(recursive=True)]
    try:
        yield
    finally:
        for child in engines():
            child.kill()
        psutil.wait_procs(processes, _GONE_WITHIN_S)


async def _warm(
    kind: Kind,
    ensemble: Ensemble,
    args: Namespace,
    engines: Engines,
    planes: Planes,
    started: list[Any],
    start: Start,
    failures: Failures,
    min_experts: int,
    max_queued: int | None,
) -> tuple[EnsembleClient | FlowEnsemble, Any]:
    """The gateway over engines that have just been started and warmed up, and the image that warms one.

    Args:
        started: gets those that came up, also on failure.

    Raises:
        StartError: an engine does not start, or cannot be warmed up.
    """
    from decar.server.gateway.admission import check_tokenizer
    from decar.server.vllm_adapter.app import image_prompt

    start.phase(f"starting {len(ensemble.experts)} engines", engines=True)
    all_engines = await engines.starter.start_all(started, start.ready)
    thread = _gateway_thread(all_engines, planes.gateways.spec.experts)
    client = kind.client(ensemble, all_engines, planes, thread, min_experts, max_queued)
    client.health.watch()
    if args.tokenizer is not None:
        check_tokenizer(client.renderer.get_tokenizer(), ensemble.vocab_size)
    image = image_prompt(client)
    start.phase("warming up")
    try:
        await kind.warm_up(client, image)
    except Exception as error:
        reason = failures.told(ensemble.expert_names) or _blamed(client, error)
        raise StartError(
            f"the warm-up failed: {reason} (vLLM's log has the traceback); mend that expert, leave it out, or "
            "serve the ensemble on another machine"
        ) from error
    return client, image


class Engines:
    """What the engines of an ensemble are started with, on ``planes``, and those of one that takes its place.

    Args:
        kind: of the ensemble.
        configs: vLLM's, one per expert.
        places: the experts', and those that later ones may have.
        launcher: starts their processes.
    """

    def __init__(
        self,
        kind: Kind,
        args: Namespace,
        configs: Sequence[Any],
        places: Sequence[Place],
        planes: Planes,
        launcher: Launcher,
        failures: Failures,
        progress: Progress,
    ):
        from decar.server.vllm_adapter.brought import Brought
        from decar.server.vllm_adapter.engine import Starter

        self._kind, self._args, self._served, self._places = kind, args, configs[0], places
        self._spec = planes.gateways.spec
        plans = [*_plans(configs, places[: len(configs)]), *[None] * (len(places) - len(configs))]
        brought = Brought(planes.gateways, planes.heard)
        brought.watch()
        self.starter = Starter(plans, launcher, brought, failures, progress, args.disable_log_stats)

    def of(self, ensemble: Ensemble, seats: Seats) -> list[EnginePlan]:
        """Of ``ensemble``'s experts, each to take the place of whoever is at its seat.

        Raises:
            StartError: one of them cannot.
        """
        from decar.server.vllm_adapter.arguments import refuse_other_steps

        taken = [self._places[seat] for seat in seats.of]
        places = exchanged(taken, ensemble, self._args.tensor_parallel_size)
        args = Namespace(**{**vars(self._args), "max_model_len": self._spec.positions})
        configs = [self._kind.engine_config(ensemble, k, args) for k in range(len(places))]
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


def _blamed(client: EnsembleClient | FlowEnsemble, error: Exception) -> str:
    """Whose engine has ended without a word (killed, say), and else what went wrong here."""
    from decar.server.vllm_adapter.failures import reason_of

    dead = [repr(expert.name) for expert in client.experts if expert.engine.client.errored]
    return f"the engine of expert {', '.join(dead)} has ended" if dead else reason_of(error)


def _placed(
    ensemble: Ensemble,
    configs: Sequence[Any],
    placement: str | None,
    max_experts: int,
    args: Namespace,
    spread: Spread,
) -> list[Place]:
    """Decide where each engine runs, and where later ones may; tell those that there are the KV size that goes with it.

    Raises:
        StartError: the experts do not fit.
    """
    from decar.server.protocol.transport import buffer_bytes
    from decar.server.vllm_adapter.arguments import on_cpu, row_dtype, shares_default_kv

    cache = configs[0].cache_config
    kv_bytes = None if shares_default_kv(args) else cache.kv_cache_memory_bytes
    if spread.plan is not None and spread.held:
        from decar.server.cluster.gpus import places_on, shared

        utilisation, ranks = cache.gpu_memory_utilization, args.tensor_parallel_size
        places = places_on(spread.plan, spread.held, ensemble, kv_bytes, utilisation, ranks)
        for shared_gpu, names in shared(spread.plan, places).items():
            logger.warning(
                "%s share %s, and take turns on it: decar starts no MPS daemon for engines of Ray's",
                ", ".join(names),
                shared_gpu,
            )
    else:
        slots = configs[0].scheduler_config.max_num_seqs
        rows_bytes = buffer_bytes(slots, ensemble.vocab_size, row_dtype(configs))
        places = place(
            ensemble,
            [] if on_cpu() else visible_gpus(),
            placement if spread.cluster is None else None,
            kv_bytes,
            rows_bytes=rows_bytes if spread.shares_devices else 0,
            utilisation=cache.gpu_memory_utilization,
            seats=max_experts,
            ranks=args.tensor_parallel_size,
        )
    taken = places[: len(configs)]
    _give_memory(configs, taken)
    for placed in taken:
        for gpu in placed.gpus:
            logger.info("expert %s: GPU %d", placed.expert, gpu)
    if spread.cluster is None and not taken[0].gpus and cache.kv_cache_memory_bytes is not None:
        check_memory(taken)
    return places


def _give_memory(configs: Sequence[Any], places: Sequence[Place]) -> None:
    from decar.server.vllm_adapter.arguments import give_memory

    for config, placed in zip(configs, places, strict=True):
        if placed.gpus:
            give_memory(config, placed.kv_bytes, placed.needed_bytes / placed.gpu_bytes)


def _gateway_thread(engines: Sequence[Any], places: int) -> GatewayThread:
    """This thread, beside ``engines`` and those that may come to have the other ``places``."""
    from decar.server.gateway.core_policy import start_all_threads
    from decar.server.protocol.cores import GatewayThread

    start_all_threads(engines)
    free: list[set[int]] = [set()] * (places - len(engines))
    return GatewayThread([engine.cores for engine in engines] + free)


def raise_on_sigterm() -> None:
    """Until the server handles signals itself, SIGTERM ends a start the way SIGINT does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
