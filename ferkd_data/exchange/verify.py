"""`verify`: compare a label set with its manifest, byte by byte and row by row.

Legend: R images of a shard, N crops per image, k kept classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ferkd_data import rng
from ferkd_data.errors import LabelSetError, RemoteError, check_at_least, renamed
from ferkd_data.exchange.checks import Block, Fault, FileCheck, VerifyReport, differing, without_path
from ferkd_data.exchange.signing import SIGNATURE, check_signature, require_signers
from ferkd_data.format import parquet
from ferkd_data.format.manifest import ShardEntry
from ferkd_data.format.manifest_file import FILE_NAME
from ferkd_data.format.progress import OnProgress, TransferProgress
from ferkd_data.images import REJECT_REASONS, ImageError, ImageRef, in_groups, open_source
from ferkd_data.label_set import LabelSet, open_labels
from ferkd_data.labels import statistics
from ferkd_data.labels.rows import ShardLabels
from ferkd_data.labels.statistics import Statistics
from ferkd_data.remote import is_remote
from ferkd_data.storage import image_digest, local_path
from ferkd_data.threads import Threads

MAX_FAULTS = 20
COMPANIONS = ("README.md", "croissant.json", "LICENSE", SIGNATURE)
"""Files that belong beside a published label set without being listed in its manifest."""
READ_AT_ONCE = 256


def verify(
    path: str | Path,
    *,
    images: str | Path | None = None,
    signed_by: str | Path | None = None,
    signer: str | None = None,
    threads: int | None = None,
    max_faults: int = MAX_FAULTS,
    on_progress: OnProgress | None = None,
    workers: int | None = None,
) -> VerifyReport:
    """Check sizes, digests, the schema, every row, and that all counts and statistics add up.

    With `images`, every labelled image must be in that source with the digest that was labelled. Faults are collected,
    not raised; `on_progress` hears of each file that was checked. Takes 24 bytes of memory for each image.
    `threads` files are checked at a time (default: one for each core); `workers` is the old name of `threads`.

    With `signed_by`, a file of allowed signers as OpenSSH has it, the manifest must be signed by one of them (by
    `signer`, where given).

    >>> fd.verify(LABELS).ok
    True

    Raises UsageError, SignatureError, ManifestError when there is no manifest that can be read, SourceError for
    `images` that cannot be listed.
    """
    threads = threads if workers is None else renamed("workers", "threads", workers)
    check_at_least(1, threads=threads)
    check_at_least(0, max_faults=max_faults)
    require_signers(signed_by, signer)
    labels = open_labels(path)
    name = None if signed_by is None else check_signature(labels, local_path(signed_by), signer)
    files, check = FileCheck(labels, max_faults, digests=images is not None), _Check(labels, max_faults)
    pairs = [(entry, file) for entry in labels.manifest.shards for file in entry.files]
    total = sum(file.bytes for _, file in pairs)
    progress = TransferProgress(files_total=len(pairs), bytes_total=total)
    report = on_progress or (lambda progress: None)
    report(progress)
    # Threads check files in any order; this thread alone takes their results, in the order of the manifest.
    with Threads(threads or os.cpu_count() or 1, thread_name_prefix="ferkd-verify") as executor:
        blocks = executor.map(files.file, *zip(*pairs, strict=True)) if pairs else iter(())
        for entry in labels.manifest.shards:
            checked = []
            for file in entry.files:
                checked.append(next(blocks))
                progress = replace(progress, files=progress.files + 1, bytes=progress.bytes + file.bytes)
                report(progress)
            check.take(check.shard(entry, checked))
    check.whole()
    if images is not None:
        check.images(str(images))
    return replace(check.report(total), signer=name)


@dataclass(kw_only=True)
class _Found:
    """The faults, statistics and images of one shard."""

    faults: list[Fault] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    hashes: npt.NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    """(R,) hashes of the keys; empty where the shard cannot be read."""
    digests: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 16), np.uint8))
    readable: bool = True


class _Check:
    """The state of one verification. Only the main thread uses it; threads check files and hand back `Block`s."""

    def __init__(self, labels: LabelSet, max_faults: int) -> None:
        self.labels = labels
        self.manifest = labels.manifest
        self.max_faults = max_faults
        self.faults: list[Fault] = []
        self.faults_found = 0
        self.warnings: list[str] = []
        self.found: list[_Found] = []

    def add(self, fault: Fault) -> None:
        # Counted beyond the limit, so that the report says how many there are.
        self.faults_found += 1
        if len(self.faults) < self.max_faults:
            self.faults.append(fault)

    def take(self, found: _Found) -> None:
        for fault in found.faults:
            self.add(fault)
        # The report has them now; hashes, digests and statistics are what is still needed.
        found.faults = []
        self.found.append(found)

    def shard(self, entry: ShardEntry, blocks: Sequence[Block]) -> _Found:
        """Find the faults that the files of one shard together can show."""
        found = _Found(readable=all(block.rows is not None for block in blocks))
        first: ShardLabels | None = None
        for file, block in zip(entry.files, blocks, strict=True):
            found.faults.extend(block.faults)
            if block.rows is None:
                continue
            # The first block that can be read speaks for the shard's images; the others must agree with it.
            if first is None:
                first = block.rows
                found.hashes = rng.hashes64(first.keys)
                found.digests = first.image_digest
            else:
                found.faults.extend(differing(first, block.rows, entry.files[0], file))
        found.statistics = statistics.add(block.statistics for block in blocks)
        return found

    def whole(self) -> None:
        """Find the faults that only all shards together can show."""
        self._keys_are_unique()
        # Sums without a shard would differ from the manifest's for that reason alone.
        if all(found.readable for found in self.found):
            self._statistics_add_up()
        self._rejects()
        self._strays()

    def _keys_are_unique(self) -> None:
        hashes = np.concatenate([found.hashes for found in self.found] or [np.empty(0, np.uint64)])
        order = np.argsort(hashes, kind="stable")
        # Equal neighbours in sorted order. Stable, so that the later row of the two is reported.
        twice = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
        starts = np.cumsum([0, *(len(found.hashes) for found in self.found)])
        for at in np.sort(twice)[: self.max_faults].tolist():
            shard = int(np.searchsorted(starts, at, side="right")) - 1
            row = at - int(starts[shard])
            entry = self.manifest.shards[shard]
            key = self.labels.keys_of(shard)[row]
            self.add(
                Fault(
                    file=entry.files[0].path, row=row, key=key, field="key", message="an earlier row has the same key"
                )
            )

    def _statistics_add_up(self) -> None:
        counted = statistics.add(found.statistics for found in self.found)
        for name in ("crops", "p_max_histogram", "bucket_counts", "crops_with_target", "top1_matches_target"):
            said, rows = getattr(self.manifest.statistics, name), getattr(counted, name)
            if said != rows:
                at = f" (entry {_first_difference(said, rows)})" if isinstance(said, tuple) else f" {said}"
                self.add(
                    Fault(file=FILE_NAME, field=f"statistics.{name}", message=f"says{at}; the rows give other counts")
                )
        for name in ("target_prob_sum", "kept_prob_sum"):
            total, rows = getattr(self.manifest.statistics, name), getattr(counted, name)
            # Sums of floats depend on the order of the shards in their last digits.
            if not np.isclose(total, rows, rtol=1e-6, atol=1e-3):
                self.add(
                    Fault(file=FILE_NAME, field=f"statistics.{name}", message=f"says {total}, the rows give {rows}")
                )

    def _rejects(self) -> None:
        entry = self.manifest.rejects
        try:
            with self.labels.open(entry) as opened:
                reasons = parquet.read_texts(opened.path, "reason", rows=entry.rows)
        except (LabelSetError, RemoteError, OSError) as error:
            self.add(Fault(file=entry.path, message=without_path(error, self.labels.location, entry.path)))
            return
        # A minor version may add reasons (docs/format.md), so an unknown one is no fault.
        unknown = sorted(set(reasons) - set(REJECT_REASONS))
        if unknown:
            named = ", ".join(map(repr, unknown[: self.max_faults]))
            self.warnings.append(f"{entry.path}: reasons that this ferkd-data does not know: {named}")

    def _strays(self) -> None:
        listed = {file.path for shard in self.manifest.shards for file in shard.files}
        listed |= {FILE_NAME, self.manifest.rejects.path, *COMPANIONS}
        # HTTP servers do not list their files.
        if is_remote(self.labels.location):
            return
        folder = Path(self.labels.location)
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if not path.is_dir() and name not in listed and len(self.warnings) < self.max_faults:
                self.warnings.append(f"{name}: is not in the manifest; nobody reads it")

    def images(self, location: str) -> None:
        """Join the labels with a source by key and compare digests."""
        source = open_source(location)
        hashes = np.concatenate([found.hashes for found in self.found] or [np.empty(0, np.uint64)])
        digests = np.concatenate([found.digests for found in self.found] or [np.empty((0, 16), np.uint8)])
        order = np.argsort(hashes, kind="stable")
        ranked = hashes[order]
        seen = np.zeros(len(hashes), np.bool_)
        listed = (item for item in source.list_images() if isinstance(item, ImageRef))
        for refs in in_groups(listed, READ_AT_ONCE):
            wanted = rng.hashes64([ref.key for ref in refs])
            at, there = rng.find_hashes(ranked, wanted)
            known = [(refs[i], int(order[at[i]])) for i in np.flatnonzero(there).tolist()]
            for (ref, row), data in zip(known, source.read(ref for ref, _ in known), strict=True):
                seen[row] = True
                if isinstance(data, ImageError):
                    self.add(Fault(file=ref.file, key=ref.key, message=f"cannot be read ({data})"))
                elif image_digest(data) != digests[row].tobytes():
                    self.add(
                        Fault(
                            file=ref.file, key=ref.key, field="image_digest", message="not the image that was labelled"
                        )
                    )
        self._missing_images(location, np.flatnonzero(~seen))

    def _missing_images(self, location: str, rows: npt.NDArray[np.int64]) -> None:
        # The others are counted by `add`.
        self.faults_found += max(len(rows) - self.max_faults, 0)
        starts = np.cumsum([0, *(len(found.hashes) for found in self.found)])
        for at in rows[: self.max_faults].tolist():
            shard = int(np.searchsorted(starts, at, side="right")) - 1
            key = self.labels.keys_of(shard)[at - int(starts[shard])]
            self.add(Fault(file=location, key=key, message="the labelled image is missing"))

    def report(self, total: int) -> VerifyReport:
        return VerifyReport(
            # manifest.json and the rejects.
            files=sum(len(shard.files) for shard in self.manifest.shards) + 2,
            bytes=total,
            images=self.manifest.num_images,
            crops=self.manifest.statistics.crops,
            faults=tuple(self.faults),
            faults_found=self.faults_found,
            warnings=tuple(self.warnings),
        )


def _first_difference(a: tuple[int, ...], b: tuple[int, ...]) -> str:
    return next((f"{i}: {x} against {y}" for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), "?")
