"""Every encoding becomes RGB as Pillow's convert("RGB") makes it."""

from __future__ import annotations

import io

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
