"""WebDataset tars: members `KEY.EXTENSION`, a sample's members side by side. Read at offsets, never unpacked."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import IO

from ferkd_data.errors import ImageError, SourceError
from ferkd_data.images.duplicates import DuplicateFilter
from ferkd_data.images.folder import EXTENSIONS, UNSUPPORTED
from ferkd_data.images.refs import ImageRef, Reject, check_key
from ferkd_data.storage import open_binary

TARGET_FIELDS = ("label", "target", "cls", "class")
MAX_TARGET_BYTES = 2**20


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
        name, stream = "", None
        try:
            for ref in refs:
                if stream is None or ref.file != name:
                    if stream is not None:
                        stream.close()
                    name, stream = ref.file, open_binary(ref.file)
                yield _read_at(stream, ref)
        finally:
            if stream is not None:
                stream.close()

    def read_one(self, ref: ImageRef) -> bytes:
        with open_binary(ref.file) as stream:
            data = _read_at(stream, ref)
        if isinstance(data, ImageError):
            raise data
        return data


def _read_at(stream: IO[bytes], ref: ImageRef) -> bytes | ImageError:
    try:
        stream.seek(ref.offset)
        data = stream.read(ref.length)
    except OSError as error:
        return ImageError("unreadable", f"{ref.file}: {error}")
    if len(data) != ref.length:
        return ImageError("unreadable", f"{ref.file}: ends within the image; did the tar change?")
    return data


def _list_tar(name: str) -> Iterator[ImageRef | Reject]:
    try:
        with open_binary(name) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            parts: list[tuple[str, tarfile.TarInfo]] = []
            key = None
            for member in tar:
                # tarfile keeps every header it has read; a shard of millions would not fit.
                tar.members = []  # type: ignore[attr-defined]
                if not member.isreg():
                    continue
                member_key, suffix = split_member(member.name)
                if member_key != key:
                    yield from _sample(name, key, parts, stream)
                    key, parts = member_key, []
                parts.append((suffix, member))
            yield from _sample(name, key, parts, stream)
    except tarfile.ReadError as error:
        raise SourceError(
            f"{name}: not an uncompressed tar, or damaged ({error}); unpack compressed tars first"
        ) from error
    except (tarfile.TarError, EOFError, OSError) as error:
        raise SourceError(f"{name}: cannot be read as a tar ({error})") from error


def split_member(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the last path component."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix


def _sample(
    tar: str, key: str | None, parts: list[tuple[str, tarfile.TarInfo]], stream: IO[bytes]
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
        target = _target(parts, stream)
    except ImageError as error:
        yield Reject(key=key, reason=error.reason, detail=error.detail)
        return
    member = images[0][1]
    yield ImageRef(key=key, target=target, file=tar, offset=member.offset_data, length=member.size)


def _extension(suffix: str) -> str:
    return "." + suffix.rpartition(".")[2].lower()


def _target(parts: list[tuple[str, tarfile.TarInfo]], stream: IO[bytes]) -> int | None:
    members = {suffix: member for suffix, member in parts if suffix in ("cls", "json")}
    if not members:
        return None
    suffix = "cls" if "cls" in members else "json"
    member = members[suffix]
    position = stream.tell()
    stream.seek(member.offset_data)
    text = stream.read(min(member.size, MAX_TARGET_BYTES))
    stream.seek(position)
    try:
        content = json.loads(text)
        if suffix == "json":
            content = next((content[name] for name in TARGET_FIELDS if name in content), None)
        if content is None:
            return None
        target = int(content)
    except (ValueError, TypeError, RecursionError) as error:
        raise ImageError("corrupt", f"{member.name} holds no class number ({text[:40]!r})") from error
    if not 0 <= target < 2**31:
        raise ImageError("corrupt", f"{member.name}: class number {target} is out of range")
    return target
