"""Tars read as a table hold what `webdataset` reads in them, or are left to it."""

from __future__ import annotations

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from label_sets import same_labels
from PIL import Image

import ferkd_data as fd
from ferkd_data.errors import ShardError
from ferkd_data.format import crop_arrays, plain_tar, webdataset
from ferkd_data.images.decode import jpeg_size
from ferkd_data.labels.rows import ImageLabels, ShardLabels
from ferkd_data.storage import HashedFile, OpenFile, sha256_file

MEMBERS = 2 + len(crop_arrays.SUFFIXES)
"""Those of a sample: its class, its labels, its image."""


@pytest.fixture
def tar(tar_label_set, tmp_path):
    return shutil.copy(tar_label_set / webdataset.file_name(0), tmp_path / "copy.tar")


def plain(path, *, digests=True, top_k=4, num_crops=10):
    with OpenFile(path) as file:
        return plain_tar.read_labels(
            file.read, num_crops=num_crops, top_k=top_k, index_dtype=np.uint16, digests=digests
        )


def slow(path):
    return ShardLabels.from_rows([row for row, _ in webdataset.read_rows(path)])


def rewrite(path, change):
    rows = [change(number, row, image) for number, (row, image) in enumerate(webdataset.read_rows(path))]
    with webdataset.Writer(path) as writer:
        for row, image in rows:
            writer.add(row, image)


def test_a_tar_of_ours_is_read_as_a_table(tar):
    assert same_labels(plain(tar), slow(tar))
    without = plain(tar, digests=False)
    assert not without.image_digest.any()
    assert without.keys == plain(tar).keys


def test_a_tar_without_targets(tar):
    rewrite(tar, lambda number, row, image: (ImageLabels(**{**row.__dict__, "target": -1}), image))
    assert same_labels(plain(tar), slow(tar))
    rewrite(tar, lambda number, row, image: (ImageLabels(**{**row.__dict__, "target": number - 1}), image))
    assert plain(tar) is None


def test_images_of_other_formats_and_with_long_headers(tar):
    def change(number, row, image):
        buffer = io.BytesIO()
        picture = Image.open(io.BytesIO(image))
        if number % 2:
            picture.save(buffer, "PNG")
        else:
            picture.save(buffer, "JPEG", exif=b"Exif\0\0" + bytes(9000))
        return row, buffer.getvalue()

    rewrite(tar, change)
    assert same_labels(plain(tar), slow(tar))


@pytest.mark.parametrize("column, value", [(crop_arrays.FLIP, 2), (crop_arrays.BUCKET, 256)])
def test_a_flip_or_bucket_that_cannot_be_is_refused(tar, column, value):
    parts = members(tar)
    at = next(i for i, (member, _) in enumerate(parts) if member.name.endswith(crop_arrays.CROPS))
    crops = crop_arrays.parse_npy(parts[at][1], "").copy()
    crops[3, column] = value
    parts[at] = (parts[at][0], crop_arrays.npy_bytes(crops))
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for member, content in parts:
            archive.addfile(member, io.BytesIO(content))
    assert plain(tar) is None
    with pytest.raises(ShardError, match="a flip must be 0 or 1, and a bucket below 256"):
        slow(tar)


def test_other_shapes_are_left_to_webdataset(tar, tmp_path):
    assert plain(tar, top_k=3) is None
    assert plain(tar, num_crops=9) is None
    (tmp_path / "empty.tar").write_bytes(b"")
    assert plain(tmp_path / "empty.tar") is None
    (tmp_path / "zeros.tar").write_bytes(bytes(10240))
    assert plain(tmp_path / "zeros.tar") is None
    whole = tar.read_bytes()
    for size in (100, 512, 5000, len(whole) // 2, len(whole.rstrip(b"\0"))):
        tar.write_bytes(whole[:size])
        assert plain(tar) is None, size


def members(path):
    with tarfile.open(path) as archive:
        return [(member, archive.extractfile(member).read()) for member in archive]


@pytest.mark.parametrize(
    "change",
    ["twice", "link", "climbing", "absolute", "long name", "pax", "not ASCII", "dotted", "no image", "order", "owner"],
)
def test_what_tarfile_must_judge_is_left_to_it(tar, change):
    parts = members(tar)
    if change == "twice":
        parts += parts[:MEMBERS]
    if change == "no image":
        del parts[MEMBERS - 1]
    if change == "order":
        parts[:MEMBERS] = parts[MEMBERS - 1 :: -1]
    renamed = {"climbing": "../a", "absolute": "/a", "long name": "a" * 120, "not ASCII": "ü", "dotted": "a.b/c"}
    for member, _ in parts[:MEMBERS]:
        suffix = member.name.partition(".")[2]
        member.name = f"{renamed[change]}.{suffix}" if change in renamed else member.name
        member.uid = 7 if change == "owner" else member.uid
    if change == "link":
        parts[MEMBERS - 1][0].type = tarfile.SYMTYPE
        parts[MEMBERS - 1][0].linkname = "/etc/passwd"
    style = tarfile.PAX_FORMAT if change == "pax" else tarfile.USTAR_FORMAT
    if change == "pax":
        parts[0][0].pax_headers = {"comment": "x"}
    if change == "long name":
        style = tarfile.GNU_FORMAT
    with tarfile.open(tar, "w", format=style) as archive:
        for member, content in parts:
            archive.addfile(member, io.BytesIO(content))
    assert plain(tar) is None


def test_no_damaged_byte_is_read_otherwise(tar):
    """The first two samples and the end, byte by byte in their headers, at random elsewhere."""
    whole = tar.read_bytes()
    generator = np.random.default_rng(0)
    headers = [member.offset for member, _ in members(tar)[: MEMBERS + 1]]
    fields = [0, 5, 99, 100, 107, 115, 124, 130, 134, 135, 136, 148, 153, 154, 155, 156, 157, 257, 263, 329, 345, 500]
    places = [header + field for header in headers for field in fields]
    places += generator.integers(0, len(whole), 100).tolist()
    told = 0
    for place in places:
        data = bytearray(whole)
        data[place] ^= int(generator.integers(1, 256))
        tar.write_bytes(data)
        found = plain(tar)
        if found is not None:
            told += 1
            assert same_labels(found, slow(tar)), place
    assert 20 < told < len(places) - 20


def test_a_label_set_with_an_unusual_tar_is_verified_as_before(tar_label_set, tmp_path):
    copy = shutil.copytree(tar_label_set, tmp_path / "tars")
    path = copy / webdataset.file_name(0)
    expected = fd.open_labels(copy).block(0, 0)
    parts = members(path)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for number in range(0, len(parts), MEMBERS):
            for member, content in parts[number : number + MEMBERS][::-1]:
                archive.addfile(member, io.BytesIO(content))
    assert plain(path) is None
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][0]["files"][0].update(bytes=path.stat().st_size, sha256=sha256_file(path))
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert fd.verify(copy).ok
    assert same_labels(fd.open_labels(copy).block(0, 0), expected)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"icc_profile": b"a" * 500}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_beginning_of_a_jpeg_says_its_size_or_nothing(options, mode):
    pixels = np.random.default_rng(0).integers(0, 255, (37, 50, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **options)
    data = buffer.getvalue()
    answers = {jpeg_size(data[:length], 10**6) for length in range(3, len(data))}
    assert answers <= {None, jpeg_size(data, 10**6)}


def test_a_hashed_file_reads_what_it_hashes(tmp_path, monkeypatch):
    monkeypatch.setattr("ferkd_data.storage.HASHED_BYTES", 100)
    data = np.random.default_rng(0).bytes(1234)
    (tmp_path / "file").write_bytes(data)
    generator = np.random.default_rng(1)
    for _ in range(50):
        with OpenFile(tmp_path / "file") as file:
            hashed = HashedFile(file)
            for offset in generator.integers(0, 1300, 8).tolist():
                length = int(generator.integers(0, 250))
                assert hashed.read(offset, length) == data[offset : offset + length]
            assert hashed.sha256() == sha256_file(tmp_path / "file")
