"""Decoding: every encoding becomes the RGB of Pillow's convert("RGB")."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from ferkd_data.errors import ImageError
from ferkd_data.images import decode_rgb, image_extension, image_size
from ferkd_data.images.decode import _webp_size
from ferkd_data.images.refs import REJECT_REASONS

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


def reference(data):
    """Decode with Pillow; 16-bit grey to its high byte, since Pillow's own conversion clips it at 255."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode == "I;16":
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        return np.array(image.convert("RGB"))


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
    pillows = reference(data)
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
    """Damaged bytes give pixels of the size in the header, or an ImageError; nothing else, and no warning."""
    good = bytearray(encoded(*combination, 24, 16, 1))
    for _ in range(data.draw(st.integers(0, 6))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(good[: data.draw(st.integers(0, len(good)))])
    try:
        assert decode_rgb(damaged, max_pixels=10**6).ndim == 3
    except ImageError as error:
        assert error.reason in REJECT_REASONS


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


def raw_png(color_type, depth, samples, *chunks):
    """A PNG of any colour type and bit depth, whose samples (H, W, channels) are big-endian where they have 16 bits."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = samples.shape
    if depth < 8:
        bits = np.unpackbits(samples.reshape(height, -1, 1).astype(np.uint8), axis=2)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(height, -1), axis=1)
    else:
        rows = samples.reshape(height, -1).astype(f">u{depth // 8}").view(np.uint8)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">2I5B", width, height, depth, color_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(*each) for each in chunks), chunk(b"IDAT", zlib.compress(lines))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
PNG_CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
PNG_DEPTHS = [(GREY, depth) for depth in (1, 2, 4, 8, 16)] + [(PALETTE, depth) for depth in (1, 2, 4, 8)]
PNG_DEPTHS += [(kind, depth) for kind in (RGB, GREY_ALPHA, RGB_ALPHA) for depth in (8, 16)]


@pytest.mark.parametrize(("color_type", "depth"), PNG_DEPTHS)
@pytest.mark.parametrize("with_transparency", [False, True])
def test_every_colour_type_and_depth_of_png(color_type, depth, with_transparency):
    """Each sample as its share of the largest one, in 8 bits; alpha is left out."""
    top = 2**depth - 1
    samples = np.random.default_rng(depth).integers(0, top + 1, (9, 13, PNG_CHANNELS[color_type]))
    palette = np.random.default_rng(1).integers(0, 256, (top + 1 if depth <= 8 else 0, 3), dtype=np.uint8)
    chunks = [(b"PLTE", palette.tobytes())] if color_type == PALETTE else []
    if with_transparency and color_type not in (GREY_ALPHA, RGB_ALPHA):
        chunks.append((b"tRNS", bytes(3) if color_type == PALETTE else struct.pack(">H", 1) * len(samples[0, 0])))
    ours = decode_rgb(raw_png(color_type, depth, samples, *chunks))
    if color_type == PALETTE:
        expected = palette[samples[..., 0]]
    else:
        eight_bits = samples >> 8 if depth == 16 else samples * 255 // top
        colours = eight_bits[..., : 3 if color_type in (RGB, RGB_ALPHA) else 1]
        expected = np.broadcast_to(colours, (9, 13, 3))
    assert np.array_equal(ours, expected)


MORE_MODES = ("I;16B", "I;16L", "PA", "La", "RGBa", "RGBX", "HSV", "LAB", "CMYK")


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "WEBP", "BMP", "GIF", "JPEG", "PPM", "JPEG2000", "TGA", "ICO", "AVIF"])
def test_whatever_pillow_can_write_is_the_picture_or_a_reject(kind):
    """A smooth ramp from dark to light, in each mode of Pillow and each format: never a white or black square."""
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (48, 1))
    written = 0
    for mode in sorted({*Image.MODES, *MORE_MODES}):
        buffer = io.BytesIO()
        try:
            in_mode(ramp, mode).save(buffer, kind)
            with Image.open(io.BytesIO(buffer.getvalue())) as image:
                was_cut_off_by_the_writer = mode[0] in "IF" and image.mode[0] not in "IF"
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if was_cut_off_by_the_writer:
            continue
        written += 1
        try:
            ours = decode_rgb(buffer.getvalue())
        except ImageError as error:
            assert error.reason in ("unsupported_format", "not_an_image"), mode
            assert kind in ("TIFF", "PPM", "JPEG2000", "TGA", "ICO", "AVIF") or mode == "F", mode
            continue
        if mode not in ("1", "P", "PA"):  # these are dithered
            assert np.abs(ours.astype(int) - ramp[..., None]).max() <= 16, mode
        assert abs(ours.mean() - ramp.mean()) < 4, mode
    assert written >= 4


def in_mode(ramp, mode):
    picture = Image.fromarray(ramp)
    if mode.startswith("I;16"):
        return Image.fromarray(ramp.astype(np.uint16) * 257)
    if mode in ("I", "F"):
        return Image.fromarray(ramp.astype(np.int32 if mode == "I" else np.float32) * (257 if mode == "I" else 1))
    if mode in ("La", "PA", "RGBa"):
        return picture.convert({"La": "LA", "PA": "P", "RGBa": "RGBA"}[mode]).convert(mode)
    return picture.convert("RGB").convert(mode) if mode not in ("L", "LA", "1") else picture.convert(mode)


def test_nothing_that_is_set_elsewhere_changes_the_pixels():
    """Another module may set Pillow's switches: half a picture stays a reject, a whole one keeps its pixels."""
    script = """
import io, sys, warnings
import numpy as np
from PIL import GifImagePlugin, Image, ImageFile, PngImagePlugin
from ferkd_data.errors import ImageError
from ferkd_data.images import decode_rgb

files = [bytes.fromhex(line) for line in sys.stdin.read().split()]

def results():
    found = []
    for data in files:
        for part in (data, data[: len(data) // 2], data[:-20]):
            try:
                found.append(decode_rgb(part).tobytes())
            except ImageError as error:
                found.append(error.reason)
    return found

before = results()
ImageFile.LOAD_TRUNCATED_IMAGES = True
Image.MAX_IMAGE_PIXELS = 10
PngImagePlugin.MAX_TEXT_CHUNK = 1
GifImagePlugin.LOADING_STRATEGY = GifImagePlugin.LoadingStrategy.RGB_ALWAYS
Image.init()
for name in list(Image.OPEN):
    Image.register_open(name, lambda stream, name: Image.new("RGB", (1, 1)), None)
np.seterr(all="raise")
warnings.simplefilter("error")
assert results() == before, "the pixels changed"
assert ImageFile.LOAD_TRUNCATED_IMAGES is True and Image.MAX_IMAGE_PIXELS == 10, "the process lost its own"
"""
    files = [encoded(kind, modes[0], 40, 30, 3) for kind, modes in MODES.items()]
    files += [encoded("PNG", "I;16", 40, 30, 3), encoded("JPEG", "CMYK", 40, 30, 3)]
    lines = "\n".join(data.hex() for data in files)
    done = subprocess.run([sys.executable, "-c", script], input=lines, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_threads_that_decode_give_the_process_its_switches_back(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded("PNG", "RGB", 60, 50, 1)

    def decode_half(_):
        with pytest.raises(ImageError, match="truncated"):
            decode_rgb(data[: len(data) // 2])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(decode_half, range(200)))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


SHORT = "too little memory to decode "
REMEDY = "use fewer threads or workers, or raise the limit (ulimit -v)"
SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from ferkd_data.errors import OutOfMemoryError
from ferkd_data.images import decode_rgb

data = Path(sys.argv[1]).read_bytes()
decode_rgb(data)
limit = resource.getrlimit(resource.RLIMIT_AS)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
for megabytes in range(0, 64, 4):
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, limit[1]))
    try:
        assert decode_rgb(data).shape == (1250, 1500, 3)
    except OutOfMemoryError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_AS, limit)
assert decode_rgb(data).shape == (1250, 1500, 3)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory")
@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "WEBP", "lossless", "GIF", "BMP"])
def test_a_host_without_memory_is_no_fault_of_the_image(tmp_path, kind):
    """Whatever a decoder says then: a build would reject the image as corrupt, and a loader skip it."""
    options = {"progressive": {"progressive": True}, "lossless": {"lossless": True, "method": 0}}.get(kind, {})
    name = {"progressive": "JPEG", "lossless": "WEBP"}.get(kind, kind)
    mode = "P" if kind == "GIF" else "RGB"
    (tmp_path / "image").write_bytes(encoded(name, mode, 1500, 1250, 1, **options))
    command = [sys.executable, "-c", SHORT_OF_MEMORY, str(tmp_path / "image")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) <= {
        SHORT + "an image of 1500x1250 pixels; " + REMEDY,
        SHORT + "an image; " + REMEDY,
    }
    assert done.stdout or kind == "JPEG"


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@given(width=st.integers(1, 300), height=st.integers(1, 300))
@settings(max_examples=5)
def test_the_size_of_a_webp_file_is_read_without_its_pixels(mode, options, width, height):
    assert _webp_size(encoded("WEBP", mode, width, height, 1, **options)) == (height, width)


def test_an_image_that_asks_for_too_much_memory_is_the_fault(monkeypatch):
    def greedy(data, max_pixels):
        raise MemoryError

    monkeypatch.setattr("ferkd_data.images.decode._decode", greedy)
    with pytest.raises(ImageError, match="more memory than its pixels take") as caught:
        decode_rgb(encoded("PNG", "RGB", 20, 10, 1))
    assert caught.value.reason == "corrupt"
