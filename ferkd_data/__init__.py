"""Offline soft labels for crops, after FerKD: build a label set once, replay it in any training loop.

Names are imported when first used, so `import ferkd_data` costs nothing: no torch, no pyarrow.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS: dict[str, str] = {
    "Calibration": "calibration",
    "CropDataset": "loader",
    "CropLoader": "loader",
    "CutMix": "mixing",
    "Mixup": "mixing",
    "SelfMix": "selfmix",
    "SoftTargets": "targets",
    "generator": "rng",
    "kl_div": "losses",
    "normalize": "normalization",
    "soft_cross_entropy": "losses",
    "BuildResult": "builder",
    "BuildSettings": "builder",
    "Box": "crops",
    "CropDistribution": "crops",
    "Crops": "crops",
    "FerkdError": "errors",
    "LabelSet": "label_set",
    "QuantileThresholds": "buckets",
    "Resources": "builder",
    "TeacherSpec": "teachers",
    "Thresholds": "buckets",
    "bench_teachers": "bench",
    "build": "builder",
    "CardFields": "exchange.card",
    "FkdTeacher": "exchange.fkd",
    "convert": "exchange.convert",
    "export_fkd": "exchange.convert",
    "export_teacher": "bench",
    "import_dr": "exchange.import_labels",
    "import_fkd": "exchange.import_labels",
    "merge": "exchange.merge",
    "publish": "exchange.publish",
    "pull": "exchange.pull",
    "relabel": "exchange.relabel",
    "verify": "exchange.verify",
    "VerifyReport": "exchange.faults",
    "open_labels": "label_set",
    "draw_crops": "crops",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'ferkd_data' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ferkd_data.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
