"""What a worker tells its driver.

A worker is asked to get ready (Ready), then to label a shard (Labelled, at last Computed), and where there is no other
shard for it, to settle (at last Settled). Finished comes with any of these. Slow and Failed end what was asked for.

Workers as the driver sees them, wherever they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias, TypeVar


class Ready(NamedTuple):
    """Its teachers are loaded."""

    node: str
    process: int


class Halved(NamedTuple):
    """The device's memory is too small for the batch; `teacher` gets `crops` at a time from now on."""

    teacher: str
    crops: int


class Labelled(NamedTuple):
    """Crops of the shard that it was asked for, since it last said so. None is a sign of life."""

    crops: int
    rejects: int
    """Of this shard so far."""


class Computed(NamedTuple):
    """The shard is labelled, and being written. The worker is free for another."""


class Finished(NamedTuple):
    """A shard that was labelled is written; its record is saved."""

    shard: int


class Settled(NamedTuple):
    """All that was labelled is written."""


class Slow(NamedTuple):
    """It has waited for this teacher as long as a worker may, and still does."""

    teacher: str


class Failed(NamedTuple):
    """No other try would help."""

    kind: str
    """The class of ferkd_data.errors, or any other exception's name."""
    text: str
    trace: str


Message: TypeAlias = Ready | Halved | Labelled | Computed | Finished | Settled | Slow | Failed


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
