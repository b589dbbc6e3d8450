"""`build`: from a source and teachers to a label set; whole, or in parts for a batch system.

Each function leads through the same steps: prepare, take OUT, plan, label the shards, seal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from typing_extensions import Unpack

import ferkd_data
from ferkd_data.builder.engines import label_shards
from ferkd_data.builder.extension import seal_extension
from ferkd_data.builder.finished import Finished, find_finished
from ferkd_data.builder.locks import (
    check_out,
    check_unfinished,
    clean_up_after_end,
    explain_unwritable,
    open_build_folder,
    open_part_folder,
)
from ferkd_data.builder.plan import Part, Plan, open_plan
from ferkd_data.builder.prepare import Request, make_request, open_request, teacher_entry
from ferkd_data.builder.seal import seal
from ferkd_data.builder.settings import BuildKeywords, BuildSettings, Resources, SettingsKeywords
from ferkd_data.builder.state import BuildFolder, Facts
from ferkd_data.builder.stop import Stop
from ferkd_data.builder.store_files import location_of, open_out
from ferkd_data.builder.watch.events import BuildFinished, OnProgress, Watcher, Watchers
from ferkd_data.errors import BuildError, UsageError
from ferkd_data.format.manifest import Manifest
from ferkd_data.format.manifest_file import FILE_NAME, read_manifest
from ferkd_data.images import open_source
from ferkd_data.storage import remove_leftovers
from ferkd_data.teachers import TeacherSpec

SHARDS_NAMED = 8
"""Most missing shards that an error names."""


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """A finished label set."""

    out: Path | str
    manifest: Manifest
    already_finished: bool = False
    """True where the label set was there already, and nothing was done."""

    @property
    def rejects(self) -> int:
        """Number of images that could not be used."""
        return self.manifest.rejects.rows


@dataclass(frozen=True, kw_only=True)
class PartResult:
    """A finished part of a build."""

    out: Path
    part: Part
    shards: int
    """Shards of this part; all of them are done."""
    images: int
    """Images labelled in these shards."""
    rejects: int
    already_finished: bool = False
    """True where the whole label set was there already, and nothing was done."""


def build(
    source: str | Path,
    out: str | Path,
    *,
    teachers: Sequence[str | TeacherSpec] = (),
    settings: BuildSettings | None = None,
    resources: Resources | None = None,
    classes: str | Path | None = None,
    precision: str = "auto",
    on_error: Literal["reject", "fail"] = "reject",
    overwrite: bool = False,
    extend: bool = False,
    on_progress: OnProgress | None = None,
    watchers: Sequence[Watcher] = (),
    stop: Stop | None = None,
    **changes: Unpack[SettingsKeywords],
) -> BuildResult:
    """Label the images of `source` with an ensemble of teachers and write the label set `out`.

    Args:
        source: Folder of class folders, WebDataset tars, or Parquet files with an image column; also patterns and URLs.
        out: Folder, or s3:// or gs:// URL. An unfinished build of the same settings there is resumed: finished shards
            are not labelled again. A finished one of the same settings is left as it is.
        teachers: Specs such as "timm:resnet50" (docs/teachers.md).
        settings: What is written; `changes` replace single fields.
        resources: What computes it; `changes` replace single fields.
        classes: File that numbers the classes: a line for each class, in the order of the teachers' outputs.
        precision: "auto", "fp32", "bf16" or "fp16".
        on_error: "reject" collects images that cannot be used in rejects.parquet, "fail" stops at the first.
        overwrite: Replace the label set or unfinished build in `out`; with `extend`, an unfinished extension.
        extend: `out` is a finished label set that gets more `crops`, the images of `source` that it lacks, or both.
            Only what is missing is labelled, and `out` stays the old label set until that is done. Its manifest gives
            all other settings, also the teachers where none are given.
        on_progress: Called with the progress after every batch, or about every second where there are worker processes.
        watchers: See all that happens (ferkd_data.builder.watch.events).
        stop: Ends the build early when it is requested (ferkd_data.builder.Stop).
        changes: Fields of BuildSettings (crops=200, top_k=5, seed=0, …) and of Resources (device="cuda", …).

    Raises UsageError, SourceError, TeacherError, BuildError (see ferkd_data.errors).

    >>> from pathlib import Path
    >>> from PIL import Image
    >>> Path("photos").mkdir()
    >>> Image.linear_gradient("L").save("photos/grey.png")
    >>> teacher = "python:torchvision.models:squeezenet1_1?size=64&mean=0.5&std=0.25"  # with random weights
    >>> result = fd.build("photos", "labels", teachers=[teacher], crops=4, device="cpu")
    >>> result.manifest.num_images, result.manifest.num_crops, result.rejects
    (1, 4, 0)
    """
    watcher = Watchers(watchers, on_progress)
    with watcher.reporting_failure():
        request = make_request(
            source,
            out,
            teachers=teachers,
            settings=settings,
            resources=resources,
            classes=classes,
            precision=precision,
            on_error=on_error,
            extend=extend,
            **changes,
        )
        finished = None if overwrite or extend else find_finished(request)
        if finished is not None:
            _confirm(finished, request)
            result = _result_of(finished)
            # Watchers made their files when they started: without an end, metrics would say "running" for ever.
            watcher.see(_ended(result))
            return result
        # Before the teachers are loaded, which takes minutes.
        if isinstance(request.out, Path):
            check_out(request.out)
        # OUT is locked, and with --overwrite cleared, after the teachers are loaded: one that cannot be costs nothing
        # there.
        with open_request(request) as prepared, open_out(request.out, overwrite=overwrite, extend=extend) as folder:
            with explain_unwritable(folder.out, only_if_named=True):
                plan, facts = prepared.begin(folder, afresh=overwrite)
                try:
                    label_shards(prepared, folder, plan, plan.shards, watcher, stop or Stop())
                finally:
                    # Killed workers leave temporary files. This process may remove them, since it holds the lock.
                    remove_leftovers(folder.out)
            result = _seal(folder, plan, prepared.job.settings, facts)
            # An extension that found nothing to add returns the old manifest.
            if prepared.base is not None and result.manifest == prepared.base.manifest:
                result = replace(result, already_finished=True)
    watcher.see(_ended(result))
    return result


def build_part(
    source: str | Path,
    out: str | Path,
    *,
    part: str,
    on_progress: OnProgress | None = None,
    watchers: Sequence[Watcher] = (),
    stop: Stop | None = None,
    **arguments: Unpack[BuildKeywords],
) -> PartResult:
    """Label one part of a build, such as "3/8", beside the other parts, on any machine that sees `out`.

    When all parts are labelled, `finish(out)` makes the label set. `arguments` are those of `build`. The same call
    resumes a part. Raises what `build` raises.
    """
    mine = Part.parse(part)
    location = _local(out, "parts share a folder; for a store, use --engine ray or build without --part")
    watcher = Watchers(watchers, on_progress)
    with watcher.reporting_failure():
        request = make_request(source, out, **arguments)
        finished = None if request.base is not None else find_finished(request, in_parts=True)
        if finished is not None:
            _confirm(finished, request)
            entries = [entry for entry in finished.manifest.shards if mine.has(entry.index)]
            images, files = sum(entry.rows for entry in entries), sum(len(entry.files) for entry in entries)
            watcher.see(BuildFinished(out=_place(location), images=images, rejects=0, files=files))
            return PartResult(
                out=location, part=mine, shards=len(entries), images=images, rejects=0, already_finished=True
            )
        check_out(location)
        with (
            open_request(request) as prepared,
            open_part_folder(location, mine, extend=prepared.base is not None) as folder,
        ):
            with explain_unwritable(folder.out, only_if_named=True):
                # Parts begin at the same time: the first one makes the plan, the others wait and find it.
                with folder.alone():
                    plan, _ = prepared.begin(folder)
                shards = mine.shards(plan.shards)
                label_shards(prepared, folder, plan, shards, watcher, stop or Stop())
                records = [folder.existing_record(shard) for shard in shards]
    result = PartResult(
        out=folder.out,
        part=mine,
        shards=len(shards),
        images=sum(record.rows for record in records),
        rejects=sum(len(record.rejects) for record in records),
    )
    files = sum(len(record.files) for record in records)
    watcher.see(BuildFinished(out=_place(result.out), images=result.images, rejects=result.rejects, files=files))
    return result


def finish(out: str | Path) -> BuildResult:
    """Write the manifest of a build whose parts were labelled by `build_part`.

    Needs neither the source nor the teachers. Raises BuildError that names missing shards and the parts to run again.
    """
    location = _local(out, "only a build in parts is finished by hand; run its build command again")
    if (location / FILE_NAME).is_file() and BuildFolder(location).has_ended:
        was_interrupted = clean_up_after_end(location)
        return BuildResult(out=location, manifest=read_manifest(location), already_finished=not was_interrupted)
    check_unfinished(location)
    extend = BuildFolder(location).extends is not None
    with open_build_folder(location, overwrite=False, extend=extend) as folder:
        if extend:
            folder.drop_what_has_ended()
            check_unfinished(location)
        settings, facts = folder.saved_settings(), folder.saved_facts()
        plan = open_plan(folder.path)
        missing = [shard for shard in plan.shards if folder.files.record(shard) is None]
        if missing:
            named = ", ".join(map(str, missing[:SHARDS_NAMED])) + (", …" if len(missing) > SHARDS_NAMED else "")
            # A shard belongs to a part in each division that was ever begun, such as 1/4 and 1/8.
            divisions = {part.of for part in folder.parts()}
            parts = sorted({f"{shard % of + 1}/{of}" for of in divisions for shard in missing})
            again = f"; run part {', '.join(parts)} again" if parts else ""
            raise BuildError(f"{out}: {len(missing)} of {plan.summary.shards} shards are missing: {named}{again}")
        return _seal(folder, plan, settings, facts)


def _confirm(finished: Finished, request: Request) -> None:
    """Look at images and teachers where the manifest alone cannot tell whether they are the same.

    Raises SettingsMismatchError where they are not.
    """
    if not finished.source_is_sure:
        finished.check_source(open_source(request.source, classes=request.classes))
    if not finished.teachers_are_sure:
        with open_request(request) as prepared:
            entries = [teacher_entry(teacher) for teacher in prepared.teachers]
            finished.check_teachers(entries, precision=request.precision)


def _result_of(finished: Finished) -> BuildResult:
    return BuildResult(out=finished.location, manifest=finished.manifest, already_finished=not finished.was_interrupted)


def _ended(result: BuildResult) -> BuildFinished:
    manifest = result.manifest
    files = sum(len(shard.files) for shard in manifest.shards)
    return BuildFinished(out=_place(result.out), images=manifest.num_images, rejects=result.rejects, files=files)


def _place(out: Path | str) -> str:
    return str(out.absolute()) if isinstance(out, Path) else out


def _local(out: str | Path, hint: str) -> Path:
    """Return OUT as a folder. Raises UsageError for a store."""
    location = location_of(out)
    if isinstance(location, str):
        raise UsageError(f"{location}: {hint}")
    return location


def _seal(folder: BuildFolder, plan: Plan, settings: BuildSettings, facts: Facts) -> BuildResult:
    ending = seal_extension if folder.extends is not None else seal
    with explain_unwritable(folder.location):
        manifest = ending(folder, plan, settings, facts, ferkd_data.__version__)
        # The state last: until the manifest is where readers look for it, the same command finds what it needs to go
        # on.
        folder.files.commit(manifest)
        folder.remove()
    return BuildResult(out=folder.location, manifest=manifest)
