"""What a request asks of the ensemble, and what it gets: the `decar` object. Knows no engines.

K experts, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import numpy as np
import pydantic
from pydantic import BaseModel, ConfigDict, Field, Strict, StrictBool

from decar.router import Ensemble, active_experts, available_routers, log_prior
from decar.router.errors import RequestError, did_you_mean
from decar.router.manifest import RouterKind, Rule, Scope, Start, Trained, describe_validation_error
from decar.server.gateway.seats import Seats

if TYPE_CHECKING:
    from decar.server.gateway.trained_routers import TrainedRouters

Sampling = Literal["mixture", "draw"]
OnExpertLoss = Literal["renormalise", "fail"]


class DecarOptions(BaseModel):
    """The request's `decar` object. All fields are optional; null is the same as absent."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    route: RouterKind | None = None
    """Where weights come from: the text so far (posterior), each expert's share of the data (prior), or a trained
    router."""
    scope: Scope | None = None
    """What the posterior goes by: prompt and output (full), or the output alone."""
    start: Start | None = None
    """With scope "output": what says the weights before the first token."""
    weights: dict[str, Annotated[float, Strict()]] | None = None
    """Fixed weights by expert, instead of a route."""
    rule: Rule | None = None
    """Arithmetic mixture (velocity), or normalised geometric mean (logit)."""
    sampling: Sampling | None = None
    """Sample the mixture, or draw one expert by the weights, which answers alone."""
    top_k: Annotated[int, Strict(), Field(ge=1)] | None = None
    """Only so many of the heaviest experts after the prompt."""
    prune: Annotated[float, Strict(), Field(ge=0, lt=1, allow_inf_nan=False)] | None = None
    """How far the answer's distribution may move, in total variation, for experts to be released on the way."""
    on_expert_loss: OnExpertLoss | None = None
    """Whether the others go on when an expert is lost, or the answer fails."""
    trace: StrictBool | None = None
    """Return the weights that mixed each token, and who led."""

    @property
    def routing(self) -> list[str]:
        """The fields that are given of those that say which experts take part, and how."""
        return sorted(self.model_dump(exclude={"trace", "on_expert_loss"}, exclude_none=True))


Options = TypeVar("Options", bound=DecarOptions)


@dataclass
class ChoiceTrace:
    """What happened to one choice: the experts and the leader it began with, and what mixed each token."""

    experts: list[str]
    leader: str
    weights: list[list[float]] = field(default_factory=list)  # [T][K] by place; 0: not active
    leaders: list[str] = field(default_factory=list)  # [T]
    tails: list[float] = field(default_factory=list)  # [T], see `WeightsReader.tails`
    sent: int = 0  # tokens whose weights a stream has already sent


@dataclass
class Call:
    """One HTTP request's way through the ensemble. Made by the gateway, filled in by `EnsembleClient`.

    Attributes:
        log_weights: float64 [K] to start from; once `EnsembleClient.call_of` has made it, by place.
        posterior: whether every token moves them on.
        scored: whether the prompt does.
        router: the trained router that looks at the prompt first, and takes the place of ``log_weights``.
        draw: decode one expert alone, drawn by the weights.
        top_k, prune: which experts stay active.
        on_expert_loss: whether to go on without an expert that is down.
        model: the id that was asked for; None: the gateway's own.
        beams: vLLM searches for beams, and asks for each one's next token as for a new prompt's.
        counts_shown: whether the client of a stream that is traced sees the usage in each chunk.
        wire_rows: how many logits of a row go to another host; 0: all.
        seats: the experts' places, if they are not in manifest order.
        trained_routers: those of the ensemble that the request is for.
        warms: an expert that may take part though it is not up yet, since this warms it.
        degraded: names of experts that should have taken part and were down, in the order that this was found in.
        choices: by choice index, once routed.
    """

    log_weights: np.ndarray
    rule: Rule = "velocity"
    model: str | None = None
    posterior: bool = False
    scored: bool = False
    router: Trained | None = None
    draw: bool = False
    top_k: int | None = None
    prune: float = 0.0
    trace: bool = False
    beams: bool = False
    counts_shown: bool = False
    on_expert_loss: OnExpertLoss = "renormalise"
    wire_rows: int = 0
    seats: Seats | None = None
    trained_routers: TrainedRouters | None = field(default=None, repr=False)
    warms: int | None = None
    degraded: dict[str, None] = field(default_factory=dict)
    choices: dict[int, ChoiceTrace] = field(default_factory=dict)
    prompts: int = 0  # prompts seen so far: a completion request may bring several

    def by_expert(self, weights: list[list[float]]) -> list[list[float]]:
        """Weights of tokens, in manifest order."""
        return weights if self.seats is None else self.seats.by_expert(weights)

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Some experts' names, in manifest order."""
        return list(names) if self.seats is None else self.seats.in_order(names)

    def summary(self, one_answer: bool = False) -> dict[str, Any]:
        """The `decar` object of a response, whose choices are ``one_answer`` or so many."""
        traces = self._in_turn()
        experts = dict.fromkeys(name for trace in traces for name in trace.experts)
        leader = traces[0].leader if traces else None
        summary: dict[str, Any] = {
            "experts": self.in_order(experts),
            "leader": leader,
            "degraded": list(self.degraded),
        }
        if self.wire_rows:
            answers = [sum(trace.tails) for trace in traces]
            summary["wire"] = {
                "rows": self.wire_rows,
                "token": max((tail for trace in traces for tail in trace.tails), default=0.0),
                # Of beams each token is a choice.
                "answer": sum(answers) if one_answer or self.beams else max(answers, default=0.0),
            }
        return summary

    def whole(self) -> dict[str, Any]:
        """The `decar` object of a response that has no choices: with the trace, if one is asked for.

        What is generated for it in several turns, between which tools are called, is one answer.
        """
        summary = self.summary(one_answer=True)
        if not self.trace:
            return summary
        traces = self._in_turn()
        return {
            **summary,
            "weights": self.by_expert([row for trace in traces for row in trace.weights]),
            "leaders": [name for trace in traces for name in trace.leaders],
            "active": self.in_order(dict.fromkeys(name for trace in traces for name in trace.experts)),
        }

    def told(self, trace: ChoiceTrace, new: slice) -> dict[str, Any]:
        """The `decar` object of a choice, for its tokens at ``new``."""
        return {
            "weights": self.by_expert(trace.weights[new]),
            "leaders": trace.leaders[new],
            "active": self.in_order(trace.experts),
        }

    def reads(self, fields: Mapping[str, Any]) -> None:
        """What else the request's body says that concerns decar: here, nothing.

        Raises:
            RequestError: something that cannot be answered.
        """

    def _in_turn(self) -> list[ChoiceTrace]:
        return [self.choices[index] for index in sorted(self.choices)]

    @property
    def only_expert(self) -> int | None:
        """The one expert that may answer, as the request asks; None where there are several."""
        active = active_experts(self.log_weights)
        return active[0] if self.router is None and len(active) == 1 else None


current_call: ContextVar[Call | None] = ContextVar("decar_call", default=None)


def model_asked_for() -> str | None:
    """The model id that the current request is for; None outside of one."""
    call = current_call.get()
    return None if call is None else call.model


def asks_for_counts(shown: bool) -> bool:
    """Whether the chunks of the current call's stream have to say how many tokens there are: a trace goes by that.

    Args:
        shown: whether the client is to see it.
    """
    call = current_call.get()
    if call is None or not call.trace:
        return shown
    call.counts_shown = shown
    return True


def parse_call(ensemble: Ensemble, model: str | None, options: Any) -> Call:
    """Turn a request's `model` and `decar` fields into a `Call`.

    Raises:
        RequestError: says which field is wrong and how to mend it.
    """
    call = routed(ensemble, model, validated(options, DecarOptions))
    if call.draw:
        _check_draw(call)
    return call


def routed(ensemble: Ensemble, model: str | None, parsed: DecarOptions) -> Call:
    """A `Call` with weights, or with what says them.

    Raises:
        RequestError: as `parse_call`.
    """
    trace = bool(parsed.trace)
    asked = model or ensemble.name
    alone = expert_of(ensemble, model)
    if alone is not None:
        if parsed.routing:
            raise RequestError(
                f"model {model!r} is one expert alone: leave decar.{parsed.routing[0]} out, "
                f"or ask for model {ensemble.name!r}",
                "decar",
            )
        log_weights = log_prior([float(name == alone) for name in ensemble.expert_names])
        return Call(log_weights, model=asked, trace=trace)  # which nobody else can answer
    mixing, router = ensemble.manifest.mixing, ensemble.manifest.router
    call = Call(
        log_prior([expert.prior for expert in ensemble.experts]),
        parsed.rule or mixing.rule,
        model=asked,
        draw=parsed.sampling == "draw",
        top_k=parsed.top_k or mixing.top_k,
        prune=mixing.prune if parsed.prune is None else parsed.prune,
        trace=trace,
        on_expert_loss=parsed.on_expert_loss or "renormalise",
    )
    if parsed.weights is not None:
        if parsed.route is not None:
            raise RequestError("decar.weights fixes the weights: leave decar.route out", "decar.route")
        call.log_weights = _explicit(ensemble, parsed.weights)
        call.top_k, call.prune = parsed.top_k, parsed.prune or 0.0  # the manifest's are for what it routes
    elif parsed.route not in (None, "posterior") or (parsed.route is None and router.kind != "posterior"):
        call.router = _trained(ensemble, parsed.route or router.kind, "decar.route")
    else:
        _route_by_posterior(ensemble, parsed, call)
    if not call.posterior:
        for field_name in ("scope", "start"):
            if getattr(parsed, field_name) is not None:
                raise RequestError(
                    f"decar.{field_name} belongs to the posterior router: leave it out, or set decar.route to "
                    '"posterior"',
                    f"decar.{field_name}",
                )
    return call


def _route_by_posterior(ensemble: Ensemble, parsed: DecarOptions, call: Call) -> None:
    router = ensemble.manifest.router
    scope = parsed.scope or (router.scope if router.kind == "posterior" else "full")
    if scope == "full" and parsed.start is not None:
        raise RequestError(
            'decar.start is where decar.scope "output" begins: set that too, or leave decar.start out',
            "decar.start",
        )
    call.posterior = len(ensemble.experts) > 1
    call.scored = call.posterior and scope == "full"
    if scope == "output":
        call.router = _trained(ensemble, parsed.start or router.start, "decar.start")


def _trained(ensemble: Ensemble, kind: RouterKind, field_name: str) -> Trained | None:
    """``kind`` if it is a router that this ensemble has been given by training; None for the prior."""
    if kind in ("prior", "posterior"):
        return None
    available = available_routers(ensemble)
    if kind not in available:
        raise RequestError(
            f"{field_name} {kind!r} is not trained for {ensemble.name!r}, which has {', '.join(available)}",
            field_name,
        )
    return cast(Trained, kind)


def _check_draw(call: Call) -> None:
    """Drawing an expert once samples the mixture whose weights follow the posterior, and no other."""
    if not call.posterior and len(active_experts(call.log_weights)) > 1:
        raise RequestError(
            'decar.sampling "draw" is exact only where every token moves the weights on: set decar.route to '
            '"posterior" (or leave decar.weights out), or decar.sampling to "mixture"',
            "decar.sampling",
        )
    check_drawn_rule(call)


def check_drawn_rule(call: Call) -> None:
    """
    Raises:
        RequestError: an expert is to be drawn, and the rule is not that of the mixture which that samples.
    """
    if call.draw and call.rule != "velocity":
        raise RequestError(
            'decar.sampling "draw" samples the arithmetic mixture: set decar.rule to "velocity", or decar.sampling to '
            '"mixture"',
            "decar.sampling",
        )


def expert_of(ensemble: Ensemble, model: str | None) -> str | None:
    """The expert that model id ``NAME/EXPERT`` names; None for every other id."""
    prefix, _, expert = (model or "").partition("/")
    return expert if prefix == ensemble.name and expert in ensemble.expert_names else None


def model_ids(ensemble: Ensemble) -> list[str]:
    """Ids the server answers to: the ensemble's, then each expert's."""
    return [ensemble.name, *(f"{ensemble.name}/{name}" for name in ensemble.expert_names)]


def validated(options: Any, model: type[Options]) -> Options:
    """A request's `decar` object.

    Raises:
        RequestError: it is none.
    """
    if options is None:
        return model()
    if not isinstance(options, dict):
        raise RequestError('decar must be an object such as {"route": "posterior"}', "decar")
    try:
        return model.model_validate(options)
    except pydantic.ValidationError as error:
        where = ".".join(["decar", *(str(part) for part in error.errors()[0]["loc"])])
        raise RequestError(f"decar.{describe_validation_error(error, model)}", where) from None


def _explicit(ensemble: Ensemble, weights: dict[str, float]) -> np.ndarray:
    names = ensemble.expert_names
    for name, weight in weights.items():
        if name not in names:
            hint = did_you_mean(name, names) or f"; the experts are {', '.join(map(repr, names))}"
            raise RequestError(
                f"decar.weights names {name!r}, which is no expert of {ensemble.name!r}{hint}",
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
