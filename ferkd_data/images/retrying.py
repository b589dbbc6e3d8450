"""Retry reads of images: decide which failures of file systems and servers are transient.

The retry loop itself is in `ferkd_data.remote.retries`. An image that stays unreadable becomes a reject; several in a
row mean that the source is down, and end the build instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import IO, TypeVar

from ferkd_data.errors import ImageError, SourceError
from ferkd_data.remote import Retries
from ferkd_data.remote.retries import PERMANENT, GivenUpError, Transient
from ferkd_data.storage import open_binary, refuse_too_many_files

RETRIES = Retries(attempts=6, first_wait=0.5, longest_wait=10.0)
"""About 20 seconds of waiting for each image."""
IMAGES_IN_A_ROW = 3
"""Consecutive unanswered images that mean that the source is down, rather than that single sectors are bad."""
CLIENTS = ("aiohttp", "fsspec", "botocore", "aiobotocore", "gcsfs", "requests", "urllib3")
"""Packages of network clients, whose errors are often no OSError."""
T = TypeVar("T")


class NoAnswerError(OSError):
    """Raised where an action failed in every attempt, each time in a way that may be transient."""


class UnansweredImageError(ImageError):
    """Raised for an image whose source did not answer; the image itself may be sound."""


def retried(action: Callable[[], T], what: str) -> T:
    """Call `action`, and again after transient failures.

    Raises NoAnswerError after the last attempt, and at once any error that is not transient, TooManyOpenFilesError
    among them.
    """

    def attempt() -> T:
        try:
            return action()
        except Exception as error:
            # Network clients raise errors of any class. An error of anything else is raised on unchanged.
            cause = _origin(error)
            # Another attempt would have no more files, and the image is not at fault.
            refuse_too_many_files(what, cause)
            if not _is_transient(cause):
                raise
            raise Transient(getattr(cause, "strerror", None) or str(cause) or type(cause).__name__) from error

    try:
        return RETRIES.run(attempt, what)
    except GivenUpError as error:
        raise NoAnswerError(str(error)) from error.__cause__


def unreadable(file: str, error: OSError) -> ImageError:
    """Turn the error of a failed read into an ImageError."""
    if isinstance(error, NoAnswerError):
        return UnansweredImageError("unreadable", str(error))
    return ImageError("unreadable", f"{file}: {error.strerror or error}")


def while_it_answers(contents: Iterable[bytes | ImageError]) -> Iterator[bytes | ImageError]:
    """Yield `contents` unchanged while the source answers.

    Raises SourceError after IMAGES_IN_A_ROW unanswered images: otherwise all further images would become rejects.
    """
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
    """A binary file for reading that retries: after a transient failure it is opened again at its position."""

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
        # The position is this object's, not the stream's: a stream that was opened again starts at 0.
        try:
            self._stream.seek(self._position)
            return self._stream.read(size)
        except Exception:
            self.close()
            raise


def _origin(error: BaseException) -> BaseException:
    """Find the error of a network client in the chain of causes, else what a SourceError wraps, else the error itself.

    fsspec hides a dead server behind FileNotFoundError, which would look permanent.
    """
    cause: BaseException | None = error
    while cause is not None:
        if _is_of_a_client(cause):
            return cause
        cause = cause.__cause__
    return error.__cause__ if isinstance(error, SourceError) and error.__cause__ else error


def _is_of_a_client(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in CLIENTS


def _is_transient(error: BaseException) -> bool:
    if _is_of_a_client(error):
        status = getattr(error, "status", None)
        # Without a status the client did not even get an answer.
        return not isinstance(status, int) or status >= 500 or status in (408, 429)
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    # An OSError without a number is about the contents, such as a decoder's "corrupt".
    return isinstance(error, OSError) and error.errno is not None and error.errno not in PERMANENT
