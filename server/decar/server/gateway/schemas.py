"""What decar's own routes answer, and what /openapi.json says of it and of the `decar` object. Knows no engines."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from decar.router.manifest import Kind, Order, RouterKind, Rule, Schedule, Scope, Start
from decar.server.gateway.gate import GENERATING
from decar.server.gateway.request import DecarOptions

_COMPONENTS = "#/components/schemas/"


class _Described(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class Wire(_Described):
    """What rows that went to another host in part may have changed in an answer, so far: upper bounds of the total
    variation of mixtures, before temperature, penalties, grammar and truncation act on them. In a stream, the chunk
    with the finish reason has the whole answer's."""

    rows: int
    """Logits that went of a row, the best ones."""
    token: float
    """Of one token's mixture, where that is most."""
    answer: float
    """Of all tokens of a choice, added up, where that is most; of beams, of all together."""


class DecarAnswer(_Described):
    """The `decar` object of an answer."""

    experts: list[str]
    """Those that took part, in the manifest's order."""
    leader: str | None
    """Who began to lead the first choice; null before anything has been generated."""
    degraded: list[str]
    """Those that should have taken part and were down."""
    wire: Wire | None = Field(default=None)
    """Of a server with `--wire-rows`."""
    weights: list[list[float]] = Field(default=[])
    """With `trace`, where an answer has no choices: [tokens][experts], in the manifest's order."""
    leaders: list[str] = Field(default=[])
    """The same: who led each token."""
    active: list[str] = Field(default=[])
    """The same: who was active at the beginning."""
    revealed_at: list[int] = Field(default=[])
    """The same, of a flow ensemble, in place of ``leaders``: the step that revealed each token, from 1."""


class ExpertState(_Described):
    """One expert of `/v1/ensemble`."""

    name: str
    model: str
    """The model id by which it answers alone."""
    prior: float
    up: bool
    leads: int
    """Requests that it leads now."""
    lockstep: dict[str, int]
    """What its engine has counted."""
    pid: int | None = None
    """For the admin."""
    path: str | None = None
    """For the admin."""


class Defaults(_Described):
    """What a request gets that does not say."""

    route: RouterKind
    scope: Scope | None = None
    start: Start | None = None
    rule: Rule
    top_k: int | None
    prune: float


class FlowDefaults(_Described):
    """The same of a flow ensemble."""

    route: RouterKind
    scope: Scope | None = None
    start: Start | None = None
    rule: Rule
    mask_token_id: int
    """Of the token that stands where nothing is known."""
    schedule: Schedule
    steps: int | None
    block_length: int | None
    order: Order
    prompt_chunks: int


class Slots(BaseModel):
    """Of requests that run."""

    total: int
    in_use: int


class Waiting(BaseModel):
    """Requests that wait, and how many may."""

    waiting: int
    length: int


class EnsembleState(_Described):
    """The answer of `/v1/ensemble`."""

    object: str = "ensemble"
    name: str
    kind: Kind
    experts: list[ExpertState]
    routes: list[str]
    """Values that `decar.route` may have here."""
    images: bool
    """Whether experts read images."""
    defaults: Defaults | FlowDefaults
    slots: Slots
    queue: Waiting


class Reloaded(_Described):
    """The answer of `/v1/ensemble/reload`: experts by name."""

    object: str = "ensemble.reload"
    exchanged: list[str]
    added: list[str]
    removed: list[str]
    message: str


class ModelShown(BaseModel):
    """A model id that the server answers to, with what vLLM says of it."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = ""
    root: str | None = None
    max_model_len: int | None = None


class ModelsShown(BaseModel):
    """The answer of `/v1/models`."""

    object: str = "list"
    data: list[ModelShown]


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class Error(BaseModel):
    """An error in the form of OpenAI's API."""

    error: ErrorInfo


def error_responses(**described: str) -> dict[int | str, dict[str, Any]]:
    """FastAPI's ``responses`` of a route, from `status_400="why"`."""
    return {
        int(status.removeprefix("status_")): {"model": Error, "description": why}
        for status, why in described.items()
    }


def describing_decar(
    describe: Callable[[], dict[str, Any]], options: type[DecarOptions] = DecarOptions
) -> Callable[[], dict[str, Any]]:
    """An app's description, with the `decar` object of the requests that take it, ``options``, and of their answers."""

    def described() -> dict[str, Any]:
        schema = deepcopy(describe())
        components = schema.setdefault("components", {}).setdefault("schemas", {})
        for name, model in (("DecarOptions", options), ("DecarAnswer", DecarAnswer)):
            components[name] = model.model_json_schema(ref_template=_COMPONENTS + "{model}")
        paths = {path: schema["paths"][path]["post"] for path in GENERATING if path in schema["paths"]}
        asked = {path: _body_of(route) for path, route in paths.items()}
        for body in filter(None, asked.values()):
            given = {"anyOf": [{"$ref": f"{_COMPONENTS}DecarOptions"}, {"type": "null"}], "default": None}
            components[body].setdefault("properties", {})["decar"] = given
        for path, route in paths.items():
            if asked[path] is None:  # /invocations, which vLLM does not describe
                forms = [asked.get(other) for other in ("/v1/chat/completions", "/v1/completions")]
                refs = [{"$ref": _COMPONENTS + form} for form in forms if form]
                route["requestBody"] = {
                    "required": True,
                    "content": {"application/json": {"schema": {"anyOf": refs}}},
                }
            answer = route.setdefault("responses", {}).setdefault("200", {"description": "The answer"})
            answer.setdefault("content", {})["application/json"] = {
                "schema": {
                    "type": "object",
                    "required": ["decar"],
                    "properties": {"decar": {"$ref": f"{_COMPONENTS}DecarAnswer"}},
                }
            }
        return schema

    return described


def _body_of(route: dict[str, Any]) -> str | None:
    """The component that a route's request body is."""
    content = route.get("requestBody", {}).get("content", {}).get("application/json", {})
    reference = content.get("schema", {}).get("$ref")
    return None if reference is None else str(reference).removeprefix(_COMPONENTS)
