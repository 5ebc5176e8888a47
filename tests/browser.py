"""Chromium for tests: where it is, and a page that may fail no request and log no error unnoticed."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page, async_playwright
from playwright.sync_api import sync_playwright

TIMEOUT_MS = 15_000  # of a click or the like, which a page that has what is clicked does at once
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def found() -> str | None:
    """The system's Chromium, or playwright's own; None where there is none."""
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return _one_of(own)


def _one_of(own: str) -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), own if Path(own).exists() else None)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A browser; skips the test where there is none."""
    async with async_playwright() as playwright:
        path = _one_of(playwright.chromium.executable_path)
        if path is None:
            pytest.skip("no Chromium on this machine: tools/setup_browser.sh gets one, or says how")
        # CI is root in a container, where Chromium's own sandbox cannot be set up, and /dev/shm may be small.
        browser = await playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def opened(browser: Browser, url: str, **options: Any) -> AsyncIterator[Page]:
    """A page in a context of its own, which takes ``options``; what its scripts raise, or its policy refuses, fails."""
    context = await browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
    context.set_default_timeout(TIMEOUT_MS)
    page = await context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "console",
        lambda message: (
            problems.append(message.text)
            if message.type == "error" and "Failed to load resource" not in message.text
            else None
        ),
    )
    try:
        await page.goto(url)
        yield page
        assert not problems
    finally:
        await context.close()
