"""A blind case study: say what a feature is about before seeing what it fires on, with a record of what was seen when.

The reference's rule was kept by hand: no look at tokens or strongest examples before there is a hypothesis. Here
evidence lies sealed, every look at it goes into the ledger before it is shown, and the reveal is refused until a
hypothesis is on file. What a study may not do, it cannot do by accident.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow.compute as pc

from tailrace.analysis.blind.sampling import LiveRule, draw
from tailrace.analysis.blind.withholding import Mode, Source, withhold
from tailrace.pipeline.blind.draw import Dictionary
from tailrace.pipeline.blind.ledger import Clock, Entry, Ledger, utc_now
from tailrace.pipeline.blind.sealed import seal, unseal
from tailrace.pipeline.blind.settings import OUTCOMES, Outcome
from tailrace.pipeline.shared.feature_selection import parse_layer_features
from tailrace.storage.artifact import new_directory
from tailrace.storage.errors import ArtifactMismatch, SettingsError
from tailrace.storage.tables import TablesManifest, read_schema, read_table

LEDGER = "ledger.jsonl"


_LIVE = LiveRule(min_log10_frequency=-4.0, min_active=4)
"""Features among which a random one is drawn."""
_WEIGHTS = ("promoted_tokens", "promoted_logits", "suppressed_tokens", "suppressed_logits")


@dataclass(frozen=True)
class Evidence:
    """A piece of evidence as the ledger knows it."""

    number: int
    kind: str
    """What it is, in a word or two: activations, connections, paths, …"""
    source: Source
    about: str
    """A line that says what it shows; nothing of the text."""
    commitment: str


class BlindStudy:
    """One feature's study, in a directory of its own."""

    def __init__(self, directory: Path, clock: Clock = utc_now) -> None:
        self.directory = directory
        self._ledger = Ledger(directory / LEDGER, clock)

    @classmethod
    def begin(cls, directory: Path, subject: dict[str, Any], mode: Mode, clock: Clock = utc_now) -> BlindStudy:
        """Open a ledger about ``subject``, JSON that says which feature it is.

        Raises ArtifactMismatch if a study was begun there already.
        """

        def check(entries: list[Entry]) -> None:
            if entries:
                raise _begun_already(directory)

        study = cls(directory, clock)
        study._ledger.append("begin", check, begins=True, subject=subject, mode=mode)
        return study

    # What is on file

    def entries(self) -> list[Entry]:
        """Return the ledger's entries; the errors are those of ``Ledger.entries``."""
        return self._ledger.entries()

    @property
    def mode(self) -> Mode:
        """What is withheld."""
        mode: Mode = self.entries()[0]["mode"]
        return mode

    @property
    def is_revealed(self) -> bool:
        """Whether evidence has been opened."""
        return _has(self.entries(), "reveal")

    def evidence(self) -> list[Evidence]:
        """Return the pieces of evidence, in the order in which they were added."""
        return [
            Evidence(number, one["kind"], one["source"], one["about"], one["commitment"])
            for number, one in enumerate(_events(self.entries(), "evidence"), start=1)
        ]

    # What may be done

    def add(self, kind: str, content: Any, *, source: Source, about: str = "") -> Evidence:
        """Seal ``content``, any JSON, as evidence; it may be added before or after the reveal.

        ``about`` is shown and kept in the ledger as it is. Raises SettingsError for an unknown source.
        """
        if source not in get_args(Source):
            raise SettingsError(f"source {source!r}: wanted {' or '.join(get_args(Source))}")
        number = 0

        def seal_next(entries: list[Entry]) -> dict[str, Any]:
            nonlocal number  # known under the ledger's lock only: two at once would seal over each other
            number = len(_events(entries, "evidence")) + 1
            return {"commitment": seal(self._path(number), {"content": content})}

        entry = self._ledger.append("evidence", seal_next, kind=kind, source=source, about=about)
        return Evidence(number, kind, source, about, entry["commitment"])

    def view(self, number: int) -> Any:
        """Return a piece of evidence: what the mode leaves of it, or, after the reveal, all of it.

        The view is on file before it is returned. Raises SettingsError if there is no such evidence, ArtifactCorrupt
        if it is not what was added.
        """
        one = self._find(number)
        content = unseal(self._path(number), one.commitment)["content"]
        revealed = self.is_revealed
        self._ledger.append("view", evidence=number, kind=one.kind, revealed=revealed)
        return content if revealed else withhold(content, mode=self.mode, source=one.source)

    def note(self, text: str) -> None:
        """Put a remark on file."""
        self._ledger.append("note", text=_said(text, "note"))

    def hypothesise(self, text: str) -> None:
        """Put a hypothesis on file; the last one before the reveal counts. Raises SettingsError after the reveal."""

        def check(entries: list[Entry]) -> None:
            if _has(entries, "reveal"):
                raise SettingsError(
                    f"{self.directory}: the evidence has been revealed, and a hypothesis now would be none; add a note"
                )

        self._ledger.append("hypothesis", check, text=_said(text, "hypothesis"))

    def reveal(self) -> None:
        """Open all evidence from here on. Raises SettingsError unless a hypothesis is on file."""

        def check(entries: list[Entry]) -> None:
            if not _has(entries, "hypothesis"):
                raise SettingsError(
                    f"{self.directory}: nothing is revealed before a hypothesis is on file; say what it is about"
                )

        if not self.is_revealed:
            self._ledger.append("reveal", check, viewed=self._viewed())

    def conclude(self, outcome: Outcome, text: str = "") -> None:
        """Put on file whether the hypothesis was right. Raises SettingsError before the reveal or for another word."""
        if outcome not in OUTCOMES:
            raise SettingsError(f"outcome {outcome!r}: wanted {', '.join(OUTCOMES)}")

        def check(entries: list[Entry]) -> None:
            if not _has(entries, "reveal"):
                raise SettingsError(f"{self.directory}: a verdict comes after the reveal, and there was none yet")

        self._ledger.append("verdict", check, outcome=outcome, text=text)

    def _viewed(self) -> list[int]:
        """Return which evidence had been looked at."""
        return sorted({one["evidence"] for one in _events(self.entries(), "view")})

    def _find(self, number: int) -> Evidence:
        there = self.evidence()
        if not 1 <= number <= len(there):
            known = ", ".join(f"{one.number} ({one.kind})" for one in there) or "none yet"
            raise SettingsError(f"{self.directory}: has no evidence {number}; there is {known}")
        return there[number - 1]

    def _path(self, number: int) -> Path:
        return self.directory / f"evidence-{number:04d}.sealed"


def _events(entries: Sequence[Entry], event: str) -> list[Entry]:
    return [entry for entry in entries if entry["event"] == event]


def _has(entries: Sequence[Entry], event: str) -> bool:
    return bool(_events(entries, event))


def _said(text: str, what: str) -> str:
    if not text.strip():
        raise SettingsError(f"the {what} is empty; say something")
    return text.strip()


class TableEvidence(NamedTuple):
    """A piece of evidence to be added to a study."""

    kind: str
    content: Any
    source: Source
    about: str


def begin_from_tables(
    directory: Path,
    tables: Path,
    *,
    feature: int | str | None,
    mode: Mode,
    seed: int = 0,
    rule: LiveRule = _LIVE,
) -> BlindStudy:
    """Begin a study of ``feature``, or of a random live one, with the evidence its tables hold.

    Of a folder of tables, a feature is written ``layer8:89``. Raises the errors of opening tables, SettingsError for a
    feature they do not have, and ArtifactMismatch if a study was begun at ``directory`` already.
    """
    dictionary = Dictionary.open(tables)
    if feature is None:
        (drawn,) = draw(*dictionary.liveness, 1, rule, seed, "study")
        tables, feature = dictionary.place(drawn.feature)
    else:
        names = [one.name for one in dictionary.tables]
        sizes = dict(zip(names, np.diff(dictionary.starts).tolist(), strict=True))
        chosen = parse_layer_features([str(feature)], sizes)
        if len(chosen) != 1:
            raise SettingsError(f"--feature {feature}: is {len(chosen)} features; a study is of one")
        ((index, feature),) = chosen
        tables = dictionary.tables[index]
    manifest = TablesManifest.read(tables)
    subject = {"site": manifest.site.name, "feature": feature, "tables": manifest.digest, "seed": seed}
    if (directory / LEDGER).exists():
        raise _begun_already(directory)
    with new_directory(directory) as folder:
        study = BlindStudy.begin(folder, subject, mode)
        for one in table_evidence(tables, feature):
            study.add(one.kind, one.content, source=one.source, about=one.about)
    return BlindStudy(directory)


def _begun_already(directory: Path) -> ArtifactMismatch:
    return ArtifactMismatch(f"{directory}: a study was begun here already; choose another directory")


def table_evidence(tables: Path, feature: int) -> list[TableEvidence]:
    """Return what tables hold of a feature: examples, and connections and token effects where they were made."""
    found = []
    examples = read_table(tables / "examples.parquet", where=pc.field("feature") == feature).to_pylist()
    about = f"{len(examples)} examples: contexts, positions and activations around them"
    found.append(TableEvidence("activations", examples, "input", about))
    if (path := tables / "connections.parquet").exists():
        rows = read_table(path, where=pc.field("feature") == feature).to_pylist()
        about = f"{len(rows)} connections to tokens, heads and features of later layers"
        found.append(TableEvidence("connections", rows, "weights", about))
    features = tables / "features.parquet"
    if names := [name for name in _WEIGHTS if name in read_schema(features).names]:
        (row,) = read_table(features, names, pc.field("feature") == feature).to_pylist()
        if row[names[0]] is not None:
            found.append(TableEvidence("token effects", row, "weights", "tokens it promotes and suppresses"))
    return found
