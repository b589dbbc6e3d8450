"""The protocol between the driver of a build and its workers, wherever they run.

A worker gets ready when it starts (message Ready). Then the driver asks it for one thing at a time:

| request | messages |
| --- | --- |
| `label(shard)` | Labelled as often as there is something new, then Computed |
| `settle()`, where there is no other shard for it | Settled |
| `measure(refs)`, in a dry run | Measured |

ShardSaved and Halved may come with any of them. Slow and Failed end a request, and the worker with it. A worker whose
GPU failed (Failed with the kind DeviceFailedError) is replaced like one that died; any other Failed ends the build.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

from ferkd_data.builder.labelling.measuring import Sample
from ferkd_data.images import ImageRef


class Ready(NamedTuple):
    """The teachers are loaded."""

    node: str
    process: int


class Halved(NamedTuple):
    """The device's memory is too small for the batch: `teacher` gets `crops` at a time from now on."""

    teacher: str
    crops: int


class Labelled(NamedTuple):
    """Progress in the shard that was asked for. With 0 crops, a sign of life."""

    crops: int
    """Crops labelled since the message before."""
    rejects: int
    """Images of this shard rejected so far."""


class Computed(NamedTuple):
    """The shard is labelled, and being written. The worker is free for another."""


class ShardSaved(NamedTuple):
    """A shard is written, and its record is saved."""

    shard: int


class Settled(NamedTuple):
    """All that was labelled is written."""


class Measured(NamedTuple):
    """The labelling is timed."""

    sample: Sample


class Slow(NamedTuple):
    """The worker has waited for this teacher as long as a worker may, and still waits."""

    teacher: str


class Failed(NamedTuple):
    """An error that no retry in this process would help."""

    kind: str
    """The class in ferkd_data.errors, or any other exception's name."""
    text: str
    trace: str


Message: TypeAlias = Ready | Halved | Labelled | Computed | ShardSaved | Settled | Measured | Slow | Failed


class WorkerLostError(Exception):
    """A worker has died or cannot be reached; the text completes "worker N …"."""


class Worker(Protocol):
    """A worker as the driver sees it."""

    number: int

    def __str__(self) -> str:
        """Return its number, and where it runs as far as that is known."""

    def location(self, ready: Ready) -> str:
        """Return where it runs, for the progress and the log."""

    def label(self, shard: int) -> None:
        """Ask it to label a shard; does not wait."""

    def settle(self) -> None:
        """Ask it to finish writing; does not wait."""

    def measure(self, refs: Sequence[ImageRef]) -> None:
        """Ask it to time the labelling of these images; does not wait."""

    def receive(self) -> Message:
        """Wait for the next message and return it. Raises WorkerLostError."""

    def leave(self) -> None:
        """Tell it that there is nothing more to do."""

    def end(self, wait_seconds: float) -> None:
        """Return when the worker is gone: by itself within that time, or killed."""


AnyWorker = TypeVar("AnyWorker", bound=Worker)


class Workers(Protocol[AnyWorker]):
    """Starts workers of one kind, and waits for their messages."""

    when_none_gets_ready: str
    """Advice to the user where workers die before they are ready."""

    def room(self) -> int:
        """Return how many there can be now. Asked again from time to time."""

    def start(self, number: int) -> AnyWorker: ...

    def with_messages(self, workers: Sequence[AnyWorker], seconds: float) -> list[AnyWorker]:
        """Return those that have a message or are lost; wait up to `seconds` for the first."""
