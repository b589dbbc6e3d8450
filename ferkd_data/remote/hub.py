"""Where the Hugging Face hub keeps the files of a data set."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ferkd_data.errors import UsageError


@dataclass(frozen=True)
class HubPlace:
    """`hf://datasets/ORG/NAME[@REVISION][/FOLDER]`"""

    repository: str
    revision: str
    folder: str
    """With a slash at its end, or empty."""


def parse_hub_url(url: str) -> HubPlace:
    """Raises UsageError."""
    match = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?((?:/[\w.-]+)*)/?", url)
    if match is None or ".." in url:
        raise UsageError(f"{url}: is not of the form hf://datasets/ORG/NAME[@REVISION][/FOLDER]")
    repository, revision, folder = match.groups()
    return HubPlace(repository, revision or "main", f"{folder[1:]}/" if folder else "")


def hub_endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub_address(url: str) -> str:
    """Where the hub serves the files. Raises UsageError."""
    place = parse_hub_url(url)
    folder = f"/{place.folder}".rstrip("/")
    return f"{hub_endpoint()}/datasets/{place.repository}/resolve/{place.revision}{folder}"


def hub_headers() -> dict[str, str]:
    """The user's token, where there is one: the hub's own variable or login file."""
    token = os.environ.get("HF_TOKEN")
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    if token is None and (home / "token").is_file():
        token = (home / "token").read_text(encoding="utf-8").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}
