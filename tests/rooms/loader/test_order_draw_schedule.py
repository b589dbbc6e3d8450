"""The pure parts of the loader: which image, which crop, which batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferkd_data import rng
from ferkd_data.loader.crops_and_targets import draw, epoch_draws
from ferkd_data.loader.order import InChunks, epoch_order, permute
from ferkd_data.loader.schedule import Cursor, EpochShape, count_batches, settled, stand_in, windows


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_permutation_holds_everything_once(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_a_permutation_is_random_enough():
    """Neighbours go anywhere, and every image is as likely in the first tenth as in any other."""
    size = 1000
    first = np.array([permute(np.arange(size), size, rng.hash64("t", k)) for k in range(400)])
    share = (first[:, :100] < 100).mean()
    assert abs(share - 0.1) < 0.01
    gaps = np.abs(np.diff(first, axis=1))
    assert abs(gaps.mean() - size / 3) < 5
    assert len({tuple(row[:5]) for row in first}) == 400


@pytest.mark.parametrize("kind", ["sequential", "global", "shards"])
@settings(deadline=None, max_examples=40)
@given(shards=st.lists(st.integers(0, 40), min_size=1, max_size=12), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_an_epoch_holds_every_row_once(kind, shards, seed, epoch):
    total = sum(shards)
    order = epoch_order(kind, shards, seed=seed, epoch=epoch, shards_together=3)
    rows = order.rows(np.arange(total))
    assert sorted(rows.tolist()) == list(range(total))
    if total > 3:
        assert order.rows(np.arange(total)[2:4]).tolist() == rows[2:4].tolist()


@pytest.mark.parametrize("kind", ["sequential", "global", "shards"])
@settings(deadline=None, max_examples=40)
@given(shards=st.lists(st.integers(0, 40), min_size=1, max_size=9), chunk=st.integers(1, 50), data=st.data())
def test_an_order_in_chunks_is_the_order(kind, shards, chunk, data):
    total = sum(shards)
    order = epoch_order(kind, shards, seed=1, epoch=2, shards_together=2)
    in_chunks = InChunks(order, total, chunk=chunk)
    for _ in range(3):
        positions = np.array(data.draw(st.lists(st.integers(0, total - 1))) if total else [], np.int64)
        assert in_chunks.rows(positions).tolist() == order.rows(positions).tolist()
    assert len(in_chunks._known) <= 4


def test_epochs_and_seeds_differ():
    orders = {
        tuple(epoch_order(kind, [50, 50], seed=seed, epoch=epoch).rows(np.arange(100)))
        for kind in ("global", "shards")
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 8


def test_shards_are_read_a_few_at_a_time():
    rows = epoch_order("shards", [100] * 20, seed=0, epoch=0, shards_together=4).rows(np.arange(2000)) // 100
    for start in range(0, 2000, 400):
        assert len(set(rows[start : start + 400])) == 4


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 12), st.integers(0, 50))
def test_an_epochs_draws_follow_each_other(num_crops, per_block, per_image, epoch):
    per_block = min(per_block, num_crops)
    draws = epoch_draws(epoch * per_image, crops_per_image=per_image, num_crops=num_crops, crops_per_block=per_block)
    places = [
        part.cycle * num_crops + part.block * per_block + part.first + i for part in draws for i in range(part.num)
    ]
    assert places == list(range(epoch * per_image, (epoch + 1) * per_image))


def all_draws(use, per_image, epochs, num_crops, per_block, seed=0):
    keys = rng.counter64(3, np.arange(len(use)))
    drawn = []
    for epoch in range(epochs):
        for part in epoch_draws(
            epoch * per_image, crops_per_image=per_image, num_crops=num_crops, crops_per_block=per_block
        ):
            start = part.block * per_block
            chosen = draw(keys, use[:, start : start + per_block], part, seed=seed)
            drawn.append(chosen + start)
    return np.concatenate(drawn, axis=1)


def test_every_crop_comes_once_before_any_comes_again():
    use = np.ones((7, 200), np.float32)
    drawn = all_draws(use, 4, 100, 200, 50)
    for half in (drawn[:, :200], drawn[:, 200:]):
        assert (np.sort(half, axis=1) == np.arange(200)).all()
    assert not np.array_equal(drawn[:, :200], drawn[:, 200:])
    assert not np.array_equal(drawn[0, :50], drawn[1, :50])
    assert (drawn[:, :48] < 50).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_discarded_crops_are_never_drawn_and_the_rest_evenly(seed, per_image):
    use = (np.random.default_rng(seed).random((5, 24)) < 0.6).astype(np.float32)
    drawn = all_draws(use, per_image, 24, 24, 8)[:, :24]
    for row in range(5):
        for block in range(3):
            mine = Counter(drawn[row, block * 8 : block * 8 + 8].tolist())
            in_use = np.flatnonzero(use[row, block * 8 : block * 8 + 8]) + block * 8
            allowed = in_use if len(in_use) else np.arange(block * 8, block * 8 + 8)
            assert set(mine) <= set(allowed.tolist())
            assert max(mine.values()) - min(mine[c] for c in allowed.tolist()) <= 1


def test_thinned_crops_come_as_often_as_asked():
    use = np.full((400, 50), 1.0, np.float32)
    use[:, :25] = 0.2
    drawn = draw(
        rng.counter64(1, np.arange(400)),
        use,
        epoch_draws(0, crops_per_image=30, num_crops=50, crops_per_block=50)[0],
        seed=0,
    )
    thinned = (drawn < 25).mean()
    assert abs(thinned - 5 / 30) < 0.02


def test_discarded_crops_stay_out_where_all_others_are_thinned_out():
    use = np.zeros((400, 10), np.float32)
    use[:, :3] = 0.05
    draws = epoch_draws(0, crops_per_image=4, num_crops=10, crops_per_block=10)[0]
    drawn = draw(rng.counter64(1, np.arange(400)), use, draws, seed=0)
    assert set(np.unique(drawn).tolist()) == {0, 1, 2}


LAYOUTS = st.builds(
    EpochShape,
    num_images=st.integers(1, 150),
    crops_per_image=st.integers(1, 4),
    batch_size=st.integers(1, 4),
    spread=st.sampled_from([1, 4, 7]),
    drop_last=st.booleans(),
    seed=st.integers(0, 5),
).map(lambda layout: replace(layout, batch_size=layout.batch_size * layout.crops_per_image))


def batches(layout, place, ranks):
    """[batch][rank] -> the (position, crop) pairs in slot order, and the place after each batch."""
    per_rank, places = [], []
    for rank in range(ranks):
        mine, after = [], []
        for window in windows(layout, place, rank=rank, world_size=ranks):
            flat = np.full(sum(window.batches), -1)
            pairs = [(int(p), m) for p in window.positions for m in range(layout.crops_per_image)]
            wanted = window.slots.reshape(-1) >= 0
            flat[window.slots.reshape(-1)[wanted]] = np.flatnonzero(wanted)
            assert (flat >= 0).all()
            start = 0
            for size, end in zip(window.batches, window.cursors, strict=True):
                mine.append([pairs[i] for i in flat[start : start + size]])
                after.append(end)
                start += size
        per_rank.append(mine)
        places.append(after)
    assert len({len(mine) for mine in per_rank}) == 1
    assert all(after == places[0] for after in places)
    return list(zip(*per_rank, strict=True)), places[0]


@settings(deadline=None, max_examples=150)
@given(LAYOUTS, st.integers(1, 4))
def test_ranks_are_disjoint_complete_and_equally_long(layout, ranks):
    steps, places = batches(layout, Cursor(), ranks)
    assert len(steps) == count_batches(layout, Cursor(), world_size=ranks)
    seen = Counter(pair for step in steps for batch in step for pair in batch)
    step_images = ranks * layout.batch_images
    if layout.drop_last:
        assert set(seen.values()) <= {1}
        assert len(seen) == layout.num_images // step_images * step_images * layout.crops_per_image
        assert all(len(batch) == layout.batch_size for step in steps for batch in step)
    else:
        assert len(seen) == layout.num_images * layout.crops_per_image
        extra = sum(seen.values()) - len(seen)
        assert extra < ranks * layout.crops_per_image
    if places:
        assert places[-1].crops == 0


@settings(deadline=None, max_examples=100)
@given(LAYOUTS.filter(lambda layout: layout.spread >= layout.crops_per_image), st.integers(1, 3))
def test_without_spread_crops_lie_side_by_side_with_it_in_different_batches(layout, ranks):
    steps, _ = batches(layout, Cursor(), ranks)
    whole = layout.num_images // (ranks * layout.batch_images)
    for number, step in enumerate(steps[:whole]):
        for batch in step:
            images = [position for position, _ in batch]
            if layout.spread == 1:
                assert batch == sorted(batch)
            elif number < whole // layout.spread * layout.spread:
                assert len(set(images)) == len(images)


@settings(deadline=None, max_examples=60)
@given(LAYOUTS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.data())
def test_resuming_anywhere_with_any_ranks_repeats_nothing_and_skips_nothing(layout, a, b, c, data):
    """Stop after some batch, go on with other ranks, stop again, go on with yet others."""
    layout = replace(layout, drop_last=False)
    seen: Counter[tuple[int, int]] = Counter()
    place, ended = Cursor(), False
    for ranks in (a, b, c):
        steps, places = batches(layout, place, ranks)
        assert len(steps) == count_batches(layout, place, world_size=ranks)
        stop = data.draw(st.integers(0, len(steps)))
        for step in steps[:stop]:
            seen.update(pair for batch in step for pair in batch)
        if stop:
            place = places[stop - 1]
        if place.images >= layout.num_images:
            ended = True
            break
    if not ended:
        steps, _ = batches(layout, place, c)
        for step in steps:
            seen.update(pair for batch in step for pair in batch)
    assert len(seen) == layout.num_images * layout.crops_per_image
    filled_up = max(a, b, c) * layout.crops_per_image
    assert sum(seen.values()) - len(seen) < filled_up


@settings(deadline=None, max_examples=60)
@given(LAYOUTS, st.integers(1, 3), st.data())
def test_resuming_with_the_same_ranks_gives_exactly_the_next_batch(layout, ranks, data):
    steps, places = batches(layout, Cursor(), ranks)
    if steps:
        stop = data.draw(st.integers(1, len(steps)))
        rest, _ = batches(layout, places[stop - 1], ranks)
        assert rest == steps[stop:]


@given(num_images=st.integers(1, 60), step=st.integers(1, 80), position=st.integers(0, 59))
def test_stand_ins_reach_every_image_once(num_images, step, position):
    position %= num_images
    reached = [stand_in(position, attempt, step, num_images=num_images) for attempt in range(num_images)]
    assert reached[0] == position and sorted(reached) == list(range(num_images))


@given(step=st.integers(1, 20), attempt=st.integers(1, 50))
def test_stand_ins_of_a_window_are_different_images(step, attempt):
    """Where the epoch has enough windows: 100 of `step` images."""
    reached = {stand_in(position, attempt, step, num_images=100 * step) for position in range(step)}
    assert len(reached) == step and not reached & set(range(step))


def test_a_place_with_no_batch_left_is_the_next_epochs_start():
    layout = EpochShape(num_images=11, crops_per_image=2, batch_size=4, spread=1, drop_last=True, seed=0)
    assert settled(layout, Cursor(epoch=3, images=8), world_size=1) == Cursor(epoch=3, images=8)
    assert settled(layout, Cursor(epoch=3, images=8), world_size=2) == Cursor(epoch=4)
    assert settled(layout, Cursor(epoch=3, images=10), world_size=1) == Cursor(epoch=4)
    assert settled(replace(layout, drop_last=False), Cursor(epoch=3, images=10), world_size=1).epoch == 3
