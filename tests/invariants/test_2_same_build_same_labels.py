"""Invariant 2: the same build gives the same label set, however it was run."""

from __future__ import annotations

import pytest
import torch
from label_sets import SMALL, same_files, same_label_sets

import ferkd_data as fd


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_a_second_build_gives_the_same_bytes(photos, tiny_teachers, tmp_path, layout):
    for name in ("a", "b"):
        fd.build(photos, tmp_path / name, teachers=[tiny_teachers], layout=layout, **SMALL)
    assert same_files(tmp_path / "a", tmp_path / "b")


@pytest.mark.usefixtures("quick_workers")
@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_two_workers_give_the_same_bytes_as_one(photos, tiny_teachers, tmp_path, layout):
    seen = []
    for workers in (1, 2):
        torch.set_num_threads(3 - workers)
        fd.build(
            photos,
            tmp_path / str(workers),
            teachers=[tiny_teachers],
            layout=layout,
            workers=workers,
            on_progress=seen.append,
            **SMALL,
        )
    assert same_files(tmp_path / "1", tmp_path / "2")
    assert seen[-1].images_done == seen[-1].images_total == 20
    assert {worker.worker for worker in seen[-1].workers} <= {0, 1} and seen[-1].crops_done == 200


def test_workers_do_not_change_the_labels(photos, tiny_teachers, tmp_path):
    for workers in (1, 4):
        fd.build(photos, tmp_path / str(workers), teachers=[tiny_teachers], workers=workers, **SMALL)
    assert same_label_sets(tmp_path / "1", tmp_path / "4")


def test_the_shard_size_does_not_change_an_images_labels(photos, tiny_teachers, tmp_path):
    fd.build(photos, tmp_path / "a", teachers=[tiny_teachers], **SMALL)
    fd.build(photos, tmp_path / "b", teachers=[tiny_teachers], **{**SMALL, "images_per_shard": 3})
    a, b = fd.open_labels(tmp_path / "a"), fd.open_labels(tmp_path / "b")
    for key in a.keys():
        assert (a[key].boxes == b[key].boxes).all()
        assert (a[key].class_index == b[key].class_index).all()


def test_both_layouts_hold_the_same_rows(label_set, tar_label_set):
    assert same_label_sets(label_set, tar_label_set)
