"""One expert's engine: vLLM's `AsyncLLM`, started for the lockstep, and what the gateway asks of it.

Knows `AsyncLLM` and what it is made of; knows nothing of requests. What it offers is
`decar.server.gateway.engine.Engine`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from vllm.engine.protocol import EngineClient
from vllm.logprobs import Logprob
from vllm.outputs import PoolingRequestOutput
from vllm.platforms import current_platform
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsTensors

from decar.router.errors import StartError
from decar.server.protocol.flow import FLOW_KEY, FLOW_TASK, Denoising
from decar.server.protocol.plane import PlaneSpec
from decar.server.protocol.runtime import remove_stale
from decar.server.vllm_adapter.brought import Brought
from decar.server.vllm_adapter.failures import Failures, Progress, ReportingConfig, reason_of
from decar.server.vllm_adapter.grammars import GrammarChooser
from decar.server.vllm_adapter.limits import keep_to_limits
from decar.server.vllm_adapter.metrics import SharedMetrics, named_log, without_nameless_log
from decar.server.vllm_adapter.tracing import keep_tracing


def describe_prompt(
    tokenizer: Any,
    described: list[dict[int, Logprob] | None],
    tokens: torch.Tensor,
    logprobs: torch.Tensor,
    ranks: torch.Tensor,
) -> None:
    """`Engine.describe`, by what describes one engine's prompts: which also knows characters of several tokens."""
    processor = LogprobsProcessor(
        tokenizer=tokenizer,
        logprobs=None,
        prompt_logprobs=described,
        cumulative_logprob=None,
        num_logprobs=None,
        num_prompt_logprobs=tokens.shape[1] - 1,
    )
    tensors = LogprobsTensors(tokens, logprobs, ranks)
    processor.update_from_output(EngineCoreOutput("", [], new_prompt_logprobs_tensors=tensors))


class LLMEngine:
    """An `AsyncLLM` whose engine runs in a process of its own."""

    def __init__(self, llm: AsyncLLM):
        keep_to_limits(llm)
        keep_tracing(llm.output_processor)
        self.llm = llm
        self.client: EngineClient = llm
        self._keeps_images = False
        self.choose_grammar = GrammarChooser(llm).choose
        self._process = llm.engine_core.resources.engine_manager.processes[0]
        self.pid = int(self._process.pid)
        self.files = getattr(self._process, "files", None)  # of an actor, on another host
        is_here = self.files is None and current_platform.is_cpu()
        self.cores = os.sched_getaffinity(self.pid) if is_here else set()

    async def submit(self, request_id: str, prompt: Any, params: SamplingParams, **kwargs: Any) -> Any:
        return await self.llm.add_request(request_id, prompt, params, **kwargs)

    async def denoise(self, request_id: str, tokens: Sequence[int], part: Denoising) -> np.ndarray:
        params = PoolingParams(task=FLOW_TASK, extra_kwargs={FLOW_KEY: part.to_wire()})
        prompt: Any = {"type": "token", "prompt_token_ids": list(tokens)}
        queue = await self.llm.add_request(request_id, prompt, params)
        try:
            output = await queue.get()
        except asyncio.CancelledError:
            await asyncio.shield(self.cancel(queue.request_id))
            raise
        assert isinstance(output, PoolingRequestOutput)
        return np.asarray(output.outputs.data.numpy(), np.float64)

    async def cancel(self, request_id: str) -> None:
        with contextlib.suppress(EngineDeadError):
            # The engine is told also where its output processor knows the request no more: see `Relay`.
            self.llm.output_processor.abort_requests([request_id], internal=True)
            await self.llm.engine_core.abort_requests_async([request_id])

    async def died(self) -> None:
        self.llm._run_output_handler()
        assert self.llm.output_handler is not None
        await asyncio.wait([self.llm.output_handler])  # it ends when there is nothing more to hear

    def dead_error(self) -> Exception:
        return EngineDeadError()

    def has_work(self) -> bool:
        return bool(self.llm.output_processor.request_states)

    def end(self) -> None:
        if self._process.is_alive():  # else its id may be another's by now: it is no child of this process
            self._process.kill()  # vLLM notices, and gives back the rest

    def keep_images(self, key: str) -> None:
        renderer = self.llm.renderer
        if self._keeps_images:
            return
        self._keeps_images = True
        process = renderer._process_tokens_async

        async def process_and_keep(prompt: Any, **kwargs: Any) -> Any:
            made = await process(prompt, **kwargs)
            images = (prompt.get("multi_modal_data") or {}).get("image")
            if images is not None:
                images = images if isinstance(images, list) else [images]
                made[key] = [getattr(image, "media", image) for image in images]
            return made

        renderer._process_tokens_async = process_and_keep

    def describe(
        self,
        described: list[dict[int, Logprob] | None],
        tokens: torch.Tensor,
        logprobs: torch.Tensor,
        ranks: torch.Tensor,
    ) -> None:
        describe_prompt(self.llm.renderer.get_tokenizer(), described, tokens, logprobs, ranks)

    def thread_pools(self) -> Sequence[ThreadPoolExecutor]:
        renderer = self.llm.renderer
        return [renderer._executor, renderer._mm_executor]


@dataclass(frozen=True)
class EnginePlan:
    """What an engine is started with.

    Attributes:
        name: of its expert, as errors give it.
        config: vLLM's.
        devices: CUDA_VISIBLE_DEVICES of its process; empty on CPU.
    """

    name: str
    config: Any
    devices: str

    @property
    def ranks(self) -> int:
        """Processes that hold its weights together."""
        return int(self.config.parallel_config.tensor_parallel_size)


@dataclass(frozen=True)
class Site:
    """What an engine has where it is started.

    Attributes:
        plane: what it attaches to.
        cpus: cores that it computes on, rank by rank; empty leaves them alone.
        ends_with: the process that it ends with.
        own_environment: it does not get the gateway's.
        mps_pipes: of an MPS daemon that it is to use; "": of the one that its environment names, if any.
    """

    plane: PlaneSpec
    cpus: tuple[int, ...]
    ends_with: int
    own_environment: bool = False
    mps_pipes: str = ""


class Launcher(Protocol):
    """Starts engines' processes."""

    def site(self, expert: int) -> Site:
        """Where the next engine of ``expert`` is going to be.

        Raises:
            StartError: it cannot be started now.
        """
        ...

    def launch(self, expert: int, config: Any, log_stats: bool) -> tuple[dict[str, str], Any] | None:
        """Start it, with vLLM's ``config``. Returns the addresses to hear it by, and what has vLLM's interface of a
        manager of engine processes; None: vLLM is to start it.

        Raises:
            Exception: it does not start.
        """
        ...


class OwnProcesses:
    """Engines are processes of the gateway's, which vLLM starts.

    Args:
        specs: [K], of the plane of each place.
        ranks: of each expert that there is.
        mps_pipes: see `Site`.
    """

    def __init__(self, specs: Sequence[PlaneSpec], ranks: Sequence[int], mps_pipes: str = ""):
        self._specs, self._mps_pipes = specs, mps_pipes
        # Experts that come later share them.
        self._cores = dealt_cores(sorted(os.sched_getaffinity(0)), ranks)

    def site(self, expert: int) -> Site:
        cpus = self._cores[expert % len(self._cores)]
        return Site(self._specs[expert], cpus, os.getpid(), mps_pipes=self._mps_pipes)

    def launch(self, expert: int, config: Any, log_stats: bool) -> None:
        return None


class Starter:
    """Starts the engines of an ensemble, and starts them again.

    Args:
        plans: by place, None where there is no expert; an expert that is exchanged has another one from then on.
        launcher: starts their processes.
        brought: waits for what other hosts' engines have written.
        failures: hears why an engine does not start.
        progress: hears what engines say while they start.
    """

    def __init__(
        self,
        plans: list[EnginePlan | None],
        launcher: Launcher,
        brought: Brought,
        failures: Failures,
        progress: Progress,
        disable_log_stats: bool,
    ):
        self.plans = plans
        self._launcher, self._brought, self._disable_log_stats = launcher, brought, disable_log_stats
        self._failures, self._progress = failures, progress
        self._metrics = SharedMetrics(len(plans))
        self._experts = [expert for expert, plan in enumerate(plans) if plan is not None]

    async def start(self, expert: int) -> LLMEngine:
        """One expert's engine, in a process of its own.

        Raises:
            StartError: it does not start; says why.
        """
        self._failures.forget(expert)
        try:
            return await asyncio.to_thread(self._started, expert)
        except Exception as error:
            names = [plan.name if plan else "" for plan in self.plans]
            reason = self._failures.told(names) or f"expert {names[expert]!r}: {reason_of(error)}"
            raise StartError(f"an engine did not start: {reason} (vLLM's log has the traceback)") from error

    async def start_all(self, started: list[LLMEngine], ready: Callable[[int], None]) -> list[LLMEngine]:
        """All experts' engines, side by side.

        Args:
            started: gets those that come up, also on failure.
            ready: is told of each.

        Raises:
            StartError: names the experts whose engines did not start, and why.
        """

        async def start(expert: int) -> LLMEngine:
            engine = await self.start(expert)
            started.append(engine)
            ready(expert)
            return engine

        results = await asyncio.gather(*map(start, self._experts), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results  # type: ignore[return-value]  # no errors are among them

    def _started(self, expert: int) -> LLMEngine:
        plan = self.plans[expert]
        assert plan is not None, "there is no expert"
        remove_stale()  # of an engine that it had before
        site = self._launcher.site(expert)
        config = copy.deepcopy(plan.config)  # in which an engine's start leaves what it has found
        config.additional_config = ReportingConfig(
            expert=expert,
            plane=site.plane,
            cpus=site.cpus,
            devices=plan.devices,
            gateway_pid=site.ends_with,
            own_environment=site.own_environment,
            mps_pipes=site.mps_pipes,
            name=plan.name,
            failures=self._failures.address,
            progress=self._progress.address,
        )
        loggers = [self._metrics.factory_for(expert), named_log(plan.name)]
        addresses, manager = self._launcher.launch(expert, config, not self._disable_log_stats) or (
            None,
            None,
        )
        try:
            llm = AsyncLLM.from_vllm_config(
                config,
                stat_loggers=None if self._disable_log_stats else loggers,
                disable_log_stats=self._disable_log_stats,
                client_addresses=addresses,
            )
        except BaseException as error:
            if manager is None:
                raise
            manager.shutdown()
            raise StartError(f"its engine has ended, or is not heard ({reason_of(error)})") from None
        finally:
            if manager is not None:
                manager.heard_of.set()
        if manager is not None:
            watch_over(llm, manager)
        if llm.logger_manager is not None:
            without_nameless_log(llm.logger_manager)
        self._brought.hold_back(expert, llm)
        return LLMEngine(llm)


def watch_over(llm: AsyncLLM, manager: Any) -> None:
    """Have an `AsyncLLM` whose engine it has not started end it, and hear of its death, by ``manager``."""
    core = llm.engine_core
    core.resources.engine_manager = manager
    core.start_engine_core_monitor()


def dealt_cores(cores: Sequence[int], ranks: Sequence[int]) -> list[tuple[int, ...]]:
    """On CPU, a host's ``cores`` dealt out evenly over all ranks of engines there: those that share cores drift apart.

    Args:
        ranks: how many each engine has.

    Returns:
        those of each engine, rank by rank: see `ranks.share_of`.
    """
    if not current_platform.is_cpu():
        return [()] * len(ranks)
    each = len(cores) // sum(ranks)
    dealt, begin = [], 0
    for count in ranks:
        wanted = range(begin * max(each, 1), (begin + count) * max(each, 1))
        dealt.append(tuple(sorted({cores[i % len(cores)] for i in wanted})))
        begin += count
    return dealt
