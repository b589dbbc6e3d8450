"""Teachers that leave a mark, or die, where they are asked a batch."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from ferkd_tiny_teachers import Tiny, is_real_batch


class Marking(Tiny):
    def forward(self, x):
        if is_real_batch(x):
            (Path(__file__).parent / f"{os.getpid()}-with-{torch.get_num_threads()}-threads").touch()
        return super().forward(x)


def marking():
    return Marking(1)


class Dying(Tiny):
    def forward(self, x):
        if is_real_batch(x):
            os._exit(9)
        return super().forward(x)


def dying():
    return Dying(1)
