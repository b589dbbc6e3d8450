"""Settings that may change from epoch to epoch, and which images an epoch has: pure functions of settings and number.

A pass goes over all images once, in an order of its own. With epoch="images" each pass is an epoch. With epoch="crops"
a pass is cut into M epochs of as many crops as there are images, and each image comes in one of them.

Legend: M crops per image, n images of the label set.
"""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ferkd_data.calibration import Calibration, calibration_at
from ferkd_data.loader.schedule import Layout
from ferkd_data.loader.settings import LoaderSettings

KEPT = 3
"""Epochs whose settings are remembered: the ones that workers make ahead of and behind the present one."""


@dataclass(frozen=True, kw_only=True)
class EpochSettings:
    """One epoch, with every setting that is a function of it evaluated. Can be pickled, whatever the functions are."""

    calibration: Calibration
    size: int
    """S."""
    crops_per_image: int
    """M."""
    window_batches: int
    """P: batches of a window."""
    pass_number: int
    """The pass over all images that this epoch is a part of."""
    first: int
    """Images of the pass that lie before this epoch."""
    num_images: int
    drawn: int
    """Crops of each image that all passes before this one draw."""

    def window_images(self, batch_size: int) -> int:
        """Images of a rank's whole window."""
        return self.window_batches * batch_size // self.crops_per_image

    def layout(self, settings: LoaderSettings) -> Layout:
        return Layout(
            num_images=self.num_images,
            crops_per_image=self.crops_per_image,
            batch_size=settings.batch_size,
            spread=self.window_batches,
            drop_last=settings.drop_last,
            seed=settings.seed,
        )


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

    def fingerprint(self, epoch: int) -> dict[str, Any]:
        """Plain values of the settings that decide what a loader gives in this epoch, besides its layout."""
        settings, at = self._settings, self.at(epoch)
        described: dict[str, Any] = {
            "size": at.size,
            "interpolation": settings.interpolation,
            "order": settings.order,
            "shards_together": settings.shards_together,
            "calibration": _described(settings.calibration),
            "selfmix": None if settings.selfmix is None else asdict(settings.selfmix),
        }
        if settings.epoch != "images":
            described["epoch"] = settings.epoch
        if callable(settings.crops_per_image):
            described["crops drawn before"] = at.drawn
        if settings.decode_scale != "exact":
            described["decode_scale"] = settings.decode_scale
        if settings.transform is not None:
            described["transform"] = _described(settings.transform)
        return described

    def learn(self, epoch: int, settings: EpochSettings) -> None:
        """Take over what another process has evaluated."""
        self._known[epoch] = settings
        if len(self._known) > KEPT:
            self._known.popitem(last=False)


def _described(setting: Any) -> Any:
    """A plain value that stays the same from process to process, and differs where a setting's parameters do."""
    if isinstance(setting, Calibration):
        return asdict(setting)
    if isinstance(setting, str):
        return setting
    name = getattr(setting, "__qualname__", None)
    # The repr of an object without one of its own holds its address.
    return name if name is not None else re.sub(r" at 0x[0-9a-fA-F]+", "", repr(setting))


def epoch_settings(settings: LoaderSettings, num_images: int, epoch: int) -> EpochSettings:
    """Raises UsageError where a function of the epoch gives what cannot be."""
    place = _place_of(settings, epoch)
    first, count = 0, num_images
    if settings.epoch == "crops":
        first, count = _part(num_images, place.part, place.crops_per_image, settings.drop_last)
    return EpochSettings(
        calibration=calibration_at(settings.calibration, epoch),
        size=settings.size_at(epoch),
        crops_per_image=place.crops_per_image,
        window_batches=settings.window_batches_of(place.crops_per_image),
        pass_number=place.pass_number,
        first=first,
        num_images=count,
        drawn=place.drawn,
    )


class _InPass(NamedTuple):
    pass_number: int
    part: int
    crops_per_image: int
    drawn: int


def _place_of(settings: LoaderSettings, epoch: int) -> _InPass:
    """Where in which pass an epoch is."""
    by_crops = settings.epoch == "crops"
    if not callable(settings.crops_per_image):
        per_image = settings.crops_per_image
        number, part = divmod(epoch, per_image) if by_crops else (epoch, 0)
        return _InPass(number, part, per_image, number * per_image)
    begin = drawn = 0
    for number in itertools.count():
        # A pass keeps the M of its first epoch to its end, or its images would not all come as often.
        per_image = settings.crops_at(begin)
        epochs = per_image if by_crops else 1
        if epoch < begin + epochs:
            return _InPass(number, epoch - begin, per_image, drawn)
        begin, drawn = begin + epochs, drawn + per_image
    raise AssertionError("unreachable")


def _part(num_images: int, part: int, parts: int, drop_last: bool) -> tuple[int, int]:
    """First image and number of images of one of `parts` parts of a pass.

    They are equally long with drop_last, and a few images of the pass come in none of them. Otherwise they differ by an
    image.
    """
    first = part * num_images // parts
    if drop_last:
        return first, num_images // parts
    return first, (part + 1) * num_images // parts - first
