"""What an engine on another host and its client in the gateway say to each other by ZMQ, led over a connection whose
ends have proved who they are: ZMQ itself would listen to anybody. Knows sockets and bytes.

An engine connects to a socket in its host's folder, and is led from there to one of the same name in the gateway's.
ZMQ does not send again what is lost with a connection: once one has been used and breaks, the engine has to end.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger("decar")

GONE_S = 15
"""A connection on which so long nothing arrives of what is sent, or of what asks whether the other is there, is
broken: more than a short disturbance."""
_PIECE_BYTES = 1 << 16


def channel_names(expert: int, start: int) -> tuple[str, str]:
    """Of the channels by which the engine of ``expert`` that is started as the ``start``-th hears and speaks."""
    return f"hears_{expert}_{start}", f"speaks_{expert}_{start}"


def lead_through(sock: socket.socket, path: Path) -> bool:
    """Between ``sock`` and the socket at ``path``, until one of them ends. Returns whether anything came from there."""
    _notice_when_gone(sock)
    with sock, socket.socket(socket.AF_UNIX) as own:
        try:
            own.connect(str(path))
        except OSError:
            return False  # it does not listen yet, or no longer
        return _lead(own, sock)


class Channel:
    """A socket at ``path``, from which one connection at a time is led on.

    Args:
        dial: makes a connection to where it leads.
        broken: is told once when a connection that has been used ends.
    """

    def __init__(self, path: Path, dial: Callable[[], socket.socket], broken: Callable[[], None]):
        self._path, self._dial, self._broken = path, dial, broken
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        threading.Thread(target=self._serve, name=f"channel-{path.name}", daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        said = ""
        while True:
            try:
                own, _ = self._listener.accept()
            except OSError:
                return
            with own:
                try:
                    sock = self._dial()
                except Exception as error:
                    if str(error) != said:
                        logger.warning("%s does not reach the gateway: %s", self._path.name, error)
                    said = str(error)
                    continue  # the engine tries again
                _notice_when_gone(sock)
                with sock:
                    if _lead(sock, own):
                        self._broken()
                        return


def _notice_when_gone(sock: socket.socket) -> None:
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, GONE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * GONE_S)


def _lead(there: socket.socket, here: socket.socket) -> bool:
    """Between two sockets, until one of them ends. Returns whether anything came from ``there``."""
    back = threading.Thread(target=_pass_on, args=(here, there), daemon=True)
    back.start()
    came = _pass_on(there, here)
    back.join()
    return came


def _pass_on(source: socket.socket, sink: socket.socket) -> bool:
    """All that comes; then end both. Returns whether anything came."""
    came = False
    with contextlib.suppress(OSError):
        while piece := source.recv(_PIECE_BYTES):
            came = True
            sink.sendall(piece)
    for sock in (source, sink):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
    return came
