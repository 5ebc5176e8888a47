"""The page at /: which files it is made of, and what a browser is allowed to do with them. Knows HTTP, no requests.

The files hold no secrets, and so need no key; what the page asks of the server needs one like everything else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

FOLDER = Path(__file__).parents[1] / "playground"
KINDS = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
METHODS = ("GET", "HEAD")

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # No text becomes HTML, whoever wrote it: a browser that knows this refuses innerHTML and its like altogether.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


def files() -> dict[str, Path]:
    """Path on the server -> file."""
    found = {f"/playground/{path.name}": path for path in FOLDER.iterdir() if path.suffix in KINDS}
    return {"/": found.pop("/playground/index.html"), **found}


FILES = files()


def page() -> APIRouter:
    """A route for each file. They are read once: a server that is being upgraded serves one version of them."""
    router = APIRouter()
    for path, file in FILES.items():
        router.add_api_route(path, _sender(file), methods=[*METHODS], include_in_schema=False)
    return router


def _sender(file: Path) -> Callable[[], Awaitable[Response]]:
    content, kind = file.read_bytes(), KINDS[file.suffix]

    async def send() -> Response:
        return Response(content, headers=HEADERS, media_type=kind)

    return send
