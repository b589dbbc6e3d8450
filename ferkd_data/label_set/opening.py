"""`open_labels`: from a path or a URL to a label set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ferkd_data.errors import ManifestError, RemoteError, UsageError, check_at_least
from ferkd_data.format.manifest_file import (
    FILE_NAME,
    MAX_MANIFEST_BYTES,
    identity_of,
    parse_manifest,
    read_manifest_bytes,
)
from ferkd_data.label_set.ensemble import EnsembleReader
from ferkd_data.label_set.files import DEFAULT_BYTES, CachedFiles, Files, LocalFiles, ShardCache
from ferkd_data.label_set.label_set import LabelSet
from ferkd_data.label_set.reader import StoredReader, VerifyLabels
from ferkd_data.remote import Remote, is_remote, open_remote
from ferkd_data.storage import default_cache_dir, label_folder


def open_labels(
    path: str | Path | Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    crops: int | None = None,
    cache_dir: str | Path | None = None,
    cache_bytes: int = DEFAULT_BYTES,
    verify_labels: VerifyLabels = "first_read",
) -> LabelSet:
    """Open the label set in a folder, or at an http(s)://, s3://, gs:// or hf://datasets/ORG/NAME URL.

    With `crops`, only the first `crops` crops of each image are shown, and only the crop blocks that hold them are
    read; `LabelSet.crop_kind` does that for label sets with crop kinds. Files of a remote set are fetched when first
    needed, checked, and kept in `cache_dir` (default: $FERKD_DATA_CACHE or the user's cache folder), which holds at
    most `cache_bytes`.

    With `verify_labels="first_read"`, the SHA-256 of each file is compared with the manifest when a process first
    reads the file, so that a damaged file is an error; one that was damaged in the cache is fetched again. "never"
    trusts the disks and saves the time that hashing takes (see docs/loader.md).

    Several label sets of the same crops by different teachers are opened as their ensemble, with `weights` (default:
    the teachers' own): nothing is written, and each training run may choose its teachers.

    >>> fd.open_labels(LABELS, crops=2)
    LabelSet(..., images=4, crops=2, top_k=2)
    >>> fd.open_labels([LABELS, LABELS], weights=[2, 1]).num_crops
    5

    Raises ManifestError when there is no finished label set, RemoteError when it cannot be fetched, UsageError when it
    has fewer crops, LabelSetError when several do not hold the same crops.
    """
    check_at_least(0, crops=crops)
    if not isinstance(path, (str, Path)):
        sets = [
            open_labels(one, crops=crops, cache_dir=cache_dir, cache_bytes=cache_bytes, verify_labels=verify_labels)
            for one in path
        ]
        if not sets:
            raise UsageError("open_labels takes the path or URL of a label set, or a list of them; the list is empty")
        # A list of one is what a script with an option that may be repeated gives: no ensemble, so no merging of each
        # row.
        if len(sets) == 1 and weights is None:
            return sets[0]
        return LabelSet(EnsembleReader([labels.reader for labels in sets], weights))
    if weights is not None:
        raise UsageError("weights are for several label sets: open_labels([A, B], weights=[2, 1])")
    files: Files
    # The manifest is never cached: it is what says whether the set has changed.
    if is_remote(path):
        remote = open_remote(str(path))
        text = read_remote_manifest(remote)
        cache = ShardCache(label_folder(cache_dir or default_cache_dir()) / "shards", cache_bytes)
        files = CachedFiles(remote, cache)
    else:
        folder = label_folder(path)
        text = read_manifest_bytes(folder)
        files = LocalFiles(folder)
    # From the same bytes as the identity below, so that the two cannot be of different versions of the file.
    manifest = parse_manifest(text, f"{files.location}/{FILE_NAME}")
    if crops is not None and len(manifest.kinds) > 1:
        raise UsageError(
            f"{files.location}: has crops of the kinds {', '.join(kind.name for kind in manifest.kinds)}, so `crops` "
            "does not say of which; leave it out and choose: open_labels(...).crop_kind(NAME, crops=...)"
        )
    if crops is not None and not 1 <= crops <= manifest.num_crops:
        raise UsageError(f"{files.location}: crops must be 1..{manifest.num_crops} (what was labelled), got {crops}")
    num_crops = manifest.num_crops if crops is None else int(crops)
    identity = identity_of(text)
    return LabelSet(
        StoredReader(
            files=files, manifest=manifest, num_crops=num_crops, identity=identity, verify_labels=verify_labels
        )
    )


def read_remote_manifest(remote: Remote) -> bytes:
    """Read a published manifest. Raises ManifestError where there is none, RemoteError."""
    try:
        # Bounded, because a server may send without end.
        return remote.read(FILE_NAME, max_bytes=MAX_MANIFEST_BYTES)
    except RemoteError as error:
        # Access denied and other failures keep their own text: only this one may mean a wrong or unfinished address.
        if error.status == 404:
            folder = remote.url.rstrip("/").removesuffix(f"/{FILE_NAME}")
            if folder != remote.url.rstrip("/"):
                raise ManifestError(f"{remote.url}: is a file; give the URL of its folder, {folder}") from error
            raise ManifestError(
                f"{remote.url}: no {FILE_NAME}; is this the URL of a published label set? While one is sent, or where "
                "that was interrupted, there is none: it comes last"
            ) from error
        raise
