"""What a worker process tells its driver. The driver answers with the number of a shard, or None: that was all."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias


class Ready(NamedTuple):
    """Its teachers are loaded."""


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


class Failed(NamedTuple):
    """No other try would help."""

    kind: str
    """The class of ferkd_data.errors, or any other exception's name."""
    text: str
    trace: str


Message: TypeAlias = Ready | Asking | Answered | Halved | Labelled | Finished | Failed
