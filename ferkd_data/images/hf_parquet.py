"""Parquet files in the form Hugging Face's datasets writes: `image` is a struct of bytes and path."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ferkd_data.errors import ImageError, SourceError
from ferkd_data.images.duplicates import DuplicateFilter
from ferkd_data.images.patience import patiently, unreadable
from ferkd_data.images.refs import MAX_TARGET, ImageRef, Reject, check_key

KEY_COLUMNS = ("key", "__key__", "id")
TARGET_COLUMNS = ("label", "target", "cls")
READ_ROWS = 32
"""Rows decoded at a time: bounds what a large row group costs."""


class ParquetSource:
    """Keys are the column key, __key__ or id; else the stem of `image.path`; else FILE/ROW."""

    def __init__(self, root: Path, files: list[str], class_names: tuple[str, ...] | None) -> None:
        self.root = root
        self.files = files
        self.class_names = class_names if class_names is not None else _class_names(root / files[0])

    @property
    def description(self) -> str:
        return f"{len(self.files)} Parquet files in {self.root.name}"

    def list_images(self) -> Iterator[ImageRef | Reject]:
        with DuplicateFilter() as duplicates:
            for file in self.files:
                for row, (key, target) in enumerate(_rows(self.root / file)):
                    try:
                        check_key(key)
                        if target is not None and target > MAX_TARGET:
                            raise ImageError("corrupt", f"{file}, row {row}: class number {target} is out of range")
                        if duplicates.seen(key):
                            raise ImageError("duplicate_key", f"again in {file}, row {row}")
                    except ImageError as error:
                        yield Reject(key=key, reason=error.reason, detail=error.detail)
                        continue
                    yield ImageRef(key=key, target=target, file=file, offset=row, length=-1)

    def read(self, refs: Iterable[ImageRef]) -> Iterator[bytes | ImageError]:
        cursor: _Cursor | None = None
        for ref in refs:
            if cursor is not None and (cursor.file != ref.file or ref.offset < cursor.row):
                cursor = None
            content, cursor = self._read_row(ref, cursor)
            yield content

    def _read_row(self, ref: ImageRef, cursor: _Cursor | None) -> tuple[bytes | ImageError, _Cursor | None]:
        """The row, and the cursor to go on with: one that has failed is not used again."""

        def action() -> tuple[bytes | ImageError, _Cursor]:
            nonlocal cursor
            mine, cursor = cursor or _Cursor(self.root, ref.file, ref.offset), None
            return mine.advance_to(ref.offset), mine

        try:
            return patiently(action, f"{ref.file}, row {ref.offset}")
        except OSError as error:
            return unreadable(f"{ref.file}, row {ref.offset}", error), None

    def read_one(self, ref: ImageRef) -> bytes:
        data = next(self.read([ref]))
        if isinstance(data, ImageError):
            raise data
        return data


class _Cursor:
    """Walks one file forward, starting at the row group that holds the first row asked for."""

    def __init__(self, root: Path, file: str, row: int) -> None:
        self.file = file
        try:
            opened = pq.ParquetFile(root / file)
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"{root / file}: cannot be read as Parquet ({error})") from error
        first, group = 0, 0
        while group < opened.num_row_groups and first + opened.metadata.row_group(group).num_rows <= row:
            first += opened.metadata.row_group(group).num_rows
            group += 1
        self.row = first
        groups = list(range(group, opened.num_row_groups))
        self._batches = opened.iter_batches(READ_ROWS, row_groups=groups, columns=["image"], use_threads=False)
        self._batch: pa.RecordBatch | None = None
        self._batch_start = first

    def advance_to(self, row: int) -> bytes | ImageError:
        """Raises OSError."""
        try:
            while self._batch is None or row >= self._batch_start + self._batch.num_rows:
                self._batch_start += 0 if self._batch is None else self._batch.num_rows
                self._batch = next(self._batches)
        except StopIteration:
            return ImageError("unreadable", f"{self.file} has no row {row}; did it change?")
        except pa.ArrowException as error:
            return ImageError("unreadable", f"{self.file}, row {row}: {error}")
        self.row = row
        image = self._batch.column("image")[row - self._batch_start].as_py() or {}
        data = image.get("bytes")
        if data is None:
            return ImageError("missing_image", f"{self.file}, row {row} holds no image bytes")
        return bytes(data)


def open_parquet(root: Path, classes: tuple[str, ...] | None) -> ParquetSource:
    """A folder of Parquet files, or one file. Raises SourceError where they have no `image` struct with bytes."""
    if root.is_file():
        root, files = root.parent, [root.name]
    else:
        found = [*root.glob("*.parquet"), *root.glob("data/*.parquet")]
        files = sorted(path.relative_to(root).as_posix() for path in found)
    for file in files:
        _check_schema(root / file)
    return ParquetSource(root, files, classes)


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: cannot be read as Parquet ({error})") from error


def _check_schema(path: Path) -> None:
    schema = _schema(path)
    image = schema.field("image").type if "image" in schema.names else None
    if image is None or not pa.types.is_struct(image) or not _is_binary(image, "bytes"):
        raise SourceError(
            f"{path}: needs a column `image` that is a struct with a binary field `bytes`, "
            f"has columns {', '.join(schema.names)}"
        )


def _is_binary(struct: pa.StructType, name: str) -> bool:
    index = struct.get_field_index(name)
    return index >= 0 and bool(pa.types.is_binary(struct[index].type) or pa.types.is_large_binary(struct[index].type))


def _rows(path: Path) -> Iterator[tuple[str, int | None]]:
    """(key, target) of every row. Raises SourceError."""
    try:
        yield from _read_rows(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SourceError(f"{path}: cannot be read to its end ({error})") from error


def _read_rows(path: Path) -> Iterator[tuple[str, int | None]]:
    schema = _schema(path)
    key_column = next((name for name in KEY_COLUMNS if name in schema.names), None)
    target_column = next((name for name in TARGET_COLUMNS if _is_integer(schema, name)), None)
    columns = [name for name in (key_column, target_column) if name]
    if key_column is None and schema.field("image").type.get_field_index("path") >= 0:
        columns.append("image.path")
    row = 0
    with pq.ParquetFile(path) as file:
        total = file.metadata.num_rows
        if not columns:
            yield from ((f"{_stem(path.name)}/{row:08d}", None) for row in range(total))
            return
        for batch in file.iter_batches(4096, columns=columns, use_threads=False):
            for record in batch.to_pylist():
                target = record.get(target_column) if target_column else None
                # datasets writes -1 for a label that is not given.
                yield _key(path, row, record, key_column), None if target is None or target < 0 else target
                row += 1


def _key(path: Path, row: int, record: dict[str, Any], key_column: str | None) -> str:
    if key_column is not None:
        key = record[key_column]
        return "" if key is None else str(key)
    image_path = (record.get("image") or {}).get("path")
    return PurePosixPath(image_path).stem if image_path else f"{_stem(path.name)}/{row:08d}"


def _stem(name: str) -> str:
    return name.removesuffix(".parquet").replace(".", "-")


def _is_integer(schema: pa.Schema, name: str) -> bool:
    return name in schema.names and pa.types.is_integer(schema.field(name).type)


def _class_names(path: Path) -> tuple[str, ...] | None:
    """Names from the feature description that datasets leaves in the schema's metadata."""
    metadata = _schema(path).metadata or {}
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        names = next((features[column].get("names") for column in TARGET_COLUMNS if column in features), None)
    except (ValueError, AttributeError):
        return None
    return tuple(str(name) for name in names) if names else None
