"""The facts that a card shows: the publisher's fields, the columns, and the images of each class.

The fields (name, licence, author) are known to the publisher alone. A published card remembers them in a comment, so
that publishing again need not repeat them. Columns have one description, for the card and for the Croissant metadata.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np

from ferkd_data.errors import UsageError
from ferkd_data.format import crop_arrays, parquet, webdataset
from ferkd_data.format.manifest import Manifest
from ferkd_data.label_set import LabelSet
from ferkd_data.labels.rows import UNKNOWN_TARGET, class_index_dtype
from ferkd_data.storage import is_utf8, shown

MARK = re.compile(r"<!-- ferkd-data card (\{.*\}) -->")
"""The line of a generated card that holds its fields and the identity of its label set as JSON."""
LONGEST_FIELD = 20_000
HUB_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
"""Licence names that the hub accepts."""


@dataclass(frozen=True, kw_only=True)
class CardFields:
    """The publisher's part of a card. Fields that are None are taken from the published card, if there is one.

    >>> fd.CardFields(name="Labels of ImageNet", license="cc-by-4.0", author="Vision Lab").title
    'Labels of ImageNet'
    """

    name: str | None = None
    """The title of the label set. Default: the folder's name."""
    license: str | None = None
    """Licence of the labels: an identifier such as cc-by-4.0, or `other`. Required for a first publication."""
    license_name: str | None = None
    """The licence's name, where `license` is `other`."""
    license_link: str | None = None
    """The address of that licence: a URL, or LICENSE (default) for that file in the label set's folder."""
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
    """Fill the fields of `given` that are None from the first of `cards` that has them, and the rest with defaults.

    Texts that are no generated cards are ignored. The day stays while the label set is the same.
    """
    found = given
    for card in cards:
        remembered, of_identity = recalled(card)
        # Another label set was published on that day.
        if of_identity != identity:
            remembered = replace(remembered, published=None)
        known = {field.name: getattr(remembered, field.name) for field in fields(CardFields)}
        found = replace(found, **{name: value for name, value in known.items() if getattr(found, name) is None})
    # The hub's identifiers are in small letters, and people write CC-BY-4.0.
    lower = found.license.lower() if found.license else None
    return replace(found, name=found.name or folder_name, license=lower, published=found.day)


def check_fields(given: CardFields, manifest: Manifest, *, has_license_file: bool = True) -> None:
    """Raise UsageError where the card would leave readers without a licence."""
    for field in fields(CardFields):
        value = getattr(given, field.name) or ()
        for text in (value,) if isinstance(value, str) else value:
            if not is_utf8(text):
                raise UsageError(f"{field.name}: {shown(text)} is not UTF-8; is that the encoding of this terminal?")
    if not given.license:
        raise UsageError("give the licence of the labels, such as --license cc-by-4.0")
    if manifest.layout == "webdataset" and not given.image_license:
        raise UsageError("layout webdataset contains the images: give their licence with --image-license")
    if given.license != "other":
        return
    if not given.license_name or not HUB_NAME.fullmatch(given.license_name):
        raise UsageError(
            "licence `other` needs --license-name, of small letters, digits, dots and hyphens; got "
            f"{given.license_name!r}"
        )
    if not given.license_link and not has_license_file:
        raise UsageError("licence `other` needs --license-link URL, or a file LICENSE in the label set's folder")


def mark(given: CardFields, identity: str, card: str) -> str:
    """Return the last line of a card, from which `recalled` reads its fields; `card` is what stands before it."""
    # `>` never stands in it, so nothing in a field can end the comment.
    text = json.dumps({"identity": identity, "text": _digest(card), **asdict(given)}, sort_keys=True)
    return f"<!-- ferkd-data card {text.replace('<', chr(92) + 'u003c').replace('>', chr(92) + 'u003e')} -->"


def recalled(card: str) -> tuple[CardFields, str | None]:
    """Read the fields of a generated card and the identity of its label set; of other texts, empty fields and None."""
    content = _marked(card)
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
    """Return whether a README.md is a card as ferkd-data wrote it, and was not edited since."""
    found = MARK.search(card)
    if found is None:
        return False
    whole = _marked(card).get("text") in (None, _digest(card[: found.start()]))
    return whole and not card[found.end() :].strip()


def _marked(card: str) -> dict[str, Any]:
    """Return the content of a card's last line; empty for other texts."""
    found = MARK.search(card)
    try:
        content: Any = json.loads(found.group(1)) if found else {}
    # A card is a stranger's text. Nesting of thousands of levels ends the parser, not this process.
    except (ValueError, RecursionError):
        content = {}
    return content if isinstance(content, dict) else {}


def _digest(text: str) -> str:
    """Return a digest of a card's text, the same whatever a system's line ends are."""
    return hashlib.sha256(text.replace("\r\n", "\n").strip().encode()).hexdigest()[:16]


COLUMNS = {
    "key": ("sc:Text", "The image's unique key."),
    "image_digest": ("sc:Text", "BLAKE2b-128 of the image file's bytes."),
    "height": ("sc:Integer", "Height of the decoded image in pixels."),
    "width": ("sc:Integer", "Width of the decoded image in pixels."),
    "target": ("sc:Integer", "Ground-truth class, null where unknown."),
    "box_top": ("sc:Integer", "First row of each crop."),
    "box_left": ("sc:Integer", "First column of each crop."),
    "box_height": ("sc:Integer", "Rows of each crop."),
    "box_width": ("sc:Integer", "Columns of each crop."),
    "flip": ("sc:Boolean", "Whether each crop is mirrored left to right after it was cut."),
    "class_index": (
        "sc:Integer",
        "The k most probable classes of each crop, flat: entry n * k + j is class j of crop n.",
    ),
    "class_prob": ("sc:Float", "Their probabilities in the same order, descending in each crop; float16 values."),
    "target_prob": ("sc:Float", "The probability of the ground truth in each crop, null where unknown."),
    "op_code": (
        "sc:Integer",
        "Recorded augmentations of each crop, flat, 0 where none: see docs/format.md.",
    ),
    "op_value": ("sc:Integer", "Their values in the same order."),
    "erase_top": ("sc:Integer", "First row of the erased box of each crop; its height is 0 where nothing is erased."),
    "erase_left": ("sc:Integer", "First column of the erased box."),
    "erase_height": ("sc:Integer", "Rows of the erased box."),
    "erase_width": ("sc:Integer", "Columns of the erased box."),
    "bucket": (
        "sc:Integer",
        "Difficulty of each crop: 0 extreme hard, 1 moderate hard, 2 hard positive, 3 easy positive.",
    ),
}
"""Croissant's type and the meaning of each column of layout parquet."""
MEMBERS = {
    "crops.npy": "Boxes (top, left, height, width), flip (0 or 1) and bucket (0 to 3) of each crop.",
    "class_index.npy": "The k most probable classes of each crop.",
    "class_prob.npy": "Their probabilities, descending in each crop; float16 values.",
    "target_prob.npy": "The probability of the ground truth in each crop, NaN where unknown.",
}


def columns_table(manifest: Manifest) -> str:
    """Make the Markdown section that lists the columns or members of a file."""
    index_dtype = np.dtype(class_index_dtype(manifest.num_classes))
    if manifest.layout == "webdataset":
        members = crop_arrays.shapes(manifest.num_crops, manifest.top_k, index_dtype)
        rows = [
            f"| `{name}` | {dtype.name}{list(shape)} | {MEMBERS[name]} |" for name, (dtype, shape) in members.items()
        ]
        if manifest.augmentations:
            rows += [
                f"| `{crop_arrays.OPERATIONS}` | uint16 | Recorded augmentations of each crop: see docs/format.md. |"
            ]
        rows += ["| `cls` | text | Ground-truth class; absent where unknown. |"]
        rows += ["| `jpg`, `png`, … | bytes | The image as it came, under the extension of its format. |"]
        title = "One sample for each image, with these members:"
    else:
        crops = manifest.block_crops(0)
        rows = []
        for field in parquet.schema(crops, manifest.top_k, index_dtype, manifest.operation_words):
            # As docs/format.md writes types; Arrow's own words mean nothing to most readers.
            kind = str(field.type).replace("fixed_size_list<element: ", "list<").replace("float", "float32")
            rows.append(f"| `{field.name}` | {kind} | {COLUMNS[field.name][1]} |")
        title = f"One row for each image. A file holds a block of {crops} crops of its images; k is {manifest.top_k}."
    return "\n".join(["## Columns", "", title, "", "| column | type | content |", "| --- | --- | --- |", *rows])


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Facts about the images of a label set that its manifest does not state."""

    images_of_class: Counter[int]
    """Images by their ground truth; those without one are left out."""
    image_suffixes: tuple[str, ...]
    """Suffixes of the images in tars, such as jpg, the most frequent first; none in layout parquet."""


def read_contents(labels: LabelSet) -> Contents:
    """Read the column of targets, or the headers of all tars. Raises ShardError, RemoteError."""
    classes: Counter[int] = Counter()
    suffixes: Counter[str] = Counter()
    for shard in labels.manifest.shards:
        if not shard.rows:
            continue
        with labels.open(shard.files[0]) as file:
            if labels.manifest.layout == "parquet":
                classes.update(parquet.read_targets(file.path, rows=shard.rows).tolist())
                continue
            # Headers alone: no image is read for its class and its format.
            for sample in webdataset.scan(file.path):
                classes[sample.target] += 1
                suffixes[sample.image_suffix] += 1
    # A Counter accepts this also where no image has an unknown target.
    del classes[UNKNOWN_TARGET]
    return Contents(images_of_class=classes, image_suffixes=tuple(name for name, _ in suffixes.most_common()))
