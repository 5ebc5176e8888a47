"""What decar adds to vLLM's OpenAI app: the `decar` object, model ids, /v1/ensemble. Knows HTTP, no engines.

An ASGI middleware takes `decar` out of a request before vLLM sees it, and puts it into the response after.
Without a trace the object is spliced in front of the first brace, so that nothing is parsed on the way out.
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
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from decar.router import available_routers
from decar.router.errors import DecarError, RequestError
from decar.server.gateway import playground
from decar.server.gateway.asgi import is_event_stream, path_of
from decar.server.gateway.body import MAX_DEPTH, is_deeper, read_body, replay, with_length
from decar.server.gateway.engine import ExpertDown
from decar.server.gateway.ensemble import EnsembleClient
from decar.server.gateway.errors import error_response, http_error, unavailable
from decar.server.gateway.gate import Gate, GateMiddleware, QueueMiddleware
from decar.server.gateway.middleware import (
    ArrivalMiddleware,
    GuardMiddleware,
    KeyMiddleware,
    has_begun,
    is_admin,
)
from decar.server.gateway.reload import Reloader, ReloadRunning
from decar.server.gateway.request import Call, current_call
from decar.server.gateway.routes import OfferedMiddleware, describing_offered

logger = logging.getLogger("decar")
_BOOL = pydantic.TypeAdapter(bool)

ANNOTATED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/invocations"})
MAX_BODY_BYTES = 32 * 2**20


def extend(
    app: FastAPI,
    client: EnsembleClient,
    gate: Gate,
    reloader: Reloader,
    keys: Sequence[str],
    admin_key: str | None = None,
    ui: bool = True,
) -> None:
    """Add decar's routes and middleware to vLLM's ``app``.

    Args:
        gate: lets requests in.
        keys: all but /health and the page's files needs one of them, or the admin's; none: nobody is asked.
        admin_key: shows paths and processes to whoever gives it; None: nobody sees them.
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
    app.openapi = describing_offered(app.openapi)  # type: ignore[method-assign]
    # CORS's headers go on every answer, errors and refused keys included, and a browser asks without a key.
    cors = [middleware for middleware in app.user_middleware if middleware.cls is CORSMiddleware]
    app.user_middleware[:] = [
        *cors,
        Middleware(GateMiddleware, gate=gate),
        Middleware(GuardMiddleware, handler=app.exception_handlers.get(Exception)),
        Middleware(ArrivalMiddleware, thread=client.thread),
        Middleware(KeyMiddleware, tokens=keys, admin=admin_key, public=playground.FILES if ui else ()),
        Middleware(OfferedMiddleware),
        *(middleware for middleware in app.user_middleware if middleware not in cors),
        # Innermost, so that vLLM's authentication has let the request pass before its body is read.
        Middleware(DecarMiddleware, served=client),
        Middleware(QueueMiddleware, queue=client.queue),
    ]
    app.middleware_stack = app.build_middleware_stack()  # vLLM's app has already built its own


routes = APIRouter()


@routes.get("/v1/models")
async def models(request: Request) -> JSONResponse:
    """The ensemble, and each expert alone."""
    return JSONResponse({"object": "list", "data": await _model_cards(request)})


@routes.get("/v1/models/{model_id:path}")
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


@routes.get("/v1/ensemble")
async def ensemble(request: Request) -> JSONResponse:
    """The manifest, each expert's health, slots in use, what engines counted, whether they read images, and defaults;
    for the admin also where experts lie and run."""
    client: EnsembleClient = request.app.state.ensemble_client
    manifest, leads = client.ensemble.manifest, client.leaders.counts()
    experts = []
    for entry, checkpoint, seat in zip(
        manifest.experts, client.ensemble.experts, client.seats.of, strict=True
    ):
        expert = client.experts[seat]
        shown = {
            "name": expert.name,
            "model": f"{client.ensemble.name}/{expert.name}",
            "prior": entry.prior,
            "up": expert.up,
            "leads": leads[seat],
            "lockstep": client.plane.blocks[seat].counted(),
        }
        if is_admin(request.scope):
            shown.update(pid=expert.engine.pid, path=str(checkpoint.path))
        experts.append(shown)
    return JSONResponse(
        {
            "object": "ensemble",
            "name": client.ensemble.name,
            "experts": experts,
            "routes": list(available_routers(client.ensemble)),
            "images": all(checkpoint.reads_images for checkpoint in client.ensemble.experts),
            "defaults": {**manifest.router.model_dump(exclude={"kind"}), "route": manifest.router.kind}
            | manifest.mixing.model_dump(),
            "slots": {"total": client.slots.total, "in_use": client.slots.in_use},
            "queue": {"waiting": client.queue.waiting, "length": client.queue.length},
        }
    )


@routes.post("/v1/ensemble/reload")
async def reload(request: Request) -> JSONResponse:
    """Read the ensemble's directory anew, and exchange what has changed; answers when that is done."""
    client: EnsembleClient = request.app.state.ensemble_client
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
    return JSONResponse(
        {
            "object": "ensemble.reload",
            "exchanged": reloaded.exchanged,
            "added": reloaded.added,
            "removed": reloaded.removed,
            "message": str(reloaded),
        }
    )


class Served(Protocol):
    """What knows what is served now: `EnsembleClient`."""

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
                call = self.served.call_of(_text(fields.get("model")), fields.pop("decar", None))
            except RequestError as error:
                return await error_response(str(error), 400, error.param)(scope, receive, send)
            call.beams = path in ANNOTATED_PATHS and _is_true(fields.get("use_beam_search"))
            if call.beams and (call.trace or call.draw):
                field = "decar.trace" if call.trace else "decar.sampling"
                message = f"{field} cannot follow a beam search: leave one of them out"
                return await error_response(message, 400, field)(scope, receive, send)
            current_call.set(call)
            body = json.dumps(fields).encode()
            if path in ANNOTATED_PATHS:
                send = _Annotated(call, send)
        await self._answer(call, with_length(scope, len(body)), replay(body, receive), send)

    async def _answer(self, call: Call | None, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the app answer; what it trips over before it has anything generated is the request's fault.

        vLLM looks at a body in many places before it knows the types of what is in it.
        """
        try:
            await self.app(scope, receive, send)
        except (OSError, MemoryError):
            raise
        except ExpertDown as down:
            if has_begun(scope):
                raise  # a stream ends with an event
            await unavailable(str(down))(scope, receive, send)
        except Exception as error:
            if has_begun(scope) or (call is not None and call.prompts):
                raise
            reason = f"{type(error).__name__}: {error}"
            logger.warning("%s is refused: vLLM cannot read it (%s)", scope["path"], reason)
            await error_response(f"the request cannot be read ({reason})", 400, None)(scope, receive, send)


class _Annotated:
    """A `send` that adds `decar` to a successful response: JSON or server-sent events."""

    def __init__(self, call: Call, send: Send):
        self._call = call
        self._send = send
        self._start: Message | None = None  # of a JSON body, held back until its length is known
        self._stream = False
        self._summary_sent = False
        self._degraded = 0  # experts whose loss the client knows of

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.body" and self._stream:
            body = message.get("body", b"")
            event = self._event(body)
            if event is not body:
                message = {**message, "body": event}
        elif message["type"] == "http.response.start":
            self._start = None
            answers = message["status"] == 200
            self._stream = answers and is_event_stream(message)
            if answers and not self._stream:  # a stream's client reads the headers while the engines compute
                self._start = message
                return
        elif message["type"] == "http.response.body" and self._start is not None:
            start, self._start = self._start, None
            body = self._object(message.get("body", b""))
            message = {**message, "body": body}
            start["headers"] = [
                (name, str(len(body)).encode() if name == b"content-length" else value)
                for name, value in start["headers"]
            ]
            await self._send(start)
        await self._send(message)

    def _object(self, body: bytes) -> bytes:
        if not body.startswith(b"{"):
            return body
        if not self._call.trace:
            return self._spliced(body)
        return json.dumps(self._traced(json.loads(body), None, once=True)).encode()

    def _event(self, body: bytes) -> bytes:
        if not body.startswith(b"data: {") or body.startswith(b'data: {"error"'):
            return body
        known = self._summary_sent and self._degraded == len(self._call.degraded)
        self._summary_sent, self._degraded = True, len(self._call.degraded)
        if self._call.trace:
            data = json.loads(body.removeprefix(b"data: "))
            data = self._traced(data, self._counted(data), once=not known)
            return b"data: " + json.dumps(data).encode() + b"\n\n"
        return body if known else b"data: " + self._spliced(body.removeprefix(b"data: "))

    def _spliced(self, body: bytes) -> bytes:
        return b'{"decar":' + json.dumps(self._call.summary()).encode() + b"," + body[1:]

    def _counted(self, data: dict[str, Any]) -> int:
        """How many tokens a chunk's choice has by now; vLLM says so for us, unless the client wants to know too."""
        usage = data.get("usage") or {}
        if data.get("choices") and not self._call.counts_shown:
            data.pop("usage", None)
        return int(usage.get("completion_tokens", 0))

    def _traced(self, data: dict[str, Any], count: int | None, once: bool) -> dict[str, Any]:
        """``data`` with the weights of tokens that no earlier chunk has carried.

        Args:
            count: tokens that the choice of a chunk has by now; None: all.
        """
        for choice in data.get("choices") or []:
            trace = self._call.choices.get(choice.get("index"))
            delta = choice.get("delta") or {}
            announces = "role" in delta and not delta.get("content") and not choice.get("finish_reason")
            if trace is not None and not announces:  # a stream's first chunk names the role, and has no token
                new = slice(trace.sent, count)
                choice["decar"] = {
                    "weights": self._call.by_expert(trace.weights[new]),
                    "leaders": trace.leaders[new],
                    "active": self._call.in_order(trace.experts),
                }
                trace.sent = max(trace.sent, count or 0)
        return {**data, "decar": self._call.summary()} if once else data


def _is_true(value: Any) -> bool:
    """Whether vLLM takes ``value`` for true; what it takes for nothing, it refuses."""
    with contextlib.suppress(pydantic.ValidationError):
        return _BOOL.validate_python(value)
    return False


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
