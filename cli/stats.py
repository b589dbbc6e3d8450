"""`ferkd-data stats`"""

from __future__ import annotations

from typing import Any

import click

from .options import json_option, print_json
from .say import say


@click.command()
@click.argument("labels")
@click.option("--classes", "num_worst", type=int, default=5, show_default=True, help="Worst classes shown.")
@json_option
def command(labels: str, num_worst: int, as_json: bool) -> int:
    """The p_max table, buckets, agreements and worst classes of the label set LABELS."""
    import ferkd_data as fd
    from ferkd_data.statistics import per_class_agreement, summarise

    opened = fd.open_labels(labels)
    worst = per_class_agreement(opened.shards())[:num_worst]
    summary = summarise(opened.manifest.statistics)
    if as_json:
        print_json({**summary, "worst_classes": [_class_entry(opened, row) for row in worst]})
        return 0
    print_statistics(summary, [teacher.name for teacher in opened.manifest.teachers])
    if worst:
        say("\nclasses whose crops are least often named right")
        for entry in (_class_entry(opened, row) for row in worst):
            say(f"  {entry['agreement']:>6.1%}  {entry['crops']:>8,} crops  {entry['name']}")
    return 0


def print_statistics(summary: dict[str, Any], teacher_names: list[str]) -> None:
    say(f"{'p_max':<10} {'crops':>12} {'share %':>8} {'aggregate %':>12} {'FerKD paper %':>14}")
    for row in summary["p_max"]:
        name = f"{row['low']:.2f}-{row['high']:.2f}"
        say(
            f"{name:<10} {row['crops']:>12,} {row['share']:>8.2f} {row['aggregate']:>12.2f} {row['paper_share']:>14.2f}"
        )
    say("\nbucket")
    for name, bucket in summary["buckets"].items():
        say(f"  {name:<14} {bucket['crops']:>12,} {bucket['share']:>8.2f} %")
    if summary["crops_with_target"]:
        say(f"\nthe ground truth is the most probable class of {summary['agreement_with_target']:.1%} of the crops")
        say(f"its mean probability is {summary['mean_target_prob']:.3f}")
    say(f"the stored top-k hold {summary['mean_kept_prob']:.1%} of the probability")
    agreement = summary["teacher_agreement"]
    if len(agreement) > 1:
        say("\nteachers: share of crops on which they name the same class first; alone, the ground truth")
        for a, name in enumerate(teacher_names):
            alone = summary["teacher_agreement_with_target"]
            right = f"{alone[a]:>8.1%}" if alone else ""
            say(f"  {name:<28} " + " ".join(f"{share:>6.1%}" for share in agreement[a]) + f"   {right}")


def _class_entry(labels: Any, row: tuple[int, int, float]) -> dict[str, Any]:
    number, crops, agreement = row
    name = labels.class_names[number] if labels.class_names else str(number)
    return {"class": number, "name": name, "crops": crops, "agreement": agreement}
