"""Teachers that run out of memory on batches of more than `most` crops, or raise on any batch."""

from __future__ import annotations

import torch
from ferkd_tiny_teachers import Tiny, is_real_batch


class Greedy(Tiny):
    def __init__(self, most):
        super().__init__(1)
        self.most = most

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(x)


def greedy():
    return Greedy(5)


def greedy_of_eight():
    return Greedy(8)


class Raising(Tiny):
    def forward(self, x):
        if is_real_batch(x):
            raise KeyError("no such layer")
        return super().forward(x)


def raising():
    return Raising(1)
