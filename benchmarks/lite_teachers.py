"""The demo's teachers as PyTorch modules, to compare the ways of running them:

cd benchmarks
ferkd-data bench --device cpu --teacher python:lite_teachers:lite0 --teacher python:lite_teachers:lite1 …
"""

from __future__ import annotations

from typing import Any

from ferkd_data.demo import SIZES, efficientnet_lite


def lite0() -> Any:
    return _teacher(0)


def lite1() -> Any:
    return _teacher(1)


def lite2() -> Any:
    return _teacher(2)


def _teacher(number: int) -> Any:
    module: Any = efficientnet_lite(number)
    module.preprocessing = {"size": SIZES[number], "mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
    return module
