"""Command-line flags generated from settings classes, so that a setting and its help live in one place.

A flag that is not given is not passed on: defaults stay with the settings class, and a configuration file given with
``--config`` is only overridden by flags that were typed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from tailrace.storage.errors import SettingsError
from tailrace.storage.settings import Settings, load_yaml

Command = TypeVar("Command", bound=Callable[..., Any])
Read = TypeVar("Read", bound=Settings)

_TAG = "kind"


def settings_options(
    settings: type[Settings],
    required: tuple[str, ...] = (),
    also: Mapping[str, type[Settings]] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Callable[[Command], Command]:
    """Return a decorator that adds ``--config`` and a flag per setting; values arrive in the argument ``given``.

    ``also`` has further classes by what their flags' help begins with. A name in several is one flag for all of them.
    ``notes`` has what a command adds to the help of a setting, by its name.
    """
    flags = list(_flags(settings, required))
    for beginning, further in (also or {}).items():
        known = {flag.names[-1] for flag in flags}
        flags += [flag.explained(beginning) for flag in _flags(further, ()) if flag.names[-1] not in known]
    flags = [flag.explained(after=(notes or {}).get(flag.names[-1], "")) for flag in flags]

    def decorate(command: Command) -> Command:
        for flag in reversed(flags):
            command = click.option(*flag.names, **flag.attributes)(command)
        file = click.Path(dir_okay=False, path_type=Path)
        return click.option("--config", type=file, help="YAML file of settings; flags override it.")(command)

    return decorate


def read_settings(settings: type[Read], config: Path | None, given: dict[str, Any]) -> Read:
    """Merge a configuration file with the flags that were given, and validate once."""
    loaded = load_yaml(config) if config else {}
    return _read(settings, loaded, given, str(config) if config else "the settings")


def _read(settings: type[Read], loaded: dict[str, Any], given: Mapping[str, Any], where: str) -> Read:
    flags = {name: value for name, value in given.items() if value is not None and value != ()}
    for name, field in settings.model_fields.items():
        variants = _variants(field)
        if variants:
            _merge_variant(loaded, flags, name, field, variants)
    return settings.read(loaded, flags, where=where)


def read_settings_together(
    classes: Sequence[type[Settings]], config: Path | None, given: dict[str, Any]
) -> list[Settings]:
    """Read one configuration file and one set of flags as several settings, each taking the names it knows.

    Raises SettingsError with the problems of all; names that none knows are the first one's.
    """
    loaded = load_yaml(config) if config else {}
    names = [setting_fields(settings).keys() for settings in classes]
    unknown = (loaded.keys() | given.keys()) - set().union(*names)
    where = str(config) if config else "the settings"
    read, problems = [], []
    for settings, own in zip(classes, names, strict=True):
        mine = own | unknown if settings is classes[0] else own
        try:
            read.append(
                _read(
                    settings,
                    {name: value for name, value in loaded.items() if name in mine},
                    {name: value for name, value in given.items() if name in mine},
                    where,
                )
            )
        except SettingsError as error:
            problems.append(str(error))
    if problems:
        raise SettingsError("\n".join(problems))
    return read


def setting_fields(settings: type[Settings]) -> dict[str, FieldInfo]:
    """Return every setting by the name of its flag: those of nested settings are beside the choice of their kind."""
    fields = {}
    for name, field in settings.model_fields.items():
        fields[name] = field
        for kind in _variants(field).values():
            fields |= {inner: about for inner, about in kind.model_fields.items() if inner != _TAG}
    return fields


def flat_values(settings: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of some of the settings by the names of their flags.

    Nested settings become the kind under their own name, and their settings beside it.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        field = settings.model_fields.get(name)
        if isinstance(value, Mapping) and field is not None and _variants(field):
            flat |= {name if inner == _TAG else inner: nested for inner, nested in value.items()}
        else:
            flat[name] = value
    return flat


class _Listed(click.Choice[str]):
    """Shows and completes the values there are; the settings class refuses others, together with all other problems."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ARG002
        return value


class _Flag:
    def __init__(self, name: str, attributes: dict[str, Any]) -> None:
        dashed = name.replace("_", "-")
        self.names = [f"--{dashed}/--no-{dashed}" if attributes.get("is_flag") else f"--{dashed}", name]
        self.attributes = {"default": None, **attributes}

    def explained(self, before: str = "", after: str = "") -> _Flag:
        """Return the flag with more to its help."""
        flag = copy.copy(self)
        flag.attributes = {**self.attributes, "help": f"{before}{self.attributes['help']} {after}".rstrip()}
        return flag


def _flags(settings: type[Settings], required: tuple[str, ...]) -> Iterator[_Flag]:
    for name, field in settings.model_fields.items():
        variants = _variants(field)
        if variants:
            yield from _variant_flags(name, field, variants)
        else:
            yield _Flag(name, {**_type_of(field.annotation), "help": _help(field, name in required)})


def _variant_flags(name: str, field: FieldInfo, variants: dict[str, type[Settings]]) -> Iterator[_Flag]:
    """One flag chooses the kind; every setting of every kind is a flag of its own."""
    yield _Flag(name, {"type": _Listed(list(variants)), "help": _help(field, required=False)})
    for inner in dict.fromkeys(inner for kind in variants.values() for inner in kind.model_fields if inner != _TAG):
        holders = {kind: settings for kind, settings in variants.items() if inner in settings.model_fields}
        about = next(iter(holders.values())).model_fields[inner]
        whose = "" if len(holders) == len(variants) else f"{'/'.join(holders)}: "
        text = f"{whose}{_help(about, required=False)}{_other_defaults(inner, holders)}"
        yield _Flag(inner, {**_type_of(about.annotation), "help": text})


def _other_defaults(name: str, holders: Mapping[str, type[Settings]]) -> str:
    """Return what the default is for the kinds that have another one than the first, to go after its help."""
    first, *others = [(kind, holder.model_fields[name].default) for kind, holder in holders.items()]
    different = [
        f"{kind}: {default}" for kind, default in others if None not in (default, first[1]) and default != first[1]
    ]
    return f" [default of {', '.join(different)}]" if different else ""


def _merge_variant(
    loaded: dict[str, Any], flags: dict[str, Any], name: str, field: FieldInfo, variants: dict[str, type[Settings]]
) -> None:
    """Gather the flags of one kind into the nested settings, on top of what the file says of the same kind.

    Flags without a kind mean the default kind if it has them all, or the only one that has.
    """
    inner_names = {inner for kind in variants.values() for inner in kind.model_fields if inner != _TAG}
    inner = {key: flags.pop(key) for key in inner_names & flags.keys()}
    kind = flags.pop(name, None)
    if not inner and kind is None:
        return
    nested = loaded.get(name)
    before: dict[str, Any] = nested if isinstance(nested, dict) else {}
    if kind is not None and before.get(_TAG) not in (None, kind):
        before = {}
    if kind is None and _TAG not in before:
        holders = [tag for tag, variant in variants.items() if inner.keys() <= variant.model_fields.keys()]
        default = getattr(field.default, _TAG, next(iter(variants)))
        kind = holders[0] if len(holders) == 1 else default
    flags[name] = {**before, **({_TAG: kind} if kind else {}), **inner}


def _variants(field: FieldInfo) -> dict[str, type[Settings]]:
    """Return the settings classes of a union told apart by ``kind``, by their kind; empty for any other field."""
    options = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else ()
    if not options or not all(inspect.isclass(option) and issubclass(option, Settings) for option in options):
        return {}
    return {get_args(option.model_fields[_TAG].annotation)[0]: option for option in options}


def _type_of(annotation: Any) -> dict[str, Any]:
    """Return click's view of a type. Anything that is not plain stays text, which the settings class reads."""
    if get_origin(annotation) is Annotated:
        return _type_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        options = [option for option in get_args(annotation) if option is not type(None)]
        return _type_of(options[0]) if len(options) == 1 else {"type": str, "metavar": "VALUE"}
    if get_origin(annotation) is Literal:
        values = get_args(annotation)
        return {"type": _Listed([str(value) for value in values])}
    if get_origin(annotation) in (tuple, list):
        return {"type": str, "multiple": True}
    if annotation is bool:
        return {"is_flag": True}
    metavar = {int: "N", float: "X"}.get(annotation, "TEXT")
    return {"type": str, "metavar": metavar}


def _help(field: FieldInfo, required: bool) -> str:
    text = " ".join((field.description or "").split()).replace("``", "")
    if required or field.is_required():
        return f"{text} [required]"
    default = field.default
    if default is None or default == () or isinstance(default, Settings):
        if isinstance(default, Settings):
            return f"{text} [default: {getattr(default, _TAG)}]"
        return text
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text} [default: {shown}]"
