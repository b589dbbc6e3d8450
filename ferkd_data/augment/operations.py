"""Define the closed list of recorded operations, in integers on uint8 pixels. docs/format.md states them in words.

Integers make a replay identical on every platform, device and library version. All divisions round down, as Python's
`//` does; `>>` divides by a power of two.

Legend: N crops, A operations of a crop, n crops that share an operation, S side. Images are uint8 (n, 3, S, S).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ferkd_data.errors import UsageError
from ferkd_data.upload import upload

FILL = (124, 116, 104)
"""Colour of pixels that an operation uncovers or erases: ImageNet's mean."""
UNIT = 10_000
"""Fixed-point values of shear, translation, hue and blur are multiples of 1/10,000; angles, of 1/100 degree."""
FACTOR = 1_000
"""Fixed-point factors of brightness, contrast, saturation and sharpness are multiples of 1/1,000."""
BOX_WORDS = 4
BOX_UNIT_BITS = 16
"""Coordinates of an erased box are multiples of 2^-16 of the crop's side."""

Values: TypeAlias = npt.NDArray[np.int64]
"""(n,): one for each crop. On the host, so that nothing has to wait for a device to read them."""
Operation: TypeAlias = Callable[[Tensor, Values], Tensor]
"""Function of images (n, 3, S, S) uint8 and values to images of the same shape; the input is unchanged."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Operations:
    """Recorded operations of N crops: for each, up to A operations in order, then at most one erased box."""

    codes: npt.NDArray[np.uint8]
    """(N, A): codes from `OPERATIONS`; 0 for no operation."""
    values: npt.NDArray[np.int16]
    """(N, A): fixed-point values; 0 for operations without a value."""
    erase: npt.NDArray[np.uint16]
    """(N, 4): top, left, height, width in 1/65,536 of the crop's side; height 0 erases nothing."""

    def __len__(self) -> int:
        return len(self.codes)

    @classmethod
    def unpack(cls, words: npt.NDArray[np.uint16]) -> Operations:
        """Unpack the array (N, 2A + 4) that `pack` made."""
        slots = (words.shape[1] - BOX_WORDS) // 2
        return cls(
            codes=words[:, :slots].astype(np.uint8),
            # Negative values are in two's complement: `pack` viewed them as unsigned, this views them back.
            values=np.ascontiguousarray(words[:, slots : 2 * slots]).view(np.int16),
            erase=words[:, 2 * slots :],
        )

    def pack(self) -> npt.NDArray[np.uint16]:
        """Pack everything into one array of words (N, 2A + 4): A codes, A values, the erased box."""
        values = np.ascontiguousarray(self.values).view(np.uint16)
        return np.concatenate([self.codes.astype(np.uint16), values, self.erase], axis=1)

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> Operations:
        return Operations(codes=self.codes[rows], values=self.values[rows], erase=self.erase[rows])


def apply_operations(images: Tensor, operations: Operations) -> None:
    """Replay the operations of N crops in place, on `images` uint8 (N, 3, S, S) on any device.

    Each crop's result is the same to the bit, whichever crops are processed together. The host does not wait for the
    device. Raises UsageError for a code or value outside `OPERATIONS`, which a verified label set does not hold.
    """
    check_operations(operations)
    for codes, values in zip(operations.codes.T, operations.values.T, strict=True):
        # Slot by slot, since the order of a crop's operations counts. Within a slot each crop has one operation, so the
        # codes may be taken in any order, with all crops of a code in one call.
        for code in np.unique(codes[codes > 0]).tolist():
            rows = np.flatnonzero(codes == code)
            value = values[rows].astype(np.int64)
            if images.device.type == "cpu":
                # One by one, a crop's intermediate results stay in the cache, and nothing is gathered or scattered.
                for number, row in enumerate(rows.tolist()):
                    _apply(BY_CODE[code].apply, images, slice(row, row + 1), value[number : number + 1])
            else:
                _apply(BY_CODE[code].apply, images, upload(rows, images.device), value)
    _erase(images, operations.erase)


def _apply(operation: Operation, images: Tensor, group: slice | Tensor, values: Values) -> None:
    # Contiguous (planar): most operations take twice as long on channels-last memory.
    images[group] = operation(images[group].contiguous(), values)


def check_operations(operations: Operations) -> None:
    """Raise UsageError for a code, value or erased box outside its range."""
    unknown = set(np.unique(operations.codes).tolist()) - {0, *BY_CODE}
    if unknown:
        raise UsageError(f"operation {min(unknown)} is not in the list of recorded operations")
    for code, operation in BY_CODE.items():
        values = operations.values[operations.codes == code]
        low, high = operation.values
        if values.size and not (low <= values.min() and values.max() <= high):
            raise UsageError(
                f"operation {operation.name} takes values {low}..{high}, got {values.min()}..{values.max()}"
            )
    # In int64, since two uint16 would wrap at the very limit that is checked.
    end = operations.erase[:, :2].astype(np.int64) + operations.erase[:, 2:]
    if (end > 1 << BOX_UNIT_BITS).any():
        raise UsageError("an erased box does not lie inside the crop")


def _erase(images: Tensor, boxes: npt.NDArray[np.uint16]) -> None:
    if not boxes[:, 2].any():
        return
    side = images.shape[-1]
    fill = _fill(images)
    half = 1 << (BOX_UNIT_BITS - 1)
    for row in np.flatnonzero(boxes[:, 2]).tolist():
        top, left, height, width = boxes[row].tolist()
        rows = slice(*((edge * side + half) >> BOX_UNIT_BITS for edge in (top, top + height)))
        columns = slice(*((edge * side + half) >> BOX_UNIT_BITS for edge in (left, left + width)))
        images[row, :, rows, columns] = fill


def _fill(images: Tensor) -> Tensor:
    return upload(np.array(FILL, np.uint8), images.device)[:, None, None]


def _each(values: Values, images: Tensor) -> Tensor:
    """Copy the values to the images' device: int32 (n, 1, 1, 1)."""
    return upload(values.astype(np.int32), images.device)[:, None, None, None]


def _blend(images: Tensor, other: Tensor, factor: Values) -> Tensor:
    """Blend: factor / 1000 of the image plus the rest of `other`, rounded half up and clipped."""
    # Whole numbers in float32, which is exact below 2**24: a factor is at most 32,000, and 2 * 32,000 * 255 is less.
    share = _each(factor, images).to(torch.float32)
    mixed = images.to(torch.float32) * share + other.to(torch.float32) * (FACTOR - share)
    # Clipping first changes no result, and leaves numbers that `_divided` takes.
    return _divided(mixed.clamp_(0, 255 * FACTOR).add_(FACTOR // 2), FACTOR)


def _divided(numbers: Tensor, divisor: int) -> Tensor:
    """Divide whole numbers in 0 … 2**19 by a divisor of at most 1,000, rounding down; return uint8.

    Floats are several times faster than integer division, and exact here: (n + 1/2) / divisor is at least 1/2,000 away
    from every whole number, and float32 errs by less than 2**-14 below 512.
    """
    return (numbers.to(torch.float32) + 0.5).mul_(1 / divisor).to(torch.uint8)


def grey(images: Tensor) -> Tensor:
    """Compute luma (n, 1, S, S) int32 with Pillow's 16-bit weights (ITU-R BT.601)."""
    # 19595 + 38470 + 7471 = 65536, so that white stays 255.
    red, green, blue = images.to(torch.int32).unbind(dim=1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16)[:, None]


def _mapped(images: Tensor, table: Tensor) -> Tensor:
    """Replace each level by its entry in `table`, uint8 (n, 1 or 3, 256)."""
    flat = images.reshape(images.shape[0], 3, -1)
    return table.expand(-1, 3, -1).gather(2, flat.to(torch.int64)).view(images.shape)


def _levels(images: Tensor) -> Tensor:
    """Make an image of one row with all levels, uint8 (1, 1, 1, 256), to compute a table of an operation."""
    return torch.arange(256, device=images.device).to(torch.uint8)[None, None, None]


def brightness(images: Tensor, factor: Values) -> Tensor:
    """Blend with black."""
    black = torch.zeros((), dtype=torch.int32, device=images.device)
    return _mapped(images, _blend(_levels(images), black, factor)[:, :, 0])


def contrast(images: Tensor, factor: Values) -> Tensor:
    """Blend with the mean luma of the image, rounded."""
    pixels = images.shape[2] * images.shape[3]
    mean = (grey(images).sum(dim=(1, 2, 3), keepdim=True) + pixels // 2).div(pixels, rounding_mode="floor")
    return _mapped(images, _blend(_levels(images), mean, factor)[:, :, 0])


def saturation(images: Tensor, factor: Values) -> Tensor:
    """Blend with the luma of each pixel."""
    return _blend(images, grey(images), factor)


def sharpness(images: Tensor, factor: Values) -> Tensor:
    """Blend with Pillow's SMOOTH filter, (1 1 1, 1 5 1, 1 1 1) / 13; the outermost pixels are unchanged."""
    smooth = images.clone()
    if min(images.shape[2:]) > 2:
        # Sums are at most 13 * 255 + 6, within int16.
        whole = images.to(torch.int16)
        rows = whole[:, :, :-2] + whole[:, :, 1:-1] + whole[:, :, 2:]
        # The 3x3 sum has the centre once, and the filter five times.
        box = rows[:, :, :, :-2] + rows[:, :, :, 1:-1] + rows[:, :, :, 2:]
        smooth[:, :, 1:-1, 1:-1] = _divided(box + 4 * whole[:, :, 1:-1, 1:-1] + 6, 13)
    return _blend(images, smooth, factor)


def hue(images: Tensor, turn: Values) -> Tensor:
    """Rotate the hue by `turn` / 10,000 of a circle; the largest and smallest levels of a pixel stay.

    The hue h of HSV is a multiple of 2^-16 of a sixth of the circle: sector `h >> 16`, fraction in it `h & 65535`.
    """
    red, green, blue = images.to(torch.int32).unbind(dim=1)
    high, low = images.amax(dim=1), images.amin(dim=1)
    spread = high.to(torch.int32) - low
    # Masks of 0 and 1, of which one applies to a pixel: torch.where takes ten times as long on a CPU.
    is_red = (high == images[:, 0]).to(torch.int32)
    is_green = (high == images[:, 1]).to(torch.int32) * (1 - is_red)
    is_blue = 1 - is_red - is_green
    difference = is_red * (green - blue) + is_green * (blue - red) + is_blue * (red - green)
    first = 2 * is_green + 4 * is_blue
    # Floats are faster than integer division, and exact here: both numbers are below 2**24, and a quotient is at most
    # 2**16, where float32 errs by 2**-9 at most, and 1/255 or more below the next whole number unless it is one itself.
    fraction = ((difference << 16) / spread.clamp(min=1)).floor_().to(torch.int32)
    turned = _each((turn * (6 << 16) + UNIT // 2) // UNIT, images)[:, 0]
    angle = fraction + (first << 16) + turned
    # From -4 to 8 sectors: once around at most.
    angle += (angle < 0).to(torch.int32) * (6 << 16)
    angle -= (angle >= 6 << 16).to(torch.int32) * (6 << 16)
    # Within a sector one channel is the largest, one the smallest, and the third rises or falls between them.
    rising = ((spread * (angle & 65535) + 32768) >> 16).to(torch.uint8)
    up, down = low + rising, high - rising
    sector = (angle >> 16).to(torch.uint8)
    s0, s1, s2, s3, s4, s5 = ((sector == number).to(torch.uint8) for number in range(6))
    return torch.stack(
        [
            (s0 + s5) * high + s1 * down + (s2 + s3) * low + s4 * up,
            s0 * up + (s1 + s2) * high + s3 * down + (s4 + s5) * low,
            (s0 + s1) * low + s2 * up + (s3 + s4) * high + s5 * down,
        ],
        dim=1,
    )


def posterize(images: Tensor, bits: Values) -> Tensor:
    """Keep the highest `bits` bits of each level."""
    return images & _each(256 - (1 << (8 - bits)), images).to(torch.uint8)


def solarize(images: Tensor, threshold: Values) -> Tensor:
    """Invert levels of `threshold` and above."""
    levels = _levels(images)
    return _mapped(
        images, torch.where(levels.to(torch.int32) >= _each(threshold, images), 255 - levels, levels)[:, :, 0]
    )


def invert(images: Tensor, _: Values) -> Tensor:
    """Replace each level by 255 minus it."""
    return 255 - images


def grayscale(images: Tensor, _: Values) -> Tensor:
    """Replace each channel by the luma."""
    return grey(images).to(torch.uint8).expand_as(images)


def autocontrast(images: Tensor, _: Values) -> Tensor:
    """Stretch each channel to 0..255; a channel with a single level is unchanged."""
    low, high = (limit(dim=(2, 3), keepdim=True).to(torch.int32) for limit in (images.amin, images.amax))
    spread, levels = high - low, _levels(images).to(torch.int32)
    # The divisor is 1 where the channel has a single level; `where` takes the level itself there.
    divisor = spread.clamp(min=1)
    stretched = ((levels - low) * 255 + divisor // 2).div(divisor, rounding_mode="floor")
    # Entries of levels that the channel does not have are never looked up.
    return _mapped(images, torch.where(spread > 0, stretched, levels).to(torch.uint8)[:, :, 0])


def equalize(images: Tensor, _: Values) -> Tensor:
    """Equalise the histogram of each channel, as Pillow does."""
    channels = images.reshape(-1, images.shape[2] * images.shape[3])
    count = _histograms(channels).view(-1, 3, 256)
    last = channels.amax(dim=1).to(torch.int64).view(-1, 3, 1)
    # Pillow's step is the number of pixels below the largest level, divided by 255; 0 leaves the channel unchanged.
    step = (count.sum(dim=2, keepdim=True) - count.gather(2, last)).div(255, rounding_mode="floor")
    before = count.cumsum(dim=2) - count
    table = (before + step // 2).div(step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    unchanged = torch.arange(256, device=images.device)
    return _mapped(images, torch.where(step > 0, table, unchanged).to(torch.uint8))


def _histograms(channels: Tensor) -> Tensor:
    """Count the pixels of each level in each channel: (c, pixels) uint8 to (c, 256) int64."""
    if channels.device.type == "cpu":
        # Several times as fast there. On a GPU, the host would wait to learn the largest level.
        return torch.stack([torch.bincount(channel, minlength=256) for channel in channels])
    return _scattered_histograms(channels)


def _scattered_histograms(channels: Tensor) -> Tensor:
    level = channels.to(torch.int64)
    return level.new_zeros((len(channels), 256)).scatter_add_(1, level, level.new_ones(()).expand_as(level))


def blur(images: Tensor, sigma: Values) -> Tensor:
    """Blur with a Gaussian of `sigma` / 10,000 of the side: across, then down, 16-bit weights, reflected edges."""
    return torch.cat([_blurred(image[None], value) for image, value in zip(images, sigma.tolist(), strict=True)])


def gaussian_weights(sigma: float) -> list[int]:
    """Compute a Gaussian's weights at distances 0, 1, … ceil(3 sigma); those of both sides add up to 65,536."""
    radius = math.ceil(3 * sigma)
    raw = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(radius + 1)]
    total = raw[0] + 2 * sum(raw[1:])
    weights = [round(65536 * value / total) for value in raw]
    # The centre takes the error of rounding, so that an even area keeps its level.
    weights[0] = 65536 - 2 * sum(weights[1:])
    return weights


def _blurred(image: Tensor, sigma: int) -> Tensor:
    side = image.shape[-1]
    if sigma <= 0:
        return image
    weights = gaussian_weights(sigma * side / UNIT)
    radius = len(weights) - 1
    position = torch.arange(-radius, side + radius, device=image.device)
    # Reflection without repeating the edge pixel has the period 2 (side - 1): a filter may be wider than the image.
    period = max(1, 2 * (side - 1))
    reflected = (side - 1) - ((side - 1) - position.remainder(period)).abs()
    for axis in (3, 2):
        padded = image.index_select(axis, reflected).to(torch.int32)
        # The weights add up to 65,536, so the sum is at most 255 * 65,536, within int32.
        total = weights[0] * padded.narrow(axis, radius, side)
        for distance, weight in enumerate(weights[1:], 1):
            both = padded.narrow(axis, radius - distance, side) + padded.narrow(axis, radius + distance, side)
            total += weight * both
        image = ((total + 32768) >> 16).to(torch.uint8)
    return image


def _moved(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Gather the pixels at `rows` and `columns`, int64 that broadcast to (n, S, S); FILL where they lie outside."""
    count, side = len(images), images.shape[-1]
    inside = ((rows >= 0) & (rows < side)) & ((columns >= 0) & (columns < side))
    index = rows.clamp(0, side - 1) * side + columns.clamp(0, side - 1)
    index = index.expand(count, side, side).reshape(count, 1, -1)
    pixels = images.reshape(count, 3, -1).gather(2, index.expand(-1, 3, -1)).view(images.shape)
    fill = _fill(images)
    # As torch.where, which takes ten times as long on a CPU.
    shown = inside[:, None].to(torch.uint8)
    return pixels * shown + fill * (1 - shown)


def _grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """Number the rows and columns of the output: int64 (1, S, 1) and (1, 1, S)."""
    numbers = torch.arange(images.shape[-1], device=images.device)
    return numbers[None, :, None], numbers[None, None, :]


def rotate(images: Tensor, angle: Values) -> Tensor:
    """Rotate counterclockwise about the centre by `angle` / 100 degrees, to the nearest pixel.

    The source of (x, y), in half pixels from the centre, is (cos x - sin y, sin x + cos y), in 16-bit fixed point.
    """
    side = images.shape[-1]
    radians = [math.radians(value / 100) for value in angle.tolist()]
    # The largest sum is below 2**16 * 2.5 * side.
    whole = torch.int32 if side < 2**13 else torch.int64
    cos, sin = (
        _each(np.array([round(65536 * f(r)) for r in radians]), images)[:, 0].to(whole) for f in (math.cos, math.sin)
    )
    row, column = (numbers.to(whole) for numbers in _grid(images))
    y, x = 2 * row + 1 - side, 2 * column + 1 - side
    # Back from half pixels and 16-bit fractions: floor((v + side) / 2) is the pixel that holds the point.
    columns = (cos * x - sin * y + (side << 16)) >> 17
    rows = (sin * x + cos * y + (side << 16)) >> 17
    return _moved(images, rows.to(torch.int64), columns.to(torch.int64))


def _sheared(images: Tensor, shear: Values, horizontal: bool) -> Tensor:
    row, column = _grid(images)
    along, across = (column, row) if horizontal else (row, column)
    # The source is floor((along + 1/2) + shear * (across + 1/2)), here in units of 1 / (2 UNIT). `along` is a whole
    # number, so that each line is moved by a whole number of pixels.
    slope = _each(shear, images)[:, 0].to(torch.int64)
    moves = (UNIT + slope * (2 * across + 1)).div(2 * UNIT, rounding_mode="floor")
    return _moved(images, across, along + moves) if horizontal else _moved(images, along + moves, across)


def shear_x(images: Tensor, shear: Values) -> Tensor:
    """Take column x of row y from x + `shear` / 10,000 * y, measured from the upper left corner."""
    return _sheared(images, shear, horizontal=True)


def shear_y(images: Tensor, shear: Values) -> Tensor:
    """Take row y of column x from y + `shear` / 10,000 * x, measured from the upper left corner."""
    return _sheared(images, shear, horizontal=False)


def _translated(images: Tensor, share: Values, horizontal: bool) -> Tensor:
    side = images.shape[-1]
    shift = _each((share * side + UNIT // 2) // UNIT, images)[:, 0].to(torch.int64)
    row, column = _grid(images)
    return _moved(images, row, column - shift) if horizontal else _moved(images, row - shift, column)


def translate_x(images: Tensor, share: Values) -> Tensor:
    """Move to the right by `share` / 10,000 of the side, rounded to whole pixels."""
    return _translated(images, share, horizontal=True)


def translate_y(images: Tensor, share: Values) -> Tensor:
    """Move down by `share` / 10,000 of the side, rounded to whole pixels."""
    return _translated(images, share, horizontal=False)


class Listed(NamedTuple):
    """An operation of the closed list."""

    code: int
    name: str
    apply: Operation
    values: tuple[int, int]
    """Smallest and largest value."""
    unit: str
    """Meaning of a value of 1; empty for operations without a value."""


OPERATIONS: tuple[Listed, ...] = (
    Listed(1, "shear_x", shear_x, (-UNIT, UNIT), "1/10,000"),
    Listed(2, "shear_y", shear_y, (-UNIT, UNIT), "1/10,000"),
    Listed(3, "translate_x", translate_x, (-UNIT, UNIT), "1/10,000 of the side, to the right"),
    Listed(4, "translate_y", translate_y, (-UNIT, UNIT), "1/10,000 of the side, down"),
    Listed(5, "rotate", rotate, (-18_000, 18_000), "1/100 degree, counterclockwise"),
    Listed(6, "brightness", brightness, (0, 32_000), "factor of 1/1,000"),
    Listed(7, "contrast", contrast, (0, 32_000), "factor of 1/1,000"),
    Listed(8, "saturation", saturation, (0, 32_000), "factor of 1/1,000"),
    Listed(9, "sharpness", sharpness, (0, 32_000), "factor of 1/1,000"),
    Listed(10, "hue", hue, (-UNIT // 2, UNIT // 2), "1/10,000 of a turn"),
    Listed(11, "posterize", posterize, (1, 8), "bits kept"),
    Listed(12, "solarize", solarize, (0, 256), "first level that is inverted"),
    Listed(13, "autocontrast", autocontrast, (0, 0), ""),
    Listed(14, "equalize", equalize, (0, 0), ""),
    Listed(15, "invert", invert, (0, 0), ""),
    Listed(16, "grayscale", grayscale, (0, 0), ""),
    Listed(17, "blur", blur, (0, UNIT), "standard deviation, 1/10,000 of the side"),
)
BY_CODE: dict[int, Listed] = {operation.code: operation for operation in OPERATIONS}
CODES: dict[str, int] = {operation.name: operation.code for operation in OPERATIONS}
