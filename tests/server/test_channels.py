"""Channels: ZMQ between an engine's host and the gateway, over connections whose ends have proved who they are."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import zmq

from decar.server.protocol.channels import Channel, channel_names
from decar.server.protocol.links import Mirror, NotOfUs, introduce, key_for, make_bell
from decar.server.protocol.mirror import Hosts
from decar.server.protocol.plane import Plane
from tests.helpers import wait_until

KEY = b"k" * 32
WITHIN_MS = 10_000


@dataclass
class Ends:
    """A gateway's mirror, and a host beside it without one."""

    plane: Plane
    gateway: Path
    host: Path
    address: tuple[str, int]

    def dial(self, channel: str, key: bytes = KEY) -> socket.socket:
        sock = socket.create_connection(self.address, 5)
        try:
            introduce(sock, key_for(key, self.plane.spec), 1, channel)
        except BaseException:
            sock.close()
            raise
        return sock


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    gateway, host = tmp_path / "gateway", tmp_path / "host"
    gateway.mkdir()
    host.mkdir()
    plane = Plane.create(2, 2, 8, 16, bell=make_bell(tmp_path, "bell"))
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    mirror = Mirror(plane, 0, Hosts((0, 1)), KEY, listener, {0: address}, channels=gateway)
    mirror.start()
    yield Ends(plane, gateway, host, address)
    mirror.close()
    plane.unlink()


def test_what_is_said_arrives_in_order_and_an_end_is_told(ends: Ends) -> None:
    hears, _ = channel_names(1, 1)
    broken = threading.Event()
    channel = Channel(ends.host / hears, partial(ends.dial, hears), broken.set)
    with zmq.Context() as context:
        engine = context.socket(zmq.DEALER)
        engine.setsockopt(zmq.LINGER, 0)
        engine.connect(f"ipc://{ends.host / hears}")
        for i in range(100):  # before anybody listens
            engine.send(b"%d" % i * 1000)
        client = context.socket(zmq.ROUTER)
        client.setsockopt(zmq.LINGER, 0)
        client.bind(f"ipc://{ends.gateway / hears}")
        said = []
        for _ in range(100):
            assert client.poll(WITHIN_MS)
            who, message = client.recv_multipart()
            said.append(message)
        assert said == [b"%d" % i * 1000 for i in range(100)]
        client.send_multipart([who, b"back"])
        assert engine.poll(WITHIN_MS)
        assert engine.recv() == b"back"
        assert not broken.is_set()
        client.close()
        assert broken.wait(10)
        engine.close()
    channel.close()
    assert list(ends.host.iterdir()) == []


@pytest.mark.parametrize("name", ["../bell", "/etc/passwd", "a/b", "..", "not there"])
def test_no_other_file_is_led_to(ends: Ends, name: str) -> None:
    sock = ends.dial(name)
    sock.settimeout(10)
    assert sock.recv(1) == b""
    sock.close()


def test_who_has_another_key_is_not_let_in(ends: Ends) -> None:
    with pytest.raises((NotOfUs, OSError)):
        ends.dial("hears_1_1", b"x" * 32)


def test_an_engine_may_be_there_before_the_gateway(ends: Ends) -> None:
    """Whoever is not there yet is tried again, and nothing of that is a break."""
    _, speaks = channel_names(1, 7)
    tries, broken = [], threading.Event()

    def dial() -> socket.socket:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionRefusedError
        return ends.dial(speaks)

    channel = Channel(ends.host / speaks, dial, broken.set)
    with zmq.Context() as context:
        engine = context.socket(zmq.PUSH)
        engine.setsockopt(zmq.LINGER, 0)
        engine.connect(f"ipc://{ends.host / speaks}")
        engine.send(b"first")
        wait_until(lambda: len(tries) > 4, 10, "it is tried again")
        assert not broken.is_set()
        client = context.socket(zmq.PULL)
        client.bind(f"ipc://{ends.gateway / speaks}")
        assert client.poll(WITHIN_MS)
        assert client.recv() == b"first"
        client.close()
        engine.close()
    channel.close()
