"""Every lie that a label set can tell, and everything that can be done with a label set: one table of each.

`python ways_in.py make PARQUET TARS WORK` writes a label set for each lie; `python ways_in.py meet WORK PHOTOS TEACHER`
does everything with each, in a process of its own for each set, and prints what came of it, seconds, and memory.
A lie about values is told in both layouts by the project's own writers, which check nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import ferkd_data as fd
import ferkd_data.builder
import ferkd_data.loader
from ferkd_data.errors import FerkdError
from ferkd_data.format import parquet, webdataset
from ferkd_data.labels.rows import ShardLabels
from ferkd_data_cli.main import run

sys.path.insert(0, str(Path(__file__).parent.parent))
from label_sets import edit_manifest, relist

HUNG_SECONDS = 120
MEMORY_BYTES = 16 * 2**30
"""Of addresses: what is reserved and never touched counts too, and torch reserves much."""

# Lies about values.


def with_values(name: str, at: tuple, value) -> Callable[[ShardLabels], ShardLabels]:
    """The same rows with another value at one place of one field."""

    def change(labels: ShardLabels) -> ShardLabels:
        array = getattr(labels, name).copy()
        array[at] = value
        return replace(labels, **{name: array})

    return change


def with_keys(change: Callable[[list[str]], list[str]]) -> Callable[[ShardLabels], ShardLabels]:
    return lambda labels: replace(labels, keys=change(list(labels.keys)))


CROP = (5, 2)
"""The row and the crop that lie: in the first crop block."""
VALUES: dict[str, Callable[[ShardLabels], ShardLabels]] = {
    "bucket 200": with_values("bucket", CROP, 200),
    "class 999 of 10": with_values("class_index", (*CROP, 1), 999),
    "a class twice": with_values("class_index", CROP, 3),
    "target 1,000,000 of 10": with_values("target", (5,), 1_000_000),
    "target 10 of 10": with_values("target", (5,), 10),
    "target -7": with_values("target", (5,), -7),
    "target_prob infinite": with_values("target_prob", CROP, np.inf),
    "target_prob 65504": with_values("target_prob", CROP, 65504),
    "target_prob negative": with_values("target_prob", CROP, -0.5),
    "probabilities NaN": with_values("class_prob", (*CROP, 0), np.nan),
    "probabilities infinite": with_values("class_prob", (*CROP, 0), np.inf),
    "probabilities negative": with_values("class_prob", (*CROP, 3), -0.1),
    "probabilities of 2 in sum": with_values("class_prob", CROP, 0.5),
    "probabilities of 0": with_values("class_prob", CROP, 0),
    "probabilities rising": with_values("class_prob", CROP, [0.1, 0.2, 0.3, 0.4]),
    "a box outside its image": with_values("boxes", CROP, [60000, 60000, 5000, 5000]),
    "an empty box": with_values("boxes", CROP, [0, 0, 0, 5]),
    "a bad value in the last block": with_values("target_prob", (5, 9), np.inf),
    "a key twice": with_keys(lambda keys: [keys[0], keys[0], *keys[2:]]),
    "fewer rows than listed": lambda labels: labels.take(np.arange(len(labels) - 1)),
    "fewer crops than listed": lambda labels: labels.crop_range(0, 9),
    "fewer classes kept than listed": lambda labels: replace(
        labels, class_index=labels.class_index[:, :, :3], class_prob=labels.class_prob[:, :, :3]
    ),
}


def tell(folder: Path, change: Callable[[ShardLabels], ShardLabels]) -> None:
    """Write the first shard anew with what `change` makes of its rows."""
    labels = fd.open_labels(folder)
    changed = change(labels.shard(0))
    if labels.manifest.layout == "parquet":
        for block, file in enumerate(labels.manifest.shards[0].files):
            crops = changed.crop_range(4 * block, 4 * block + 4)
            parquet.write(folder / file.path, crops)
    else:
        path = folder / labels.manifest.shards[0].files[0].path
        images = [image for _, image in webdataset.read_rows(path)]
        with webdataset.Writer(path) as writer:
            for row, image in zip(changed, images, strict=False):
                writer.add(row, image)
    relist(folder)


# Lies about files.


def edit_table(folder: Path, change: Callable[[pa.Table], pa.Table], block: int = 0) -> None:
    path = folder / f"labels/00000-00{block}.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    relist(folder)


def column(name: str, change: Callable[[pa.Array], pa.Array], block: int = 0) -> Callable[[Path], None]:
    def lie(folder: Path) -> None:
        def make(table: pa.Table) -> pa.Table:
            at = table.schema.get_field_index(name)
            return table.set_column(at, table.schema.field(at), change(table.column(at).combine_chunks()))

        edit_table(folder, make, block)

    return lie


def not_utf8(keys: pa.Array) -> pa.Array:
    texts = [b"\xff\xfe" + key.encode() for key in keys.to_pylist()]
    return pa.Array.from_buffers(pa.string(), len(texts), pa.array(texts, pa.binary()).buffers())


def twice(table: pa.Table) -> pa.Table:
    fields = [*table.schema, table.schema.field("bucket")]
    return pa.Table.from_arrays([*table.columns, table.column("bucket")], schema=pa.schema(fields))


def edit_tar(change: Callable[[list], list]) -> Callable[[Path], None]:
    def lie(folder: Path) -> None:
        path = folder / "shards/00000.tar"
        with tarfile.open(path) as tar:
            members = [(member, tar.extractfile(member).read()) for member in tar]
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
            for member, data in change(members):
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        relist(folder)

    return lie


def arrays(suffix: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def make(members: list) -> list:
        made = []
        for member, data in members:
            if member.name.endswith(suffix):
                stream = io.BytesIO()
                np.save(stream, change(np.load(io.BytesIO(data))), allow_pickle=True)
                data = stream.getvalue()
            made.append((member, data))
        return made

    return edit_tar(make)


def claims_shape(data: bytes) -> bytes:
    array, stream = np.load(io.BytesIO(data)), io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(stream, {**header, "shape": (10**10, *array.shape[1:])})
    return stream.getvalue() + array.tobytes()


def renamed(members: list) -> list:
    for member, _ in members[:6]:
        member.name = os.fsdecode(b"\xff\xfe") + member.name
    return members


def manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: edit_manifest(folder, change)


def first_file(**changes) -> Callable[[Path], None]:
    return manifest(lambda content: content["shards"][0]["files"][0].update(changes))


def claim_rows(content: dict) -> None:
    content["shards"][0]["rows"] += 10**9
    content["num_images"] += 10**9
    content["source"]["images_seen"] += 10**9


def claim_bytes(content: dict) -> None:
    """As many bytes as the rows need, which are not there."""
    claim_rows(content)
    for file in content["shards"][0]["files"]:
        file["bytes"] = 10**12


def claim_rejects(content: dict) -> None:
    content["rejects"]["rows"] += 100
    content["source"]["images_seen"] += 100


PARQUET: dict[str, Callable[[Path], None]] = {
    "a column twice": lambda folder: edit_table(folder, twice),
    "a key that is not UTF-8": column("key", not_utf8),
    "a key of 300 kB": column("key", lambda keys: pa.array(["k" * 300_000, *keys.to_pylist()[1:]])),
    "blocks of other keys": column("key", lambda keys: pa.array([f"{key}x" for key in keys.to_pylist()]), 1),
    "blocks in another order": lambda folder: edit_table(folder, lambda table: table.take(list(range(7, -1, -1))), 1),
    "blocks of other sizes": column(
        "height", lambda heights: pa.array([h.as_py() + 1 for h in heights], pa.uint16()), 1
    ),
    "blocks of other targets": column("target", lambda targets: pa.array([1] * len(targets), pa.int32()), 1),
    "text in place of Parquet": lambda folder: ((folder / "labels/00000-000.parquet").write_text("no"), relist(folder)),
    "an empty file": lambda folder: ((folder / "labels/00000-000.parquet").write_bytes(b""), relist(folder)),
    "a shard in a rejects file's place": lambda folder: (
        shutil.copyfile(folder / "labels/00000-000.parquet", folder / "rejects.parquet"),
        relist(folder),
    ),
    "more rejects than there are": manifest(claim_rejects),
    "rows that no file holds": manifest(claim_rows),
    "rows in bytes that are not there": manifest(claim_bytes),
    "a billion crops": manifest(lambda content: content.update(num_crops=10**6, crops_per_block=10**5)),
    "absurd top_k": manifest(lambda content: content.update(top_k=1000)),
    "more classes kept than there are": manifest(lambda content: content.update(top_k=11)),
    "fewer classes than are named": manifest(lambda content: content.update(num_classes=3, class_names=None)),
    "a shard named README.md": first_file(path="README.md"),
    "a shard named as unfinished": first_file(path="labels/.00000-000.parquet.part"),
    "rejects named README.md": manifest(lambda content: content["rejects"].update(path="README.md")),
    "rejects named *.part": manifest(lambda content: content["rejects"].update(path=".rejects.parquet.part")),
    "a name of 300 bytes": first_file(path=f"labels/{'x' * 300}.parquet"),
    "a path that climbs": first_file(path="labels/../../x.parquet"),
    "a path with a lone surrogate": lambda folder: (folder / "manifest.json").write_text(
        (folder / "manifest.json").read_text().replace("labels/00000-000", "labels/\\ud800")
    ),
    "a missing file": lambda folder: (folder / "labels/00000-000.parquet").unlink(),
    "brackets alone": lambda folder: (folder / "manifest.json").write_text("[" * 10**6),
}
TARS: dict[str, Callable[[Path], None]] = {
    "a key that is not UTF-8": edit_tar(renamed),
    "arrays that claim 10^10 rows": edit_tar(
        lambda members: [(m, claims_shape(d) if m.name.endswith(".npy") else d) for m, d in members]
    ),
    "arrays of another shape": arrays("class_prob.npy", lambda prob: prob.reshape(-1)),
    "arrays of no rows": arrays("class_prob.npy", lambda prob: prob[:0]),
    "arrays of objects": arrays("class_prob.npy", lambda prob: prob.astype(object)),
    "arrays of texts": arrays("class_index.npy", lambda index: index.astype("U10")),
    "bucket 999": arrays("crops.npy", lambda crops: np.where(np.arange(crops.shape[1]) == 5, 999, crops).astype("<u2")),
    "flip 7": arrays("crops.npy", lambda crops: np.where(np.arange(crops.shape[1]) == 4, 7, crops).astype("<u2")),
    "an array is missing": edit_tar(lambda members: [m for m in members if "class_prob" not in m[0].name]),
    "a sample twice": edit_tar(lambda members: [*members, *members[:6]]),
    "a class that is text": edit_tar(
        lambda members: [(m, b"9e9" if m.name.endswith("cls") else d) for m, d in members]
    ),
    "a class of 30 digits": edit_tar(
        lambda members: [(m, b"9" * 30 if m.name.endswith("cls") else d) for m, d in members]
    ),
    "an image that is none": edit_tar(lambda members: [(m, b"?" if m.name.endswith("jpg") else d) for m, d in members]),
    "rows that no file holds": manifest(claim_rows),
    "rows in bytes that are not there": manifest(claim_bytes),
    "a billion crops": manifest(lambda content: content.update(num_crops=10**6)),
    "absurd top_k": manifest(lambda content: content.update(top_k=1000)),
}


def lies() -> dict[str, tuple[str, Callable[[Path], None]]]:
    """By name: the layout, and what makes the lie of a good label set."""
    both = {
        f"{layout}: {name}": (layout, lambda folder, change=change: tell(folder, change))
        for name, change in VALUES.items()
        for layout in ("parquet", "tars")
    }
    return {
        **both,
        **{f"parquet: {name}": ("parquet", lie) for name, lie in PARQUET.items()},
        **{f"tars: {name}": ("tars", lie) for name, lie in TARS.items()},
    }


# What can be done with a label set.


def load(folder: Path, photos: Path, out: Path, **settings) -> None:
    """Every crop block comes up: three epochs of four crops each."""
    images = None if (folder / "shards").exists() else photos
    labels = fd.open_labels(folder)
    common = {"batch_size": 4, "crops_per_image": 4, "size": 8, "drop_last": False, "cache_dir": out}
    loader = fd.CropLoader(labels, images=images, **common, **settings)
    for _ in range(3):
        list(loader)


def command(*arguments: object) -> None:
    """What the program said; raises what a user would take for a crash, or for success."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = run([str(argument) for argument in arguments])
    if "ferkd-data: unexpected" in said.getvalue() or "Traceback" in said.getvalue():
        raise RuntimeError(said.getvalue()[-300:])
    if status:
        raise FerkdError(said.getvalue()[-300:])


def uses(folder: Path, out: Path, photos: Path, teacher: str) -> dict[str, Callable[[], object]]:
    card = ["--name", "x", "--license", "cc0-1.0", "--author", "a"]
    images: list[object] = ["--images", photos]
    if (folder / "shards").exists():
        # The images lie in its tars, and others would not be read.
        card, images = [*card, "--image-license", "cc0-1.0"], []
    extend = ["--teacher", teacher, "--teacher", "python:ferkd_tiny_teachers:second", "--device", "cpu", "--extend"]
    return {
        "info": lambda: command("info", folder),
        "stats": lambda: command("stats", folder),
        "show": lambda: command("show", folder),
        "report": lambda: command("report", folder, out / "report.html"),
        "verify": lambda: command("verify", folder),
        "publish": lambda: command("publish", folder, out / "public", *card),
        "pull": lambda: command("pull", folder, out / "pulled"),
        "pull a part": lambda: command("pull", folder, out / "part", "--shards", "0"),
        "convert to parquet": lambda: command(
            "convert", folder, out / "parquet", "--layout", "parquet", "--crops-per-block", 5
        ),
        "convert to tars": lambda: command("convert", folder, out / "tars", "--layout", "webdataset", *images),
        "export": lambda: fd.export_fkd(folder, out / "fkd"),
        "merge": lambda: command("merge", folder, folder, out / "merged"),
        "extend": lambda: command("build", photos, folder, *extend),
        "iterate": lambda: list(fd.open_labels(folder)),
        "ensemble": lambda: list(fd.open_labels([folder, folder], weights=[1, 1])),
        "load": lambda: load(folder, photos, out / "cache"),
        "load in shards": lambda: load(folder, photos, out / "cache-2", order="shards"),
    }


# Making and meeting them.


def make(sets: dict[str, Path], work: Path) -> None:
    work.mkdir(exist_ok=True)
    told = {
        "parquet: no lie": ("parquet", lambda folder: None),
        "tars: no lie": ("tars", lambda folder: None),
        **lies(),
    }
    for number, (name, (layout, lie)) in enumerate(told.items()):
        folder = shutil.copytree(sets[layout], work / f"{number:03d}")
        lie(folder)
        (work / f"{number:03d}.name").write_text(name)


def outcome(act: Callable[[], object]) -> str:
    try:
        act()
    except FerkdError as error:
        return f"refused:{' '.join(str(error).split())[-160:]}"
    except TimeoutError:
        return "hung"
    except BaseException as error:
        return f"raw:{type(error).__name__}:{' '.join(str(error).split())[:160]}"
    return "passed"


def disk_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512 if path.is_file() else 0
    except FileNotFoundError:
        # A thread that ends still removes its own files.
        return 0


def meet_one(folder: Path, out: Path, photos: Path, teacher: str) -> None:
    """One line for each use: name, what came of it, seconds, peak of memory so far in MB, bytes written so far."""

    def hung(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, hung)
    out.mkdir()
    for use, act in uses(folder, out, photos, teacher).items():
        signal.alarm(HUNG_SECONDS)
        start = time.monotonic()
        what = outcome(act)
        signal.alarm(0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        written = sum(map(disk_bytes, out.rglob("*")))
        print(use, what, f"{time.monotonic() - start:.2f}", peak, written, sep="\t", flush=True)
    for path in sorted(out.rglob("manifest.json")):
        print("written", path.relative_to(out).parts[0], 0, 0, 0, sep="\t", flush=True)


def meet(work: Path, photos: Path, teacher: str) -> None:
    """Processes are forked that have everything imported; nothing is used before, since threads do not survive that."""
    for name in sorted(work.glob("*.name")):
        folder = name.with_suffix("")
        print(f"set\t{name.read_text()}", flush=True)
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            meet_one(folder, work / f"out-{folder.name}", photos, teacher)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print("process", f"killed:{status}", 0, 0, 0, sep="\t", flush=True)
        shutil.rmtree(work / f"out-{folder.name}", ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make({"parquet": Path(sys.argv[2]), "tars": Path(sys.argv[3])}, Path(sys.argv[4]))
    else:
        meet(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
