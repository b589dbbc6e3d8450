"""The shape of the code: imports point one way, public names exist, importing is light."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import ferkd_data

ROOT = Path(ferkd_data.__file__).parent

FLOORS = [
    {"errors", "html_tables", "words"},
    {"rng", "extras", "storage", "locks", "scratch", "threads", "parquet_guard", "upload"},
    {"remote"},
    {"crops", "crop_kinds", "augment"},
    {"images", "replay", "normalization"},
    {"teachers"},
    {"labels", "targets"},
    {"format", "losses", "class_map", "calibration", "mixing", "selfmix", "evaluate", "bench", "demo"},
    {"label_set"},
    {"builder"},
    {"loader"},
    {"importers"},
    {"exchange"},
    {"relabelling"},
    {"report"},
]
"""From the ground up: a module may import what stands on its own floor or below.

`relabelling` (verify --deep) is the one reader of label sets that needs the builder.
"""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_module(name: str) -> bool:
    return (ROOT / f"{name}.py").exists() or (ROOT / name / "__init__.py").exists()


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Modules of this package that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "ferkd_data":
                found |= {alias.name for alias in node.names if is_module(alias.name)}
            elif (node.module or "").startswith("ferkd_data."):
                found.add((node.module or "").removeprefix("ferkd_data."))
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("ferkd_data.") for alias in node.names if "ferkd_data." in alias.name}
    return frozenset(found)


def floor(module: str) -> int:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for number, rooms in enumerate(FLOORS):
            if name in rooms:
                return number
    raise AssertionError(f"module {module} has no floor")


@functools.cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"}


def test_imports_never_point_up():
    for name, path in modules().items():
        for imported in imports(path):
            assert floor(imported) <= floor(name), f"{name} imports {imported}"


def test_exchange_and_importers_do_without_the_builder():
    for name, path in modules().items():
        if name.split(".")[0] in ("exchange", "importers"):
            assert not [imported for imported in imports(path) if imported.split(".")[0] == "builder"], name


def test_there_is_no_cycle():
    check_acyclic({name: imports(path) & set(modules()) for name, path in modules().items()})


def test_no_two_folders_need_each_other():
    """Below builder/, which has folders of its own."""

    def folder(name: str) -> str:
        parts = name.split(".")
        return ".".join(parts[:-1]) if len(parts) > 2 else name

    graph: dict[str, set[str]] = {folder(name): set() for name in modules()}
    for name, path in modules().items():
        graph[folder(name)] |= {folder(imported) for imported in imports(path) & set(modules())} - {folder(name)}
    check_acyclic(graph)


def check_acyclic(graph: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"cycle: {' -> '.join((*above, name))}"
        if name not in done:
            for imported in graph[name] - {name.rpartition(".")[0]}:
                visit(imported, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_command_line_uses_public_names_only():
    """No name with a leading underscore: a command that needs one shows that other programs need it too."""
    for path in (ROOT.parent / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ferkd_data"):
                names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("fd.", "ferkd_data.")):
                names = [node.attr]
            private = [name for name in names if name.startswith("_") and not name.endswith("__")]
            assert not private, f"{path.name}: uses {private}"


def test_public_names_exist_and_are_listed():
    for name in ferkd_data.__all__:
        assert getattr(ferkd_data, name) is not None
        assert name in dir(ferkd_data)
    for name in ("build", "open_labels"):
        assert callable(getattr(ferkd_data, name))


def test_windows_is_told_what_to_do():
    """Files are locked and mapped as POSIX has it; the first import says so, and not a missing module later."""
    code = "import sys; sys.platform = 'win32'; import ferkd_data"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "ImportError: ferkd-data needs a POSIX system, Linux or macOS" in done.stderr


def test_importing_is_light():
    light = "import sys, ferkd_data; assert not {'torch', 'numpy', 'pyarrow', 'timm', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", light], check=True)


def test_every_folder_is_installed():
    """Setuptools gets a list; from a checkout, a folder that is not on it would not be missed."""
    listed = (ROOT.parent / "pyproject.toml").read_text()
    for path in ROOT.rglob("__init__.py"):
        package = ".".join(path.parent.relative_to(ROOT.parent).parts)
        assert f'"{package}",' in listed, f"{package} is not among the packages in pyproject.toml"
