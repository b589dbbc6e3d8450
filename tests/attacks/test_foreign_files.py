"""Other people's `torch.save` files that claim more than they hold: one error each, and no memory out of proportion."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from ferkd_data.errors import ForeignFileError
from ferkd_data.importers import foreign_arrays
from ferkd_data.importers.foreign_arrays import load_arrays


def archive(path, pickled, **members):
    with zipfile.ZipFile(path, "w") as writer:
        writer.writestr("x/data.pkl", pickled)
        for name, data in members.items():
            writer.writestr(f"x/{name.replace('_', '/')}", data)
    return path


def tensor(numbers, shape, strides, start=0):
    """The pickle of a tensor over a storage of so many floats, whatever they claim."""
    pid = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    pid += b"J" + struct.pack("<i", numbers) + b"tQ"
    numbers_of = b"".join(b"J" + struct.pack("<i", size) for size in shape)
    steps = b"".join(b"J" + struct.pack("<i", step) for step in strides)
    place = b"J" + struct.pack("<i", start) + b"(" + numbers_of + b"t(" + steps + b"t"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + pid + place + b"\x89ccollections\nOrderedDict\n)RtR."


def test_the_tensors_below_are_those_of_torch(tmp_path):
    path = archive(tmp_path / "x.tar", tensor(4, (2, 2), (2, 1)), data_0=np.arange(4, dtype="<f4").tobytes())
    assert load_arrays(path).tolist() == [[0, 1], [2, 3]]


BILLION = (
    b"\x80\x02]q\x00" + b"".join(b"](" + (b"h" + bytes([n])) * 10 + b"eq" + bytes([n + 1]) for n in range(12)) + b"."
)
CLAIMS = {
    "a storage that is shorter": (tensor(10**8, (10**8,), (1,)), "claims 100000000 numbers where 4 are"),
    "a tensor beyond its storage": (tensor(4, (5,), (1,)), "claims a tensor of shape"),
    "a tensor that starts behind": (tensor(4, (1,), (1,), start=4), "claims a tensor of shape"),
    "a tensor that steps back": (tensor(4, (2,), (-1,), start=1), "claims a tensor of shape"),
    "numbers shown again and again": (tensor(4, (2**31 - 1, 4), (0, 1)), "claims a tensor of shape"),
    "a memo of 64 GB": (b"\x80\x02Nr\xff\xff\xff\xff.", "none that arrays need"),
    "a memo in decimals": (b"\x80\x02Np99999999999\n.", "none that arrays need"),
    "an object made by its class": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "none that arrays need"),
    "an extension": (b"\x80\x02\x82\x01.", "none that arrays need"),
    "the class of arrays called": (
        b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.",
        "not a file of arrays alone",
    ),
    "no end": (b"\x80\x02N", "has no end"),
    "a list of lists of lists": (BILLION, "holds more than 1048576 items"),
    "a text encoded again and again": (
        b"\x80\x02X\x02\x00\x00\x00abq\x00](" + b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R" * 40 + b"e.",
        "more than 16 arrays",
    ),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_claims(tmp_path, name):
    pickled, message = CLAIMS[name]
    path = archive(tmp_path / "x.tar", pickled, data_0=bytes(16))
    with pytest.raises(ForeignFileError, match=message):
        load_arrays(path)


def test_a_storage_shown_in_view_after_view(tmp_path):
    """Each view that is not stored in its own order is a copy: 48 kB would become 4 GB with 100,000 of them."""
    whole = torch.zeros(100, 120)
    torch.save([whole.T for _ in range(foreign_arrays.MAX_ARRAYS)], tmp_path / "few.tar")
    assert len(load_arrays(tmp_path / "few.tar")) == foreign_arrays.MAX_ARRAYS
    torch.save([whole.T for _ in range(100)], tmp_path / "many.tar")
    with pytest.raises(ForeignFileError, match="more than 16 arrays"):
        load_arrays(tmp_path / "many.tar")


def test_members_that_overlap(tmp_path):
    path = tmp_path / "x.tar"
    torch.save([torch.zeros(1000), torch.ones(1000)], path)
    data = bytearray(path.read_bytes())
    for name in (b"/data/0", b"/data/1"):
        at = data.rindex(name)
        header = data.rindex(b"PK\x01\x02", 0, at)
        data[header + 20 : header + 28] = struct.pack("<II", 9000, 9000)
    path.write_bytes(data)
    with pytest.raises(ForeignFileError, match="its members overlap"):
        load_arrays(path)


def test_a_pickle_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign_arrays, "MAX_PICKLE_BYTES", 1000)
    torch.save(["x" * 1000], tmp_path / "x.tar")
    with pytest.raises(ForeignFileError, match="its pickle is too large"):
        load_arrays(tmp_path / "x.tar")


def test_numbers_of_another_byte_order(tmp_path):
    path = archive(tmp_path / "x.tar", pickle.dumps([1], 2), byteorder=b"big")
    with pytest.raises(ForeignFileError, match="not little-endian"):
        load_arrays(path)


def test_every_kind_of_numbers_and_view(tmp_path):
    whole = torch.arange(24).reshape(2, 3, 4)
    kinds = [whole.to(kind) for kind in (torch.float64, torch.float16, torch.int16, torch.uint8, torch.bool)]
    content = {
        "views": [whole[1, 1:, ::2], whole.permute(2, 0, 1), whole[0, 0, 0], torch.zeros(0, 3)],
        "kinds": kinds,
        "arrays": [np.arange(6.0).reshape(2, 3), np.arange(6, dtype=">f4")[::2], np.array(2.0, np.float32)],
        "others": (None, True, 2**40, 0.5, "text", b"bytes"),
    }
    for protocol in (2, 4):
        torch.save(content, tmp_path / "x.tar", pickle_protocol=protocol)
        loaded = load_arrays(tmp_path / "x.tar")
        for name in ("views", "kinds", "arrays"):
            for before, after in zip(content[name], loaded[name], strict=True):
                before = np.asarray(before)
                assert np.array_equal(before, after) and before.dtype.newbyteorder("=") == after.dtype
        assert loaded["others"] == content["others"]


def test_foreign_files_are_read_without_torch():
    code = "import sys, ferkd_data.importers.foreign_arrays; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
