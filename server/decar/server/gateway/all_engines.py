"""`AllEngines`: what vLLM's app asks of "the" engine beside answers, asked of all; who of them may answer.

Knows what requests ask for, and not how they are answered.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, cast

import numpy as np
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError

from decar.router import Ensemble, active_experts
from decar.server.gateway.aborts import Abort, Aborts
from decar.server.gateway.admission import Admission
from decar.server.gateway.engine import Engine, ExpertDown, ExpertEngine, NoEngine
from decar.server.gateway.health import Health
from decar.server.gateway.queue import Queue
from decar.server.gateway.request import Call
from decar.server.gateway.seats import Seats
from decar.server.gateway.trained_routers import TrainedRouters
from decar.server.metrics import EnsembleMetrics
from decar.server.protocol.cores import GatewayThread
from decar.server.protocol.plane import Plane


class AllEngines(EngineClient):
    """K engines as vLLM's app wants one to be. A subclass generates.

    Args:
        ensemble: what is served.
        engines: one per expert, in manifest order, sharing ``plane``.
        plane: made by the caller; removed by `shutdown`. It may have places for more.
        thread: this one.
        metrics: told what mixed each token.
        slots: how many choices are answered at once.
        min_experts: how many have to live for the ensemble to be served.
        max_queued: how many requests may wait; None: four for each slot.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        engines: Sequence[Engine],
        plane: Plane,
        thread: GatewayThread,
        metrics: EnsembleMetrics,
        slots: int,
        min_experts: int,
        max_queued: int | None,
    ):
        self.ensemble = ensemble
        self.plane = plane
        self.experts = [
            ExpertEngine(name, engine) for name, engine in zip(ensemble.expert_names, engines, strict=True)
        ]
        free = plane.spec.experts - len(engines)
        self.experts += [
            ExpertEngine("", cast(Engine, NoEngine()), up=False, seated=False) for _ in range(free)
        ]
        self.seats = Seats(tuple(ensemble.expert_names), tuple(range(len(engines))), plane.spec.experts)
        self.health = Health(self.experts, plane, min_experts)
        # Where vLLM's app asks about "the" engine, any one will do: they differ in weights only. What renders prompts
        # computes in this process, and goes on when that engine has died.
        self._first = first = engines[0].client
        self.vllm_config = first.vllm_config
        self.model_config = first.model_config
        self.renderer = first.renderer
        self.input_processor = first.input_processor
        self.trained_routers = TrainedRouters(ensemble, engines[0], self.seats)
        self.thread = thread
        self.queue = Queue(slots, 4 * slots if max_queued is None else max_queued)
        self._aborts = Aborts()
        self._admission = Admission(ensemble.vocab_size, self.model_config.max_logprobs)
        self._metrics = metrics
        metrics.watch(self.experts, self.queue, ensemble.name)
        self._stopped = False

    # --- requests -----------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def place(self, abort: Abort) -> AsyncIterator[None]:
        """One of the places for what runs at once; waiting for it is not urgent."""
        self.thread.arrived()
        async with contextlib.AsyncExitStack() as kept:
            with abort.waking():
                await kept.enter_async_context(self.queue.take())
            yield

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests by the ids that users know: each answers with what it has, and finish reason "abort"."""
        await self._aborts.do([request_id] if isinstance(request_id, str) else request_id)

    # --- who may answer -----------------------------------------------------------------------------------

    def give_engine(self, expert: int, engine: Engine) -> None:
        """An expert whose engine has died has a new one, which is still to be warmed up."""
        self.experts[expert].engine = engine
        self.thread.moved(expert, engine.cores)
        self.health.begins(expert)

    def rejoin(self, expert: int) -> None:
        """Give requests to an expert's new engine from now on."""
        self.health.back(expert)
        self._metrics.restarted(expert)

    def serve(self, ensemble: Ensemble, seats: Seats, trained_routers: TrainedRouters | None = None) -> None:
        """From now on, requests are for this ensemble, whose experts the engines have at ``seats``; those that have
        begun keep what they began with.

        Args:
            trained_routers: None: as they were.
        """
        self.ensemble, self.seats = ensemble, seats
        self.trained_routers = trained_routers or self.trained_routers
        for expert in self.experts:
            expert.seated = False
        for name, seat in zip(ensemble.expert_names, seats.of, strict=True):
            self.experts[seat].name, self.experts[seat].seated = name, True

    def of_living(self, call: Call, log_weights: np.ndarray) -> np.ndarray:
        """``log_weights`` [K] of those that live, for want of the others; these are noted in ``call``.

        Raises:
            ExpertDown: none of those with weight lives, or the user wants no answer without them.
        """
        missing = self.missing(call, log_weights)
        if not missing:
            return log_weights
        call.degraded.update(dict.fromkeys(self.experts[k].name for k in missing))
        if len(missing) == len(active_experts(log_weights)) or call.on_expert_loss == "fail":
            raise self.down(missing)
        rest = np.array(log_weights)
        rest[missing] = -np.inf
        return rest - np.logaddexp.reduce(rest)

    def missing(self, call: Call, log_weights: np.ndarray) -> list[int]:
        """Those of the experts with weight that do not live; the one that ``call`` warms up does, until it dies."""
        return [k for k in active_experts(log_weights) if not (self.experts[k].lives or self._warms(call, k))]

    def _warms(self, call: Call, expert: int) -> bool:
        return expert == call.warms and not self.experts[expert].engine.client.errored

    def busy(self, expert: int) -> bool:
        """Whether somebody's answer still needs an expert's engine."""
        return self.experts[expert].engine.has_work()

    def down(self, experts: Sequence[int]) -> ExpertDown:
        names = ", ".join(repr(self.experts[k].name) for k in experts)
        return ExpertDown(f"expert {names} is down and is being started again: ask again in a moment")

    # --- health -------------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        return not self._stopped  # a dead engine turns /health 503; it does not stop the server

    @property
    def is_stopped(self) -> bool:
        return self._stopped

    @property
    def errored(self) -> bool:
        return False  # vLLM would refuse every request; a dead engine's requests go on without it, and it comes back

    @property
    def dead_error(self) -> BaseException:
        return self.health.dead_error()

    async def check_health(self) -> None:
        self.health.check()

    def shutdown(self, timeout: float | None = None) -> None:
        """Stop every engine and remove the plane."""
        self._stopped = True
        for client in {self._first, *(expert.engine.client for expert in self.experts)}:
            client.shutdown(timeout=timeout)
        self.plane.unlink()

    # --- passed on ----------------------------------------------------------------------------------------

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        for expert in self.experts:
            if expert.lives:
                expert.engine.client.check_admission(n, request_id)

    async def get_supported_tasks(self) -> Any:
        return await self.experts[0].engine.client.get_supported_tasks()

    async def is_tracing_enabled(self) -> bool:
        enabled: bool = await self.experts[0].engine.client.is_tracing_enabled()
        return enabled

    async def do_log_stats(self) -> None:
        await self._all("do_log_stats")

    async def reset_mm_cache(self) -> None:
        await self._all("reset_mm_cache")

    async def reset_encoder_cache(self) -> None:
        await self._all("reset_encoder_cache")

    async def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        return all(await self._all("reset_prefix_cache", *args, **kwargs))

    async def start_profile(self, *args: Any, **kwargs: Any) -> None:
        await self._all("start_profile", *args, **kwargs)

    async def stop_profile(self) -> None:
        await self._all("stop_profile")

    async def pause_generation(self, **kwargs: Any) -> None:
        await self._all("pause_generation", **kwargs)

    async def resume_generation(self) -> None:
        await self._all("resume_generation")

    async def is_paused(self) -> bool:
        return any(await self._all("is_paused"))

    async def is_sleeping(self) -> bool:
        return any(await self._all("is_sleeping"))

    async def sleep(self, *args: Any, **kwargs: Any) -> None:
        await self._all("sleep", *args, **kwargs)

    async def wake_up(self, *args: Any, **kwargs: Any) -> bool:
        return all(await self._all("wake_up", *args, **kwargs))

    async def release_kv_cache_memory(self) -> None:
        await self._all("release_kv_cache_memory")

    async def _all(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        living = [expert.engine.client for expert in self.experts if expert.lives]
        return await asyncio.gather(*(getattr(client, method)(*args, **kwargs) for client in living))

    # --- refused ------------------------------------------------------------------------------------------

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        raise VLLMValidationError("an ensemble generates text; it has no embeddings")

    async def add_lora(self, lora_request: Any) -> bool:
        raise VLLMValidationError("an ensemble serves whole experts; merge the adapter into its expert")

    async def notify_kv_transfer_request_rejected(self, *args: Any, **kwargs: Any) -> None:
        raise VLLMValidationError("an ensemble does not take keys and values from other servers")
