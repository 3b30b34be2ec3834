"""The tables of ``pipeline task``, whose columns explain themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from tailrace.storage.tables import column

PROMPTS, CURVES, RANKING = "prompts", "curves", "ranking"
MODEL, TRANSCODER, FEATURES, NEURONS = "model", "transcoder", "features", "neurons"

_SCHEMAS: dict[str, pa.Schema] = {
    PROMPTS: pa.schema(
        [
            column("prompt", pa.int32(), "place in the file of prompts, from 0"),
            column("text", pa.string(), "the prompt"),
            column("token_ids", pa.list_(pa.int32()), "its tokens, the BOS in front"),
            column("correct_token_ids", pa.list_(pa.int32()), "its correct answers, one token each"),
            column("incorrect_token_ids", pa.list_(pa.int32()), "its incorrect answers, one token each"),
        ]
    ),
    CURVES: pa.schema(
        [
            column("site", pa.string(), "site that is replaced; null for the model as it is", nullable=True),
            column(
                "kind",
                pa.string(),
                "model: as it is; transcoder: whole, in place of its MLP; features, neurons: only n_kept of them left",
            ),
            column("n_kept", pa.int32(), "features or neurons of the highest variance that are kept", nullable=True),
            column(
                "score",
                pa.float64(),
                "probability of the correct less that of the incorrect answers, among answers; mean over prompts",
            ),
            column("scores", pa.list_(pa.float64()), "the same of each prompt"),
        ]
    ),
    RANKING: pa.schema(
        [
            column("site", pa.string(), "site of the transcoder"),
            column("kind", pa.string(), "features (of the transcoder) or neurons (of the MLP)"),
            column("rank", pa.int32(), "place by variance, from 0, highest first"),
            column("index", pa.int32(), "which feature or neuron"),
            column("mean", pa.float64(), "mean activation at the last token, over prompts", unit="activation"),
            column("variance", pa.float64(), "unbiased variance of it over prompts", unit="activation²"),
            column("n_active", pa.int32(), "prompts on which it is above zero", unit="prompts"),
            column(
                "score_without",
                pa.float64(),
                "score of the whole transcoder without this feature; null where it was not left out",
                nullable=True,
            ),
            column(
                "answer_effects",
                pa.list_(pa.float32()),
                "W_dec[i] · W_U of every answer, in the order of the manifest's answers, less the vocabulary's mean; "
                "null for neurons",
                unit="logit · norm per activation",
                nullable=True,
            ),
        ]
    ),
}


@dataclass(frozen=True)
class Curve:
    """How well the task is done with something in place; every field is described by its column."""

    site: str | None
    kind: str
    n_kept: int | None
    score: float
    scores: list[float]


@dataclass(frozen=True)
class Ranked:
    """A feature or neuron; every field is described by its column."""

    site: str
    kind: str
    rank: int
    index: int
    mean: float
    variance: float
    n_active: int
    score_without: float | None
    answer_effects: list[float] | None


def schema_of(table: str) -> pa.Schema:
    """Return the columns of a table."""
    return _SCHEMAS[table]


def prompts_batch(
    texts: Sequence[str],
    tokens: Sequence[Sequence[int]],
    correct: Sequence[Sequence[int]],
    incorrect: Sequence[Sequence[int]],
) -> pa.RecordBatch:
    """Return the rows of prompts."""
    columns = [range(len(texts)), texts, tokens, correct, incorrect]
    return _batch(PROMPTS, columns)


def curves_batch(curves: Sequence[Curve]) -> pa.RecordBatch:
    """Return the rows of curves."""
    return _rows(CURVES, [asdict(one) for one in curves])


def ranking_batch(ranking: Sequence[Ranked]) -> pa.RecordBatch:
    """Return the rows of the ranking."""
    return _rows(RANKING, [asdict(one) for one in ranking])


def _rows(table: str, rows: Sequence[dict[str, Any]]) -> pa.RecordBatch:
    return _batch(table, [[row[field.name] for row in rows] for field in _SCHEMAS[table]])


def _batch(table: str, columns: Sequence[Any]) -> pa.RecordBatch:
    schema = _SCHEMAS[table]
    arrays = [pa.array(list(values), field.type) for values, field in zip(columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
