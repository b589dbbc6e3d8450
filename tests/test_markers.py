"""The markers name files that exist."""

from __future__ import annotations

from pathlib import Path

import markers


def test_marked_files_exist():
    for name in markers.SLOW | markers.NETWORK:
        assert (Path(__file__).parent / f"{name}.py").exists(), name


def test_markers_follow_the_file():
    assert markers.markers_of("rooms/builder/test_ray", []) == ["slow", "ray"]
    assert markers.markers_of("golden/test_golden", []) == []
    assert markers.markers_of("rooms/loader/test_device_decode", ["needs a GPU"]) == ["gpu"]
