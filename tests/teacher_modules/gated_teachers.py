"""A teacher that answers for one shard, and then says nothing until there is a file `open`."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ferkd_tiny_teachers import Tiny, is_real_batch

FOLDER = Path(os.environ["GATED_FOLDER"])


class Gated(Tiny):
    crops = 0

    def forward(self, x):
        while self.crops >= 4 * 10 and not (FOLDER / "open").exists():
            if any(FOLDER.glob("out/.build/shards/*.json")):
                (FOLDER / "waits").touch()
            time.sleep(0.01)
        self.crops += len(x) if is_real_batch(x) else 0
        return super().forward(x)


def gated():
    return Gated(1)
