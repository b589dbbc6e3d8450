"""Any damage to a label set's files ends in rows or in a LabelSetError: no other exception, no hang, nothing run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from label_sets import relist

import ferkd_data as fd
from ferkd_data.errors import LabelSetError
from ferkd_data.format import crop_arrays, webdataset
from ferkd_data.format.manifest_file import parse_manifest

GOLDEN = Path(__file__).parent.parent / "golden" / "version-1"
MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FUZZ = st.lists(
    st.tuples(st.sampled_from(["flip", "insert", "delete", "truncate", "repeat"]), st.integers(0), st.integers(0)),
    min_size=1,
    max_size=6,
)


def mutated(data: bytes, changes) -> bytes:
    changed = bytearray(data)
    for kind, where, value in changes:
        at = where % max(len(changed), 1)
        if kind == "flip" and changed:
            changed[at] ^= 1 + value % 255
        elif kind == "insert":
            changed[at:at] = value.to_bytes(value.bit_length() // 8 + 1, "little")[:64]
        elif kind == "delete":
            del changed[at : at + 1 + value % 64]
        elif kind == "truncate":
            del changed[at:]
        else:
            changed[at:at] = changed[at : at + 1 + value % 512]
    return bytes(changed)


def layouts():
    return sorted(path.parent for path in GOLDEN.rglob("manifest.json"))


@MANY
@given(changes=FUZZ)
@pytest.mark.parametrize("folder", layouts(), ids=lambda path: path.name)
def test_manifests(folder, changes):
    data = mutated((folder / "manifest.json").read_bytes(), changes)
    try:
        parse_manifest(data, "manifest.json")
    except LabelSetError as error:
        assert str(error).startswith("manifest.json: ")


def leaves(content, path=()):
    if isinstance(content, dict):
        for key, value in content.items():
            yield from leaves(value, (*path, key))
    elif isinstance(content, list) and content:
        yield from leaves(content[0], (*path, 0))
    yield path


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@MANY
@given(choice=st.integers(0), value=ANY_JSON)
@pytest.mark.parametrize("folder", layouts(), ids=lambda path: path.name)
def test_manifests_of_other_types_and_values(folder, choice, value, tmp_path):
    content = json.loads((folder / "manifest.json").read_text())
    paths = [path for path in leaves(content) if path]
    *above, last = paths[choice % len(paths)]
    inner = content
    for step in above:
        inner = inner[step]
    inner[last] = value
    shutil.rmtree(tmp_path / "set", ignore_errors=True)
    copy = shutil.copytree(folder, tmp_path / "set")
    (copy / "manifest.json").write_text(json.dumps(content))
    try:
        list(fd.open_labels(copy).shards())
        fd.verify(copy)
    except LabelSetError:
        pass


@MANY
@given(changes=FUZZ)
@example(changes=[("flip", 9, 0)])
@pytest.mark.parametrize("member", crop_arrays.SUFFIXES)
def test_crop_arrays(member, changes):
    tar = next(GOLDEN.rglob("*.tar"))
    sample = next(webdataset.scan(tar))
    at, size = sample.arrays[member]
    data = tar.read_bytes()[at : at + size]
    try:
        records = crop_arrays.parse_npy(mutated(data, changes), "crops.npy")
        assert not records.dtype.hasobject
    except LabelSetError as error:
        assert str(error).startswith("crops.npy: ")


@MANY
@given(changes=FUZZ)
@pytest.mark.parametrize("folder", layouts(), ids=lambda path: path.name)
def test_shards(folder, changes, tmp_path):
    shutil.rmtree(tmp_path / "set", ignore_errors=True)
    copy = shutil.copytree(folder, tmp_path / "set")
    shard = next(path for path in sorted(copy.rglob("*")) if path.suffix in (".tar", ".parquet") and "0" in path.name)
    data = mutated(shard.read_bytes(), changes)
    shard.write_bytes(data)
    relist(copy)
    try:
        list(fd.open_labels(copy).shards())
    except LabelSetError as error:
        assert shard.name in str(error)
