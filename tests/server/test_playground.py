"""The page at /: who may have it, what a browser may do with it, and what its files are made of."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI
from typer.testing import CliRunner

from decar.server.cli import app
from decar.server.gateway.playground import FILES, FOLDER, KINDS

from .fake_engine import FakeServer
from .scripted import Script, scripted_app
from .test_middleware import client_of

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
ALL_BYTES = 100_000


def sources() -> list[Path]:
    return sorted(FOLDER.iterdir())


def app_of(*keys: str, ui: bool = True) -> FastAPI:
    return scripted_app(FakeServer(0.5, 0.5), Script(), *keys, ui=ui)


@pytest.mark.parametrize("path", FILES)
async def test_every_file_is_there_without_a_key_and_strictly_confined(path: str) -> None:
    async with client_of(app_of("secret")) as client:
        response = await client.get(path)
        assert response.status_code == 200
        assert response.text == FILES[path].read_text()
        assert response.headers["content-type"] == KINDS[FILES[path].suffix]
        directives = (
            each.split(maxsplit=1) for each in response.headers["content-security-policy"].split(";")
        )
        assert dict(directives) == POLICY
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        head = await client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == response.headers["content-length"]
        posted = await client.post(path)
        assert (posted.status_code, posted.headers["allow"]) == (405, "GET, HEAD")


async def test_all_else_needs_the_key() -> None:
    async with client_of(app_of("secret")) as client:
        for path in ("/v1/ensemble", "/playground", "/playground/", "/playground//"):
            assert (await client.get(path)).status_code == 401, path
        for path in ("/playground/no.js", "/playground/..%2fcli.py", "/playground/%2e%2e/cli.py"):
            response = await client.get(path, headers={"authorization": "Bearer secret"})
            assert response.status_code == 404, path


@pytest.mark.parametrize("keys", [(), ("secret",)])
async def test_without_ui_there_is_no_page_and_no_open_path(keys: tuple[str, ...]) -> None:
    async with client_of(app_of(*keys, ui=False)) as client:
        for path in FILES:
            assert (await client.get(path)).status_code == (401 if keys else 404)
            response = await client.get(path, headers={"authorization": "Bearer secret"})
            assert response.status_code == 404
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(("flags", "ui"), [([], True), (["--no-ui"], False)])
def test_the_flag(monkeypatch: pytest.MonkeyPatch, flags: list[str], ui: bool) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("decar.server.serve.serve", lambda *_, ui, **__: asked.append(ui))
    monkeypatch.setattr("decar.server.serve.raise_on_sigterm", lambda: None)
    monkeypatch.setattr("os._exit", sys.exit)
    CliRunner().invoke(app, ["serve", "somewhere", *flags], catch_exceptions=False)
    assert asked == [ui]


async def test_pages_are_not_part_of_the_api() -> None:
    async with client_of(app_of()) as client:
        assert not set(FILES) & set((await client.get("/openapi.json")).json()["paths"])


async def test_the_page_learns_whether_experts_read_images() -> None:
    server = FakeServer(0.5, 0.5)
    async with client_of(scripted_app(server, Script())) as client:
        assert (await client.get("/v1/ensemble")).json()["images"] is False
        for expert in server.client.ensemble.experts:
            expert.reads_images = True  # type: ignore[misc]
        assert (await client.get("/v1/ensemble")).json()["images"] is True


def test_files_name_only_each_other() -> None:
    """What a file asks for is a file that is served, or one of the server's routes; nothing is from elsewhere."""
    assert {path.name for path in sources()} == {file.name for file in FILES.values()}
    for path in sources():
        text = path.read_text()
        assert set(re.findall(r"https?://[^\s\"'<>`]*", text)) <= {"http://www.w3.org/2000/svg"}, path
        assert not re.search(r"@import|//[a-z]+\.[a-z]+/", text), path
        assert path.suffix != ".css" or "url(" not in text, path
        asked = re.findall(r"from \"\./([^\"]*)\"|(?:src|href)=\"playground/([^\"]*)\"", text)
        for name in map("".join, asked):
            assert f"/playground/{name}" in FILES, (path, name)


def test_nothing_becomes_html_and_nothing_is_inline() -> None:
    for path in sources():
        text = path.read_text()
        if path.suffix == ".js":
            sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|DOMParser"
            assert not re.search(sinks, text), path
        elif path.suffix == ".html":
            assert not re.search(r"\sstyle=|\son\w+=|<style|javascript:", text)
            assert not re.search(r"<script(?![^>]*\ssrc=)", text)


def test_files_are_few_and_small() -> None:
    assert sum(path.stat().st_size for path in sources()) < ALL_BYTES
    assert max(len(path.read_text().splitlines()) for path in sources()) < 400
