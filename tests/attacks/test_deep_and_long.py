"""Texts that are nested deep, numbers without end, and files in other encodings: one error of ours for each."""

from __future__ import annotations

import io
import json
import struct
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from label_sets import relist
from PIL import Image

import ferkd_data as fd
from ferkd_data.errors import ManifestError, ShardError, SourceError
from ferkd_data.images import ImageRef, open_source
from ferkd_data_cli.main import run

DEEP = "[" * 200_000
LONG = "1" + "0" * 6000
"""Python turns no text of more than 4,300 digits into a number."""

pytestmark = pytest.mark.usefixtures("no_collection")


@pytest.mark.parametrize("text", [DEEP, f"[{LONG}]", '{"a": ' * 50_000])
def test_a_list_of_classes(photos, tmp_path, text):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(SourceError, match=r"classes.json: is not JSON"):
        open_source(photos, classes=tmp_path / "classes.json")


@pytest.mark.parametrize("text", [f"crops = {DEEP}", f"crops = {LONG}", "a." * 5_000 + "b = 1", "crops = \xff"])
def test_settings_in_a_file(photos, tmp_path, tiny_teachers, text, capsys):
    (tmp_path / "settings.toml").write_text(text, encoding="latin-1")
    command = ["build", photos, tmp_path / "out", "--teacher", tiny_teachers, "--config", tmp_path / "settings.toml"]
    assert run([str(argument) for argument in command]) == 2
    assert "settings.toml: " in capsys.readouterr().err


def table_of(folder, metadata):
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "JPEG")
    table = pa.table({"image": [{"bytes": data.getvalue(), "path": "a.jpg"}], "label": [1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), folder / "x.parquet")


def test_a_table_whose_features_are_nested_deep(tmp_path):
    """Features only describe the columns: without them the table is read all the same."""
    table_of(tmp_path, DEEP)
    (ref,) = open_source(tmp_path).list_images()
    assert isinstance(ref, ImageRef) and ref.target == 1


def test_a_small_table_with_the_names_of_20_000_classes(tmp_path):
    names = [f"a class with a name of some length, number {number:05d}" for number in range(20_000)]
    feature = {"label": {"_type": "ClassLabel", "names": names}, "image": {"_type": "Image"}}
    table_of(tmp_path, json.dumps({"info": {"features": feature}}))
    source = open_source(tmp_path)
    assert len(list(source.list_images())) == 1 and source.class_names == tuple(names)


HEADERS = {
    "brackets": "(" * 9000,
    "signs": "-" * 9000 + "1",
    "a side without end": "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1" * 5000 + ",)}",
    "a type of types": "{'descr': " + "[" * 150 + "'<f4'" + "]" * 150 + ", 'fortran_order': False, 'shape': (1,)}",
}


@pytest.mark.parametrize("name", HEADERS)
def test_arrays_whose_headers_are_nested_deep(tar_copy, name):
    header = HEADERS[name].encode()
    head = header + b" " * (-(len(header) + 11) % 64) + b"\n"
    array = b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head + bytes(64)
    path = tar_copy / "shards/00000.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            content = array if member.name.endswith("class_prob.npy") else data
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    relist(tar_copy)
    with pytest.raises(ShardError, match="not a plain NumPy array"):
        fd.open_labels(tar_copy).shard(0)
    assert not fd.verify(tar_copy).ok


MANIFESTS = {
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "zeros behind its end": lambda text: text.encode() + bytes(3),
    "a number without end": lambda text: text.replace('"seed": 0', f'"seed": {LONG}').encode(),
    "a weight without end": lambda text: text.replace('"weight": 1.0', '"weight": Infinity').encode(),
    "a threshold that is none": lambda text: text.replace('"low": 0.15', '"low": NaN').encode(),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_other_readers_might_take(copy, tmp_path, name):
    path = copy / "manifest.json"
    changed = MANIFESTS[name](path.read_text())
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    for use in (fd.open_labels, fd.verify, lambda folder: fd.pull(str(folder), tmp_path / "out")):
        with pytest.raises(ManifestError, match=r"manifest.json: (not JSON|field)"):
            use(copy)
