"""The port that a server listens on, taken before anything that takes long. Knows sockets, no HTTP."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator

from decar.router.errors import StartError


@contextlib.contextmanager
def bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """Take the port before the engines start, so that a taken one is known at once.

    Raises:
        StartError: it is taken, or there is no such host or port.
    """
    # Two sockets may be bound to one port as long as neither listens, and a server listens only once it is warm.
    claim = socket.socket(socket.AF_UNIX)
    sock = socket.socket(socket.AF_INET6 if _is_ipv6(host) else socket.AF_INET, socket.SOCK_STREAM)
    with contextlib.closing(claim), contextlib.closing(sock):
        try:
            if port:
                claim.bind(f"\0decar-{host}-{port}")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
        except OverflowError:
            raise StartError(f"--port {port}: ports are numbers from 0 to 65535") from None
        except OSError as error:
            raise StartError(
                f"cannot listen on {host}:{port} ({error.strerror}); stop what uses it (`decar ps` shows decar's "
                "servers), or choose another --port"
            ) from None
        yield sock


def base_url(sock: socket.socket, tls: bool) -> str:
    """Where ``sock`` is reached, as "http://127.0.0.1:8000"."""
    host, port = sock.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if _is_ipv6(host) else host}:{port}"


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:  # a name
        return False
