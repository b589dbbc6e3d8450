"""The report in a real browser: it runs, sends nothing, and its numbers are right."""

from __future__ import annotations

import base64
import itertools
import os
from pathlib import Path

import numpy as np
import pytest

import ferkd_data as fd
from ferkd_data.calibration import crop_buckets
from ferkd_data.labels.buckets import BUCKETS

ARTEFACTS = os.environ.get("FERKD_DATA_SCREENSHOTS")


def screenshot(browser, name: str) -> None:
    """Save a picture of the page where FERKD_DATA_SCREENSHOTS names a folder."""
    if ARTEFACTS:
        found = browser.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        Path(ARTEFACTS).mkdir(parents=True, exist_ok=True)
        (Path(ARTEFACTS) / f"{name}.png").write_bytes(base64.b64decode(found["data"]))


@pytest.mark.parametrize("width", [1440, 360])
@pytest.mark.parametrize("dark", [False, True])
def test_it_opens_without_a_complaint_and_sends_nothing(browser, page, width, dark):
    browser.open(page, width=width, dark=dark)
    assert browser.complaints() == []
    assert {url.split(":")[0] for url in browser.requests()} <= {"file", "data"}
    assert browser.run("return document.documentElement.scrollWidth") <= width
    paper = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is not dark
    broken = "return [...document.images].filter(i => !i.complete || i.naturalWidth === 0).length"
    assert browser.run("return document.images.length") > 50 and browser.run(broken) == 0
    screenshot(browser, f"report-{width}-{'dark' if dark else 'light'}")


def test_hostile_names_are_text(browser, page):
    browser.open(page)
    text = browser.run("return document.body.textContent")
    for name in ("<script>window.hacked=1", "onerror='window.hacked=1'>", "{{ 7 * 7 }}", "</title><!-- ]]>"):
        assert name in text
    assert browser.run("return window.hacked") is None
    assert browser.run("return document.scripts.length") == 2
    assert browser.run("return document.querySelectorAll('[onerror]').length") == 0


def test_the_policy_keeps_scripts_of_others_from_running(browser, page):
    browser.open(page)
    browser.run(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s);"
        "const i = new Image(); i.src = 'https://example.invalid/x.png'; document.body.append(i)"
    )
    assert browser.run("return window.hacked") is None
    refused = " ".join(browser.complaints())
    assert "script-src" in refused and "img-src" in refused


def bucket_rows(browser) -> list[list[str]]:
    return browser.run(
        "return [...document.querySelectorAll('#buckets tbody tr')]"
        ".map(r => [...r.querySelectorAll('td')].slice(0, 3).map(c => c.textContent))"
    )


def expected_rows(labels: fd.LabelSet, thresholds: fd.Thresholds) -> list[list[str]]:
    """Count by `crop_buckets` on the labels themselves."""
    counts = np.zeros((3, len(BUCKETS)), np.int64)
    for shard in labels.shards():
        calibration = fd.Calibration(thresholds=thresholds)
        bucket = crop_buckets(calibration, shard.bucket, shard.class_prob, shard.target_prob)
        known = np.broadcast_to(shard.target[:, None] >= 0, bucket.shape)
        right = shard.class_index[..., 0] == shard.target[:, None]
        for row, mask in enumerate((bucket >= 0, known, right)):
            counts[row] += np.bincount(bucket[mask], minlength=len(BUCKETS))
    total = counts[0].sum()
    return [
        [f"{crops:,}", f"{100 * crops / total:.2f}", f"{100 * right / known:.1f}" if known else "\u2013"]
        for crops, known, right in counts.T.tolist()
    ]


@pytest.mark.parametrize(
    ("low", "mid", "top", "confidence"),
    [
        (0.25, 0.4, 0.8, "max"),
        (0.3, 0.5, 0.9, "max"),
        (0.123, 0.333, 0.987, "target"),
        (0, 0, 1, "max"),
        (1, 1, 1, "max"),
    ],
)
def test_sliders_say_what_crop_buckets_says(browser, page, hostile_labels, low, mid, top, confidence):
    browser.open(page)
    browser.run(
        "const e = document.getElementById('which'); e.value = arguments[0];"
        "e.dispatchEvent(new Event('change', {bubbles: true}))",
        confidence,
    )
    for name, value in (("top", top), ("low", low), ("mid", mid)):
        browser.set(f"{name}-number", value)
    thresholds = fd.Thresholds(low=low, mid=mid, top=top, confidence=confidence)
    assert bucket_rows(browser) == expected_rows(fd.open_labels(hostile_labels), thresholds)
    line = browser.run("return document.getElementById('line').textContent")
    assert eval(line, {"fd": fd}) == fd.Calibration(thresholds=thresholds)
    option = browser.run("return document.getElementById('option').textContent")
    assert option == f"--thresholds {low} {mid} {top}" + (" --confidence target" if confidence == "target" else "")


@pytest.mark.parametrize("confidence", ["max", "target"])
def test_thresholds_between_two_steps_of_the_sliders_are_exact(browser, photos, tiny_teachers, confidence, tmp_path):
    """Those of quantiles were rounded to a thousandth: the page named other shares, and other thresholds to copy."""
    thresholds = fd.QuantileThresholds(low=0.1, mid=0.3, top=0.6, confidence=confidence)
    fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], crops=10, thresholds=thresholds, device="cpu")
    labels = fd.open_labels(tmp_path / "out")
    browser.open(fd.write_report(labels, tmp_path / "report.html").path)
    stored = labels.manifest.thresholds.absolute()
    assert any(value * 1000 % 1 for value in (stored.low, stored.mid, stored.top))
    for _ in range(2):
        assert bucket_rows(browser) == expected_rows(labels, stored)
        line = browser.run("return document.getElementById('line').textContent")
        assert eval(line, {"fd": fd}) == fd.Calibration(thresholds=stored)
        browser.run("document.getElementById('use-suggested').click()")
        browser.run("document.getElementById('use-stored').click()")


def test_sliders_push_each_other_and_show_crops_that_move(browser, page):
    browser.open(page)
    shown = "return document.querySelectorAll('#moved li').length"
    assert browser.run(shown) == 0
    browser.set("low", 0.6)
    values = browser.run("return ['low', 'mid', 'top'].map(i => document.getElementById(i).valueAsNumber)")
    assert values == [0.6, 0.6, 0.8]
    assert browser.run(shown) > 0
    assert browser.run("return document.querySelectorAll('#moved img').length") > 0
    assert "extreme hard" in browser.run("return document.getElementById('live').textContent")
    browser.run("document.getElementById('use-stored').click()")
    assert browser.run(shown) == 0


def test_crops_that_change_bucket_are_hidden_until_a_threshold_moves(browser, page):
    browser.open(page)
    hidden = "return document.getElementById('changes').hidden"
    assert browser.run(hidden)
    browser.set("low", 0.3)
    assert not browser.run(hidden)
    browser.run("document.getElementById('use-stored').click()")
    assert browser.run(hidden)


@pytest.mark.parametrize("width", [360, 1280])
def test_every_column_of_the_main_tables_is_on_the_screen(browser, page, width):
    browser.open(page, width=width)
    tables = browser.run(
        "return ['#glance table', '#buckets', '#thresholds table'].map(s => { const t = document.querySelector(s);"
        "return [...t.tBodies[0].rows].map(r => { const full = [...r.cells].filter(c => c.textContent.trim());"
        "const c = full[full.length - 1].getBoundingClientRect();"
        "return c.width > 0 && c.left >= 0 && c.right <= window.innerWidth; }); })"
    )
    assert all(rows and all(rows) for rows in tables)
    empty = (
        "return [...document.querySelectorAll('#glance td')].filter(c => !c.textContent.trim()).map(c => c.offsetWidth)"
    )
    assert {bool(cell) for cell in browser.run(empty)} == {width != 360}, "cards leave out empty cells"
    label = "return getComputedStyle(document.querySelector('#buckets td'), '::before').content"
    assert (browser.run(label) == '"crops"') is (width == 360)


def test_a_slider_moves_by_keyboard(browser, page):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    browser.open(page)
    slider = browser.driver.find_element("id", "low")
    slider.send_keys(keys.ARROW_RIGHT)
    assert browser.run("return document.getElementById('low-number').value") == "0.255"


def test_tables_sort(browser, page):
    browser.open(page)
    column = (
        "return [...document.querySelectorAll('table.sortable')[0].tBodies[0].rows]"
        ".map(r => Number(r.cells[arguments[0]].dataset.value))"
    )
    for number in (1, 2, 3):
        press = "document.querySelectorAll('table.sortable')[0].querySelectorAll('thead button')[arguments[0]].click()"
        browser.run(press, number)
        rising = browser.run(column, number)
        assert rising == sorted(rising) and len(rising) == 10
        browser.run(press, number)
        assert browser.run(column, number) == rising[::-1]
        state = "return document.querySelectorAll('table.sortable')[0].querySelectorAll('th[aria-sort]').length"
        assert browser.run(state) == 1


def test_every_chart_has_a_name_and_a_table(browser, page):
    browser.open(page)
    figures = browser.run(
        "return [...document.querySelectorAll('figure')].map(f => [!!f.querySelector('svg[role=img][aria-label]'),"
        "!!(f.querySelector('table') || f.closest('#play').querySelector('table'))])"
    )
    assert len(figures) > 8 and all(all(figure) for figure in figures)
    assert browser.run("return [...document.images].every(i => i.alt)")
    labelled = "return [...document.querySelectorAll('input, select')].every(i => i.labels.length || i.ariaLabel)"
    assert browser.run(labelled)
    levels = browser.run("return [...document.querySelectorAll('h1,h2,h3,h4,h5')].map(h => Number(h.tagName[1]))")
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_it_prints(browser, page):
    browser.open(page, dark=True)
    printed = browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert base64.b64decode(printed["data"])[:5] == b"%PDF-"
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert browser.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_the_doubtful_images_can_be_saved(browser, page):
    browser.open(page)
    link = browser.run("return document.querySelector('a[download]')?.href")
    assert link is None or link.startswith("data:text/csv;")
