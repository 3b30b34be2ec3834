"""The stage ``pipeline export``: transcoders, or tables of their features, in the format of another tool.

An export is an artifact like any other, but whoever reads it knows no manifest. So the one file that a reader begins
with is written last: what is half-written looks like nothing to it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tailrace.analysis.weights.model_weights import ModelWeights
from tailrace.pipeline.analyze.stage import KIND as TABLES_KIND
from tailrace.pipeline.artifacts.folders import each_artifact
from tailrace.pipeline.artifacts.manifests import ExportManifest
from tailrace.pipeline.artifacts.transcoders import PublishedTranscoder, TranscoderLayer, layers_of, open_transcoders
from tailrace.pipeline.formats import circuit_tracer, delphi, saelens, sparsify, viewer_features
from tailrace.pipeline.formats.calibration import Calibration
from tailrace.pipeline.formats.conversion import Converted, Written, convert
from tailrace.pipeline.formats.hooks import NORMALISED_IN, STREAM_OUT, is_normalised_otherwise, layer_hooks
from tailrace.pipeline.formats.settings import TABLE_FORMATS, ExportSettings, Format
from tailrace.storage.activation_cache import open_cache, reopen_cache
from tailrace.storage.artifact import MANIFEST, canonical_json, read_sealed
from tailrace.storage.draft import Draft
from tailrace.storage.errors import ArtifactMismatch, ArtifactMissing, SettingsError
from tailrace.storage.formats import ARTIFACT_FORMATS, TRANSCODER_KINDS
from tailrace.storage.generations import CacheAt, CachePath

KIND = ExportManifest.of_kind
FORMAT_VERSION = ARTIFACT_FORMATS[KIND]


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportResult:
    """A published export."""

    path: Path
    to: str
    files: list[str]
    costs: list[str] = field(default_factory=list)
    """Of the notes, those on what thresholds in place of k cost."""
    notes: list[str] = field(default_factory=list)
    """Sentences a user should read."""


def run(
    settings: ExportSettings,
    *,
    to: Format,
    sources: Sequence[Path],
    output: Path,
    cache: CachePath | None = None,
    model: str | None = None,
) -> ExportResult:
    """Publish ``sources`` in the format ``to`` at ``output``; return at once if that export is there already.

    ``sources`` are transcoders, or artifacts of tables for ``TABLE_FORMATS``, or folders that hold some. ``cache``
    gives the rows on which thresholds are calibrated, or the contexts of tables. ``model`` says where the language
    model lies if it moved, for ``fold_norm``. Raises SettingsError with every reason why the format cannot hold what
    was given, and the errors of opening sources and of ``tailrace.storage.artifact.Draft``.
    """
    if problems := settings.given_for_others(to):
        raise SettingsError("\n".join(problems))
    sources = each_artifact(sources, *((TABLES_KIND,) if to in TABLE_FORMATS else TRANSCODER_KINDS))
    inputs = [{"digest": _digest(path)} for path in sources]
    reference = None
    if cache is not None:
        with reopen_cache(cache, output) as opened:  # which may have grown since the export was begun
            reference, cache = opened.reference, CacheAt(opened.path, opened.generation)
    job = _Job(settings, to, sources, cache, model)
    job.check()
    request = {
        "format": FORMAT_VERSION,
        "to": to,
        "settings": settings.model_dump(mode="json"),
        "inputs": inputs,
        "cache": reference,
        **job.renamed_hooks(),
    }
    _refuse_former_names(output, request)
    with Draft(output, KIND, request) as draft:
        if not draft.published:
            files, record = job.write(output)
            draft.publish(
                {"format": FORMAT_VERSION, "to": to, **record, "versions": {"safetensors": version("safetensors")}},
                files,
            )
    return read_result(output)


def read_result(path: Path) -> ExportResult:
    """Return what a published export says. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch."""
    manifest = ExportManifest.read(path)
    rows = [{**row} for row in manifest.calibration]
    costs = [f"{row.pop('site')}: {Calibration(**row).sentence()}" for row in rows]
    return ExportResult(path, manifest.to, sorted(manifest.files), costs, manifest.notes)


def _refuse_former_names(output: Path, request: Mapping[str, Any]) -> None:
    """Raise ArtifactMismatch if the same export lies at ``output`` as SAELens does not attach it where it belongs."""
    if "hooks" not in request or not (output / MANIFEST).exists():
        return
    former = ExportManifest.read(output).request
    if former == json.loads(canonical_json({key: value for key, value in request.items() if key != "hooks"})):
        raise ArtifactMismatch(
            f"{output}: holds this export as an earlier release wrote it, so that SAELens attaches it nowhere or where "
            "other vectors are; delete it and run the same command again, or choose another path"
        )


def _digest(path: Path) -> str:
    if not (path / MANIFEST).exists():
        raise ArtifactMissing(f"{path}: no published transcoder or tables lie here; check the path")
    return str(read_sealed(path / MANIFEST)["digest"])


class _Job:
    """One export, opened: what it is made of and how it is written."""

    def __init__(
        self,
        settings: ExportSettings,
        to: Format,
        sources: Sequence[Path],
        cache: CachePath | None,
        model: str | None,
    ) -> None:
        self._settings, self._to, self._cache = settings, to, cache
        self._model = model
        self._transcoders: list[PublishedTranscoder] = []
        self._tables: list[viewer_features.LayerTables] = []
        self._latents: list[delphi.LatentTables] = []
        if to == "circuit-tracer-features":
            self._tables = viewer_features.open_tables(sources)
        elif to == "delphi":
            self._latents = delphi.open_tables(sources, cache, settings.module)
        elif not sources:
            raise SettingsError("nothing to export; give the path of at least one transcoder")
        else:
            self._transcoders = open_transcoders(sources)
        self._layers = layers_of(self._transcoders)

    def check(self) -> None:
        """Raise SettingsError with every reason why the format cannot hold these transcoders."""
        problems: dict[Format, Callable[[], list[str]]] = {
            "saelens": lambda: saelens.problems(self._layers),
            "circuit-tracer": lambda: circuit_tracer.problems(self._transcoders),
            "sparsify": lambda: sparsify.problems(self._layers, self._settings.module),
        }
        across = [str(one.path) for one in self._transcoders if one.is_cross_layer]
        if across and self._to != "circuit-tracer":
            found = [
                f"{', '.join(across)}: is a cross-layer transcoder, whose features write to several layers; {self._to} "
                "holds one layer at a time. circuit-tracer alone can hold it: --to circuit-tracer"
            ]
        else:
            found = problems[self._to]() if self._to in problems else []
        if found:
            raise SettingsError(f"cannot be exported to {self._to}:\n" + "\n".join(f"  {line}" for line in found))

    def renamed_hooks(self) -> dict[str, list[str]]:
        """Return what is written of the hooks if it is not their recorded names, for the request.

        Earlier releases wrote the recorded ones, and the same command must not take such an export for its own.
        """
        if self._to != "saelens":
            return {}
        (layer,) = self._layers
        recorded = [layer.site.hook_in, layer.site.hook_out]
        if self._settings.fold_norm and (hooks := layer_hooks(layer.site)) is not None:
            recorded = [f"blocks.{hooks.layer}.{name}" for name in (NORMALISED_IN, STREAM_OUT)]
        written = saelens.written_hooks(layer, recorded)
        return {} if written == recorded else {"hooks": written}

    def write(self, directory: Path) -> tuple[list[str], dict[str, Any]]:
        """Write all files; return their names, and what the manifest says besides."""
        match self._to:
            case "circuit-tracer-features":
                done = Written(viewer_features.write(directory, self._tables))
            case "delphi":
                parts = [
                    delphi.write(directory, one, self._settings.module, self._name(one.manifest.model))
                    for one in self._latents
                ]
                notes = [note for _, some in parts for note in some]
                notes += [delphi.NOTE_ON_RELEASES, *self._notes_on_name(self._latents[0].manifest.model)]
                done = Written([name for names, _ in parts for name in names], notes=notes)
            case "sparsify":
                parts_files = [sparsify.write(directory, one, self._settings.module) for one in self._layers]
                done = Written([name for names in parts_files for name in names], notes=[sparsify.NOTE_ON_RELEASES])
            case "circuit-tracer":
                layer, scan = self._layers[0], self._settings.scan
                done = circuit_tracer.write(directory, self._convert(), layer.model, self._name(layer.model), scan)
                notes = [*done.notes, *self._notes_on_norms(layer), *self._notes_on_name(layer.model)]
                done = done._replace(notes=notes)
            case "saelens":
                done = self._write_saelens(directory, self._layers[0])
                done = done._replace(notes=[*done.notes, *self._notes_on_name(self._layers[0].model)])
        return done.files, {
            "notes": [
                *(f"{site}: {cost.sentence()}" for site, cost in done.costs.items()),
                *done.notes,
            ],
            "calibration": [{"site": site, **cost.record()} for site, cost in done.costs.items()],
        }

    def _write_saelens(self, directory: Path, layer: TranscoderLayer) -> Written:
        if self._cache is None:
            text = saelens.trained_on(layer.manifest.inputs, None)
        else:
            with open_cache(self._cache) as opened:
                text = saelens.trained_on(layer.manifest.inputs, opened)
        name = self._name(layer.model)
        if saelens.is_topk_autoencoder(layer):
            return saelens.write_topk_autoencoder(directory, layer, name, text)
        (converted,) = self._convert()
        return saelens.write(directory, converted, name, text)

    def _notes_on_norms(self, layer: TranscoderLayer) -> list[str]:
        """Return a sentence on which TransformerLens circuit-tracer must load; a SAELens export holds under each."""
        reads = NORMALISED_IN if self._settings.fold_norm else layer.site.hook_in
        if not is_normalised_otherwise(reads, layer.model):
            return []
        return [
            f"{reads}: of a model with LayerNorms (GPT-2, Pythia) this needs TransformerLens 3 or later, which "
            f"{circuit_tracer.CONFIG} says and circuit-tracer does not look at; earlier releases have it behind the "
            "norm's gain and bias, and every number is another there"
            + (". Without --fold-norm the set holds under all of them" if self._settings.fold_norm else "")
        ]

    def _notes_on_name(self, model: Mapping[str, Any]) -> list[str]:
        """Return a sentence if the model is recorded by the name of a folder, by which nobody else can load it."""
        if self._settings.model_name is not None or not model.get("files_digest"):
            return []
        return [
            f"the model is called {model.get('name')}, after a folder of this machine; if the other tool finds it "
            "under another name, give that with --model-name"
        ]

    def _convert(self) -> Iterator[Converted]:
        return convert(self._layers, cache=self._cache, rows=self._settings.rows, weights=self._weights())

    def _weights(self) -> ModelWeights | None:
        """Return the language model's weights where a norm has to be folded in."""
        if not self._settings.fold_norm:
            return None
        from tailrace.pipeline.model.of_transcoders import open_transcoder_model
        from tailrace.pipeline.model.weights import read_weights  # loads TransformerLens, which nothing else here needs

        paths = [one.path for one in self._transcoders]
        return read_weights(open_transcoder_model(paths, model=self._model))

    def _name(self, model: Mapping[str, Any]) -> str:
        return self._settings.model_name or str(model.get("name", "unknown"))
