"""Before a build begins: its settings checked, its source open, its teachers loaded, its plan made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Unpack

from ferkd_data.builder.extension import Base, load_or_make_extension
from ferkd_data.builder.finished import digest_of_place
from ferkd_data.builder.job import Job, same_working_folder
from ferkd_data.builder.plan import Plan, load_or_make_plan
from ferkd_data.builder.request import Request, make_request
from ferkd_data.builder.settings import BuildKeywords
from ferkd_data.builder.state import EXTENDS, BuildFolder, Facts
from ferkd_data.builder.workplace import Workplace, open_workplace
from ferkd_data.errors import BuildError, FerkdError, UsageError
from ferkd_data.format.manifest import TeacherEntry, identity_of, read_manifest_bytes
from ferkd_data.images import ImageSource, describe_left_out
from ferkd_data.labels.buckets import QuantileThresholds
from ferkd_data.teachers import Teacher, load_teachers
from ferkd_data.teachers.load import check_class_count, check_class_order


@dataclass(frozen=True, kw_only=True)
class Prepared:
    job: Job
    workplace: Workplace
    images: ImageSource
    ensemble: list[Teacher]
    base: Base | None = None
    """The label set that is to be extended."""

    def begin(self, folder: BuildFolder, *, afresh: bool = False) -> tuple[Plan, Facts]:
        """The plan and facts of this build, those of an earlier run where there was one.

        Raises SettingsMismatchError when that was of other settings, UsageError when classes cannot be matched.
        """
        if self.base is not None:
            self._check_base(folder, self.base, afresh=afresh)
        folder.check_settings(_fingerprint(self.job, self.ensemble, self.base))
        begun_before = folder.is_begun
        try:
            plan, facts = self._plan_and_facts(folder)
        except FerkdError:
            if not begun_before:
                # What is corrected now are settings: they must not meet those of a build that never was.
                folder.clear()
            raise
        folder.save_facts(facts)
        folder.share()
        return plan, facts

    def let_teachers_go(self) -> None:
        """Where workers have their own, those of this process would only take memory of the first one's device."""
        self.ensemble.clear()
        torch.cuda.empty_cache()

    def _plan_and_facts(self, folder: BuildFolder) -> tuple[Plan, Facts]:
        plan = self._plan(folder)
        check_targets(plan, self.ensemble[0].num_classes, classes_given=self.job.classes is not None)
        for teacher in self.ensemble:
            check_class_order(plan.summary.class_names, teacher)
        facts = Facts(
            teachers=tuple(teacher_entry(teacher) for teacher in self.ensemble),
            num_classes=self.ensemble[0].num_classes,
            class_names=class_names(plan, self.ensemble),
            source=self.images.description,
            place_sha256=digest_of_place(self.job.source),
            class_folders=plan.summary.class_folders,
            left_out=plan.summary.left_out,
        )
        if self.base is not None:
            self.base.check_class_names(facts.class_names)
        return plan, facts

    def _plan(self, folder: BuildFolder) -> Plan:
        settings = self.job.settings
        if self.base is not None:
            return load_or_make_extension(self.images, folder.path, self.base, settings)
        return load_or_make_plan(self.images, folder.path, images_per_shard=settings.shard_images)

    def _check_base(self, folder: BuildFolder, base: Base, *, afresh: bool) -> None:
        """Raises BuildError where the label set is not the one that was found before the folder was taken."""
        if identity_of(read_manifest_bytes(base.out)) != base.identity:
            raise BuildError(f"{base.out}: was extended by another process just now; run the same command again")
        if afresh:
            folder.discard_extension(base.manifest)
        folder.drop_what_has_ended()


@contextmanager
def prepare(source: str | Path, out: str | Path, **arguments: Unpack[BuildKeywords]) -> Iterator[Prepared]:
    """`open_request` for the arguments of `build`."""
    with open_request(make_request(source, out, **arguments)) as prepared:
        yield prepared


@contextmanager
def open_request(request: Request) -> Iterator[Prepared]:
    """Open the source and load the teachers. A cluster that is needed is there for as long as the context lasts."""
    settings, resources, base = request.settings, request.resources, request.base
    with open_workplace(resources) as workplace:
        job = Job(
            source=request.source,
            classes=request.classes,
            out=request.out.absolute() if isinstance(request.out, Path) else request.out,
            teachers=request.teachers,
            precision=request.precision,
            settings=settings,
            batch_size=workplace.batch_size,
            workers=workplace.workers,
            threads=workplace.threads,
            compile=resources.compile,
            teacher_timeout=resources.teacher_timeout,
            fail_on_reject=request.on_error == "fail",
        )
        images = job.open_source()
        with same_working_folder():
            ensemble = load_teachers(
                job.teachers, device=workplace.device_here, precision=job.precision, used_on=workplace.devices[0]
            )
        if settings.top_k > ensemble[0].num_classes:
            raise UsageError(f"top_k {settings.top_k} is more than the teachers' {ensemble[0].num_classes} classes")
        if base is not None:
            base.check_teachers([teacher_entry(teacher) for teacher in ensemble])
        job = replace(job, digests=tuple(teacher.digest for teacher in ensemble))
        yield Prepared(job=job, workplace=workplace, images=images, ensemble=ensemble, base=base)


def check_targets(plan: Plan, num_classes: int, *, classes_given: bool) -> None:
    """Raise UsageError where targets and teachers' outputs cannot mean the same classes."""
    summary = plan.summary
    try:
        check_class_count(
            num_classes,
            class_names=summary.class_names,
            max_target=summary.max_target,
            classes_given=classes_given,
        )
    except UsageError as error:
        empty = summary.left_out.get("empty_folder")
        if not empty:
            raise
        left_out = describe_left_out({"empty_folder": empty})[0]
        raise UsageError(
            f"{error} ({left_out} left out, such as {summary.left_out_examples['empty_folder']})"
        ) from error


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


def _fingerprint(job: Job, teachers: Sequence[Teacher], base: Base | None) -> dict[str, Any]:
    """Everything that must be the same for a resume."""
    entries = [teacher_entry(teacher).model_dump(mode="json", exclude={"spec", "name"}) for teacher in teachers]
    listed = None if job.classes is None else {"folders": job.classes.folders, "names": job.classes.names}
    return {
        "source": job.source,
        "classes": listed,
        **asdict(job.settings),
        "quantile": isinstance(job.settings.thresholds, QuantileThresholds),
        "teachers": entries,
        **({} if base is None else {EXTENDS: base.identity}),
    }
