"""`StepV1` on a runner made of what it touches."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from decar.server.vllm_adapter.runner_v1 import StepV1

VOCABULARY, PADDED = 5, 8
State = namedtuple("State", "logits hidden_states")


class Runner:
    """Two requests in its batch, of which the second has a chunk of its prompt computed; a third waits."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(compute_logits=lambda hidden: hidden.new_ones(len(hidden), PADDED))
        self.input_batch = SimpleNamespace(
            num_reqs=2,
            req_id_to_index={"a": 0, "b": 1},
            generators={0: torch.Generator().manual_seed(1), 1: torch.Generator().manual_seed(2)},
            num_tokens_no_spec=np.array([3, 7]),
            token_ids_cpu=np.zeros((2, 16), np.int32),
            is_token_ids=np.zeros((2, 16), bool),
        )
        self.requests = {
            of: SimpleNamespace(output_token_ids=[], num_computed_tokens=computed)
            for of, computed in (("a", 2), ("b", 4), ("c", 0))
        }
        self.discard_request_mask = SimpleNamespace(np=np.array([False, True]))
        self.query_start_loc = SimpleNamespace(np=np.array([0, 1, 4, 4]))
        self.execute_model_state = State(
            torch.zeros(2, PADDED, dtype=torch.bfloat16), torch.arange(4.0)[:, None]
        )
        self.drawn: set[int] = set()

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self._sample(self.execute_model_state.logits, None).sampled_token_ids.tolist()

    def _sample(self, logits: torch.Tensor, spec_decode_metadata: Any) -> Any:
        self.drawn = set(self.input_batch.generators)
        return SimpleNamespace(sampled_token_ids=logits.argmax(dim=-1, keepdim=True).to(torch.int32))


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
def step(runner: Runner) -> StepV1:
    return StepV1(runner, VOCABULARY)


def test_ids_that_not_every_expert_has_are_masked(runner: Runner, step: StepV1) -> None:
    for logits in (step.compute_logits(torch.zeros(2, 1)), runner.model.compute_logits(torch.zeros(2, 1))):
        assert (logits[:, :VOCABULARY] == 1).all()
        assert (logits[:, VOCABULARY:] == -torch.inf).all()


def test_what_is_written_into_the_logits_is_sampled_from(step: StepV1) -> None:
    logits = step.logits()
    assert logits.dtype == torch.float32
    logits[0, 3], logits[1, 4] = 1, 1
    assert step.sample(None) == [[3], [4]]


def test_settling_comes_before_the_runner_keeps_tokens(runner: Runner, step: StepV1) -> None:
    def settle(tokens: torch.Tensor) -> None:
        assert tokens.tolist() == [0, 0]
        tokens[0] = 2
        step.drop([1])

    runner.discard_request_mask.np[:] = False
    assert step.sample(None, settle=settle) == [[2], [0]]
    assert runner.discard_request_mask.np.tolist() == [False, True]
    assert step.sample(None) == [[0], [0]]  # the next step is another one


def test_neither_undecided_rows_nor_chunks_of_prompts_draw(runner: Runner, step: StepV1) -> None:
    generators = dict(runner.input_batch.generators)
    step.sample(None)
    assert runner.drawn == {0}
    step.sample(None, undecided=[0])
    assert runner.drawn == set()
    assert runner.input_batch.generators == generators


def test_no_sampler_where_others_decide(runner: Runner, step: StepV1) -> None:
    step.logits()[:, 3] = 1
    runner.drawn = {9}
    assert step.sample(None, settle=lambda tokens: tokens.fill_(4), sampler=False) == [[4], [4]]
    assert runner.drawn == {9}


def test_a_late_token_is_the_next_of_its_request(runner: Runner, step: StepV1) -> None:
    batch = runner.input_batch
    for request_id in ("a", "c"):  # "c" is in no batch
        step.append(request_id, 6)
        assert runner.requests[request_id].output_token_ids == [6]
    assert batch.token_ids_cpu[0, 3] == 6
    assert batch.is_token_ids[0, 3]
    assert batch.num_tokens_no_spec.tolist() == [4, 7]


def test_hidden_states_are_those_of_this_steps_positions(step: StepV1) -> None:
    first, hidden_states = step.hidden_states("b")
    assert first == 4
    assert hidden_states[:, 0].tolist() == [1, 2, 3]


def test_a_request_that_goes_on_joins_the_batch_with_what_was_said(runner: Runner, step: StepV1) -> None:
    """It is in the runner's own past when the batch first sees it, and so is what a seed drew for it."""
    joined: list[tuple[str, list[int]]] = []
    drawn: list[int] = []
    runner.input_batch.add_request = lambda request: joined.append(
        (request.req_id, list(request.output_token_ids))
    )
    step.redraw = lambda request_id, tokens: drawn.append(tokens)  # type: ignore[method-assign]
    step.go_on("c", [7, 8, 9])
    step.go_on("d", [5])
    for request_id in ("c", "e", "d"):
        runner.input_batch.add_request(SimpleNamespace(req_id=request_id, output_token_ids=[]))
    assert joined == [("c", [7, 8, 9]), ("e", []), ("d", [5])]
    assert drawn == [3, 1]
    runner.input_batch.add_request(SimpleNamespace(req_id="c", output_token_ids=[7, 8, 9, 1]))
    assert joined[-1] == ("c", [7, 8, 9, 1]), "as after a preemption: it has them already"
