"""Plain functions that tests import."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

import ferkd_data as fd
from ferkd_data.labels.rows import ShardLabels
from ferkd_data.storage import sha256_file

TEACHER_MODULES = Path(__file__).parent / "teacher_modules"
SMALL_TARS = {"crops": 10, "top_k": 4, "images_per_shard": 8, "device": "cpu"}
SMALL = {**SMALL_TARS, "crops_per_block": 4}


def same_labels(a: ShardLabels, b: ShardLabels) -> bool:
    """Return whether two shards hold the same rows, value by value; NaN equals NaN."""
    if list(a.keys) != list(b.keys):
        return False
    # Only target_prob has NaN, for "unknown".
    names = [f.name for f in fields(ShardLabels) if f.name != "keys"]
    return all(np.array_equal(getattr(a, name), getattr(b, name), equal_nan=name == "target_prob") for name in names)


def same_label_sets(a: Path, b: Path) -> bool:
    """Row by row and value by value."""
    first, second = list(fd.open_labels(a).shards()), list(fd.open_labels(b).shards())
    return len(first) == len(second) and all(map(same_labels, first, second))


def same_rows(a: Path, b: Path) -> bool:
    """Whatever shards they are in."""
    first, second = rows_by_key(a), rows_by_key(b)
    return first.keys() == second.keys() and all(same_labels(first[key], second[key]) for key in first)


def rows_by_key(folder: Path) -> dict[str, ShardLabels]:
    return {row.key: ShardLabels.from_rows([row]) for row in fd.open_labels(folder)}


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_files(a: Path, b: Path) -> bool:
    """The same names with the same bytes, the manifest included, and nothing besides."""
    first, second = files_below(a), files_below(b)
    return len(first) > 3 and first == second


def build_with_two(photos: Path, out: Path, teacher: str) -> None:
    """For a process of its own, which finds this module but no test's."""
    fd.build(photos, out, teachers=[teacher], workers=2, **SMALL)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def relist(folder: Path) -> None:
    """Make the manifest agree with the files as they are: their sizes and digests."""

    def change(content: dict[str, Any]) -> None:
        for entry in [*(file for shard in content["shards"] for file in shard["files"]), content["rejects"]]:
            path = folder / entry["path"]
            entry.update(bytes=path.stat().st_size, sha256=sha256_file(path))

    edit_manifest(folder, change)


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
