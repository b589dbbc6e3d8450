"""The description of a label set that is made of several sources."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferkd_data.images.refs import MAX_SOURCES_NAMED, described_together


def folders(start: int, stop: int) -> list[str]:
    return [f"folder {number}" for number in range(start, stop)]


def test_each_source_is_named_once():
    assert described_together(["folder a; folder b", "folder b", "folder c"]) == "folder a; folder b; folder c"


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_sources_are_counted_over_several_merges(sizes):
    joined, start = "", 0
    for size in sizes:
        texts = [joined] if joined else []
        joined = described_together([*texts, *folders(start, start + size)])
        start += size
    *named, last = joined.split("; ")
    if start <= MAX_SOURCES_NAMED:
        assert [*named, last] == folders(0, start)
    else:
        more = start - MAX_SOURCES_NAMED
        assert named == folders(0, MAX_SOURCES_NAMED)
        assert last == ("1 more source" if more == 1 else f"{more:,} more sources")


@pytest.mark.parametrize(
    ("texts", "more"),
    [
        (["a; 4 more sources", "b; 1 more source"], "5 more sources"),
        (["a; 1,004 more sources", "b"], "1,004 more sources"),
        # Label sets of one build say the same; they have the same sources.
        (["a; 4 more sources", "a; 4 more sources"], "4 more sources"),
        # Earlier versions wrote the plural for one source too.
        (["a; 1 more sources", "b"], "1 more source"),
    ],
)
def test_the_number_in_a_description_is_carried_over(texts, more):
    assert described_together(texts).endswith(f"; {more}")


def test_a_folder_with_such_a_name_is_no_number():
    texts = ["folder 4 more sources", "folder b"]
    assert described_together(texts) == "folder 4 more sources; folder b"
