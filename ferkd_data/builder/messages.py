"""What a worker tells its driver.

Over a pipe, the driver answers with the number of a shard, or None: that was all. A worker on Ray is called for each
shard and yields its messages: Opened when it was asked to get ready, then Labelled, at last Finished, Slow or Failed.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias


class Ready(NamedTuple):
    """Its teachers are loaded."""


class Opened(NamedTuple):
    """Its teachers are loaded, on a node of a cluster."""

    node: str
    process: int


class Asking(NamedTuple):
    """It waits for a teacher's answer. Sent only where the driver minds how long that takes."""

    teacher: str


class Answered(NamedTuple):
    """It does not wait any more."""


class Halved(NamedTuple):
    """The device's memory is too small for the batch; `teacher` gets `crops` at a time from now on."""

    teacher: str
    crops: int


class Labelled(NamedTuple):
    """A batch of a shard."""

    crops: int
    rejects: int
    """Of this shard so far."""


class Finished(NamedTuple):
    """A shard; its record is saved."""

    shard: int


class Slow(NamedTuple):
    """It has waited for this teacher as long as a worker may, and still does."""

    teacher: str


class Failed(NamedTuple):
    """No other try would help."""

    kind: str
    """The class of ferkd_data.errors, or any other exception's name."""
    text: str
    trace: str


Message: TypeAlias = Ready | Opened | Asking | Answered | Halved | Labelled | Finished | Slow | Failed
