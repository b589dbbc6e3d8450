"""Standard output and error whose reader may be gone: `2>&1 | head -1`, a closed terminal, a full disk below a log."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Forgiving:
    """A text stream that goes on into nothing once nobody can read it; all else is the stream's own."""

    def __init__(self, stream: TextIO, *, forgives: tuple[type[OSError], ...]) -> None:
        self._stream = stream
        self._forgives = forgives

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except self._forgives:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except self._forgives:
            self._give_up()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self) -> None:
        """Lead the descriptor to nowhere: for what is in the buffer, and for worker processes that inherit it."""
        with suppress(OSError, ValueError):  # a stream without a descriptor, as tests have
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """A build must not end because nobody reads what it says. Results on a full disk are still an error."""
    before = sys.stdout, sys.stderr
    # Python sets these to None where the descriptor is closed (`2>&-`).
    out, err = (stream or open(os.devnull, "w") for stream in before)  # noqa: PTH123
    sys.stdout = Forgiving(out, forgives=(BrokenPipeError,))
    sys.stderr = Forgiving(err, forgives=(OSError,))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
