"""Kill -9 a pull and a publish at random points, 100 times each: is anything lost, damaged, or sent again?

    python benchmarks/interruptions.py [--kills 100]

The label set is a directory of random shards with a manifest. Each transfer runs in a process of its own, is killed at
a random moment after it began and before an undisturbed one would end, and is started again until it ends by itself.
Both are slowed down, so that most kills fall into the transfer: the server sends as much as the label set in a second,
and a publish waits before and after each file. The script fails unless
- every transfer ends with the same files, and no manifest is ever seen before its files;
- no file that was whole at a kill is touched by a later attempt (its inode and its time of change stay);
- pull: the server sends hardly more than once the size for each pull. Starting files again would cost half a file for
  each kill, starting all again half of the label set.
"""

from __future__ import annotations

import argparse
import http.server
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from synthetic import write_label_set

import ferkd_data as fd
from ferkd_data.label_set import LabelSet
from ferkd_data.labels.rows import ImageLabels
from ferkd_data.labels.statistics import Statistics, add, shard_statistics
from ferkd_data.remote import Remote
from ferkd_data.storage import sha256_file

SHARDS, IMAGES, CROPS, TOP_K, CLASSES = 6, 1000, 50, 5, 1000
CHUNK, PULL_SECONDS, PUBLISH_WAIT_SECONDS = 2**14, 1.0, 0.05
CARD = fd.CardFields(name="random", license="cc0-1.0")
LONGEST_START = 60.0


def random_rows(shard: int) -> list[tuple[ImageLabels, bytes]]:
    generator = np.random.default_rng(shard)
    rows = []
    for number in range(IMAGES):
        first = generator.integers(0, CLASSES - TOP_K, (CROPS, 1))
        prob = -np.sort(-generator.dirichlet(np.ones(TOP_K + 1), CROPS)[:, :TOP_K], axis=1).astype(np.float16)
        labels = ImageLabels(
            key=f"class0/{shard:03d}-{number:05d}",
            image_digest=generator.bytes(16),
            height=375,
            width=500,
            target=-1,
            boxes=generator.integers(1, 180, (CROPS, 4)).astype(np.uint16),
            flip=generator.random(CROPS) < 0.5,
            class_index=(first + np.arange(TOP_K)).astype(np.uint16),
            class_prob=prob,
            target_prob=np.full(CROPS, np.nan, np.float16),
            bucket=np.digitize(prob[:, 0], [0.15, 0.3, 0.95]).astype(np.uint8),
        )
        rows.append((labels, b""))
    return rows


def make_labels(folder: Path) -> LabelSet:
    write_label_set(folder, map(random_rows, range(SHARDS)), num_crops=CROPS, top_k=TOP_K, num_classes=CLASSES)
    labels = fd.open_labels(folder)
    counted: Statistics = add(map(shard_statistics, labels.shards()))
    whole = labels.manifest.model_copy(update={"statistics": counted})
    (folder / "manifest.json").write_text(whole.to_json())
    return fd.open_labels(folder)


class SlowServer(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    sent = 0
    bytes_per_second = 1e6

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        try:
            for first in range(start, len(data), CHUNK):
                self.wfile.write(data[first : first + CHUNK])
                SlowServer.sent += len(data[first : first + CHUNK])
                time.sleep(CHUNK / self.bytes_per_second)
        except ConnectionError:
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


class QuietServer(http.server.ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed are what this is about."""


def pull(began: Event, url: str, out: Path) -> None:
    began.set()
    fd.pull(url, out, threads=1)


def publish(began: Event, labels: Path, place: Path, cache: Path) -> None:
    os.environ["FERKD_DATA_CACHE"] = str(cache)
    upload = Remote.upload

    def slow(self: Remote, file: Path, name: str, *, size: int, sha256: str) -> None:
        time.sleep(PUBLISH_WAIT_SECONDS)
        upload(self, file, name, size=size, sha256=sha256)
        time.sleep(PUBLISH_WAIT_SECONDS)

    Remote.upload = slow  # type: ignore[method-assign]
    began.set()
    fd.publish(labels, str(place), card=CARD, threads=1)


class Kills:
    """Runs transfers and kills them."""

    def __init__(self) -> None:
        self.done = 0
        self.transfers = 0
        self.context = multiprocessing.get_context("forkserver")

    def start(self, work: Callable[..., None], arguments: tuple[object, ...]) -> Any:
        began = self.context.Event()
        process = self.context.Process(target=work, args=(began, *arguments))
        process.start()
        if not began.wait(LONGEST_START):
            raise SystemExit("a transfer did not begin")
        return process

    def seconds(self, work: Callable[..., None], arguments: tuple[object, ...]) -> float:
        """How long it takes undisturbed."""
        process = self.start(work, arguments)
        start = time.perf_counter()
        process.join()
        if process.exitcode != 0:
            raise SystemExit("an undisturbed transfer failed")
        return time.perf_counter() - start

    def until_done(
        self, work: Callable[..., None], arguments: tuple[object, ...], longest: float, check: Callable[[], None]
    ) -> None:
        """Start it again and again, killed within `longest` seconds, until it ends before that."""
        self.transfers += 1
        while True:
            process = self.start(work, arguments)
            process.join(random.uniform(0, longest))
            if process.exitcode is not None:
                if process.exitcode != 0:
                    raise SystemExit(f"a transfer failed with status {process.exitcode}")
                return
            process.kill()
            process.join()
            self.done += 1
            check()


class Untouched:
    """Files that were whole once must stay the same files."""

    def __init__(self, labels: LabelSet, out: Path) -> None:
        self.labels = labels
        self.out = out
        self.entries = [file for shard in labels.manifest.shards for file in shard.files]
        self.whole: dict[str, tuple[int, int]] = {}

    def __call__(self) -> None:
        if (self.out / "manifest.json").exists() and not self.same():
            raise SystemExit(f"{self.out}: a manifest came before its files")
        for entry in self.entries:
            path = self.out / entry.path
            there = path.exists() and path.stat().st_size == entry.bytes and sha256_file(path) == entry.sha256
            now = (path.stat().st_ino, path.stat().st_mtime_ns) if there else None
            if entry.path in self.whole and self.whole[entry.path] != now:
                raise SystemExit(f"{path}: was whole, and came again")
            # A file that nobody has read back yet is not known to be whole: see `known`.
            if now and self.known(entry.sha256):
                self.whole[entry.path] = now

    def known(self, sha256: str) -> bool:
        """Whether the transfer knows that this file is whole."""
        return True

    def same(self) -> bool:
        names = [entry.path for entry in self.entries]
        equal = all(
            (Path(self.labels.location) / name).read_bytes() == (self.out / name).read_bytes() for name in names
        )
        return equal and fd.open_labels(self.out).identity == self.labels.identity


def interrupt_pulls(folder: Path, labels: LabelSet, size: int, kills: int) -> None:
    server = QuietServer(("127.0.0.1", 0), partial(SlowServer, directory=labels.location))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    SlowServer.bytes_per_second = size / PULL_SECONDS
    url = f"http://127.0.0.1:{server.server_address[1]}"
    work = Kills()
    longest = work.seconds(pull, (url, folder / "undisturbed"))
    SlowServer.sent = 0
    while work.done < kills:
        out = folder / f"pull{work.transfers}"
        check = Untouched(labels, out)
        work.until_done(pull, (url, out), longest, check)
        check()
        if not check.same():
            raise SystemExit(f"{out}: is not the label set")
    server.shutdown()
    again = SlowServer.sent - size * work.transfers
    print(f"  pull, {longest:.1f} s: {work.done} kills over {work.transfers} pulls, each ended with the same files")
    print(
        f"    sent {SlowServer.sent / size / work.transfers:.2f} times the size, {again / work.done / 1e3:,.0f} kB more"
    )
    print(f"    for each kill; half of a file would be {size / SHARDS / 2e3:,.0f} kB, half of all {size / 2e3:,.0f} kB")
    if again / work.done > size / SHARDS / 4:
        raise SystemExit("files were started again")


def interrupt_publishes(folder: Path, labels: LabelSet, kills: int) -> None:
    work = Kills()
    source = Path(labels.location)
    # The first one reads files that are not in the system's cache yet.
    longest = min(work.seconds(publish, (source, folder / f"undisturbed{i}", folder / f"cache-{i}")) for i in range(3))
    kept = 0
    while work.done < kills:
        place, cache = folder / f"public{work.transfers}", folder / f"cache{work.transfers}"
        check = Untouched(labels, place)
        check.known = lambda sha256, cache=cache: sha256 in journal(cache)  # type: ignore[method-assign]
        work.until_done(publish, (source, place, cache), longest, check)
        check()
        kept += len(check.whole)
        if not check.same():
            raise SystemExit(f"{place}: is not the label set")
    print(
        f"  publish, {longest:.1f} s: {work.done} kills over {work.transfers} publishes, each ended with the same files"
    )
    print(f"    {kept} files had arrived before a kill, none of them was written again")


def journal(cache: Path) -> str:
    return "".join(file.read_text() for file in cache.glob("publish/*.txt"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    kills = parser.parse_args().kills
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["ferkd_data.exchange.pull", "ferkd_data.exchange.publish", "numpy", "synthetic"]
    )
    random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        labels = make_labels(folder / "labels")
        size = sum(file.bytes for shard in labels.manifest.shards for file in shard.files)
        print(f"{time.strftime('%Y-%m-%d')}: {SHARDS} shards, {size / 1e6:.1f} MB")
        interrupt_pulls(folder, labels, size, kills)
        interrupt_publishes(folder, labels, kills)


if __name__ == "__main__":
    main()
