"""Asking a teacher: with smaller batches where the device runs out of memory, and its errors under its name.

Legend: B crops of a batch, C classes, S output side.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ferkd_data.errors import FerkdError, TeacherError
from ferkd_data.teachers import Teacher
from ferkd_data.teachers.memory import is_out_of_memory


class Observer(Protocol):
    """Whoever wants to know what the teachers are at; called in the thread that asks them."""

    def asking(self, teacher: str) -> None:
        """The process now waits for this teacher."""

    def answered(self) -> None:
        """It does not any more."""

    def halved(self, teacher: str, crops: int) -> None:
        """The device ran out of memory; the teacher now gets `crops` at a time."""


class Nobody:
    def asking(self, teacher: str) -> None:
        pass

    def answered(self) -> None:
        pass

    def halved(self, teacher: str, crops: int) -> None:
        pass


@dataclass(kw_only=True)
class Forwards:
    observer: Observer = field(default_factory=Nobody)
    _most: dict[str, int] = field(default_factory=dict)
    """Crops that a teacher gets at a time, where that is fewer than a batch."""

    def logits(self, teacher: Teacher, images_BCSS: Tensor) -> Tensor:
        """(B, C) float32. Raises TeacherError."""
        name = str(teacher.spec)
        self.observer.asking(name)
        while (logits := self._try(teacher, images_BCSS, name)) is None:
            # Here and not where it was caught: the exception held on to the tensors of its frames.
            torch.cuda.empty_cache()
            self.observer.halved(name, self._most[name])
        return logits

    def _try(self, teacher: Teacher, images_BCSS: Tensor, name: str) -> Tensor | None:
        """None when memory ran out; the next try is then with half as many crops at a time."""
        step = min(len(images_BCSS), self._most.get(name, len(images_BCSS)))
        try:
            if step == len(images_BCSS):
                return teacher.logits(images_BCSS)
            return torch.cat([teacher.logits(part) for part in torch.split(images_BCSS, step)])
        except FerkdError:
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise TeacherError(
                    f"teacher {name}: failed on {len(images_BCSS)} crops: {type(error).__name__}: {error}"
                ) from error
            if step <= 1:
                raise TeacherError(
                    f"teacher {name}: the device has too little memory for a single crop; end what else runs on it, "
                    "or use fewer --processes or teachers"
                ) from error
            self._most[name] = step // 2
            return None
