"""Every error that a user can meet, and checks of arguments that raise them.

    FerkdError                    exit status 1: one line that says what, where, and what to do
    ├── UsageError                exit status 2: a setting or an argument that cannot be right (is a ValueError)
    ├── MissingExtraError         an optional package is not installed; names the pip line
    ├── SourceError               the image source cannot be listed or read
    ├── ImageError                one image cannot be used; becomes a reject with this reason
    ├── TeacherError              a teacher cannot be loaded, or gives an impossible answer
    ├── BuildError                the build cannot go on
    │   ├── BuildLockedError      another live process builds into the same folder
    │   ├── SettingsMismatchError a saved state was made with other settings; names both values
    │   ├── StorageFullError      no space left; nothing finished is lost
    │   ├── DeviceFailedError     a GPU failed; only a new process can use it again
    │   └── BuildStoppedError     exit status 143: stopped by SIGTERM; the same command goes on where it stopped
    ├── TooManyOpenFilesError     the process may open no more files; names the limit and how to raise it
    ├── OutOfMemoryError          the host has too little memory for an image; names its size
    ├── LoaderError               a batch cannot be made: names the image and its shard
    ├── ForeignFileError          another project's label file is malformed, or holds more than arrays
    ├── PublishError              a label set has faults, or the destination holds another one
    ├── RemoteError               a server lacks a file, refuses it, sends another one, or cannot be reached
    ├── StateMismatchError        a loader's saved state has other settings or labels; names both values
    └── LabelSetError             a label set cannot be read
        ├── SignatureError        a label set is not signed, is signed by another person, or was changed since
        ├── ManifestError         manifest.json is missing, malformed or of an unknown version
        └── ShardError            a shard is missing, truncated, or does not hold what the manifest says

`FerkdError.exit_code` is the exit status of the command line.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypeVar

T = TypeVar("T")


class FerkdError(Exception):
    """Base of all errors of this package.

    >>> try:
    ...     fd.open_labels("nowhere")
    ... except fd.FerkdError as error:
    ...     print(error.exit_code)
    1
    """

    exit_code = 1


# A ValueError, and MissingExtraError an ImportError, as Python's own calls would raise: callers that guard these need
# not know this package.
class UsageError(FerkdError, ValueError):
    exit_code = 2


class MissingExtraError(FerkdError, ImportError):
    pass


class SourceError(FerkdError):
    pass


class ImageError(FerkdError):
    """`reason` is one of the reasons documented in docs/format.md; `detail` is free text for people."""

    def __init__(self, reason: str, detail: str) -> None:
        # Both go to Exception, which pickles an error as its class and these arguments.
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class TeacherError(FerkdError):
    pass


class BuildError(FerkdError):
    pass


class BuildLockedError(BuildError):
    pass


class SettingsMismatchError(BuildError):
    pass


class StorageFullError(BuildError):
    pass


class DeviceFailedError(BuildError):
    pass


class BuildStoppedError(BuildError):
    # What a shell reports of a process that SIGTERM ended: 128 + 15. `Stop.error` puts another signal's number in.
    exit_code = 143


class TooManyOpenFilesError(FerkdError):
    pass


class OutOfMemoryError(FerkdError):
    pass


class LoaderError(FerkdError):
    pass


class ForeignFileError(FerkdError):
    pass


class PublishError(FerkdError):
    pass


class RemoteError(FerkdError):
    """`status` is the HTTP status where there is one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class StateMismatchError(FerkdError):
    pass


class LabelSetError(FerkdError):
    pass


class SignatureError(LabelSetError):
    pass


class ManifestError(LabelSetError):
    pass


class ShardError(LabelSetError):
    pass


def check_at_least(least: int, **numbers: Any) -> None:
    """Raise UsageError that names the first of these arguments that is no whole number of at least `least`.

    None stands for an argument that was not given. Types are checked too: callers need not follow the hints.

    >>> check_at_least(1, threads=4, crops=None)
    """
    for name, number in numbers.items():
        # Integral, not int: NumPy's integers are registered with it.
        if number is not None and (not isinstance(number, Integral) or number < least):
            raise UsageError(f"{name} must be a whole number, at least {least}; got {number!r}")


def nearest(word: str, known: Sequence[str], otherwise: str) -> str:
    """Advise on an unknown word: name the known words that look like it, else say `otherwise`.

    >>> nearest("crop", ["crops", "seed"], "see --help"), nearest("x", ["crops", "seed"], "see --help")
    ("did you mean 'crops'?", 'see --help')
    """
    close = difflib.get_close_matches(word, known, n=3)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else otherwise


def renamed(old: str, new: str, value: T) -> T:
    """Return `value`, given under the old name of an argument, with a DeprecationWarning at the caller's caller."""
    # Level 1 is this line, 2 the function of ours with the old argument, 3 the line of the user that calls that.
    warnings.warn(f"{old}= is now called {new}=; the old name will be removed", DeprecationWarning, stacklevel=3)
    return value


def describe_differences(saved: Any, present: Any, name: str = "") -> list[str]:
    """Return a line `field: saved X, now Y` for every leaf that differs."""
    if isinstance(saved, dict) and isinstance(present, dict):
        # A field that one side lacks counts as None: a state from before an optional setting existed equals its
        # default.
        names = [*saved, *(key for key in present if key not in saved)]
        return [
            line
            for key in names
            for line in describe_differences(saved.get(key), present.get(key), f"{name}.{key}" if name else key)
        ]
    # Of lists that differ in length nobody can say which items belong together: both are shown whole.
    if isinstance(saved, list) and isinstance(present, list) and len(saved) == len(present):
        pairs = enumerate(zip(saved, present, strict=True))
        return [line for i, (a, b) in pairs for line in describe_differences(a, b, f"{name}[{i}]")]
    # States keep what the user chose under "settings"; nobody wrote that prefix.
    return [] if saved == present else [f"{name.removeprefix('settings.')}: saved {saved!r}, now {present!r}"]
