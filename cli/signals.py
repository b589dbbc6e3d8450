"""Signals that end a command.

SIGINT (Ctrl-C), SIGTERM and SIGHUP (a closed terminal) end a command in order at the first signal, with one line and
status 128 + the signal's number. A second signal ends the process at once. Nothing that was finished is lost either
way. A build first gives its shards in progress some time (`--grace`) at SIGTERM and SIGHUP.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signalled(KeyboardInterrupt):
    """Raised in the main thread at the first signal; libraries handle it as they handle Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def end_at_once(number: int, frame: FrameType | None) -> None:
    """End the process at a second signal."""
    with suppress(OSError):
        # The descriptor: the signal may have come in the middle of a write to the stream, whose lock is then held.
        os.write(2, b"\nferkd-data: ended at once; run the same command again to resume\n")
    os._exit(128 + number)


def handle_ending(handler: Any) -> None:
    """Give all of ENDING a handler, but for signals that are ignored: `nohup` and `&` in scripts do so on purpose."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def orderly_end() -> Iterator[None]:
    """Handle ENDING until the context ends. Does nothing outside the main thread, and for signals that are ignored."""
    # Python sets handlers in the main thread alone.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            end_at_once(number, frame)
        seen = True
        raise Signalled(number)

    # `nohup` and `&` in scripts leave signals ignored on purpose.
    taken = {number: before for number in ENDING if (before := signal.getsignal(number)) is not signal.SIG_IGN}
    for number in taken:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, before in taken.items():
            signal.signal(number, before)
