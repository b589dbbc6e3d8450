"""Reading images from a source that fails for a while: tried again before an image is given up.

The loop is that of `ferkd_data.remote.retries`; here is which failures of file systems and servers may pass.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from typing import IO, TypeVar

from ferkd_data.errors import ImageError, SourceError
from ferkd_data.remote import Retries
from ferkd_data.remote.retries import GivenUpError, Transient
from ferkd_data.storage import open_binary

RETRIES = Retries(attempts=6, first_wait=0.5, longest_wait=10.0)
"""About 20 seconds for each image."""
IMAGES_IN_A_ROW = 3
"""Images without an answer in a row that mean that the source is down, not that sectors are bad."""
FOREIGN = ("aiohttp", "fsspec", "botocore", "aiobotocore", "gcsfs", "requests", "urllib3")
"""Packages of server clients whose errors are no OSError."""
WILL_NOT_PASS = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
)

T = TypeVar("T")


class NoAnswerError(OSError):
    """An action failed as often as it was tried, in a way that may pass."""


class UnansweredImageError(ImageError):
    """An image that was given up although nothing says that it is bad."""


def retried(action: Callable[[], T], what: str) -> T:
    """Call `action`, again while its failure may pass. Raises NoAnswerError in the end; other errors at once."""

    def attempt() -> T:
        try:
            return action()
        except Exception as error:
            # Clients of servers raise errors of any kind; what is not theirs goes on as it is.
            cause = _origin(error)
            if not _may_pass(cause):
                raise
            raise Transient(getattr(cause, "strerror", None) or str(cause) or type(cause).__name__) from error

    try:
        return RETRIES.run(attempt, what)
    except GivenUpError as error:
        raise NoAnswerError(str(error)) from error.__cause__


def unreadable(file: str, error: OSError) -> ImageError:
    """The ImageError for a file that could not be read."""
    if isinstance(error, NoAnswerError):
        return UnansweredImageError("unreadable", str(error))
    return ImageError("unreadable", f"{file}: {error.strerror or error}")


def while_it_answers(contents: Iterable[bytes | ImageError]) -> Iterator[bytes | ImageError]:
    """Yield the same contents. Raises SourceError when the source is down, before everything becomes a reject."""
    in_a_row = 0
    for content in contents:
        in_a_row = in_a_row + 1 if isinstance(content, UnansweredImageError) else 0
        if isinstance(content, UnansweredImageError) and in_a_row == IMAGES_IN_A_ROW:
            raise SourceError(
                f"the source does not answer: {in_a_row} images in a row cannot be read, the last {content.detail}; "
                "run the same command again when it does"
            )
        yield content


class ReopeningFile:
    """A file for reading that is opened again at its position when a read fails in a way that may pass."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._position = 0
        self._stream: IO[bytes] | None = retried(lambda: open_binary(path), path)

    def read(self, size: int = -1) -> bytes:
        data = retried(lambda: self._read(size), self._path)
        self._position += len(data)
        return data

    def seek(self, position: int, whence: int = 0) -> int:
        if whence != 0:
            raise ValueError("only positions from the start")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def __enter__(self) -> ReopeningFile:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def _read(self, size: int) -> bytes:
        if self._stream is None:
            self._stream = open_binary(self._path)
        try:
            self._stream.seek(self._position)
            return self._stream.read(size)
        except Exception:
            self.close()
            raise


def _origin(error: BaseException) -> BaseException:
    """Return the first cause below our own errors and those of fsspec, which calls a file of a dead server missing."""
    told: BaseException | None = error
    while told is not None:
        if _is_foreign(told):
            return told
        told = told.__cause__
    return error.__cause__ if isinstance(error, SourceError) and error.__cause__ else error


def _is_foreign(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in FOREIGN


def _may_pass(error: BaseException) -> bool:
    if _is_foreign(error):
        status = getattr(error, "status", None)
        return not isinstance(status, int) or status >= 500 or status in (408, 429)
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    # Without a number it is about the contents: a decoder's "corrupt" is an OSError too.
    return isinstance(error, OSError) and error.errno is not None and error.errno not in WILL_NOT_PASS
