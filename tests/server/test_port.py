"""A port that is taken is told before anything starts."""

import socket
from types import SimpleNamespace
from typing import cast

import pytest

from decar.router.errors import StartError
from decar.server.port import base_url, bound_socket


def test_a_port_that_is_taken_or_none_is_told() -> None:
    with bound_socket("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert base_url(sock, tls=False) == f"http://127.0.0.1:{port}"
        sock.listen()
        with (
            pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{port} .*--port"),
            bound_socket("127.0.0.1", port),
        ):
            pass
    with pytest.raises(StartError, match="65535"), bound_socket("127.0.0.1", 99_999):
        pass
    with pytest.raises(StartError, match="cannot listen on nowhere"), bound_socket("nowhere.invalid", 0):
        pass


def test_two_servers_that_start_do_not_take_the_same_port() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with bound_socket("127.0.0.1", port), pytest.raises(StartError), bound_socket("127.0.0.1", port):
        pass
    with bound_socket("127.0.0.1", port):
        pass  # it is free again


def test_an_address_of_six_numbers_has_brackets() -> None:
    sock = SimpleNamespace(getsockname=lambda: ("::1", 8000, 0, 0))
    assert base_url(cast(socket.socket, sock), tls=True) == "https://[::1]:8000"
