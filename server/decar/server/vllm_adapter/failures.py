"""Why an engine failed, in one line: its process tells the gateway of the first error that it logs with a traceback.

vLLM's own exceptions in the gateway say only that an engine failed, and refer to hundreds of lines above. Knows that
vLLM logs what ends an engine; knows no engines.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from decar.server.protocol.member import LockstepConfig

_LONGEST = 400  # characters of a reason


class Failures:
    """The gateway's end: hears what engines' processes report. Close it after use."""

    def __init__(self) -> None:
        # Of an abstract name, it leaves nothing behind, however the gateway ends.
        self.address = f"\0decar-failures-{os.getpid()}-{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.setblocking(False)
        self._reasons: dict[int, str] = {}

    def told(self, names: Sequence[str]) -> str | None:
        """What has failed so far, of experts by their ``names``: "expert 'code': reason"; None: nothing."""
        self._hear()
        return "; ".join(f"expert {names[k]!r}: {self._reasons[k]}" for k in sorted(self._reasons)) or None

    def forget(self, expert: int) -> None:
        """An expert's engine is started anew: what it has reported before is no reason any more."""
        self._hear()
        self._reasons.pop(expert, None)

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                expert, reason = json.loads(self._socket.recv(65_536))
                self._reasons.setdefault(expert, reason)  # what comes later follows from it

    def close(self) -> None:
        self._socket.close()


@dataclass(frozen=True)
class ReportingConfig(LockstepConfig):
    """A `LockstepConfig` whose engine reports to ``failures``, the address of `Failures`."""

    failures: str

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if os.getpid() != self.gateway_pid:
            _report_errors(self.expert, self.failures)


def _report_errors(expert: int, address: str) -> None:
    """By a record factory: vLLM replaces the handlers of its loggers when it likes, but wraps a factory."""
    make = logging.getLogRecordFactory()

    def make_and_report(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if record.levelno >= logging.ERROR and record.exc_info and record.exc_info[1] is not None:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto(json.dumps([expert, reason_of(record.exc_info[1])]).encode(), address)
        return record

    logging.setLogRecordFactory(make_and_report)


def reason_of(error: BaseException) -> str:
    """The root cause of ``error`` on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
