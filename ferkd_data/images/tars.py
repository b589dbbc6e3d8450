"""WebDataset tars: members `KEY.EXTENSION`, a sample's members side by side. Read at offsets, never unpacked."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any, cast

from ferkd_data.errors import ImageError, SourceError
from ferkd_data.images.duplicates import DuplicateFilter
from ferkd_data.images.folder import EXTENSIONS, UNSUPPORTED
from ferkd_data.images.patience import PatientFile, unreadable
from ferkd_data.images.refs import MAX_TARGET, ImageRef, Reject, check_key
from ferkd_data.storage import CHUNK_BYTES

TARGET_FIELDS = ("label", "target", "cls", "class")
MAX_TARGET_BYTES = 2**20
DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, MemoryError, RecursionError)
"""What tarfile raises for headers that claim absurd sizes or nest without end."""


class TarSource:
    """Keys are the member names up to the first dot of the last component, as WebDataset splits them.

    Targets come from `KEY.cls` (a number), or from `KEY.json` with a field label, target, cls or class.
    """

    def __init__(self, tars: list[str], class_names: tuple[str, ...] | None) -> None:
        self.tars = tars
        self.class_names = class_names

    @property
    def description(self) -> str:
        first = PurePosixPath(self.tars[0]).name
        return f"{len(self.tars)} tars, {first} .. {PurePosixPath(self.tars[-1]).name}"

    def list_images(self) -> Iterator[ImageRef | Reject]:
        with DuplicateFilter() as duplicates:
            for tar in self.tars:
                for item in _list_tar(tar):
                    if isinstance(item, ImageRef) and duplicates.seen(item.key):
                        yield Reject(key=item.key, reason="duplicate_key", detail=f"again in {tar}")
                    else:
                        yield item

    def read(self, refs: Iterable[ImageRef]) -> Iterator[bytes | ImageError]:
        name = ""
        stream: PatientFile | None = None
        try:
            for ref in refs:
                if stream is None or ref.file != name:
                    if stream is not None:
                        stream.close()
                    name, stream = ref.file, PatientFile(ref.file)
                yield _read_at(stream, ref)
        finally:
            if stream is not None:
                stream.close()

    def read_one(self, ref: ImageRef) -> bytes:
        with PatientFile(ref.file) as stream:
            data = _read_at(stream, ref)
        if isinstance(data, ImageError):
            raise data
        return data


def _read_at(stream: PatientFile, ref: ImageRef) -> bytes | ImageError:
    try:
        stream.seek(ref.offset)
        data = stream.read(ref.length)
    except OSError as error:
        return unreadable(ref.file, error)
    if len(data) != ref.length:
        return ImageError("unreadable", f"{ref.file}: ends within the image; did the tar change?")
    return data


def _list_tar(name: str) -> Iterator[ImageRef | Reject]:
    try:
        with PatientFile(name) as stream, tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as tar:
            parts: list[tuple[str, tarfile.TarInfo]] = []
            key = None
            for member in _headers(tar, stream):
                member_key, suffix = split_member(member.name)
                is_image_link = (member.islnk() or member.issym()) and _extension(suffix) in EXTENSIONS
                if not member.isreg() and not is_image_link:
                    continue
                if member_key != key:
                    yield from _sample(name, key, parts, stream)
                    key, parts = member_key, []
                parts.append((suffix, member))
            yield from _sample(name, key, parts, stream)
    except tarfile.ReadError as error:
        raise SourceError(
            f"{name}: not an uncompressed tar, or damaged ({error}); unpack compressed tars first"
        ) from error
    except DAMAGE as error:
        raise SourceError(f"{name}: cannot be read as a tar ({str(error) or type(error).__name__})") from error


def _headers(tar: tarfile.TarFile, stream: PatientFile) -> Iterator[tarfile.TarInfo]:
    """Every header, to the end of the file. Raises tarfile.ReadError where tarfile would stop early or turn back."""
    last = -1
    for member in tar:
        # tarfile keeps every header it has read; a shard of millions would not fit.
        tar.members = []  # type: ignore[attr-defined]
        if member.offset <= last:
            raise tarfile.ReadError(f"the header at byte {last} leads back to byte {member.offset}")
        last = member.offset
        yield member
    # tarfile takes a damaged header for the end, and ignores a tar behind the end: images would be lost in silence.
    stream.seek(tar.offset)
    while chunk := stream.read(CHUNK_BYTES):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(f"a damaged header at byte {tar.offset}, or a second tar behind it")


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Whether the member's bytes lie in the tar as they are: no link, no sparse file."""
    return member.isreg() and not member.issparse()


def split_member(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the last path component."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


def _sample(
    tar: str, key: str | None, parts: list[tuple[str, tarfile.TarInfo]], stream: PatientFile
) -> Iterator[ImageRef | Reject]:
    if key is None or not parts:
        return
    images = [(suffix, member) for suffix, member in parts if _extension(suffix) in EXTENSIONS]
    try:
        check_key(key)
        if len(images) > 1:
            names = " and ".join(member.name for _, member in images[:2])
            raise ImageError("bad_key", f"{tar}: {names} are one sample to WebDataset, which cuts at the first dot")
        if not images:
            unsupported = [member.name for suffix, member in parts if _extension(suffix) in UNSUPPORTED]
            if unsupported:
                raise ImageError("unsupported_format", f"{tar}: {unsupported[0]}")
            raise ImageError("missing_image", f"{tar}: the sample holds {sorted(s for s, _ in parts)}")
        if not _is_plain(images[0][1]):
            raise ImageError("unreadable", f"{tar}: {images[0][1].name} is a link or a sparse file; store its bytes")
        target = _target(parts, stream)
    except ImageError as error:
        yield Reject(key=key, reason=error.reason, detail=error.detail)
        return
    member = images[0][1]
    yield ImageRef(key=key, target=target, file=tar, offset=member.offset_data, length=member.size)


def _extension(suffix: str) -> str:
    return "." + suffix.rpartition(".")[2].lower()


def _target(parts: list[tuple[str, tarfile.TarInfo]], stream: PatientFile) -> int | None:
    members = {suffix: member for suffix, member in parts if suffix in ("cls", "json")}
    if not members:
        return None
    suffix = "cls" if "cls" in members else "json"
    member = members[suffix]
    if not _is_plain(member):
        raise ImageError("corrupt", f"{member.name} is a sparse file; store its bytes")
    position = stream.tell()
    stream.seek(member.offset_data)
    text = stream.read(min(member.size, MAX_TARGET_BYTES))
    stream.seek(position)
    try:
        target = int(text) if suffix == "cls" else _json_target(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ImageError("corrupt", f"{member.name} holds no class number ({text[:40]!r})") from error
    if target is not None and not 0 <= target <= MAX_TARGET:
        raise ImageError("corrupt", f"{member.name}: class number {target} is out of range")
    return target


def _json_target(content: Any) -> int | None:
    """The class number in a sample's JSON, None where it names none. Raises ValueError, TypeError."""
    value = next((content[name] for name in TARGET_FIELDS if name in content), None)
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(f"{value} is no class number")
    return None if value is None else int(value)
