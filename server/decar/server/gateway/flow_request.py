"""What a request asks of a flow ensemble, and what it gets: the `decar` object. Knows no engines.

K experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, Strict

from decar.router import Ensemble
from decar.router.errors import RequestError
from decar.router.flow import NOISE_STRIDE
from decar.router.manifest import Flow, Order, Schedule
from decar.server.gateway.request import (
    Call,
    ChoiceTrace,
    DecarOptions,
    check_drawn_rule,
    routed,
    validated,
)

Count = Annotated[int, Strict(), Field(ge=1, le=NOISE_STRIDE)]
HOW = ("steps", "block_length", "order", "schedule")
"""What a request says of how tokens are revealed."""
_EVERY_EXPERT = "every expert with weight is asked for the rows of each step; leave it out"
_NOT_OFFERED = {"top_k": _EVERY_EXPERT, "prune": _EVERY_EXPERT}
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


class FlowOptions(DecarOptions):
    """The `decar` object of a request to a flow ensemble. All fields are optional; null is the same as absent."""

    steps: Count | None = None
    """In how many steps the whole answer is revealed; absent: the manifest's, which may be one for each token."""
    block_length: Count | None = None
    """How many masked tokens are revealed before any to their right."""
    order: Order | None = None
    """Which are revealed first: random ones, the most confident, or the leftmost."""
    schedule: Schedule | None = None
    """How much is revealed by when: evenly (linear), or late (cosine)."""

    @property
    def how(self) -> dict[str, Any]:
        return self.model_dump(include=set(HOW), exclude_none=True)

    @property
    def routing(self) -> list[str]:
        return [name for name in super().routing if name not in HOW]


@dataclass(kw_only=True)
class FlowTrace(ChoiceTrace):
    """What happened to one choice: also the step that revealed each token, from 1; 0 for one that the prompt has."""

    leader: str = ""
    revealed_at: list[int] = field(default_factory=list)  # [T]


@dataclass(kw_only=True)
class FlowCall(Call):
    """One HTTP request's way through a flow ensemble.

    Attributes:
        flow: how tokens are revealed.
        bounded: whether the request says how many tokens are to follow its prompt.
    """

    flow: Flow
    bounded: bool = True

    def reads(self, fields: Mapping[str, Any]) -> None:
        for name, why in (
            (
                "echo",
                "a text with mask tokens is answered from the first of them on, with what the prompt has there",
            ),
            ("tools", "a call has a grammar, which is read from left to right"),
        ):
            if fields.get(name):
                raise RequestError(f"{name} is not offered by a flow ensemble: {why}; leave it out", name)
        self.bounded = any(fields.get(name) is not None for name in _LENGTHS)

    def summary(self, one_answer: bool = False) -> dict[str, Any]:
        return {**super().summary(one_answer), "leader": None, **self.flow.model_dump(include=set(HOW))}

    def whole(self) -> dict[str, Any]:
        whole = super().whole()
        if self.trace:
            del whole["leaders"]
            whole["revealed_at"] = [step for trace in self._in_turn() for step in _revealed_at(trace)]
        return whole

    def told(self, trace: ChoiceTrace, new: slice) -> dict[str, Any]:
        told = super().told(trace, new)
        del told["leaders"]
        return {**told, "revealed_at": _revealed_at(trace)[new]}


def _revealed_at(trace: ChoiceTrace) -> list[int]:
    assert isinstance(trace, FlowTrace)
    return trace.revealed_at


def parse_flow_call(ensemble: Ensemble, model: str | None, options: Any) -> FlowCall:
    """Turn a request's `model` and `decar` fields into a `FlowCall`.

    Raises:
        RequestError: says which field is wrong and how to mend it.
    """
    flow = ensemble.manifest.flow
    assert flow is not None, "the manifest of a flow ensemble says how its experts reveal tokens"
    parsed = validated(options, FlowOptions)
    for name, why in _NOT_OFFERED.items():
        if getattr(parsed, name) is not None:
            raise RequestError(f"decar.{name} is not offered by a flow ensemble: {why}", f"decar.{name}")
    call = FlowCall(**vars(routed(ensemble, model, parsed)), flow=flow.model_copy(update=parsed.how))
    check_drawn_rule(call)
    return call
