"""What tests of the builder share."""

from __future__ import annotations

import pytest

from ferkd_data.builder import BuildSettings
from ferkd_data.builder.labelling.job import Job
from ferkd_data.builder.settings import WorkerResources
from ferkd_data.teachers import TeacherSpec


@pytest.fixture
def job(photos, tiny_teachers, tmp_path):
    return Job(
        source=str(photos),
        classes=None,
        out=tmp_path / "out",
        teachers=(TeacherSpec.parse(tiny_teachers),),
        precision="fp32",
        settings=BuildSettings(crops=2),
        resources=WorkerResources(batch_size=8, threads=1, compute_threads=1),
    )
