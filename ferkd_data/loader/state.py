"""What a loader's saved state holds, and whether it fits the loader that it is given to."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, fields
from numbers import Integral
from typing import Any

from ferkd_data.calibration import Calibration
from ferkd_data.errors import StateMismatchError, describe_differences
from ferkd_data.label_set import LabelSet
from ferkd_data.loader.epochs import EpochSettings
from ferkd_data.loader.schedule import Cursor, EpochShape, window_images
from ferkd_data.loader.settings import LoaderSettings

STATE_VERSION = 1


def saved_state(cursor: Cursor, must_fit: dict[str, Any]) -> dict[str, Any]:
    """Return a state: small, and plain JSON."""
    # The key "place" is older than the word cursor. It stays, since states are files of users.
    return {"version": STATE_VERSION, "settings": must_fit, "place": asdict(cursor)}


def read_state(state: Any, must_fit: Callable[[int], dict[str, Any]], shape: Callable[[int], EpochShape]) -> Cursor:
    """Return where a state continues. `must_fit` and `shape` give what this loader has in an epoch.

    Raises StateMismatchError that names both values when the state is of other labels or settings, or says what is
    wrong with it when it is no state that a loader saved.
    """
    if not isinstance(state, dict):
        raise StateMismatchError(f"a loader's state is a dictionary, as state_dict() gives it; got {state!r}")
    epoch = _saved_epoch(state.get("place"))
    present = {"version": STATE_VERSION, "settings": must_fit(epoch)}
    saved = {"version": state.get("version"), "settings": state.get("settings")}
    # Compared before the cursor is read, which would call a state of other settings damaged.
    differences = describe_differences(saved, present)
    if differences:
        raise StateMismatchError(f"this state was saved by another loader: {'; '.join(differences)}")
    return _read_cursor(state.get("place"), shape(epoch))


def settings_that_must_fit(labels: LabelSet, settings: LoaderSettings, at: EpochSettings) -> dict[str, Any]:
    """Return plain values of all that decides what a loader gives in an epoch.

    They are of one epoch, since size and others may be functions of it. Ranks, workers and memory options are left out:
    they may differ when a training goes on.
    """
    kinds = [list(kind) for kind in settings.kinds]
    described: dict[str, Any] = {
        "labels": labels.identity,
        "crops": labels.num_crops,
        **({"kinds": kinds} if kinds else {}),
        **asdict(at.shape),
        "size": at.size,
        "interpolation": settings.interpolation,
        "order": settings.order,
        "shards_together": settings.shards_together,
        # Of a function, its Calibration in this epoch, as for sizes: many functions go by the name <lambda>.
        "calibration": _described(at.calibration if callable(settings.calibration) else settings.calibration),
        "selfmix": None if settings.selfmix is None else asdict(settings.selfmix),
    }
    # Only what differs from the defaults: states saved before these settings existed stay valid.
    if settings.epoch != "images":
        described["epoch"] = settings.epoch
    if callable(settings.crops_per_image):
        described["crops drawn before"] = at.drawn
    if settings.decode_scale != "exact":
        described["decode_scale"] = settings.decode_scale
    if settings.transform is not None:
        described["transform"] = _described(settings.transform)
    return described


def _described(setting: Any) -> Any:
    """A plain value that stays the same from process to process, and differs where a setting's parameters do."""
    if isinstance(setting, Calibration):
        return asdict(setting)
    if isinstance(setting, str):
        return setting
    # A function is compared by its name: two processes that define it alike give the same, and its code is not looked
    # at.
    name = getattr(setting, "__qualname__", None)
    # The repr of an object without one of its own holds its address.
    return name if name is not None else re.sub(r" at 0x[0-9a-fA-F]+", "", repr(setting))


def _read_cursor(saved: Any, shape: EpochShape) -> Cursor:
    """Read a cursor that `asdict` wrote. Raises StateMismatchError where it is malformed or in no epoch of `shape`."""
    names = [field.name for field in fields(Cursor)]
    if not isinstance(saved, dict) or set(saved) != set(names):
        raise StateMismatchError(f"this state is damaged: its place must hold {', '.join(names)}; it is {saved!r}")
    # Checkpoints may be damaged or made by hand: a number out of range here would index beyond the epoch.
    for name, value in saved.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
            raise StateMismatchError(f"this state is damaged: {name} of its place is {value!r}, not a number from 0 on")
    cursor = Cursor(**{name: int(value) for name, value in saved.items()})
    window = window_images(shape, cursor)
    # Both ends excluded: a window that is finished counts under `images` (see `_after`).
    in_window = 0 < cursor.crops < window * shape.crops_per_image
    if cursor.images + window > shape.num_images or not (in_window or cursor.crops == window == 0):
        raise StateMismatchError(
            f"this state is damaged: its place is in no epoch of {shape.num_images} images with "
            f"{shape.crops_per_image} crops of each: {saved}"
        )
    return cursor


def _saved_epoch(saved: Any) -> int:
    """Return the epoch of a saved cursor, which decides the shape that it must fit; 0 for a damaged one."""
    epoch = saved.get("epoch") if isinstance(saved, dict) else None
    return max(int(epoch), 0) if isinstance(epoch, Integral) else 0
