"""Teachers that end the process they run in."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

from ferkd_tiny_teachers import Tiny, is_real_batch

LIVES = Path(__file__).parent.with_name("lives")


class Deadly(Tiny):
    """Dies on its real batches as long as it finds lives to take; the probe is spared."""

    def forward(self, x):
        if is_real_batch(x):
            for life in LIVES.glob("*"):
                try:
                    life.unlink()
                except FileNotFoundError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def deadly():
    return Deadly(1)


class OnBrokenGpu(Tiny):
    """Meets a GPU that fails, as long as there are lives to take."""

    def forward(self, x):
        if is_real_batch(x):
            for life in LIVES.glob("*"):
                life.unlink(missing_ok=True)
                raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later")
        return super().forward(x)


def on_broken_gpu():
    return OnBrokenGpu(1)


class Slow(Tiny):
    def forward(self, x):
        if is_real_batch(x):
            (LIVES / f"asleep-{os.getpid()}").touch()
            time.sleep(600)
        return super().forward(x)


def slow():
    return Slow(1)


class Frozen(Tiny):
    """Hangs in C code that keeps all other threads of its process from running."""

    def forward(self, x):
        if is_real_batch(x):
            ctypes.PyDLL(None).sleep(600)
        return super().forward(x)


def frozen():
    return Frozen(1)


class Late(Tiny):
    """Says nothing that makes sense of its real batches."""

    def forward(self, x):
        return super().forward(x) * (float("nan") if is_real_batch(x) else 1)


def late():
    return Late(1)


def unborn():
    if "FERKD_DRIVER" not in os.environ or int(os.environ["FERKD_DRIVER"]) != os.getpid():
        os.kill(os.getpid(), signal.SIGKILL)
    return Tiny(1)
