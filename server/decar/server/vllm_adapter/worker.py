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
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm
from vllm.platforms import current_platform
from vllm.v1.executor import uniproc_executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import SamplerOutput

from decar.server.protocol.cores import take_long_slices
from decar.server.protocol.lockstep import Lockstep, Turn
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
        self._turns: dict[str, Turn] = {}  # this step's, by request
        self._ready: list[Turn] = []
        self._rows: dict[str, PromptRows] = {}  # by request, where rows of its prompt are asked for
        self._unscored: dict[str, Member] = {}  # by request, where its prompt has still to be scored

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        tqdm.set_lock(threading.RLock())  # its own would leave a named semaphore in /dev/shm
        super().load_model(*args, **kwargs)
        model = self.model_runner.model
        self._compute_logits = model.compute_logits
        model.compute_logits = self._shared_vocabulary_only
        self._sample = self.model_runner._sample
        self.model_runner._sample = self._sample_in_lockstep

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        self._turns = self._take_turns(scheduler_output)
        self.lockstep.announce(self._turns.values())
        with self.lockstep.mine.timed("forward_ns") if self._turns else contextlib.nullcontext():
            return super().execute_model(scheduler_output)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        runner, lockstep = self.model_runner, self.lockstep
        state = runner.execute_model_state
        if state is not None and (self._unscored or self._rows):
            with lockstep.mine.timed("score_ns"):
                self._read_prompts(state)
        if state is None or not self._turns:
            return self._sample_sparing((), grammar_output)
        for request_id, turn in self._turns.items():
            turn.row = runner.input_batch.req_id_to_index[request_id]
        turns = [turn for turn in self._turns.values() if lockstep.holds_slot(turn.member)]
        turns.sort(key=lambda turn: turn.row)
        logits = state.logits.float()  # as rows are mixed, and tokens sampled
        runner.execute_model_state = state._replace(logits=logits)
        with lockstep.mine.timed("post_ns"):
            lockstep.post(turns, logits)
        led = [turn for turn in turns if turn.leader == lockstep.expert]
        self._ready = lockstep.wait_for_rows(led)
        if self._ready:
            with lockstep.mine.timed("mix_ns"):
                lockstep.weigh(self._ready)
                rows = torch.tensor([turn.row for turn in self._ready], device=logits.device)
                shared = logits[:, : lockstep.vocab_size]
                shared.index_copy_(0, rows, lockstep.mixed(self._ready).to(logits.device))
        ready = {turn.row for turn in self._ready}
        undecided = [turn.row for turn in self._turns.values() if turn.row not in ready]
        with lockstep.mine.timed("sample_ns"):
            output = self._sample_sparing(undecided, grammar_output)
        lockstep.finish(turns)
        return output

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
        if not self._turns:
            return output
        tokens = output.sampled_token_ids
        if self._ready:
            lockstep.publish(self._ready, tokens[[turn.row for turn in self._ready], 0].tolist())
        followed = [
            turn
            for turn in self._turns.values()
            if turn.leader != lockstep.expert and lockstep.holds_slot(turn.member)
        ]
        decided = set(map(id, self._ready))
        for turn, token in zip(followed, lockstep.adopt(followed), strict=True):
            if token is not None:
                tokens[turn.row, 0] = token
                decided.add(id(turn))
        for turn in self._turns.values():
            if id(turn) not in decided:
                self.model_runner.discard_request_mask.np[turn.row] = True
        return output

    def _only_follows(self, rows: int) -> bool:
        """Whether others decide all of this step's ``rows``, and no sampler here has to keep up to lead them later."""
        return rows == len(self._turns) and not any(
            turn.leader == self.lockstep.expert or turn.member.may_release for turn in self._turns.values()
        )

    def _take_turns(self, scheduler_output: SchedulerOutput) -> dict[str, Turn]:
        """Turns of this step: shared requests whose last known token is computed in it."""
        for request_id in scheduler_output.finished_req_ids:
            self._members.pop(request_id, None)
            self._rows.pop(request_id, None)
            self._unscored.pop(request_id, None)
        turns = {}
        for new in scheduler_output.scheduled_new_reqs:
            rows = PromptRows.of(new.sampling_params)
            if rows is not None:
                self._rows[new.req_id] = rows
            member = Member.of(new.sampling_params)
            if member is None:
                continue
            self._members[new.req_id] = member
            self.lockstep.join(member)
            if member.scored is not None:
                self._unscored[new.req_id] = member
            scheduled = scheduler_output.num_scheduled_tokens[new.req_id]
            if new.num_computed_tokens + scheduled >= len(new.prompt_token_ids):
                turns[new.req_id] = Turn(member, position=0)
        cached = scheduler_output.scheduled_cached_reqs
        if not self._members:
            return turns
        for i, request_id in enumerate(cached.req_ids):
            member = self._members.get(request_id)
            if member is None:
                continue
            state = self.model_runner.requests[request_id]
            led_by = member.leader
            if not self.lockstep.takes_part(member):
                continue  # the scheduler, which knows too, ends it
            if member.leader == self.lockstep.expert != led_by:
                self._draw_what_others_drew(member, state)
            late = cached.num_output_tokens[i] > len(state.output_token_ids)
            if late and not self._adopt_late(request_id, member, state):
                continue
            position = len(state.output_token_ids)
            if member.alone_from is not None and position >= member.alone_from:
                continue  # nobody is left to mix with: plain vLLM
            scheduled = scheduler_output.num_scheduled_tokens[request_id]
            if cached.num_computed_tokens[i] + scheduled >= state.num_tokens:
                turns[request_id] = Turn(member, position)
        return turns

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

    def _adopt_late(self, request_id: str, member: Member, state: Any) -> bool:
        """Catch up with the scheduler, which took a held follower's token from the plane between two steps.

        False if the token is gone: the request has ended, its slot has a new tenant, and its abort is on the way.
        """
        token = self.lockstep.decided(member, len(state.output_token_ids))
        if token is None:
            return False
        state.output_token_ids.append(token)
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
        for request_id, member in list(self._unscored.items()):
            if not self.lockstep.holds_slot(member):
                continue  # it is being aborted, and its slot has a new tenant
            assert member.scored is not None
            ids, (known, _) = requests[request_id].prompt_token_ids, member.scored[self.lockstep.expert]
            of_slot = self.lockstep.mine.prompt[member.slot]
            last = known - 1
            for first, last, logits in self._prompt_logits(state, request_id, known - 1, len(ids) - 1):
                targets = torch.tensor(ids[first + 1 : last + 1], device=logits.device)
                said = torch.nn.functional.cross_entropy(logits, targets, reduction="none").neg()
                of_slot[first + 1 : last + 1] = said.cpu().numpy()
                self.lockstep.mine.count("scored_tokens", last - first)
            if last == len(ids) - 1:
                for feature in requests[request_id].mm_features:
                    start = feature.mm_position.offset
                    of_slot[start : start + feature.mm_position.length] = 0  # an image's places hold no text
                self.lockstep.mine.prompt_sum[member.slot] = of_slot[known : len(ids)].sum(dtype=np.float64)
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
