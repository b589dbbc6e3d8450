"""`LoaderStats`: where the time of an epoch goes, and the clock that measures it in the training process."""

from __future__ import annotations

import logging
import textwrap
import warnings
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch

from ferkd_data.html_tables import html_table
from ferkd_data.loader.batch_maker import Made
from ferkd_data.loader.bottleneck import Setup, cores_of_rank, judge
from ferkd_data.loader.plan import Window
from ferkd_data.loader.settings import LoaderSettings, Ranks
from ferkd_data.loader.stage_clock import NOTHING, STAGES, added

log = logging.getLogger("ferkd_data.loader")

Part = Literal["prepare", "wait", "hand_over", "step"]
WIDTH = 79
BAR = 20
NO_BATCH = "no batch yet: iterate over the loader first"


@dataclass(frozen=True, kw_only=True, repr=False)
class LoaderStats:
    """Where the time of one epoch went; see `CropLoader.stats`. `print` it for a table, `asdict` it for a logger.

    Times are wall time in seconds. The training process divides its own into waiting, hand-over and your step; the
    stages are summed over the processes that made the batches, which work side by side.

        stats = loader.stats()
        stats.bottleneck, stats.wait_share    # ("your step", 0.01)
    """

    epoch: int
    """The epoch that is under way, else the last one."""
    batches: int
    """Batches given."""
    of_batches: int
    """Batches that the iteration has: those of the epoch, or of its rest after `load_state_dict`."""
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
        """The epoch in one line, as `log_stats=True` logs it."""
        if not self.batches:
            return f"epoch {self.epoch}: {NO_BATCH}"
        text = (
            f"epoch {self.epoch}: {self._batches()} in {self.seconds:,.1f} s, {self.images_per_second:,.0f} images/s, "
            f"{self.crops_per_second:,.0f} crops/s, {self.wait_share:.0%} of it waiting; bottleneck: {self.bottleneck}"
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
        shared = [f"{name} {value / self.seconds:.0%}" if self.seconds else name for name, value in parts]
        rows = [
            ("speed", f"{self.images_per_second:,.0f} images/s, {self.crops_per_second:,.0f} crops/s"),
            ("time", f"{self.seconds:,.1f} s: {', '.join(shared)}"),
        ]
        if self.prepare_seconds >= 0.1:
            rows.append(("before it", f"{self.prepare_seconds:,.1f} s to unpack labels"))
        rows.append(("made by", self._makers()))
        for stage, seconds in self.stage_seconds.items():
            share = self.stage_shares[stage]
            rows.append((f"  {stage}", f"{seconds:9,.2f} s {share:4.0%}  {'#' * round(share * BAR)}".rstrip()))
        return [*rows, ("bottleneck", self.bottleneck), ("advice", self.advice)]

    def _makers(self) -> str:
        if not self.num_workers:
            return "the training process"
        workers = f"{self.num_workers} worker{'' if self.num_workers == 1 else 's'}"
        if not self.here_share:
            return workers
        return f"{workers}; {self.here_share:.0%} by the training process, before they had started"

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
    if not log.isEnabledFor(logging.INFO):
        warnings.warn(
            "log_stats=True logs at level INFO, which is not shown; call logging.basicConfig(level=logging.INFO), or "
            "print(loader.stats())",
            stacklevel=2,
        )
    rank = f"rank {ranks.rank} of {ranks.world_size}, " if ranks.world_size > 1 else ""
    log.info("%s%s", rank, stats.line())


class EpochClock:
    """Times one iteration over a loader; its thread calls it, and any thread may ask for `stats`."""

    def __init__(self, epoch: int, of_batches: int) -> None:
        self._epoch, self._of_batches = epoch, of_batches
        self._seconds: dict[Part, float] = dict.fromkeys(("prepare", "wait", "hand_over", "step"), 0.0)
        self._part: Part | None = "prepare"
        """What the training process is at; None once the iteration has ended."""
        self._since = perf_counter()
        self._stages = NOTHING
        self._batches = self._crops = self._windows = self._windows_here = 0
        self._images = 0.0
        self._images_of_crop = 0.0

    def enter(self, part: Part | None) -> None:
        """The training process leaves what it was at, and goes on with `part`."""
        now = perf_counter()
        if self._part is not None:
            self._seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def add_window(self, window: Window, made: Made) -> None:
        """A window has come, whose batches are handed over next."""
        self.enter("hand_over")
        self._stages = added(self._stages, made.spent)
        self._windows += 1
        self._windows_here += not made.by_worker
        self._images_of_crop = len(window.positions) / max(1, sum(made.batches))

    def give(self, crops: int) -> None:
        """A batch goes to the user's loop, whose step begins."""
        self._batches += 1
        self._crops += crops
        self._images += crops * self._images_of_crop
        self.enter("step")

    def stats(self, settings: LoaderSettings) -> LoaderStats:
        seconds, part = dict(self._seconds), self._part
        if part is not None:
            seconds[part] += perf_counter() - self._since
        stages = dict(zip(STAGES, self._stages, strict=True))
        here_share = self._windows_here / self._windows if self._windows else 0.0
        bottleneck, advice = "unknown", NO_BATCH
        if self._batches:
            bottleneck, advice = judge(
                _setup(settings, self._epoch),
                wait=seconds["wait"],
                hand_over=seconds["hand_over"],
                step=seconds["step"],
                stages=stages,
                here_share=here_share,
            )
        return LoaderStats(
            epoch=self._epoch,
            batches=self._batches,
            of_batches=self._of_batches,
            images=round(self._images),
            crops=self._crops,
            prepare_seconds=seconds["prepare"],
            wait_seconds=seconds["wait"],
            hand_over_seconds=seconds["hand_over"],
            step_seconds=seconds["step"],
            stage_seconds=stages,
            num_workers=settings.num_workers,
            here_share=here_share,
            bottleneck=bottleneck,
            advice=advice,
        )


def _setup(settings: LoaderSettings, epoch: int) -> Setup:
    return Setup(
        num_workers=settings.num_workers,
        crops_per_image=settings.crops_at(epoch),
        spread=bool(settings.spread),
        decode_device=settings.decode_device is not None,
        cuda=torch.cuda.is_available(),
        cores=cores_of_rank(),
    )
