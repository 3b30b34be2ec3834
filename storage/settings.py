"""The base of every settings class: frozen, strict, documented under each field.

A setting is a decision that changes the result, so it belongs to an artifact's identity. Devices, worker
counts, output paths and log levels do not, and are ordinary function arguments.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, NamedTuple, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from tailrace.storage.errors import SettingsError
from tailrace.storage.parsing import is_broken, read_yaml, shown

_UNITS = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_QUANTITY = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]{1,2})?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_quantity(text: Any) -> Any:
    """Read ``60M``, ``1.5GB``, ``2GiB`` or ``1e6`` as a whole number; anything but a string passes through."""
    if not isinstance(text, str):
        return text
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a quantity; write a number such as 4096, 60M, 1.5GB or 2GiB")
    # exact, since a float would round seeds above 2⁵³
    value = Fraction(match[1].replace("_", "")) * _UNITS[match[2].lower()]
    if value.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number")
    return value.numerator


Quantity = Annotated[int, BeforeValidator(parse_quantity)]
"""A whole number that may be written ``60M`` or ``1.5GB``."""


def _as_text(value: Any) -> Any:
    """Read a number of a YAML file, such as a single layer, as the text it would be on the command line."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_as_text)]
"""A text that may look like a number."""


class Retired(NamedTuple):
    """A name that a setting had before."""

    new: str
    """The setting of the same class that has the same values with the same meaning."""
    since: str
    """The release that retired the name."""
    is_refused: bool = False
    """Whether users must write the new name by now. In what was recorded, the old name is read for ever."""


class Settings(BaseModel):
    """Frozen settings that refuse unknown keys; the docstring under a field is its ``--help`` text."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,  # no setting means anything then, and JSON cannot hold it
    )

    help_sections: ClassVar[Mapping[str, str]] = {}
    """Headings of a command's help, each by the first setting below it."""
    help_basics: ClassVar[tuple[str, ...]] = ()
    """Settings that people change first; they come before all headings."""
    retired: ClassVar[Mapping[str, Retired]] = {}
    """Former names of settings; docs/contributing.md, *How a setting is retired*."""
    later: ClassVar[tuple[str, ...]] = ()
    """Settings that came after a release and by default change nothing: recorded only where they are not the default,
    so that what was made or begun before is still the same request."""

    @model_serializer(mode="wrap")
    def _leave_out_later(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = write(self)
        for name in self.later:
            if getattr(self, name) == type(self).model_fields[name].default:
                values.pop(name, None)
        return values

    @model_validator(mode="before")
    @classmethod
    def _take_former_names(cls, values: Any) -> Any:
        if not cls.retired or not isinstance(values, Mapping):
            return values
        if twice := [old for old, name in cls.retired.items() if old in values and name.new in values]:
            raise ValueError("; ".join(f"{old} is {cls.retired[old].new}: give one of them" for old in twice))
        return {cls.retired[name].new if name in cls.retired else name: value for name, value in values.items()}

    @model_validator(mode="before")
    @classmethod
    def _refuse_yes_for_one(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not any(isinstance(value, bool) for value in values.values()):
            return values
        numbers = _numbers(cls)
        return {
            name: str(value).lower() if isinstance(value, bool) and name in numbers else value
            for name, value in values.items()
        }

    @model_validator(mode="after")
    def _refuse_what_no_file_holds(self) -> Self:
        values = [(name, value if isinstance(value, tuple) else (value,)) for name, value in vars(self).items()]
        beyond = [name for name, parts in values if any(isinstance(part, int) and _is_beyond(part) for part in parts)]
        if beyond:
            raise ValueError(f"{', '.join(beyond)}: wanted a number of at most 64 bits")
        broken = [name for name, parts in values if any(isinstance(part, str) and is_broken(part) for part in parts)]
        if broken:
            raise ValueError(f"{', '.join(broken)}: holds half of a surrogate pair, which is no character")
        return self

    @classmethod
    def read(cls, *sources: Mapping[str, Any], where: str = "settings") -> Self:
        """Merge ``sources`` (later ones win) and validate once.

        Raises SettingsError that lists every problem of the merged settings at once.
        """
        merged: dict[str, Any] = {}
        for source in sources:
            merged.update(source)
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise SettingsError(_describe(cls, error, where)) from error

    @classmethod
    def read_file(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read a YAML file and apply ``overrides`` on top, before validation."""
        return cls.read(load_yaml(path), overrides or {}, where=str(path))


@cache
def _numbers(settings: type[BaseModel]) -> frozenset[str]:
    """Return the settings that are numbers and never yes or no, which Python takes for 1 and 0."""
    kinds = {name: set(_kinds(field.annotation)) for name, field in settings.model_fields.items()}
    return frozenset(name for name, own in kinds.items() if own & {int, float} and bool not in own)


def _kinds(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def _is_beyond(number: int) -> bool:
    return not -(2**63) <= number < 2**64


def code_of(settings: Settings) -> ModuleType:
    """Return the module beside that of ``settings`` that their ``kind`` names: the code for what they describe.

    It is loaded on demand, so that settings can be read and explained without torch.
    """
    folder = type(settings).__module__.rpartition(".")[0]
    return import_module(f"{folder}.{_kind(type(settings))}")


def load_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; raise SettingsError if it is unreadable or not a mapping."""
    loaded = read_yaml(path)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise SettingsError(f"{path}: holds {type(loaded).__name__}, wanted a mapping of settings to values")
    return {str(name): value for name, value in loaded.items()}


_LISTED = 50
"""Problems that a message lists: a file may have a hundred thousand."""


def _describe(settings: type[Settings], error: ValidationError, where: str) -> str:
    """Return one line per setting, with the objections of every alternative of a union."""
    by_name: dict[str, list[Any]] = {}
    for problem in error.errors(include_url=False):
        name, about, others = _name(settings, problem)
        by_name.setdefault(name, []).append({**problem, "about": about, "others": others})
    lines = [f"{len(by_name)} problem{'s' if len(by_name) > 1 else ''} in {where}:"]
    lines += [f"  {name}: {_message(problems)}" for name, problems in itertools.islice(by_name.items(), _LISTED)]
    return "\n".join([*lines, *([f"  and {len(by_name) - _LISTED:,} more"] if len(by_name) > _LISTED else [])])


def _name(settings: type[BaseModel], problem: Any) -> tuple[str, list[type[BaseModel]], list[type[BaseModel]]]:
    """Return the setting's dotted name, the classes it may belong to, and the alternatives that were not chosen.

    The name is without pydantic's labels for the alternatives of a union.
    """
    models: list[type[BaseModel]] = [settings]
    others: list[type[BaseModel]] = []
    names = []
    is_unknown = problem["type"] == "extra_forbidden"
    path = problem["loc"][:-1] if is_unknown else problem["loc"]
    for part in path:
        if not isinstance(part, str):
            names.append(str(part))
        elif fields := [model.model_fields[part] for model in models if part in model.model_fields]:
            names.append(part)
            models = [model for field in fields for model in _models_in(field.annotation)]
        else:
            chosen = [model for model in models if _kind(model) == part] or models
            others = [model for model in models if model not in chosen]
            models = chosen
    if is_unknown:
        names.append(str(problem["loc"][-1]))
    return ".".join(names) or "(combination)", models, others


def _kind(model: type[BaseModel]) -> str | None:
    """Return the ``kind`` by which a union knows this model."""
    field = model.model_fields.get("kind")
    return None if field is None else str(get_args(field.annotation)[0])


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the settings classes that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _below(settings: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    """Return the alternatives of every setting that is a choice between kinds, beside the setting's name."""
    return [
        (name, model)
        for name, field in settings.model_fields.items()
        for model in _models_in(field.annotation)
        if _kind(model) is not None
    ]


def _unknown(name: str, models: list[type[BaseModel]], others: list[type[BaseModel]]) -> str:
    known = {field for model in models for field in model.model_fields}
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.75)
    kinds = [kind for model in models if (kind := _kind(model)) is not None]
    whose = f" of {' or '.join(kinds)}" if kinds else ""
    if holders := [str(_kind(model)) for model in others if name in model.model_fields]:
        return f"is no setting{whose}, but of {' or '.join(holders)}"
    if parents := [(parent, model) for top in models for parent, model in _below(top) if name in model.model_fields]:
        parent, model = parents[0]
        return (
            f"is no setting by itself; write it below {parent}, such as {parent}: {{kind: {_kind(model)}, {name}: …}}"
        )
    return f"is no setting{whose}" + (f"; did you mean {' or '.join(near)}?" if near else "")


def _message(problems: list[Any]) -> str:
    problem = problems[0]
    if problem["type"] == "missing":
        return "is required"
    if problem["type"] == "extra_forbidden":
        return _unknown(str(problem["loc"][-1]), problem["about"], problem["others"])
    if problem["type"] == "union_tag_invalid":
        wanted = problem["ctx"]["expected_tags"].replace("'", "")
        return f"wanted one of {wanted} (got {shown(problem['ctx']['tag'])})"
    reasons = [alternative["msg"].removeprefix("Value error, ") for alternative in problems]
    reasons[1:] = [reason.removeprefix("Input should be ") for reason in reasons[1:]]
    got = f" (got {shown(problem['input'])})" if problem["loc"] and problem["input"] != () else ""
    return ", or ".join(dict.fromkeys(reasons)) + got
