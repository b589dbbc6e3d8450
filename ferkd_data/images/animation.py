"""Animations cut down to their first picture, before Pillow sees them.

Pillow checks the frames of a GIF against a pixel limit of its own, and warns where the frame list of an animated PNG
is broken. Neither says anything about the one picture we take, so both are kept from it.
"""

from __future__ import annotations

import struct

from ferkd_data.crops import check_size

GIF_HEADER_BYTES = 13
PNG_SIGNATURE_BYTES = 8
ANIMATION_CHUNKS = (b"acTL", b"fcTL", b"fdAT")


def first_gif_frame(data: bytes) -> bytes:
    """The same GIF with a screen that holds its first frame, and with no rule for what follows that frame.

    Bytes that make no sense are left for the decoder to refuse. Raises ImageError for a size of 0 or beyond 65,535.
    """
    if len(data) < GIF_HEADER_BYTES:
        return data
    patched = bytearray(data)
    flags = data[10]
    at = GIF_HEADER_BYTES + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while at < len(data):
        if data[at] == ord("!"):
            if data[at + 1 : at + 2] == b"\xf9" and len(data) > at + 3:
                patched[at + 3] &= ~0x1C & 0xFF  # the disposal method
            at = _after_blocks(data, at + 2)
        elif data[at] == ord(",") and len(data) >= at + 9:
            left, top, width, height = struct.unpack_from("<4H", data, at + 1)
            screen_width, screen_height = struct.unpack_from("<2H", data, 6)
            width, height = max(screen_width, left + width), max(screen_height, top + height)
            check_size(height, width)
            struct.pack_into("<2H", patched, 6, width, height)
            break
        elif data[at] == ord(";"):
            break
        else:
            at += 1
    return bytes(patched)


def _after_blocks(data: bytes, at: int) -> int:
    """The offset behind a chain of sub-blocks: each its length in one byte and its bytes, the last one empty."""
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return at + 1


def still_png(data: bytes) -> bytes:
    """The same PNG without its animation chunks; the picture that is left is the first frame or the one for all."""
    if b"acTL" not in data:
        return data
    kept, at = [data[:PNG_SIGNATURE_BYTES]], PNG_SIGNATURE_BYTES
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in ANIMATION_CHUNKS:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)
