"""`Step` for vLLM's V2 model runner (`vllm/v1/worker/gpu/model_runner.py`), and its CPU child.

What V1 keeps in lists of the host, V2 keeps on the device. Noise is by seed and position there: there is no stream of
random numbers to keep up with.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from decar.server.vllm_adapter.step import Settle, Step


class StepV2(Step):
    """A hold is `num_sampled` 0: the position counts as computed, and no token follows it.

    Whether it runs again is the scheduler's to say, and V2 does not hear it: of a request in its batch it only counts
    computed tokens on. So what the scheduler counts of a request is written to the device after a hold.
    """

    def __init__(self, runner: Any, vocab_size: int):
        super().__init__(runner, vocab_size)
        self._sample = runner.sample
        runner.sample = self._sample_and_settle
        self._update_requests = runner.update_requests
        runner.update_requests = self._update_requests_after_holds
        self._held: set[str] = set()
        self._mixed: torch.Tensor | None = None  # this step's logits, once somebody has asked for them
        self._asked: torch.Tensor | None = None  # the same, while the sampler is about to ask for them
        self._settle: Settle | None = None
        self._sampler = True
        self._batch: Any = None
        self._rows: dict[str, int] = {}  # of that batch
        self._sampled: tuple[SamplerOutput, Sequence[str]] | None = None  # and the request of each row

    def compute_logits(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        mixed, self._asked = self._asked, None
        return super().compute_logits(hidden_states, *args, **kwargs) if mixed is None else mixed

    def append(self, request_id: str, token: int) -> None:
        states, device = self._runner.req_states, self._runner.device
        one = torch.ones(1, dtype=torch.int32, device=device)
        self._runner.postprocess_sampled(
            torch.tensor([states.req_id_to_index[request_id]], device=device),
            torch.tensor([[token]], device=device),
            num_sampled=one,
            num_rejected=torch.zeros_like(one),
        )

    def go_on(self, request_id: str, tokens: Sequence[int]) -> None:
        """Nothing to do: what was preempted comes with its tokens too."""

    def redraw(self, request_id: str, tokens: int) -> None:
        """Nothing to do."""

    @property
    def ran(self) -> bool:
        return self._runner.execute_model_state is not None

    @property
    def rows(self) -> Mapping[str, int]:
        batch = self._runner.execute_model_state.input_batch
        if batch is not self._batch:
            self._batch = batch
            self._rows = {request_id: row for row, request_id in enumerate(batch.req_ids)}
        return self._rows

    def hidden_states(self, request_id: str) -> tuple[int, torch.Tensor]:
        state = self._runner.execute_model_state
        row = self.rows[request_id]
        start, end = state.input_batch.query_start_loc_np[row : row + 2].tolist()
        return int(state.input_batch.num_computed_tokens_np[row]), state.hidden_states[start:end]

    def logits(self) -> torch.Tensor:
        if self._mixed is None:
            state = self._runner.execute_model_state
            self._mixed = self.compute_logits(state.hidden_states[state.input_batch.logits_indices]).float()
        return self._mixed

    def sample(
        self,
        grammar_output: Any,
        undecided: Collection[int] = (),
        settle: Settle | None = None,
        sampler: bool = True,
    ) -> Any:
        self._settle, self._sampler = settle, sampler
        try:
            return self._runner.sample_tokens(grammar_output)
        finally:
            self._settle, self._sampler, self._mixed = None, True, None

    def keep_told(self, grammar_output: Any, settle: Settle) -> Any:
        """Its sampler runs nevertheless: it is what knows of which rows a prompt is not finished."""
        return self.sample(grammar_output, settle=settle)

    def drop(self, rows: Sequence[int]) -> None:
        assert self._sampled is not None, "only within settle"
        output, request_of = self._sampled
        output.num_sampled[rows] = 0
        self._held.update(request_of[row] for row in rows)

    def _sample_and_settle(
        self, hidden_states: torch.Tensor, input_batch: Any, grammar_output: Any
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        """In place of the runner's `sample`, which asks the model for logits, then applies the grammar and samples."""
        if self._sampler:
            self._asked = self._mixed
            output, *_ = self._sample(hidden_states, input_batch, grammar_output)
        else:
            output = _nothing_sampled(input_batch.num_reqs, hidden_states.device)
        if self._settle is not None:
            self._sampled = output, input_batch.req_ids
            self._settle(output.sampled_token_ids[:, 0])
            self._sampled = None
        return output, output.num_sampled, output.num_rejected

    def _update_requests_after_holds(self, scheduler_output: Any) -> None:
        """In place of the runner's `update_requests`, after which it reads the device's counts."""
        self._update_requests(scheduler_output)
        self._held -= scheduler_output.finished_req_ids
        if not self._held:
            return
        states, cached = self._runner.req_states, scheduler_output.scheduled_cached_reqs
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if request_id in self._held:
                self._held.remove(request_id)
                states.num_computed_tokens.gpu[states.req_id_to_index[request_id]] = computed


def _nothing_sampled(rows: int, device: torch.device) -> SamplerOutput:
    """Of rows whose tokens others decide: zeros [B, 1], one token each."""
    counts = torch.zeros(2, rows, dtype=torch.int32, device=device)
    counts[0] = 1
    return SamplerOutput(
        sampled_token_ids=torch.zeros(rows, 1, dtype=torch.int64, device=device),
        logprobs_tensors=None,
        num_nans=None,
        num_sampled=counts[0],
        num_rejected=counts[1],
    )
