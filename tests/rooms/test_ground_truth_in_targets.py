"""Ground truth, rows, buckets and keys travel with the targets, through everything that is done to them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ferkd_data as fd
from ferkd_data.targets import TENSORS

CLASSES = 7
CARRIED = ("hard", "hard_partner", "hard_share", "bucket", "rows", "keys")


def made(hard, *, keys=True):
    """Targets whose soft label is the ground truth itself, as one-hot."""
    hard = torch.as_tensor(hard)
    num = len(hard)
    return fd.SoftTargets(
        index=hard.clamp(min=0)[:, None],
        weight=torch.ones(num, 1),
        floor=torch.zeros(num),
        num_classes=CLASSES,
        hard=hard,
        hard_partner=hard,
        hard_share=torch.ones(num),
        bucket=(torch.arange(num) % 4).to(torch.uint8),
        rows=torch.arange(num) + 100,
        keys=tuple(f"image{row + 100}" for row in range(num)) if keys else None,
    )


def plain(num=3):
    whole = made(torch.arange(num))
    return fd.SoftTargets(index=whole.index, weight=whole.weight, floor=whole.floor, num_classes=CLASSES)


def test_rows_are_chosen_in_every_field():
    targets = made([0, 1, 2, 3, 4])
    chosen_ways = [
        slice(1, 4),
        torch.tensor([4, 0]),
        [4, 0],
        (4, 0),
        np.array([4, 0]),
        torch.tensor(3),
        np.int64(3),
        -2,
    ]
    rows_chosen = [[1, 2, 3], *[[4, 0]] * 4, *[[3]] * 3]
    for chosen, expected in zip(chosen_ways, rows_chosen, strict=True):
        part = targets[chosen]
        assert part.hard.tolist() == expected and part.rows.tolist() == [row + 100 for row in expected]
        assert part.keys == tuple(f"image{row + 100}" for row in expected) and len(part) == len(expected)
        assert part.bucket.tolist() == [row % 4 for row in expected]
    mask = [True, False, False, True, False]
    for chosen in (mask, np.array(mask), torch.tensor(mask)):
        assert targets[chosen].keys == ("image100", "image103") and targets[chosen].hard.tolist() == [0, 3]
    for chosen in (0.5, torch.tensor(0.5)):
        with pytest.raises(TypeError):
            targets[chosen]
    assert targets[slice(0, 0)].keys == ()
    back = fd.SoftTargets.cat([targets[slice(0, 2)], targets[slice(2, 5)]])
    for name in TENSORS:
        assert torch.equal(getattr(back, name), getattr(targets, name))
    assert back.keys == targets.keys


def test_a_field_that_one_part_lacks_is_left_out():
    joined = fd.SoftTargets.cat([made([0, 1]), plain(2)])
    assert len(joined) == 4 and all(getattr(joined, name) is None for name in CARRIED)


def test_targets_of_ones_own_need_none_of_it():
    targets = plain()
    mixed = targets.mix(torch.tensor([2, 1, 0]), torch.tensor([0.2, 0.5, 0.7]))
    for some in (targets, mixed, targets[slice(0, 2)], targets.to("cpu")):
        assert all(getattr(some, name) is None for name in CARRIED)


def test_every_tensor_moves():
    targets = made([0, 1]).to("meta")
    assert {getattr(targets, name).device.type for name in TENSORS} == {"meta"} and targets.keys is not None
    assert {field for field in vars(targets) if isinstance(getattr(targets, field), torch.Tensor)} == set(TENSORS)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_one_mixing_is_written_out_by_hard_partner_and_share(data):
    """share * CE(hard) + (1 - share) * CE(partner) is the loss on the mixed one-hot targets, row by row."""
    num = data.draw(st.integers(1, 6))
    targets = made(data.draw(st.lists(st.integers(0, CLASSES - 1), min_size=num, max_size=num)))
    partner = torch.tensor(data.draw(st.permutations(range(num))))
    share = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=num, max_size=num)))
    mixed = targets.mix(partner, share)
    assert ((mixed.hard_share >= 0.5) & (mixed.hard_share <= 1)).all()
    logits = torch.randn(num, CLASSES, generator=torch.Generator().manual_seed(num))
    each = torch.nn.functional.cross_entropy
    both = mixed.hard_share * each(logits, mixed.hard, reduction="none")
    both = both + (1 - mixed.hard_share) * each(logits, mixed.hard_partner, reduction="none")
    torch.testing.assert_close(both, fd.soft_cross_entropy(logits, mixed, reduction="none"))
    for row in range(num):
        larger = row if share[row] >= 0.5 else int(partner[row])
        assert mixed.hard[row] == targets.hard[larger] and mixed.rows[row] == 100 + larger
        assert mixed.keys[row] == f"image{100 + larger}" and mixed.bucket[row] == larger % 4
        if share[row] in (0, 1):
            assert mixed.hard_partner[row] == mixed.hard[row] and mixed.hard_share[row] == 1


@pytest.mark.parametrize("mode", ["cutmix", "mixup"])
def test_selfmix_keeps_the_ground_truth_and_strangers_are_named(mode):
    hard = [0, 0, 0, 0, 3, 3, 3, 3]
    images = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    selfmix = fd.SelfMix(prob=1.0, mode=mode, per="sample")
    with pytest.raises(fd.FerkdError, match="do not lie side by side in groups of 4"):
        selfmix(images, made(hard), crops_per_image=4, rng=np.random.default_rng(0))
    of_two = replace(made(hard), rows=torch.tensor([7] * 4 + [2] * 4))
    _, mixed = selfmix(images, of_two, crops_per_image=4, rng=np.random.default_rng(0))
    assert mixed.hard.tolist() == hard and mixed.hard_partner.tolist() == hard and mixed.hard_share.tolist() == [1] * 8
    strangers = fd.CutMix() if mode == "cutmix" else fd.Mixup(alpha=1.0)
    _, twice = strangers(images, mixed, rng=np.random.default_rng(2))
    torch.testing.assert_close(
        twice.dense()[torch.arange(8), twice.hard] + (twice.hard != twice.hard_partner) * (1 - twice.hard_share),
        torch.ones(8),
    )
    assert (twice.hard_share < 1).any()


def test_unknown_ground_truths_stay_unknown():
    mixed = made([-1, 2]).mix(torch.tensor([1, 0]), torch.tensor([0.75, 0.5]))
    assert mixed.hard.tolist() == [-1, 2] and mixed.hard_partner.tolist() == [2, -1]
    assert mixed.hard_share.tolist() == [0.75, 0.5]
    logits = torch.zeros(2, CLASSES)
    assert torch.nn.functional.cross_entropy(logits, mixed.hard, ignore_index=-1) == pytest.approx(np.log(CLASSES))
