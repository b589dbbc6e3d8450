"""Label sets on servers: ranged, resumed, retried reads and checked writes; urllib3 for HTTP, Arrow for stores.

A name is a path relative to the label set's URL, which the manifest's checks have let pass.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

import pyarrow as pa

from ferkd_data.errors import RemoteError, UsageError
from ferkd_data.storage import CHUNK_BYTES, NO_SPACE, explain_full_disk, is_url, sha256_file, write_atomically

SCHEMES = ("file", "http", "https", "s3", "gs", "hf")
"""What label sets are read from; everything else (pipe:, ftp:, chains with ::) is refused."""
STORE_CHUNK_BYTES = 8 * CHUNK_BYTES
NOT_FOUND = (404, 410)
FORBIDDEN = (401, 403)
TRANSIENT = (408, 425, 429)
LOG_IN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run: aws configure",
    "gs": "run: gcloud auth application-default login (public data: gs://anonymous@BUCKET/...)",
    "hf": "set HF_TOKEN, or run: hf auth login",
}
DENIED = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "INVALID_SIGNATURE",
    "UNRECOGNIZED_CLIENT",
)
"""As Arrow names what S3 answers with 403."""

T = TypeVar("T")
Chunks = Generator[bytes, None, None]
"""Must be closed: only then is the connection free, or the file."""


@dataclass(frozen=True, kw_only=True)
class Retries:
    """What fails for a while is tried again; an attempt that got any bytes further starts the count anew."""

    attempts: int = 8
    first_wait: float = 0.5
    """Seconds; doubled after each attempt, with jitter."""
    longest_wait: float = 30.0
    timeout: float = 60.0
    """Seconds without a byte."""

    def wait(self, attempt: int) -> None:
        time.sleep(min(self.first_wait * 2**attempt, self.longest_wait) * random.uniform(0.5, 1.0))


class Transient(Exception):
    """May work when tried again."""


class Transport(Protocol):
    """One kind of server. Raises Transient for what may pass, RemoteError for what will not."""

    def read(self, name: str, start: int) -> tuple[int, Chunks]:
        """(first byte that comes: `start`, or 0 where ranges are not known here; the chunks)."""

    def size(self, name: str) -> int | None:
        """Bytes of the file, None where there is none."""

    def write(self, name: str, file: Path) -> None: ...

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below the URL, by name."""

    def remove(self, name: str) -> None:
        """A file, or a folder with all that is in it; nothing where there is neither."""


@dataclass(frozen=True)
class Remote:
    """A folder on a server. Can be pickled; connections are made where they are used."""

    url: str
    retries: Retries = field(default_factory=Retries)

    @cached_property
    def transport(self) -> Transport:
        scheme = self.url.partition("://")[0]
        if scheme in ("http", "https"):
            return _Http(self.url, self.retries.timeout)
        if scheme == "hf":
            return _Http(hub_address(self.url), self.retries.timeout, hub_headers(), LOG_IN["hf"])
        return _Store(self.url)

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """A small file as a whole. Raises RemoteError, also where it is larger than `max_bytes`."""

        data = bytearray()

        def attempt() -> bytes:
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
        """Bytes of every file below the URL, by name: one request for a thousand of them."""
        return self._persist("", self.transport.sizes)

    def remove(self, name: str) -> None:
        """A file, or a folder with all that is in it; nothing where there is neither."""
        self._persist(name, lambda: self.transport.remove(name))

    def fetch(self, name: str, to: Path, *, size: int) -> None:
        """A file of which nothing but the size is known. Raises RemoteError, StorageFullError."""
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
        """Whether the server has exactly this file, by reading it back as a whole."""
        if self.size(name) != size:
            return False

        def attempt() -> str:
            state = hashlib.sha256()
            for chunk in self.transport.read(name, 0)[1]:
                state.update(chunk)
            return state.hexdigest()

        return self._persist(name, attempt) == sha256

    def _fill(self, name: str, part: Path, size: int) -> None:
        """Append to `part` until it has `size` bytes; it keeps what it has when this fails."""

        def there() -> int:
            return part.stat().st_size if part.exists() else -1

        def attempt() -> None:
            if there() < size:
                self._append(name, part, max(there(), 0), size)

        self._persist(name, attempt, progress=there)

    def _append(self, name: str, part: Path, start: int, size: int) -> None:
        first, chunks = self.transport.read(name, start)
        with closing(chunks), part.open("r+b" if part.exists() else "wb") as stream:
            stream.seek(first)
            stream.truncate()
            for chunk in chunks:
                if stream.tell() + len(chunk) > size:
                    part.unlink()
                    raise RemoteError(
                        f"{self.url}/{name}: has more than the {size} bytes that the manifest lists; it was changed on "
                        "the server: ask its publisher, or open the label set again"
                    )
                stream.write(chunk)
            if stream.tell() < size:
                raise Transient(f"the connection ended after {stream.tell()} of {size} bytes")

    def _persist(self, name: str, action: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Try again while it may pass; as long as `progress` grows, without end."""
        failures = 0
        while True:
            before = progress()
            try:
                return action()
            except Transient as error:
                failures = 1 if progress() > before else failures + 1
                if failures >= self.retries.attempts:
                    raise RemoteError(
                        f"{self.url}/{name}: {error}, also after {failures} attempts; what arrived is kept: try again "
                        "later"
                    ) from error
                self.retries.wait(failures)

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "retries": self.retries}


def part_of(path: Path) -> Path:
    """Where a download lies until it is whole."""
    return path.with_name(f".{path.name}.part")


def is_remote(place: str | Path) -> bool:
    return isinstance(place, str) and is_url(place)


def open_remote(url: str, retries: Retries | None = None) -> Remote:
    """Raises UsageError for a URL of a kind that is not read."""
    if url.partition("://")[0] not in SCHEMES or "::" in url:
        raise UsageError(f"{url}: label sets are read from and written to {', '.join(SCHEMES)} URLs only")
    if url.startswith("hf:"):
        hub_address(url)
    return Remote(url.rstrip("/"), retries or Retries())


class _Http:
    def __init__(self, url: str, timeout: float, headers: dict[str, str] | None = None, log_in: str = "") -> None:
        import urllib3

        self._url, self._log_in = url, log_in
        # Compressed transfers would make byte positions meaningless.
        self._headers = {"Accept-Encoding": "identity", **(headers or {})}
        self._pool = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=timeout, read=timeout),
            # A total of 0 would forbid redirects too.
            retries=urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=3),
            maxsize=16,
        )
        self._versions: dict[str, str] = {}
        """The ETag of each file under way, so that halves of two versions are not joined."""

    def read(self, name: str, start: int) -> tuple[int, Chunks]:
        version = self._versions.get(name) if start else None
        condition = {"If-Range": version} if version else {}
        response = self._request("GET", name, {"Range": f"bytes={start}-", **condition} if start else {})
        # Forgotten only now: a server that answers 503 first may answer with another version next.
        self._versions.pop(name, None)
        found = response.headers.get("ETag", "")
        if found and not found.startswith("W/"):
            self._versions[name] = found
        if response.status == 200:
            return 0, self._chunks(response)
        if version and found and found != version:
            response.close()
            return self.read(name, 0)
        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            response.close()
            raise RemoteError(f"{self._url}/{name}: asked for bytes from {start}, the server sent others")
        return start, self._chunks(response)

    def size(self, name: str) -> int | None:
        try:
            response = self._request("HEAD", name, {})
        except RemoteError as error:
            if error.status in NOT_FOUND:
                return None
            raise
        # Nothing comes after the headers, but the connection is free for others only then.
        response.drain_conn()
        return int(response.headers.get("Content-Length", -1))

    def write(self, name: str, file: Path) -> None:
        raise self._read_only()

    def sizes(self) -> dict[str, int]:
        raise self._read_only()

    def remove(self, name: str) -> None:
        raise self._read_only()

    def _read_only(self) -> UsageError:
        return UsageError(f"{self._url}: HTTP servers are read only here; write to a folder, s3:// or gs://")

    def _request(self, method: str, name: str, headers: dict[str, str]) -> Any:
        import urllib3

        url = f"{self._url}/{quote(name)}"
        try:
            response = self._pool.request(method, url, headers={**self._headers, **headers}, preload_content=False)
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, (urllib3.exceptions.ResponseError, urllib3.exceptions.LocationValueError)):
                raise RemoteError(f"{url}: {reason}") from error
            raise Transient(f"cannot be reached ({error})") from error
        status = response.status
        if status in (200, 206):
            return response
        response.drain_conn()
        if status >= 500 or status in TRANSIENT:
            raise Transient(f"the server answered {status}")
        raise _refused(url, status, self._log_in)

    @staticmethod
    def _chunks(response: Any) -> Chunks:
        import urllib3

        try:
            # read1 gives what has arrived, so that nothing is lost when the connection breaks.
            while chunk := response.read1(CHUNK_BYTES):
                yield chunk
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Transient(f"the connection was lost ({error})") from error
        finally:
            response.close()


class _Store:
    """A folder, S3 or Google's store, through Arrow's file systems and the stores' usual credentials."""

    def __init__(self, url: str) -> None:
        self._url = url

    @cached_property
    def _target(self) -> tuple[Any, str]:
        from pyarrow import fs

        with _explained(self._url):
            file_system, root = fs.FileSystem.from_uri(self._url)
        return file_system, root.rstrip("/")

    def read(self, name: str, start: int) -> tuple[int, Chunks]:
        file_system, root = self._target
        what = f"{self._url}/{name}"
        with _explained(what):
            file = file_system.open_input_file(f"{root}/{name}")
            try:
                file.seek(start)
            except BaseException:
                file.close()
                raise
        return start, self._chunks(file, what)

    def size(self, name: str) -> int | None:
        file_system, root = self._target
        with _explained(f"{self._url}/{name}"):
            info = file_system.get_file_info(f"{root}/{name}")
        return info.size if info.is_file else None

    def write(self, name: str, file: Path) -> None:
        file_system, root = self._target
        path = f"{root}/{name}"
        with _explained(f"{self._url}/{name}"):
            if file_system.type_name == "local":
                # Readers may have the old file mapped; and half a manifest would be taken for another label set's.
                with write_atomically(Path(path)) as aside:
                    shutil.copyfile(file, aside)
                return
            with file.open("rb") as source, file_system.open_output_stream(path) as sink:
                while chunk := source.read(STORE_CHUNK_BYTES):
                    sink.write(chunk)

    def sizes(self) -> dict[str, int]:
        from pyarrow import fs

        file_system, root = self._target
        with _explained(self._url):
            found = file_system.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        return {info.path.removeprefix(f"{root}/"): info.size for info in found if info.is_file}

    def remove(self, name: str) -> None:
        file_system, root = self._target
        path = f"{root}/{name}"
        with _explained(f"{self._url}/{name}"):
            info = file_system.get_file_info(path)
            if info.is_file:
                file_system.delete_file(path)
            elif info.type.name == "Directory":
                file_system.delete_dir(path)

    @staticmethod
    def _chunks(file: Any, what: str) -> Chunks:
        try:
            while True:
                with _explained(what):
                    chunk = file.read(STORE_CHUNK_BYTES)
                if not chunk:
                    return
                yield chunk
        finally:
            file.close()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Sort what Arrow's file systems raise into what may pass and what will not."""
    try:
        yield
    except FileNotFoundError as error:
        raise _refused(what, 404) from error
    except PermissionError as error:
        raise _refused(what, 403) from error
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise
        text = str(error)
        status = re.search(r"HTTP status (\d{3})", text)
        number = int(status.group(1)) if status else None
        if number is not None and 400 <= number < 500 and number not in TRANSIENT:
            raise _refused(what, number) from error
        if any(name in text for name in DENIED):
            raise _refused(what, 403) from error
        if "credentials" in text.lower():
            raise RemoteError(f"{what}: no credentials were found; {_log_in(what)}") from error
        if isinstance(error, ValueError):
            raise RemoteError(f"{what}: {text}") from error
        raise Transient(text) from error


def _refused(what: str, status: int, log_in: str = "") -> RemoteError:
    if status in NOT_FOUND:
        return RemoteError(f"{what}: no such file on the server", status=status)
    if status in FORBIDDEN:
        return RemoteError(f"{what}: access denied ({status}); is it private? {log_in or _log_in(what)}", status)
    return RemoteError(f"{what}: the server refused ({status})", status)


def _log_in(what: str) -> str:
    return LOG_IN.get(what.partition("://")[0], "only files that anybody may read can be had over HTTP")


@dataclass(frozen=True)
class HubPlace:
    """`hf://datasets/ORG/NAME[@REVISION][/FOLDER]`"""

    repository: str
    revision: str
    folder: str
    """With a slash at its end, or empty."""


def parse_hub_url(url: str) -> HubPlace:
    """Raises UsageError."""
    match = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?((?:/[\w.-]+)*)/?", url)
    if match is None or ".." in url:
        raise UsageError(f"{url}: is not of the form hf://datasets/ORG/NAME[@REVISION][/FOLDER]")
    repository, revision, folder = match.groups()
    return HubPlace(repository, revision or "main", f"{folder[1:]}/" if folder else "")


def hub_endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub_address(url: str) -> str:
    """Where the hub serves the files. Raises UsageError."""
    place = parse_hub_url(url)
    folder = f"/{place.folder}".rstrip("/")
    return f"{hub_endpoint()}/datasets/{place.repository}/resolve/{place.revision}{folder}"


def hub_headers() -> dict[str, str]:
    """The user's token, where there is one: the hub's own variable or login file."""
    token = os.environ.get("HF_TOKEN")
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    if token is None and (home / "token").is_file():
        token = (home / "token").read_text(encoding="utf-8").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}
