"""Blending uint8 images with PyTorch's resize kernel: the only loop over bytes at hand that is vectorised on a CPU.

Two images that lie one behind the other in memory are the two rows of one picture. The row between them, at a distance
f from the first, is 1 - f of the one and f of the other, rounded to the nearest level and a half up. The kernel's
weights have 14 bits or more, so for shares that are multiples of 1/128 it is exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHANNELS = 3
"""How many bytes the kernel takes for a pixel: 3 and 4 are vectorised."""
_resize_into: Any = torch._C._nn.upsample_bilinear2d


def can_blend(images: Tensor) -> bool:
    """Whether these images can be taken as runs of bytes, and the kernel is vectorised here."""
    one = images[:1]
    dense = one.is_contiguous() or one.is_contiguous(memory_format=torch.channels_last)
    whole = one.numel() % CHANNELS == 0
    fast = images.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return images.dtype == torch.uint8 and dense and whole and fast


def blend_cycles(images: Tensor, cycles: Iterable[list[int]], share: Sequence[float]) -> None:
    """In place: along each cycle b, c, d ..., image b becomes share[b] of itself and the rest of c, and so on to b.

    Two that blend with each other by the same share keep their sum: the second is what the first leaves of it, at half
    the cost. Elsewhere an image is copied aside once, so that the two to be blended lie one behind the other.
    """
    size_bytes = images[0].numel()
    width = size_bytes // CHANNELS
    # NumPy copies and adds bytes in less time than PyTorch needs to begin.
    pixels = images.as_strided((len(images), size_bytes), (images.stride(0), 1)).numpy()
    outputs = images.as_strided((len(images), 1, CHANNELS, 1, width), (images.stride(0), 0, 1, size_bytes, CHANNELS))
    output = outputs.unbind()
    aside = torch.empty((3, size_bytes), dtype=torch.uint8)
    copies = aside.numpy()
    pairs = [aside[k:].as_strided((1, CHANNELS, 2, width), (0, 1, size_bytes, CHANNELS)) for k in range(2)]

    def blend(row: int, place: int, other: int) -> None:
        if share[row] != 1:
            distance = 1 - share[row] if place < other else share[row]
            # The first row of the output lies at scale / 2 - 1 / 2 of the input; asked for is 1 / scale.
            scales = (1 / (1 + 2 * distance), None)
            _resize_into(pairs[min(place, other)], [1, width], False, *scales, out=output[row])

    for cycle in cycles:
        copies[0] = pixels[cycle[0]]
        place = 0
        if keeps_sum(cycle, share):
            first, second = pixels[cycle[0]], pixels[cycle[1]]
            copies[1] = second
            blend(cycle[0], 0, 1)
            # Beyond 255 both wrap around, which cancels.
            np.add(second, copies[0], out=second)
            np.subtract(second, first, out=second)
            continue
        for row, following in itertools.pairwise(cycle):
            beside = 2 if place == 1 else 1
            copies[beside] = pixels[following]
            blend(row, place, beside)
            place = beside
        if place == 2:
            copies[1] = copies[2]
        if place:
            blend(cycle[-1], 1, 0)


def keeps_sum(cycle: list[int], share: Sequence[float]) -> bool:
    return len(cycle) == 2 and share[cycle[0]] == share[cycle[1]]
