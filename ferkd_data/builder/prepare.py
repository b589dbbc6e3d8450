"""From the arguments of a build to the point where it can begin.

1. `make_request`: all arguments checked and completed. Nothing is opened or loaded.
2. `open_request`: the source open, the cluster connected, the teachers loaded: a `Prepared`.
3. `Prepared.begin`: compared with what an earlier run left in OUT, and the plan made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import Unpack

from ferkd_data.builder.base import Base, open_base
from ferkd_data.builder.extension import load_or_make_extension
from ferkd_data.builder.labelling.job import Job, same_working_folder
from ferkd_data.builder.plan import Plan, load_or_make_plan
from ferkd_data.builder.settings import BuildKeywords, BuildSettings, Resources, renamed_workers
from ferkd_data.builder.state import EXTENDS, BuildFolder, Facts, digest_of_location
from ferkd_data.builder.store_files import location_of
from ferkd_data.builder.workers.ray_cluster import Placement, open_placement
from ferkd_data.crop_kinds import make_crop_kinds
from ferkd_data.crops import CropDistribution
from ferkd_data.errors import BuildError, FerkdError, UsageError, nearest
from ferkd_data.format.manifest import TeacherEntry
from ferkd_data.format.manifest_file import identity_of, read_manifest_bytes
from ferkd_data.images import ClassList, ImageSource, describe_left_out, read_class_list
from ferkd_data.labels.buckets import QuantileThresholds
from ferkd_data.storage import expanded, is_url
from ferkd_data.teachers import Teacher, TeacherSpec, load_teachers
from ferkd_data.teachers.probe import check_class_count, check_class_orders
from ferkd_data.teachers.spec import parse_specs


@dataclass(frozen=True, kw_only=True)
class Request:
    """A build as it was asked for, complete and checked."""

    source: str
    """Absolute, unless it is a URL: a teacher's module may change the working folder."""
    out: Path | str
    classes: ClassList | None
    teachers: tuple[TeacherSpec, ...]
    precision: str
    settings: BuildSettings
    resources: Resources
    on_error: Literal["reject", "fail"]
    base: Base | None = None
    """The label set that is to be extended."""

    def __post_init__(self) -> None:
        if self.on_error not in ("reject", "fail"):
            raise UsageError(f"on_error must be reject or fail, got {self.on_error!r}")


def make_request(source: str | Path, out: str | Path, **arguments: Unpack[BuildKeywords]) -> Request:
    """Check the arguments of `build`. An extension takes what is not given from the label set in OUT.

    Raises UsageError, and for an extension what `open_base` raises.
    """
    given: dict[str, Any] = dict(arguments)
    settings, resources = given.pop("settings", None), given.pop("resources", None)
    teachers, precision = given.pop("teachers", ()), given.pop("precision", "auto")
    classes, on_error = given.pop("classes", None), given.pop("on_error", "reject")
    location = location_of(out)
    base = _base(location) if given.pop("extend", False) else None
    class_list = None if classes is None else read_class_list(expanded(classes))
    # In an extension, what the caller gave is compared with the label set, and what is left out is taken from it. A
    # BuildSettings gives all of its fields.
    wanted = {**(vars(settings) if settings else {}), **given}
    # An extension's crop kinds are parsed in `Base.settings`, where those of the label set fill in options left out.
    changes = {name: value for name, value in given.items() if base is None or name != "crop_kinds"}
    settings, resources = with_changes(settings, resources, changes)
    if base is not None:
        settings = base.settings({name: value for name, value in wanted.items() if name in vars(settings)})
        teachers = teachers or base.specs
        precision = base.precision if precision == "auto" else precision
        class_list = class_list or base.classes
    return Request(
        source=_absolute(str(source)),
        out=location,
        classes=class_list,
        teachers=parse_specs(teachers),
        precision=precision,
        settings=settings,
        resources=resources,
        on_error=on_error,
        base=base,
    )


def with_changes(
    settings: BuildSettings | None, resources: Resources | None, changes: Mapping[str, Any]
) -> tuple[BuildSettings, Resources]:
    """Return the settings and resources with single fields replaced.

    Raises UsageError for a field of neither, and for one that would have no effect.
    """
    settings, resources = settings or BuildSettings(), resources or Resources()
    changes = dict(changes)
    if changes.get("crop_kinds"):
        if changes.get("crops") is not None:
            raise UsageError(
                "crops (--crops) and crop_kinds (--crop-kinds) exclude each other: each kind says its own number of "
                "crops (n=)"
            )
        changes["crops"] = None
    _check_effect(changes)
    if "processes" in changes:
        changes["workers"] = renamed_workers(changes.get("workers"), changes.pop("processes"))
    of_settings = {field.name for field in fields(BuildSettings)}
    of_resources = {field.name for field in fields(Resources)}
    unknown = sorted(set(changes) - of_settings - of_resources)
    if unknown:
        known = sorted(of_settings | of_resources)
        advice = nearest(unknown[0], known, f"there are {', '.join(known)}")
        raise UsageError(f"build has no setting {unknown[0]!r}; {advice}")
    return (
        replace(settings, **{k: v for k, v in changes.items() if k in of_settings}),
        replace(resources, **{k: v for k, v in changes.items() if k in of_resources}),
    )


def _check_effect(changes: Mapping[str, Any]) -> None:
    """Raise UsageError for an option of the crops' distribution that every crop kind replaces."""
    drawn, kinds = changes.get("distribution"), changes.get("crop_kinds")
    if not kinds or drawn is None:
        return
    made, usual = make_crop_kinds(kinds, distribution=drawn), CropDistribution()
    for name in ("scale", "ratio", "hflip"):
        without = replace(drawn, **{name: getattr(usual, name)})
        if without != drawn and make_crop_kinds(kinds, distribution=without) == made:
            raise UsageError(
                f"{name} (--{name}) has no effect: each of the crop kinds (--crop-kinds) gives its own {name}=; leave "
                "out one of the two"
            )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A build whose source is open and whose teachers are loaded."""

    job: Job
    placement: Placement
    images: ImageSource
    teachers: list[Teacher]
    base: Base | None = None
    """The label set that is to be extended."""

    def begin(self, folder: BuildFolder, *, afresh: bool = False) -> tuple[Plan, Facts]:
        """Return the plan and facts of this build: those of an earlier run where there was one.

        Raises SettingsMismatchError when that had other settings, UsageError when classes cannot be matched.
        """
        if self.base is not None:
            self._check_base(folder, self.base, afresh=afresh)
        folder.check_settings(_fingerprint(self.job, self.teachers, self.base))
        begun_before = folder.is_begun
        try:
            plan, facts = self._plan_and_facts(folder)
        except FerkdError:
            if not begun_before:
                # The user corrects settings now: these must not be compared with those of a build that never began.
                folder.clear()
            raise
        # Only now has the build begun (see `is_begun`): settings, classes and plan fit together.
        folder.save_facts(facts)
        folder.files.share()
        return plan, facts

    def free_teachers(self) -> None:
        """Free the driver's teachers. Workers have their own, and these would only take memory of the first device."""
        # The list itself is emptied: others refer to it, and the teachers must have no reference left.
        self.teachers.clear()
        torch.cuda.empty_cache()

    def _plan_and_facts(self, folder: BuildFolder) -> tuple[Plan, Facts]:
        plan = self._plan(folder)
        check_plan_targets(plan, self.teachers[0].num_classes, classes_given=self.job.classes is not None)
        sorted_folders = plan.summary.class_folders if self.job.classes is None else None
        check_class_orders(self.teachers, class_names=plan.summary.class_names, sorted_folders=sorted_folders)
        facts = Facts(
            teachers=tuple(teacher_entry(teacher) for teacher in self.teachers),
            num_classes=self.teachers[0].num_classes,
            class_names=class_names(plan, self.teachers),
            source=self.images.description,
            place_sha256=digest_of_location(self.job.source),
            class_folders=plan.summary.class_folders,
            classes_sha256=None if self.job.classes is None else self.job.classes.sha256,
            left_out=plan.summary.left_out,
        )
        if self.base is not None:
            self.base.check_class_names(facts.class_names)
        return plan, facts

    def _plan(self, folder: BuildFolder) -> Plan:
        settings, fail = self.job.settings, self.job.fail_on_reject
        if self.base is not None:
            place_sha256 = digest_of_location(self.job.source)
            return load_or_make_extension(
                self.images, folder.path, self.base, settings, place_sha256=place_sha256, fail_on_reject=fail
            )
        shard_images = settings.shard_images
        return load_or_make_plan(self.images, folder.path, images_per_shard=shard_images, fail_on_reject=fail)

    def _check_base(self, folder: BuildFolder, base: Base, *, afresh: bool) -> None:
        """Check that the label set is still the one that was found before the folder was locked. Raises BuildError."""
        if identity_of(read_manifest_bytes(base.out)) != base.identity:
            raise BuildError(f"{base.out}: was extended by another process just now; run the same command again")
        # Before the comparisons that follow, which would refuse to go on with its state.
        if afresh:
            folder.discard_extension(base.manifest)
        folder.drop_what_has_ended()


@contextmanager
def open_request(request: Request) -> Iterator[Prepared]:
    """Open the source and load the teachers. A cluster stays connected for as long as the context lasts.

    Raises SourceError, TeacherError, UsageError, SettingsMismatchError for an extension by other teachers.
    """
    settings, base = request.settings, request.base
    # The cluster first: it fails in seconds, where loading teachers takes minutes.
    with open_placement(request.resources) as placement:
        job = Job(
            source=request.source,
            classes=request.classes,
            out=request.out.absolute() if isinstance(request.out, Path) else request.out,
            teachers=request.teachers,
            precision=request.precision,
            settings=settings,
            resources=placement.worker,
            fail_on_reject=request.on_error == "fail",
        )
        images = job.open_source()
        with same_working_folder():
            teachers = load_teachers(
                job.teachers, device=placement.driver_device, precision=job.precision, used_on=placement.devices[0]
            )
        if settings.top_k > teachers[0].num_classes:
            raise UsageError(f"top_k {settings.top_k} is more than the teachers' {teachers[0].num_classes} classes")
        if base is not None:
            base.check_teachers([teacher_entry(teacher) for teacher in teachers])
        job = replace(job, digests=tuple(teacher.digest for teacher in teachers))
        yield Prepared(job=job, placement=placement, images=images, teachers=teachers, base=base)


def check_plan_targets(plan: Plan, num_classes: int, *, classes_given: bool) -> None:
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
    """Return the source's own names where they are for all classes, else those that a teacher brings."""
    named = plan.summary.class_names
    if named is not None and len(named) == teachers[0].num_classes:
        return named
    return next((teacher.class_names for teacher in teachers if teacher.class_names), None)


def teacher_entry(teacher: Teacher) -> TeacherEntry:
    """Return the manifest's entry for a teacher."""
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


def _settings_of(settings: BuildSettings) -> dict[str, Any]:
    """Return the settings as plain values. One that was added later is left out where it is not used, so that a build
    that an earlier version began can be resumed."""
    plain = asdict(settings)
    if not plain["crop_kinds"]:
        del plain["crop_kinds"]
    return plain


def _base(location: Path | str) -> Base:
    if isinstance(location, str):
        raise UsageError(f"{location}: --extend works on a folder; pull the label set, extend it, and publish it again")
    return open_base(location)


def _absolute(source: str) -> str:
    if is_url(source):
        return source
    path = expanded(source)
    # SOURCE may be a pattern. Behind a working folder whose name has a bracket it would mean something else.
    return source if any(mark in str(Path.cwd()) for mark in "*?[{") and not path.exists() else str(path.absolute())


def _fingerprint(job: Job, teachers: Sequence[Teacher], base: Base | None) -> dict[str, Any]:
    """Return everything that must be the same for a resume."""
    # By digest, not by name: weights that were moved are the same teacher, and others under the same name are not.
    entries = [teacher_entry(teacher).identity() for teacher in teachers]
    # By content, since a file of classes may be edited between two runs.
    listed = None if job.classes is None else {"folders": job.classes.folders, "names": job.classes.names}
    return {
        "source": job.source,
        "classes": listed,
        **_settings_of(job.settings),
        "quantile": isinstance(job.settings.thresholds, QuantileThresholds),
        "teachers": entries,
        **({} if base is None else {EXTENDS: base.identity}),
    }
