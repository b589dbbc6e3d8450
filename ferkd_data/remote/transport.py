"""What every kind of server gives, and how one says no."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Protocol

from ferkd_data.errors import RemoteError

NOT_FOUND = (404, 410)
FORBIDDEN = (401, 403)
TRANSIENT = (408, 425, 429)
LOG_IN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run: aws configure",
    "gs": "run: gcloud auth application-default login (public data: gs://anonymous@BUCKET/...)",
    "hf": "set HF_TOKEN, or run: hf auth login",
}

Chunks = Generator[bytes, None, None]
"""Must be closed: only then is the connection free, or the file."""


class Transport(Protocol):
    """One kind of server. Raises Transient for what may pass, RemoteError for what will not."""

    reached: bool
    """Whether the server has answered before: then a connection that is refused may mean that it is restarting."""

    def read(self, name: str, start: int) -> tuple[int, Chunks]:
        """(first byte that comes: `start`, or 0 where ranges are not known here; the chunks)."""

    def size(self, name: str) -> int | None:
        """Bytes of the file, None where there is none."""

    def write(self, name: str, file: Path) -> None: ...

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below the URL, by name."""

    def remove(self, name: str) -> None:
        """A file, or a folder with all that is in it; nothing where there is neither."""


def refused(what: str, status: int, log_in: str = "") -> RemoteError:
    if status in NOT_FOUND:
        return RemoteError(f"{what}: no such file on the server", status=status)
    if status in FORBIDDEN:
        return RemoteError(f"{what}: access denied ({status}); is it private? {log_in or log_in_to(what)}", status)
    return RemoteError(f"{what}: the server refused ({status})", status)


def log_in_to(what: str) -> str:
    return LOG_IN.get(what.partition("://")[0], "only files that anybody may read can be had over HTTP")
