"""Something to look at: a label set as a page, an image with its boxes, a loader's next batch, two sets compared."""

from __future__ import annotations

from ferkd_data.report.make import ReportResult, write_report

__all__ = ["ReportResult", "write_report"]
