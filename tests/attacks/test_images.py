"""Hostile images, tars, folders and Parquet files: each ends in the one error or reject named here. Nothing hangs,
nothing warns, and no image is lost in silence."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import warnings
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ferkd_data.errors import ImageError, SourceError
from ferkd_data.images import ImageRef, Reject, decode_rgb, image_size, open_source


def encoded(kind="JPEG", mode="RGB", size=(8, 6), **options):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


JPEG = encoded()


# ---- bytes of images ----


def gif(screen, frame):
    """A one-pixel picture that claims these sizes."""
    header = b"GIF89a" + struct.pack("<2H", *screen) + b"\x80\0\0" + bytes(6)
    return header + b"," + struct.pack("<4H", 0, 0, *frame) + b"\0\x02\x02\x4c\x01\0;"


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of_size(width, height):
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10)))


def bmp_header(width, height):
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def jpeg_of_size(height, width):
    start = JPEG.index(b"\xff\xc0")
    return JPEG[: start + 5] + struct.pack(">2H", height, width) + JPEG[start + 9 :]


HOSTILE_IMAGES = {
    "empty": (b"", "empty"),
    "zeros": (bytes(4096), "not_an_image"),
    "text": (b"<html>404 not found</html>", "not_an_image"),
    "a lone JPEG marker": (b"\xff\xd8\xff", "truncated"),
    "half a JPEG": (encoded(size=(200, 200), quality=95)[:700], "truncated"),
    "half a PNG": (encoded("PNG", size=(300, 300))[:200], "truncated"),
    "PNG bomb": (png_of_size(60_000, 60_000), "pixel_bomb"),
    "PNG with a side of 2**31": (png_of_size(2**31 - 1, 1), "too_large"),
    "PNG of no height": (png_of_size(9, 0), "zero_sized"),
    "JPEG bomb": (jpeg_of_size(65_000, 65_000), "pixel_bomb"),
    "JPEG of no height": (jpeg_of_size(0, 8), "zero_sized"),
    "BMP bomb": (bmp_header(40_000, 40_000), "pixel_bomb"),
    "GIF bomb in its screen": (gif((60_000, 60_000), (1, 1)), "pixel_bomb"),
    "GIF bomb in its frame": (gif((10, 10), (60_000, 60_000)), "pixel_bomb"),
    "GIF frame where Pillow only warns": (gif((10, 10), (12_000, 12_000)), "pixel_bomb"),
    "TIFF": (encoded("TIFF"), "unsupported_format"),
    "PPM": (encoded("PPM"), "unsupported_format"),
    "AVIF": (b"\0\0\0\x1cftypavif" + bytes(100), "unsupported_format"),
}


@pytest.mark.parametrize(("data", "reason"), HOSTILE_IMAGES.values(), ids=HOSTILE_IMAGES)
def test_each_hostile_image_has_its_reason(data, reason):
    with pytest.raises(ImageError) as caught:
        decode_rgb(data)
    assert caught.value.reason == reason


def with_segment(jpeg, marker, content):
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


def with_chunk(png, name, content):
    return png[:33] + chunk(name, content) + png[33:]


BROKEN_EXIF = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x1a\x01\x05\0\x01\0\0\0\xff\xff\0\0"
BROKEN_MPO = b"MPF\0II*\0\x08\0\0\0\x01\0\x01\xb0\x04\0\x01\0\0\0\xff\xff\xff\xff\0\0\0\0"
PALETTE = Image.new("P", (8, 6))
PALETTE.putpalette(list(range(30)))


def palette_png(**options):
    buffer = io.BytesIO()
    PALETTE.save(buffer, "PNG", **options)
    return buffer.getvalue()


def with_screen(gif, width, height):
    return gif[:6] + struct.pack("<2H", width, height) + gif[10:]


WARNED_OF = {
    "broken EXIF": with_segment(encoded(mode="CMYK"), 0xE1, BROKEN_EXIF),
    "broken picture list": with_segment(encoded(mode="CMYK"), 0xE2, BROKEN_MPO),
    "animation of no frames": with_chunk(encoded("PNG"), b"acTL", bytes(8)),
    "transparent palette": palette_png(transparency=bytes([0, 128, 255])),
    "GIF frame beyond its screen": with_screen(encoded("GIF", "L", (12, 14)), 10, 10),
    "GIF that cleans up behind itself": encoded("GIF", "L", (12, 14), disposal=2, transparency=0),
}


@pytest.mark.parametrize("data", WARNED_OF.values(), ids=WARNED_OF)
def test_what_pillow_warns_of_is_decoded_without_a_warning(data, monkeypatch):
    """The test run turns warnings into errors; and Pillow's own limit, set low here, has no say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert np.array_equal(decode_rgb(data), expected)
    assert image_size(data) == expected.shape[:2]


# ---- tars ----


def member(name, size=0, **fields):
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def tar_of(path, *members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def photo_tar(path, count=10):
    return tar_of(path, *((member(f"k{i}.jpg", len(JPEG)), JPEG) for i in range(count)))


def patch_header(path, offset, change):
    """Change a header and make its checksum right again."""
    raw = bytearray(path.read_bytes())
    change(raw, offset)
    raw[offset + 148 : offset + 156] = b" " * 8
    raw[offset + 148 : offset + 156] = b"%06o\0 " % sum(raw[offset : offset + 512])
    path.write_bytes(raw)


def listed(path):
    return list(open_source(path).list_images())


@pytest.mark.parametrize("damage", ["flip", "cut", "checksum of the second", "concatenated"])
def test_a_tar_that_tarfile_would_end_early_is_refused(tmp_path, damage):
    """tarfile takes these for a normal end: the images behind it would be missing and nobody would know."""
    path = photo_tar(tmp_path / "a.tar")
    with tarfile.open(path) as tar:
        headers = [info.offset for info in tar]
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[headers[3] + 5] ^= 1
    elif damage == "cut":
        del raw[headers[5] + 100 :]
    elif damage == "concatenated":
        raw = raw * 2
    else:
        raw[headers[1] + 150] ^= 1
    path.write_bytes(raw)
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) <= 10
    with pytest.raises(SourceError, match="damaged header at byte"):
        listed(path)


def test_a_tar_without_an_end_mark_is_whole(tmp_path):
    path = photo_tar(tmp_path / "a.tar", 3)
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset
    path.write_bytes(path.read_bytes()[:end])
    assert [ref.key for ref in listed(path)] == ["k0", "k1", "k2"]


@pytest.mark.parametrize("size", [-1, -512, -1024, -2048, -(2**40), 2**40, 2**62, 2**80])
def test_absurd_sizes_in_a_header(tmp_path, size):
    path = photo_tar(tmp_path / "a.tar", 3)

    def change(raw, offset):
        raw[offset + 124 : offset + 136] = (size % 2**95 | (0xFF << 88 if size < 0 else 0x80 << 88)).to_bytes(12, "big")

    with tarfile.open(path) as tar:
        second = tar.getmembers()[1].offset
    patch_header(path, second, change)
    with pytest.raises(SourceError, match=r"a\.tar"):
        listed(path)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [0, 2**45])
def test_extended_headers_that_are_huge_or_without_end(tmp_path, kind, size):
    header = member("x", size, type=kind).tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(header * 3000 + bytes(1024))
    with pytest.raises(SourceError, match=r"a\.tar"):
        listed(tmp_path / "a.tar")


def sparse_headers(real_size, name="k.jpg"):
    return {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": name,
        "GNU.sparse.realsize": str(real_size),
    }


def test_a_sparse_image_is_a_reject_and_not_an_exabyte(tmp_path):
    body = b"1\n0\n10\n".ljust(512, b"\0") + bytes(512)
    sparse = member("k.jpg", len(body), pax_headers=sparse_headers(2**60))
    (item, after) = listed(tar_of(tmp_path / "a.tar", (sparse, body), (member("z.jpg", len(JPEG)), JPEG)))
    assert isinstance(item, Reject) and item.reason == "unreadable"
    assert after.key == "z"


def test_a_sparse_label_is_a_reject_and_not_the_bytes_that_lie_there(tmp_path):
    body = b"1\n0\n1\n".ljust(512, b"\0") + b"7".ljust(512, b"\0")
    sparse = member("k.cls", len(body), pax_headers=sparse_headers(1, "k.cls"))
    (item,) = listed(tar_of(tmp_path / "a.tar", (member("k.jpg", len(JPEG)), JPEG), (sparse, body)))
    assert isinstance(item, Reject) and "sparse" in item.detail


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_linked_image_is_a_reject(tmp_path, kind):
    link = member("b.jpg", type=kind, linkname="/etc/passwd")
    first, second = listed(tar_of(tmp_path / "a.tar", (member("a.jpg", len(JPEG)), JPEG), (link, b"")))
    assert isinstance(first, ImageRef)
    assert isinstance(second, Reject) and (second.key, second.reason) == ("b", "unreadable")


@pytest.mark.parametrize("name", ["../k.jpg", "/k.jpg", "a/../k.jpg", "a\\k.jpg", "a\nb.jpg", "__k__.jpg"])
def test_member_names_that_climb_or_hide(tmp_path, name):
    (item,) = listed(tar_of(tmp_path / "a.tar", (member(name, len(JPEG)), JPEG)))
    assert isinstance(item, Reject) and item.reason == "bad_key"


def test_a_member_name_that_is_not_utf8(tmp_path):
    path = tar_of(tmp_path / "a.tar", (member("\udc80.jpg", len(JPEG)), JPEG), format=tarfile.GNU_FORMAT)
    (item,) = listed(path)
    assert isinstance(item, Reject) and item.reason == "bad_key"


@pytest.mark.parametrize("suffix", ["cls", "json"])
@pytest.mark.parametrize("number", [b"Infinity", b"-1", b"1e400", b"3.7", b"true", b"[[", b"", b"\xff", b"9" * 5000])
def test_labels_that_are_no_class_number(tmp_path, suffix, number):
    """The image is not corrupt for that: its ground truth is unknown, and the listing says so."""
    text = number if suffix == "cls" else b'{"label": ' + number + b"}"
    path = tar_of(tmp_path / "a.tar", (member("k.jpg", len(JPEG)), JPEG), (member(f"k.{suffix}", len(text)), text))
    source = open_source(path)
    (item,) = source.list_images()
    assert isinstance(item, ImageRef) and item.target is None
    assert len(source.notes) == 1


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 511), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_to_headers_ends_in_a_listing_or_a_source_error(tmp_path_factory, changes):
    path = photo_tar(tmp_path_factory.mktemp("fuzz") / "a.tar", 4)
    with tarfile.open(path) as tar:
        headers = [info.offset for info in tar]
    for which, position, value in changes:
        patch_header(path, headers[which], lambda raw, at, p=position, v=value: raw.__setitem__(at + p, v))
    try:
        assert len(listed(path)) <= 4
    except SourceError as error:
        assert "a.tar" in str(error)


# ---- folders ----


def test_a_pipe_a_loop_and_a_dead_link_are_rejects(tmp_path):
    (tmp_path / "good.jpg").write_bytes(JPEG)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "dead.jpg").symlink_to("nowhere")
    items = listed(tmp_path)
    assert [item.key for item in items if isinstance(item, ImageRef)] == ["good"]
    assert {item.key: item.reason for item in items if isinstance(item, Reject)} == dict.fromkeys(
        ["pipe", "loop", "dead"], "unreadable"
    )


def test_a_file_name_that_is_not_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.jpg")).write_bytes(JPEG)
    (item,) = listed(tmp_path)
    assert isinstance(item, Reject) and item.reason == "bad_key"


# ---- Parquet ----


def parquet_of(path, **columns):
    pq.write_table(pa.table({"image": [{"bytes": JPEG, "path": None}] * 2, **columns}), path)
    return path


def test_a_null_key_is_a_reject_and_a_label_beyond_int32_none(tmp_path):
    source = open_source(parquet_of(tmp_path / "a.parquet", key=["a", None], label=[2**40, 1]))
    first, second = source.list_images()
    assert isinstance(first, ImageRef) and (first.key, first.target) == ("a", None)
    assert isinstance(second, Reject) and second.reason == "bad_key"
    assert source.notes == ("1 image with labels that name no class, such as 1099511627776",)


def test_keys_that_are_not_utf8(tmp_path):
    offsets = pa.py_buffer(np.array([0, 1, 2], np.int32).tobytes())
    keys = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    with pytest.raises(SourceError, match="cannot be read to its end"):
        listed(parquet_of(tmp_path / "a.parquet", key=keys))


def test_damaged_pages(tmp_path):
    path = parquet_of(tmp_path / "a.parquet", key=["a", "b"])
    raw = bytearray(path.read_bytes())
    footer = struct.unpack_from("<I", raw, len(raw) - 8)[0] + 8
    raw[4 : len(raw) - footer] = b"\xff" * (len(raw) - footer - 4)
    path.write_bytes(raw)
    with pytest.raises(SourceError, match="cannot be read to its end"):
        listed(path)


def test_image_bytes_of_another_type(tmp_path):
    pq.write_table(pa.table({"image": [{"bytes": "text", "path": "a.jpg"}]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="binary field `bytes`"):
        open_source(tmp_path / "a.parquet")


def test_a_file_that_is_gone_when_it_is_read(tmp_path):
    path = parquet_of(tmp_path / "a.parquet")
    source = open_source(path)
    refs = list(source.list_images())
    path.unlink()
    with pytest.raises(SourceError, match=r"a\.parquet"):
        list(source.read(refs))
