"""Files that a listing meets and does not take: counted by reason, so that none disappears in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

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
