"""Which requests need vLLM's sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from decar.server.protocol.member import REQUEST_KEY, SPOKEN_KEY, Draw
from decar.server.vllm_adapter import draws
from decar.server.vllm_adapter.draws import VARIABLE, Draws


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Draws:
    monkeypatch.delenv(VARIABLE, raising=False)
    return Draws(on_device=True, logits_processors=None)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stop": ["x"], "stop_token_ids": [7], "max_tokens": 3, "ignore_eos": True},
        {"detokenize": False, "skip_special_tokens": False, "output_kind": RequestOutputKind.DELTA},
        {"extra_args": {REQUEST_KEY: {}, SPOKEN_KEY: {}}},
        {"prompt_logprobs": 1},
        {"watermarking": False},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
    ],
    ids=str,
)
def test_greedy_and_temperature_alone_need_no_sampler(on_gpu: Draws, more: dict[str, Any]) -> None:
    assert on_gpu.of(SamplingParams(temperature=0.7, seed=11, **more)) == Draw(0.7, 11)
    greedy = on_gpu.of(SamplingParams(temperature=0, **more))
    assert greedy is not None
    assert greedy.temperature == 0


@pytest.mark.parametrize(
    "more",
    [
        {"logprobs": 0},
        {"logprob_token_ids": [3], "logprobs": 1},
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"repetition_penalty": 1.1},
        {"min_tokens": 2},
        {"logit_bias": {3: 1.0}},
        {"allowed_token_ids": [3]},
        {"bad_words": ["x"]},
        {"structured_outputs": StructuredOutputsParams(regex="x")},
        {"thinking_token_budget": 5},
        {"extra_args": {"somebodys": 1}},
    ],
    ids=str,
)
def test_all_else_does(on_gpu: Draws, more: dict[str, Any]) -> None:
    assert on_gpu.of(SamplingParams(temperature=0.7, seed=11, **more)) is None


def test_a_parameter_of_a_later_version_does(on_gpu: Draws, monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(SamplingParams):
        surprise: float = 0.0

    monkeypatch.setattr(draws, "SamplingParams", Later)
    later = Draws(on_device=True, logits_processors=None)
    assert later.of(Later()) is not None
    assert later.of(Later(surprise=1.0)) is None


def test_any_integer_is_a_seed_and_without_one_each_request_has_its_own(on_gpu: Draws) -> None:
    for seed in (-(2**63), -5, 2**63 - 1):
        draw = on_gpu.of(SamplingParams(seed=seed))
        assert draw is not None
        assert 0 <= draw.seed < 2**63
        np.int64(draw.seed)
        assert on_gpu.of(SamplingParams(seed=seed)) == draw
    assert on_gpu.of(SamplingParams()) != on_gpu.of(SamplingParams())


@pytest.mark.parametrize(
    ("who", "on_device", "decides"),
    [
        (None, True, True),
        (None, False, False),
        ("auto", True, True),
        ("decar", False, True),
        ("vllm", True, False),
    ],
)
def test_the_environment_says_who(
    monkeypatch: pytest.MonkeyPatch, who: str | None, on_device: bool, decides: bool
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if who is not None:
        monkeypatch.setenv(VARIABLE, who)
    assert (Draws(on_device, None).of(SamplingParams()) is not None) == decides


def test_what_is_no_answer_to_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "me")
    with pytest.raises(ValueError, match="DECAR_SAMPLER must be auto, decar or vllm, not 'me'"):
        Draws(True, None)


def test_a_users_logits_processors_see_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "decar")
    assert Draws(True, ["mine:Processor"]).of(SamplingParams()) is None
    monkeypatch.setattr(draws, "entry_points", lambda group: ["a plugin"])
    assert Draws(True, None).of(SamplingParams()) is None
