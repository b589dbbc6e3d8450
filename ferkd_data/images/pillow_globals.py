"""Pillow's switches, held at known values while an image is decoded.

Code that shares the process, such as a teacher's module, may set `ImageFile.LOAD_TRUNCATED_IMAGES` or
`Image.MAX_IMAGE_PIXELS`. Half a picture would then be labelled as a whole one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import GifImagePlugin, Image, ImageFile, PngImagePlugin

HELD: tuple[tuple[Any, str, Any], ...] = (
    (ImageFile, "LOAD_TRUNCATED_IMAGES", False),
    # `decode` has limits of its own, which come first.
    (Image, "MAX_IMAGE_PIXELS", None),
    (PngImagePlugin, "MAX_TEXT_CHUNK", 2**20),
    (PngImagePlugin, "MAX_TEXT_MEMORY", 2**26),
    (GifImagePlugin, "LOADING_STRATEGY", GifImagePlugin.LoadingStrategy.RGB_AFTER_FIRST),
)
"""(module, name, value)."""

# Guards _users and _saved. Threads that decode share the held values: the first one sets them, the last one restores
# what it found, so that the rest of the process keeps its own.
_lock = threading.Lock()
_users = 0
_saved: tuple[Any, ...] = ()


@contextmanager
def hold_pillow_globals() -> Iterator[None]:
    """Hold the values in HELD until the context ends; any number of threads may be inside."""
    global _users, _saved
    with _lock:
        if not _users:
            _saved = tuple(getattr(module, name) for module, name, _ in HELD)
        for module, name, value in HELD:
            setattr(module, name, value)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                for (module, name, _), value in zip(HELD, _saved, strict=True):
                    setattr(module, name, value)
