"""The public names have types: a checker of a user's code finds a wrong call, and takes a right one."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import ferkd_data as fd
from ferkd_data.builder.settings import SettingsKeywords

ROOT = Path(fd.__file__).parent.parent

RIGHT = """
import ferkd_data as fd

result = fd.build("photos", "out", teachers=["timm:resnet18"], crops=100, device="cpu", layout="parquet")
images: int = result.manifest.num_images
labels = fd.open_labels("out", crops=50)
loader = fd.CropLoader(labels, images="photos", batch_size=64, calibration=fd.Calibration(epsilon=0.2))
for batch, targets in loader:
    loss = fd.soft_cross_entropy(batch.float(), targets, reduction="sum").item()
"""

WRONG = {
    'fd.build("a", 3, teachers=["x"])': "arg-type",
    'fd.build("a", "b", teechers=["x"])': "call-arg",
    'fd.build("a", "b", crops="many")': "typeddict-item|arg-type",
    "fd.nonexistent": "attr-defined",
    'fd.open_labels("a").no_such_thing': "attr-defined",
    "fd.Thresholds(low=None)": "arg-type",
    "fd.soft_cross_entropy(1, 2)": "arg-type",
}


def mypy(code: str, folder: Path) -> str:
    script = folder / "user.py"
    script.write_text(code)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml", str(script)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout


def test_right_calls_pass_and_wrong_ones_do_not(tmp_path):
    said = mypy(RIGHT + "\n" + "\n".join(WRONG), tmp_path)
    first = RIGHT.count("\n") + 2
    for number, (call, codes) in enumerate(WRONG.items(), first):
        line = next((line for line in said.splitlines() if f"user.py:{number}: error" in line), "nothing")
        assert any(f"[{code}]" in line for code in codes.split("|")), f"{call}: {line}\n{said}"
    assert not [line for line in said.splitlines() if "error: " in line and int(line.split(":")[1]) < first], said


def test_type_checkers_see_the_names_that_exist():
    tree = ast.parse(Path(fd.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {
        alias.name: (node.module or "").removeprefix("ferkd_data.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == fd._EXPORTS


def test_the_keywords_of_build_are_the_fields_of_its_settings():
    declared = {field.name: field.type for kind in (fd.BuildSettings, fd.Resources) for field in fields(kind)}
    keywords = {name: value.__forward_arg__ for name, value in SettingsKeywords.__annotations__.items()}
    assert keywords == declared
