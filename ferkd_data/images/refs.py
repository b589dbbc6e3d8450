"""Files that a listing meets and does not take: counted by reason, so that none disappears in silence.

Entries of a source's listing: references to images, and rejects. Never pixels.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

from ferkd_data.errors import ImageError

MAX_EXTENSIONS = 16
"""A folder with more kinds of other files has the rest counted together."""
KINDS = {
    "system": ("system file", "system files"),
    "hidden": ("hidden file", "hidden files"),
    "empty_folder": ("folder without images", "folders without images"),
    "loop": ("link to a folder above it", "links to folders above them"),
    "unreadable": ("file that cannot be read", "files that cannot be read"),
    "special": ("broken link or device", "broken links or devices"),
    "no_image": ("file without an extension that is no image", "files without an extension that are no images"),
    "other": ("file of another kind", "files of other kinds"),
    "beside_tars": ("Parquet table beside the tars", "Parquet tables beside the tars"),
}
"""Reason -> its words, for one and for many. A reason that begins with a dot is a file name extension."""


class LeftOut:
    """The accumulator of one source: `counts` by reason, and the first file of each in `examples`."""

    def __init__(self, counts: Mapping[str, int] | None = None, examples: Mapping[str, str] | None = None) -> None:
        self.counts: Counter[str] = Counter(counts or {})
        self.examples: dict[str, str] = dict(examples or {})

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count `count` files under one of KINDS, or under an extension such as `.txt`."""
        if reason.startswith(".") and reason not in self.counts:
            if sum(known.startswith(".") for known in self.counts) >= MAX_EXTENSIONS:
                reason = "other"
        self.counts[reason] += count
        self.examples.setdefault(reason, example)

    def start_from(self, other: LeftOut) -> None:
        """Forget what was counted, and begin with a copy of `other`."""
        self.counts, self.examples = Counter(other.counts), dict(other.examples)


def describe_left_out(counts: Mapping[str, int]) -> list[str]:
    """`3 system files`, `1 txt file`, ..., the most frequent first."""
    return [f"{count:,} {_words(reason, count)}" for reason, count in sorted(counts.items(), key=lambda c: (-c[1], c))]


def _words(reason: str, count: int) -> str:
    if reason in KINDS:
        return KINDS[reason][count != 1]
    return f"{reason} file" if count == 1 else f"{reason} files"


Item = TypeVar("Item")

# A class with slots and a frozen dataclass cost the same here; slots halve the memory of a listed shard.
MAX_KEY_BYTES = 1024
MAX_TARGET = 2**31 - 1
"""Label sets hold targets as int32."""

REASONS: dict[str, str] = {
    "bad_key": "the key cannot be a member name in a tar: a dot in the file name, a climbing or absolute path, "
    "control characters, not UTF-8, or too long",
    "duplicate_key": "an earlier image has the same key",
    "empty": "the file has no bytes",
    "not_an_image": "the bytes are of no image format",
    "unsupported_format": "an image, but not JPEG, PNG, WebP, GIF or BMP, or with pixels of an unknown kind",
    "truncated": "the image ends too early",
    "corrupt": "the image cannot be decoded",
    "zero_sized": "the image has no pixels",
    "too_large": "a side is longer than 65,535 pixels",
    "pixel_bomb": "more pixels than --max-pixels allows",
    "missing_image": "the sample holds labels but no image",
    "other_image": "the loader found another image than the one that was labelled",
    "unreadable_labels": "the labels to import for this image are missing or cannot be read",
    "unreadable": "the file could not be read",
}
"""Every reason in rejects.parquet, with its meaning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    key: str
    target: int | None
    file: str
    """Path below the source's root, or a URL."""
    offset: int
    """First byte in a tar, row number in a Parquet file, 0 for a file of its own."""
    length: int
    """Bytes, or -1 where the listing does not know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    key: str
    reason: str
    detail: str


class ImageSource(Protocol):
    """Images with keys, in an order that depends on their names alone. Instances can be pickled."""

    @property
    def description(self) -> str: ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the numbered classes. After listing where they are found in the images' own labels."""

    @property
    def class_folder_names(self) -> tuple[str, ...] | None:
        """Class folders, or the texts of labels, by which classes are numbered, in the order of the numbers."""

    @property
    def left_out(self) -> LeftOut:
        """After listing: the files that are no images of this source."""

    @property
    def notes(self) -> tuple[str, ...]:
        """After listing: what a person should know of how the source was read, a sentence each."""

    def list_images(self) -> Iterator[ImageRef | Reject]:
        """Every image once, streaming. Raises SourceError."""

    def read(self, refs: Iterable[ImageRef]) -> Iterator[bytes | ImageError]:
        """The encoded bytes of `refs`, in their order; an ImageError stands for an image that cannot be read."""

    def read_one(self, ref: ImageRef) -> bytes:
        """The encoded bytes of one image; may be called from several threads. Raises ImageError."""


def in_groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Cut a listing that may be long into lists of `size` items, in order; the last one may be shorter."""
    stream = iter(items)
    while group := list(islice(stream, size)):
        yield group


def check_key(key: str) -> None:
    """Raise ImageError("bad_key") for a key that would not survive in both layouts."""
    problem = _key_problem(key)
    if problem:
        raise ImageError("bad_key", f"{key!r} {problem}")


def _key_problem(key: str) -> str | None:
    components = key.split("/")
    base = components[-1]
    if not all(components):
        return "is empty, absolute, or has an empty component"
    if "." in base:
        return "has a dot in its last component, where WebDataset would cut it; rename the file"
    if any(component in (".", "..") for component in components):
        return "climbs out of its folder"
    if base.startswith("__") and base.endswith("__"):
        return "is a name that WebDataset keeps for itself"
    # Printable text has no control character, and that is asked faster.
    if "\\" in key or (not key.isprintable() and any(unicodedata.category(character) == "Cc" for character in key)):
        return "has a backslash or a control character"
    try:
        size = len(key.encode("utf-8"))
    except UnicodeEncodeError:
        return "is not UTF-8"
    return f"has {size} bytes; at most {MAX_KEY_BYTES}" if size > MAX_KEY_BYTES else None
