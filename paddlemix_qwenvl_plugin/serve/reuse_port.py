"""Two servers on one port: the kernel gives each connection to one of the sockets that listen (SO_REUSEPORT).

A socket that is closed takes with it the connections that it was given and that nobody has accepted, those whose
handshake is on its way included: their clients see a reset. So the old server first has the kernel give it no more.
"""

from __future__ import annotations

import ctypes
import socket
import sys
from contextlib import suppress

# Linux, asm-generic/socket.h; Python does not name them.
_SO_ATTACH_REUSEPORT_CBPF = 51
_SO_DETACH_REUSEPORT_BPF = 68
_BPF_RET_K = 0x06


class _Filter(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("filters", ctypes.POINTER(_Filter)))


def give_to_the_newer(listener: socket.socket) -> None:
    """Have the kernel give new connections to the server that began to listen after this one.

    The program that chooses a socket says "number 1", and they are numbered from 0 as they came. Where there is no
    number 1 the kernel chooses as before. On other systems than Linux nothing happens.
    """
    if sys.platform != "linux":
        return
    filters = (_Filter * 1)(_Filter(_BPF_RET_K, 0, 0, 1))
    program = _Program(1, filters)
    with suppress(OSError):  # a kernel without it
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, bytes(program))


def give_to_all(listener: socket.socket) -> None:
    """Have the kernel spread new connections over all sockets again: an earlier server's choice outlives it.

    Args:
        listener: a socket that listens.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # there is no such choice, or Linux is older than 5.3
            listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_REUSEPORT_BPF, 0)
