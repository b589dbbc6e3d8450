from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

import ferkd_data as fd
from ferkd_data.errors import UsageError


@pytest.fixture
def dataset(label_set, photos, tmp_path):
    return fd.CropDataset(
        fd.open_labels(label_set), images=photos, crops_per_image=2, size=32, calibration="fkd", cache_dir=tmp_path
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_under_a_plain_dataloader_it_gives_the_loaders_batches(dataset, label_set, photos, tmp_path, num_workers):
    loader = fd.CropLoader(
        fd.open_labels(label_set),
        images=photos,
        batch_size=10,
        crops_per_image=2,
        size=32,
        calibration="fkd",
        order="sequential",
        cache_dir=tmp_path,
    )
    plain = DataLoader(
        dataset,
        batch_size=5,
        collate_fn=dataset.collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        multiprocessing_context="forkserver" if num_workers else None,
    )
    for epoch in (0, 1, 2):
        loader.set_epoch(epoch)
        dataset.set_epoch(epoch)
        pairs = list(zip(plain, loader, strict=True))
        assert len(pairs) == 4
        for (images, targets), (same_images, same_targets) in pairs:
            assert torch.equal(images, same_images)
            torch.testing.assert_close(targets.dense(), same_targets.dense())


def test_items_and_errors(dataset):
    images, targets = dataset[3]
    assert len(dataset) == 20 and images.shape == (2, 3, 32, 32) and len(targets) == 2
    with pytest.raises(IndexError):
        dataset[20]
    with pytest.raises(UsageError, match="negative"):
        dataset.set_epoch(-1)
