"""`merge`: several label sets into one: more teachers, more crops, or more images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import ferkd_data
from ferkd_data.crop_kinds import block_of_kinds
from ferkd_data.errors import LabelSetError, UsageError
from ferkd_data.exchange.checks import check_as_verify_does
from ferkd_data.exchange.origins import draws_of, origin_of
from ferkd_data.format import out_folder, parquet
from ferkd_data.format.manifest import (
    DEFAULT_CROPS_PER_BLOCK,
    CreatedBy,
    Manifest,
    RejectsEntry,
    ShardEntry,
    SourceEntry,
)
from ferkd_data.format.progress import OnProgress, TransferProgress, with_files
from ferkd_data.format.rejects import LONGEST_TEXT, REJECTS_NAME, RejectWriter, rejects_entry
from ferkd_data.format.writers import write_shard
from ferkd_data.images import Reject
from ferkd_data.images.refs import added_left_out, described_together
from ferkd_data.label_set import LabelSet, check_same_classes, combined_teachers, ensemble_shares, open_labels
from ferkd_data.label_set.ensemble import check_same_crops, merge_labels
from ferkd_data.labels import statistics
from ferkd_data.labels.rows import ShardLabels, concat_crops
from ferkd_data.labels.statistics import shard_statistics
from ferkd_data.storage import label_folder, write_atomically

MergeKind = Literal["teachers", "crops", "images"]
SAME_CROPS = ("seed", "crop_distribution", "crop_kinds", "augmentations", "num_crops")
SAME_TEACHERS = ("teachers", "ensemble", "top_k", "thresholds")
SETTINGS = {"teachers": SAME_CROPS, "crops": (*SAME_TEACHERS, "augmentations"), "images": (*SAME_CROPS, *SAME_TEACHERS)}
"""Settings that must be the same, by what the label sets add to each other."""

TEACHER_FIELDS = ("name", "digest", "size", "interpolation", "mean", "std", "weight", "temperature")
"""Fields of a teacher that decide its labels, and its name for messages. The spec holds paths of the machine that built
the set; the precision changes the labels by about 1e-3, and a set may be built on several kinds of machines."""


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """The label set that `merge` made."""

    out: Path
    kind: MergeKind
    """What the label sets add to each other: teachers, crops or images."""
    manifest: Manifest
    mean_uncertain: float
    """Mean over the crops of the bound on a probability's error against a joint build; 0 unless teachers differ."""
    max_uncertain: float


def merge(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    on_progress: OnProgress | None = None,
) -> MergeResult:
    """Merge label sets into a new one of layout parquet. `merge` finds out what they add to each other:

    - The same crops of the same images by other teachers: their ensemble, weighted by `weights` (default: the teachers'
      own weights). Exact for classes that all kept; see ferkd_data.label_set.ensemble for the rest.
    - Other crops of the same images (another seed or distribution) by the same teachers: all crops.
    - Other images: all images.

    An interrupted merge is begun again; one that has ended is left as it is.

    Raises UsageError where `out` holds anything else, LabelSetError that names the first setting or key that conflicts.

    >>> fd.merge([LABELS, LABELS], "both", weights=[2, 1]).kind
    'teachers'
    """
    if isinstance(paths, (str, Path)) or len(paths) < 2:
        raise UsageError("merge takes two label sets or more")
    sets = [open_labels(path) for path in paths]
    kind = _kind(sets)
    if weights is not None and kind != "teachers":
        raise UsageError(f"weights are for label sets of the same crops; these hold different {kind}")
    if weights is not None and len(weights) != len(sets):
        raise UsageError(f"{len(weights)} weights for {len(sets)} label sets")
    work = _Merge(sets, kind, weights)
    there = out_folder.finished(out)
    # The same command again after it has ended: the manifest that it would write, but for what only rows can tell.
    if there is not None and work.is_in(there):
        out_folder.clean(out)
        return _result(label_folder(out), kind, there)
    # Identities and not paths: an interrupted merge goes on also where the sets were moved.
    identities = [labels.identity for labels in sets]
    out = out_folder.begin(out, {"command": "merge", "labels": identities, "weights": work.given_weights})
    entries, counted = [], []
    progress = TransferProgress(files_total=work.num_files, images=0, images_total=work.images)
    report = on_progress or (lambda progress: None)
    report(progress)
    for index, labels in enumerate(work.shards()):
        # Inputs are strangers' files, and combining them may break a rule that each of them keeps.
        check_as_verify_does(labels, work.first, f"{work.where}: shard {index}")
        starts = range(0, labels.num_crops, work.crops_per_block)
        # No image bytes: a merged set is of layout parquet.
        rows = ((row, b"") for row in labels)
        count, files = write_shard(out, index, rows, layout="parquet", block_starts=starts)
        entries.append(ShardEntry(index=index, rows=count, files=files))
        counted.append(shard_statistics(labels))
        progress = with_files(progress, files, sum(entry.rows for entry in entries))
        report(progress)
    manifest = work.manifest(entries, statistics.add(counted), _write_rejects(out, sets, kind))
    return _result(out, kind, out_folder.finish(out, manifest))


def _result(out: Path, kind: MergeKind, manifest: Manifest) -> MergeResult:
    mean, largest = (manifest.model_extra or {}).get("merge_uncertain", (0.0, 0.0))
    return MergeResult(out=out, kind=kind, manifest=manifest, mean_uncertain=mean, max_uncertain=largest)


def _kind(sets: Sequence[LabelSet]) -> MergeKind:
    """Find what the label sets add to each other. Raises LabelSetError that names the first conflict."""
    first = sets[0]
    for labels in sets[1:]:
        check_same_classes(first, labels)
    if _same_images(sets):
        differs = any(getattr(first.manifest, n) != getattr(s.manifest, n) for s in sets for n in SAME_CROPS)
        # Merged sets may agree in these and hold further draws: their seed is that of their first crops.
        differs = differs or any(draws_of(labels.manifest) != draws_of(first.manifest) for labels in sets)
        # The same images: other crops if anything that draws crops differs, else the same crops by other teachers.
        kind: MergeKind = "crops" if differs else "teachers"
    else:
        kind = "images"
    _check_settings(sets, kind)
    if kind == "crops":
        _check_other_crops(sets)
    return kind


def _same_images(sets: Sequence[LabelSet]) -> bool:
    """Return whether all label sets hold the same images; False where no two have one in common.

    Raises LabelSetError for anything between the two.
    """
    first = sets[0]
    # Keys are compared by their 64-bit hashes: 8 bytes for each image, and no key stays in memory.
    ours, *others = (labels.key_hashes() for labels in sets)
    same = []
    for labels, theirs in zip(sets[1:], others, strict=True):
        known = np.isin(theirs, ours)
        same.append(bool(known.any()))
        if not known.any() or (known.all() and len(theirs) == len(ours)):
            continue
        lacking, row = (first, _first_without(ours, theirs)) if known.all() else (labels, _first_without(theirs, ours))
        shard, at = lacking.position(row)
        raise LabelSetError(
            f"{first.location} and {labels.location}: only some images are in both, {lacking.keys_of(shard)[at]!r} "
            "is not; merge takes label sets with the same images, or without common images"
        )
    if all(same):
        return True
    if any(same):
        raise LabelSetError("some of the label sets hold the same images and some do not; merge those that do first")
    # None shares an image with the first, but they may with each other.
    if len(np.unique(np.concatenate([ours, *others]))) != len(ours) + sum(map(len, others)):
        raise LabelSetError(f"{first.location}: shares no image with the others, but these share some with each other")
    return False


def _first_without(hashes: npt.NDArray[np.uint64], known: npt.NDArray[np.uint64]) -> int:
    """Return the first row whose hash is not among `known`."""
    return int((~np.isin(hashes, known)).argmax())


def _check_other_crops(sets: Sequence[LabelSet]) -> None:
    """Raise LabelSetError where crops cannot be added: to crop kinds, or where two sets hold the same draws."""
    with_kinds = next((labels for labels in sets if labels.crop_kinds), None)
    if with_kinds is not None:
        raise LabelSetError(
            f"{with_kinds.location}: has crop kinds, so crops of another label set cannot be added to it: they would "
            "be of no kind. More crops of its last kind, or a further kind: ferkd-data build --extend --crop-kinds"
        )
    # The crops of the smaller set would come twice.
    drawn: dict[str, LabelSet] = {}
    for labels in sets:
        for draw in draws_of(labels.manifest):
            other = drawn.setdefault(draw, labels)
            if other is not labels:
                raise LabelSetError(
                    f"{other.location} and {labels.location}: hold the same crops ({draw}), {other.num_crops} and "
                    f"{labels.num_crops} of each image; more of them come from `ferkd-data build --extend`, other ones "
                    "from a build with another --seed"
                )


def _check_settings(sets: Sequence[LabelSet], kind: MergeKind) -> None:
    names = SETTINGS[kind]
    first = sets[0]
    for labels in sets[1:]:
        for name in names:
            ours, theirs = _comparable(first, name), _comparable(labels, name)
            if ours != theirs:
                raise LabelSetError(
                    f"{first.location} and {labels.location}: {name} differs: {ours} and {theirs}; label sets with "
                    f"other {kind} must have the same"
                )


def _comparable(labels: LabelSet, name: str) -> Any:
    value = getattr(labels.manifest, name)
    if name == "crop_kinds":
        return [str(kind) for kind in labels.crop_kinds] or "none"
    if name == "teachers":
        teachers = [{field: getattr(teacher, field) for field in TEACHER_FIELDS} for teacher in value]
        return [{**one, "digest": one["digest"][:12]} for one in teachers]
    return value


class _Merge:
    """One merge: its shards, and the manifest of what it writes."""

    def __init__(self, sets: Sequence[LabelSet], kind: MergeKind, weights: Sequence[float] | None) -> None:
        self.sets = sets
        self.kind = kind
        # The largest, since each set's images must pass; `first` is what the merged rows are checked against.
        limit = max_pixels_of([labels.manifest for labels in sets])
        self.first = sets[0].manifest.model_copy(update={"max_pixels": limit})
        self.where = " + ".join(labels.location for labels in sets)
        self.shares = ensemble_shares(sets, weights) if kind == "teachers" else []
        self.weights = weights
        self.given_weights = None if weights is None else [float(weight) for weight in weights]
        self.crops_per_block = self.first.crops_per_block
        if self.first.layout == "webdataset":
            # A set of tars has no blocks.
            most = min(self.first.num_crops, DEFAULT_CROPS_PER_BLOCK)
            self.crops_per_block = block_of_kinds(self.first.kinds, most)
        self.images = sum(map(len, sets)) if kind == "images" else len(sets[0])
        shards = sum(len(labels.manifest.shards) for labels in (sets if kind == "images" else sets[:1]))
        num_crops = sum(labels.num_crops for labels in sets) if kind == "crops" else self.first.num_crops
        self.num_files = shards * -(-num_crops // self.crops_per_block)
        self.uncertain_sum = 0.0
        self.uncertain_max = 0.0
        self.thresholds = self.first.thresholds.absolute()

    def shards(self) -> Iterator[ShardLabels]:
        if self.kind == "images":
            for one in self.sets:
                yield from one.shards()
            return
        for labels in self.sets[0].shards():
            # By key and shard by shard: sets of the same images may list them in another order.
            yield self._same_images([labels, *(gather(other, labels.keys) for other in self.sets[1:])])

    def _same_images(self, parts: list[ShardLabels]) -> ShardLabels:
        where = self.where
        if self.kind == "crops":
            for part in parts[1:]:
                # Sizes, digests and targets must agree; the crops are what differs.
                check_same_crops(_without_crops(parts[0]), _without_crops(part), where)
            return concat_crops(parts)
        merged = merge_labels(
            parts, self.shares, num_classes=self.first.num_classes, thresholds=self.thresholds, where=where
        )
        # float64: in float32, a large sum swallows what single shards add.
        self.uncertain_sum += float(merged.uncertain.sum(dtype=np.float64))
        self.uncertain_max = max(self.uncertain_max, float(merged.uncertain.max(initial=0)))
        return merged.labels

    def is_in(self, there: Manifest) -> bool:
        """Return whether a finished label set is this merge: the same but for its files and its counts."""
        extra = there.model_extra or {}
        same = self.manifest(list(there.shards), there.statistics, there.rejects)
        # What only the rows tell, and the version of ferkd-data that wrote it.
        known = {"merge_uncertain": extra.get("merge_uncertain"), "created_by": there.created_by}
        return same.model_copy(update=known).to_json() == there.to_json()

    def manifest(self, entries: list[ShardEntry], counted: statistics.Statistics, rejects: RejectsEntry) -> Manifest:
        first = self.first
        changes: dict[str, Any] = {
            "created_by": CreatedBy(name="ferkd-data", version=ferkd_data.__version__),
            "layout": "parquet",
            "num_images": self.images,
            # Of sets without names, nothing but the number of classes is compared.
            "class_names": next((names for one in self.sets if (names := one.manifest.class_names)), None),
            "crops_per_block": self.crops_per_block,
            "shards": tuple(entries),
            "statistics": counted,
            "rejects": rejects,
            "source": self._source(rejects),
            "merged_from": [origin_of(labels) for labels in self.sets],
            "merge_uncertain": [self.uncertain_sum / max(counted.crops, 1), self.uncertain_max],
        }
        if self.kind == "teachers":
            changes["teachers"] = combined_teachers(self.sets, self.weights)
            changes["ensemble"] = "mean"
            changes["top_k"] = max(labels.top_k for labels in self.sets)
        if self.kind == "crops":
            changes["num_crops"] = sum(labels.num_crops for labels in self.sets)
        merged = first.model_copy(update=changes)
        # What the first set was a part of, the merged one is not; `merged_from` names what it was made of.
        (merged.model_extra or {}).pop("pulled_from", None)
        return merged

    def _source(self, rejects: RejectsEntry) -> SourceEntry:
        """Describe the sources of all label sets together."""
        sources = [labels.manifest.source for labels in self.sets]
        changes: dict[str, Any] = {
            "description": described_together(source.description for source in sources),
            "images_seen": self.images + rejects.rows,
            # A statement on one place or list holds for the merged set where it is that of all.
            **{
                name: _common([getattr(source, name) for source in sources])
                for name in ("place_sha256", "classes_sha256")
            },
            "class_folders": next((folders for source in sources if (folders := source.class_folders)), None),
        }
        if self.kind == "images":
            plans = "".join(source.plan_sha256 for source in sources)
            changes["plan_sha256"] = hashlib.sha256(plans.encode()).hexdigest()
            # As with the rejects: sets of the same images have left out the same files.
            changes["left_out"] = added_left_out(source.left_out for source in sources)
        return sources[0].model_copy(update=changes)


def _common(values: Sequence[str | None]) -> str | None:
    """Return the value that all are; None where they differ."""
    return values[0] if len(set(values)) == 1 else None


def max_pixels_of(manifests: Sequence[Manifest]) -> int | None:
    """Return the largest pixel limit of these label sets; None where no manifest has one."""
    if all(manifest.max_pixels is None for manifest in manifests):
        return None
    return max(manifest.pixel_limit for manifest in manifests)


def gather(labels: LabelSet, keys: Sequence[str]) -> ShardLabels:
    """Return the rows of these images, in this order. Raises LabelSetError where one is missing."""
    try:
        return ShardLabels.from_rows([labels[key] for key in keys])
    except KeyError as error:
        raise LabelSetError(str(error.args[0])) from error


def _without_crops(labels: ShardLabels) -> ShardLabels:
    return replace(labels, **{name: getattr(labels, name)[:, :0] for name in ("boxes", "flip", "operations")})


def _write_rejects(out: Path, sets: Sequence[LabelSet], kind: MergeKind) -> RejectsEntry:
    path = out / REJECTS_NAME
    with write_atomically(path) as aside, RejectWriter(aside) as writer:
        # The same images everywhere: the rejects of the first set stand for all.
        for labels in sets if kind == "images" else sets[:1]:
            entry = labels.manifest.rejects
            with labels.open(entry) as opened:
                columns = [
                    list(parquet.read_texts(opened.path, name, rows=entry.rows, longest=LONGEST_TEXT))
                    for name in ("key", "reason", "detail")
                ]
            for key, reason, detail in zip(*columns, strict=True):
                writer.add(Reject(key=key, reason=reason, detail=detail))
    return rejects_entry(path, writer.rows)
