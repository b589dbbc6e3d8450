"""on_error="skip": full batches, `len(loader)` of them, the same after a resume and with any number of workers."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import warnings

import pytest
import torch

import ferkd_data as fd
from ferkd_data.errors import LoaderError, OutOfMemoryError
from ferkd_data.images import open_source, retrying
from ferkd_data.remote import Retries

LAYOUTS = {
    "plain": {},
    "spread": {"spread": 3},
    "shards": {"order": "shards", "shards_together": 2},
    "sequential": {"order": "sequential"},
    "short last batch": {"drop_last": False, "batch_size": 12},
    "on the device": {"decode_device": "cpu"},
}
LOST = 11
"""Images of 20 that cannot be used."""


@pytest.fixture(scope="module")
def half(photos, tmp_path_factory):
    """Every second image is missing, and one more is damaged."""
    folder = shutil.copytree(photos, tmp_path_factory.mktemp("half") / "photos")
    for path in sorted(folder.rglob("*.jpg"))[::2]:
        path.unlink()
    (folder / "class3/photo0013.jpg").write_bytes(b"no picture")
    assert len(list(folder.rglob("*.jpg"))) == 20 - LOST + 1
    return folder


@pytest.fixture(scope="module")
def make(label_set, half, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def make_(images=half, **changes):
        settings = {"batch_size": 8, "crops_per_image": 2, "size": 16, "cache_dir": cache, "calibration": "fkd"}
        return fd.CropLoader(fd.open_labels(label_set), images=images, on_error="skip", **(settings | changes))

    return make_


def contents(batches):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*left out, and another image of the epoch")
        return [(images.clone(), targets.dense().clone()) for images, targets in batches]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(t, u) for (x, t), (y, u) in zip(a, b, strict=True)
    )


def names(batches):
    """Each crop with its target."""
    return {
        hashlib.sha1(image.numpy().tobytes() + target.numpy().tobytes()).hexdigest()
        for images, targets in batches
        for image, target in zip(images, targets, strict=True)
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_batches_are_full_and_as_many_as_ever(make, photos, name):
    """What they hold are crops of usable images with their own targets."""
    loader, whole = make(**LAYOUTS[name]), make(images=photos, **LAYOUTS[name])
    batches, of_all = contents(loader), contents(whole)
    assert [len(images) for images, _ in batches] == [len(images) for images, _ in of_all]
    assert len(batches) == len(loader) and loader.skipped == LOST and whole.skipped == 0
    assert names(batches) < names(of_all) and len(names(batches)) == 2 * (20 - LOST)
    assert all(fd.soft_cross_entropy(torch.zeros(len(t), 10), t).isfinite() for _, t in batches)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_resume_after_every_batch_goes_on_with_the_same(make, name):
    whole = contents(make(**LAYOUTS[name]))
    for stop in range(1, len(whole)):
        first, second = make(**LAYOUTS[name]), make(**LAYOUTS[name])
        stream = iter(first)
        contents(next(stream) for _ in range(stop))
        second.load_state_dict(first.state_dict())
        assert same(contents(second), whole[stop:])


@pytest.mark.parametrize("name", ["plain", "spread"])
def test_the_number_of_workers_changes_nothing(make, name):
    alone, two = make(**LAYOUTS[name]), make(num_workers=2, **LAYOUTS[name])
    assert same(contents(alone), contents(two)) and alone.skipped == two.skipped == LOST


def test_ranks_get_equally_many_full_batches(make):
    for rank in range(2):
        sizes = [len(images) for images, _ in contents(make(rank=rank, world_size=2, batch_size=4))]
        assert sizes == [4] * 5


def test_the_first_one_is_said_and_all_are_counted(make):
    loader = make()
    with pytest.warns(UserWarning, match=r"^image 'class\d/photo\d+' \(shard .*: left out, and another") as said:
        list(loader)
        list(loader)
    assert len(said) == 1 and loader.skipped == 2 * LOST
    assert all("photo" in line for line in loader.skipped_last)


@pytest.mark.parametrize("decode_device", [None, "cpu"])
def test_images_of_which_none_is_left_are_an_error(make, photos, tmp_path, decode_device):
    images = shutil.copytree(photos, tmp_path / "photos")
    loader = make(images=images, decode_device=decode_device)
    for path in images.rglob("*.jpg"):
        path.unlink()
    with pytest.raises(LoaderError, match=r"20 images in a row cannot be used; the last is image 'class.*still there"):
        list(loader)


def test_a_source_that_is_gone_is_an_error_after_a_few_images(make, photos, tmp_path, monkeypatch):
    """Each image is tried for about 20 seconds: a thousand of them would be hours."""
    monkeypatch.setattr(retrying, "RETRIES", Retries(attempts=2, first_wait=0.01, longest_wait=0.01))
    images = shutil.copytree(photos, tmp_path / "photos")
    loader = make(images=images)
    shutil.rmtree(images)
    with pytest.raises(LoaderError, match=r"the source of the images does not answer: image 'class.* is gone"):
        list(loader)


def test_single_images_that_do_not_answer_are_skipped(make, photos, monkeypatch):
    """Bad sectors, three within one window: only images in a row mean that the source is gone."""
    source = open_source(photos)
    read_one, reads = source.read_one, itertools.count()

    def read(ref):
        if next(reads) % 2:
            raise retrying.UnansweredImageError("unreadable", f"{ref.file}: Input/output error")
        return read_one(ref)

    monkeypatch.setattr(source, "read_one", read)
    loader = make(images=source, batch_size=16)
    assert [len(images) for images, _ in contents(loader)] == [16, 16]
    assert loader.skipped > retrying.IMAGES_IN_A_ROW


def test_a_host_without_memory_skips_no_image(label_set, photos, tmp_path, monkeypatch):
    """The error is made here: tests/rooms/images/test_decode.py takes the memory away for real."""

    def short(*arguments):
        raise OutOfMemoryError("too little memory to decode an image")

    loader = fd.CropLoader(
        fd.open_labels(label_set), images=photos, batch_size=8, on_error="skip", cache_dir=tmp_path, size=16
    )
    monkeypatch.setattr("ferkd_data.loader.batch_maker.decode_checked", short)
    with pytest.raises(LoaderError, match=r"image 'class\d/photo\d+' \(shard \d of .*\): too little memory to decode"):
        list(loader)
    assert loader.skipped == 0
