"""Ground truth, rows, buckets and keys in the batches of a loader."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import ferkd_data as fd
from ferkd_data.labels.buckets import assign_buckets, confidences_of
from ferkd_data.loader.images_and_keys import KeyTable


@pytest.fixture(params=["parquet", "webdataset"])
def source(request, label_set, tar_label_set, photos):
    return (fd.open_labels(label_set), photos) if request.param == "parquet" else (fd.open_labels(tar_label_set), None)


@pytest.fixture
def make(source, tmp_path):
    def make_(labels=None, **changes):
        settings = {"batch_size": 4, "crops_per_image": 2, "size": 16, "images": source[1]}
        return fd.CropLoader(labels or source[0], **(settings | {"cache_dir": tmp_path / "cache"} | changes))

    return make_


CHANGES = {
    "plain": {},
    "workers": {"num_workers": 2},
    "spread": {"spread": True},
    "shards": {"order": "shards"},
    "two ranks": {"rank": 1, "world_size": 2},
    "device": {"decode_device": "cpu"},
    "fkd": {"calibration": "fkd"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_crop_knows_its_row_class_key_and_bucket(make, source, name):
    labels = source[0]
    loader = make(keys=True, **CHANGES[name])
    for _, targets in loader:
        for b, row in enumerate(targets.rows.tolist()):
            image = labels[row]
            assert targets.keys[b] == image.key
            assert targets.hard[b] == targets.hard_partner[b] == image.target and targets.hard_share[b] == 1
            assert int(targets.bucket[b]) in image.bucket.tolist()
        assert targets.hard.dtype == targets.rows.dtype == torch.int64 and targets.bucket.dtype == torch.uint8


def test_a_bucket_is_that_of_its_own_crop(make, source):
    """Against the stored labels: the top class and its probability name the crop."""
    labels, sure = source[0], 0
    for thresholds in (None, fd.Thresholds(low=0.5, mid=0.7, top=0.9, confidence="target")):
        calibration = fd.Calibration(
            extreme_hard="keep", moderate_hard="keep", recovery="label_smoothing", thresholds=thresholds
        )
        for _, targets in make(calibration=calibration):
            for b, row in enumerate(targets.rows.tolist()):
                image = labels[row]
                top = targets.dense()[b].max()
                # Crops of nearly the same probability cannot be told apart so.
                away = np.abs(image.class_prob[:, 0].astype(float) - float(top))
                crops = np.flatnonzero(away <= away.min() + 1e-6)
                buckets = image.bucket
                if thresholds is not None:
                    certain = confidences_of(image.class_prob, image.target_prob, thresholds.confidence)
                    buckets = assign_buckets(certain, thresholds)
                assert int(targets.bucket[b]) in buckets[crops]
                sure += len(crops) == 1
    assert sure > 40


def test_rows_are_those_of_the_loaders_own_label_set(make, source):
    labels = source[0].select(rows=[3, 4, 11, 19]).map_classes([number // 5 for number in range(10)])
    loader = make(labels, keys=True)
    seen = set()
    for _, targets in loader:
        for b, row in enumerate(targets.rows.tolist()):
            seen.add(row)
            assert labels[row].key == targets.keys[b] and labels[row].target == targets.hard[b]
    assert seen == {0, 1, 2, 3} and loader.labels is labels


def test_an_unknown_ground_truth_is_minus_one(make, source):
    labels = source[0].map_classes({3: 0}, keep_images=True)
    hard = torch.cat([targets.hard for _, targets in make(labels, calibration="fkd")])
    assert hard.unique(return_counts=True)[1].tolist() == [36, 4] and hard.min() == -1


def test_selfmix_in_the_workers_keeps_the_ground_truth(make, source):
    for _, targets in make(selfmix=fd.SelfMix(prob=1.0, per="sample"), keys=True):
        for b, row in enumerate(targets.rows.tolist()):
            assert source[0][row].key == targets.keys[b] and source[0][row].target == targets.hard[b]
        assert torch.equal(targets.hard, targets.hard_partner) and (targets.hard_share == 1).all()


def test_keys_are_given_on_request_only(make):
    (_, targets) = next(iter(make()))
    assert targets.keys is None and targets.rows is not None


def test_a_data_set_gives_the_same(source, tmp_path):
    labels, images = source
    dataset = fd.CropDataset(
        labels, images=images, size=16, crops_per_image=2, calibration="fkd", keys=True, cache_dir=tmp_path
    )
    for context in (None, "fork", "forkserver"):
        workers = {} if context is None else {"num_workers": 1, "multiprocessing_context": context}
        loader = torch.utils.data.DataLoader(dataset, batch_size=5, collate_fn=dataset.collate, **workers)
        keys: list[str] = []
        for _, targets in loader:
            assert len(targets.keys) == len(targets.hard) == 10
            keys += targets.keys
        assert keys == [key for key in labels.keys() for _ in range(2)]


def test_the_table_of_keys_goes_with_its_owner(source):
    labels = source[0]
    table = KeyTable(labels)
    folder: Path = table.folder
    copy = pickle.loads(pickle.dumps(table))
    rows = torch.tensor([19, 0, 0, 7])
    keys = list(labels.keys())
    assert table.take(rows) == copy.take(rows) == tuple(keys[row] for row in rows.tolist())
    assert table.take(torch.empty(0, dtype=torch.int64)) == ()
    del copy
    assert folder.is_dir()
    del table
    assert not folder.exists()
