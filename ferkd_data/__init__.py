"""Offline soft labels for crops, after FerKD: build a label set once, replay it in any training loop.

Names are imported when first used, so `import ferkd_data` costs nothing: no torch, no pyarrow.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # For type checkers, which cannot follow __getattr__; a test compares this with _EXPORTS.
    from ferkd_data.bench import bench_teachers as bench_teachers
    from ferkd_data.bench import export_teacher as export_teacher
    from ferkd_data.builder import BuildResult as BuildResult
    from ferkd_data.builder import BuildSettings as BuildSettings
    from ferkd_data.builder import Resources as Resources
    from ferkd_data.builder import build as build
    from ferkd_data.calibration import Calibration as Calibration
    from ferkd_data.crop_kinds import CropKind as CropKind
    from ferkd_data.crops import Box as Box
    from ferkd_data.crops import CropDistribution as CropDistribution
    from ferkd_data.crops import Crops as Crops
    from ferkd_data.crops import draw_crops as draw_crops
    from ferkd_data.errors import FerkdError as FerkdError
    from ferkd_data.exchange.card_facts import CardFields as CardFields
    from ferkd_data.exchange.checks import VerifyReport as VerifyReport
    from ferkd_data.exchange.convert import convert as convert
    from ferkd_data.exchange.merge import merge as merge
    from ferkd_data.exchange.publish import publish as publish
    from ferkd_data.exchange.pull import pull as pull
    from ferkd_data.exchange.verify import verify as verify
    from ferkd_data.format.progress import TransferProgress as TransferProgress
    from ferkd_data.importers.dataset_reinforcement import import_dr as import_dr
    from ferkd_data.importers.fkd import FkdTeacher as FkdTeacher
    from ferkd_data.importers.fkd import import_fkd as import_fkd
    from ferkd_data.importers.fkd_export import export_fkd as export_fkd
    from ferkd_data.importers.relabel_maps import import_relabel as import_relabel
    from ferkd_data.label_set import LabelSet as LabelSet
    from ferkd_data.label_set import open_labels as open_labels
    from ferkd_data.labels.buckets import QuantileThresholds as QuantileThresholds
    from ferkd_data.labels.buckets import Thresholds as Thresholds
    from ferkd_data.loader import CropDataset as CropDataset
    from ferkd_data.loader import CropLoader as CropLoader
    from ferkd_data.loader import LoaderStats as LoaderStats
    from ferkd_data.losses import SoftTargetLoss as SoftTargetLoss
    from ferkd_data.losses import kl_div as kl_div
    from ferkd_data.losses import soft_cross_entropy as soft_cross_entropy
    from ferkd_data.mixing import CutMix as CutMix
    from ferkd_data.mixing import Mixup as Mixup
    from ferkd_data.normalization import normalize as normalize
    from ferkd_data.relabelling import relabel as relabel
    from ferkd_data.report import ReportResult as ReportResult
    from ferkd_data.report import write_report as write_report
    from ferkd_data.report.compare import Comparison as Comparison
    from ferkd_data.report.compare import compare as compare
    from ferkd_data.report.make import LiveReport as LiveReport
    from ferkd_data.report.preview import preview as preview
    from ferkd_data.report.show import Shown as Shown
    from ferkd_data.report.show import show as show
    from ferkd_data.rng import generator as generator
    from ferkd_data.selfmix import SelfMix as SelfMix
    from ferkd_data.targets import SoftTargets as SoftTargets
    from ferkd_data.teachers import TeacherSpec as TeacherSpec

if sys.platform == "win32":
    raise ImportError("ferkd-data needs a POSIX system, Linux or macOS: it locks and maps files; on Windows, use WSL")

__version__ = "0.1.0"

_EXPORTS: dict[str, str] = {
    "Calibration": "calibration",
    "CropDataset": "loader",
    "CropLoader": "loader",
    "LoaderStats": "loader",
    "CutMix": "mixing",
    "Mixup": "mixing",
    "SelfMix": "selfmix",
    "SoftTargetLoss": "losses",
    "SoftTargets": "targets",
    "generator": "rng",
    "kl_div": "losses",
    "normalize": "normalization",
    "soft_cross_entropy": "losses",
    "BuildResult": "builder",
    "BuildSettings": "builder",
    "Box": "crops",
    "CropDistribution": "crops",
    "CropKind": "crop_kinds",
    "Crops": "crops",
    "FerkdError": "errors",
    "LabelSet": "label_set",
    "QuantileThresholds": "labels.buckets",
    "Resources": "builder",
    "TeacherSpec": "teachers",
    "Thresholds": "labels.buckets",
    "bench_teachers": "bench",
    "build": "builder",
    "CardFields": "exchange.card_facts",
    "FkdTeacher": "importers.fkd",
    "convert": "exchange.convert",
    "export_fkd": "importers.fkd_export",
    "export_teacher": "bench",
    "import_dr": "importers.dataset_reinforcement",
    "import_fkd": "importers.fkd",
    "import_relabel": "importers.relabel_maps",
    "merge": "exchange.merge",
    "TransferProgress": "format.progress",
    "publish": "exchange.publish",
    "pull": "exchange.pull",
    "relabel": "relabelling",
    "verify": "exchange.verify",
    "ReportResult": "report",
    "write_report": "report",
    "LiveReport": "report.make",
    "Comparison": "report.compare",
    "compare": "report.compare",
    "preview": "report.preview",
    "Shown": "report.show",
    "show": "report.show",
    "VerifyReport": "exchange.checks",
    "open_labels": "label_set",
    "draw_crops": "crops",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _EXPORTS:
            raise AttributeError(f"module 'ferkd_data' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"ferkd_data.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
