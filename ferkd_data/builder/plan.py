"""The plan: which images a build labels, in which order, in which shard. Made once, then fixed.

One row group of `plan.parquet` is one image shard, so a worker reads the rows of its own shard only. `Part` chooses the
shards of one part of a build for a batch system: every n-th.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from ferkd_data.errors import BuildError, SourceError, UsageError
from ferkd_data.format.rejects import RejectWriter
from ferkd_data.images import ImageRef, ImageSource, Reject, describe_left_out, in_groups
from ferkd_data.labels.rows import DIGEST_BYTES
from ferkd_data.storage import open_regular_stream, write_atomically

FORMAT: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["target"], "write_statistics": False}
"""Keys and files do not repeat, so a dictionary would cost space. Statistics would fill the footer, which every worker
reads for each shard: 10 million images have 2,500 row groups."""
REF_FIELDS = ("key", "target", "file", "offset", "length")
DIGEST = pa.binary(DIGEST_BYTES)
DIGESTED_TOGETHER = 4096
FINGERPRINT_BYTES = 4096
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("target", pa.int32()),
        pa.field("file", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("image_digest", DIGEST),
    ]
)
"""`image_digest` is set for an image that has labels already: it must be the same when it gets more crops."""


class PlanSummary(BaseModel):
    """`plan.json`: what is known of the whole plan without reading its rows."""

    model_config = ConfigDict(frozen=True)

    version: int = 1
    images: int
    """Images planned, without those rejected by their key."""
    labelled_images: int
    """Planned images whose target is known."""
    max_target: int
    rejects: int
    shards: int
    """Planned shards."""
    sha256: str
    """Digest of every key and target in their order; in an extension, see ferkd_data.builder.extension."""
    class_names: tuple[str, ...] | None
    class_folders: tuple[str, ...] | None = None
    """Class folders, or texts of labels, in the order of their numbers."""
    left_out: dict[str, int] = {}
    """Number of files that are no images, by reason (see ferkd_data.images.refs)."""
    left_out_examples: dict[str, str] = {}
    containers: dict[str, str] = {}
    """The files that hold many images each (see `ImageSource.containers`), and their fingerprints."""
    notes: tuple[str, ...] = ()
    """Remarks about how the source was read, a sentence each."""
    first_shard: int = 0
    """The number of the first planned shard. In an extension, shards before it are finished."""
    known_shards: int = 0
    """In an extension: the number of planned shards, from the first on, whose images have labels already."""
    known_images: int = 0
    """Images of the known shards."""
    known_crops: int = 0
    """Crops that each image of the known shards has already."""
    all_listed: bool = True
    """True where the source still has every image of an extended label set."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan that is made; rows are read when they are asked for."""

    folder: Path
    summary: PlanSummary

    @property
    def shards(self) -> range:
        """The numbers of the planned shards."""
        return range(self.summary.first_shard, self.summary.first_shard + self.summary.shards)

    def is_known(self, shard: int) -> bool:
        """Return whether the images of a shard have labels already, and get more crops."""
        return shard - self.summary.first_shard < self.summary.known_shards

    def first_crop(self, shard: int) -> int:
        """Return the number of the first crop that this build labels in a shard."""
        return self.summary.known_crops if self.is_known(shard) else 0

    def refs(self, shard: int) -> list[ImageRef]:
        """Return the images of one shard."""
        columns = self._read(shard, REF_FIELDS)
        return [ImageRef(**dict(zip(REF_FIELDS, row, strict=True))) for row in zip(*columns, strict=True)]

    def digests(self, shard: int) -> list[bytes]:
        """Return the digests that the images of a known shard had when they were labelled."""
        return self._read(shard, ("image_digest",))[0]

    def count_images(self, shards: Iterable[int]) -> int:
        return sum(self.shard_images(shards))

    def shard_images(self, shards: Iterable[int]) -> list[int]:
        """Return the number of images in each of these shards."""
        # From the footer: no rows are read.
        metadata = pq.read_metadata((self.folder / "plan.parquet").absolute())
        return [metadata.row_group(shard - self.summary.first_shard).num_rows for shard in shards]

    def _read(self, shard: int, columns: Sequence[str]) -> list[list[Any]]:
        # Opened for each shard: a worker reads a few kilobytes of footer for what takes it minutes to label.
        with pq.ParquetFile((self.folder / "plan.parquet").absolute()) as file:
            table = file.read_row_group(shard - self.summary.first_shard, columns=list(columns), use_threads=False)
        return [table.column(name).to_pylist() for name in columns]


def load_or_make_plan(
    source: ImageSource, folder: Path, *, images_per_shard: int, fail_on_reject: bool = False
) -> Plan:
    """Return the plan that an earlier run of this build made, or make one.

    Raises SourceError when the source holds no image at all, or has other contents than in that run; BuildError as
    `list_images` does.
    """
    if (folder / "plan.json").exists():
        return resume_plan(source, folder)
    with PlanWriter(folder) as writer:
        for refs in _shards(list_images(source, fail_on_reject=fail_on_reject), writer, images_per_shard):
            writer.add_shard(table_of(refs))
    if writer.images + writer.rejects == 0:
        counts = describe_left_out(source.left_out.counts)
        raise SourceError(f"{source.description}: no images found{'; left out: ' if counts else ''}{', '.join(counts)}")
    return save_plan(folder, writer.summary(source))


def list_images(source: ImageSource, *, fail_on_reject: bool) -> Iterator[ImageRef | Reject]:
    """List the images of a source. Where `fail_on_reject`, raise BuildError for the first that its listing rejects."""
    return _without_rejects(source.list_images()) if fail_on_reject else source.list_images()


def _without_rejects(items: Iterator[ImageRef | Reject]) -> Iterator[ImageRef | Reject]:
    for item in items:
        if isinstance(item, Reject):
            raise unusable(item)
        yield item


def unusable(reject: Reject) -> BuildError:
    """Return the error that ends a build which collects no rejects."""
    return BuildError(
        f"image {reject.key!r} cannot be used ({reject.reason}: {reject.detail}); repair or remove it and run the "
        "same command again, or let rejects be collected with --on-error reject"
    )


def open_plan(folder: Path) -> Plan:
    """Open the plan in `folder`."""
    return Plan(folder=folder, summary=PlanSummary.model_validate_json((folder / "plan.json").read_bytes()))


def resume_plan(source: ImageSource, folder: Path) -> Plan:
    """Open the plan of an earlier run.

    Raises SourceError for a tar or Parquet file that was written anew since then: other images may lie at the places
    of the plan. A file that is gone is left to its images, which become rejects.
    """
    plan = open_plan(folder)
    for file, now in _fingerprints(source).items():
        if now != plan.summary.containers.get(file, now):
            raise SourceError(
                f"{file}: was written anew since this build began, and its images may lie elsewhere in it now; bring "
                "the old file back, or begin again with --overwrite (with --part, in an empty OUT)"
            )
    return plan


def _fingerprints(source: ImageSource) -> dict[str, str]:
    return {file: _fingerprint(Path(file)) for file in source.containers if Path(file).is_file()}


def _fingerprint(path: Path) -> str:
    """Hash the size, the beginning and the end of a file: a tar's first member, or a Parquet file's footer, are there.

    Not the time of writing, which a copy on another machine has not.
    """
    with open_regular_stream(path) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        begin = stream.read(FINGERPRINT_BYTES)
        stream.seek(max(0, size - FINGERPRINT_BYTES))
        end = stream.read(FINGERPRINT_BYTES)
    return hashlib.blake2b(b"%d\0" % size + begin + end, digest_size=8).hexdigest()


def save_plan(folder: Path, summary: PlanSummary) -> Plan:
    """Write plan.json. This is the last step: without it, no plan is there."""
    with write_atomically(folder / "plan.json") as aside:
        aside.write_text(summary.model_dump_json(indent=1))
    return Plan(folder=folder, summary=summary)


class PlanWriter:
    """Writes the plan shard by shard, and rejects beside it. An error that ends the context leaves no file."""

    def __init__(self, folder: Path, digest_of: str = "") -> None:
        self.folder = folder
        self.digest = hashlib.sha256(digest_of.encode())
        self.images = self.labelled = self.rejects = self.shards = 0
        self.max_target = -1
        self._stack = ExitStack()

    def __enter__(self) -> PlanWriter:
        # Absolute paths: Arrow takes a relative one with a colon in it for a URI.
        # Where one cannot be opened, the inner stack closes the others; else they all pass to `self._stack`. It unwinds
        # backwards, so that writers are closed before their files get their names.
        with ExitStack() as stack:
            plan_path = stack.enter_context(write_atomically(self.folder / "plan.parquet"))
            rejects_path = stack.enter_context(write_atomically(self.folder / "plan-rejects.parquet"))
            self._plan = stack.enter_context(pq.ParquetWriter(plan_path.absolute(), SCHEMA, **FORMAT))
            self._rejects = stack.enter_context(RejectWriter(rejects_path))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add_reject(self, reject: Reject) -> None:
        self._rejects.add(reject)
        self.rejects += 1

    def add_shard(self, rows: pa.Table, *, are_known: bool = False) -> None:
        """Add a shard. `are_known`: its images have labels already, so they do not count in the digest."""
        # All rows in one group, which is how a shard's rows are found again.
        self._plan.write_table(rows, row_group_size=max(len(rows), 1))
        targets = rows["target"]
        self.shards += 1
        self.images += len(rows)
        self.labelled += len(rows) - targets.null_count
        self.max_target = max(self.max_target, pc.max(targets).as_py() if targets.null_count < len(rows) else -1)
        if not are_known:
            pairs = zip(rows["key"].to_pylist(), targets.to_pylist(), strict=True)
            self.digest.update(_digested(pairs))

    def summary(self, source: ImageSource) -> PlanSummary:
        """Return the summary of the plan. `source` must have been listed to its end."""
        return PlanSummary(
            images=self.images,
            labelled_images=self.labelled,
            max_target=self.max_target,
            rejects=self.rejects,
            shards=self.shards,
            sha256=self.digest.hexdigest(),
            class_names=source.class_names,
            class_folders=source.class_folder_names,
            left_out=dict(source.left_out.counts),
            containers=_fingerprints(source),
            left_out_examples=source.left_out.examples,
            notes=source.notes,
        )


def digest_of_listing(source: ImageSource) -> str:
    """Return the `PlanSummary.sha256` that a plan of this source would have now."""
    # As `PlanWriter` begins, whose `digest_of` is empty in a build from the start.
    digest = hashlib.sha256(b"")
    listed = (item for item in source.list_images() if isinstance(item, ImageRef))
    for refs in in_groups(listed, DIGESTED_TOGETHER):
        digest.update(_digested((ref.key, ref.target) for ref in refs))
    return digest.hexdigest()


def _digested(pairs: Iterable[tuple[str, int | None]]) -> bytes:
    # Keys hold no control characters (`images.keys`), so no two lists of pairs give the same text.
    return "".join(f"{key}\0{target}\n" for key, target in pairs).encode()


def table_of(refs: Sequence[ImageRef]) -> pa.Table:
    columns: dict[str, Any] = {name: list(map(attrgetter(name), refs)) for name in REF_FIELDS}
    return pa.table({**columns, "image_digest": pa.nulls(len(refs), DIGEST)}, schema=SCHEMA)


def _shards(listing: Iterable[ImageRef | Reject], writer: PlanWriter, size: int) -> Iterator[list[ImageRef]]:
    # One shard of references in memory; the listing itself may have a billion.
    refs: list[ImageRef] = []
    for item in listing:
        if isinstance(item, Reject):
            writer.add_reject(item)
            continue
        refs.append(item)
        if len(refs) == size:
            yield refs
            refs = []
    if refs:
        yield refs


PATTERN = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part `number` of `of` of a build: every `of`-th shard.

    >>> Part.parse("3/8").shards(range(20))
    [2, 10, 18]
    """

    number: int
    """1 .. of"""
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise UsageError(f"a part is 1/N .. N/N, got {self}")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @classmethod
    def parse(cls, text: str) -> Part:
        found = PATTERN.fullmatch(text.strip())
        if found is None:
            raise UsageError(f"a part is I/N such as 3/8, got {text!r}")
        return cls(number=int(found[1]), of=int(found[2]))

    def has(self, shard: int) -> bool:
        return shard % self.of == self.number - 1

    def shards(self, planned: range) -> list[int]:
        """Return this part's shards, spread over the whole, since images are often sorted by size or class."""
        return [shard for shard in planned if self.has(shard)]
