"""The part of ``pipeline analyze`` that needs the language model: its weights alone, let go before rows are read.

What is kept of them is a few numbers per feature, and ``connections.parquet``.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from analysis.model_weights import ModelWeights
from analysis.tables.connections import ROW_GROUP_ROWS, SCHEMA, Connected, Later, connection_rows
from analysis.weight_space.stream import StreamPoint, read_point, write_point
from analysis.weight_space.unembedding import TokenEffects, token_effects
from pipeline.model.language_model import LanguageModel
from pipeline.model.weights import read_weights
from storage.artifact import list_differences
from storage.errors import ActionableError, ArtifactMismatch, SettingsError
from storage.tables import write_table
from training.transcoder import Transcoder, load_transcoder, read_transcoder_manifest

CONNECTIONS = "connections.parquet"

logger = logging.getLogger(__name__)

Manifest = Mapping[str, Any]

_ADVICE = (
    "The tables need the model for what features do to tokens and for connections.parquet; "
    "--without-model leaves these out"
)


class FromWeights(NamedTuple):
    """What the model's weights gave."""

    effects: TokenEffects | None
    """None for a transcoder whose output is not added to the residual stream."""
    n_connections: int
    """Rows of the table of connections."""


def check_downstream(transcoder: Path, made_of: Manifest, downstream: Sequence[Path]) -> dict[Path, Manifest]:
    """Return the manifests of transcoders to look for connections to.

    Raises ArtifactMismatch if some belong to another model than ``transcoder``, with every difference, and
    SettingsError if two replace one site; that they read later is checked when the model is known.
    """
    found: dict[Path, Manifest] = {path: read_transcoder_manifest(path) for path in downstream}
    mismatches = [
        f"--downstream {path}: {line}"
        for path, other in found.items()
        for line in list_differences(_model(made_of), _model(other))
    ]
    if mismatches:
        lines = "\n".join(f"  {line}" for line in mismatches)
        raise ArtifactMismatch(
            f"{transcoder}: was trained on another model than transcoders given as --downstream; give transcoders of "
            f"the same model ('there' is the model of {transcoder}):\n{lines}"
        )
    sites = [manifest["site"]["name"] for manifest in found.values()]
    if repeated := sorted({site for site in sites if sites.count(site) > 1}):
        raise SettingsError(
            f"--downstream: several transcoders of site {', '.join(repeated)}; give one of each site, since features "
            "are named by their site"
        )
    return found


def write_weight_tables(
    coder: Transcoder,
    site: Manifest,
    *,
    downstream: Mapping[Path, Manifest],
    open_model: Callable[[], LanguageModel],
    vocabulary: Sequence[str],
    output: Path,
    quiet: bool = False,
) -> FromWeights:
    """Open the model, write ``connections.parquet`` into ``output``, and let the model go.

    Raises ModelError, or what ``open_model`` raises, with what to do instead; SettingsError if a downstream transcoder
    does not read the residual stream after this one writes to it.
    """
    weights = _read_weights(open_model)
    reads, writes = read_point(site["hook_in"], weights), write_point(site["hook_out"], weights)
    later = _open_later(downstream, weights, site, writes)
    connected = Connected(coder.W_enc, coder.W_dec, reads, writes, weights, later)
    d_sae = coder.W_enc.shape[0]
    with tqdm(total=2 * d_sae, desc="weights", unit="feature", unit_scale=True, disable=quiet or None) as bar:
        n_rows = write_table(
            output / CONNECTIONS,
            SCHEMA,
            connection_rows(connected, vocabulary, progress=bar.update),
            row_group_rows=ROW_GROUP_ROWS,
        )
        with torch.inference_mode():
            effects = None if writes is None else token_effects(coder.W_dec, writes, weights, progress=bar.update)
    logger.info("wrote %s, %d rows", CONNECTIONS, n_rows)
    del weights, connected, later
    gc.collect()  # modules and their hooks refer to each other, and would otherwise stay for the whole pass
    return FromWeights(effects, n_rows)


def _read_weights(open_model: Callable[[], LanguageModel]) -> ModelWeights:
    try:
        return read_weights(open_model())
    except ActionableError as error:
        raise type(error)(f"{error}\n{_ADVICE}") from error


def _open_later(
    downstream: Mapping[Path, Manifest], weights: ModelWeights, site: Manifest, writes: StreamPoint | None
) -> list[Later]:
    """Load the encoders of later transcoders; raise SettingsError with everything that cannot be connected."""
    problems: list[str] = []
    if downstream and writes is None:
        problems.append(
            f"site {site['name']}: {site['hook_out']} is not added to the residual stream, so no connection to a later "
            "transcoder can be told; leave out --downstream"
        )
    later: list[Later] = []
    for path, manifest in downstream.items():
        there = manifest["site"]
        reads = read_point(there["hook_in"], weights)
        if reads is None:
            problems.append(f"--downstream {path}: its input, {there['hook_in']}, is not read off the residual stream")
        elif writes is not None and reads.time < writes.time:
            problems.append(
                f"--downstream {path}: {there['hook_in']} reads before {site['hook_out']} is written; give transcoders "
                "of later layers"
            )
        else:
            later.append(Later(there["name"], reads, load_transcoder(path).W_enc))
    if problems:
        raise SettingsError("\n".join(problems))
    return later


def _model(manifest: Manifest) -> dict[str, Any]:
    return {key: value for key, value in manifest["model"].items() if key != "versions"}
