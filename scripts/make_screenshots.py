"""The pictures in docs/report.md, taken of a report in Debian's Chromium:

    python scripts/make_screenshots.py labels

Only what is drawn from labels is shown, no photo: whoever has a label set may not have the right to publish its photos.
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver

import ferkd_data as fd

DOCS = Path(__file__).parent.parent / "docs" / "images"
MAX_BYTES = 300_000
SHOTS = (
    ("report-thresholds", 1120, "light", "thresholds", 1600),
    ("report-confidence", 1120, "dark", "confidence", 720),
    ("report-phone", 360, "light", "glance", 900),
)
"""Name, width, mode, section, height at most."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels")
    options = parser.parse_args()
    DOCS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "report.html"
        fd.write_report(options.labels, page)
        browser = open_browser()
        try:
            for name, width, mode, section, height in SHOTS:
                shoot(browser, page, DOCS / f"{name}.png", width=width, mode=mode, section=section, height=height)
        finally:
            browser.quit()


def open_browser() -> Any:
    """A headless Chromium."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def shoot(browser: Any, page: Path, out: Path, *, width: int, mode: str, section: str, height: int) -> None:
    """Write a section of the page as a PNG file of few colours."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": mode}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())
    browser.execute_script("document.getElementById('use-suggested').click()")
    find = "const r = document.getElementById(arguments[0]).getBoundingClientRect(); return [r.top + scrollY, r.height]"
    top, whole = browser.execute_script(find, section)
    # The first section is shown with the title above it.
    top = 0 if section == "glance" else top
    clip = {"x": 0, "y": top, "width": width, "height": min(height, whole + top), "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(out, optimize=True)
    if out.stat().st_size > MAX_BYTES:
        raise SystemExit(f"{out}: {out.stat().st_size} bytes are more than {MAX_BYTES}")
    print(f"{out}: {picture.width}x{picture.height}, {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
