"""The worker: where a vLLM engine's forward pass meets the lockstep. Knows `Step`, not what is behind it.

`sample_tokens` runs between the forward pass and sampling: prompts are scored, rows are posted, and the leader's
logits are replaced by the mixture's, before grammar, penalties and sampling. `_settle` gets the sampled tokens before
the runner keeps them: leaders publish theirs, followers adopt. Where an engine has several ranks, that is the first's
to do, and the others keep what it tells them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.platforms import current_platform

from decar.server.protocol.lockstep import HELD, Lockstep
from decar.server.protocol.member import Draw, Member, PromptRows, spoken_tokens
from decar.server.protocol.plane import Plane
from decar.server.protocol.transport import transport_of
from decar.server.vllm_adapter.cuda_memory import CudaMemory
from decar.server.vllm_adapter.draws import Draws, draw_alone
from decar.server.vllm_adapter.expert_worker import ExpertWorker
from decar.server.vllm_adapter.failures import ReportingConfig
from decar.server.vllm_adapter.prompts import PromptReader
from decar.server.vllm_adapter.ranks import Ranks
from decar.server.vllm_adapter.step import Step

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput


class LockstepWorker(ExpertWorker):
    """A vLLM worker whose requests may be shared with other engines."""

    def init_device(self) -> None:
        super().init_device()
        config: ReportingConfig = self.vllm_config.additional_config
        self._ranks = Ranks()
        # Only one process writes a word of the plane: the other ranks of an engine have one of their own to write to.
        plane = Plane.attach(config.plane) if self._ranks.first else Plane.of_nobody(config.plane)
        on_gpu = self._ranks.first and not current_platform.is_cpu()
        memory = CudaMemory(self.device) if on_gpu else None
        self.lockstep = Lockstep(plane, config.expert, transport_of(plane, config.expert, memory))
        self._draws = Draws(on_gpu, self.vllm_config.model_config.logits_processors)
        self._members: dict[str, Member] = {}  # of shared requests
        self._prompt_tokens = np.zeros(plane.spec.slots, np.int64)
        self._due: list[str] = []  # shared requests of whose next position this step gives the row
        self._holding = np.zeros(0, bool)  # which of them have their slot
        self._turns = self.lockstep.turns(*np.zeros((2, 0), np.int64))  # of these
        self._ready = self._turns  # of these, those that this engine leads and whose rows have all come
        self._sampled = self._turns  # of these, those whose tokens vLLM samples
        self._decided = self._turns  # and the others, whose tokens `Lockstep.decide` has chosen
        self._tokens = torch.zeros(0, dtype=torch.int64)  # those
        self._draw_of: dict[
            str, tuple[Draw, int]
        ] = {}  # of requests that draw, and the length of their prompts
        self._lone: list[tuple[str, int]] = []  # of these, those that this step decides alone, and positions
        self._lone_rows: list[int] = []
        self._lone_tokens = torch.zeros(0, dtype=torch.int64)
        self._rows: list[int] = []  # of what is due, in this step's batch
        self._batch = _Batch.of([], {}, self.lockstep, self._prompt_tokens)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.step = self._step_of_runner()
        self._prompts = PromptReader(self.step, self.lockstep, writes_rows=self._ranks.first)

    def _step_of_runner(self) -> Step:
        # Each file imports what only its runner has.
        if self.use_v2_model_runner:
            from decar.server.vllm_adapter.runner_v2 import StepV2

            return StepV2(self.model_runner, self.lockstep.vocab_size)
        from decar.server.vllm_adapter.runner_v1 import StepV1

        return StepV1(self.model_runner, self.lockstep.vocab_size)

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        self._take_turns(scheduler_output)
        self.lockstep.announce(self._turns)
        with self.lockstep.mine.timed("forward_ns") if self._due else contextlib.nullcontext():
            return super().execute_model(scheduler_output)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        step, lockstep = self.step, self.lockstep
        if step.ran and self._prompts:
            with lockstep.mine.timed("score_ns"):
                self._prompts.read()
        if not step.ran:
            return step.sample(grammar_output)
        if not self._ranks.first:
            step.logits()  # which all ranks compute together
            return step.keep_told(grammar_output, self._take_told)
        if not self._due and not self._lone:
            return step.sample(grammar_output, settle=self._ranks.tell)
        self._find_rows()
        logits = step.logits()  # in float32, as rows are mixed, and tokens sampled
        if self._lone:
            self._lone_tokens = self._draw_alone(logits)
        with lockstep.mine.timed("post_ns"):
            lockstep.post(self._turns, logits)
        lockstep.bound_waits(self._turns, len(logits))
        self._ready = lockstep.wait_for_rows(self._turns.where(self._turns.leaders == lockstep.expert))
        plain = lockstep.plain[self._ready.slots]
        self._decided, self._sampled = self._ready.where(plain), self._ready.where(~plain)
        if len(self._ready):
            with lockstep.mine.timed("mix_ns"):
                lockstep.weigh(self._ready)
                if len(self._decided):
                    self._tokens = lockstep.decide(self._decided)
                if len(self._sampled):
                    (rows,) = lockstep.transport.to_device(self._sampled.rows)
                    shared = logits[:, : lockstep.vocab_size]
                    mixed = lockstep.mixed(self._sampled)
                    shared.index_copy_(0, rows.to(logits.device), mixed.to(logits.device))
        undecided = () if len(self._sampled) == len(self._rows) else self._rows_but(self._sampled.rows)
        undecided = [*undecided, *self._lone_rows]
        with lockstep.mine.timed("sample_ns"):
            sampler = self._wants_sampler(len(logits))
            output = step.sample(grammar_output, undecided, self._settle, sampler=sampler)
        lockstep.finish(self._turns)
        return output

    def _settle(self, tokens: torch.Tensor) -> None:
        """Publish what was sampled of ``tokens`` [B], write what was chosen or others decided, and drop the rest."""
        lockstep, decided = self.lockstep, self._ready.rows
        if len(self._sampled):
            lockstep.publish(self._sampled, tokens.cpu().numpy()[self._sampled.rows].astype(np.int64))
        if len(self._decided):
            (rows,) = lockstep.transport.to_device(self._decided.rows)
            tokens[rows.to(tokens.device)] = self._tokens.to(tokens)
        if self._lone_rows:
            (rows,) = lockstep.transport.to_device(np.array(self._lone_rows))
            tokens[rows.to(tokens.device)] = self._lone_tokens.to(tokens)
        if len(self._ready) < len(self._turns):
            followed = self._turns.where(self._turns.leaders != lockstep.expert)
            adopted = lockstep.adopt(followed)
            there = adopted != HELD
            rows, given = lockstep.transport.to_device(followed.rows[there], adopted[there])
            tokens[rows.to(tokens.device)] = given.to(tokens)
            decided = np.concatenate([decided, followed.rows[there]])
        held = self._rows_but(decided) if len(decided) < len(self._rows) else []
        if held:
            self.step.drop(held)
        self._ranks.tell(tokens, held)

    def _take_told(self, tokens: torch.Tensor) -> None:
        """What the first rank has decided, in place of ``tokens`` [B]."""
        held = self._ranks.hear(tokens)
        if held:
            self.step.drop(held)

    def _rows_but(self, decided: np.ndarray) -> list[int]:
        """Rows of what is due, without those that are ``decided``."""
        return sorted(set(self._rows) - set(decided.tolist()))

    def _wants_sampler(self, rows: int) -> bool:
        """Whether one of this step's ``rows`` is for vLLM's sampler, or may be later, so that it has to keep up."""
        lockstep, turns = self.lockstep, self._turns
        if not (len(turns) == len(self._due) and rows == len(turns) + len(self._lone)):
            return True
        sampled = (turns.leaders == lockstep.expert) | lockstep.may_release[turns.slots]
        return bool((sampled & ~lockstep.plain[turns.slots]).any())

    def _draw_alone(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens of requests that this engine decides alone, with the noise that they would have in a mixture.

        Whether others take part in a request, and from when on they do not, so never changes what its seed means.
        """
        draws = [self._draw_of[request_id][0] for request_id, _ in self._lone]
        rows, temperatures, seeds, positions = self.lockstep.transport.to_device(
            np.array(self._lone_rows),
            np.array([draw.temperature for draw in draws]),
            np.array([draw.seed for draw in draws]),
            np.array([position for _, position in self._lone]),
        )
        return draw_alone(logits[:, : self.lockstep.vocab_size], rows, temperatures, seeds, positions)

    def _find_rows(self) -> None:
        """Where this step's batch has what is due; the turns in that order, in which rows are posted."""
        row_of = self.step.rows
        self._rows = [row_of[request_id] for request_id in self._due]
        self._lone_rows = [row_of[request_id] for request_id, _ in self._lone]
        rows = np.array(self._rows, np.int64)[self._holding]
        self._turns.rows = rows
        if (rows[1:] < rows[:-1]).any():
            self._turns = self._turns[np.argsort(rows)]

    def _take_turns(self, scheduler_output: SchedulerOutput) -> None:
        """The turns of this step: shared requests whose last known token is computed in it."""
        lockstep = self.lockstep
        # By a held follower's scheduler; what V2 warms up with has no scheduler.
        for request_id, token in getattr(scheduler_output, "adopted", {}).items():
            self.step.append(request_id, token)
            lockstep.learn(self._members[request_id])
        for request_id in scheduler_output.finished_req_ids:
            self._members.pop(request_id, None)
            self._draw_of.pop(request_id, None)
        self._prompts.forget(scheduler_output.finished_req_ids)
        for new in scheduler_output.scheduled_new_reqs:
            self._admit(new)
        self._due, self._holding, slots = _NOTHING
        if self._members and self._ranks.first:
            self._due, self._holding, slots = self._what_is_due(scheduler_output)
        self._lone, self._lone_rows = [], []
        if self._draw_of and self._ranks.first:
            self._lone = self._who_draws_alone(scheduler_output)
        slots = slots[self._holding]
        self._turns = lockstep.turns(slots, lockstep.produced[slots])
        self._ready = self._sampled = self._decided = self._turns[:0]

    def _admit(self, new: NewRequestData) -> None:
        """Know a request that this engine begins with, or begins with again: V2 resumes what was preempted so."""
        rows, spoken = PromptRows.of(new.sampling_params), spoken_tokens(new.sampling_params)
        if rows is not None:
            self._prompts.write_rows(new.req_id, rows)
        if spoken:
            self.step.go_on(new.req_id, spoken)
        draw = self._draws.of(new.sampling_params)
        if draw is not None and draw.temperature and new.req_id not in self._draw_of:
            self._draw_of[new.req_id] = draw, len(new.prompt_token_ids)
        resumed = new.req_id in self._members
        member = self._members[new.req_id] if resumed else Member.of(new.sampling_params)
        if member is None:
            return
        self._members[new.req_id] = member
        self.lockstep.join(member, len(spoken), draw)
        if self.lockstep.holds_slot(member):
            self._prompt_tokens[member.slot] = len(new.prompt_token_ids)
            self.lockstep.produced[member.slot] = max(_num_output_tokens(new), len(spoken))
        if member.scored is not None and not resumed:
            self._prompts.score(new.req_id, member, [*new.prompt_token_ids, *spoken], new.mm_features)

    def _what_is_due(self, scheduler_output: SchedulerOutput) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Requests whose last known token is computed in this step; which of them have their slot, and slots: [n]."""
        new, cached = scheduler_output.scheduled_new_reqs, scheduler_output.scheduled_cached_reqs
        ids = [*(begun.req_id for begun in new), *cached.req_ids]
        if new or ids != self._batch.ids:  # an id may come back, for another request
            self._batch = _Batch.of(ids, self._members, self.lockstep, self._prompt_tokens)
        lockstep, batch = self.lockstep, self._batch
        slots = batch.slots
        if not len(slots):
            return _NOTHING
        ends = np.array([*(begun.num_computed_tokens for begun in new), *cached.num_computed_tokens])
        ends = ends[batch.shared] + [*map(scheduler_output.num_scheduled_tokens.__getitem__, batch.requests)]
        goes_on = self._who_goes_on() if batch.may_release else batch.holding
        produced = lockstep.produced[slots]
        # Where nobody is left to mix with, it is plain vLLM.
        goes_on = goes_on & (produced < lockstep.alone_from[slots]) & (ends >= batch.prompt_tokens + produced)
        if goes_on.all():
            return batch.requests, goes_on, slots
        due = np.flatnonzero(goes_on | ~batch.holding)
        return [batch.requests[i] for i in due], batch.holding[due], slots[due]

    def _who_draws_alone(self, scheduler_output: SchedulerOutput) -> list[tuple[str, int]]:
        """Requests that draw and are not due, whose last known token is computed in this step, and next positions."""
        new, cached = scheduler_output.scheduled_new_reqs, scheduler_output.scheduled_cached_reqs
        known = [
            *(
                (
                    begun.req_id,
                    begun.num_computed_tokens,
                    max(_num_output_tokens(begun), len(spoken_tokens(begun.sampling_params))),
                )
                for begun in new
            ),
            *zip(cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True),
        ]
        due, found = set(self._due), []
        for request_id, computed, position in known:
            if request_id in self._draw_of and request_id not in due:
                _, prompt_tokens = self._draw_of[request_id]
                if computed + scheduler_output.num_scheduled_tokens[request_id] >= prompt_tokens + position:
                    found.append((request_id, position))
        return found

    def _who_goes_on(self) -> np.ndarray:
        """Which of the batch's shared requests [n] this engine still takes part in.

        One that has been released is left alone: the scheduler, which knows too, ends it. One whose lead this engine
        has taken over goes on in its stream of random numbers.
        """
        lockstep, batch = self.lockstep, self._batch
        led_by = lockstep.leader[batch.slots]
        goes_on = lockstep.take_part(batch.slots) & batch.holding
        leads = lockstep.leader[batch.slots]
        sampled = ~lockstep.plain[batch.slots]
        for i in np.flatnonzero(goes_on & sampled & (led_by != leads) & (leads == lockstep.expert)):
            tokens, _ = self._members[batch.requests[i]].led_before[-1]
            self.step.redraw(batch.requests[i], tokens)
        return goes_on


@dataclass(frozen=True)
class _Batch:
    """What a step computes, the same for many steps.

    Attributes:
        ids: of all its requests.
        shared: indices [n] of those that other engines take part in; a slice where it is all of them.
        requests: their ids [n].
        slots, prompt_tokens: theirs [n].
        holding: which of them [n] have their slot still: who joins a step takes another's.
        may_release: whether an engine may leave one of them.
    """

    ids: list[str]
    shared: np.ndarray | slice
    requests: list[str]
    slots: np.ndarray
    prompt_tokens: np.ndarray
    holding: np.ndarray
    may_release: bool

    @classmethod
    def of(
        cls, ids: list[str], members: Mapping[str, Member], lockstep: Lockstep, prompt_tokens: np.ndarray
    ) -> _Batch:
        found = [i for i, request_id in enumerate(ids) if request_id in members]
        theirs = [members[ids[i]] for i in found]
        slots = np.array([member.slot for member in theirs], np.int64)
        generations = np.array([member.generation for member in theirs], np.int64)
        return cls(
            ids,
            slice(None) if len(found) == len(ids) else np.array(found, np.int64),
            [ids[i] for i in found],
            slots,
            prompt_tokens[slots],
            generations == lockstep.generation[slots],
            any(member.may_release for member in theirs),
        )


_NOTHING: tuple[list[str], np.ndarray, np.ndarray] = [], np.zeros(0, bool), np.zeros(0, np.int64)


def _num_output_tokens(new: NewRequestData) -> int:
    """Tokens of the answer that a request comes with: V2 resumes with ``prefill_token_ids``, which end with them."""
    return len(new.prefill_token_ids or new.prompt_token_ids) - len(new.prompt_token_ids)
