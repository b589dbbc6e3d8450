"""Options that several commands share, and commands that group their options in `--help`."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from ferkd_data.errors import UsageError
from ferkd_data.storage import read_text

from .terminal import say

DONE_WITH_REJECTS = 3
"""Exit status of a command that is done, and left images out as rejects."""

TEACHERS = "Teachers and classes"
LABELS = "Crops and labels"
FILES = "Output"
MACHINE = "This machine"
CLUSTER = "Clusters and batch systems"
WATCHING = "Monitoring and configuration"
OTHERS = "Options"
HEADINGS = (TEACHERS, LABELS, FILES, MACHINE, CLUSTER, WATCHING, OTHERS)
"""Headings in the order of `--help`."""


class GroupedOption(click.Option):
    """An option with its heading in `--help`."""

    def __init__(self, *names: Any, group: str = OTHERS, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.group = group


class GroupedCommand(click.Command):
    """A command with option groups, which still takes the old names of options that were renamed."""

    def __init__(self, *args: Any, renamed: Mapping[str, str] | None = None, **settings: Any) -> None:
        """`renamed` maps old option names to new ones, such as {"--workers": "--threads"}."""
        super().__init__(*args, **settings)
        self.renamed = dict(renamed or {})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = [self.new_name(arg) for arg in args]
        given = list(args)  # click takes them out of the list
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            if "unexpected extra argument" in error.message and "--crop-kinds" in given:
                raise click.UsageError(f"{error.message} Give --crop-kinds once for each kind.", ctx) from error
            files = [arg for arg in given if arg.endswith((".tar", ".parquet")) and Path(arg).is_file()]
            # train-*.tar without quotes: the shell makes many arguments of it, and the second is taken for OUT.
            if "unexpected extra argument" not in error.message or len(files) < 2:
                raise
            raise click.UsageError(
                f"the shell made {len(files)} names of a pattern in SOURCE; put the pattern in quotes, such as "
                f"'{_pattern(files)}'",
                ctx,
            ) from error

    def new_name(self, argument: str) -> str:
        old, equals, value = argument.partition("=")
        if old not in self.renamed:
            return argument
        say(f"ferkd-data: {old} is now called {self.renamed[old]}; the old name will be removed", err=True)
        return f"{self.renamed[old]}{equals}{value}"

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                # Options that click makes, such as --help, have no group.
                groups.setdefault(getattr(parameter, "group", OTHERS), []).append(record)
        for heading in HEADINGS:
            if heading in groups:
                with formatter.section(heading):
                    formatter.write_dl(groups[heading])


def _pattern(files: list[str]) -> str:
    """Return a pattern for all files, such as data/train-*.tar."""
    start = files[0]
    while not all(file.startswith(start) for file in files):
        start = start[:-1]
    return f"{start}*{Path(files[0]).suffix}"


class NumberOrAuto(click.ParamType):  # type: ignore[type-arg]  # generic in stubs alone
    """A whole number, or `auto`, which becomes None: the library then chooses."""

    name = "number"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value is None or value == "auto":
            return None
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor auto", param, ctx)


NUMBER_OR_AUTO = NumberOrAuto()

Function = TypeVar("Function", bound=Callable[..., Any])

TEACHER_HELP = (
    "A teacher: timm:NAME[@FILE], torchvision:NAME[@FILE], hf:ORG/NAME[@FOLDER], openclip:ARCH@TAG?names=FILE, "
    "onnx:FILE, torchscript:FILE or python:module:factory[@FILE], with options after ? (size, mean, std, "
    "interpolation, classes, output, activation, weight, temperature, crop_pct), such as 'timm:resnet50?weight=2'. "
    "Repeat it for each teacher. docs/teachers.md describes all kinds and options."
)


def grouped(*names: str, group: str, **settings: Any) -> Callable[[Function], Function]:
    """Make a `click.option` with its heading in `--help`."""
    return click.option(*names, cls=GroupedOption, group=group, **settings)


def end_of_help(*default: float, limits: str = "") -> str:
    """Return the end of a help text with a default as people type it, in the form that click gives others.

    >>> end_of_help(0.08, 1.0), end_of_help(200, limits="x>=1")
    ('  [default: 0.08 1]', '  [default: 200; x>=1]')
    """
    return f"  [default: {' '.join(f'{value:g}' for value in default)}{limits and f'; {limits}'}]"


def device_option(text: str) -> Callable[[Function], Function]:
    """Make the option --device, whose help says which devices a command takes."""
    return grouped("--device", group=MACHINE, default="auto", show_default=True, metavar="DEVICE", help=text)


def teacher_options(function: Function) -> Function:
    """Add the options that name teachers and say how to run them."""
    options = [
        grouped("--teacher", "teachers", group=TEACHERS, multiple=True, metavar="SPEC", help=TEACHER_HELP),
        grouped(
            "--classes",
            group=TEACHERS,
            type=click.Path(dir_okay=False, path_type=Path),
            help="Class list: one line per class in the order of the teachers' outputs, with the class folder and "
            "optionally a tab and a name. Kaggle's LOC_synset_mapping.txt, timm's class maps and JSON lists also work.",
        ),
        grouped(
            "--precision",
            group=MACHINE,
            type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
            default="auto",
            show_default=True,
            help="Precision of the teachers. auto: bf16 on cuda, fp32 on a CPU and for ONNX teachers.",
        ),
        grouped(
            "--ensemble",
            group=LABELS,
            type=click.Choice(["mean", "logits", "geometric"]),
            default="mean",
            show_default=True,
            help="Combine the teachers by the mean of their probabilities, the mean of their logits, or the geometric "
            "mean.",
        ),
    ]
    # Decorators apply from the last to the first, so that `--help` shows them in this order.
    for option in reversed(options):
        function = option(function)
    return function


def require_teachers(teachers: tuple[str, ...]) -> None:
    """Raise a usage error without a teacher: an extension takes them from the label set, so click cannot ask."""
    if not teachers:
        raise click.UsageError("Missing option '--teacher'.")


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options given on the command line or in a --config file, without the defaults."""
    context = click.get_current_context()
    # Where a value came from, not whether it equals the default: what is not given, an extension takes from the
    # manifest.
    default = click.core.ParameterSource.DEFAULT
    return {name: value for name, value in values.items() if context.get_parameter_source(name) is not default}


def named(parameters: Iterable[str]) -> str:
    """Name parameters of the running command as the options that people type, such as `--teacher and --sample`."""
    options = {parameter.name: parameter.opts[0] for parameter in click.get_current_context().command.params}
    return " and ".join(options[name] for name in parameters)


def default_of(function: Callable[..., Any], name: str) -> Any:
    """Return the default of an argument of the library, so that it is written once."""
    return inspect.signature(function).parameters[name].default


json_option = grouped("--json", "as_json", group=WATCHING, is_flag=True, help="Print JSON instead of a table.")


def signature_options(function: Function) -> Function:
    """Add --signed-by and --signer: whose signature of the manifest is required."""
    signer = click.option("--signer", metavar="NAME", help="With --signed-by: name of the signer to require.")
    signed_by = click.option(
        "--signed-by",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="OpenSSH file of allowed signers, one of whom must have signed the manifest.",
    )
    # The last one applied comes first in --help.
    return signed_by(signer(function))


def config_option(function: Function) -> Function:
    """Add --config, a file with defaults for all other options of the command."""
    return grouped(
        "--config",
        group=WATCHING,
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        # Read before all other options, whose defaults it sets.
        is_eager=True,
        expose_value=False,
        callback=_load_config,
        help='A TOML file with defaults for these options, such as crops = 100 or teacher = ["timm:…"].',
    )(function)


def _load_config(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    content = _read_toml(path)
    known = {name.lstrip("-").replace("-", "_"): p for p in ctx.command.params for name in p.opts}
    defaults = {}
    for key, value in content.items():
        # Old names work in files too.
        if isinstance(ctx.command, GroupedCommand):
            key = ctx.command.new_name(f"--{key.replace('_', '-')}").removeprefix("--")
        option = known.get(key.replace("-", "_"))
        if option is None or option.name is None or option.name == "config":
            raise UsageError(f"{path}: unknown setting {key!r}; settings are {', '.join(sorted(known))}")
        defaults[option.name] = _as_typed(f"{path}: {key}", option, value)
    # Defaults, so that the command line has the last word.
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


def _as_typed(where: str, option: click.Parameter, value: Any) -> Any:
    """Return a setting as the command line would give it: text, or a list of texts.

    So both are read by the same rules: click would take 2.5 for a whole number, and make 2 of it. Raises UsageError.
    """
    if getattr(option, "is_flag", False):
        if not isinstance(value, (bool, str)):
            raise UsageError(f"{where} must be true or false, got {value!r}")
        return value
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) or not isinstance(item, (str, int, float)) for item in items):
        raise UsageError(f"{where} must be a text, a number or a list of these, got {value!r}")
    words = [str(item) for item in items]
    # thresholds = [0.1, 0.3, 0.9] is one option of three words; teacher = "timm:resnet50" is a list of one teacher.
    return words if getattr(option, "multiple", False) or option.nargs != 1 else " ".join(words)


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        content: dict[str, Any] = tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not TOML: {error}") from error
    return content


def print_json(content: Any) -> None:
    """Print plain values as indented JSON on stdout. JSON has no NaN and no infinity: both become null."""
    say(json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
