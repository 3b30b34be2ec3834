"""What is recorded of a cache, a model and a transcoder, and numbers at the ends of their ranges."""

from __future__ import annotations

import functools
import json
import math
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tailrace.analysis.evaluate.recovered import recorded_share
from tailrace.analysis.evaluate.splice_scores import Outcome, SpliceScore
from tailrace.pipeline.cache import stage, verify
from tailrace.pipeline.cache.learnt_rows import LearntTokens
from tailrace.pipeline.cache.recorded_model import open_recorded_model
from tailrace.pipeline.circuit import question
from tailrace.pipeline.circuit import stage as circuit
from tailrace.pipeline.circuit.settings import CircuitSettings
from tailrace.pipeline.evaluate import stage as evaluate
from tailrace.pipeline.evaluate.command import show_scores
from tailrace.pipeline.evaluate.settings import EvaluateSettings
from tailrace.pipeline.live.batches import LiveBatches, Opening
from tailrace.pipeline.model.language_model import LanguageModel, PairingCheck, load_language_model
from tailrace.pipeline.model.loading import choose_dtype
from tailrace.pipeline.model.locations import loaded_files
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.score import stage as score
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.task import prompts
from tailrace.pipeline.task import stage as task
from tailrace.pipeline.task.settings import TaskSettings
from tailrace.pipeline.train.runs_table import FINISHED, RunOutcome
from tailrace.pipeline.train.sources import CacheSource
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import checksum_file, digest
from tailrace.storage.errors import ModelError, SettingsError, TextError
from tailrace.storage.layout import FLOAT16_NORMAL, RELATIVE_ERROR, relative_error
from tailrace.storage.tables import read_table
from tests.support.cache_jobs import (
    HERE,
    Job,
    Kill,
    command,
    differing,
    model_folder,
    run_cache,
    run_job,
    scaled_model,
    tree,
)
from tests.support.live_runs import BATCH_ROWS, live_settings
from tests.support.spliced_models import publish_transcoder, random_transcoder


@pytest.fixture(scope="module")
def layer_transcoder(tmp_path_factory):
    """A transcoder of random weights of the second layer."""
    place = tmp_path_factory.mktemp("transcoder")
    cache = run_cache(place / "cache", layers="1", tokens=100).cache
    return publish_transcoder(place / "transcoder", cache, "layer1", random_transcoder(seed=3))


# Relative errors of zero (case 26)


@pytest.mark.parametrize(
    ("difference", "size", "share"),
    [(0.0, 0.0, 0.0), (1e-300, 0.0, math.inf), (0.0, 2.0, 0.0), (1.0, 2.0, 0.5), (math.inf, 2.0, math.inf)],
)
def test_difference_of_zero_is_no_relative_error(difference: float, size: float, share: float) -> None:
    assert relative_error(difference, size) == share
    assert math.isnan(relative_error(math.nan, size))


@pytest.mark.parametrize("storage_dtype", ["auto", pytest.param("int8", marks=pytest.mark.slow)])
def test_cache_of_a_layer_that_writes_zeros_is_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], storage_dtype: str
) -> None:
    model = scaled_model(tmp_path / "model", 0.0)
    made = run_cache(tmp_path / "cache", model=str(model), layers="all", storage_dtype=storage_dtype)
    assert made.warnings == ()
    answer = command(capsys, "verify", made.path, "--threads", 1)
    assert answer.code == 0, answer
    assert "layer0/out" in answer.out
    zeros = [
        one
        for one in verify.check_pairs(made.path, compute=Compute(threads=1))
        if (one.site, one.side) == ("layer0", "out")
    ]
    assert [(one.relative_error, one.mlp_relative_error) for one in zeros] == [(0.0, 0.0)] * 2


def test_pairing_that_gives_nan_is_refused_while_caching(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(LanguageModel, "compare_pair", lambda *_: PairingCheck(applicable=True))
    with pytest.raises(ModelError, match=r"is not the MLP of blocks\.0\.mlp\.hook_in"):
        run_cache(tmp_path / "cache")


# The lower end of float16 (case 27)


def largest_error(cache: Path) -> float:
    return max(report.relative_error for report in verify.check_pairs(cache, compute=Compute(threads=1)))


@pytest.mark.parametrize("scale", [1e-6, pytest.param(1e-12, marks=pytest.mark.slow)])
def test_auto_does_not_store_small_activations_in_float16(tmp_path: Path, scale: float) -> None:
    model = scaled_model(tmp_path / "model", scale)
    made = run_cache(tmp_path / "cache", model=str(model), layers="all", storage_dtype="auto")
    assert {name: site.dtype for name, site in made.cache.sites.items()} == {"layer0": "bfloat16", "layer1": "float16"}
    assert largest_error(made.path) <= RELATIVE_ERROR["bfloat16"]


@given(
    rows=st.lists(st.lists(st.floats(-4, 4, width=32), min_size=8, max_size=8), min_size=1, max_size=8),
    exponent=st.integers(-30, 12),
)
def test_rows_that_are_not_small_keep_what_float16_promises(rows: list[list[float]], exponent: int) -> None:
    values = np.array(rows, np.float64) * 2.0**exponent
    for row in values:
        if np.sqrt((row**2).mean()) >= FLOAT16_NORMAL:
            error = np.linalg.norm(row.astype(np.float16).astype(np.float64) - row)
            assert relative_error(float(error), float(np.linalg.norm(row))) <= RELATIVE_ERROR["float16"]


@pytest.mark.parametrize("scale", [1e-6, pytest.param(1e-12, marks=pytest.mark.slow)])
def test_float16_asked_for_where_it_rounds_to_few_digits_is_warned_of(tmp_path: Path, scale: float) -> None:
    model = scaled_model(tmp_path / "model", scale)
    made = run_cache(tmp_path / "cache", model=str(model), layers="all", storage_dtype="float16")
    assert len(made.warnings) == 1
    assert "layer0/out: half of the rows have a root mean square below 6.1e-05" in made.warnings[0]
    assert "--storage-dtype bfloat16 or float32" in made.warnings[0]


# A share of a gap of the wrong sign (case 40)


def outcome(ce):
    return Outcome(ce, 0.1, {})


def test_ablation_that_costs_nothing_leaves_nothing_to_recover():
    # the report's second model: the splice is worse than both, and the share was 321 %
    score = SpliceScore(("mlp",), 4, 60, 7.008, outcome(7.193), outcome(6.924), outcome(7.109), 0.1, {})
    assert score.ce_recovered is None
    assert score.ce_recovered_from_mean == pytest.approx((7.109 - 7.193) / (7.109 - 7.008))
    record = json.loads(json.dumps(score.record()))
    assert record["ce_recovered"] is None
    assert show_scores({"mlp": score})[2].split()[:6] == ["mlp", "7.1930", "6.9240", "7.1090", "–", "-83.2%"]
    older = {**record, "ce_recovered": 3.21}
    assert SpliceScore.from_record(older) == score
    assert recorded_share(older) is None
    trained = {"ce_original": 7.008, "ce_spliced": 7.193, "ce_zero": 6.924, "ce_recovered": 3.21, "kl": 0.1}
    assert recorded_share(trained) is None
    assert recorded_share({**trained, "ce_zero": 8.0}) == pytest.approx((8.0 - 7.193) / (8.0 - 7.008))
    outcomes = {"train": {}, "steps": 1, "rows": 1, "model": trained}
    assert RunOutcome("k=2", FINISHED, "runs/k=2", {}, outcomes).row()["ce_recovered"] is None


# A recorded dtype is asked for, whatever ``auto`` is on this device (case 41)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Return a context in which ``auto`` is the dtype that a GPU would take."""

    @contextmanager
    def on_a_gpu():
        with monkeypatch.context() as patch:
            chosen = functools.partial(choose_dtype, device=torch.device("cuda"))
            patch.setattr(
                "tailrace.pipeline.model.language_model.choose_dtype",
                lambda checkpoint, wanted, _: chosen(checkpoint, wanted),
            )
            yield

    return on_a_gpu


@pytest.mark.slow
def test_float16_cache_of_a_gpu_is_used_and_grown_on_a_cpu(tmp_path, as_on_a_gpu):
    model = {"model": str(model_folder(dtype=torch.float16)), "storage_dtype": "auto", "tokens": 100}
    with as_on_a_gpu():
        expected = run_cache(tmp_path / "expected", **model)
        path = run_cache(tmp_path / "cache", **model).path
        stage.extend(expected.path, 150, **HERE)
        stage.widen(expected.path, "1", (), **HERE)
    assert open_cache(path).manifest.model["dtype"] == "float16"
    assert open_recorded_model(open_cache(path)).model.dtype == torch.float16
    stage.extend(path, 150, **HERE)
    stage.widen(path, "1", (), **HERE)
    assert differing(tree(path), tree(expected.path)) == []


@pytest.mark.slow
def test_float32_cache_of_a_cpu_is_used_on_a_gpu_and_an_interrupted_one_goes_on(tmp_path, as_on_a_gpu):
    model = {"model": str(model_folder(dtype=torch.float16)), "storage_dtype": "auto", "tokens": 100}
    expected = run_cache(tmp_path / "expected", **model).path
    assert run_job(Job.cache(tmp_path / "cache", **model), Kill(3, "commits")) != 0
    with as_on_a_gpu():
        assert open_recorded_model(open_cache(expected)).model.dtype == torch.float32
        path = run_cache(tmp_path / "cache", **model).path
    assert open_cache(path).manifest.model["dtype"] == "float32"
    assert differing(tree(path), tree(expected)) == []


def test_live_rows_go_on_in_the_dtype_they_began_in(as_on_a_gpu):
    live = {"model": str(model_folder(dtype=torch.float16)), "storage_dtype": "auto"}
    with LiveBatches(live_settings(**live), batch_rows=BATCH_ROWS) as began:
        opening = Opening.from_json(json.loads(json.dumps(began.opening.as_json())))
        expected = began.next_batch()["layer0"].inputs.clone()
    with as_on_a_gpu(), LiveBatches(live_settings(**live), batch_rows=BATCH_ROWS, opening=opening) as resumed:
        assert torch.equal(resumed.next_batch()["layer0"].inputs, expected)


# The files that are loaded are the model (case 45)


def files_digest(folder, recorded=None):
    settings = ModelSettings(model=str(folder))
    return load_language_model(settings).identity({"files_digest": recorded})["files_digest"]


def test_what_lies_beside_the_weights_is_no_part_of_the_model(tmp_path):
    folder = shutil.copytree(model_folder(), tmp_path / "model")
    own = files_digest(folder)
    older = digest({path.name: checksum_file(folder / path.name) for path in loaded_files(folder)})
    assert own == older  # of a folder with nothing beside, as it always was
    for name in ("training_args.bin", "optimizer.bin", "consolidated.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(name.encode())
    assert files_digest(folder) == own
    with_all = digest(
        {path.name: checksum_file(path) for path in folder.iterdir() if path.suffix in (".bin", ".safetensors")}
        | {"config.json": checksum_file(folder / "config.json")}
    )
    assert files_digest(folder, with_all) == with_all  # recorded by the older rule
    assert files_digest(folder, "sha256:another") == own
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert files_digest(folder, with_all) not in (own, with_all)


def test_shards_count_where_their_index_names_them(tmp_path):
    names = {name: shard for shard, name in enumerate(load_file(model_folder() / "model.safetensors"))}
    folder = tmp_path / "model"
    shutil.copytree(model_folder(), folder, ignore=shutil.ignore_patterns("model.safetensors"))
    index = {"weight_map": {name: f"part-{shard % 2}.safetensors" for name, shard in names.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard in range(3):
        (folder / f"part-{shard}.safetensors").touch()
    (folder / "pytorch_model.bin").touch()
    assert [path.name for path in loaded_files(folder)] == ["config.json", "part-0.safetensors", "part-1.safetensors"]


@pytest.mark.slow
def test_cache_of_a_folder_with_training_arguments_is_verified_without_them(tmp_path):
    folder = shutil.copytree(model_folder(), tmp_path / "model")
    (folder / "training_args.bin").write_text("x")
    path = run_cache(tmp_path / "cache", model=str(folder), tokens=100).path
    (folder / "training_args.bin").unlink()
    assert all(report.passed for report in verify.check_pairs(path, compute=Compute(threads=1)))


# A prompt that begins with the BOS (case 39)


def test_typed_bos_is_not_doubled_by_any_command(tmp_path, layer_transcoder):
    model = load_language_model(ModelSettings(model=str(model_folder())))
    bos = "<eos>"
    on_model: dict[str, Any] = {"model": str(model_folder()), "compute": Compute(threads=1)}
    expected = [model.bos_token_id, *model.tokenize(["the people of"])[0]]
    for prompt in ("the people of", f"{bos} the people of"):
        assert model.prompt_tokens([prompt]) == [expected]
        assert question.prompt_tokens(model, prompt) == expected
        file = tmp_path / "task.jsonl"
        file.write_text(json.dumps({"prompt": prompt, "correct": ["the"], "incorrect": ["of"]}))
        assert prompts.tokenized(file, prompts.read_lines(file), model).tokens == [expected]
        scores = score.run([prompt], transcoder=layer_transcoder, features=[0], **on_model)
        assert scores.texts[0].token_ids == expected
    for nothing in ("", bos):
        with pytest.raises(TextError, match="has no token"):
            score.run([nothing], transcoder=layer_transcoder, features=[0], **on_model)


# Tokens that a transcoder has not learnt from (case 43)

PROMPT = "the people of the government have the power"


@pytest.fixture(scope="module")
def late(tmp_path_factory):
    """A folder with transcoders of both layers that were trained without the first four positions, and two caches."""
    folder = tmp_path_factory.mktemp("late")
    cache = run_cache(folder / "cache", layers="all", tokens=100, first_position=4).cache
    run_cache(folder / "everywhere", layers="all", tokens=100)
    packing = CacheSource(cache, batch_rows=8, order_seed=0, device=torch.device("cpu")).description()["packing"]
    for layer in range(2):
        coder = random_transcoder(seed=layer)
        publish_transcoder(folder / f"t/{layer}", cache, f"layer{layer}", coder, {"packing": packing})
    return folder


def learnt(tokens, *, packing=None, live=None, special=()):
    inputs = SimpleNamespace(live=None if live is None else {"packing": live})
    layer: Any = SimpleNamespace(path="transcoder", manifest=SimpleNamespace(inputs=inputs, packing=packing or {}))
    model: Any = SimpleNamespace(special_token_ids=special)
    return LearntTokens([layer], model)(torch.tensor([tokens]))[0].tolist()


@pytest.mark.parametrize(
    ("exclude", "first", "expected"),
    [
        ("bos", 0, [0, 1, 1, 1, 1]),
        ("none", 0, [1, 1, 1, 1, 1]),
        ("special", 0, [0, 1, 0, 1, 1]),
        ("bos", 3, [0, 0, 0, 1, 1]),
    ],
)
def test_every_filter_of_rows_is_read_from_a_manifest(exclude, first, expected):
    rows = {"exclude": exclude, "first_position": first}
    of_cache = {"packing": {"context_length": 16, "row_filter": rows}}
    of_live = {"live": {"context_length": 16, **rows}}
    for recorded in (of_cache, of_live):
        assert learnt([9, 5, 9, 6, 7], special=(9,), **recorded) == [bool(one) for one in expected]


def test_manifest_without_the_record_is_taken_for_all_but_the_bos_and_said_so(caplog):
    assert learnt([9, 5, 6]) == [False, True, True]
    assert "transcoder: which tokens it learnt from is not recorded" in caplog.text
    caplog.clear()
    packing = {"context_length": 2, "row_filter": {"exclude": "bos", "first_position": 0}}
    assert learnt([9, 5, 6], packing=packing) == [False, True, True]
    assert "learnt from contexts of 2, so positions from 2 on are new" in caplog.text


def test_roles_are_left_out_of_account_in_a_prompt_and_that_is_said_once(caplog):
    rows = {"exclude": "bos", "first_position": 2, "roles": "assistant"}
    for recorded in ({"packing": {"context_length": 16, "row_filter": rows}}, {"live": {"context_length": 16, **rows}}):
        caplog.clear()
        assert learnt([9, 5, 6, 7], **recorded) == [False, False, True, True]
        (said,) = caplog.messages
        assert said.startswith("transcoder learnt from messages of some roles only, and tokens do not say")


def test_score_leaves_out_what_was_not_learnt(late):
    scores = score.run([PROMPT], transcoder=late / "t", model=str(model_folder()), compute=Compute(threads=1))
    assert scores.texts[0].is_scored.tolist() == [position >= 4 for position in range(9)]
    with pytest.raises(TextError, match="no token of the texts is of a kind that"):
        score.run(["the people"], transcoder=late / "t", model=str(model_folder()), compute=Compute(threads=1))


def test_circuit_has_the_models_own_mlp_where_nothing_was_learnt(tmp_path, late):
    def ask(token):
        asked = question.Question(PROMPT, token, feature=(1, 3))
        transcoders, output, model = [late / "t"], tmp_path / str(token), str(model_folder())
        settings = CircuitSettings(node_threshold=1.0, edge_threshold=1.0)
        return circuit.run(settings, asked, transcoders=transcoders, output=output, model=model).document

    with pytest.raises(SettingsError, match=r"token 1: transcoders do not stand in .* one of 4, 5, 6, 7, …"):
        ask(1)
    tokens: dict[str, set[int]] = {}
    for node in ask(5)["attribution_graph"]["nodes"]:
        tokens.setdefault(node["kind"], set()).add(node["token"])
    assert tokens["feature"] <= {4, 5}
    assert tokens["mlp"] <= {0, 1, 2, 3}


def test_task_replaces_only_where_a_transcoder_has_learnt(tmp_path, late, caplog):
    texts = ["the people of", "of the people", PROMPT]
    lines = [{"prompt": text, "correct": ["the"], "incorrect": ["of"]} for text in texts]
    file = tmp_path / "task.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = task.run(
        TaskSettings(kept=(0,), leave_out=0),
        prompts=file,
        transcoders=[late / "t/0"],
        model=str(model_folder()),
        output=tmp_path / "task",
        compute=Compute(threads=1, quiet=True),
    )
    plain, *replaced = (curve.scores for curve in made.curves)
    assert len(replaced) == 3
    for scores in replaced:
        assert scores[:2] == pytest.approx(plain[:2], abs=1e-5)
        assert scores[2] != pytest.approx(plain[2], abs=1e-3)
    assert "2 of 3 prompts end at a token that it has not learnt from" in caplog.text


def test_evaluation_replaces_only_where_the_transcoders_have_learnt(tmp_path, late):
    for name in ("cache", "everywhere"):
        settings = EvaluateSettings(contexts=4, split="train")
        compute = Compute(threads=1, quiet=True)
        made = evaluate.run(
            settings, transcoders=[late / "t"], cache=late / name, output=tmp_path / name, compute=compute
        )
        rows = read_table(made.path / "tokens.parquet", ["position", "replaced"]).to_pylist()
        assert {row["position"] for row in rows if row["replaced"]} == set(range(4, 15))
