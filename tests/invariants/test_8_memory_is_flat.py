"""Invariant 8: a build of ten times the images takes the same memory."""

from __future__ import annotations

import resource

from label_sets import SMALL

import ferkd_data as fd


def peak_of_build(photos, out, teacher, queue):
    fd.build(photos, out, teachers=[teacher], **{**SMALL, "crops": 4, "images_per_shard": 50})
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def test_ten_times_the_images(make_photos, tiny_teachers, tmp_path, quick_process):
    peaks = {}
    for count in (200, 2000):
        photos = make_photos(tmp_path / f"photos{count}", count)
        queue = quick_process.SimpleQueue()
        process = quick_process.Process(
            target=peak_of_build, args=(photos, tmp_path / f"out{count}", tiny_teachers, queue)
        )
        process.start()
        peaks[count] = queue.get()
        process.join()
    assert peaks[2000] < 1.05 * peaks[200], peaks
