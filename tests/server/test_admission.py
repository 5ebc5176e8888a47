"""What an ensemble refuses before any engine sees it: every refusal names the field."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from decar.router.errors import StartError
from decar.server.gateway.admission import TOKEN_FIELDS, Admission, check_drawable, check_tokenizer
from decar.server.protocol.member import REQUEST_KEY, ROWS_KEY

V = 8
PROMPT = {"prompt_token_ids": [0, 7]}


@pytest.fixture
def admission() -> Admission:
    return Admission(V, max_logprobs=5)


def refused(admission: Admission, prompt: Any = PROMPT, priority: int = 0, **params: Any) -> str:
    """The field that is named."""
    with pytest.raises(VLLMValidationError) as error:
        admission.check(prompt, SamplingParams(**params), priority)
    assert error.value.parameter is not None
    assert str(error.value.parameter).split(".")[0] in str(error.value)
    return str(error.value.parameter)


def test_what_all_experts_know_is_admitted(admission: Admission) -> None:
    admission.check(PROMPT, SamplingParams())
    params = SamplingParams(
        logit_bias={0: 1.0, 7: -1.0},
        allowed_token_ids=[0, 7],
        stop_token_ids=[0, 7],
        logprobs=5,
        prompt_logprobs=5,
        extra_args={"mine": 1},
    )
    admission.check(PROMPT, params)
    admission.check(PROMPT, SamplingParams(logprob_token_ids=[0, 7]))


@pytest.mark.parametrize("token", [V, V + 100, -1])
@pytest.mark.parametrize("field", [*TOKEN_FIELDS, "prompt"])
def test_a_token_id_that_not_all_experts_know(admission: Admission, field: str, token: int) -> None:
    ids = [3, token, 5]
    if field == "prompt":
        assert refused(admission, {"prompt_token_ids": ids}) == "prompt"
    else:
        named: Any = dict.fromkeys(ids, 1.0) if field == "logit_bias" else ids
        assert refused(admission, **{field: named}) == field


def test_what_holds_an_images_place_is_no_word(admission: Admission) -> None:
    place = SimpleNamespace(offset=1, length=2)
    prompt = {"prompt_token_ids": [3, 900, 900, 4], "mm_placeholders": {"image": [place]}}
    admission.check(prompt, SamplingParams())
    assert refused(admission, {**prompt, "prompt_token_ids": [3, 900, 900, 900]}) == "prompt"


def test_prompts_that_an_ensemble_does_not_score(admission: Admission) -> None:
    assert refused(admission, prompt_logprob_token_ids=[[1, 2]]) == "prompt_logprob_token_ids"

    async def stream() -> AsyncIterator[Any]:
        yield PROMPT

    assert refused(admission, stream()) == "prompt"


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("count", [6, -1])
def test_more_log_probabilities_than_are_allowed(admission: Admission, field: str, count: int) -> None:
    assert refused(admission, **{field: count}) == field
    Admission(V, max_logprobs=-1).check(PROMPT, SamplingParams(**{field: -1}))
    with pytest.raises(VLLMValidationError, match="8"):
        Admission(V, max_logprobs=-1).check(PROMPT, SamplingParams(**{field: V + 1}))


@pytest.mark.parametrize("key", [REQUEST_KEY, ROWS_KEY])
def test_decars_own_keys_are_not_the_users(admission: Admission, key: str) -> None:
    assert refused(admission, extra_args={key: {"slot": 0}}) == "vllm_xargs"


def test_requests_are_served_as_they_come(admission: Admission) -> None:
    assert refused(admission, priority=1) == "priority"


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 3}, {"logit_bias": {1: 1.0}}, {"logprobs": 1}],
    ids=str,
)
def test_what_does_not_commute_with_drawing(params: dict[str, Any]) -> None:
    with pytest.raises(VLLMValidationError) as error:
        check_drawable(SamplingParams(**params))
    assert error.value.parameter == next(iter(params))


def test_plain_sampling_may_be_drawn() -> None:
    check_drawable(SamplingParams(n=3, seed=1, stop=["x"], max_tokens=4, top_k=-1))


def test_a_tokenizer_that_makes_ids_beyond_is_refused() -> None:
    check_tokenizer(SimpleNamespace(max_token_id=V - 1), V)
    with pytest.raises(StartError, match="--tokenizer"):
        check_tokenizer(SimpleNamespace(max_token_id=V), V)
