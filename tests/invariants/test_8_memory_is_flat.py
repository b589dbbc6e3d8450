"""Invariant 8: a build of many times the images takes the same memory."""

from __future__ import annotations

import resource

from label_sets import SMALL

import ferkd_data as fd

SIZE = (320, 240)
FEW, MANY = 100, 700
LEAKED_BYTES = (MANY - FEW) * SIZE[0] * SIZE[1] * 3
"""Memory that keeping every decoded image would take: 138 MB."""


def peak_of_build(photos, out, teacher, queue):
    fd.build(photos, out, teachers=[teacher], **{**SMALL, "crops": 4, "images_per_shard": 50})
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def test_many_times_the_images(make_photos, tiny_teachers, tmp_path, quick_process):
    peaks = {}
    for count in (FEW, MANY):
        photos = make_photos(tmp_path / f"photos{count}", count, size=SIZE)
        queue = quick_process.SimpleQueue()
        process = quick_process.Process(
            target=peak_of_build, args=(photos, tmp_path / f"out{count}", tiny_teachers, queue)
        )
        process.start()
        peaks[count] = queue.get()
        process.join()
    assert peaks[MANY] - peaks[FEW] < LEAKED_BYTES / 6, peaks
