"""Invariant 8: a build or a training on many times the images takes the same memory."""

from __future__ import annotations

import itertools
import resource

import pytest
from label_sets import SMALL

import ferkd_data as fd

SIZE = (320, 240)
FEW, MANY = 100, 700
BATCH_IMAGES = 20
LEAKED_BYTES = (MANY - FEW) * SIZE[0] * SIZE[1] * 3
"""Memory that keeping every decoded image would take: 138 MB."""


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_of_build(photos, out, teacher, queue):
    fd.build(photos, out, teachers=[teacher], **{**SMALL, "crops": 4, "images_per_shard": 50})
    queue.put(peak_bytes())


def peaks_of_loader(photos, labels, cache, queue):
    """The peak after the first batches of an epoch, the peak after all of them, and the images read in all."""
    loader = fd.CropLoader(
        fd.open_labels(labels), images=photos, batch_size=2 * BATCH_IMAGES, crops_per_image=2, size=32, cache_dir=cache
    )
    batches = iter(loader)
    first = sum(len(images) for images, _ in itertools.islice(batches, FEW // BATCH_IMAGES))
    peak = peak_bytes()
    rest = sum(len(images) for images, _ in batches)
    queue.put((peak, peak_bytes(), (first + rest) // 2))


def in_own_process(context, measure, *arguments):
    queue = context.SimpleQueue()
    process = context.Process(target=measure, args=(*arguments, queue))
    process.start()
    measured = queue.get()
    process.join()
    return measured


@pytest.fixture(scope="module")
def photos(make_photos, tmp_path_factory):
    """The folders of few and of many photos."""
    folder = tmp_path_factory.mktemp("photos")
    return {count: make_photos(folder / str(count), count, size=SIZE) for count in (FEW, MANY)}


@pytest.fixture(scope="module")
def built(photos, tiny_teachers, tmp_path_factory, quick_process):
    """The label sets of both folders, and the peak memory of each build."""
    out = tmp_path_factory.mktemp("labels")
    peaks = {
        count: in_own_process(quick_process, peak_of_build, photos[count], out / str(count), tiny_teachers)
        for count in (FEW, MANY)
    }
    return out, peaks


def test_many_times_the_images(built):
    _, peaks = built
    assert peaks[MANY] - peaks[FEW] < LEAKED_BYTES / 6, peaks


def test_loader_keeps_no_decoded_image(built, photos, tmp_path, quick_process):
    out, _ = built
    few, many, num_images = in_own_process(quick_process, peaks_of_loader, photos[MANY], out / str(MANY), tmp_path)
    assert num_images == MANY
    assert many - few < LEAKED_BYTES / 6, (few, many)
