"""Render a report's content as one HTML file that needs nothing else and may do nothing else.

The file's Content-Security-Policy allows exactly its own style sheet and script, by their digests, and pictures that it
carries with it. So nothing is fetched or sent, and a string out of a hostile label set could not run even if it were
not escaped, which every one is.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import ferkd_data
from ferkd_data import extras
from ferkd_data.storage import write_atomically

SECTIONS = (
    ("glance", "At a glance"),
    ("confidence", "How sure"),
    ("thresholds", "Thresholds"),
    ("places", "Where crops lie"),
    ("sheets", "Crops by bucket"),
    ("suspects", "Doubtful ground truth"),
    ("classes", "Classes"),
    ("teachers", "Teachers"),
    ("quality", "Data quality"),
    ("student", "What a student sees"),
    ("words", "Words"),
)


def render(name: str, content: dict[str, Any], data: Any = None, *, script: str = "") -> str:
    """The HTML of the template `NAME.html.j2`; `data` is what its script, a file's name or none, reads.

    Raises MissingExtraError without the extra `report`.
    """
    jinja2 = extras.require("jinja2", extra="report", what_for="a report")
    markup = extras.require("markupsafe", extra="report", what_for="a report").Markup
    style, code = asset("report.css"), asset(script) if script else ""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(asset(f"{name}.html.j2"))
    text: str = template.render(
        **content,
        version=ferkd_data.__version__,
        policy=policy(style, code),
        style=markup(style),
        script=markup(code),
        data=markup(inert_json(data)),
    )
    return text


def asset(name: str) -> str:
    """A file beside this module."""
    return (resources.files("ferkd_data.report") / "assets" / name).read_text(encoding="utf-8")


def policy(style: str, script: str) -> str:
    """The page's Content-Security-Policy."""
    return "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"style-src '{_digest(style)}'",
            f"script-src '{_digest(script)}'" if script else "script-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def inert_json(data: Any) -> str:
    """JSON that cannot end the element which holds it, whatever its strings are."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_page(path: Path, text: str) -> None:
    """Aside and renamed, so that a browser never loads half a file. Raises StorageFullError."""
    with write_atomically(path) as aside:
        aside.write_text(text, encoding="utf-8")
