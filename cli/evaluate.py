"""`ferkd-data evaluate`"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ferkd_data.words import count, percent

from .options import GroupedCommand, device_option, json_option, print_json, require_teachers, teacher_options
from .overview import left_out
from .terminal import say


@click.command(cls=GroupedCommand)
@click.argument("source")
@device_option("auto, cpu, cuda or cuda:N.")
@teacher_options
@click.option(
    "--limit",
    type=int,
    metavar="N",
    default=1000,
    show_default=True,
    help="Number of images to evaluate, spread over SOURCE.",
)
@click.option(
    "--diagnose",
    type=int,
    metavar="N",
    default=200,
    show_default=True,
    help="Number of images on which to try other common normalisations too; 0: none.",
)
@json_option
def command(
    source: str,
    teachers: tuple[str, ...],
    classes: Path | None,
    device: str,
    precision: str,
    ensemble: Any,
    limit: int,
    diagnose: int,
    as_json: bool,
) -> int:
    """Check on the images of SOURCE, whose classes are known, that each teacher is set up correctly.

    Prints top-1 and top-5 accuracy and the expected calibration error (ECE) of each teacher and of the ensemble on
    central crops. Warns where a teacher is near chance, far below its published accuracy, or better under another
    normalisation.
    """
    from ferkd_data.builder import Resources
    from ferkd_data.evaluate import evaluate

    require_teachers(teachers)
    result = evaluate(
        source,
        teachers=teachers,
        classes=classes,
        ensemble=ensemble,
        device=Resources(device=device).resolved_device(),
        precision=precision,
        limit=limit,
        diagnose=diagnose,
    )
    if as_json:
        print_json(asdict(result))
        return 0
    # The scores alone on stdout; all remarks go to stderr, so that a pipe gets a table.
    click.echo(f"{'images':>6}  {'top-1':>6}  {'top-5':>6}  {'ECE':>6}  {'published':>9}  teacher")
    for score in result.scores:
        published = "" if score.published_top1 is None else percent(score.published_top1)
        say(
            f"{score.images:>6}  {percent(score.top1):>6}  {percent(score.top5):>6}  {score.ece:>6.3f}  "
            f"{published:>9}  {score.name}"
        )
    for warning in result.warnings:
        say(f"warning: {warning}", err=True)
    for note in result.notes:
        say(f"note: {note}", err=True)
    if result.unlabelled:
        say(f"note: {count(result.unlabelled, 'image')} without ground truth were left out", err=True)
    if result.left_out:
        say(f"left out: {left_out(result.left_out)}", err=True)
    if result.rejects:
        say(f"warning: {count(result.rejects, 'image')} could not be used", err=True)
    return 0
