"""Destinations of label sets: finding what is there already, and sending what is not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ferkd_data import extras
from ferkd_data.errors import RemoteError, UsageError
from ferkd_data.remote import LOG_IN, Remote, Retries, hub_endpoint, is_remote, open_remote, parse_hub_url
from ferkd_data.storage import default_cache_dir, label_folder, remove_leftovers
from ferkd_data.threads import Threads, as_they_end

COMMIT_FILES = 500
"""Files in a commit, unless that would make more than MAX_COMMITS."""
MAX_COMMITS = 40
"""Commits of one publication, at most: the hub throttles frequent ones, so larger label sets get larger commits."""

TOGETHER = 4
"""Files in one request to the hub, for each thread."""


@dataclass(frozen=True, kw_only=True)
class FileToSend:
    """A file of a label set on this host, with its name at the destination."""

    name: str
    file: Path
    bytes: int
    sha256: str


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
    if is_remote(url):
        # First, so that no message shows credentials that stand in a URL.
        target = open_remote(url, retries)
        if url.partition("://")[0] in ("http", "https"):
            raise UsageError(f"{url}: HTTP servers are read only here; publish to a folder, s3://, gs:// or hf://")
        return target
    folder = label_folder(url).absolute()
    if folder.is_file():
        raise UsageError(f"{url}: is a file; give a folder")
    return open_remote(folder.as_uri(), retries)


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
        # Bytes that are no text, after a disk's failure, match no digest.
        noted = self._path.read_text(encoding="utf-8", errors="replace").split() if self.was_there else []
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


class Hub:
    """A data set repository, made (public) when the first file is sent to one that does not exist.

    Files are sent first and then committed together, many in few commits, so a kill loses no file that arrived: the
    next run finds it in the hub's storage. The hub states the digest of everything it holds, so nothing has to be read
    back to be compared.
    """

    def __init__(self, url: str, threads: int) -> None:
        """Raises MissingExtraError, UsageError."""
        self._url, self._address, self._threads = url, parse_hub_url(url), threads
        self._hub, self._errors, self._utils = (
            extras.require(f"huggingface_hub{part}", extra="hub", what_for="publishing to the hub")
            for part in ("", ".errors", ".utils")
        )
        self._api = self._hub.HfApi(endpoint=hub_endpoint())
        self._where = {"repo_id": self._address.repository, "repo_type": "dataset"}

    def missing(self, files: Sequence[FileToSend]) -> list[FileToSend]:
        there = self._listed()
        return [file for file in files if not _is_same(there.get(self._address.folder + file.name), file)]

    def send(self, files: Sequence[FileToSend], *, instead_of: Sequence[str] = ()) -> Iterator[FileToSend]:
        """Yield files as they arrive. Others see them from the commit on that follows each batch.

        The first of these commits removes the files of `instead_of`.
        """
        size = max(COMMIT_FILES, -(-len(files) // MAX_COMMITS))
        there = self._listed() if instead_of else {}
        gone = [name for name in instead_of if self._address.folder + name in there]
        # One commit at least where something has to go, also if every file is there already.
        for start in range(0, max(len(files), 1 if gone else 0), size):
            batch = files[start : start + size]
            yield from self._send(batch, gone if start == 0 else ())
            # Listed anew after the commit: the hub's own digests say whether what arrived is what was sent.
            lost = self.missing(batch)
            if lost:
                raise RemoteError(
                    f"{self._url}/{lost[0].name}: what arrived is not what was sent; run the same command again"
                )

    def would_replace(self) -> list[str]:
        """Return nothing: the repository's history keeps what is replaced."""
        return []

    def finish(self) -> None:
        """Do nothing: the hub itself remembers what has arrived."""

    def _send(self, batch: Sequence[FileToSend], gone: Sequence[str]) -> Iterator[FileToSend]:
        additions = [
            self._hub.CommitOperationAdd(path_in_repo=self._address.folder + file.name, path_or_fileobj=str(file.file))
            for file in batch
        ]
        revision = {"revision": self._address.revision, "num_threads": self._threads}
        with self._explained():
            # Its bars would mix with the command's own display.
            self._utils.disable_progress_bars()
            if not self._api.repo_exists(**self._where):
                self._api.create_repo(**self._where, exist_ok=True)
        together = TOGETHER * self._threads
        for start in range(0, len(batch), together):
            some = slice(start, start + together)
            with self._explained():
                # free_memory=False: the commit below takes the same objects, and must know what was uploaded.
                self._api.preupload_lfs_files(
                    self._address.repository, additions[some], repo_type="dataset", free_memory=False, **revision
                )
            yield from batch[some]
        removals = [self._hub.CommitOperationDelete(path_in_repo=self._address.folder + name) for name in gone]
        named = batch[0].name if len(batch) == 1 else f"{len(batch)} files"
        message = f"ferkd-data publish: {named}"
        with self._explained():
            # One commit removes and adds: nobody sees the repository in between.
            self._api.create_commit(
                **self._where, operations=[*removals, *additions], commit_message=message, **revision
            )

    def _listed(self) -> dict[str, Any]:
        """List the hub's entries of files by path; empty where there is no such repository or folder."""
        errors = self._errors
        absent = (errors.RepositoryNotFoundError, errors.EntryNotFoundError)
        with self._explained():
            try:
                tree = self._api.list_repo_tree(
                    **self._where,
                    path_in_repo=self._address.folder.rstrip("/") or None,
                    revision=self._address.revision,
                    recursive=True,
                )
                # Folders have no blob. The listing is read within the `try`, since it is fetched as it is iterated
                # over.
                return {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
            except absent as error:
                # The hub says 401 for a private repository without a valid token: not absent, but not to be seen.
                if _status(error) == 401:
                    raise
                return {}

    @contextmanager
    def _explained(self) -> Iterator[None]:
        errors = self._errors
        # Its bases are errors of the HTTP client, which the library has changed more than once.
        http_errors = errors.HfHubHTTPError.__bases__
        try:
            yield
        except errors.LocalTokenNotFoundError as error:
            raise RemoteError(f"{self._url}: no token was found; {LOG_IN['hf']}") from error
        except (*http_errors, ValueError, RuntimeError) as error:
            status = _status(error)
            if status in (401, 403):
                raise RemoteError(
                    f"{self._url}: access denied ({status}); the token must be allowed to write there: {LOG_IN['hf']}",
                    status,
                ) from error
            said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise RemoteError(
                f"{self._url}: {said}; what arrived is kept: run the same command again", status
            ) from error


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", getattr(error.__cause__, "response", None))
    return None if response is None else int(response.status_code)


def _is_same(entry: Any, file: FileToSend) -> bool:
    """Return whether the hub has this very file: by SHA-256 for large files, by Git's digest for others."""
    if entry is None or entry.size != file.bytes:
        return False
    return bool(entry.lfs.sha256 == file.sha256 if entry.lfs else entry.blob_id == _git_digest(file.file))


def _git_digest(path: Path) -> str:
    data = path.read_bytes()
    # Git's name for the content of a file, which the hub states for files that are not in LFS.
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
