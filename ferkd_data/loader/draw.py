"""Which crops of an image an epoch uses: without replacement, crop block by crop block, pure in (seed, key, epoch).

An epoch draws M crops of each of its images. Draw number t, counted over all epochs, lies in cycle t // N (all N crops
once) and, inside it, in the crop block that holds place t % N. Within a block, an image's crops come in a random order
of its own; those that are not in use (discarded, or thinned out in this cycle) are left out, and the order begins
again, shuffled anew, when the block has fewer crops in use than draws. So an epoch reads one block, or
more where it crosses from one to the next.

Legend: R images, M crops per image and epoch, n crops of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ferkd_data import rng


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
