"""The gateway's real HTTP side around an app whose answers a test has written: for what no engine says on demand."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from decar.server.gateway.api import extend
from decar.server.gateway.gate import Gate

from .fake_engine import FakeServer

Token = tuple[str, Sequence[float]]
"""A text, and the weights that mixed it."""


@dataclass
class Script:
    """What a scripted app answers, and what it was asked.

    Attributes:
        tokens: of every answer.
        breaks: cut the connection behind them, once this is set.
        pauses: wait before the last of them until this is set.
        bodies: of the requests so far.
        left: set when a client has left before its answer was whole.
    """

    tokens: Sequence[Token] = (("Hello", (0.75, 0.25)), (" there", (0.25, 0.75)))
    breaks: asyncio.Event | None = None
    pauses: asyncio.Event | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)


def scripted_app(server: FakeServer, script: Script, *keys: str, ui: bool = True) -> FastAPI:
    """An app as vLLM makes it, extended, whose chats and completions ``script`` answers."""
    app = FastAPI()
    names = [expert.name for expert in server.client.ensemble.experts]

    @app.get("/health")
    async def health() -> dict[str, bool]:
        return {"ok": True}

    @app.post("/v1/chat/completions")
    @app.post("/v1/completions")
    async def answer(request: Request) -> Any:
        body = await request.json()
        script.bodies.append(body)
        if body.get("temperature", 0) > 1.9:
            error = {"message": "temperature is too high", "type": "BadRequestError", "param": "temperature"}
            return JSONResponse({"error": {**error, "code": 400}}, 400)
        chat = "messages" in body

        async def events() -> AsyncIterator[str]:
            try:
                for i, (text, weights) in enumerate(script.tokens):
                    if i == len(script.tokens) - 1 and script.pauses is not None:
                        await script.pauses.wait()
                    yield f"data: {json.dumps({'choices': [_choice(chat, text, weights, names)]})}\n\n"
            except asyncio.CancelledError:
                script.left.set()
                raise
            if script.breaks is not None:
                await script.breaks.wait()
                raise KeyError("in a stream")
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def show() -> Any:
        return SimpleNamespace(data=[])

    app.state.openai_serving_models = SimpleNamespace(show_available_models=show)
    extend(app, server.client, Gate(), None, list(keys), ui=ui)  # type: ignore[arg-type]
    return app


def _choice(chat: bool, text: str, weights: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    leader = names[max(range(len(weights)), key=weights.__getitem__)]
    decar = {"weights": [list(weights)], "leaders": [leader], "active": list(names)}
    logprob = math.log(0.8)
    if chat:
        top = [{"token": text, "logprob": logprob}, {"token": " else", "logprob": math.log(0.1)}]
        content = [{"token": text, "logprob": logprob, "top_logprobs": top}]
        return {"index": 0, "delta": {"content": text}, "logprobs": {"content": content}, "decar": decar}
    logprobs = {
        "tokens": [text],
        "token_logprobs": [logprob],
        "top_logprobs": [{text: logprob, " else": math.log(0.1)}],
    }
    return {"index": 0, "text": text, "logprobs": logprobs, "decar": decar}
