"""Events of a build, and the protocol of those who watch it: displays, logs, metrics, reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from ferkd_data.teachers.probe import TeacherProbe


@dataclass(frozen=True, kw_only=True)
class Overview:
    """The images and teachers as the build understands them, before it labels anything."""

    source: str
    extends: bool
    """Whether a finished label set grows: images that keep their labels as they are do not count below."""
    images: int
    """Images to be labelled, without those that the listing rejected."""
    images_with_target: int
    rejects: dict[str, int]
    """Images that the listing rejected, by reason."""
    left_out: dict[str, int]
    """Number of files that are no images, by reason (see ferkd_data.images.refs)."""
    left_out_examples: dict[str, str]
    notes: tuple[str, ...]
    """Remarks for a person about how the source was read."""
    num_classes: int
    first_class: str | None
    """Name of class 0, where classes have names."""
    last_class: str | None
    shards: int
    crops_per_image: int
    crop_kinds: tuple[str, ...]
    """Each kind of crops in words; empty where all crops are of one distribution."""
    teachers: tuple[TeacherProbe, ...]
    """Each teacher's answers to a few images; empty where all shards are labelled, or memory was short."""


@dataclass(frozen=True, kw_only=True)
class BuildStarted:
    """The plan is made and the labelling begins."""

    out: str
    source: str
    teachers: tuple[str, ...]
    settings: dict[str, Any]
    devices: tuple[str, ...]
    """The device of each worker."""
    extends: bool
    shards: int
    shards_done: int
    """Shards finished by earlier runs of this build."""
    images: int
    crops: int
    """Crops still to be labelled."""
    forwards: int
    """Forward passes of these crops: crops x teachers."""


@dataclass(frozen=True, kw_only=True)
class WorkerStarted:
    """A worker has loaded its teachers."""

    worker: int
    device: str


@dataclass(frozen=True, kw_only=True)
class WorkerDied:
    """A worker is gone; a new one takes its place."""

    worker: int
    how: str
    shards: tuple[int, ...]
    """Shards that it labelled or wrote. Other workers get them."""


@dataclass(frozen=True, kw_only=True)
class BatchHalved:
    """A device ran out of memory; the teacher gets `crops` at a time from now on."""

    worker: int
    teacher: str
    crops: int


@dataclass(frozen=True, kw_only=True)
class ShardDone:
    """A shard is labelled, written and recorded."""

    shard: int
    worker: int
    seconds: float
    images: int
    """Images that were labelled."""
    crops: int
    rejects: int


@dataclass(frozen=True, kw_only=True)
class ImageRejected:
    """An image cannot be used."""

    shard: int | None
    """None where the listing of the source rejected the image."""
    key: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class WorkerProgress:
    """The rate of one worker."""

    worker: int
    shard: int
    """The image shard of its last report."""
    crops_per_second: float
    """Rate over the last minute."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of the build. The one event that comes with every batch."""

    shard: int
    """The image shard in work."""
    shards_done: int
    shards_total: int
    images_done: int
    """Images labelled or rejected, also by earlier runs of this build."""
    images_total: int
    crops_done: int
    """Crops labelled by this run."""
    rejects: int
    crops_per_second: float
    """Rate over this run."""
    seconds_left: float | None
    workers: tuple[WorkerProgress, ...] = ()
    """Every worker that has labelled anything, in the order of their numbers; up to a second old."""
    stragglers: tuple[int, ...] = ()
    """Workers with a shard in work that label at less than half of the median rate, or not at all for a minute."""
    forwards_done: int = 0
    """Forward passes of this run so far, also in shards that were lost."""
    forwards_total: int = 0
    """Forward passes that this run needs in all."""


@dataclass(frozen=True, kw_only=True)
class BuildFinished:
    """The label set, or the part of it, is whole; also where it was so before, and nothing was done."""

    out: str
    images: int
    rejects: int
    files: int


@dataclass(frozen=True, kw_only=True)
class BuildFailed:
    """The build ended with an error, or was stopped."""

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
    """Sees every event of a build.

    Called in the driver's thread, between batches, so it must be quick. An exception that it raises ends the build.
    """

    def see(self, event: Event) -> None: ...


class Watchers:
    """Several watchers, and a function of the progress, as one watcher."""

    def __init__(self, watchers: Sequence[Watcher] = (), on_progress: OnProgress | None = None) -> None:
        self._watchers = tuple(watchers)
        self._on_progress = on_progress

    def see(self, event: Event) -> None:
        for watcher in self._watchers:
            watcher.see(event)
        if self._on_progress is not None and isinstance(event, Progress):
            self._on_progress(event)

    @contextmanager
    def reporting_failure(self) -> Iterator[None]:
        """Report an exception that leaves the context as BuildFailed."""
        try:
            yield
        except BaseException as error:
            # A watcher's own error, such as a log on a full disk, must not hide why the build failed.
            with suppress(OSError):
                self.see(BuildFailed(error=type(error).__name__, reason=str(error)))
            raise
