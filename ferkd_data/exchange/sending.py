"""A file on its way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class FileToSend:
    name: str
    file: Path
    bytes: int
    sha256: str
