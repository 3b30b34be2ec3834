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
from typing import NamedTuple

import torch

from tailrace.analysis.tables.connections import N_ENDS, ROW_GROUP_ROWS, SCHEMA, Connected, Later, connection_rows
from tailrace.analysis.weights.model_weights import ModelWeights
from tailrace.analysis.weights.stream import read_point, write_point
from tailrace.analysis.weights.unembedding import TokenEffects, token_effects
from tailrace.pipeline.artifacts.transcoders import TranscoderLayer, layers_of, open_transcoders
from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.model.same_model import list_model_differences
from tailrace.pipeline.model.weights import read_weights
from tailrace.pipeline.shared.progress import Progress
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ActionableError, ArtifactMismatch, SettingsError
from tailrace.storage.tables import write_table
from tailrace.training.architectures.transcoder import Transcoder
from tailrace.training.cross_layer.layers import open_weights

CONNECTIONS = "connections.parquet"

logger = logging.getLogger(__name__)

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


Downstream = Mapping[Path, Sequence[TranscoderLayer]]
"""Layers to whose features connections are wanted, by the path that was given for them."""


def check_downstream(analysed: TranscoderLayer, downstream: Sequence[Path]) -> Downstream:
    """Return the layers to look for connections to.

    Raises ArtifactMismatch if some belong to another model than ``analysed``, with every difference, and SettingsError
    if two replace one site; that they read later is checked when the model is known.
    """
    found = {path: layers_of(open_transcoders(path)) for path in downstream}
    mismatches = {
        f"--downstream {layer.path}: {line}": None
        for layers in found.values()
        for layer in layers
        for line in list_model_differences(analysed.model, layer.model)
    }
    if mismatches:
        lines = "\n".join(f"  {line}" for line in mismatches)
        raise ArtifactMismatch(
            f"{analysed.path}: was trained on another model than transcoders given as --downstream; give transcoders "
            f"of the same model ('there' is the model of {analysed.path}):\n{lines}"
        )
    sites = [layer.site.name for layers in found.values() for layer in layers]
    if repeated := sorted({site for site in sites if sites.count(site) > 1}):
        raise SettingsError(
            f"--downstream: several transcoders of site {', '.join(repeated)}; give one of each site, since features "
            "are named by their site"
        )
    return found


def write_weight_tables(
    coder: Transcoder,
    analysed: TranscoderLayer,
    *,
    downstream: Downstream,
    weights: ModelWeights,
    vocabulary: Sequence[str],
    output: Path,
    n_ends: int = N_ENDS,
    quiet: bool = False,
) -> FromWeights:
    """Write ``connections.parquet`` into ``output`` and return what the tables of features need.

    Of ``downstream``, the layers that read the residual stream after this one writes to it are connected. Raises
    ModelError for weights that are not finite.
    """
    reads, writes = read_point(analysed.site.hook_in, weights), write_point(analysed.site.hook_out, weights)
    layers = [layer for layers in downstream.values() for layer in layers]
    later = [found for layer in layers if (found := _open_later(layer, analysed, weights)) is not None]
    connected = Connected(coder.W_enc, coder.W_dec, reads, writes, weights, later, n_ends)
    d_sae = coder.W_enc.shape[0]
    with Progress(2 * d_sae, "weights", "features", quiet=quiet) as bar:
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


def later_problems(downstream: Downstream, weights: ModelWeights, analysed: Mapping[str, Site]) -> list[str]:
    """Return a sentence for everything that keeps layers from being connected to those later.

    ``analysed`` are the layers' sites by what sentences about them begin with. Of a folder or a cross-layer transcoder,
    layers that read too early are left out; it is a problem if that leaves none for any.
    """
    problems: list[str] = []
    ends = {}
    for name, site in analysed.items():
        if (writes := write_point(site.hook_out, weights)) is not None:
            ends[name] = writes.time
        elif downstream:
            problems.append(
                f"{name}site {site.name}: {site.hook_out} is not added to the residual stream, so no connection to a "
                "later transcoder can be told; leave out --downstream"
            )
    for path, layers in downstream.items():
        times = {layer.site.hook_in: read_point(layer.site.hook_in, weights) for layer in layers}
        problems += [
            f"--downstream {path}: its input, {hook}, is not read off the residual stream"
            for hook, reads in times.items()
            if reads is None
        ]
        latest = max((reads.time for reads in times.values() if reads is not None), default=None)
        early = [name for name, end in ends.items() if latest is not None and latest < end]
        if len(layers) == 1 or len(early) == len(ends):
            hooks = next(iter(times)) if len(times) == 1 else f"each of {', '.join(times)}"
            problems += [
                f"{name}--downstream {path}: {hooks} reads before {analysed[name].hook_out} is written; give "
                "transcoders of later layers"
                for name in early
            ]
    return problems


def _open_later(layer: TranscoderLayer, analysed: TranscoderLayer, weights: ModelWeights) -> Later | None:
    """Load the encoder of a layer, and what ``analysed`` writes before it reads; None if that is nothing."""
    reads = read_point(layer.site.hook_in, weights)
    assert reads is not None, "a transcoder that reads no stream is a problem"
    written = analysed.manifest.sites
    before = [
        index
        for index, site in enumerate(written)
        if (writes := write_point(site.hook_out, weights)) is not None and writes.time <= reads.time
    ]
    first = analysed.index or 0
    before = [index for index in before if index >= first]
    if not before:
        return None
    decoder = None
    if len(before) < len(written) - first:
        with open_weights(analysed.path) as file:
            decoder = file.summed_writes(first, before).float()
    return Later(layer.site.name, reads, layer.load_encoder(), decoder)
