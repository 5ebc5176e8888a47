"""What vLLM's V2 model runner has no room for is refused, by name; what it has room for is not."""

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from decar.server.vllm_adapter.limits import refuse_beyond_limits


@pytest.mark.parametrize(
    ("field", "fits", "too_many"),
    [
        ("allowed_token_ids", list(range(1024)), list(range(1025))),
        ("logit_bias", dict.fromkeys(range(1024), 1.0), dict.fromkeys(range(1025), 1.0)),
        ("stop_token_ids", list(range(128)), list(range(129))),
    ],
)
def test_too_many_tokens(field: str, fits: object, too_many: object) -> None:
    refuse_beyond_limits(SamplingParams(min_tokens=1, **{field: fits}))
    with pytest.raises(VLLMValidationError, match=rf"{field} .* V2 "):
        refuse_beyond_limits(SamplingParams(min_tokens=1, **{field: too_many}))


def test_stop_tokens_without_min_tokens_need_no_room() -> None:
    refuse_beyond_limits(SamplingParams(stop_token_ids=list(range(500))))


@pytest.mark.parametrize(("words", "tokens", "fits"), [(128, 8, True), (129, 1, False), (100, 11, False)])
def test_bad_words(words: int, tokens: int, fits: bool) -> None:
    params = SamplingParams(bad_words=["x"])
    params._bad_words_token_ids = [list(range(tokens))] * words  # as the tokenizer would
    if fits:
        refuse_beyond_limits(params)
    else:
        with pytest.raises(VLLMValidationError, match=r"bad_words .* V2 "):
            refuse_beyond_limits(params)
