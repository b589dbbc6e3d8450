"""From the stored labels of a window's images to its crops and their targets, before any image is read.

Three steps, all pure functions: judge every stored crop (`calibration.judge_crops`), draw M crops of each image, and
make targets of those drawn (`calibration.calibrate`).

An epoch draws M crops of each of its images, without replacement and crop block by crop block. Draw number t, counted
over all epochs, lies in cycle t // N (all N crops once) and, inside it, in the crop block that holds crop t % N. Within
a block, each image's crops come in a random order of its own. Crops that are not in use (discarded, or thinned out in
this cycle) are left out; where the block has fewer crops in use than draws, the order begins again, shuffled anew. So
an epoch reads one block, or more where it crosses from one to the next.

Legend: I images of a window, N crops of an image, M of them drawn in an epoch, B crops of a window, n crops of a block,
k stored classes.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ferkd_data import rng
from ferkd_data.calibration import Calibration, Judged, calibrate, judge_crops
from ferkd_data.class_map import map_columns
from ferkd_data.label_set import LabelSet
from ferkd_data.labels.rows import CROP_FIELDS
from ferkd_data.loader.schedule import Window
from ferkd_data.targets import SoftTargets
from ferkd_data.words import percent


class BlockDraws(NamedTuple):
    """The draws of an epoch that fall into one block."""

    block: int
    size: int
    """Crops of the block that are drawn from: a selection of fewer crops than were labelled ends within a block."""
    cycle: int
    first: int
    """Index of the first of these draws within the block."""
    num: int


def epoch_draws(drawn: int, *, crops_per_image: int, num_crops: int, crops_per_block: int) -> tuple[BlockDraws, ...]:
    """List the blocks that an epoch draws from, in order, after `drawn` draws of earlier epochs; `num` adds up to M."""
    draws: list[BlockDraws] = []
    number, left = drawn, crops_per_image
    while left:
        cycle, at = divmod(number, num_crops)
        block, first = divmod(at, crops_per_block)
        size = min(crops_per_block, num_crops - block * crops_per_block)
        count = min(left, size - first)
        draws.append(BlockDraws(block, size, cycle, first, count))
        number, left = number + count, left - count
    return tuple(draws)


def draw(
    key_hash: npt.NDArray[np.uint64], use: npt.NDArray[np.float32], draws: BlockDraws, *, seed: int
) -> npt.NDArray[np.int64]:
    """Draw crops: their numbers within the block, (I, draws.num).

    `key_hash` (I,) identifies the images, `use` (I, n) is each crop's probability of being in use: 0, 1, or between
    for crops that are thinned out. Where an image has none in use in this block, those that were only thinned
    out are drawn from, else all its crops there.
    """
    # A stream of random words for each image, (I, 1): of its key and not of its row, so that a selection draws the
    # same.
    stream = rng.mix64(key_hash ^ np.uint64(rng.hash64("draw", seed, draws.cycle, draws.block)))[:, None]
    size = use.shape[1]
    crop = np.arange(size, dtype=np.uint64)[None]
    # Words 0 .. n - 1 of the stream decide which crops are in use in this cycle; each turn below takes the next n
    # words.
    coin = rng.uniforms(rng.counter64(stream, crop))
    in_use = coin < use
    # Where chance has thinned out all of an image's crops, they are drawn from before any that is discarded.
    for instead in (use > 0, np.ones_like(in_use)):
        in_use |= instead & ~in_use.any(axis=1, keepdims=True)
    count = in_use.sum(axis=1)[:, None]
    numbers = draws.first + np.arange(draws.num)[None]
    # Draw t of a block that has `count` crops in use is the t % count-th of its order number t // count.
    turns, ranks = np.divmod(numbers, count)
    drawn = np.empty((len(use), draws.num), np.int64)
    for turn in np.unique(turns):
        # A random number for each crop, those out of use last: the order of the numbers is the order of the crops.
        word = rng.counter64(stream, crop + np.uint64((int(turn) + 1) * size)) >> np.uint64(1)
        order = np.argsort(np.where(in_use, word, np.uint64(2**63)), axis=1, kind="stable")
        # Images of other turns look up rank 0, which the next line leaves out.
        chosen = np.take_along_axis(order, np.where(turns == turn, ranks, 0), axis=1)
        drawn = np.where(turns == turn, chosen, drawn)
    return drawn


def draw_seed(labels: LabelSet, seed: int) -> int:
    """Return the seed of a loader's draws from these labels: of one crop kind, a seed of its own.

    So the crops of two kinds are drawn independently, and those of a kind are the same beside whichever others.
    """
    kinds = labels.crop_kinds
    return rng.hash64("crop kind", seed, kinds[0].name) if kinds else seed


CROPS_TO_JUDGE, MOST_DISCARDED = 400, 0.05
"""After so many crops (or an epoch), more than this share of discarded ones is too much. With the default calibration
it was 0.4 % for teachers that are right on two thirds of the crops."""
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
    """Policy codes (see `calibration.policy_table`)."""
    discarded: npt.NDArray[np.bool_]
    """Whether the calibration discards the crop, which was drawn since its image has no crop in use in this block."""


class DiscardedCrops:
    """Counts the crops that were drawn though the calibration discards them, and warns once where they are many.

    Their targets are the smoothed ground truth or as `all_discarded` says: a training almost without soft labels would
    look like any other.
    """

    def __init__(self) -> None:
        self.crops = self.discarded = 0
        self._warned = False

    def add(self, crops: int, discarded: int) -> None:
        """Count crops, and judge as soon as there are enough of them."""
        self.crops, self.discarded = self.crops + crops, self.discarded + discarded
        if self.crops >= CROPS_TO_JUDGE:
            self.judge()

    def judge(self) -> None:
        """Warn where too many of the crops so far are discarded ones."""
        share = self.discarded / max(1, self.crops)
        if share > MOST_DISCARDED and not self._warned:
            self._warned = True
            warnings.warn(
                f"{percent(share, 0)} of the crops so far are of images whose crops are all discarded, and so train as "
                "the calibration's all_discarded says: it discards too much of these labels. Lower its thresholds "
                '(ferkd-data report shows what they do), or use calibration="fkd"',
                stacklevel=3,
            )


def draw_stored_crops(
    labels: LabelSet,
    records: list[npt.NDArray[np.void]],
    draws: tuple[BlockDraws, ...],
    *,
    calibration: Calibration,
    seed: int,
) -> Drawn:
    """Draw an epoch's crops of some images, given their records (I,) in each block that it draws from."""
    parts = []
    for block, part in zip(records, draws, strict=True):
        columns = {name: block[name][:, : part.size] for name in CROP_FIELDS} | {"target": block["target"]}
        judged = _judge(labels, columns, calibration)
        chosen = draw(block["key_hash"], judged.use, part, seed=seed)
        row = np.arange(len(chosen))[:, None]
        # A copy of the M crops drawn: what is not drawn of the n crops is not kept with the window.
        drawn = {name: columns[name][row, chosen] for name in DRAWN_FIELDS}
        parts.append(
            Drawn(
                **drawn,
                bucket=judged.bucket[row, chosen],
                codes=judged.codes[row, chosen],
                discarded=judged.use[row, chosen] == 0,
            )
        )
    if len(parts) == 1:
        return parts[0]
    return Drawn(*(np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)))


def _judge(labels: LabelSet, columns: dict[str, npt.NDArray[Any]], calibration: Calibration) -> Judged:
    """Judge stored crops (I, n) in terms of the classes that are trained on."""
    if labels.class_map is not None:
        # Only to judge: targets are made from the stored columns and mapped afterwards, which loses nothing
        # (`class_map`).
        columns = map_columns(labels.class_map, columns, labels.manifest.thresholds.absolute())
    return judge_crops(
        calibration,
        bucket=columns["bucket"],
        top1=columns["class_index"][..., 0],
        class_prob=columns["class_prob"],
        target=columns["target"][:, None],
        target_prob=columns["target_prob"],
    )


def window_targets(
    labels: LabelSet,
    window: Window,
    drawn: Drawn,
    *,
    rows: npt.NDArray[np.int64],
    target: npt.NDArray[np.int32],
    calibration: Calibration,
) -> list[SoftTargets]:
    """Make the targets of each batch of the window, in the order of the slots.

    `rows` and `target` (I,) are the images' rows in `labels` and their ground truths as stored.
    """
    flat = np.empty(sum(window.batches), np.int64)
    wanted = window.slots >= 0
    # Inverts `slots`: for each slot, image * M + m of the crop that goes there.
    flat[window.slots[wanted]] = np.flatnonzero(wanted.reshape(-1))
    image = flat // wanted.shape[1]
    class_map = labels.class_map
    # int64, as torch's cross_entropy takes class numbers.
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
        # As if every crop were mixed with itself: what `SoftTargets.mix` then changes is true also where nothing was
        # mixed.
        hard_partner=known,
        hard_share=torch.ones(len(known), dtype=torch.float32, device="cpu"),
        bucket=torch.from_numpy(drawn.bucket.reshape(-1)[flat]),
        rows=torch.from_numpy(rows[image]),
    )
    bounds = np.cumsum([0, *window.batches])
    return [whole[slice(int(a), int(b))] for a, b in itertools.pairwise(bounds)]
