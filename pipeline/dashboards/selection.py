"""Which features a site shows, as typed: ``89,100-200``."""

from __future__ import annotations

import re

from storage.errors import SettingsError

_PART = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")
_SHOWN = 5


def parse_features(text: str | None, n_features: int) -> list[int]:
    """Return the chosen features, sorted, each once; all of them for None.

    Both ends of a range belong to it. Raises SettingsError with everything that cannot be read or does not exist.
    """
    if text is None:
        return list(range(n_features))
    chosen: set[int] = set()
    problems = []
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            problems.append(f"{part.strip()!r} is no feature and no range of features")
            continue
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            problems.append(f"{part.strip()!r} ends before it begins; write {last}-{first}")
        elif last >= n_features:
            problems.append(f"{part.strip()!r} is beyond the last feature, {n_features - 1}")
        else:
            chosen.update(range(first, last + 1))
    if problems:
        rest = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        lines = "".join(f"\n  {line}" for line in [*problems[:_SHOWN], *rest])
        raise SettingsError(f"--features: write indices and ranges such as 89,100-200:{lines}")
    return sorted(chosen)
