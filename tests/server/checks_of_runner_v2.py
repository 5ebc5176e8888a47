"""Run by test_runner_v2.py."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # tests/conftest.py has it only while it imports kernels
import vllm.v1.worker.cpu.shm  # noqa: F401, I001 - first, as vLLM's CPU worker does
import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.states import RequestState

from decar.server.vllm_adapter.runner_v2 import StepV2

VOCABULARY, PADDED = 5, 8
CPU = torch.device("cpu")


class Runner(GPUModelRunner):
    """Two requests, "a" of three tokens and "b" of four, all of them computed up to the last one."""

    is_last_pp_rank = True

    def __init__(self) -> None:
        self.device = CPU
        self.model = SimpleNamespace(compute_logits=lambda hidden: hidden.new_ones(len(hidden), PADDED))
        self.req_states = RequestState(4, 16, 16, 0, PADDED, CPU)
        counts = torch.zeros(4, PADDED, dtype=torch.int32)
        self.sampler = SimpleNamespace(penalties_state=SimpleNamespace(output_bin_counts=counts))
        self.model_state = SimpleNamespace(postprocess_state=lambda *args: None)
        for request_id, tokens in (("a", [1, 2, 3]), ("b", [4, 3, 2, 1])):
            self.req_states.add_request(request_id, 2, tokens, len(tokens) - 1, 8)
        self.req_states.apply_staged_writes()
        self.of = self.req_states.req_id_to_index
        self.batch = SimpleNamespace(
            req_ids=["b", "a"],
            num_reqs=2,
            idx_mapping=torch.tensor([self.of["b"], self.of["a"]]),
            query_start_loc=torch.tensor([0, 1, 2], dtype=torch.int32),
            query_start_loc_np=np.array([0, 1, 2, 2]),
            num_computed_tokens_np=np.array([3, 2]),
            logits_indices=torch.tensor([0, 1]),
        )
        self.execute_model_state = SimpleNamespace(
            input_batch=self.batch, hidden_states=torch.arange(2.0)[:, None]
        )
        self.sampler_ran = 0

    def sample(self, hidden_states: torch.Tensor, input_batch: Any, grammar_output: Any) -> Any:
        self.sampler_ran += 1
        logits = self.model.compute_logits(hidden_states[input_batch.logits_indices])
        counts = torch.ones(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        return SamplerOutput(logits.argmax(dim=-1, keepdim=True), None, None, *counts), *counts

    def sample_tokens(self, grammar_output: Any) -> list[list[int]]:
        hidden_states = self.execute_model_state.hidden_states
        output, sampled, rejected = self.sample(hidden_states, self.batch, grammar_output)
        self.postprocess_sampled(
            self.batch.idx_mapping, output.sampled_token_ids, sampled, rejected, self.batch.query_start_loc
        )
        tokens = zip(output.sampled_token_ids.tolist(), sampled.tolist(), strict=True)
        return [ids[:count] for ids, count in tokens]

    def known(self, request_id: str) -> tuple[list[int], int]:
        """Tokens of a request, and how many of them count as computed."""
        states, index = self.req_states, self.of[request_id]
        count = int(states.total_len.gpu[index])
        return states.all_token_ids.gpu[index, :count].tolist(), int(states.num_computed_tokens.gpu[index])


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
def step(runner: Runner) -> StepV2:
    return StepV2(runner, VOCABULARY)


def test_rows_and_hidden_states_are_this_steps(step: StepV2) -> None:
    assert step.ran
    assert step.rows == {"b": 0, "a": 1}
    first, hidden_states = step.hidden_states("a")
    assert (first, hidden_states.tolist()) == (2, [[1.0]])


def test_what_is_written_into_the_logits_is_sampled_from(runner: Runner, step: StepV2) -> None:
    logits = step.logits()
    assert (logits[:, VOCABULARY:] == -torch.inf).all()
    logits[0, 3], logits[1, 4] = 2, 2
    assert step.sample(None) == [[3], [4]]
    assert runner.known("b") == ([4, 3, 2, 1, 3], 4)
    assert runner.known("a") == ([1, 2, 3, 4], 3)
    assert step.sample(None) == [[0], [0]]  # the next step's logits are the model's


@pytest.mark.parametrize("sampler", [True, False])
def test_adopted_tokens_are_kept_and_dropped_rows_get_none(
    runner: Runner, step: StepV2, sampler: bool
) -> None:
    def settle(tokens: torch.Tensor) -> None:
        tokens[0] = 2
        step.drop([1])

    assert step.sample(None, settle=settle, sampler=sampler) == [[2], []]
    assert runner.sampler_ran == sampler
    assert runner.known("b") == ([4, 3, 2, 1, 2], 4)
    assert runner.known("a") == ([1, 2, 3], 3)


@pytest.mark.parametrize(("computed", "known"), [(2, 2), (3, 3)], ids=["again", "later"])
def test_after_a_hold_the_scheduler_says_what_is_computed(
    runner: Runner, step: StepV2, computed: int, known: int
) -> None:
    """Where the position runs again it is one less than the device has counted, also long after."""
    step.sample(None, settle=lambda tokens: step.drop([1]))
    for ids, counts in (([], []), (["b", "a"], [4, computed])):
        runner.update_requests(_scheduled(ids, counts))
    assert runner.known("a")[1] == known
    runner.req_states.num_computed_tokens.gpu[runner.of["a"]] = 9
    runner.update_requests(_scheduled(["a"], [7]))  # once only: from here on the device counts
    assert runner.known("a")[1] == 9


def test_one_that_has_ended_is_forgotten(runner: Runner, step: StepV2) -> None:
    step.sample(None, settle=lambda tokens: step.drop([1]))
    runner.update_requests(_scheduled([], [], finished={"a"}))
    runner.update_requests(_scheduled(["a"], [0]))  # a new one of that name
    assert runner.known("a")[1] == 3


def test_a_late_token_is_kept_and_counted_as_a_sampled_one(runner: Runner, step: StepV2) -> None:
    step.sample(None, settle=lambda tokens: step.drop([1]))
    step.append("a", 6)
    assert runner.known("a") == ([1, 2, 3, 6], 3)
    index = runner.of["a"]
    assert runner.req_states.last_sampled_tokens[index].tolist() == [6]
    assert runner.sampler.penalties_state.output_bin_counts[index].tolist() == [0, 0, 0, 0, 0, 0, 1, 0]


def _scheduled(request_ids: list[str], computed: list[int], finished: set[str] | None = None) -> Any:
    cached = SimpleNamespace(
        req_ids=request_ids, num_computed_tokens=computed, new_block_ids=[None] * len(request_ids)
    )
    return SimpleNamespace(
        scheduled_cached_reqs=cached,
        finished_req_ids=finished or set(),
        new_block_ids_to_zero=None,
        kv_cache_block_copies=None,
    )
