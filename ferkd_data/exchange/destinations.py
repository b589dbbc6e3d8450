"""Destinations of label sets: finding what is there already, and sending what is not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ferkd_data.errors import UsageError
from ferkd_data.exchange.hub import FileToSend, Hub
from ferkd_data.exchange.threads import Threads, as_they_end
from ferkd_data.remote import Remote, Retries, open_remote
from ferkd_data.storage import default_cache_dir, remove_leftovers


class Destination(Protocol):
    """A folder, store or repository that the files of one label set are sent to."""

    def missing(self, files: Sequence[FileToSend]) -> list[FileToSend]:
        """Return the files that are not there with the right digest. Raises RemoteError."""

    def send(self, files: Sequence[FileToSend], *, instead_of: Sequence[str] = ()) -> Iterator[FileToSend]:
        """Send files, and yield each once it has arrived. Raises RemoteError, also when another digest arrived.

        Files named by `instead_of` are removed before any of `files` can be seen there.
        """

    def would_replace(self) -> list[str]:
        """Return the names of files seen by `missing` that `send` would replace, if no publish of ours put them there.

        Empty where an interrupted publish is known, and where old versions of all files are kept.
        """

    def finish(self) -> None:
        """Forget what was remembered for a resume: everything has been sent."""


def open_target(url: str, retries: Retries | None = None) -> Remote:
    """Return the folder at a destination, for reading. Raises UsageError for one that cannot be written to."""
    if "://" in url:
        # First, so that no message shows credentials that stand in a URL.
        target = open_remote(url, retries)
        if url.partition("://")[0] in ("http", "https"):
            raise UsageError(f"{url}: HTTP servers are read only here; publish to a folder, s3://, gs:// or hf://")
        return target
    if Path(url).is_file():
        raise UsageError(f"{url}: is a file; give a folder")
    return open_remote(Path(url).absolute().as_uri(), retries)


def open_destination(target: Remote, identity: str, threads: int) -> Destination:
    """Open a destination for the label set of this identity. Raises UsageError, MissingExtraError."""
    if target.url.startswith("hf://"):
        return Hub(target.url, threads)
    return Store(target, identity, threads)


class Store:
    """A folder or an object store: every file is read back and its digest compared."""

    def __init__(self, target: Remote, identity: str, threads: int) -> None:
        self._target, self._threads = target, threads
        self._journal = _Journal(identity, target.url)
        self._folders: set[str] = set()
        """Folders below the destination that files were sent to, or are there."""
        self._others: list[str] = []
        """Names of files that are there with other bytes, in the order of `missing`."""

    def missing(self, files: Sequence[FileToSend]) -> list[FileToSend]:
        self._folders |= {file.name.rpartition("/")[0] for file in files}
        return [file for file in files if not self._holds(file)]

    def would_replace(self) -> list[str]:
        return [] if self._journal.was_there else self._others

    def send(self, files: Sequence[FileToSend], *, instead_of: Sequence[str] = ()) -> Iterator[FileToSend]:
        """Send several files at a time; the first failure ends it."""
        # First of all: it says that what lies there from now on was put there by `publish`.
        self._journal.begin()
        for name in instead_of:
            # Before any thread starts: the old manifest must be gone when the first new file can be seen.
            self._target.remove(name)

        def send(file: FileToSend) -> None:
            self._target.upload(file.file, file.name, size=file.bytes, sha256=file.sha256)

        # Threads only send; this generator alone writes the journal, after the digest of a file was compared.
        with Threads(self._threads, thread_name_prefix="ferkd-publish") as executor:
            for sent, _ in as_they_end(executor, send, files, ahead=2 * self._threads):
                for file, _ in sent:
                    self._journal.add(file)
                    yield file

    def finish(self) -> None:
        if self._target.url.startswith("file://"):
            # A killed publish leaves the file that it was writing under another name.
            root = Path(url2pathname(urlsplit(self._target.url).path))
            for folder in sorted(self._folders):
                remove_leftovers(root / folder, below=False)
        self._journal.remove()

    def _holds(self, file: FileToSend) -> bool:
        size = self._target.size(file.name)
        if size is None:
            return False
        if size == file.bytes and (
            self._journal.holds(file) or self._target.holds(file.name, size=size, sha256=file.sha256)
        ):
            return True
        self._others.append(file.name)
        return False


class _Journal:
    """The files of a label set that have been read back from a destination; after a kill they need not be read again.

    Each destination has one. It is begun anew for another label set, which may have overwritten files noted here.
    """

    def __init__(self, identity: str, url: str) -> None:
        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        self._path = default_cache_dir() / "publish" / f"{name}.txt"
        self._identity = identity
        # The first word is the label set's identity; after another set was sent, nothing here holds any more.
        self.was_there = self._path.exists()
        """An interrupted publish, of this label set or another one, has sent files to this destination."""
        noted = self._path.read_text().split() if self.was_there else []
        self._arrived = set(noted[1:]) if noted[:1] == [identity] else set()

    def holds(self, file: FileToSend) -> bool:
        return file.sha256 in self._arrived

    def begin(self) -> None:
        """Begin the journal, before the first file is sent."""
        if not self._arrived:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(f"{self._identity}\n")

    def add(self, file: FileToSend) -> None:
        self._arrived.add(file.sha256)
        with self._path.open("a") as stream:
            # A line that a kill cuts short matches no digest, and that file is read back again.
            stream.write(f"{file.sha256}\n")

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
