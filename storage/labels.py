"""Labels, notes and stars of features, in ``labels.parquet`` beside the tables of their transcoder.

Tables are published once and never change; labels change every day. So their file lies in the folder of the tables and
goes where it goes, but no manifest lists it: no digest of the tables depends on it. It says which transcoder, and which
layer of it, its features are of, and is refused beside tables of another.

Edits read, change and write the file under a lock, so none is lost. Whoever edits what they saw some time ago says
when that was last changed, and is refused if it has been changed since.
"""

from __future__ import annotations

import getpass
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from tailrace.storage.artifact import digest
from tailrace.storage.draft import Lock
from tailrace.storage.errors import ArtifactBusy, ArtifactCorrupt, ArtifactMismatch, LabelConflict, SettingsError
from tailrace.storage.tables import TablesManifest, column, read_schema, read_table, write_table

LABELS = "labels"
FILE = f"{LABELS}.parquet"
MOST_CHARACTERS = {"label": 200, "note": 10_000, "author": 100}
"""Longest texts: a label stands in lists, pages and graphs, and a page sends a note in one request."""
WAIT_SECONDS = 10.0
"""How long an edit waits for the lock; another edit takes milliseconds."""
_SHOWN = 5

SCHEMA = pa.schema(
    [
        column("feature", pa.int32(), "index of the feature"),
        column("label", pa.string(), "what it stands for, in a few words; empty if it has no name"),
        column("note", pa.string(), "anything else worth knowing; empty if nothing was written"),
        column("starred", pa.bool_(), "whether it is marked with a star"),
        column("updated", pa.timestamp("us", tz="UTC"), "time of its last edit"),
        column("author", pa.string(), "person or program that edited it last"),
    ]
)


@dataclass(frozen=True)
class Label:
    """What people and programs say of a feature."""

    feature: int
    label: str = ""
    note: str = ""
    starred: bool = False
    updated: datetime | None = None
    """Time of the last edit, which is also its version: later than that of any edit before. None before the first."""
    author: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is said of the feature."""
        return not (self.label or self.note or self.starred)


@dataclass(frozen=True)
class LabelEdit:
    """A change of what is said of a feature; what is None stays as it is."""

    feature: int
    author: str
    label: str | None = None
    note: str | None = None
    starred: bool | None = None

    def of(self, before: Label) -> Label:
        """Return what is said of the feature after the edit; an edit that changes nothing leaves no trace."""
        given: dict[str, Any] = {"label": self.label, "note": self.note, "starred": self.starred}
        after = replace(before, **{name: value for name, value in given.items() if value is not None})
        return before if after == before else replace(after, updated=_after(before.updated), author=self.author)


def read_labels(tables: Path) -> dict[int, Label]:
    """Return the label of every feature that has something said of it, in order; none without a file.

    Raises ArtifactMismatch if the file beside ``tables`` is of another transcoder, and what opening tables raises.
    """
    path = labels_file(tables)
    if path is None:
        return {}
    return {row["feature"]: Label(**row) for row in read_table(path, SCHEMA.names).to_pylist()}


def labels_file(tables: Path) -> Path | None:
    """Return the file of labels beside tables, None where there is none; the errors are those of ``read_labels``."""
    path = tables / FILE
    if not path.exists():
        return None
    owner = owner_of(TablesManifest.read(tables))
    schema = read_schema(path)
    facts = schema.metadata or {}
    refuse_other_owner(path, {key: facts[key.encode()].decode() for key in owner if key.encode() in facts}, owner)
    kinds = {field.name: field.type for field in schema}
    if others := [field.name for field in SCHEMA if kinds.get(field.name) != field.type]:
        raise ArtifactCorrupt(f"{path}: its columns {', '.join(others)} are not those of labels; restore it")
    return path


def owner_of(manifest: TablesManifest) -> dict[str, str]:
    """Return what tells the layer whose features tables are of: its transcoder's digest, and its site."""
    return {"transcoder": manifest.inputs.transcoder.digest, "site": manifest.site.name}


def refuse_other_owner(path: Path, found: Mapping[str, str], owner: Mapping[str, str]) -> None:
    """Raise ArtifactMismatch if labels at ``path`` are of another transcoder or layer than ``owner``."""
    if dict(found) == dict(owner):
        return
    if not found:
        raise ArtifactMismatch(
            f"{path}: does not say which transcoder its labels are of; move it elsewhere, and give its rows to "
            "`pipeline label --import` as .csv or .jsonl if they are of this one"
        )
    shown = [f"{owner_['transcoder'][:19]}…, {owner_['site']}" for owner_ in ({**owner, **found}, owner)]
    raise ArtifactMismatch(
        f"{path}: has labels of another transcoder ({shown[0]}) than the tables here ({shown[1]}); features of two "
        "transcoders have nothing in common but their numbers. Put it beside the tables it belongs to"
    )


def labels_digest(labels: Mapping[int, Label]) -> str:
    """Return the digest of what labels say, whoever said it and when."""
    return digest([[one.feature, one.label, one.note, one.starred] for _, one in sorted(labels.items())])


def edit_labels(
    tables: Path, edits: Iterable[LabelEdit], *, seen: Mapping[int, datetime | None] | None = None
) -> dict[int, tuple[Label, Label]]:
    """Change what is said of features, all edits or none; return what was said before and is now, by feature.

    ``seen`` has for a feature the ``updated`` that the editor saw, None for a feature of which nothing was said then:
    LabelConflict is raised if it is another now. Raises SettingsError for features that are not there and for texts
    that are too long or no text, with every problem; ArtifactMismatch for labels of another transcoder; StorageFull.
    """
    manifest = TablesManifest.read(tables)
    edits = [_checked(edit) for edit in edits]
    _refuse_problems(tables, edits, manifest.n_features)
    with _locked(tables):
        before = read_labels(tables)
        _refuse_changed(tables, before, seen or {})
        after = dict(before)
        for edit in edits:
            after[edit.feature] = edit.of(after.get(edit.feature, Label(edit.feature)))
        if after != before:
            _write(tables, owner_of(manifest), after)
    return {edit.feature: (before.get(edit.feature, Label(edit.feature)), after[edit.feature]) for edit in edits}


def _checked(edit: LabelEdit) -> LabelEdit:
    """Return an edit with its label on one line: it stands in lists and at nodes."""
    return edit if edit.label is None else replace(edit, label=" ".join(edit.label.split()))


def _refuse_problems(tables: Path, edits: Iterable[LabelEdit], n_features: int) -> None:
    problems = []
    for edit in edits:
        if not 0 <= edit.feature < n_features:
            problems.append(f"feature {edit.feature}: there are features 0 to {n_features - 1}")
        for name, text in (("label", edit.label), ("note", edit.note), ("author", edit.author)):
            problem = _text_problem(name, text or "")
            problems.append(problem and f"feature {edit.feature}, {problem}")
    if found := [problem for problem in problems if problem]:
        more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise SettingsError("\n".join([f"{tables}: labels cannot be kept:", *found[:_SHOWN], *more]))


def _text_problem(name: str, text: str) -> str:
    """Return why a text cannot be kept; nothing if it can."""
    if len(text) > MOST_CHARACTERS[name]:
        return f"{name}: has {len(text):,} characters, at most {MOST_CHARACTERS[name]:,} are kept; shorten it"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"{name}: is not valid Unicode ({error.reason}); write it again"
    return ""


def _refuse_changed(tables: Path, labels: Mapping[int, Label], seen: Mapping[int, datetime | None]) -> None:
    for feature, version in seen.items():
        now = labels.get(feature, Label(feature))
        if now.updated != version:
            who = f"{now.author} made it {now.label!r}" if now.label else "its label was taken away"
            raise LabelConflict(
                f"{tables}: feature {feature} was edited since you looked at it: {who}. Nothing of yours was written; "
                "look at it again, then save what you want to keep"
            )


def _after(before: datetime | None) -> datetime:
    """Return the time; later than ``before``, whatever the clock says."""
    now = datetime.now(UTC)
    return now if before is None else max(now, before + timedelta(microseconds=1))


def _write(tables: Path, owner: Mapping[str, str], labels: Mapping[int, Label]) -> None:
    rows = [asdict(label) for _, label in sorted(labels.items()) if not label.is_empty]
    write_table(tables / FILE, SCHEMA, pa.Table.from_pylist(rows, schema=SCHEMA).to_batches(), metadata=owner)


@contextmanager
def _locked(tables: Path) -> Iterator[None]:
    """Hold the lock on the folder of tables, waiting for other edits to end."""
    until = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            lock = Lock(tables)
            break
        except ArtifactBusy:
            if time.monotonic() > until:
                raise
            time.sleep(0.005)
    try:
        yield
    finally:
        lock.take_back()


def login() -> str:
    """Return the name under which edits of this machine's user are kept."""
    try:
        return getpass.getuser()[: MOST_CHARACTERS["author"]]
    except (KeyError, OSError):  # a user without a name, as in a container
        return "unknown"


def as_json(label: Label) -> dict[str, Any]:
    """Return a label as JSON values, its time in ISO 8601."""
    return {**asdict(label), "updated": None if label.updated is None else label.updated.isoformat()}
