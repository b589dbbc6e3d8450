"""A request to end soon, as a pre-empted job gets it: the shards in work may be finished within a grace time."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ferkd_data.errors import BuildStoppedError, UsageError

GRACE_SECONDS = 20.0
"""Batch systems usually kill 30 seconds after SIGTERM."""


class Stop:
    """Asked for by a signal handler or another thread, looked at by the engines."""

    def __init__(self, grace_seconds: float = GRACE_SECONDS) -> None:
        if grace_seconds < 0:
            raise UsageError(f"the grace time must be 0 seconds or more, got {grace_seconds:g}")
        self.grace_seconds = grace_seconds
        self._requested_at: float | None = None
        self._labelling = False
        self.signal_number: int = signal.SIGTERM
        """The signal that asked, for the exit status."""

    @property
    def requested(self) -> bool:
        """No new shard is begun."""
        return self._requested_at is not None

    @property
    def expired(self) -> bool:
        """The shards in work are dropped."""
        return self._requested_at is not None and time.monotonic() - self._requested_at >= self.grace_seconds

    def request(self) -> None:
        """Raises BuildStoppedError at once where no shard is in work."""
        if self._requested_at is None:
            self._requested_at = time.monotonic()
        if not self._labelling:
            raise self.error()

    @contextmanager
    def labelling(self) -> Iterator[None]:
        """While shards are in work, a request waits for the engine to look at it."""
        if self.requested:
            raise self.error()
        self._labelling = True
        try:
            yield
        finally:
            self._labelling = False

    def error(self) -> BuildStoppedError:
        error = BuildStoppedError("stopped on request; run the same command again to go on where it stopped")
        error.exit_code = 128 + self.signal_number
        return error


@contextmanager
def stop_on_sigterm(grace_seconds: float = GRACE_SECONDS) -> Iterator[Stop]:
    """A Stop that SIGTERM and SIGHUP (a closed terminal) ask for. A second one does what it would do without this.

    Only the main thread can have it. A signal that is ignored, as SIGHUP is under `nohup`, stays ignored.
    """
    stop = Stop(grace_seconds)

    def on_signal(number: int, frame: FrameType | None) -> None:
        for other, handler in before.items():
            signal.signal(other, handler)
        stop.signal_number = number
        stop.request()

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
