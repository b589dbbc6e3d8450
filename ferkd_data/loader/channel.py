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
import numpy.typing as npt
import torch
from torch import Tensor

from ferkd_data.errors import LoaderError
from ferkd_data.storage import refuse_too_many_files

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
        """Receive a message and descriptors, which the caller closes. Raises EOFError when the other end is gone.

        The descriptors are none where this process may not open all of them.
        """
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
        size, sent = HEADER.unpack(header)
        message = pickle.loads(self._bytes(size))
        # The system drops descriptors above the process's limit without an error.
        if len(descriptors) < sent:
            while descriptors:
                os.close(descriptors.pop())
        return message, descriptors

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
CROP_MEMORY = "memory for crops"
"""What the memory is called in errors; it is a file without a name."""


Shapes = tuple[tuple[int, int], ...]
"""(crops, S) of a window: of one kind of crops, or of each kind, one behind the other."""


class Slot:
    """Memory for the crops of a window: for each shape, uint8 (num_crops, S, S, 3)."""

    def __init__(self, shapes: Shapes, *, shared: bool, number: int) -> None:
        self.shapes = shapes
        self.number = number
        """NOT_KEPT for one that is used once."""
        self.user: int | None = None
        """The worker that had it last, and may have it mapped."""
        self.descriptor = -1
        num_bytes = _num_bytes(shapes)
        if shared:
            self.descriptor = anonymous_file(num_bytes)
            self.close = weakref.finalize(self, os.close, self.descriptor)
            # Python's mmap would hold another descriptor for as long as the map exists.
            self.flat = torch.from_file(
                f"/dev/fd/{self.descriptor}", shared=True, size=num_bytes, dtype=torch.uint8, device="cpu"
            )
        else:
            # Without workers no other process reads it. The device is named, since users may have set another default.
            self.flat = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

    def images(self) -> tuple[Tensor, ...]:
        """(num_crops, 3, S, S) for each shape, in the memory format that the cutter writes fastest (channels last)."""
        return _images(self.flat.numpy(), self.shapes)


class MappedSlots:
    """The slots that a worker has mapped, by number."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, ...]] = {}
        self._shapes: Shapes = ()

    def images(self, number: int, descriptor: int, shapes: Shapes) -> tuple[Tensor, ...]:
        """Map a slot, or find it mapped: its images, as `Slot.images` gives them."""
        if shapes != self._shapes:
            # Slots of the shapes before are not used again (`BatchBuffers.take`), and their memory is free once they
            # are unmapped.
            self._kept, self._shapes = {}, shapes
        found = self._kept.get(number)
        if found is not None:
            return found
        num_bytes = _num_bytes(shapes)
        # Without MAP_POPULATE, touching the pages one by one takes three times as long.
        mapped = mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | POPULATE)
        images = _images(np.frombuffer(mapped, np.uint8), shapes)
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
        self._shapes: Shapes = ()
        self._numbers = itertools.count()
        # Weak: slots live through `_free`, the jobs that write them and the tensors lent, and go with the last of
        # these.
        self._kept: weakref.WeakSet[Slot] = weakref.WeakSet()
        self._free: list[Slot] = []

    def take(self, shapes: Shapes, user: int | None = None) -> Slot:
        """Take an unused slot for crops of these shapes; if possible one that this worker had before.

        New shapes drop the slots of the shapes before.
        Raises LoaderError when the machine has less memory than `keep` slots need.
        """
        if shapes != self._shapes:
            # Slots of the old shapes that are still lent are not taken back: `give_back` compares the shapes.
            self._shapes, self._kept, self._free = shapes, weakref.WeakSet(), []
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
            return Slot(self._shapes, shared=self._shared, number=number)
        except (OSError, RuntimeError) as error:
            refuse_too_many_files(CROP_MEMORY, error)
            raise self._no_memory(1, str(error).splitlines()[0]) from error

    def give_back(self, slot: Slot) -> None:
        # The garbage collector calls this too, in any thread: an append is atomic, and moves no other slot.
        if slot.number != NOT_KEPT and slot.shapes == self._shapes:
            self._free.append(slot)

    def lend(self, slot: Slot, counts: Sequence[int]) -> tuple[Tensor, ...]:
        """Lend the first `counts` crops of each shape. The slot is free again when no tensor refers to its memory."""
        if slot.number == NOT_KEPT and self._shared:
            # Users may hold thousands of batches, but not as many open files.
            slot.close()
        # The arrays of all shapes refer to this one, and every tensor to its array: it ends when the last view of any
        # of them does. The finalizer holds the slot.
        whole = slot.flat.numpy()
        # At exit, memory need not be given back, and other modules may be gone.
        weakref.finalize(whole, self.give_back, slot).atexit = False
        return _images(whole, slot.shapes, counts)

    def _check_memory(self) -> None:
        # A memfd takes memory as it is written, and too much of it ends in the OOM killer and not in an error.
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self._keep * _num_bytes(self._shapes) > there:
            raise self._no_memory(self._keep, f"this machine has {there / 1e6:,.0f} MB")

    def _no_memory(self, slots: int, why: str) -> LoaderError:
        megabytes = slots * _num_bytes(self._shapes) / 1e6
        shapes = " and ".join(f"{num_crops} crops of {size} pixels" for num_crops, size in self._shapes)
        return LoaderError(
            f"{slots} windows of {shapes} need {megabytes:,.0f} MB of memory, which could not be allocated ({why}); "
            "lower num_workers, prefetch_factor, batch_size or spread"
        )


def _num_bytes(shapes: Shapes) -> int:
    return sum(num_crops * size * size * 3 for num_crops, size in shapes)


def _images(flat: npt.NDArray[np.uint8], shapes: Shapes, counts: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    """Return views of the memory of these shapes, (num_crops, 3, S, S) each; with `counts`, of so many crops of each.

    Each tensor has a storage of its own, so that who saves one kind of crops does not save the others with it.
    """
    found, start = [], 0
    for (num_crops, size), count in zip(shapes, counts or [num_crops for num_crops, _ in shapes], strict=True):
        pixels = flat[start : start + count * size * size * 3].reshape(count, size, size, 3)
        found.append(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        start += num_crops * size * size * 3
    return tuple(found)
