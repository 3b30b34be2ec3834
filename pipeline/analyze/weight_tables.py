"""The part of ``pipeline analyze`` that needs the language model: its weights alone, let go before rows are read.

What is kept of them is a few numbers per feature, and ``connections.parquet``. A set of transcoders looks at the same
weights one after another: the model is opened once, and of it the embeddings and what attention reads and writes stay
until the last has looked.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from tailrace.analysis.tables.connections import ROW_GROUP_ROWS, SCHEMA, Connected, Later, connection_rows
from tailrace.analysis.weights.model_weights import ModelWeights
from tailrace.analysis.weights.stream import read_point, write_point
from tailrace.analysis.weights.unembedding import TokenEffects, token_effects
from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.model.same_model import list_model_differences
from tailrace.pipeline.model.weights import read_weights
from tailrace.storage.errors import ActionableError, ArtifactMismatch, SettingsError
from tailrace.storage.tables import write_table
from tailrace.training.architectures.transcoder import Transcoder, load_transcoder, read_transcoder_manifest
from tailrace.training.cross_layer.artifact import is_cross_layer

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


class SharedWeights:
    """The weights of a language model that is opened when they are first used, and let go at once.

    After ``n_uses`` uses they are gone too.
    """

    def __init__(self, open_model: Callable[[], LanguageModel], n_uses: int = 1) -> None:
        self._open_model, self._n_left = open_model, n_uses
        self._weights: ModelWeights | None = None

    @contextmanager
    def used(self) -> Iterator[ModelWeights]:
        """Yield the weights. Raises ModelError, or what opening the model raises, with what to do instead."""
        if self._weights is None:
            self._weights = _read_weights(self._open_model)
            gc.collect()  # modules and their hooks refer to each other, and would otherwise stay
        try:
            yield self._weights
        finally:
            self._n_left -= 1
            if self._n_left <= 0:
                self._weights = None


def check_downstream(transcoder: Path, made_of: Manifest, downstream: Sequence[Path]) -> dict[Path, Manifest]:
    """Return the manifests of transcoders to look for connections to.

    Raises ArtifactMismatch if some are cross-layer transcoders, or belong to another model than ``transcoder``, with
    every difference, and SettingsError if two replace one site; that they read later is checked when the model is
    known.
    """
    if across := [path for path in downstream if is_cross_layer(path)]:
        raise ArtifactMismatch(
            f"--downstream {', '.join(map(str, across))}: a cross-layer transcoder; connections are told to features "
            "of transcoders of one layer, give those"
        )
    found: dict[Path, Manifest] = {path: read_transcoder_manifest(path) for path in downstream}
    mismatches = [
        f"--downstream {path}: {line}"
        for path, other in found.items()
        for line in list_model_differences(made_of["model"], other["model"])
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
    weights: ModelWeights,
    vocabulary: Sequence[str],
    output: Path,
    quiet: bool = False,
) -> FromWeights:
    """Write ``connections.parquet`` into ``output`` and return what the tables of features need.

    Raises ModelError for weights that are not finite; SettingsError if a downstream transcoder does not read the
    residual stream after this one writes to it.
    """
    reads, writes = read_point(site["hook_in"], weights), write_point(site["hook_out"], weights)
    later = _open_later(downstream, weights, site)
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
    return FromWeights(effects, n_rows)


def _read_weights(open_model: Callable[[], LanguageModel]) -> ModelWeights:
    try:
        return read_weights(open_model())
    except ActionableError as error:
        raise type(error)(f"{error}\n{_ADVICE}") from error


def later_problems(downstream: Mapping[Path, Manifest], weights: ModelWeights, site: Manifest) -> list[str]:
    """Return a sentence for everything that keeps a transcoder of ``site`` from being connected to those later."""
    problems: list[str] = []
    writes = write_point(site["hook_out"], weights)
    if downstream and writes is None:
        problems.append(
            f"site {site['name']}: {site['hook_out']} is not added to the residual stream, so no connection to a later "
            "transcoder can be told; leave out --downstream"
        )
    for path, manifest in downstream.items():
        hook_in = manifest["site"]["hook_in"]
        reads = read_point(hook_in, weights)
        if reads is None:
            problems.append(f"--downstream {path}: its input, {hook_in}, is not read off the residual stream")
        elif writes is not None and reads.time < writes.time:
            problems.append(
                f"--downstream {path}: {hook_in} reads before {site['hook_out']} is written; give transcoders "
                "of later layers"
            )
    return problems


def _open_later(downstream: Mapping[Path, Manifest], weights: ModelWeights, site: Manifest) -> list[Later]:
    """Load the encoders of later transcoders; raise SettingsError with everything that cannot be connected."""
    if problems := later_problems(downstream, weights, site):
        raise SettingsError("\n".join(problems))
    later: list[Later] = []
    for path, manifest in downstream.items():
        there = manifest["site"]
        reads = read_point(there["hook_in"], weights)
        assert reads is not None, "a transcoder that reads no stream is a problem"
        later.append(Later(there["name"], reads, load_transcoder(path).W_enc))
    return later
