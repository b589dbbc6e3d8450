"""Look at labels: `write_report` and `LiveReport` write a label set as an HTML page, `preview` a loader's next batch;
`show` draws one image with its crops; `compare` compares two label sets.

A report is made in three steps. `collect` reads the label set once, into sums (`sketch`) and samples (`samples`,
`suspects`). `pictures` fetches the sampled images. `page` arranges charts, tables, cards and findings, and renders them
as one file.
"""

from __future__ import annotations

from ferkd_data.report.make import ReportResult, write_report

__all__ = ["ReportResult", "write_report"]
