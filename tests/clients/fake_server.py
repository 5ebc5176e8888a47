"""A server that speaks as much of decar's API as `decar chat` listens to. Its answers are made of what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAMES = ["code", "prose"]
ROOM = 3
"""Messages that a conversation has room for."""


class FakeServer(ThreadingHTTPServer):
    """Remembers the bodies of requests. "slowly" is answered by one word and then nothing, until ``go_on`` is set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, Any]] = []
        self.go_on = threading.Event()
        self.left = threading.Event()

    @property
    def address(self) -> str:
        """Without a scheme, and without /v1."""
        return f"127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        if self.path != "/v1/ensemble":
            return self._json(404, {"error": {"message": "nothing there"}})
        experts = [{"name": name, "model": f"demo/{name}", "up": True} for name in NAMES]
        slots = {"in_use": 3, "total": 32}
        return self._json(200, {"object": "ensemble", "name": "demo", "experts": experts, "slots": slots})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        question = body["messages"][-1]["content"]
        if len(body["messages"]) > ROOM:
            message = "the maximum context length is 512 tokens; this has more"
            return self._json(400, {"error": {"message": message, "type": "BadRequestError", "code": 400}})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        try:
            self._say("slowly...", [0.9, 0.1], body)
            if question == "slowly":
                # A client that leaves is noticed by what is written then.
                while not self.server.go_on.wait(0.05):
                    self._say("", [0.5, 0.5], body)
            self._say(f" you said {question}", [0.2, 0.8], body)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.left.set()

    def _say(self, text: str, weights: list[float], body: dict[str, Any]) -> None:
        trace: dict[str, Any] = {"weights": [weights] if text else [], "leaders": ["code"] if text else []}
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
        if body.get("decar", {}).get("trace"):
            choice["decar"] = trace
        chunk = {
            "id": "1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "demo",
            "choices": [choice],
        }
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()

    def _json(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()
