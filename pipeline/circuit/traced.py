"""What circuits are traced through: layers of transcoders, by their numbers in the model, and how good they are."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tailrace.pipeline.artifacts.transcoders import PublishedTranscoder, TranscoderLayer, layers_of
from tailrace.pipeline.circuit.question import Question
from tailrace.pipeline.train.layer_set_scores import LAYERS, LayerOutcome, read_layers
from tailrace.storage.errors import SettingsError
from tailrace.storage.tables import read_schema

_POOR_FVU = 0.9
"""Above this share of variance left unexplained, a transcoder is told of; 1 is as good as always the mean."""
logger = logging.getLogger(__name__)


def traced_layers(transcoders: Sequence[PublishedTranscoder]) -> dict[int, TranscoderLayer]:
    """Return the layers that something stands in for, by their numbers in the model.

    Raises SettingsError, with every problem, for sites that are no MLP's and for two of one layer.
    """
    found: dict[int, TranscoderLayer] = {}
    problems = []
    for one in layers_of(transcoders):
        if one.site.layer is None:
            problems.append(
                f"{one}: is of {one.site.hook_in} and {one.site.hook_out}; circuits need transcoders of one layer's "
                "MLP, blocks.L.mlp.hook_in to blocks.L.mlp.hook_out"
            )
        elif (other := found.setdefault(one.site.layer, one)) is not one:
            problems.append(f"{one} and {other} are both of layer {one.site.layer}; give one of them")
    if problems:
        raise SettingsError("\n".join(problems))
    return found


def warn_of_poor_layers(
    question: Question, transcoders: Mapping[int, Path], scores: Mapping[int, Mapping[str, Any]]
) -> None:
    """Log one warning that names every layer the answer goes through whose transcoder has an FVU above ``_POOR_FVU``.

    ``transcoders`` are by layer, ``scores`` what their manifests say of held-out rows. FVU is over ordinary rows where
    it was taken, else over all: from the ``layers.parquet`` that ``pipeline circuits-model`` writes beside its
    transcoders, or from the manifest. What was never scored is taken as it is.
    """
    poor = []
    for layer, path in sorted(transcoders.items()):
        if not _goes_through(question, layer):
            continue
        outcome = _score(path)
        known = scores.get(layer, {}) if outcome is None else asdict(outcome)
        is_ordinary = known.get("fvu_ordinary") is not None
        fvu = known.get("fvu_ordinary" if is_ordinary else "fvu")
        if fvu is not None and fvu > _POOR_FVU:
            poor.append(f"layer {layer} ({fvu:.3g} on {'ordinary' if is_ordinary else 'all'} rows)")
    if poor:
        logger.warning(
            "transcoders with an FVU above %g: %s; what goes through such a layer lies in its error node, not in "
            "features",
            _POOR_FVU,
            ", ".join(poor),
        )


def _goes_through(question: Question, layer: int) -> bool:
    """Return whether the MLP of a layer can be part of the answer: what a feature reads comes from those below it."""
    if question.feature is None:
        return True
    return layer < question.feature[0] + (question.direction == "decoder")


def _score(transcoder: Path) -> LayerOutcome | None:
    """Return a transcoder's scores; None if it was not made with others, whose table would lie beside it."""
    table = transcoder.resolve().parent / LAYERS
    # Tables of features have a table of this name as well.
    if not table.is_file() or set(read_schema(table).names) != {field.name for field in fields(LayerOutcome)}:
        return None
    return next((one for one in read_layers(table) if one.path == transcoder.resolve().name), None)
