"""Reading files over HTTP by urllib3, in ranges; and errors that say what a server did wrong and whether it may pass.

Redirects are followed here: urllib3 would first read the body of each to its end, and a body may have none. Retries are
not made here: `Transient` tells the caller that another attempt may succeed.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from ferkd_data.errors import RemoteError, UsageError
from ferkd_data.remote.retries import Stalled, Transient
from ferkd_data.remote.transport import NOT_FOUND, TRANSIENT, Chunks, refused
from ferkd_data.storage import CHUNK_BYTES

CONNECT_SECONDS = 15.0
LEAST_BYTES = 1024
"""A server that sends fewer bytes of a file within the time limit has stalled: 17 bytes a second at 60 s."""
MAX_REDIRECTS = 3
NEVER_SERVED = (501, 505)
"""Statuses of servers that will not answer otherwise in a minute: not implemented, unknown version of HTTP."""


class HttpTransport:
    """Files of an HTTP server. Threads share it: urllib3's pool is safe, and a file is read by one thread at a time."""

    def __init__(self, url: str, timeout: float, headers: dict[str, str] | None = None, log_in: str = "") -> None:
        # Not at the top: reading from a disk needs no HTTP client.
        import urllib3

        self._url, self._log_in = url, log_in
        # Compressed transfers would make byte positions meaningless.
        self._headers = {"Accept-Encoding": "identity", **(headers or {})}
        connect = min(timeout, CONNECT_SECONDS)
        self._timeout = timeout
        # No retries of its own: `Retries` has the one loop, and resumes where urllib3 would begin anew.
        self._pool = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=connect, read=timeout), retries=False, maxsize=16
        )
        self._pool.pool_classes_by_scheme = _pools(timeout)
        self._versions: dict[str, str] = {}
        """The ETag of each file being read, so that halves of two versions are never joined."""
        self.reached = False
        """True once the server has answered, with anything that is HTTP."""

    def read(self, name: str, start: int) -> tuple[int, Chunks]:
        # If-Range: the server sends the rest of this very version, or the whole of a newer one (status 200).
        version = self._versions.get(name) if start else None
        condition = {"If-Range": version} if version else {}
        response = self._request("GET", name, {"Range": f"bytes={start}-", **condition} if start else {})
        # Dropped only after the answer: a server that answers 503 first may answer with another version next.
        self._versions.pop(name, None)
        found = response.headers.get("ETag", "")
        # Weak tags (W/) promise the same meaning, not the same bytes, so If-Range may not use them.
        if found and not found.startswith("W/"):
            self._versions[name] = found
        if response.headers.get("Content-Encoding", "identity") != "identity":
            response.close()
            raise RemoteError(f"{self._url}/{name}: the server sends it compressed, though asked not to")
        if response.status == 200:
            # The whole file: what was asked for, or from a server without ranges. The caller starts again at byte 0.
            return 0, self._chunks(response, name)
        # A server that ignored If-Range and sends the rest of another version.
        if version and found and found != version:
            response.close()
            return self.read(name, 0)
        # Said in no header, the bytes could be any: joined to the first half they would make a third file.
        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            response.close()
            raise RemoteError(f"{self._url}/{name}: asked for bytes from {start}, the server sent others")
        return start, self._chunks(response, name)

    def size(self, name: str) -> int | None:
        try:
            response = self._request("HEAD", name, {})
        except RemoteError as error:
            if error.status in NOT_FOUND:
                return None
            raise
        _let_go(response)
        length = response.headers.get("Content-Length", "")
        # -1: there, of unknown size. It equals no size of a manifest.
        return int(length) if length.isdecimal() else -1

    def write(self, name: str, file: Path) -> None:
        raise self._read_only()

    def sizes(self) -> dict[str, int]:
        raise self._read_only()

    def remove(self, name: str) -> None:
        raise self._read_only()

    def _read_only(self) -> UsageError:
        return UsageError(f"{self._url}: HTTP servers are read only here; write to a folder, s3:// or gs://")

    def _request(self, method: str, name: str, headers: dict[str, str]) -> Any:
        """Return an answer with the file. Raises Transient or RemoteError for any other, whose body is not read."""
        url = f"{self._url}/{quote(name)}"
        response = self._follow(method, url, {**self._headers, **headers})
        self.reached = True
        status = response.status
        if status in (200, 206):
            return response
        _let_go(response)
        if (500 <= status < 600 and status not in NEVER_SERVED) or status in TRANSIENT:
            raise Transient(f"the server answered {status}")
        raise refused(url, status, self._log_in)

    def _follow(self, method: str, url: str, headers: dict[str, str]) -> Any:
        where = url
        for _ in range(MAX_REDIRECTS + 1):
            response = self._ask(method, where, headers)
            location = response.get_redirect_location()
            if not location:
                return response
            _let_go(response)
            target = urljoin(where, location)
            if urlsplit(target).scheme not in ("http", "https"):
                raise RemoteError(f"{url}: the server redirects to {target!r}, which is not HTTP")
            if _server(target) != _server(where):
                # A token is for the server it was given for.
                headers = {name: value for name, value in headers.items() if name != "Authorization"}
            where = target
        raise RemoteError(f"{url}: the server redirects more than {MAX_REDIRECTS} times")

    def _ask(self, method: str, url: str, headers: dict[str, str]) -> Any:
        import urllib3

        try:
            return self._pool.request(method, url, headers=headers, preload_content=False, redirect=False)
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            raise failure(error, url, reached=self.reached) from error

    def _chunks(self, response: Any, name: str) -> Chunks:
        import urllib3

        waited, arrived = 0.0, 0
        try:
            while True:
                before = time.monotonic()
                # read1 gives what has arrived, so that nothing is lost when the connection breaks.
                chunk = response.read1(CHUNK_BYTES, decode_content=False)
                if not chunk:
                    return
                # Only the wait for the server counts, not the time that the consumer takes for a chunk.
                waited += time.monotonic() - before
                arrived += len(chunk)
                if waited >= self._timeout:
                    if arrived < LEAST_BYTES:
                        raise Stalled(f"the server sent {arrived} bytes in {waited:.0f} s")
                    waited, arrived = 0.0, 0
                yield chunk
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise failure(error, f"{self._url}/{name}", reached=True) from error
        finally:
            response.close()


def _pools(seconds: float) -> dict[str, Any]:
    """Return urllib3's pool classes by scheme, with connections that wait `seconds` for the whole head of an answer.

    urllib3's own time limit begins anew with each byte.
    """
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    kinds: dict[str, tuple[Any, Any]] = {
        "http": (HTTPConnectionPool, HTTPConnection),
        "https": (HTTPSConnectionPool, HTTPSConnection),
    }
    return {
        scheme: type(pool.__name__, (pool,), {"ConnectionCls": _bounded(connection, seconds)})
        for scheme, (pool, connection) in kinds.items()
    }


def _bounded(kind: Any, seconds: float) -> Any:
    class Bounded(kind):  # type: ignore[misc]
        def getresponse(self) -> Any:
            ended = threading.Event()

            def end() -> None:
                ended.set()
                if self.sock is not None:
                    with suppress(OSError):
                        # The thread that reads sees the end of the connection. Not TLS's own way, which would wait.
                        socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

            # A thread for each request, for as long as the head takes: urllib3 has no limit for the whole of it. A
            # daemon, so that a server that never answers does not keep the program from ending.
            timer = threading.Timer(seconds, end)
            timer.daemon = True
            timer.start()
            try:
                response = super().getresponse()
            except (OSError, http.client.HTTPException) as error:
                if ended.is_set():
                    raise TimeoutError("timed out") from error
                raise
            finally:
                timer.cancel()
            if ended.is_set():
                # A head that was cut may look whole.
                response.close()
                raise TimeoutError("timed out")
            return response

    return Bounded


def _server(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _let_go(response: Any) -> None:
    """Return the connection to the pool where no body follows; else close it, since a body may never end."""
    if response.length_remaining == 0:
        response.drain_conn()
    else:
        response.close()


def failure(error: Exception, url: str, *, reached: bool) -> RemoteError | Transient:
    """Return the error to raise for one of urllib3's.

    A refused connection or an unknown host is a mistake in the URL or in the network's settings, unless the server has
    answered before (`reached`): then it may be restarting.
    """
    import urllib3.exceptions as of

    cause = _cause(error)
    host = urlsplit(url).netloc
    if isinstance(error, of.SSLError):
        return _of_tls(cause, url, host)
    # NewConnectionError is a ConnectTimeoutError in urllib3, and is told apart from it below.
    if isinstance(error, of.ConnectTimeoutError) and not isinstance(error, of.NewConnectionError):
        return Transient(f"{host} cannot be reached (no answer in time)")
    # Refused, or an unknown host.
    if isinstance(error, (of.NewConnectionError, of.ProxyError)):
        text = f"{host} cannot be reached ({_reason(error)})"
        return Transient(text) if reached else RemoteError(f"{url}: {text}; check the URL and the network")
    # Before ProtocolError, in which urllib3 wraps these too: trying again would not teach the server HTTP.
    if _speaks_no_http(cause):
        return RemoteError(f"{url}: the server at {host} does not answer in HTTP as it should ({_short(cause)})")
    if isinstance(error, (of.ProtocolError, of.TimeoutError)):
        return Transient(f"the connection was lost ({_short(cause)})")
    return RemoteError(f"{url}: {_short(error)}")


def _cause(error: Exception) -> BaseException:
    """Return the error that urllib3 wraps: the last of the arguments that is one, or the cause."""
    inner = [part for part in error.args if isinstance(part, BaseException)]
    return inner[-1] if inner else error.__cause__ or error


def _of_tls(cause: BaseException, url: str, host: str) -> RemoteError | Transient:
    if isinstance(cause, ssl.SSLCertVerificationError):
        reason = cause.verify_message or _short(cause)
        return RemoteError(
            f"{url}: the certificate of {host} is not trusted ({reason}); add its authority to the system's, "
            "or name a file of authorities in SSL_CERT_FILE"
        )
    if isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError, TimeoutError)):
        return Transient(f"the connection was lost ({_short(cause)})")
    return RemoteError(f"{url}: no secure connection to {host} ({_short(cause)}); does it speak HTTPS on this port?")


def _reason(error: Exception) -> str:
    for found in (error.__cause__, error.__context__, _cause(error)):
        if isinstance(found, socket.gaierror):
            return f"unknown host: {found.strerror}"
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
    return _short(error)


def _speaks_no_http(cause: BaseException) -> bool:
    """Return whether http.client met bytes that are no answer; two of its errors mean a connection that ended."""
    if isinstance(cause, http.client.IncompleteRead):
        # Also of a chunk's size that is no number; where the connection ended before it, that is an empty text.
        size = cause.__context__
        return isinstance(size, ValueError) and not str(size).endswith("b''")
    return isinstance(cause, http.client.HTTPException) and not isinstance(cause, http.client.RemoteDisconnected)


def _short(error: Any) -> str:
    """Return the text of an error in one line, cut at 200 characters, since a server's own words may be long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
