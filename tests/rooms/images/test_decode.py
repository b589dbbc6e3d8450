"""Every encoding becomes RGB as Pillow's convert("RGB") makes it."""

from __future__ import annotations

import io
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ferkd_data.errors import ImageError
from ferkd_data.images import decode_rgb, image_extension, image_size
from ferkd_data.images.refs import REASONS

MODES = {
    "JPEG": ["RGB", "L", "CMYK"],
    "PNG": ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["P", "L"],
    "BMP": ["RGB", "L", "P"],
}
COMBINATIONS = [(kind, mode) for kind, modes in MODES.items() for mode in modes]


def encoded(kind, mode, width, height, seed, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode in ("LA", "CMYK"):
        image = image.convert("RGB" if mode == "CMYK" else "LA").convert(mode)
    else:
        image = image.convert("RGB").convert(mode) if mode != "RGBA" else image
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(COMBINATIONS),
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(0, 2**32 - 1),
)
def test_pixels_are_pillows(combination, width, height, seed):
    data = encoded(*combination, width, height, seed)
    ours = decode_rgb(data)
    with Image.open(io.BytesIO(data)) as image:
        pillows = np.array(image.convert("RGB"))
    assert ours.shape == (height, width, 3) and ours.dtype == np.uint8
    assert ours.flags.c_contiguous and ours.flags.writeable
    assert np.abs(ours.astype(int) - pillows.astype(int)).max() <= 2
    assert image_size(data) == (height, width)
    assert image_extension(data) == {"JPEG": "jpg"}.get(combination[0], combination[0].lower())


@pytest.mark.parametrize("options", [{"quality": 30}, {"quality": 95, "subsampling": 0}, {"progressive": True}])
def test_kinds_of_jpeg(options):
    data = encoded("JPEG", "RGB", 61, 43, 0, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert np.abs(decode_rgb(data).astype(int) - np.array(image).astype(int)).max() <= 2


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), "blue").save(buffer, "JPEG", exif=exif)
    assert decode_rgb(buffer.getvalue()).shape == (20, 40, 3)


def test_the_first_frame_of_an_animation():
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert decode_rgb(buffer.getvalue())[0, 0].tolist() == [255, 0, 0]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(COMBINATIONS), st.data())
def test_damaged_bytes_give_an_image_or_a_known_reason(combination, data):
    """Whatever happens to the bytes: pixels of the size in the header, or an ImageError. Nothing else, no warning."""
    good = bytearray(encoded(*combination, 24, 16, 1))
    for _ in range(data.draw(st.integers(0, 6))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(good[: data.draw(st.integers(0, len(good)))])
    try:
        assert decode_rgb(damaged, max_pixels=10**6).ndim == 3
    except ImageError as error:
        assert error.reason in REASONS


def test_our_limit_is_the_only_one(monkeypatch):
    """Pillow's own limit neither warns nor refuses before ours does."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    data = encoded("PNG", "L", 30, 30, 0)
    assert decode_rgb(data).shape == (30, 30, 3)
    with pytest.raises(ImageError, match="30x30 pixels is more than the limit of 899"):
        decode_rgb(data, max_pixels=899)


def pillows(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("number", range(0, 20, 4))
def test_real_photos(real_photos, number):
    data = real_photos[number].read_bytes()
    assert np.abs(decode_rgb(data).astype(int) - pillows(data).astype(int)).max() <= 2
    assert image_size(data) == decode_rgb(data).shape[:2]


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=256), st.integers(0, 99))
def test_a_palette_with_transparency_keeps_its_colours(transparency, seed):
    generator = np.random.default_rng(seed)
    image = Image.fromarray(generator.integers(0, 256, (9, 7), dtype=np.uint8))
    image.putpalette(generator.integers(0, 256, 768, dtype=np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=transparency)
    assert np.array_equal(decode_rgb(buffer.getvalue()), pillows(buffer.getvalue()))


def animation(kind, modes, **options):
    frames = [Image.new("RGB", (12, 10), color).convert(modes) for color in ("red", "blue", "green")]
    frames[0].putpixel((3, 4), 1 if modes in ("P", "L") else (1, 2, 3))
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        animation("PNG", "RGB"),
        animation("PNG", "RGB", default_image=True),
        animation("WEBP", "RGB", lossless=True),
        animation("MPO", "RGB"),
        *(animation("GIF", "P", disposal=disposal, transparency=0) for disposal in range(4)),
    ],
    ids=["APNG", "APNG with a picture of its own", "WebP", "MPO", "GIF 0", "GIF 1", "GIF 2", "GIF 3"],
)
def test_animations_give_pillows_first_picture(data):
    assert np.abs(decode_rgb(data).astype(int) - pillows(data).astype(int)).max() <= 2


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([0, 1, 2, 3]))
def test_a_gif_whose_frame_leaves_its_screen(width, height, disposal):
    data = encoded("GIF", "P", 20, 16, 3, disposal=disposal)
    data = data[:6] + struct.pack("<2H", width, height) + data[10:]
    assert np.array_equal(decode_rgb(data), pillows(data))


def test_decoding_in_threads_is_decoding():
    images = [encoded(*combination, 50, 40, seed) for seed in range(8) for combination in COMBINATIONS]
    expected = [decode_rgb(data) for data in images]
    with ThreadPoolExecutor(8) as threads:
        assert all(map(np.array_equal, threads.map(decode_rgb, images), expected))
