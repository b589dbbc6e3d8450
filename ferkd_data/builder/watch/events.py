"""What happens in a build, as records, and who may watch it: one small protocol for displays, logs and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from ferkd_data.teachers.probe import TeacherProbe


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What a build has understood of its images and teachers, before it labels anything."""

    source: str
    images: int
    """To be labelled, without those that the listing rejected."""
    images_with_target: int
    rejects: dict[str, int]
    """By the listing: reason -> images."""
    left_out: dict[str, int]
    """Files that are no images, by reason (see ferkd_data.images.refs)."""
    left_out_examples: dict[str, str]
    notes: tuple[str, ...]
    """What a person should know of how the source was read."""
    num_classes: int
    first_class: str | None
    """Name of class 0, where classes have names."""
    last_class: str | None
    shards: int
    crops_per_image: int
    teachers: tuple[TeacherProbe, ...]
    """What each teacher says of a few images; none where all shards are labelled, or where it could not be asked."""


@dataclass(frozen=True, kw_only=True)
class BuildStarted:
    """The plan is made and the labelling begins."""

    out: str
    source: str
    teachers: tuple[str, ...]
    settings: dict[str, Any]
    devices: tuple[str, ...]
    """Of each worker."""
    extends: bool
    shards: int
    shards_done: int
    """By earlier runs of this build."""
    images: int
    crops: int
    """Still to be labelled."""
    forwards: int
    """These crops through every teacher."""


@dataclass(frozen=True, kw_only=True)
class WorkerStarted:
    worker: int
    device: str


@dataclass(frozen=True, kw_only=True)
class WorkerDied:
    worker: int
    how: str
    shards: tuple[int, ...]
    """What it labelled or wrote, which other workers get."""


@dataclass(frozen=True, kw_only=True)
class BatchHalved:
    """A device ran out of memory; the teacher gets `crops` at a time from now on."""

    worker: int
    teacher: str
    crops: int


@dataclass(frozen=True, kw_only=True)
class ShardDone:
    shard: int
    worker: int
    seconds: float
    images: int
    """Labelled ones."""
    crops: int
    rejects: int


@dataclass(frozen=True, kw_only=True)
class ImageRejected:
    shard: int | None
    """None where the listing of the source rejected it."""
    key: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class WorkerProgress:
    worker: int
    shard: int
    """The image shard that it last spoke of."""
    crops_per_second: float
    """Over the last minute."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a build is. The one event that comes with every batch."""

    shard: int
    """The image shard in work."""
    shards_done: int
    shards_total: int
    images_done: int
    """Labelled or rejected, also by earlier runs of this build."""
    images_total: int
    crops_done: int
    """By this run."""
    rejects: int
    crops_per_second: float
    """Over this run."""
    seconds_left: float | None
    workers: tuple[WorkerProgress, ...] = ()
    """Every worker that has labelled anything, in the order of their numbers; up to a second old."""
    stragglers: tuple[int, ...] = ()
    """Workers with a shard in work that label at less than half of the median rate, or not at all for a minute."""
    forwards_done: int = 0
    """Crops through teachers by this run, those of shards that were lost included: what it has cost so far."""
    forwards_total: int = 0
    """What this run needs in all."""


@dataclass(frozen=True, kw_only=True)
class BuildFinished:
    """The label set, or the part of it, is whole."""

    images: int
    rejects: int
    files: int


@dataclass(frozen=True, kw_only=True)
class BuildFailed:
    error: str
    """The exception's class."""
    reason: str


Event: TypeAlias = (
    Overview
    | BuildStarted
    | WorkerStarted
    | WorkerDied
    | BatchHalved
    | ShardDone
    | ImageRejected
    | Progress
    | BuildFinished
    | BuildFailed
)
OnProgress = Callable[[Progress], None]


class Watcher(Protocol):
    """Called in the driver's thread, between batches: be quick. What it raises ends the build."""

    def see(self, event: Event) -> None: ...


class Watchers:
    """All who watch one build, as one watcher."""

    def __init__(self, watchers: Sequence[Watcher] = (), on_progress: OnProgress | None = None) -> None:
        self._watchers = tuple(watchers)
        self._on_progress = on_progress

    def see(self, event: Event) -> None:
        for watcher in self._watchers:
            watcher.see(event)
        if self._on_progress is not None and isinstance(event, Progress):
            self._on_progress(event)

    @contextmanager
    def told_of_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            # A log on a full disk must not take the place of the reason why the build failed.
            with suppress(OSError):
                self.see(BuildFailed(error=type(error).__name__, reason=str(error)))
            raise
