"""`ferkd-data bench`"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ferkd_data.errors import UsageError

from .options import TEACHER_HELP, device_option, end_of_help, given, json_option, named, print_json


@click.command()
@click.option("--teacher", "teachers", multiple=True, required=True, metavar="SPEC", help=TEACHER_HELP)
@device_option("auto, cpu, cuda or cuda:N.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Precision of the teachers. auto: bf16 on cuda, fp32 on a CPU.",
)
@click.option(
    "--batch-sizes", default=None, metavar="N,N", help="Batch sizes to try.  [default: 4,8,32; on cuda 64 to 1024]"
)
@click.option(
    "--threads", default=None, metavar="N,N", help="Numbers of compute threads to try.  [default: 1, and all cores]"
)
@click.option(
    "--seconds",
    type=float,
    metavar="SECONDS",
    default=1.0,
    help="Seconds per measurement. Each is repeated three times and the median is taken." + end_of_help(1),
)
@click.option(
    "--compile/--no-compile",
    "compiled",
    default=True,
    show_default=True,
    help="Also try torch.compile, which takes a minute or more per teacher.",
)
@click.option(
    "--export",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    metavar="FILE.onnx",
    help="Measure nothing. Write the teacher as an ONNX file, to use as onnx:FILE.onnx, if it gives the same "
    "probabilities.",
)
@json_option
def command(
    teachers: tuple[str, ...],
    device: str,
    precision: str,
    batch_sizes: str | None,
    threads: str | None,
    seconds: float,
    compiled: bool,
    export: Path | None,
    as_json: bool,
) -> int:
    """Time each teacher on this machine in eager mode, channels-last, with torch.compile and with ONNX Runtime.

    Prints crops per second, the ratio to the best eager result, the largest difference of a probability from eager
    mode, and one line of advice on the options for `ferkd-data build`.
    """
    # Imported here: it needs torch, which `bench --help` does not.
    from ferkd_data.bench import bench_teachers
    from ferkd_data.builder import Resources

    if export is not None:
        measuring = {
            "device": device,
            "precision": precision,
            "batch_sizes": batch_sizes,
            "threads": threads,
            "seconds": seconds,
            "compiled": compiled,
        }
        if useless := given(measuring):
            raise UsageError(f"--export measures nothing, so {named(useless)} would have no effect; leave it out")
        return _export(teachers, export, as_json)
    result = bench_teachers(
        teachers,
        device=Resources(device=device).resolved_device(),
        precision=precision,
        batch_sizes=_numbers("--batch-sizes", batch_sizes),
        threads=_numbers("--threads", threads),
        compiled=compiled,
        seconds=seconds,
    )
    if as_json:
        print_json(asdict(result))
        return 0
    for teacher in result.teachers:
        _print_teacher(teacher)
    return 0


def _export(teachers: tuple[str, ...], path: Path, as_json: bool) -> int:
    from ferkd_data.bench import TOLERANCE, export_teacher

    if len(teachers) != 1:
        raise UsageError(f"--export writes one teacher into one file; {len(teachers)} were given")
    spec = export_teacher(teachers[0], path)
    if as_json:
        print_json({"teacher": str(spec), "tolerance": TOLERANCE})
    else:
        click.echo(f"{path}: its probabilities are within {TOLERANCE:g} of the eager ones; use --teacher '{spec}'")
    return 0


def _print_teacher(teacher: Any) -> None:
    click.echo(teacher.spec)
    click.echo(f"  {'way':<14} {'batch':>5} {'threads':>7} {'crops/s':>9} {'ratio':>6}  largest difference")
    for timing in teacher.timings:
        click.echo(
            f"  {timing.way:<14} {timing.batch_size:>5} {timing.threads:>7} {timing.crops_per_second:>9.1f} "
            f"{timing.ratio:>5.2f}x  {timing.largest_difference:.1g}"
        )
    for way, reason in teacher.failures.items():
        click.echo(f"  {way}: not measured: {reason}")
    click.echo(f"  {teacher.advice}")


def _numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(piece) for piece in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} takes whole numbers separated by commas, got {text!r}") from error
