"""A folder of class folders, as torchvision's ImageFolder reads it, or one flat folder of unlabelled images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from ferkd_data.errors import ImageError, SourceError
from ferkd_data.images.patience import patiently, unreadable
from ferkd_data.images.refs import ImageRef, Reject, check_key

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp")
UNSUPPORTED = (
    ".tif",
    ".tiff",
    ".heic",
    ".heif",
    ".avif",
    ".jp2",
    ".jxl",
    ".ppm",
    ".pgm",
    ".pbm",
    ".svg",
    ".tga",
)


class FolderSource:
    """Keys are paths below the root, without extension and with forward slashes.

    `class_folders` maps a class folder to its target; None means a flat folder, whose targets are unknown.
    """

    def __init__(self, root: Path, class_folders: dict[str, int] | None, class_names: tuple[str, ...] | None) -> None:
        self.root = root
        self.class_folders = class_folders
        self.class_names = class_names
        self.ignored_files: Counter[str] = Counter()
        """After listing: files that are no images, counted by extension."""

    @property
    def description(self) -> str:
        return f"folder {self.root.resolve().name}"

    def list_images(self) -> Iterator[ImageRef | Reject]:
        self.ignored_files.clear()
        if self.class_folders is None:
            yield from self._list_folder("", None, set())
            return
        for name in sorted(self.class_folders):
            yield from self._list_folder(name, self.class_folders[name], set())

    def read(self, refs: Iterable[ImageRef]) -> Iterator[bytes | ImageError]:
        for ref in refs:
            try:
                yield self.read_one(ref)
            except ImageError as error:
                yield error

    def read_one(self, ref: ImageRef) -> bytes:
        try:
            return patiently(lambda: self._read_file(ref.file), ref.file)
        except OSError as error:
            raise unreadable(ref.file, error) from error

    def _read_file(self, file: str) -> bytes:
        try:
            # Without pathlib and buffering, which cost as much as the read itself.
            with open(f"{self.root}/{file}", "rb", buffering=0) as stream:  # noqa: PTH123
                return stream.read()
        except FileNotFoundError as error:
            if not self.root.is_dir():
                raise TimeoutError(f"{self.root} is gone; is it a file system that was mounted?") from error
            raise

    def _list_folder(self, folder: str, target: int | None, above: set[tuple[int, int]]) -> Iterator[ImageRef | Reject]:
        """`above` holds the folders on the way down, so that a link to one of them ends there."""
        path = self.root / folder
        try:
            status = path.stat()
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                return
        except OSError as error:
            raise SourceError(f"{path}: cannot be listed ({error.strerror})") from error
        found = _entries(path)
        yield from self._list_files(folder, target, {name: kind for name, kind in found.items() if kind != "folder"})
        # A flat folder has no folders below it: `open_source` has looked.
        for name in (name for name, kind in found.items() if kind == "folder" and self.class_folders is not None):
            yield from self._list_folder(f"{folder}/{name}", target, above | {identity})

    def _list_files(self, folder: str, target: int | None, kinds: dict[str, str]) -> Iterator[ImageRef | Reject]:
        previous = ""
        keyed = sorted((Path(name).stem, name) for name in kinds)
        for stem, name in keyed:
            file = f"{folder}/{name}" if folder else name
            key = f"{folder}/{stem}" if folder else stem
            extension = Path(name).suffix.lower()
            if extension in UNSUPPORTED:
                yield Reject(key=key, reason="unsupported_format", detail=file)
                continue
            if extension not in EXTENSIONS:
                self.ignored_files[extension] += 1
                continue
            try:
                check_key(key)
                if kinds[name] != "file":
                    raise ImageError("unreadable", f"{file}: not a file, or a link that leads to none")
                if stem == previous:
                    raise ImageError("duplicate_key", f"{file}: another file of this folder has the same key")
            except ImageError as error:
                yield Reject(key=key, reason=error.reason, detail=error.detail)
                continue
            previous = stem
            yield ImageRef(key=key, target=target, file=file, offset=0, length=-1)


def open_folder(root: Path, classes: dict[str, tuple[int, str]] | None) -> FolderSource:
    """Class folders where there are any, else a flat folder.

    Raises SourceError for a class folder that `classes` does not name, and for images beside class folders.
    """
    kinds = _entries(root)
    folders = [name for name, kind in kinds.items() if kind == "folder"]
    known = (*EXTENSIONS, *UNSUPPORTED)
    images = [name for name, kind in kinds.items() if kind != "folder" and Path(name).suffix.lower() in known]
    if folders and images:
        raise SourceError(
            f"{root}: holds images ({images[0]}) beside folders ({folders[0]}); "
            "give a folder of class folders, or one flat folder of images"
        )
    if not folders:
        names = None if classes is None else tuple(name for _, name in classes.values())
        return FolderSource(root, None, names)
    if classes is None:
        return FolderSource(root, {name: i for i, name in enumerate(folders)}, tuple(folders))
    unknown = [name for name in folders if name not in classes]
    if unknown:
        raise SourceError(f"{root}: class folder {unknown[0]!r} is not in the classes file")
    return FolderSource(root, {name: classes[name][0] for name in folders}, tuple(name for _, name in classes.values()))


def _entries(path: Path) -> dict[str, str]:
    """Name -> `folder`, `file` or `other`, sorted by name; hidden ones left out. Raises SourceError."""
    try:
        with os.scandir(path) as entries:
            return dict(sorted((entry.name, _kind(entry)) for entry in entries if not entry.name.startswith(".")))
    except OSError as error:
        raise SourceError(f"{path}: cannot be listed ({error.strerror})") from error


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except OSError:  # a link to itself
        return "other"
