"""vLLM's flags and configurations: what the user may set, and what the lockstep sets. Knows no running engine."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from decar.router.errors import StartError

if TYPE_CHECKING:
    from decar.router import Ensemble
    from decar.server.protocol.plane import PlaneSpec
    from decar.server.vllm_adapter.flags import Flag

DEFAULT_HOST = "127.0.0.1"
RESERVED_FLAGS: dict[str, tuple[str, ...]] = {
    "decar sets it for each expert": (
        *("additional_config", "async_scheduling", "device_ids", "distributed_executor_backend", "model"),
        *("mm_processor_cache_gb", "mm_processor_cache_type", "scheduler_cls", "scheduling_policy"),
        *("served_model_name", "worker_cls", "worker_extension_cls"),
    ),
    "it is a flag of `decar serve`, and none of vLLM's --config": ("max_num_queued_reqs", "shutdown_timeout"),
    "one gateway serves HTTP on --port": (*("api_server_count", "grpc", "grpc_port", "headless", "uds"),),
    "a pipeline computes several steps at once, and experts in lockstep decide one before they begin the next": (
        *("pipeline_parallel_size",),
    ),
    "each expert is one engine on one host": (
        *("data_parallel_size", "data_parallel_size_local", "data_parallel_rank", "data_parallel_start_rank"),
        *("data_parallel_hybrid_lb", "data_parallel_external_lb", "data_parallel_multi_port_external_lb"),
        *("decode_context_parallel_size", "prefill_context_parallel_size"),
        *("nnodes", "node_rank", "enable_elastic_ep", "enable_fault_tolerance"),
    ),
    "a step of an engine would not be one row for each request": (
        *("speculative_config", "spec_method", "spec_model", "spec_tokens", "diffusion_config"),
        *("enable_dbo", "ubatch_size"),
    ),
    "the token that is published has to be the one that was sampled from the mixture": (
        *("enable_trace_replay", "watermark_config"),
    ),
    "the first of an expert's ranks samples, from logits that are the mixture's": (
        *("enable_batch_sharded_sampling",),
    ),
    "experts score what they compute of a prompt, and with it would not compute all": (
        *("kv_sharing_fast_prefill", "kv_transfer_config", "kv_offloading_size", "ec_transfer_config"),
    ),
    "it would report of one expert what the mixture does not have": (
        *("aux_output_config", "enable_return_routed_experts", "return_sampling_mask"),
    ),
    "an ensemble generates text from text and images, with its experts' tokenizer": (
        *("convert", "io_processor_plugin", "pooler_config", "runner", "skip_tokenizer_init", "tokens_only"),
    ),
    "embeddings are one expert's, and every expert needs the prompt": (
        *("enable_mm_embeds", "enable_prompt_embeds", "mm_encoder_only"),
    ),
    "an ensemble serves whole experts, as they are in its directory": (
        *("enable_lora", "lora_modules", "weight_transfer_config"),
    ),
}
"""vLLM flags that decar sets itself, or that an engine in lockstep cannot follow, by the reason."""

FLOW_ARCHITECTURE = "BertForMaskedLM"
_NO_KV_BYTES = 1 << 20
"""What looks both ways keeps no keys and values; without a size vLLM would want most of the memory for them."""
_EXECUTORS = "decar.server.vllm_adapter.executor"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]+)?")


def prepare_environment() -> None:
    """vLLM settings that decar relies on. Where the user set one of them, it stays."""
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # V2 is exact on a GPU, and not timed there yet
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # `LockstepWorker` binds each rank's threads
    os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "86400")  # --engine-timeout is the bound
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi numbers them
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_MEDIA_CONNECTOR", "decar")  # `media.Connector`
    os.environ.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")  # an allowed host may name one that is not
    os.environ.setdefault("VLLM_MAX_IMAGE_PIXELS", str(2**25))  # 100 MB once decoded, from a file of some kB
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OTEL_SERVICE_NAME", "decar")  # whose spans they are, with --otlp-traces-endpoint
    os.environ.setdefault("JOBLIB_MULTIPROCESSING", "0")  # its import leaves named semaphores in /dev/shm


def make_parser() -> Any:
    """vLLM's parser of server and engine flags; what is wrong with them is a `StartError`, and no page of usage."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from decar.server.vllm_adapter.versions import make_arg_parser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise StartError(message.removeprefix("argument "))

    parser = make_arg_parser(Parser(prog="decar serve DIR", description="Serve an ensemble."))
    parser.set_defaults(h11_max_incomplete_event_size=2**16)  # vLLM's 4 MiB are for one header of one client
    parser.set_defaults(allowed_origins=[])  # vLLM 0.26 let pages of all origins read answers
    return parser


def parse_flags(flags: Sequence[str], model: str, names: Sequence[str]) -> Namespace:
    """vLLM's server and engine flags.

    Args:
        model: what stands for "the" model in the app's own messages.
        names: model ids that the server answers to.

    Raises:
        StartError: a flag that an ensemble cannot have.
    """
    from decar.server.vllm_adapter.versions import validate_parsed_serve_args

    parser = make_parser()
    defaults = parser.parse_args([])
    try:
        args = parser.parse_args(list(flags))
    except (AssertionError, OSError, ValueError) as error:  # of what --config names
        raise StartError(f"vLLM refuses these flags: {error}") from None
    refuse_reserved(args, defaults)
    if args.model_tag is not None:
        raise StartError(
            f"unexpected argument {args.model_tag!r}: the ensemble directory says which models to serve"
        )
    if str(args.logprobs_mode).endswith("logits"):
        raise StartError(
            f"--logprobs-mode {args.logprobs_mode} cannot be passed: experts are weighed by their log-probabilities"
        )
    check_origins(args.allowed_origins, args.allow_credentials)
    args.model = model
    args.served_model_name = list(names)
    args.host = args.host or DEFAULT_HOST
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise StartError(f"vLLM refuses these flags: {error}") from None
    return args


def offered_flags() -> list[Flag]:
    """vLLM's that an ensemble can have."""
    from decar.server.vllm_adapter.flags import described_flags

    reserved = {name for names in RESERVED_FLAGS.values() for name in names}
    return [flag for flag in described_flags() if flag.dest not in reserved]


def refuse_reserved_early(given: Namespace, flags: Sequence[Flag]) -> None:
    """
    Args:
        given: what `check_flags` found.

    Raises:
        StartError: as `refuse_reserved`.
    """
    defaults = {flag.dest: flag.default for flag in flags}
    for reason, names in RESERVED_FLAGS.items():
        for name in names:
            if name in given and name in defaults and str(getattr(given, name)) != defaults[name]:
                raise _reserved(name, reason)


def check_origins(origins: Any, credentials: bool) -> None:
    """What --allowed-origins has to be for a browser's origins to be found in it.

    Raises:
        StartError: it is not, or lets every page there is act for whoever looks at it.
    """
    example = """--allowed-origins '["https://app.example.org"]'"""
    if not isinstance(origins, list) or not all(isinstance(origin, str) for origin in origins):
        raise StartError(f"--allowed-origins is a JSON list of texts: {example}")
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise StartError(
                f"--allowed-origins has {origin!r}, which no browser calls itself: give scheme, host and port alone, "
                f"in small letters, as in {example}"
            )
    if credentials and "*" in origins:
        raise StartError(
            """--allow-credentials with --allowed-origins '["*"]' would let every page act for whoever looks at it: """
            "name the origins, or leave --allow-credentials out (decar has no cookies)"
        )


def refuse_reserved(args: Namespace, defaults: Namespace) -> None:
    """
    Raises:
        StartError: names one of `RESERVED_FLAGS` that ``args`` do not have as ``defaults`` have it, and the reason.
    """
    for reason, flags in RESERVED_FLAGS.items():
        for flag in flags:
            if getattr(args, flag, None) != getattr(defaults, flag, None):
                raise _reserved(flag, reason)


def _reserved(flag: str, reason: str) -> StartError:
    return StartError(f"--{flag.replace('_', '-')} cannot be passed: {reason}; leave it out")


def engine_config(ensemble: Ensemble, expert: int, args: Namespace, cpu_kv_bytes: int) -> Any:
    """The user's flags with what one expert's engine needs, checked by vLLM.

    Args:
        cpu_kv_bytes: size of its KV cache on a CPU, where the user sets none; its ranks share it.

    Raises:
        StartError: vLLM refuses the flags for this expert, or the lockstep cannot serve its architecture.
    """
    ranks = ensemble.experts[expert].options.tensor_parallel_size or args.tensor_parallel_size
    config = _checked(ensemble, expert, _engine_args(ensemble, expert, args, ranks, cpu_kv_bytes // ranks))
    model = config.model_config
    if model.is_hybrid or model.is_attention_free:
        raise StartError(
            f"{_described(ensemble, expert)} keeps a recurrent state, which a position that runs again would advance "
            "twice; only attention models can be mixed"
        )
    return config


def flow_engine_config(ensemble: Ensemble, expert: int, args: Namespace) -> Any:
    """The same for an expert of a flow ensemble, which keeps no KV cache.

    Raises:
        StartError: as `engine_config`; or a flag, or an architecture, that a flow ensemble cannot have.
    """
    from decar.server.vllm_adapter.versions import FLOWS_SINCE, installed_version, numbers_of

    described, version = _described(ensemble, expert), installed_version() or "0"
    if numbers_of(version) < numbers_of(FLOWS_SINCE):
        raise StartError(
            f"a flow ensemble needs vLLM {FLOWS_SINCE}, and {version} is installed: install that"
        )
    if ensemble.experts[expert].architecture != FLOW_ARCHITECTURE:
        raise StartError(
            f"{described} cannot be an expert of a flow ensemble: of masked-language models vLLM serves "
            f"{FLOW_ARCHITECTURE} alone"
        )
    if ensemble.experts[expert].options.tensor_parallel_size or args.tensor_parallel_size > 1:
        raise StartError(
            f"{described} would have several ranks, and a flow ensemble's experts have one each: leave "
            "tensor_parallel_size and --tensor-parallel-size out"
        )
    return _checked(ensemble, expert, _flow_engine_args(ensemble, expert, args))


def _described(ensemble: Ensemble, expert: int) -> str:
    return f"expert {ensemble.experts[expert].name!r} ({ensemble.experts[expert].architecture})"


def _checked(ensemble: Ensemble, expert: int, engine: Any) -> Any:
    """The configuration that vLLM makes of an expert's arguments, if it can be served.

    Raises:
        StartError: it cannot.
    """
    name, described = ensemble.experts[expert].name, _described(ensemble, expert)
    try:
        config = engine.create_engine_config()
    except ValueError as error:  # pydantic's ValidationError is one
        reason = " ".join(str(error).split("[type=")[0].split())
        raise StartError(f"expert {name!r}: vLLM refuses these flags: {reason}") from None
    model = config.model_config
    if model.get_vocab_size() < ensemble.vocab_size:
        raise StartError(
            f"{described} would have {model.get_vocab_size()} token ids, and its config.json says more: leave "
            "--hf-overrides and --hf-config-path out"
        )
    sizes = _unsupported_head_size(model)
    if sizes is not None:
        raise StartError(
            f"{described} has attention heads of {model.get_head_size()} dimensions, and vLLM's attention on CPUs has "
            f"only {', '.join(map(str, sizes))}: serve it on a GPU, or train it with another head size"
        )
    return config


def refuse_other_steps(served: Any, config: Any, name: str, spec: PlaneSpec) -> None:
    """An expert's engine takes the place of one that runs, beside others that go on.

    Args:
        served: the configuration of that one.
        name: of the expert that ``config`` is for.
        spec: of the plane.

    Raises:
        StartError: what the engines have in common would not be so any more.
    """
    for what, before, after in (
        ("positions", spec.positions, config.model_config.max_model_len),
        ("slots", served.scheduler_config.max_num_seqs, config.scheduler_config.max_num_seqs),
        ("tokens in a KV block", 0, spec.prompt_unit % config.cache_config.block_size),
        *(
            [("dtype", served.model_config.dtype, config.model_config.dtype)] if spec.on_device else []
        ),  # that of rows
    ):
        if before != after:
            raise StartError(
                f"expert {name!r} does not fit in with the engines that run (its {what}): start the server anew"
            )


def _unsupported_head_size(model: Any) -> list[int] | None:
    """On CPU, the sizes that there are, if the model's is none of them: vLLM would find out as it computes."""
    if not on_cpu() or model.use_mla:
        return None
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    if CPUAttentionBackend.supports_head_size(model.get_head_size()):
        return None
    sizes: list[int] = CPUAttentionBackend.get_supported_head_sizes()
    return sizes


def _engine_args(ensemble: Ensemble, expert: int, args: Namespace, ranks: int, cpu_kv_bytes: int) -> Any:
    from decar.server.vllm_adapter.versions import sampler_needs_fp64

    engine = _common_args(ensemble, expert, args)
    engine.tensor_parallel_size = ranks
    engine.worker_cls = "decar.server.vllm_adapter.worker.LockstepWorker"
    engine.scheduler_cls = "decar.server.vllm_adapter.scheduler.LockstepScheduler"
    engine.scheduling_policy = "priority"  # every engine orders requests by the same arrival times
    if on_cpu():
        if sampler_needs_fp64():
            engine.use_fp64_gumbel = True
        if shares_default_kv(args):
            engine.kv_cache_memory_bytes = cpu_kv_bytes
    if ranks > 1:
        engine.distributed_executor_backend = f"{_EXECUTORS}.RanksExecutor"
    return engine


def _flow_engine_args(ensemble: Ensemble, expert: int, args: Namespace) -> Any:
    engine = _common_args(ensemble, expert, args)
    engine.runner = "pooling"
    engine.worker_cls = "decar.server.vllm_adapter.flow_worker.FlowWorker"
    if shares_default_kv(args):
        engine.kv_cache_memory_bytes = _NO_KV_BYTES
    return engine


def _common_args(ensemble: Ensemble, expert: int, args: Namespace) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    engine = AsyncEngineArgs.from_cli_args(args)
    engine.model = str(ensemble.experts[expert].path)
    # One tokenizer configuration and one generation_config.json, the first expert's, for all: what ends an
    # answer must not depend on which expert leads.
    first = str(ensemble.experts[0].path)
    engine.tokenizer = engine.tokenizer or first
    if engine.generation_config == "auto":
        engine.generation_config = first
    engine.served_model_name = [ensemble.name]
    engine.async_scheduling = False
    # The cache is one engine's: it would keep the images that this one has from those that have yet to see them.
    engine.mm_processor_cache_gb = 0
    if engine.max_model_len is None:
        engine.max_model_len = ensemble.max_positions
    if on_cpu():
        engine.distributed_executor_backend = f"{_EXECUTORS}.InProcessExecutor"
    return engine


def shares_default_kv(args: Namespace) -> bool:
    """Whether decar says how large each engine's KV cache is on a CPU; else the user does, for each rank."""
    return on_cpu() and args.kv_cache_memory_bytes is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ


def on_cpu() -> bool:
    """Whether vLLM computes on this machine's cores."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def give_memory(config: Any, kv_bytes: int | None, share: float) -> None:
    """Have an engine on a GPU take what it is given there.

    Args:
        kv_bytes: its KV cache; None: what is left.
        share: of the GPU's memory, needed in all.
    """
    cache = config.cache_config
    cache.kv_cache_memory_bytes = kv_bytes
    if kv_bytes is not None:  # vLLM refuses to start where less than this share is free
        cache.gpu_memory_utilization = min(share, cache.gpu_memory_utilization)


def row_dtype(configs: Sequence[Any]) -> str:
    """The experts' dtype where they have one in common, for rows on a device."""
    dtypes = {str(config.model_config.dtype).removeprefix("torch.") for config in configs}
    return dtypes.pop() if len(dtypes) == 1 else "float32"
