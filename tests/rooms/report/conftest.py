"""Fixtures: a label set with hostile names and faults of every kind, and a real browser for its report."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import ferkd_data as fd

HOSTILE = (
    "<script>window.hacked=1<\u2215script>",
    "\"><img src=x onerror='window.hacked=1'>",
    "\u202egnp.exe\u202c & <b>",
    "{{ 7 * 7 }}{% for x in y %}",
    "</title><!-- ]]> ${1} `x`",
)
"""Hostile names of classes. Keys have another character in place of the slash, which would make a folder."""


@pytest.fixture(scope="session")
def hostile_photos(tmp_path_factory: pytest.TempPathFactory, make_photos) -> Path:
    """30 photos in 10 class folders, with hostile keys, a copy under another class, a tiny one and a broken one."""
    folder = make_photos(tmp_path_factory.mktemp("hostile"), num_images=30)
    for number, name in enumerate(HOSTILE):
        key = name.replace("/", "\u2215").replace(".", "\u2024")
        photo = folder / f"class{number}" / f"photo{number:04d}.jpg"
        photo.rename(photo.with_name(f"{key}.jpg"))
    shutil.copyfile(folder / "class5/photo0005.jpg", folder / "class6/copy.jpg")
    (folder / "class7/broken.jpg").write_bytes((folder / "class7/photo0007.jpg").read_bytes()[:300])
    return folder


@pytest.fixture(scope="session")
def hostile_labels(tmp_path_factory: pytest.TempPathFactory, hostile_photos: Path, tiny_teachers: str) -> Path:
    """Label set of the hostile photos: 31 images, 12 crops, 2 teachers, hostile class names."""
    out = tmp_path_factory.mktemp("hostile-labels") / "out"
    classes = out.parent / "classes.txt"
    names = [*HOSTILE, *(f"plain {number}" for number in range(5, 10))]
    classes.write_text("".join(f"class{number}\t{name}\n" for number, name in enumerate(names)), encoding="utf-8")
    teachers = [tiny_teachers, "python:ferkd_tiny_teachers:second"]
    fd.build(
        hostile_photos, out, teachers=teachers, classes=classes, crops=12, crops_per_block=5, top_k=4,
        images_per_shard=8, device="cpu", thresholds=fd.Thresholds(low=0.25, mid=0.4, top=0.8),
    )  # fmt: skip
    return out


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory, hostile_labels: Path, hostile_photos: Path) -> Path:
    """Report of the hostile label set, with pictures."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    fd.write_report(hostile_labels, path, images=hostile_photos)
    return path


class Browser:
    """A headless Chromium that records requests and errors of its page."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, path: Path, *, width: int = 1280, dark: bool = False) -> None:
        self.driver.get_log("performance"), self.driver.get_log("browser")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        self.driver.get(path.as_uri())

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def requests(self) -> list[str]:
        """List the URLs requested since `open`."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """List the messages in the console."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def set(self, element: str, value: float) -> None:
        """Move a slider, or write into a number's field, as a person does."""
        self.run(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', {bubbles: true}))",
            element,
            value,
        )


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    selenium = pytest.importorskip("selenium.webdriver")
    program, helper = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or helper is None:
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = program
    profile = tmp_path_factory.mktemp("profile")
    # Chromium refuses its sandbox to root, and a container's /dev/shm is small.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = selenium.ChromeService(helper, log_output=os.devnull)
    driver = selenium.Chrome(options=options, service=service)
    driver.set_script_timeout(60)
    # Leave Chromium's own start page, whose chrome:// requests would be taken for the report's.
    driver.get("about:blank")
    yield Browser(driver)
    driver.quit()
