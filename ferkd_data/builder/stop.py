"""Stop a build early, as a pre-empted job must: shards in work may be finished within a grace time."""

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
    """A request to stop. A signal handler or another thread makes it; engines look at it between batches.

    `request` only sets a time, which is read as a whole, so no lock is needed. Raises UsageError for a negative grace
    time.
    """

    def __init__(self, grace_seconds: float = GRACE_SECONDS) -> None:
        if grace_seconds < 0:
            raise UsageError(f"the grace time must be 0 seconds or more, got {grace_seconds:g}")
        self.grace_seconds = grace_seconds
        self._requested_at: float | None = None
        self._labelling = False
        self.signal_number: int = signal.SIGTERM
        """The signal that made the request, for the exit status."""

    @property
    def requested(self) -> bool:
        """True once a stop was requested: no new shard is begun."""
        return self._requested_at is not None

    @property
    def expired(self) -> bool:
        """True when the grace time is over: shards in work are dropped."""
        return self._requested_at is not None and time.monotonic() - self._requested_at >= self.grace_seconds

    def request(self) -> None:
        """Request a stop. Raises BuildStoppedError at once where no shard is in work."""
        if self._requested_at is None:
            self._requested_at = time.monotonic()
        # A signal handler runs in the main thread between two of its instructions, so this ends whatever it was doing:
        # listing, loading teachers, writing the manifest.
        if not self._labelling:
            raise self.error()

    @contextmanager
    def labelling(self) -> Iterator[None]:
        """Have requests wait for the engine while the context lasts, since shards are in work."""
        if self.requested:
            raise self.error()
        self._labelling = True
        try:
            yield
        finally:
            self._labelling = False

    def error(self) -> BuildStoppedError:
        error = BuildStoppedError("stopped on request; run the same command again to resume")
        error.exit_code = 128 + self.signal_number
        return error


@contextmanager
def stop_on_sigterm(grace_seconds: float = GRACE_SECONDS) -> Iterator[Stop]:
    """Yield a Stop that SIGTERM and SIGHUP (a closed terminal) request. A second signal has its ordinary effect.

    Must be used in the main thread. A signal that is ignored, as SIGHUP is under `nohup`, stays ignored.
    """
    stop = Stop(grace_seconds)

    def on_signal(number: int, frame: FrameType | None) -> None:
        # First, so that a second signal has its ordinary effect from here on.
        for other, handler in before.items():
            signal.signal(other, handler)
        stop.signal_number = number
        stop.request()

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    # What is ignored stays so: nohup means that a closed terminal shall not stop the build.
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
