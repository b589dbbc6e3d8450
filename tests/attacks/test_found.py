"""What fuzzing found (scripts/fuzz.py): each input with the one error that it must raise; its name says what it did."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ferkd_data.errors import FerkdError, ForeignFileError, ManifestError, ShardError
from ferkd_data.format import crop_arrays, parquet, webdataset
from ferkd_data.format.manifest_file import parse_manifest
from ferkd_data.importers.foreign_arrays import load_arrays

FOUND = Path(__file__).parent / "found"
READERS = {
    "manifest": (ManifestError, lambda path: parse_manifest(path.read_bytes(), "manifest.json")),
    "npy": (ShardError, lambda path: crop_arrays.parse_npy(path.read_bytes(), "crops.npy")),
    "tar": (ShardError, lambda path: list(webdataset.read_rows(path))),
    "parquet": (ShardError, lambda path: parquet.read_labels(path, rows=2, num_crops=3, top_k=2, num_classes=6)),
    "foreign": (ForeignFileError, load_arrays),
}


@pytest.mark.parametrize("name", sorted(path.name for path in FOUND.iterdir()))
def test_what_was_found(name, tmp_path):
    error, read = READERS[name.partition("-")[0]]
    copy = shutil.copyfile(FOUND / name, tmp_path / "input")
    with pytest.raises(error) as raised:
        read(copy)
    assert isinstance(raised.value, FerkdError)
