"""Which features are meant, as typed: ``--feature 89,100-200 --feature 7``, and of several layers ``layer8:89``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from tailrace.storage.errors import SettingsError

_PART = re.compile(r"(\d{1,18})\s*(?:-\s*(\d{1,18}))?")
_SHOWN = 5


def split_features(value: Any) -> Any:
    """Return numbers and texts such as ``1,5-9``, alone or in a list as YAML has them, as one part per number or range.

    Several ways to type the same parts are one setting so. Anything else is returned for pydantic to refuse.
    """
    items = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, str | int) and not isinstance(item, bool) for item in items):
        return value
    return tuple(part.strip() for item in items for part in str(item).split(","))


FeatureSelection = Annotated[tuple[str, ...], BeforeValidator(split_features)]
"""A setting that chooses features; empty if none is chosen. ``parse_features`` reads it."""


def parse_features(texts: Sequence[str], n_features: int, flag: str = "--feature") -> list[int]:
    """Return the chosen features, in the order they are named, each once; ``flag`` is what a message calls them.

    Both ends of a range belong to it. Raises SettingsError with everything that cannot be read or does not exist.
    """
    chosen: dict[int, None] = {}
    problems = []
    for part in split_features(texts):
        match = _PART.fullmatch(part)
        if match is None:
            problems.append(f"{part!r} is no feature and no range of features")
            continue
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            problems.append(f"{part!r} ends before it begins; write {last}-{first}")
        elif last >= n_features:
            problems.append(f"{part!r} is beyond the last feature, {n_features - 1}")
        else:
            chosen.update(dict.fromkeys(range(first, last + 1)))
    if problems:
        rest = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        lines = "".join(f"\n  {line}" for line in [*problems[:_SHOWN], *rest])
        raise SettingsError(f"{flag}: not every part is a feature, or a range such as 100-200, of these:{lines}")
    return list(chosen)


def parse_layer_features(
    texts: Sequence[str], layers: Mapping[str, int], flag: str = "--feature"
) -> list[tuple[int, int]]:
    """Return the chosen features, (layer by its place in ``layers``, feature), in the order they are named, each once.

    ``layers`` has the number of features by name. Where there are several, a part begins with a name and a colon,
    ``layer8:89,100-200``, or with the number the name ends in, ``8:89``, and what follows is of that layer until
    another is named. Raises SettingsError for features of no layer, with the layers there are.
    """
    names = list(layers)
    parts: list[tuple[int, str]] = []
    problems = []
    index = 0 if len(names) == 1 else None
    for part in split_features(texts):
        layer, colon, rest = part.rpartition(":")
        if colon:
            fitting = [n for n, name in enumerate(names) if layer in (name, _number_in(name))]
            index = fitting[0] if len(fitting) == 1 else None
        if index is None:
            problems.append(f"{part!r} is of no layer here")
            continue
        parts.append((index, rest))
    if problems:
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        raise SettingsError(
            f"{flag}: {'; '.join(problems)}. There are {shown}; write LAYER:FEATURE, such as {names[-1]}:0"
        )
    for index in dict.fromkeys(index for index, _ in parts):
        parse_features(
            [rest for layer, rest in parts if layer == index], layers[names[index]], flag
        )  # every problem at once
    found = [
        (index, feature) for index, rest in parts for feature in parse_features([rest], layers[names[index]], flag)
    ]
    return list(dict.fromkeys(found))


def _number_in(name: str) -> str | None:
    match = re.search(r"(\d{1,9})$", name)
    return match[1] if match else None
