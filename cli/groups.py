"""A command whose `--help` shows its options in groups, and that knows when a shell has expanded a pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

TEACHERS = "Teachers and classes"
LABELS = "Crops and labels"
FILES = "What is written"
MACHINE = "This machine"
CLUSTER = "Clusters and batch systems"
WATCHING = "Looking on"
OTHERS = "Options"
HEADINGS = (TEACHERS, LABELS, FILES, MACHINE, CLUSTER, WATCHING, OTHERS)
"""In the order of `--help`."""


class GroupedOption(click.Option):
    """An option with the heading that it stands under."""

    def __init__(self, *names: Any, group: str = OTHERS, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.group = group


class GroupedCommand(click.Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)  # click takes them out of the list
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            files = [arg for arg in given if arg.endswith((".tar", ".parquet")) and Path(arg).is_file()]
            if "unexpected extra argument" not in error.message or len(files) < 2:
                raise
            raise click.UsageError(
                f"the shell made {len(files)} names of a pattern in SOURCE; put the pattern in quotes, such as "
                f"'{_pattern(files)}'",
                ctx,
            ) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", OTHERS), []).append(record)
        for heading in HEADINGS:
            if heading in groups:
                with formatter.section(heading):
                    formatter.write_dl(groups[heading])


def _pattern(files: list[str]) -> str:
    """What names them all: data/train-*.tar."""
    start = files[0]
    while not all(file.startswith(start) for file in files):
        start = start[:-1]
    return f"{start}*{Path(files[0]).suffix}"
