"""Connections of features equal the largest entries of whole matrices, computed forwards in float64."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tailrace.analysis.tables import connections
from tailrace.analysis.tables.connections import SCHEMA, Connected, Later, connection_rows
from tailrace.analysis.weights import extremes
from tailrace.analysis.weights.model_weights import ModelWeights
from tailrace.analysis.weights.stream import read_point, write_point
from tests.support.made_up_weights import D_MODEL, D_VOCAB, N_HEADS, gradient, made_up_weights, normalised, through_head

D_SAE = 7
D_LATER = 25
VOCABULARY = [f"t{token}" for token in range(D_VOCAB)]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ENCODER, DECODER, LATER = (
    random(D_SAE, D_MODEL, seed=1),
    random(D_SAE, D_MODEL, seed=2),
    random(D_LATER, D_MODEL, seed=3),
)


def connected(weights: ModelWeights) -> Connected:
    later_reads = read_point("blocks.2.mlp.hook_in", weights)
    assert later_reads is not None
    return Connected(
        ENCODER,
        DECODER,
        read_point("blocks.1.mlp.hook_in", weights),
        write_point("blocks.1.mlp.hook_out", weights),
        weights,
        [Later("layer2", later_reads, LATER)],
    )


def rows_of(what: Connected) -> list[dict[str, Any]]:
    return pa.Table.from_batches(connection_rows(what, VOCABULARY), SCHEMA).to_pylist()


@pytest.fixture(scope="module")
def weights() -> ModelWeights:
    return made_up_weights()


@pytest.fixture(scope="module")
def rows(weights: ModelWeights) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extremes, "NUMBERS_AT_ONCE", 100)
        patch.setattr("tailrace.analysis.harvest.table.FEATURES_PER_BATCH", 3)
        return rows_of(connected(weights))


def of(rows: list[dict[str, Any]], feature: int, kind: str, **others: Any) -> list[dict[str, Any]]:
    wanted = {"feature": feature, "kind": kind, **others}
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def reads(weights: ModelWeights, feature: int) -> torch.Tensor:
    row = ENCODER[feature].double()
    return gradient(lambda x: row @ normalised(weights.layers[1].norm_mlp, x))


def source(weights: ModelWeights, direction: torch.Tensor, layer: int, head: int) -> torch.Tensor:
    """What the stream at the head's source must hold."""
    return gradient(lambda x: direction @ through_head(weights.layers[layer], head, x))


def check_ends(found: list[dict[str, Any]], name: str, scores: np.ndarray, n: int = 10) -> None:
    """Both ends of ``scores``: rank 0, 1, … from the largest, −1, −2, … from the smallest."""
    order = np.argsort(-scores)
    n_bottom = min(n, len(scores) - n)
    ranks = [*range(n), *(-1 - place for place in range(n_bottom))]
    assert [row["rank"] for row in found] == ranks
    assert [row[name] for row in found] == order[ranks].tolist()
    np.testing.assert_allclose([row["weight"] for row in found], scores[order[ranks]], rtol=1e-4, atol=1e-4)


def test_tokens_are_the_ends_of_embeddings_times_the_direction_read(rows, weights) -> None:
    for feature in range(D_SAE):
        found = of(rows, feature, "token")
        check_ends(found, "token_id", (weights.W_E.double() @ reads(weights, feature)).numpy())
        assert [row["token"] for row in found] == [f"t{row['token_id']}" for row in found]


def test_heads_are_those_of_largest_norm_among_the_layers_before(rows, weights) -> None:
    for feature in range(D_SAE):
        direction = reads(weights, feature)
        names = [(layer, head) for layer in (0, 1) for head in range(N_HEADS)]
        norms = {name: source(weights, direction, *name).norm().item() for name in names}
        expected = sorted(norms, key=lambda name: -norms[name])
        found = of(rows, feature, "head")
        assert [(row["layer"], row["head"]) for row in found] == expected
        assert [row["rank"] for row in found] == list(range(2 * N_HEADS))
        assert [row["weight"] for row in found] == pytest.approx([norms[name] for name in expected], rel=1e-4)


def test_tokens_through_a_head_are_those_of_the_two_strongest(rows, weights) -> None:
    for feature in range(D_SAE):
        direction = reads(weights, feature)
        names = [(row["layer"], row["head"]) for row in of(rows, feature, "head")[:2]]
        for layer, head in names:
            scores = (weights.W_E.double() @ source(weights, direction, layer, head)).numpy()
            found = of(rows, feature, "head_token", layer=layer, head=head)
            assert [row["rank"] for row in found] == list(range(10))
            assert [row["token_id"] for row in found] == np.argsort(-scores)[:10].tolist()
            np.testing.assert_allclose(
                [row["weight"] for row in found], np.sort(scores)[::-1][:10], rtol=1e-4, atol=1e-4
            )
        assert len(of(rows, feature, "head_token")) == 20


def test_later_features_are_the_ends_of_what_is_written_times_what_is_read(rows, weights) -> None:
    written = normalised(weights.layers[1].norm_mlp_out, DECODER.double())
    for feature in range(D_SAE):
        later = torch.stack([
            gradient(lambda x, row=row: row @ normalised(weights.layers[2].norm_mlp, x)) for row in LATER.double()
        ])  # fmt: skip
        found = of(rows, feature, "feature")
        check_ends(found, "other", (later @ written[feature]).numpy())
        assert {(row["site"], row["layer"], row["head"]) for row in found} == {("layer2", 2, None)}


def test_as_many_are_kept_at_either_end_as_asked_for(rows, weights) -> None:
    fewer = rows_of(dataclasses.replace(connected(weights), n_ends=2))
    ranks = {"token": (0, 1, -2, -1), "feature": (0, 1, -2, -1), "head_token": (0, 1)}
    for kind in connections.KINDS:
        wanted = [row for row in rows if row["kind"] == kind and row["rank"] in ranks.get(kind, (row["rank"],))]
        found = [row for row in fewer if row["kind"] == kind]
        # products of other batches of features, which may round otherwise
        weights_of = [[row["weight"] for row in some] for some in (wanted, found)]
        assert weights_of[0] == pytest.approx(weights_of[1], rel=1e-6)
        assert [{**row, "weight": 0} for row in wanted] == [{**row, "weight": 0} for row in found]


def test_rows_are_sorted_by_feature_then_kind_and_name_only_what_they_have(rows) -> None:
    places = [(row["feature"], connections.KINDS.index(row["kind"])) for row in rows]
    assert places == sorted(places)
    assert {row["feature"] for row in rows} == set(range(D_SAE))
    named: dict[str, set[str]] = {kind: set() for kind in connections.KINDS}
    for row in rows:
        named[row["kind"]] |= {name for name, value in row.items() if value is not None}
    always = {"feature", "kind", "rank", "weight"}
    assert named == {
        "token": always | {"token_id", "token"},
        "head": always | {"layer", "head"},
        "head_token": always | {"layer", "head", "token_id", "token"},
        "feature": always | {"site", "layer", "other"},
    }


def test_batches_have_the_tables_schema_and_are_cut_by_features(weights) -> None:
    seen: list[int] = []
    batches = list(connection_rows(connected(weights), VOCABULARY, progress=seen.append))
    assert [batch.schema.equals(SCHEMA, check_metadata=True) for batch in batches] == [True]
    assert seen == [D_SAE]


def test_a_transcoder_beside_the_stream_has_no_connections(weights) -> None:
    assert rows_of(replace(connected(weights), reads=None, writes=None)) == []
    only_written = rows_of(replace(connected(weights), reads=None))
    assert {row["kind"] for row in only_written} == {"feature"}


def test_a_first_layer_that_runs_beside_its_attention_has_no_heads() -> None:
    weights = made_up_weights(parallel=True)
    what = replace(connected(weights), reads=read_point("blocks.0.mlp.hook_in", weights), later=())
    assert {row["kind"] for row in rows_of(what)} == {"token"}
