"""vLLM's OpenAI app and HTTP server, and the prompt that warms up images. Knows vLLM's app, no requests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from argparse import Namespace
from asyncio import Protocol
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import uvicorn
from vllm.engine.protocol import EngineClient

IDLE_S = 75
"""How long an idle connection is kept. Clients and proxies keep theirs for up to a minute (httpx 5 s, nginx 60 s); who
asks just when the server closes gets no answer. vLLM's 5 s are httpx's own."""


def allow_many_files() -> None:
    """As many connections as the system allows, in this process and in engines that it starts."""
    from vllm.utils.system_utils import set_ulimit

    set_ulimit()


async def openai_app(
    client: EngineClient,
    args: Namespace,
    asks_for_counts: Callable[[bool], bool],
    model_asked_for: Callable[[], str | None],
    error_event: Callable[[str, int], str],
) -> Any:
    """vLLM's FastAPI app, which asks ``client`` for answers.

    Args:
        asks_for_counts, model_asked_for, error_event: as `count_tokens`, `name_model_asked_for` and `tell_errors` take
            them.
    """
    from decar.server.vllm_adapter import media  # noqa: F401 - vLLM finds it by name
    from decar.server.vllm_adapter.answers import name_model_asked_for, tell_errors
    from decar.server.vllm_adapter.token_counts import count_tokens
    from decar.server.vllm_adapter.versions import build_app, init_app_state

    tasks = await client.get_supported_tasks()
    app = build_app(args, tasks, client.model_config)
    await init_app_state(client, app.state, args, tasks)
    count_tokens(asks_for_counts)
    name_model_asked_for(app, model_asked_for)
    tell_errors(app, error_event)
    return app


def name_models(app: Any, names: Sequence[str]) -> None:
    """Have the app answer to these model ids from now on; the first is what stands for "the" model."""
    paths = app.state.openai_serving_models.base_model_paths  # one list, whoever asks
    paths[:] = [replace(paths[0], name=name) for name in names]


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs it."""

    listening: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening()

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()


async def listen(
    app: Any,
    args: Namespace,
    sock: socket.socket,
    protocol: type[Protocol],
    until: Coroutine[Any, Any, None],
    listening: Callable[[], None],
) -> None:
    """Serve ``app`` until ``until`` has returned, and every connection is closed.

    Args:
        protocol: speaks HTTP on each connection.
        listening: is called when connections are taken.
    """
    from decar.server.vllm_adapter.versions import get_uvicorn_log_config

    log_config = get_uvicorn_log_config(args)
    config = uvicorn.Config(
        app,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        http=protocol,
        ws="none",  # no route is one
        timeout_keep_alive=int(os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", IDLE_S)),
        timeout_graceful_shutdown=1,  # for connections, when nothing is answered any more
        **({"log_config": log_config} if log_config is not None else {}),
    )
    config.h11_max_incomplete_event_size = args.h11_max_incomplete_event_size
    config.h11_max_header_count = args.h11_max_header_count  # type: ignore[attr-defined]
    server = app.state.server = _Server(config)  # where vLLM's error handlers look for it
    server.listening = listening
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    told = asyncio.create_task(until)
    await asyncio.wait((serving, told), return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    server.should_exit = True
    await serving


def api_keys(args: Namespace, admin_key: str | None) -> list[str]:
    """Keys that a client has to give one of; none: nobody is asked. vLLM's app, made of ``args``, knows them all."""
    from vllm import envs

    keys = [key for key in args.api_key or [envs.VLLM_API_KEY] if key]
    if keys and admin_key:
        keys.append(admin_key)
    args.api_key = keys
    return keys


def keep_environment() -> None:
    """vLLM's settings stay as they are from here on: else every token's statistics read the environment anew."""
    from vllm.envs import enable_envs_cache

    enable_envs_cache()


def image_prompt(client: EngineClient) -> Any:
    """A prompt with one image, as vLLM's renderer makes it; None where the experts take no images."""
    from decar.server.vllm_adapter.versions import dummy_image_prompt, takes_images

    if not takes_images(client.model_config):
        return None
    if not client.renderer.get_mm_processor().info.allowed_mm_limits.get("image"):
        return None
    prompt = dummy_image_prompt(client.renderer)
    [image] = prompt["mm_placeholders"]["image"]
    # It fills the whole context, and would leave no room for an answer.
    prompt["prompt_token_ids"] = prompt["prompt_token_ids"][: image.offset + image.length + 1]
    return prompt
