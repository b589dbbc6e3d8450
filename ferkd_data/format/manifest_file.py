"""Read, check and write `manifest.json`.

A manifest comes from strangers, and readers trust what it says. So more is checked than its fields: that it costs no
more to parse than its label files justify, that all counts add up, and that the labels can be in files of the listed
sizes. An unknown version is an error.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ferkd_data.augment.distribution import parse_augmentations
from ferkd_data.crop_kinds import fits_blocks, make_crop_kinds
from ferkd_data.errors import LabelSetError, ManifestError, UsageError
from ferkd_data.format.manifest import CROP_KINDS, RECORDED_OPERATIONS, Manifest
from ferkd_data.storage import read_regular, write_atomically

FILE_NAME = "manifest.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 200 * 2**20
"""A manifest above this is refused unread: 1 billion images with 200 crops in 4 blocks need 188 MB."""
FREE_MANIFEST_BYTES, BYTES_PER_FILE = 2**25, 256
"""Bytes that a manifest may have, and bytes for each file with a digest that it lists (ours takes 193). So the cost of
parsing a manifest is bounded by its label files, not by its padding."""
LISTED_FILE = re.compile(rb'"sha256"\s*:\s*"[0-9a-f]{64}"')
FREE_TOKENS, BYTES_PER_TOKEN, BYTES_PER_BRACKET = 250_000, 8, 40
"""Brackets, commas and colons that a manifest may have, in all and for its bytes: JSON of these alone takes 30 times
its size in memory. In a manifest without any white space they are one byte in 10, opening brackets one in 60."""
FREE_BYTES, MAX_EXPANSION = 2**26, 100
"""Bytes that labels may take in memory: a fixed number, and a multiple of the files' bytes (2 to 20 in builds)."""
REJECT_BYTES = 32
KNOWN_REQUIREMENTS = (RECORDED_OPERATIONS, CROP_KINDS)


def parse_manifest(text: str | bytes, where: str) -> Manifest:
    """Parse and check a manifest. Raises ManifestError that names the first field at fault."""
    if len(text) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{where}: {len(text)} bytes is more than a manifest may have ({MAX_MANIFEST_BYTES})")
    data = text.encode() if isinstance(text, str) else text
    # In this order: cost before parsing, the version before fields that another version may have, then the contents.
    _check_cost(data, where)
    _check_version(data, where)
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ManifestError(f"{where}: field {field or '(top)'}: {first['msg']}") from error
    _check_whole(manifest, where)
    _check_proportions(manifest, where)
    return manifest


class _Head(BaseModel):
    """The fields by which a JSON file is recognised as a manifest; all others are ignored."""

    format: Any = None
    version: Any = None
    requires: Any = None


def _check_cost(data: bytes, where: str) -> None:
    """Raise ManifestError for JSON that would take far more memory than a manifest of its size."""
    brackets = data.count(b"[") + data.count(b"{")
    tokens = brackets + data.count(b",") + data.count(b":")
    tokens_allowed, brackets_allowed = (
        FREE_TOKENS + len(data) // each for each in (BYTES_PER_TOKEN, BYTES_PER_BRACKET)
    )
    if len(data) > FREE_MANIFEST_BYTES:
        files = sum(1 for _ in LISTED_FILE.finditer(data))
        if len(data) > FREE_MANIFEST_BYTES + BYTES_PER_FILE * files:
            raise ManifestError(f"{where}: {len(data)} bytes are out of proportion for a manifest of {files} files")
    if tokens > tokens_allowed or brackets > brackets_allowed:
        raise ManifestError(f"{where}: {tokens} brackets, commas and colons in {len(data)} bytes are no manifest")


def _check_version(data: bytes, where: str) -> None:
    try:
        head = _Head.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] != "json_invalid":
            raise ManifestError(f"{where}: not the manifest of a ferkd-data label set") from error
        raise ManifestError(f"{where}: not JSON ({first['msg']}); was the file cut short?") from error
    if head.format != "ferkd-data":
        raise ManifestError(f"{where}: not the manifest of a ferkd-data label set")
    # In Python true equals 1.
    if isinstance(head.version, bool) or head.version != FORMAT_VERSION:
        raise ManifestError(
            f"{where}: format version {str(head.version)[:40]!s} is not known to this ferkd-data, which reads version "
            f"{FORMAT_VERSION}; upgrade with: pip install -U ferkd-data"
        )
    required = head.requires if isinstance(head.requires, list) else []
    unknown = [name for name in required if name not in KNOWN_REQUIREMENTS]
    if unknown:
        raise ManifestError(
            f"{where}: this label set requires {str(unknown[0])[:40]!r}, which this ferkd-data does not know; upgrade "
            "with: pip install -U ferkd-data"
        )


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder. Raises ManifestError when it holds no finished label set."""
    return parse_manifest(read_manifest_bytes(folder), str(folder / FILE_NAME))


def read_manifest_bytes(folder: Path) -> bytes:
    """Read the manifest's bytes, unparsed. Raises ManifestError when there is none."""
    path = folder / FILE_NAME
    try:
        return read_regular(path, MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        if folder.is_file():
            raise ManifestError(f"{folder}: is a file; give the folder of a label set") from error
        raise ManifestError(f"{folder}: no {FILE_NAME}; {_why_none(folder)}") from error
    except LabelSetError as error:
        raise ManifestError(str(error)) from error
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from error


def write_manifest(folder: Path, manifest: Manifest | bytes) -> None:
    """Write manifest.json, as a whole or not at all: from then on, `folder` is this label set.

    Bytes are written as they are, so that a copy has the identity and the signature of the original.
    """
    with write_atomically(folder / FILE_NAME) as aside:
        aside.write_bytes(manifest if isinstance(manifest, bytes) else manifest.to_json().encode())


def _why_none(folder: Path) -> str:
    if (folder / ".build").is_dir():
        return "its build has not finished: run the same build command to resume it"
    # `demo` and many users put the label set into a folder of this name, which is also that of a label set's shards.
    if (folder / "labels" / FILE_NAME).is_file():
        return f"did you mean {folder / 'labels'}?"
    if (folder / "labels").is_dir() or (folder / "shards").is_dir():
        return (
            "was a publish, pull, convert or merge interrupted here? They write it last: run the same command again to "
            "finish"
        )
    return "is this the folder that a build wrote?"


def _check_paths(paths: list[str], where: str) -> None:
    """Raise ManifestError for files that would overwrite each other, also on case-insensitive file systems."""
    # Case-insensitive file systems (macOS) would write one file over the other.
    folded = [path if path.islower() else path.lower() for path in paths]
    if len(set(folded)) < len(folded):
        twice = next(path for path, count in Counter(folded).items() if count > 1)
        raise ManifestError(f"{where}: lists the file {twice!r} twice")
    folders = {path.rpartition("/")[0] for path in folded}
    folders |= {"/".join(folder.split("/")[:depth]) for folder in folders for depth in range(1, folder.count("/") + 1)}
    both = folders.intersection(folded)
    if both:
        raise ManifestError(f"{where}: {min(both)!r} is a file and a folder")


def identity_of(manifest: bytes) -> str:
    """Return the identity of the label set with this manifest.json: its SHA-256, 64 hex digits."""
    return hashlib.sha256(manifest).hexdigest()


def _check_proportions(manifest: Manifest, where: str) -> None:
    """Raise ManifestError for labels that cannot be in files of the sizes that the manifest itself lists.

    Readers reserve memory and disk by these claims before they have read a byte.
    """
    listed = sum(file.bytes for shard in manifest.shards for file in shard.files)
    decoded = manifest.num_images * manifest.row_bytes
    if decoded > FREE_BYTES + MAX_EXPANSION * listed:
        raise ManifestError(
            f"{where}: {manifest.num_images} images with {manifest.num_crops} crops and {manifest.top_k} classes each "
            f"take {decoded} bytes, which cannot be in label files of {listed} bytes"
        )
    rejects = manifest.rejects
    if rejects.rows * REJECT_BYTES > FREE_BYTES + MAX_EXPANSION * rejects.bytes:
        raise ManifestError(f"{where}: {rejects.rows} rejects cannot be in a file of {rejects.bytes} bytes")
    if manifest.top_k > manifest.num_classes:
        raise ManifestError(f"{where}: top_k is {manifest.top_k}, and there are {manifest.num_classes} classes")


def _check_augmentations(manifest: Manifest, where: str) -> None:
    try:
        # Parsed here, since readers take the number of a crop's operations from these texts.
        parse_augmentations(manifest.augmentations or ())
    except UsageError as error:
        raise ManifestError(f"{where}: {error}") from error
    if (manifest.augmentations is not None) != (RECORDED_OPERATIONS in (manifest.requires or ())):
        raise ManifestError(f"{where}: augmentations and requires contradict each other")


def _check_kinds(manifest: Manifest, where: str) -> None:
    try:
        kinds = make_crop_kinds(manifest.kinds)
    except UsageError as error:
        raise ManifestError(f"{where}: {error}") from error
    if bool(kinds) != (CROP_KINDS in (manifest.requires or ())):
        raise ManifestError(f"{where}: crop_kinds and requires contradict each other")
    total = sum(kind.crops for kind in kinds)
    if kinds and total != manifest.num_crops:
        raise ManifestError(f"{where}: the crop kinds have {total} crops, num_crops says {manifest.num_crops}")
    if manifest.layout == "parquet" and not fits_blocks(kinds, manifest.crops_per_block):
        raise ManifestError(f"{where}: crop blocks of {manifest.crops_per_block} hold crops of two kinds")


def _check_whole(manifest: Manifest, where: str) -> None:
    _check_augmentations(manifest, where)
    _check_kinds(manifest, where)
    rows = sum(shard.rows for shard in manifest.shards)
    if rows != manifest.num_images:
        raise ManifestError(f"{where}: the shards hold {rows} rows, num_images says {manifest.num_images}")
    # Readers index shards and blocks by their position in these lists.
    for position, shard in enumerate(manifest.shards):
        if shard.index != position:
            raise ManifestError(f"{where}: shard {shard.index} stands where shard {position} belongs")
        blocks = [file.block for file in shard.files]
        expected = range(manifest.num_blocks if shard.rows else 0)
        if len(blocks) != len(expected) or blocks != list(expected):
            raise ManifestError(
                f"{where}: shard {shard.index} has crop blocks {blocks[:10]}, expected {len(expected)}, numbered from 0"
            )
    _check_paths([manifest.rejects.path, *(file.path for shard in manifest.shards for file in shard.files)], where)
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
