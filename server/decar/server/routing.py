"""What a request asks of the ensemble, and what it gets: the `decar` object. Knows no engines.

K experts, T tokens.
"""

from __future__ import annotations

import difflib
import math
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import pydantic
from pydantic import BaseModel, ConfigDict, Strict, StrictBool

from decar.router import Ensemble, log_prior
from decar.router.errors import RequestError
from decar.router.manifest import Route, Rule, describe_validation_error


class DecarOptions(BaseModel):
    """The request's `decar` object. All fields are optional; null is the same as absent."""

    model_config = ConfigDict(extra="forbid")

    route: Route | None = None
    weights: dict[str, Annotated[float, Strict()]] | None = None
    rule: Rule | None = None
    trace: StrictBool | None = None


@dataclass
class ChoiceTrace:
    """What happened to one choice: its experts, its leader, and the weights that mixed each token."""

    experts: list[str]
    leader: str
    weights: list[list[float]] = field(default_factory=list)  # [T][K] in manifest order
    sent: int = 0  # tokens whose weights a stream has already sent


@dataclass
class Call:
    """One HTTP request's way through the ensemble. Made by the gateway, filled in by `EnsembleClient`.

    Attributes:
        log_weights: float64 [K] to start from.
        posterior: whether the prompt and every token move them on.
        choices: by choice index, once routed.
    """

    log_weights: np.ndarray
    rule: Rule = "velocity"
    posterior: bool = False
    trace: bool = False
    choices: dict[int, ChoiceTrace] = field(default_factory=dict)
    prompts: int = 0  # prompts seen so far: a completion request may bring several

    def summary(self) -> dict[str, Any]:
        """The `decar` object of a response."""
        traces = [self.choices[index] for index in sorted(self.choices)]
        experts = dict.fromkeys(name for trace in traces for name in trace.experts)
        return {"experts": list(experts), "leader": traces[0].leader if traces else None, "degraded": []}


current_call: ContextVar[Call | None] = ContextVar("decar_call", default=None)


def parse_call(ensemble: Ensemble, model: str | None, options: Any) -> Call:
    """Turn a request's `model` and `decar` fields into a `Call`.

    Raises:
        RequestError: says which field is wrong and how to mend it.
    """
    parsed = _validated(options)
    trace = bool(parsed.trace)
    alone = expert_of(ensemble, model)
    if alone is not None:
        if parsed.weights is not None or parsed.route is not None or parsed.rule is not None:
            raise RequestError(
                f"model {model!r} is one expert alone: leave decar.weights, decar.route and decar.rule out, "
                f"or ask for model {ensemble.name!r}",
                "decar",
            )
        log_weights = log_prior([float(name == alone) for name in ensemble.expert_names])
        return Call(log_weights, trace=trace)
    rule = parsed.rule or ensemble.manifest.mixing.rule
    if parsed.weights is not None:
        if parsed.route is not None:
            raise RequestError("decar.weights fixes the weights: leave decar.route out", "decar.route")
        return Call(_explicit(ensemble, parsed.weights), rule, trace=trace)
    route = parsed.route or ensemble.manifest.router.kind
    priors = log_prior([expert.prior for expert in ensemble.experts])
    return Call(priors, rule, posterior=route == "posterior" and len(priors) > 1, trace=trace)


def expert_of(ensemble: Ensemble, model: str | None) -> str | None:
    """The expert that model id ``NAME/EXPERT`` names; None for every other id."""
    prefix, _, expert = (model or "").partition("/")
    return expert if prefix == ensemble.name and expert in ensemble.expert_names else None


def model_ids(ensemble: Ensemble) -> list[str]:
    """Ids the server answers to: the ensemble's, then each expert's."""
    return [ensemble.name, *(f"{ensemble.name}/{name}" for name in ensemble.expert_names)]


def _validated(options: Any) -> DecarOptions:
    if options is None:
        return DecarOptions()
    if not isinstance(options, dict):
        raise RequestError('decar must be an object such as {"route": "posterior"}', "decar")
    try:
        return DecarOptions.model_validate(options)
    except pydantic.ValidationError as error:
        where = ".".join(["decar", *(str(part) for part in error.errors()[0]["loc"])])
        raise RequestError(f"decar.{describe_validation_error(error, DecarOptions)}", where) from None


def _explicit(ensemble: Ensemble, weights: dict[str, float]) -> np.ndarray:
    names = ensemble.expert_names
    for name, weight in weights.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the experts are {', '.join(map(repr, names))}"
            raise RequestError(
                f"decar.weights names {name!r}, which is no expert of {ensemble.name!r}; {hint}",
                "decar.weights",
            )
        if not math.isfinite(weight) or weight < 0:
            raise RequestError(
                f"decar.weights.{name} is {weight}; give a number that is zero or more", "decar.weights"
            )
    if not sum(weights.values()) > 0:
        raise RequestError(
            "decar.weights are all zero; give at least one expert a positive weight", "decar.weights"
        )
    return log_prior([weights.get(name, 0.0) for name in names])
