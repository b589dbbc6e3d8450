"""Invariant 7: an image that cannot be used is in rejects.parquet with its reason, and the counts add up."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from functools import partial

import pyarrow.parquet as pq
import pytest
from label_sets import SMALL
from PIL import Image

import ferkd_data as fd
from ferkd_data.builder import dry_run
from ferkd_data.errors import BuildError


def png_header(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b""))
    )


@pytest.fixture
def troubled(make_photos, tmp_path):
    folder = make_photos(tmp_path / "photos", 10, classes=2)
    good = (folder / "class0/photo0000.jpg").read_bytes()
    (folder / "class0/truncated.jpg").write_bytes(good[: len(good) // 2])
    (folder / "class0/empty.jpg").write_bytes(b"")
    (folder / "class0/text.jpg").write_bytes(b"this is no image at all")
    (folder / "class0/bomb.png").write_bytes(png_header(60_000, 60_000))
    (folder / "class0/huge.png").write_bytes(png_header(70_000, 1))
    (folder / "class0/flat.png").write_bytes(png_header(0, 5))
    (folder / "class0/has.dot.jpg").write_bytes(good)
    (folder / "class0/photo0000.png").write_bytes(good)
    (folder / "class0/scan.tiff").write_bytes(b"II*\0")
    (folder / "class0/notes.txt").write_text("not an image, and not named like one")
    (tmp_path / "classes.txt").write_text("".join(f"class{i}\n" for i in range(10)))
    return folder


REASONS = {
    "truncated": "truncated",
    "empty": "empty",
    "text": "not_an_image",
    "bomb": "pixel_bomb",
    "huge": "too_large",
    "flat": "zero_sized",
    "has.dot": "bad_key",
    "photo0000": "duplicate_key",
    "scan": "unsupported_format",
}


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_every_reject_has_its_reason_and_the_counts_add_up(troubled, tiny_teachers, tmp_path, layout):
    classes = tmp_path / "classes.txt"
    result = fd.build(troubled, tmp_path / "out", teachers=[tiny_teachers], classes=classes, layout=layout, **SMALL)
    rows = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    assert {row["key"].removeprefix("class0/"): row["reason"] for row in rows} == REASONS
    manifest = result.manifest
    assert manifest.num_images == 10
    assert manifest.source.images_seen == manifest.num_images + manifest.rejects.rows == 10 + len(REASONS)
    assert len(fd.open_labels(tmp_path / "out")) == 10


def test_on_error_fail_stops_with_the_key(troubled, tiny_teachers, tmp_path):
    classes = tmp_path / "classes.txt"
    with pytest.raises(BuildError, match=r"class0/.*cannot be used"):
        fd.build(troubled, tmp_path / "out", teachers=[tiny_teachers], classes=classes, on_error="fail", **SMALL)


@pytest.mark.parametrize("reason", ["bad_key", "unsupported_format"])
def test_on_error_fail_stops_at_what_the_listing_rejects(reason, make_photos, tiny_teachers, tmp_path):
    """Such images were collected all the same, and the build went on."""
    photos, out = make_photos(tmp_path / "photos", 10), tmp_path / "out"
    bad = photos / "class0" / {"bad_key": "has.dot.jpg", "unsupported_format": "scan.tiff"}[reason]
    picture = io.BytesIO()
    Image.new("RGB", (64, 48)).save(picture, {"bad_key": "JPEG", "unsupported_format": "TIFF"}[reason])
    bad.write_bytes(picture.getvalue())
    settings = {"teachers": [tiny_teachers], "on_error": "fail", **SMALL, "crops": 8}
    for build in (dry_run, partial(fd.build, out=out)):
        with pytest.raises(BuildError, match=rf"class0/.*cannot be used \({reason}: "):
            build(photos, **settings)
    # The remedy that the message names.
    bad.unlink()
    assert fd.build(photos, out, **settings).manifest.rejects.rows == 0
    bad.write_bytes(picture.getvalue())
    more = {"extend": True, "crops": 12, "on_error": "fail", "device": "cpu"}
    with pytest.raises(BuildError, match=rf"class0/.*cannot be used \({reason}: "):
        fd.build(photos, out, **more)
    fd.build(photos, out, **{**more, "on_error": "reject"})
    bad.unlink()
    # A reject that is not in SOURCE any more is no image that it lists.
    fd.build(photos, out, **{**more, "crops": 16})


def test_the_pixel_limit_can_be_set(photos, tiny_teachers, tmp_path):
    with pytest.raises(BuildError, match="every one of the 20 images was rejected"):
        fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], max_pixels=64 * 48 - 1, **SMALL)


def test_tars_with_duplicates_and_split_keys(tiny_teachers, tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(picture, "JPEG")
    names = ["a.jpg", "a.cls", "b.v1.jpg", "b.v2.jpg", "c.json", "d.jpg", "a.jpg"]
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for name in names:
            data = b"3" if name.endswith("cls") else b"{}" if name.endswith("json") else picture.getvalue()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    fd.build(tmp_path / "images.tar", tmp_path / "out", teachers=[tiny_teachers], **SMALL)
    rows = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    assert [(row["key"], row["reason"]) for row in rows] == [
        ("b", "bad_key"),
        ("c", "missing_image"),
        ("a", "duplicate_key"),
    ]
    labels = fd.open_labels(tmp_path / "out")
    assert (labels["a"].target, labels["d"].target) == (3, -1)
