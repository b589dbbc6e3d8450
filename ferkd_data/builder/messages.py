"""What a worker process tells its driver. The driver answers with the number of a shard, or None: that was all."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias


class Ready(NamedTuple):
    """Its teachers are loaded."""


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


Message: TypeAlias = Ready | Labelled | Finished | Failed
