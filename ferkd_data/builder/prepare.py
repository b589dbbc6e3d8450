"""Before a build begins: its settings checked, its source open, its teachers loaded, its plan made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from ferkd_data.buckets import QuantileThresholds
from ferkd_data.builder.job import Job
from ferkd_data.builder.plan import Plan, load_or_make_plan
from ferkd_data.builder.settings import BuildSettings, Resources
from ferkd_data.builder.state import BuildFolder, Facts
from ferkd_data.errors import UsageError
from ferkd_data.images import ImageSource
from ferkd_data.manifest import TeacherEntry
from ferkd_data.teachers import Teacher, TeacherSpec, load_teachers

OnError = Literal["reject", "fail"]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    job: Job
    devices: list[str]
    """Of each worker."""
    images: ImageSource
    ensemble: list[Teacher]

    def begin(self, folder: BuildFolder) -> tuple[Plan, Facts]:
        """The plan and facts of this build, those of an earlier run where there was one.

        Raises SettingsMismatchError when that was of other settings, UsageError when classes cannot be matched.
        """
        folder.check_settings(_fingerprint(self.job, self.ensemble))
        plan = load_or_make_plan(self.images, folder.path, images_per_shard=self.job.settings.shard_images)
        check_targets(plan, self.ensemble[0].num_classes, classes_given=self.job.classes is not None)
        facts = Facts(
            teachers=tuple(teacher_entry(teacher) for teacher in self.ensemble),
            num_classes=self.ensemble[0].num_classes,
            class_names=class_names(plan, self.ensemble),
            source=self.images.description,
        )
        folder.save_facts(facts)
        return plan, facts


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    teachers: Sequence[str | TeacherSpec],
    settings: BuildSettings | None = None,
    resources: Resources | None = None,
    classes: str | Path | None = None,
    precision: str = "auto",
    on_error: OnError = "reject",
    **changes: Any,
) -> Prepared:
    """The arguments are those of `build`."""
    settings, resources = with_changes(settings, resources, changes)
    if on_error not in ("reject", "fail"):
        raise UsageError(f"on_error must be reject or fail, got {on_error!r}")
    devices = resources.resolved_devices()
    job = Job(
        source=str(source),
        classes=None if classes is None else str(classes),
        out=Path(out),
        teachers=tuple(spec if isinstance(spec, TeacherSpec) else TeacherSpec.parse(spec) for spec in teachers),
        precision=precision,
        settings=settings,
        batch_size=resources.resolved_batch_size(),
        workers=resources.resolved_workers(),
        threads=resources.resolved_threads(),
        teacher_timeout=resources.teacher_timeout,
        fail_on_reject=on_error == "fail",
    )
    images = job.open_source()
    ensemble = load_teachers(job.teachers, device=devices[0], precision=precision)
    if settings.top_k > ensemble[0].num_classes:
        raise UsageError(f"top_k {settings.top_k} is more than the teachers' {ensemble[0].num_classes} classes")
    return Prepared(job=job, devices=devices, images=images, ensemble=ensemble)


def check_targets(plan: Plan, num_classes: int, *, classes_given: bool) -> None:
    """Raise UsageError where targets and teachers' outputs cannot mean the same classes."""
    summary = plan.summary
    if summary.max_target >= num_classes:
        raise UsageError(f"the images have targets up to {summary.max_target}, the teachers know {num_classes} classes")
    numbered_folders = summary.class_names is not None and not classes_given and summary.max_target >= 0
    if numbered_folders and len(summary.class_names or ()) != num_classes:
        raise UsageError(
            f"{len(summary.class_names or ())} classes in the source, {num_classes} in the teachers: which is which? "
            "Give --classes FILE, one line per class folder in the order of the teachers' outputs"
        )


def class_names(plan: Plan, teachers: Sequence[Teacher]) -> tuple[str, ...] | None:
    """The source's own names where they are for all classes, else those a teacher brings."""
    named = plan.summary.class_names
    if named is not None and len(named) == teachers[0].num_classes:
        return named
    return next((teacher.class_names for teacher in teachers if teacher.class_names), None)


def teacher_entry(teacher: Teacher) -> TeacherEntry:
    spec, preprocessing = teacher.spec, teacher.preprocessing
    return TeacherEntry(
        spec=str(spec),
        name=spec.name.rpartition("/")[2],
        digest=teacher.digest,
        num_classes=teacher.num_classes,
        size=preprocessing.size,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        weight=spec.weight,
        temperature=spec.temperature,
        precision=teacher.precision,
    )


def _fingerprint(job: Job, teachers: Sequence[Teacher]) -> dict[str, Any]:
    """Everything that must be the same for a resume."""
    entries = [teacher_entry(teacher).model_dump(mode="json", exclude={"spec", "name"}) for teacher in teachers]
    place = job.source if "://" in job.source else str(Path(job.source).absolute())
    listed = None if job.classes is None else Path(job.classes).read_text(encoding="utf-8")
    return {
        "source": place,
        "classes": listed,
        **asdict(job.settings),
        "quantile": isinstance(job.settings.thresholds, QuantileThresholds),
        "teachers": entries,
    }


def with_changes(
    settings: BuildSettings | None, resources: Resources | None, changes: dict[str, Any]
) -> tuple[BuildSettings, Resources]:
    """Settings with single fields replaced. Raises UsageError for a field that neither has."""
    settings, resources = settings or BuildSettings(), resources or Resources()
    of_settings = {field.name for field in fields(BuildSettings)}
    of_resources = {field.name for field in fields(Resources)}
    unknown = set(changes) - of_settings - of_resources
    if unknown:
        raise UsageError(
            f"build has no setting {sorted(unknown)[0]!r}; settings are {sorted(of_settings | of_resources)}"
        )
    return (
        replace(settings, **{k: v for k, v in changes.items() if k in of_settings}),
        replace(resources, **{k: v for k, v in changes.items() if k in of_resources}),
    )
