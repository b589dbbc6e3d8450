"""Teachers: frozen classifiers, each with its own input size, interpolation, mean, std, weight and temperature.

A spec (`timm:NAME`, `onnx:FILE`, …) becomes a `TeacherSpec`; `load_teacher` turns it into a `Teacher` by the module of
its kind. `spec.TEACHER_KINDS` lists the kinds, `teacher.py` holds the protocols that a kind fulfils.
"""

from __future__ import annotations

from ferkd_data.teachers.module_teacher import ModuleTeacher
from ferkd_data.teachers.spec import Preprocessing, TeacherSpec
from ferkd_data.teachers.teacher import LoadTeacher, Precision, Teacher, load_teacher, load_teachers

__all__ = [
    "LoadTeacher",
    "ModuleTeacher",
    "Precision",
    "Preprocessing",
    "Teacher",
    "TeacherSpec",
    "load_teacher",
    "load_teachers",
]
