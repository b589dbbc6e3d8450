"""`ferkd-data stats`"""

from __future__ import annotations

from typing import Any

import click

from ferkd_data.words import in_percent, percent

from .options import json_option, print_json
from .terminal import say, say_table

SHARES = ("share", "aggregate", "paper_share")
WEAK = 0.75
"""Share of crops named rightly below which a hint says so. Measured at 0.65: benchmarks/teach."""


@click.command()
@click.argument("labels")
@click.option(
    "--classes",
    "num_worst",
    type=click.IntRange(min=0),
    metavar="N",
    default=5,
    show_default=True,
    help="Number of worst classes to show.",
)
@json_option
def command(labels: str, num_worst: int, as_json: bool) -> int:
    """Print statistics of the label set LABELS, a folder or a URL.

    The tables show the crops by p_max (the largest probability of a soft label) and by bucket, how often the teachers
    are right and agree with each other, the worst classes, and each crop kind's buckets.
    """
    import ferkd_data as fd
    from ferkd_data.labels.statistics import count_agreement, summarise

    opened = fd.open_labels(labels)
    # Not in the manifest: how often the teachers are right by class and by bucket. It takes a pass over the labels.
    agreement = count_agreement(opened.shards())
    worst = agreement.by_class[:num_worst]
    summary = summarise(opened.manifest.statistics)
    for bucket, right in zip(summary["buckets"].values(), agreement.by_bucket, strict=True):
        bucket["right"] = None if right is None else 100 * right
    by_kind = {kind.name: summarise(opened.crop_kind(kind.name).statistics) for kind in opened.crop_kinds}
    if by_kind:
        summary["crop_kinds"] = by_kind
    if as_json:
        print_json({**summary, "worst_classes": [_class_entry(opened, row) for row in worst]})
        return 0
    print_statistics(summary, [teacher.name for teacher in opened.manifest.teachers])
    if by_kind:
        _print_kinds(by_kind)
    if worst:
        say("\nclasses that the teachers get right least often")
        entries = [_class_entry(opened, row) for row in worst]
        rows = [[percent(entry["agreement"]), f"{entry['crops']:,}", entry["name"]] for entry in entries]
        say_table(["right", "crops", "class"], rows, indent=2)
    return 0


def print_statistics(summary: dict[str, Any], teacher_names: list[str]) -> None:
    """Print the p_max table with the paper's shares, the buckets, and the agreement of the teachers."""
    rows = [
        [
            f"{row['low']:.2f}-{row['high']:.2f}",
            f"{row['crops']:,}",
            *(in_percent(row[name] / 100, 2) for name in SHARES),
        ]
        for row in summary["p_max"]
    ]
    say_table(["p_max", "crops", "share %", "aggregate %", "FerKD paper %"], rows)
    say("")
    counted = summary["crops_with_target"] and all("right" in one for one in summary["buckets"].values())
    rows = [
        [name, f"{one['crops']:,}", in_percent(one["share"] / 100, 2), *([_percent(one["right"])] if counted else [])]
        for name, one in summary["buckets"].items()
    ]
    say_table(["bucket", "crops", "share %", *(["right %"] if counted else [])], rows)
    if summary["crops_with_target"]:
        say(
            f"\nthe ground truth is the most probable class of {percent(summary['agreement_with_target'])} of the crops"
        )
        say(f"its mean probability is {summary['mean_target_prob']:.3f}")
    else:
        say("\nthe ground truth is unknown for every image")
    say(f"the stored top-k classes hold {percent(summary['mean_kept_prob'])} of the probability")
    if summary["crops_with_target"] and summary["agreement_with_target"] < WEAK:
        say(
            "hint: a student trained on such labels alone may do worse than one trained on the ground truth; "
            'compare CropLoader(calibration="blend") (docs/evidence.md)'
        )
    _print_teachers(summary, teacher_names)


def _print_kinds(by_kind: dict[str, dict[str, Any]]) -> None:
    """Print a row for each crop kind: its crops, its buckets in percent, and how often the ground truth comes first."""
    known = all(summary["crops_with_target"] for summary in by_kind.values())
    buckets = list(next(iter(by_kind.values()))["buckets"])
    say("\nby crop kind")
    rows = [
        [
            name,
            f"{summary['crops']:,}",
            *(in_percent(summary["buckets"][bucket]["share"] / 100, 2) for bucket in buckets),
            *([percent(summary["agreement_with_target"])] if known else []),
        ]
        for name, summary in by_kind.items()
    ]
    heads = ["kind", "crops", *(f"{bucket} %" for bucket in buckets), *(["right"] if known else [])]
    say_table(heads, rows, indent=2)


def _percent(value: float | None) -> str:
    # The column's title has the unit.
    return "" if value is None else in_percent(value / 100)


def _print_teachers(summary: dict[str, Any], names: list[str]) -> None:
    agreement, alone = summary["teacher_agreement"], summary["teacher_agreement_with_target"]
    if len(agreement) < 2:
        return
    say(
        "\nteachers: share of crops on which two name the same most probable class"
        + ("; share on which each is right" if alone else "")
    )
    rows = [
        [f"{a + 1}", name, *map(percent, agreement[a]), *([percent(alone[a])] if alone else [])]
        for a, name in enumerate(names)
    ]
    numbers = [f"as {number + 1}" for number in range(len(names))]
    say_table(["", "teacher", *numbers, *(["right"] if alone else [])], rows, indent=2)


def _class_entry(labels: Any, row: tuple[int, int, float]) -> dict[str, Any]:
    number, crops, agreement = row
    name = labels.class_names[number] if labels.class_names else str(number)
    return {"class": number, "name": name, "crops": crops, "agreement": agreement}
