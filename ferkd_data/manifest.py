"""`manifest.json`: what a label set is, from what, by whom, with which settings. Written last: the commit point.

The models here are the published schema (docs/format.md is generated from them). An unknown version is an error;
an unknown field is kept and written back.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ferkd_data.buckets import Thresholds
from ferkd_data.errors import ManifestError
from ferkd_data.statistics import Count, Statistics

FILE_NAME = "manifest.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 256 * 2**20
"""A manifest above this is refused unread: 1 billion images need about 150 MB."""
MAX_CROPS, MAX_TOP_K = 10**6, 1000
"""So that the lists of one image stay within what Parquet and memory can hold."""
MAX_CLASSES = 2**24
"""Ranking keeps 24 bits for the class."""
FREE_TOKENS, BYTES_PER_TOKEN = 10**6, 16
"""JSON of brackets and commas alone takes 30 times its size in memory; in a manifest they are one byte in 38."""
PIXELS = "decoded raster, converted to RGB; EXIF orientation ignored"

Layout = Literal["parquet", "webdataset"]


def _inside(path: str) -> str:
    # Not through pathlib, which took half of the time to open a manifest of 25,000 shards.
    if not {"", ".", ".."}.isdisjoint(path.split("/")) or not {"\\", "\0", ":"}.isdisjoint(path):
        raise ValueError(f"{path!r} is not a path inside the label set")
    return path


def _is_shard(path: str) -> str:
    if not path.startswith(("labels/", "shards/")) or not path.endswith((".parquet", ".tar")):
        raise ValueError(f"{path!r} is not where shard files lie (labels/*.parquet, shards/*.tar)")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Probability = Annotated[float, Field(ge=0, le=1)]


class Record(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class FileEntry(Record):
    path: RelativePath
    """Relative to the manifest's folder, with forward slashes."""
    bytes: Count
    sha256: Sha256


class BlockEntry(FileEntry):
    path: Annotated[RelativePath, AfterValidator(_is_shard)]
    block: Count
    """Crop block: crops block * crops_per_block and up (always 0 in layout webdataset)."""


class ShardEntry(Record):
    index: Count
    rows: Count
    """Images in this shard; the same in each of its blocks. A shard of 0 rows has no files."""
    files: tuple[BlockEntry, ...]


class TeacherEntry(Record):
    spec: str
    name: str
    digest: Sha256
    """SHA-256 over the weights, buffers and hyperparameters of the model, or over its files."""
    num_classes: Annotated[int, Field(ge=1)]
    size: Annotated[int, Field(ge=1)]
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    weight: Annotated[float, Field(gt=0)]
    temperature: Annotated[float, Field(gt=0)]
    precision: Literal["fp32", "bf16", "fp16"]


class CropDistributionEntry(Record):
    scale: tuple[float, float]
    ratio: tuple[float, float]
    hflip: Probability


class ThresholdsEntry(Record):
    low: Probability
    mid: Probability
    top: Probability
    confidence: Literal["max", "target"]
    quantile: tuple[float, float, float] | None = None
    """The shares asked for, where low, mid and top were derived from them."""

    def absolute(self) -> Thresholds:
        """Those that the stored buckets follow. Raises UsageError where they are not in their order."""
        return Thresholds(low=self.low, mid=self.mid, top=self.top, confidence=self.confidence)


class SourceEntry(Record):
    description: str
    images_seen: Count
    """Labelled and rejected images together."""
    plan_sha256: Sha256
    """Digest of the keys and targets in their order; after an extension, of the digest before and what was added."""


class RejectsEntry(FileEntry):
    path: Annotated[RelativePath, Field(pattern=r"\.parquet$")]
    rows: Count


class CreatedBy(Record):
    name: str
    version: str


class Manifest(Record):
    format: Literal["ferkd-data"] = "ferkd-data"
    version: Literal[1] = 1
    created_by: CreatedBy
    layout: Layout
    num_images: Count
    num_crops: Annotated[int, Field(ge=1, le=MAX_CROPS)]
    """Crops per image, N."""
    crops_per_block: Annotated[int, Field(ge=1, le=MAX_CROPS)]
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K)]
    num_classes: Annotated[int, Field(ge=1, le=MAX_CLASSES)]
    class_names: tuple[str, ...] | None = None
    seed: int
    crop_distribution: CropDistributionEntry
    pixels: str = PIXELS
    teachers: Annotated[tuple[TeacherEntry, ...], Field(min_length=1)]
    ensemble: Literal["mean", "logits", "geometric"]
    thresholds: ThresholdsEntry
    source: SourceEntry
    shards: tuple[ShardEntry, ...]
    rejects: RejectsEntry
    statistics: Statistics

    @property
    def num_blocks(self) -> int:
        """Crop blocks of a shard."""
        return 1 if self.layout == "webdataset" else -(-self.num_crops // self.crops_per_block)

    def block_crops(self, block: int) -> int:
        """Crops in a block: the last one may be short."""
        if self.layout == "webdataset":
            return self.num_crops
        return min(self.crops_per_block, self.num_crops - block * self.crops_per_block)

    def to_json(self) -> str:
        return self.model_dump_json(indent=1, exclude_none=True) + "\n"


def parse_manifest(text: str | bytes, where: str) -> Manifest:
    """Validate a manifest. Raises ManifestError that names the first field at fault."""
    if len(text) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{where}: {len(text)} bytes is more than a manifest may have ({MAX_MANIFEST_BYTES})")
    data = text.encode() if isinstance(text, str) else text
    tokens = sum(map(data.count, (b"[", b"{", b",")))
    if tokens > FREE_TOKENS + len(data) // BYTES_PER_TOKEN:
        raise ManifestError(f"{where}: {tokens} brackets and commas in {len(data)} bytes are no manifest")
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: not JSON ({error}); was the file cut short?") from error
    if not isinstance(content, dict) or content.get("format") != "ferkd-data":
        raise ManifestError(f"{where}: not the manifest of a ferkd-data label set")
    version = content.get("version")
    if version != FORMAT_VERSION:
        raise ManifestError(
            f"{where}: format version {version!r} is not known to this ferkd-data, which reads version "
            f"{FORMAT_VERSION}; upgrade with: pip install -U ferkd-data"
        )
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ManifestError(f"{where}: field {field or '(top)'}: {first['msg']}") from error
    _check_whole(manifest, where)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Raises ManifestError when the folder holds no finished label set."""
    return parse_manifest(read_manifest_bytes(folder), str(folder / FILE_NAME))


def read_manifest_bytes(folder: Path) -> bytes:
    """The manifest as it lies there, unparsed. Raises ManifestError when there is none."""
    path = folder / FILE_NAME
    try:
        if not path.is_file() and path.exists():
            raise ManifestError(f"{path}: is not a regular file")
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ManifestError(f"{path}: more than {MAX_MANIFEST_BYTES} bytes")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ManifestError(f"{folder}: no {FILE_NAME}; {_why_none(folder)}") from error


def _why_none(folder: Path) -> str:
    if (folder / ".build").is_dir():
        return "its build has not finished: run the same build command to resume it"
    if (folder / "labels").is_dir() or (folder / "shards").is_dir():
        return (
            "was a publish, pull, convert or merge interrupted here? They write it last: run the same command again to "
            "finish"
        )
    return "is this the folder that a build wrote?"


def identity_of(manifest: bytes) -> str:
    """Of the label set that has this manifest.json: its SHA-256, 64 hex digits."""
    return hashlib.sha256(manifest).hexdigest()


def _check_whole(manifest: Manifest, where: str) -> None:
    rows = sum(shard.rows for shard in manifest.shards)
    if rows != manifest.num_images:
        raise ManifestError(f"{where}: the shards hold {rows} rows, num_images says {manifest.num_images}")
    for position, shard in enumerate(manifest.shards):
        if shard.index != position:
            raise ManifestError(f"{where}: shard {shard.index} stands where shard {position} belongs")
        blocks = [file.block for file in shard.files]
        expected = list(range(manifest.num_blocks)) if shard.rows else []
        if blocks != expected:
            raise ManifestError(f"{where}: shard {shard.index} has crop blocks {blocks}, expected {expected}")
    paths = [manifest.rejects.path, *(file.path for shard in manifest.shards for file in shard.files)]
    if len(set(paths)) < len(paths):
        twice = next(path for path, count in Counter(paths).items() if count > 1)
        raise ManifestError(f"{where}: lists the file {twice!r} twice")
    low, mid, top = manifest.thresholds.low, manifest.thresholds.mid, manifest.thresholds.top
    if not low <= mid <= top:
        raise ManifestError(f"{where}: the thresholds {low} {mid} {top} are not in their order")
    seen = manifest.num_images + manifest.rejects.rows
    if seen != manifest.source.images_seen:
        raise ManifestError(
            f"{where}: {manifest.num_images} labelled and {manifest.rejects.rows} rejected images do not add up "
            f"to the {manifest.source.images_seen} seen"
        )
    teachers, counted = len(manifest.teachers), manifest.statistics
    if not counted.fits(teachers):
        raise ManifestError(f"{where}: statistics of other teachers than the {teachers} that are listed")
    if manifest.class_names is not None and len(manifest.class_names) != manifest.num_classes:
        raise ManifestError(f"{where}: {len(manifest.class_names)} class names for {manifest.num_classes} classes")
