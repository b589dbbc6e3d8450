"""Finished label sets, opened for reading: one, or several of the same crops as their ensemble."""

from __future__ import annotations

from ferkd_data.label_set.ensemble import check_same_classes, combined_teachers, ensemble_shares
from ferkd_data.label_set.files import CachedFiles, Files, LocalFiles
from ferkd_data.label_set.label_set import LabelSet
from ferkd_data.label_set.opening import open_labels, read_remote_manifest
from ferkd_data.label_set.reader import StoredReader, VerifyLabels

__all__ = [
    "CachedFiles",
    "Files",
    "LabelSet",
    "LocalFiles",
    "StoredReader",
    "VerifyLabels",
    "check_same_classes",
    "combined_teachers",
    "ensemble_shares",
    "open_labels",
    "read_remote_manifest",
]
