"""`ferkd-data publish`"""

from __future__ import annotations

from pathlib import Path

import click

from .say import say
from .transfers import show_bytes


@click.command()
@click.argument("labels", type=click.Path(path_type=Path))
@click.argument("url")
@click.option("--name", help="How the label set is called.  [default: the folder's name]")
@click.option(
    "--license", "license_", required=True, help="Of the labels: an SPDX identifier such as cc-by-4.0, or other."
)
@click.option("--image-license", help="Of the images, where the label set holds them (layout webdataset).")
@click.option("--author", help="Who publishes it.")
@click.option("--homepage", help="Where to read more.")
@click.option("--citation", help="How to cite it: BibTeX or a sentence.")
@click.option("--sign", "sign_with", type=click.Path(path_type=Path), help="An OpenSSH key to sign the manifest with.")
@click.option("--workers", type=click.IntRange(min=1), default=4, show_default=True, help="Files sent at once.")
@click.option("--overwrite", is_flag=True, help="Replace another label set that lies at URL.")
@click.option("--dry-run", is_flag=True, help="Print what would be sent.")
def command(
    labels: Path,
    url: str,
    name: str | None,
    license_: str,
    image_license: str | None,
    author: str | None,
    homepage: str | None,
    citation: str | None,
    sign_with: Path | None,
    workers: int,
    overwrite: bool,
    dry_run: bool,
) -> int:
    """Send the label set in the folder LABELS to URL: a folder, s3://BUCKET/PATH, gs://BUCKET/PATH, or
    hf://datasets/ORG/NAME, which is made if need be.

    The label set is verified first. The digest of each file that arrived is compared; the manifest goes last. Run the
    same command again after an interruption: what arrived is not sent again.
    """
    import ferkd_data as fd

    card = fd.CardFields(
        name=name or labels.resolve().name,
        license=license_,
        image_license=image_license,
        author=author,
        homepage=homepage,
        citation=citation,
    )
    with show_bytes("publish") as on_progress:
        result = fd.publish(
            labels,
            url,
            card=card,
            sign_with=sign_with,
            workers=workers,
            overwrite=overwrite,
            dry_run=dry_run,
            on_progress=on_progress,
        )
    if dry_run:
        for file in result.sent:
            say(f"{file.bytes:>14,}  {file.name}")
    verb = "would be sent" if dry_run else "sent"
    say(f"{url}: {len(result.sent)} files, {result.bytes / 1e6:,.2f} MB {verb}, {result.skipped} were there already")
    return 0
