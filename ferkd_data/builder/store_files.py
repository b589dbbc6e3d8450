"""OUT in an object store: a host labels shards on its own disk, sends each when it is whole, and forgets it.

The store holds what `.build/` holds in a folder, but for the lock, which stores do not have. The lock is on the host's
disk and keeps drivers of one host apart. Drivers of two hosts would do the same work twice and write the same files.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ferkd_data.builder.locks import locked, open_build_folder
from ferkd_data.builder.shard_files import FOLDER, DiskFiles, ShardRecord
from ferkd_data.builder.state import BuildFolder, alone_in, clear_state
from ferkd_data.errors import BuildError, RemoteError, UsageError
from ferkd_data.format.manifest import Manifest
from ferkd_data.format.manifest_file import FILE_NAME
from ferkd_data.format.rejects import REJECTS_FILE
from ferkd_data.remote import is_remote, open_remote
from ferkd_data.storage import default_cache_dir, label_folder, sha256_file

WRITABLE = ("s3", "gs")
STATE_FILES = ("state.json", "facts.json", "plan.parquet", "plan-rejects.parquet", "plan.json")
"""In the order in which they are sent: where the last one is, so are the others."""
CLEARING = "clearing"
"""Sent to the store's `.build/` before anything is removed, and gone when the build ends. Without it, a kill could
leave files that nothing shows to be ours, and the same command would be refused."""
MAX_STATE_BYTES = 2**26
REQUESTS_AT_ONCE = 16


class StoreFiles:
    """`ShardFiles` in a store. `disk` is a folder in this host's cache, which holds only the shards in work."""

    def __init__(self, url: str) -> None:
        """Take the URL of a store; nothing is contacted. Raises UsageError for one that no build writes to."""
        if url.partition("://")[0] not in WRITABLE:
            raise UsageError(
                f"{url}: a build writes to a folder, s3:// or gs://; for other destinations, publish the label "
                f"set afterwards"
            )
        self.remote = open_remote(url)
        name = hashlib.sha256(self.remote.url.encode()).hexdigest()[:16]
        self.disk = DiskFiles(default_cache_dir() / "builds" / name)

    @property
    def location(self) -> str:
        return self.remote.url

    def begin(self, *, overwrite: bool) -> None:
        """Fetch the state that the store holds of this build, whichever host began it.

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
        self._clear_disk()
        # Cleared again where a kill came before the state of the new build: what is there may be files of the old one.
        was_clearing = f"{FOLDER}/{CLEARING}" in sizes and f"{FOLDER}/state.json" not in sizes
        if sizes and (overwrite or was_clearing):
            self._clear_store(sizes)
            return
        self._fetch_state(sizes)

    def join(self) -> None:
        """See what the driver has prepared. Raises BuildError where the store has no plan of this build."""
        self.disk.path.mkdir(parents=True, exist_ok=True)
        with alone_in(self.disk.path):
            try:
                plan = self.remote.read(f"{FOLDER}/plan.json", max_bytes=MAX_STATE_BYTES)
            except RemoteError as error:
                if error.status != 404:
                    raise
                raise BuildError(f"{self.location}: holds no unfinished build; was it finished or removed?") from error
            # Another plan is an earlier build's, left in this host's cache. The workers of one host
            # share this folder, and do this one at a time.
            here = self.disk.path / "plan.json"
            if not here.exists() or here.read_bytes() != plan:
                self._clear_disk()
                self._fetch_state(self.remote.sizes())

    def share(self) -> None:
        for name in STATE_FILES:
            self._send(self.disk.path / name, f"{FOLDER}/{name}")

    def record(self, shard: int) -> ShardRecord | None:
        # A record on the disk says that this host has seen the shard whole in the store: no request is needed.
        here = self.disk.record_path(shard)
        if here.exists():
            return ShardRecord.model_validate_json(here.read_bytes())
        return self._seen(self._stored_record(shard), self.remote.size)

    def records(self, shards: Iterable[int]) -> Iterator[tuple[int, ShardRecord | None]]:
        sizes = self.remote.sizes()

        # One listing for all, and no request for a shard without a record; threads, since each answer is waited for.
        def find(shard: int) -> ShardRecord | None:
            return self._seen(self._stored_record(shard) if self._record_name(shard) in sizes else None, sizes.get)

        with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="ferkd-records") as executor:
            yield from zip(shards, executor.map(find, shards), strict=True)

    def save(self, record: ShardRecord) -> None:
        """Send the shard's files, then the record, which says that they are whole."""
        for file in record.files:
            self.remote.upload(self.disk.out / file.path, file.path, size=file.bytes, sha256=file.sha256)
        self.announce(record)
        self._drop(record)

    def announce(self, record: ShardRecord) -> None:
        self.disk.save(record)
        self._send(self.disk.record_path(record.index), self._record_name(record.index))

    def look_again(self) -> None:
        pass

    @contextmanager
    def at_hand(self, record: ShardRecord) -> Iterator[None]:
        for old, new in record.either():
            # A kill while the shard was written anew: the object is the old or the new one, whole in either case.
            is_new = old != new and self.remote.holds(new.path, size=new.bytes, sha256=new.sha256)
            there = new if is_new else old
            self.remote.download(there.path, self.disk.out / there.path, size=there.bytes, sha256=there.sha256)
        yield
        self._drop(record)

    def commit(self, manifest: Manifest) -> None:
        """Send the rejects, then the manifest."""
        self._send(self.disk.out / manifest.rejects.path, manifest.rejects.path)
        self._send(self.disk.out / FILE_NAME, FILE_NAME)

    def forget(self) -> None:
        self.remote.remove(FOLDER)

    def remove(self) -> None:
        self.remote.remove(FOLDER)
        shutil.rmtree(self.disk.out)

    def _seen(self, record: ShardRecord | None, size_of: Callable[[str], int | None]) -> ShardRecord | None:
        """Keep a record on the disk if all files of its shard are in the store."""
        if record is None or any(size_of(old.path) not in (old.bytes, new.bytes) for old, new in record.either()):
            return None
        self.disk.save(record)
        return record

    def _stored_record(self, shard: int) -> ShardRecord | None:
        try:
            data = self.remote.read(self._record_name(shard), max_bytes=MAX_STATE_BYTES)
        except RemoteError as error:
            if error.status == 404:
                return None
            raise
        return ShardRecord.model_validate_json(data)

    def _record_name(self, shard: int) -> str:
        return self.disk.record_path(shard).relative_to(self.disk.out).as_posix()

    def _fetch_state(self, sizes: dict[str, int]) -> None:
        for name in STATE_FILES:
            there = f"{FOLDER}/{name}"
            # Without plan.json the others may be of an earlier plan; the settings alone are compared in any case.
            if there in sizes and (name == "state.json" or f"{FOLDER}/plan.json" in sizes):
                self.remote.fetch(there, self.disk.path / name, size=sizes[there])

    def _send(self, file: Path, name: str) -> None:
        self.remote.upload(file, name, size=file.stat().st_size, sha256=sha256_file(file))

    def _clear_store(self, sizes: dict[str, int]) -> None:
        """Remove what a build wrote, and nothing else."""
        mark = self.disk.path / CLEARING
        mark.write_text("cleared by --overwrite\n", encoding="utf-8")
        self._send(mark, f"{FOLDER}/{CLEARING}")
        mark.unlink()
        state = [f"{FOLDER}/{name}" for name in ("shards", *STATE_FILES)]
        rejects = [name for name in sizes if REJECTS_FILE.fullmatch(name)]
        # The manifest first: readers then find no label set, and not one whose files are going away.
        for name in (FILE_NAME, *state, "labels", "shards", *rejects):
            self.remote.remove(name)

    def _drop(self, record: ShardRecord) -> None:
        for file in record.files:
            (self.disk.out / file.path).unlink(missing_ok=True)

    def _clear_disk(self) -> None:
        clear_state(self.disk.path)
        for name in ("labels", "shards"):
            shutil.rmtree(self.disk.out / name, ignore_errors=True)


def location_of(out: str | Path) -> Path | str:
    """Return OUT as a folder, or as the URL of a store."""
    return out if isinstance(out, str) and is_remote(out) else label_folder(out)


def folder_of(location: Path | str) -> BuildFolder:
    """Return the folder that a worker writes to. Raises UsageError for a URL that no build writes to."""
    if isinstance(location, Path):
        return BuildFolder(location)
    files = StoreFiles(location)
    return BuildFolder(files.disk.out, files)


@contextmanager
def open_out(location: Path | str, *, overwrite: bool, extend: bool) -> Iterator[BuildFolder]:
    """Lock OUT for this process while the context lasts. Raises as `open_build_folder` does."""
    if isinstance(location, Path):
        with open_build_folder(location, overwrite=overwrite, extend=extend) as folder:
            yield folder
        return
    files = StoreFiles(location)
    files.disk.path.mkdir(parents=True, exist_ok=True)
    with locked(files.disk.path / "lock", location):
        files.begin(overwrite=overwrite)
        yield BuildFolder(files.disk.out, files)
