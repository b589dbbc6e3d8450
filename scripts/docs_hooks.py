"""Hooks of the docs site (mkdocs.yml): README.md is its front page, links out of docs/ become plain file names, and the
page of the command line gets the help texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
HELP = "<!-- help: the site prints each command's --help here -->"
OUTSIDE = re.compile(r"\[([^\]]*)\]\((\.\./[^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Make the front page from README.md, so that it is written once; unlink files that the site does not have."""
    if page.file.src_uri == "index.md":
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        markdown = readme.replace("](docs/", "](")
        return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:)([^)#]*?(?<!\.md)|SECURITY\.md)\)", r"\1 (`\2`)", markdown)
    markdown = markdown.replace(HELP, _help_texts() if HELP in markdown else "")
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def unlinked(link: re.Match[str]) -> str:
        if (folder / link[2]).resolve().is_relative_to(ROOT / "docs"):
            return link[0]
        return f"{link[1]} (`{link[2].replace('../', '')}`)"

    return OUTSIDE.sub(unlinked, markdown)


def _help_texts() -> str:
    """Return the help of all commands as one section each."""
    import click

    from ferkd_data_cli.main import COMMANDS, cli

    sections = []
    with click.Context(cli, info_name="ferkd-data", max_content_width=100) as group:
        for name in COMMANDS:
            command = cli.get_command(group, name)
            with click.Context(
                command, info_name=name, parent=group, max_content_width=100, terminal_width=100
            ) as context:
                sections.append(f"## {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(sections)
