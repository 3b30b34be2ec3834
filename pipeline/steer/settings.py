"""The settings of ``pipeline steer``, and how a change of a feature is typed."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field, field_validator, model_validator

from tailrace.storage.errors import SettingsError
from tailrace.storage.settings import Settings

if TYPE_CHECKING:
    from tailrace.analysis.interventions.generation import ChangeKind

OUTPUTS = (".html", ".parquet", ".json")
"""Endings of the files that texts are written to."""

_CHANGE = "write +30 or -30 to add, clamp:5 to set, scale:2 to multiply, or off"


class Change(NamedTuple):
    """What is done to an activation."""

    kind: ChangeKind
    value: float
    text: str
    """As it was typed."""


class Assignment(NamedTuple):
    """Features, and what is done to them: ``3:1850=+10,+30``."""

    features: str
    changes: tuple[Change, ...]
    """A change for each run; one alone is for all runs."""


def read_assignment(text: str) -> Assignment:
    """Read ``FEATURES=CHANGE,CHANGE``; raise ValueError for anything else."""
    features, equals, changes = text.rpartition("=")
    if not equals or not features.strip():
        raise ValueError(f"{text!r} does not say what to do with a feature; write LAYER:INDEX=+30, or =clamp:5, =off")
    return Assignment(features.strip(), tuple(_read_change(part.strip(), text) for part in changes.split(",")))


def _read_change(part: str, text: str) -> Change:
    if part == "off":
        return Change("off", 0.0, part)
    match = re.fullmatch(r"([+-]|clamp:|scale:)(.+)", part)
    if match is None:
        raise ValueError(f"{text!r}: {part!r} is no change; {_CHANGE}")
    sign = match[1] if match[1] in "+-" else ""
    try:
        value = float(sign + match[2])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text!r}: {match[2]!r} is no finite number; {_CHANGE}")
    kinds: dict[str, ChangeKind] = {"clamp:": "clamp", "scale:": "scale"}
    return Change(kinds.get(match[1], "add"), value, part)


class SteerSettings(Settings):
    """What to change, and how text is written."""

    help_sections: ClassVar = {"feature": "What to change", "tokens": "How text is written", "random": "What it shows"}

    feature: tuple[str, ...] = ()
    """Feature and what is done to it, such as 3:1850=+30, 8:89,90=off, 8:91=clamp:5 or 8:92=scale:2. All that are
    given are changed together; values with commas between them, =+10,+30, are runs beside each other."""

    nodes: tuple[str, ...] = ()
    """With --from-circuit: nodes and what is done to them, by name, such as mlp3tc[268]@6=off, or by number: 10=off is
    the ten features of most influence in its attribution graph."""

    tokens: int = Field(default=40, gt=0)
    """New tokens, unless the text ends before."""

    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token; any other draws tokens."""

    seed: int = 0
    """Decides which tokens are drawn, by the same random numbers in every run, and which random features."""

    random: int = Field(default=0, ge=0)
    """Beside each change, make the same of this many random sets of features of as large an effect: matched in
    activation frequency, and in strength times decoder norm. Needs --tables."""

    count: str | None = None
    """Count the texts that match this regular expression in what is new, such as '\\b(war|army)\\b'."""

    prompts_per_batch: int = Field(default=8, gt=0)
    """Prompts per pass of the language model. Memory: three times the logits of a batch."""

    @field_validator("feature", "nodes", mode="before")
    @classmethod
    def _take_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("feature", "nodes")
    @classmethod
    def _check_assignments(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        problems = []
        for text in value:
            try:
                read_assignment(text)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        return value

    @field_validator("count")
    @classmethod
    def _check_count(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression ({error})") from error
        return value

    @model_validator(mode="after")
    def _check_runs(self) -> SteerSettings:
        counts = {len(one.changes) for one in self.assignments} - {1}
        if len(counts) > 1:
            shown = " and ".join(str(count) for count in sorted(counts))
            raise ValueError(
                f"features have {shown} values: those with several are changed together, value by value, so give as "
                "many of each, or a single value for all runs"
            )
        return self

    @property
    def assignments(self) -> list[Assignment]:
        """What is typed for features, then for nodes."""
        return [read_assignment(text) for text in (*self.feature, *self.nodes)]

    @property
    def n_runs(self) -> int:
        """How many changed runs there are."""
        return max((len(one.changes) for one in self.assignments), default=0)


def check_output(path: Path) -> None:
    """Raise SettingsError unless the name says which kind of file is wanted."""
    if path.suffix.lower() not in OUTPUTS:
        raise SettingsError(f"--out {path}: the name decides the kind of file; end it in {', '.join(OUTPUTS)}")
