"""Extend a finished label set: more crops for its images, new images, or both.

- `load_or_make_extension`: the plan. Images that get more crops keep their shards and rows; new images follow.
- `seal_extension`: the end. New files lie beside the old ones, and a new manifest replaces the old one at once.

The digest of the plan is that of the label set's plan where no image is new, else that of this digest followed by the
new keys and targets. `base.py` says what can be extended.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice, repeat, takewhile
from operator import attrgetter
from pathlib import Path, PurePosixPath

from ferkd_data.builder.base import Base, open_base
from ferkd_data.builder.known_images import KnownImages
from ferkd_data.builder.plan import Plan, PlanWriter, list_images, resume_plan, save_plan
from ferkd_data.builder.seal import write_rejects
from ferkd_data.builder.settings import BuildSettings
from ferkd_data.builder.state import BuildFolder, Facts
from ferkd_data.errors import BuildError, SettingsMismatchError, SourceError
from ferkd_data.format.manifest import CreatedBy, CropKindEntry, Manifest, RejectsEntry, ShardEntry
from ferkd_data.format.manifest_file import identity_of, write_manifest
from ferkd_data.format.rejects import check_rejects, read_rejects, readable
from ferkd_data.images import ImageRef, ImageSource, Reject, in_groups
from ferkd_data.images.refs import added_left_out, described_together
from ferkd_data.label_set import LabelSet, open_labels
from ferkd_data.labels import statistics
from ferkd_data.labels.rows import UNKNOWN_TARGET
from ferkd_data.storage import image_digest, write_atomically

CHUNK = 4096
"""Images that are looked up together."""
OTHERS_ALLOWED = 1 / 4
"""Largest share of images with other bytes than before, of those compared. A source where more differ has other images
under the same keys; below it, single files were replaced."""


def load_or_make_extension(
    source: ImageSource,
    folder: Path,
    base: Base,
    settings: BuildSettings,
    *,
    place_sha256: str,
    fail_on_reject: bool = False,
) -> Plan:
    """Return the plan that an earlier run of this extension made, or make one. `place_sha256` says where the source is.

    Raises SourceError for a labelled image that is to get more crops and is not in the source any more, and for a
    source that has other images under the keys of labelled ones; SettingsMismatchError for an image that has another
    target there; BuildError as `list_images` does.
    """
    if (folder / "plan.json").exists():
        return resume_plan(source, folder)
    old = base.manifest.source
    # A label set of several sources has no place; then their names decide whether there is anything to say.
    named = old.place_sha256 is None and source.description in old.description.split("; ")
    extension = _Extension(
        source,
        folder,
        base,
        settings,
        is_same_place=named or place_sha256 == old.place_sha256,
        fail_on_reject=fail_on_reject,
    )
    return extension.plan()


class _Extension:
    """Makes the plan of an extension."""

    def __init__(
        self,
        source: ImageSource,
        folder: Path,
        base: Base,
        settings: BuildSettings,
        *,
        is_same_place: bool,
        fail_on_reject: bool,
    ) -> None:
        self.source = source
        self.is_same_place = is_same_place
        """True where the source is the one that the label set was built from."""
        self.folder = folder
        self.base = base
        self.fail_on_reject = fail_on_reject
        self.labels: LabelSet = open_labels(base.out)
        self.images_per_shard = settings.shard_images
        self.more_crops = settings.crops > base.manifest.num_crops
        self.rejects_path = base.out / base.manifest.rejects.path

    def plan(self) -> Plan:
        manifest = self.base.manifest
        plan_sha256 = manifest.source.plan_sha256
        with self.labels.open(manifest.rejects) as rejects:
            check_rejects(rejects.path, manifest.rejects.rows)
        num_known, num_rejected = manifest.num_images, manifest.rejects.rows
        # In this order: what the label set has, what the source has, the checks, and only then the plan's rows, for
        # which all positions have to be known.
        with KnownImages(num_known, num_rejected) as known, PlanWriter(self.folder, digest_of=plan_sha256) as writer:
            self._learn(known)
            self._list(known, writer)
            # The images first: where others have the same keys, their classes differ too, and --classes is no cure.
            notes = self._compare_images(known)
            self._check(known)
            notes += self._notes(known)
            for reject, is_gone in zip(read_rejects(self.rejects_path), known.is_gone, strict=True):
                # An old reject that the source no longer lists stays a reject, so that the counts go on adding up. The
                # others are tried again: they are new images of the plan.
                if is_gone:
                    writer.add_reject(reject)
            # Old shards are planned again only to get more crops, with the same rows: new blocks lie beside the old
            # ones.
            known_sizes = [entry.rows for entry in manifest.shards] if self.more_crops else []
            sizes = chain(known_sizes, repeat(self.images_per_shard))
            shards = known.placed(sizes, place_known=self.more_crops)
            for rows in islice(shards, len(known_sizes)):
                writer.add_shard(rows, are_known=True)
            # `placed` yields empty tables without end when there are no more images.
            for rows in takewhile(len, shards):
                writer.add_shard(rows)
        num_shards = len(manifest.shards)
        summary = writer.summary(self.source)
        changes = {
            "max_target": known.max_target,
            # Every listed image is known: nothing is new.
            "sha256": plan_sha256 if known.num_found == known.num_listed else summary.sha256,
            "first_shard": 0 if self.more_crops else num_shards,
            "known_shards": num_shards if self.more_crops else 0,
            "known_images": num_known if self.more_crops else 0,
            "known_crops": manifest.num_crops,
            "all_listed": known.num_found == num_known,
            "notes": (*summary.notes, *notes),
        }
        return save_plan(self.folder, summary.model_copy(update=changes))

    def _learn(self, known: KnownImages) -> None:
        row = 0
        for keys, targets, digests in self._identities():
            known.add_labelled(row, keys, targets, digests)
            row += len(keys)
        for rejects in in_groups(enumerate(read_rejects(self.rejects_path)), CHUNK):
            known.add_rejected(rejects[0][0], [reject.key for _, reject in rejects])

    def _list(self, known: KnownImages, writer: PlanWriter) -> None:
        for items in in_groups(list_images(self.source, fail_on_reject=self.fail_on_reject), CHUNK):
            known.add_listed([item for item in items if isinstance(item, ImageRef)])
            rejects = [item for item in items if isinstance(item, Reject)]
            known.add_named([readable(reject.key) for reject in rejects])
            for reject in rejects:
                writer.add_reject(reject)

    def _check(self, known: KnownImages) -> None:
        if known.mismatch is not None:
            key, saved, now = known.mismatch
            raise SettingsMismatchError(
                f"{self.base.out}: image {key!r} has another target in {self.source.description}: saved "
                f"{saved}, now {now}; give the --classes that the label set was built with"
            )
        if self.more_crops and (missing := known.missing()) is not None:
            raise SourceError(
                f"image {missing!r} has labels in {self.base.out}, and is not in {self.source.description}: "
                "it cannot get more crops. Put it back, or leave out --crops to add new images alone"
            )

    def _compare_images(self, known: KnownImages) -> list[str]:
        """Read some of the labelled images that the source has, and return notes on what they are.

        Raises SourceError where they are other images: numbered files and samples get the same keys in every batch.
        """
        refs = [ref for ref, _ in known.samples]
        contents = zip(known.samples, self.source.read(refs), strict=True)
        # One that cannot be read now says nothing of the others; it is not labelled again.
        read = [(ref, image_digest(data) == then) for (ref, then), data in contents if isinstance(data, bytes)]
        others = [ref.key for ref, is_same in read if not is_same]
        where = self.source.description
        if len(others) > OTHERS_ALLOWED * len(read):
            raise SourceError(
                f"image {others[0]!r} of {where} is another image than the one labelled under this key in "
                f"{self.base.out}, and so are {len(others)} of the {len(read)} compared; give the new images keys of "
                "their own (rename the files or their folders), or build into another folder"
            )
        notes = []
        # With more crops, labelling compares every image, and stops at the first that differs.
        if others and not self.more_crops:
            notes.append(
                f"labelled images that have other bytes in {where} now (such as {others[0]!r}): {len(others)} of the "
                f"{len(read)} compared; their labels stay those of the images as they were, and `ferkd-data verify "
                "--images` finds all of them"
            )
        if known.num_found and not self.is_same_place and not self.more_crops:
            notes.append(
                f"images of {where} with keys that labelled images have: {known.num_found:,}; taken to be the same "
                f"images ({len(read)} compared), and not labelled again"
            )
        return notes

    def _notes(self, known: KnownImages) -> Iterator[str]:
        """Yield what should be said of labelled images that the source does not have: they may be there under new keys.

        A file that was moved or renamed is a new image, and then has two rows, of two classes where its folder changed.
        """
        count = known.num_known - known.num_found
        if count:
            images, keep = ("image is", "keeps its") if count == 1 else ("images are", "keep their")
            yield (
                f"{count:,} labelled {images} not in {self.source.description} (such as {known.missing()!r}), and "
                f"{keep} labels; a file that was moved or renamed is labelled once more, as a new image"
            )

    def _identities(self) -> Iterator[tuple[Sequence[str], list[int | None], list[bytes]]]:
        """Yield (keys, targets, digests) of each shard of the label set.

        Reads and checks every file of the label set, since the extended set vouches for the old files too. Raises
        ShardError for a file that is damaged or breaks the format.
        """
        for entry in filter(attrgetter("rows"), self.base.manifest.shards):
            first = self.labels.block(entry.index, 0)
            for block in range(1, self.labels.num_blocks):
                # For the checks of a reader alone; keys, targets and digests are the same in every block.
                self.labels.block(entry.index, block)
            targets = [None if target == UNKNOWN_TARGET else target for target in first.target.tolist()]
            yield first.keys, targets, list(map(bytes, first.image_digest))


def seal_extension(folder: BuildFolder, plan: Plan, settings: BuildSettings, facts: Facts, version: str) -> Manifest:
    """Write the manifest of the old and the new labels together; return the old one where nothing was added.

    Until the manifest is written OUT is the old label set, whatever is killed before. Can be run again.
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
        "crop_kinds": tuple(map(CropKindEntry.of, settings.kinds)) or None,
        "crops_per_block": settings.crops_per_block,
        "source": old.source.model_copy(
            update={
                "description": _description(old, plan, facts),
                "images_seen": images + rejects.rows,
                "plan_sha256": plan.summary.sha256 if new_images else old.source.plan_sha256,
                "place_sha256": facts.place_sha256 if plan.summary.all_listed else None,
                "left_out": _left_out(old, plan, facts),
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
        return old  # nothing was added
    # Before the manifest: a run after a kill finds one whose digest stands here, and knows that the extension has
    # ended.
    with write_atomically(folder.path / "sealed") as aside:
        aside.write_text(identity_of(manifest.to_json().encode()))
    write_manifest(folder.out, manifest)
    # The old manifest named it until a moment ago. Where a kill comes first, `drop_what_has_ended` removes it.
    if rejects.path != old.rejects.path:
        (folder.out / old.rejects.path).unlink(missing_ok=True)
    return manifest


def _shards(folder: BuildFolder, plan: Plan, old: Manifest) -> Iterator[ShardEntry]:
    """Yield the old shards with their new blocks, then the new shards without empty ones at the end."""
    for entry in old.shards:
        if entry.index not in plan.shards:
            yield entry
            continue
        record = folder.existing_record(entry.index)
        if record.rows != entry.rows:
            raise BuildError(f"{folder.out}: shard {entry.index} has {entry.rows} rows, its new blocks {record.rows}")
        yield entry.model_copy(update={"files": (*entry.files, *record.files)})
    new = [folder.existing_record(shard) for shard in plan.shards if shard >= len(old.shards)]
    # A shard whose images were all rejected keeps its number, as shards are found by their position; at the end no
    # other depends on it.
    while new and not new[-1].rows:
        new.pop()
    for record in new:
        yield ShardEntry(index=record.index, rows=record.rows, files=record.files)


def _rejects(folder: BuildFolder, plan: Plan, old: Manifest) -> RejectsEntry:
    """Write the rejects under a new name, since the old manifest is in force; keep the old file if it is the same."""
    new = write_rejects(folder, plan, _next_name(old.rejects.path))
    if new.sha256 != old.rejects.sha256:
        return new
    (folder.out / new.path).unlink()
    return old.rejects


def _next_name(path: str) -> str:
    """Return the next name: rejects.parquet, rejects-2.parquet, rejects-3.parquet, ..."""
    found = re.fullmatch(r"rejects-(\d+)", PurePosixPath(path).stem)
    return f"rejects-{int(found[1]) + 1 if found else 2}.parquet"


def _description(old: Manifest, plan: Plan, facts: Facts) -> str:
    """Describe the new source, or both sources where the old images are not in the new one."""
    before = old.source.description
    return facts.source if _is_one_source(old, plan, facts) else described_together([before, facts.source])


def _left_out(old: Manifest, plan: Plan, facts: Facts) -> dict[str, int] | None:
    """Count the files that were left out of the new source, or of both."""
    if _is_one_source(old, plan, facts):
        return facts.left_out
    # A source that was added before is counted already.
    is_counted = facts.source in old.source.description.split("; ")
    return old.source.left_out if is_counted else added_left_out([old.source.left_out, facts.left_out])


def _is_one_source(old: Manifest, plan: Plan, facts: Facts) -> bool:
    """Return whether the new source stands for all images: it has them, or is the same, less what is gone."""
    return plan.summary.all_listed or facts.source == old.source.description
