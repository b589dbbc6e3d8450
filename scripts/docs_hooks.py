"""Hooks of the docs site (mkdocs.yml): README.md is its front page, and links out of docs/ become plain file names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"\[([^\]]*)\]\((\.\./[^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Make the front page from README.md, so that it is written once; unlink files that the site does not have."""
    if page.file.src_uri == "index.md":
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        markdown = readme.replace("](docs/", "](")
        return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:)([^)#]*?(?<!\.md)|SECURITY\.md)\)", r"\1 (`\2`)", markdown)
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def unlinked(link: re.Match[str]) -> str:
        if (folder / link[2]).resolve().is_relative_to(ROOT / "docs"):
            return link[0]
        return f"{link[1]} (`{link[2].replace('../', '')}`)"

    return OUTSIDE.sub(unlinked, markdown)
