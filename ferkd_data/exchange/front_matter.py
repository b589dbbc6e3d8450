"""The YAML at the head of a card, which the hub and `datasets` read: configurations, features, size, licence."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from ferkd_data.exchange.card_fields import CardFields
from ferkd_data.exchange.contents import Contents
from ferkd_data.manifest import Manifest
from ferkd_data.shards import crop_arrays, parquet
from ferkd_data.shards.columns import class_index_dtype

SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
    (10**10, "1B<n<10B"),
    (10**11, "10B<n<100B"),
    (10**12, "100B<n<1T"),
)
LARGEST = "n>1T"
MAX_NAMED_CLASSES = 5_000
"""The hub's viewer handles class names up to about this number; beyond, a target is a plain number."""


def front_matter(manifest: Manifest, fields: CardFields, contents: Contents) -> str:
    lines = [
        f"pretty_name: {quoted(fields.title)}",
        f"license: {quoted(fields.license or '')}",
        *([f"license_name: {quoted(fields.license_name or '')}"] if fields.license == "other" else []),
        *([f"license_link: {quoted(fields.license_link or 'LICENSE')}"] if fields.license == "other" else []),
        "task_categories: [image-classification]",
        "annotations_creators: [machine-generated]",
        f"size_categories: [{quoted(size_category(manifest.num_images))}]",
        *([f"source_datasets: [{', '.join(map(quoted, fields.source_datasets))}]"] if fields.source_datasets else []),
        "tags: [knowledge-distillation, soft-labels, ferkd-data]",
        "configs:",
        *_configs(manifest),
        "dataset_info:",
        *_features(manifest, contents),
    ]
    return "\n".join(["---", *lines, "---"])


def size_category(num_images: int) -> str:
    """The hub's name for a number of rows, such as 1M<n<10M."""
    return next((name for limit, name in SIZES if num_images < limit), LARGEST)


def patterns(manifest: Manifest, block: int) -> list[str]:
    """Globs that find the files of a crop block, in as few folders as there are."""
    top, name = ("shards", "*.tar") if manifest.layout == "webdataset" else ("labels", f"*-{block:03d}.parquet")
    levels = {file.path.count("/") for shard in manifest.shards for file in shard.files}
    return [f"{top}/{'*/' * (level - 1)}{name}" for level in sorted(levels)] or [f"{top}/{name}"]


def _configs(manifest: Manifest) -> Iterator[str]:
    for block, name in enumerate(config_names(manifest)):
        files = ", ".join(map(quoted, patterns(manifest, block)))
        yield from (f"- config_name: {name}", f"  data_files: [{files}]")
        if block == 0:
            yield "  default: true"


def config_names(manifest: Manifest) -> list[str]:
    """One for each crop block; `default` for tars."""
    if manifest.layout == "webdataset":
        return ["default"]
    return [f"crops-{block:03d}" for block in range(manifest.num_blocks)]


def _features(manifest: Manifest, contents: Contents) -> Iterator[str]:
    target = ["dtype: int32"]
    if manifest.class_names is not None and manifest.num_classes <= MAX_NAMED_CLASSES:
        names = enumerate(distinct(manifest.class_names))
        target = ["dtype:", "  class_label:", "    names:", *(f"      '{i}': {quoted(name)}" for i, name in names)]
    for name in config_names(manifest):
        yield from (f"- config_name: {name}", "  features:")
        for column, kind in _columns(manifest, contents):
            yield f"  - name: {column}"
            yield from (f"    {line}" for line in (target if kind == "target" else [kind]))


def _columns(manifest: Manifest, contents: Contents) -> Iterator[tuple[str, str]]:
    """Names and types as `datasets` writes them in YAML; `target` stands for the class."""
    index_dtype = class_index_dtype(manifest.num_classes)
    if manifest.layout == "webdataset":
        yield from (("__key__", "dtype: string"), ("__url__", "dtype: string"))
        if contents.images_of_class:
            yield "cls", "target"
        for suffix, (dtype, shape) in crop_arrays.shapes(1, 1, index_dtype).items():
            yield suffix, f"list: {dtype.name}" if len(shape) == 1 else f"list: {{list: {dtype.name}}}"
        if manifest.augmentations:
            yield crop_arrays.OPERATIONS, "list: {list: uint16}"
        for suffix in contents.image_suffixes:
            yield suffix, "dtype: image"
        return
    for field in parquet.schema(1, 1, np.dtype(index_dtype), manifest.operation_words):
        if field.name == "target":
            yield "target", "target"
        elif pa.types.is_fixed_size_list(field.type):
            yield field.name, f"list: {str(field.type.value_type).replace('float', 'float32')}"
        else:
            yield field.name, f"dtype: {field.type}"


def distinct(names: tuple[str, ...]) -> list[str]:
    """Class names as `datasets` wants them: no two alike. ImageNet has two cranes; the second becomes `crane (517)`."""
    seen: set[str] = set()
    found = []
    for number, name in enumerate(names):
        while name in seen:
            name = f"{name} ({number})"
        seen.add(name)
        found.append(name)
    return found


def quoted(text: str) -> str:
    """A YAML string in double quotes, whatever the text."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    code = ord(character)
    if character in '"\\':
        return f"\\{character}"
    if 0xD800 <= code < 0xE000:
        # Half of a pair, which no UTF-8 file can hold.
        return "?"
    if character.isprintable() and code != 0xFEFF:
        return character
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
