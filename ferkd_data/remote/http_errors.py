"""What went wrong between here and an HTTP server: may it pass when it is tried again, and how to say it."""

from __future__ import annotations

import http.client
import socket
import ssl
from typing import Any
from urllib.parse import urlsplit

from ferkd_data.errors import RemoteError
from ferkd_data.remote.transport import Transient


def failure(error: Exception, url: str, *, reached: bool) -> RemoteError | Transient:
    """The error to raise for one of urllib3's.

    A refused connection or an unknown host is a mistake in the URL or in the network's settings, unless the server has
    answered before (`reached`): then it may be restarting.
    """
    import urllib3.exceptions as of

    cause = _cause(error)
    place = urlsplit(url).netloc
    if isinstance(error, of.SSLError):
        return _of_tls(cause, url, place)
    if isinstance(error, of.ConnectTimeoutError) and not isinstance(error, of.NewConnectionError):
        return Transient(f"{place} cannot be reached (no answer in time)")
    if isinstance(error, (of.NewConnectionError, of.ProxyError)):
        text = f"{place} cannot be reached ({_reason(error)})"
        return Transient(text) if reached else RemoteError(f"{url}: {text}; check the URL and the network")
    if _speaks_no_http(cause):
        return RemoteError(f"{url}: the server at {place} does not answer in HTTP as it should ({_short(cause)})")
    if isinstance(error, (of.ProtocolError, of.TimeoutError)):
        return Transient(f"the connection was lost ({_short(cause)})")
    return RemoteError(f"{url}: {_short(error)}")


def _cause(error: Exception) -> BaseException:
    """What urllib3 wraps: the last of an error's arguments that is an error itself, or its cause."""
    inner = [part for part in error.args if isinstance(part, BaseException)]
    return inner[-1] if inner else error.__cause__ or error


def _of_tls(cause: BaseException, url: str, place: str) -> RemoteError | Transient:
    if isinstance(cause, ssl.SSLCertVerificationError):
        said = cause.verify_message or _short(cause)
        return RemoteError(
            f"{url}: the certificate of {place} is not trusted ({said}); add its authority to the system's, "
            "or name a file of authorities in SSL_CERT_FILE"
        )
    if isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError, TimeoutError)):
        return Transient(f"the connection was lost ({_short(cause)})")
    return RemoteError(f"{url}: no secure connection to {place} ({_short(cause)}); does it speak HTTPS on this port?")


def _reason(error: Exception) -> str:
    for found in (error.__cause__, error.__context__, _cause(error)):
        if isinstance(found, socket.gaierror):
            return f"unknown host: {found.strerror}"
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
    return _short(error)


def _speaks_no_http(cause: BaseException) -> bool:
    """What http.client raises for bytes that are no answer; of its errors, two are of connections that ended."""
    if isinstance(cause, http.client.IncompleteRead):
        # Also of a chunk's size that is no number; where the connection ended before it, that is an empty text.
        size = cause.__context__
        return isinstance(size, ValueError) and not str(size).endswith("b''")
    return isinstance(cause, http.client.HTTPException) and not isinstance(cause, http.client.RemoteDisconnected)


def _short(error: Any) -> str:
    """One line; a server's own words may be long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
