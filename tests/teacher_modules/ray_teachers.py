"""Teachers that look into a folder for what is to happen to them. The driver shows them a few images too."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from ferkd_tiny_teachers import Tiny, is_real_batch

FOLDER = Path(os.environ["RAY_TEACHERS_FOLDER"])
IN_WORKER = any("default_worker" in argument for argument in sys.argv)


class Deadly(Tiny):
    """Ends its process as long as it finds lives to take."""

    def forward(self, x):
        for life in FOLDER.glob("life-*") if IN_WORKER and is_real_batch(x) else ():
            life.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def deadly():
    return Deadly(1)


class Slow(Tiny):
    """Slow while a file `slow` is there; waits while a file says that its process is to, or all for somebody beside."""

    def forward(self, x):
        if IN_WORKER and is_real_batch(x):
            (FOLDER / f"at-work-{os.getpid()}").touch()
            until = time.monotonic() + 60
            while self.waits():
                if time.monotonic() > until:
                    raise TimeoutError("waited in vain")
                time.sleep(0.05)
            if (FOLDER / "slow").exists():
                time.sleep(0.4)
        return super().forward(x)

    def waits(self):
        alone = len(list(FOLDER.glob("at-work-*"))) < 2
        return (FOLDER / f"wait-{os.getpid()}").exists() or ((FOLDER / "together").exists() and alone)


def slow():
    return Slow(1)


class Hanging(Tiny):
    def forward(self, x):
        if IN_WORKER and is_real_batch(x):
            time.sleep(60)
        return super().forward(x)


def hanging():
    return Hanging(1)


class NaN(Tiny):
    """Gives NaN, but not to the driver, which would find out first."""

    def forward(self, x):
        return super().forward(x) * (float("nan") if IN_WORKER and is_real_batch(x) else 1)


def nan():
    return NaN(1)
