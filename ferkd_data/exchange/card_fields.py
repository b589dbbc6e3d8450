"""What only the publisher knows of a label set: its name, its licence, its author. A published card remembers it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from typing import Any

from ferkd_data.errors import UsageError
from ferkd_data.manifest import Manifest

MARK = re.compile(r"<!-- ferkd-data card (\{.*\}) -->")
"""The line of a generated card that holds its fields and the identity of its label set as JSON."""
LONGEST_FIELD = 20_000
HUB_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
"""What the hub takes for a licence's name."""


@dataclass(frozen=True, kw_only=True)
class CardFields:
    """The publisher's part of a card. What is None is taken from the card that is published already, if there is one.

    Example: `CardFields(name="Labels of ImageNet", license="cc-by-4.0", author="Vision Lab")`
    """

    name: str | None = None
    """The title of the label set. Default: the folder's name."""
    license: str | None = None
    """Licence of the labels: an identifier such as cc-by-4.0, or `other`. Needed for a first publication."""
    license_name: str | None = None
    """The licence's name, where `license` is `other`."""
    license_link: str | None = None
    """Where that licence is: a URL, or LICENSE for the file of this name in the label set's folder (the default)."""
    image_license: str | None = None
    """Licence of the images, where they are included (layout webdataset)."""
    author: str | None = None
    homepage: str | None = None
    published: str | None = None
    """The day, as YYYY-MM-DD. Default: today, or the day of the published card of the same label set."""
    citation: str | None = None
    """BibTeX, or a sentence."""
    source_datasets: tuple[str, ...] | None = None
    """Names on the hub of the data sets that the images come from, such as imagenet-1k."""

    @property
    def title(self) -> str:
        return self.name or "Soft labels"

    @property
    def day(self) -> str:
        return self.published or datetime.now(timezone.utc).date().isoformat()


def completed(given: CardFields, cards: list[str], *, identity: str, folder_name: str) -> CardFields:
    """`given`, with what is None taken from the first of `cards` that knows it, and defaults for the rest.

    Texts that are no cards of ours count as none. The day stays while the label set is the same.
    """
    found = given
    for card in cards:
        remembered, of_identity = recalled(card)
        if of_identity != identity:
            remembered = replace(remembered, published=None)
        known = {field.name: getattr(remembered, field.name) for field in fields(CardFields)}
        found = replace(found, **{name: value for name, value in known.items() if getattr(found, name) is None})
    lower = found.license.lower() if found.license else None
    return replace(found, name=found.name or folder_name, license=lower, published=found.day)


def check_fields(given: CardFields, manifest: Manifest, *, has_license_file: bool = True) -> None:
    """Raises UsageError where the card would leave readers without a licence."""
    if not given.license:
        raise UsageError("say under which licence the labels are, with --license cc-by-4.0 or another")
    if manifest.layout == "webdataset" and not given.image_license:
        raise UsageError("layout webdataset holds the images too: say under which licence with --image-license")
    if given.license != "other":
        return
    if not given.license_name or not HUB_NAME.fullmatch(given.license_name):
        raise UsageError(
            "licence `other` needs --license-name, of small letters, digits, dots and hyphens; got "
            f"{given.license_name!r}"
        )
    if not given.license_link and not has_license_file:
        raise UsageError("licence `other` needs --license-link URL, or a file LICENSE in the label set's folder")


def mark(given: CardFields, identity: str) -> str:
    """The line of a card by which `recalled` finds its fields again."""
    # `>` never stands in it, so nothing in a field can end the comment.
    text = json.dumps({"identity": identity, **asdict(given)}, sort_keys=True)
    return f"<!-- ferkd-data card {text.replace('<', chr(92) + 'u003c').replace('>', chr(92) + 'u003e')} -->"


def recalled(card: str) -> tuple[CardFields, str | None]:
    """The fields that a generated card holds, and the identity of its label set; nothing of any other text."""
    found = MARK.search(card)
    try:
        content: Any = json.loads(found.group(1)) if found else {}
    except (ValueError, RecursionError):
        content = {}
    texts = {
        field.name: content.get(field.name)
        for field in fields(CardFields)
        if isinstance(content.get(field.name), str) and len(content[field.name]) <= LONGEST_FIELD
    }
    sources = content.get("source_datasets")
    if isinstance(sources, list) and all(isinstance(name, str) for name in sources):
        texts["source_datasets"] = tuple(sources)
    identity = content.get("identity")
    return CardFields(**texts), identity if isinstance(identity, str) else None


def is_generated(card: str) -> bool:
    """Whether a README.md is a card that ferkd-data wrote, and not somebody's own words."""
    return MARK.search(card) is not None
