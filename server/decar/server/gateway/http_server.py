"""A connection of the HTTP server: uvicorn's, with bounds on what half a request may cost. Knows no paths."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
from http import HTTPStatus
from typing import Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from decar.server.gateway.errors import anthropic_error_body, error_body, is_anthropic
from decar.server.gateway.request_id import logged_for

logger = logging.getLogger("decar")

LOOK_S = 1.0
"""How often it is looked whether clients read."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol on httptools, which keeps whatever comes of a request, and waits for its rest for ever.

    A head is bounded in bytes and headers, by the settings that uvicorn has for h11 alone. What is sent by halves has
    deadlines; they do not run while the client waits for an answer, or the app does not read.

    Attributes:
        max_head_bytes: of a request's first line and headers, where ``config`` does not say.
        max_headers: the same.
        timeout_s: for a head, from the connection's beginning or its own.
        body_bytes_per_s: what a body has to bring on the average of every ``timeout_s``, and a client has to take of an
            answer that it has not read.
        max_unread_bytes: of a stream, beyond what the system keeps of it.
    """

    max_head_bytes = 2**16
    max_headers = 256
    timeout_s = 30.0
    body_bytes_per_s = 1024
    max_unread_bytes = 4 * 2**20

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.max_head_bytes = self.config.h11_max_incomplete_event_size or self.max_head_bytes
        self.max_headers = getattr(self.config, "h11_max_header_count", None) or self.max_headers
        self._reading: Literal["nothing", "head", "body"] = "nothing"
        self._message = 0  # counts the connection's requests
        self._pieces = 0  # of their bodies
        self._kept_bytes = 0  # of a head, or of the headers behind a body
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        before = (self._message, self._pieces)
        super().data_received(data)
        if self._refused:
            return
        self._period_bytes += len(data)
        if self._reading == "nothing" or before != (self._message, self._pieces):
            self._kept_bytes = 0
        else:
            self._kept_bytes += len(data)
        if self._kept_bytes > self.max_head_bytes:
            self._refuse_head()
        else:
            self._watch()

    # --- what the parser finds ----------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reading = "head"
        self._message += 1

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self.max_head_bytes or len(self.headers) > self.max_headers:
            self._refuse_head()
            raise ValueError  # to the parser, which stops
        super().on_headers_complete()
        self._reading = "body"

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._pieces += 1

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._reading = "nothing"

    def send_400_response(self, msg: str) -> None:
        if not self._refused:
            self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def _refuse_head(self) -> None:
        self._refuse(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"a request may have {self.max_headers} headers, of {self.max_head_bytes} bytes in all",
        )

    # --- deadlines ----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Have a deadline while something is awaited from the client that uvicorn has none for."""
        idle = self.timeout_keep_alive_task is None and not self._answers
        if self._reading == "nothing" and not idle:
            self._stop_watching()
        elif self._timer is None:
            self._watched = (self._message, self._reading)
            self._period_bytes = 0
            self._timer = self.loop.call_later(self.timeout_s, self._time_out)

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        moves = self._period_bytes >= self.timeout_s * self.body_bytes_per_s or self.flow.read_paused
        if (
            self._watched != (self._message, self._reading)
            or (self._reading == "body" and moves)
            or self._answers
        ):
            self._watch()
        elif self._reading == "nothing":
            self.transport.close()
        else:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"the request's {self._reading} has not come in time")

    # --- what the client does not read --------------------------------------------------------------------

    def pause_writing(self) -> None:
        """uvicorn would have the app wait, with all that it holds. What it sends is kept instead, within bounds."""
        self._look_later(0, taken_bytes(self.transport))

    def resume_writing(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _look_at_unread(self, looks: int, taken: int) -> None:
        """End a connection whose client leaves too much unread, or takes too little of it.

        Args:
            looks: how often it was looked since the client had ``taken`` so many bytes.
        """
        streams = self.cycle is not None and not self.cycle.response_complete
        too_much = streams and self.transport.get_write_buffer_size() > self.max_unread_bytes
        if looks * LOOK_S >= self.timeout_s:
            before, taken, looks = taken, taken_bytes(self.transport), 0
            too_much = too_much or taken - before < self.timeout_s * self.body_bytes_per_s
        if too_much:
            with logged_for(self.cycle):
                logger.warning("%s does not read its answer: the connection is closed", self.client)
            self._unread_timer = None
            self.transport.abort()
        else:
            self._look_later(looks, taken)

    def _look_later(self, looks: int, taken: int) -> None:
        self._unread_timer = self.loop.call_later(LOOK_S, self._look_at_unread, looks + 1, taken)

    @property
    def _answers(self) -> bool:
        """Whether a request that has come whole is still being answered."""
        if self._reading == "body":  # which is that of the newest request
            return bool(self.pipeline)
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Answer what has come of a request with an error, and close the connection."""
        self._refused = True
        self._stop_watching()
        if self._answers:  # to the end; then the connection closes
            self.cycle.keep_alive = False
            return
        if self._reading == "body":
            begun = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if begun:
                self.transport.close()
                return
        path = getattr(self, "url", b"").partition(b"?")[0].decode("latin-1")  # as far as it has come
        anthropic = is_anthropic(path.removeprefix(self.root_path))
        error = anthropic_error_body(message, status) if anthropic else error_body(message, status)
        body = json.dumps(error).encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def taken_bytes(transport: asyncio.Transport) -> int:
    """How many bytes a connection's client has acknowledged: on Linux, and over TCP, as all are."""
    info = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED.size)
    acked: int = _ACKED.unpack(info)[0]
    return acked


_ACKED = struct.Struct("=120xQ")  # `tcpi_bytes_acked` of Linux's `struct tcp_info`
