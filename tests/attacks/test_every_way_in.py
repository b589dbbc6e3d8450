"""Every lie of ways_in.py, given to everything that takes a label set: one error of ours, and nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "ways_in.py"
READS_NO_LABELS = {"info"}
"""It shows the manifest, and cannot know what the rows say."""
READS_NO_REJECTS = {"stats", "show", "report", "export", "iterate", "ensemble", "load", "load in shards"}
ABOUT_REJECTS = {"parquet: a shard in a rejects file's place", "parquet: more rejects than there are"}
NO_LIE = {"parquet: no lie", "tars: no lie"}
MOST_MORE_MB, MOST_WRITTEN_BYTES = 150, 10**7
"""Beyond what a label set of the same size takes that tells no lie."""


@pytest.fixture(scope="module")
def met(label_set, tar_label_set, photos, tiny_teachers, tmp_path_factory):
    """By set: the uses, each with what came of it, the peak of memory in MB, and the bytes written."""
    work = tmp_path_factory.mktemp("ways")
    sets = work / "sets"
    subprocess.run([sys.executable, SCRIPT, "make", label_set, tar_label_set, sets], check=True)
    command = [sys.executable, "-W", "ignore", SCRIPT, "meet", sets, photos, tiny_teachers]
    environment = {**os.environ, "FERKD_DATA_CACHE": str(work / "cache")}
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found, name = defaultdict(list), ""
    for line in said.splitlines():
        first, *rest = line.split("\t")
        if first == "set":
            name = rest[0]
        else:
            use, (what, _, peak, written) = first, rest
            found[name].append((use, what, int(peak), int(written)))
    return found


def test_what_tells_no_lie_is_taken_by_everything(met):
    for name in NO_LIE:
        uses = [(use, what) for use, what, _, _ in met[name] if use != "written"]
        assert len(uses) == 17
        assert all(what == "passed" for _, what in uses), (name, uses)


def test_every_lie_is_refused_by_everything_that_reads_it(met):
    assert len(met) > 85
    wrong = []
    for name, uses in met.items():
        if name in NO_LIE:
            continue
        blind = READS_NO_LABELS | (READS_NO_REJECTS if name in ABOUT_REJECTS else set())
        for use, what, _, _ in uses:
            if not what.startswith("refused:") and not (what == "passed" and use in blind):
                wrong.append((name, use, what))
    assert not wrong


def test_lies_take_no_more_memory_and_disk_than_the_truth(met):
    most = max(peak for name in NO_LIE for _, _, peak, _ in met[name])
    for name, uses in met.items():
        for use, _, peak, written in uses:
            assert peak < most + MOST_MORE_MB, (name, use, peak)
            assert written < MOST_WRITTEN_BYTES, (name, use, written)
