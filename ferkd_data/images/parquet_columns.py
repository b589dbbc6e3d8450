"""Find the columns of a Parquet file that hold the images, their keys and their classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from ferkd_data.errors import LabelSetError, SourceError
from ferkd_data.images.file_kinds import HEAD_BYTES, decoded_kind, other_kind
from ferkd_data.parquet_guard import check_footer
from ferkd_data.storage import refuse_too_many_files

KEY_COLUMNS = ("key", "__key__", "id")
FIRST_ROWS = 64
"""Rows that are searched for a value, to tell whether a column of bytes holds images."""
IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
# The likeliest first. A file that has several gets a note that names the others.
TARGET_COLUMNS = (
    "label",
    "target",
    "cls",
    "class",
    "labels",
    "targets",
    "fine_label",
    "fine_labels",
    "class_id",
    "class_index",
    "class_idx",
    "label_id",
    "category",
    "category_id",
    "class_label",
    "class_name",
    "label_name",
    "label_text",
    "y",
)
LabelKind = Literal["number", "float", "text"]


@dataclass(frozen=True, kw_only=True)
class ParquetColumns:
    """Roles of a Parquet file's columns."""

    image: str
    is_struct: bool
    """The image column is a struct with a field `bytes`, as Hugging Face's datasets writes it; else it is binary."""
    has_path: bool
    """The struct also has a field `path`."""
    keys: tuple[str, ...]
    """Columns that may hold keys, the likeliest first."""
    label: str | None
    label_kind: LabelKind | None
    label_names: tuple[str, ...] | None
    """Names of the classes by number, from a ClassLabel feature."""
    other_labels: tuple[str, ...]
    """Other columns that may hold the ground truth, the likeliest first."""
    names: tuple[str, ...]
    """All columns of the file."""


def find_columns(path: Path) -> ParquetColumns:
    """Find the roles of a file's columns. Raises SourceError for a file that is not Parquet or holds no images."""
    schema = read_schema(path)
    features = _features(schema)
    image = _image_column(path, schema, features)
    kind = schema.field(image).type
    is_struct = pa.types.is_struct(kind)
    labels = _label_columns(schema, features)
    label = labels[0] if labels else None
    names = features.get(label or "", {}).get("names")
    return ParquetColumns(
        image=image,
        is_struct=is_struct,
        has_path=is_struct and kind.get_field_index("path") >= 0,
        keys=tuple(name for name in KEY_COLUMNS if name in schema.names and name != image),
        label=label,
        label_kind=None if label is None else _label_kind(schema.field(label).type),
        label_names=tuple(map(str, names)) if isinstance(names, list) and names else None,
        other_labels=tuple(labels[1:]),
        names=tuple(schema.names),
    )


def open_table(path: Path) -> pq.ParquetFile:
    """Open a Parquet file, after its footer was checked (see `parquet_guard`).

    Raises SourceError, also for a path that is not a regular file.
    """
    # In this order: some footers make Arrow abort the process, which no `except` sees.
    try:
        check_footer(path)
        return pq.ParquetFile(path.absolute())
    except LabelSetError as error:
        raise SourceError(str(error)) from error
    except (OSError, ValueError, pa.ArrowException) as error:
        refuse_too_many_files(path, error)
        raise SourceError(f"{path}: cannot be read as Parquet ({error})") from error


def read_schema(path: Path) -> pa.Schema:
    """Read the schema of a Parquet file. Raises SourceError."""
    with open_table(path) as file:
        try:
            return file.schema_arrow
        except (OSError, ValueError, pa.ArrowException) as error:
            raise SourceError(f"{path}: cannot be read as Parquet ({error})") from error


def holds_images(path: Path) -> bool:
    """Return whether a Parquet file has a column of images. Raises SourceError for a file that is not Parquet."""
    schema = read_schema(path)
    return bool(_image_columns(path, schema, _features(schema)))


def _image_column(path: Path, schema: pa.Schema, features: Mapping[str, Any]) -> str:
    found = _image_columns(path, schema, features)
    if not found:
        texts = [name for name in IMAGE_COLUMNS if name in schema.names and _is_text(schema.field(name).type)]
        why = f"; {texts[0]} holds texts, perhaps paths or URLs: the bytes have to be in the file" if texts else ""
        raise SourceError(
            f"{path}: needs a column of images (binary, or a struct with a binary field `bytes`, such as `image`), "
            f"has columns {', '.join(schema.names)}{why}"
        )
    known = [name for name in IMAGE_COLUMNS if name in found]
    if not known and len(found) > 1:
        raise SourceError(f"{path}: holds images in {' and '.join(found)}; rename the one to use to `image`")
    # A usual name decides among several; a single column may have any name.
    return (known or found)[0]


def _image_columns(path: Path, schema: pa.Schema, features: Mapping[str, Any]) -> list[str]:
    """List the columns of images: declared as such, or structs; else binary columns whose values begin like images."""
    fitting = [field.name for field in schema if _fits_images(field.type)]
    declared = [name for name in fitting if features.get(name, {}).get("_type") == "Image"]
    structs = [name for name in fitting if pa.types.is_struct(schema.field(name).type)]
    named = [name for name in IMAGE_COLUMNS if name in fitting]
    binaries = [name for name in named if name not in structs]
    # Without a declaration or a struct, the name and the bytes decide: a column of masks or hashes is binary, too.
    certain = [name for name in fitting if name in (*declared, *structs)]
    return certain or [name for name in binaries or fitting if _begins_with_an_image(path, name)]


def _fits_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind[index].type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _begins_with_an_image(path: Path, column: str) -> bool:
    """Return whether the first value that is not null begins like an image; True where the first rows are null."""
    with open_table(path) as file:
        batch = next(file.iter_batches(FIRST_ROWS, columns=[column], use_threads=False), None)
    values = [] if batch is None else batch.column(0).drop_null().to_pylist()
    head = values[0][:HEAD_BYTES] if values else b""
    return not values or bool(decoded_kind(head) or other_kind(head))


def _label_columns(schema: pa.Schema, features: Mapping[str, Any]) -> list[str]:
    """List the columns that may be the ground truth, the likeliest first.

    The order: ClassLabels with a usual name, other ClassLabels, numbers with a usual name, other types with one.
    """
    fitting = [field.name for field in schema if _label_kind(field.type)]
    declared = [name for name in fitting if features.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for name in TARGET_COLUMNS if name in fitting]
    numbers = [name for name in named if _label_kind(schema.field(name).type) == "number"]
    order = [name for name in TARGET_COLUMNS if name in declared] + declared + numbers + named
    return list(dict.fromkeys(order))


def _label_kind(kind: pa.DataType) -> LabelKind | None:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return "number"
    if pa.types.is_floating(kind):
        return "float"
    return "text" if _is_text(kind) else None


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Read the features that the library datasets stores in the schema's metadata, by column."""
    try:
        content = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = content["info"]["features"]
        return {str(name): feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # Metadata is anybody's: without it, names and bytes decide.
        return {}


def describe_differing(columns: ParquetColumns, other: ParquetColumns) -> Sequence[str]:
    """List the differences that keep two files from being one source, such as `labels in MINE and THEIRS`."""
    # A later file may have more columns of keys, which are not used.
    keys = tuple(name for name in columns.keys if name in other.keys)
    return [
        f"{what} {mine or 'none'} and {theirs or 'none'}"
        for what, mine, theirs in (
            ("keys in", ", ".join(columns.keys), ", ".join(keys)),
            ("images in", columns.image, other.image),
            ("labels in", columns.label, other.label),
            ("labels as", columns.label_kind, other.label_kind),
            ("classes", columns.label_names, other.label_names),
        )
        if mine != theirs
    ]
