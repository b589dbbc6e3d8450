"""`publish`: a label set to a folder or a store: checked, resumed, read back, the manifest last."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ferkd_data.errors import ManifestError, PublishError, RemoteError, UsageError, check_at_least, renamed
from ferkd_data.exchange.card import render_card
from ferkd_data.exchange.card_facts import HUB_NAME, CardFields, check_fields, completed, is_generated, recalled
from ferkd_data.exchange.croissant import render_croissant
from ferkd_data.exchange.destinations import Destination, FileToSend, open_destination, open_target
from ferkd_data.exchange.signing import SIGNATURE, sign
from ferkd_data.exchange.verify import verify
from ferkd_data.format.manifest import Manifest
from ferkd_data.format.manifest_file import FILE_NAME, identity_of
from ferkd_data.format.progress import OnProgress, TransferProgress
from ferkd_data.label_set import LabelSet, open_labels, read_remote_manifest
from ferkd_data.remote import Remote, Retries, is_remote
from ferkd_data.scratch import Scratch
from ferkd_data.storage import inside, local_path, read_regular, sha256_file
from ferkd_data.words import count

README, CROISSANT, LICENSE = "README.md", "croissant.json", "LICENSE"
MAX_CARD_BYTES = 2**20
HUB_FILES_PER_FOLDER, HUB_FILES = 10_000, 100_000
"""Most files of a folder, and of a repository, on the hub (from its documentation)."""
ONLY_IN_THE_CARD = ("license_name", "license_link", "image_license", "source_datasets")
"""Fields that stand in the card alone; the others are in croissant.json too."""

log = logging.getLogger("ferkd_data.exchange")


@dataclass(frozen=True, kw_only=True)
class PublishResult:
    """The files that `publish` sent."""

    url: str
    sent: tuple[FileToSend, ...]
    """Files that were sent or, in a dry run, would be; empty where all were there already."""
    skipped: int
    """Files that were there already, with the right digest."""

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.sent)


def publish(
    path: str | Path,
    url: str,
    *,
    card: CardFields | None = None,
    sign_with: str | Path | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    threads: int = 4,
    retries: Retries | None = None,
    on_progress: OnProgress | None = None,
    workers: int | None = None,
) -> PublishResult:
    """Send the label set in `path` to `url`: a folder, s3://, gs:// or hf://datasets/ORG/NAME.

    A card, Croissant metadata and a file LICENSE in `path` are sent with it. The card says what `card` says; what
    `card` leaves out is taken from the card that is published there already. A README.md in `path` that is not a
    card of ours, or was edited since, is sent in place of the generated one; one at `url` stays as long as the label
    set is the same.

    The digest of every file that arrived is compared; the manifest goes last, so nobody ever opens half a label set.
    After an interruption, what arrived is not sent again; after success, nothing is. With `overwrite`, the manifest of
    another label set is removed before anything of this one is sent. `threads` files are sent at a time; `workers` is
    the old name of `threads`.

    With `sign_with`, an OpenSSH key, the manifest is signed and the signature sent; one that lies in `path` is sent as
    it is.

    Raises UsageError for a card without a licence, and for more files than the hub takes; SignatureError; PublishError
    when the label set has faults, or the destination holds another one or somebody's files of the same names;
    RemoteError; MissingExtraError for the hub.

    >>> card = fd.CardFields(license="cc-by-4.0", author="Vision Lab")
    >>> fd.publish(LABELS, "public", card=card).url
    'public'
    >>> fd.publish(LABELS, "hf://datasets/ORG/NAME", card=card)  # doctest: +SKIP
    """
    threads = threads if workers is None else renamed("workers", "threads", workers)
    check_at_least(1, threads=threads)
    labels = open_labels(path)
    if is_remote(labels.location):
        raise UsageError(f"{path}: publish takes a folder; fetch the label set first: ferkd-data pull {path} DIR")
    target = open_target(url, retries)
    destination = open_destination(target, labels.identity, threads)
    # Refused before the label set is verified, which may take minutes.
    same = _is_there(target, labels, overwrite)
    published = _published_card(target)
    fields = _fields(labels, published, card or CardFields())
    keeps_text = same and not overwrite and _keeps_text(labels, target, published, card or CardFields(), fields)
    _warn_of_unused(labels, card or CardFields())
    if target.url.startswith("hf://"):
        check_number_of_files(labels.manifest)
    # Every file and row, before anything is sent: what is published is copied by others.
    _check(labels)
    with Scratch("publish") as scratch:
        files, manifest = _files(labels, url, fields, scratch)
        files = [file for file in files if not (keeps_text and file.name == README)]
        files += _signature(labels, sign_with, scratch)
        missing = destination.missing(files)
        if not same and not overwrite:
            _check_nothing_is_replaced(destination, target, published)
        skipped = len(files) - len(missing)
        last = () if same and not destination.missing([manifest]) else (manifest,)
        skipped += not last
        if dry_run:
            return PublishResult(url=url, sent=(*missing, *last), skipped=skipped)
        progress = TransferProgress(files_total=len(missing), bytes_total=sum(file.bytes for file in missing))
        report = on_progress or (lambda progress: None)
        report(progress)
        # Leftovers of another label set; a signature among them would stay beside an unsigned one.
        stale = [] if same else sorted({FILE_NAME, SIGNATURE} - {file.name for file in files})
        # Order is the commit protocol: old manifest away, files, new manifest.
        for file in destination.send(missing, instead_of=stale):
            progress = replace(progress, files=progress.files + 1, bytes=progress.bytes + file.bytes)
            report(progress)
        # Sends nothing where this very manifest is there already.
        list(destination.send(destination.missing([manifest])))
        destination.finish()
    return PublishResult(url=url, sent=(*missing, *last), skipped=skipped)


def _fields(labels: LabelSet, published: str | None, given: CardFields) -> CardFields:
    """Complete the card's fields from the folder's card and the published one. Raises UsageError."""
    folder = Path(labels.location)
    own = inside(folder, README)
    cards = [_read_card(own)] if own.exists() else []
    cards += [] if published is None else [published]
    fields = completed(given, cards, identity=labels.identity, folder_name=folder.resolve().name)
    check_fields(fields, labels.manifest, has_license_file=inside(folder, LICENSE).is_file())
    if given.license and not HUB_NAME.fullmatch(given.license.lower()):
        raise UsageError(
            f"licence {given.license!r}: must be an identifier of small letters, digits, dots and hyphens, such as "
            "cc-by-4.0 or mit; for another licence give --license other and --license-name"
        )
    useless = given.license_name or given.license_link
    if useless and fields.license != "other":
        raise UsageError(
            f"--license-name and --license-link describe a licence of your own, and are for --license other; the "
            f"licence is {fields.license}, which has a name and a text; leave out {useless!r}"
        )
    return fields


def _warn_of_unused(labels: LabelSet, given: CardFields) -> None:
    """Log a warning for fields that only a generated card shows, where somebody's own text is sent in its place."""
    own = inside(Path(labels.location), README)
    if not own.exists() or is_generated(_read_card(own)):
        return
    said = [name for name in ONLY_IN_THE_CARD if getattr(given, name) is not None]
    if said:
        log.warning(
            f"{own} is a text of your own and is sent as it is, so {' and '.join(said)} will be read nowhere; write it "
            "into that text, or remove the file to send the generated card"
        )


def check_number_of_files(manifest: Manifest) -> None:
    """Raise UsageError for more files than the hub takes in a repository or in one of its folders."""
    paths = [file.path for shard in manifest.shards for file in shard.files]
    folder, most = Counter(path.rpartition("/")[0] for path in paths).most_common(1)[0] if paths else ("", 0)
    blocks = manifest.num_blocks
    fewer = f"ferkd-data convert LABELS OUT --layout parquet --crops-per-block {manifest.num_crops}"
    if len(paths) > HUB_FILES:
        ways = [f"{fewer} makes one file of {blocks}"] if blocks > 1 else []
        ways.append("build --images-per-shard with a larger number makes fewer shards")
        raise UsageError(
            f"the hub takes {HUB_FILES:,} files in a repository, this label set has {len(paths):,}: {'; '.join(ways)}; "
            "S3 and Google's store have no such limit"
        )
    if most > HUB_FILES_PER_FOLDER:
        raise UsageError(
            f"the hub takes {HUB_FILES_PER_FOLDER:,} files in a folder, {folder}/ has {most:,}: {fewer} makes fewer, "
            "in several folders"
        )


def _check(labels: LabelSet) -> None:
    report = verify(labels.location)
    if not report.ok:
        raise PublishError(
            f"{labels.location}: {count(report.faults_found, 'fault')}, the first is: {report.faults[0]}; "
            f"see all with: ferkd-data verify {labels.location}"
        )


def _is_there(target: Remote, labels: LabelSet, overwrite: bool) -> bool:
    """Return whether the destination holds this very manifest. Raises PublishError where it holds another one."""
    try:
        there = identity_of(read_remote_manifest(target))
    # No manifest is there, so nobody can be using what may lie there.
    except ManifestError:
        return False
    if there != labels.identity and not overwrite:
        raise PublishError(
            f"{target.url}: holds another label set (manifest {there[:12]}, this one is {labels.identity[:12]}); "
            "publish to another place, or replace it with --overwrite"
        )
    return there == labels.identity


def _keeps_text(labels: LabelSet, target: Remote, published: str | None, given: CardFields, fields: CardFields) -> bool:
    """Return whether the published README.md is somebody's text, or a card that was edited, and stays.

    Raises PublishError for fields that it does not have: they could not be changed in it.
    """
    own = inside(Path(labels.location), README)
    sends_text = own.exists() and not is_generated(_read_card(own))
    if published is None or is_generated(published) or sends_text:
        return False
    has, _ = recalled(published)
    said = [name for name, value in asdict(given).items() if value is not None]
    changed = [name for name in said if getattr(fields, name) != getattr(has, name)]
    if changed:
        raise PublishError(
            f"{target.url}: its README.md is not the generated one, or was edited, so {changed[0]} cannot be changed "
            f"in it; put your text into {own} to send that, or replace it with a new card with --overwrite"
        )
    return True


def _check_nothing_is_replaced(destination: Destination, target: Remote, published: str | None) -> None:
    """Raise PublishError where files lie at a new destination that no publish put there, and that would be replaced."""
    others = destination.would_replace()
    # A card of ours: an interrupted publish from another host, of which nothing is noted here.
    if others and recalled(published or "")[1] is None:
        raise PublishError(
            f"{target.url}: holds {others[0]!r}, which is not of this label set; publish to another place, or replace "
            "it with --overwrite"
        )


def _published_card(target: Remote) -> str | None:
    try:
        return target.read(README, max_bytes=MAX_CARD_BYTES).decode("utf-8", "replace")
    except RemoteError as error:
        if error.status != 404:
            raise
        return None


def _read_card(path: Path) -> str:
    """Read a card. Raises LabelSetError for one that is no regular file, or too large."""
    return read_regular(path, MAX_CARD_BYTES).decode("utf-8", "replace")


def _files(labels: LabelSet, url: str, card: CardFields, scratch: Path) -> tuple[list[FileToSend], FileToSend]:
    """List the files to send: everything but the manifest, and the manifest."""
    folder, manifest = Path(labels.location), labels.manifest
    entries = [*(file for shard in manifest.shards for file in shard.files), manifest.rejects]
    listed = [
        FileToSend(name=entry.path, file=folder / entry.path, bytes=entry.bytes, sha256=entry.sha256)
        for entry in entries
    ]
    (scratch / CROISSANT).write_text(render_croissant(labels, card, url), encoding="utf-8")
    # A stranger's README.md may be a link to a file of the publisher's.
    written = inside(folder, README)
    # A card of ours is rendered anew, since counts and fields may have changed; somebody's own is sent as it is.
    if not written.exists() or is_generated(_read_card(written)):
        written = scratch / README
        written.write_text(render_card(labels, card, url), encoding="utf-8")
    beside = [_to_send(README, written), _to_send(CROISSANT, scratch / CROISSANT)]
    if inside(folder, LICENSE).exists():
        beside.append(_to_send(LICENSE, folder / LICENSE))
    return [*listed, *beside], _to_send(FILE_NAME, folder / FILE_NAME)


def _signature(labels: LabelSet, key: str | Path | None, scratch: Path) -> list[FileToSend]:
    folder = Path(labels.location)
    if key is not None:
        sign(folder / FILE_NAME, local_path(key), scratch / SIGNATURE)
        return [_to_send(SIGNATURE, scratch / SIGNATURE)]
    there = inside(folder, SIGNATURE)
    return [_to_send(SIGNATURE, there)] if there.exists() else []


def _to_send(name: str, file: Path) -> FileToSend:
    return FileToSend(name=name, file=file, bytes=file.stat().st_size, sha256=sha256_file(file))
