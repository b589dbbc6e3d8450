"""A build as it was asked for: complete and checked, before anything is opened or loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from typing_extensions import Unpack

from ferkd_data.builder.extension import Base, open_base
from ferkd_data.builder.settings import BuildSettings, Resources, SettingsKeywords
from ferkd_data.builder.store_folder import place_of
from ferkd_data.errors import UsageError
from ferkd_data.images import ClassList, read_class_list
from ferkd_data.storage import is_url
from ferkd_data.teachers import TeacherSpec

OnError = Literal["reject", "fail"]


@dataclass(frozen=True, kw_only=True)
class Request:
    source: str
    """Absolute, unless it is a URL: a teacher's module may change the working folder."""
    out: Path | str
    classes: ClassList | None
    teachers: tuple[TeacherSpec, ...]
    precision: str
    settings: BuildSettings
    resources: Resources
    on_error: OnError
    base: Base | None = None
    """The label set that is to be extended."""

    def __post_init__(self) -> None:
        if self.on_error not in ("reject", "fail"):
            raise UsageError(f"on_error must be reject or fail, got {self.on_error!r}")


def make_request(
    source: str | Path,
    out: str | Path,
    *,
    teachers: Sequence[str | TeacherSpec] = (),
    settings: BuildSettings | None = None,
    resources: Resources | None = None,
    classes: str | Path | None = None,
    precision: str = "auto",
    on_error: OnError = "reject",
    extend: bool = False,
    **changes: Unpack[SettingsKeywords],
) -> Request:
    """The arguments are those of `build`. An extension takes what is not given from the label set in OUT."""
    place = place_of(out)
    base = _base(place) if extend else None
    listed = None if classes is None else read_class_list(Path(classes).expanduser())
    given = {**(vars(settings) if settings else {}), **changes}
    settings, resources = with_changes(settings, resources, changes)
    if base is not None:
        settings = base.settings({name: value for name, value in given.items() if name in vars(settings)})
        teachers = teachers or base.specs
        precision = base.precision if precision == "auto" else precision
        listed = listed or base.classes
    return Request(
        source=_absolute(str(source)),
        out=place,
        classes=listed,
        teachers=tuple(spec if isinstance(spec, TeacherSpec) else TeacherSpec.parse(spec) for spec in teachers),
        precision=precision,
        settings=settings,
        resources=resources,
        on_error=on_error,
        base=base,
    )


def with_changes(
    settings: BuildSettings | None, resources: Resources | None, changes: Mapping[str, Any]
) -> tuple[BuildSettings, Resources]:
    """Settings with single fields replaced. Raises UsageError for a field that neither has."""
    settings, resources = settings or BuildSettings(), resources or Resources()
    of_settings = {field.name for field in fields(BuildSettings)}
    of_resources = {field.name for field in fields(Resources)}
    unknown = set(changes) - of_settings - of_resources
    if unknown:
        raise UsageError(
            f"build has no setting {sorted(unknown)[0]!r}; settings are {sorted(of_settings | of_resources)}"
        )
    return (
        replace(settings, **{k: v for k, v in changes.items() if k in of_settings}),
        replace(resources, **{k: v for k, v in changes.items() if k in of_resources}),
    )


def _base(place: Path | str) -> Base:
    if isinstance(place, str):
        raise UsageError(f"{place}: --extend works on a folder; pull the label set, extend it, and publish it again")
    return open_base(place)


def _absolute(source: str) -> str:
    if is_url(source):
        return source
    path = Path(source).expanduser()
    # In a pattern, a working folder whose name has a bracket would mean something else.
    return source if any(mark in str(Path.cwd()) for mark in "*?[{") and not path.exists() else str(path.absolute())
