"""Listening socket of the server."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from typing import NamedTuple

from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

# File descriptor of the first socket that systemd passes (sd_listen_fds).
_SYSTEMD_DESCRIPTOR = 3

BACKLOG = 2048
"""Maximum of connections that the kernel queues until the server accepts them."""


class Listener(NamedTuple):
    """A bound socket.

    Attributes:
        inherited: whether systemd passed it. systemd keeps it open too, so closing it here loses no connections.
    """

    socket: socket.socket
    inherited: bool = False


def bound_socket(host: str, port: int, reuse_port: bool) -> Listener:
    """Take the socket that systemd passed, else bind a TCP socket, which listens unless `reuse_port` is set.

    With `reuse_port`, the kernel distributes connections over all servers that listen on the port, so one that is still
    loading its model must not listen; server.py lets it listen afterwards. A socket passed by systemd takes precedence
    over the address.

    Raises:
        UsageError: the address does not exist, systemd passed no socket, several or another than TCP, or the
            system has no SO_REUSEPORT.
        QwenVLError: the port is in use or not permitted, or the address is not this machine's.
    """
    inherited = _from_systemd()
    if inherited is not None:
        return Listener(inherited, inherited=True)
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"--host {host}: no such address ({error})") from error
    family, socket_type, protocol, _, address = infos[0]
    listener = socket.socket(family, socket_type, protocol)
    try:
        if os.name == "posix":  # on Windows the option would let two servers bind the same port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            _set_reuse_port(listener)
        listener.bind(address)
        if not reuse_port:
            listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _bind_error(host, port, error) from error
    listener.setblocking(False)
    return Listener(listener)


def url_of(listener: socket.socket) -> str:
    """URL of the server for a client on this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # loopback for "all addresses"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def accept_queued(listener: socket.socket) -> list[socket.socket]:
    """Accept all connections in the kernel's backlog: closing the socket would reset them."""
    accepted = []
    with suppress(OSError):  # BlockingIOError when the backlog is empty, or no more file descriptors
        while True:
            connection, _ = listener.accept()
            connection.setblocking(False)
            accepted.append(connection)
    return accepted


def _from_systemd() -> socket.socket | None:
    """Socket passed by systemd's socket activation, if any."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not os.environ.get("LISTEN_FDS", "").isdigit():
        return None
    count = int(os.environ["LISTEN_FDS"])
    if count != 1:
        raise UsageError(f"LISTEN_FDS {count}: the server takes one socket; give the unit one ListenStream")
    # Child processes must not use the socket as if systemd had passed it to them.
    del os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"]
    os.set_inheritable(_SYSTEMD_DESCRIPTOR, False)
    listener = socket.socket(fileno=_SYSTEMD_DESCRIPTOR)
    if listener.family not in (socket.AF_INET, socket.AF_INET6) or listener.type != socket.SOCK_STREAM:
        raise UsageError("systemd passed no TCP socket; give the unit ListenStream=PORT or HOST:PORT")
    listener.setblocking(False)
    return listener


def _set_reuse_port(listener: socket.socket) -> None:
    if not hasattr(socket, "SO_REUSEPORT"):
        raise UsageError("--reuse_port: this system has no SO_REUSEPORT")
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def _bind_error(host: str, port: int, error: OSError) -> QwenVLError:
    if error.errno == errno.EADDRINUSE:
        return QwenVLError(
            f"--port {port}: another program listens on this port; choose another port, or 0 for any free port"
        )
    if error.errno == errno.EACCES:
        return QwenVLError(f"--port {port}: this user may not listen on it; choose a port from 1024 on")
    if error.errno == errno.EADDRNOTAVAIL:
        return QwenVLError(f"--host {host}: not an address of this machine")
    return QwenVLError(f"--host {host} --port {port}: cannot listen there ({error.strerror})")
