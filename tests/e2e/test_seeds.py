"""Seeded sampling where a position is run without being sampled: chunks of long prompts, holds, preemption."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.conftest import CHUNK_TOKENS
from tests.helpers import Server

pytestmark = pytest.mark.engines

LONG_PROMPT = [5 + i % 500 for i in range(CHUNK_TOKENS + 50)]


def sample(server: Server, model: str, decar: dict[str, Any] | None) -> list[str]:
    response = server.openai().completions.create(
        model=model,
        prompt=LONG_PROMPT,
        max_tokens=16,
        temperature=1.0,
        seed=7,
        n=2,
        extra_body={"ignore_eos": True, "decar": decar},
    )
    return [choice.text for choice in response.choices]


@pytest.mark.parametrize(
    ("model", "decar"),
    [("duo", {"weights": {"code": 1, "prose": 2}}), ("duo", None), ("duo/prose", None)],
    ids=["weights", "posterior", "alone"],
)
def test_a_seed_gives_the_same_samples_alone_and_in_company(
    duo_server: Server, model: str, decar: dict[str, Any] | None
) -> None:
    alone = sample(duo_server, model, decar)
    assert len(set(alone)) == 2
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda _: sample(duo_server, model, decar), range(6)))
    assert together == [alone] * 6
