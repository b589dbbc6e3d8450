"""Where images come from, and what their bytes decode to."""

from __future__ import annotations

from pathlib import Path

from ferkd_data.errors import ImageError, SourceError
from ferkd_data.images.decode import DEFAULT_MAX_PIXELS, decode_rgb, image_extension, image_size
from ferkd_data.images.folder import FolderSource, open_folder
from ferkd_data.images.hf_parquet import ParquetSource, open_parquet
from ferkd_data.images.patience import while_it_answers
from ferkd_data.images.refs import REASONS, ImageRef, ImageSource, Reject, check_key, in_groups
from ferkd_data.images.tars import TarSource
from ferkd_data.storage import expand, is_url

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "REASONS",
    "FolderSource",
    "ImageError",
    "ImageRef",
    "ImageSource",
    "ParquetSource",
    "Reject",
    "TarSource",
    "check_key",
    "decode_rgb",
    "image_extension",
    "image_size",
    "in_groups",
    "open_source",
    "while_it_answers",
]


def open_source(source: str | Path, *, classes: Path | None = None) -> ImageSource:
    """A folder of class folders, a flat folder, a folder of Parquet files, or tars by path, glob or braces.

    `classes` is a text file with one line per class, in the order of the teachers' outputs: the class folder's name,
    then optionally a tab and a name to show. Without it, class folders are numbered in sorted order.

    Raises SourceError when nothing is found, or it is none of these.
    """
    text = str(source)
    named = None if classes is None else read_classes(classes)
    names = None if named is None else tuple(name for _, name in named.values())
    path = Path(source)
    if path.is_dir():
        if any(path.glob("*.parquet")) or any(path.glob("data/*.parquet")):
            return open_parquet(path, names)
        tars = sorted(str(tar) for tar in path.glob("*.tar"))
        return TarSource(tars, names) if tars else open_folder(path, named)
    if path.suffix == ".parquet" and path.is_file():
        return open_parquet(path, names)
    if path.suffix == ".parquet" and not path.exists():
        raise SourceError(f"{text}: give the folder that holds the Parquet files, or one file; a pattern is for tars")
    if ".tar" in text or any(mark in text for mark in "*?[{") or is_url(text):
        return TarSource(expand(text), names)
    if path.exists():
        raise SourceError(f"{text}: is neither a folder, nor a tar, nor a Parquet file")
    raise SourceError(f"{text}: no such folder or file; SOURCE is a folder of images, tars, or Parquet files")


def read_classes(path: Path) -> dict[str, tuple[int, str]]:
    """Class folder -> (class number, name to show). Raises SourceError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read as a list of classes ({error})") from error
    classes: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(lines):
        folder, _, name = line.partition("\t")
        if not folder or folder in classes:
            raise SourceError(f"{path}: line {number + 1} is empty or names {folder!r} a second time")
        classes[folder] = (number, name or folder)
    return classes
