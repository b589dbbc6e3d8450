"""What a pickle is made of, looked at before anything executes it.

Even an unpickler that may name nothing can be told, in five bytes, to reserve 64 GB for its memo. So only the opcodes
that `torch.save` writes for arrays, lists, dictionaries, numbers and text are let through, with small memo numbers.
"""

from __future__ import annotations

import re

FIXED = re.compile(
    rb"(?s:[\](}){)tuNabesQR\x85-\x89\x93\x94]"  # no argument
    rb"|[\x80Khq].|M..|[Jj]....|[G\x95].{8}"  # one of 1, 2, 4 or 8 bytes
    rb"|r..[\x00-\x0f]\x00"  # a memo number, below 2**20: 400 crops at top-10 take 20,000
    rb"){1,4096}"
)
LENGTH_BYTES = {b"\x8c": 1, b"C": 1, b"U": 1, b"\x8a": 1, b"X": 4, b"B": 4, b"T": 4, b"\x8d": 8, b"\x8e": 8}
"""Opcodes that are followed by a length of so many bytes, then by as much text or data."""
STOP, GLOBAL = b".", b"c"


def check_opcodes(pickled: bytes) -> None:
    """Raises ValueError for an opcode that is not needed to hold arrays, lists, dictionaries, numbers and text."""
    at = 0
    while at < len(pickled):
        run = FIXED.match(pickled, at)
        if run:
            at = run.end()
            continue
        code = pickled[at : at + 1]
        if code == STOP:
            return
        if code in LENGTH_BYTES:
            start = at + 1 + LENGTH_BYTES[code]
            at = start + int.from_bytes(pickled[at + 1 : start], "little")
        elif code == GLOBAL:
            for _ in ("module", "name"):
                at = pickled.index(b"\n", at) + 1
        else:
            raise ValueError(f"opcode {code!r} at byte {at} of its pickle is none that arrays need")
    raise ValueError("its pickle has no end")
