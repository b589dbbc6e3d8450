"""`ferkd-data build`"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

import click

import ferkd_data as fd
import ferkd_data.builder
from ferkd_data.errors import UsageError
from ferkd_data.words import count

from .display import show_progress
from .options import (
    CLUSTER,
    DONE_WITH_REJECTS,
    FILES,
    LABELS,
    MACHINE,
    NUMBER_OR_AUTO,
    WATCHING,
    GroupedCommand,
    config_option,
    default_of,
    device_option,
    end_of_help,
    given,
    grouped,
    json_option,
    named,
    print_json,
    require_teachers,
    teacher_options,
)
from .overview import ShowOverview, lines
from .terminal import say, size

SETTINGS, RESOURCES, THRESHOLDS = fd.BuildSettings(), fd.Resources(), fd.Thresholds()
"""The defaults of the options, written once: in the library."""


@click.command(cls=GroupedCommand, renamed={"--processes": "--workers"})
@click.argument("source")
@click.argument("out")
@device_option("auto, cpu, cuda, cuda:N, or several GPUs: cuda:0,1 or all.")
@teacher_options
@grouped(
    "--crops",
    group=LABELS,
    type=int,
    metavar="N",
    default=SETTINGS.crops,
    help="Crops per image." + end_of_help(SETTINGS.crops, limits="1<=x<=65535"),
)
@grouped(
    "--crop-kinds",
    group=LABELS,
    multiple=True,
    metavar="SPEC",
    help="Label a kind of crops for multi-crop students, such as global:scale=0.25..1,n=20 or "
    "local:scale=0.05..0.25,size=96,n=80, in place of --crops (docs/crop_kinds.md). Give it once for each kind.",
)
@grouped(
    "--crops-per-block",
    group=FILES,
    type=int,
    metavar="N",
    default=SETTINGS.crops_per_block,
    help="Crops in one block file of layout parquet, the unit that a trainer can download alone. Layout webdataset "
    "has all crops of an image in one tar; the number then is that of `convert --layout parquet`."
    + end_of_help(SETTINGS.crops_per_block, limits="x>=1"),
)
@grouped(
    "--top-k",
    group=LABELS,
    type=int,
    metavar="N",
    default=SETTINGS.top_k,
    help="Classes kept for each crop." + end_of_help(SETTINGS.top_k, limits="1<=x<=1000"),
)
@grouped(
    "--layout",
    group=FILES,
    type=click.Choice(["parquet", "webdataset"]),
    default=SETTINGS.layout,
    show_default=True,
    help="parquet: labels only. webdataset: images and labels together in tars.",
)
@grouped(
    "--images-per-shard",
    group=FILES,
    type=int,
    metavar="N",
    default=SETTINGS.images_per_shard,
    help="Images per shard.  [default: 4096 for parquet, 1024 for webdataset; x>=1]",
)
@grouped(
    "--seed",
    group=LABELS,
    type=int,
    metavar="N",
    default=SETTINGS.seed,
    show_default=True,
    help="Seed of the crops.",
)
@grouped(
    "--scale",
    group=LABELS,
    type=float,
    nargs=2,
    metavar="MIN MAX",
    default=SETTINGS.distribution.scale,
    help="Smallest and largest area of a crop, as a share of the image's area."
    + end_of_help(*SETTINGS.distribution.scale),
)
@grouped(
    "--ratio",
    group=LABELS,
    type=float,
    nargs=2,
    metavar="MIN MAX",
    default=SETTINGS.distribution.ratio,
    help="Smallest and largest aspect ratio (width / height) of a crop." + end_of_help(*SETTINGS.distribution.ratio),
)
@grouped(
    "--hflip",
    group=LABELS,
    type=float,
    metavar="P",
    default=SETTINGS.distribution.hflip,
    show_default=True,
    help="Probability of a horizontal flip.",
)
@grouped(
    "--augment",
    group=LABELS,
    multiple=True,
    metavar="SPEC",
    help="Draw an augmentation for each crop and record it, such as randaugment:n=2,m=9, "
    "colorjitter:0.4,0.4,0.4,0.1 or erase:p=0.25 (docs/augment.md). Repeat it to apply several, in order.",
)
@grouped(
    "--thresholds",
    group=LABELS,
    default=" ".join(f"{value:g}" for value in (THRESHOLDS.low, THRESHOLDS.mid, THRESHOLDS.top)),
    metavar="LOW MID TOP",
    help="Bucket thresholds, or quantile:LOW,MID,TOP as shares of this label set's own crops. A loader can use others "
    "later." + end_of_help(THRESHOLDS.low, THRESHOLDS.mid, THRESHOLDS.top),
)
@grouped(
    "--confidence",
    group=LABELS,
    type=click.Choice(["max", "target"]),
    default=SETTINGS.thresholds.confidence,
    show_default=True,
    help="Value compared with the thresholds: the largest probability, or that of the ground truth.",
)
@grouped(
    "--max-pixels",
    group=LABELS,
    type=int,
    metavar="N",
    default=SETTINGS.max_pixels,
    help=f"Reject images with more pixels than this.  [default: {SETTINGS.max_pixels}; x>=1]",
)
@grouped(
    "--batch-size",
    group=MACHINE,
    type=NUMBER_OR_AUTO,
    default=RESOURCES.batch_size,
    help="Crops per forward pass.  [default: auto: 8 on a CPU, 256 on cuda]",
)
@grouped(
    "--compile",
    group=MACHINE,
    is_flag=True,
    help="Run PyTorch teachers through torch.compile. Needs a C++ compiler, and minutes at the start of each worker; "
    "`ferkd-data bench` measures whether it pays.",
)
@grouped(
    "--workers",
    group=MACHINE,
    type=NUMBER_OR_AUTO,
    default=RESOURCES.workers,
    help="Worker processes per device; with --engine ray, in the whole cluster.  [default: auto: 1; on a cluster, as "
    "many as it has room for]",
)
@grouped(
    "--threads",
    group=MACHINE,
    type=NUMBER_OR_AUTO,
    default=RESOURCES.threads,
    help="Threads per worker that decode and cut images.  [default: auto: half of its cores, up to 8]",
)
@grouped(
    "--teacher-timeout",
    group=MACHINE,
    type=float,
    default=RESOURCES.teacher_timeout,
    metavar="SECONDS",
    help="Stop the build when a teacher takes longer than this for one batch.  [default: no limit]",
)
@grouped(
    "--grace",
    group=CLUSTER,
    type=float,
    default=default_of(fd.builder.stop_on_sigterm, "grace_seconds"),
    metavar="SECONDS",
    help="Seconds to finish in-progress shards after SIGTERM or SIGHUP before dropping them."
    + end_of_help(default_of(fd.builder.stop_on_sigterm, "grace_seconds")),
)
@grouped(
    "--engine",
    group=CLUSTER,
    type=click.Choice(["local", "ray"]),
    default=RESOURCES.engine,
    show_default=True,
    help="local: this machine. ray: a Ray cluster, all of whose nodes can reach SOURCE and OUT.",
)
@grouped(
    "--ray-address",
    group=CLUSTER,
    default=RESOURCES.ray_address,
    metavar="HOST:PORT",
    help="Address of the cluster; auto: the one on this machine.  [default: $RAY_ADDRESS, else a Ray started for this "
    "build]",
)
@grouped(
    "--gpus-per-teacher",
    group=CLUSTER,
    type=float,
    metavar="SHARE",
    default=RESOURCES.gpus_per_teacher,
    help="Share of a GPU per worker on a Ray cluster: 0.5 puts two workers on each GPU."
    + end_of_help(RESOURCES.gpus_per_teacher),
)
@grouped(
    "--on-error",
    group=FILES,
    type=click.Choice(["reject", "fail"]),
    default=default_of(fd.build, "on_error"),
    show_default=True,
    help="reject: list unusable images in rejects.parquet and go on. fail: stop at the first one.",
)
@grouped(
    "--part",
    group=CLUSTER,
    default=None,
    metavar="I/N",
    help="Label only part I of N, such as 3/16, for batch systems. Parts may run at the same time; when all are done, "
    "run `ferkd-data finish OUT`.",
)
@grouped(
    "--log-json",
    group=WATCHING,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append events to this file, one JSON object per line.",
)
@grouped(
    "--metrics",
    group=WATCHING,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Keep metrics for Prometheus up to date in this file (textfile collector of the node exporter).",
)
@grouped(
    "--report",
    "report_file",
    group=WATCHING,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    help="Write an HTML report and update it after each shard (see `ferkd-data report`).",
)
@grouped("--overwrite", group=FILES, is_flag=True, help="Replace the label set or unfinished build in OUT.")
@grouped(
    "--extend",
    group=FILES,
    is_flag=True,
    help="Add more --crops (or --crop-kinds), new images of SOURCE, or both to the finished label set in OUT. "
    "Teachers, classes and all other settings come from its manifest. With --overwrite, restart an unfinished "
    "extension.",
)
@grouped(
    "--dry-run",
    group=WATCHING,
    is_flag=True,
    help="Print an overview and estimate time and disk space for the given options. Writes nothing, neither to OUT nor "
    "to the files of --report, --log-json and --metrics.",
)
@json_option
@config_option
def command(
    source: str,
    out: str,
    teachers: tuple[str, ...],
    classes: Path | None,
    precision: str,
    thresholds: str,
    confidence: Any,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    hflip: float,
    on_error: Any,
    part: str | None,
    log_json: Path | None,
    metrics: Path | None,
    report_file: Path | None,
    overwrite: bool,
    extend: bool,
    grace: float,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Label crops of the images of SOURCE with an ensemble of teachers and write the label set OUT, a folder or
    an s3:// or gs:// URL.

    SOURCE is a folder of class folders, a flat folder of images, WebDataset tars, or Parquet files with a column of
    images. Tars and Parquet files are given as a folder, or as a glob or brace pattern in quotes. Before labelling,
    the build prints what it found: images, classes, files left out, and the teachers' answers to 32 images.

    Run the same command again to resume an interrupted build. On a finished one it does nothing.
    """
    from ferkd_data.builder import JsonLog, MetricsFile, stop_on_sigterm
    from ferkd_data.labels.buckets import parse_thresholds

    # What was given, and nothing else: an extension takes the rest from the manifest, others from the library's
    # defaults.
    changes = given(options)
    if given({"thresholds": thresholds, "confidence": confidence}):
        changes["thresholds"] = parse_thresholds(thresholds.split(), confidence)
    if given({"scale": scale, "ratio": ratio, "hflip": hflip}):
        changes["distribution"] = fd.CropDistribution(scale=scale, ratio=ratio, hflip=hflip)
    if not extend:
        require_teachers(teachers)
    if dry_run:
        unused = {"log_json": log_json, "metrics": metrics, "report_file": report_file}
        _say_unused({**unused, "overwrite": overwrite, "grace": grace})
        asked: dict[str, Any] = {"teachers": teachers, "classes": classes, "precision": precision, "on_error": on_error}
        return _dry_run(source, part, as_json, {**asked, "extend": extend, **changes})
    overview = ShowOverview()
    # Signals are taken before anything starts, and given back after the display has ended.
    with stop_on_sigterm(grace) as stop, show_progress() as report, _quiet_ray(changes):
        hint = _hint(teachers, changes)
        on_progress = _with_hint(report, hint) if hint else report
        changes |= {
            "teachers": teachers,
            "classes": classes,
            "precision": precision,
            "on_error": on_error,
            "extend": extend,
            "on_progress": on_progress,
            "watchers": [
                overview,
                *(kind(path) for kind, path in ((JsonLog, log_json), (MetricsFile, metrics)) if path),
                *([fd.LiveReport(report_file, images=source)] if report_file else []),
            ],
            "stop": stop,
        }
        if part is not None:
            return _build_part(source, out, part, overwrite, as_json, changes)
        result = fd.build(source, out, overwrite=overwrite, **changes)
    print_result(result, as_json, overview.overview)
    if result.already_finished and not extend and not as_json:
        say(
            "note: what changed in SOURCE since the build is not looked for: --extend adds new images, and "
            f"`ferkd-data verify {quote(out)} --images {quote(source)}` finds those that are gone or are others now",
            err=True,
        )
    return status_of(result)


def _say_unused(options: dict[str, Any]) -> None:
    """Name the options that a dry run leaves aside. No error: people add --dry-run to a command that is complete."""
    if unused := given(options):
        say(f"note: --dry-run does not use {named(unused)}", err=True)


def _dry_run(source: str, part: str | None, as_json: bool, arguments: dict[str, Any]) -> int:
    with _quiet_ray(arguments):
        estimate = fd.builder.dry_run(source, part=part, **arguments)
    for line in lines(estimate.overview):
        say(line, err=True)
    print_json(asdict(estimate)) if as_json else _print_estimate(estimate)
    return 0


def _quiet_ray(changes: dict[str, Any]) -> AbstractContextManager[Any]:
    """Send what Ray prints to stderr while it runs: it prints the death of workers to stdout, where --json writes."""
    return redirect_stdout(sys.stderr) if changes.get("engine") == "ray" else nullcontext()


def status_of(result: Any) -> int:
    """Return 3 where images could not be used, 0 where a build had ended before: batch systems repeat a failed job."""
    return DONE_WITH_REJECTS if result.rejects and not result.already_finished else 0


def _hint(teachers: tuple[str, ...], changes: dict[str, Any]) -> str:
    """Return a remark for a build that leaves GPUs idle, or runs teachers on a CPU without ONNX Runtime; else nothing.

    It decides nothing: a device that is not here may be another machine's.
    """
    device, on_ray = changes.get("device", "auto"), changes.get("engine") == "ray"
    if not on_ray and device in ("auto", "cuda"):
        import torch

        if torch.cuda.is_available():
            gpus = torch.cuda.device_count()
            return f"hint: this build uses 1 of {gpus} GPUs; --device all uses every one" if gpus > 1 else ""
    on_a_cpu = device == "cpu" or (device == "auto" and not on_ray)
    if not on_a_cpu or changes.get("compile") or all(teacher.startswith("onnx:") for teacher in teachers):
        return ""
    return "hint: on a CPU, ONNX Runtime runs many teachers several times faster: `ferkd-data bench` measures it"


def _with_hint(report: Callable[[Any], None], hint: str) -> Callable[[Any], None]:
    """Add a hint to a progress display. It is printed once, when the labelling has begun."""
    said = False

    def report_and_hint(progress: Any) -> None:
        nonlocal said
        if not said:
            said = True
            say(hint, err=True)
        report(progress)

    return report_and_hint


def _build_part(source: str, out: str, part: str, overwrite: bool, as_json: bool, arguments: dict[str, Any]) -> int:
    # Parts run side by side on machines that know nothing of each other.
    if overwrite:
        raise UsageError(
            "--overwrite with --part would remove the work of other parts; empty OUT before the first part begins"
        )
    result = fd.builder.build_part(source, out, part=part, **arguments)
    if as_json:
        print_json({**asdict(result), "out": str(out), "part": str(result.part)})
    elif result.already_finished:
        say(f"{out}: already finished, with all its parts")
    else:
        say(
            f"{out}: part {result.part} is done, {count(result.shards, 'shard')} with {count(result.images, 'image')}; "
            f"when all parts are done, run `ferkd-data finish {quote(out)}`"
        )
    return status_of(result)


def print_result(result: Any, as_json: bool, overview: Any = None) -> None:
    """Print a build's result in one line, or as JSON; rejects are counted on stderr."""
    manifest = result.manifest
    total = sum(file.bytes for shard in manifest.shards for file in shard.files)
    if as_json:
        print_json(
            {
                "out": str(result.out),
                "already_finished": result.already_finished,
                "images": manifest.num_images,
                "rejects": result.rejects,
                "crops": manifest.statistics.crops,
                "bytes": total,
                "left_out": manifest.source.left_out or {},
                "overview": None if overview is None else asdict(overview),
            }
        )
        return
    files = sum(len(shard.files) for shard in manifest.shards)
    done = "already finished: " if result.already_finished else ""
    say(
        f"{result.out}: {done}{count(manifest.num_images, 'image')} x {count(manifest.num_crops, 'crop')}, "
        f"{size(total)} in {count(files, 'file')}"
    )
    if result.rejects:
        say(
            f"{count(result.rejects, 'image')} could not be used; the reasons are in "
            f"{result.out}/{manifest.rejects.path}",
            err=True,
        )


def _print_estimate(estimate: Any) -> None:
    if estimate.part:
        click.echo(f"part          {estimate.part}")
    click.echo(f"images        {estimate.images:,}")
    click.echo(f"crops         {estimate.crops:,}")
    click.echo(f"forwards      {estimate.forwards:,}")
    each = f": {estimate.workers:,} workers at {estimate.worker_crops_per_second:,.1f}" if estimate.workers > 1 else ""
    click.echo(f"rate          {estimate.crops_per_second:,.1f} crops/s{each}")
    click.echo(f"measured      {estimate.measured_crops:,} crops, on {_measured_on(estimate)}")
    click.echo(f"time          {_duration(estimate.hours)}")
    click.echo(f"labels        {size(estimate.label_bytes)}")
    if estimate.image_bytes:
        click.echo(f"images copied {size(estimate.image_bytes)}")
    click.echo(f"files         {estimate.files:,}")
    for teacher in estimate.teachers:
        click.echo(
            f"  {teacher.spec}: {teacher.forwards:,} forwards, {teacher.milliseconds_per_crop:.1f} ms each, "
            f"{_duration(teacher.hours)} of the time"
        )


def _measured_on(estimate: Any) -> str:
    machines = Counter(estimate.measured_on)
    named = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in machines.items())
    measured = len(estimate.measured_on)
    if estimate.workers == 1:
        return named
    if measured == estimate.workers:
        return f"{named}, all at once"
    return f"{named}: {measured} of {estimate.workers:,} workers; those of one node share its disk, memory and network"


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
