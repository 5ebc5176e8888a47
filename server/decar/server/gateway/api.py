"""What decar adds to vLLM's OpenAI app: the `decar` object, model ids, /v1/ensemble. Knows HTTP, no engines.

An ASGI middleware takes `decar` out of a request before vLLM sees it, and puts it into the response after.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import pydantic
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from opentelemetry.trace import Tracer
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from decar.router import available_routers
from decar.router.errors import DecarError, RequestError
from decar.server.gateway import playground
from decar.server.gateway.annotate import FAILED, RESPONSES, Annotated
from decar.server.gateway.anthropic import AnthropicErrors
from decar.server.gateway.asgi import path_of
from decar.server.gateway.body import MAX_DEPTH, is_deeper, read_body, replay, with_length
from decar.server.gateway.engine import ExpertDown
from decar.server.gateway.ensemble import EnsembleClient
from decar.server.gateway.errors import error_response, http_error, unavailable
from decar.server.gateway.flow import FlowEnsemble
from decar.server.gateway.gate import GENERATING, FullMiddleware, Gate, GateMiddleware, QueueMiddleware
from decar.server.gateway.middleware import (
    ArrivalMiddleware,
    GuardMiddleware,
    KeyMiddleware,
    has_begun,
    is_admin,
)
from decar.server.gateway.reload import Reloader, ReloadRunning
from decar.server.gateway.request import Call, current_call
from decar.server.gateway.request_id import RequestIdMiddleware, add_request_ids
from decar.server.gateway.routes import OfferedMiddleware, describing_offered
from decar.server.gateway.schemas import (
    EnsembleState,
    ExpertState,
    ModelShown,
    ModelsShown,
    Reloaded,
    Slots,
    Waiting,
    describing_decar,
    error_responses,
)
from decar.server.gateway.tracing import TracingMiddleware, current_trace

logger = logging.getLogger("decar")
_BOOL = pydantic.TypeAdapter(bool)

BEAM_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/invocations"})
"""Where vLLM searches for beams if it is asked to."""
EXPOSED_HEADERS = ("Retry-After", "X-Request-Id")
"""What a page of another origin may read of an answer, beside what browsers let everybody read."""
MAX_BODY_BYTES = 32 * 2**20


def extend(
    app: FastAPI,
    client: EnsembleClient | FlowEnsemble,
    gate: Gate,
    reloader: Reloader,
    keys: Sequence[str],
    admin_key: str | None = None,
    tracer: Tracer | None = None,
    ui: bool = True,
) -> None:
    """Add decar's routes and middleware to vLLM's ``app``.

    Args:
        gate: lets requests in.
        keys: all but /health and the page's files needs one of them, or the admin's; none: nobody is asked.
        admin_key: shows paths and processes to whoever gives it; None: nobody sees them.
        tracer: makes a span of each request that generates; None: nobody wants them.
        ui: offer the page at /.
    """
    theirs = list(app.router.routes)
    app.include_router(routes)
    if ui:
        app.include_router(playground.page())
    ours = app.router.routes[len(theirs) :]
    app.router.routes[:] = [*ours, *theirs]  # the first that fits answers
    app.state.ensemble_client = client
    app.state.ensemble_reloader = reloader
    app.add_exception_handler(HTTPException, http_error)  # vLLM's own leaves out what Starlette raises
    app.openapi = describing_decar(describing_offered(app.openapi), client.options)  # type: ignore[method-assign]
    # CORS's headers go on every answer, errors and refused keys included, and a browser asks without a key.
    cors = [middleware for middleware in app.user_middleware if middleware.cls is CORSMiddleware]
    for each in cors:
        each.kwargs["expose_headers"] = EXPOSED_HEADERS
    add_request_ids(logger)
    app.user_middleware[:] = [
        Middleware(RequestIdMiddleware),
        *([Middleware(TracingMiddleware, tracer=tracer)] if tracer is not None else []),
        *cors,
        Middleware(AnthropicErrors),
        Middleware(GateMiddleware, gate=gate),
        Middleware(GuardMiddleware, handler=app.exception_handlers.get(Exception)),
        Middleware(ArrivalMiddleware, thread=client.thread),
        Middleware(KeyMiddleware, tokens=keys, admin=admin_key, public=playground.FILES if ui else ()),
        Middleware(FullMiddleware, queue=client.queue),
        Middleware(OfferedMiddleware),
        *(middleware for middleware in app.user_middleware if middleware not in cors),
        # Innermost, so that vLLM's authentication has let the request pass before its body is read.
        Middleware(DecarMiddleware, served=client),
        Middleware(QueueMiddleware, queue=client.queue),
    ]
    app.middleware_stack = app.build_middleware_stack()  # vLLM's app has already built its own


routes = APIRouter()


@routes.get("/v1/models", responses={200: {"model": ModelsShown}})
async def models(request: Request) -> JSONResponse:
    """The ensemble, and each expert alone."""
    return JSONResponse({"object": "list", "data": await _model_cards(request)})


@routes.get(
    "/v1/models/{model_id:path}",
    responses={200: {"model": ModelShown}, **error_responses(status_404="There is no such model")},
)
async def model(model_id: str, request: Request) -> JSONResponse:
    """One model, as `client.models.retrieve` asks."""
    for card in await _model_cards(request):
        if card["id"] == model_id:
            return JSONResponse(card)
    return error_response(f"The model `{model_id}` does not exist.", 404, "model", "NotFoundError")


async def _model_cards(request: Request) -> list[dict[str, Any]]:
    """vLLM's cards, whose ``root`` is a path for the admin alone."""
    shown = await request.app.state.openai_serving_models.show_available_models()
    cards: list[dict[str, Any]] = [card.model_dump() for card in shown.data]
    return cards if is_admin(request.scope) else [{**card, "root": card["id"]} for card in cards]


@routes.get("/v1/ensemble", response_model_exclude_unset=True)
async def ensemble(request: Request) -> EnsembleState:
    """The manifest, each expert's health, slots in use, what engines counted, whether they read images, and defaults;
    for the admin also where experts lie and run."""
    client: EnsembleClient | FlowEnsemble = request.app.state.ensemble_client
    manifest, leads = client.ensemble.manifest, client.leads()
    experts = []
    for entry, checkpoint, seat in zip(
        manifest.experts, client.ensemble.experts, client.seats.of, strict=True
    ):
        expert = client.experts[seat]
        shown = ExpertState(
            name=expert.name,
            model=f"{client.ensemble.name}/{expert.name}",
            prior=entry.prior,
            up=expert.up,
            leads=leads[seat],
            lockstep=client.plane.blocks[seat].counted(),
        )
        if is_admin(request.scope):
            shown.pid, shown.path = expert.engine.pid, str(checkpoint.path)
        experts.append(shown)
    return EnsembleState(
        object="ensemble",
        name=client.ensemble.name,
        kind=manifest.kind,
        experts=experts,
        routes=list(available_routers(client.ensemble)),
        images=all(checkpoint.reads_images for checkpoint in client.ensemble.experts),
        defaults=client.defaults(),
        slots=Slots(total=client.slots.total, in_use=client.slots.in_use),
        queue=Waiting(waiting=client.queue.waiting, length=client.queue.length),
    )


@routes.post(
    "/v1/ensemble/reload",
    responses={
        200: {"model": Reloaded},
        **error_responses(
            status_400="What there is now cannot be served, and nothing is changed",
            status_403="It is for the admin",
            status_409="Another reload runs",
            status_500="It has ended early",
        ),
    },
)
async def reload(request: Request) -> JSONResponse:
    """Read the ensemble's directory anew, and exchange what has changed; answers when that is done."""
    client: EnsembleClient | FlowEnsemble = request.app.state.ensemble_client
    client.thread.arrived()  # it takes as long as engines take to start
    reloader: Reloader = request.app.state.ensemble_reloader
    try:
        reloaded = await reloader.reload()
    except ReloadRunning as error:
        return error_response(str(error), 409, None, "ConflictError")
    except DecarError as error:
        return error_response(f"nothing is changed: {error}", 400, None)
    if reloaded.failed is not None:
        return error_response(str(reloaded), 500, None, "InternalServerError")
    answer = Reloaded(
        exchanged=list(reloaded.exchanged),
        added=list(reloaded.added),
        removed=list(reloaded.removed),
        message=str(reloaded),
    )
    return JSONResponse(answer.model_dump())


class Served(Protocol):
    """What knows what is served now: `EnsembleClient`, `FlowEnsemble`."""

    def call_of(self, model: str | None, options: Any) -> Call: ...


class DecarMiddleware:
    """Carries the `decar` object between a client and the `Call` that its request becomes."""

    def __init__(self, app: ASGIApp, served: Served):
        self.app = app
        self.served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        path = path_of(scope)
        try:
            body = await read_body(receive, MAX_BODY_BYTES)
        except ClientDisconnect:
            return
        if body is None:
            message = f"the request body is larger than {MAX_BODY_BYTES // 2**20} MiB"
            refused = error_response(message, 413, None)
            refused.headers["connection"] = "close"  # what is left of it is not read
            return await refused(scope, receive, send)
        try:
            fields = json.loads(body)
            too_deep = is_deeper(fields, body)
        except RecursionError:
            too_deep = True
        except ValueError:
            fields, too_deep = None, False  # vLLM answers what is no JSON object
        if too_deep:
            message = f"the request body has more than {MAX_DEPTH} levels of lists and objects"
            return await error_response(message, 400, None)(scope, receive, send)
        call = None
        if isinstance(fields, dict):
            try:
                call = self._call_of(path, fields, fields.pop("decar", None))
            except RequestError as error:
                return await error_response(str(error), 400, error.param)(scope, receive, send)
            current_call.set(call)
            trace = current_trace.get()
            if trace is not None:
                trace.asked(call, _text(fields.get("model")))
            body = json.dumps(fields).encode()
            if path in GENERATING:
                send = Annotated(path, call, send)
        await self._answer(call, with_length(scope, len(body)), replay(body, receive), send)

    def _call_of(self, path: str, fields: dict[str, Any], options: Any) -> Call:
        """
        Raises:
            RequestError: says which field is wrong, or has nothing that it could say to this path, and how to mend it.
        """
        if options is not None and path not in GENERATING:
            raise RequestError(
                f"{path} generates nothing that decar could be about: leave decar out", "decar"
            )
        call = self.served.call_of(_text(fields.get("model")), options)
        if path in GENERATING:
            call.reads(fields)
        call.beams = path in BEAM_PATHS and _is_true(fields.get("use_beam_search"))
        if call.beams and (call.trace or call.draw):
            field = "decar.trace" if call.trace else "decar.sampling"
            raise RequestError(f"{field} cannot follow a beam search: leave one of them out", field)
        if call.trace and path == RESPONSES and _is_true(fields.get("background")):
            raise RequestError(
                "decar.trace comes with an answer, and background has it fetched later: leave one of them out",
                "decar.trace",
            )
        return call

    async def _answer(self, call: Call | None, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the app answer; what it trips over before it has anything generated is the request's fault.

        vLLM looks at a body in many places before it knows the types of what is in it.
        """
        try:
            await self.app(scope, receive, send)
        except (OSError, MemoryError):
            raise
        except ExpertDown as down:
            if not has_begun(scope):
                await unavailable(str(down))(scope, receive, send)
            elif not (isinstance(send, Annotated) and await send.ended_with(str(down), 503)):
                raise
        except Exception as error:
            if has_begun(scope) and isinstance(send, Annotated):
                await send.ended_with(FAILED, 500)
            if has_begun(scope) or (call is not None and call.prompts):
                raise
            reason = f"{type(error).__name__}: {error}"
            logger.warning("%s is refused: vLLM cannot read it (%s)", scope["path"], reason)
            await error_response(f"the request cannot be read ({reason})", 400, None)(scope, receive, send)


def _is_true(value: Any) -> bool:
    """Whether vLLM takes ``value`` for true; what it takes for nothing, it refuses."""
    with contextlib.suppress(pydantic.ValidationError):
        return _BOOL.validate_python(value)
    return False


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
