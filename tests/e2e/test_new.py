"""What `decar new` makes is served: the trio's server has it, so all that is asked of the trio is asked of it."""

from __future__ import annotations

import pytest

from decar.router import Ensemble
from tests.helpers import Server
from tests.reference import Reference, mixture_decode

pytestmark = pytest.mark.engines


def test_checkpoints_become_a_served_ensemble(
    trio_server: Server, new_trio: Reference, trio: Reference
) -> None:
    ensemble = Ensemble.load(new_trio.directory)
    assert [expert.prior for expert in ensemble.experts] == pytest.approx(trio.prior)
    served = {expert["name"]: expert["path"] for expert in trio_server.ensemble()["experts"]}
    assert served == {expert.name: str(expert.path) for expert in ensemble.experts}
    prompt = "import os\n"
    answer = trio_server.openai().completions.create(
        model="trio", prompt=prompt, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
    )
    (wanted,) = mixture_decode(trio, [trio.encode(prompt)], 8)
    assert answer.choices[0].text == trio.decode(wanted.tokens)
