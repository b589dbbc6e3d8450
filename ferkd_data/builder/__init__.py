"""The builder: images and teachers in, a label set out."""

from __future__ import annotations

from ferkd_data.builder.dry_run import Estimate, dry_run
from ferkd_data.builder.progress import Progress
from ferkd_data.builder.run import BuildResult, build
from ferkd_data.builder.settings import BuildSettings, Resources

__all__ = ["BuildResult", "BuildSettings", "Estimate", "Progress", "Resources", "build", "dry_run"]
