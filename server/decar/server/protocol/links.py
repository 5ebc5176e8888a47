"""Connections between the hosts of an ensemble, over which their planes are kept alike: see `mirror`. Knows sockets.

Every two hosts have one connection; the host with the larger number makes it, and makes it again when it breaks, or
when the other has been silent for too long. Whoever cannot prove that it has this start's key is sent away before
anything that it says is looked at.

Others that prove it are let through to a socket in the gateway's folder: what an engine there says to its client, see
`channels`.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from decar.server.protocol.channels import lead_through
from decar.server.protocol.mirror import (
    GATEWAY,
    LENGTH,
    Hosts,
    Incoming,
    Outgoing,
    OutgoingHeader,
    WireError,
    longest_message,
)
from decar.server.protocol.plane import Plane, PlaneSpec

logger = logging.getLogger("decar")

HEARTBEAT_S = 0.25
"""A host that has nothing to say says so that often."""
SILENT_S = 2.0
"""A host that says nothing for so long is taken for lost, and connected to anew."""
AGAIN_S = 0.25
_HELLO = b"decar\x00\x00\x01"
_NONCE_BYTES = 32
_WHO = struct.Struct(
    "<H64s"
)  # a host, and the name of a channel; none: it is the connection of the two hosts
_UNSENT_BYTES = 1 << 17  # in the kernel: what is new goes first, before rows that have still to be sent
_STRANGERS = 16  # that may be asked for the key at a time

Address = tuple[str, int]


class NotOfUs(Exception):
    """Whoever is at the other end does not have the key, or serves something else."""


class Mirror:
    """Keeps ``plane`` like those of the other hosts.

    Args:
        host: this one.
        key: of this start; all hosts have the same.
        listener: where the others connect to; bound, and listening.
        addresses: of the hosts with smaller numbers.
        heard: a pipe that is written to when there is something new; "" for none.
        channels: the folder with the sockets that others are let through to; None: there are none.
    """

    def __init__(
        self,
        plane: Plane,
        host: int,
        hosts: Hosts,
        key: bytes,
        listener: socket.socket,
        addresses: Mapping[int, Address],
        heard: str = "",
        channels: Path | None = None,
    ):
        self._plane, self._host, self._hosts, self._channels = plane, host, hosts, channels
        self._key = key_for(key, plane.spec)
        self._listener = listener
        self._stopped = threading.Event()
        heard_fd = os.open(heard, os.O_RDWR | os.O_NONBLOCK) if heard else None
        self._peers = {peer: _Peer(plane, host, hosts, peer, heard_fd) for peer in hosts.all if peer != host}
        self._addresses = {peer: address for peer, address in addresses.items() if peer < host}
        self._strangers = threading.Semaphore(_STRANGERS)
        self._bell = os.open(plane.spec.bell, os.O_RDWR)

    def start(self) -> None:
        """Begin, in threads that end with the process."""
        for peer in self._peers:  # as a mirror before this one may have left it
            Incoming(self._plane, self._hosts, peer).lost()
        for work in (self._listen, self._hear_bell, *(self._dialer(peer) for peer in self._addresses)):
            threading.Thread(target=work, daemon=True).start()

    def moved(self, peer: int, address: Address) -> None:
        """A host with a smaller number has begun anew, elsewhere."""
        if peer < self._host:
            self._addresses[peer] = address

    def close(self) -> None:
        self._stopped.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # which wakes who waits there
        self._listener.close()
        for peer in self._peers.values():
            peer.cut()
        os.write(self._bell, b"!")

    def _hear_bell(self) -> None:
        while not self._stopped.is_set():
            os.read(self._bell, 1 << 16)
            for peer in self._peers.values():
                peer.bell.set()

    def _listen(self) -> None:
        while not self._stopped.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError as error:
                if not self._stopped.wait(AGAIN_S):
                    logger.warning("host %d lets nobody in: %s", self._host, error)
                continue
            self._strangers.acquire()
            threading.Thread(target=self._welcome, args=(sock, address), daemon=True).start()

    def _welcome(self, sock: socket.socket, address: Address) -> None:
        try:
            peer, channel = accept_peer(sock, self._key)
            if peer not in self._peers or peer < self._host:
                raise NotOfUs(f"no host {peer} is to connect here")
            if channel and (self._channels is None or not channel.isidentifier()):
                raise NotOfUs(f"there is no channel {channel!r}")
        except (NotOfUs, OSError) as error:
            logger.warning("%s:%d is not let in: %s", *address[:2], error)
            sock.close()
            return
        finally:
            self._strangers.release()
        if channel:
            assert self._channels is not None
            lead_through(sock, self._channels / channel)
        else:
            self._peers[peer].serve(sock)

    def _dialer(self, peer: int) -> Callable[[], None]:
        def dial() -> None:
            said = ""
            while not self._stopped.is_set():
                try:
                    sock = socket.create_connection(self._addresses[peer], SILENT_S)
                    introduce(sock, self._key, self._host)
                except (NotOfUs, OSError) as error:
                    if str(error) != said:
                        logger.warning("host %d cannot reach host %d: %s", self._host, peer, error)
                    said = str(error)
                else:
                    said = ""
                    self._peers[peer].serve(sock)
                self._stopped.wait(AGAIN_S)

        return dial


class _Peer:
    """One other host, and the connection to it while there is one.

    Attributes:
        bell: set when there may be something new.
    """

    def __init__(self, plane: Plane, host: int, hosts: Hosts, peer: int, heard: int | None):
        self.bell = threading.Event()
        self._plane, self._host, self._hosts, self._peer = plane, host, hosts, peer
        self._heard = heard
        self._one_at_a_time = threading.Lock()
        self._sock: socket.socket | None = None

    def cut(self) -> None:
        """Break the connection that there is."""
        sock = self._sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.bell.set()

    def serve(self, sock: socket.socket) -> None:
        """Tell and listen over a connection until it breaks; it takes the place of one that there may be."""
        self.cut()
        with self._one_at_a_time, sock:
            self._sock = sock
            sock.settimeout(SILENT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
            logger.info("host %d is connected to host %d", self._host, self._peer)
            telling = threading.Thread(target=self._tell, args=(sock,), daemon=True)
            telling.start()
            incoming = Incoming(self._plane, self._hosts, self._peer)
            try:
                self._listen(sock, incoming)
            except (OSError, WireError) as error:
                logger.warning("host %d has lost host %d: %s", self._host, self._peer, error or repr(error))
            finally:
                self._sock = None
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                self.bell.set()
                telling.join()
                incoming.lost()

    def _listen(self, sock: socket.socket, incoming: Incoming) -> None:
        longest = longest_message(self._plane.spec)
        message = memoryview(bytearray(longest))
        length = memoryview(bytearray(LENGTH.size))
        while True:
            _receive(sock, length)
            [size] = LENGTH.unpack(length)
            if size > longest:
                raise WireError(f"a message of {size} bytes; none is longer than {longest}")
            _receive(sock, message[:size])
            incoming.apply(message[:size])
            if self._heard is not None:
                with contextlib.suppress(BlockingIOError):
                    os.write(self._heard, b"!")

    def _tell(self, sock: socket.socket) -> None:
        """Words first, and again between two rows."""
        plane, experts = self._plane, self._hosts.experts_on(self._host)
        blocks = [Outgoing(plane, expert, self._hosts, self._peer) for expert in experts]
        header = OutgoingHeader(plane) if self._host == GATEWAY else None
        told = 0.0
        with contextlib.suppress(OSError):  # whoever listens says so
            while self._sock is sock:
                self.bell.clear()
                due = time.monotonic() - told >= HEARTBEAT_S
                if header is not None:
                    _send(sock, header.news(due))
                rows = []
                for block in blocks:
                    message, entries = block.news(due)
                    _send(sock, message)
                    rows += [(block, entry) for entry in entries]
                if due:
                    told = time.monotonic()
                for block, entry in rows:
                    _send(sock, block.row(entry) or b"")
                    if self.bell.is_set():
                        break
                if not rows:
                    self.bell.wait(HEARTBEAT_S)


def accept_peer(sock: socket.socket, key: bytes) -> tuple[int, str]:
    """The number of the host that has connected, once it has proved to have the key, and the channel that it wants; "":
    to tell and be told.

    Raises:
        NotOfUs: it has not.
        OSError: it does not say so within `SILENT_S`.
    """
    end = time.monotonic() + SILENT_S
    theirs = _received(sock, len(_HELLO) + _NONCE_BYTES, end)
    ours = secrets.token_bytes(_NONCE_BYTES)
    sock.sendall(ours + _proof(key, b"accept", theirs, ours))
    proof, who = _received(sock, 32, end), _received(sock, _WHO.size, end)
    if not hmac.compare_digest(proof, _proof(key, b"dial", ours, theirs, who)):
        raise NotOfUs("it has another key, or another ensemble")
    host, channel = _WHO.unpack(who)
    return int(host), channel.rstrip(b"\0").decode("ascii", "replace")


def introduce(sock: socket.socket, key: bytes, host: int, channel: str = "") -> None:
    """Prove to have the key, and to be ``host``; and have the other prove that it has it.

    Args:
        key: as `key_for` makes it.
        channel: what of the other is wanted; "": to tell and be told.

    Raises:
        NotOfUs: it has not.
        OSError: it does not say so within `SILENT_S`.
    """
    end = time.monotonic() + SILENT_S
    ours = _HELLO + secrets.token_bytes(_NONCE_BYTES)
    sock.sendall(ours)
    theirs, proof = _received(sock, _NONCE_BYTES, end), _received(sock, 32, end)
    if not hmac.compare_digest(proof, _proof(key, b"accept", ours, theirs)):
        raise NotOfUs("it has another key, or another ensemble")
    who = _WHO.pack(host, channel.encode())
    sock.sendall(_proof(key, b"dial", theirs, ours, who) + who)


def make_bell(folder: Path, name: str) -> str:
    """A pipe to be woken by; its path."""
    path = folder / name
    os.mkfifo(path, 0o600)
    return str(path)


def key_for(key: bytes, spec: PlaneSpec) -> bytes:
    """A key that fits planes of this shape only."""
    shape = {name: value for name, value in asdict(spec).items() if name not in ("name", "bell")}
    return hmac.digest(key, json.dumps(shape, sort_keys=True).encode(), "sha256")


def _proof(key: bytes, who: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"\x00".join((who, *parts)), "sha256")


def _received(sock: socket.socket, size: int, end: float) -> bytes:
    """So many bytes.

    Raises:
        OSError: they have not come by ``end`` (`time.monotonic`).
    """
    said = b""
    while len(said) < size:
        sock.settimeout(max(end - time.monotonic(), 1e-3))
        more = sock.recv(size - len(said))
        if not more:
            raise ConnectionError("it has closed the connection")
        said += more
    return said


def _receive(sock: socket.socket, view: memoryview) -> None:
    """Fill ``view``.

    Raises:
        OSError: the connection has ended, or nothing comes for `SILENT_S`.
    """
    while view:
        count = sock.recv_into(view)
        if not count:
            raise ConnectionError("it has closed the connection")
        view = view[count:]


def _send(sock: socket.socket, message: bytes) -> None:
    """All of it, however slow the link is.

    Raises:
        OSError: the connection has ended, or takes nothing for `SILENT_S`.
    """
    view = memoryview(message)
    while view:
        view = view[sock.send(view) :]
