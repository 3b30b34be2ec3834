"""The stage and the command ``evaluate`` on a tiny cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tailrace.analysis.evaluate.evaluation import ALL_SITES
from tailrace.pipeline.artifacts.info_stage import summarise
from tailrace.pipeline.cache.recorded_model import open_recorded_model, sample_contexts
from tailrace.pipeline.evaluate import stage as evaluate
from tailrace.pipeline.evaluate.settings import EvaluateSettings
from tailrace.pipeline.query import stage as query
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import verify_artifact
from tailrace.storage.errors import ArtifactMismatch, SettingsError
from tailrace.storage.tables import describe, read_schema, read_table
from tailrace.training.architectures.transcoder import load_transcoder
from tests.support.cache_jobs import CONTEXT_LENGTH, command, model_folder, run_cache
from tests.support.spliced_models import WIDTH, publish_transcoder, random_transcoder

SETTINGS = EvaluateSettings(contexts=3, contexts_per_batch=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of both layers, a transcoder of each, and their evaluation."""
    place = tmp_path_factory.mktemp("stages")
    run_cache(place / "cache", layers="all")
    cache = open_cache(place / "cache")
    for layer in (0, 1):
        publish_transcoder(place / f"t{layer}", cache, f"layer{layer}", random_transcoder(seed=layer))
    run(place, place / "evaluation")
    return place


def run(made: Path, output: Path, settings: EvaluateSettings = SETTINGS, **changes) -> evaluate.EvaluateResult:
    arguments = {
        "transcoders": [made / "t1", made / "t0"],
        "cache": made / "cache",
        "compute": Compute(threads=1, quiet=True),
    }
    return evaluate.run(settings, output=output, **{**arguments, **changes})


def test_a_folder_stands_for_the_transcoders_in_it(made: Path) -> None:
    assert run(made, made / "evaluation", transcoders=[made]).scores.keys() >= {"layer0", "layer1"}


def test_the_numbers_are_those_of_the_model_run_by_hand_on_the_stored_contexts(made: Path) -> None:
    split = open_cache(made / "cache").split("heldout")
    contexts = sample_contexts(split, 3, 0)
    assert len(contexts) == 3
    tokens = torch.from_numpy(split.context_tokens(contexts).astype(np.int64))
    transcoder = load_transcoder(made / "t1")
    is_row = torch.arange(CONTEXT_LENGTH)[None, :, None] > 0
    mean = torch.from_numpy(open_cache(made / "cache").split("train").statistics("layer1", "out").mean).float()
    replacements = {
        "ce_original": lambda inputs, output: output,
        "spliced": lambda inputs, output: torch.where(is_row, transcoder(inputs[0]), output),
        "zero": lambda inputs, output: torch.where(is_row, torch.zeros(WIDTH), output),
        "mean": lambda inputs, output: torch.where(is_row, mean, output),
    }
    score = evaluate.read_result(made / "evaluation").scores["layer1"]
    for name, replacement in replacements.items():
        found = score.ce_original if name == "ce_original" else getattr(score, name).ce
        assert found == pytest.approx(loss_with(replacement, tokens), abs=1e-5), name
    assert score.n_predictions == 3 * (CONTEXT_LENGTH - 1)


def loss_with(replacement, tokens: torch.Tensor) -> float:
    import transformers

    plain = transformers.AutoModelForCausalLM.from_pretrained(model_folder(), attn_implementation="eager").eval()
    plain.transformer.h[1].mlp.register_forward_hook(lambda _, inputs, output: replacement(inputs, output))
    with torch.no_grad():
        return plain(tokens, labels=tokens).loss.item()


def test_every_token_says_what_became_of_it_and_every_column_what_it_means(made: Path) -> None:
    table = read_table(made / "evaluation" / "tokens.parquet")
    scores = evaluate.read_result(made / "evaluation").scores
    assert list(scores) == ["layer0", "layer1", ALL_SITES]
    assert table.num_rows == 3 * 3 * (CONTEXT_LENGTH - 1)
    split = open_cache(made / "cache").split("heldout")
    for row in table.to_pylist():
        tokens = split.context_tokens(np.array([row["context"]]))[0]
        assert (row["token_id"], row["next_token_id"]) == tuple(tokens[row["position"] : row["position"] + 2])
        assert row["replaced"] == (row["position"] > 0)
        assert row["delta"] == row["ce_spliced"] - row["ce_original"]
    for name, score in scores.items():
        own = [row for row in table.to_pylist() if row["sites"] == name]
        assert np.mean([row["delta"] for row in own]) == pytest.approx(score.spliced.ce - score.ce_original)
    columns = describe(read_schema(made / "evaluation" / "tokens.parquet"))
    assert all(column.meaning for column in columns)
    assert {column.name for column in columns if column.unit == "nats"} == {"ce_original", "ce_spliced", "delta", "kl"}


def test_the_artifact_is_sound_and_names_its_inputs_and_no_place(made: Path) -> None:
    assert verify_artifact(made / "evaluation", evaluate.KIND) == []
    text = (made / "evaluation" / "manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest["inputs"]["cache"] == open_cache(made / "cache").reference
    assert set(manifest["inputs"]["transcoders"]) == {"layer0", "layer1"}
    assert [score["name"] for score in manifest["scores"]] == ["layer0", "layer1", ALL_SITES]
    together = evaluate.read_result(made / "evaluation").scores[ALL_SITES]
    assert manifest["scores"][2]["ce_recovered"] == together.ce_recovered
    assert str(made) not in text


def test_an_evaluation_is_asked_in_sql_as_the_view_tokens(made: Path) -> None:
    sql = f"SELECT avg(ce_spliced) AS ce, count(*) AS n FROM tokens WHERE sites = '{ALL_SITES}'"
    [row] = json.loads(query.run(sql, tables=made / "evaluation", format="json"))
    score = evaluate.read_result(made / "evaluation").scores[ALL_SITES]
    assert row == {"ce": pytest.approx(score.spliced.ce, abs=1e-6), "n": score.n_predictions}


def test_info_of_an_evaluation_fits_a_glance(made: Path) -> None:
    shown = summarise(made / "evaluation")
    scores = evaluate.read_result(made / "evaluation").scores
    shares = {
        name: "" if score.ce_recovered is None else f", {score.ce_recovered:.1%} recovered"
        for name, score in scores.items()
    }
    expected = {
        f"with {name}": f"{score.spliced.ce:.4f}{shares[name]}, KL {score.spliced.kl:.4f}"
        for name, score in scores.items()
    }
    assert shown == {
        "kind": "evaluation",
        "model": f"{model_folder().name} (float32)",
        "site layer0": "blocks.0.mlp.hook_in (16) -> blocks.0.mlp.hook_out (16)",
        "site layer1": "blocks.1.mlp.hook_in (16) -> blocks.1.mlp.hook_out (16)",
        "cache id": f"{open_cache(made / 'cache').cache_id}, generation 0",
        "run on": "45 tokens of 3 heldout contexts",
        "cross entropy": f"{scores['layer0'].ce_original:.4f} nats per token",
        **expected,
        "table tokens": "135 rows",
        "everything else": "--json",
    }


def test_the_order_of_transcoders_and_the_place_make_no_difference(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "again", transcoders=[made / "t0", made / "t1"])
    for name in ("manifest.json", "tokens.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (made / "evaluation" / name).read_bytes()


def test_an_evaluation_that_is_there_is_returned_and_another_refused(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "open_recorded_model", lambda *_, **__: pytest.fail("the model is not needed again"))
    assert run(made, made / "evaluation") == evaluate.read_result(made / "evaluation")
    with pytest.raises(ArtifactMismatch, match=r"settings\.contexts: there it is 3, asked for 2"):
        run(made, made / "evaluation", EvaluateSettings(contexts=2, contexts_per_batch=2))


def test_a_cut_short_evaluation_is_run_again_and_ends_with_the_same_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tailrace.pipeline.evaluate.stage.token_rows", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(made, tmp_path / "e")
    run(made, tmp_path / "e")
    assert (tmp_path / "e" / "manifest.json").read_bytes() == (made / "evaluation" / "manifest.json").read_bytes()


def test_positions_that_the_cache_leaves_out_are_not_replaced(tmp_path: Path) -> None:
    run_cache(tmp_path / "cache", exclude="none", first_position=5)
    recorded = open_recorded_model(open_cache(tmp_path / "cache"))
    batch = recorded.batch(recorded.cache.split("heldout"), np.array([1, 0]))
    assert batch.where.tolist() == [[position >= 5 for position in range(CONTEXT_LENGTH)]] * 2
    assert batch.tokens[1].tolist() == recorded.cache.split("heldout").context_tokens(np.array([0]))[0].tolist()


def test_contexts_are_a_uniform_sample_decided_by_the_seed(made: Path) -> None:
    split = open_cache(made / "cache").split("train")
    assert sample_contexts(split, 10**6, 0).tolist() == list(range(split.n_contexts))
    chosen = [sample_contexts(split, 17, seed).tolist() for seed in range(100)]
    assert chosen[0] == sample_contexts(split, 17, 0).tolist()
    assert all(len(set(one)) == 17 and one == sorted(one) for one in chosen)
    counts = np.bincount(np.concatenate(chosen), minlength=split.n_contexts)
    assert abs(counts - 50).max() <= 20  # each of 34 is drawn with p = ½: beyond four deviations of 5


@pytest.mark.parametrize(("head", "hook"), [(0, "blocks.1.attn.hook_q"), (2, "blocks.0.attn.hook_z")])
def test_one_attention_heads_autoencoder_is_evaluated_on_its_slice(tmp_path: Path, head: int, hook: str) -> None:
    run_cache(tmp_path / "cache", layers=None, hooks=[f"head={hook}[{head}]"])
    cache = open_cache(tmp_path / "cache")
    publish_transcoder(tmp_path / "sae", cache, "head", random_transcoder(4, 4))
    result = run(tmp_path, tmp_path / "e", transcoders=[tmp_path / "sae"])
    score = result.scores["head"]
    assert (cache.sites["head"].d_in, score.in_place["head"].n_rows) == (4, 3 * (CONTEXT_LENGTH - 1))
    assert score.ce_original != score.zero.ce != score.spliced.ce
    assert set(score.spliced.pattern_kl) == ({"head"} if hook.endswith("q") else set())


# ---- what is refused


def test_transcoders_of_another_model_or_site_are_all_refused_with_both_values(made: Path, tmp_path: Path) -> None:
    cache = open_cache(made / "cache")
    site = {**json.loads((made / "t0" / "manifest.json").read_text())["site"]}
    other = {**cache.manifest.model, "files_digest": "sha256:0"}
    publish_transcoder(tmp_path / "model", cache, "layer0", random_transcoder(), {"model": other})
    moved = {**site, "hook_in": "blocks.0.hook_resid_mid"}
    publish_transcoder(tmp_path / "hook", cache, "layer0", random_transcoder(), {"site": moved})
    publish_transcoder(tmp_path / "absent", cache, "layer0", random_transcoder(), {"site": {**site, "name": "layer7"}})
    with pytest.raises(ArtifactMismatch) as caught:
        run(made, tmp_path / "e", transcoders=[tmp_path / "model", tmp_path / "hook", tmp_path / "absent", made / "t1"])
    message = str(caught.value)
    assert "asked for 'sha256:0'" in message
    assert "site.hook_in: there it is 'blocks.0.mlp.hook_in', asked for 'blocks.0.hook_resid_mid'" in message
    assert "has no site 'layer7'" in message
    assert not (tmp_path / "e").exists()


def test_two_transcoders_for_one_site_and_none_at_all_are_refused(made: Path, tmp_path: Path) -> None:
    publish_transcoder(tmp_path / "more", open_cache(made / "cache"), "layer0", random_transcoder(seed=9))
    with pytest.raises(SettingsError, match=r"t0 and .*more are both of site layer0; give one of them"):
        run(made, tmp_path / "e", transcoders=[made / "t0", tmp_path / "more", made / "t1"])
    with pytest.raises(SettingsError, match="no transcoder to evaluate"):
        run(made, tmp_path / "e", transcoders=[])


def test_another_language_model_is_refused_and_a_moved_one_found(made: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactMismatch,
        match=r"files_digest \(content of .*\): there it is 'sha256:\w{12}…', asked for 'sha256:\w{12}…'",
    ):
        run(made, tmp_path / "e", model=str(model_folder(seed=5)))
    moved = tmp_path / "renamed"
    moved.symlink_to(model_folder())
    assert run(made, tmp_path / "e", model=str(moved)).scores == evaluate.read_result(made / "evaluation").scores


def test_a_cache_without_heldout_rows_is_refused(made: Path, tmp_path: Path) -> None:
    run_cache(tmp_path / "cache", holdout="0")
    with pytest.raises(ArtifactMismatch, match="has no heldout rows, only train"):
        run(made, tmp_path / "e", cache=tmp_path / "cache")


# ---- the command


def test_the_command_publishes_and_shows_a_line_per_site(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", made / "t0", made / "t1", "--cache", made / "cache", "--out", tmp_path / "e"]
    small = ["--contexts", 3, "--contexts-per-batch", 2, "--threads", 1]
    answer = command(capsys, *arguments, *small)
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    score = evaluate.read_result(tmp_path / "e").scores["layer0"]
    assert (
        lines[0]
        == f"cross entropy of the model itself: {score.ce_original:.4f} nats per token, over 45 tokens of 3 contexts"
    )
    assert lines[1].split() == ["spliced", "zero", "mean", "recovered", "from", "mean", "KL", "FVU", "L0"]
    first = lines[2].split()
    assert first[:3] == ["layer0", f"{score.spliced.ce:.4f}", f"{score.zero.ce:.4f}"]
    assert first[-1] == f"{score.in_place['layer0'].l0:.1f}"
    assert [line.split("  ")[0] for line in lines[2:]] == ["layer0", "layer1", ALL_SITES, f"{tmp_path / 'e'}: written"]
    assert (tmp_path / "e" / "tokens.parquet").read_bytes() == (made / "evaluation" / "tokens.parquet").read_bytes()
    assert command(capsys, "verify", tmp_path / "e").out.endswith("verified\n")
    query = command(capsys, "evaluate", "--cache", made / "cache", "--out", tmp_path / "e")
    assert (query.code, "TRANSCODER" in query.err) == (2, True)
