"""``pipeline analyze`` with the model's weights: its columns and connections against transformers' own matrices."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tailrace.analysis.dashboards.values import visible_token
from tailrace.analysis.weights.stream import write_point
from tailrace.analysis.weights.unembedding import token_effects
from tailrace.pipeline.analyze import stage as analyze
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.analyze.weight_tables import SharedWeights, write_weight_tables
from tailrace.pipeline.artifacts.transcoders import layers_of, open_transcoders
from tailrace.pipeline.cache.recorded_model import open_recorded_model
from tailrace.pipeline.model.language_model import load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.model.weights import read_weights
from tailrace.pipeline.query import promotes
from tailrace.pipeline.query import stage as query
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import verify_artifact
from tailrace.storage.errors import ArtifactMismatch, ModelError, SettingsError
from tailrace.storage.labels import LabelEdit, edit_labels
from tailrace.storage.tables import read_table
from tailrace.training.architectures.manifest import TranscoderManifest
from tailrace.training.architectures.transcoder import load_transcoder
from tests.support.cache_jobs import model_folder, run_cache
from tests.support.spliced_models import D_HEAD, WIDTH, publish_transcoder, random_transcoder, tiny_model

N_HEADS = 4
HOOKS = ("blocks.0.attn.hook_z[2]", "blocks.0.attn.hook_q")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache, transcoders of both layers and two autoencoders, and tables of layer 0's transcoder."""
    place = tmp_path_factory.mktemp("weights")
    run_cache(place / "cache", layers="all", hooks=HOOKS)
    cache = open_cache(place / "cache")
    for name, site, width in (
        ("t0", "layer0", WIDTH),
        ("t1", "layer1", WIDTH),
        ("head", "blocks.0.attn.hook_z.head2", D_HEAD),
        ("queries", "blocks.0.attn.hook_q", WIDTH),
    ):
        publish_transcoder(place / name, cache, site, random_transcoder(width, width, seed=len(name)))
    run(place, "t0", place / "tables", downstream=[place / "t1"])
    return place


def run(made: Path, transcoder: str, output: Path, settings: AnalyzeSettings | None = None, **arguments: Any) -> Path:
    settings = settings or AnalyzeSettings(examples=2, rows=50)
    given = {"cache": made / "cache", "transcoder": made / transcoder, "compute": Compute(threads=1, quiet=True)}
    return analyze.run(settings, output=output, **{**given, **arguments}).path


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_folder())
    return {name: value.detach().double() for name, value in model.state_dict().items()}


def gained(plain: dict[str, torch.Tensor], norm: str, vectors: torch.Tensor) -> torch.Tensor:
    """What a layer norm that divides by one makes of vectors added before it."""
    return (vectors - vectors.mean(-1, keepdim=True)) * plain[f"transformer.{norm}.weight"]


def reads(plain: dict[str, torch.Tensor], norm: str, directions: torch.Tensor) -> torch.Tensor:
    weighed = directions * plain[f"transformer.{norm}.weight"]
    return weighed - weighed.mean(-1, keepdim=True)


def weights_of(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    coder = load_transcoder(path)
    return coder.W_enc.double(), coder.W_dec.double()


def test_promoted_tokens_are_those_of_the_decoder_through_norm_and_unembedding(made: Path, plain) -> None:
    _, decoder = weights_of(made / "t0")
    logits = (gained(plain, "ln_f", decoder) @ plain["lm_head.weight"].T).numpy()
    vocabulary = open_cache(made / "cache").vocabulary()
    for row, own in zip(read_table(made / "tables" / "features.parquet").to_pylist(), logits, strict=True):
        for name, order in (("promoted", np.argsort(-own)), ("suppressed", np.argsort(own))):
            assert row[f"{name}_token_ids"] == order[:10].tolist()
            assert row[f"{name}_tokens"] == [vocabulary[token] for token in order[:10]]
            np.testing.assert_allclose(row[f"{name}_logits"], own[order[:10]], rtol=1e-4, atol=1e-5)
        assert sum(row["logit_histogram"]) == len(vocabulary)
        assert row["logit_histogram_edges"][0] == pytest.approx(own.min(), rel=1e-4)
        assert row["logit_histogram_edges"][-1] == pytest.approx(own.max(), rel=1e-4)


def test_any_token_can_be_asked_of_the_weights(made: Path, plain) -> None:
    _, decoder = weights_of(made / "t0")
    logits = (gained(plain, "ln_f", decoder) @ plain["lm_head.weight"].T).numpy()
    vocabulary = open_cache(made / "cache").vocabulary()
    top = read_table(made / "tables" / "features.parquet")["promoted_token_ids"].to_pylist()
    kept = {token for tokens in top for token in tokens}
    words = [next(token for token in range(5, len(vocabulary)) if token not in kept), top[3][0]]
    texts = [vocabulary[token] for token in words]
    compute = Compute(threads=1, quiet=True)
    asked = promotes.run(texts, transcoders=[made / "t0"], model=str(model_folder()), compute=compute)
    for token, text in zip(words, texts, strict=True):
        rows = [row for row in asked.to_pylist() if row["token"] == text]
        assert [row["feature"] for row in rows] == np.argsort(-logits[:, token], kind="stable").tolist()
        for row in rows:
            own = logits[row["feature"]]
            assert row["logit"] == pytest.approx(own[token], rel=1e-4, abs=1e-5)
            assert row["token_rank"] == 1 + (own > own[token]).sum()
    assert [len(promotes.strongest(asked, 3)), len(asked)] == [6, 2 * len(logits)]
    assert "about" not in asked.column_names
    edit_labels(made / "tables", [LabelEdit(3, "ann", "votes")])
    told = promotes.run(
        texts, transcoders=[made / "t0"], tables=[made / "tables"], model=str(model_folder()), compute=compute
    )
    assert told.drop_columns("about") == asked
    tops = read_table(made / "tables" / "features.parquet")["top_token"].to_pylist()
    about = {row["feature"]: row["about"] for row in told.to_pylist()}
    assert about == {n: None if top is None else visible_token(top) for n, top in enumerate(tops)} | {3: "votes"}
    with pytest.raises(SettingsError, match=r"^token .* is 2 tokens to this model"):
        promotes.run([" ".join(texts)], transcoders=[made / "t0"], model=str(model_folder()), compute=compute)


def test_nearest_features_are_those_of_largest_decoder_cosine(made: Path) -> None:
    _, decoder = weights_of(made / "t0")
    unit = decoder / decoder.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).fill_diagonal_(-2).numpy()
    for row, own in zip(read_table(made / "tables" / "features.parquet").to_pylist(), cosines, strict=True):
        assert row["nearest_features"] == np.argsort(-own)[:10].tolist()
        np.testing.assert_allclose(row["nearest_cosines"], np.sort(own)[::-1][:10], rtol=1e-4, atol=1e-6)


def test_connections_equal_the_models_own_matrices(made: Path, plain) -> None:
    rows = read_table(made / "tables" / "connections.parquet").to_pylist()
    encoder, decoder = weights_of(made / "t0")
    later, _ = weights_of(made / "t1")
    directions = reads(plain, "h.0.ln_2", encoder)
    tokens = directions @ plain["transformer.wte.weight"].T
    later_products = decoder @ reads(plain, "h.1.ln_2", later).T
    values = plain["transformer.h.0.attn.c_attn.weight"][:, 2 * WIDTH :]
    outputs = plain["transformer.h.0.attn.c_proj.weight"]
    for feature in range(len(encoder)):
        sources = [
            reads(plain, "h.0.ln_1", values[:, own] @ (outputs[own] @ directions[feature]))
            for own in (slice(head * D_HEAD, (head + 1) * D_HEAD) for head in range(N_HEADS))
        ]
        norms = torch.stack(sources).norm(dim=1)
        mine = [row for row in rows if row["feature"] == feature]
        by_kind = {
            kind: [row for row in mine if row["kind"] == kind] for kind in ("token", "head", "head_token", "feature")
        }
        assert [row["head"] for row in by_kind["head"]] == norms.argsort(descending=True).tolist()
        assert [row["weight"] for row in by_kind["head"]] == pytest.approx(
            norms.sort(descending=True).values.tolist(), rel=1e-4
        )
        for kind, name, expected in (
            ("token", "token_id", tokens[feature]),
            ("feature", "other", later_products[feature]),
        ):
            order = expected.argsort(descending=True).tolist()
            assert [row[name] for row in by_kind[kind]] == [order[row["rank"]] for row in by_kind[kind]]
            assert {row["rank"] for row in by_kind[kind]} == set(range(-10, 10))
        strongest = by_kind["head"][0]["head"]
        through = plain["transformer.wte.weight"] @ sources[strongest]
        told = [row["token_id"] for row in by_kind["head_token"] if row["head"] == strongest]
        assert told == through.argsort(descending=True)[:10].tolist()


def test_the_tables_are_sound_and_say_what_they_were_made_from(made: Path) -> None:
    assert verify_artifact(made / "tables", "tables") == []
    manifest = json.loads((made / "tables" / "manifest.json").read_text())
    assert manifest["inputs"]["downstream"] == {"layer1": {"digest": TranscoderManifest.read(made / "t1").digest}}
    n_rows = query.select("SELECT count(*) AS n FROM connections", made / "tables")["n"].to_pylist()[0]
    assert manifest["tables"]["connections"]["n_rows"] == n_rows == 24 * (20 + N_HEADS + 20 + 20)


def test_without_the_model_the_columns_are_null_and_there_are_no_connections(made: Path, tmp_path: Path) -> None:
    plain_tables = run(made, "t0", tmp_path / "t", AnalyzeSettings(examples=2, rows=50, without_model=True))
    assert not (plain_tables / "connections.parquet").exists()
    features = read_table(plain_tables / "features.parquet")
    for name in ("promoted_tokens", "suppressed_logits", "logit_histogram", "logit_histogram_edges"):
        assert features[name].null_count == 24
    with_model = read_table(made / "tables" / "features.parquet")
    for name in ("nearest_features", "frequency", "max", "top_token"):
        assert features[name].equals(with_model[name])


def test_an_autoencoder_of_a_head_writes_through_its_output_matrix_and_reads_no_stream(
    made: Path, tmp_path: Path, plain
) -> None:
    tables = run(made, "head", tmp_path / "t", downstream=[made / "t1"])
    own = slice(2 * D_HEAD, 3 * D_HEAD)
    written = weights_of(made / "head")[1] @ plain["transformer.h.0.attn.c_proj.weight"][own]
    logits = gained(plain, "ln_f", written) @ plain["lm_head.weight"].T
    promoted = read_table(tables / "features.parquet")["promoted_token_ids"].to_pylist()
    assert promoted == logits.argsort(dim=1, descending=True)[:, :10].tolist()
    assert set(read_table(tables / "connections.parquet")["kind"].to_pylist()) == {"feature"}


def test_what_is_beside_the_stream_has_neither_tokens_nor_connections(made: Path, tmp_path: Path) -> None:
    tables = run(made, "queries", tmp_path / "t")
    assert read_table(tables / "features.parquet")["promoted_tokens"].null_count == 24
    assert read_table(tables / "connections.parquet").num_rows == 0
    with pytest.raises(SettingsError, match=r"hook_q is not added to the residual stream.*leave out --downstream"):
        run(made, "queries", tmp_path / "u", downstream=[made / "t1"])


def test_a_model_that_moved_is_asked_for_and_found_again(made: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder(), tmp_path / "model")
    run_cache(tmp_path / "cache", model=str(tmp_path / "model"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").rename(tmp_path / "elsewhere" / "renamed")
    publish_transcoder(tmp_path / "t0", open_cache(tmp_path / "cache"), "layer0", random_transcoder())
    with pytest.raises(ModelError, match=r"read from a folder, .*, which is gone, nor [\s\S]*--without-model"):
        run(tmp_path, "t0", tmp_path / "tables")
    run(tmp_path, "t0", tmp_path / "tables", model=str(tmp_path / "elsewhere" / "renamed"))
    assert read_table(tmp_path / "tables" / "features.parquet")["promoted_tokens"].null_count == 0


def test_another_model_than_the_caches_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactMismatch, match=r"is not the model that .*cache was made with[\s\S]*files_digest"):
        run(made, "t0", tmp_path / "t", model=str(model_folder(seed=1)))


def test_downstream_transcoders_must_read_later_and_be_of_the_same_model(made: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        run(made, "t0", tmp_path / "t", downstream=[made / "t0", made / "queries"])
    assert "t0: blocks.0.mlp.hook_in reads before blocks.0.mlp.hook_out is written" in str(caught.value)
    assert "queries: its input, blocks.0.attn.hook_q, is not read off the residual stream" in str(caught.value)
    with pytest.raises(SettingsError, match="several transcoders of site layer1"):
        run(made, "t0", tmp_path / "u", downstream=[made / "t1", made / "t1" / ".." / "t1"])
    other = {"model": {**open_cache(made / "cache").manifest.model, "files_digest": "sha256:0"}}
    publish_transcoder(tmp_path / "other", open_cache(made / "cache"), "layer1", random_transcoder(), other)
    with pytest.raises(ArtifactMismatch, match=r"another model[\s\S]*other: files_digest"):
        run(made, "t0", tmp_path / "v", downstream=[tmp_path / "other"])
    without = AnalyzeSettings(without_model=True)
    with pytest.raises(SettingsError, match="leaves nothing for --model and --downstream to do"):
        run(made, "t0", tmp_path / "w", without, model="x", downstream=[made / "t1"])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_with_its_norms_folded_in_promotes_the_same_tokens_as_the_raw_one(family: str) -> None:
    raw = tiny_model(family)
    settings = ModelSettings(model=raw.bridge.cfg.model_name, processing="compatibility")
    decoder = random_transcoder(seed=5).W_dec
    found = []
    for weights in (read_weights(raw), read_weights(load_language_model(settings))):
        writes = write_point("blocks.1.mlp.hook_out", weights)
        assert writes is not None
        found.append(token_effects(decoder, writes, weights))
    assert found[0].promoted.indices.tolist() == found[1].promoted.indices.tolist()
    assert found[0].suppressed.indices.tolist() == found[1].suppressed.indices.tolist()
    # the folded unembedding has its mean over tokens taken off, which moves all of a feature's effects alike
    shift = found[0].promoted.values - found[1].promoted.values
    np.testing.assert_allclose(shift - shift[:, :1], 0, atol=1e-4)


def test_the_model_is_gone_when_its_weights_are_read_and_they_after_their_last_use(made: Path, tmp_path: Path) -> None:
    cache = open_cache(made / "cache")
    seen: list[weakref.ref[Any]] = []

    def open_model() -> Any:
        model = open_recorded_model(cache).model
        seen.extend(weakref.ref(part) for part in (model, model.bridge, model.bridge.original_model))
        return model

    (layer,) = layers_of(open_transcoders(made / "t0"))
    shared = SharedWeights(open_model, n_uses=2)
    given: dict[str, Any] = {"downstream": {}, "vocabulary": cache.vocabulary(), "output": tmp_path, "quiet": True}
    with shared.used() as weights:
        assert len(seen) == 3
        assert [ref() for ref in seen] == [None, None, None]
        write_weight_tables(layer.load(), layer, weights=weights, **given)
    unembedding = weakref.ref(weights.W_U)
    with shared.used() as again:
        assert again is weights
    assert len(seen) == 3, "opened once"
    del weights, again
    assert unembedding() is None, "after the last use weights are gone too"
