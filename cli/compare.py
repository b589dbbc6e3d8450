"""`ferkd-data compare`"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from ferkd_data.words import percent

from .display import show_images
from .options import json_option, print_json
from .terminal import say


@click.command()
@click.argument("a")
@click.argument("b")
@click.option(
    "--examples",
    type=click.IntRange(min=0),
    metavar="N",
    default=5,
    show_default=True,
    help="Number of the most different crops to show.",
)
@json_option
def command(a: str, b: str, examples: int, as_json: bool) -> int:
    """Compare two label sets of the same images, A and B, that differ in teachers, thresholds or crops.

    Compares the crops that both label sets have: the same box of the same image, with the same flip and recorded
    operations. The KL divergence is that of B's soft label from A's, in nats; 0 means equal labels.
    """
    import ferkd_data as fd

    # Opened before the display starts, so that a wrong path is one line of error.
    first, second = fd.open_labels(a), fd.open_labels(b)
    with show_images("compare") as on_progress:
        result = fd.compare(first, second, examples=examples, on_progress=on_progress)
    if as_json:
        print_json(asdict(result))
        return 0
    _print_counts(result)
    if result.crops:
        _print_labels(result)
        _print_moves(result)
        _print_examples(result, first.class_names or second.class_names)
    return 0


def _print_counts(result: Any) -> None:
    say(f"images in both       {result.images:>12,}   only in A {result.only_a:,}, only in B {result.only_b:,}")
    say(f"crops in both        {result.crops:>12,}   drawn otherwise {result.other_crops:,}")


def _print_labels(result: Any) -> None:
    say(f"same class first     {percent(result.same_top1):>12}")
    say(f"mean KL divergence   {result.mean_kl:>12.4f}   nats, of B from A")
    say(f"\n{'':<20} {'A':>12} {'B':>12}")
    say(f"{'mean p_max':<20} {result.mean_p_max_a:>12.3f} {result.mean_p_max_b:>12.3f}")
    if result.right_a is None:
        say("the ground truth is unknown for every image")
        return
    say(f"{'right':<20} {percent(result.right_a):>12} {percent(result.right_b):>12}")
    say(f"{'right alone':<20} {percent(result.only_a_right):>12} {percent(result.only_b_right):>12}")


def _print_moves(result: Any) -> None:
    from ferkd_data.labels.buckets import BUCKETS

    say("\ncrops by bucket, A's down, B's across (each by its own thresholds)")
    say(f"{'':<16}" + "".join(f"{name:>15}" for name in BUCKETS))
    for name, row in zip(BUCKETS, result.bucket_moves, strict=True):
        say(f"{name:<16}" + "".join(f"{count:>15,}" for count in row))


def _print_examples(result: Any, names: tuple[str, ...] | None) -> None:
    if result.most_different:
        say("\ncrops that differ most, at most one of an image")
    for found in result.most_different:
        a, b, truth = (_name(names, number) for number in (found.named_a, found.named_b, found.target))
        say(f"  KL {found.kl:>6.2f}  {found.key} crop {found.crop} (truth: {truth})")
        say(f"             A: {a} {found.p_max_a:.2f}, B: {b} {found.p_max_b:.2f}")


def _name(names: tuple[str, ...] | None, number: int) -> str:
    if number < 0:
        return "unknown"
    from ferkd_data.report.tables import short_names

    return short_names(names)[number] if names else f"class {number}"
