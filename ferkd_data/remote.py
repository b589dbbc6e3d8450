"""Label sets on servers: ranged, resumed, retried reads and checked writes; urllib3 for HTTP, fsspec for stores.

A name is a path relative to the label set's URL, which the manifest's checks have let pass.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from ferkd_data.errors import MissingExtraError, RemoteError, UsageError
from ferkd_data.storage import CHUNK_BYTES, explain_full_disk, is_url, sha256_file

SCHEMES = {"file": None, "http": None, "https": None, "memory": None, "s3": "s3", "gs": "gs", "hf": "hub"}
"""URL scheme -> the extra that it needs. Everything else (pipe:, ftp:, chains with ::) is refused."""
EXTRA_MODULES = {"s3": "s3fs", "gs": "gcsfs", "hub": "huggingface_hub"}
NOT_FOUND = (404, 410)
FORBIDDEN = (401, 403)
TRANSIENT = (408, 425, 429)
LOG_IN = "log in as the store's own tools ask"

T = TypeVar("T")


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

    def read(self, name: str, start: int) -> tuple[int, Iterator[bytes]]:
        """(first byte that comes: `start`, or 0 where ranges are not known here; the chunks)."""

    def size(self, name: str) -> int | None:
        """Bytes of the file, None where there is none."""

    def write(self, name: str, file: Path) -> None: ...


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
        return _Store(self.url)

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """A small file as a whole. Raises RemoteError, also where it is larger than `max_bytes`."""

        data = bytearray()

        def attempt() -> bytes:
            first, chunks = self.transport.read(name, len(data))
            del data[first:]
            for chunk in chunks:
                data.extend(chunk)
                if len(data) > max_bytes:
                    raise RemoteError(f"{self.url}/{name}: more than {max_bytes} bytes")
            return bytes(data)

        return self._persist(name, attempt, progress=lambda: len(data))

    def size(self, name: str) -> int | None:
        return self._persist(name, lambda: self.transport.size(name))

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
            import hashlib

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
        with part.open("r+b" if part.exists() else "wb") as stream:
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
    """Raises UsageError for a scheme that is not read, MissingExtraError where its package is not installed."""
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES or "::" in url:
        raise UsageError(f"{url}: label sets are read from and written to {', '.join(sorted(SCHEMES))} URLs only")
    extra = SCHEMES[scheme]
    if extra is not None:
        from ferkd_data.extras import require

        require(EXTRA_MODULES[extra], extra=extra, what_for=f"{scheme}:// URLs")
    return Remote(url.rstrip("/"), retries or Retries())


class _Http:
    def __init__(self, url: str, timeout: float) -> None:
        import urllib3

        self._url = url
        self._pool = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=timeout, read=timeout), retries=urllib3.Retry(0, redirect=3), maxsize=16
        )

    def read(self, name: str, start: int) -> tuple[int, Iterator[bytes]]:
        headers = {"Range": f"bytes={start}-"} if start else {}
        # Compressed transfers would make byte positions meaningless.
        response = self._request("GET", name, {**headers, "Accept-Encoding": "identity"})
        if response.status == 200:
            return 0, self._chunks(response)
        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            response.close()
            raise RemoteError(f"{self._url}/{name}: asked for bytes from {start}, the server sent others")
        return start, self._chunks(response)

    def size(self, name: str) -> int | None:
        try:
            response = self._request("HEAD", name, {"Accept-Encoding": "identity"})
        except RemoteError as error:
            if error.status in NOT_FOUND:
                return None
            raise
        return int(response.headers.get("Content-Length", -1))

    def write(self, name: str, file: Path) -> None:
        raise UsageError(f"{self._url}: HTTP servers are read only here; publish to a folder, s3://, gs:// or hf://")

    def _request(self, method: str, name: str, headers: dict[str, str]) -> Any:
        import urllib3

        url = f"{self._url}/{quote(name)}"
        try:
            response = self._pool.request(method, url, headers=headers, preload_content=False)
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
        raise _refused(url, status)

    @staticmethod
    def _chunks(response: Any) -> Iterator[bytes]:
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
    """Anything that fsspec knows, with the client libraries' own credentials."""

    def __init__(self, url: str) -> None:
        self._url = url

    @cached_property
    def _target(self) -> tuple[Any, str]:
        import fsspec

        options: dict[str, Any] = {"skip_instance_cache": True} if self._url.startswith("s3") else {}
        try:
            file_system, root = fsspec.core.url_to_fs(self._url, **options)
        except (ImportError, ValueError) as error:
            raise RemoteError(f"{self._url}: {error}") from error
        return file_system, root

    def read(self, name: str, start: int) -> tuple[int, Iterator[bytes]]:
        file_system, root = self._target
        path = f"{root}/{name}"
        with _explained(f"{self._url}/{name}"):
            size = int(file_system.info(path)["size"])
        return start, self._chunks(file_system, path, start, size, f"{self._url}/{name}")

    def size(self, name: str) -> int | None:
        file_system, root = self._target
        try:
            with _explained(f"{self._url}/{name}"):
                file_system.invalidate_cache()
                return int(file_system.info(f"{root}/{name}")["size"])
        except RemoteError as error:
            if error.status in NOT_FOUND:
                return None
            raise

    def write(self, name: str, file: Path) -> None:
        file_system, root = self._target
        path = f"{root}/{name}"
        with _explained(f"{self._url}/{name}"):
            file_system.makedirs(path.rpartition("/")[0], exist_ok=True)
            file_system.put_file(str(file), path)

    @staticmethod
    def _chunks(file_system: Any, path: str, start: int, size: int, what: str) -> Iterator[bytes]:
        step = 8 * CHUNK_BYTES
        for first in range(start, size, step):
            with _explained(what):
                chunk = file_system.cat_file(path, start=first, end=min(first + step, size))
            yield chunk


class _explained:
    """Sort what a client library raises into what may pass and what will not."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, (RemoteError, MissingExtraError)):
            return
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"):
            raise RemoteError(
                f"{self._what}: no credentials were found; log in as the store's own tools ask"
            ) from error
        if isinstance(error, FileNotFoundError):
            raise _refused(self._what, 404) from error
        if isinstance(error, PermissionError):
            raise _refused(self._what, 403) from error
        status = _status(error)
        if status is not None and 400 <= status < 500 and status not in TRANSIENT:
            raise _refused(self._what, status) from error
        if isinstance(error, OSError) or status is not None or "Connection" in type(error).__name__:
            raise Transient(f"{type(error).__name__}: {error}") from error


def _status(error: BaseException) -> int | None:
    """The HTTP status that a client library's error carries (botocore, huggingface_hub, gcsfs), if any."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return int(response) if response else None
    status = getattr(response, "status_code", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def _refused(what: str, status: int) -> RemoteError:
    if status in NOT_FOUND:
        return RemoteError(f"{what}: no such file on the server", status=status)
    if status in FORBIDDEN:
        return RemoteError(
            f"{what}: access denied ({status}); is it private? log in as the store's own tools ask", status
        )
    return RemoteError(f"{what}: the server refused ({status})", status)
