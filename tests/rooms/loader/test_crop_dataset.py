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


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("order", ["global", "shards", "sequential"])
def test_a_stream_gives_every_image_of_the_epoch_once(dataset, label_set, order, num_workers):
    """To 3 ranks of 6 images each; which image an item is, shows in its pixels."""
    items = {row: dataset[row][0].numpy().tobytes() for row in range(len(dataset))}
    rows = {pixels: row for row, pixels in items.items()}
    ranks = []
    for rank in range(3):
        stream = dataset.stream(order=order, rank=rank, world_size=3)
        context = "forkserver" if num_workers else None
        plain = DataLoader(stream, batch_size=None, num_workers=num_workers, multiprocessing_context=context)
        ranks.append([rows[images.numpy().tobytes()] for images, _ in plain])
        assert len(ranks[-1]) == len(stream) == 6
    seen = sorted(row for rank in ranks for row in rank)
    assert len(set(seen)) == 18 and set(seen) < set(range(20))
    assert (order == "sequential") == (ranks[0] == [0, 3, 6, 9, 12, 15] and seen == list(range(18)))


def test_a_stream_follows_set_epoch(dataset):
    first = [images for images, _ in dataset.stream()]
    again = [images for images, _ in dataset.stream()]
    assert all(map(torch.equal, first, again))
    dataset.set_epoch(1)
    assert not all(map(torch.equal, first, (images for images, _ in dataset.stream())))
    with pytest.raises(UsageError, match=r"rank must be 0\.\.1"):
        dataset.stream(rank=2, world_size=2)
    with pytest.raises(UsageError, match="order must be"):
        dataset.stream(order="random")
