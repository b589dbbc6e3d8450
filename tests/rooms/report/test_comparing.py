"""Comparing two label sets: counts by hand, KL against dense distributions, any order of images."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ferkd_data as fd
from ferkd_data.errors import LabelSetError
from ferkd_data.report.compare import _Sums, divergence
from ferkd_data.report.samples import Smallest
from ferkd_data.targets import SoftTargets, recover
from ferkd_data_cli.main import run

SMALL = {"crops": 10, "crops_per_block": 4, "top_k": 4, "images_per_shard": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def other(tmp_path_factory, photos, tiny_teachers):
    """Label the images of `label_set` with another teacher, in other shards, with fewer crops."""
    out = tmp_path_factory.mktemp("other") / "out"
    thresholds = fd.Thresholds(low=0.3, mid=0.5, top=0.9)
    teachers = ["python:ferkd_tiny_teachers:third"]
    fd.build(photos, out, teachers=teachers, thresholds=thresholds, **{**SMALL, "crops": 6, "images_per_shard": 5})
    return out


def dense(index, prob, num_classes):
    weight, floor = recover(prob, num_classes=num_classes)
    targets = SoftTargets(
        index=torch.from_numpy(index.astype(np.int64)),
        weight=torch.from_numpy(weight),
        floor=torch.from_numpy(floor),
        num_classes=num_classes,
    )
    return targets.dense().double()


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), st.integers(5, 12))
def test_kl_is_that_of_the_dense_labels(seed, k_a, k_b, classes):
    generator = np.random.default_rng(seed)

    def labels(k):
        prob = -np.sort(-generator.dirichlet([0.5] * classes, 6), axis=1)[:, :k].astype(np.float16)
        return generator.permuted(np.tile(np.arange(classes), (6, 1)), axis=1)[:, :k], prob

    a, b = labels(k_a), labels(k_b)
    p, q = (dense(*one, classes).clamp(min=1e-7) for one in (a, b))
    expected = (p * (p / q).log()).sum(dim=1).clamp(min=0)
    np.testing.assert_allclose(divergence(a, b, classes), expected.numpy(), atol=1e-5)


def test_a_set_and_itself_are_the_same(label_set):
    found = fd.compare(label_set, label_set)
    assert (found.images, found.crops, found.other_crops, found.only_a, found.only_b) == (20, 200, 0, 0, 0)
    assert found.same_top1 == 1 and found.mean_kl < 1e-6 and found.most_different == ()
    assert sum(found.bucket_moves[i][i] for i in range(4)) == 200


def test_other_teachers_shards_and_crops(label_set, other):
    found = fd.compare(label_set, other, examples=3)
    a, b = fd.open_labels(label_set), fd.open_labels(other)
    same = moves = right_a = 0
    worst = {}
    for ours in a:
        theirs = b[ours.key]
        assert (ours.boxes[:6] == theirs.boxes).all()
        same += int((ours.class_index[:6, 0] == theirs.class_index[:, 0]).sum())
        moves += int((ours.bucket[:6] != theirs.bucket).sum())
        right_a += int((ours.class_index[:6, 0] == ours.target).sum())
        p, q = (dense(i.class_index[:6], i.class_prob[:6], 10).clamp(min=1e-7) for i in (ours, theirs))
        worst[ours.key] = float((p * (p / q).log()).sum(dim=1).max())
    assert (found.images, found.crops, found.other_crops) == (20, 120, 0)
    assert found.same_top1 == same / 120 and found.right_a == right_a / 120
    assert sum(map(sum, found.bucket_moves)) == 120
    assert moves == 120 - sum(found.bucket_moves[i][i] for i in range(4))
    expected = sorted(worst, key=lambda key: -worst[key])[:3]
    assert [difference.key for difference in found.most_different] == expected
    assert found.most_different[0].kl == pytest.approx(worst[expected[0]], abs=1e-4)


def test_it_is_symmetric_where_it_should_be(label_set, other):
    there, back = fd.compare(label_set, other), fd.compare(other, label_set)
    assert (there.crops, there.same_top1, there.right_a) == (back.crops, back.same_top1, back.right_b)
    assert np.array_equal(np.array(there.bucket_moves).T, back.bucket_moves)


def test_other_boxes_are_counted_and_not_compared(label_set, tmp_path, photos, tiny_teachers):
    fd.build(photos, tmp_path / "seed", teachers=[tiny_teachers], **SMALL, seed=9)
    found = fd.compare(label_set, tmp_path / "seed")
    assert found.images == 20 and found.other_crops + found.crops == 200 and found.other_crops > 150


def test_images_of_one_alone_are_counted(label_set):
    labels = fd.open_labels(label_set)
    found = fd.compare(labels.select(rows=range(3, 15)), labels.select(rows=range(0, 10)))
    assert (found.images, found.only_a, found.only_b) == (7, 5, 3)


def test_no_common_image_is_an_error(label_set):
    labels = fd.open_labels(label_set)
    with pytest.raises(LabelSetError, match="no image is in both"):
        fd.compare(labels.select(rows=range(5)), labels.select(rows=range(5, 9)))


def test_other_classes_are_an_error(label_set, hostile_labels):
    with pytest.raises(LabelSetError, match="class 0 is"):
        fd.compare(label_set, hostile_labels)


def test_command(label_set, other, capsys):
    assert run(["compare", str(label_set), str(other)]) == 0
    text = capsys.readouterr().out
    assert "crops in both" in text and "A's down" in text and "KL" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    assert run(["compare", str(label_set), str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["crops"] == 120


def test_without_a_ground_truth_nothing_is_said_to_be_wrong(photos, tiny_teachers, tmp_path, capsys):
    """0 % right was printed, and 0.0 returned, for labels that nothing is known of."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for photo in photos.rglob("*.jpg"):
        shutil.copyfile(photo, flat / photo.name)
    fd.build(flat, tmp_path / "out", teachers=[tiny_teachers], **SMALL)
    found = fd.compare(tmp_path / "out", tmp_path / "out")
    assert (found.right_a, found.right_b, found.only_a_right, found.only_b_right) == (None,) * 4
    assert found.same_top1 == 1 and run(["compare", *[str(tmp_path / "out")] * 2]) == 0
    text = capsys.readouterr().out
    assert "the ground truth is unknown for every image" in text and "right" not in text


def test_without_common_crops_nothing_is_said_to_be_equal(label_set, photos, tiny_teachers, tmp_path, capsys):
    """A divergence of 0 means equal labels."""
    distribution = fd.CropDistribution(scale=(1, 1), ratio=(1, 1), hflip=0)
    fd.build(photos, tmp_path / "whole", teachers=[tiny_teachers], distribution=distribution, **SMALL)
    found = fd.compare(label_set, tmp_path / "whole")
    assert found.crops == 0 and found.other_crops == 200
    assert (found.mean_kl, found.same_top1, found.mean_p_max_a, found.right_a) == (None,) * 4
    assert run(["compare", str(label_set), str(tmp_path / "whole"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean_kl"] is None


def test_one_ground_truth_is_enough(label_set):
    """B's is taken where A has none, and an image that was not hashed is compared by its key."""
    labels = fd.open_labels(label_set)
    shards = list(labels.shards())
    whole, blind = _Sums(num_classes=10, worst=Smallest(0)), _Sums(num_classes=10, worst=Smallest(0))
    for shard in shards:
        whole.add(shard, shard)
        bare = replace(shard, target=np.full_like(shard.target, -1), image_digest=np.zeros_like(shard.image_digest))
        blind.add(bare, shard)
    assert blind.comparison(labels, labels) == whole.comparison(labels, labels) and whole.others == 0


def test_other_recorded_operations_are_other_crops(label_set, photos, tiny_teachers, tmp_path):
    """Same boxes and flips, but the teachers saw other pictures."""
    for name, augment in (("a", ["randaugment:n=2,m=9"]), ("b", ["randaugment:n=2,m=10"])):
        fd.build(photos, tmp_path / name, teachers=[tiny_teachers], augment=augment, **SMALL)
    assert fd.compare(tmp_path / "a", tmp_path / "a").crops == 200
    found = fd.compare(label_set, tmp_path / "a")
    assert (found.images, found.crops, found.other_crops) == (20, 0, 200)
    found = fd.compare(tmp_path / "a", tmp_path / "b")
    assert found.other_crops > 150 and found.crops + found.other_crops == 200
