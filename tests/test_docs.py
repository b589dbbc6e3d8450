"""What the documents say, held against the code."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import re
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

import click
import pytest

from ferkd_data_cli.main import COMMANDS, cli

ROOT = Path(__file__).parent.parent


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_format_are_up_to_date():
    text = (ROOT / "docs/format.md").read_text(encoding="utf-8")
    assert load_script("write_format_doc").filled(text) == text, "run python scripts/write_format_doc.py"


RECORDS = [ROOT / "CHANGELOG.md", ROOT / "docs/decisions.md"]
"""Pages that may name what there is no more."""
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def anchors(path):
    """Return the anchors that a forge gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    texts = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in texts}


@pytest.mark.parametrize("document", sorted(path.relative_to(ROOT).as_posix() for path in DOCUMENTS))
def test_links_lead_somewhere(document):
    path = ROOT / document
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"\w+:", link):
            continue
        target, _, anchor = link.partition("#")
        page = path.parent / target if target else path
        assert page.exists(), link
        assert not anchor or anchor in anchors(page), link


def test_the_table_of_commands_is_complete():
    text = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) and set(
        re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    ) == set(COMMANDS)
    assert load_script("docs_hooks").HELP in text


@cache
def options_of(command):
    """Return the options of a command, as a person types them."""
    parameters = cli.get_command(click.Context(cli), command).params
    return {text for parameter in parameters for text in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


def test_documented_command_lines_have_options_that_exist():
    seen = set()
    for path in {*DOCUMENTS, *ROOT.glob("examples/*")} - {*RECORDS}:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for command, rest in re.findall(rf"ferkd-data ({'|'.join(COMMANDS)})\b([^\n`]*)", text):
            given = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", rest.partition("#")[0]))
            assert given <= options_of(command), (path.name, command, given - options_of(command))
            seen |= {(command, option) for option in given}
    assert len(seen) > 40


def test_documented_examples_have_options_that_exist():
    count = 0
    for path in {*DOCUMENTS, *ROOT.glob("examples/*.py")} - {*RECORDS}:
        text = path.read_text(encoding="utf-8")
        for program, rest in re.findall(r"\b((?:examples|benchmarks|scripts)/[\w/]+\.py)\b([^\n`]*)", text):
            given = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", rest))
            unknown = {option for option in given if f'"{option}"' not in (ROOT / program).read_text(encoding="utf-8")}
            assert not unknown, (path.name, program, unknown)
            count += len(given)
    assert count > 20


def calls_of(text):
    """Yield the name and the keywords of each call of `fd.NAME(…)`, also where arguments are left out with dots."""
    for call in re.finditer(r"\bfd\.(\w+)\(", text):
        depth, own = 1, ""
        for character in text[call.end() :]:
            depth += (character in "([{") - (character in ")]}")
            if depth == 0:
                break
            own += character if depth == 1 else ""
        yield call[1], re.findall(r"(?:^|,)\s*(\w+)=(?!=)", own)


def parameters_of(function):
    found = set()
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            (keywords,) = get_args(parameter.annotation)
            found |= set(get_type_hints(keywords))
        else:
            found.add(parameter.name)
    return found


def test_documented_calls_have_names_and_keywords_that_exist():
    import ferkd_data as fd

    count = 0
    for path in {*DOCUMENTS} - {*RECORDS}:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"\bfd\.(\w+)", text):
            assert hasattr(fd, name), (path.name, name)
        for name, keywords in calls_of(text):
            assert not keywords or set(keywords) <= parameters_of(getattr(fd, name)), (path.name, name, keywords)
            count += len(keywords)
    assert count > 50


def test_the_table_of_augmentations_has_their_options_and_defaults():
    import ferkd_data as fd

    text = (ROOT / "docs/augment.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.*?) ?\| .+ \|$", text, re.MULTILINE)
    names = [(name, options) for cell, options in rows for name in re.findall(r"`(\w+)`", cell)]
    assert len(names) == 11
    for name, options in names:
        expected = ":".join([name, ",".join(re.findall(r"`(.+?)`", options))]).rstrip(":")
        assert fd.BuildSettings(augment=[name]).augment == (expected,)


def test_readme_names_real_commands_and_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^ +(?:\$ )?ferkd-data (\w+)", text, re.MULTILINE)
    assert len(commands) >= 3 and set(commands) <= set(COMMANDS)
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target


def test_readme_says_what_ci_runs():
    ci = (ROOT / ".ci/run").read_text()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install --quiet -e '.[dev]'" in ci and "pip install -e '.[dev]'" in readme
    assert re.search(r"^pytest -n 2$", ci, re.MULTILINE) and "pytest -n 2" in readme


def test_decisions_are_numbered_and_the_index_names_each():
    text = (ROOT / "docs/decisions.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert [int(title.split(".")[0]) for title in titles] == list(range(1, len(titles) + 1))
    assert re.findall(r"^- \[(.*)\]\(#", text, re.MULTILINE) == titles


def test_every_kind_and_option_of_a_teacher_is_documented():
    from ferkd_data.teachers.spec import OPTIONS, TEACHER_KINDS

    text = (ROOT / "docs/teachers.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) >= set(TEACHER_KINDS)
    first_cells = re.findall(r"^\| (`[^|]*`) \|", text, re.MULTILINE)
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == {*TEACHER_KINDS, *OPTIONS}


def test_loader_docs_name_every_parameter_with_its_default():
    import ferkd_data as fd

    text = (ROOT / "docs/loader.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (`.*?`)? ?\| .+ \|$", text, re.MULTILINE)
    parameters = list(inspect.signature(fd.CropLoader.__init__).parameters.values())[1:]
    expected = {
        parameter.name: "" if parameter.default is inspect.Parameter.empty else f"`{parameter.default!r}`"
        for parameter in parameters
    }
    assert dict(rows) == expected


def test_loader_docs_name_every_setting_of_a_calibration_with_its_default():
    import ferkd_data as fd

    text = (ROOT / "docs/loader.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)=` \| `(.+?)` \| .+ \|$", text, re.MULTILINE))
    assert {name: ast.literal_eval(default) for name, default in rows.items()} == {
        field.name: field.default for field in dataclasses.fields(fd.Calibration)
    }


def test_the_query_of_the_readme_gives_the_mean_p_max_of_each_image(label_set):
    import ferkd_data as fd

    duckdb = pytest.importorskip("duckdb")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (query,) = re.findall(r"^    (select key, round.*?) limit 3$", text, re.MULTILINE | re.DOTALL)
    assert "'demo-out/labels/labels/**/*-000.parquet'" in query and "[1:-:5]" in query
    labels = fd.open_labels(label_set)
    # The demo's label set has 5 classes per crop, this one another number.
    query = query.replace("[1:-:5]", f"[1:-:{labels.top_k}]")
    found = duckdb.sql(query.replace("demo-out/labels", str(label_set))).fetchall()
    block = labels.manifest.crops_per_block
    expected = {image.key: image.class_prob[:block, 0].astype(float).mean() for image in labels}
    assert len(found) == len(expected) > 1
    assert [mean for _, mean in found] == sorted(mean for _, mean in found)
    for key, mean in found:
        assert mean == pytest.approx(expected[key], abs=0.006)


def test_the_query_of_the_format_gives_the_first_crops_of_an_image(label_set):
    import ferkd_data as fd

    duckdb = pytest.importorskip("duckdb")
    text = (ROOT / "docs/format.md").read_text(encoding="utf-8")
    (query,) = re.findall(r"^    (select key, target.*? order by n)$", text, re.MULTILINE | re.DOTALL)
    labels = fd.open_labels(label_set)
    image = labels[3]
    assert query.count("n*5+1 : n*5+5") == 2
    query = query.replace("n*5+1 : n*5+5", f"n*{labels.top_k}+1 : n*{labels.top_k}+{labels.top_k}")
    query = query.replace("n01614925/imagenet_17_22", image.key).replace("demo-out/labels", str(label_set))
    found = duckdb.sql(query).fetchall()
    assert len(found) == 2
    for n, (key, target, crop, *box, flip, classes, probs) in enumerate(found):
        assert (key, target, crop) == (image.key, image.target, n)
        assert box == image.boxes[n].tolist() and flip == image.flip[n]
        assert classes == image.class_index[n].tolist() and probs == image.class_prob[n].tolist()


def test_every_field_of_the_manifest_has_a_meaning():
    text = (ROOT / "docs/format.md").read_text(encoding="utf-8")
    tables = text.partition("<!-- generated: manifest -->")[2].partition("<!-- end -->")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.*?) \|$", tables, re.MULTILINE)
    assert len(rows) > 50 and not [name for name, _, meaning in rows if not meaning.strip()]
