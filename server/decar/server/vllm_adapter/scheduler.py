"""The scheduler: keeps a held request out of the batch until what it waits for is there. Knows vLLM's scheduler.

A hold leaves a request with every token computed and no new one, which vLLM's scheduler already skips. When
the follower's token has been published it is appended, with nothing to run again. When the leader's rows
are there, one computed token is taken back, so that the position runs again and is sampled.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, wait
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from decar.server.protocol.lockstep import Observer
from decar.server.protocol.member import LockstepConfig, Member, PromptRows, spoken_tokens
from decar.server.protocol.plane import Plane
from decar.server.vllm_adapter.grammars import Backends
from decar.server.vllm_adapter.versions import accept_tokens

_STATS_INTERVAL_S = 0.1


class LockstepScheduler(Scheduler):
    """vLLM's scheduler for an engine whose requests may be shared with other engines."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config: LockstepConfig = self.vllm_config.additional_config
        plane = Plane.attach(config.plane)
        self.lockstep = Observer(plane, config.expert)
        self._tell_others = plane.tell_others
        self._members: dict[str, Member] = {}  # of requests in lockstep
        self._held: dict[str, Request] = {}
        self._adopted: dict[str, int] = {}  # tokens that held requests were given since the last step
        self._stats_due = 0.0
        Backends(self.structured_output_manager)
        self._releasable: dict[str, Member] = {}  # those of them that this expert may be released from
        self._readable: int | None = None  # tokens that the request being scheduled may read from the cache
        self._cached_blocks = self.kv_cache_manager.get_computed_blocks
        self.kv_cache_manager.get_computed_blocks = self._cached_blocks_of
        self._longest_hit = self.kv_cache_manager.coordinator.find_longest_cache_hit
        self.kv_cache_manager.coordinator.find_longest_cache_hit = self._longest_readable_hit

    def add_request(self, request: Request) -> None:
        tokens = spoken_tokens(request.sampling_params)
        if tokens:
            self._go_on(request, tokens)
        super().add_request(request)
        member = Member.of(request.sampling_params)
        if member is not None:
            self._members[request.request_id] = member
            if member.may_release:
                self._releasable[request.request_id] = member

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self.lockstep.mine.beat()
        released = [
            request for request, member in self._releasable.items() if not self.lockstep.takes_part(member)
        ]
        if released:
            self.finish_requests(released, RequestStatus.FINISHED_ABORTED)  # their memory is free at once
        self._resume_held()
        output = super().schedule(*args, **kwargs)
        output.adopted, self._adopted = self._adopted, {}  # for `LockstepWorker`, in every rank
        if self._held and not output.num_scheduled_tokens:
            self._yield_memory()
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for of_client in outputs.values():
            of_client.outputs = [output for output in of_client.outputs if self._matters(output)]
        outputs = {client: of_client for client, of_client in outputs.items() if _says_something(of_client)}
        for request_id in scheduler_output.num_scheduled_tokens if self._members else ():
            member = self._members.get(request_id)
            request = self.requests.get(request_id)
            if member is None or request is None or request.status != RequestStatus.RUNNING:
                continue
            if request.num_computed_tokens >= request.num_tokens:
                self._held[request_id] = request
        self._tell_others()  # that all is told which has been written before these outputs were made
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's statistics of a step, but while requests run only every `_STATS_INTERVAL_S`: what they count adds up,
        and the gateway takes a tenth of a millisecond to note them. What a step alone can tell is told at once."""
        now = time.monotonic()
        of_this_step = any(value is not None for value in (*args, *kwargs.values()))
        if self.requests and not of_this_step and now < self._stats_due:
            return None
        self._stats_due = now + _STATS_INTERVAL_S
        return super().make_stats(*args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._members.pop(request.request_id, None)
        self._releasable.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def _matters(self, output: Any) -> bool:
        """Nobody reads a follower's tokens, and the gateway would spend as much on them as on its leader's."""
        member, request = self._members.get(output.request_id), self.requests.get(output.request_id)
        if member is None or request is None or output.finish_reason is not None:
            return True
        self.lockstep.takes_part(member)
        return member.leader_at(request.num_output_tokens - 1) == self.lockstep.expert

    def _resume_held(self) -> None:
        """Make held requests runnable whose token is published, or whose rows are there or coming."""
        patient = not self._held or all(map(self._needs_hosts, self.running))
        for request_id, request in list(self._held.items()):
            member = self._members.get(request_id)
            if member is not None and request.status == RequestStatus.RUNNING:
                position = request.num_output_tokens
                if member.leader_at(position) == self.lockstep.expert:
                    if not self.lockstep.rows_may_come(member, position, patient):
                        continue
                    request.num_computed_tokens -= 1
                else:
                    token = self.lockstep.decided(member, position)
                    if token is None:
                        continue
                    self._append(request, token)
            del self._held[request_id]  # runnable; or preempted or finished, and then no longer a hold

    def _needs_hosts(self, request: Request) -> bool:
        member = self._members.get(request.request_id)
        return member is not None and self.lockstep.needs_hosts(member)

    def _append(self, request: Request, token: int) -> None:
        """Give a held follower the token that its leader has published, as `update_from_output` would; the worker gets
        it with the next step."""
        request.append_output_token_ids(token)
        accept_tokens(self.structured_output_manager, request, [token])
        self._adopted[request.request_id] = token

    def _go_on(self, request: Request, tokens: list[int]) -> None:
        """Have a new request begin after ``tokens`` [T] of its answer, which other engines have said."""
        request.append_output_token_ids(tokens)
        request.prefill_stats = (
            None  # of a request's first prefill; vLLM takes it for one of the prompt alone
        )
        if request.structured_output_request is not None:
            compiled = request.structured_output_request._grammar
            if isinstance(compiled, Future):
                wait(
                    [compiled]
                )  # it is compiled meanwhile; no token may be asked of it before it has heard these
            if not isinstance(request.structured_output_request.grammar, Exception):  # else it ends by itself
                accept_tokens(self.structured_output_manager, request, tokens)

    def _cached_blocks_of(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Cached blocks of a request; of one whose prompt is looked at, only those that need no look.

        What is read from the cache is not computed, and what is not computed has no log-likelihood.
        """
        member, rows = self._members.get(request.request_id), PromptRows.of(request.sampling_params)
        self._readable = None if rows is None else rows.start
        if member is not None and member.scored is not None:
            known, _ = member.scored[self.lockstep.expert]
            if request.num_output_tokens == len(spoken_tokens(request.sampling_params)):
                self._readable = known - 1  # the last of these tokens predicts the first that is not known
        return self._cached_blocks(request, *args, **kwargs)

    def _longest_readable_hit(self, block_hashes: Any, max_length: int) -> Any:
        if self._readable is not None:
            max_length = min(max_length, self._readable)
        return self._longest_hit(block_hashes, max_length)

    def _yield_memory(self) -> None:
        """Preempt the youngest held request if an older one waits for its memory.

        Held requests wait for other engines, and those may wait for a request that waits here. Every engine
        has the same order of age, so the oldest request can always run everywhere: no cycle of waits.
        """
        held = [request for request in self._held.values() if request.status == RequestStatus.RUNNING]
        if not self.waiting or not held:
            return
        oldest, youngest = self.waiting.peek_request(), max(held, key=_age)
        if oldest.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED) and _age(oldest) < _age(
            youngest
        ):
            self.running.remove(youngest)
            self._preempt_request(youngest, time.monotonic())
            del self._held[youngest.request_id]
            self.lockstep.mine.count("yielded")


def _says_something(outputs: Any) -> bool:
    """Whether the gateway has to wake for what a step gives: a follower's gives it nothing."""
    return bool(outputs.outputs or outputs.finished_requests or outputs.scheduler_stats is not None)


def _age(request: Request) -> tuple[int, float]:
    return request.priority, request.arrival_time
