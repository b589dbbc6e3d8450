"""Arrays out of other people's `torch.save` files, without torch and without running any code in them.

A file passes three guards. Only the zip form (PyTorch 1.6 and later) with members stored as they are is read. The
opcodes of its pickle are checked before the first is executed: even an unpickler that may name nothing can be told, in
five bytes, to reserve 64 GB for its memo. And the unpickler finds no name but those that rebuild tensors and NumPy
arrays of numbers; it calls none of the file's own.
"""

from __future__ import annotations

import collections
import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from ferkd_data.errors import ForeignFileError, LabelSetError
from ferkd_data.storage import open_regular_stream

FIXED = re.compile(
    rb"(?s:[\](}){)tuNabesQR\x85-\x89\x93\x94]"  # no argument
    rb"|[\x80Khq].|M..|[Jj]....|[G\x95].{8}"  # one of 1, 2, 4 or 8 bytes
    rb"|r..[\x00-\x0f]\x00"  # a memo number, below 2**20: 400 crops at top-10 take 20,000
    rb"){1,4096}"
)
LENGTH_BYTES = {b"\x8c": 1, b"C": 1, b"U": 1, b"\x8a": 1, b"X": 4, b"B": 4, b"T": 4, b"\x8d": 8, b"\x8e": 8}
"""Opcodes with a length of so many bytes, which is followed by that much text or data."""
STOP, GLOBAL = b".", b"c"


def check_opcodes(pickled: bytes) -> None:
    """Raise ValueError for an opcode that is not needed to hold arrays, lists, dictionaries, numbers and text."""
    at = 0
    while at < len(pickled):
        # Nearly all of a pickle: up to 4,096 opcodes in one match, at C speed.
        run = FIXED.match(pickled, at)
        if run:
            at = run.end()
            continue
        code = pickled[at : at + 1]
        # What follows is not executed.
        if code == STOP:
            return
        if code in LENGTH_BYTES:
            start = at + 1 + LENGTH_BYTES[code]
            # Text and data are jumped over. A length beyond the end leaves the loop, and is refused there.
            at = start + int.from_bytes(pickled[at + 1 : start], "little")
        elif code == GLOBAL:
            for _ in ("module", "name"):
                # GLOBAL names a module and a name, a line each. Which ones may be named is for `find_class` to say.
                at = pickled.index(b"\n", at) + 1
        else:
            raise ValueError(f"opcode {code!r} at byte {at} of its pickle is none that arrays need")
    raise ValueError("its pickle has no end")


MAX_BYTES = 2**28
"""Largest file; FKD's 500 full distributions of 1,000 classes take 2 MB."""
MAX_PICKLE_BYTES = 2**25
"""Largest pickle beside the arrays; 400 crops of Dataset Reinforcement at top-10 take 60 kB."""
MAX_ARRAYS = 16
"""Most arrays of a file: each may be a copy of data that the file holds once."""
MAX_ITEMS = 2**20
"""Most numbers, texts, lists and arrays of a file; a list that is named again is counted again."""
Numbers = np.ndarray[Any, np.dtype[Any]]
STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
SCALARS = frozenset((type(None), bool, int, float, str, bytes))
NDARRAY = "numpy.ndarray"
"""Stands for the class, which cannot be called."""
RECONSTRUCT = ("numpy.core.multiarray", "numpy._core.multiarray")


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds tensors and arrays of numbers as NumPy arrays; every other name is an error."""

    def __init__(self, pickled: bytes, archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(io.BytesIO(pickled))
        self._archive = archive
        self._prefix = prefix
        self._arrays = 0
        self._storages: dict[tuple[str, str], Numbers] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module in RECONSTRUCT and name == "_reconstruct":
            # A method of ours stands for the constructor; the name in the file is never imported.
            return self._empty_array
        if module == "torch" and name in STORAGES:
            # A storage's class is only a word here, which `persistent_load` gets back.
            return name
        known: dict[tuple[str, str], Any] = {
            ("_codecs", "encode"): self._latin1,
            ("collections", "OrderedDict"): collections.OrderedDict,
            # With OrderedDict the only callable that is not ours: it makes types, and `_plain` refuses all but those of
            # numbers.
            ("numpy", "dtype"): np.dtype,
            ("numpy", "ndarray"): NDARRAY,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Numbers:
        """Return a tensor's numbers, a member of the archive."""
        kind, storage, key, _, count = pid
        if kind != "storage" or storage not in STORAGES:
            raise pickle.UnpicklingError(f"it holds a {kind} {storage}")
        if (storage, key) not in self._storages:
            self._count()
            data = self._archive.read(f"{self._prefix}/data/{key}")
            # Once for each key: several tensors may be views of one storage.
            self._storages[storage, key] = np.frombuffer(data, STORAGES[storage])
        found = self._storages[storage, key]
        if len(found) != count:
            raise pickle.UnpicklingError(f"it claims {count} numbers where {len(found)} are")
        return found

    def _tensor(self, numbers: Numbers, start: int, shape: Any, strides: Any, *_: Any) -> Numbers:
        """Return a copy of a view of a storage, as `torch._utils` rebuilds it; more numbers than stored are refused.

        Each copy is counted, since any number of views may share a storage.
        """
        self._count()
        # The largest index that the view reaches: strides are not negative, which is checked below before any use.
        last = start + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        # Python's integers, since a product of claimed sizes may pass 2**63.
        count = int(np.prod([int(size) for size in shape], dtype=object))
        if min((start, *shape, *strides)) < 0 or (count and last >= len(numbers)) or count > len(numbers):
            raise pickle.UnpicklingError(f"it claims a tensor of shape {tuple(shape)} in {len(numbers)} numbers")
        steps = [stride * numbers.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(numbers[start:], tuple(shape), steps, writeable=False)
        # A copy, so that strides of 0 become memory now, within the bound above, and not later.
        packed: Numbers = np.ascontiguousarray(view).reshape(shape)
        return packed

    def _empty_array(self, kind: str, shape: tuple[int, ...], code: bytes) -> Numbers:
        """Begin an array as NumPy's pickles do; its state brings shape and numbers."""
        if kind != NDARRAY or tuple(shape) != (0,):
            raise pickle.UnpicklingError("it holds an array of an unknown kind")
        self._count()
        return np.empty(0, np.uint8)

    def _latin1(self, text: str, encoding: str) -> bytes:
        """Return the bytes of an array as old pickle protocols write them."""
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"it holds text in {encoding!r}")
        self._count()
        return text.encode("latin1")

    def _count(self) -> None:
        self._arrays += 1
        # A tensor counts with its storage, an old array with its bytes.
        if self._arrays > 2 * MAX_ARRAYS:
            raise pickle.UnpicklingError(f"it holds more than {MAX_ARRAYS} arrays")


def load_arrays(path: Path) -> Any:
    """Load lists, tuples, dictionaries, numbers and text, with every tensor and array as a NumPy array of numbers.

    Raises ForeignFileError for a file that holds anything else, is damaged, or is out of proportion.
    """
    try:
        size = path.stat().st_size
        # Before it is opened: what follows takes memory in proportion to the file.
        if size > MAX_BYTES:
            raise ForeignFileError(f"{path}: {size} bytes; at most {MAX_BYTES} are read")
        with open_regular_stream(path) as stream:
            content = _load(path, stream, size)
        return _plain(path, content, [MAX_ITEMS])
    except ForeignFileError:
        raise
    except FileNotFoundError as error:
        raise ForeignFileError(f"{path}: no such file") from error
    except LabelSetError as error:
        raise ForeignFileError(str(error)) from error
    except Exception as error:
        # On arbitrary bytes, pickle and NumPy raise errors of every kind.
        raise ForeignFileError(f"{path}: is not a file of arrays alone ({error}); it was not loaded") from error


def _load(path: Path, stream: IO[bytes], size: int) -> Any:
    # The first bytes of a zip.
    if stream.read(4) != b"PK\x03\x04":
        raise ForeignFileError(f"{path}: is not in the form that torch.save has written since PyTorch 1.6")
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        for member in members:
            # torch.save compresses nothing. A compressed member could grow a thousandfold.
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > MAX_BYTES:
                raise ForeignFileError(f"{path}: member {member.filename!r} is compressed or too large")
        # Members that share bytes could add up to any amount of memory.
        if sum(member.file_size for member in members) > size:
            raise ForeignFileError(f"{path}: its members overlap")
        # torch.save puts all members into a folder named after the file.
        prefix = members[0].filename.partition("/")[0] if members else ""
        names = {member.filename for member in members}
        if f"{prefix}/byteorder" in names and archive.read(f"{prefix}/byteorder") != b"little":
            raise ForeignFileError(f"{path}: its numbers are not little-endian")
        if archive.getinfo(f"{prefix}/data.pkl").file_size > MAX_PICKLE_BYTES:
            raise ForeignFileError(f"{path}: its pickle is too large")
        pickled = archive.read(f"{prefix}/data.pkl")
        # Before the unpickler sees the first of them.
        check_opcodes(pickled)
        return _ArraysOnly(pickled, archive, prefix).load()


def _plain(path: Path, content: Any, left: list[int]) -> Any:
    """Return the content with built-in types and arrays only; `left[0]` counts the items that it may still have."""
    left[0] -= 1
    if left[0] < 0:
        raise ForeignFileError(f"{path}: holds more than {MAX_ITEMS} items")
    # Exact types: a subclass could bring methods of its own.
    if type(content) in SCALARS:
        return content
    if isinstance(content, np.ndarray):
        if content.dtype.kind not in "biuf" or content.nbytes > MAX_BYTES:
            raise ForeignFileError(f"{path}: holds an array of {content.dtype}, expected numbers")
        return content
    if type(content) in (list, tuple):
        # At C speed: most lists hold a thousand numbers.
        if SCALARS.issuperset(map(type, content)):
            left[0] -= len(content)
            return content
        return type(content)([_plain(path, item, left) for item in content])
    if isinstance(content, dict):
        return {key: _plain(path, item, left) for key, item in content.items()}
    raise ForeignFileError(f"{path}: holds a {type(content).__name__}, expected arrays")
