from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ferkd_data import mixing
from ferkd_data.errors import UsageError
from ferkd_data.mixing import CutMix, Mixup, cycles
from ferkd_data.selfmix import SelfMix, partners
from ferkd_data.targets import SoftTargets

DTYPES = [torch.uint8, torch.float32, torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]


def random_images(num, dtype, memory_format):
    images = torch.randint(0, 256, (num, 3, 9, 11), generator=torch.Generator().manual_seed(0))
    return images.to(dtype).contiguous(memory_format=memory_format)


def one_hot(num):
    return SoftTargets(
        index=torch.arange(num)[:, None], weight=torch.ones(num, 1), floor=torch.zeros(num), num_classes=num
    )


def permutations():
    rng = np.random.default_rng(0)
    return [partners(12, 4, rng), partners(12, 2, rng), np.arange(12), *(rng.permutation(12) for _ in range(5))]


@given(st.integers(0, 20).flatmap(lambda num: st.permutations(range(num))))
def test_cycles_are_the_permutation(partner):
    found = list(cycles(np.array(partner, np.int64)))
    assert sorted(row for cycle in found for row in cycle) == list(range(len(partner)))
    for cycle in found:
        assert [partner[row] for row in cycle] == [*cycle[1:], cycle[0]]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 12])
def test_pasting_one_by_one_and_at_once_follow_the_definition(dtype, memory_format, count):
    images = random_images(12, dtype, memory_format)
    rng = np.random.default_rng(1)
    for partner in permutations():
        boxes = mixing._rectangles(count, 9, 11, 0.8, 1.0, rng)
        expected = images.clone()
        for row, (top, left, bottom, right) in enumerate(np.broadcast_to(boxes, (12, 4)).tolist()):
            expected[row, :, top:bottom, left:right] = images[partner[row], :, top:bottom, left:right]
        for paste in (mixing.paste_one_by_one, mixing.paste_at_once):
            mixed = images.clone()
            paste(mixed, partner, boxes)
            assert torch.equal(mixed, expected)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blending_one_by_one_and_at_once_follow_the_definition(dtype, memory_format):
    images = random_images(12, dtype, memory_format)
    share = torch.arange(12) / 16
    for partner in permutations():
        own = share[:, None, None, None].double()
        expected = images.double() * own + images[partner].double() * (1 - own)
        tolerance = {torch.uint8: 0.5, torch.float32: 1e-4, torch.float16: 0.15, torch.bfloat16: 1.1}[dtype]
        for blend in (mixing.blend_one_by_one, mixing.blend_at_once):
            mixed = images.clone()
            blend(mixed, partner, share)
            assert mixed.dtype == dtype
            assert (mixed.double() - expected).abs().max() <= tolerance


@pytest.mark.parametrize("vectorised", [True, False])
@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), levels=st.lists(st.sampled_from([0, 1, 64, 96, 128]), min_size=1, max_size=12))
def test_bytes_blend_to_the_same_levels_everywhere(vectorised, seed, levels):
    """Cycles of every length, shares of which some are equal; with the resize kernel, without it, and as on a GPU."""
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (len(levels), 3, 5, 7), np.uint8))
    share, partner = torch.tensor(levels) / 128, rng.permutation(len(levels))
    one_by_one, at_once = images.clone(), images.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "can_blend", lambda images: vectorised)
        mixing.blend_one_by_one(one_by_one, partner, share)
    mixing.blend_at_once(at_once, partner, share)
    assert torch.equal(one_by_one, at_once)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("blend", [mixing.blend_one_by_one, mixing.blend_at_once])
def test_all_levels_with_all_levels(blend, pair):
    """Nearest to the definition; a pair keeps its sum, and elsewhere a half goes up."""
    first, second = (levels.reshape(1, 256, 256).to(torch.uint8) for levels in all_pairs())
    images = torch.stack([first.expand(3, -1, -1), second.expand(3, -1, -1)])
    images = images if pair else torch.cat([images, images[:1]])
    partner = np.array([1, 0] if pair else [1, 2, 0])
    for level in (1, 32, 63, 64, 127):
        mixed = images.clone()
        blend(mixed, partner, torch.full((len(images),), level / 128))
        own, other, result = (x.to(torch.int64) for x in (images, images[partner], mixed))
        exact = own * level + other * (128 - level)
        assert ((result * 128 - exact).abs() <= 64).all()
        if pair:
            assert torch.equal(result.sum(0), own.sum(0))
        else:
            assert torch.equal(result, (exact + 64) // 128)


def all_pairs():
    return torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")


@pytest.mark.parametrize("crops", range(2, 10))
def test_partners_are_all_others_in_turn_and_pairs_where_the_number_is_even(crops):
    met = set()
    for seed in range(60):
        partner = partners(3 * crops, crops, np.random.default_rng(seed))
        assert (partner // crops == np.arange(3 * crops) // crops).all() and (partner != np.arange(3 * crops)).all()
        assert np.array_equal(partner[:crops], partner[crops : 2 * crops] - crops)
        assert sorted(partner) == list(range(3 * crops))
        if crops % 2 == 0:
            assert (partner[partner] == np.arange(3 * crops)).all()
        met |= set(enumerate(partner[:crops].tolist()))
    assert len(met) == crops * (crops - 1)


def test_two_that_blend_with_each_other_have_one_share():
    selfmix = SelfMix(prob=0.5, alpha=1.0, mode="mixup", per="sample")
    images = random_images(64, torch.uint8, torch.channels_last)
    _, targets = selfmix(images, one_hot(64), crops_per_image=2, rng=np.random.default_rng(0))
    own, other = targets.weight[:, 0], targets.weight[targets.index[:, 1], 0]
    assert torch.equal(own, other) and len(own.unique()) > 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_targets_share_is_one_the_images_type_can_hold(dtype):
    images = random_images(64, dtype, torch.contiguous_format)
    for seed in range(5):
        _, targets = Mixup(alpha=1.0, per="sample")(images, one_hot(64), rng=np.random.default_rng(seed))
        share = targets.weight[:, 0]
        held = (share * 128).round() / 128 if dtype == torch.uint8 else share.to(dtype).float()
        assert torch.equal(share, held)


@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize("kind", [CutMix, Mixup])
def test_images_that_need_a_gradient_are_mixed_alike_and_get_one(kind, per):
    plain = random_images(6, torch.float32, torch.contiguous_format)
    leaf = plain.clone().requires_grad_()
    expected, _ = kind(per=per, alpha=1.0)(plain, one_hot(6), rng=np.random.default_rng(2))
    mixed, _ = kind(per=per, alpha=1.0)(leaf, one_hot(6), rng=np.random.default_rng(2))
    torch.testing.assert_close(mixed.detach(), expected)
    mixed.sum().backward()
    # Each pixel goes whole to someone, so the gradients add up to as many as there are pixels.
    torch.testing.assert_close(leaf.grad.sum(), torch.tensor(float(leaf.numel())))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("mode", ["cutmix", "mixup"])
def test_memory_format_stays(mode, memory_format):
    images = random_images(4, torch.uint8, memory_format)
    mixed, _ = SelfMix(prob=1.0, mode=mode)(images, one_hot(4), crops_per_image=2, rng=np.random.default_rng(0))
    assert mixed.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("mix", [CutMix(per="sample"), Mixup(per="sample")])
def test_global_generators_are_left_alone(mix):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    mix(random_images(4, torch.uint8, torch.channels_last), one_hot(4), rng=np.random.default_rng(0))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


def test_what_cannot_be_mixed():
    images = random_images(4, torch.uint8, torch.channels_last)
    for mix in (CutMix(), Mixup()):
        with pytest.raises(UsageError, match="4 images have 3 targets"):
            mix(images, one_hot(3), rng=np.random.default_rng(0))
        with pytest.raises(UsageError, match=r"\(B, 3, H, W\), got \(4, \d+, \d+, 3\); permute\(0, 3, 1, 2\)"):
            mix(images.permute(0, 2, 3, 1), one_hot(4), rng=np.random.default_rng(0))
        with pytest.raises(UsageError, match="mixing takes SoftTargets, got Tensor; torchvision's"):
            mix(images, one_hot(4).dense(), rng=np.random.default_rng(0))
        with pytest.raises(UsageError, match=r"must have shape \(B, 3, H, W\)"):
            mix(images[:, 0], one_hot(4), rng=np.random.default_rng(0))
    with pytest.raises(UsageError, match="mixing takes SoftTargets, got Tensor"):
        SelfMix()(images, one_hot(4).dense(), crops_per_image=2, rng=np.random.default_rng(0))
    for rng in (0, torch.Generator(), None):
        for mix in (CutMix(), Mixup(), partial(SelfMix(), crops_per_image=2)):
            with pytest.raises(UsageError, match=r"rng must be a generator of NumPy, such as fd\.generator"):
                mix(images, one_hot(4), rng=rng)
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="alpha must be positive and finite"):
            CutMix(alpha=alpha)
