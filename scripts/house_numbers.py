"""Print how large and how tangled the code is: modules, lines, comments, importers, functions, and the two walks.

    python scripts/house_numbers.py

A walk is measured, not guessed: label sets are built from 280 and from 560 photos (and read by a loader), and every
call is counted. A file belongs to the walk when its functions are called at least once more for each further image.
There are more photos than a build looks at before it labels: 64 names of a folder, and 32 images that the teachers are
tried on.
"""

from __future__ import annotations

import ast
import sys
import tempfile
import threading
import tokenize
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import ferkd_data

ROOT = Path(ferkd_data.__file__).parent
CLI = ROOT.parent / "cli"
FEW, MANY = 280, 560


def files() -> list[Path]:
    return sorted([*ROOT.rglob("*.py"), *CLI.rglob("*.py")])


def code_and_comments(path: Path) -> tuple[int, int]:
    """Lines with code (docstrings and comments alone left out), and comments."""
    code: set[int] = set()
    comments = 0
    with path.open("rb") as stream:
        for token in tokenize.tokenize(stream.readline):
            if token.type == tokenize.COMMENT:
                comments += 1
            elif token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER):
                code |= {*range(token.start[0], token.end[0] + 1)}
    return len(code), comments


def functions(path: Path) -> list[tuple[str, int, int]]:
    """Name, lines and parameters of each function."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            named = [a for a in arguments if a.arg not in ("self", "cls")]
            found.append((f"{path.name}:{node.name}", (node.end_lineno or 0) - node.lineno + 1, len(named)))
    return found


def importers() -> Counter[str]:
    """How many modules import each module."""
    count: Counter[str] = Counter()
    for path in files():
        seen = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ferkd_data"):
                seen |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        count.update(name for name in seen if name)
    return count


def calls_by_file(work: Callable[[], Any]) -> Counter[str]:
    """Calls of functions of each of our files while `work` runs, in all threads of this process."""
    count: Counter[str] = Counter()

    def see(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(str(ROOT)) and frame.f_code.co_name != "<module>":
            count[str(Path(name).relative_to(ROOT))] += 1

    threading.setprofile(see)
    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return count


def photos(folder: Path, number: int) -> Path:
    import numpy as np
    from PIL import Image

    for i in range(number):
        path = folder / f"class{i % 4}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8)).save(path)
    return folder


TEACHER = """
from torch import nn
class Teacher(nn.Module):
    preprocessing = {"size": 32, "mean": (0.5,), "std": (0.25,)}
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 4))
    def forward(self, x):
        return self.layers(x)
"""


def walks() -> tuple[list[str], list[str]]:
    """The files that an image passes from SOURCE to its row, and a row from the shard to its batch."""
    built, read = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "house_teacher.py").write_text(TEACHER)
        sys.path.insert(0, name)
        for number in (FEW, MANY):
            source, out = photos(folder / f"photos{number}", number), folder / f"labels{number}"

            def build(source: Path = source, out: Path = out) -> None:
                ferkd_data.build(source, out, teachers=["python:house_teacher:Teacher"], crops=4, top_k=2, device="cpu")

            def load(source: Path = source, out: Path = out) -> None:
                labels = ferkd_data.open_labels(out)
                for _ in ferkd_data.CropLoader(labels, images=source, batch_size=4, crops_per_image=4, cache_dir=name):
                    pass

            built[number], read[number] = calls_by_file(build), calls_by_file(load)

    def per_image(counts: dict[int, Counter[str]]) -> list[str]:
        return sorted(f for f in counts[MANY] if counts[MANY][f] - counts[FEW][f] >= MANY - FEW)

    return per_image(built), per_image(read)


def main() -> None:
    modules = [path for path in files() if path.name != "__init__.py"]
    lines = [code_and_comments(path) for path in files()]
    code, comments = sum(c for c, _ in lines), sum(c for _, c in lines)
    bodies = [found for path in files() for found in functions(path)]
    count = importers()
    single = sum(
        count[".".join(("ferkd_data", *p.relative_to(ROOT).with_suffix("").parts))] == 1
        for p in modules
        if p.is_relative_to(ROOT)
    )
    print(f"modules                              {len(modules)}")
    print(f"lines of code                        {code}")
    print(f"comments for 100 lines of code       {100 * comments / code:.1f}")
    print(f"modules with exactly one importer    {single}")
    print(
        f"lines of a function, median / most   {median(size for _, size, _ in bodies):.0f} / "
        f"{max(bodies, key=lambda b: b[1])[1]} ({max(bodies, key=lambda b: b[1])[0]})"
    )
    print("functions with over 10 parameters    " + ", ".join(f"{n} ({p})" for n, _, p in bodies if p > 10))
    for told, walk in zip(("SOURCE to row", "row to batch "), walks(), strict=True):
        print(f"files from {told}             {len(walk)}: {', '.join(walk)}")


if __name__ == "__main__":
    main()
