"""`ferkd-data finish`"""

from __future__ import annotations

from pathlib import Path

import click

from .build import print_result, status_of
from .options import json_option


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@json_option
def command(out: Path, as_json: bool) -> int:
    """Complete the label set OUT, whose parts were labelled by `ferkd-data build --part I/N`.

    Needs neither the images nor the teachers. If shards are missing, names them and the parts to run again.
    """
    from ferkd_data.builder import finish

    result = finish(out)
    print_result(result, as_json)
    return status_of(result)
