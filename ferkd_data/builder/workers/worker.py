"""Workers as the driver sees them, wherever they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from ferkd_data.builder.workers.messages import Message, Ready


class WorkerLostError(Exception):
    """It has died, or cannot be reached; the text says how. The cause is known where something told."""


class Worker(Protocol):
    """Another process; it gets ready as soon as it is there."""

    number: int

    def __str__(self) -> str:
        """Its number, and where it runs as far as that is known."""

    def place(self, ready: Ready) -> str:
        """Where it runs, for the progress and the log."""

    def label(self, shard: int) -> None:
        """Ask it to; the answer is heard."""

    def settle(self) -> None:
        """The same."""

    def hear(self) -> Message:
        """The next message; waits for it. Raises WorkerLostError."""

    def leave(self) -> None:
        """There is nothing more to do for it."""

    def end(self, patience_seconds: float) -> None:
        """Returns when it is gone: by itself within that time, or killed."""


AnyWorker = TypeVar("AnyWorker", bound=Worker)


class Workers(Protocol[AnyWorker]):
    when_none_gets_ready: str
    """What the user may try then."""

    def room(self) -> int:
        """How many there can be now; asked again from time to time."""

    def start(self, number: int) -> AnyWorker: ...

    def with_news(self, workers: Sequence[AnyWorker], seconds: float) -> list[AnyWorker]:
        """Those that have a message, or are lost. Waits that long for some."""
