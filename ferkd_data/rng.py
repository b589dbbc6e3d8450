"""Randomness as a pure function of a hashed tuple.

Nothing here touches a global generator, and seeds are never added up: the parts of a tuple are encoded with
their type and length before they are hashed, so (1, 0) and (0, 1), or ("a", "bc") and ("ab", "c"), never collide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Part = str | int | bytes
UInt64s = npt.NDArray[np.uint64]


def digest(*parts: Part, size_bytes: int = 16) -> bytes:
    """Return the BLAKE2b digest of the tuple `parts`, each encoded as type tag, length and value."""
    state = hashlib.blake2b(digest_size=size_bytes)
    for part in parts:
        if isinstance(part, str):
            # Keys come from file names, and Python reads bytes that are not UTF-8 as lone surrogates.
            tag, value = b"s", part.encode("utf-8", "surrogateescape")
        elif isinstance(part, bytes):
            tag, value = b"b", part
        else:
            tag, value = b"i", str(int(part)).encode()
        state.update(tag + len(value).to_bytes(8, "little") + value)
    return state.digest()


def philox(*parts: Part) -> np.random.Philox:
    """Return the counter-based bit generator whose key is the hash of `parts`, at counter 0."""
    # Read as little-endian everywhere: a crop must not depend on the machine's byte order.
    return np.random.Philox(key=np.frombuffer(digest(*parts), dtype="<u8").astype(np.uint64))


def generator(*parts: Part) -> np.random.Generator:
    """Return a NumPy generator that is a pure function of `parts`: texts, bytes and whole numbers.

    >>> int(fd.generator("augment", 0, "cat/1").integers(100)) == int(fd.generator("augment", 0, "cat/1").integers(100))
    True
    """
    return np.random.Generator(philox(*parts))


def hash64(*parts: Part) -> int:
    """Return the first 64 bits of the digest of `parts`."""
    return int.from_bytes(digest(*parts, size_bytes=8), "little")


def hashes64(texts: Sequence[str]) -> UInt64s:
    """Return `hash64` of each text."""
    # Little-endian on every machine, as `hash64` reads them: caches store these numbers, and they are compared.
    return np.frombuffer(b"".join([digest(text, size_bytes=8) for text in texts]), "<u8").astype(np.uint64)


def find_hashes(ranked: UInt64s, wanted: UInt64s) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return where each wanted hash is among ascending ones, and whether it is there; both of the shape of `wanted`."""
    if not len(ranked):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.bool_)
    # searchsorted gives len(ranked) for a hash above all of them: the last one is not equal to it either.
    at = np.minimum(np.searchsorted(ranked, wanted), len(ranked) - 1)
    return at, ranked[at] == wanted


def uniforms(raw: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Turn raw 64-bit words into doubles in [0, 1), of the same shape."""
    # A double holds 53 bits, so the upper 53 convert exactly; rounding all 64 could give 1.0.
    doubles: npt.NDArray[np.float64] = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return doubles


def mix64(words: Any) -> UInt64s:
    """Scramble 64-bit words, element by element (the finaliser of SplitMix64, Steele et al., 2014)."""
    z: UInt64s = np.asarray(words, dtype=np.uint64)
    # Products wrap at 2**64, as the generator's definition says. NumPy would warn where `words` is a single number.
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return z


def counter64(seed: Any, counter: Any) -> UInt64s:
    """Return word number `counter` of the SplitMix64 stream `seed`; both broadcast, so whole batches draw at once."""
    # SplitMix64's state advances by the golden ratio of 2**64, so word n needs no words before it.
    with np.errstate(over="ignore"):
        state = np.asarray(seed, np.uint64) + (np.asarray(counter, np.uint64) + np.uint64(1)) * np.uint64(
            0x9E3779B97F4A7C15
        )
    return mix64(state)
