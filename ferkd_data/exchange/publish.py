"""`publish`: a label set to a folder or a store: checked, resumed, read back, the manifest last."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ferkd_data.errors import ManifestError, PublishError, UsageError
from ferkd_data.exchange.arguments import check_at_least
from ferkd_data.exchange.card import CardFields, render_card
from ferkd_data.exchange.croissant import render_croissant
from ferkd_data.exchange.places import open_place, open_target
from ferkd_data.exchange.sending import FileToSend
from ferkd_data.exchange.signing import SIGNATURE, sign
from ferkd_data.exchange.verify import verify
from ferkd_data.label_set import LabelSet, open_labels, read_remote_manifest
from ferkd_data.manifest import FILE_NAME, identity_of
from ferkd_data.remote import Remote, Retries, is_remote
from ferkd_data.storage import inside, sha256_file

README, CROISSANT = "README.md", "croissant.json"


@dataclass(frozen=True, kw_only=True)
class PublishResult:
    url: str
    sent: tuple[FileToSend, ...]
    """What was sent (or, in a dry run, would be)."""
    skipped: int
    """Files that were there already, with the right digest."""

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.sent)


OnSent = Callable[[int, int], None]
"""Gets (bytes sent, bytes to send)."""


def publish(
    path: str | Path,
    url: str,
    *,
    card: CardFields,
    sign_with: str | Path | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    workers: int = 4,
    retries: Retries | None = None,
    on_progress: OnSent | None = None,
) -> PublishResult:
    """Send the label set in `path` to `url`: a folder, s3://, gs:// or hf://datasets/ORG/NAME.

    With it go a card and Croissant metadata.

    The digest of every file that arrived is compared; the manifest goes last, so nobody ever opens half a label set.
    After an interruption, what arrived is not sent again. With `overwrite`, the manifest of another label set goes away
    before anything of this one comes. A README.md in `path` is sent in place of the generated card.

    With `sign_with`, an OpenSSH key, a signature of the manifest goes with it; one that lies in `path` goes as it is.

    Raises SignatureError; PublishError when the label set has faults or the place holds another label set, RemoteError,
    MissingExtraError for the hub.
    """
    check_at_least(1, workers=workers)
    labels = open_labels(path)
    if is_remote(labels.location):
        raise UsageError(f"{path}: publish takes a folder; fetch the label set first: ferkd-data pull {path} DIR")
    target = open_target(url, retries)
    place = open_place(target, labels.identity, workers)
    _check(labels)
    same = _is_there(target, labels, overwrite)
    with tempfile.TemporaryDirectory(prefix="ferkd-data-publish-") as scratch:
        files, manifest = _files(labels, url, card, Path(scratch))
        files += _signature(labels, sign_with, Path(scratch))
        missing = place.missing(files)
        skipped = len(files) - len(missing)
        if dry_run:
            return PublishResult(url=url, sent=(*missing, manifest), skipped=skipped)
        total = sum(file.bytes for file in missing)
        done = 0
        # Of another label set, or what a kill left of it: also a signature that would stay beside an unsigned set.
        stale = [] if same else sorted({FILE_NAME, SIGNATURE} - {file.name for file in files})
        for file in place.send(missing, instead_of=stale):
            done += file.bytes
            if on_progress:
                on_progress(done, total)
        list(place.send(place.missing([manifest])))
        place.finish()
    return PublishResult(url=url, sent=(*missing, manifest), skipped=skipped)


def _check(labels: LabelSet) -> None:
    report = verify(labels.location)
    if not report.ok:
        raise PublishError(
            f"{labels.location}: {report.faults_found} faults, the first is: {report.faults[0]}; see all with: "
            f"ferkd-data verify {labels.location}"
        )


def _is_there(target: Remote, labels: LabelSet, overwrite: bool) -> bool:
    """Whether the place holds this very manifest. Raises PublishError where it holds another and may not lose it."""
    try:
        there = identity_of(read_remote_manifest(target))
    except ManifestError:
        return False
    if there != labels.identity and not overwrite:
        raise PublishError(
            f"{target.url}: holds another label set (manifest {there[:12]}, this one is {labels.identity[:12]}); "
            "publish to another place, or replace it with --overwrite"
        )
    return there == labels.identity


def _files(labels: LabelSet, url: str, card: CardFields, scratch: Path) -> tuple[list[FileToSend], FileToSend]:
    """Everything but the manifest, and the manifest."""
    folder, manifest = Path(labels.location), labels.manifest
    entries = [*(file for shard in manifest.shards for file in shard.files), manifest.rejects]
    listed = [
        FileToSend(name=entry.path, file=folder / entry.path, bytes=entry.bytes, sha256=entry.sha256)
        for entry in entries
    ]
    (scratch / CROISSANT).write_text(render_croissant(labels, card, url), encoding="utf-8")
    # A stranger's README.md may be a link to a file of the publisher's.
    written = inside(folder, README)
    if not written.exists():
        written = scratch / README
        written.write_text(render_card(labels, card, url), encoding="utf-8")
    beside = [_to_send(README, written), _to_send(CROISSANT, scratch / CROISSANT)]
    return [*listed, *beside], _to_send(FILE_NAME, folder / FILE_NAME)


def _signature(labels: LabelSet, key: str | Path | None, scratch: Path) -> list[FileToSend]:
    folder = Path(labels.location)
    if key is not None:
        sign(folder / FILE_NAME, Path(key), scratch / SIGNATURE)
        return [_to_send(SIGNATURE, scratch / SIGNATURE)]
    there = inside(folder, SIGNATURE)
    return [_to_send(SIGNATURE, there)] if there.exists() else []


def _to_send(name: str, file: Path) -> FileToSend:
    return FileToSend(name=name, file=file, bytes=file.stat().st_size, sha256=sha256_file(file))
