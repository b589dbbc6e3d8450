"""Loaders over views of a label set: selections, splits, class maps, and labels without the images that are missing."""

from __future__ import annotations

import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import ferkd_data as fd
from ferkd_data.errors import LabelSetError, StateMismatchError, UsageError
from ferkd_data.loader.label_cache import LabelCache
from ferkd_data.loader.streaming import StreamedLabels

ROWS = [1, 2, 3, 5, 8, 9, 11, 12, 16, 17, 19]


@pytest.fixture(params=["parquet", "webdataset"])
def source(request, label_set, tar_label_set, photos):
    """A label set and its images."""
    return (fd.open_labels(label_set), photos) if request.param == "parquet" else (fd.open_labels(tar_label_set), None)


@pytest.fixture
def make(source, tmp_path):
    def make_(labels, **changes):
        settings = {"batch_size": 4, "crops_per_image": 2, "size": 16, "calibration": "fkd", "drop_last": False}
        settings |= {"images": source[1], "cache_dir": tmp_path / "cache"}
        return fd.CropLoader(labels, **(settings | changes))

    return make_


def contents(batches):
    return [(images.clone(), targets.dense().clone()) for images, targets in batches]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(t, u) for (x, t), (y, u) in zip(a, b, strict=True)
    )


def by_image(batches, num_images):
    """(images, M, ...) of an epoch in sequential order."""
    images, targets = zip(*contents(batches), strict=True)
    crops = torch.cat(images)
    return crops.view(num_images, -1, *crops.shape[1:]), torch.cat(targets).view(num_images, -1, targets[0].shape[1])


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_image_has_the_crops_and_targets_that_it_has_in_the_whole(make, source, epoch):
    labels, _ = source
    view = labels.select(rows=ROWS)
    found = {}
    for name, opened in {"whole": labels, "view": view}.items():
        loader = make(opened, order="sequential", calibration="ferkd")
        loader.set_epoch(epoch)
        found[name] = by_image(loader, len(opened))
    for whole, part in zip(found["whole"], found["view"], strict=True):
        assert torch.equal(whole[ROWS], part)


ORDERS = {
    "global": {},
    "sequential": {"order": "sequential"},
    "shards": {"order": "shards", "shards_together": 2},
    "spread": {"spread": 3},
    "shards, spread": {"order": "shards", "shards_together": 1, "spread": 2},
}


@pytest.mark.parametrize("name", ORDERS)
def test_every_image_of_a_view_comes_once_on_any_number_of_ranks(make, source, name):
    """11 images: no number of ranks divides them."""
    labels = source[0].select(rows=ROWS)
    whole, _ = by_image(make(labels, order="sequential"), len(labels))
    pictures = {crop.numpy().tobytes(): row for row, image in enumerate(whole) for crop in image}
    assert len(pictures) == 22
    for world_size in (1, 2, 3):
        loaders = [make(labels, rank=rank, world_size=world_size, **ORDERS[name]) for rank in range(world_size)]
        assert len({len(loader) for loader in loaders}) == 1
        seen: list[int] = []
        for loader in loaders:
            batches = contents(loader)
            assert len(batches) == len(loader)
            seen += [pictures[crop.numpy().tobytes()] for images, _ in batches for crop in images]
        assert set(seen) == set(range(11))
        # Ranks are filled up with an image each at most, of two crops.
        assert 22 <= len(seen) <= 22 + 2 * (world_size - 1)


@pytest.mark.parametrize("name", ORDERS)
def test_resume_after_every_batch_and_with_workers(make, source, name):
    labels = source[0].select(rows=ROWS).map_classes([number // 3 for number in range(10)])
    changes = ORDERS[name]
    whole = contents(make(labels, **changes))
    assert same(contents(make(labels, num_workers=2, **changes)), whole)
    for stop in range(1, len(whole)):
        first = make(labels, **changes)
        for number, _ in enumerate(first, 1):
            if number == stop:
                break
        second = make(labels, **changes)
        second.load_state_dict(first.state_dict())
        assert same(contents(second), whole[stop:])


def test_a_state_fits_only_the_selection_and_the_classes_it_was_saved_with(make, source):
    labels = source[0]
    views = {
        "whole": labels,
        "some": labels.select(rows=ROWS),
        "others": labels.select(rows=[*ROWS[:-1], 18]),
        "mapped": labels.map_classes([number // 3 for number in range(10)]),
        "mapped otherwise": labels.map_classes([number // 4 for number in range(10)]),
    }
    states = {name: make(view).state_dict() for name, view in views.items()}
    for name, view in views.items():
        for other, state in states.items():
            if other == name:
                make(view).load_state_dict(state)
            else:
                with pytest.raises(StateMismatchError, match="labels"):
                    make(view).load_state_dict(state)


def test_mapped_targets_belong_to_the_same_crops(make, source):
    labels = source[0]
    new = [0, 0, 1, 1, 1, 2, None, None, 3, 3]
    mapped = labels.map_classes(new, keep_images=True)
    member = torch.zeros(10, 4)
    for old, number in enumerate(new):
        if number is not None:
            member[old, number] = 1
    for recovery in ("smooth", "renorm"):
        calibration = fd.Calibration(extreme_hard="keep", moderate_hard="keep", recovery=recovery)
        plain, changed = make(labels, calibration=calibration), make(mapped, calibration=calibration)
        for (images, targets), (same_images, new_targets) in zip(plain, changed, strict=True):
            assert torch.equal(images, same_images) and new_targets.num_classes == 4
            mass = targets.dense() @ member
            sure = mass.sum(dim=1) > 1e-3
            expected = mass[sure] / mass[sure].sum(dim=1, keepdim=True)
            torch.testing.assert_close(new_targets.dense()[sure], expected, atol=1e-5, rtol=0)


def test_softened_targets_are_of_the_new_classes(make, source):
    labels = source[0].map_classes([number // 5 for number in range(10)])
    soften = fd.Calibration(
        extreme_hard="soften", moderate_hard="soften", hard_positive="soften", easy_positive="soften"
    )
    loader = make(labels, calibration=soften, order="sequential")
    _, targets = by_image(loader, 20)
    for row, image in enumerate(labels):
        expected = torch.full((2, 2), 0.1)
        expected[:, image.target] = 0.9
        torch.testing.assert_close(targets[row], expected)


def test_crops_of_what_was_dropped_are_discarded(make, source):
    """With the default calibration, by what the teacher gave to the classes that are left."""
    labels = source[0]
    mapped = labels.map_classes({3: 0, 4: 1}, keep_images=True)
    hard = sum(int((image.bucket == 0).sum()) for image in mapped)
    assert hard > sum(int((image.bucket == 0).sum()) for image in labels)
    loader = make(mapped, order="sequential", calibration="ferkd", crops_per_image=10, batch_size=10)
    # In layout parquet, blocks of few crops have images without a crop in use.
    with (
        pytest.warns(UserWarning, match="are all discarded") if loader.labels.manifest.num_blocks > 1 else nullcontext()
    ):
        images, _ = by_image(loader, 20)
    everything, _ = by_image(make(mapped, order="sequential", calibration="fkd", crops_per_image=10, batch_size=10), 20)
    for row, image in enumerate(mapped):
        in_use = int((image.bucket > 0).sum())
        if labels.manifest.layout == "webdataset" and in_use:
            assert len({crop.numpy().tobytes() for crop in images[row]}) == in_use
        assert {crop.numpy().tobytes() for crop in images[row]} <= {crop.numpy().tobytes() for crop in everything[row]}


def test_mapped_labels_share_the_cache_of_the_stored_ones(make, source, tmp_path):
    labels = source[0]
    contents(make(labels))
    contents(make(labels.map_classes([number // 3 for number in range(10)])))
    folders = [path for path in (tmp_path / "cache").iterdir() if any(path.glob("block-*"))]
    assert [folder.name for folder in folders] == [labels.identity[:32]]


@pytest.mark.parametrize("cache", [LabelCache, StreamedLabels])
def test_records_of_a_view_are_those_of_its_rows(source, tmp_path, cache):
    labels = source[0]
    every = cache(labels, tmp_path / "a").take(0, np.arange(20))
    some = cache(labels.select(rows=ROWS), tmp_path / "b").take(0, np.arange(len(ROWS)))
    assert np.array_equal(every[ROWS], some)


def test_a_data_set_of_a_view(make, source, tmp_path):
    labels, images = source
    settings = {"images": images, "size": 16, "crops_per_image": 2, "cache_dir": tmp_path}
    whole = fd.CropDataset(labels, **settings)
    view = fd.CropDataset(labels.select(rows=ROWS), **settings)
    mapped = fd.CropDataset(labels.select(rows=ROWS).map_classes([0] * 10), **settings)
    assert len(whole) == 20 and len(view) == len(mapped) == 11
    for row, base in enumerate(ROWS):
        crops, targets = view[row]
        same_crops, same_targets = whole[base]
        assert torch.equal(crops, same_crops) and torch.equal(targets.dense(), same_targets.dense())
        same_crops, ones = mapped[row]
        assert torch.equal(same_crops, crops) and torch.allclose(ones.dense(), torch.ones(2, 1))
    with pytest.raises(IndexError):
        view[11]
    stream = view.stream(order="shards", shards_together=1)
    assert len(stream) == len(list(stream)) == 11


@pytest.fixture
def fewer_photos(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "fewer")
    for name in ("class3/photo0013.jpg", "class0/photo0000.jpg", "class9/photo0019.jpg"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("order", ["global", "shards", "sequential"])
def test_labels_of_missing_images_are_dropped_where_that_is_chosen(label_set, fewer_photos, tmp_path, order):
    labels = fd.open_labels(label_set)
    settings = {"batch_size": 2, "crops_per_image": 2, "size": 16, "calibration": "fkd", "order": order}
    settings |= {"images": fewer_photos, "cache_dir": tmp_path / "cache"}
    with pytest.raises(LabelSetError, match=r"3 of 20 labelled images are missing.*leave their labels out with "):
        fd.CropLoader(labels, **settings)
    with pytest.warns(UserWarning, match="3 of 20 labelled images are missing and were dropped.*17 are left") as said:
        loader = fd.CropLoader(labels, images_missing="drop", **settings)
    assert len(said) == 1 and said[0].filename == __file__
    assert len(loader) == len(loader.labels) == 17
    there = {key for key in labels.keys() if (fewer_photos / f"{key}.jpg").exists()}
    assert set(loader.labels.keys()) == there
    batches = contents(loader)
    assert len(batches) == 17 and loader.skipped == 0 and all(len(images) == 2 for images, _ in batches)
    state = loader.state_dict()
    with pytest.warns(UserWarning, match="17 are left"):
        fd.CropLoader(labels, images_missing="drop", **settings).load_state_dict(state)
    fd.CropLoader(labels.select(keys=there), **settings).load_state_dict(state)
    with pytest.raises(UsageError, match="images_missing must be one of raise, drop, got 'skip'"):
        fd.CropLoader(labels, images_missing="skip", **settings)


def test_a_data_set_without_the_images_that_are_missing(label_set, fewer_photos, tmp_path):
    with pytest.warns(UserWarning, match="17 are left"):
        dataset = fd.CropDataset(
            fd.open_labels(label_set), images=fewer_photos, images_missing="drop", size=16, cache_dir=tmp_path / "c"
        )
    assert len(dataset) == 17 and [dataset[row][0].shape for row in range(17)] == [(1, 3, 16, 16)] * 17


def test_nothing_is_said_where_no_image_is_missing(label_set, photos, tmp_path):
    labels = fd.open_labels(label_set)
    loader = fd.CropLoader(labels, images=photos, batch_size=4, images_missing="drop", cache_dir=tmp_path)
    assert loader.labels is labels


def test_a_source_without_any_of_the_images_is_an_error_whatever_was_chosen(label_set, make_photos, tmp_path):
    other = make_photos(tmp_path / "other", 3)
    for path in sorted(other.rglob("*.jpg")):
        path.rename(path.with_name(f"other-{path.name}"))
    with pytest.raises(LabelSetError, match="has a key of this label set"):
        fd.CropLoader(fd.open_labels(label_set), images=other, batch_size=4, images_missing="drop", cache_dir=tmp_path)
