"""The user's own augmentation of crops, under random numbers that belong to the crop.

torchvision and most other libraries draw from the global generators of torch, NumPy and `random`. So these are seeded
before each crop, and put back afterwards: what a transform draws is a pure function of the crop, and whoever shares the
process draws what they would have drawn without it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ferkd_data import rng
from ferkd_data.errors import LoaderError

Transform: TypeAlias = Callable[[Tensor], Tensor]

TRIES = 8
"""Number of seeds with which a transform is tried."""
SECOND_CROPS = (
    "RandomResizedCrop",
    "RandomResizedCropAndInterpolation",
    "RandomSizedCrop",
    "RandomCrop",
    "CenterCrop",
    "RandomIoUCrop",
    "RandomZoomOut",
)
"""Names of transforms in torchvision, timm and Albumentations that change what a crop shows."""
_LOCK = threading.Lock()
"""Held while the global generators are not the user's: loaders in several threads of a process take turns."""


@contextmanager
def lent_generators() -> Iterator[None]:
    """Lend the global generators: afterwards they are as they were, also after an error.

    Only this process's CPU generators. A GPU's is not touched, which `torch.manual_seed` would do.
    """
    with _LOCK:
        saved = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(saved[0])
            np.random.set_state(saved[1])  # noqa: NPY002
            torch.default_generator.set_state(saved[2])


def transformed(transform: Transform, crop: Tensor, seed: int, where: Callable[[], str]) -> Tensor:
    """Return `transform(crop)`, with the global generators seeded by a 64-bit seed; call it within `lent_generators`.

    `where()` names the crop in errors. Raises LoaderError where the transform fails, or does not give uint8 (3, S, S).
    """
    random.seed(seed)
    # NumPy takes 32 bits; the lower ones of a hash are as good as any.
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        given: Any = transform(crop)
    except Exception as error:
        raise LoaderError(f"{where()}: transform failed with {type(error).__name__}: {error}") from error
    if isinstance(given, Tensor) and given.dtype == torch.uint8 and given.shape == crop.shape:
        if given is crop:
            return crop
        # A transform may return a subclass (torchvision's tv_tensors), whose operations take another dispatch.
        plain = given.as_subclass(Tensor)
        # A view of the crop, such as its transpose, would be overwritten while it is read.
        return plain.clone() if plain.untyped_storage().data_ptr() == crop.untyped_storage().data_ptr() else plain
    got = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
    raise LoaderError(
        f"{where()}: transform must give a crop like the one it got, torch.uint8 {tuple(crop.shape)}; it gave {got}. "
        "Leave out what changes size or type: size= sets the size, fd.normalize makes floats of the whole batch"
    )


def crop_seed(seed: int, key_hash: int, draw: int) -> int:
    """Return the 64-bit seed of an image's crop; `draw` counts the crops drawn of the image in the training before."""
    return rng.hash64("transform", seed, key_hash, draw)


def cuts_again(transform: Any) -> str | None:
    """Name the first transform, within any composition of transforms, that cuts a part out of a crop; None without."""
    name = type(transform).__name__
    if name in SECOND_CROPS:
        return name
    # torchvision and Albumentations compose transforms in a list of this name.
    inner = list(transform) if isinstance(transform, nn.Sequential) else getattr(transform, "transforms", ())
    return next(filter(None, map(cuts_again, inner)), None) if isinstance(inner, (list, tuple, nn.ModuleList)) else None


def draws_elsewhere(transform: Transform, size: int) -> bool:
    """Return whether a transform gives different crops for the same seed: it then has a generator of its own.

    It is tried on noise, with several seeds, since many transforms change a crop only at times. One that fails is not
    judged: it fails on the first crop too, in an error that names the crop.
    """
    # Noise, so that any other place, colour or angle gives other pixels.
    crop = torch.from_numpy(rng.generator("noise").integers(0, 256, (3, size, size), np.uint8))
    with lent_generators():
        for seed in range(TRIES):
            try:
                first, second = (transformed(transform, crop.clone(), seed, str) for _ in range(2))
            except LoaderError:
                return False
            if not torch.equal(first, second):
                return True
    return False
