"""WebDataset tars as a source of images, read at offsets and never unpacked.

Members are called `KEY.EXTENSION`; the members of a sample stand side by side.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any, cast

from ferkd_data.errors import ImageError, SourceError
from ferkd_data.images.class_list import ClassList, LabelCounts
from ferkd_data.images.file_kinds import (
    EXTENSIONS,
    HEAD_BYTES,
    NO_IMAGES,
    UNSUPPORTED,
    decoded_kind,
    other_kind,
    skip_reason_of_path,
)
from ferkd_data.images.keys import DuplicateFilter, check_key
from ferkd_data.images.refs import ImageRef, LeftOut, Reject
from ferkd_data.images.retrying import ReopeningFile, unreadable
from ferkd_data.storage import CHUNK_BYTES, is_url

# The likeliest first, whatever the order of the members and the case of their names.
TARGET_SUFFIXES = ("cls", "class", "label", "target")
TARGET_FIELDS = (
    "label",
    "target",
    "cls",
    "class",
    "labels",
    "class_id",
    "class_index",
    "class_idx",
    "label_id",
    "fine_label",
    "class_name",
    "label_name",
)
NUMBER = re.compile(r"[-+]?\d{1,18}")
"""Whole numbers within int64; longer ones are texts, which name no class."""
MAX_TARGET_BYTES = 2**20
"""Bytes of a label member that are read: a hostile one may have gigabytes."""
TAR_ERRORS = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, MemoryError, RecursionError)
"""Errors that tarfile raises for damaged or hostile headers, such as absurd sizes and endless nesting."""


class TarSource:
    """Source of images that are members of tars.

    Keys are the member names up to the first dot of the last component, as in WebDataset. Targets come from `KEY.cls`
    (a number, or a text that `classes` lists) or another of TARGET_SUFFIXES, or from one of TARGET_FIELDS in
    `KEY.json`.
    `beside` counts the files that `open_source` met beside the tars, `split_note` names their splits where they are
    several.
    """

    def __init__(
        self, tars: list[str], classes: ClassList | None, *, beside: LeftOut | None = None, split_note: str = ""
    ) -> None:
        self.tars = tars
        self.classes = classes
        self.class_names = None if classes is None else classes.names
        self.left_out = LeftOut()
        """Members that are no images and belong to none, and `beside`; complete after listing."""
        self._beside = beside or LeftOut()
        self._split_note = split_note
        self._labels = LabelCounts()

    @property
    def containers(self) -> tuple[str, ...]:
        return tuple(tar for tar in self.tars if not is_url(tar))

    @property
    def description(self) -> str:
        # The manifest records it: the query of a URL may hold a signature, which is a secret.
        names = [
            PurePosixPath(tar.partition("?")[0] if is_url(tar) else tar).name for tar in self.tars[:1] + self.tars[-1:]
        ]
        if len(self.tars) == 1:
            return f"tar {names[0]}"
        return f"{len(self.tars)} tars, {names[0]} .. {names[1]}"

    @property
    def class_folder_names(self) -> tuple[str, ...] | None:
        return None if self.classes is None else self.classes.folders

    @property
    def notes(self) -> tuple[str, ...]:
        members = ", ".join(sorted(self._labels.suffixes))
        suffixes, fields = (f"{', '.join(names[:-1])} or {names[-1]}" for names in (TARGET_SUFFIXES, TARGET_FIELDS))
        where = f": the samples hold {members}; it is read from {suffixes}, or in json from {fields}"
        found = self._labels.notes(has_classes=self.classes is not None, where=where)
        return (*filter(None, (self._split_note,)), *found)

    def list_images(self) -> Iterator[ImageRef | Reject]:
        self.left_out.start_from(self._beside)
        self._labels = LabelCounts()
        with DuplicateFilter() as duplicates:
            for tar in self.tars:
                for item in self._list_tar(tar):
                    if isinstance(item, ImageRef) and duplicates.seen(item.key):
                        yield Reject(key=item.key, reason="duplicate_key", detail=f"again in {tar}")
                    else:
                        yield item

    def read(self, refs: Iterable[ImageRef]) -> Iterator[bytes | ImageError]:
        name = ""
        stream: ReopeningFile | None = None
        try:
            for ref in refs:
                if stream is None or ref.file != name:
                    if stream is not None:
                        stream.close()
                    name, stream = ref.file, ReopeningFile(ref.file)
                yield _read_at(stream, ref)
        finally:
            if stream is not None:
                stream.close()

    def read_one(self, ref: ImageRef) -> bytes:
        # A stream for each image, since threads call this at the same time.
        with ReopeningFile(ref.file) as stream:
            data = _read_at(stream, ref)
        if isinstance(data, ImageError):
            raise data
        return data

    def _list_tar(self, name: str) -> Iterator[ImageRef | Reject]:
        try:
            # `r:` and not `r`: no decompression, since images are later read at their offsets. tarfile sees one file,
            # however often that is opened again.
            with ReopeningFile(name) as stream, tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as tar:
                parts: list[tuple[str, tarfile.TarInfo]] = []
                key = None
                for member in _headers(tar, stream):
                    member_key, suffix = split_member(member.name)
                    if not self._belongs_to_a_sample(name, member, suffix, stream):
                        continue
                    # A sample's members stand side by side: another key ends it.
                    if member_key != key:
                        yield from self._sample(name, key, parts, stream)
                        key, parts = member_key, []
                    parts.append((suffix, member))
                yield from self._sample(name, key, parts, stream)
        except tarfile.ReadError as error:
            raise SourceError(
                f"{name}: not an uncompressed tar, or damaged ({error}); unpack compressed tars first"
            ) from error
        except TAR_ERRORS as error:
            raise SourceError(f"{name}: cannot be read as a tar ({str(error) or type(error).__name__})") from error

    def _belongs_to_a_sample(self, tar: str, member: tarfile.TarInfo, suffix: str, stream: ReopeningFile) -> bool:
        """Return whether a member belongs to a sample; count any other as left out, unless it is a folder.

        Files that systems add to a tar are skipped, so that they do not split a sample's members.
        """
        if member.isdir():
            return False
        skipped = skip_reason_of_path(member.name)
        if skipped:
            self.left_out.add(skipped, f"{tar}: {member.name}")
            return False
        is_image_link = (member.islnk() or member.issym()) and _extension(suffix) in EXTENSIONS
        if not member.isreg() and not is_image_link:
            self.left_out.add("special", f"{tar}: {member.name}")
            return False
        if not suffix and not _looks_like_an_image(member, stream):
            self.left_out.add("no_image", f"{tar}: {member.name}")
            return False
        return True

    def _sample(
        self, tar: str, key: str | None, parts: list[tuple[str, tarfile.TarInfo]], stream: ReopeningFile
    ) -> Iterator[ImageRef | Reject]:
        if key is None or not parts:
            return
        try:
            check_key(key)
            member = _image_of(tar, parts, stream)
            label = _label(parts, stream)
        except ImageError as error:
            yield Reject(key=key, reason=error.reason, detail=error.detail)
            return
        target = self._labels.count(label, self.classes, [suffix for suffix, _ in parts])
        yield ImageRef(key=key, target=target, file=tar, offset=member.offset_data, length=member.size)


def _read_at(stream: ReopeningFile, ref: ImageRef) -> bytes | ImageError:
    try:
        stream.seek(ref.offset)
        data = stream.read(ref.length)
    except OSError as error:
        return unreadable(ref.file, error)
    if len(data) != ref.length:
        return ImageError("unreadable", f"{ref.file}: ends within the image; did the tar change?")
    return data


def _headers(tar: tarfile.TarFile, stream: ReopeningFile) -> Iterator[tarfile.TarInfo]:
    """Yield every member to the end of the file.

    Raises tarfile.ReadError where tarfile would stop early, or follow a header back to an earlier one.
    """
    last = -1
    for member in tar:
        # tarfile keeps every header that it has read; those of millions of members would not fit into memory.
        tar.members = []  # type: ignore[attr-defined]
        if member.offset <= last:
            raise tarfile.ReadError(f"the header at byte {last} leads back to byte {member.offset}")
        last = member.offset
        yield member
    # tarfile takes a damaged header for the end, and ignores a second tar behind the end. Either would lose images in
    # silence, so nothing but zeros may follow.
    stream.seek(tar.offset)
    while chunk := stream.read(CHUNK_BYTES):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(f"a damaged header at byte {tar.offset}, or a second tar behind it")


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Return whether the member's bytes are stored as they are: neither a link nor a sparse file."""
    return member.isreg() and not member.issparse()


def split_member(name: str) -> tuple[str, str]:
    """Split a member's name into key and suffix at the first dot of its last component, as WebDataset does."""
    # `tar -C folder .` writes names with ./ in front.
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


def _image_of(tar: str, parts: list[tuple[str, tarfile.TarInfo]], stream: ReopeningFile) -> tarfile.TarInfo:
    """Find the image of a sample. Raises ImageError where there is none, or more than one."""
    images = [member for suffix, member in parts if _extension(suffix) in EXTENSIONS]
    if not images:
        unknown = [(suffix, member) for suffix, member in parts if _extension(suffix) not in NO_IMAGES]
        # No name of an image: first bytes decide, as for files in a folder.
        images = [
            member
            for suffix, member in unknown
            if suffix.lower() not in TARGET_SUFFIXES and _is_decoded(member, stream)
        ]
    if len(images) > 1:
        names = " and ".join(member.name for member in images[:2])
        raise ImageError("bad_key", f"{tar}: {names} are one sample to WebDataset, which cuts at the first dot")
    if not images:
        for suffix, member in parts:
            kind = _extension(suffix) if _extension(suffix) in UNSUPPORTED else other_kind(_head(member, stream))
            if kind:
                raise ImageError("unsupported_format", f"{tar}: {member.name} ({kind})")
        raise ImageError("missing_image", f"{tar}: the sample holds {sorted(s for s, _ in parts)}")
    if not _is_plain(images[0]):
        raise ImageError("unreadable", f"{tar}: {images[0].name} is a link or a sparse file; store its bytes")
    return images[0]


def _head(member: tarfile.TarInfo, stream: ReopeningFile) -> bytes:
    """Read the first bytes of a member, none of a link or a sparse file. The stream keeps its position."""
    if not _is_plain(member):
        return b""
    position = stream.tell()
    stream.seek(member.offset_data)
    head = stream.read(min(member.size, HEAD_BYTES))
    stream.seek(position)
    return head


def _is_decoded(member: tarfile.TarInfo, stream: ReopeningFile) -> bool:
    return decoded_kind(_head(member, stream)) is not None


def _looks_like_an_image(member: tarfile.TarInfo, stream: ReopeningFile) -> bool:
    head = _head(member, stream)
    return bool(decoded_kind(head) or other_kind(head))


def _extension(suffix: str) -> str:
    return "." + suffix.rpartition(".")[2].lower()


def _label(parts: list[tuple[str, tarfile.TarInfo]], stream: ReopeningFile) -> Any:
    """Find the label of a sample: a number, a text, None where there is none, or a value that cannot name a class.

    Raises ImageError.
    """
    found = {suffix.lower(): member for suffix, member in reversed(parts)}
    for suffix in TARGET_SUFFIXES:
        if suffix in found:
            # The pattern is narrower than int(), which also takes "1_000" and digits of other scripts.
            text = _read_member(found[suffix], stream).decode("utf-8", "replace").strip()
            return int(text) if NUMBER.fullmatch(text) else text
    if "json" not in found:
        return None
    try:
        content = json.loads(_read_member(found["json"], stream))
    except (ValueError, RecursionError):
        return b"not JSON"
    fields = content if isinstance(content, dict) else {}
    label = next((fields[name] for name in TARGET_FIELDS if fields.get(name) is not None), None)
    # Bytes are no value that names a class: `class_number` refuses them, and the note shows them.
    return b"true or false" if isinstance(label, bool) else label


def _read_member(member: tarfile.TarInfo, stream: ReopeningFile) -> bytes:
    """Read the first MAX_TARGET_BYTES of a member. The stream keeps its position. Raises ImageError."""
    if not _is_plain(member):
        raise ImageError("corrupt", f"{member.name} is a sparse file; store its bytes")
    position = stream.tell()
    stream.seek(member.offset_data)
    text = stream.read(min(member.size, MAX_TARGET_BYTES))
    stream.seek(position)
    return text
