"""Invariant 6: a hostile label set ends in one clear error; nothing runs, nothing outside the folder is read."""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from label_sets import edit_manifest, relist

import ferkd_data as fd
from ferkd_data.errors import LabelSetError, ManifestError, ShardError


def set_in(*path_and_value):
    *path, last, value = path_and_value

    def change(content):
        for part in path:
            content = content[part]
        content[last] = value

    return change


MANIFESTS = {
    "climbing path": (set_in("shards", 0, "files", 0, "path", "../../etc/passwd"), "not a path inside"),
    "absolute path": (set_in("shards", 0, "files", 0, "path", "/etc/passwd"), "not a path inside"),
    "url": (set_in("shards", 0, "files", 0, "path", "http://127.0.0.1/x"), "not a path inside"),
    "pipe": (set_in("shards", 0, "files", 0, "path", "pipe:touch x"), "not a path inside"),
    "newer version": (set_in("version", 2), "format version 2.*upgrade"),
    "no version": (lambda m: m.pop("version"), "format version None"),
    "another format": (set_in("format", "safetensors"), "not the manifest"),
    "negative rows": (set_in("shards", 0, "rows", -1), "shards.0.rows"),
    "lying rows": (set_in("shards", 0, "rows", 10**9), "the shards hold"),
    "lying total": (set_in("num_images", 10**9), "the shards hold"),
    "missing block": (lambda m: m["shards"][0]["files"].pop(), "crop blocks"),
    "shards swapped": (lambda m: m["shards"].reverse(), "shard 2 stands where shard 0"),
    "bad digest": (set_in("shards", 0, "files", 0, "sha256", "zz"), "sha256"),
    "infinite mean": (set_in("teachers", 0, "mean", [1e999, 0, 0]), "teachers.0.mean"),
    "no teachers": (set_in("teachers", []), "teachers"),
    "text for a number": (set_in("top_k", "many"), "top_k"),
    "too few class names": (set_in("class_names", ["a"]), "class names"),
    "counts do not add up": (set_in("source", "images_seen", 5), "do not add up"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_hostile_manifest(copy, name):
    change, message = MANIFESTS[name]
    edit_manifest(copy, change)
    with pytest.raises(ManifestError, match=message):
        fd.open_labels(copy)


@pytest.mark.usefixtures("no_collection")
def test_deeply_nested_json_and_cut_json(copy):
    (copy / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(ManifestError, match="not JSON"):
        fd.open_labels(copy)
    (copy / "manifest.json").write_text('{"format": "ferkd-data", "version": 1')
    with pytest.raises(ManifestError, match="cut short"):
        fd.open_labels(copy)


def test_an_unknown_field_is_kept(copy):
    edit_manifest(copy, set_in("teachers", 0, "licence", "MIT"))
    assert '"licence": "MIT"' in fd.open_labels(copy).manifest.to_json()


def test_a_link_out_of_the_folder_is_refused(copy, tmp_path):
    shard = copy / "labels/00000-000.parquet"
    shutil.move(shard, tmp_path / "elsewhere.parquet")
    shard.symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(LabelSetError, match="leads outside"):
        fd.open_labels(copy).shard(0)


def replace_shard(folder, table, block="labels/00000-000.parquet"):
    """Put another table in a shard's place, with a manifest that agrees."""
    path = folder / block
    pq.write_table(table, path)
    relist(folder)


def test_a_truncated_or_missing_shard(copy):
    path = copy / "labels/00000-000.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ShardError, match="the manifest says"):
        fd.open_labels(copy).shard(0)
    path.unlink()
    with pytest.raises(ShardError, match="missing"):
        fd.open_labels(copy).shard(0)


def test_a_shard_of_the_right_size_with_rubbish(copy):
    path = copy / "labels/00000-000.parquet"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ShardError, match="SHA-256 differs"):
        fd.open_labels(copy).shard(0)
    relist(copy)
    with pytest.raises(ShardError, match="cannot be read as Parquet"):
        fd.open_labels(copy).shard(0)


def test_a_lying_row_count_takes_no_memory(copy):
    table = pq.read_table(copy / "labels/00000-000.parquet")
    replace_shard(copy, pa.concat_tables([table] * 50))
    with pytest.raises(ShardError, match="holds 400 rows, the manifest says 8"):
        fd.open_labels(copy).shard(0)


def test_a_bomb_in_a_column_takes_no_memory(copy):
    table = pq.read_table(copy / "labels/00000-000.parquet")
    bomb = pa.array(["a" * 50_000_000] + ["b"] * (table.num_rows - 1))
    replace_shard(copy, table.set_column(0, table.schema.field("key"), bomb))
    with pytest.raises(ShardError, match="column 'key' claims"):
        fd.open_labels(copy).shard(0)


@pytest.mark.parametrize("digests", [[b"short"] * 8, [b"a" * 16] * 7 + [b"a" * 17]])
def test_a_digest_of_another_length(copy, digests):
    table = pq.read_table(copy / "labels/00000-000.parquet")
    at = table.schema.get_field_index("image_digest")
    replace_shard(copy, table.set_column(at, table.schema.field(at), pa.array(digests, pa.binary())))
    with pytest.raises(ShardError, match="a digest that has not 16 bytes"):
        fd.open_labels(copy).shard(0)


@pytest.mark.parametrize("column", ["key", "class_prob", "bucket"])
def test_a_missing_column(copy, column):
    table = pq.read_table(copy / "labels/00000-000.parquet").drop_columns([column])
    replace_shard(copy, table)
    with pytest.raises(ShardError, match=f"'{column}' is missing"):
        fd.open_labels(copy).shard(0)


def test_a_class_out_of_range(copy):
    table = pq.read_table(copy / "labels/00000-000.parquet")
    at = table.schema.get_field_index("class_index")
    field = table.schema.field(at)
    wrong = pa.FixedSizeListArray.from_arrays(pa.array([10] * 16 * 8, pa.uint16()), type=field.type)
    replace_shard(copy, table.set_column(at, field, wrong))
    with pytest.raises(ShardError, match="class 10 in a label set of 10 classes"):
        fd.open_labels(copy).shard(0)


POISON = {
    "are not all finite": [np.nan, 0.2, 0.1, 0.1],
    "are not descending": [0.1, 0.2, 0.1, 0.1],
    "are negative": [0.5, 0.2, 0.1, -0.1],
    "are all 0": [0, 0, 0, 0],
    "sum to more than 1": [0.5, 0.3, 0.2, 0.1],
}


@pytest.mark.parametrize("what", POISON)
def test_probabilities_that_would_poison_a_training(copy, what):
    table = pq.read_table(copy / "labels/00000-000.parquet")
    at = table.schema.get_field_index("class_prob")
    field = table.schema.field(at)
    prob = np.concatenate(table.column(at).to_numpy()).reshape(8, 4, 4)
    prob[5, 2] = POISON[what]
    wrong = pa.FixedSizeListArray.from_arrays(pa.array(prob.reshape(-1), pa.float32()), type=field.type)
    replace_shard(copy, table.set_column(at, field, wrong))
    key = table.column("key")[5].as_py()
    with pytest.raises(ShardError, match=f"of crop 2 of image '{key}' {what}"):
        fd.open_labels(copy).shard(0)


@pytest.mark.parametrize("what", POISON)
def test_poisoned_probabilities_in_a_tar(tar_copy, what):
    def poison(members):
        at = next(i for i, (member, _) in enumerate(members) if member.name.endswith("class_prob.npy"))
        prob = np.load(io.BytesIO(members[at][1]), allow_pickle=False)
        prob[2] = POISON[what]
        members[at] = (members[at][0], npy(prob))
        return members

    rewrite_tar(tar_copy, poison)
    with pytest.raises(ShardError, match=what):
        fd.open_labels(tar_copy).shard(0)


class RunsCode:
    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (pathlib.Path("/tmp/ferkd-data-was-here"),)


def rewrite_tar(folder, change):
    path = folder / "shards/00000.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for member, data in change(members):
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data))
    relist(folder)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def with_crops(data):
    return lambda members: [(m, data if m.name.endswith(".npy") else d) for m, d in members]


def only_crops(data):
    """As drafts of version 1 had them."""
    return lambda members: [(m, d) for m, d in with_crops(data)(members) if "_" not in m.name.partition(".")[2]]


def shorter(suffix):
    def change(members):
        return [(m, npy(np.load(io.BytesIO(d))[:-1]) if m.name.endswith(suffix) else d) for m, d in members]

    return change


def renamed(old, new):
    def change(members):
        for member, _ in members:
            if member.name.endswith(old):
                member.name = new
                break
        return members

    return change


def linked(members):
    members[0][0].type, members[0][0].linkname = tarfile.SYMTYPE, "/etc/passwd"
    return members


TARS = {
    "pickled array": (with_crops(npy(np.array([RunsCode()], dtype=object))), "not a plain NumPy array"),
    "bare pickle": (with_crops(pickle.dumps(RunsCode())), "not a plain NumPy array"),
    "huge header": (with_crops(npy(np.zeros(1)).replace(b"(1,)", b"(9999999999,)")), "not a plain NumPy array"),
    "floats": (with_crops(npy(np.zeros(5))), r"crops\.npy: is float64\[5\], expected uint16\[0, 6\]"),
    "objects": (with_crops(npy(np.zeros(5, [("class_index", "u2", 4), ("x", "O")]))), "not a plain NumPy array"),
    "another shape": (with_crops(npy(np.zeros(8)).replace(b"(8,)", b"(7,)")), "64 bytes for 56 of values"),
    "records alone": (only_crops(npy(np.zeros(5))), "does not hold crop records"),
    "fewer crops": (shorter("target_prob.npy"), r"target_prob\.npy: is float32\[9\], expected float32\[10\]"),
    "climbing name": (renamed(".jpg", "../../escape.jpg"), "not KEY.EXTENSION inside"),
    "absolute name": (renamed(".jpg", "/escape.jpg"), "not KEY.EXTENSION inside"),
    "link": (linked, "links and devices are refused"),
    "duplicate member": (lambda members: [members[0], *members], "appears twice"),
    "duplicate sample": (lambda members: [*members, *members[:6]], "appears twice"),
    "no labels": (
        lambda members: [m for m in members if not m[0].name.endswith("npy")],
        "needs one image and crops.npy",
    ),
    "class is text": (
        lambda members: [(m, b"os.system" if m.name.endswith("cls") else d) for m, d in members],
        "expected a class number",
    ),
    "an image that is none": (
        lambda members: [(m, b"GIF?" if m.name.endswith("jpg") else d) for m, d in members],
        "not_an_image",
    ),
}


@pytest.mark.parametrize("name", TARS)
def test_hostile_tar(tar_copy, name):
    import pathlib

    change, message = TARS[name]
    rewrite_tar(tar_copy, change)
    with pytest.raises(ShardError, match=message):
        fd.open_labels(tar_copy).shard(0)
    assert not pathlib.Path("/tmp/ferkd-data-was-here").exists()


def test_a_truncated_tar(tar_copy):
    path = tar_copy / "shards/00000.tar"
    data = path.read_bytes()
    for size in (0, 100, 1000, len(data) // 2, len(data) - 12_000):
        path.write_bytes(data[:size])
        relist(tar_copy)
        with pytest.raises(ShardError):
            fd.open_labels(tar_copy).shard(0)
