"""Messages over a Unix socket, and memory for crops, that the processes of a loader exchange.

A `Channel` carries pickled messages with file descriptors. A `Slot` is memory for the crops of a window; the training
owns it, lends it to a worker, then to the user as a batch, and uses it again when no tensor refers to it any more.

Fresh memory costs a page fault for every 4 KiB: for uint8 crops, a tenth of the time that cutting them takes. A slot
that workers fill is an anonymous file, mapped in the training as long as it exists. Mapping it in a worker costs a
twentieth of the time again, so a worker gets the same slots again and keeps a few megabytes of them mapped; beyond
that it maps a slot for as long as it works on it, and its memory does not grow with the batches made ahead.
"""

from __future__ import annotations

import itertools
import mmap
import os
import pickle
import socket
import struct
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ferkd_data.errors import LoaderError

HEADER = struct.Struct("!QI")
"""Bytes of the message that follows, and the number of its descriptors."""
MAX_DESCRIPTORS = 2
"""Descriptors that a message may have."""
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
        """Send a message. The receiver gets descriptors of its own for the same open files.

        Raises OSError when the other end is gone.
        """
        content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        # Descriptors travel with the header's bytes; the content follows without any, in as many pieces as it takes.
        socket.send_fds(self._socket, [HEADER.pack(len(content), len(descriptors))], descriptors)
        self._socket.sendall(content)

    def receive(self) -> tuple[Any, list[int]]:
        """Receive a message and descriptors, which the caller closes. Raises EOFError when the other end is gone."""
        try:
            header, descriptors, _, _ = socket.recv_fds(self._socket, HEADER.size, MAX_DESCRIPTORS, CLOSE_ON_EXEC)
            # A stream socket may give fewer bytes than were sent at once.
            while header and len(header) < HEADER.size:
                header += self._bytes(HEADER.size - len(header))
        except ConnectionResetError as error:
            raise EOFError from error
        # End of the stream between two messages: the other end was closed, or its process has ended.
        if not header:
            raise EOFError
        size, _ = HEADER.unpack(header)
        return pickle.loads(self._bytes(size)), descriptors

    def _bytes(self, size: int) -> bytearray:
        content = bytearray(size)
        # Received in place: a message may have many megabytes.
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
    """Make a channel: this process's end, and the socket of the other, to send with a message or pass at a start."""
    # Unix sockets, since only these carry descriptors.
    ours, theirs = socket.socketpair()
    return Channel(ours), theirs


def anonymous_file(size: int) -> int:
    """Make a file without a name, of `size` zero bytes, that other processes can map; returns its descriptor.

    On Linux it is a memfd, which takes nothing from /dev/shm; elsewhere a temporary file that is removed at once.
    """
    if sys.platform == "linux":
        descriptor = os.memfd_create("ferkd-data", os.MFD_CLOEXEC)
    else:
        import tempfile

        descriptor, path = tempfile.mkstemp(prefix="ferkd-data-")
        # Its content lives as long as a descriptor or a map of it.
        Path(path).unlink()
    try:
        # Sparse: pages are made, as zeros, when they are first touched.
        os.ftruncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def write_all(descriptor: int, content: memoryview | bytes) -> None:
    """Write the whole content, however long: a system writes at most 2 GiB at a time."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


POPULATE = getattr(mmap, "MAP_POPULATE", 0)
MAPPED_BYTES = 40 * 10**6
"""Bytes of slots that a worker keeps mapped, at most."""
NOT_KEPT = -1


class Slot:
    """Memory for the crops of a window, uint8 (num_crops, S, S, 3)."""

    def __init__(self, num_crops: int, size: int, *, shared: bool, number: int) -> None:
        self.shape = (num_crops, size)
        self.number = number
        """NOT_KEPT for one that is used once."""
        self.user: int | None = None
        """The worker that had it last, and may have it mapped."""
        self.descriptor = -1
        num_bytes = _num_bytes(num_crops, size)
        if shared:
            self.descriptor = anonymous_file(num_bytes)
            self.close = weakref.finalize(self, os.close, self.descriptor)
            # Python's mmap would hold another descriptor for as long as the map exists.
            flat = torch.from_file(f"/dev/fd/{self.descriptor}", shared=True, size=num_bytes, dtype=torch.uint8)
        else:
            # Without workers no other process reads it.
            flat = torch.empty(num_bytes, dtype=torch.uint8)
        self.pixels = flat.view(num_crops, size, size, 3)

    def images(self) -> Tensor:
        """(num_crops, 3, S, S) in the memory format that the cutter writes fastest (channels last)."""
        return self.pixels.permute(0, 3, 1, 2)


class MappedSlots:
    """The slots that a worker has mapped, by number."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def images(self, number: int, descriptor: int, num_crops: int, size: int) -> Tensor:
        """Map a slot, or find it mapped: its images, as `Slot.images` gives them."""
        shape = (num_crops, 3, size, size)
        found = self._kept.get(number)
        if found is not None and found.shape == shape:
            return found
        # Slots of the shape before are not used again (`BatchBuffers.take`), and their memory is free once they are
        # unmapped.
        self._kept = {number: images for number, images in self._kept.items() if images.shape == shape}
        num_bytes = _num_bytes(num_crops, size)
        # Without MAP_POPULATE, touching the pages one by one takes three times as long.
        mapped = mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | POPULATE)
        pixels = np.frombuffer(mapped, np.uint8).reshape(num_crops, size, size, 3)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        # All that are kept have this shape.
        if number != NOT_KEPT and (len(self._kept) + 1) * num_bytes <= MAPPED_BYTES:
            self._kept[number] = images
        return images


class BatchBuffers:
    """Slots for windows of one shape, at most `keep` of which are kept while unused.

    Used by the training's thread; only `give_back` may run in any thread.
    """

    def __init__(self, *, keep: int, shared: bool) -> None:
        self._keep = keep
        self._shared = shared
        self._shape = (0, 0)
        self._numbers = itertools.count()
        # Weak: slots live through `_free`, the jobs that write them and the tensors lent, and go with the last of
        # these.
        self._kept: weakref.WeakSet[Slot] = weakref.WeakSet()
        self._free: list[Slot] = []

    def take(self, num_crops: int, size: int, user: int | None = None) -> Slot:
        """Take an unused slot for `num_crops` crops of this size; if possible one that this worker had before.

        A new shape drops the slots of the shape before.
        Raises LoaderError when the machine has less memory than `keep` slots need.
        """
        if (num_crops, size) != self._shape:
            # Slots of the old shape that are still lent are not taken back: `give_back` compares the shape.
            self._shape, self._kept, self._free = (num_crops, size), weakref.WeakSet(), []
            self._check_memory()
        slot = self._take_free(user)
        slot.user = user
        return slot

    def _take_free(self, user: int | None) -> Slot:
        # From the end: the slot used last is the most likely to be in a core's cache.
        for i in range(len(self._free) - 1, -1, -1):
            if self._free[i].user == user:
                return self._free.pop(i)
        # None that this worker has mapped: a new one while there may be more, rather than one that another has mapped.
        if len(self._kept) < self._keep:
            slot = self._new(next(self._numbers))
            self._kept.add(slot)
            return slot
        # The user holds more batches than expected: memory that is used once and freed, so that nothing waits.
        return self._free.pop() if self._free else self._new(NOT_KEPT)

    def _new(self, number: int) -> Slot:
        try:
            return Slot(*self._shape, shared=self._shared, number=number)
        except (OSError, RuntimeError) as error:
            raise self._no_memory(1, str(error).splitlines()[0]) from error

    def give_back(self, slot: Slot) -> None:
        # The garbage collector calls this too, in any thread: an append is atomic, and moves no other slot.
        if slot.number != NOT_KEPT and slot.shape == self._shape:
            self._free.append(slot)

    def lend(self, slot: Slot, num_crops: int) -> Tensor:
        """Lend a slot's first crops as a tensor. The slot is free again when no tensor refers to that memory."""
        if slot.number == NOT_KEPT and self._shared:
            # Users may hold thousands of batches, but not as many open files.
            slot.close()
        # Every view of the tensor refers to this array, so it ends when the last of them does. The finalizer holds the
        # slot.
        array = slot.pixels[:num_crops].numpy()
        # At exit, memory need not be given back, and other modules may be gone.
        weakref.finalize(array, self.give_back, slot).atexit = False
        return torch.from_numpy(array).permute(0, 3, 1, 2)

    def _check_memory(self) -> None:
        # A memfd takes memory as it is written, and too much of it ends in the OOM killer and not in an error.
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self._keep * _num_bytes(*self._shape) > there:
            raise self._no_memory(self._keep, f"this machine has {there / 1e6:,.0f} MB")

    def _no_memory(self, slots: int, why: str) -> LoaderError:
        num_crops, size = self._shape
        megabytes = slots * _num_bytes(num_crops, size) / 1e6
        return LoaderError(
            f"{slots} windows of {num_crops} crops of {size} pixels need {megabytes:,.0f} MB of memory, which could "
            f"not be allocated ({why}); lower num_workers, prefetch_factor, batch_size or spread"
        )


def _num_bytes(num_crops: int, size: int) -> int:
    return num_crops * size * size * 3
