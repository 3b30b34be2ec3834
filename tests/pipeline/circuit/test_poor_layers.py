"""``pipeline circuit`` warns of layers whose transcoder explains next to nothing, where a set's scores say so."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa
import pytest

from tailrace.pipeline.circuit.question import Question
from tailrace.pipeline.circuit.traced import warn_of_poor_layers
from tailrace.pipeline.train.layer_set_scores import LAYERS, write_layers
from tailrace.storage.tables import write_table
from tests.support.layer_outcomes import layer_outcome

LOGIT = Question("text", logit="her")


@pytest.fixture
def transcoders(tmp_path: Path) -> dict[int, Path]:
    """Of four layers; 1 is good on massive rows alone, 2 is bad without a score on ordinary rows, 3 on the line."""
    scores = [(0.3, 0.3), (0.2, 5.14), (0.95, None), (0.9, 0.9)]
    write_layers(tmp_path / LAYERS, [layer_outcome(layer, *found) for layer, found in enumerate(scores)])
    return {layer: tmp_path / f"layer{layer}" for layer in range(4)}


def said(
    caplog: pytest.LogCaptureFixture,
    question: Question,
    transcoders: dict[int, Path],
    scores: dict[int, dict[str, float]] | None = None,
) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_poor_layers(question, transcoders, scores or {})
    return [record.getMessage() for record in caplog.records]


def test_poor_layers_are_told_in_one_warning_with_their_numbers(
    caplog: pytest.LogCaptureFixture, transcoders: dict[int, Path]
) -> None:
    assert said(caplog, LOGIT, transcoders) == [
        "transcoders with an FVU above 0.9: layer 1 (5.14 on ordinary rows), layer 2 (0.95 on all rows); what goes "
        "through such a layer lies in its error node, not in features"
    ]


@pytest.mark.parametrize(
    ("feature", "direction", "layers"),
    [((1, 0), "encoder", []), ((1, 0), "decoder", [1]), ((2, 0), "encoder", [1]), ((3, 0), "encoder", [1, 2])],
)
def test_only_layers_that_an_answer_goes_through_are_told(
    caplog: pytest.LogCaptureFixture, transcoders: dict[int, Path], feature: tuple[int, int], direction, layers
) -> None:
    found = said(caplog, Question("text", feature=feature, direction=direction), transcoders)
    assert [layer for layer in range(4) if any(f"layer {layer} (" in line for line in found)] == layers
    assert len(found) == bool(layers)


def test_layers_without_a_transcoder_in_the_circuit_are_not_told(
    caplog: pytest.LogCaptureFixture, transcoders: dict[int, Path]
) -> None:
    assert said(caplog, LOGIT, {0: transcoders[0], 3: transcoders[3]}) == []


def test_transcoders_made_alone_or_beside_another_table_are_taken_as_they_are(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    assert said(caplog, LOGIT, {1: tmp_path / "layer1"}) == []
    table = pa.table({"site": ["layer1"], "n_rows": [6]})
    write_table(tmp_path / LAYERS, table.schema, table.to_batches())
    assert said(caplog, LOGIT, {1: tmp_path / "layer1"}) == []


def test_a_transcoder_is_found_by_any_path_to_it(
    caplog: pytest.LogCaptureFixture, transcoders: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    transcoders[1].mkdir()
    monkeypatch.chdir(transcoders[1])
    assert len(said(caplog, LOGIT, {1: Path(".")})) == 1


def test_what_manifests_say_counts_where_no_table_of_layers_does(
    caplog: pytest.LogCaptureFixture, transcoders: dict[int, Path], tmp_path: Path
) -> None:
    alone = {5: tmp_path / "apart" / "one", 6: tmp_path / "apart" / "one", 7: tmp_path / "apart" / "one"}
    scores = {5: {"fvu": 0.97}, 6: {"fvu": 0.97, "fvu_ordinary": 0.4}, 1: {"fvu": 0.1, "fvu_ordinary": 0.1}}
    told = said(caplog, LOGIT, {1: transcoders[1], **alone}, scores)
    assert told == [
        "transcoders with an FVU above 0.9: layer 1 (5.14 on ordinary rows), layer 5 (0.97 on all rows); what goes "
        "through such a layer lies in its error node, not in features"
    ]
