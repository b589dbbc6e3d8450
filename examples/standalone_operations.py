"""Replay recorded augmentations without ferkd-data: docs/format.md, "Recorded augmentations", in NumPy.

Written from that text alone, for those who read label sets in another language; a test holds it against ferkd-data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.int64]
"""(S, S, 3): levels 0..255."""
FILL = (124, 116, 104)


def blend(x: Image, other: Image | int, value: int) -> Image:
    return np.clip((value * x + (1000 - value) * other + 500) // 1000, 0, 255)


def luma(x: Image) -> Image:
    return (19595 * x[..., :1] + 38470 * x[..., 1:2] + 7471 * x[..., 2:] + 32768) >> 16


def sharpness(x: Image, value: int) -> Image:
    smooth, side = x.copy(), len(x)
    for row in range(1, side - 1):
        for column in range(1, side - 1):
            around = x[row - 1 : row + 2, column - 1 : column + 2].sum(axis=(0, 1))
            smooth[row, column] = (around + 4 * x[row, column] + 6) // 13
    return blend(x, smooth, value)


def hue(x: Image, value: int) -> Image:
    out = x.copy()
    for place in np.ndindex(x.shape[:2]):
        red, green, blue = x[place].tolist()
        high, low = max(red, green, blue), min(red, green, blue)
        spread = high - low
        if spread == 0:
            continue
        if high == red:
            angle = ((green - blue) << 16) // spread
        elif high == green:
            angle = ((blue - red) << 16) // spread + (2 << 16)
        else:
            angle = ((red - green) << 16) // spread + (4 << 16)
        angle = (angle + (value * (6 << 16) + 5000) // 10000) % (6 << 16)
        rise = (spread * (angle & 65535) + 32768) >> 16
        up, down = low + rise, high - rise
        out[place] = [
            (high, up, low), (down, high, low), (low, high, up), (low, down, high), (up, low, high), (high, low, down)
        ][angle >> 16]  # fmt: skip
    return out


def autocontrast(x: Image) -> Image:
    out = x.copy()
    for channel in range(3):
        low, high = int(x[..., channel].min()), int(x[..., channel].max())
        if high > low:
            out[..., channel] = ((x[..., channel] - low) * 255 + (high - low) // 2) // (high - low)
    return out


def equalize(x: Image) -> Image:
    out = x.copy()
    for channel in range(3):
        count = np.bincount(x[..., channel].ravel(), minlength=256)
        step = int(count.sum() - count[x[..., channel].max()]) // 255
        if step:
            below = np.concatenate([[0], np.cumsum(count)[:-1]])
            out[..., channel] = np.minimum(255, (below + step // 2) // step)[x[..., channel]]
    return out


def blur(x: Image, value: int) -> Image:
    side = len(x)
    sigma = value * side / 10000
    if value == 0:
        return x
    radius = math.ceil(3 * sigma)
    raw = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(radius + 1)]
    weights = [round(65536 * w / (raw[0] + 2 * sum(raw[1:]))) for w in raw]
    weights[0] = 65536 - 2 * sum(weights[1:])
    for axis in (1, 0):
        padded = np.pad(x, [(radius, radius) if a == axis else (0, 0) for a in range(3)], mode="reflect")
        places = range(-radius, radius + 1)
        parts = [weights[abs(i)] * np.take(padded, range(radius + i, radius + i + side), axis) for i in places]
        x = (np.sum(parts, axis=0) + 32768) >> 16
    return x


def moved(x: Image, rows: Image, columns: Image) -> Image:
    side = len(x)
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    taken = x[np.clip(rows, 0, side - 1), np.clip(columns, 0, side - 1)]
    return np.where(inside[..., None], taken, np.array(FILL))


def geometric(name: str, x: Image, value: int) -> Image:
    side = len(x)
    row, column = np.mgrid[:side, :side]
    if name == "translate_x":
        return moved(x, row, column - (value * side + 5000) // 10000)
    if name == "translate_y":
        return moved(x, row - (value * side + 5000) // 10000, column)
    if name == "shear_x":
        return moved(x, row, (10000 * (2 * column + 1) + value * (2 * row + 1)) // 20000)
    if name == "shear_y":
        return moved(x, (10000 * (2 * row + 1) + value * (2 * column + 1)) // 20000, column)
    cos, sin = (round(65536 * f(math.radians(value / 100))) for f in (math.cos, math.sin))
    across, down = 2 * column + 1 - side, 2 * row + 1 - side
    columns = (cos * across - sin * down + (side << 16)) >> 17
    rows = (sin * across + cos * down + (side << 16)) >> 17
    return moved(x, rows, columns)


NAMES = (
    "none", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "contrast", "saturation",
    "sharpness", "hue", "posterize", "solarize", "autocontrast", "equalize", "invert", "grayscale", "blur",
)  # fmt: skip
"""By code."""


def operation(code: int, value: int, x: Image) -> Image:
    name = NAMES[code]
    if code <= 5:
        return x if code == 0 else geometric(name, x, value)
    pixels = x.shape[0] * x.shape[1]
    simple = {
        "brightness": lambda: blend(x, 0, value),
        "contrast": lambda: blend(x, int(luma(x).sum() + pixels // 2) // pixels, value),
        "saturation": lambda: blend(x, luma(x), value),
        "sharpness": lambda: sharpness(x, value),
        "hue": lambda: hue(x, value),
        "posterize": lambda: x >> (8 - value) << (8 - value),
        "solarize": lambda: np.where(x >= value, 255 - x, x),
        "autocontrast": lambda: autocontrast(x),
        "equalize": lambda: equalize(x),
        "invert": lambda: 255 - x,
        "grayscale": lambda: np.repeat(luma(x), 3, axis=2),
        "blur": lambda: blur(x, value),
    }
    return simple[name]()


def apply(image: npt.NDArray[np.uint8], codes: Sequence[int], values: Sequence[int], erase: Sequence[int]) -> Image:
    """The pixels (S, S, 3) of a crop that was cut, resized and flipped, after its operations and its erased box."""
    x = image.astype(np.int64)
    for code, value in zip(codes, values, strict=True):
        x = operation(int(code), int(value), x)
    side = len(x)
    top, left, height, width = map(int, erase)
    if height:
        rows = slice((top * side + 32768) >> 16, ((top + height) * side + 32768) >> 16)
        columns = slice((left * side + 32768) >> 16, ((left + width) * side + 32768) >> 16)
        x = x.copy()
        x[rows, columns] = FILL
    return x
