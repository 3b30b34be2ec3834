"""``connections``: the strongest connections of features by weights alone, of every kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailrace.analysis.harvest.table import TableDescription, feature_ranges, record_batch
from tailrace.analysis.weights.extremes import BothEnds, Ends, blocks, both_ends, ends_of_products, largest
from tailrace.analysis.weights.heads import HeadReader
from tailrace.analysis.weights.model_weights import ModelWeights
from tailrace.analysis.weights.stream import StreamPoint, layers_attending_before
from tailrace.storage.tables import column

N_ENDS = 10
"""Tokens at either end of a de-embedding (through a head the largest alone), and later features at either end."""
N_HEADS = 64
"""Heads of largest norm."""
N_HEADS_WITH_TOKENS = 2
"""Of these, heads through which tokens are listed."""

KINDS = ("token", "head", "head_token", "feature")
"""In the order of a feature's rows."""

ROW_GROUP_ROWS = 16_384
"""About a hundred features, so that one feature's connections are read at once."""

SCHEMA = pa.schema(
    [
        column("feature", pa.int32(), "index of the feature"),
        column(
            "kind",
            pa.string(),
            "what it is connected with: token (its embedding), head (all that an attention head may carry), head_token "
            "(a token's embedding through that head), feature (of a later transcoder)",
        ),
        column(
            "rank",
            pa.int32(),
            "place among its connections of this kind, head and site by falling weight: 0 is the largest weight, and "
            "counting from the other end −1 the smallest",
        ),
        column("layer", pa.int32(), "layer of the head, or of the later transcoder", nullable=True),
        column("head", pa.int32(), "head in its layer", nullable=True),
        column("site", pa.string(), "site of the later transcoder", nullable=True),
        column("other", pa.int32(), "feature of the later transcoder", nullable=True),
        column("token_id", pa.int32(), "the token", nullable=True),
        column("token", pa.string(), "text of the token", nullable=True),
        column(
            "weight",
            pa.float32(),
            "token: embedding · encoder row. head: ‖OV · encoder row‖. head_token: embedding · OV · encoder row. "
            "feature: decoder row · the later encoder row. Directions are taken in the residual stream",
        ),
    ]
)

DESCRIPTION = TableDescription(
    name="connections",
    meaning=(
        "What features are connected with by weights alone, whatever the text: the strongest connections of every "
        "kind, one row each. Made from the language model's weights, so there is no such table where the model was "
        "left out. Sorted by feature, then kind (token, head, head_token, feature).\n\n"
        "Encoder rows are taken as directions of the residual stream: a norm's gain is multiplied in (and for a layer "
        "norm the mean taken off), what it divides by is not, as it depends on the text. Positions and biases are left "
        f"out. Kept are the {N_ENDS} tokens at either end (`--connections`); the {N_HEADS} heads of largest norm among "
        f"those that write before the feature reads, and through the first {N_HEADS_WITH_TOKENS} of them the {N_ENDS} "
        f"largest tokens; and for each later transcoder given, the {N_ENDS} features at either end. A transcoder that "
        "does not read the residual stream has no rows of the first three kinds, one that does not write to it none of "
        "the last. Of a feature of a cross-layer transcoder, the decoder row is the sum of what it writes to its own "
        "and all later layers, as far as the later transcoder reads after them."
    ),
    schema=SCHEMA,
)


@dataclass(frozen=True)
class Later:
    """A transcoder that reads after the one analysed."""

    site: str
    reads: StreamPoint
    encoder: Tensor
    """(d_sae, d_in)."""
    decoder: Tensor | None = None
    """(d_sae, d_out) of the transcoder analysed: what is written before this one reads, where that is not all."""


@dataclass(frozen=True)
class Connected:
    """A transcoder's weights, the points where it reads and writes, and the later transcoders."""

    encoder: Tensor
    """(d_sae, d_in)."""
    decoder: Tensor
    """(d_sae, d_out)."""
    reads: StreamPoint | None
    writes: StreamPoint | None
    weights: ModelWeights
    later: Sequence[Later] = ()
    n_ends: int = N_ENDS
    """Tokens, and features of each later transcoder, kept at either end."""


def connection_rows(
    connected: Connected, vocabulary: Sequence[str], *, progress: Callable[[int], object] = int
) -> Iterator[pa.RecordBatch]:
    """Make the rows, a run of features at a time; ``progress`` is called with the number of features of each run.

    Memory: W_E, and of each later transcoder the encoder, in float32; and a few blocks of 64 MB.
    """
    texts = pa.array(vocabulary, pa.string())
    with torch.inference_mode():
        finders = _finders(connected)
        for features in feature_ranges(len(connected.encoder)):
            rows = _ConnectionRows(features)
            for find in finders:
                find(rows)
            yield rows.batch(texts)
            progress(len(features))


_MAY_BE_NULL = ("layer", "head", "other", "token_id")


class _ConnectionRows:
    """Connections of a run of features, kind by kind, before they are sorted by feature."""

    def __init__(self, features: range) -> None:
        self.features = features
        self._parts: list[dict[str, NDArray[np.generic]]] = []
        self._sites: list[str | None] = []

    @property
    def chosen(self) -> slice:
        """The run as a slice."""
        return slice(self.features.start, self.features.stop)

    def add(self, kind: str, weight: NDArray[np.float32], rank: NDArray[np.integer], **others: Any) -> None:
        """Add connections: weights (features, n), ranks (n,), and columns that broadcast to them, where -1 is null."""
        shape = weight.shape
        features = np.arange(self.features.start, self.features.stop)[:, None]
        site = others.pop("site", None)
        columns: dict[str, Any] = {"feature": features, "rank": rank, "weight": weight}
        columns |= {"kind": KINDS.index(kind), "site": len(self._sites)}
        columns |= dict.fromkeys(_MAY_BE_NULL, -1) | others
        self._parts.append({name: np.broadcast_to(values, shape).reshape(-1) for name, values in columns.items()})
        self._sites.append(site)

    def add_ends(self, kind: str, ends: BothEnds, name: str, **others: Any) -> None:
        """Add both ends, whose indices are column ``name``."""
        n_bottom = ends.bottom.indices.shape[1]
        self.add(kind, ends.top.values, np.arange(ends.top.indices.shape[1]), **{name: ends.top.indices}, **others)
        self.add(kind, ends.bottom.values, -1 - np.arange(n_bottom), **{name: ends.bottom.indices}, **others)

    def batch(self, texts: pa.Array) -> pa.RecordBatch:
        """Return the rows sorted by feature, then kind, in the order they were added."""
        if not self._parts:
            return record_batch(SCHEMA, {field.name: pa.nulls(0, field.type) for field in SCHEMA})
        joined = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        order = np.lexsort((joined["kind"], joined["feature"]))
        columns: dict[str, Any] = {name: values[order] for name, values in joined.items()}
        for name in _MAY_BE_NULL:
            columns[name] = pa.array(columns[name], pa.int32(), mask=columns[name] < 0)
        columns["token"] = texts.take(columns["token_id"])
        columns["kind"] = pa.array(KINDS).take(pa.array(columns["kind"]))
        columns["site"] = pa.array(self._sites, pa.string()).take(pa.array(columns["site"]))
        return record_batch(SCHEMA, columns)


def _finders(connected: Connected) -> list[Any]:
    """Return the finders of the kinds of connections that this transcoder has."""
    finders: list[Any] = []
    if connected.reads is not None:
        finders.append(_FindEmbedded(connected, connected.reads))
    if connected.writes is not None:
        for one in connected.later:
            decoder = connected.decoder if one.decoder is None else one.decoder
            finders.append(_FindLater(decoder, connected.writes, one, connected.n_ends))
    return finders


class _FindEmbedded:
    """Finds tokens and heads that a feature reads from."""

    def __init__(self, connected: Connected, reads: StreamPoint) -> None:
        self._encoder, self._reads, self._n_ends = connected.encoder, reads, connected.n_ends
        self._columns = connected.weights.W_E.to(connected.encoder.device, torch.float32).T
        layers = layers_attending_before(reads.time, connected.weights)
        self._heads = HeadReader.prepare(layers, connected.weights)
        self._names = self._heads.names()

    def __call__(self, rows: _ConnectionRows) -> None:
        directions = self._reads.carry(self._encoder[rows.chosen].float())
        rows.add_ends("token", ends_of_products(directions, self._columns, self._n_ends), "token_id")
        if not self._heads.n_heads:
            return
        strongest = self._heads.strongest(directions, N_HEADS)
        layer, head = (self._names[strongest.indices, field] for field in (0, 1))
        rows.add("head", strongest.values, np.arange(strongest.indices.shape[1]), layer=layer, head=head)
        for rank in range(min(N_HEADS_WITH_TOKENS, strongest.indices.shape[1])):
            sources = self._heads.sources(directions, strongest.indices[:, rank])
            tokens = self._largest_tokens(sources)
            own = {"layer": layer[:, rank, None], "head": head[:, rank, None]}
            rows.add("head_token", tokens.values, np.arange(tokens.indices.shape[1]), token_id=tokens.indices, **own)

    def _largest_tokens(self, directions: Tensor) -> Ends:
        cut = blocks(len(directions), self._columns.shape[1])
        return Ends.joined([largest(directions[block] @ self._columns, self._n_ends) for block in cut])


class _FindLater:
    """Finds features of a later transcoder that read what a feature writes."""

    def __init__(self, decoder: Tensor, writes: StreamPoint, later: Later, n_ends: int) -> None:
        self._decoder, self._writes, self._later, self._n_ends = decoder, writes, later, n_ends
        self._columns = later.reads.carry(later.encoder.to(decoder.device).float()).T

    def __call__(self, rows: _ConnectionRows) -> None:
        written = self._writes.carry(self._decoder[rows.chosen].float())
        cut = blocks(len(written), self._columns.shape[1])
        ends = BothEnds.joined([both_ends(written[block] @ self._columns, self._n_ends) for block in cut])
        rows.add_ends("feature", ends, "other", layer=self._later.reads.layer, site=self._later.site)
