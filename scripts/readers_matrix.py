"""Which libraries, old and new, read which columns of a label set: writes the table of readers in docs/format.md.

    python scripts/readers_matrix.py [--folder DIR] [--only duckdb]

Each library is installed at each version into an environment of its own below DIR (default: a temporary folder), from
PyPI and npm by the ordinary clients. Needs `node` for hyparquet and Java for Spark; what is absent is left out of the
table and named. Every value of two block files, one of them large enough to have dictionaries, must be the one written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ferkd_data.format import parquet
from ferkd_data.labels.rows import ShardLabels

ROOT = Path(__file__).parent.parent
READERS = ROOT / "tests" / "clients" / "readers"
DOCUMENT = ROOT / "docs" / "format.md"
BEGIN, END = "<!-- readers -->\n", "<!-- end of readers -->"
WHOLE = "installed"
"""Lies in an environment that was made to its end."""
GROUPS = {
    "key, digest, size, target": ("key", "image_digest", "height", "width", "target"),
    "boxes": parquet.BOX_COLUMNS,
    "flip": ("flip",),
    "class_index": ("class_index",),
    "class_prob, target_prob": parquet.PROB_COLUMNS,
    "bucket": ("bucket",),
}


@dataclass(frozen=True, kw_only=True)
class Library:
    """One library at one version, and what is installed for it."""

    name: str
    reader: str
    packages: tuple[str, ...]
    runtime: str = "python"
    """python, java (Python with Java) or node."""


LIBRARIES = (
    *(
        Library(name="DuckDB", reader="duckdb", packages=(f"duckdb{version}", "numpy"))
        for version in ("==1.0.0", "==1.1.3", "==1.4.5", "==1.5.6", ">=2")
    ),
    Library(name="fastparquet", reader="fastparquet", packages=("fastparquet==2024.11.0", "pandas<3")),
    Library(name="fastparquet", reader="fastparquet", packages=("fastparquet",)),
    *(
        Library(name="Polars", reader="polars", packages=(f"polars{version}",))
        for version in ("==1.0.0", "==1.14.0", "")
    ),
    Library(name="pandas", reader="pandas", packages=("pandas==2.2.3", "pyarrow==18.1.0")),
    Library(name="pandas", reader="pandas", packages=("pandas", "pyarrow")),
    Library(name="PyArrow", reader="pyarrow", packages=("pyarrow==15.0.0", "numpy<2")),
    Library(name="PyArrow", reader="pyarrow", packages=("pyarrow",)),
    Library(name="datasets", reader="datasets", packages=("datasets==3.1.0",)),
    Library(name="datasets", reader="datasets", packages=("datasets",)),
    Library(name="Spark", reader="spark", packages=("pyspark==3.5.3",), runtime="java"),
    Library(name="Spark", reader="spark", packages=("pyspark",), runtime="java"),
    *(
        Library(
            name="hyparquet",
            reader="hyparquet",
            packages=(f"hyparquet{version}", "hyparquet-compressors"),
            runtime="node",
        )
        for version in ("@1.6.0", "")
    ),
)


def block(rows: int, num_crops: int, top_k: int) -> ShardLabels:
    """Random labels with every kind of value: unknown targets, 0, subnormal numbers, boxes of the largest size."""
    generator = np.random.default_rng(0)
    prob = -np.sort(-generator.dirichlet([0.2] * 12, (rows, num_crops)), axis=2)[:, :, :top_k].astype(np.float16)
    target = generator.integers(-1, 10, rows).astype(np.int32)
    target_prob = generator.random((rows, num_crops)).astype(np.float16)
    target_prob[target < 0] = np.nan
    boxes = generator.integers(1, 65536, (rows, num_crops, 4)).astype(np.uint16)
    return ShardLabels(
        keys=[f"class{number % 7}/\u00e9t\u00e9 {number:05d}" for number in range(rows)],
        image_digest=generator.integers(0, 256, (rows, 16)).astype(np.uint8),
        height=generator.integers(1, 65536, rows).astype(np.uint16),
        width=generator.integers(1, 65536, rows).astype(np.uint16),
        target=target,
        boxes=boxes,
        flip=generator.random((rows, num_crops)) < 0.5,
        class_index=generator.integers(0, 65536, (rows, num_crops, top_k)).astype(np.uint16),
        class_prob=prob,
        target_prob=target_prob,
        bucket=generator.integers(0, 4, (rows, num_crops)).astype(np.uint8),
    )


def expected(labels: ShardLabels) -> dict[str, list[Any]]:
    """The columns of a block as read_with.py prints them."""
    flat = {name: getattr(labels, name).reshape(len(labels), -1) for name in ("flip", "class_index", "bucket")}
    columns: dict[str, list[Any]] = {name: values.tolist() for name, values in flat.items()}
    for number, name in enumerate(parquet.BOX_COLUMNS):
        columns[name] = labels.boxes[:, :, number].tolist()
    for name in parquet.PROB_COLUMNS:
        lists = getattr(labels, name).reshape(len(labels), -1).astype(float).tolist()
        columns[name] = [[None if value != value else value for value in row] for row in lists]
    columns["target"] = [None if value < 0 else value for value in labels.target.tolist()]
    columns |= {"key": list(labels.keys), "height": labels.height.tolist(), "width": labels.width.tolist()}
    columns["image_digest"] = [row.tobytes().hex() for row in labels.image_digest]
    return columns


def install(library: Library, folder: Path) -> list[str]:
    """The command that reads a file, in an environment with this library. Raises CalledProcessError."""
    place = folder / "-".join(name.translate(str.maketrans("=<>@", "----")) for name in library.packages)
    if library.runtime == "node":
        place.mkdir(parents=True, exist_ok=True)
        if not (place / WHOLE).exists():
            run(["npm", "init", "-y"], place)
            run(["npm", "install", *library.packages], place)
            (place / WHOLE).touch()
        return ["node", str(READERS / "read_with.mjs"), library.reader]
    python = place / "bin" / "python"
    if not (place / WHOLE).exists():
        run([sys.executable, "-m", "venv", str(place)], folder)
        run([str(python), "-m", "pip", "install", "--quiet", *library.packages], folder)
        (place / WHOLE).touch()
    return [str(python), str(READERS / "read_with.py"), library.reader]


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=1200)
    return done.stdout


def row(library: Library, folder: Path, blocks: dict[Path, dict[str, list[Any]]]) -> str:
    """A line of the table; what went wrong is printed."""
    command = install(library, folder)
    place = folder / "-".join(name.translate(str.maketrans("=<>@", "----")) for name in library.packages)
    where = place if library.runtime == "node" else folder
    bad: dict[str, str] = {}
    for path, wanted in blocks.items():
        said = json.loads(run([*command, str(path)], where).splitlines()[-1])
        for name, values in wanted.items():
            found = said["columns"][name]
            if found != values:
                bad[name] = found["error"] if isinstance(found, dict) else "other values"
    for name, what in bad.items():
        print(f"{library.name} {said['version']}: {name}: {what}", file=sys.stderr)
    marks = ["no" if any(name in bad for name in names) else "yes" for names in GROUPS.values()]
    return f"| {library.name} {said['version']} | {' | '.join(marks)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Where environments are made and kept.")
    parser.add_argument("--only", help="One reader, such as duckdb; the table is printed and not written.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ferkd-data-readers-") as scratch:
        folder = (arguments.folder or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        blocks = {}
        for number, labels in enumerate((block(5, 4, 3), block(420, 50, 5))):
            path = Path(scratch) / f"{number}.parquet"
            parquet.write(path, labels)
            blocks[path] = expected(labels)
        lines = [f"| reader | {' | '.join(GROUPS)} |", f"| --- |{' --- |' * len(GROUPS)}"]
        for library in LIBRARIES:
            program = {"java": "java", "node": "npm"}.get(library.runtime)
            if arguments.only in (None, library.reader):
                if program and not shutil.which(program):
                    print(f"{library.name}: left out, {program} is absent", file=sys.stderr)
                    continue
                lines.append(row(library, folder, blocks))
                print(lines[-1], file=sys.stderr)
    table = "\n".join(lines)
    if arguments.only:
        print(table)
        return
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
