"""Every name of vLLM's that decar relies on, and a check of vLLM's source against that list. Runs none of vLLM.

    python tools/seams.py                     # the installed vLLM
    python tools/seams.py --version 0.33.0    # that version's wheel, downloaded

To add one, add a line to `SEAMS`: what `reads` or `is_a` names has to be there; what decar `calls` has to take what it
passes; what decar `replaces`, by overriding or by assignment, has to have the parameters that decar's own takes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from decar.server.vllm_adapter.source_tree import Function, Signature, SourceTree, mentions
from decar.server.vllm_adapter.versions import FLOWS_SINCE, MOVED, numbers_of

Kind = Literal["reads", "calls", "replaces", "implements"]


@dataclass(frozen=True)
class Seam:
    """One name of vLLM's that decar relies on.

    Attributes:
        module, name: where it is: "function", "Class", "CONSTANT", "Class.member"; inherited ones count.
        kind: "reads": uses it as it is, or inherits from it. "calls": calls it with these ``parameters``. "replaces":
            puts a function that takes these ``parameters`` in its place. "implements": defines what it declares
            abstract, of which ``parameters`` are the names.
        parameters: as in a ``def``, without self: "async first, *, by_name"; "=" is any default. A replacement that
            passes on whatever else comes has "*args, **kwargs".
        used_by: which file of the adapter relies on it, or the gateway, and where that is not plain, for what.
        called_in: "Class.member" of that module, or "module:Class.member", that has to call it: what is replaced and
            never called does nothing.
        since, before: the versions that have it there.
    """

    module: str
    name: str
    kind: Kind
    parameters: str = ""
    used_by: str = ""
    called_in: str = ""
    since: str = ""
    before: str = ""

    def is_of(self, version: str) -> bool:
        """Whether it concerns this version."""
        return (not self.since or numbers_of(version) >= numbers_of(self.since)) and (
            not self.before or numbers_of(version) < numbers_of(self.before)
        )


def reads(module: str, owner: str, members: str, **more: str) -> Iterator[Seam]:
    """``members`` of a class, by name; with no ``owner``, names of the module."""
    for member in members.split():
        yield Seam(module, f"{owner}.{member}" if owner else member, "reads", **more)


def calls(module: str, name: str, parameters: str = "", **more: str) -> Iterator[Seam]:
    yield Seam(module, name, "calls", parameters, **more)


def replaces(module: str, name: str, parameters: str = "", **more: str) -> Iterator[Seam]:
    yield Seam(module, name, "replaces", parameters, **more)


def implements(module: str, name: str, members: str) -> Iterator[Seam]:
    yield Seam(module, name, "implements", members)


def moved(name: str, parameters: str) -> Iterator[Seam]:
    """What is called, or in a class of, `versions.MOVED`: a seam for each place that it has been in."""
    before = ""
    for since, module in MOVED[name.partition(".")[0]]:
        yield Seam(module, name, "calls", parameters, since=since, before=before)
        before = since


def used_by(file: str, *groups: Iterable[Seam]) -> Iterator[Seam]:
    """The seams that one of decar's files relies on."""
    for group in groups:
        for seam in group:
            yield replace(seam, used_by=f"{file}: {seam.used_by}" if seam.used_by else file)


def of_flows(file: str, *groups: Iterable[Seam]) -> Iterator[Seam]:
    """The same of flow ensembles, which versions before `versions.FLOWS_SINCE` cannot serve."""
    for seam in used_by(file, *groups):
        yield replace(seam, since=FLOWS_SINCE)


_RUNNER = "vllm.v1.worker.gpu_model_runner"
_BATCH = "vllm.v1.worker.gpu_input_batch"
_V2 = "vllm.v1.worker.gpu.model_runner"
_V2_STATES = "vllm.v1.worker.gpu.states"
_V2_BUFFERS = "vllm.v1.worker.gpu.buffer_utils"
_V2_BATCH = "vllm.v1.worker.gpu.input_batch"
_SCHEDULER = "vllm.v1.core.sched.scheduler"
_STEP = "vllm.v1.core.sched.output"
_ENGINE = "vllm.v1.engine.async_llm"
_CLIENT = "vllm.v1.engine.core_client"
_PROCESSOR = "vllm.v1.engine.output_processor"
_RENDERER = "vllm.renderers.base"
_CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn"
_MULTIPROC = "vllm.v1.executor.multiproc_executor"
_CUDA = "vllm.distributed.device_communicators.cuda_wrapper"

_WORKERS = (("vllm.v1.worker.cpu_worker", "CPUWorker"), ("vllm.v1.worker.gpu_worker", "Worker"))

SEAMS: tuple[Seam, ...] = (
    *used_by(
        "expert_worker",
        *(
            seams
            for module, worker in _WORKERS
            for seams in (
                replaces(module, f"{worker}.init_device"),
                replaces(module, f"{worker}.load_model", "*args, **kwargs"),
                reads(module, worker, "vllm_config distributed_init_method rank parallel_config"),
            )
        ),
        reads("vllm.platforms", "", "current_platform"),
    ),
    *of_flows(
        "flow_worker",
        *(
            seams
            for module, worker in _WORKERS
            for seams in (
                replaces(module, f"{worker}.execute_model", "scheduler_output"),
                reads(module, worker, "model_runner"),
            )
        ),
        calls(_RUNNER, "GPUModelRunner.get_model"),
        calls(
            "vllm.model_executor.models.bert",
            "BertMLMHead.forward",
            "hidden_states",
            used_by="is computed at the positions that are asked for",
        ),
        replaces(
            "vllm.model_executor.layers.pooler.abstract",
            "Pooler.forward",
            "hidden_states, pooling_metadata",
        ),
        replaces("vllm.model_executor.layers.pooler.abstract", "Pooler.get_supported_tasks"),
        calls("vllm.v1.pool.metadata", "PoolingMetadata.get_pooling_cursor"),
        reads("vllm.v1.pool.metadata", "PoolingMetadata", "pooling_params"),
        calls("vllm.v1.pool.metadata", "PoolingCursor.is_partial_prefill"),
        reads("vllm.v1.pool.metadata", "PoolingCursor", "num_scheduled_tokens_cpu"),
        reads("vllm.pooling_params", "PoolingParams", "extra_kwargs task"),
        reads("vllm.tasks", "", "PoolingTask"),
    ),
    *of_flows(
        "virtual",
        calls(
            "vllm.v1.engine.input_processor",
            "InputProcessor.process_inputs",
            "request_id, prompt, params, *, supported_tasks",
        ),
        calls("vllm.v1.engine.input_processor", "InputProcessor.assign_request_id", "request"),
        calls(_PROCESSOR, "OutputProcessor.__init__", "tokenizer, *, log_stats"),
        calls(_PROCESSOR, "OutputProcessor.add_request", "request, prompt, parent_req, request_index, queue"),
        calls(_PROCESSOR, "OutputProcessor.process_outputs", "engine_core_outputs"),
        calls(_PROCESSOR, "OutputProcessor.abort_requests", "request_ids, *, internal"),
        reads(_PROCESSOR, "OutputProcessorOutput", "reqs_to_abort"),
        calls(_PROCESSOR, "RequestOutputCollector.__init__", "output_kind, request_id"),
        reads("vllm.v1.engine", "EngineCoreRequest", "request_id prompt_token_ids sampling_params"),
        reads("vllm.v1.engine", "EngineCoreOutput", "new_logprobs finish_reason stop_reason"),
        reads("vllm.v1.engine", "FinishReason", "STOP LENGTH"),
        reads("vllm.v1.outputs", "LogprobsLists", "logprob_token_ids logprobs sampled_token_ranks"),
        reads("vllm.sampling_params", "SamplingParams", "eos_token_id all_stop_token_ids stop_token_ids"),
    ),
    *used_by(
        "worker",
        *(
            seams
            for module, worker in _WORKERS
            for seams in (
                replaces(module, f"{worker}.execute_model", "scheduler_output"),
                replaces(module, f"{worker}.sample_tokens", "grammar_output"),
                reads(module, worker, "vllm_config device model_runner use_v2_model_runner"),
            )
        ),
        reads(
            _STEP,
            "SchedulerOutput",
            "finished_req_ids scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens",
        ),
        reads(_STEP, "NewRequestData", "req_id prompt_token_ids sampling_params num_computed_tokens"),
        reads(_STEP, "NewRequestData", "prefill_token_ids mm_features"),
        reads(_STEP, "CachedRequestData", "req_ids num_computed_tokens num_output_tokens"),
        reads("vllm.platforms", "", "current_platform"),
        reads("vllm.config", "ModelConfig", "logits_processors"),
    ),
    *used_by(
        "draws",
        reads("vllm.sampling_params", "SamplingParams", "temperature seed extra_args"),
        reads("vllm.sampling_params", "SamplingParams", "_eos_token_id _all_stop_token_ids"),
        reads("vllm.v1.sample.logits_processor", "", "LOGITSPROCS_GROUP"),
    ),
    *used_by(
        "prompts",
        reads("vllm.multimodal.inputs", "MultiModalFeatureSpec", "mm_position"),
        reads("vllm.multimodal.inputs", "PlaceholderRange", "offset length"),
        reads("vllm.platforms", "", "current_platform"),
    ),
    *used_by(
        "executor",
        replaces("vllm.v1.executor.uniproc_executor", "UniProcExecutor._init_executor"),
        reads(
            "vllm.v1.executor.uniproc_executor", "", "Lock", used_by="its lock would have a name in /dev/shm"
        ),
        replaces(_MULTIPROC, "MultiprocExecutor._init_executor"),
        replaces(
            _MULTIPROC,
            "MultiprocExecutor._ensure_worker_termination",
            "worker_procs",
            called_in="MultiprocExecutor.shutdown",
        ),
        reads(_MULTIPROC, "MultiprocExecutor", "vllm_config"),
        reads(
            "vllm.distributed.device_communicators.shm_broadcast",
            "",
            "shared_memory",
            used_by="its message queues are named after who makes them",
        ),
    ),
    *used_by(
        "ranks",
        calls("vllm.distributed.parallel_state", "get_tp_group"),
        reads("vllm.distributed.parallel_state", "GroupCoordinator", "rank_in_group world_size"),
        calls("vllm.distributed.parallel_state", "GroupCoordinator.broadcast_object", "obj"),
    ),
    *used_by(
        "step",
        replaces(
            "vllm.model_executor.models.interfaces_base",
            "VllmModelForTextGeneration.compute_logits",
            "hidden_states, *args, **kwargs",
        ),
    ),
    *used_by(
        "runner_v1",
        replaces(
            _RUNNER,
            "GPUModelRunner._sample",
            "logits, spec_decode_metadata",
            called_in="GPUModelRunner.sample_tokens",
            used_by="tokens are published and adopted before the runner keeps them",
        ),
        reads(
            "vllm.v1.worker.cpu_model_runner",
            "CPUModelRunner",
            "_sample execute_model_state discard_request_mask",
        ),
        reads(
            _RUNNER,
            "GPUModelRunner",
            "execute_model_state model requests input_batch query_start_loc sampler",
        ),
        reads(
            _RUNNER, "GPUModelRunner", "discard_request_mask", used_by="marks rows whose sample is dropped"
        ),
        reads(_RUNNER, "ExecuteModelState", "logits hidden_states"),
        reads("vllm.v1.utils", "CpuGpuBuffer", "np"),
        reads(_BATCH, "InputBatch", "req_id_to_index num_reqs generators vocab_size"),
        reads(
            _BATCH,
            "InputBatch",
            "num_tokens_no_spec token_ids_cpu is_token_ids",
            used_by="tokens adopted late",
        ),
        replaces(
            _BATCH,
            "InputBatch.add_request",
            "request",
            called_in=f"{_RUNNER}:GPUModelRunner._update_states",
            used_by="a request that begins after tokens of its answer",
        ),
        reads(
            _BATCH,
            "CachedRequestState",
            "req_id output_token_ids num_computed_tokens sampling_params generator",
        ),
        reads("vllm.v1.sample.sampler", "Sampler", "topk_topp_sampler"),
        *(
            calls(
                "vllm.v1.sample.ops.topk_topp_sampler", f"TopKTopPSampler.{name}", "logits, generators, k, p"
            )
            for name in ("forward_native", "forward_cpu", "forward_cuda")
        ),
        reads("vllm.v1.sample.ops.topk_topp_sampler", "TopKTopPSampler", "use_fp64_gumbel"),
        reads("vllm.v1.outputs", "SamplerOutput", "sampled_token_ids logprobs_tensors"),
    ),
    *used_by(
        "runner_v2",
        replaces(
            _V2,
            "GPUModelRunner.sample",
            "hidden_states, input_batch, grammar_output",
            called_in="GPUModelRunner.sample_tokens",
            used_by="logits are mixed before grammar and sampler, tokens published and adopted after",
        ),
        replaces(
            _V2,
            "GPUModelRunner.update_requests",
            "scheduler_output",
            called_in="GPUModelRunner.execute_model",
            used_by="what the scheduler counts as computed is written to the device after a hold",
        ),
        calls(
            _V2,
            "GPUModelRunner.postprocess_sampled",
            "idx_mapping, sampled_tokens, *, num_sampled, num_rejected",
            used_by="tokens adopted late",
        ),
        reads(_V2, "GPUModelRunner", "execute_model_state model req_states device"),
        calls(_V2, "GPUModelRunner.sample_tokens", "grammar_output"),
        reads(_V2, "ExecuteModelState", "input_batch hidden_states"),
        reads(_V2_BATCH, "InputBatch", "req_ids num_reqs query_start_loc_np logits_indices"),
        reads(_V2_BATCH, "InputBatch", "num_computed_tokens_np"),
        reads(_V2_STATES, "RequestState", "req_id_to_index num_computed_tokens"),
        reads(_V2_BUFFERS, "StagedWriteTensor", "gpu"),
        reads(
            "vllm.v1.worker.gpu.sample.output",
            "SamplerOutput",
            "sampled_token_ids num_sampled num_rejected num_nans logprobs_tensors",
            used_by="num_sampled 0 is a hold",
        ),
    ),
    *used_by(
        "scheduler",
        replaces(_SCHEDULER, "Scheduler.__init__", "*args, **kwargs"),
        replaces(_SCHEDULER, "Scheduler.add_request", "request"),
        replaces(_SCHEDULER, "Scheduler.schedule", "*args, **kwargs"),
        replaces(_SCHEDULER, "Scheduler.update_from_output", "scheduler_output, model_runner_output"),
        replaces(
            _SCHEDULER, "Scheduler.make_stats", "*args, **kwargs", called_in="Scheduler.update_from_output"
        ),
        replaces(_SCHEDULER, "Scheduler._free_request", "request, *args, **kwargs", called_in="Scheduler"),
        calls(_SCHEDULER, "Scheduler.finish_requests", "request_ids, finished_status"),
        calls(_SCHEDULER, "Scheduler._preempt_request", "request, timestamp"),
        reads(
            _SCHEDULER,
            "Scheduler",
            "requests running waiting vllm_config kv_cache_manager structured_output_manager",
        ),
        calls("vllm.v1.core.sched.request_queue", "RequestQueue.peek_request"),
        replaces(
            "vllm.v1.core.kv_cache_manager",
            "KVCacheManager.get_computed_blocks",
            "request, *args, **kwargs",
            called_in=f"{_SCHEDULER}:Scheduler",
            used_by="what is to be scored may not come from the cache",
        ),
        *(
            replaces(
                "vllm.v1.core.kv_cache_coordinator",
                f"{owner}.find_longest_cache_hit",
                "block_hashes, max_cache_hit_length",
                called_in="vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
            )
            for owner in (
                "UnitaryKVCacheCoordinator",
                "HybridKVCacheCoordinator",
                "KVCacheCoordinatorNoPrefixCache",
            )
        ),
        reads("vllm.v1.core.kv_cache_manager", "KVCacheManager", "coordinator"),
        reads("vllm.v1.request", "Request", "request_id sampling_params status priority arrival_time"),
        reads("vllm.v1.request", "Request", "num_computed_tokens num_tokens num_output_tokens"),
        reads("vllm.v1.request", "Request", "structured_output_request prefill_stats"),
        reads(
            "vllm.v1.structured_output.request",
            "StructuredOutputRequest",
            "_grammar",
            used_by="waited for where it has to hear of tokens that were said before",
        ),
        calls("vllm.v1.request", "Request.append_output_token_ids", "token_ids"),
        reads("vllm.v1.request", "RequestStatus", "WAITING RUNNING PREEMPTED FINISHED_ABORTED"),
        reads("vllm.v1.engine", "EngineCoreOutputs", "outputs finished_requests scheduler_stats"),
        reads("vllm.v1.engine", "EngineCoreOutput", "request_id new_token_ids finish_reason"),
        calls(
            "vllm.v1.structured_output",
            "StructuredOutputManager.accept_tokens",
            "request, new_token_ids",
            since="0.30",
        ),
        calls(
            "vllm.v1.structured_output", "StructuredOutputManager.should_advance", "request", before="0.30"
        ),
        calls(
            "vllm.v1.structured_output",
            "StructuredOutputManager.trim_reasoning_for_advance",
            "request, new_token_ids",
            before="0.30",
        ),
        calls(
            "vllm.v1.structured_output.backend_types",
            "StructuredOutputGrammar.accept_tokens",
            "request_id, tokens",
        ),
    ),
    *used_by(
        "engine",
        calls(
            _ENGINE,
            "AsyncLLM.from_vllm_config",
            "vllm_config, *, stat_loggers, disable_log_stats, client_addresses",
            used_by="starts engines",
        ),
        calls(_ENGINE, "AsyncLLM.generate", "async prompt, sampling_params, request_id, **kwargs"),
        calls(_ENGINE, "AsyncLLM.add_request", "async request_id, prompt, params, *, arrival_time, **kwargs"),
        calls(_ENGINE, "AsyncLLM._run_output_handler", used_by="starts noticing that an engine dies"),
        reads(_ENGINE, "AsyncLLM", "output_handler output_processor engine_core errored"),
        reads(_ENGINE, "AsyncLLM", "vllm_config model_config renderer input_processor"),
        calls(_ENGINE, "AsyncLLM.shutdown", "*, timeout"),
        calls(_ENGINE, "AsyncLLM.check_admission", "n, request_id", since="0.29"),
        calls(_ENGINE, "AsyncLLM.release_kv_cache_memory", "async ", since="0.31"),
        *(
            calls(_ENGINE, f"AsyncLLM.{name}", "async ")
            for name in (
                *(
                    "get_supported_tasks",
                    "is_tracing_enabled",
                    "do_log_stats",
                    "reset_mm_cache",
                    "reset_encoder_cache",
                ),
                *(
                    "reset_prefix_cache",
                    "start_profile",
                    "stop_profile",
                    "pause_generation",
                    "resume_generation",
                ),
                *("is_paused", "is_sleeping", "sleep", "wake_up"),
            )
        ),
        calls(_ENGINE, "AsyncLLM.abort", "async request_id"),
        reads(_CLIENT, "AsyncMPClient", "resources", used_by="engine processes"),
        reads(_CLIENT, "BackgroundResources", "engine_manager", used_by="engine processes"),
        reads("vllm.v1.engine.utils", "CoreEngineProcManager", "processes", used_by="engine processes"),
        calls(_CLIENT, "AsyncMPClient.start_engine_core_monitor", used_by="engines that are actors"),
        calls(_CLIENT, "AsyncMPClient.abort_requests_async", "async request_ids"),
        calls(_PROCESSOR, "OutputProcessor.abort_requests", "request_ids, *, internal"),
        calls(_PROCESSOR, "RequestOutputCollector.get", "async "),
        calls(_PROCESSOR, "RequestOutputCollector.get_nowait"),
        calls(_PROCESSOR, "RequestOutputCollector.put", "output"),
        reads(_PROCESSOR, "RequestOutputCollector", "request_id"),
        reads("vllm.v1.engine.exceptions", "", "EngineDeadError"),
    ),
    *used_by(
        "actor",
        calls(
            "vllm.v1.engine.core",
            "EngineCoreActor.__init__",
            "vllm_config, local_client, addresses, executor_class, log_stats",
        ),
        calls("vllm.v1.engine.core", "EngineCoreActor.run"),
        reads("vllm.v1.engine.core", "", "EngineCoreActor"),
        reads("vllm.v1.engine.utils", "EngineZmqAddresses", "inputs outputs"),
        reads("vllm.v1.engine.utils", "", "EngineZmqAddresses"),
        reads("vllm.v1.executor", "", "Executor"),
        calls("vllm.v1.executor.abstract", "Executor.get_class", "vllm_config"),
        # What vLLM's client asks of whoever manages its engine.
        replaces(
            "vllm.v1.engine.utils",
            "CoreEngineProcManager.monitor_engine_liveness",
            called_in=f"{_CLIENT}:MPClient.start_engine_core_monitor",
        ),
        replaces("vllm.v1.engine.utils", "CoreEngineProcManager.shutdown", "timeout="),
    ),
    *used_by(
        "fork_server",
        replaces("vllm.v1.engine.utils", "get_mp_context", called_in="CoreEngineProcManager.__init__"),
    ),
    *used_by(
        "brought",
        replaces(
            _CLIENT,
            "AsyncMPClient.get_output_async",
            "async ",
            called_in=f"{_ENGINE}:AsyncLLM._run_output_handler",
        ),
        reads(_CLIENT, "AsyncMPClient", "resources"),
        reads(_CLIENT, "BackgroundResources", "engine_dead"),
        reads("vllm.v1.engine", "EngineCoreOutputs", "timestamp"),
    ),
    *used_by(
        "tracing",
        replaces(
            _PROCESSOR,
            "OutputProcessor.do_tracing",
            "engine_core_output, req_state, iteration_stats",
            called_in="OutputProcessor.process_outputs",
        ),
        reads(_PROCESSOR, "RequestState", "stats detokenizer"),
        reads("vllm.v1.metrics.stats", "RequestStateStats", "scheduled_ts"),
        calls(
            "vllm.tracing",
            "init_tracer",
            "instrumenting_module_name, otlp_traces_endpoint",
            used_by="what AsyncLLM sets up for decar's spans too",
        ),
    ),
    *used_by(
        "grammars",
        reads(
            "vllm.v1.engine.input_processor",
            "InputProcessor",
            "structured_outputs_config model_config renderer",
        ),
        calls(
            "vllm.sampling_params",
            "SamplingParams._validate_structured_outputs",
            "model_config, structured_outputs_config, tokenizer",
            used_by="chooses the backend; does nothing where the configuration is None",
        ),
        reads("vllm.sampling_params", "SamplingParams", "structured_outputs"),
        reads("vllm.sampling_params", "StructuredOutputsParams", "_backend"),
        replaces(
            "vllm.v1.structured_output",
            "StructuredOutputManager.grammar_init",
            "request",
            called_in="vllm.v1.engine.core:EngineCore.preprocess_add_request",
        ),
        reads("vllm.v1.structured_output", "StructuredOutputManager", "backend"),
    ),
    *used_by(
        "limits",
        replaces(
            "vllm.v1.engine.input_processor",
            "InputProcessor.process_inputs",
            "*args, **kwargs",
            called_in=f"{_ENGINE}:AsyncLLM.add_request",
            used_by="an engine of V2 would end with what it has no room for",
        ),
        reads("vllm.v1.engine", "EngineCoreRequest", "sampling_params"),
        reads("vllm.config", "VllmConfig", "use_v2_model_runner"),
        reads(
            "vllm.v1.worker.gpu.sample.logit_bias",
            "",
            "MAX_NUM_ALLOWED_TOKEN_IDS MAX_NUM_LOGIT_BIAS_TOKENS MAX_NUM_STOP_TOKEN_IDS",
        ),
        reads("vllm.envs", "", "VLLM_MAX_NUM_BAD_WORDS VLLM_MAX_BAD_WORDS_TOTAL_TOKENS", since="0.28"),
        reads(
            "vllm.v1.worker.gpu.sample.bad_words",
            "",
            "MAX_NUM_BAD_WORDS MAX_BAD_WORDS_TOTAL_TOKENS",
            before="0.28",
        ),
        reads("vllm.sampling_params", "SamplingParams", "all_stop_token_ids bad_words_token_ids min_tokens"),
    ),
    *used_by(
        "relay",
        replaces(
            _PROCESSOR,
            "OutputProcessor.process_outputs",
            "engine_core_outputs, engine_core_timestamp, *args, **kwargs",
            called_in=f"{_ENGINE}:AsyncLLM._run_output_handler",
        ),
        replaces(
            _PROCESSOR,
            "OutputProcessor.add_request",
            "request, *args, **kwargs",
            called_in=f"{_ENGINE}:AsyncLLM._add_request",
            used_by="an answer that another engine goes on with",
        ),
        replaces(
            _PROCESSOR,
            "OutputProcessor.propagate_error",
            "e",
            called_in=f"{_ENGINE}:AsyncLLM._run_output_handler",
        ),
        reads(_PROCESSOR, "OutputProcessor", "request_states"),
        reads(_PROCESSOR, "RequestState", "request_id detokenizer queue"),
        reads("vllm.v1.engine", "EngineCoreOutput", "request_id new_token_ids finish_reason"),
        reads("vllm.v1.engine", "FinishReason", "ERROR"),
        reads("vllm.v1.engine.detokenizer", "IncrementalDetokenizer", "output_token_ids"),
        calls("vllm.v1.engine.detokenizer", "IncrementalDetokenizer.num_output_tokens"),
    ),
    *used_by(
        "gateway",
        implements(
            "vllm.engine.protocol",
            "EngineClient",
            "generate encode abort is_running is_stopped errored dead_error check_health shutdown "
            "is_tracing_enabled do_log_stats reset_mm_cache reset_encoder_cache reset_prefix_cache "
            "start_profile stop_profile pause_generation resume_generation is_paused is_sleeping sleep wake_up "
            "add_lora notify_kv_transfer_request_rejected release_kv_cache_memory",
        ),
        reads("vllm.engine.protocol", "EngineClient", "vllm_config model_config renderer input_processor"),
        reads("vllm.config", "ModelConfig", "max_logprobs is_hybrid is_attention_free max_model_len dtype"),
        reads("vllm.outputs", "RequestOutput", "request_id outputs finished prompt_logprobs"),
        reads("vllm.outputs", "CompletionOutput", "index token_ids"),
        reads(
            "vllm.sampling_params",
            "SamplingParams",
            "extra_args output_kind detokenize skip_reading_prefix_cache",
        ),
        reads(
            "vllm.sampling_params", "SamplingParams", "logprobs prompt_logprobs logit_bias allowed_token_ids"
        ),
        reads("vllm.sampling_params", "RequestOutputKind", "FINAL_ONLY DELTA"),
        calls("vllm.exceptions", "VLLMValidationError.__init__", "message, *, parameter"),
        reads("vllm.logprobs", "", "Logprob"),
    ),
    *used_by(
        "engine",
        calls("vllm.v1.engine.logprobs", "LogprobsProcessor.update_from_output", "output"),
        reads(
            "vllm.v1.engine.logprobs",
            "LogprobsProcessor",
            "tokenizer logprobs prompt_logprobs cumulative_logprob num_logprobs num_prompt_logprobs",
        ),
        reads("vllm.v1.engine", "EngineCoreOutput", "request_id new_token_ids new_prompt_logprobs_tensors"),
        reads("vllm.v1.outputs", "LogprobsTensors", "logprob_token_ids logprobs selected_token_ranks"),
        reads("vllm.pooling_params", "PoolingParams", "task extra_kwargs"),
        reads("vllm.outputs", "PoolingRequestOutput", "outputs"),
        *(
            replaces(
                module,
                f"{renderer}._process_tokens_async",
                "async prompt, **kwargs",
                called_in=f"{_RENDERER}:BaseRenderer",
            )
            for module, renderer in ((_RENDERER, "BaseRenderer"), ("vllm.renderers.hf", "HfRenderer"))
        ),
        reads(_RENDERER, "BaseRenderer", "_executor _mm_executor", used_by="their threads are started early"),
        reads(
            _RENDERER,
            "_SwappableExecutor",
            "_max_workers",
            since="0.32",
            used_by="their threads are started early",
        ),
    ),
    *used_by(
        "versions",
        reads(_RENDERER, "BaseRenderer", "get_tokenizer get_mm_processor model_config"),
        reads("vllm.config", "ModelConfig", "supports_multimodal_inputs", since="0.31"),
        calls(
            "vllm.multimodal.registry",
            "MultiModalRegistry.supports_multimodal_inputs",
            "model_config",
            before="0.31",
        ),
        calls(
            "vllm.multimodal.processing",
            "BaseMultiModalProcessor.get_dummy_mm_inputs",
            "mm_counts",
            since="0.31",
        ),
        calls(
            "vllm.multimodal.registry",
            "MultiModalRegistry.get_dummy_mm_inputs",
            "model_config, mm_counts, *, processor",
            before="0.31",
        ),
        reads("vllm.multimodal", "", "MULTIMODAL_REGISTRY", before="0.31"),
        reads("vllm.multimodal.processing", "BaseMultiModalProcessor", "info"),
        reads("vllm.multimodal.processing", "BaseProcessingInfo", "allowed_mm_limits"),
    ),
    *used_by(
        "media",
        reads("vllm.multimodal.media", "", "MEDIA_CONNECTOR_REGISTRY MediaConnector"),
        calls("vllm.utils.registry", "ExtensionManager.register", "name"),
        replaces("vllm.multimodal.media", "MediaConnector.load_from_url_async", "async url, *args, **kwargs"),
        reads("vllm.multimodal.media", "MediaConnector", "allowed_media_domains"),
        reads("vllm.exceptions", "", "VLLMUnprocessableEntityError VLLMValidationError"),
        reads("vllm.envs", "", "VLLM_MEDIA_CONNECTOR VLLM_MEDIA_URL_ALLOW_REDIRECTS VLLM_MAX_IMAGE_PIXELS"),
    ),
    *used_by(
        "metrics",
        replaces("vllm.v1.metrics.loggers", "PrometheusStatLogger.__init__", "vllm_config, engine_indexes="),
        replaces("vllm.v1.metrics.loggers", "PrometheusStatLogger.record", "*args, **kwargs"),
        reads("vllm.v1.metrics.loggers", "PrometheusStatLogger", "record_sleep_state log_engine_initialized"),
        calls("vllm.v1.metrics.loggers", "PrometheusStatLogger.record", "*, engine_idx, **kwargs"),
        reads("vllm.v1.metrics.loggers", "PrometheusStatLogger", "record_admission_rejection", since="0.32"),
        reads("vllm.v1.metrics.loggers", "LoggingStatLogger", "log_prefix"),
        reads("vllm.v1.metrics.loggers", "PerEngineStatLoggerAdapter", "per_engine_stat_loggers"),
        reads("vllm.v1.metrics.loggers", "StatLoggerManager", "stat_loggers"),
        reads("vllm.v1.engine.async_llm", "AsyncLLM", "logger_manager"),
    ),
    *used_by(
        "app",
        *(
            moved(name, parameters)
            for name, parameters in (
                ("build_app", "args, supported_tasks, model_config"),
                ("init_app_state", "async engine_client, state, args, supported_tasks"),
                ("get_uvicorn_log_config", "args"),
                ("make_arg_parser", "parser"),
                ("validate_parsed_serve_args", "args"),
            )
        ),
        reads("vllm.utils.argparse_utils", "", "FlexibleArgumentParser"),
        reads("vllm.entrypoints.openai.models.serving", "OpenAIServingModels", "base_model_paths"),
        calls(_CPU_ATTENTION, "CPUAttentionBackend.supports_head_size", "head_size"),
        calls(_CPU_ATTENTION, "CPUAttentionBackend.get_supported_head_sizes"),
        reads("vllm.config", "ModelConfig", "is_hybrid is_attention_free use_mla max_model_len dtype"),
        calls("vllm.config", "ModelConfig.get_head_size"),
        calls("vllm.config", "ModelConfig.get_vocab_size"),
        calls("vllm.utils.system_utils", "set_ulimit"),
        calls("vllm.utils.system_utils", "decorate_logs", "process_name"),
        calls("vllm.utils.system_utils", "set_process_title", "name"),
        calls("vllm.envs", "enable_envs_cache"),
        reads(
            "vllm.envs",
            "",
            "VLLM_API_KEY VLLM_RPC_BASE_PATH VLLM_USE_V2_MODEL_RUNNER VLLM_WORKER_MULTIPROC_METHOD",
        ),
        calls("vllm.engine.arg_utils", "AsyncEngineArgs.from_cli_args", "args"),
        calls("vllm.engine.arg_utils", "AsyncEngineArgs.create_engine_config"),
        reads(
            "vllm.engine.arg_utils", "AsyncEngineArgs", "model tokenizer generation_config served_model_name"
        ),
        reads(
            "vllm.engine.arg_utils",
            "AsyncEngineArgs",
            "worker_cls scheduler_cls async_scheduling scheduling_policy",
        ),
        reads(
            "vllm.engine.arg_utils",
            "AsyncEngineArgs",
            "mm_processor_cache_gb max_model_len use_fp64_gumbel",
        ),
        reads(
            "vllm.engine.arg_utils", "AsyncEngineArgs", "kv_cache_memory_bytes distributed_executor_backend"
        ),
        reads("vllm.config", "VllmConfig", "additional_config cache_config scheduler_config model_config"),
        reads("vllm.config", "CacheConfig", "kv_cache_memory_bytes gpu_memory_utilization block_size"),
        reads("vllm.config", "SchedulerConfig", "max_num_seqs"),
    ),
    *used_by(
        "token_counts",
        *(
            replaces(
                f"vllm.entrypoints.openai.{module}.serving",
                "should_include_usage",
                "stream_options, enable_force_include_usage",
                called_in=generator,
                used_by="what a trace goes by",
                since=since,
                before=before,
            )
            for module, generator, since, before in (
                ("chat_completion", "OpenAIServingChat.chat_completion_stream_generator", "", "0.33"),
                ("chat_completion", "OpenAIServingChat.chat_completion_stream_generator_raw", "0.33", ""),
                ("completion", "OpenAIServingCompletion.completion_stream_generator", "", ""),
            )
        ),
    ),
    *used_by(
        "answers",
        replaces("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.model_name", "lora_request="),
        *(
            replaces(
                "vllm.entrypoints.anthropic.serving",
                "AnthropicServingMessages.message_stream_converter",
                "async generator",
                called_in=f"AnthropicServingMessages.{caller}",
                since=since,
                before=before,
            )
            for caller, since, before in (
                ("create_messages", "", "0.33"),
                ("chat_completion_stream_generator", "0.33", ""),
            )
        ),
    ),
    *used_by(
        "cuda_memory",
        calls(_CUDA, "CudaRTLibrary.cudaMalloc", "size"),
        calls(_CUDA, "CudaRTLibrary.cudaMemset", "devPtr, value, count"),
        calls(_CUDA, "CudaRTLibrary.cudaIpcGetMemHandle", "devPtr"),
        calls(_CUDA, "CudaRTLibrary.cudaIpcOpenMemHandle", "handle"),
        reads(_CUDA, "", "cudaIpcMemHandle_t"),
    ),
)


def check(root: Path, version: str) -> list[str]:
    """What is not as decar takes it to be in ``root``/vllm, which is of this version: a line for each name."""
    tree = SourceTree(root)
    found = (_problem(tree, seam) for seam in SEAMS if seam.is_of(version))
    return [problem for problem in found if problem is not None]


def version_of(root: Path) -> str | None:
    """The version of the vLLM in ``root``, as its own source says."""
    path = root / "vllm" / "_version.py"
    for node in ast.walk(ast.parse(path.read_bytes())) if path.is_file() else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if "__version__" in names:
                return str(node.value.value)
    return None


def _problem(tree: SourceTree, seam: Seam) -> str | None:
    """One line on what is wrong with a seam; None if nothing is."""
    where, relies = f"{tree.path(seam.module)}: {seam.name}", f"[{seam.used_by}]"
    if not tree.has(seam.module):
        return f"{where}: there is no such module {relies}"
    found = tree.find(seam.module, seam.name)
    if found is None:
        return f"{where}: not found {relies}"
    if found.module != seam.module:
        where = f"{where} (in {tree.path(found.module)})"
    wrong = None
    if seam.kind == "implements":
        new = sorted(tree.abstract_members(found) - set(seam.parameters.split()))
        wrong = f"has abstract members that decar does not define: {', '.join(new)}" if new else None
    elif seam.kind != "reads":
        if not isinstance(found.node, Function):
            return f"{where}: expected a function, found `{ast.unparse(found.node).splitlines()[0]}` {relies}"
        theirs = Signature.read(found.node, method="." in seam.name)
        ours = Signature.parse(seam.parameters)
        wrong = ours.unlike_call_of(theirs) if seam.kind == "calls" else ours.unlike_replaced(theirs)
        if wrong is not None:
            wrong += f"; decar {seam.kind} {ours}, found {theirs}"
    if wrong is None and seam.called_in:
        module, _, caller = seam.called_in.rpartition(":")
        source = tree.find(module or seam.module, caller)
        if source is None or not mentions(source.node, seam.name.rpartition(".")[2]):
            wrong = f"nothing in {module or seam.module}.{caller} calls it any more"
    return f"{where}: {wrong} {relies}" if wrong is not None else None
