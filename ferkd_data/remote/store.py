"""Files in a folder or an object store, by Arrow's file systems: read and written."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from ferkd_data.errors import RemoteError
from ferkd_data.remote.retries import PERMANENT, Transient
from ferkd_data.remote.transport import TRANSIENT, Chunks, log_in_to, refused
from ferkd_data.storage import CHUNK_BYTES, NO_SPACE, open_regular_stream, write_atomically

STORE_CHUNK_BYTES = 8 * CHUNK_BYTES
"""Each read of a store is a request of its own, which takes tens of milliseconds however short it is."""
DENIED = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "INVALID_SIGNATURE",
    "UNRECOGNIZED_CLIENT",
)
"""Arrow's names for the reasons of S3 to answer 403."""
NO_SERVER = ("curlCode: 6,", "curlCode: 7,", "curlCode: 35,", "curlCode: 60,")
"""curl's numbers for an unknown host, a refused connection, no TLS, and a certificate that is not trusted."""


class StoreTransport:
    """A folder, S3 or Google's store, through Arrow's file systems and the stores' usual credentials."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.reached = False

    @cached_property
    def _target(self) -> tuple[Any, str]:
        from pyarrow import fs

        reached = self.reached
        with self._explained(self._url):
            file_system, root = fs.FileSystem.from_uri(self._url)
        # Making a file system contacts no server, so this does not count as an answer.
        self.reached = reached
        return file_system, root.rstrip("/")

    def read(self, name: str, start: int) -> tuple[int, Chunks]:
        file_system, root = self._target
        what = f"{self._url}/{name}"
        if file_system.type_name == "local":
            return start, self._from_disk(Path(f"{root}/{name}"), start, what)
        with self._explained(what):
            file = file_system.open_input_file(f"{root}/{name}")
            try:
                file.seek(start)
            except BaseException:
                file.close()
                raise
        return start, self._chunks(file, what)

    def size(self, name: str) -> int | None:
        file_system, root = self._target
        with self._explained(f"{self._url}/{name}"):
            info = file_system.get_file_info(f"{root}/{name}")
        return info.size if info.is_file else None

    def write(self, name: str, file: Path) -> None:
        file_system, root = self._target
        path = f"{root}/{name}"
        with self._explained(f"{self._url}/{name}"):
            if file_system.type_name == "local":
                # Readers may have the old file mapped; and half a manifest would be taken for another label set's.
                with write_atomically(Path(path)) as aside:
                    shutil.copyfile(file, aside)
                return
            # An object appears when the stream is closed, so a killed upload leaves no half object.
            with file.open("rb") as source, file_system.open_output_stream(path) as sink:
                while chunk := source.read(STORE_CHUNK_BYTES):
                    sink.write(chunk)

    def sizes(self) -> dict[str, int]:
        from pyarrow import fs

        file_system, root = self._target
        with self._explained(self._url):
            # Object stores have no folders: one that nobody has written to is not found, and is empty.
            found = file_system.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        return {info.path.removeprefix(f"{root}/"): info.size for info in found if info.is_file}

    def remove(self, name: str) -> None:
        file_system, root = self._target
        path = f"{root}/{name}"
        with self._explained(f"{self._url}/{name}"):
            info = file_system.get_file_info(path)
            if info.is_file:
                file_system.delete_file(path)
            elif info.type.name == "Directory":
                file_system.delete_dir(path)

    def _from_disk(self, path: Path, start: int, what: str) -> Chunks:
        """Read without Arrow, which would wait at a FIFO and ignore Ctrl-C. Raises LabelSetError for a FIFO."""
        with self._explained(what), open_regular_stream(path) as stream:
            stream.seek(start)
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk

    def _chunks(self, file: Any, what: str) -> Chunks:
        try:
            while True:
                with self._explained(what):
                    chunk = file.read(STORE_CHUNK_BYTES)
                if not chunk:
                    return
                yield chunk
        finally:
            file.close()

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn errors of Arrow's file systems into Transient, where they may pass, and RemoteError."""
        try:
            yield
            self.reached = True
        except FileNotFoundError as error:
            raise refused(what, 404) from error
        except PermissionError as error:
            raise refused(what, 403) from error
        except (OSError, ValueError, pa.ArrowException) as error:
            # The disk of a local target: `explain_full_disk` says what to do about it.
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise
            if isinstance(error, OSError) and error.errno in PERMANENT:
                # Below a file there is nothing, and so nothing is there either.
                if error.errno == errno.ENOTDIR:
                    raise refused(what, 404) from error
                raise RemoteError(f"{what}: {error.strerror}") from error
            text = str(error)
            # Arrow's errors carry a server's status in words only.
            status = re.search(r"HTTP status (\d{3})", text)
            number = int(status.group(1)) if status else None
            if number is not None and 400 <= number < 500 and number not in TRANSIENT:
                raise refused(what, number) from error
            if any(name in text for name in DENIED):
                raise refused(what, 403) from error
            if "credentials" in text.lower():
                raise RemoteError(f"{what}: no credentials were found; {log_in_to(what)}") from error
            if isinstance(error, ValueError):
                raise RemoteError(f"{what}: {text}") from error
            if not self.reached and any(code in text for code in NO_SERVER):
                raise RemoteError(
                    f"{what}: the store cannot be reached ({text}); check the URL and the network"
                ) from error
            raise Transient(text) from error
