"""Starting and stopping: from an ensemble directory to a listening server. Knows vLLM's launcher.

Order: check the directory, take the port, clean up after a predecessor, make the plane, start K engines side
by side, warm every path, and only then listen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from decar.router import Ensemble
from decar.router.errors import StartError
from decar.server.gateway.request import Call, current_call, model_ids
from decar.server.placement import CPU_KV_BYTES, Place, gib, place, visible_gpus
from decar.server.protocol.member import LockstepConfig
from decar.server.protocol.plane import Plane, remove_stale

logger = logging.getLogger("decar")

RESERVED_FLAGS = (
    "additional_config",
    "api_server_count",
    "async_scheduling",
    "data_parallel_size",
    "enable_prompt_embeds",
    "headless",
    "mm_processor_cache_gb",
    "mm_processor_cache_type",
    "model",
    "pipeline_parallel_size",
    "scheduler_cls",
    "scheduling_policy",
    "served_model_name",
    "speculative_config",
    "tensor_parallel_size",
    "uds",
    "worker_cls",
)
"""vLLM flags that decar sets itself, or that an engine in lockstep cannot follow."""


def serve(directory: Path, flags: Sequence[str], placement: str | None = None) -> None:
    """Serve the ensemble in ``directory`` until SIGINT or SIGTERM.

    Args:
        flags: vLLM's own server and engine flags, given to every engine.
        placement: "EXPERT=GPU,..."; None leaves it to decar.

    Raises:
        EnsembleError: the directory cannot be served.
        StartError: port, memory or an engine.
    """
    ensemble = Ensemble.load(directory)
    _prepare_environment()
    args = _parse(ensemble, flags)
    import uvloop

    with _bound_socket(args) as sock:
        for name in remove_stale():
            logger.warning("removed shared memory %s of a server that is gone", name)
        uvloop.run(_serve(ensemble, args, sock, placement))


async def _serve(ensemble: Ensemble, args: Namespace, sock: socket.socket, placement: str | None) -> None:
    from vllm import envs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.launcher import serve_http
    from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config

    from decar.server.gateway.api import extend
    from decar.server.vllm_adapter import media  # noqa: F401 - vLLM finds it by name

    async with _running_ensemble(ensemble, args, placement) as client:
        tasks = await client.get_supported_tasks()
        app = build_app(args, tasks, client.model_config)
        extend(app, client, [key for key in args.api_key or [envs.VLLM_API_KEY] if key])
        await init_app_state(client, app.state, args, tasks)
        log_config = get_uvicorn_log_config(args)
        host, port = sock.getsockname()[:2]
        print(f"decar: {ensemble.name} listens on http://{host}:{port}/v1", flush=True)
        stopped = await serve_http(
            app,
            sock=sock,
            host=args.host,
            port=port,
            log_level=args.uvicorn_log_level,
            access_log=not args.disable_uvicorn_access_log,
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            ssl_ca_certs=args.ssl_ca_certs,
            ssl_cert_reqs=args.ssl_cert_reqs,
            h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
            h11_max_header_count=args.h11_max_header_count,
            **({"log_config": log_config} if log_config is not None else {}),
        )
    await stopped


@contextlib.asynccontextmanager
async def _running_ensemble(ensemble: Ensemble, args: Namespace, placement: str | None) -> AsyncIterator[Any]:
    """Engines started and warm; stopped, with their memory given back, on the way out."""
    from vllm.envs import enable_envs_cache

    from decar.server.gateway.ensemble import EnsembleClient

    configs = [_vllm_config(ensemble, expert, args) for expert in range(len(ensemble.experts))]
    places = _placed(ensemble, configs, placement)
    on_gpu = places[0].gpu is not None
    if not on_gpu and configs[0].cache_config.kv_cache_memory_bytes is not None:
        _check_memory(places)
    plane = Plane.create(
        len(ensemble.experts),
        configs[0].scheduler_config.max_num_seqs,
        ensemble.vocab_size,
        configs[0].model_config.max_model_len,
        _row_dtype(configs) if on_gpu else None,
    )
    started: list[Any] = []
    try:
        engines = await _start_engines(ensemble, configs, places, plane, started, args.disable_log_stats)
        client = EnsembleClient(ensemble, engines, [_engine_pid(engine) for engine in engines], plane)
        client.watch_engines()
        await _warm_up(client)
        enable_envs_cache()  # else every token's statistics read the environment anew
        yield client  # vLLM's server shuts the client down when it is told to stop
    finally:
        for engine in started:
            engine.shutdown(timeout=0)
        for child in multiprocessing.active_children():
            child.kill()
        plane.unlink()


async def _start_engines(
    ensemble: Ensemble,
    configs: Sequence[Any],
    places: Sequence[Place],
    plane: Plane,
    started: list[Any],
    disable_log_stats: bool,
) -> list[Any]:
    """Build one `AsyncLLM` per expert, side by side; ``started`` has those that came up, also on failure."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from decar.server.vllm_adapter.metrics import SharedMetrics

    metrics = SharedMetrics(len(configs))
    cpus = _share_cores(len(configs))

    def start(expert: int) -> Any:
        configs[expert].additional_config = LockstepConfig(
            expert, plane.spec, cpus[expert], places[expert].devices, os.getpid()
        )
        engine = AsyncLLM.from_vllm_config(
            configs[expert],
            stat_loggers=None if disable_log_stats else [metrics.factory_for(expert)],
            disable_log_stats=disable_log_stats,
        )
        started.append(engine)
        return engine

    started_at = time.monotonic()
    logger.info("starting %d engines", len(configs))
    results = await asyncio.gather(
        *(asyncio.to_thread(start, expert) for expert in range(len(configs))), return_exceptions=True
    )
    for name, result in zip(ensemble.expert_names, results, strict=True):
        if isinstance(result, BaseException):
            raise StartError(
                f"expert {name!r}: its engine did not start ({result}); the log above says why"
            ) from result
    logger.info("engines ready after %.0f s", time.monotonic() - started_at)
    return results


async def _warm_up(client: Any) -> None:
    """Run every kind of request once, so that no user waits for a compilation."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    from decar.router import log_prior

    experts = len(client.experts)
    everyone = log_prior([1.0] * experts)
    calls = [Call(everyone, "velocity"), Call(everyone, "logit")]
    calls += [
        Call(everyone, posterior=True, scored=True, prune=prune) for prune in (0.0, 1e-9) if experts > 1
    ]
    calls += [Call(log_prior([float(j == k) for j in range(experts)])) for k in range(experts)]

    async def run(call: Call, params: SamplingParams, prompt: Any) -> None:
        current_call.set(call)
        async for _ in client.generate(prompt, params, f"warm-up-{id(call)}"):
            pass

    text: Any = {"prompt_token_ids": [0, 1, 2, 3]}
    for kind in (RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA):
        for extra in ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 0, "logprobs": 2}):
            params = SamplingParams(max_tokens=4, ignore_eos=True, output_kind=kind, **extra)
            await asyncio.gather(*(asyncio.create_task(run(call, params, text)) for call in calls))
    asked_for_prompt = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    await asyncio.create_task(run(calls[0], asked_for_prompt, text))
    image = _image_prompt(client)
    if image is not None:
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        await asyncio.gather(*(asyncio.create_task(run(call, params, image)) for call in calls))
    await client.reset_prefix_cache()


def _image_prompt(client: Any) -> Any:
    """A prompt with one image, as vLLM's renderer makes it; None where the experts take no images."""
    if not client.model_config.supports_multimodal_inputs:
        return None
    processor = client.renderer.get_mm_processor()
    if not processor.info.allowed_mm_limits.get("image"):
        return None
    prompt = processor.get_dummy_mm_inputs({"image": 1})
    [image] = prompt["mm_placeholders"]["image"]
    # It fills the whole context, and would leave no room for an answer.
    prompt["prompt_token_ids"] = prompt["prompt_token_ids"][: image.offset + image.length + 1]
    return prompt


def _prepare_environment() -> None:
    """vLLM settings that decar relies on. Where the user set one of them, it stays."""
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # V2 has not been seen exact on a GPU yet
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi numbers them
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_MEDIA_CONNECTOR", "decar")  # `media.Connector`
    os.environ.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")  # an allowed host may name one that is not
    os.environ.setdefault("VLLM_MAX_IMAGE_PIXELS", str(2**25))  # 100 MB once decoded, from a file of some kB
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("JOBLIB_MULTIPROCESSING", "0")  # its import leaves named semaphores in /dev/shm


def _parse(ensemble: Ensemble, flags: Sequence[str]) -> Namespace:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="decar serve DIR", description="Serve an ensemble."))
    defaults = parser.parse_args([])
    args = parser.parse_args(list(flags))
    for reserved in RESERVED_FLAGS:
        if getattr(args, reserved, None) != getattr(defaults, reserved, None):
            raise StartError(
                f"--{reserved.replace('_', '-')} cannot be passed: decar sets it, or it does not fit an ensemble"
            )
    if args.model_tag is not None:
        raise StartError(
            f"unexpected argument {args.model_tag!r}: the ensemble directory says which models to serve"
        )
    if str(args.logprobs_mode).endswith("logits"):
        raise StartError(
            f"--logprobs-mode {args.logprobs_mode} cannot be passed: experts are weighed by their log-probabilities"
        )
    args.model = str(ensemble.directory)
    args.served_model_name = model_ids(ensemble)
    args.host = args.host or "127.0.0.1"
    validate_parsed_serve_args(args)
    return args


@contextlib.contextmanager
def _bound_socket(args: Namespace) -> Any:
    """Take the port before the engines start, so that a taken one is known at once."""
    from vllm.entrypoints.launchers.launcher import create_server_socket
    from vllm.utils.system_utils import set_ulimit

    # Two sockets may be bound to one port as long as neither listens, and a server listens only once it is warm.
    claim = socket.socket(socket.AF_UNIX)
    try:
        if args.port:
            claim.bind(f"\0decar-{args.host}-{args.port}")
        sock = create_server_socket((args.host, args.port), reuse_port=False)
    except OSError as error:
        claim.close()
        raise StartError(
            f"cannot listen on {args.host}:{args.port} ({error.strerror}); stop what uses it, or choose another --port"
        ) from None
    set_ulimit()
    try:
        yield sock
    finally:
        sock.close()
        claim.close()


def _vllm_config(ensemble: Ensemble, expert: int, args: Namespace) -> Any:
    """The user's flags with what one expert's engine needs, checked by vLLM.

    Raises:
        StartError: vLLM refuses the flags for this expert, or the lockstep cannot serve its architecture.
    """
    name = ensemble.experts[expert].name
    try:
        config = _engine_args(ensemble, expert, args).create_engine_config()
    except ValueError as error:  # pydantic's ValidationError is one
        reason = " ".join(str(error).split("[type=")[0].split())
        raise StartError(f"expert {name!r}: vLLM refuses these flags: {reason}") from None
    if config.model_config.is_hybrid or config.model_config.is_attention_free:
        raise StartError(
            f"expert {name!r} ({ensemble.experts[expert].architecture}) keeps a recurrent state, which a position that "
            "runs again would advance twice; only attention models can be mixed"
        )
    return config


def _engine_args(ensemble: Ensemble, expert: int, args: Namespace) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    engine = AsyncEngineArgs.from_cli_args(args)
    engine.model = str(ensemble.experts[expert].path)
    # One tokenizer configuration and one generation_config.json, the first expert's, for all: what ends an
    # answer must not depend on which expert leads.
    first = str(ensemble.experts[0].path)
    engine.tokenizer = engine.tokenizer or first
    if engine.generation_config == "auto":
        engine.generation_config = first
    engine.served_model_name = [ensemble.name]
    engine.worker_cls = "decar.server.vllm_adapter.worker.LockstepWorker"
    engine.scheduler_cls = "decar.server.vllm_adapter.scheduler.LockstepScheduler"
    engine.async_scheduling = False
    # The cache is one engine's: it would keep the images that this one has from those that have yet to see them.
    engine.mm_processor_cache_gb = 0
    engine.scheduling_policy = "priority"  # every engine orders requests by the same arrival times
    if engine.max_model_len is None:
        engine.max_model_len = ensemble.max_positions
    if current_platform.is_cpu():
        engine.distributed_executor_backend = "decar.server.vllm_adapter.executor.InProcessExecutor"
        if engine.kv_cache_memory_bytes is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            engine.kv_cache_memory_bytes = CPU_KV_BYTES
    return engine


def _placed(ensemble: Ensemble, configs: Sequence[Any], placement: str | None) -> list[Place]:
    """Decide where each engine runs, and tell its config the KV size that goes with it.

    Raises:
        StartError: the experts do not fit.
    """
    from vllm.platforms import current_platform

    from decar.server.protocol.transport import buffer_bytes

    cache = configs[0].cache_config
    gpus = [] if current_platform.is_cpu() else visible_gpus()
    slots = configs[0].scheduler_config.max_num_seqs
    rows_bytes = buffer_bytes(slots, ensemble.vocab_size, _row_dtype(configs))
    places = place(
        ensemble,
        gpus,
        placement,
        cache.kv_cache_memory_bytes,
        rows_bytes,
        cache.gpu_memory_utilization,
    )
    for config, of in zip(configs, places, strict=True):
        if of.gpu is not None:
            config.cache_config.kv_cache_memory_bytes = of.kv_bytes
            if of.kv_bytes is not None:  # vLLM refuses to start where less than this share is free
                share = of.needed_bytes / gpus[of.gpu].total_bytes
                config.cache_config.gpu_memory_utilization = min(share, cache.gpu_memory_utilization)
            logger.info("expert %s: GPU %d (%s)", of.expert, of.gpu, gpus[of.gpu].name)
    return places


def _row_dtype(configs: Sequence[Any]) -> str:
    """The experts' dtype where they have one in common, for rows on a device."""
    dtypes = {str(config.model_config.dtype).removeprefix("torch.") for config in configs}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _check_memory(places: Sequence[Place]) -> None:
    """On CPU, refuse before anything starts what cannot fit."""
    available = psutil.virtual_memory().available
    needed = sum(of.needed_bytes for of in places)
    if needed > available:
        raise StartError(
            f"not enough memory: {len(places)} experts need about {gib(needed)} "
            f"({gib(places[0].kv_bytes or 0)} of it for each one's KV cache), {gib(available)} are free; "
            "lower --kv-cache-memory-bytes"
        )


def _share_cores(engines: int) -> list[tuple[int, ...]]:
    """On CPU, the cores of this process dealt out evenly: engines that share cores drift apart."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return [()] * engines
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < engines:
        return [(cores[k % len(cores)],) for k in range(engines)]
    each = len(cores) // engines
    return [tuple(cores[k * each : (k + 1) * each]) for k in range(engines)]


def _engine_pid(engine: Any) -> int:
    """Process id of an engine's core."""
    return int(engine.engine_core.resources.engine_manager.processes[0].pid)


def raise_on_sigterm() -> None:
    """Until the server handles signals itself, SIGTERM ends a start the way SIGINT does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
