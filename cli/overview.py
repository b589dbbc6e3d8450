"""The overview of a build, in about ten lines on stderr."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ferkd_data.words import count, percent

from .terminal import say

SHOWN = 6
"""Most reasons in one line."""


class ShowOverview:
    """A watcher of a build: prints the overview, and keeps it for `--json`."""

    def __init__(self) -> None:
        self.overview: Any = None

    def see(self, event: Any) -> None:
        from ferkd_data.builder import Overview

        if isinstance(event, Overview):
            self.overview = event
            for line in lines(event):
                say(line, err=True)


def lines(overview: Any) -> Iterator[str]:
    """Yield the overview as a table of two columns."""
    images, known = overview.images, overview.images_with_target
    if overview.extends and not images:
        yield _line("source", f"{overview.source}: no image to label")
    else:
        to_label = " to label" if overview.extends else ""
        shards = count(overview.shards, "shard")
        yield _line("source", f"{overview.source}: {count(images, 'image')}{to_label} in {shards}")
        yield _line("ground truth", f"known for {known:,}, unknown for {images - known:,}")
    yield _line("classes", _classes(overview))
    if overview.left_out:
        yield _line("left out", left_out(overview.left_out, overview.left_out_examples))
    if overview.rejects:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in overview.rejects.items())
        yield _line("rejected", f"{count(sum(overview.rejects.values()), 'image')} by name or label: {reasons}")
    for note in overview.notes:
        yield _line("note", note)
    for teacher in overview.teachers:
        yield _line("teacher", f"{teacher.teacher}: {teacher.input_size} px, {count(teacher.num_classes, 'output')}")
        yield _line("", _answers(teacher))
        for hint in teacher.hints:
            yield _line("hint", hint)
    for kind in overview.crop_kinds:
        yield _line("crop kind", kind)
    yield _line("to do", f"{count(overview.crops_per_image, 'crop')} per image")


def left_out(counts: Mapping[str, int], examples: Mapping[str, str] | None = None) -> str:
    """Return counts by reason: `3 system files (.DS_Store), 1 .txt file (notes.txt)`."""
    from ferkd_data.images import describe_left_out

    order = sorted(counts.items(), key=lambda item: (-item[1], item))
    # One by one: `describe_left_out` sorts by its own rule.
    words = [describe_left_out({reason: number})[0] for reason, number in order]
    shown = [
        f"{text} ({examples[reason]})" if examples and reason in examples else text
        for (reason, _), text in zip(order[:SHOWN], words, strict=False)
    ]
    rest = sum(number for _, number in order[SHOWN:])
    return ", ".join([*shown, f"{rest:,} more"] if rest else shown)


def _classes(overview: Any) -> str:
    last = overview.num_classes - 1
    if overview.first_class is None:
        return f"{overview.num_classes:,}, numbered 0 to {last}, without names"
    return f"{overview.num_classes:,}: 0 is {overview.first_class}, {last} is {overview.last_class}"


def _answers(teacher: Any) -> str:
    low, middle, high = teacher.p_max
    top1 = "" if teacher.top1 is None else f"{percent(teacher.top1, 0)} right, "
    equal = f", all classes equal on {percent(teacher.all_equal, 0)}" if teacher.all_equal else ""
    return f"on {count(teacher.images, 'image')}: {top1}p_max {low:.2f} to {high:.2f}, median {middle:.2f}{equal}"


def _line(name: str, text: str) -> str:
    return f"{name:<13} {text}"
