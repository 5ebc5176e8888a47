"""What an engine's process tells the gateway: what it logs while it starts, and why it failed, in one line, which is
the first error that it logs with a traceback.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from decar.server.protocol.member import LockstepConfig

_LONGEST = 400  # characters of a reason


class _Letters:
    """The gateway's end: datagrams from engines' processes. Close it after use."""

    def __init__(self) -> None:
        # Of an abstract name, it leaves nothing behind, however the gateway ends.
        self.address = f"\0decar-{type(self).__name__.lower()}-{os.getpid()}-{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.setblocking(False)

    def heard(self) -> Iterator[tuple[int, str]]:
        """What has come since this was called last: (expert, text)."""
        with contextlib.suppress(OSError):  # there is nothing more, or it is closed
            while True:
                expert, text = json.loads(self._socket.recv(65_536))
                yield expert, text

    def close(self) -> None:
        self._socket.close()


class Progress(_Letters):
    """Hears every line that engines log. When it is closed, they talk to nobody."""

    def tell(self, expert: int, text: str) -> None:
        """What goes on before there is an engine to say so."""
        _send(self.address, expert, text)


class Failures(_Letters):
    """Hears why engines have failed."""

    def __init__(self) -> None:
        super().__init__()
        self._reasons: dict[int, str] = {}

    def told(self, names: Sequence[str]) -> str | None:
        """What has failed so far, of experts by their ``names``: "expert 'code': reason"; None: nothing."""
        self._hear()
        return "; ".join(f"expert {names[k]!r}: {self._reasons[k]}" for k in sorted(self._reasons)) or None

    def forget(self, expert: int) -> None:
        """An expert's engine is started anew: what it has reported before is no reason any more."""
        self._hear()
        self._reasons.pop(expert, None)

    def of(self, names: Sequence[str]) -> list[str]:
        """Those of ``names`` whose engines have failed so far."""
        self._hear()
        return [names[k] for k in sorted(self._reasons)]

    def _hear(self) -> None:
        for expert, reason in self.heard():
            self._reasons.setdefault(expert, reason)  # what comes later follows from it


@dataclass(frozen=True)
class ReportingConfig(LockstepConfig):
    """A `LockstepConfig` whose engine reports to the gateway.

    Attributes:
        name: of its expert, which its log has.
        failures, progress: addresses of `Failures` and `Progress`.
    """

    name: str
    failures: str
    progress: str

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if os.getpid() != self.gateway_pid:
            _report_errors(self.expert, self.failures)
            _report_progress(self.expert, self.progress)


def _report_errors(expert: int, address: str) -> None:
    """By a record factory: vLLM replaces the handlers of its loggers when it likes, but wraps a factory."""
    make = logging.getLogRecordFactory()

    def make_and_report(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if record.levelno >= logging.ERROR and record.exc_info and record.exc_info[1] is not None:
            _send(address, expert, reason_of(record.exc_info[1]))
        return record

    logging.setLogRecordFactory(make_and_report)


def _report_progress(expert: int, address: str) -> None:
    make = logging.getLogRecordFactory()

    def make_and_report(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        with contextlib.suppress(Exception):  # whatever is wrong with a message is its logger's to tell
            _send(address, expert, " ".join(record.getMessage().split())[:_LONGEST])
        return record

    logging.setLogRecordFactory(make_and_report)


def _send(address: str, expert: int, text: str) -> None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.sendto(json.dumps([expert, text]).encode(), address)


def reason_of(error: BaseException) -> str:
    """The root cause of ``error`` on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def last_line(error: BaseException) -> str:
    """Of what Ray says of an error: after tracebacks, the end says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:_LONGEST] if lines else repr(error)
