"""Folders as a source of images: class folders as in torchvision's ImageFolder, or one flat folder without labels."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from unicodedata import normalize

from ferkd_data.errors import ImageError, LabelSetError, SourceError
from ferkd_data.images.class_list import ClassList
from ferkd_data.images.class_names import order_note
from ferkd_data.images.file_kinds import (
    EXTENSIONS,
    HEAD_BYTES,
    NO_IMAGES,
    UNSUPPORTED,
    decoded_kind,
    other_kind,
    skip_reason,
    split_of_folder,
)
from ferkd_data.images.keys import check_key
from ferkd_data.images.refs import ImageRef, LeftOut, Reject
from ferkd_data.images.retrying import retried, unreadable
from ferkd_data.storage import is_utf8, open_regular, shown

SHOWN = 4
"""Folders listed in a message."""


class FolderSource:
    """Source of images that are files below a folder.

    Keys are paths below the root, without extension and with forward slashes. `class_folders` maps each class folder to
    its target, or to None where the target is unknown. `class_folders=None` is a flat folder: the images lie in the
    root itself and have no targets. `order_note` says how the class folders were numbered.
    """

    def __init__(
        self,
        root: Path,
        class_folders: Mapping[str, int | None] | None,
        classes: ClassList | None,
        *,
        order_note: str | None = None,
    ) -> None:
        self.root = root
        self.class_folders = class_folders
        self.class_names = None if classes is None else classes.names
        self.class_folder_names = None if classes is None else classes.folders
        self.left_out = LeftOut()
        """Files below the root that are no images; complete after listing."""
        self._order_note = order_note
        self._nested = ""
        """First folder below a class folder that holds images; known after listing."""

    @property
    def containers(self) -> tuple[str, ...]:
        return ()

    @property
    def description(self) -> str:
        return f"folder {shown(self.root.resolve().name)}"

    @property
    def notes(self) -> tuple[str, ...]:
        found = [self._order_note] if self._order_note else []
        if self._nested:
            above = self._nested.partition("/")[0]
            found.append(
                f"images in folders below a class folder count for that class: those in {self._nested} for {above}"
            )
        return tuple(found)

    def list_images(self) -> Iterator[ImageRef | Reject]:
        # A listing may be asked for again, as for the comparison with a finished build: it counts anew.
        self.left_out.start_from(LeftOut())
        self._nested = ""
        # Only folders above count as a loop. Two links to one folder are two folders of images, as ImageFolder follows
        # them.
        above = {_identity(self.root)}
        found = _entries(self.root)
        if self.class_folders is None:
            yield from self._list_files("", None, found)
            self._count_folders(found)
            return
        self._count_files_beside(found)
        for name in (name for name, kind in found.items() if kind == "folder"):
            if name in self.class_folders:
                yield from self._list_folder(name, self.class_folders[name], above)
        self._count_folders({name: kind for name, kind in found.items() if name not in self.class_folders})

    def read(self, refs: Iterable[ImageRef]) -> Iterator[bytes | ImageError]:
        for ref in refs:
            try:
                yield self.read_one(ref)
            except ImageError as error:
                yield error

    def read_one(self, ref: ImageRef) -> bytes:
        try:
            return retried(lambda: self._read_file(ref.file), ref.file)
        except OSError as error:
            raise unreadable(ref.file, error) from error

    def _read_file(self, file: str) -> bytes:
        try:
            # pathlib and buffering would cost as much as the read itself.
            with open(open_regular(f"{self.root}/{file}"), "rb", buffering=0) as stream:  # noqa: PTH123
                return stream.read()
        except LabelSetError as error:
            raise ImageError("unreadable", f"{file}: is not a regular file") from error
        except FileNotFoundError as error:
            if not self.root.is_dir():
                # A transient error, so that the read is tried again: a network file system may come back.
                raise TimeoutError(f"{self.root} is gone; was its file system unmounted?") from error
            raise

    def _list_folder(self, folder: str, target: int | None, above: set[tuple[int, int]]) -> Iterator[ImageRef | Reject]:
        """List a class folder and its folders. `above` identifies its ancestors: a link to one of them is a loop."""
        identity = _identity(self.root / folder)
        if identity in above:
            self.left_out.add("loop", folder)
            return
        found = _entries(self.root / folder)
        for item in self._list_files(folder, target, found):
            if "/" in folder and not self._nested:
                self._nested = folder
            yield item
        for name in (name for name, kind in found.items() if kind == "folder"):
            if self._count_if_skipped(folder, name):
                continue
            yield from self._list_folder(f"{folder}/{name}", target, above | {identity})

    def _list_files(self, folder: str, target: int | None, kinds: Mapping[str, str]) -> Iterator[ImageRef | Reject]:
        previous = ""
        # Sorted by stem, files with the same key stand side by side: one name is enough to find duplicates.
        keyed = sorted((_split(name), name) for name, kind in kinds.items() if kind != "folder")
        for (stem, extension), name in keyed:
            file = f"{folder}/{name}" if folder else name
            key = f"{folder}/{stem}" if folder else stem
            # A usual extension decides without a read of the file: a listing of millions would need as many reads.
            is_named_as_image = extension.lower() in EXTENSIONS and not name.startswith(".")
            reason = None if is_named_as_image else self._reason_to_leave_out(file, name, kinds[name])
            if reason:
                self.left_out.add(reason, file)
                continue
            try:
                if kinds[name] != "file":
                    raise ImageError("unreadable", f"{file}: not a file, or a broken link")
                if not is_named_as_image:
                    self._check_format(file)
                check_key(key)
                if stem == previous:
                    raise ImageError("duplicate_key", f"{file}: another file of this folder has the same key")
            except ImageError as error:
                yield Reject(key=key, reason=error.reason, detail=error.detail)
                continue
            previous = stem
            yield ImageRef(key=key, target=target, file=file, offset=0, length=-1)

    def _reason_to_leave_out(self, file: str, name: str, kind: str) -> str | None:
        """Say why a file is left out; None for an image, also for one that will be rejected."""
        skipped = skip_reason(name)
        if skipped:
            return skipped
        extension = _extension(name)
        if extension in EXTENSIONS or extension in UNSUPPORTED:
            return None
        if kind != "file":
            return "special"
        if extension in NO_IMAGES:
            return extension
        try:
            head = _head(self.root / file)
        except OSError:
            return "unreadable"
        if decoded_kind(head) or other_kind(head):
            return None
        return extension or "no_image"

    def _check_format(self, file: str) -> None:
        """Raise ImageError unless the first bytes are of a decoded format; the name of the file does not count."""
        try:
            head = _head(self.root / file)
        except OSError as error:
            raise unreadable(file, error) from error
        if decoded_kind(head) is None:
            raise ImageError("unsupported_format", f"{file}: {other_kind(head) or _extension(file)}")

    def _count_if_skipped(self, folder: str, name: str) -> bool:
        """Return whether a folder is hidden or belongs to a system, and count its files as left out if so."""
        reason = skip_reason(name)
        if reason:
            file = f"{folder}/{name}" if folder else name
            self.left_out.add(reason, file, max(1, _count_files(self.root / file)))
        return reason is not None

    def _count_files_beside(self, found: Mapping[str, str]) -> None:
        """Count the files beside the class folders; none is an image, since `open_folder` refuses images there."""
        for name, kind in found.items():
            if kind != "folder":
                reason = self._reason_to_leave_out(name, name, kind) or "other"
                self.left_out.add(reason, name)

    def _count_folders(self, found: Mapping[str, str]) -> None:
        """Count the files in folders that are no class folders; none is an image, as `open_folder` has checked."""
        for name in (name for name, kind in found.items() if kind == "folder"):
            if self._count_if_skipped("", name):
                continue
            self.left_out.add("empty_folder", name)
            for _ in self._list_folder(name, None, {_identity(self.root)}):
                pass


def open_folder(root: Path, classes: ClassList | None) -> FolderSource:
    """Open a folder of class folders, or a flat folder where none of its folders holds images.

    A folder without images is not a class. Raises SourceError for a class folder that `classes` does not name, for
    images beside class folders, and for folders that are splits (train, val) or a level above the class folders.
    """
    kinds = _entries(root)
    below = [name for name, kind in kinds.items() if kind == "folder" and not skip_reason(name)]
    folders = [name for name in below if folder_holds_images(root / name, frozenset({_identity(root)}))]
    if not folders:
        return FolderSource(root, None, classes)
    odd = next((name for name in folders if not is_utf8(name)), None)
    if odd is not None:
        raise SourceError(f"{shown(root / odd)}: the name of this class folder is not UTF-8; rename it")
    images = _first_image(root, kinds)
    if images:
        raise SourceError(
            f"{root}: holds images ({images}) beside folders ({folders[0]}); "
            "give a folder of class folders, or one flat folder of images"
        )
    named = {} if classes is None else classes.numbers
    if _written_by_img2dataset(root, folders):
        return FolderSource(root, dict.fromkeys(folders), classes)
    _check_levels(root, [name for name in folders if name not in named])
    if classes is None:
        # Sorted by `_entries`, so these are ImageFolder's numbers.
        classes = ClassList(str(root), tuple(folders), tuple(folders))
        return FolderSource(root, classes.numbers, classes, order_note=order_note(folders))
    unknown = [name for name in folders if name not in named]
    if unknown:
        # Two texts that look the same: macOS writes é as two characters.
        same = next((name for name in named if normalize("NFC", name) == normalize("NFC", unknown[0])), None)
        forms = f"; {same!a} there is {unknown[0]!a} here, in another Unicode form: write it alike" if same else ""
        raise SourceError(
            f"{root}: class folder {unknown[0]!r} is not in the classes file {classes.where}, which begins with "
            f"{', '.join(map(repr, classes.folders[:3]))}; each line there names a class folder{forms}"
        )
    return FolderSource(root, {name: named[name] for name in folders}, classes)


def _check_levels(root: Path, folders: list[str]) -> None:
    """Raise SourceError where `folders` are the splits of a data set, or one folder that holds the class folders."""
    splits = {name: split for name in folders if (split := split_of_folder(name))}
    if splits and (len(splits) == len(folders) or len(set(splits.values())) > 1):
        some = ", ".join(f"{name}/" for name in splits)
        raise SourceError(
            f"{root}: holds {some}, which look like the splits of a data set and not like classes; give one of them: "
            f"{root / next(iter(splits))} (where they are classes, name them in --classes)"
        )
    if len(folders) == 1:
        only = root / folders[0]
        kinds = _entries(only)
        inner = [name for name, kind in kinds.items() if kind == "folder" and not skip_reason(name)]
        inner = [name for name in inner if folder_holds_images(only / name)]
        if len(inner) > 1 and not _first_image(only, kinds):
            raise SourceError(
                f"{root}: holds one folder, {folders[0]}, whose folders look like the classes "
                f"({', '.join(inner[:SHOWN])}); give {only} (where {folders[0]} is a class, name it in --classes)"
            )


def _written_by_img2dataset(root: Path, folders: list[str]) -> bool:
    """Return whether the folders are shards of img2dataset (00000 beside 00000.parquet), and so no classes."""
    return all(name.isdecimal() and (root / f"{name}.parquet").is_file() for name in folders)


def folder_holds_images(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> bool:
    """Return whether an image lies in `folder` or below; stops at the first one. Raises SourceError."""
    identity = _identity(folder)
    if identity in above:
        return False
    folders = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if skip_reason(entry.name):
                    continue
                kind = kind_of(entry)
                if kind == "folder":
                    folders.append(entry.name)
                elif _is_image(Path(entry.path), kind):
                    return True
    except OSError as error:
        raise SourceError(f"{folder}: cannot be listed ({error.strerror})") from error
    # Files of this folder before folders in it: of class folders, one entry is usually enough.
    return any(folder_holds_images(folder / name, above | {identity}) for name in sorted(folders))


def _first_image(folder: Path, kinds: Mapping[str, str]) -> str | None:
    names = (name for name, kind in kinds.items() if kind != "folder" and not skip_reason(name))
    return next((name for name in names if _is_image(folder / name, kinds[name])), None)


def _is_image(path: Path, kind: str) -> bool:
    """Tell an image by the name of the file, or by its first bytes where the name says nothing."""
    extension = _extension(path.name)
    if extension in EXTENSIONS or extension in UNSUPPORTED:
        return True
    if kind != "file" or extension in NO_IMAGES:
        return False
    try:
        head = _head(path)
    except OSError:
        return False
    return bool(decoded_kind(head) or other_kind(head))


def _split(name: str) -> tuple[str, str]:
    """Split a name into stem and extension. pathlib would take several times as long."""
    return os.path.splitext(name)  # noqa: PTH122


def _extension(name: str) -> str:
    return _split(name)[1].lower()


def _head(path: Path) -> bytes:
    """Read the first bytes of a file. Raises OSError, also where it is no longer a regular file."""
    try:
        with open(open_regular(path), "rb", buffering=0) as stream:  # noqa: PTH123
            return stream.read(HEAD_BYTES)
    except LabelSetError as error:
        raise OSError(errno.EINVAL, "is not a regular file") from error


def _count_files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def _identity(path: Path) -> tuple[int, int]:
    """Identify a folder by device and inode, which all paths to it share. Raises SourceError."""
    try:
        status = path.stat()
    except OSError as error:
        raise SourceError(f"{path}: cannot be listed ({error.strerror})") from error
    return status.st_dev, status.st_ino


def _entries(path: Path) -> dict[str, str]:
    """Classify each entry of a folder with `kind_of`, sorted by name. Raises SourceError."""
    try:
        with os.scandir(path) as entries:
            return dict(sorted((entry.name, kind_of(entry)) for entry in entries))
    except OSError as error:
        raise SourceError(f"{path}: cannot be listed ({error.strerror})") from error


def kind_of(entry: os.DirEntry[str]) -> str:
    """Classify an entry as `folder`, `file` or `other`; links count as what they lead to."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except OSError:  # a link to itself
        return "other"
