"""Parquet files with images in a column: a struct of bytes and path, as Hugging Face's datasets writes it, or bytes."""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from ferkd_data.errors import ImageError, SourceError
from ferkd_data.images.class_list import ClassList, LabelCounts
from ferkd_data.images.keys import DuplicateFilter
from ferkd_data.images.parquet_columns import describe_differing, find_columns, open_table
from ferkd_data.images.parquet_pages import NotPlain, PagedColumn
from ferkd_data.images.refs import ImageRef, LeftOut, Reject, check_key
from ferkd_data.images.retrying import retried, unreadable

OWN_KEYS = ("key", "__key__")
"""Columns whose values are keys whatever they are: the second image of a key is a reject."""
MAX_TEXT_CLASSES = 100_000
"""A text column with more different values names no classes."""
READ_ROWS = 32
"""Rows decoded at a time: bounds what a large row group costs."""
LISTED_ROWS = 4096

Record = dict[str, Any]
_KeyOf = Callable[[str, int, Record], str]


KEPT_FILES = 8
"""Files that a thread keeps open for reading single images."""
KEPT_BYTES = 4 * 2**20
"""Of images that are kept for each of them, at most, or a batch of READ_ROWS."""


class ParquetSource:
    """Keys are the column key or __key__; else id, or the stem of the image's path, if unique; else FILE/ROW.

    Targets are the numbers of a label column (see `parquet_columns.TARGET_COLUMNS`), or its texts: by their place in
    `classes`, else numbered in sorted order as class folders are. Names that a ClassLabel feature gives to numbers are
    looked up in `classes` too.
    """

    def __init__(
        self, root: Path, files: list[str], classes: ClassList | None, *, beside: LeftOut | None = None
    ) -> None:
        self.root = root
        self.files = files
        self.classes = classes
        self.columns = find_columns(root / files[0])
        self.left_out = LeftOut()
        """After listing: what `open_source` met beside the files."""
        self._beside = beside or LeftOut()
        self._labels = LabelCounts()
        self._key_note = ""
        self._texts: ClassList | None = None
        """After listing: the texts of the label column, where no list of classes was given."""
        self._numbers = self._renumbered()
        self._stems = _stems(files)
        self._kept = _Kept()
        self._paged = _Paged()
        for file in files[1:]:
            differing = describe_differing(self.columns, find_columns(root / file))
            if differing:
                raise SourceError(f"{root / file}: has {differing[0]} where {files[0]} has the other; give them apart")

    @property
    def description(self) -> str:
        count = len(self.files)
        return f"{count} Parquet {'file' if count == 1 else 'files'} in {self.root.resolve().name}"

    @property
    def class_names(self) -> tuple[str, ...] | None:
        if self.classes is not None:
            return self.classes.names
        return self.columns.label_names if self._texts is None else self._texts.names

    @property
    def class_folder_names(self) -> tuple[str, ...] | None:
        known = self.classes or self._texts
        return None if known is None else known.folders

    @property
    def notes(self) -> tuple[str, ...]:
        where = f": the columns are {', '.join(self.columns.names)}"
        found = list(self._labels.notes(has_classes=self.classes is not None, where=where))
        label = self.columns.label
        if label is not None and self.columns.other_labels:
            found.append(f"the ground truth is the column {label}, not {' or '.join(self.columns.other_labels)}")
        return (*found, self._key_note) if self._key_note else tuple(found)

    def list_images(self) -> Iterator[ImageRef | Reject]:
        self.left_out.start_from(self._beside)
        self._labels = LabelCounts()
        if self.columns.label_kind == "text" and self.classes is None:
            self._texts = self._distinct_texts()
        key_of, is_unique = self._choose_keys()
        with DuplicateFilter() as duplicates:
            for file, row, record in self._records(self._listed_columns()):
                key = key_of(file, row, record)
                try:
                    check_key(key)
                    if not is_unique and duplicates.seen(key):
                        raise ImageError("duplicate_key", f"again in {file}, row {row}")
                except ImageError as error:
                    yield Reject(key=key, reason=error.reason, detail=error.detail)
                    continue
                yield ImageRef(key=key, target=self._target(record), file=file, offset=row, length=-1)

    def read(self, refs: Iterable[ImageRef]) -> Iterator[bytes | ImageError]:
        cursor: _Cursor | None = None
        for ref in refs:
            if cursor is not None and not cursor.can_reach(ref):
                cursor = None
            content, cursor = self._read_row(ref, cursor)
            yield content

    def _read_row(self, ref: ImageRef, cursor: _Cursor | None) -> tuple[bytes | ImageError, _Cursor | None]:
        """The row, and the cursor to go on with: one that has failed is not used again."""

        def action() -> tuple[bytes | ImageError, _Cursor]:
            nonlocal cursor
            mine, cursor = cursor or _Cursor(self.root, ref.file, ref.offset, self.columns.image), None
            return mine.advance_to(ref.offset), mine

        try:
            return retried(action, f"{ref.file}, row {ref.offset}")
        except OSError as error:
            return unreadable(f"{ref.file}, row {ref.offset}", error), None

    def read_one(self, ref: ImageRef) -> bytes:
        paged = self._paged.column(self.root, ref.file, self.columns.image)
        if paged is not None:
            try:
                return retried(lambda: paged.read(ref.offset), f"{ref.file}, row {ref.offset}")
            except NotPlain:
                pass  # PyArrow reads every way to store it
            except OSError as error:
                raise unreadable(f"{ref.file}, row {ref.offset}", error) from error
        kept = self._kept.files
        # One that another thread goes on with is not in the list meanwhile.
        place = next((i for i, cursor in enumerate(kept) if cursor.can_reach(ref)), None)
        cursor = None if place is None else kept.pop(place)
        data, cursor = self._read_row(ref, cursor)
        if cursor is not None:
            kept.append(cursor)
            del kept[:-KEPT_FILES]
        if isinstance(data, ImageError):
            raise data
        return data

    def _target(self, record: Record) -> int | None:
        label = None if self.columns.label is None else record.get(self.columns.label)
        number = self._labels.count(label, self.classes or self._texts)
        if number is None or self._numbers is None:
            return number
        return self._numbers[number] if number < len(self._numbers) else None

    def _renumbered(self) -> tuple[int, ...] | None:
        """The number in `classes` of each class that the label column names; None where it keeps its numbers.

        Raises SourceError where only some of the names are in `classes`.
        """
        names = self.columns.label_names
        if names is None or self.classes is None:
            return None
        unknown = [name for name in names if name not in self.classes.by_text]
        if len(unknown) == len(names) == len(self.classes.names):
            return None  # other names for the same classes
        if unknown:
            raise SourceError(
                f"{self.root}: class {unknown[0]!r} of the column {self.columns.label} is not in the classes file "
                f"{self.classes.where}"
            )
        return tuple(self.classes.by_text[name] for name in names)

    def _distinct_texts(self) -> ClassList | None:
        """The texts of the label column in sorted order; None where they are numbers, or too many to be classes."""
        texts: set[str] = set()
        label = str(self.columns.label)
        for _, _, record in self._records([label]):
            text = (record[label] or "").strip()
            texts.update([text] if text else [])
            if len(texts) > MAX_TEXT_CLASSES:
                return None
        if not texts or all(text.lstrip("+-").isdecimal() for text in texts):
            return None
        names = tuple(sorted(texts))
        return ClassList(f"the column {label}", names, names)

    def _choose_keys(self) -> tuple[_KeyOf, bool]:
        """Return the function that makes a row's key, and whether it is known to give each key once."""
        own = next((name for name in OWN_KEYS if name in self.columns.keys), None)
        if own is not None:
            return lambda file, row, record: "" if record[own] is None else str(record[own]), False
        repeated = []
        for name, key_of in self._candidates():
            twice = self._first_repeated(key_of)
            if twice is None:
                return key_of, True
            repeated.append(f"{name} has {twice!r} twice")
        if repeated:
            self._key_note = f"keys are made of file and row, since {' and '.join(repeated)}"
        return self._file_and_row, True

    def _candidates(self) -> Iterator[tuple[str, _KeyOf]]:
        if "id" in self.columns.keys:
            yield "the column id", self._id
        if self.columns.has_path:
            yield f"{self.columns.image}.path", self._path_stem

    def _id(self, file: str, row: int, record: Record) -> str:
        return self._file_and_row(file, row, record) if record["id"] is None else str(record["id"])

    def _path_stem(self, file: str, row: int, record: Record) -> str:
        path = (record.get(self.columns.image) or {}).get("path")
        return PurePosixPath(path.replace("\\", "/")).stem if path else self._file_and_row(file, row, record)

    def _file_and_row(self, file: str, row: int, record: Record) -> str:
        return f"{self._stems[file]}/{row:08d}"

    def _first_repeated(self, key_of: _KeyOf) -> str | None:
        with DuplicateFilter() as duplicates:
            for file, row, record in self._records(self._listed_columns(with_label=False)):
                key = key_of(file, row, record)
                if duplicates.seen(key):
                    return key
        return None

    def _listed_columns(self, *, with_label: bool = True) -> list[str]:
        label = [self.columns.label] if with_label and self.columns.label else []
        path = [f"{self.columns.image}.path"] if self.columns.has_path else []
        return [*dict.fromkeys([*self.columns.keys, *label]), *path]

    def _records(self, columns: list[str]) -> Iterator[tuple[str, int, Record]]:
        """(file, row, values) of every row. Raises SourceError."""
        for file in self.files:
            try:
                for row, record in enumerate(_read_records(self.root / file, columns)):
                    yield file, row, record
            except (OSError, ValueError, pa.ArrowException) as error:
                raise SourceError(f"{self.root / file}: cannot be read to its end ({error})") from error


class _Kept(threading.local):
    """What a thread has open for reading single images; nothing of it is pickled."""

    def __init__(self) -> None:
        self.files: list[_Cursor] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Kept, ())


class _Paged:
    """Tables of the files' pages, made when a file is first asked for and shared by all threads; never pickled.

    Two threads may make the same table at once: both are right, and one stays.
    """

    def __init__(self) -> None:
        self._columns: dict[str, PagedColumn | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Paged, ())

    def column(self, root: Path, file: str, column: str) -> PagedColumn | None:
        """Return None where PyArrow has to read the file. Raises SourceError."""
        if file not in self._columns:
            try:
                with open_table(root / file) as opened:
                    self._columns[file] = PagedColumn(root / file, opened, column)
            except NotPlain:
                self._columns[file] = None
        return self._columns[file]


class _Cursor:
    """Walks one file forward, starting at the row group that holds the first row asked for.

    A row of the group that it is in is reached without opening the file again, also if it lies behind.
    """

    def __init__(self, root: Path, file: str, row: int, column: str) -> None:
        self.file = file
        self._column = column
        self._opened = open_table(root / file)
        metadata = self._opened.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = list(itertools.accumulate(sizes))
        self._group = -1
        self._read: list[tuple[int, pa.RecordBatch]] = []
        """(first row, batch) of the row group, as far as it has been read."""
        self._rest: Iterator[pa.RecordBatch] = iter(())

    def can_reach(self, ref: ImageRef) -> bool:
        return self.file == ref.file

    def advance_to(self, row: int) -> bytes | ImageError:
        """Raises OSError."""
        group = bisect.bisect_right(self._ends, row)
        if group == len(self._ends):
            return ImageError("unreadable", f"{self.file} has no row {row}; did it change?")
        try:
            batch, place = self._find(group, row)
        except StopIteration:
            return ImageError("unreadable", f"{self.file} has no row {row}; did it change?")
        except pa.ArrowException as error:
            # The reader does not go on after that.
            self._group = -1
            return ImageError("unreadable", f"{self.file}, row {row}: {error}")
        return _bytes_of(batch.column(self._column)[place].as_py(), f"{self.file}, row {row}")

    def _find(self, group: int, row: int) -> tuple[pa.RecordBatch, int]:
        if group != self._group:
            self._group, self._read = group, []
            self._rest = self._opened.iter_batches(
                READ_ROWS, row_groups=[group], columns=[self._column], use_threads=False
            )
        start = self._ends[group - 1] if group else 0
        while not self._read or row >= self._read[-1][0] + self._read[-1][1].num_rows:
            first = self._read[-1][0] + self._read[-1][1].num_rows if self._read else start
            self._read.append((first, next(self._rest)))
            self._forget()
        for first, batch in self._read:
            if first <= row < first + batch.num_rows:
                return batch, row - first
        # It was given up for memory.
        self._group = -1
        return self._find(group, row)

    def _forget(self) -> None:
        while len(self._read) > 1 and sum(batch.nbytes for _, batch in self._read) > KEPT_BYTES:
            del self._read[0]


def _bytes_of(image: Any, where: str) -> bytes | ImageError:
    data = image.get("bytes") if isinstance(image, dict) else image
    if data is not None:
        return bytes(data)
    path = image.get("path") if isinstance(image, dict) else None
    what = f"only a path ({path}), no image bytes" if path else "no image bytes"
    return ImageError("missing_image", f"{where} holds {what}")


def _read_records(path: Path, columns: list[str]) -> Iterator[Record]:
    with open_table(path) as file:
        if not columns:
            yield from ({} for _ in range(file.metadata.num_rows))
            return
        for batch in file.iter_batches(LISTED_ROWS, columns=columns, use_threads=False):
            yield from batch.to_pylist()


def _stems(files: list[str]) -> dict[str, str]:
    """File -> the first part of its rows' keys: its name, or its path below the root where names are not unique."""
    names = {file: PurePosixPath(file).name for file in files}
    chosen = names if len(set(names.values())) == len(files) else {file: file for file in files}
    return {file: name.removesuffix(".parquet").replace(".", "-") for file, name in chosen.items()}
