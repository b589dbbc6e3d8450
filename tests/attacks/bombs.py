"""Small files that claim to be large ones.

`python bombs.py make GOLDEN WORK` makes a label set of each; `python bombs.py meet WORK`, in a process of its own,
meets them and prints the memory that they took.
"""

from __future__ import annotations

import io
import resource
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import ferkd_data as fd
from ferkd_data.errors import FerkdError

sys.path.insert(0, str(Path(__file__).parent.parent))
from label_sets import edit_manifest, relist

LONG = 200_000_000
KEY_BYTES = 1_000_000


def varint(number: int, length: int) -> bytes:
    """A zigzag number in so many bytes."""
    number <<= 1
    return bytes([number >> 7 * i & 127 | 128 for i in range(length - 1)] + [number >> 7 * (length - 1)])


def with_lying_footer(path: Path) -> None:
    """Let the footer say that the first column takes 100 bytes."""
    data = path.read_bytes()
    at = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    true = pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size
    length = -(-(2 * true).bit_length() // 7)
    said = varint(true, length)
    assert said in data[at:]
    path.write_bytes(data[:at] + data[at:].replace(said, varint(100, length)))
    assert pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size == 100


def page_bomb(folder: Path) -> None:
    path = folder / "labels/00000-000.parquet"
    table = pq.read_table(path)
    keys = pa.array(["a" * LONG] + ["b"] * (len(table) - 1))
    table = table.set_column(0, table.schema.field("key"), keys)
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    with_lying_footer(path)


def dictionary_bomb(folder: Path, name: str = "labels/00000-000.parquet", column: int = 0) -> None:
    """One long text, for a few thousand rows."""
    path = folder / name
    table = pq.read_table(path)
    rows = 3000
    many = pa.concat_tables([table.slice(0, 1)] * rows) if len(table) else table
    if not len(table):
        many = pa.table({field.name: pa.array(["x"] * rows) for field in table.schema}, schema=table.schema)
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["a" * KEY_BYTES]))
    many = many.set_column(column, many.schema.field(column).name, texts)
    pq.write_table(many, path, compression="zstd", store_schema=False)


def key_bomb(folder: Path) -> None:
    dictionary_bomb(folder)

    def change(content):
        content["shards"][0]["rows"], shard = 3000, content["shards"][0]["rows"]
        content["num_images"] += 3000 - shard
        content["source"]["images_seen"] += 3000 - shard
        first, *others = content["shards"][0]["files"]
        for file in others:
            shutil.copyfile(folder / first["path"], folder / file["path"])

    edit_manifest(folder, change)


def reason_bomb(folder: Path) -> None:
    dictionary_bomb(folder, "rejects.parquet", 1)

    def change(content):
        content["rejects"]["rows"] = 3000
        content["source"]["images_seen"] = content["num_images"] + 3000

    edit_manifest(folder, change)


def tar_bomb(folder: Path) -> None:
    """An image that claims 64 GB."""
    path = folder / "shards/00000.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with path.open("wb") as sink:
        for member, data in members:
            member.size = len(data) if member.name.endswith((".cls", ".npy")) else 64 * 10**9
            sink.write(member.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))


def header_bomb(folder: Path) -> None:
    """A name that claims 64 GB."""
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 64 * 10**9
    (folder / "shards/00000.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def npy_bomb(folder: Path) -> None:
    """Crop records that claim 64 GB."""
    path = folder / "shards/00000.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            if member.name.endswith(".npy"):
                array = np.load(io.BytesIO(data), allow_pickle=False)
                claim = io.BytesIO()
                header = np.lib.format.header_data_from_array_1_0(array)
                np.lib.format.write_array_header_1_0(claim, {**header, "shape": (10**10, *array.shape[1:])})
                data = claim.getvalue() + array.tobytes()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def json_bomb(folder: Path) -> None:
    text = (folder / "manifest.json").read_text().rstrip().removesuffix("}")
    (folder / "manifest.json").write_text(text + ', "more": [' + "[],[]," * 2_500_000 + "[]]}")


def deep_json_bomb(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": "ferkd-data", "version": 1, "a": ' + "[" * 10**6)


BOMBS = {
    "parquet": [page_bomb, key_bomb, reason_bomb, json_bomb, deep_json_bomb],
    "webdataset": [tar_bomb, header_bomb, npy_bomb],
}
USES = {
    "open": lambda folder, out: list(fd.open_labels(folder).shards()),
    "keys": lambda folder, out: fd.open_labels(folder).key_hashes(),
    "verify": lambda folder, out: fd.verify(folder),
    "convert": lambda folder, out: fd.convert(folder, out, layout="parquet", crops_per_block=2),
    "merge": lambda folder, out: fd.merge([folder, folder], out),
    "export": lambda folder, out: fd.export_fkd(folder, out),
    "pull": lambda folder, out: fd.pull(str(folder), out, shards=[0]),
    "load": lambda folder, out: list(fd.CropLoader(fd.open_labels(folder), images=None, batch_size=1, size=8)),
}


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def make(golden: Path, work: Path) -> None:
    for layout, bombs in BOMBS.items():
        for bomb in bombs:
            folder = shutil.copytree(golden / layout, work / bomb.__name__)
            bomb(folder)
            if "json" not in bomb.__name__:
                relist(folder)


def meet(work: Path) -> None:
    """One line per bomb and use: what came of it, and the peak of memory so far. What making them took is not in it."""
    list(fd.open_labels(work.parent / "plain").shards())
    fd.verify(work.parent / "plain")
    print("start", "-", "-", peak_mb())
    for folder in sorted(path for path in work.iterdir() if path.is_dir()):
        for use, action in USES.items():
            try:
                said = action(folder, work.parent / "out" / f"{folder.name}-{use}")
                outcome = "faults" if isinstance(said, fd.VerifyReport) and not said.ok else "passed"
            except FerkdError as error:
                outcome = type(error).__name__
            print(folder.name, use, outcome, peak_mb(), flush=True)


if __name__ == "__main__":
    (make if sys.argv[1] == "make" else meet)(*map(Path, sys.argv[2:]))
