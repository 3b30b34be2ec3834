"""Command-line flags generated from settings classes, so that a setting and its help live in one place.

A flag that is not given is not passed on: defaults stay with the settings class, and a configuration file given with
``--config`` is only overridden by flags that were typed.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
import yaml
from pydantic.fields import FieldInfo

from tailrace.pipeline.shared.run_options import FILE, FILE_OR_ARTIFACT
from tailrace.pipeline.shared.sections import current_name, option, running
from tailrace.storage.artifact import REQUEST, read_json, write_output
from tailrace.storage.errors import SettingsError
from tailrace.storage.settings import Retired, Settings, load_yaml

Command = TypeVar("Command", bound=Callable[..., Any])
Read = TypeVar("Read", bound=Settings)

logger = logging.getLogger(__name__)

_TAG = "kind"


def settings_options(
    settings: type[Settings],
    required: tuple[str, ...] = (),
    also: Mapping[str, type[Settings]] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Callable[[Command], Command]:
    """Return a decorator that adds ``--config`` and a flag per setting; values arrive in the argument ``given``.

    ``also`` has further classes by when they count, such as ``with --live``. A name in several is one flag for all of
    them. ``notes`` has what a command adds to the help of a setting, by its name. The flags' headings are those of the
    classes' ``help_sections``; those of ``help_basics`` come first and have none.
    """
    flags = {flag.name: flag for flag in _flags(settings, required)}
    for when, further in (also or {}).items():
        flags |= {flag.name: flag for flag in _flags(further, (), when) if flag.name not in flags}
    flags = {name: flags[name] for name in dict.fromkeys([*settings.help_basics, *flags])}

    def decorate(command: Command) -> Command:
        for name, flag in reversed(flags.items()):
            section = None if name in settings.help_basics else flag.section
            more = (notes or {}).get(name, "")
            command = option(*flag.names, section=section, help=flag.explained(more), **flag.attributes)(command)
        command = running(
            "--save-config", type=FILE, expose_value=False, callback=_keep_file,
            help="Write the settings that would be used to a file for --config, and stop.",
        )(command)  # fmt: skip
        return option(
            "--config",
            type=FILE_OR_ARTIFACT,
            help="YAML file of settings, or an artifact made with them; flags override.",
        )(command)

    return decorate


def read_settings(settings: type[Read], config: Path | None, given: dict[str, Any]) -> Read:
    """Merge a configuration file with the flags that were given, and validate once."""
    (read,) = read_settings_together([settings], config, given)
    assert isinstance(read, settings)
    return read


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

    ``config`` may be an artifact's folder too, whose settings it then is. With ``--save-config`` the command ends here.
    Raises SettingsError with the problems of all; names that none knows are the first one's.
    """
    loaded = _load_config(classes, config) if config else {}
    given = current_names(classes, given)
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
    _save_config(read)
    return read


def _load_config(classes: Sequence[type[Settings]], config: Path) -> dict[str, Any]:
    """Return the settings in a YAML file, or those that an artifact's request records."""
    file = config / REQUEST if config.is_dir() else config
    if config.is_dir() and not file.is_file():
        raise SettingsError(
            f"{config}: is no artifact, so it has no settings; give a YAML file, or an artifact's folder"
        )
    if file.name != REQUEST:
        return current_names(classes, load_yaml(file))
    loaded = read_json(file)
    if not isinstance(loaded, dict) or "runs" in loaded:
        raise SettingsError(f"{config}: was made with settings of several runs; give the folder of one of them")
    own = loaded.get("settings", loaded)  # a cache's request is its settings
    beside = [part for part in (loaded.get("live"), loaded.get("model_scores")) if part and own is not loaded]
    if not all(isinstance(part, dict) for part in (own, *beside)):
        raise SettingsError(f"{file}: its settings are no JSON object; restore it, or give a YAML file")
    fields = {name: field for settings in classes for name, field in settings.model_fields.items()}
    current = {name: retired.new for name, retired in _former_names(classes).items()}
    recorded = {current.get(name, name): value for part in (*beside, own) for name, value in part.items()}
    if unknown := sorted(name for name in own if current.get(name, name) not in fields):
        raise SettingsError(
            f"{config}: was made with other settings than this command has, such as {', '.join(unknown[:3])}; give an "
            "artifact that this command makes"
        )
    used = {name: value for name, value in recorded.items() if name in fields}
    used = {name: value for name, value in used.items() if value not in (None, _recorded_default(fields[name]))}
    return {name: value for name, value in used.items() if name != "expansion" or "d_sae" not in used}


def _recorded_default(field: FieldInfo) -> Any:
    default = field.get_default(call_default_factory=False)
    return default.model_dump(mode="json") if isinstance(default, Settings) else default


_SAVED = "save-config"
"""Key in a context's ``meta``: the file that settings are written to."""


def _keep_file(ctx: click.Context, _: click.Parameter, file: Path | None) -> None:
    ctx.meta[_SAVED] = file


def saves_config() -> bool:
    """Return whether the command that runs was asked for its settings, instead of what it makes."""
    context = click.get_current_context(silent=True)
    return context is not None and context.meta.get(_SAVED) is not None


def _save_config(read: Sequence[Settings]) -> None:
    """Write settings and end the command, if it was asked to."""
    if not saves_config():
        return
    context = click.get_current_context()
    file: Path = context.meta[_SAVED]
    lines = [f"# Settings of {context.command_path}. Lines that begin with # have the defaults."]
    known: set[str] = set()
    for settings in read:
        lines += _yaml_lines(settings, settings.model_dump(mode="json"), but=known)
        known |= type(settings).model_fields.keys()
    write_output(file, "".join(f"{line}\n" for line in lines).encode())
    click.echo(f"{file}: written, nothing else; use it with --config {file}")
    context.exit()


def _yaml_lines(
    settings: Settings, values: Mapping[str, Any], *, indent: str = "", but: Collection[str] = ()
) -> Iterator[str]:
    """Yield lines for each setting; those that have their default as a comment, except the kind of a choice."""
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if name in but:
            continue
        if isinstance(value, Settings):
            yield f"{indent}{name}:"
            yield from _yaml_lines(value, values[name], indent=indent + "  ")
        else:
            written = yaml.safe_dump(values.get(name), default_flow_style=True, width=sys.maxsize).removesuffix("...\n")
            is_default = name != _TAG and value == field.get_default(call_default_factory=True)
            yield f"{indent}{'# ' if is_default else ''}{name}: {written.strip()}"


def current_names(classes: Sequence[type[Settings]], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a user gave by the names that settings have now, and warn of each name that is retired.

    Other names of a setting (``ALIASES``) are as good as its own.
    Raises SettingsError for names that are refused by now, and for a setting given by two names.
    """
    kinds = {name: _kinds(field) for settings in classes for name, field in settings.model_fields.items()}
    fields = {name for settings in classes for name in setting_fields(settings)}
    former = _former_names([*classes, *(kind for several in kinds.values() for kind in several)])
    current: dict[str, Any] = {}
    problems = []
    for written, value in values.items():
        if value is None or value == ():
            continue  # a flag that was not given
        name = current_name(written, fields)
        if written in former:
            name, since, is_refused = former[written]
            advice = f"{written} is called {name} since {since}; write {name}"
            if is_refused:
                problems.append(advice)
            else:
                logger.warning("%s", advice)
        if name in current:
            problems.append(f"{name} is given twice, once by another name; leave one out")
        is_nested = bool(kinds.get(name)) and isinstance(value, Mapping)
        current[name] = current_names(kinds[name], value) if is_nested else value
    if problems:
        raise SettingsError("\n".join(problems))
    return current


def _kinds(field: FieldInfo) -> list[type[Settings]]:
    return list(_variants(field).values())


def _former_names(classes: Iterable[type[Settings]]) -> dict[str, Retired]:
    return {old: name for settings in classes for old, name in settings.retired.items()}


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


@dataclass(frozen=True)
class _Flag:
    name: str
    about: str
    facts: str
    """Whether it is required, and what its default is."""
    type: dict[str, Any]
    section: str | None = None

    @property
    def names(self) -> list[str]:
        dashed = self.name.replace("_", "-")
        return [f"--{dashed}/--no-{dashed}" if self.type.get("is_flag") else f"--{dashed}", self.name]

    @property
    def attributes(self) -> dict[str, Any]:
        return {"default": None, **self.type}

    def explained(self, more: str = "") -> str:
        """Return the help, with ``more`` to it."""
        facts = f"[{self.facts}]" if self.facts else ""
        return " ".join(part for part in (self.about, more, facts) if part)


def _flags(settings: type[Settings], required: tuple[str, ...], when: str = "") -> Iterator[_Flag]:
    """Yield the flags of all settings, with the headings under which they stand; flags of former names are hidden."""
    begins = {name: heading for kind in settings.__mro__[::-1] for name, heading in _own_sections(kind).items()}
    section = None
    for name, field in settings.model_fields.items():
        section = begins.get(name, section)
        heading = f"{when.capitalize()}: {section.lower()}" if section and when else section
        former = _former_names([settings, *_kinds(field)])
        for flag in _flags_of(name, field, name in required, when):
            yield replace(flag, section=heading)
            for old in (old for old, known in former.items() if known.new == flag.name):
                yield replace(flag, name=old, type={**flag.type, "hidden": True})


def _own_sections(kind: type) -> Mapping[str, str]:
    sections: Mapping[str, str] = vars(kind).get("help_sections", {})
    return sections


def _flags_of(name: str, field: FieldInfo, required: bool, when: str) -> Iterator[_Flag]:
    """Yield a setting's flag; of a choice, one for the kind, and one for every setting of every kind."""
    variants = _variants(field)
    if not variants:
        yield _Flag(name, _about(field), _facts(field, required, when), _type_of(field.annotation))
        return
    yield _Flag(name, _about(field), _facts(field, required, when), {"type": _Listed(list(variants))})
    for inner in dict.fromkeys(inner for kind in variants.values() for inner in kind.model_fields if inner != _TAG):
        holders = {kind: one.model_fields[inner] for kind, one in variants.items() if inner in one.model_fields}
        about = next(iter(holders.values()))
        whose = "" if len(holders) == len(variants) else f"{'/'.join(holders)}: "
        facts = _facts(about, False, f"with {' or '.join(holders)}") + _other_defaults(holders)
        yield _Flag(inner, f"{whose}{_about(about)}", facts, _type_of(about.annotation))


def _other_defaults(holders: Mapping[str, FieldInfo]) -> str:
    """Return the defaults of the kinds that have another one than the first, to go after that."""
    first, *others = [(kind, field.default) for kind, field in holders.items()]
    different = {kind: default for kind, default in others if None not in (default, first[1]) and default != first[1]}
    if not different:
        return ""
    own = "default: off" if first[1] is False else ""  # which is not told by itself
    return "; ".join([own, *(f"with {kind}: {_shown(default)}" for kind, default in different.items())])


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


def _about(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("``", "")


def _facts(field: FieldInfo, required: bool, when: str) -> str:
    """Return whether a setting is required, and when, or its default. That a switch is off goes without saying."""
    if required or field.is_required():
        return f"required {when}".rstrip()
    shown = "" if field.default is False else _shown(field.default)
    return f"default: {shown}" if shown else ""


def _shown(default: Any) -> str:
    """Return a default as it would be typed; nothing where there is none."""
    if isinstance(default, Settings):
        return str(getattr(default, _TAG))
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    if isinstance(default, int):
        return f"{default:_}" if default >= 10_000 else str(default)
    return "" if default is None else str(default)
