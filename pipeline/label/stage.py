"""``pipeline label``: labels, notes and stars of features, given by hand or taken from a file, and written to one.

Of a folder of tables, such as those of every layer, the labels of all; each row of a file then says whose it is.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from tailrace.pipeline.artifacts.folders import artifacts_inside
from tailrace.pipeline.query.stage import check_folder, write_answer
from tailrace.pipeline.shared.feature_selection import parse_layer_features
from tailrace.storage.artifact import write_output
from tailrace.storage.errors import SettingsError
from tailrace.storage.formats import TABLES_KIND
from tailrace.storage.labels import (
    MOST_CHARACTERS,
    SCHEMA,
    Label,
    LabelEdit,
    as_json,
    edit_labels,
    login,
    owner_of,
    read_labels,
)
from tailrace.storage.names import files_below
from tailrace.storage.parsing import parse_json, read_text
from tailrace.storage.tables import TablesManifest, read_table

OWNER = ("transcoder", "site")
"""Columns of a file that say whose a row is."""
_TEXTS = ("label", "note", "author")
_FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_EXPLANATION = re.compile(r"(.+)_latent(\d+)\.txt")
_SHOWN = 5

Change = tuple[Path, Label, Label]
"""The tables, and what is said of one of their features before and after."""


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    n_changed: int
    kept: list[Change]
    """What the file would have made of labels that were there, and stayed: before, and what the file says."""


def layers_of(tables: Path) -> list[Path]:
    """Return ``tables``; of a folder that holds some, these."""
    return artifacts_inside(tables, TABLES_KIND) or [tables]


def run(
    tables: Path,
    features: Sequence[str],
    *,
    label: str | None = None,
    note: str | None = None,
    starred: bool | None = None,
    author: str | None = None,
) -> list[Change]:
    """Change what is said of features, named as ``89,100-120`` or ``layer8:89``; return each before and after.

    With nothing to change, they are only read. Raises SettingsError for features that are not there and for texts that
    cannot be kept, ArtifactMismatch for labels of another transcoder, and what opening tables raises.
    """
    layers = layers_of(tables)
    sizes = {one.name: TablesManifest.read(one).n_features for one in layers}
    by_layer: dict[Path, list[int]] = {}
    for index, feature in parse_layer_features(features, sizes, "FEATURE"):
        by_layer.setdefault(layers[index], []).append(feature)
    if label is None and note is None and starred is None:
        labels = {path: read_labels(path) for path in by_layer}
        own = [(path, labels[path].get(one, Label(one))) for path, chosen in by_layer.items() for one in chosen]
        return [(path, one, one) for path, one in own]
    by_whom = login() if author is None else author
    changes = []
    for path, chosen in by_layer.items():
        edits = [LabelEdit(feature, by_whom, label, note, starred) for feature in chosen]
        changes += [(path, before, after) for before, after in edit_labels(path, edits).values()]
    return changes


def every_label(tables: Path) -> pa.Table:
    """Return what is said of features: the columns of ``labels.parquet``, and whose each row is."""
    rows = []
    for path in layers_of(tables):
        owner = owner_of(TablesManifest.read(path))
        rows += [{**vars(label), **owner} for label in read_labels(path).values()]
    fields = [*SCHEMA, *(pa.field(name, pa.string()) for name in OWNER)]
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


def export_labels(tables: Path, output: Path) -> int:
    """Write every label to a .csv, .jsonl or .parquet file; return their number."""
    if output.suffix not in _READERS:
        raise SettingsError(f"--export {output}: the name decides the kind of file; end it in {', '.join(_READERS)}")
    check_folder(output)
    labels = every_label(tables)
    if output.suffix == ".jsonl":
        rows = [{**as_json(Label(**_without(row, OWNER))), **_only(row, OWNER)} for row in labels.to_pylist()]
        write_output(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    else:
        write_answer(output, labels, "csv" if output.suffix == ".csv" else "parquet")
    return int(labels.num_rows)


def import_labels(tables: Path, source: Path, *, replace: bool = False, author: str | None = None) -> Imported:
    """Take over labels from a .csv, .jsonl or .parquet file, or from a folder of delphi's explanations.

    Only what is empty here is filled in, unless ``replace`` is given. Nothing is taken if any row cannot be: raises
    SettingsError with every problem, for rows of another transcoder among them.
    """
    layers = layers_of(tables)
    by_whom = author or ("delphi" if source.is_dir() else login())
    edits = _edits_by_layer(source, layers, by_whom)
    n_changed, kept = 0, []
    for path, own in edits.items():
        here = read_labels(path)
        seen = {edit.feature: here[edit.feature].updated if edit.feature in here else None for edit in own}
        filled = [edit if replace else _filling(edit, here.get(edit.feature)) for edit in own]
        n_changed += sum(before != after for before, after in edit_labels(path, filled, seen=seen).values())
        for edit, fill in zip(own, filled, strict=True):
            if edit != fill and edit.of(here[edit.feature]) != here[edit.feature]:
                kept.append((path, here[edit.feature], edit.of(here[edit.feature])))
    return Imported(n_changed, kept)


def _filling(edit: LabelEdit, here: Label | None) -> LabelEdit:
    """Return the part of an edit that overwrites nothing."""
    if here is None:
        return edit
    label, note = None if here.label else edit.label, None if here.note else edit.note
    return LabelEdit(edit.feature, edit.author, label, note, edit.starred or None)


def _edits_by_layer(source: Path, layers: Sequence[Path], author: str) -> dict[Path, list[LabelEdit]]:
    manifests = {path: TablesManifest.read(path) for path in layers}
    owners = {path: owner_of(manifest) for path, manifest in manifests.items()}
    problems: list[str] = []
    edits: dict[Path, list[LabelEdit]] = {}
    rows = _explanations(source, manifests) if source.is_dir() else _rows(source, problems)
    for where, row in rows:
        try:
            edit = _edit(row, author)
            edits.setdefault(_layer_of(row, owners), []).append(edit)
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        more = [f"and {len(problems) - _SHOWN} more rows"] if len(problems) > _SHOWN else []
        raise SettingsError("\n".join([f"--import {source}: nothing was taken over:", *problems[:_SHOWN], *more]))
    if not edits:
        raise SettingsError(f"--import {source}: holds no label; give a file of `pipeline label --export`, or like it")
    return edits


def _edit(row: Mapping[str, Any], author: str) -> LabelEdit:
    """Return a row of a file as an edit. Raises ValueError saying what is wrong with it."""
    try:
        feature = int(str(row["feature"]))
    except (KeyError, ValueError) as error:
        raise ValueError("has no `feature` that is a whole number") from error
    texts = {name: row.get(name) for name in _TEXTS}
    if wrong := [name for name, text in texts.items() if text is not None and not isinstance(text, str)]:
        raise ValueError(f"{', '.join(wrong)}: wanted text, got {texts[wrong[0]]!r}")
    starred = row.get("starred")
    flag = None if starred in (None, "") else _FLAGS.get(str(starred).lower())
    if flag is None and starred not in (None, ""):
        raise ValueError(f"starred: wanted true or false, got {starred!r}")
    if texts["label"] is None and texts["note"] is None and flag is None:
        raise ValueError("has none of `label`, `note` and `starred`")
    return LabelEdit(feature, texts["author"] or author, texts["label"], texts["note"], flag)


def _layer_of(row: Mapping[str, Any], owners: Mapping[Path, Mapping[str, str]]) -> Path:
    """Return the tables that a row is of. Raises ValueError if there are none, or if that is not said."""
    said = {name: row[name] for name in OWNER if row.get(name)}
    fitting = [path for path, owner in owners.items() if all(owner[name] == value for name, value in said.items())]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(f"does not say which of {len(owners)} tables it is of; add a column `site`, or `transcoder`")
    whose = ", ".join(f"{name} {value}" for name, value in said.items())
    raise ValueError(f"is of another transcoder ({whose}); its features have nothing in common with those here")


def _rows(source: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every row of a file with the words by which a message names it; add to ``problems`` what is none."""
    reader = _READERS.get(source.suffix)
    if reader is None:
        raise SettingsError(f"--import {source}: wanted a file that ends in {', '.join(_READERS)}, or delphi's folder")
    try:
        yield from reader(source, problems)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--import {source}: cannot be read ({error}); give a file in UTF-8") from error


def _csv_rows(source: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:  # noqa: ARG001 - a reader
    with source.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield f"line {reader.line_num}", row


def _jsonl_rows(source: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_text(source).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            problems.append(f"line {number}: is not JSON ({error})")
            continue
        if isinstance(row, dict):
            yield f"line {number}", row
        else:
            problems.append(f"line {number}: wanted an object with `feature` and `label`")


def _parquet_rows(source: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:  # noqa: ARG001 - a reader
    table = read_table(source)
    facts = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"row {number}", {**_only(facts, OWNER), **row}


_READERS: dict[str, Callable[[Path, list[str]], Iterator[tuple[str, dict[str, Any]]]]] = {
    ".csv": _csv_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
}


def _explanations(folder: Path, manifests: Mapping[Path, TablesManifest]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield delphi's explanations, a file ``MODULE_latentN.txt`` with a JSON string each; other modules are left out.

    A long explanation is a note, and its beginning the label.
    """
    from tailrace.pipeline.formats.hooks import module_of

    owners = {
        module_of(manifest.site, manifest.model) or manifest.site.name: owner_of(manifest)
        for manifest in manifests.values()
    }
    modules = set()
    for path in sorted(file for file in files_below(folder) if file.match("*_latent*.txt")):
        match = _EXPLANATION.fullmatch(path.name)
        if match is None:
            continue
        modules.add(match[1])
        if match[1] not in owners:
            continue
        yield str(path), {"feature": match[2], **_explanation(path), **owners[match[1]]}
    if not modules & owners.keys():
        raise SettingsError(
            f"--import {folder}: has no explanation of {', '.join(owners)}"
            + (f"; there are some of {', '.join(sorted(modules)[:_SHOWN])}" if modules else "; delphi writes them to "
               "MODULE_latentN.txt")
        )  # fmt: skip


def _explanation(path: Path) -> dict[str, Any]:
    try:
        said = parse_json(read_text(path))
    except ValueError:
        return {}
    said = said.get("explanation") if isinstance(said, dict) else said
    if not isinstance(said, str) or len(said) <= MOST_CHARACTERS["label"]:
        return {"label": said}
    return {"label": said[: MOST_CHARACTERS["label"] - 1] + "…", "note": said}


def _only(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: row[name] for name in names if name in row}


def _without(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}
