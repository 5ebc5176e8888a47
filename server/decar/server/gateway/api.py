"""What decar adds to vLLM's OpenAI app: the `decar` object, model ids, /v1/ensemble. Knows HTTP, no engines.

An ASGI middleware takes `decar` out of a request before vLLM sees it, and puts it into the response after.
Without a trace the object is spliced in front of the first brace, so that nothing is parsed on the way out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from decar.router import Ensemble
from decar.router.errors import RequestError
from decar.server.gateway.engine import ExpertDown
from decar.server.gateway.ensemble import EnsembleClient
from decar.server.gateway.request import Call, current_call, model_ids, offered_routers, parse_call
from decar.server.protocol.cores import GatewayThread

ANNOTATED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/invocations"})
MAX_BODY_BYTES = 32 * 2**20
RETRY_AFTER_S = 10
"""When to ask again for an expert that is down: an engine takes about as long to start, and longer on a CPU."""


def extend(app: FastAPI, client: EnsembleClient, keys: Sequence[str]) -> None:
    """Add decar's routes and middleware to vLLM's ``app``. With ``keys``, all but /health needs one."""
    app.include_router(routes)
    app.state.ensemble_client = client
    app.add_exception_handler(HTTPException, http_error)  # vLLM's own leaves out what Starlette raises
    # Innermost, so that vLLM's authentication has let the request pass before its body is read.
    app.user_middleware.append(Middleware(DecarMiddleware, ensemble=client.ensemble))
    if keys:
        app.user_middleware.insert(0, Middleware(KeyMiddleware, tokens=keys))
    app.user_middleware.insert(0, Middleware(ArrivalMiddleware, thread=client.thread))
    app.middleware_stack = app.build_middleware_stack()  # vLLM's app has already built its own


def error_response(
    message: str, status: int, param: str | None, kind: str = "BadRequestError"
) -> JSONResponse:
    """An error body as OpenAI's API gives it."""
    error = {"message": message, "type": kind, "param": param, "code": status}
    return JSONResponse({"error": error}, status_code=status)


async def http_error(_: Request, error: Exception) -> JSONResponse:
    """Unknown routes, wrong methods and unreadable bodies in the form of every other error."""
    assert isinstance(error, HTTPException)
    kind = "NotFoundError" if error.status_code == 404 else "BadRequestError"
    response = error_response(str(error.detail), error.status_code, None, kind)
    response.headers.update(error.headers or {})
    return response


routes = APIRouter()


@routes.get("/v1/models/{model_id:path}")
async def model(model_id: str, request: Request) -> JSONResponse:
    """One model, as `client.models.retrieve` asks."""
    models = await request.app.state.openai_serving_models.show_available_models()
    for card in models.data:
        if card.id == model_id:
            return JSONResponse(card.model_dump())
    return error_response(f"The model `{model_id}` does not exist.", 404, "model", "NotFoundError")


@routes.get("/v1/ensemble")
async def ensemble(request: Request) -> JSONResponse:
    """The manifest, each expert's health, slots in use, what engines counted, and defaults."""
    client: EnsembleClient = request.app.state.ensemble_client
    manifest = client.ensemble.manifest
    experts = [
        {
            "name": expert.name,
            "model": f"{client.ensemble.name}/{expert.name}",
            "prior": entry.prior,
            "up": expert.up,
            "pid": expert.engine.pid,
            "leads": leads,
            "lockstep": block.counted(),
        }
        for expert, entry, block, leads in zip(
            client.experts, manifest.experts, client.plane.blocks, client.leaders.counts(), strict=True
        )
    ]
    return JSONResponse(
        {
            "object": "ensemble",
            "name": client.ensemble.name,
            "experts": experts,
            "routes": list(offered_routers(client.ensemble)),
            "defaults": {**manifest.router.model_dump(exclude={"kind"}), "route": manifest.router.kind}
            | manifest.mixing.model_dump(),
            "slots": {"total": client.slots.total, "in_use": client.slots.in_use},
        }
    )


class KeyMiddleware:
    """Asks for one of ``tokens`` everywhere but at /health; vLLM's own asks for one under some prefixes only."""

    def __init__(self, app: ASGIApp, tokens: Sequence[str]):
        self.app = app
        self._digests = [_digest(token) for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        open_to_all = (
            scope["type"] == "lifespan" or scope.get("method") == "OPTIONS" or scope["path"] == "/health"
        )
        if open_to_all or self._knows(Headers(scope=scope).get("authorization", "")):
            return await self.app(scope, receive, send)
        message = "give a valid API key: Authorization: Bearer KEY"
        await error_response(message, 401, None, "AuthenticationError")(scope, receive, send)

    def _knows(self, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        given = _digest(token)
        # All are compared, and digests of one length: how long it takes says nothing of any.
        matches = [secrets.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


class ArrivalMiddleware:
    """While the gateway gives way to engines: has it see to an HTTP request at once, when its headers are read."""

    def __init__(self, app: ASGIApp, thread: GatewayThread):
        self.app = app
        self.thread = thread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.thread.arriving() if scope["type"] == "http" else contextlib.nullcontext():
            await self.app(scope, receive, send)


class DecarMiddleware:
    """Carries the `decar` object between a client and the `Call` that its request becomes."""

    def __init__(self, app: ASGIApp, ensemble: Ensemble):
        self.app = app
        self.ensemble = ensemble
        self._models = frozenset(model_ids(ensemble))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        plain, path = send, scope["path"].removeprefix(scope.get("root_path", ""))
        body = await _read_body(receive)
        if body is None:
            message = f"the request body is larger than {MAX_BODY_BYTES // 2**20} MiB"
            return await error_response(message, 413, None)(scope, receive, send)
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):
            fields = None  # vLLM answers what is no JSON object
        if isinstance(fields, dict):
            try:
                call = parse_call(self.ensemble, _text(fields.get("model")), fields.pop("decar", None))
            except RequestError as error:
                return await error_response(str(error), 400, error.param)(scope, receive, send)
            if call.trace and fields.get("use_beam_search"):
                message = "decar.trace cannot follow a beam search: leave one of them out"
                return await error_response(message, 400, "decar.trace")(scope, receive, send)
            current_call.set(call)
            body = json.dumps(fields).encode()
            if path in ANNOTATED_PATHS and (fields.get("model") is None or fields["model"] in self._models):
                send = _Annotated(call, send)
        try:
            await self.app(_with_length(scope, len(body)), _replay(body, receive), send)
        except ExpertDown as down:  # raised before anything was sent: a stream ends with an event
            response = error_response(str(down), 503, None, "ServiceUnavailableError")
            response.headers["Retry-After"] = str(RETRY_AFTER_S)
            await response(scope, receive, plain)


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
        if message["type"] == "http.response.start" and message["status"] == 200:
            headers = dict(message["headers"])
            self._stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            if not self._stream:  # a stream's client reads the headers while the engines compute
                self._start = message
                return
        elif message["type"] == "http.response.body" and self._stream:
            message = {**message, "body": self._event(message.get("body", b""))}
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
        return json.dumps(self._traced(json.loads(body), once=True)).encode()

    def _event(self, body: bytes) -> bytes:
        if not body.startswith(b"data: {") or body.startswith(b'data: {"error"'):
            return body
        known = self._summary_sent and self._degraded == len(self._call.degraded)
        self._summary_sent, self._degraded = True, len(self._call.degraded)
        if self._call.trace:
            data = self._traced(json.loads(body.removeprefix(b"data: ")), once=not known)
            return b"data: " + json.dumps(data).encode() + b"\n\n"
        return body if known else b"data: " + self._spliced(body.removeprefix(b"data: "))

    def _spliced(self, body: bytes) -> bytes:
        return b'{"decar":' + json.dumps(self._call.summary()).encode() + b"," + body[1:]

    def _traced(self, data: dict[str, Any], once: bool) -> dict[str, Any]:
        """``data`` with the weights of tokens that no earlier chunk has carried."""
        for choice in data.get("choices") or []:
            trace = self._call.choices.get(choice.get("index"))
            delta = choice.get("delta") or {}
            announces = "role" in delta and not delta.get("content") and not choice.get("finish_reason")
            if trace is not None and not announces:  # a stream's first chunk names the role, and has no token
                choice["decar"] = {
                    "weights": trace.weights[trace.sent :],
                    "leaders": trace.leaders[trace.sent :],
                    "active": trace.experts,
                }
                trace.sent = len(trace.weights)
        return {**data, "decar": self._call.summary()} if once else data


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body, or None if it is too large."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives ``body`` and then what is left: the client's disconnect."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _with_length(scope: Scope, length: int) -> Scope:
    headers = [(n, v) for n, v in scope["headers"] if n != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}
