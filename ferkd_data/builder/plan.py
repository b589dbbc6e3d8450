"""The plan: which images a build labels, in which order, in which shard. Made once, then fixed.

One row group of `plan.parquet` is one image shard, so that any shard can be worked on knowing its own rows only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from ferkd_data.builder.rejects import RejectWriter
from ferkd_data.errors import SourceError
from ferkd_data.images import ImageRef, ImageSource, Reject
from ferkd_data.storage import write_atomically

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("target", pa.int32()),
        pa.field("file", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
    ]
)


class PlanSummary(BaseModel):
    model_config = ConfigDict(frozen=True)

    version: int = 1
    images: int
    """Images planned, without those rejected by their key."""
    labelled_images: int
    """Planned images whose target is known."""
    max_target: int
    rejects: int
    shards: int
    sha256: str
    """Over every key and target in their order."""
    class_names: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    folder: Path
    summary: PlanSummary

    def refs(self, shard: int) -> list[ImageRef]:
        """The images of one shard."""
        with pq.ParquetFile(self.folder / "plan.parquet") as file:
            rows = file.read_row_group(shard, use_threads=False).to_pylist()
        return [ImageRef(**row) for row in rows]

    def count_images(self, shards: Iterable[int]) -> int:
        metadata = pq.read_metadata(self.folder / "plan.parquet")
        return sum(metadata.row_group(shard).num_rows for shard in shards)


def load_or_make_plan(source: ImageSource, folder: Path, *, images_per_shard: int) -> Plan:
    """The plan that an earlier run of this build made, or a new one; written aside and renamed.

    Raises SourceError when the source holds no image at all.
    """
    done = folder / "plan.json"
    if done.exists():
        return open_plan(folder)
    writer = _PlanWriter(folder, images_per_shard)
    summary = writer.write(source)
    with write_atomically(done) as aside:
        aside.write_text(summary.model_dump_json(indent=1))
    return Plan(folder=folder, summary=summary)


def open_plan(folder: Path) -> Plan:
    """The plan that was made here."""
    return Plan(folder=folder, summary=PlanSummary.model_validate_json((folder / "plan.json").read_bytes()))


class _PlanWriter:
    def __init__(self, folder: Path, images_per_shard: int) -> None:
        self.folder = folder
        self.images_per_shard = images_per_shard
        self.digest = hashlib.sha256()
        self.images = self.labelled = self.rejects = self.shards = 0
        self.max_target = -1

    def write(self, source: ImageSource) -> PlanSummary:
        with (
            write_atomically(self.folder / "plan.parquet") as plan_path,
            write_atomically(self.folder / "plan-rejects.parquet") as rejects_path,
            pq.ParquetWriter(plan_path, SCHEMA, compression="zstd") as plan,
            RejectWriter(rejects_path) as rejects,
        ):
            for refs in self._shards(source.list_images(), rejects):
                columns = {name: [getattr(ref, name) for ref in refs] for name in SCHEMA.names}
                plan.write_table(pa.table(columns, schema=SCHEMA), row_group_size=self.images_per_shard)
        if self.images + self.rejects == 0:
            raise SourceError(f"{source.description}: no images found")
        return PlanSummary(
            images=self.images,
            labelled_images=self.labelled,
            max_target=self.max_target,
            rejects=self.rejects,
            shards=self.shards,
            sha256=self.digest.hexdigest(),
            class_names=source.class_names,
        )

    def _shards(self, listing: Iterator[ImageRef | Reject], rejects: RejectWriter) -> Iterator[list[ImageRef]]:
        refs: list[ImageRef] = []
        for item in listing:
            if isinstance(item, Reject):
                rejects.add(item)
                self.rejects += 1
                continue
            self._count(item)
            refs.append(item)
            if len(refs) == self.images_per_shard:
                self.shards += 1
                yield refs
                refs = []
        if refs:
            self.shards += 1
            yield refs

    def _count(self, ref: ImageRef) -> None:
        self.images += 1
        if ref.target is not None:
            self.labelled += 1
            self.max_target = max(self.max_target, ref.target)
        self.digest.update(f"{ref.key}\0{ref.target}\n".encode())
