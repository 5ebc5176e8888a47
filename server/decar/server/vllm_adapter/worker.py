"""The worker: where a vLLM engine's forward pass meets the lockstep. Knows `Step`, not what is behind it.

`sample_tokens` runs between the forward pass and sampling: prompts are scored, rows are posted, and the leader's
logits are replaced by the mixture's, before grammar, penalties and sampling. `_settle` gets the sampled tokens before
the runner keeps them: leaders publish theirs, followers adopt.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from vllm.platforms import current_platform

from decar.server.protocol.cores import take_long_slices
from decar.server.protocol.lockstep import Lockstep, Turn
from decar.server.protocol.member import LockstepConfig, Member, PromptRows
from decar.server.protocol.plane import Plane
from decar.server.protocol.transport import transport_of
from decar.server.vllm_adapter.cuda_memory import CudaMemory
from decar.server.vllm_adapter.prompts import PromptReader
from decar.server.vllm_adapter.step import Step

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput


@dataclass
class _Shared:
    """A request that other engines take part in.

    Attributes:
        prompt_len: tokens of its prompt.
        held: the position whose row was dropped when it last ran.
    """

    member: Member
    prompt_len: int
    held: int | None = None


class LockstepWorker(_Worker):
    """A vLLM worker whose requests may be shared with other engines."""

    def init_device(self) -> None:
        config: LockstepConfig = self.vllm_config.additional_config
        if config.cpus:
            torch.set_num_threads(len(config.cpus))  # before the base class disables it
            os.sched_setaffinity(0, config.cpus)
            take_long_slices()
        super().init_device()
        plane = Plane.attach(config.plane)
        memory = CudaMemory(self.device) if plane.spec.on_device else None
        self.lockstep = Lockstep(plane, config.expert, transport_of(plane, config.expert, memory))
        self._shared: dict[str, _Shared] = {}  # by request
        self._turns: dict[str, Turn] = {}  # this step's, by request
        self._ready: list[Turn] = []

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        tqdm.set_lock(threading.RLock())  # its own would leave a named semaphore in /dev/shm
        super().load_model(*args, **kwargs)
        self.step = self._step_of_runner()
        self._prompts = PromptReader(self.step, self.lockstep)

    def _step_of_runner(self) -> Step:
        # Each file imports what only its runner has.
        if self.use_v2_model_runner:
            from decar.server.vllm_adapter.runner_v2 import StepV2

            return StepV2(self.model_runner, self.lockstep.vocab_size)
        from decar.server.vllm_adapter.runner_v1 import StepV1

        return StepV1(self.model_runner, self.lockstep.vocab_size)

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        self._turns = self._take_turns(scheduler_output)
        self.lockstep.announce(self._turns.values())
        with self.lockstep.mine.timed("forward_ns") if self._turns else contextlib.nullcontext():
            return super().execute_model(scheduler_output)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        step, lockstep = self.step, self.lockstep
        if step.ran and self._prompts:
            with lockstep.mine.timed("score_ns"):
                self._prompts.read()
        if not step.ran or not self._turns:
            return step.sample(grammar_output)
        rows = step.rows
        for request_id, turn in self._turns.items():
            turn.row = rows[request_id]
        turns = [turn for turn in self._turns.values() if lockstep.holds_slot(turn.member)]
        turns.sort(key=lambda turn: turn.row)
        logits = step.logits()  # in float32, as rows are mixed, and tokens sampled
        with lockstep.mine.timed("post_ns"):
            lockstep.post(turns, logits)
        led = [turn for turn in turns if turn.leader == lockstep.expert]
        self._ready = lockstep.wait_for_rows(led)
        if self._ready:
            with lockstep.mine.timed("mix_ns"):
                lockstep.weigh(self._ready)
                mixed = torch.tensor([turn.row for turn in self._ready], device=logits.device)
                shared = logits[:, : lockstep.vocab_size]
                shared.index_copy_(0, mixed, lockstep.mixed(self._ready).to(logits.device))
        ready = {turn.row for turn in self._ready}
        undecided = [turn.row for turn in self._turns.values() if turn.row not in ready]
        with lockstep.mine.timed("sample_ns"):
            output = step.sample(
                grammar_output, undecided, self._settle, sampler=not self._only_follows(len(logits))
            )
        lockstep.finish(turns)
        return output

    def _settle(self, tokens: torch.Tensor) -> None:
        """Publish what this engine decided of ``tokens`` [B], adopt what others did, and drop the rest."""
        lockstep = self.lockstep
        if self._ready:
            lockstep.publish(self._ready, tokens[[turn.row for turn in self._ready]].tolist())
        followed = [
            turn
            for turn in self._turns.values()
            if turn.leader != lockstep.expert and lockstep.holds_slot(turn.member)
        ]
        decided = set(map(id, self._ready))
        for turn, token in zip(followed, lockstep.adopt(followed), strict=True):
            if token is not None:
                tokens[turn.row] = token
                decided.add(id(turn))
        held = {request_id: turn for request_id, turn in self._turns.items() if id(turn) not in decided}
        if held:
            self.step.drop([turn.row for turn in held.values()])
        for request_id, turn in held.items():
            self._shared[request_id].held = turn.position

    def _only_follows(self, rows: int) -> bool:
        """Whether others decide all of this step's ``rows``, and no sampler here has to keep up to lead them later."""
        return rows == len(self._turns) and not any(
            turn.leader == self.lockstep.expert or turn.member.may_release for turn in self._turns.values()
        )

    def _take_turns(self, scheduler_output: SchedulerOutput) -> dict[str, Turn]:
        """Turns of this step: shared requests whose last known token is computed in it."""
        for request_id in scheduler_output.finished_req_ids:
            self._shared.pop(request_id, None)
        self._prompts.forget(scheduler_output.finished_req_ids)
        for new in scheduler_output.scheduled_new_reqs:
            self._admit(new)
        turns: dict[str, Turn] = {}
        for request_id, computed, position in _scheduled(scheduler_output) if self._shared else ():
            shared = self._shared.get(request_id)
            if shared is None:
                continue
            member = shared.member
            led_by = member.leader
            if not self.lockstep.takes_part(member):
                continue  # the scheduler, which knows too, ends it
            if member.leader == self.lockstep.expert != led_by:
                tokens, _ = member.led_before[-1]
                self.step.redraw(request_id, tokens)
            if shared.held is not None and not self._adopt_late(request_id, shared, position):
                continue
            if member.alone_from is not None and position >= member.alone_from:
                continue  # nobody is left to mix with: plain vLLM
            scheduled = scheduler_output.num_scheduled_tokens[request_id]
            if computed + scheduled >= shared.prompt_len + position:
                turns[request_id] = Turn(member, position)
        return turns

    def _admit(self, new: NewRequestData) -> None:
        """Know a request that this engine begins with, or begins with again: V2 resumes what was preempted so."""
        rows = PromptRows.of(new.sampling_params)
        if rows is not None:
            self._prompts.write_rows(new.req_id, rows)
        resumed = self._shared.get(new.req_id)
        if resumed is not None:
            resumed.held = None  # it comes with all of its tokens
            return
        member = Member.of(new.sampling_params)
        if member is None:
            return
        self._shared[new.req_id] = _Shared(member, len(new.prompt_token_ids))
        self.lockstep.join(member)
        if member.scored is not None:
            self._prompts.score(new.req_id, member, new.prompt_token_ids, new.mm_features)

    def _adopt_late(self, request_id: str, shared: _Shared, position: int) -> bool:
        """Catch up with the scheduler, which may have taken a held follower's token from the plane between two steps.

        False if the token is gone: the request has ended, its slot has a new tenant, and its abort is on the way.
        """
        assert shared.held is not None
        if position > shared.held:
            token = self.lockstep.decided(shared.member, shared.held)
            if token is None:
                return False
            self.step.append(request_id, token)
        shared.held = None
        return True


def _scheduled(scheduler_output: SchedulerOutput) -> Iterator[tuple[str, int, int]]:
    """(request, tokens computed before, tokens generated so far) of all that a step computes."""
    for new in scheduler_output.scheduled_new_reqs:
        known = (
            new.prefill_token_ids or new.prompt_token_ids
        )  # the former are V2's, and end with what was generated
        yield new.req_id, new.num_computed_tokens, len(known) - len(new.prompt_token_ids)
    cached = scheduler_output.scheduled_cached_reqs
    yield from zip(cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True)
