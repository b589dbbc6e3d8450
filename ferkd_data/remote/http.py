"""Files over HTTP, by urllib3: in ranges, read only."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from ferkd_data.errors import RemoteError, UsageError
from ferkd_data.remote.transport import NOT_FOUND, TRANSIENT, Chunks, Transient, refused
from ferkd_data.storage import CHUNK_BYTES


class HttpTransport:
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
        raise refused(url, status, self._log_in)

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
