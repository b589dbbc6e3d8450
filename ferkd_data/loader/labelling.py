"""Which crops of an image an epoch uses: without replacement, crop block by crop block, pure in (seed, key, epoch).

An epoch draws M crops of each of its images. Draw number t, counted over all epochs, lies in cycle t // N (all N crops
once) and, inside it, in the crop block that holds place t % N. Within a block, an image's crops come in a random order
of its own; those that are not in use (discarded, or thinned out in this cycle) are left out, and the order begins
again, shuffled anew, when the block has fewer crops in use than draws. So an epoch reads one block, or
more where it crosses from one to the next.

Legend: R images, M crops per image and epoch, n crops of a block.

From the records of a window's images to its crops and their targets: pure functions, before any image is read.

Legend: I images of a window, M crops per image, B crops of a window, n crops of a block, k stored classes.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ferkd_data import rng
from ferkd_data.calibration import Calibration, calibrate, crop_actions, crop_buckets, use_probability
from ferkd_data.class_map import map_columns
from ferkd_data.label_set import LabelSet
from ferkd_data.labels.rows import CROP_FIELDS
from ferkd_data.loader.plan import Window
from ferkd_data.targets import SoftTargets


class BlockDraws(NamedTuple):
    """The part of an epoch's draws that falls into one block."""

    block: int
    cycle: int
    first: int
    """Place in the block of the first of these draws."""
    num: int


def epoch_draws(drawn: int, *, crops_per_image: int, num_crops: int, crops_per_block: int) -> tuple[BlockDraws, ...]:
    """The blocks that an epoch draws from after `drawn` draws of earlier ones, in order; their numbers add up to M."""
    draws: list[BlockDraws] = []
    place, left = drawn, crops_per_image
    while left:
        cycle, at = divmod(place, num_crops)
        block, first = divmod(at, crops_per_block)
        size = min(crops_per_block, num_crops - block * crops_per_block)
        count = min(left, size - first)
        draws.append(BlockDraws(block, cycle, first, count))
        place, left = place + count, left - count
    return tuple(draws)


def draw(
    key_hash: npt.NDArray[np.uint64], use: npt.NDArray[np.float32], draws: BlockDraws, *, seed: int
) -> npt.NDArray[np.int64]:
    """Crop numbers within the block: (R, draws.num).

    `key_hash` (R,) identifies the images, `use` (R, n) is each crop's probability of being in use: 0, 1, or between
    for crops that are thinned out. Where an image has none in use, all its crops are drawn from.
    """
    stream = rng.mix64(key_hash ^ np.uint64(rng.hash64("draw", seed, draws.cycle, draws.block)))[:, None]
    size = use.shape[1]
    crop = np.arange(size, dtype=np.uint64)[None]
    coin = rng.uniforms(rng.counter64(stream, crop))
    in_use = coin < use
    in_use |= ~in_use.any(axis=1, keepdims=True)
    count = in_use.sum(axis=1)[:, None]
    places = draws.first + np.arange(draws.num)[None]
    turns, ranks = np.divmod(places, count)
    drawn = np.empty((len(use), draws.num), np.int64)
    for turn in np.unique(turns):
        # A random number for each crop, those out of use last: the order of the numbers is the order of the crops.
        word = rng.counter64(stream, crop + np.uint64((int(turn) + 1) * size)) >> np.uint64(1)
        order = np.argsort(np.where(in_use, word, np.uint64(2**63)), axis=1, kind="stable")
        chosen = np.take_along_axis(order, np.where(turns == turn, ranks, 0), axis=1)
        drawn = np.where(turns == turn, chosen, drawn)
    return drawn


DRAWN_FIELDS = ("boxes", "flip", "operations", "class_index", "class_prob")


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
