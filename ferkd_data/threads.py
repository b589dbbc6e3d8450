"""Thread pools that Ctrl-C ends."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import TracebackType


class Threads(ThreadPoolExecutor):
    """A thread pool whose `with` block Ctrl-C leaves at once, and an error as soon as nothing is under way.

    The standard pool would do all that was asked of it first. No thread can be stopped from outside: what is under way
    when Ctrl-C comes ends by itself.
    """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.shutdown(wait=not interrupted, cancel_futures=kind is not None)
