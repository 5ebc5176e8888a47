"""The worker: where a vLLM engine's forward pass meets the lockstep. Knows vLLM's model runner (V1).

Two seams. `sample_tokens` runs between the forward pass and sampling: prompts are scored, rows are posted, and
the leader's logits are replaced by the mixture's, before grammar, penalties and sampling. `_sample` gives the sampled
tokens before the runner keeps them: leaders publish theirs, followers adopt.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm
from vllm.platforms import current_platform
from vllm.v1.executor import uniproc_executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import SamplerOutput

from decar.server.protocol.cores import take_long_slices
from decar.server.protocol.lockstep import HELD, Lockstep, Turns
from decar.server.protocol.member import LockstepConfig, Member, PromptRows
from decar.server.protocol.plane import DIRECTORY, Plane
from decar.server.protocol.transport import transport_of
from decar.server.vllm_adapter.cuda_memory import CudaMemory

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


_POSITIONS_AT_ONCE = 256  # of a prompt, whose logits are in memory
# Of float32 logits: what a core takes from conversion to sum without leaving its cache.
_CACHED_BYTES = 2**19


class InProcessExecutor(UniProcExecutor):
    """The worker in the engine's own process. vLLM's CPU platform refuses "uni" only because it sets OpenMP
    up through the environment of a new process; `LockstepWorker` binds its threads itself."""

    def _init_executor(self) -> None:
        # vLLM's lock for the worker; of the fork context, it has no name in /dev/shm to leave behind.
        uniproc_executor.Lock = multiprocessing.get_context("fork").Lock
        super()._init_executor()


class Scoring:
    """How far an engine has come with the log-likelihood of a prompt.

    Args:
        member: whose prompt it is.
        known: its leading tokens whose log-likelihood the gateway knows.
    """

    def __init__(self, member: Member, known: int):
        self.member, self.known = member, known
        self.end, self.total = known, 0.0

    def add(self, lockstep: Lockstep, start: int, said: np.ndarray, images: Any) -> None:
        """Take in log p [n] of the tokens from ``start`` on, and leave the sums so far in the plane."""
        if start == self.known:
            self.end, self.total = start, 0.0  # anew, after a preemption
        for feature in images:  # an image's places hold no text
            place = feature.mm_position
            said[max(place.offset - start, 0) : max(place.offset + place.length - start, 0)] = 0.0
        sums = self.total + np.cumsum(said)
        unit, end = lockstep.prompt_unit, start + len(said)
        whole_units = np.arange(-(-start // unit) * unit, end, unit)
        lockstep.mine.prompt_sums[self.member.slot, whole_units // unit - 1] = sums[whole_units - start]
        lockstep.mine.count("scored_tokens", len(said))
        self.end, self.total = end, float(sums[-1])


def _slots_and_generations(members: Sequence[Member]) -> tuple[np.ndarray, np.ndarray]:
    count = len(members)
    return (
        np.fromiter((member.slot for member in members), np.int64, count),
        np.fromiter((member.generation for member in members), np.int64, count),
    )


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
        self._members: dict[str, Member] = {}
        self._prompt_tokens = np.zeros(plane.spec.slots, np.int64)  # by slot
        self._due: list[str] = []  # shared requests that this step gives a row of
        self._turns = self.lockstep.turns(*np.zeros((2, 0), np.int64))  # those of them that hold their slot
        self._ready: Turns = self._turns  # those that this engine leads and whose rows have come
        self._rows: dict[str, PromptRows] = {}  # by request, where rows of its prompt are asked for
        self._unscored: dict[str, Scoring] = {}  # by request, where its prompt has still to be scored

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        tqdm.set_lock(threading.RLock())  # its own would leave a named semaphore in /dev/shm
        super().load_model(*args, **kwargs)
        model = self.model_runner.model
        self._compute_logits = model.compute_logits
        model.compute_logits = self._shared_vocabulary_only
        self._sample = self.model_runner._sample
        self.model_runner._sample = self._sample_in_lockstep

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        self._take_turns(scheduler_output)
        self.lockstep.announce(self._turns)
        with self.lockstep.mine.timed("forward_ns") if self._due else contextlib.nullcontext():
            return super().execute_model(scheduler_output)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        runner, lockstep = self.model_runner, self.lockstep
        state = runner.execute_model_state
        if state is not None and (self._unscored or self._rows):
            with lockstep.mine.timed("score_ns"):
                self._read_prompts(state)
        if state is None or not self._due:
            return self._sample_sparing((), grammar_output)
        self._find_rows()
        logits = state.logits.float()  # as rows are mixed, and tokens sampled
        runner.execute_model_state = state._replace(logits=logits)
        with lockstep.mine.timed("post_ns"):
            lockstep.post(self._turns, logits)
        self._ready = lockstep.wait_for_rows(self._turns[self._turns.leaders == lockstep.expert])
        if len(self._ready):
            with lockstep.mine.timed("mix_ns"):
                lockstep.weigh(self._ready)
                rows = torch.from_numpy(self._ready.rows).to(logits.device)
                shared = logits[:, : lockstep.vocab_size]
                shared.index_copy_(0, rows, lockstep.mixed(self._ready).to(logits.device))
        undecided = set(self._due_rows) - set(self._ready.rows.tolist())
        with lockstep.mine.timed("sample_ns"):
            output = self._sample_sparing(undecided, grammar_output)
        lockstep.finish(self._turns)
        return output

    def _find_rows(self) -> None:
        """Where this step's batch has the rows that are due; the turns in that order, as rows are posted."""
        row_of = self.model_runner.input_batch.req_id_to_index
        self._due_rows = [row_of[request_id] for request_id in self._due]
        self._turns.rows = np.array(self._due_rows, np.int64)[self._holding]
        self._turns = self._turns[np.argsort(self._turns.rows)]

    def _sample_sparing(self, rows: Iterable[int], grammar_output: Any) -> Any:
        """Sample, but let neither ``rows`` nor unfinished prompts draw from their seeded generators.

        Their sample is dropped. vLLM would take the draw back, which a CPU generator cannot do: it raises.
        """
        batch = self.model_runner.input_batch
        unfinished = np.flatnonzero(self.model_runner.discard_request_mask.np[: batch.num_reqs]).tolist()
        spared = {row: batch.generators.pop(row) for row in {*rows, *unfinished} if row in batch.generators}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            batch.generators.update(spared)

    def _sample_in_lockstep(self, logits: torch.Tensor, spec_decode_metadata: Any) -> Any:
        lockstep = self.lockstep
        if self._only_follows(len(logits)):
            nothing = torch.zeros(len(logits), 1, dtype=torch.int32, device=logits.device)
            output = SamplerOutput(nothing, logprobs_tensors=None)
        else:
            output = self._sample(logits, spec_decode_metadata)
        if not self._due:
            return output
        tokens, decided = output.sampled_token_ids, self._ready.rows
        if len(self._ready):
            lockstep.publish(self._ready, tokens[self._ready.rows, 0].cpu().numpy().astype(np.int64))
        followed = self._turns[self._turns.leaders != lockstep.expert]
        if len(followed):
            adopted = lockstep.adopt(followed)
            there = adopted != HELD
            rows = followed.rows[there]
            tokens[rows, 0] = torch.from_numpy(adopted[there]).to(tokens)
            decided = np.concatenate([decided, rows])
        held = np.setdiff1d(self._due_rows, decided)
        self.model_runner.discard_request_mask.np[held] = True
        return output

    def _only_follows(self, rows: int) -> bool:
        """Whether others decide all of this step's ``rows``, and no sampler here has to keep up to lead them later."""
        turns = self._turns
        return (
            rows == len(turns) == len(self._due)
            and not (turns.leaders == self.lockstep.expert).any()
            and not self.lockstep.may_release[turns.slots].any()
        )

    def _take_turns(self, scheduler_output: SchedulerOutput) -> None:
        """The turns of this step: shared requests whose last known token is computed in it."""
        for request_id in scheduler_output.finished_req_ids:
            self._members.pop(request_id, None)
            self._rows.pop(request_id, None)
            self._unscored.pop(request_id, None)
        due: list[str] = []
        for new in scheduler_output.scheduled_new_reqs:
            rows = PromptRows.of(new.sampling_params)
            if rows is not None:
                self._rows[new.req_id] = rows
            member = Member.of(new.sampling_params)
            if member is None:
                continue
            self._members[new.req_id] = member
            self.lockstep.join(member)
            if self.lockstep.holds_slot(member):
                self._prompt_tokens[member.slot] = len(new.prompt_token_ids)
            if member.scored is not None:
                self._unscored[new.req_id] = Scoring(member, member.scored[self.lockstep.expert][0])
            scheduled = scheduler_output.num_scheduled_tokens[new.req_id]
            if new.num_computed_tokens + scheduled >= len(new.prompt_token_ids):
                due.append(new.req_id)
        if self._members:
            due += self._going_on(scheduler_output)
        members = [self._members[request_id] for request_id in due]
        slots, generations = _slots_and_generations(members)
        self._due, self._holding = due, generations == self.lockstep.generation[slots]
        slots = slots[self._holding]
        self._turns = self.lockstep.turns(slots, self.lockstep.produced[slots])
        self._ready = self._turns[:0]

    def _going_on(self, scheduler_output: SchedulerOutput) -> list[str]:
        """Of the requests that are scheduled once more, those whose last known token is computed in this step."""
        cached, lockstep = scheduler_output.scheduled_cached_reqs, self.lockstep
        shared = [i for i, request_id in enumerate(cached.req_ids) if request_id in self._members]
        if not shared:
            return []
        ids = [cached.req_ids[i] for i in shared]
        slots, generations = _slots_and_generations([self._members[request_id] for request_id in ids])
        known = np.array([cached.num_output_tokens[i] for i in shared])
        computed = np.array([cached.num_computed_tokens[i] for i in shared])
        scheduled = np.array([scheduler_output.num_scheduled_tokens[request_id] for request_id in ids])
        holding = generations == lockstep.generation[slots]
        led_by = lockstep.leader[slots]
        # One that has been released is left alone: the scheduler, which knows too, ends it.
        goes_on = lockstep.take_part(slots) & holding
        for i in np.flatnonzero(
            goes_on & (lockstep.leader[slots] == lockstep.expert) & (led_by != lockstep.expert)
        ):
            self._draw_what_others_drew(self._members[ids[i]], self.model_runner.requests[ids[i]])
        mixed = lockstep.produced[slots] < lockstep.alone_from[slots]
        for i in np.flatnonzero(goes_on & mixed & (known > lockstep.produced[slots])):
            goes_on[i] = self._adopt_late(ids[i], int(slots[i]))
        produced = lockstep.produced[slots]
        goes_on &= produced < lockstep.alone_from[slots]  # else nobody is left to mix with: plain vLLM
        goes_on &= computed + scheduled >= self._prompt_tokens[slots] + produced
        return [ids[i] for i in np.flatnonzero(goes_on | ~holding)]

    def _draw_what_others_drew(self, member: Member, state: Any) -> None:
        """A seeded request whose lead this engine takes over goes on in its stream of random numbers.

        What vLLM draws for a token differs by device, so its own sampler draws it.
        """
        if state.generator is None:
            return
        tokens, _ = member.led_before[-1]
        sample = self.model_runner.sampler.topk_topp_sampler
        # On a CPU it draws one number whatever the vocabulary, unless it is told to draw all of them.
        narrow = current_platform.is_cpu() and not getattr(sample, "use_fp64_gumbel", False)
        width = 1 if narrow else self.model_runner.input_batch.vocab_size
        nothing = torch.zeros(1, width, device=state.generator.device)
        state.generator.manual_seed(state.sampling_params.seed)
        for _ in range(tokens):
            sample(nothing, {0: state.generator}, None, None)

    def _adopt_late(self, request_id: str, slot: int) -> bool:
        """Catch up with the scheduler, which took a held follower's token from the plane between two steps.

        False if the token is gone: the request has ended, its slot has a new tenant, and its abort is on the way.
        """
        token = self.lockstep.decided(slot)
        if token is None:
            return False
        self.lockstep.produced[slot] += 1
        self.model_runner.requests[request_id].output_token_ids.append(token)
        batch = self.model_runner.input_batch
        row = batch.req_id_to_index.get(request_id)
        if row is not None:
            end = batch.num_tokens_no_spec[row]
            batch.token_ids_cpu[row, end] = token
            batch.is_token_ids[row, end] = True
            batch.num_tokens_no_spec[row] = end + 1
        return True

    def _read_prompts(self, state: Any) -> None:
        """Score the prompt positions of this step, and write out those whose rows are asked for."""
        requests = self.model_runner.requests
        for request_id, scoring in list(self._unscored.items()):
            if not self.lockstep.holds_slot(scoring.member):
                continue  # it is being aborted, and its slot has a new tenant
            request = requests[request_id]
            ids, known = request.prompt_token_ids, scoring.known
            for first, last, logits in self._prompt_logits(state, request_id, known - 1, len(ids) - 1):
                targets = torch.tensor(ids[first + 1 : last + 1], device=logits.device)
                said = torch.nn.functional.cross_entropy(logits, targets, reduction="none").neg()
                scoring.add(self.lockstep, first + 1, said.double().cpu().numpy(), request.mm_features)
            if scoring.end == len(ids):
                self.lockstep.mine.prompt_sum[scoring.member.slot] = scoring.total
                del self._unscored[request_id]
        for request_id, asked in self._rows.items():
            shape = (asked.end - asked.start, self.lockstep.vocab_size)
            for first, last, logits in self._prompt_logits(state, request_id, asked.start, asked.end):
                with contextlib.suppress(FileNotFoundError):  # the client has left
                    rows = np.memmap(DIRECTORY / asked.file, np.float32, "r+", shape=shape)
                    rows[first - asked.start : last - asked.start] = logits.log_softmax(dim=-1).cpu().numpy()

    def _prompt_logits(
        self, state: Any, request_id: str, start: int, end: int
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first, last, logits [last - first, V] float32) of the positions from ``start`` to ``end`` in this step."""
        runner = self.model_runner
        scheduled = state.scheduler_output.num_scheduled_tokens.get(request_id, 0)
        computed = runner.requests[request_id].num_computed_tokens
        start, end = max(start, computed), min(end, computed + scheduled)
        if start >= end:
            return
        offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]]) - computed
        vocab_size = self.lockstep.vocab_size
        at_once = _POSITIONS_AT_ONCE
        if current_platform.is_cpu():
            at_once = max(_CACHED_BYTES // (4 * vocab_size), 1)
        for hidden_states in state.hidden_states[offset + start : offset + end].split(_POSITIONS_AT_ONCE):
            for logits in runner.model.compute_logits(hidden_states)[:, :vocab_size].split(at_once):
                yield start, start + len(logits), logits.float()
                start += len(logits)

    def _shared_vocabulary_only(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Logits with ids that some expert has no row for masked: they could not be fed to every expert."""
        logits = self._compute_logits(hidden_states, *args, **kwargs)
        if logits is not None and logits.shape[-1] > self.lockstep.vocab_size:
            logits[..., self.lockstep.vocab_size :] = -torch.inf
        return logits
