"""The end of an extension: new files beside the old ones, and a manifest that takes the old one's place at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from ferkd_data import statistics
from ferkd_data.builder.extension.base import open_base
from ferkd_data.builder.out.seal import write_manifest, write_rejects
from ferkd_data.builder.out.state import BuildFolder, Facts
from ferkd_data.builder.plan import Plan
from ferkd_data.builder.settings import BuildSettings
from ferkd_data.errors import BuildError
from ferkd_data.manifest import CreatedBy, Manifest, RejectsEntry, ShardEntry, identity_of
from ferkd_data.storage import write_atomically


def seal_extension(folder: BuildFolder, plan: Plan, settings: BuildSettings, facts: Facts, version: str) -> Manifest:
    """The manifest of the old and the new labels together; the old one where nothing came to it.

    Until the manifest is written, and whatever was killed before, OUT is the old label set. Can be run again.
    """
    old = open_base(folder.out).manifest
    shards = tuple(_shards(folder, plan, old))
    images = sum(shard.rows for shard in shards)
    rejects = _rejects(folder, plan, old)
    records = (folder.existing_record(shard) for shard in plan.shards)
    new_images = images > old.num_images
    changes = {
        "created_by": CreatedBy(name="ferkd-data", version=version),
        "num_images": images,
        "num_crops": settings.crops,
        "crops_per_block": settings.crops_per_block,
        "source": old.source.model_copy(
            update={
                "description": _description(old, plan, facts),
                "images_seen": images + rejects.rows,
                "plan_sha256": plan.summary.sha256 if new_images else old.source.plan_sha256,
                "place_sha256": facts.place_sha256 if plan.summary.all_listed else None,
                "left_out": facts.left_out,
            }
        ),
        "shards": shards,
        "rejects": rejects,
        "statistics": statistics.add([old.statistics, *(record.statistics for record in records)]),
    }
    manifest = old.model_copy(update=changes)
    if new_images:
        # Old images may be as large as the old limit, new ones as this build's.
        manifest = manifest.model_copy(update={"max_pixels": max(old.pixel_limit, settings.max_pixels)})
    if manifest.model_copy(update={"created_by": old.created_by, "source": old.source}) == old:
        return old  # nothing came to it
    with write_atomically(folder.path / "sealed") as aside:
        aside.write_text(identity_of(manifest.to_json().encode()))
    write_manifest(folder.out, manifest)
    if rejects.path != old.rejects.path:
        (folder.out / old.rejects.path).unlink(missing_ok=True)
    return manifest


def _shards(folder: BuildFolder, plan: Plan, old: Manifest) -> Iterator[ShardEntry]:
    """Those of the old label set, with their new blocks; then the new ones, but for empty ones at the end."""
    for entry in old.shards:
        if entry.index not in plan.shards:
            yield entry
            continue
        record = folder.existing_record(entry.index)
        if record.rows != entry.rows:
            raise BuildError(f"{folder.out}: shard {entry.index} has {entry.rows} rows, its new blocks {record.rows}")
        yield entry.model_copy(update={"files": (*entry.files, *record.files)})
    new = [folder.existing_record(shard) for shard in plan.shards if shard >= len(old.shards)]
    while new and not new[-1].rows:
        new.pop()
    for record in new:
        yield ShardEntry(index=record.index, rows=record.rows, files=record.files)


def _rejects(folder: BuildFolder, plan: Plan, old: Manifest) -> RejectsEntry:
    """A file of another name, since the old manifest is in force; the old one where it would be the same."""
    new = write_rejects(folder, plan, _next_name(old.rejects.path))
    if new.sha256 != old.rejects.sha256:
        return new
    (folder.out / new.path).unlink()
    return old.rejects


def _next_name(path: str) -> str:
    """rejects.parquet, rejects-2.parquet, rejects-3.parquet, ..."""
    found = re.fullmatch(r"rejects-(\d+)", PurePosixPath(path).stem)
    return f"rejects-{int(found[1]) + 1 if found else 2}.parquet"


def _description(old: Manifest, plan: Plan, facts: Facts) -> str:
    """Of the new source, or of both where the old images are not in it."""
    before = old.source.description
    return facts.source if plan.summary.all_listed or facts.source in before else f"{before}; {facts.source}"
