from __future__ import annotations

import os
import signal
from pathlib import Path

from ferkd_tiny_teachers import Tiny, is_real_batch


class Deadly(Tiny):
    """Dies once, on a real batch: the probe is spared."""

    def forward(self, x):
        if is_real_batch(x) and take(Path(os.environ["WATCHED_LIFE"])):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def take(life):
    try:
        life.unlink()
    except FileNotFoundError:
        return False
    return True


def once():
    return Deadly(1)
