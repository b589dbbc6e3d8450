"""One thread for a piece of work, without touching the user's own thread settings.

PyTorch's kernels share even the work for one crop among all compute threads. Each of them then waits for the others,
busily: where other processes want the cores too, 27 times the CPU time of one thread was measured.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch's kernels in the calling thread alone; other threads of the process go on as they were.

    `torch.set_num_threads` would speak for all threads, so OpenMP is asked for the calling one. Where PyTorch was
    built without OpenMP, nothing changes.
    """
    before = torch.get_num_threads()
    if before == 1 or _set_threads is None:
        yield
        return
    _set_threads(1)
    try:
        yield
    finally:
        _set_threads(before)


def _find() -> Callable[[int], None] | None:
    """OpenMP's function that sets the calling thread's number of threads, from the library that PyTorch has loaded."""
    try:
        # A symbol is looked for in all that this library needs.
        found = ctypes.CDLL(torch._C.__file__).omp_set_num_threads
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = [ctypes.c_int], None
    before = torch.get_num_threads()
    found(1)
    works = torch.get_num_threads() == 1
    found(before)
    return found if works else None


_set_threads = _find()
