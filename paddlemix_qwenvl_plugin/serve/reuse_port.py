"""Handover between two servers on one port (SO_REUSEPORT): the kernel assigns each connection to one listening socket.

Closing a listening socket resets the connections that were assigned to it and not accepted yet, including those whose
handshake is in progress. So the old server first makes the kernel assign all new connections to the new server.
"""

from __future__ import annotations

import ctypes
import socket
import sys
from contextlib import suppress

# Constants of Linux (asm-generic/socket.h, linux/filter.h) that Python's socket module lacks.
_SO_ATTACH_REUSEPORT_CBPF = 51
_SO_DETACH_REUSEPORT_BPF = 68
_BPF_RET_K = 0x06  # instruction that returns the constant k


class _Filter(ctypes.Structure):
    """An instruction of a BPF program: struct sock_filter of linux/filter.h."""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    """A BPF program: struct sock_fprog of linux/filter.h."""

    _fields_ = (("length", ctypes.c_uint16), ("filters", ctypes.POINTER(_Filter)))


def direct_to_newer_server(listener: socket.socket) -> None:
    """Direct new connections to the server that began to listen after this one. Linux only; no effect elsewhere.

    This server must be the oldest on the port: if it is the second, it directs the connections to itself.

    The attached BPF program returns socket index 1; sockets are numbered from 0 in listening order. If no socket has
    index 1, the kernel chooses by hash as before.
    """
    if sys.platform != "linux":
        return
    filters = (_Filter * 1)(_Filter(_BPF_RET_K, 0, 0, 1))
    program = _Program(1, filters)
    with suppress(OSError):  # the kernel does not support it
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, bytes(program))


def distribute_to_all_servers(listener: socket.socket) -> None:
    """Distribute new connections over all listening sockets, without the BPF program of an earlier server.

    The program stays attached to the port after that server has ended.

    Args:
        listener: any listening socket of the port.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # no program is attached, or Linux is older than 5.3
            listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_REUSEPORT_BPF, 0)
