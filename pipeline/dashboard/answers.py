"""What a page of a served site asks for beside its files: to read and edit a label, and to try a text.

A request and its answer are JSON objects. Labels are edited by the version that the page showed, so that of two people
who edit the same the second is told. A text is read by the language model, which is opened when the first is tried.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailrace.analysis.dashboards.values import visible_token
from tailrace.pipeline.dashboard.site_data import nearby_transcoder
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.errors import ActionableError, ArtifactMismatch, LabelConflict, SettingsError, TextError
from tailrace.storage.labels import Label, LabelEdit, as_json, edit_labels, owner_of, read_labels
from tailrace.storage.tables import TablesManifest

if TYPE_CHECKING:
    from tailrace.pipeline.model.language_model import LanguageModel
    from tailrace.pipeline.score.stage import Scorer

JSON = dict[str, Any]
MOST_BYTES = 1 << 18
"""Of a request: the longest note fits in any script."""
MOST_CHARACTERS = 10_000
"""Of a text that is tried: some seconds of the model."""


class TriedTexts:
    """Transcoders whose features are asked about texts, with their language model.

    If none are given, those that lie near the tables.
    """

    def __init__(self, transcoders: Sequence[Path] = (), *, model: str | None, compute: Compute) -> None:
        self._transcoders, self._model_path, self._compute = transcoders, model, compute
        self._lock = threading.Lock()
        """Held while the model runs: its threads and memory are for one text at a time."""
        self._scorers: dict[Path, Scorer] = {}
        self._model: LanguageModel | None = None

    def activations(self, tables: Path, feature: int, text: str) -> JSON:
        """Return the tokens of a text with the activations of a feature of ``tables``, None where it is not scored.

        Raises ArtifactMismatch if the tables are of none of the transcoders, TextError, ModelError.
        """
        with self._lock, self._compute.opened() as device:
            if tables not in self._scorers:
                self._scorers[tables] = self._open(tables, device)
            (scored,) = self._scorers[tables].score([text], [(0, feature)]).texts
        values = scored.values[:, 0].tolist()
        return {
            "tokens": [visible_token(token) for token in scored.tokens],
            "values": [None if math.isnan(value) else value for value in values],
        }

    def _open(self, tables: Path, device: Any) -> Scorer:
        from tailrace.pipeline.artifacts.transcoders import layers_of, open_transcoders
        from tailrace.pipeline.model.of_transcoders import open_transcoder_model
        from tailrace.pipeline.score.stage import Scorer

        manifest = TablesManifest.read(tables)
        near = None if self._transcoders else nearby_transcoder(manifest, tables)
        owner = owner_of(manifest)
        for one in open_transcoders(self._transcoders or ([near[0]] if near else [])):
            for layer in layers_of([one]):
                if {"transcoder": layer.digest, "site": layer.site.name} == owner:
                    # tables of one site are of one model
                    self._model = self._model or open_transcoder_model(
                        [one.path], model=self._model_path, device=self._compute.device_name
                    )
                    return Scorer(str(layer), [layer], self._model, device)
        given = ", ".join(map(str, self._transcoders))
        raise ArtifactMismatch(
            f"{f'{given}: not the transcoder' if given else 'no transcoder at hand is that'} of {tables.name}; "
            "start the server with its path, and with where the language model lies if it moved: pipeline serve TABLES "
            "--transcoders PATH --model PATH"
        )


class Answers:
    """Answers to pages of ``tables``, by the names that they have in the site."""

    def __init__(self, tables: Mapping[str, Path], author: str, tried: TriedTexts | None = None) -> None:
        self._tables, self._author = tables, author
        self._tried = tried or TriedTexts(model=None, compute=Compute(quiet=True))
        self._sizes = {at: TablesManifest.read(path).n_features for at, path in tables.items()}
        self._known: Mapping[str, Callable[[Path, int, JSON], JSON]] = {
            "label": self._label,
            "edit": self._edit,
            "try": self._try,
        }

    def answer(self, name: str, asked: JSON) -> tuple[HTTPStatus, JSON]:
        """Return the answer to a question by its name, or what is wrong with it as ``error``."""
        try:
            if name not in self._known:
                raise SettingsError(f"{name}: there is no such question; the page and the server differ: load it again")
            at, feature = _of(asked, "at", str), _of(asked, "feature", int)
            if not 0 <= feature < self._sizes.get(at, 0):
                raise SettingsError(f"there is no feature {feature} in {at or 'these tables'}; load the page again")
            return HTTPStatus.OK, self._known[name](self._tables[at], feature, asked)
        except LabelConflict as error:
            now = self._label(self._tables[at], feature, asked)
            return HTTPStatus.CONFLICT, {**now, "error": str(error).partition(": ")[2]}
        except ActionableError as error:
            return HTTPStatus.BAD_REQUEST, {"error": str(error)}

    def _label(self, tables: Path, feature: int, asked: JSON) -> JSON:  # noqa: ARG002 - an answer
        return as_json(read_labels(tables).get(feature, Label(feature)))

    def _edit(self, tables: Path, feature: int, asked: JSON) -> JSON:
        label, note, starred = _of(asked, "label", str), _of(asked, "note", str), _of(asked, "starred", bool)
        edit = LabelEdit(feature, self._author, label, note, starred)
        seen = asked.get("seen")
        try:
            version = None if seen is None else datetime.fromisoformat(seen)
        except (TypeError, ValueError) as error:
            raise SettingsError(f"seen: wanted a time or null, got {seen!r}; load the page again") from error
        ((_, after),) = edit_labels(tables, [edit], seen={feature: version}).values()
        return as_json(after)

    def _try(self, tables: Path, feature: int, asked: JSON) -> JSON:
        text = _of(asked, "text", str)
        if not text.strip():
            raise TextError("the text is empty; write something")
        if len(text) > MOST_CHARACTERS:
            raise TextError(
                f"the text has {len(text):,} characters, at most {MOST_CHARACTERS:,} are read here; use `pipeline "
                "score --file` for longer ones"
            )
        return self._tried.activations(tables, feature, text)


def _of(asked: JSON, name: str, kind: type) -> Any:
    """Return a part of a request; raise SettingsError if it is not there or of another type."""
    value = asked.get(name)
    if type(value) is not kind:
        raise SettingsError(f"{name}: wanted {kind.__name__}, got {value!r}; load the page again")
    return value
