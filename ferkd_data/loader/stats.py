"""`LoaderStats`: where the time of an epoch went, what the training waited for, and what to do about it.

The times come from `clocks.py`; `judge` names the bottleneck.
"""

from __future__ import annotations

import logging
import os
import textwrap
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ferkd_data.html_tables import html_table
from ferkd_data.loader.clocks import Times
from ferkd_data.loader.ranks import Ranks
from ferkd_data.loader.settings import LoaderSettings
from ferkd_data.words import percent

log = logging.getLogger("ferkd_data.loader")

WIDTH = 79
BAR = 20
NO_BATCH = "no batch yet: iterate over the loader first"


@dataclass(frozen=True, kw_only=True, repr=False)
class LoaderStats:
    """Where the time of one epoch went; see `CropLoader.stats`. `print` it for a table, `asdict` it for a logger.

    Times are wall time in seconds. The training process divides its own into waiting, hand-over and your step; the
    stages are summed over the processes that made the batches, which work side by side.

    >>> loader = fd.CropLoader(fd.open_labels("labels-with-images"), batch_size=4, crops_per_image=2, size=32)
    >>> for images, targets in loader:
    ...     pass
    >>> stats = loader.stats()
    >>> stats.batches, stats.images, stats.crops
    (2, 4, 8)
    """

    epoch: int
    """The epoch that is under way, else the last one."""
    batches: int
    """Batches given."""
    of_batches: int
    """Batches of the whole iteration: of the epoch or, after `load_state_dict`, of its rest."""
    images: int
    """Images that were read and decoded for these batches."""
    crops: int
    """Crops given."""
    prepare_seconds: float
    """Time before the first batch was begun: unpacking a crop block, where the cache does not have it."""
    wait_seconds: float
    """Time in which the training waited for batches to be made: by workers, or by its own process without workers."""
    hand_over_seconds: float
    """Time in the training process for pin_memory, targets="dense" and to_batch."""
    step_seconds: float
    """Time that your loop took between two batches."""
    stage_seconds: dict[str, float]
    """Seconds by stage, summed over processes: read, decode, cut, label, mix, transform, send (see `STAGES`)."""
    num_workers: int
    here_share: float
    """The share of the work that the training process did itself; with workers, until the first one was ready."""
    bottleneck: str
    """"your step", "hand-over", the stage that takes most of the time, or "unknown"."""
    advice: str
    """One line: what would help."""

    @property
    def seconds(self) -> float:
        """Time from the first batch on."""
        # Without "prepare": unpacking happens once for all epochs, and would spoil every rate of the first one.
        return self.wait_seconds + self.hand_over_seconds + self.step_seconds

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def crops_per_second(self) -> float:
        return self.crops / self.seconds if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        """The share of the time that the training waited for batches: 0 to 1."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    @property
    def stage_shares(self) -> dict[str, float]:
        """Each stage's share of the sum of all stages."""
        total = sum(self.stage_seconds.values())
        return {stage: seconds / total if total else 0.0 for stage, seconds in self.stage_seconds.items()}

    def line(self) -> str:
        """Describe the epoch in one line, as `log_stats=True` logs it."""
        if not self.batches:
            return f"epoch {self.epoch}: {NO_BATCH}"
        text = (
            f"epoch {self.epoch}: {self._batches()} in {self.seconds:,.1f} s, {self.images_per_second:,.0f} images/s, "
            f"{self.crops_per_second:,.0f} crops/s, {percent(self.wait_share, 0)} of it waiting; "
            f"bottleneck: {self.bottleneck}"
        )
        return text if self.bottleneck == "your step" else f"{text} ({self.advice})"

    def _batches(self) -> str:
        batches = f"{self.of_batches:,} batch{'' if self.of_batches == 1 else 'es'}"
        return batches if self.batches == self.of_batches else f"{self.batches:,} of {batches}"

    def _rows(self) -> list[tuple[str, str]]:
        if not self.batches:
            return [("", NO_BATCH)]
        parts = [("your step", self.step_seconds), ("waiting for batches", self.wait_seconds)]
        parts += [("hand-over", self.hand_over_seconds)]
        shared = [f"{name} {percent(value / self.seconds, 0)}" if self.seconds else name for name, value in parts]
        rows = [
            ("speed", f"{self.images_per_second:,.0f} images/s, {self.crops_per_second:,.0f} crops/s"),
            ("time", f"{self.seconds:,.1f} s: {', '.join(shared)}"),
        ]
        if self.prepare_seconds >= 0.1:
            rows.append(("before it", f"{self.prepare_seconds:,.1f} s to unpack labels"))
        rows.append(("made by", self._makers()))
        for stage, seconds in self.stage_seconds.items():
            share = self.stage_shares[stage]
            bar = "#" * round(share * BAR)
            rows.append((f"  {stage}", f"{seconds:9,.2f} s {percent(share, 0):>4}  {bar}".rstrip()))
        return [*rows, ("bottleneck", self.bottleneck), ("advice", self.advice)]

    def _makers(self) -> str:
        if not self.num_workers:
            return "the training process"
        workers = f"{self.num_workers} worker{'' if self.num_workers == 1 else 's'}"
        if not self.here_share:
            return workers
        return f"{workers}; {percent(self.here_share, 0)} by the training process, before they had started"

    def __str__(self) -> str:
        lines = [f"LoaderStats: epoch {self.epoch}, {self._batches()}"]
        for name, text in self._rows():
            head = f"  {name:<13}"
            lines += textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head)) or [head]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        return html_table(f"LoaderStats: epoch {self.epoch}, {self._batches()}", self._rows())


def log_stats(stats: LoaderStats, ranks: Ranks) -> None:
    """Log an epoch's line, and warn where logging is set up so that nobody would see it."""
    if not stats.batches:
        return
    # Python's default level is WARNING: without a word, log_stats=True would do nothing in a plain script.
    if not log.isEnabledFor(logging.INFO):
        warnings.warn(
            "log_stats=True logs at level INFO, which is not shown; call logging.basicConfig(level=logging.INFO), or "
            "print(loader.stats())",
            stacklevel=2,
        )
    rank = f"rank {ranks.rank} of {ranks.world_size}, " if ranks.world_size > 1 else ""
    log.info("%s%s", rank, stats.line())


def stats_of(times: Times, settings: LoaderSettings) -> LoaderStats:
    """Make the statistics of an epoch from its clock's times."""
    bottleneck, advice = "unknown", NO_BATCH
    seconds = times.seconds
    if times.batches:
        bottleneck, advice = judge(
            _setup(settings, times.epoch),
            wait=seconds["wait"],
            hand_over=seconds["hand_over"],
            step=seconds["step"],
            stages=times.stage_seconds,
            here_share=times.here_share,
        )
    return LoaderStats(
        epoch=times.epoch,
        batches=times.batches,
        of_batches=times.of_batches,
        images=times.images,
        crops=times.crops,
        prepare_seconds=seconds["prepare"],
        wait_seconds=seconds["wait"],
        hand_over_seconds=seconds["hand_over"],
        step_seconds=seconds["step"],
        stage_seconds=times.stage_seconds,
        num_workers=settings.num_workers,
        here_share=times.here_share,
        bottleneck=bottleneck,
        advice=advice,
    )


def _setup(settings: LoaderSettings, epoch: int) -> Setup:
    return Setup(
        num_workers=settings.num_workers,
        crops_per_image=settings.crops_at(epoch),
        spread=bool(settings.spread),
        kinds=bool(settings.kinds),
        transform=settings.transform is not None,
        decode_scale=settings.decode_scale != "exact",
        decode_device=settings.decode_device is not None,
        cuda=torch.cuda.is_available(),
        cores=cores_of_rank(),
    )


LOADER_SHARE = 0.1
"""Share of its time that a training may wait for its loader before the loader counts as the bottleneck."""
HERE_SHARE = 0.5
"""Share of windows made in the training process, since no worker was ready, above which it is too early to judge."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The settings and the machine, as far as advice depends on them."""

    num_workers: int
    crops_per_image: int
    spread: bool
    kinds: bool = False
    """Whether batches have several crop kinds."""
    transform: bool = False
    """Whether the user's function augments crops."""
    decode_scale: bool = False
    """Whether large JPEGs are decoded at a part of their size."""
    decode_device: bool
    cuda: bool
    """Whether a GPU could decode."""
    cores: int
    """Cores that this rank may use."""

    @property
    def gpu_may_decode(self) -> bool:
        """Whether there is a GPU, and no setting that `decode_device` excludes."""
        return self.cuda and not (self.kinds or self.transform or self.decode_scale)

    @property
    def free_cores(self) -> bool:
        return self.num_workers < self.cores


def cores_of_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the cores that this process may use, divided by the ranks that a launcher started on this machine."""
    # Slurm and cpusets restrict the affinity; macOS has none.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # torchrun sets it: the processes of this machine, which all start workers.
    ranks = environment.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // max(1, int(ranks))) if ranks.isdecimal() else cores


def judge(
    setup: Setup, *, wait: float, hand_over: float, step: float, stages: Mapping[str, float], here_share: float
) -> tuple[str, str]:
    """Return the bottleneck, and advice. Times are in seconds, `stages` as in `STAGES`.

    >>> setup = Setup(num_workers=2, crops_per_image=4, spread=False, decode_device=False, cuda=False, cores=8)
    >>> judge(setup, wait=9, hand_over=0, step=1, stages={"read": 15, "decode": 3}, here_share=0)[0]
    'read'
    >>> judge(setup, wait=0.1, hand_over=0, step=10, stages={"read": 15, "decode": 3}, here_share=0)[0]
    'your step'

    Only settings that go with those of the loader are advised:

    >>> from dataclasses import replace
    >>> busy = Setup(num_workers=8, crops_per_image=4, spread=False, decode_device=False, cuda=True, cores=8)
    >>> judge(busy, wait=9, hand_over=0, step=1, stages={"decode": 15}, here_share=0)
    ('decode', "decode on the GPU: decode_device='cuda'")
    >>> judge(replace(busy, transform=True), wait=9, hand_over=0, step=1, stages={"cut": 15}, here_share=0)
    ('cut', '8 workers keep all 8 cores busy: more cores, or a smaller size, would help')
    """
    if wait + hand_over < LOADER_SHARE * (wait + hand_over + step):
        return "your step", "your training step is the bottleneck; a faster loader would gain next to nothing"
    # Before the workers are judged: they are not what the loop waits for.
    if hand_over > wait:
        return "hand-over", (
            "to_batch, pin_memory or targets='dense' takes its time in your own process, between two steps; make "
            "to_batch cheaper"
        )
    if setup.num_workers and here_share > HERE_SHARE:
        return "unknown", "too early to say: most of these batches were made while the workers were still starting"
    # Stages are summed over processes, so they are compared with each other and not with the waiting time.
    slowest = max(stages, key=lambda stage: stages[stage])
    if setup.num_workers == 0:
        return slowest, (
            f"set num_workers={setup.cores}: batches are made in your own process, in turn with your step; most of the "
            f"time goes to {slowest}"
        )
    return slowest, ADVICE[slowest](setup)


def _read(setup: Setup) -> str:
    return (
        "images and labels arrive slowly: put them on a faster or a local disk, or raise num_workers (now "
        f"{setup.num_workers}), which wait for files side by side"
    )


def _decode(setup: Setup) -> str:
    if setup.decode_device:
        return _on_device(setup)
    # Other ways to decode faster cost something; more workers only need cores.
    if setup.free_cores:
        return _more_workers(setup)
    if setup.crops_per_image == 1 and not setup.kinds:
        return "decode each image once for several crops: crops_per_image=4, spread=True"
    if setup.gpu_may_decode:
        return "decode on the GPU: decode_device='cuda'"
    if setup.decode_scale:
        return "make the photos smaller once, before the build"
    return "make the photos smaller once, before the build, or try decode_scale='auto' where they are large"


def _cut(setup: Setup) -> str:
    if setup.decode_device:
        return _on_device(setup)
    if setup.gpu_may_decode and not setup.free_cores:
        return "cut on the GPU: decode_device='cuda'"
    return _more_workers(setup)


def _on_device(setup: Setup) -> str:
    return (
        "decode_device decodes and cuts in your own process, between two steps; without it, "
        f"{setup.cores} workers do that beside your step"
    )


def _transform(setup: Setup) -> str:
    more = f", or raise num_workers to {setup.cores}" if setup.free_cores else ""
    return f"your transform takes most of the workers' time: make it cheaper, or apply it to batches on the GPU{more}"


def _send(setup: Setup) -> str:
    smaller = "spread or batch_size" if setup.spread else "batch_size"
    # 40 MB: `channel.MAPPED_BYTES`, up to which a worker keeps its slots mapped.
    return f"mapping memory takes most of the workers' time: lower {smaller}, so that a window's crops take 40 MB"


def _more_workers(setup: Setup) -> str:
    if setup.free_cores:
        return f"raise num_workers from {setup.num_workers} to {setup.cores}, the cores that this process may use"
    return f"{setup.num_workers} workers keep all {setup.cores} cores busy: more cores, or a smaller size, would help"


ADVICE: Mapping[str, Callable[[Setup], str]] = {
    "read": _read,
    "decode": _decode,
    "cut": _cut,
    "label": _more_workers,
    "mix": _more_workers,
    "transform": _transform,
    "send": _send,
}
