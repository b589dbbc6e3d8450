"""`build`: from a source and teachers to a label set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import ferkd_data
from ferkd_data.builder.crew import Crew
from ferkd_data.builder.job import Job, open_tools
from ferkd_data.builder.local import label_here
from ferkd_data.builder.plan import Plan, load_or_make_plan
from ferkd_data.builder.progress import OnProgress, ProgressCounter
from ferkd_data.builder.seal import seal
from ferkd_data.builder.settings import BuildSettings, Resources
from ferkd_data.builder.state import BuildFolder, open_build_folder
from ferkd_data.builder.stop import Stop
from ferkd_data.errors import BuildError, UsageError
from ferkd_data.manifest import Manifest, TeacherEntry
from ferkd_data.storage import remove_leftovers
from ferkd_data.teachers import Teacher, TeacherSpec, load_teachers

OnError = Literal["reject", "fail"]


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    out: Path
    manifest: Manifest

    @property
    def rejects(self) -> int:
        return self.manifest.rejects.rows


def build(
    source: str | Path,
    out: str | Path,
    *,
    teachers: Sequence[str | TeacherSpec],
    settings: BuildSettings | None = None,
    resources: Resources | None = None,
    classes: str | Path | None = None,
    precision: str = "auto",
    on_error: OnError = "reject",
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    stop: Stop | None = None,
    **changes: Any,
) -> BuildResult:
    """Label the images of `source` with an ensemble and write the label set `out`.

    `changes` are fields of BuildSettings (crops=200, top_k=5, seed=0, …) or of Resources (device="cuda", …).
    A folder that holds an unfinished build of the same settings is resumed; finished shards are not labelled again.

    Raises UsageError, SourceError, TeacherError, BuildError (see ferkd_data.errors).
    """
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
    num_classes = ensemble[0].num_classes
    if settings.top_k > num_classes:
        raise UsageError(f"top_k {settings.top_k} is more than the teachers' {num_classes} classes")

    with open_build_folder(job.out, overwrite=overwrite) as folder:
        folder.check_settings(_fingerprint(source, classes, settings, ensemble))
        plan = load_or_make_plan(images, folder.path, images_per_shard=settings.shard_images)
        check_targets(plan, num_classes, classes_given=classes is not None)
        _label(job, folder, plan, devices, ensemble, on_progress or (lambda _: None), stop or Stop())
        manifest = seal(
            folder,
            plan,
            settings,
            teachers=tuple(teacher_entry(teacher) for teacher in ensemble),
            num_classes=num_classes,
            class_names=class_names(plan, ensemble),
            source=images.description,
            version=ferkd_data.__version__,
        )
        if manifest.num_images == 0:
            raise BuildError(
                f"{out}: every one of the {manifest.rejects.rows} images was rejected; see rejects.parquet"
            )
        folder.remove()
    return BuildResult(out=Path(out), manifest=manifest)


def _label(
    job: Job,
    folder: BuildFolder,
    plan: Plan,
    devices: Sequence[str],
    ensemble: Sequence[Teacher],
    on_progress: OnProgress,
    stop: Stop,
) -> None:
    """Label every shard that has no record yet."""
    counter = ProgressCounter(
        report=on_progress,
        crops_per_image=job.settings.crops - job.first_crop,
        shards_total=plan.summary.shards,
        images_total=plan.summary.images,
        rejects_before=plan.summary.rejects,
    )
    todo = []
    for shard in range(plan.summary.shards):
        record = folder.record(shard)
        if record is None:
            todo.append(shard)
        else:
            counter.shard_done(shard, record.rows + len(record.rejects), len(record.rejects))
    if len(devices) == 1 and job.teacher_timeout is None:
        with stop.labelling(), open_tools(job, devices[0], ensemble) as tools:
            label_here(folder, plan, tools, todo, counter, stop)
        return
    try:
        with stop.labelling(), Crew(job, devices, counter, stop) as crew:
            crew.label(todo)
    finally:
        # Killed workers leave files aside; this process alone may remove them, since it holds the lock.
        remove_leftovers(job.out)


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


def _fingerprint(
    source: str | Path, classes: str | Path | None, settings: BuildSettings, teachers: Sequence[Teacher]
) -> dict[str, Any]:
    """Everything that must be the same for a resume."""
    entries = [teacher_entry(teacher).model_dump(mode="json", exclude={"spec", "name"}) for teacher in teachers]
    place = str(source) if "://" in str(source) else str(Path(source).absolute())
    listed = None if classes is None else Path(classes).read_text(encoding="utf-8")
    return {"source": place, "classes": listed, **asdict(settings), "teachers": entries}


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
