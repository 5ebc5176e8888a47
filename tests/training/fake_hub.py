"""A Hugging Face Hub of a few folders, over HTTP, for huggingface_hub's own client. Knows nothing about decar."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "1" * 40


@contextmanager
def hub(repositories: Mapping[str, Path], gated: str) -> Iterator[tuple[str, list[str]]]:
    """(its address, the files that are fetched). A repository has one revision, ``main``; ``gated`` is for nobody."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *_: object) -> None:
            """Silent."""

        def _answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0].strip("/")
            is_api = path.startswith("api/")
            for prefix in ("api/models/", "api/datasets/", "datasets/"):
                path = path.removeprefix(prefix)
            words = path.split("/")
            repository, rest = "/".join(words[:2]), words[2:]
            if repository == gated:
                self._send(403, {"X-Error-Code": "GatedRepo"}, b"{}")
            elif repository not in repositories:
                self._send(404, {"X-Error-Code": "RepoNotFound"}, b"{}")
            elif rest[1:2] not in (["main"], [COMMIT]) and not (is_api and not rest):
                self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
            elif is_api:
                files = [_described(file) for file in sorted(repositories[repository].iterdir())]
                info = {
                    "id": repository,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": f["path"]} for f in files],
                }
                self._send(200, {}, json.dumps(files if rest[:1] == ["tree"] else info).encode())
            elif not (repositories[repository] / rest[2]).is_file():
                self._send(404, {"X-Error-Code": "EntryNotFound"}, b"{}")
            else:
                file = repositories[repository] / rest[2]
                headers = {"ETag": f'"{_hash(file)}"', "X-Repo-Commit": COMMIT}
                if with_body:
                    fetched.append(file.name)
                self._send(200, headers, file.read_bytes(), with_body)

        def _send(self, status: int, headers: dict[str, str], body: bytes, with_body: bool = True) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body and self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _described(file: Path) -> dict[str, Any]:
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _hash(file)}


def _hash(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
