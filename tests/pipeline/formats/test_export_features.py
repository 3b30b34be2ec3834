"""Feature files of the circuit-tracer viewer and delphi's latents hold what the tables say, where readers look."""

from __future__ import annotations

import gzip
import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file

from tailrace.pipeline.formats import export
from tailrace.pipeline.formats.settings import ExportSettings
from tailrace.pipeline.formats.viewer_features import N_BINS, equal_bins, feature_json
from tailrace.storage.errors import ArtifactMismatch, ArtifactMissing, SettingsError
from tests.support.synthetic_cache import write_synthetic_cache
from tests.support.tables_by_hand import (
    dead_row,
    example_row,
    feature_row,
    publish_latents,
    publish_tables,
    write_columns,
)


def write(to, sources, output, cache=None, **settings):
    return export.run(ExportSettings(**settings), to=to, sources=sources, output=output, cache=cache)


def look_up(folder, layer, feature):
    """Read a feature as the viewer does: bytes from its offset to the next, both included, the length in front."""
    index = json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))
    entry = index[layer]
    start, end = entry["offsets"][feature], entry["offsets"][feature + 1]
    taken = (folder / entry["filename"]).read_bytes()[start : end + 1]
    (length,) = struct.unpack("<I", taken[:4])
    return json.loads(gzip.decompress(taken[4 : 4 + length]))


EXAMPLES_OF_1 = [
    example_row(1, 0, 4.0),
    example_row(1, 1, 3.0),
    example_row(1, 0, 0.5, kind="band", band=0),
    example_row(1, 0, 3.9, kind="band", band=4),
    example_row(1, 0, 1.0, kind="random"),
]


def test_a_feature_is_found_where_the_viewer_looks_for_it(tmp_path):
    features = [dead_row(0), feature_row(1), feature_row(2)]
    tables = publish_tables(tmp_path / "t", features, [*EXAMPLES_OF_1, example_row(2)])
    result = write("circuit-tracer-features", [tables], tmp_path / "out")
    assert result.files == ["features/index.json.gz", "features/layer_0.bin"]
    found = look_up(tmp_path / "out/features", 0, 1)
    assert (found["index"], found["transcoder_id"], found["activation_frequency"]) == (1, "layer0", 0.01)
    assert (found["act_min"], found["act_max"]) == (0.0, 4.0)
    assert (found["top_logits"], found["bottom_logits"]) == ([" up"], [" down"])
    assert [group["quantile_name"] for group in found["examples_quantiles"]] == [
        "Top activations", "Band 5 of 5", "Band 1 of 5", "Random activations",
    ]  # fmt: skip
    assert [len(group["examples"]) for group in found["examples_quantiles"]] == [2, 1, 1, 1]
    assert found["examples_quantiles"][0]["examples"][0] == {
        "tokens_acts_list": [0.0, 4.0, 0.0],
        "train_token_ind": 1,
        "is_repeated_datapoint": False,
        "tokens": ["<bos>", " the", " word1"],
    }
    assert look_up(tmp_path / "out/features", 0, 2)["examples_quantiles"][0]["examples"][0]["tokens"][2] == " word2"
    dead = look_up(tmp_path / "out/features", 0, 0)
    assert (dead["examples_quantiles"], dead["act_max"], sum(dead["histogram"])) == ([], 0.0, 0)


def test_layers_are_sorted_and_those_that_are_missing_have_no_features(tmp_path):
    paths = [
        publish_tables(tmp_path / f"t{layer}", [feature_row(0)], [example_row(0, 0, 1.0 + layer)], layer=layer)
        for layer in (3, 1)
    ]
    write("circuit-tracer-features", paths, tmp_path / "out")
    index = json.loads(gzip.decompress((tmp_path / "out/features/index.json.gz").read_bytes()))
    assert [entry["filename"] for entry in index] == ["", "layer_1.bin", "", "layer_3.bin"]
    assert [len(entry["offsets"]) for entry in index] == [0, 2, 0, 2]
    for layer in (1, 3):
        (group,) = look_up(tmp_path / "out/features", layer, 0)["examples_quantiles"]
        assert group["examples"][0]["tokens_acts_list"][1] == 1.0 + layer


def test_equal_tables_give_equal_bytes(tmp_path):
    tables = publish_tables(tmp_path / "t", [feature_row(0), feature_row(1)], EXAMPLES_OF_1)
    for name in ("one", "two"):
        write("circuit-tracer-features", [tables], tmp_path / name)
    for file in ("features/index.json.gz", "features/layer_0.bin"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_tables_without_a_layer_and_two_of_one_layer_are_refused_together(tmp_path):
    paths = [
        publish_tables(tmp_path / name, [feature_row(0)], [], layer=layer)
        for name, layer in (("a", None), ("b", 1), ("c", 1))
    ]
    with pytest.raises(SettingsError, match=r"(?s)belongs to no one layer.*layer 1: .* are both of it"):
        write("circuit-tracer-features", paths, tmp_path / "out")


def test_counts_are_spread_evenly_inside_their_bins():
    spread = equal_bins(np.array([60.0, 40.0]), np.array([1.0, 2.0, 4.0]), 4.0)
    width = 4.0 / N_BINS  # 0.08: 12.5 bins to each unit
    assert len(spread) == N_BINS
    assert spread.sum() == pytest.approx(100)
    assert spread[:12].sum() == 0
    assert spread[13] == pytest.approx(60 * width)  # wholly inside [1, 2)
    assert spread[30] == pytest.approx(40 * width / 2)  # wholly inside [2, 4)


def test_a_last_bin_above_the_maximum_still_counts():
    # the maximum 3 lies in the bin [2, 4): its 40 rows are all at or below 3
    spread = equal_bins(np.array([60.0, 40.0]), np.array([1.0, 2.0, 4.0]), 3.0)
    assert spread.sum() == pytest.approx(100)
    assert spread[-1] == pytest.approx(40 * 3.0 / N_BINS)


def test_percentiles_are_middles_of_the_bins_they_fall_into():
    values = feature_json(feature_row(0), [], "layer0")["quantile_values"]
    assert len(values) == 99
    assert values[0] == pytest.approx(2**0.5)  # the 1st of 100 rows, in [1, 2)
    assert values[59] == pytest.approx(2**0.5)  # the 60th
    assert values[60] == pytest.approx(8**0.5)  # the 61st, in [2, 4)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return publish_latents(tmp_path_factory.mktemp("latents"))


def test_delphi_finds_every_activation_at_its_context_position_and_latent(latents, tmp_path):
    root, split, context, position, made = latents
    result = write("delphi", [root / "t"], tmp_path / "out", cache=root / "cache", model_name="me/tiny")
    folder = tmp_path / "out/latents/layer0"
    contexts = np.unique(context)
    for (first, last), (feature, row, activation) in made.items():
        saved = load_file(folder / f"{first}_{last}.safetensors")
        assert saved["locations"].dtype == np.uint16
        wanted = [np.searchsorted(contexts, context[row]), position[row], feature - first]
        assert (saved["locations"] == np.stack(wanted, axis=1)).all()
        assert saved["activations"] == pytest.approx(activation, rel=1e-3)
        tokens = saved["tokens"][saved["locations"][:, 0], saved["locations"][:, 1]]
        assert (tokens == split.context_tokens(context[row])[np.arange(len(row)), position[row]]).all()
    assert load_file(folder / "0_3.safetensors")["activations"].dtype == np.float16
    assert load_file(folder / "4_5.safetensors")["activations"].dtype == np.float32
    assert result.notes == [
        "layer0: 1 files keep activations in float32, which float16 cannot hold",
        "written for the reader of delphi (eai-delphi) 0.1.3",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_name"], config["cache_ctx_len"], config["n_splits"]) == ("me/tiny", 16, 2)
    assert config["n_tokens"] == 20 * 16


def test_delphi_needs_activations_and_the_cache_they_come_from(latents, tmp_path):
    root = latents[0]
    with pytest.raises(SettingsError, match="give the cache they come from"):
        write("delphi", [root / "t"], tmp_path / "out")
    other = write_synthetic_cache(tmp_path / "other", n_heldout_contexts=4)
    with pytest.raises(ArtifactMismatch, match="is not the cache that"):
        write("delphi", [root / "t"], tmp_path / "out", cache=other.path)
    bare = publish_tables(tmp_path / "bare", [feature_row(0)], [])
    with pytest.raises(ArtifactMissing, match="hold no activations"):
        write("delphi", [bare], tmp_path / "out", cache=root / "cache")
    live = publish_tables(tmp_path / "live", [feature_row(0)], [], fresh={"live": {"dataset": "speeches"}})
    (live / "activations").mkdir()
    with pytest.raises(ArtifactMismatch, match=r"live: was made from fresh text .* analyze a cache"):
        write("delphi", [live], tmp_path / "out", cache=root / "cache")


def test_the_context_in_which_kept_rows_end_is_left_out(latents, tmp_path):
    root, split, context, position, _ = latents
    n_kept = int(np.searchsorted(context, np.unique(context)[3])) + 5  # three contexts and a bit of the fourth
    tables = publish_tables(tmp_path / "t", [feature_row(0)], [], cache=split.cache.reference)
    write_columns(tables / "rows.parquet", {"context": context[:n_kept], "position": position[:n_kept]})
    (tables / "activations").mkdir()
    columns = {
        "feature": np.zeros(n_kept, np.int32),
        "row": np.arange(n_kept),
        "activation": np.ones(n_kept, np.float32),
    }
    write_columns(tables / "activations/features-000000-000000.parquet", columns)
    write("delphi", [tables], tmp_path / "out", cache=root / "cache")
    saved = load_file(tmp_path / "out/latents/layer0/0_0.safetensors")
    assert len(saved["tokens"]) == 3
    assert len(saved["locations"]) == n_kept - 5
    assert saved["locations"][:, 0].max() == 2
