"""Messages between the processes of a loader, each with the file descriptors that go with it, over a Unix socket."""

from __future__ import annotations

import os
import pickle
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEADER = struct.Struct("!QI")
"""Bytes of the message that follows, and the number of its descriptors."""
MAX_DESCRIPTORS = 2
"""Of a message."""
CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Channel:
    """One end of a connection. Sending and receiving block; each may be done by one thread at a time.

    What is received is unpickled: both ends belong to the same training.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Any, descriptors: Sequence[int] = ()) -> None:
        """The receiver gets descriptors of its own for the same open files.

        Raises OSError when the other end is gone.
        """
        content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        socket.send_fds(self._socket, [HEADER.pack(len(content), len(descriptors))], descriptors)
        self._socket.sendall(content)

    def receive(self) -> tuple[Any, list[int]]:
        """A message and its descriptors, which the caller closes. Raises EOFError when the other end is gone."""
        try:
            header, descriptors, _, _ = socket.recv_fds(self._socket, HEADER.size, MAX_DESCRIPTORS, CLOSE_ON_EXEC)
            while header and len(header) < HEADER.size:
                header += self._bytes(HEADER.size - len(header))
        except ConnectionResetError as error:
            raise EOFError from error
        if not header:
            raise EOFError
        size, _ = HEADER.unpack(header)
        return pickle.loads(self._bytes(size)), descriptors

    def _bytes(self, size: int) -> bytearray:
        content = bytearray(size)
        view, at = memoryview(content), 0
        while at < size:
            try:
                count = self._socket.recv_into(view[at:])
            except ConnectionResetError as error:
                raise EOFError from error
            if not count:
                raise EOFError
            at += count
        return content

    def close(self) -> None:
        self._socket.close()


def channel_pair() -> tuple[Channel, socket.socket]:
    """An end for this process, and one to hand over: as a descriptor that goes with a message, or at a start."""
    ours, theirs = socket.socketpair()
    return Channel(ours), theirs


def anonymous_file(size: int) -> int:
    """The descriptor of a file without a name, of `size` zero bytes: memory that other processes can map.

    On Linux it is a memfd, which takes nothing from /dev/shm; elsewhere a temporary file that is removed at once.
    """
    if sys.platform == "linux":
        descriptor = os.memfd_create("ferkd-data", os.MFD_CLOEXEC)
    else:
        import tempfile

        descriptor, path = tempfile.mkstemp(prefix="ferkd-data-")
        Path(path).unlink()
    try:
        os.ftruncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def write_all(descriptor: int, content: memoryview | bytes) -> None:
    """Append the whole content: a system writes 2 GiB at a time at most."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
