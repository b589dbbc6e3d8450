"""OUT in an object store: shards are labelled on a host's own disk, sent when they are whole, and forgotten there.

What `.build/` is in a folder it is in the store, but for the lock, which stores do not have: it keeps drivers of one
host apart. Drivers of two hosts would do the same work twice and write the same files.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ferkd_data.builder.locks import locked, open_build_folder
from ferkd_data.builder.state import FOLDER, BuildFolder, ShardRecord
from ferkd_data.errors import BuildError, RemoteError, UsageError
from ferkd_data.format.manifest import FILE_NAME, Manifest
from ferkd_data.remote import is_remote, open_remote
from ferkd_data.storage import default_cache_dir, sha256_file

WRITABLE = ("s3", "gs")
STATE_FILES = ("state.json", "facts.json", "plan.parquet", "plan-rejects.parquet", "plan.json")
"""In the order in which they are sent: where the last one is, the others are."""
MAX_STATE_BYTES = 2**26
REQUESTS_AT_ONCE = 16


class StoreFolder(BuildFolder):
    """`out` is a folder in the cache of this host that holds the shards in work."""

    def __init__(self, url: str) -> None:
        if url.partition("://")[0] not in WRITABLE:
            raise UsageError(
                f"{url}: a build writes to a folder, s3:// or gs://; for other places, publish it when done"
            )
        self.remote = open_remote(url)
        place = hashlib.sha256(self.remote.url.encode()).hexdigest()[:16]
        super().__init__(default_cache_dir() / "builds" / place)

    @property
    def location(self) -> str:
        return self.remote.url

    def begin(self, *, overwrite: bool) -> None:
        """Take up what the store holds of this build, whichever host did it.

        Raises BuildError for a finished label set, or files that are not ours.
        """
        sizes = self.remote.sizes()
        ours = FILE_NAME in sizes or any(name.startswith(f"{FOLDER}/") for name in sizes)
        if sizes and not ours:
            raise BuildError(f"{self.location}: is not empty and holds no label set; give a new or empty place")
        if FILE_NAME in sizes and not overwrite:
            raise BuildError(
                f"{self.location} holds a finished label set; use another place, or --overwrite to replace it"
            )
        self._forget()
        if overwrite:
            for name in (FILE_NAME, FOLDER, "labels", "shards"):
                self.remote.remove(name)
            return
        self._fetch_state(sizes)

    def join(self) -> None:
        """Raises BuildError where the store has no plan of this build."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.alone():
            try:
                plan = self.remote.read(f"{FOLDER}/plan.json", max_bytes=MAX_STATE_BYTES)
            except RemoteError as error:
                if error.status != 404:
                    raise
                raise BuildError(f"{self.location}: holds no unfinished build; was it finished or removed?") from error
            here = self.path / "plan.json"
            if not here.exists() or here.read_bytes() != plan:
                self._forget()
                self._fetch_state(self.remote.sizes())

    def share(self) -> None:
        for name in STATE_FILES:
            self._send(self.path / name, f"{FOLDER}/{name}")

    def record(self, shard: int) -> ShardRecord | None:
        """As in a folder; what this process has seen whole is not asked for again."""
        here = self._record_path(shard)
        if here.exists():
            return ShardRecord.model_validate_json(here.read_bytes())
        record = self._stored_record(shard)
        if record is None or not _is_whole(record, self.remote.size):
            return None
        super().save(record)
        return record

    def records(self, shards: Iterable[int]) -> Iterator[tuple[int, ShardRecord | None]]:
        sizes = self.remote.sizes()

        def find(shard: int) -> ShardRecord | None:
            record = self._stored_record(shard) if self._record_name(shard) in sizes else None
            if record is None or not _is_whole(record, sizes.get):
                return None
            super(StoreFolder, self).save(record)
            return record

        with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="ferkd-records") as executor:
            yield from zip(shards, executor.map(find, shards), strict=True)

    def save(self, record: ShardRecord) -> None:
        """Send the shard's files, then its record, which says that they are whole."""
        for file in record.files:
            self.remote.upload(self.out / file.path, file.path, size=file.bytes, sha256=file.sha256)
        super().save(record)
        self._send(self._record_path(record.index), self._record_name(record.index))
        self._drop(record)

    def announce(self, record: ShardRecord) -> None:
        super().announce(record)
        self._send(self._record_path(record.index), self._record_name(record.index))

    def look_again(self) -> None:
        pass

    @contextmanager
    def at_hand(self, record: ShardRecord) -> Iterator[None]:
        for old, new in record.either():
            is_new = old != new and self.remote.holds(new.path, size=new.bytes, sha256=new.sha256)
            there = new if is_new else old
            self.remote.download(there.path, self.out / there.path, size=there.bytes, sha256=there.sha256)
        yield
        self._drop(record)

    def commit(self, manifest: Manifest) -> None:
        """Send the rejects, then the manifest."""
        self._send(self.out / manifest.rejects.path, manifest.rejects.path)
        self._send(self.out / FILE_NAME, FILE_NAME)

    def start_over(self, rejects: Path) -> Path:
        self.remote.remove(FOLDER)
        return super().start_over(rejects)

    def remove(self) -> None:
        self.remote.remove(FOLDER)
        shutil.rmtree(self.out)

    def _stored_record(self, shard: int) -> ShardRecord | None:
        try:
            data = self.remote.read(self._record_name(shard), max_bytes=MAX_STATE_BYTES)
        except RemoteError as error:
            if error.status == 404:
                return None
            raise
        return ShardRecord.model_validate_json(data)

    def _record_name(self, shard: int) -> str:
        return self._record_path(shard).relative_to(self.out).as_posix()

    def _fetch_state(self, sizes: dict[str, int]) -> None:
        for name in STATE_FILES:
            there = f"{FOLDER}/{name}"
            if there in sizes and (name == "state.json" or f"{FOLDER}/plan.json" in sizes):
                self.remote.fetch(there, self.path / name, size=sizes[there])

    def _send(self, file: Path, name: str) -> None:
        self.remote.upload(file, name, size=file.stat().st_size, sha256=sha256_file(file))

    def _drop(self, record: ShardRecord) -> None:
        for file in record.files:
            (self.out / file.path).unlink(missing_ok=True)

    def _forget(self) -> None:
        self.clear()
        for name in ("labels", "shards"):
            shutil.rmtree(self.out / name, ignore_errors=True)


def _is_whole(record: ShardRecord, size_of: Callable[[str], int | None]) -> bool:
    return all(size_of(old.path) in (old.bytes, new.bytes) for old, new in record.either())


def location_of(out: str | Path) -> Path | str:
    """OUT as a folder, or as the URL of a store."""
    return out if isinstance(out, str) and is_remote(out) else Path(str(out).removeprefix("file://")).expanduser()


def folder_of(place: Path | str) -> BuildFolder:
    """The place that a worker writes to. Raises UsageError for a URL that no build writes to."""
    return StoreFolder(place) if isinstance(place, str) else BuildFolder(place)


@contextmanager
def open_out(place: Path | str, *, overwrite: bool, extend: bool) -> Iterator[BuildFolder]:
    """Take OUT for this process, for as long as the context lasts. Raises as `open_build_folder` does."""
    if isinstance(place, Path):
        with open_build_folder(place, overwrite=overwrite, extend=extend) as taken:
            yield taken
        return
    folder = StoreFolder(place)
    folder.path.mkdir(parents=True, exist_ok=True)
    with locked(folder.path / "lock", place):
        folder.begin(overwrite=overwrite)
        yield folder
