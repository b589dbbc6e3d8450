"""What a worker tells its driver.

A worker is asked to get ready (Ready), then to label a shard (Labelled, at last Computed), and where there is no other
shard for it, to settle (at last Settled). Finished comes with any of these. Slow and Failed end what was asked for.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias


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
