"""What `decar ps` shows: the servers of this machine, by what each has written of itself, and what it answers now."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from rich import box
from rich.console import Console
from rich.table import Table

from decar.server.protocol.runtime import Record, records

PATIENCE_S = 3.0


def show(console: Console, api_key: str | None) -> None:
    """A table of the servers that run.

    Args:
        api_key: sent to each, as those want who have one.
    """
    found = records()
    if not found:
        console.print("no decar server runs on this machine (of this user, in this container)")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("name", "address", "pid", "state", "experts up", "slots in use", "up for"):
        table.add_column(column, no_wrap=column == "address")  # which is there to be copied
    with ThreadPoolExecutor(max_workers=8) as pool:
        for record, (state, experts, slots) in zip(
            found, pool.map(lambda record: _asked(record, api_key), found), strict=True
        ):
            since = age(time.time() - record.started)
            address = f"{record.url}/v1" if record.url else ""
            table.add_row(record.name, address, str(record.pid), state, experts, slots, since)
    console.print(table)


def _asked(record: Record, api_key: str | None) -> tuple[str, str, str]:
    """A server's state, how many of its experts live, and how many of its slots are in use, as it says."""
    if record.state != "ready":
        return "starting", f"0 of {record.experts}", ""
    # What listens everywhere is asked here.
    url = record.url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        # It is this machine's, whatever name its certificate has.
        with httpx.Client(base_url=url, timeout=PATIENCE_S, verify=False, headers=headers) as client:
            health, answer = client.get("/health"), client.get("/v1/ensemble")
        state = "ready" if health.is_success else "not healthy"
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            return state, "needs --api-key", ""
        said: dict[str, Any] = answer.json()
        up = sum(expert["up"] for expert in said["experts"])
        slots = said["slots"]
        return state, f"{up} of {len(said['experts'])}", f"{slots['in_use']} of {slots['total']}"
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return "does not answer", "", ""


def age(seconds: float) -> str:
    """As 42 s, 5 min, 3 h 20 min, 2 d 4 h."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if minutes < 1:
        return f"{max(int(seconds), 0)} s"
    if hours < 1:
        return f"{minutes} min"
    if hours < 24:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
