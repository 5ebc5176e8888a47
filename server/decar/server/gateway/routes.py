"""Which routes of vLLM's app an ensemble offers, and why not the others. Knows paths, not what answers there.

vLLM's app brings routes that are for one engine, or for the machinery around it. What is in neither table below is not
offered: a newer vLLM's routes are decided on, not let in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from decar.server.gateway.asgi import path_of
from decar.server.gateway.errors import error_response
from decar.server.gateway.middleware import is_admin
from decar.server.gateway.playground import FILES, METHODS

OFFERED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(FILES, METHODS),
    "/health": ("GET",),
    "/ping": ("GET", "POST"),
    "/version": ("GET",),
    "/load": ("GET",),
    "/metrics": ("GET",),
    "/openapi.json": ("GET",),
    "/docs": ("GET",),
    "/docs/oauth2-redirect": ("GET",),
    "/redoc": ("GET",),
    "/static/{path:path}": ("GET",),
    "/v1/ensemble": ("GET",),
    "/v1/ensemble/reload": ("POST",),
    "/v1/models": ("GET",),
    "/v1/models/{model_id:path}": ("GET",),
    "/v1/chat/completions": ("POST",),
    "/v1/completions": ("POST",),
    "/v1/responses": ("POST",),
    "/v1/responses/{response_id}": ("GET",),
    "/v1/responses/{response_id}/cancel": ("POST",),
    "/v1/messages": ("POST",),
    "/v1/messages/count_tokens": ("POST",),
    "/invocations": ("POST",),
    "/inference/v1/abort_requests": ("POST",),  # with --enable-scale-out
    "/tokenize": ("POST",),
    "/detokenize": ("POST",),
    "/tokenizer_info": ("GET",),  # with --enable-tokenizer-info-endpoint
    "/start_profile": ("POST",),  # with --profiler-config
    "/stop_profile": ("POST",),
}
"""Path -> methods."""

FOR_THE_ADMIN = {"/tokenizer_info": "shows paths", "/v1/ensemble/reload": "changes what is served"}
"""Those of them that not everybody may ask, and why."""

REFUSED: dict[str, tuple[str, ...]] = {
    "engines are started, stopped and scaled by decar alone": (
        *("/scale_elastic_ep", "/is_scaling_elastic_ep", "/fault_tolerance/apply", "/fault_tolerance/status"),
        *(
            "/sleep",
            "/wake_up",
            "/is_sleeping",
            "/release_kv_cache_memory",
            "/pause",
            "/resume",
            "/is_paused",
        ),
        *("/collective_rpc", "/server_info", "/kv_event_sources", "/ready", "/readyz"),
        *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"),
    ),
    "experts are served as they are in the ensemble's directory": (
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/init_weight_transfer_engine"),
        *("/shutdown_weight_transfer_engine", "/start_weight_update", "/start_draft_weight_update"),
        *("/update_weights", "/finish_weight_update", "/update_weight_version", "/weight_info"),
        *("/weight_checker", "/get_world_size"),
    ),
    "it speaks to one engine, and an ensemble has several, which know a request by other names": (
        *("/inference/v1/generate", "/abort_requests"),
        *("/v1/chat/completions/render", "/v1/completions/render", "/v1/messages/render"),
        *("/v1/responses/render", "/v1/chat/completions/derender", "/v1/completions/derender"),
    ),
    "send each conversation as a request of its own": ("/v1/chat/completions/batch",),
    "ask for log-probabilities in /v1/completions": (
        *("/generative_scoring", "/v1/decisions", "/v1/systemone"),
    ),
    "an ensemble speaks OpenAI's and Anthropic's API": ("/cohere/v2/chat", "/cohere/v2/chat/render"),
    "an ensemble generates text": (
        *("/classify", "/pooling", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
        *(
            "/v1/embeddings",
            "/v2/embed",
            "/v1/audio/transcriptions",
            "/v1/audio/translations",
            "/v1/realtime",
        ),
    ),
}
"""Reason -> paths."""

_PATTERNS = [(compile_path(path)[0], path) for path in OFFERED]
_REASONS = {path: reason for reason, paths in REFUSED.items() for path in paths}


def route_of(path: str) -> str | None:
    """The one of `OFFERED` that ``path`` belongs to."""
    return next((route for pattern, route in _PATTERNS if pattern.match(path)), None)


class OfferedMiddleware:
    """Lets through what is `OFFERED`."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        path = path_of(scope)
        route = route_of(path)
        if route is None:
            reason = _REASONS.get(path, "/openapi.json has what it offers")
            response = error_response(
                f"an ensemble does not offer {path}: {reason}", 404, None, "NotFoundError"
            )
        elif scope.get("method") not in OFFERED[route]:
            allowed = ", ".join(OFFERED[route])
            response = error_response(f"{path} is for {allowed}, not {scope.get('method')}", 405, None)
            response.headers["allow"] = allowed
        elif route in FOR_THE_ADMIN and not is_admin(scope):
            message = f"{path} {FOR_THE_ADMIN[route]}: give the key of --admin-key as API key"
            response = error_response(message, 403, None, "PermissionDeniedError")
        else:
            return await self.app(scope, receive, send)
        await response(scope, receive, send)


def describing_offered(describe: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """FastAPI's own description of an app, without what is not `OFFERED`."""
    offered = {path.replace(":path}", "}") for path in OFFERED}

    def described() -> dict[str, Any]:
        schema = describe()
        return {**schema, "paths": {path: of for path, of in schema["paths"].items() if path in offered}}

    return described
