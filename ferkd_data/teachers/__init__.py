"""Teachers: frozen classifiers, each with its own input size, interpolation, mean, std, weight and temperature."""

from __future__ import annotations

from ferkd_data.teachers.load import load_teacher, load_teachers
from ferkd_data.teachers.spec import Preprocessing, TeacherSpec
from ferkd_data.teachers.teacher import ModuleTeacher, Precision, Teacher

__all__ = [
    "ModuleTeacher",
    "Precision",
    "Preprocessing",
    "Teacher",
    "TeacherSpec",
    "load_teacher",
    "load_teachers",
]
