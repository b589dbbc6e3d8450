"""`pull`: a published label set, or its first crop blocks, or some of its shards, into a folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ferkd_data.crop_kinds import kind_starts
from ferkd_data.errors import PublishError, RemoteError, UsageError, check_at_least, renamed
from ferkd_data.exchange.card import render_card
from ferkd_data.exchange.card_facts import is_generated, recalled
from ferkd_data.exchange.signing import SIGNATURE, check_signed, read_remote_signature, require_signers
from ferkd_data.format import out_folder
from ferkd_data.format.manifest import BlockEntry, CropKindEntry, FileEntry, Manifest, ShardEntry
from ferkd_data.format.manifest_file import FILE_NAME, identity_of, parse_manifest, read_manifest, write_manifest
from ferkd_data.format.progress import OnProgress, TransferProgress
from ferkd_data.format.rejects import check_rejects
from ferkd_data.label_set import LabelSet, LocalFiles, StoredReader, VerifyLabels, read_remote_manifest
from ferkd_data.labels import statistics
from ferkd_data.labels.statistics import Statistics, shard_statistics
from ferkd_data.locks import held
from ferkd_data.remote import Remote, Retries, is_remote, open_remote, part_of
from ferkd_data.storage import (
    inside,
    label_folder,
    local_path,
    read_regular,
    remove_leftovers,
    sha256_file,
    write_atomically,
)
from ferkd_data.threads import Threads, as_they_end

README = "README.md"
BESIDE = (README, "LICENSE")
MAX_BESIDE_BYTES = 2**20
WEB_PAGE = re.compile(rb"(?i)\s*<(?:!doctype\s+html|html)\b")
"""The beginning of a page for browsers."""
LOCK = ".pull.lock"

LOOK_SECONDS = 0.5
"""Seconds between two looks at what has arrived of the files under way."""


@dataclass(frozen=True, kw_only=True)
class PullResult:
    """The label set that `pull` made."""

    out: Path
    manifest: Manifest
    fetched: int
    """Files that were transferred; the others lay there already."""
    signer: str | None = None
    """Name of the signer of the whole label set's manifest, where that was asked for."""


def pull(
    url: str,
    out: str | Path,
    *,
    crops: int | None = None,
    crop_kind: str | None = None,
    shards: Sequence[int] | None = None,
    signed_by: str | Path | None = None,
    signer: str | None = None,
    threads: int = 4,
    retries: Retries | None = None,
    on_progress: OnProgress | None = None,
    workers: int | None = None,
) -> PullResult:
    """Copy a label set from a URL or a folder into `out`, checked file by file; resumes after an interruption.

    With `crops`, only the crop blocks that hold the first so many crops of each image come (a whole number of blocks);
    with `crop_kind`, only those of one kind of crops; with `shards`, only those image shards. The smaller label set has
    a manifest of its own: counts and statistics of what it holds (without those per teacher, which only a build can
    know), and `pulled_from`.

    With `signed_by`, a file of allowed signers as OpenSSH has it, nothing is fetched unless one of them (`signer`,
    where given) signed the manifest, which names the SHA-256 of every file, also of a part. `threads` files are fetched
    at a time; `workers` is the old name of `threads`.

    >>> fd.pull(LABELS, "part", crops=2).manifest.num_crops  # a whole crop block
    3

    Raises UsageError for crops or shards that are not there, and where `out` holds anything else than a label set or an
    interrupted pull; SignatureError; PublishError when `out` holds another label set or another pull works there;
    RemoteError; LabelSetError.
    """
    threads = threads if workers is None else renamed("workers", "threads", workers)
    check_at_least(1, threads=threads)
    require_signers(signed_by, signer)
    out = label_folder(out)
    # A folder goes the way of every server, as file://, so that local pulls are checked and resumed in the same way.
    folder = None if is_remote(url) else label_folder(url).absolute()
    remote = open_remote(url if folder is None else folder.as_uri(), retries)
    # Read once: what is signed, parsed and finally written are these very bytes.
    text = read_remote_manifest(remote)
    name, signature = None, None
    if signed_by is not None:
        signature = read_remote_signature(remote)
        # Before it is parsed, and before anything else is fetched: an unsigned manifest is not even looked at.
        name = check_signed(text, signature, f"{url}/{FILE_NAME}", local_path(signed_by), signer)
    whole = parse_manifest(text, f"{url}/{FILE_NAME}")
    part = _selected(whole, url, crops, crop_kind, shards)
    with _alone(out):
        _take(out, part)
        fetched = _fetch_files(remote, out, part, threads, on_progress)
        _fetch_beside(remote, out, BESIDE[1:] if part is not whole else BESIDE, folder)
        # `_selected` returns `whole` itself where nothing is left out.
        if part is not whole:
            # It has a manifest of its own, which nobody signed, and so it needs a card of its own.
            part = _with_statistics(out, part)
            text = part.to_json().encode()
            _write_card(remote, out, part, url, identity_of(text))
        elif signature is not None:
            _write(out / SIGNATURE, signature)
        else:
            _fetch_beside(remote, out, (SIGNATURE,), folder)
        # Last: only from here on is this folder a label set (invariant 3).
        write_manifest(out, text)
        out_folder.clean(out)
    return PullResult(out=out, manifest=part, fetched=fetched, signer=name)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Lock `out`: two pulls into one folder would write to the same unfinished files."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    # A file, not the folder itself: NFS locks nothing that is not open for writing.
    lock = out / LOCK
    with held(lock, out, work="pull", refusal=PublishError):
        try:
            yield
        finally:
            # While it is still locked. Another pull that has opened it meanwhile finds that it is gone
            # (`is_still_there`).
            lock.unlink(missing_ok=True)


def _fetch_files(remote: Remote, out: Path, part: Manifest, threads: int, on_progress: OnProgress | None) -> int:
    """Fetch and check all files of the manifest; return how many were transferred."""
    # The digest is compared by `bring`; rows are read right after it, so that hashing again would find the same.
    labels = _labels_in(out, part, verify_labels="never")
    files = [(shard.index, file) for shard in part.shards for file in shard.files]
    entries: list[FileEntry] = [*(file for _, file in files), part.rejects]
    shard_of = {file.path: (shard, file.block) for shard, file in files}
    progress = TransferProgress(files_total=len(entries), bytes_total=sum(entry.bytes for entry in entries))
    report = on_progress or (lambda progress: None)
    report(progress)
    fetched = shown = 0

    def fetch(entry: FileEntry) -> bool:
        was_fetched = bring(entry)
        # The digest says that the file is the listed one; reading it checks that its labels are possible.
        if entry.path in shard_of:
            labels.block(*shard_of[entry.path])
        else:
            check_rejects(inside(out, entry.path), part.rejects.rows)
        return was_fetched

    def bring(entry: FileEntry) -> bool:
        path = inside(out, entry.path)
        # The size first, since hashing takes seconds for a large file.
        if path.exists() and path.stat().st_size == entry.bytes and sha256_file(path) == entry.sha256:
            return False
        remote.download(entry.path, path, size=entry.bytes, sha256=entry.sha256)
        return True

    # Each file is written and read by one thread; `labels` reads different blocks in each, and only this thread counts.
    with Threads(threads, thread_name_prefix="ferkd-pull") as executor:
        try:
            for ended, unfinished in as_they_end(executor, fetch, entries, ahead=2 * threads, seconds=LOOK_SECONDS):
                for entry, was_fetched in ended:
                    fetched += was_fetched
                    progress = replace(progress, files=progress.files + 1, bytes=progress.bytes + entry.bytes)
                # A file that arrived damaged is fetched again: until then, the number stands still.
                shown = max(shown, progress.bytes + sum(_arrived(out, entry) for entry in unfinished))
                report(replace(progress, bytes=shown))
        except BaseException:
            # Threads end at their next bytes, so that none writes to a file that the next pull continues.
            remote.stop()
            raise
    return fetched


def _labels_in(
    out: Path, part: Manifest, identity: str = "", *, verify_labels: VerifyLabels = "first_read"
) -> LabelSet:
    """Open a label set whose manifest is not written yet."""
    reader = StoredReader(
        files=LocalFiles(out),
        manifest=part,
        num_crops=part.num_crops,
        identity=identity,
        verify_labels=verify_labels,
    )
    return LabelSet(reader)


def _arrived(out: Path, entry: FileEntry) -> int:
    """Return the bytes that have arrived of a file: its unfinished part or, once it has its name, all."""
    path = inside(out, entry.path)
    # The unfinished file first: it takes its final name between two looks, and is then found by that.
    for candidate in (part_of(path), path):
        with suppress(FileNotFoundError):
            return min(candidate.stat().st_size, entry.bytes)
    return 0


@dataclass(frozen=True)
class _Blocks:
    """The crop blocks that a part has of every shard."""

    first: int
    count: int
    crops: int
    """Crops of each image in these blocks."""
    kind: CropKindEntry | None = None
    """Their kind, where the part is one kind of crops."""
    first_crop: int = 0
    """The number that the part's first crop has in the whole label set."""

    def of(self, files: Sequence[BlockEntry]) -> tuple[BlockEntry, ...]:
        """Return these blocks out of a shard's files, numbered from 0."""
        chosen = files[self.first : self.first + self.count]
        return tuple(file.model_copy(update={"block": number}) for number, file in enumerate(chosen))


def _kind_blocks(whole: Manifest, url: str, name: str) -> _Blocks:
    """Return the crop blocks of one kind. Raises UsageError where the label set has no files for it alone."""
    for entry, start in zip(whole.crop_kinds or (), kind_starts(whole.kinds), strict=True):
        if entry.name == name:
            if whole.layout == "webdataset" and len(whole.kinds) > 1:
                raise UsageError(
                    f"{url}: layout webdataset keeps all crops of an image in one file; pull it without crop_kind "
                    "(--crop-kind), and choose with labels.crop_kind(NAME)"
                )
            # A tar holds all crops of its images: one block.
            per_block = whole.crops_per_block if whole.layout == "parquet" else whole.num_crops
            count = -(-entry.crops // per_block)
            return _Blocks(start // per_block, count, entry.crops, kind=entry, first_crop=start)
    there = ", ".join(kind.name for kind in whole.kinds) or "none: it was built without"
    raise UsageError(f"{url}: has no crop kind {name!r}; its crop kinds are {there}")


def _first_blocks(whole: Manifest, url: str, crops: int | None) -> _Blocks:
    """Return the crop blocks that hold the first `crops` crops. Raises UsageError where no files hold them alone."""
    blocks, num_crops = whole.num_blocks, whole.num_crops
    if crops is not None:
        if len(whole.kinds) > 1:
            raise UsageError(
                f"{url}: has crops of the kinds {', '.join(kind.name for kind in whole.kinds)}; choose one of them "
                "with crop_kind (--crop-kind) in place of crops"
            )
        if not 1 <= crops <= whole.num_crops:
            raise UsageError(f"{url}: crops must be 1..{whole.num_crops} (what was labelled), got {crops}")
        if whole.layout == "webdataset" and crops != whole.num_crops:
            raise UsageError(
                f"{url}: layout webdataset has no crop blocks; pull it without --crops, or pull a parquet set"
            )
        # Rounded up to whole blocks: files come as they were published, with the digests that the manifest names.
        blocks = -(-crops // whole.crops_per_block) if whole.layout == "parquet" else 1
        num_crops = min(whole.num_crops, blocks * whole.crops_per_block) if whole.layout == "parquet" else num_crops
    # A label set with a single kind: the part has fewer crops of it.
    kinds = whole.crop_kinds or ()
    kind = kinds[0].model_copy(update={"crops": num_crops}) if len(kinds) == 1 else None
    return _Blocks(0, blocks, num_crops, kind=kind)


def _selected(
    whole: Manifest, url: str, crops: int | None, crop_kind: str | None, shards: Sequence[int] | None
) -> Manifest:
    """Return the manifest of the part, with the statistics of the whole for now; `whole` itself for everything."""
    if crops is not None and crop_kind is not None:
        raise UsageError("crops (--crops) and crop_kind (--crop-kind) exclude each other")
    blocks = _first_blocks(whole, url, crops) if crop_kind is None else _kind_blocks(whole, url, crop_kind)
    wanted = range(len(whole.shards)) if shards is None else sorted(set(shards))
    if shards is not None and not wanted:
        raise UsageError(f"{url}: shards is empty; leave it out for all {len(whole.shards)}")
    if any(not 0 <= shard < len(whole.shards) for shard in wanted):
        raise UsageError(f"{url}: shards are 0..{len(whole.shards) - 1}, got {wanted[0]}..{wanted[-1]}")
    # Everything: the manifest stays byte for byte, and so do identity and signature.
    if blocks.count == whole.num_blocks and len(wanted) == len(whole.shards):
        return whole
    kept = tuple(
        ShardEntry(index=index, rows=whole.shards[shard].rows, files=blocks.of(whole.shards[shard].files))
        # Numbered anew from 0, as the format demands; files keep their names, which mean nothing by themselves.
        for index, shard in enumerate(wanted)
    )
    rows = sum(shard.rows for shard in kept)
    changes = {
        "num_images": rows,
        "num_crops": blocks.crops,
        "crop_kinds": whole.crop_kinds if blocks.kind is None else (blocks.kind,),
        "shards": kept,
        "source": whole.source.model_copy(update={"images_seen": rows + whole.rejects.rows}),
        "pulled_from": {
            "url": url,
            "images": whole.num_images,
            "crops": whole.num_crops,
            "shards": list(wanted),
            **({"first_crop": blocks.first_crop} if blocks.first_crop else {}),
        },
    }
    return whole.model_copy(update=changes)


def _take(out: Path, part: Manifest) -> None:
    """Take the folder, which is locked: an empty one, or one of this label set, whole or not."""
    if (out / FILE_NAME).exists():
        there = read_manifest(out)
        # Files and digests decide. The same part pulled from another URL may go on here.
        if there.shards != part.shards or there.rejects != part.rejects:
            raise PublishError(f"{out}: holds another label set; pull into another folder, or remove it first")
    else:
        out_folder.begin_pull(out, lock=LOCK)
    # What a killed pull had begun to write; its unfinished downloads have other names, and are gone on with.
    listed = {inside(out, file.path).parent for shard in part.shards for file in shard.files}
    for folder in sorted({out, *listed}):
        remove_leftovers(folder, below=False)


def _with_statistics(out: Path, part: Manifest) -> Manifest:
    part = part.model_copy(update={"statistics": Statistics()})
    labels = _labels_in(out, part)
    counted = statistics.add(map(shard_statistics, labels.shards()))
    return part.model_copy(update={"statistics": counted})


def _write_card(remote: Remote, out: Path, part: Manifest, url: str, identity: str) -> None:
    """Write a card that describes the part, with the fields of the published card where that was generated."""
    card = _read_beside(remote, README)
    if card is None:
        return
    # A card is text for people: bytes that are no UTF-8 must not stop a pull.
    published = card.decode("utf-8", "replace")
    labels = _labels_in(out, part, identity)
    fields, _ = recalled(published)
    # Of a folder, the name alone: a path is no address.
    shown = url if is_remote(url) else Path(url).resolve().name
    unknown = f"see the card of {shown}"
    fields = replace(
        fields,
        name=fields.name or f"A part of {shown}",
        license=fields.license or unknown,
        image_license=fields.image_license or (unknown if part.layout == "webdataset" else None),
        # The hub wants a name for `other`, and a published card may be somebody's own text without fields.
        license_name=fields.license_name or ("see-the-whole" if fields.license == "other" else None),
    )
    _write_beside(out, README, render_card(labels, fields, url).encode())


def _fetch_beside(remote: Remote, out: Path, names: Sequence[str], folder: Path | None) -> None:
    """Fetch the card, the licence and so on, where they exist."""
    for name in names:
        if folder is not None:
            # In a stranger's folder they may be links to files of ours, and what is pulled may be published again.
            inside(folder, name)
        data = _read_beside(remote, name)
        if data is not None:
            _write_beside(out, name, data)


def _read_beside(remote: Remote, name: str) -> bytes | None:
    """Read a published file that the manifest does not list; None where there is none."""
    try:
        data = remote.read(name, max_bytes=MAX_BESIDE_BYTES)
    except RemoteError as error:
        if error.status != 404:
            raise
        return None
    # Some servers answer every address, with their start page where there is no such file.
    return None if WEB_PAGE.match(data) else data


def _write_beside(out: Path, name: str, data: bytes) -> None:
    """Write the card, the licence or the signature; a text of the user's own in a label set's folder stays."""
    path = out / name
    if name != SIGNATURE and path.exists() and (out / FILE_NAME).exists():
        there = read_regular(path, MAX_BESIDE_BYTES).decode("utf-8", "replace")
        # `publish` sends such a text in place of a card: it is meant to stay.
        if not (name == README and is_generated(there)):
            return
    _write(path, data)


def _write(path: Path, data: bytes) -> None:
    with write_atomically(path) as aside:
        aside.write_bytes(data)
