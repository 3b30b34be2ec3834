"""JSON and YAML that users and strangers wrote, as values; with limits, since a few bytes can exhaust a parser."""

from __future__ import annotations

import errno
import io
import itertools
import os
import re
import reprlib
import stat
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from pydantic import TypeAdapter, ValidationError

from tailrace.storage.errors import SettingsError

LONGEST_TEXT = 1 << 28
"""Bytes of a text that is read at once."""
LONGEST_LOG = 1 << 32
"""Bytes of a log that is read at once: a line of each of ten million steps."""
LONGEST_YAML = 1 << 20
"""Bytes of a file of settings: ten thousand runs of a sweep take a fifth of it."""
MOST_YAML_VALUES = 200_000
"""Values in one, each counted wherever it is used: nine lines of aliases make 10⁹ of them."""
DEEPEST_YAML = 50
_LARGEST_BITS = 1024
_SURROGATE = re.compile("[\ud800-\udfff]")

_ANY: TypeAdapter[Any] = TypeAdapter(Any)

_LONGEST_SHOWN = 200
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxdict, _SHOWN.maxlist, _SHOWN.maxtuple, _SHOWN.maxset = 3, 20, 20, 20, 20
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = _LONGEST_SHOWN


def open_regular(path: Path) -> BinaryIO:
    """Return a file of an artifact, opened; raise ValueError for a pipe or a device, which may never end, and OSError.

    A link to a regular file is one.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe waits for its writer otherwise
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise ValueError(_IRREGULAR) from error
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise ValueError(_IRREGULAR)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


_IRREGULAR = "is no regular file but a pipe or a device, which may never end"


def read_regular(path: Path, longest: int = LONGEST_TEXT) -> bytes:
    """Return what a file of an artifact holds; raise what ``open_regular`` does, and ValueError if it is too long."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > longest:
            raise ValueError(f"is longer than {longest >> 20:,} MiB, which no such file is")
        return file.read()  # to be given a length, it would take memory of that length first


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Return a text file that somebody wrote, its line breaks as ``\\n``.

    Raises OSError, and ValueError for what is no text or longer than any that is read at once: a device never ends.
    """
    with path.open("rb") as file:
        data = file.read(LONGEST_TEXT + 1)
    if len(data) > LONGEST_TEXT:
        raise ValueError(f"it is longer than {LONGEST_TEXT >> 20} MiB")
    return io.TextIOWrapper(io.BytesIO(data), encoding=encoding).read()


def parse_json(data: str | bytes) -> Any:
    """Return the JSON value in a text. Raises ValueError for what is none, and for lists and objects 200 deep."""
    try:
        return _ANY.validate_json(data.encode() if isinstance(data, str) else data)
    except ValidationError as error:
        raise ValueError(error.errors(include_url=False)[0]["msg"].removeprefix("Invalid JSON: ")) from error


def read_yaml(path: Path, what: str = "settings") -> Any:
    """Return the value in a YAML file of ``what``; raise SettingsError for what is unreadable or beyond the limits."""
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST_YAML + 1)  # a device never ends
        if len(data) > LONGEST_YAML:
            raise ValueError(f"it is longer than {LONGEST_YAML >> 20} MiB")
        return _parse_yaml(data.decode())
    except FileNotFoundError as error:
        raise SettingsError(f"{path}: there is no such file; check the path of the {what}") from error
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: cannot be read as YAML: {error}") from error


class _Loader(yaml.SafeLoader):
    """Refuses a name that is given twice: YAML has none, and one of the values would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping. Raises ConstructorError."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return dict(super().construct_mapping(node, deep))


_MERGE = "tag:yaml.org,2002:merge"


def _parse_yaml(text: str) -> Any:
    try:
        value = yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except Exception as error:  # of a date, a number or a tag the parser raises whatever its text leads to
        raise ValueError(str(error)) from error
    level, n_values = [value], 0
    for _ in range(DEEPEST_YAML):
        n_values += len(level)
        if n_values > MOST_YAML_VALUES:
            raise ValueError(f"with its aliases it holds more than {MOST_YAML_VALUES:,} values")
        if any(isinstance(part, int) and part.bit_length() > _LARGEST_BITS for part in level):
            raise ValueError(f"it holds a number of more than {_LARGEST_BITS} bits")
        if any(isinstance(part, str) and is_broken(part) for part in level):
            raise ValueError("it holds half of a surrogate pair, which is no character")
        inner = itertools.chain.from_iterable(map(_parts, level))
        level = list(itertools.islice(inner, MOST_YAML_VALUES + 1))
        if not level:
            return value
    raise ValueError(f"it is nested more than {DEEPEST_YAML} deep, or refers to itself")


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, list | tuple | set) else []


def is_broken(text: str) -> bool:
    """Return whether a text holds half of a surrogate pair: no file in UTF-8 can hold that."""
    return _SURROGATE.search(text) is not None


def shown(value: Any) -> str:
    """Return a value as a message shows it: cut off where it is long or deep."""
    text = _SHOWN.repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
