"""A folder on any server: reads that are resumed and tried again, and writes that are read back.

Names are paths relative to the label set's URL, which the manifest's checks have let pass. Addresses of data sets on
the Hugging Face hub are made here too.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ferkd_data.errors import RemoteError, UsageError
from ferkd_data.remote.http import HttpTransport
from ferkd_data.remote.retries import GivenUpError, Retries, Transient
from ferkd_data.remote.store import StoreTransport
from ferkd_data.remote.transport import LOG_IN, Transport
from ferkd_data.storage import explain_full_disk, is_url, sha256_file


@dataclass(frozen=True)
class HubLocation:
    """`hf://datasets/ORG/NAME[@REVISION][/FOLDER]`"""

    repository: str
    revision: str
    folder: str
    """Path within the repository with a slash at its end, or empty."""


def parse_hub_url(url: str) -> HubLocation:
    """Parse an hf:// URL. Raises UsageError."""
    # Revisions with a slash (refs/pr/1) are not taken: they could not be told from a folder.
    match = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?((?:/[\w.-]+)*)/?", url)
    if match is None or ".." in url:
        raise UsageError(f"{url}: is not of the form hf://datasets/ORG/NAME[@REVISION][/FOLDER]")
    repository, revision, folder = match.groups()
    return HubLocation(repository, revision or "main", f"{folder[1:]}/" if folder else "")


def hub_endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub_address(url: str) -> str:
    """Return the HTTP URL at which the hub serves the files. Raises UsageError."""
    location = parse_hub_url(url)
    folder = f"/{location.folder}".rstrip("/")
    return f"{hub_endpoint()}/datasets/{location.repository}/resolve/{location.revision}{folder}"


def hub_headers() -> dict[str, str]:
    """Return the header with the user's token, where there is one: from the hub's own variable or login file."""
    # As the hub's own library does: an empty variable counts as unset, as containers pass it, and a secret read from a
    # file may end in a newline, which no header may hold.
    token = os.environ.get("HF_TOKEN", "").strip()
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    if not token and (home / "token").is_file():
        token = (home / "token").read_text(encoding="utf-8").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


SCHEMES = ("file", "http", "https", "s3", "gs", "hf")
"""Schemes that label sets are read from; everything else (pipe:, ftp:, chains with ::) is refused."""

RANGE_BEHIND_THE_END = 416

T = TypeVar("T")


@dataclass(frozen=True)
class Remote:
    """A folder on a server. Can be pickled and forked; each process makes connections of its own."""

    url: str
    retries: Retries = field(default_factory=Retries)

    @property
    def transport(self) -> Transport:
        """This process's connections to the server, made at the first use.

        Two threads that come first at once may make one each: both work, and the one stored last stays.
        """
        # By process: a child that was forked, as a DataLoader's worker, holds its parent's sockets, and the two would
        # read each other's answers. The parent's stay here untouched: to close them takes locks, which a thread may
        # have held at the fork and nobody releases in the child.
        made: dict[int, Transport] = self.__dict__.setdefault("made", {})
        if os.getpid() not in made:
            transport = self._transport()
            # A copy in another process knows that the server has answered, and is as patient when it restarts.
            transport.reached = self._has_answered()
            made[os.getpid()] = transport
        return made[os.getpid()]

    def _transport(self) -> Transport:
        scheme = self.url.partition("://")[0]
        if scheme in ("http", "https"):
            return HttpTransport(self.url, self.retries.timeout)
        if scheme == "hf":
            return HttpTransport(hub_address(self.url), self.retries.timeout, hub_headers(), LOG_IN["hf"])
        return StoreTransport(self.url)

    def _has_answered(self) -> bool:
        made: dict[int, Transport] = self.__dict__.get("made", {})
        return self.__dict__.get("reached", False) or any(transport.reached for transport in made.values())

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """Read a small file as a whole. Raises RemoteError, also where it is larger than `max_bytes`."""
        data = bytearray()

        def attempt() -> bytes:
            # From where the last attempt ended. A server without ranges begins anew at 0, and so do we.
            first, chunks = self.transport.read(name, len(data))
            del data[first:]
            with closing(chunks):
                for chunk in chunks:
                    data.extend(chunk)
                    if len(data) > max_bytes:
                        raise RemoteError(f"{self.url}/{name}: more than {max_bytes} bytes")
            return bytes(data)

        return self._persist(name, attempt, progress=lambda: len(data))

    def size(self, name: str) -> int | None:
        return self._persist(name, lambda: self.transport.size(name))

    def sizes(self) -> dict[str, int]:
        """List the bytes of every file below the URL, by name: one request for a thousand of them."""
        return self._persist("", self.transport.sizes)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; do nothing where there is neither."""
        self._persist(name, lambda: self.transport.remove(name))

    def fetch(self, name: str, to: Path, *, size: int) -> None:
        """Fetch a file of which only the size is known. Raises RemoteError, StorageFullError."""
        to.parent.mkdir(parents=True, exist_ok=True)
        with explain_full_disk(to):
            self._fill(name, part_of(to), size)
        part_of(to).replace(to)

    def download(self, name: str, to: Path, *, size: int, sha256: str) -> None:
        """Fetch a file whose size and digest are known; continues what an earlier attempt left beside `to`.

        Raises RemoteError when it cannot be had or is another file than the one expected, StorageFullError.
        """
        part = part_of(to)
        to.parent.mkdir(parents=True, exist_ok=True)
        # Once anew after a wrong digest: the half that lay there may have been of an older version.
        for again in (True, False):
            with explain_full_disk(to):
                self._fill(name, part, size)
            if part.stat().st_size == size and sha256_file(part) == sha256:
                part.replace(to)
                return
            part.unlink()
            if not again:
                raise RemoteError(
                    f"{self.url}/{name}: is not the file that the manifest lists (SHA-256 differs, twice); it was "
                    "changed or damaged on the server: ask its publisher, or open the label set again"
                )

    def upload(self, file: Path, name: str, *, size: int, sha256: str) -> None:
        """Send a file and read it back. Raises RemoteError when what arrived has another digest."""
        self._persist(name, lambda: self.transport.write(name, file))
        if not self.holds(name, size=size, sha256=sha256):
            raise RemoteError(f"{self.url}/{name}: what arrived is not what was sent; run the same command again")

    def holds(self, name: str, *, size: int, sha256: str) -> bool:
        """Return whether the server has exactly this file, by reading it back as a whole."""
        if self.size(name) != size:
            return False

        def attempt() -> str:
            state = hashlib.sha256()
            for chunk in self.transport.read(name, 0)[1]:
                state.update(chunk)
            return state.hexdigest()

        return self._persist(name, attempt) == sha256

    def _fill(self, name: str, part: Path, size: int) -> None:
        """Append to `part` until it has `size` bytes; on failure it keeps what has arrived."""

        def there() -> int:
            return part.stat().st_size if part.exists() else -1

        # A body may end early because the connection was lost, or because the file is shorter than listed. The same end
        # twice means the latter.
        ended_at: set[int] = set()

        def attempt() -> None:
            if there() >= size:
                return
            try:
                self._append(name, part, max(there(), 0), size)
            except _Short as error:
                # A body that ends there again is the whole file.
                if error.at in ended_at:
                    raise self._another(
                        name, f"has {error.at} bytes on the server, the manifest lists {size}"
                    ) from error
                ended_at.add(error.at)
                raise
            except RemoteError as error:
                if error.status == RANGE_BEHIND_THE_END and there() > 0:
                    raise self._another(name, f"has fewer than the {size} bytes that the manifest lists") from error
                raise

        self._persist(name, attempt, progress=there)

    def _append(self, name: str, part: Path, start: int, size: int) -> None:
        # `first` is `start`, or 0 where the server has no ranges or another version: then what lay there is cut off.
        first, chunks = self.transport.read(name, start)
        with closing(chunks), part.open("r+b" if part.exists() else "wb") as stream:
            stream.seek(first)
            stream.truncate()
            for chunk in chunks:
                self._check_stopped()
                # Checked before it is written: a server must not fill the disk.
                if stream.tell() + len(chunk) > size:
                    part.unlink()
                    raise self._another(name, f"has more than the {size} bytes that the manifest lists")
                stream.write(chunk)
                # What has arrived is counted by the file's size, and goes on from there after a kill.
                stream.flush()
            if stream.tell() < size:
                raise _Short(f"the connection ended after {stream.tell()} of {size} bytes", stream.tell())

    def stop(self) -> None:
        """End the downloads of other threads at their next bytes or attempts, when a pull is interrupted."""
        # Frozen, so written past __setattr__; one assignment, which other threads see as a whole.
        self.__dict__["stopped"] = True

    def _check_stopped(self) -> None:
        if self.__dict__.get("stopped"):
            raise RemoteError(f"{self.url}: stopped; run the same command again to go on")

    def _another(self, name: str, what: str) -> RemoteError:
        return RemoteError(
            f"{self.url}/{name}: {what}; it was changed on the server: ask its publisher, or open the label set again"
        )

    def _persist(self, name: str, action: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Run `action`, again while failures may pass: without end as long as `progress` grows. Raises RemoteError."""
        what = f"{self.url}/{name}"
        try:
            return self.retries.run(action, what, progress=progress, before_attempt=self._check_stopped)
        except GivenUpError as error:
            raise RemoteError(f"{error}; what arrived is kept: try again later") from error.__cause__

    def __getstate__(self) -> dict[str, Any]:
        # Without connections, and without opening one only to be pickled.
        return {"url": self.url, "retries": self.retries, "reached": self._has_answered()}


class _Short(Transient):
    """A body ended before the file was whole, and nothing says that the connection was lost."""

    def __init__(self, message: str, at: int) -> None:
        super().__init__(message)
        self.at = at


def part_of(path: Path) -> Path:
    """Return the path at which a download lies until it is whole."""
    return path.with_name(f".{path.name}.part")


def is_remote(location: str | Path) -> bool:
    return isinstance(location, str) and is_url(location)


def open_remote(url: str, retries: Retries | None = None) -> Remote:
    """Return the folder at a URL; nothing is contacted yet.

    Raises UsageError for a scheme that is not read, for a URL with credentials in it, and for an HTTP URL with a query.
    """
    _check_no_credentials(url)
    # fsspec would take `a::b` for a chain of file systems.
    if url.partition("://")[0] not in SCHEMES or "::" in url:
        raise UsageError(f"{url}: label sets are read from and written to {', '.join(SCHEMES)} URLs only")
    if url.startswith("hf:"):
        hub_address(url)
    return Remote(url.rstrip("/"), retries or Retries())


def _check_no_credentials(url: str) -> None:
    """Raise UsageError for a URL that holds credentials, or may hold them; the text shows none of them.

    URLs of label sets are shown, and recorded in manifests and cards that are published.
    """
    scheme, _, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    user, at, host = place.rpartition("@")
    # A secret key of S3 may hold a slash, which ends the place too early; names of buckets hold no colon.
    if (at and (":" in user or scheme in ("http", "https"))) or (scheme == "s3" and ":" in place):
        ways = LOG_IN.get(scheme, "files that anybody may read need none, and others cannot be had over HTTP")
        shown = f"{scheme}://...@{host}{slash}{path}" if at else f"{scheme}://..."
        raise UsageError(
            f"{shown.partition('?')[0]}: credentials in a URL are not taken, since URLs are shown and recorded; {ways}"
        )
    if scheme in ("http", "https") and ("?" in rest or "#" in rest):
        shown = re.split(r"[?#]", url, maxsplit=1)[0]
        raise UsageError(
            f"{shown}: the URL of a label set is that of a folder, to which names of files are added; it cannot end in "
            "a query or a fragment (? or #)"
        )
