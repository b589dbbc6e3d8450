"""Files: written aside and renamed, hashed, and never outside the folder they belong to."""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import mmap
import os
import re
import resource
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast
from urllib.parse import unquote

from ferkd_data.errors import LabelSetError, SourceError, StorageFullError, TooManyOpenFilesError, UsageError

CHUNK_BYTES = 2**20
URL_AS_PATH = re.compile(r"(?:s3|gs|hf|https?):/")
"""The beginning of a URL, also of one that went through `Path`, which joins its slashes."""
FILE_URL = re.compile(r"file:(?://)?(?=/)")
HASHED_BYTES = 2**18
"""Bytes hashed at a time where they are read again, so that they are still in a core's cache."""
LEFTOVER = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")
"""Names that `write_atomically` gives to files while they are written."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
GO_ON = "free some and run the same command again: finished shards are kept"
FREE_CACHE = "free some, or choose another place for the cache with cache_dir or FERKD_DATA_CACHE"


def check_replaceable(path: Path, what: str, *marks: bytes) -> None:
    """Raise UsageError for an existing file without one of `marks` in its first bytes, where such a file is written.

    It may be SOURCE, or a photo: a name in the wrong place of a command is easily given.
    """
    if not path.is_file():
        return
    with path.open("rb") as stream:
        head = stream.read(512).lower()
    if head and not any(mark.lower() in head for mark in marks):
        raise UsageError(f"{path}: exists and is no {what}; name another file")


@contextmanager
def write_atomically(path: Path, *, sync: bool = True, advice: str = GO_ON) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it is synced to disk and renamed, on failure removed.

    Without `sync`, a power failure may lose the file, which is good enough for one that can be made again.

    Raises StorageFullError when the disk is full, UsageError where `path` is a device, a FIFO, a socket or a URL.
    """
    # Parents would be made for it: a folder `s3:` on this host, and nothing at the URL.
    if URL_AS_PATH.match(str(path)):
        raise UsageError(f"{path}: is a URL; name a file of this host")
    # Renaming would put a file in its place: for root, in that of /dev/null.
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UsageError(f"{path}: is a device, a FIFO or a socket; name a file to write to")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of two machines can have the same number.
    aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with explain_full_disk(path, advice):
            yield aside
            if sync:
                # Content before name: after a power failure, a file renamed first could have its final name and no
                # bytes.
                _sync(aside)
        # Renaming within a folder is atomic: readers see the old file or the new one.
        aside.replace(path)
        if sync:
            # The new name is an entry of the folder, which has to reach the disk as well.
            _sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def remove_leftovers(folder: Path, *, older_than: float = 0.0, below: bool = True) -> None:
    """Remove the unfinished files of killed writers in `folder`, where no live process may be writing.

    Folders below it are searched too, unless `below` is False. With `older_than`, only files that have not been touched
    for that many seconds are removed.
    """
    for path in folder.rglob(".*.tmp") if below else folder.glob(".*.tmp"):
        # Other programs have files of such names as well.
        if not LEFTOVER.fullmatch(path.name):
            continue
        with suppress(FileNotFoundError):
            if not older_than or time.time() - path.stat().st_mtime > older_than:
                path.unlink()


@contextmanager
def explain_full_disk(path: Path, advice: str = GO_ON) -> Iterator[None]:
    """Turn "no space left" into a StorageFullError that says what to do."""
    try:
        yield
    except OSError as error:
        if _is_system_error(error, *NO_SPACE):
            raise StorageFullError(f"{path}: no space left on the disk; {advice}") from error
        raise


def refuse_too_many_files(path: Path | str, error: BaseException) -> None:
    """Raise TooManyOpenFilesError where `error` says that no further file can be opened; else do nothing.

    The file at `path` may be sound: it must not be rejected, skipped or fetched again for such an error.
    """
    if _is_system_error(error, errno.EMFILE):
        raise too_many_open_files(path) from error
    if _is_system_error(error, errno.ENFILE):
        raise TooManyOpenFilesError(
            f"{path}: cannot be opened, since this machine has as many files open as it may (fs.file-max)"
        ) from error


def _is_system_error(error: BaseException, *codes: int) -> bool:
    """Return whether an error is one of the system's with one of these numbers, by itself or by its words."""
    # Libraries that wrap an OSError may keep the system's words and lose its number.
    return getattr(error, "errno", None) in codes or any(os.strerror(code) in str(error) for code in codes)


def too_many_open_files(path: Path | str) -> TooManyOpenFilesError:
    """Return the error for a file that this process may not open beside those that it has open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return TooManyOpenFilesError(
        f"{path}: cannot be opened, since this process has as many files open as it may ({limit}); raise the limit in "
        "the shell that starts it, as `ulimit -n 65536` does"
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def default_cache_dir() -> Path:
    """Return $FERKD_DATA_CACHE, or ferkd-data below the user's cache folder."""
    chosen = os.environ.get("FERKD_DATA_CACHE")
    if chosen:
        # A shell expands ~ in a variable, files of variables (.env, a batch system's) do not.
        return local_path(chosen)
    # An empty variable counts as unset, as the XDG specification says.
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ferkd-data"


def open_regular(path: Path | str) -> int:
    """Open a regular file for reading and return its descriptor.

    Raises LabelSetError at once for a FIFO, a device, a socket or a folder; TooManyOpenFilesError, which no caller
    takes for a fault of this file; OSError as `os.open` does.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer that may never come.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        refuse_too_many_files(path, error)
        # What Linux answers for a socket, and for a device without a driver.
        if error.errno == errno.ENXIO:
            raise LabelSetError(f"{path}: is not a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LabelSetError(f"{path}: is not a regular file")
    return descriptor


def open_regular_stream(path: Path) -> IO[bytes]:
    """Open a regular file as a binary stream. Raises as `open_regular` does."""
    return open(open_regular(path), "rb")


def read_text(path: Path) -> str:
    """Read a regular file as UTF-8 text, with or without a byte order mark.

    Raises as `open_regular` does, and UnicodeDecodeError.
    """
    with open_regular_stream(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
        return text.read()


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of at most `max_bytes` bytes. Raises LabelSetError for a larger one, as `open_regular`."""
    with open_regular_stream(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > max_bytes:
            raise LabelSetError(f"{path}: {size} bytes; at most {max_bytes} are read")
        return stream.read(max_bytes)


class OpenFile:
    """A regular file kept open for reading at offsets, by any thread; closed with its last reference at the latest."""

    def __init__(self, path: Path) -> None:
        """Raises as `open_regular` does."""
        # Set first, so that `__del__` of an object whose file could not be opened finds nothing to close.
        self.descriptor = -1
        self.path = path
        self.descriptor = open_regular(path)

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes at `offset`, or fewer where the file ends."""
        # pread leaves the descriptor's position alone, so that threads need no lock.
        return os.pread(self.descriptor, length, offset)

    def map(self) -> mmap.mmap:
        """Map the whole file, which must not be empty. The mapping stays valid after `close`."""
        return mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self, *, close: Callable[[int], None] = os.close) -> None:
        # The module's names are gone already when a file lives until the interpreter ends.
        if self.descriptor >= 0:
            close(self.descriptor)
            self.descriptor = -1


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a regular file, 64 hex digits. Raises as `open_regular` does."""
    with OpenFile(path) as file:
        return HashedFile(file).sha256()


_DIGESTS: dict[tuple[int, ...], str] = {}
"""The SHA-256 of each file that this process has checked, by `_state_of`. About 200 bytes for each file.

Threads share it: each entry is written whole, and two threads that hash one file write the same.
"""


def sha256_once(file: OpenFile) -> str:
    """Return the SHA-256 of an open file, computed once in this process for as long as the file stays as it is."""
    # Taken before hashing: a file that is written to meanwhile has another state the next time, and is hashed again.
    state = _state_of(file)
    found = _DIGESTS.get(state)
    if found is None:
        found = HashedFile(file).sha256()
        _DIGESTS[state] = found
    return found


def _state_of(file: OpenFile) -> tuple[int, ...]:
    """Identify a file and its content by device, inode, size and times, as the file system states them."""
    found = os.fstat(file.descriptor)
    # The change time too: tar and rsync set the modification time back, and no program can set the
    # change time.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class HashedFile:
    """A file that is hashed from its first byte to its last, and can be read meanwhile without reading it twice."""

    def __init__(self, file: OpenFile) -> None:
        self.file = file
        self._state = hashlib.sha256()
        self._chunk = b""
        self._start = 0

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes at `offset`, or fewer where the file ends; ascending offsets are read once only."""
        # Hash up to the chunk that holds the offset. One chunk is kept: what lies before it, or crosses its end, is
        # read again.
        while offset >= self._start + len(self._chunk) and self._hash_more():
            pass
        at = offset - self._start
        if 0 <= at <= len(self._chunk) - length:
            return self._chunk[at : at + length]
        return self.file.read(offset, length)

    def sha256(self) -> str:
        while self._hash_more():
            pass
        return self._state.hexdigest()

    def _hash_more(self) -> bool:
        start = self._start + len(self._chunk)
        chunk = self.file.read(start, HASHED_BYTES)
        if not chunk:
            return False
        self._state.update(chunk)
        self._start, self._chunk = start, chunk
        return True


def image_digest(data: bytes) -> bytes:
    """Return the BLAKE2b-128 of an encoded image: 16 bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


def inside(folder: Path, name: str) -> Path:
    """Return `folder / name`. Raises LabelSetError when that would lie outside `folder`, also through a link."""
    # The text first, which costs no system call; then the file system, since a link inside the folder may lead out.
    parts = name.split("/")
    if not name or name.startswith("/") or "\\" in name or "\0" in name or ".." in parts:
        raise LabelSetError(f"{folder}: {name!r} is not a path inside the label set")
    path = folder / name
    try:
        stays = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:
        # RuntimeError is a loop of links before Python 3.13; ValueError a name that no file system can hold.
        raise LabelSetError(f"{folder}: {name!r} is not a path inside the label set ({error})") from error
    if not stays:
        raise LabelSetError(f"{folder}: {name!r} leads outside the label set")
    return path


def local_path(path: str | Path) -> Path:
    """Return the path on this host of a path, which may begin with `~`, or of a file:// URL.

    Raises UsageError for another URL: as a path, it would name a folder `s3:` or `https:` on this host.
    """
    text = str(path)
    if URL_AS_PATH.match(text):
        raise UsageError(f"{text}: is a URL; give a path on this host")
    url = FILE_URL.match(text)
    return Path(unquote(text[url.end() :])) if url else expanded(text)


def expanded(path: str | Path) -> Path:
    """Replace a leading `~` by the home folder. A user that does not exist stays as it is, as in a shell.

    pathlib's own method raises a RuntimeError then.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111


def shown(path: str | Path) -> str:
    r"""Return a path as text that any file can hold, with bytes that are not UTF-8 as escapes.

    >>> shown(os.fsdecode(b"caf\xe9"))
    'caf\\xe9'
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_utf8(path: str | Path) -> bool:
    """Return whether a path is UTF-8: Arrow and ONNX Runtime cannot open others, and no JSON file can hold them."""
    return shown(path) == str(path)


def label_folder(path: str | Path) -> Path:
    """Return the folder of a label set on this host, as `local_path` does.

    Raises UsageError also for a path that is not UTF-8.
    """
    folder = local_path(path)
    if not is_utf8(folder.absolute()):
        raise UsageError(
            f"{shown(folder.absolute())}: is not UTF-8, so the files of a label set cannot be opened in it; rename the "
            "folder, or choose another one"
        )
    return folder


def is_url(text: str) -> bool:
    return "://" in text and not text.startswith("file://")


def open_binary(path: str) -> IO[bytes]:
    """Open a local file, or a URL through fsspec, for reading with seek. Raises SourceError."""
    try:
        if not is_url(path):
            return open_regular_stream(Path(path))
        # Not at the top: sources on a disk need no fsspec.
        import fsspec

        return cast(IO[bytes], fsspec.open(path, "rb").open())
    except LabelSetError as error:
        raise SourceError(str(error)) from error
    except (OSError, ImportError, ValueError) as error:
        raise SourceError(f"{path}: cannot be opened ({error})") from error


def expand(pattern: str) -> list[str]:
    """Return the sorted files (or the URLs) that a glob or brace pattern names, such as `train-{000..147}.tar`.

    Raises SourceError when the pattern, or one of its brace alternatives, matches nothing.
    """
    import braceexpand

    # An ordered set: alternatives of braces may name the same file, which must be listed once, at its first position.
    found: dict[str, Any] = {}
    try:
        alternatives = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise SourceError(f"{pattern}: the braces do not match") from error
    for alternative in alternatives:
        matches = _matches(alternative)
        if not matches:
            raise SourceError(f"{alternative}: no such file")
        found.update(dict.fromkeys(matches))
    return list(found)


def _matches(alternative: str) -> list[str]:
    # Tried as a name before as a pattern: file names may contain brackets and question marks.
    if is_url(alternative) or Path(alternative).is_file():
        return [alternative]
    return sorted(glob.glob(alternative, recursive=True))  # noqa: PTH207
