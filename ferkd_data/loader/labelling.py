"""From the records of a window's images to its crops and their targets: pure functions, before any image is read.

Legend: I images of a window, M crops per image, B crops of a window, n crops of a block, k stored classes.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ferkd_data.calibration import Calibration, calibrate, crop_actions, crop_buckets, use_probability
from ferkd_data.class_map import map_columns
from ferkd_data.label_set import LabelSet
from ferkd_data.loader.draw import BlockDraws, draw
from ferkd_data.loader.plan import Window
from ferkd_data.targets import SoftTargets

DRAWN_FIELDS = ("boxes", "flip", "operations", "class_index", "class_prob")
CROP_FIELDS = (*DRAWN_FIELDS, "target_prob", "bucket")


class Drawn(NamedTuple):
    """The labels of the crops drawn, each with leading axes (I, M)."""

    boxes: npt.NDArray[np.uint16]
    flip: npt.NDArray[np.bool_]
    operations: npt.NDArray[np.uint16]
    class_index: npt.NDArray[Any]
    """The teacher's classes, also where the labels have a class map."""
    class_prob: npt.NDArray[np.float16]
    bucket: npt.NDArray[np.uint8]
    codes: npt.NDArray[np.uint8]
    """Action codes (see `calibration.crop_actions`)."""


def draw_crops(
    labels: LabelSet,
    records: list[npt.NDArray[np.void]],
    draws: tuple[BlockDraws, ...],
    *,
    calibration: Calibration,
    seed: int,
) -> Drawn:
    """An epoch's crops of some images, from their records (I,) in each block that it draws from."""
    parts = []
    for block, part in zip(records, draws, strict=True):
        # A view of fewer crops than were labelled ends within a block.
        shown = min(block["flip"].shape[1], labels.num_crops - part.block * labels.manifest.block_crops(0))
        columns = {name: block[name][:, :shown] for name in CROP_FIELDS} | {"target": block["target"]}
        bucket, codes = _difficulty(labels, columns, calibration)
        chosen = draw(block["key_hash"], use_probability(calibration, codes), part, seed=seed)
        row = np.arange(len(chosen))[:, None]
        drawn = {name: columns[name][row, chosen] for name in DRAWN_FIELDS}
        parts.append(Drawn(**drawn, bucket=bucket[row, chosen], codes=codes[row, chosen]))
    if len(parts) == 1:
        return parts[0]
    return Drawn(*(np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)))


def _difficulty(
    labels: LabelSet, columns: dict[str, npt.NDArray[Any]], calibration: Calibration
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Buckets and action codes (I, n) of stored crops, in terms of the classes that are trained on."""
    if labels.class_map is not None:
        columns = map_columns(labels.class_map, columns, labels.manifest.thresholds.absolute())
    bucket = crop_buckets(calibration, columns["bucket"], columns["class_prob"], columns["target_prob"])
    return bucket, crop_actions(calibration, bucket, columns["class_index"][..., 0], columns["target"][:, None])


def window_targets(
    labels: LabelSet,
    window: Window,
    drawn: Drawn,
    *,
    rows: npt.NDArray[np.int64],
    target: npt.NDArray[np.int32],
    calibration: Calibration,
) -> list[SoftTargets]:
    """Targets for each batch of the window, in the order of the slots.

    `rows` and `target` (I,) are the images' rows in `labels` and their ground truths as stored.
    """
    flat = np.empty(sum(window.batches), np.int64)
    wanted = window.slots >= 0
    flat[window.slots[wanted]] = np.flatnonzero(wanted.reshape(-1))
    image = flat // wanted.shape[1]
    class_map = labels.class_map
    hard = (target if class_map is None else class_map.targets(target))[image].astype(np.int64)
    whole = calibrate(
        calibration,
        class_index=drawn.class_index.reshape(-1, drawn.class_index.shape[-1])[flat],
        class_prob=drawn.class_prob.reshape(-1, drawn.class_prob.shape[-1])[flat],
        codes=drawn.codes.reshape(-1)[flat],
        target=hard,
        num_classes=labels.unmapped.num_classes,
        class_map=class_map,
    )
    known = torch.from_numpy(hard)
    whole = replace(
        whole,
        hard=known,
        hard_partner=known,
        hard_share=torch.ones(len(known)),
        bucket=torch.from_numpy(drawn.bucket.reshape(-1)[flat]),
        rows=torch.from_numpy(rows[image]),
    )
    bounds = np.cumsum([0, *window.batches])
    return [whole[slice(int(a), int(b))] for a, b in itertools.pairwise(bounds)]
