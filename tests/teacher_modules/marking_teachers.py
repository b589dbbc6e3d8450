"""Teachers that leave a mark, or die, where they are asked a batch."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from ferkd_tiny_teachers import Tiny


class Marking(Tiny):
    def forward(self, x):
        if len(x) > 2:
            (Path(__file__).parent / f"{os.getpid()}-with-{torch.get_num_threads()}-threads").touch()
        return super().forward(x)


def marking():
    return Marking(1)


class Dying(Tiny):
    def forward(self, x):
        if len(x) > 2:
            os._exit(9)
        return super().forward(x)


def dying():
    return Dying(1)
