"""Label sets of every format version ever published stay readable, value for value.

`version-1-draft` was written before version 1 was frozen, with FLOAT16 columns; `version-1-crop-kinds` has crop kinds.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from label_sets import same_labels

import ferkd_data as fd
from ferkd_data.storage import sha256_file

HERE = Path(__file__).parent
FOLDER = HERE / "version-1"
LAYOUTS = ("parquet", "webdataset")
FOLDERS = [HERE / version / layout for version in ("version-1", "version-1-draft") for layout in LAYOUTS]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: "/".join(folder.parts[-2:]))
def test_every_value(folder):
    labels = fd.open_labels(folder)
    assert list(labels.keys()) == ["class0/photo0", "class0/photo2", "class1/photo1", "class1/photo3"]
    image = labels["class1/photo3"]
    assert (image.height, image.width, image.target) == (12, 16, 1)
    assert image.boxes.tolist() == BOXES
    assert image.flip.tolist() == FLIPS
    assert image.class_index.tolist() == CLASSES
    assert image.class_prob.astype(float).round(4).tolist() == PROBABILITIES
    assert image.bucket.tolist() == BUCKETS
    assert labels.class_names == tuple(f"name {i}" for i in range(6))
    assert pq.read_table(folder / "rejects.parquet").to_pylist()[0]["reason"] == "not_an_image"
    for entry in labels.manifest.shards:
        for file in entry.files:
            assert sha256_file(folder / file.path) == file.sha256


def test_all_hold_the_same():
    first, *others = (list(fd.open_labels(folder).shards()) for folder in FOLDERS)
    for shards in others:
        assert all(map(same_labels, first, shards)) and len(first) == len(shards)
    assert not np.isnan(first[0].target_prob).any()


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_a_reader_that_never_saw_our_code_finds_the_same(layout):
    """examples/standalone_reader.py has nothing but docs/format.md, NumPy and PyArrow."""
    path = Path(__file__).parent.parent.parent / "examples/standalone_reader.py"
    assert len(path.read_text().splitlines()) <= 66
    reader = runpy.run_path(str(path))["read_rows"]
    rows, images = list(reader(FOLDER / layout)), list(fd.open_labels(FOLDER / layout))
    assert [(row["key"], row["target"]) for row in rows] == [(image.key, image.target) for image in images]
    for row, image in zip(rows, images, strict=True):
        for name in ("boxes", "class_index", "class_prob", "flip", "bucket", "target_prob"):
            assert np.array_equal(row[name], getattr(image, name)), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_value_of_a_set_with_crop_kinds(layout):
    labels = fd.open_labels(HERE / "version-1-crop-kinds" / layout)
    small = fd.CropDistribution(scale=(0.05, 0.4))
    assert labels.crop_kinds[1] == fd.CropKind(name="local", crops=3, size=16, distribution=small)
    image = labels["class1/photo3"]
    assert image.boxes.tolist() == [[0, 0, 10, 11], [0, 0, 9, 10], [1, 1, 5, 6], [4, 2, 8, 9], [0, 2, 7, 8]]
    assert image.flip.tolist() == FLIPS
    assert image.class_prob[:, 0].astype(float).round(4).tolist() == [0.8853, 0.8535, 0.748, 0.9634, 0.8569]
    assert labels.crop_kind("local")["class1/photo3"].bucket.tolist() == [2, 3, 2]
    assert fd.verify(HERE / "version-1-crop-kinds" / layout).ok


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sets_without_crop_kinds_say_nothing_of_them(layout):
    """Their manifests are written again byte for byte, without any field that was added later."""
    text = (FOLDER / layout / "manifest.json").read_text()
    assert fd.open_labels(FOLDER / layout).manifest.to_json() == text and "kinds" not in text


BOXES = [[1, 1, 7, 8], [1, 1, 5, 5], [1, 0, 8, 10], [0, 2, 12, 10], [0, 1, 11, 13]]
FLIPS = [True, True, False, True, True]
CLASSES = [[5, 4], [5, 4], [5, 4], [5, 4], [5, 4]]
PROBABILITIES = [[0.8569, 0.1432], [0.7461, 0.2532], [0.8433, 0.1567], [0.9404, 0.0597], [0.9453, 0.0549]]
BUCKETS = [2, 2, 2, 2, 2]
