"""Write a loader's next batch, as the student gets it, as a page to look at. The loader does not move.

Legend: B crops of the batch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ferkd_data.calibration import Calibration, Policy, policy_table
from ferkd_data.errors import UsageError
from ferkd_data.label_set.joined_images import decode_checked, labelled_size
from ferkd_data.labels.buckets import BUCKETS
from ferkd_data.loader import CropLoader
from ferkd_data.loader.batch_maker import BatchMaker, Labelled
from ferkd_data.loader.schedule import Window
from ferkd_data.replay import empty_batch
from ferkd_data.report.page import check_page, render, write_page
from ferkd_data.report.pictures import data_uri
from ferkd_data.report.tables import BUCKET_TITLES, class_name
from ferkd_data.storage import local_path
from ferkd_data.targets import SoftTargets
from ferkd_data.words import percent

BARS = 4
PICTURE_PIXELS = 160
SAME_TARGET = 1e-4
"""Largest difference of any class's probability at which two targets count as the same."""


def preview(loader: CropLoader, path: str | Path, *, crops: int = 16) -> Path:
    """Write a loader's next batch as an HTML page, and return the page's path.

    It shows up to `crops` crops: the picture as the student gets it, the bucket, what calibration made of the soft
    label, and, where SelfMix mixed it, the partner and the mixed target. The loader then gives the same batches as if
    `preview` had not been called, also in the middle of an epoch. Images of a loader with `decode_device` are cut on
    the CPU here.

    Raises MissingExtraError without the extra `report`, UsageError for `crops` below 1, and the errors that the loader
    would raise for this batch.

    >>> labels = fd.open_labels("labels-with-images")
    >>> loader = fd.CropLoader(labels, batch_size=4, size=32, crops_per_image=1, cache_dir="cache")
    >>> fd.preview(loader, "batch.html", crops=2).name
    'batch.html'
    """
    if crops < 1:
        raise UsageError(f"crops must be 1 or more, got {crops}")
    page = local_path(path)
    check_page(page)
    maker, window = loader.next_window()
    size = maker.epochs.at(window.epoch).size
    # A second maker without SelfMix gives the same window before mixing.
    plain = maker.alone(selfmix=None)
    labelled = _labelled(plain, window)
    before, before_targets = _made(plain, window, size)
    images, targets = (before, before_targets) if maker.settings.selfmix is None else _made(maker, window, size)
    # A window may hold several batches, where they are spread; the next batch is the first.
    shown = min(crops, window.batches[0])
    batch = _Batch(loader, maker, window, labelled, (images, targets), (before, before_targets))
    content = {
        "title": f"The next batch, of epoch {window.epoch}",
        "about": "Each crop as a student gets it, with its soft label as the teachers gave it, the target that "
        "calibration made of it, and the target after mixing.",
        "facts": _facts(loader, window, shown),
        "crops": [batch.card(slot) for slot in range(shown)],
    }
    write_page(page, render("preview", content))
    return page


def _facts(loader: CropLoader, window: Window, shown: int) -> list[tuple[str, str]]:
    settings = loader.settings
    calibration = settings.calibration
    return [
        ("Batch", f"{window.batches[0]:,} crops, {shown} of them shown"),
        ("Calibration", calibration if isinstance(calibration, str) else repr(calibration)),
        ("SelfMix", "none" if settings.selfmix is None else repr(settings.selfmix)),
        ("Seed", str(settings.seed)),
    ]


def _labelled(maker: BatchMaker, window: Window) -> Labelled:
    """Return the window's crops with their labels; other images stand in for those that cannot be used."""

    def look(labelled: Labelled, i: int) -> None:
        record = labelled.records[i]
        data = maker.read(int(labelled.rows[i]), record)
        decode_checked(data, labelled_size(record), maker.labels.manifest.pixel_limit)

    return maker.filled(window, look)[0]


def _made(maker: BatchMaker, window: Window, size: int) -> tuple[Tensor, SoftTargets]:
    out = empty_batch(sum(window.batches), size)
    targets = maker.targets(maker.make(window, out))
    return out, targets


class _Batch:
    """The next batch, before and after mixing. A slot is a crop's number in the batch."""

    def __init__(
        self,
        loader: CropLoader,
        maker: BatchMaker,
        window: Window,
        labelled: Labelled,
        after: tuple[Tensor, SoftTargets],
        before: tuple[Tensor, SoftTargets],
    ) -> None:
        self._labels, self._labelled = loader.labels, labelled
        self._calibration: Calibration = maker.epochs.at(window.epoch).calibration
        self._mixes = maker.settings.selfmix is not None
        self._images, self._before_images = after[0], before[0]
        first = window.batches[0]
        self._targets = after[1][:first].dense().numpy()
        self._before = before[1][:first].dense().numpy()
        self._hard = before[1].hard
        # Slot -> (image, crop) within the window, of the first batch alone.
        self._crop_at = {int(slot): at for at, slot in np.ndenumerate(window.slots) if 0 <= slot < first}

    def card(self, slot: int) -> dict[str, Any]:
        i, m = self._crop_at[slot]
        drawn = self._labelled.drawn
        bucket, code = int(drawn.bucket[i, m]), int(drawn.codes[i, m])
        mixed = self._mixes and bool(np.abs(self._targets[slot] - self._before[slot]).max() > SAME_TARGET)
        partner = self._partner(slot) if mixed else None
        truth = -1 if self._hard is None else int(self._hard[slot])
        top, left, height, width = drawn.boxes[i, m].tolist()
        # Pictures and targets apart: two crops of equal targets may be mixed.
        changed = self._mixes and not torch.equal(self._images[slot], self._before_images[slot])
        return {
            "number": slot,
            "key": self._key(int(self._labelled.rows[i])),
            "box": f"{width}x{height} at {left}, {top}{', flipped' if drawn.flip[i, m] else ''}",
            "picture": _picture(self._images[slot]),
            "before": _picture(self._before_images[slot]) if changed else "",
            "partner": partner[0] if partner else None,
            "partner_picture": _picture(self._before_images[partner[0]]) if partner else "",
            "mixed": f"{percent(partner[1], 0)} of it is this crop, the rest crop {partner[0]}" if partner else "",
            "bucket": bucket,
            "bucket_name": BUCKET_TITLES[BUCKETS[bucket]],
            "policy": self._policy_in_words(policy_table(self._calibration)[code], code, truth),
            "truth": class_name(self._labels, truth),
            "stored": self._stored(i, m),
            "target": self._largest(self._before[slot]),
            "mixed_target": self._largest(self._targets[slot]) if mixed else [],
        }

    def _partner(self, slot: int) -> tuple[int, float] | None:
        """Find the crop of the same image that was mixed in, and this crop's share in 0..1.

        The mixed target is share * own + (1 - share) * other: least squares give the share for each candidate, and the
        candidate that explains the target best is the partner.
        """
        own, mixed = self._before[slot].astype(np.float64), self._targets[slot].astype(np.float64)
        found = None
        for other, (i, _) in self._crop_at.items():
            if other == slot or i != self._crop_at[slot][0]:
                continue
            apart = own - self._before[other]
            length = float(apart @ apart)
            # Two crops with the same target: no share follows from it.
            if length < SAME_TARGET**2:
                continue
            # mixed - other = share * (own - other): the projection onto own - other.
            share = float(np.clip((mixed - self._before[other]) @ apart / length, 0, 1))
            error = float(np.abs(share * own + (1 - share) * self._before[other] - mixed).max())
            if error < SAME_TARGET and (found is None or error < found[2]):
                found = (other, share, error)
        return found[:2] if found else None

    def _stored(self, i: int, m: int) -> list[tuple[str, str, float]]:
        drawn = self._labelled.drawn
        # Stored labels are of the teacher's classes, also under a class map.
        labels = self._labels.unmapped
        pairs = zip(drawn.class_index[i, m].tolist(), drawn.class_prob[i, m].astype(float).tolist(), strict=True)
        return [(class_name(labels, index), f"{prob:.3f}", prob) for index, prob in list(pairs)[:BARS]]

    def _largest(self, target: npt.NDArray[np.float32]) -> list[tuple[str, str, float]]:
        order = np.argsort(-target, kind="stable")[:BARS].tolist()
        rows = [(class_name(self._labels, n), f"{target[n]:.3f}", min(1.0, float(target[n]))) for n in order]
        rest = max(0.0, float(target.sum() - target[order].sum()))
        return [*rows, ("all other classes", f"{rest:.3f}", min(1.0, rest))]

    def _policy_in_words(self, policy: Policy, code: int, truth: int) -> str:
        wrong = "confident but wrong; " if code >= len(BUCKETS) else ""
        return wrong + _in_words(policy, self._calibration, truth)

    def _key(self, row: int) -> str:
        shard, at = self._labels.position(row)
        return self._labels.keys_of(shard)[at]


def _in_words(policy: Policy, calibration: Calibration, truth: int) -> str:
    if truth < 0 and policy.kind in ("soften", "blend"):
        return "keeps its soft label, since its ground truth is unknown"
    if policy.kind == "discard":
        kept = calibration.all_discarded == "keep" or truth < 0
        instead = "keeps its soft label" if kept else "gets the softened ground truth"
        return f"its image has no crop in use, so it {instead}"
    words: Sequence[tuple[str, str]] = (
        ("soften", f"softened ground truth, epsilon {calibration.epsilon:g}"),
        ("blend", f"{percent(calibration.blend_weight, 0)} of its soft label, the rest the softened ground truth"),
        ("keep", "keeps its soft label"),
        ("thin", f"keeps its soft label; {percent(policy.share, 0)} of such crops are in use"),
    )
    return dict(words)[policy.kind]


def _picture(image_CHW: Tensor) -> str:
    pixels = image_CHW[None]
    if pixels.shape[-1] > PICTURE_PIXELS:
        shape = (PICTURE_PIXELS, PICTURE_PIXELS)
        pixels = torch.nn.functional.interpolate(pixels, shape, mode="bilinear", antialias=True)
    return data_uri(np.ascontiguousarray(pixels[0].permute(1, 2, 0).numpy()))
