"""The overview before a build starts, so that a person sees in the first minute that something is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from threading import Thread

from ferkd_data.builder.plan import Plan
from ferkd_data.builder.prepare import Prepared, class_names
from ferkd_data.builder.watch.events import Overview
from ferkd_data.errors import TeacherError
from ferkd_data.format.rejects import read_rejects
from ferkd_data.images import ImageRef
from ferkd_data.teachers.probe import PROBE_IMAGES, TeacherProbe, probe_teachers
from ferkd_data.teachers.teacher import is_out_of_memory

PROBE_SHARDS = 8
"""Shards from which images for the teachers are taken: few, since each is read from elsewhere in the source."""
FEW_IMAGES = 8
"""Images that a driver on a cluster asks its teachers about, which are on its CPU."""


def overview_of(prepared: Prepared, plan: Plan, todo: Sequence[int]) -> Overview:
    """Describe the images of the whole plan, and the teachers' answers to a few images of the shards `todo`.

    Raises TeacherError for a teacher that is no classifier (see `probe_teachers`).
    """
    summary = plan.summary
    names = class_names(plan, prepared.teachers)
    reasons = Counter(reject.reason for reject in read_rejects(plan.folder / "plan-rejects.parquet"))
    return Overview(
        source=prepared.images.description,
        extends=prepared.base is not None,
        images=summary.images,
        images_with_target=summary.labelled_images,
        rejects=dict(reasons.most_common()),
        left_out=summary.left_out,
        left_out_examples=summary.left_out_examples,
        notes=summary.notes,
        num_classes=prepared.teachers[0].num_classes,
        first_class=names[0] if names else None,
        last_class=names[-1] if names else None,
        shards=summary.shards,
        crops_per_image=prepared.job.settings.crops,
        crop_kinds=tuple(f"{kind.name}: {kind.summary}" for kind in prepared.job.settings.kinds),
        teachers=_probe(prepared, _spread(plan, todo)) if todo else (),
    )


def _spread(plan: Plan, shards: Sequence[int]) -> list[ImageRef]:
    """Choose a few images from all over; of many shards, some neighbours each, since images are read by shard."""
    with_images = [shard for shard, images in zip(shards, plan.shard_images(shards), strict=True) if images]
    chosen = with_images[:: max(1, len(with_images) // PROBE_SHARDS)][:PROBE_SHARDS]
    found: list[ImageRef] = []
    for shard in chosen:
        refs = plan.refs(shard)
        each = -(-PROBE_IMAGES // len(chosen))
        step = 1 if len(chosen) == PROBE_SHARDS else max(1, len(refs) // each)
        found.extend(refs[::step][:each])
    return found[:PROBE_IMAGES]


def _probe(prepared: Prepared, refs: Sequence[ImageRef]) -> tuple[TeacherProbe, ...]:
    """Ask the teachers. Returns nothing where the device has no room: a build halves its batches, a probe does not."""
    job, placement = prepared.job, prepared.placement
    refs = refs if placement.cluster is None else refs[:FEW_IMAGES]
    timeout = job.resources.teacher_timeout
    answers: list[tuple[TeacherProbe, ...]] = []
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            answers.append(probe_teachers(prepared.teachers, prepared.images, refs, device=placement.driver_device))
        except BaseException as error:
            failures.append(error)

    if timeout is None:
        ask()
    else:
        # A thread that waits for a hanging teacher cannot be ended. As a daemon it ends with the process.
        thread = Thread(target=ask, daemon=True, name="ferkd-data-probe")
        thread.start()
        # The limit is for one teacher, and they are asked one after the other.
        thread.join(timeout * max(1, len(prepared.teachers)))
        if thread.is_alive():
            raise TeacherError(
                f"teachers {', '.join(map(str, job.teachers))}: no answer for {len(refs)} images within "
                f"{timeout:g} seconds; run the same command again, with a larger --teacher-timeout if they "
                "are slow"
            )
    # The thread has ended, or there was none: both lists are this thread's now.
    for failure in failures:
        if isinstance(failure, RuntimeError) and is_out_of_memory(failure):
            return ()
        raise failure
    return answers[0]
