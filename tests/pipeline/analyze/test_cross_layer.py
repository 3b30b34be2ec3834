"""``pipeline analyze`` of a cross-layer transcoder: tables of every layer, of the sum of what features write."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from tailrace.pipeline.analyze import many as analyze_each
from tailrace.pipeline.analyze import stage as analyze
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.analyze.stage import AnalyzeResult
from tailrace.pipeline.artifacts.transcoders import open_tables, open_transcoders
from tailrace.pipeline.circuit import stage as circuit
from tailrace.pipeline.circuit.cards import read_cards
from tailrace.pipeline.circuit.question import Question
from tailrace.pipeline.circuit.settings import CircuitSettings
from tailrace.pipeline.circuit.traced import traced_layers
from tailrace.pipeline.live.settings import FreshText
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import Manifest, verify_artifact
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMismatch, NonFiniteActivation, SettingsError
from tailrace.storage.tables import read_table
from tailrace.training.architectures.transcoder import load_transcoder
from tailrace.training.cross_layer.layers import load_cross_layer, load_layers, load_summed_layer, split_layers
from tailrace.training.cross_layer.stack import CrossLayerTranscoder
from tests.support.cache_jobs import CONTEXT_LENGTH, command, differing, model_folder, run_cache, text_file, tree
from tests.support.cross_layer_transcoders import D_SAE, publish_cross_layer, random_cross_layer
from tests.support.spliced_models import WIDTH, mlp_site, publish_transcoder, random_transcoder

SETTINGS = AnalyzeSettings(split="train", examples=2)
NAMES = ("layer0", "layer1")
SITES = [mlp_site(layer) for layer in range(2)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a model's three layers, a transcoder across the lower two and one of the third, and tables."""
    place = tmp_path_factory.mktemp("across")
    run_cache(place / "cache", model=str(model_folder(n_layers=3)), layers="all", tokens="all", holdout="0")
    cache = open_cache(place / "cache")
    publish(place / "clt", place, random_cross_layer(width=WIDTH, n_layers=2))
    publish_transcoder(place / "third", cache, "layer2", random_transcoder(seed=2))
    run(place, place / "tables", downstream=[place / "third"])
    return place


def publish(path: Path, made: Path, module: CrossLayerTranscoder) -> Path:
    cache = open_cache(made / "cache")
    return publish_cross_layer(path, module, [cache.sites[name] for name in NAMES], model=cache.manifest.model)


def run(
    made: Path, output: Path, *paths: Path, settings: AnalyzeSettings = SETTINGS, **given: Any
) -> list[AnalyzeResult]:
    arguments = {"cache": made / "cache", "compute": Compute(threads=1, quiet=True), **given}
    return analyze_each.run(settings, transcoders=paths or [made / "clt"], output=output, **arguments)


def rows_of(made: Path, table: str, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(made / "tables" / name / f"{table}.parquet").to_pylist()
    return rows


def summed_decoders(made: Path) -> list[torch.Tensor]:
    """Return (d_sae, d_out) float64 a layer: what its features write to it and all later ones, added up."""
    whole = load_cross_layer(made / "clt").double()
    return [sum((whole.writes(own, to) for to in range(own, 2)), torch.zeros(D_SAE, WIDTH)) for own in range(2)]


# ---- what is analysed


def test_a_layer_reads_as_the_whole_transcoder_does_and_writes_the_sum(made: Path) -> None:
    whole = load_cross_layer(made / "clt")
    inputs = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(3))
    for place, part in enumerate(split_layers(whole, SITES)):
        summed = load_summed_layer(made / "clt", place)
        activations = summed.encode(inputs)
        assert torch.equal(activations, whole.encode_layer(place, inputs))
        assert torch.equal(activations, part.encode(inputs))
        assert 0.02 < float((activations > 0).float().mean()) < 0.98
        torch.testing.assert_close(summed.W_dec.double(), summed_decoders(made)[place], rtol=1e-6, atol=1e-7)
        assert torch.equal(summed.b_dec_out, part.b_dec_out)


def test_layers_read_one_by_one_are_those_of_the_whole(made: Path) -> None:
    split = split_layers(load_cross_layer(made / "clt"), SITES)
    for layer, own in zip(load_layers(made / "clt"), split, strict=True):
        assert (layer.sites, layer.index, layer.training) == (own.sites, own.index, False)
        found, wanted = layer.state_dict(), own.state_dict()
        assert found.keys() == wanted.keys()
        for name, values in found.items():
            assert torch.equal(values, wanted[name]), name
            assert bool(values.any()), name  # something was read


def test_weights_of_another_shape_or_none_are_corrupt(made: Path, tmp_path: Path) -> None:
    for name, content in (("short", (made / "third" / "weights.safetensors").read_bytes()), ("none", b"")):
        shutil.copytree(made / "clt", tmp_path / name)
        (tmp_path / name / "weights.safetensors").write_bytes(content)
        with pytest.raises(ArtifactCorrupt, match=f"{name}/weights.safetensors: has .+ its record says"):
            load_summed_layer(tmp_path / name, 1)
        with pytest.raises(ArtifactCorrupt, match=f"{name}/weights.safetensors: has .+ its record says"):
            load_layers(tmp_path / name)


# ---- tables


def test_every_layer_gets_sound_tables_that_say_which_layer_they_are_of(made: Path) -> None:
    digest = Manifest.read(made / "clt", "cross_layer_transcoder").digest
    assert sorted(path.name for path in (made / "tables").iterdir()) == list(NAMES)
    for layer, name in enumerate(NAMES):
        assert verify_artifact(made / "tables" / name, "tables") == []
        manifest = Manifest.read(made / "tables" / name, "tables").as_json()
        assert manifest["inputs"]["transcoder"] == {"digest": digest, "layer": layer}
        assert manifest["site"]["name"] == name


def test_tables_of_a_transcoder_of_one_layer_name_no_layer(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "t", made / "third")
    manifest = Manifest.read(tmp_path / "t" / "third", "tables").as_json()
    digest = Manifest.read(made / "third", "transcoder").digest
    assert manifest["inputs"]["transcoder"] == manifest["request"]["inputs"]["transcoder"] == {"digest": digest}
    (row,) = read_table(tmp_path / "t" / "third" / "layers.parquet").to_pylist()
    assert row["fvu"] > 0
    assert row["mean_squared_error"] > 0


def test_statistics_are_those_of_encoding_all_rows_at_once(made: Path) -> None:
    split = open_cache(made / "cache").split("train")
    whole = load_cross_layer(made / "clt")
    for layer, name in enumerate(NAMES):
        units = [split.read_unit(unit, [f"{name}/in"])[f"{name}/in"] for unit in range(split.n_units)]
        acts = whole.encode_layer(layer, torch.from_numpy(np.concatenate(units))).numpy()
        features = rows_of(made, "features", name)
        assert [row["n_active"] for row in features] == (acts > 0).sum(0).tolist()
        assert [row["max"] or 0.0 for row in features] == pytest.approx(acts.max(0), rel=1e-5)
        sums = acts.sum(0, dtype=np.float64)
        assert [(row["mean"] or 0.0) * row["n_active"] for row in features] == pytest.approx(sums, rel=1e-5)
        (row,) = rows_of(made, "layers", name)
        assert row["l0_mean"] == pytest.approx((acts > 0).sum(1).mean())
        assert (row["n_rows"], row["d_sae"], row["site"]) == (split.n_rows, D_SAE, name)
        kept = read_table(made / "tables" / name / "activations" / f"features-000000-{D_SAE - 1:06d}.parquet")
        for feature, own in enumerate(acts.T):
            told = kept["activation"].filter(pc.equal(kept["feature"], feature)).to_numpy()
            np.testing.assert_allclose(np.sort(told), np.sort(own[own > 0]), rtol=1e-4, atol=1e-5)


def test_what_is_told_from_weights_is_of_the_sum_of_what_a_feature_writes(made: Path) -> None:
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_folder(n_layers=3))
    weights = {name: value.detach().double() for name, value in model.state_dict().items()}
    encoder = load_transcoder(made / "third").W_enc.double() * weights["transformer.h.2.ln_2.weight"]
    later = encoder - encoder.mean(-1, keepdim=True)
    for name, decoder in zip(NAMES, summed_decoders(made), strict=True):
        centred = (decoder - decoder.mean(-1, keepdim=True)) * weights["transformer.ln_f.weight"]
        logits = (centred @ weights["lm_head.weight"].T).numpy()
        cosines = torch.nn.functional.cosine_similarity(decoder[:, None], decoder[None], dim=-1).fill_diagonal_(-2)
        products = (decoder @ later.T).numpy()
        connections = [row for row in rows_of(made, "connections", name) if row["kind"] == "feature"]
        for row, own, near, read in zip(rows_of(made, "features", name), logits, cosines, products, strict=True):
            assert row["promoted_token_ids"] == np.argsort(-own)[:10].tolist()
            assert row["suppressed_token_ids"] == np.argsort(own)[:10].tolist()
            np.testing.assert_allclose(row["promoted_logits"], np.sort(own)[::-1][:10], rtol=1e-4, atol=1e-5)
            assert row["nearest_features"] == near.argsort(descending=True)[:10].tolist()
            assert row["decoder_norm"] == pytest.approx(float(decoder[row["feature"]].norm()), rel=1e-5)
            ends = [one for one in connections if one["feature"] == row["feature"]]
            assert [one["other"] for one in ends] == [int(np.argsort(-read)[one["rank"]]) for one in ends]


def test_a_layers_faithfulness_is_no_number_and_not_printed(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES:
        (row,) = rows_of(made, "layers", name)
        assert row["fvu"] is None
        assert np.isnan(row["mean_squared_error"])
    flags = ("--split", "train", "--rows", "30", "--without-model", "--threads", "1")
    said = command(capsys, "analyze", made / "clt", "--cache", made / "cache", "--out", tmp_path / "t", *flags)
    assert said.code == 0
    lines = said.out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(tmp_path / "t" / name) for name in NAMES]
    assert all(line.endswith(" dead") and "FVU" not in line for line in lines)


@pytest.mark.slow  # test_workers.py has it of one layer
def test_two_workers_write_the_bytes_of_one_process(made: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"rows": 130, "without_model": True})  # three units, the last one in part
    for workers in (0, 2):
        on = Compute(threads=1, workers=workers, quiet=True)
        run(made, tmp_path / str(workers), settings=settings, compute=on)
    alone, together = tree(tmp_path / "0"), tree(tmp_path / "2")
    assert differing(alone, together) == []
    assert {f"{name}/features.parquet" for name in NAMES} < alone.keys()


@pytest.mark.slow
def test_interrupted_it_goes_on_with_the_first_layer_that_is_not_finished(made: Path, tmp_path: Path) -> None:
    def stop(_: AnalyzeResult) -> None:
        raise KeyboardInterrupt

    given: dict[str, Any] = {"downstream": [made / "third"]}
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "t", finished=stop, **given)
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["layer0"]
    before = (tmp_path / "t" / "layer0" / "features.parquet").stat().st_mtime_ns
    assert [one.path.name for one in run(made, tmp_path / "t", **given)] == list(NAMES)
    assert (tmp_path / "t" / "layer0" / "features.parquet").stat().st_mtime_ns == before
    assert differing(tree(tmp_path / "t"), tree(made / "tables")) == []


@pytest.mark.slow
def test_fresh_text_gives_every_layer_what_a_cache_of_it_does(made: Path, tmp_path: Path) -> None:
    text = FreshText.read({"dataset": str(text_file()), "context_length": CONTEXT_LENGTH, "contexts_per_batch": 4}, {})
    run(made, tmp_path / "cached")
    settings = SETTINGS.model_copy(update={"rows": open_cache(made / "cache").split(SETTINGS.split).n_rows})
    fresh = {"cache": None, "live": text, "model": str(model_folder(n_layers=3))}
    run(made, tmp_path / "live", settings=settings, **fresh)
    kept = f"activations/features-000000-{D_SAE - 1:06d}.parquet"
    for name in NAMES:
        for file in (kept, "rows.parquet", "connections.parquet"):
            assert (tmp_path / "live" / name / file).read_bytes() == (tmp_path / "cached" / name / file).read_bytes()
    assert (tmp_path / "live" / NAMES[0] / kept).read_bytes() != (tmp_path / "live" / NAMES[1] / kept).read_bytes()


# ---- cards of circuits


def test_features_of_a_circuit_have_the_cards_of_their_own_layers_tables(made: Path, tmp_path: Path) -> None:
    words = json.loads((model_folder(n_layers=3) / "tokenizer.json").read_text())["model"]["vocab"]
    known = sorted(words, key=lambda word: words[word])
    misnamed = tmp_path / "tables"
    for name, place in zip(NAMES, reversed(NAMES), strict=True):
        shutil.copytree(made / "tables" / name, misnamed / place)
    result = circuit.run(
        CircuitSettings(iterations=2, branches=20, max_features=40, missing_layers="opaque"),
        Question(" ".join(known[2:9]), logit=known[10]),
        transcoders=[made / "clt"],
        tables=[misnamed],
        output=tmp_path / "circuit",
        model=str(model_folder(n_layers=3)),
        compute=Compute(threads=1),
    )
    page = (result.path / "index.html").read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    shown = {node["card"] for graph in data["graphs"] for node in graph["nodes"] if node["kind"] == "feature"}
    assert {card.partition(":")[0] for card in shown} == {"0", "1"}
    assert shown <= data["cards"].keys()
    rows = {layer: rows_of(made, "features", name) for layer, name in enumerate(NAMES)}
    for card in shown:
        layer, index = map(int, card.split(":"))
        assert ["fires on", f"{rows[layer][index]['frequency']:.3%} of rows"] in data["cards"][card]["facts"]
    told = Manifest.read(result.path, "circuit").as_json()["inputs"]["tables"]
    assert told == {name: {"digest": Manifest.read(made / "tables" / name, "tables").digest} for name in NAMES}


def test_tables_are_matched_by_digest_and_site(made: Path, tmp_path: Path) -> None:
    traced = traced_layers(open_transcoders(made / "clt"))
    assert open_tables([made / "tables"], traced) == {layer: made / "tables" / name for layer, name in enumerate(NAMES)}
    only = open_tables([made / "tables" / "layer1"], traced)
    assert only == {1: made / "tables" / "layer1"}
    assert read_cards(only, [(0, 3), (1, 3)]).keys() == {(1, 3)}
    other = publish(tmp_path / "other", made, random_cross_layer(width=WIDTH, n_layers=2, seed=1))
    with pytest.raises(ArtifactMismatch, match="made from a transcoder that was not given"):
        open_tables([made / "tables" / "layer1"], traced_layers(open_transcoders(other)))
    with pytest.raises(ArtifactMismatch, match=r"layer1: .*layer1 is of the same transcoder; give one of them"):
        open_tables([made / "tables", made / "tables" / "layer1"], traced)


# ---- what is refused


def test_beside_other_transcoders_its_layers_are_named_after_it_too(made: Path, tmp_path: Path) -> None:
    results = run(made, tmp_path / "t", made / "clt", made / "third")
    assert [one.path.name for one in results] == ["clt-layer0", "clt-layer1", "third"]
    for table in ("features", "examples"):
        beside, alone = (
            read_table(path / f"{table}.parquet") for path in (results[0].path, made / "tables" / "layer0")
        )
        assert beside.equals(alone)
    with pytest.raises(SettingsError, match=r"some of these are the same[\s\S]*clt-layer0: .*clt, .*clt"):
        run(made, tmp_path / "u", made / "clt", made / "clt")
    assert not (tmp_path / "u").exists()


def test_every_layers_problem_is_told_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    cache = open_cache(made / "cache")
    sites = [cache.sites["layer0"], *(replace(cache.sites["layer1"], name=name) for name in ("layer7", "layer8"))]
    module = random_cross_layer(width=WIDTH, n_layers=3)
    path = publish_cross_layer(tmp_path / "clt", module, sites, model=cache.manifest.model)
    with pytest.raises(ArtifactMismatch, match=r"has no site 'layer7'[\s\S]*has no site 'layer8'"):
        run(made, tmp_path / "t", path)
    path = publish_cross_layer(tmp_path / "stranger", module, [*cache.sites.values()], model={"name": "another"})
    with pytest.raises(ArtifactMismatch) as refused:
        run(made, tmp_path / "u", path)
    assert str(refused.value).count("was not trained on what") == 1, "one sentence for one model, not one a layer"
    assert not (tmp_path / "t").exists()
    assert not (tmp_path / "u").exists()


def test_tables_with_other_settings_and_an_artifact_at_the_place_are_refused(made: Path) -> None:
    changed = SETTINGS.model_copy(update={"examples": 3})
    with pytest.raises(ArtifactMismatch, match=r"layer0: published[\s\S]*layer1: published[\s\S]*there it is 2"):
        run(made, made / "tables", settings=changed, downstream=[made / "third"])
    with pytest.raises(ArtifactMismatch, match="and so of each layer with a cross-layer transcoder"):
        run(made, made / "tables" / "layer0")


def test_later_transcoders_must_read_after_all_that_any_layer_writes(made: Path, tmp_path: Path) -> None:
    early = publish_transcoder(tmp_path / "early", open_cache(made / "cache"), "layer1", random_transcoder())
    with pytest.raises(SettingsError, match=r"clt, layer1: --downstream .*early: blocks.1.mlp.hook_in reads before"):
        run(made, tmp_path / "t", downstream=[early])
    assert not (tmp_path / "t").exists()


def test_connections_to_a_layer_are_of_what_was_written_before_it_reads(made: Path, tmp_path: Path) -> None:
    """Of itself: layer 0 writes to layers 0 and 1, and what layer 1 reads has seen the former alone."""
    import transformers

    run(
        made,
        tmp_path / "t",
        downstream=[made / "clt", made / "third"],
        settings=SETTINGS.model_copy(update={"rows": 30}),
    )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_folder(n_layers=3))
    whole = load_cross_layer(made / "clt").double()
    gain = model.state_dict()["transformer.h.1.ln_2.weight"].double()
    read = whole.W_enc[whole.of_layer(1)] * gain
    read = read - read.mean(-1, keepdim=True)
    products = whole.writes(0, 0) @ read.T
    rows = read_table(tmp_path / "t" / "layer0" / "connections.parquet").to_pylist()
    own = [row for row in rows if row["kind"] == "feature" and row["site"] == "layer1"]
    assert len(own) == D_SAE * 20
    for row in own:
        assert row["weight"] == pytest.approx(float(products[row["feature"], row["other"]]), rel=1e-4, abs=1e-5)
    last = read_table(tmp_path / "t" / "layer1" / "connections.parquet").to_pylist()
    assert {row["site"] for row in last if row["kind"] == "feature"} == {"layer2"}
    with pytest.raises(SettingsError, match=r"third: --downstream .*clt: each of .* reads before"):
        run(made, tmp_path / "u", made / "third", downstream=[made / "clt"])
    told = Manifest.read(tmp_path / "t" / "layer0", "tables").as_json()["inputs"]["downstream"]
    digest = Manifest.read(made / "clt", "cross_layer_transcoder").digest
    assert [told[name] for name in NAMES] == [{"digest": digest, "layer": layer} for layer in range(2)]


def test_a_layer_that_is_not_finite_is_named_and_keeps_no_other_from_its_tables(made: Path, tmp_path: Path) -> None:
    broken = random_cross_layer(width=WIDTH, n_layers=2)
    broken.b_enc[3] = torch.nan
    path = publish(tmp_path / "broken", made, broken)
    with pytest.raises(NonFiniteActivation, match="broken, layer0: rows 0"):
        run(made, tmp_path / "t", path, settings=SETTINGS.model_copy(update={"rows": 30, "without_model": True}))
    assert Manifest.read(tmp_path / "t" / "layer1", "tables").as_json()["site"]["name"] == "layer1"
    assert not (tmp_path / "t" / "layer0" / "manifest.json").exists()


def test_what_is_for_one_layer_says_where_to_go(made: Path, tmp_path: Path) -> None:
    advice = r"clt: has 2 layers, which get tables each; use tailrace\.pipeline\.analyze\.many\.run"
    with pytest.raises(ArtifactMismatch, match=advice):
        analyze.run(
            SETTINGS, transcoder=made / "clt", cache=made / "cache", output=tmp_path / "t", compute=Compute(quiet=True)
        )
    assert not (tmp_path / "t").exists()
