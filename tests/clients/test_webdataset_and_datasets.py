"""Tars of layout webdataset, read by the stock libraries webdataset and datasets with their own decoders."""

from __future__ import annotations

import gc
import io

import numpy as np
import pytest
from PIL import Image

import ferkd_data as fd


def expected_members(image):
    return {
        "crops.npy": np.column_stack([image.boxes, image.flip, image.bucket]),
        "class_index.npy": image.class_index,
        "class_prob.npy": image.class_prob,
        "target_prob.npy": image.target_prob,
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets(tar_label_set, tmp_path, streaming):
    import datasets

    ours = list(fd.open_labels(tar_label_set))
    data_files = str(tar_label_set / "shards/*.tar")
    rows = datasets.load_dataset(
        "webdataset", data_files=data_files, split="train", streaming=streaming, cache_dir=str(tmp_path)
    )
    samples = list(rows)
    assert [sample["__key__"] for sample in samples] == [image.key for image in ours]
    for sample, image in zip(samples, ours, strict=True):
        assert sample["cls"] == image.target
        assert sample["jpg"].size == (image.width, image.height)
        for name, values in expected_members(image).items():
            assert np.array_equal(np.array(sample[name]), values), name


# webdataset 1.0 leaves the last tar open until it is collected.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset(tar_label_set, photos):
    import webdataset as wds

    ours = list(fd.open_labels(tar_label_set))
    pattern = str(tar_label_set / "shards/{00000..00002}.tar")
    samples = list(wds.WebDataset(pattern, shardshuffle=False, empty_check=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [image.key for image in ours]
    for sample, image in zip(samples, ours, strict=True):
        assert sample["cls"] == image.target
        assert sample["jpg"].shape == (48, 64, 3)
        for name, values in expected_members(image).items():
            assert np.array_equal(sample[name], values), name
    raw, *_ = wds.WebDataset(pattern, shardshuffle=False, empty_check=False)
    gc.collect()
    assert raw["jpg"] == (photos / f"{raw['__key__']}.jpg").read_bytes()


def test_unlabelled_images_in_datasets(tmp_path, tiny_teachers):
    import datasets

    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(buffer, "PNG")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(buffer.getvalue())
    fd.build(
        tmp_path / "photos", tmp_path / "set", teachers=[tiny_teachers], crops=3, layout="webdataset", device="cpu"
    )
    rows = datasets.load_dataset(
        "webdataset", data_files=str(tmp_path / "set/shards/*.tar"), split="train", cache_dir=str(tmp_path / "cache")
    )
    (sample,) = list(rows)
    assert "cls" not in sample and sample["png"].size == (30, 20)
    assert np.isnan(sample["target_prob.npy"]).all() and len(sample["target_prob.npy"]) == 3
