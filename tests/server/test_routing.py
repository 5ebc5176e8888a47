"""What requests may ask, and what they are told when they may not."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decar.router import Ensemble
from decar.router.errors import RequestError
from decar.router.manifest import ExpertEntry, Manifest, Mixing, RouterEntry
from decar.server.gateway.request import Call, ChoiceTrace, DecarOptions, model_ids, parse_call


@pytest.fixture
def ensemble() -> Ensemble:
    entries = (
        ExpertEntry(name="code", path="code", prior=1),
        ExpertEntry(name="prose", path="prose", prior=3),
    )
    manifest = Manifest(name="demo", experts=entries)
    return Ensemble(Path("demo"), manifest, entries)  # type: ignore[arg-type]


def weights(call: Call) -> list[float]:
    return np.exp(call.log_weights).round(6).tolist()


def test_defaults_are_the_manifests(ensemble: Ensemble) -> None:
    call = parse_call(ensemble, "demo", None)
    assert (call.posterior, call.rule, call.trace) == (True, "velocity", False)
    assert weights(call) == [0.25, 0.75]


def test_prior_explicit_weights_and_one_expert(ensemble: Ensemble) -> None:
    assert weights(parse_call(ensemble, None, {"route": "prior"})) == [0.25, 0.75]
    assert weights(parse_call(ensemble, "demo", {"weights": {"prose": 4, "code": 1}})) == [0.2, 0.8]
    assert weights(parse_call(ensemble, "demo", {"weights": {"prose": 2}})) == [0.0, 1.0]
    assert weights(parse_call(ensemble, "demo/code", {"trace": True})) == [1.0, 0.0]


def test_the_posterior_looks_at_the_prompt_or_does_not(ensemble: Ensemble) -> None:
    full = parse_call(ensemble, "demo", {"route": "posterior"})
    assert (full.posterior, full.scored, full.router) == (True, True, None)
    output = parse_call(ensemble, "demo", {"scope": "output", "start": "prior"})
    assert (output.posterior, output.scored, output.router) == (True, False, None)
    prior = parse_call(ensemble, "demo", {"route": "prior"})
    assert (prior.posterior, prior.scored) == (False, False)


def test_the_manifests_mixing_is_for_what_it_routes(ensemble: Ensemble) -> None:
    mixing = Mixing(rule="logit", top_k=1, prune=0.01)
    router = RouterEntry(kind="posterior", scope="output")
    ensemble.manifest = ensemble.manifest.model_copy(update={"mixing": mixing, "router": router})
    call = parse_call(ensemble, "demo", None)
    assert (call.rule, call.top_k, call.prune, call.scored) == ("logit", 1, 0.01, False)
    assert parse_call(ensemble, "demo", {"prune": 0.0, "scope": "full"}).prune == 0.0
    # Who says the weights says them all.
    explicit = parse_call(ensemble, "demo", {"weights": {"code": 1, "prose": 1}})
    assert (explicit.top_k, explicit.prune) == (None, 0.0)
    alone = parse_call(ensemble, "demo/code", None)
    assert (alone.top_k, alone.prune, alone.draw) == (None, 0.0, False)


def test_one_positive_weight_may_be_drawn(ensemble: Ensemble) -> None:
    assert parse_call(ensemble, "demo", {"sampling": "draw", "weights": {"code": 1}}).draw
    assert parse_call(ensemble, "demo", {"sampling": "draw", "scope": "output"}).draw


def test_null_means_absent(ensemble: Ensemble) -> None:
    nothing = dict.fromkeys(DecarOptions.model_fields)
    assert parse_call(ensemble, "demo", nothing).posterior


@pytest.mark.parametrize(
    ("model", "options", "param", "says"),
    [
        ("demo", {"weights": {"cod": 1}}, "decar.weights", "did you mean 'code'"),
        ("demo", {"weights": {"zebra": 1}}, "decar.weights", "'code', 'prose'"),
        ("demo", {"weights": {"code": -1}}, "decar.weights", "zero or more"),
        ("demo", {"weights": {"code": math.nan}}, "decar.weights", "zero or more"),
        ("demo", {"weights": {"code": math.inf}}, "decar.weights", "zero or more"),
        ("demo", {"weights": {"code": 0.0}}, "decar.weights", "all zero"),
        ("demo", {"weights": {}}, "decar.weights", "all zero"),
        ("demo", {"weights": [1, 2]}, "decar.weights", "dict"),
        ("demo", {"weights": {"code": "0.5"}}, "decar.weights.code", "number"),
        ("demo", {"weights": {"code": True}}, "decar.weights.code", "number"),
        ("demo", {"trace": "yes"}, "decar.trace", "boolean"),
        ("demo", {"wieghts": {"code": 1}}, "decar.wieghts", "did you mean 'weights'"),
        ("demo", {"rule": "mean"}, "decar.rule", "velocity"),
        ("demo", {"route": "oracle"}, "decar.route", "posterior"),
        ("demo", {"route": "prior", "weights": {"code": 1}}, "decar.route", "leave decar.route out"),
        ("demo", "posterior", "decar", "must be an object"),
        ("demo/code", {"weights": {"code": 1}}, "decar", "one expert alone"),
        ("demo/code", {"prune": 0.1}, "decar", "leave decar.prune out"),
        ("demo", {"route": "classifier"}, "decar.route", "which has posterior, prior"),
        ("demo", {"scope": "output", "start": "centroid"}, "decar.start", "not trained"),
        ("demo", {"scope": "all"}, "decar.scope", "'full' or 'output'"),
        ("demo", {"scope": "output", "route": "prior"}, "decar.scope", "belongs to the posterior"),
        ("demo", {"scope": "full", "weights": {"code": 1}}, "decar.scope", "belongs to the posterior"),
        ("demo", {"start": "prior"}, "decar.start", "decar.scope"),
        ("demo", {"top_k": 0}, "decar.top_k", "greater than or equal to 1"),
        ("demo", {"top_k": True}, "decar.top_k", "integer"),
        ("demo", {"prune": 1.0}, "decar.prune", "less than 1"),
        ("demo", {"prune": -0.1}, "decar.prune", "greater than or equal to 0"),
        ("demo", {"prune": math.nan}, "decar.prune", "finite"),
        ("demo", {"sampling": "greedy"}, "decar.sampling", "'mixture' or 'draw'"),
        ("demo", {"sampling": "draw", "route": "prior"}, "decar.sampling", "posterior"),
        ("demo", {"sampling": "draw", "weights": {"code": 1, "prose": 1}}, "decar.sampling", "posterior"),
        ("demo", {"sampling": "draw", "rule": "logit"}, "decar.sampling", "velocity"),
    ],
)
def test_bad_options_name_the_field_and_the_fix(
    ensemble: Ensemble, model: str, options: Any, param: str, says: str
) -> None:
    with pytest.raises(RequestError, match="decar") as raised:
        parse_call(ensemble, model, options)
    assert raised.value.param == param
    assert says in str(raised.value)


def test_ids_are_the_ensembles_then_the_experts(ensemble: Ensemble) -> None:
    assert model_ids(ensemble) == ["demo", "demo/code", "demo/prose"]


def test_a_summary_unites_the_choices_and_is_json(ensemble: Ensemble) -> None:
    call = parse_call(ensemble, "demo", None)
    call.choices = {1: ChoiceTrace(["prose"], "prose"), 0: ChoiceTrace(["code", "prose"], "code")}
    assert json.loads(json.dumps(call.summary())) == {
        "experts": ["code", "prose"],
        "leader": "code",
        "degraded": [],
    }
