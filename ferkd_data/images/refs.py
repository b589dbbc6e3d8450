"""The vocabulary of sources: the images that a source lists, its rejects, the files that it leaves out.

`ImageSource` is the protocol that every source fulfils. A listing yields references and rejects, never pixels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

from ferkd_data.errors import ImageError
from ferkd_data.storage import is_utf8, shown

Item = TypeVar("Item")

MAX_TARGET = 2**31 - 1
"""Largest class number: label sets store targets as int32."""
MAX_EXTENSIONS = 16
"""Extensions counted separately; files with further extensions are counted together as `other`."""
MAX_SOURCES_NAMED = 16
"""Most sources that the description of a label set names."""
MORE_SOURCES = re.compile(r"(\d{1,3}(?:,\d{3}){0,4}) more sources?", re.ASCII)
"""End of a description of more sources than that, with the number of those that it does not name."""
LEFT_OUT_REASONS = {
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
"""Reasons for leaving out a file: singular and plural for messages. Any other reason is a file name extension."""

REJECT_REASONS: dict[str, str] = {
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


# Slots halve the memory of a listed shard.
@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    """Reference to an image of a source: its key, its ground truth and its location."""

    key: str
    target: int | None
    """Class number; None where it is unknown."""
    file: str
    """Path below the source's root, or a URL."""
    offset: int
    """First byte in a tar; row number in a Parquet file; 0 in a folder."""
    length: int
    """Size in bytes; -1 where the listing does not know it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """An image that cannot be used."""

    key: str
    reason: str
    """One of REJECT_REASONS."""
    detail: str
    """A sentence for a person: the file, and what is wrong with it."""


class ImageSource(Protocol):
    """Images with unique keys, listed in an order that depends on their names alone.

    A source can be pickled: each worker gets a copy of its own.
    """

    @property
    def description(self) -> str:
        """Words for a message, such as `folder photos`."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes by number; complete after listing, which may find them in the images' own labels."""

    @property
    def class_folder_names(self) -> tuple[str, ...] | None:
        """Class folders, or labels as texts, in the order of the class numbers."""

    @property
    def left_out(self) -> LeftOut:
        """Files that are no images of this source; complete after listing."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that tell a person how the source was read; complete after listing."""

    @property
    def containers(self) -> tuple[str, ...]:
        """Files on the disk that hold many images each, in which references are places; none in a folder of images."""

    def list_images(self) -> Iterator[ImageRef | Reject]:
        """Yield each image once, without holding the listing in memory. Raises SourceError."""

    def read(self, refs: Iterable[ImageRef]) -> Iterator[bytes | ImageError]:
        """Yield the encoded bytes of `refs` in order, with an ImageError in place of an image that cannot be read."""

    def read_one(self, ref: ImageRef) -> bytes:
        """Read the encoded bytes of one image. Raises ImageError. May be called by several threads at a time."""


class LeftOut:
    """Files that a source leaves out: how many for each reason, and the first of each as an example.

    No file disappears in silence: a build prints these counts.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count files under a reason: one of LEFT_OUT_REASONS, or an extension such as `.txt`."""
        # Plans and manifests hold the reason and the example, and are UTF-8.
        reason = reason if is_utf8(reason) else "other"
        # A folder may hold files with thousands of different extensions, such as numbered backups.
        if reason.startswith(".") and reason not in self.counts:
            if sum(known.startswith(".") for known in self.counts) >= MAX_EXTENSIONS:
                reason = "other"
        self.counts[reason] += count
        self.examples.setdefault(reason, shown(example))

    def start_from(self, other: LeftOut) -> None:
        """Replace the counts by a copy of `other`."""
        self.counts, self.examples = Counter(other.counts), dict(other.examples)


def describe_left_out(counts: Mapping[str, int]) -> list[str]:
    """List the counts in words, the most frequent first: `3 system files`, `1 .txt file`."""
    return [f"{count:,} {_words(reason, count)}" for reason, count in sorted(counts.items(), key=lambda c: (-c[1], c))]


def described_together(descriptions: Iterable[str]) -> str:
    """Join the descriptions of sources, each once: `folder a; folder b`. Of very many, the first ones are named.

    A description may be the result of a former call. The sources that it counts without a name are taken for others
    than those of a different description.
    """
    named: dict[str, None] = {}
    more = 0
    for text in dict.fromkeys(descriptions):
        *parts, last = text.split("; ")
        counted = MORE_SOURCES.fullmatch(last) if parts else None
        more += int(counted[1].replace(",", "")) if counted else 0
        named.update(dict.fromkeys(parts if counted else [*parts, last]))
    more += max(0, len(named) - MAX_SOURCES_NAMED)
    words = [f"{more:,} more source{'s' if more > 1 else ''}"] if more else []
    return "; ".join([*islice(named, MAX_SOURCES_NAMED), *words])


def added_left_out(counts: Iterable[Mapping[str, int] | None]) -> dict[str, int] | None:
    """Add up the numbers of files that several sources left out; None where none of them is known."""
    known = [count for count in counts if count is not None]
    total: Counter[str] = Counter()
    for count in known:
        total.update(count)
    return dict(total) if known else None


def _words(reason: str, count: int) -> str:
    if reason in LEFT_OUT_REASONS:
        return LEFT_OUT_REASONS[reason][count != 1]
    return f"{reason} file" if count == 1 else f"{reason} files"


def in_groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Cut a listing that may be long into lists of `size` items, in order; the last one may be shorter."""
    stream = iter(items)
    while group := list(islice(stream, size)):
        yield group
