"""Evaluate the settings of an epoch, and which images it has: pure functions of the settings and its number.

A pass goes over all images once, in an order of its own. With epoch="images" each pass is an epoch. With epoch="crops"
a pass is cut into M epochs of as many crops as there are images, and each image comes in one of them.

Legend: M crops per image, n images of the label set.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from ferkd_data.calibration import Calibration, calibration_at
from ferkd_data.loader.schedule import EpochShape
from ferkd_data.loader.settings import LoaderSettings

KEPT = 3
"""Epochs whose settings are kept: workers may be an epoch ahead of or behind the training."""


@dataclass(frozen=True, kw_only=True)
class EpochSettings:
    """One epoch, with every setting that is a function of it evaluated. Can be pickled, whatever the functions are."""

    calibration: Calibration
    size: int
    """S."""
    shape: EpochShape
    pass_number: int
    """The pass over all images that this epoch belongs to."""
    first: int
    """Images of the pass that lie before this epoch."""
    drawn: int
    """Crops of each image that all passes before this one draw."""
    others: tuple[EpochSettings, ...] = ()
    """The same epoch for each further crop kind, where a loader's workers need to know it."""


class Epochs:
    """`epochs.at(number)`: the settings of an epoch, evaluated once as long as they are needed."""

    def __init__(self, settings: LoaderSettings, num_images: int) -> None:
        self._settings, self._num_images = settings, num_images
        self._known: OrderedDict[int, EpochSettings] = OrderedDict()

    def at(self, epoch: int) -> EpochSettings:
        """Raises UsageError where a function of the epoch gives what cannot be."""
        if epoch not in self._known:
            self.learn(epoch, epoch_settings(self._settings, self._num_images, epoch))
        return self._known[epoch]

    def learn(self, epoch: int, settings: EpochSettings) -> None:
        """Take over the settings that another process has evaluated."""
        self._known[epoch] = settings
        if len(self._known) > KEPT:
            self._known.popitem(last=False)


def epoch_settings(settings: LoaderSettings, num_images: int, epoch: int) -> EpochSettings:
    """Raises UsageError where a function of the epoch gives what cannot be."""
    found = _in_pass(settings, epoch)
    first, count = 0, num_images
    if settings.epoch == "crops":
        first, count = _slice_of_pass(num_images, found.number, found.crops_per_image, settings.drop_last)
    return EpochSettings(
        calibration=calibration_at(settings.calibration, epoch),
        size=settings.size_at(epoch),
        shape=EpochShape(
            num_images=count,
            crops_per_image=found.crops_per_image,
            batch_size=settings.batch_size,
            spread=settings.window_batches_of(found.crops_per_image),
            drop_last=settings.drop_last,
            seed=settings.seed,
        ),
        pass_number=found.pass_number,
        first=first,
        drawn=found.drawn,
    )


class _InPass(NamedTuple):
    pass_number: int
    number: int
    crops_per_image: int
    drawn: int


def _in_pass(settings: LoaderSettings, epoch: int) -> _InPass:
    """Find the pass of an epoch, and the epoch's number within it."""
    by_crops = settings.epoch == "crops"
    if not callable(settings.crops_per_image):
        per_image = settings.crops_per_image
        pass_number, number = divmod(epoch, per_image) if by_crops else (epoch, 0)
        return _InPass(pass_number, number, per_image, pass_number * per_image)
    begin = drawn = 0
    # M may differ from pass to pass, so passes are counted from the first. Called once for each epoch: `Epochs.at`
    # keeps it.
    for number in itertools.count():
        # A pass keeps the M of its first epoch to its end, or its images would not all come as often.
        per_image = settings.crops_at(begin)
        epochs = per_image if by_crops else 1
        if epoch < begin + epochs:
            return _InPass(number, epoch - begin, per_image, drawn)
        begin, drawn = begin + epochs, drawn + per_image
    raise AssertionError("unreachable")


def _slice_of_pass(num_images: int, number: int, epochs: int, drop_last: bool) -> tuple[int, int]:
    """Return the first image and the number of images of epoch `number` of a pass that is cut into `epochs` epochs.

    With drop_last they are equally long, and up to epochs - 1 images of the pass come in none of them. Otherwise their
    lengths differ by at most one image.
    """
    # Rounded down at both ends of each slice: together they hold every image of the pass once.
    first = number * num_images // epochs
    if drop_last:
        return first, num_images // epochs
    return first, (number + 1) * num_images // epochs - first
