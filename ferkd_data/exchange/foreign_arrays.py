"""Arrays out of other people's `torch.save` files, without running what else may be in them.

Only the zip form (PyTorch 1.6 and later) is read, its members must be stored as they are, and its pickle may name
nothing but what rebuilds tensors and NumPy arrays of numbers. Everything else is refused before it is looked up.
"""

from __future__ import annotations

import collections
import pickle
import types
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ferkd_data.errors import ForeignFileError

MAX_BYTES = 2**28
"""Of one file; FKD's 500 full distributions of 1,000 classes take 2 MB."""
ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
RECONSTRUCT = ("numpy.core.multiarray", "numpy._core.multiarray")


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in RECONSTRUCT and name == "_reconstruct":
            return _empty_array
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no array")
        return ALLOWED[module, name]


def _empty_array(kind: type, shape: tuple[int, ...], code: bytes) -> Any:
    """What NumPy's pickles begin an array with; its state brings shape and numbers."""
    if kind is not np.ndarray or tuple(shape) != (0,):
        raise pickle.UnpicklingError("it holds an array of an unknown kind")
    return np.ndarray((0,), np.uint8)


def _latin1(text: str, encoding: str) -> bytes:
    """How old pickle protocols write an array's bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds text in {encoding!r}")
    return text.encode("latin1")


_PICKLE = types.ModuleType("arrays_only")
_PICKLE.__dict__.update(Unpickler=_ArraysOnly, load=lambda stream, **_: _ArraysOnly(stream).load())


def load_arrays(path: Path) -> Any:
    """Lists, tuples, dictionaries, numbers and text, with every tensor and array as a NumPy array of numbers.

    Raises ForeignFileError for a file that holds anything else, is damaged, or is out of proportion.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ForeignFileError(f"{path}: {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
        with path.open("rb") as stream:
            _check_zip(path, stream)
            stream.seek(0)
            content = torch.load(stream, map_location="cpu", pickle_module=_PICKLE, weights_only=False)
        return _plain(path, content)
    except ForeignFileError:
        raise
    except FileNotFoundError as error:
        raise ForeignFileError(f"{path}: no such file") from error
    except Exception as error:
        # An unpickler meets arbitrary bytes here, and torch and NumPy raise of every kind on them.
        raise ForeignFileError(f"{path}: is not a file of arrays alone ({error}); it was not loaded") from error


def _check_zip(path: Path, stream: IO[bytes]) -> None:
    if stream.read(4) != b"PK\x03\x04":
        raise ForeignFileError(f"{path}: is not in the form that torch.save has written since PyTorch 1.6")
    with zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > MAX_BYTES:
                raise ForeignFileError(f"{path}: member {member.filename!r} is compressed or too large")


def _plain(path: Path, content: Any) -> Any:
    if isinstance(content, torch.Tensor):
        if content.numel() * content.element_size() > MAX_BYTES:
            raise ForeignFileError(f"{path}: claims a tensor of shape {tuple(content.shape)}")
        return content.numpy()
    if isinstance(content, np.ndarray):
        if content.dtype.kind not in "biuf" or content.nbytes > MAX_BYTES:
            raise ForeignFileError(f"{path}: holds an array of {content.dtype}, expected numbers")
        return content
    if isinstance(content, (list, tuple)):
        return type(content)(_plain(path, item) for item in content)
    if isinstance(content, dict):
        return {key: _plain(path, item) for key, item in content.items()}
    if content is None or isinstance(content, (bool, int, float, str, bytes)):
        return content
    raise ForeignFileError(f"{path}: holds a {type(content).__name__}, expected arrays")
