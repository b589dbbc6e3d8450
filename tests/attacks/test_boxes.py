"""A box outside its image: whoever reads the labels names the image, the crop and the file."""

from __future__ import annotations

import shutil

import pytest
from attacks.ways_in import CROP, VALUES, tell

import ferkd_data as fd
from ferkd_data.errors import FerkdError


@pytest.fixture(params=["parquet", "tars"])
def lying(request, label_set, tar_label_set, tmp_path):
    """(the folder, the file that lies, the key of its image)."""
    folder = shutil.copytree(label_set if request.param == "parquet" else tar_label_set, tmp_path / "lying")
    tell(folder, VALUES["a box outside its image"])
    labels = fd.open_labels(folder)
    return folder, labels.manifest.shards[0].files[0].path, list(labels.keys_of(0))[CROP[0]]


def load(folder, photos, tmp_path, **settings):
    images = None if (folder / "shards").exists() else photos
    common = {"batch_size": 4, "crops_per_image": 2, "size": 32, "cache_dir": tmp_path / "cache"}
    return list(fd.CropLoader(fd.open_labels(folder), images=images, **common, **settings))


USES = {
    "open_labels": lambda folder, photos, tmp_path: fd.open_labels(folder).shard(0),
    "CropLoader": load,
    "CropLoader on a device": lambda *places: load(*places, decode_device="cpu"),
    "CropLoader shard by shard": lambda *places: load(*places, order="shards"),
    "convert": lambda folder, photos, tmp_path: fd.convert(
        folder, tmp_path / "out", layout="parquet", crops_per_block=5
    ),
    "publish": lambda folder, photos, tmp_path: fd.publish(
        folder,
        str(tmp_path / "public"),
        card=fd.CardFields(name="x", license="mit", author="a", image_license="mit"),
    ),
    "merge": lambda folder, photos, tmp_path: fd.merge([folder, folder.with_name("lying")], tmp_path / "out"),
    "pull": lambda folder, photos, tmp_path: fd.pull(str(folder), tmp_path / "out"),
}


@pytest.mark.parametrize("use", USES)
def test_the_message_names_image_crop_and_file(lying, photos, tmp_path, use):
    folder, file, key = lying
    with pytest.raises(FerkdError) as caught:
        USES[use](folder, photos, tmp_path)
    said = str(caught.value)
    for part in (f"'{key}'", file, "60000, 60000, 5000, 5000", "not inside"):
        assert part in said, f"{part} is not in: {said}"


def test_verify_names_them_too(lying):
    folder, file, key = lying
    fault = next(fault for fault in fd.verify(folder).faults if fault.field == "boxes" or "not inside" in fault.message)
    assert (fault.file, fault.key) == (file, key) and key in str(fault) and "not inside" in str(fault), fault
