"""`manifest.json`: the facts of a label set (source, teachers, settings, files). It is written last: the commit point.

The models here are the published schema; docs/format.md is generated from them. An unknown field is kept and written
back. `manifest_file.py` reads, checks and writes the file.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ferkd_data.augment.distribution import num_words, parse_augmentations
from ferkd_data.crop_kinds import MAX_KINDS, MAX_SIZE, NAME_PATTERN, CropKind
from ferkd_data.crops import CropDistribution
from ferkd_data.errors import UsageError
from ferkd_data.images.decode import DEFAULT_MAX_PIXELS
from ferkd_data.labels.buckets import QuantileThresholds, Thresholds
from ferkd_data.labels.statistics import Count, Statistics

MAX_CROPS, MAX_TOP_K = 10**6, 1000
"""Bounds on the lists of one image, within the limits of Parquet and of memory."""
MAX_CLASSES = 2**24
"""Ranking keeps 24 bits for the class."""
IMAGE_BYTES, CROP_BYTES = 32, 12
"""Bytes in memory of an image's digest, sizes, target and short key; of a crop's box, flip, bucket and target_prob."""
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 1024
"""Bytes of a file's name, and of a path, that every file system and object store accepts."""
UNKNOWN_SHA256 = "0" * 64
"""Digest where none is known, such as that of a teacher whose labels were imported."""
PIXELS = "decoded raster, converted to RGB; EXIF orientation ignored"

RECORDED_OPERATIONS = "recorded-operations-1"
"""Name in `requires`: crops have recorded operations, by version 1 of the list in docs/format.md."""
CROP_KINDS = "crop-kinds-1"
"""Name in `requires`: the crops of an image are of several kinds, which are not meant to be mixed at one size."""

Layout = Literal["parquet", "webdataset"]
DEFAULT_CROPS_PER_BLOCK = 50
DEFAULT_IMAGES_PER_SHARD: dict[Layout, int] = {"parquet": 4096, "webdataset": 1024}
"""Shapes of the files that builds, imports and merges write, unless the user says otherwise."""


def _inside(path: str) -> str:
    # Not through pathlib, which took half of the time to open a manifest of 25,000 shards.
    names = path.split("/")
    if not {"", ".", ".."}.isdisjoint(names) or not {"\\", "\0", ":"}.isdisjoint(path):
        raise ValueError(f"{path!r} is not a path inside the label set")
    # A character takes at most 4 bytes.
    if 4 * len(path) > MAX_NAME_BYTES:
        sizes = [len(name.encode("utf-8", "replace")) for name in names]
        if max(sizes) > MAX_NAME_BYTES or sum(sizes) + len(sizes) > MAX_PATH_BYTES:
            raise ValueError(f"a path of {len(path)} characters is longer than file systems take ({path[:40]!r}...)")
    return path


def _not_hidden(path: str) -> str:
    if path.startswith(".") or "/." in path:
        raise ValueError(f"{path!r} has a name that begins with a dot, as unfinished and hidden files have")
    return path


def _is_shard(path: str) -> str:
    if not path.startswith(("labels/", "shards/")) or not path.endswith((".parquet", ".tar")):
        raise ValueError(f"{path!r} is not a path for shard files (labels/*.parquet, shards/*.tar)")
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
    """Size of the file."""
    sha256: Sha256
    """SHA-256 of the file."""


class BlockEntry(FileEntry):
    path: Annotated[RelativePath, AfterValidator(_is_shard), AfterValidator(_not_hidden)]
    block: Count
    """Crop block: crops block * crops_per_block and up (always 0 in layout webdataset)."""


class ShardEntry(Record):
    index: Count
    """Number of the shard: 0, 1, 2, ... in the order of the list."""
    rows: Count
    """Images in this shard; the same in each of its blocks. A shard of 0 rows has no files."""
    files: tuple[BlockEntry, ...]
    """One file per crop block, in any order."""


class TeacherEntry(Record):
    spec: str
    """Kind, name, checkpoint and options of the teacher, as the build was given them."""
    name: str
    """Name to show."""
    digest: Sha256
    """SHA-256 over the weights, buffers and hyperparameters of the model, or over its files."""
    num_classes: Annotated[int, Field(ge=1)]
    """Number of outputs."""
    size: Annotated[int, Field(ge=1)]
    """Side of the square input in pixels."""
    interpolation: Literal["bilinear", "bicubic"]
    """Filter that resized the crops to `size`."""
    mean: tuple[float, float, float]
    """Mean of R, G and B that was subtracted, in units of pixel values scaled to 0..1."""
    std: tuple[float, float, float]
    """Divisor of R, G and B after that, in the same units."""
    weight: Annotated[float, Field(gt=0)]
    """Weight in the ensemble, relative to the other teachers."""
    temperature: Annotated[float, Field(gt=0)]
    """Divisor of the logits."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Number format in which the teacher ran."""

    def identity(self) -> dict[str, Any]:
        """Return what decides on the teacher's labels: every known field but those that only say how it was named."""
        known = set(TeacherEntry.model_fields) - {"spec", "name"}
        return {name: value for name, value in self.model_dump(mode="json").items() if name in known}


class CropDistributionEntry(Record):
    scale: tuple[float, float]
    """Smallest and largest area of a crop, as a share of the image's area."""
    ratio: tuple[float, float]
    """Smallest and largest aspect ratio, width / height."""
    hflip: Probability
    """Probability of a flip."""

    @classmethod
    def of(cls, distribution: CropDistribution) -> CropDistributionEntry:
        return cls(**asdict(distribution))

    def settings(self) -> CropDistribution:
        """Return the settings that crops are drawn with. Raises UsageError for impossible ones."""
        return CropDistribution(scale=self.scale, ratio=self.ratio, hflip=self.hflip)


class CropKindEntry(Record):
    name: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
    """Name of the kind."""
    crops: Annotated[int, Field(ge=1, le=MAX_CROPS)]
    """Crops of this kind that each image has; kinds take the crop numbers in the order of the list."""
    size: Annotated[int, Field(ge=1, le=MAX_SIZE)]
    """Side in pixels that a student gets these crops in unless the training says otherwise."""
    scale: tuple[float, float]
    """Smallest and largest area of a crop, as a share of the image's area."""
    ratio: tuple[float, float]
    """Smallest and largest aspect ratio, width / height."""
    hflip: Probability
    """Probability of a flip."""

    @classmethod
    def of(cls, kind: CropKind) -> CropKindEntry:
        return cls(name=kind.name, crops=kind.crops, size=kind.size, **asdict(kind.distribution))

    def kind(self) -> CropKind:
        """Return the kind as builds and readers use it. Raises UsageError for an impossible distribution."""
        drawn = CropDistribution(scale=self.scale, ratio=self.ratio, hflip=self.hflip)
        return CropKind(name=self.name, crops=self.crops, size=self.size, distribution=drawn)


class ThresholdsEntry(Record):
    low: Probability
    """Below this, a crop is extreme_hard."""
    mid: Probability
    """From low and below this, moderate_hard."""
    top: Probability
    """From mid and below this, hard_positive; from this on, easy_positive."""
    confidence: Literal["max", "target"]
    """Value that is compared: the largest probability, or that of the ground truth."""
    quantile: tuple[float, float, float] | None = None
    """The shares asked for, where low, mid and top were derived from shares."""

    @classmethod
    def of(cls, thresholds: Thresholds, asked: Thresholds | QuantileThresholds | None = None) -> ThresholdsEntry:
        """Record the thresholds of the buckets, and the shares `asked` for where they were derived from shares."""
        quantile = (asked.low, asked.mid, asked.top) if isinstance(asked, QuantileThresholds) else None
        return cls(**asdict(thresholds), quantile=quantile)

    def absolute(self) -> Thresholds:
        """Return the thresholds that the stored buckets follow. Raises UsageError where they are not in order."""
        return Thresholds(low=self.low, mid=self.mid, top=self.top, confidence=self.confidence)


class SourceEntry(Record):
    description: str
    """Words that name the source, without its path."""
    images_seen: Count
    """Labelled and rejected images together."""
    plan_sha256: Sha256
    """Digest of the keys and targets in their order; after an extension, of the digest before and what was added."""
    place_sha256: Sha256 | None = None
    """Digest of where the images were, so that a build that is run again knows its source without saying where."""
    class_folders: tuple[str, ...] | None = None
    """The class folder, or the text of a label, of each class, where the build numbered the classes by these."""
    classes_sha256: Sha256 | None = None
    """Digest of the list of classes (folders and names) that the build was given; null where it was given none."""
    left_out: dict[str, Count] | None = None
    """Files met beside the images, by the reason why they are none; a reason with a dot is a file name extension."""


class RejectsEntry(FileEntry):
    path: Annotated[RelativePath, Field(pattern=r"\.parquet$"), AfterValidator(_not_hidden)]
    rows: Count
    """Number of rejected images."""


class CreatedBy(Record):
    name: str
    """Program that wrote the label set."""
    version: str
    """Its version."""


class Manifest(Record):
    format: Literal["ferkd-data"] = "ferkd-data"
    """Always this text; a writer must give it."""
    version: Literal[1] = 1
    """Version of the format; a writer must give it."""
    created_by: CreatedBy
    """Program that wrote the label set."""
    layout: Layout
    """Kind of the shard files."""
    num_images: Count
    """Images with labels, in all shards together."""
    num_crops: Annotated[int, Field(ge=1, le=MAX_CROPS)]
    """Crops per image, N."""
    crops_per_block: Annotated[int, Field(ge=1, le=MAX_CROPS)]
    """Crops in one block file of layout parquet; the last block of an image may have fewer."""
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K)]
    """Classes kept per crop, k."""
    num_classes: Annotated[int, Field(ge=1, le=MAX_CLASSES)]
    """Number of classes, C."""
    class_names: tuple[str, ...] | None = None
    """Name of each class, in the order of the class numbers."""
    seed: int
    """Seed that drew the crops; 0 where they were drawn elsewhere and imported."""
    crop_distribution: CropDistributionEntry
    """Distribution of all crops; where there are crop kinds, what the build gave them as defaults."""
    crop_kinds: Annotated[tuple[CropKindEntry, ...], Field(min_length=1, max_length=MAX_KINDS)] | None = None
    """Kinds of crops, each a range of crop numbers; absent where all crops are of one distribution."""
    augmentations: Annotated[tuple[str, ...], Field(min_length=1, max_length=16)] | None = None
    """Augmentations that were drawn and recorded with each crop, in order; absent where there are none."""
    requires: tuple[str, ...] | None = None
    """Extensions that a reader must know to read this label set; it must refuse a name that it does not know."""
    pixels: str = PIXELS
    """How boxes refer to the pixels of an image, in words."""
    teachers: Annotated[tuple[TeacherEntry, ...], Field(min_length=1)]
    """Teachers of the ensemble."""
    ensemble: Literal["mean", "logits", "geometric"]
    """What the ensemble averages: probabilities, logits, or logarithms of probabilities."""
    thresholds: ThresholdsEntry
    """Thresholds of the stored buckets."""
    max_pixels: Annotated[int, Field(ge=1)] | None = None
    """Images with more pixels were rejected."""
    images_per_shard: Annotated[int, Field(ge=1)] | None = None
    """As the build was asked for; the last shard may have fewer."""
    source: SourceEntry
    """Images that were labelled."""
    shards: tuple[ShardEntry, ...]
    """Shards with their files."""
    rejects: RejectsEntry
    """Table of the rejected images."""
    statistics: Statistics
    """Counts over all crops."""

    @property
    def kinds(self) -> tuple[CropKind, ...]:
        """The crop kinds; empty where all crops are of one distribution."""
        return tuple(entry.kind() for entry in self.crop_kinds or ())

    @property
    def origin(self) -> Literal["build", "import", "merge", "later kind"]:
        """Where the labels come from: "later kind" is a crop kind pulled alone whose crop numbers do not begin at 0.

        Only of "build" do seed, settings and teachers give the same crops and labels again.
        """
        extra = self.model_extra or {}
        pulled: Any = extra.get("pulled_from")
        if "imported_from" in extra:
            return "import"
        if "merged_from" in extra:
            return "merge"
        return "later kind" if isinstance(pulled, dict) and pulled.get("first_crop") else "build"

    @property
    def operation_words(self) -> int:
        """W: uint16 words of recorded operations of each crop (see `augment.Operations.pack`); 0 without any."""
        return num_words(parse_augmentations(self.augmentations or ()))

    @property
    def pixel_limit(self) -> int:
        """Most pixels of a labelled image: `max_pixels`, or a build's default where the manifest has none."""
        return self.max_pixels or DEFAULT_MAX_PIXELS

    @property
    def num_blocks(self) -> int:
        """Number of crop blocks of a shard."""
        return 1 if self.layout == "webdataset" else -(-self.num_crops // self.crops_per_block)

    def block_crops(self, block: int) -> int:
        """Return the number of crops in a block; the last one may be short."""
        if self.layout == "webdataset":
            return self.num_crops
        return min(self.crops_per_block, self.num_crops - block * self.crops_per_block)

    @property
    def row_bytes(self) -> int:
        """Bytes that the labels of one image take in memory, all its crops together."""
        # A float16 and an index.
        per_class = 2 + (2 if self.num_classes <= 65536 else 4)
        per_crop = CROP_BYTES + self.top_k * per_class + 2 * self.operation_words
        return IMAGE_BYTES + self.num_crops * per_crop

    def to_json(self) -> str:
        return self.model_dump_json(indent=1, exclude_none=True) + "\n"


def check_limits(
    *,
    crops: int | None = None,
    crops_per_block: int | None = None,
    top_k: int | None = None,
    num_classes: int | None = None,
) -> None:
    """Raise UsageError for a number that no label set can hold. None stands for one that was not given.

    Call it before anything is written: the manifest, which comes last, would be refused after all the work.
    """
    for name, number, most in (
        ("crops", crops, MAX_CROPS),
        ("crops_per_block", crops_per_block, MAX_CROPS),
        ("top_k", top_k, MAX_TOP_K),
        ("num_classes", num_classes, MAX_CLASSES),
    ):
        if number is not None and number > most:
            raise UsageError(f"{name} must be at most {most:,}, the limit of the format; got {number:,}")
