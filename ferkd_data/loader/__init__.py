"""The loader: label sets and images in, training batches out."""

from __future__ import annotations

from ferkd_data.loader.crop_dataset import CropDataset
from ferkd_data.loader.crop_loader import CropLoader
from ferkd_data.loader.stats import LoaderStats

__all__ = ["CropDataset", "CropLoader", "LoaderStats"]
