"""The one retry loop: for label sets on servers, and for images wherever they lie.

Clients below it try nothing again: urllib3 is told so. Whoever calls `Retries.run` decides which failures may pass.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
JITTER = random.SystemRandom()
PERMANENT = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EROFS,
)
"""Answers of a system about the file or the path, which the next attempt would get again."""
LOG = logging.getLogger("ferkd_data.remote")
"""Warns of what is tried again: Python prints warnings on stderr where nobody has asked for anything else."""


class Transient(Exception):
    """A failure that may pass: the action may work when tried again."""


class Stalled(Transient):
    """A server sends next to nothing: attempts that get a few bytes further count like those that get none."""


class GivenUpError(Exception):
    """An action failed with Transient as often as it may; the text says what, why and how often."""


@dataclass(frozen=True, kw_only=True)
class Retries:
    """The number of attempts of a failing action, and the waits between them."""

    attempts: int = 8
    """Attempts in a row without progress."""
    first_wait: float = 0.5
    """Seconds; doubled after each attempt, with jitter."""
    longest_wait: float = 30.0
    timeout: float = 60.0
    """Seconds without a byte, for the head of an answer, and for LEAST_BYTES of a file."""

    def wait(self, attempt: int) -> None:
        # Jitter keeps a thousand workers that lost the same server from coming back in the same moment. Not from the
        # global generator: its draws belong to the training, and forked workers would all draw the same.
        time.sleep(min(self.first_wait * 2**attempt, self.longest_wait) * JITTER.uniform(0.5, 1.0))

    def run(
        self,
        action: Callable[[], T],
        what: str,
        *,
        progress: Callable[[], int] = lambda: 0,
        before_attempt: Callable[[], None] = lambda: None,
    ) -> T:
        """Call `action` until it does not raise Transient; any other error ends the loop at once.

        An attempt after which `progress()` has grown starts the count anew, unless it stalled: so a download that gets
        further each time goes on for as long as it takes. `before_attempt` may raise to end the loop.

        Raises GivenUpError after `attempts` failures in a row.
        """
        failures = 0
        while True:
            before_attempt()
            # Each attempt is measured against its own start, so that progress before it does not count twice.
            reached = progress()
            try:
                return action()
            except Transient as error:
                advanced = progress() > reached and not isinstance(error, Stalled)
                failures = 1 if advanced else failures + 1
                if failures >= self.attempts:
                    raise GivenUpError(f"{what}: {error}, also after {failures} attempts") from error
                LOG.warning("%s: %s; trying again (%d of %d)", what, error, failures + 1, self.attempts)
                self.wait(failures)
