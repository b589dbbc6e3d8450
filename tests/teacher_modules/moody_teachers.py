"""Teachers that have one bad batch as long as a file is there."""

from __future__ import annotations

import os
from pathlib import Path

from ferkd_tiny_teachers import Tiny, is_real_batch


class Moody(Tiny):
    asked = 0

    def bad(self, x):
        self.asked += is_real_batch(x)
        return self.asked == 4 and Path(os.environ["FERKD_MOOD"]).exists()


class Raising(Moody):
    def forward(self, x):
        if self.bad(x):
            raise RuntimeError("CUDA error: device-side assert triggered")
        return super().forward(x)


class Equal(Moody):
    def forward(self, x):
        return super().forward(x) * (0 if self.bad(x) else 1)


class NaN(Moody):
    def forward(self, x):
        return super().forward(x) * (float("nan") if self.bad(x) else 1)


def raising():
    return Raising(1)


def equal():
    return Equal(1)


def nan():
    return NaN(1)
