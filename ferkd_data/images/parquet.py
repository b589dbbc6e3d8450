"""Parquet files as a source of images: list their rows, with keys and targets.

Images are a struct of bytes and path, as Hugging Face's library datasets writes them, or plain bytes.
`parquet_columns` finds the columns, `parquet_rows` reads the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from ferkd_data.errors import ImageError, SourceError
from ferkd_data.images.class_list import ClassList, LabelCounts, is_number
from ferkd_data.images.class_names import contradictions, order_note
from ferkd_data.images.keys import DuplicateFilter, check_key
from ferkd_data.images.parquet_columns import describe_differing, find_columns, open_table
from ferkd_data.images.parquet_rows import ImageRowReader
from ferkd_data.images.refs import ImageRef, LeftOut, Reject
from ferkd_data.storage import shown

OWN_KEYS = ("key", "__key__")
"""Columns whose values are taken as keys without a test: a second image with the same key is a reject."""
MAX_TEXT_CLASSES = 100_000
"""Distinct values above which a text column does not name classes."""
MISSING = ("nan", "none", "null", "<na>")
"""Texts that pandas writes for missing values, in lower case."""
LISTED_ROWS = 4096
"""Rows of keys and labels read at a time."""

Record = dict[str, Any]
_KeyOf = Callable[[str, int, Record], str]


class ParquetSource:
    """Source of images that are rows of Parquet files.

    Keys are the first of these that exists and is unique: the column `key` or `__key__` (taken without a test), the
    column `id`, the stem of the image's path, FILE/ROW.

    Targets come from a label column (see `parquet_columns.TARGET_COLUMNS`). Numbers are targets as they are, unless a
    ClassLabel feature names them and `classes` lists the names. Texts are looked up in `classes`; without it they are
    numbered in sorted order, as class folders are. `beside` counts the files that `open_source` met beside these,
    `split_note` names their splits where they are several.
    """

    def __init__(
        self,
        root: Path,
        files: list[str],
        classes: ClassList | None,
        *,
        beside: LeftOut | None = None,
        split_note: str = "",
    ) -> None:
        self.root = root
        self.files = files
        self.classes = classes
        self.columns = find_columns(root / files[0])
        self.left_out = LeftOut()
        """Files beside these; complete after listing."""
        self._beside = beside or LeftOut()
        self._split_note = split_note
        self._labels = LabelCounts()
        self._key_note = ""
        self._texts: ClassList | None = None
        """Texts of the label column as classes, where no list was given; complete after listing."""
        self._numbers = self._renumbered()
        self._stems = _stems(files)
        self._rows = ImageRowReader(root, self.columns.image)
        for file in files[1:]:
            differing = describe_differing(self.columns, find_columns(root / file))
            if differing:
                raise SourceError(
                    f"{root / file}: has {differing[0]} where {files[0]} has the other; give them as two sources"
                )

    @property
    def containers(self) -> tuple[str, ...]:
        return tuple(str(self.root / file) for file in self.files)

    @property
    def description(self) -> str:
        count = len(self.files)
        return f"{count} Parquet {'file' if count == 1 else 'files'} in {shown(self.root.resolve().name)}"

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
        order = order_note(self._texts.names) if self._texts else None
        return (*filter(None, (self._split_note, order, self._key_note)), *found)

    def list_images(self) -> Iterator[ImageRef | Reject]:
        self.left_out.start_from(self._beside)
        self._labels = LabelCounts()
        # A pass of its own, before the first image: numbers depend on the sorted set of all texts.
        if self.columns.label_kind == "text" and self.classes is None:
            self._texts = self._distinct_texts()
        key_of, is_unique = self._choose_keys()
        with DuplicateFilter() as duplicates:
            # Keys that `_choose_keys` found unique need no second filter.
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
        return self._rows.read(refs)

    def read_one(self, ref: ImageRef) -> bytes:
        return self._rows.read_one(ref)

    def _target(self, record: Record) -> int | None:
        label = None if self.columns.label is None else record.get(self.columns.label)
        number = self._labels.count(label, self.classes or self._texts)
        if number is None or self._numbers is None:
            return number
        # A number beyond the ClassLabel's names has no name to look up: unknown ground truth.
        return self._numbers[number] if number < len(self._numbers) else None

    def _renumbered(self) -> tuple[int, ...] | None:
        """Map the label column's numbers to those in `classes`, by name; None where they are kept.

        Raises SourceError where only some of the names are in `classes`.
        """
        names = self.columns.label_names
        if names is None or self.classes is None:
            return None
        unknown = [name for name in names if name not in self.classes.by_text]
        # As many names and none in common: the list names the same classes in another vocabulary, such as WordNet IDs.
        if len(unknown) == len(names) == len(self.classes.names):
            differing = contradictions(names, self.classes.names)
            if differing:
                raise SourceError(
                    f"{self.root}: the column {self.columns.label} and {self.classes.where} write the names of the "
                    f"classes differently, and in another order ({differing}); write them alike"
                )
            return None
        if unknown:
            raise SourceError(
                f"{self.root}: class {unknown[0]!r} of the column {self.columns.label} is not in the classes file "
                f"{self.classes.where}"
            )
        return tuple(self.classes.by_text[name] for name in names)

    def _distinct_texts(self) -> ClassList | None:
        """Collect the texts of the label column, sorted; None where they are numbers, or too many to be classes."""
        texts: set[str] = set()
        label = str(self.columns.label)
        for _, _, record in self._records([label]):
            text = (record[label] or "").strip()
            texts.update([text] if text else [])
            if len(texts) > MAX_TEXT_CLASSES:
                return None
        # Where a table has gaps, pandas writes numbers and "nan", which then is no class but leaves a note.
        if all(is_number(text) or text.lower() in MISSING for text in texts):
            return None
        names = tuple(sorted(texts))
        return ClassList(f"the column {label}", names, names)

    def _choose_keys(self) -> tuple[_KeyOf, bool]:
        """Choose the function that makes a row's key; the second value is True where keys are known to be unique."""
        own = next((name for name in OWN_KEYS if name in self.columns.keys), None)
        if own is not None:
            return lambda file, row, record: "" if record[own] is None else _key_text(record[own]), False
        # Each candidate costs a pass over the columns of keys alone, which are small beside the images.
        repeated = []
        for name, key_of in self._candidates():
            twice = self._first_repeated(key_of)
            if twice is None:
                return key_of, True
            repeated.append(f"{name} has {twice!r} twice")
        if repeated:
            self._key_note = f"keys are made of file and row, since {' and '.join(repeated)}"
        # Names that differ in a dot and a hyphen alone have the same stem (see `_stems`): then later rows are rejects.
        return self._file_and_row, len(set(self._stems.values())) == len(self.files)

    def _candidates(self) -> Iterator[tuple[str, _KeyOf]]:
        if "id" in self.columns.keys:
            yield "the column id", self._id
        if self.columns.has_path:
            yield f"{self.columns.image}.path", self._path_stem

    def _id(self, file: str, row: int, record: Record) -> str:
        return self._file_and_row(file, row, record) if record["id"] is None else _key_text(record["id"])

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
        """Yield (file, row, values) of every row. Raises SourceError."""
        for file in self.files:
            try:
                for row, record in enumerate(_read_records(self.root / file, columns)):
                    yield file, row, record
            except (OSError, ValueError, pa.ArrowException) as error:
                raise SourceError(f"{self.root / file}: cannot be read to its end ({error})") from error


def _key_text(value: Any) -> str:
    # Some writers store texts as bytes. What is not UTF-8 becomes a reject (see `keys.check_key`).
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _read_records(path: Path, columns: list[str]) -> Iterator[Record]:
    with open_table(path) as file:
        if not columns:
            yield from ({} for _ in range(file.metadata.num_rows))
            return
        for batch in file.iter_batches(LISTED_ROWS, columns=columns, use_threads=False):
            yield from batch.to_pylist()


def _stems(files: list[str]) -> dict[str, str]:
    """Make FILE of each file's FILE/ROW keys: its name, or its path below the root where names repeat."""
    names = {file: PurePosixPath(file).name for file in files}
    chosen = names if len(set(names.values())) == len(files) else {file: file for file in files}
    # A dot would make the key unfit for tars (see `keys.check_key`).
    return {file: name.removesuffix(".parquet").replace(".", "-") for file, name in chosen.items()}
