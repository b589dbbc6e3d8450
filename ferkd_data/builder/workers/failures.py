"""What a worker could not do, as the error that the build raises."""

from __future__ import annotations

from collections.abc import Sequence

from ferkd_data import errors
from ferkd_data.builder.workers.messages import Failed
from ferkd_data.errors import BuildError, FerkdError, TeacherError


class WorkerTraceback(Exception):
    """Where a worker raised, as text: the cause of what the driver raises."""


def failure(failed: Failed, worker: str, shards: Sequence[int] = ()) -> FerkdError:
    """An error of ours as it was raised; any other as a BuildError that says where.

    Of two `shards`, one was being written while the other was labelled, and either may be the one that failed.
    """
    place = f"shard {' or '.join(map(str, shards))}: {worker}" if shards else worker
    kind = getattr(errors, failed.kind, None)
    if isinstance(kind, type) and issubclass(kind, FerkdError) and kind is not errors.ImageError:
        error: FerkdError = kind(failed.text)
    else:
        error = BuildError(f"{place} failed: {failed.kind}: {failed.text} (--debug shows where)")
    error.__cause__ = WorkerTraceback(f"in {place}\n{failed.trace}")
    return error


def silent(shard: int, limit_seconds: float, worker: str) -> TeacherError:
    """Its process cannot even say which teacher."""
    return TeacherError(
        f"shard {shard}: a teacher hangs, and {worker} with it, for longer than {limit_seconds:g} seconds; the worker "
        "was ended. Run the same command again, with a larger --teacher-timeout if the teacher is slow"
    )


def too_slow(teacher: str, shard: int | None, limit_seconds: float, worker: str) -> TeacherError:
    return TeacherError(
        f"teacher {teacher}: no answer for a batch of shard {shard} within {limit_seconds:g} seconds, "
        f"{worker} was ended; run the same command again, with a larger --teacher-timeout if it is slow"
    )
