"""Hooks of mkdocs, for `make docs`: pages from outside docs/, sources for the reference, and a check of what was built.

A page's links are relative to its place in the repository, so that they work there as well; here they are made
relative to its place in the site. README.md is the site's first page, and files that pages link to come along.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "build/reference"
"""Where the reference is read from: decar's parts side by side, as in a wheel. Nothing of it is imported."""
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
"""Of the repository, beside docs/."""
HOME = "index.md"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(?=[)#])|(?<=src=\")(?![a-z]+:)([^\"]+)")


def on_startup(**_: Any) -> None:
    shutil.rmtree(SOURCES, ignore_errors=True)
    for package in ROOT.glob("*/decar"):
        shutil.copytree(
            package,
            SOURCES / "decar",
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__", "*.html*"),
        )


def on_files(files: Files, config: Any) -> Files:
    for page in PAGES:
        files.append(_file(page, config))
    for file in list(files.documentation_pages()):
        for linked in _linked(_in_repository(file.src_uri), file.content_string):
            path = ROOT / linked
            if path.is_file() and files.get_file_from_path(_in_site(linked)) is None:
                files.append(_file(linked, config))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = _in_repository(page.file.src_uri)
    folder = PurePosixPath(page.file.src_uri).parent

    def moved(match: re.Match[str]) -> str:
        return os.path.relpath(_in_site(_target(here, match[0])), folder)

    return LINK.sub(moved, markdown)


def on_post_build(config: Any, **_: Any) -> None:
    """
    Raises:
        PluginError: a page asks for what the site does not have, or for something from elsewhere.
    """
    site = Path(config.site_dir)
    wrong = [
        f"{page.relative_to(site)}: {said}"
        for page in sorted(site.rglob("*.html"))
        for said in _problems(page, site)
    ]
    wrong += [
        f"{sheet.relative_to(site)}: fetches from elsewhere"
        for sheet in sorted(site.rglob("*.css"))
        if re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8"))
    ]
    if wrong:
        raise PluginError("\n".join(["the site is not whole:", *wrong]))


def _file(path: str, config: Any) -> File:
    return File.generated(config, _in_site(path), abs_src_path=str(ROOT / path))


def _in_site(path: str) -> str:
    """Where a file of the repository lies in the site's sources."""
    return HOME if path == "README.md" else path.removeprefix("docs/")


def _in_repository(uri: str) -> str:
    if uri == HOME:
        return "README.md"
    return uri if uri in PAGES else f"docs/{uri}"


def _linked(page: str, text: str) -> Iterator[str]:
    return (_target(page, match[0]) for match in LINK.finditer(text))


def _target(page: str, link: str) -> str:
    """The file of the repository that ``link`` on ``page`` means, from the repository's root."""
    return os.path.normpath(PurePosixPath(page).parent / link)


class _Asked(HTMLParser):
    """What a page has a browser fetch, and where it links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        asked = [given[name] for name in ("src", "data", "poster") if name in given]
        asked += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            asked.append(given.get("href", ""))
        elif tag != "link" and "href" in given:
            self.links.append(given["href"])
        self.fetched += asked


def _problems(page: Path, site: Path) -> Iterator[str]:
    asked = _Asked(page.read_text(encoding="utf-8"))
    for link in asked.fetched:
        if urlsplit(link).netloc:
            yield f"fetches {link}"
    for link in (*asked.fetched, *asked.links):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc or not parts.path:
            continue
        base = site if parts.path.startswith("/") else page.parent
        target = base / unquote(parts.path).lstrip("/")
        if not (target / "index.html" if parts.path.endswith("/") else target).exists():
            yield f"{link} does not exist"
