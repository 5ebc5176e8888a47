"""What a request may ask of a flow ensemble."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decar.router import Ensemble, Manifest
from decar.router.errors import RequestError
from decar.router.manifest import ExpertCheckpoint
from decar.server.gateway.flow_request import FlowTrace, parse_flow_call


def ensemble(**more: Any) -> Ensemble:
    manifest = Manifest.model_validate(
        {
            "name": "flows",
            "kind": "flow",
            "flow": {"mask_token_id": 5, "steps": 8, "order": "confident"},
            "experts": [{"name": name, "path": name, "prior": 1} for name in ("a", "b")],
            **more,
        }
    )
    experts = tuple(
        ExpertCheckpoint(entry.name, Path(entry.path), entry.prior, {"vocab_size": 6})
        for entry in manifest.experts
    )
    return Ensemble(Path("nowhere"), manifest, experts)


def test_what_is_not_said_is_the_manifests() -> None:
    call = parse_flow_call(ensemble(), None, None)
    assert (call.flow.steps, call.flow.order, call.flow.schedule, call.flow.block_length) == (
        8,
        "confident",
        "linear",
        None,
    )
    assert (call.posterior, call.scored, call.rule) == (True, True, "velocity")
    call = parse_flow_call(
        ensemble(), None, {"steps": 3, "order": "random", "block_length": 2, "schedule": "cosine"}
    )
    assert (call.flow.steps, call.flow.order, call.flow.schedule, call.flow.block_length) == (
        3,
        "random",
        "cosine",
        2,
    )
    assert call.flow.mask_token_id == 5
    assert call.summary() == {
        **{"experts": [], "leader": None, "degraded": []},
        **{"steps": 3, "order": "random", "block_length": 2, "schedule": "cosine"},
    }


def test_one_expert_alone_may_be_told_how() -> None:
    call = parse_flow_call(ensemble(), "flows/b", {"steps": 2})
    assert np.exp(call.log_weights).tolist() == [0, 1]
    assert (call.flow.steps, call.posterior) == (2, False)
    with pytest.raises(RequestError, match=r"decar\.rule"):
        parse_flow_call(ensemble(), "flows/b", {"steps": 2, "rule": "logit"})


def test_an_expert_may_be_drawn_whatever_says_the_weights() -> None:
    for options in ({"route": "prior"}, {"weights": {"a": 1, "b": 3}}, {}):
        assert parse_flow_call(ensemble(), None, {"sampling": "draw", **options}).draw


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prune": 0.1}, r"decar\.prune is not offered"),
        ({"top_k": 2}, r"decar\.top_k is not offered"),
        ({"steps": 0}, r"decar\.steps"),
        ({"steps": 2**16 + 1}, r"decar\.steps"),
        ({"steps": "3"}, r"decar\.steps"),
        ({"block_length": 1.5}, r"decar\.block_length"),
        ({"order": "rightmost"}, r"decar\.order"),
        ({"orders": "random"}, "did you mean 'order'"),
        ({"sampling": "draw", "rule": "logit"}, r"decar\.sampling"),
        ([], "object"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(options: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        parse_flow_call(ensemble(), None, options)


def test_the_rest_of_a_body_is_read() -> None:
    call = parse_flow_call(ensemble(), None, None)
    call.reads({"max_tokens": None})
    assert not call.bounded
    call.reads({"max_completion_tokens": 3, "echo": False, "tools": []})
    assert call.bounded
    for name, value in (("echo", True), ("tools", [{}])):
        with pytest.raises(RequestError, match=f"{name} is not offered"):
            call.reads({name: value})


def test_a_trace_says_which_step_revealed_a_token() -> None:
    call = parse_flow_call(ensemble(), None, {"trace": True})
    trace = FlowTrace(experts=["a", "b"], weights=[[0.5, 0.5], [0.1, 0.9]], revealed_at=[2, 1])
    call.choices[0] = trace
    assert call.told(trace, slice(1, None)) == {
        "weights": [[0.1, 0.9]],
        "active": ["a", "b"],
        "revealed_at": [1],
    }
    assert call.whole()["revealed_at"] == [2, 1]


@pytest.mark.parametrize("mixing", [{"top_k": 1}, {"prune": 0.1}])
def test_a_manifest_cannot_leave_experts_out(mixing: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="every expert at every step"):
        ensemble(mixing=mixing)
