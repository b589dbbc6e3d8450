"""Before a build begins: its settings checked, its source open, its teachers loaded, its plan made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import Unpack

from ferkd_data.buckets import QuantileThresholds
from ferkd_data.builder.extension.base import Base, open_base
from ferkd_data.builder.extension.plan import load_or_make_extension
from ferkd_data.builder.job import Job
from ferkd_data.builder.keywords import SettingsKeywords
from ferkd_data.builder.out.state import EXTENDS, BuildFolder, Facts
from ferkd_data.builder.out.store_folder import place_of
from ferkd_data.builder.plan import Plan, load_or_make_plan
from ferkd_data.builder.settings import BuildSettings, Resources
from ferkd_data.builder.workplace import Workplace, open_workplace
from ferkd_data.errors import BuildError, FerkdError, UsageError
from ferkd_data.images import ImageSource
from ferkd_data.manifest import TeacherEntry, identity_of, read_manifest_bytes
from ferkd_data.teachers import Teacher, TeacherSpec, load_teachers
from ferkd_data.teachers.classes import check_class_count, check_class_order

OnError = Literal["reject", "fail"]


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
        begun_before = folder.is_begun
        folder.check_settings(_fingerprint(self.job, self.ensemble, self.base))
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
def prepare(
    source: str | Path,
    out: str | Path,
    *,
    teachers: Sequence[str | TeacherSpec] = (),
    settings: BuildSettings | None = None,
    resources: Resources | None = None,
    classes: str | Path | None = None,
    precision: str = "auto",
    on_error: OnError = "reject",
    extend: bool = False,
    **changes: Unpack[SettingsKeywords],
) -> Iterator[Prepared]:
    """The arguments are those of `build`. A cluster that it needs is there for as long as the context lasts."""
    base = _base(place_of(out)) if extend else None
    if on_error not in ("reject", "fail"):
        raise UsageError(f"on_error must be reject or fail, got {on_error!r}")
    given = {**(vars(settings) if settings else {}), **changes}
    settings, resources = with_changes(settings, resources, changes)
    if base is not None:
        settings = base.settings({name: value for name, value in given.items() if name in vars(settings)})
        teachers = teachers or base.specs
        precision = base.precision if precision == "auto" else precision
    with open_workplace(resources) as workplace:
        job = Job(
            source=str(source),
            classes=None if classes is None else str(classes),
            out=place_of(out),
            teachers=tuple(spec if isinstance(spec, TeacherSpec) else TeacherSpec.parse(spec) for spec in teachers),
            precision=precision,
            settings=settings,
            batch_size=workplace.batch_size,
            workers=workplace.workers,
            threads=workplace.threads,
            compile=resources.compile,
            teacher_timeout=resources.teacher_timeout,
            fail_on_reject=on_error == "fail",
        )
        images = job.open_source()
        ensemble = load_teachers(
            job.teachers, device=workplace.device_here, precision=precision, used_on=workplace.devices[0]
        )
        if settings.top_k > ensemble[0].num_classes:
            raise UsageError(f"top_k {settings.top_k} is more than the teachers' {ensemble[0].num_classes} classes")
        if base is not None:
            base.check_teachers([teacher_entry(teacher) for teacher in ensemble])
        job = replace(job, digests=tuple(teacher.digest for teacher in ensemble))
        yield Prepared(job=job, workplace=workplace, images=images, ensemble=ensemble, base=base)


def _base(place: Path | str) -> Base:
    if isinstance(place, str):
        raise UsageError(f"{place}: --extend works on a folder; pull the label set, extend it, and publish it again")
    return open_base(place)


def check_targets(plan: Plan, num_classes: int, *, classes_given: bool) -> None:
    """Raise UsageError where targets and teachers' outputs cannot mean the same classes."""
    check_class_count(
        num_classes,
        class_names=plan.summary.class_names,
        max_target=plan.summary.max_target,
        classes_given=classes_given,
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


def _fingerprint(job: Job, teachers: Sequence[Teacher], base: Base | None) -> dict[str, Any]:
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
        **({} if base is None else {EXTENDS: base.identity}),
    }


def with_changes(
    settings: BuildSettings | None, resources: Resources | None, changes: Mapping[str, Any]
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
