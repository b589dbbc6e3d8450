"""Open SOURCE: tell folders, tars and Parquet files apart, or raise an error that says what to give instead."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from operator import attrgetter
from pathlib import Path, PurePosixPath

from ferkd_data.errors import SourceError
from ferkd_data.images.class_list import ClassList, read_class_list
from ferkd_data.images.file_kinds import skip_reason, splits_of_files
from ferkd_data.images.folder import FolderSource, folder_holds_images, kind_of, open_folder
from ferkd_data.images.parquet import ParquetSource
from ferkd_data.images.parquet_columns import holds_images
from ferkd_data.images.refs import LeftOut
from ferkd_data.images.tars import TarSource
from ferkd_data.storage import expand, expanded, is_url, is_utf8, shown

LEVELS = 3
"""Folders above a Parquet file, counted from SOURCE: SOURCE/CONFIG/SPLIT/0000.parquet has three."""
FOLDERS_TRIED = 8
"""Folders of each level that are searched for Parquet files."""
NAMES_TRIED = 64
"""Entries of each folder that are looked at in this search."""
ARCHIVES = (".zip", ".7z", ".rar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")


def open_source(
    source: str | Path, *, classes: Path | ClassList | None = None
) -> TarSource | FolderSource | ParquetSource:
    """Open a folder of class folders, a flat folder, a folder of tars or Parquet files, or such files by pattern.

    A pattern has wildcards or braces (`shards/{000..127}.tar`); tars may also be URLs. A leading `~` means the home
    folder. `classes` is a file with one line per class, in the order of the teachers' outputs (see `read_class_list`).
    Without it, class folders are numbered in sorted order.

    Raises SourceError where nothing is found, where it is none of these, and where it is ambiguous, such as a folder of
    the splits train and val.
    """
    listed = read_class_list(expanded(classes)) if isinstance(classes, Path) else classes
    text = os.path.expanduser(str(source))  # noqa: PTH111 (a pattern or a URL is no path)
    path = Path(text)
    if path.is_dir():
        return _open_folder(path, listed)
    if is_url(text):
        if _is_parquet(text):
            raise SourceError(f"{text}: Parquet is read from disk only; download the files and give their folder")
        files = expand(text)
        return TarSource(files, listed, split_note=_split_note(files))
    if path.is_file():
        return _open_files([text], listed)
    if any(mark in text for mark in "*?[{"):
        return _open_files(expand(text), listed)
    if path.exists():
        raise SourceError(f"{text}: is not a regular file")
    if ".tar" in path.name or _is_parquet(text):
        raise SourceError(f"{text}: no such file")
    raise SourceError(f"{text}: no such folder or file; SOURCE is a folder of images, tars, or Parquet files")


def _open_folder(path: Path, classes: ClassList | None) -> TarSource | FolderSource | ParquetSource:
    tars = sorted(str(tar) for tar in path.glob("*.tar") if tar.is_file() and not skip_reason(tar.name))
    tables = _find_parquet(path)
    # One file speaks for all here; ParquetSource compares the columns of the others with its.
    tables_hold_images = bool(tables) and holds_images(path / tables[0])
    if tars and tables_hold_images:
        raise SourceError(f"{path}: holds tars and Parquet files with images; say which: '{path}/*.tar' or a pattern")
    _check_names([*tars, *([str(path / tables[0])] if tables else [])])
    if tars:
        _ask_for_a_split(path, [PurePosixPath(tar).name for tar in tars], ".tar")
        return TarSource(tars, classes, beside=_beside(path, set(tars)))
    # Tables of labels often lie beside class folders. Beside nothing else they are SOURCE, and opening them says what
    # they lack.
    if not tables or (not tables_hold_images and folder_holds_images(path)):
        return open_folder(path, classes)
    _ask_for_a_split(path, tables, ".parquet")
    _ask_for_a_folder(path, tables)
    return ParquetSource(path, tables, classes, beside=_beside(path, {str(path / table) for table in tables}))


def _check_names(files: Iterable[str]) -> None:
    """Raise SourceError for a tar or Parquet file whose path is not UTF-8: plans and Arrow cannot hold it."""
    odd = next((file for file in files if not is_utf8(file)), None)
    if odd is not None:
        raise SourceError(f"{shown(odd)}: the path is not UTF-8; rename the file, or the folder above it")


def _open_files(files: list[str], classes: ClassList | None) -> TarSource | ParquetSource:
    """Open the files that a pattern names, or one file."""
    _check_names(files)
    if all(map(_is_parquet, files)):
        folder = Path(os.path.commonpath([str(Path(file).parent) for file in files]))
        tables = [Path(file).relative_to(folder).as_posix() for file in files]
        return ParquetSource(folder, tables, classes, split_note=_split_note(tables))
    if any(map(_is_parquet, files)):
        raise SourceError(f"{files[0]}: the pattern names Parquet files and others; give one kind")
    for file in files:
        name = file.lower()
        if name.endswith(ARCHIVES):
            raise SourceError(f"{file}: unpack it first, or write an uncompressed tar; archives are not read in place")
        if Path(file).is_dir():
            raise SourceError(f"{file}: is a folder; give one folder, or a pattern of tars or Parquet files")
        if ".tar" not in PurePosixPath(name).name:
            raise SourceError(f"{file}: is neither a folder, nor a tar, nor a Parquet file")
    return TarSource(files, classes, split_note=_split_note(files))


def _split_note(files: list[str]) -> str:
    """Name the splits of a pattern's files where they are several: asked for, but perhaps by mistake."""
    splits = splits_of_files(files)
    return f"files of several splits: {_counted(splits)}" if len(splits.keys() - {""}) > 1 else ""


def _counted(splits: dict[str, list[str]]) -> str:
    return ", ".join(f"{name or 'others'} ({len(files)})" for name, files in sorted(splits.items()))


def _is_parquet(name: str) -> bool:
    return name.lower().endswith((".parquet", ".pq"))


def _find_parquet(root: Path) -> list[str]:
    """List the Parquet files below `root` as sorted relative paths."""
    if not _may_hold_parquet(root, LEVELS):
        return []
    found = [path.relative_to(root).as_posix() for path in root.rglob("*") if _is_parquet(path.name) and path.is_file()]
    # Sorted, since the order of rows is the order of the plan.
    return sorted(name for name in found if not any(map(skip_reason, name.split("/"))))


def _may_hold_parquet(folder: Path, levels: int) -> bool:
    """Guess whether Parquet files lie below `folder`, by the first NAMES_TRIED entries of each folder.

    Class folders may hold millions of images, and are not worth being listed twice.
    """
    with os.scandir(folder) as entries:
        first = sorted(islice(entries, NAMES_TRIED), key=attrgetter("name"))
    # In SOURCE itself every name counts: labels.parquet may stand behind a thousand class folders.
    has_tables = any(folder.glob("*.parquet")) if levels == LEVELS else any(_is_parquet(entry.name) for entry in first)
    if has_tables:
        return True
    folders = [Path(entry.path) for entry in first if kind_of(entry) == "folder" and not skip_reason(entry.name)]
    return levels > 1 and any(_may_hold_parquet(path, levels - 1) for path in folders[:FOLDERS_TRIED])


def _ask_for_a_split(path: Path, files: list[str], extension: str) -> None:
    """Raise SourceError where the files belong to several splits; suggest a pattern for one of them."""
    splits = splits_of_files(files)
    # One split beside files that name none is not a choice between splits.
    if len(splits.keys() - {""}) < 2:
        return
    first = next(files[0] for name, files in sorted(splits.items()) if name)
    pattern = _pattern_of(first, extension)
    raise SourceError(
        f"{path}: holds several splits: {_counted(splits)}; give one of them as a pattern, such as "
        f"'{path}/{pattern}' (in quotes)"
    )


def _pattern_of(file: str, extension: str) -> str:
    """Make the pattern of a shard's split: data/train-*.parquet for data/train-00000-of-00002.parquet."""
    folder, slash, name = file.rpartition("/")
    stem = name.removesuffix(extension)
    start = stem.rstrip("0123456789").removesuffix("-of-").rstrip("0123456789")
    return f"{folder}{slash}{start}*{extension}"


def _ask_for_a_folder(path: Path, files: list[str]) -> None:
    """Raise SourceError where the files lie in several folders, which may be several configurations of a data set."""
    folders = sorted({file.rpartition("/")[0] for file in files})
    if len(folders) > 1:
        some = ", ".join(folder or "." for folder in folders[:4])
        raise SourceError(
            f"{path}: Parquet files with images lie in several folders ({some}); give one of them, or "
            f"'{path}/**/*.parquet' (in quotes) for all"
        )


def _beside(path: Path, taken: set[str]) -> LeftOut:
    """Count all files below `path` except those that are read."""
    found = LeftOut()
    # Sorting `folders` in place makes os.walk descend in order, so that the examples are the same every time.
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(files):
            file = Path(folder, name)
            if str(file) in taken:
                continue
            shown = file.relative_to(path).as_posix()
            skipped = next(filter(None, map(skip_reason, shown.split("/"))), None)
            is_table = _is_parquet(name) and any(other.endswith(".tar") for other in taken)
            found.add(skipped or ("beside_tars" if is_table else file.suffix.lower() or "no_image"), shown)
    return found
