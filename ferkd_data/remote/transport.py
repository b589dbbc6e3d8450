"""The operations of every kind of server, and the errors for its refusals."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Protocol

from ferkd_data.errors import RemoteError

NOT_FOUND = (404, 410)
FORBIDDEN = (401, 403)
TRANSIENT = (408, 425, 429)
"""Statuses below 500 that may pass: time-out, too early, too many requests."""
LOG_IN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run: aws configure",
    "gs": "run: gcloud auth application-default login (public data: gs://anonymous@BUCKET/...)",
    "hf": "set HF_TOKEN, or run: hf auth login",
}

Chunks = Generator[bytes, None, None]
"""A stream of bytes. It must be closed, which frees the connection or the file."""


class Transport(Protocol):
    """One kind of server. Raises Transient for what may pass, RemoteError for what will not."""

    reached: bool
    """True once the server has answered: from then on, a refused connection may mean that it is restarting."""

    def read(self, name: str, start: int) -> tuple[int, Chunks]:
        """Read a file from `start`: returns the first byte that comes (0 where ranges are not known) and the chunks."""

    def size(self, name: str) -> int | None:
        """Return the bytes of the file; None where there is none."""

    def write(self, name: str, file: Path) -> None: ...

    def sizes(self) -> dict[str, int]:
        """List the bytes of every file below the URL, by name."""

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; do nothing where there is neither."""


def refused(what: str, status: int, log_in: str = "") -> RemoteError:
    if status in NOT_FOUND:
        return RemoteError(f"{what}: no such file on the server", status=status)
    if status in FORBIDDEN:
        return RemoteError(f"{what}: access denied ({status}); is it private? {log_in or log_in_to(what)}", status)
    return RemoteError(f"{what}: the server refused ({status})", status)


def log_in_to(what: str) -> str:
    return LOG_IN.get(what.partition("://")[0], "only files that anybody may read can be had over HTTP")
