"""What `verify` found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Fault:
    file: str
    """Relative to the label set; of the image source for faults found with `images`."""
    message: str
    row: int | None = None
    key: str | None = None
    crop: int | None = None
    field: str | None = None

    def __str__(self) -> str:
        row = None if self.row is None else f"row {self.row}"
        key = None if self.key is None else f"image {self.key!r}"
        crop = None if self.crop is None else f"crop {self.crop}"
        where = ", ".join(part for part in (row, key, crop, self.field) if part)
        return ": ".join(part for part in (self.file, where, self.message) if part)


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    files: int
    bytes: int
    images: int
    crops: int
    faults: tuple[Fault, ...]
    """The first ones, at most as many as were asked for."""
    faults_found: int
    warnings: tuple[str, ...]
    signer: str | None = None
    """Who signed the manifest, where that was asked for."""

    @property
    def ok(self) -> bool:
        return self.faults_found == 0

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}
