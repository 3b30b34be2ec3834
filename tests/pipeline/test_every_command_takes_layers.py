"""Every command that takes a transcoder takes a cross-layer one, and a folder of a transcoder a layer.

The folder has the layers of a cross-layer transcoder whose features write to their own layer only, so that numbers
about features have to agree wherever transcoders are looked at one by one.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tailrace
from tailrace.analysis.evaluate.evaluation import ALL_SITES
from tailrace.analysis.splice.replacement import run_replaced
from tailrace.pipeline.evaluate import pareto
from tailrace.pipeline.evaluate import stage as evaluate
from tailrace.pipeline.evaluate.settings import EvaluateSettings
from tailrace.pipeline.score import stage as score
from tailrace.pipeline.score.text import as_json
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.task import stage as task
from tailrace.pipeline.task.settings import TaskSettings
from tailrace.pipeline.task.tables import FEATURES, TRANSCODER
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import Manifest
from tailrace.storage.cache_format import Site
from tailrace.storage.draft import Draft
from tailrace.storage.tables import read_table
from tailrace.training.architectures.manifest import FORMAT_VERSION, KIND, WEIGHTS
from tailrace.training.architectures.transcoder import save_weights
from tailrace.training.cross_layer.layers import split_layers
from tailrace.training.cross_layer.stack import CrossLayerTranscoder
from tests.support.cache_jobs import Answer, command, model_folder, run_cache
from tests.support.cross_layer_transcoders import D_SAE, publish_cross_layer, random_cross_layer
from tests.support.quick import quick
from tests.support.spliced_models import WIDTH

NAMES = ("layer0", "layer1")
N_LAYERS = len(NAMES)
FORMS = ("one", "folder", "cross-layer")
"""What is given: a transcoder of one layer, a folder with one for each, a cross-layer transcoder."""


def words() -> list[str]:
    known = json.loads((model_folder() / "tokenizer.json").read_text())["model"]["vocab"]
    return sorted(known, key=lambda word: known[word])[2:40]


def own_layer_only() -> CrossLayerTranscoder:
    """Return a cross-layer transcoder of which no feature writes to a later layer."""
    module = random_cross_layer(width=WIDTH, n_layers=N_LAYERS, seed=4)
    module.decoder(0)[:, WIDTH:] = 0
    return module


def publish_one(path: Path, site: Site, weights: dict[str, torch.Tensor], model: dict[str, Any]) -> Path:
    """Publish a layer of a stack as a transcoder of one layer."""
    from tailrace.training.architectures import JumpReLU

    module = JumpReLU().build(WIDTH, WIDTH, D_SAE)
    module.load_state_dict({name: value for name, value in weights.items() if not name.startswith("later_")})
    with Draft(path, KIND, {"site": site.name}) as draft:
        save_weights(path / WEIGHTS, module)
        draft.publish(
            {
                "format": FORMAT_VERSION,
                "inputs": {},
                "model": model,
                "site": asdict(site),
                "d_sae": D_SAE,
                "architecture": JumpReLU().model_dump(mode="json"),
                "metrics": {"steps": 1, "rows": 1},
            },
            [WEIGHTS],
        )
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a tiny model, the three forms of transcoders, and tables of each."""
    place = tmp_path_factory.mktemp("layers")
    run_cache(place / "cache", layers="all")
    cache = open_cache(place / "cache")
    sites, model = [cache.sites[name] for name in NAMES], cache.manifest.model
    module = own_layer_only()
    publish_cross_layer(place / "cross-layer", module, sites, model=model)
    publish_cross_layer(place / "writes-on", random_cross_layer(width=WIDTH, n_layers=N_LAYERS), sites, model=model)
    for site, layer in zip(sites, split_layers(module, sites), strict=True):
        publish_one(place / "folder" / site.name, site, layer.state_dict(), model)
    publish_one(place / "one", sites[0], split_layers(module, sites)[0].state_dict(), model)
    tailrace.analyze(place / "one", cache=place / "cache", out=place / "tables" / "one", split="train")
    for form in ("folder", "cross-layer"):
        tailrace.analyze([place / form], cache=place / "cache", out=place / "tables" / form, split="train")
    lines = [
        {"prompt": " ".join(words()[i : i + 4]), "correct": [words()[9]], "incorrect": [words()[i]]} for i in range(4)
    ]
    (place / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def ran(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Answer:
    answer = command(capsys, *arguments)
    assert answer.code == 0, answer.err
    return answer


@pytest.mark.parametrize("form", quick(FORMS, "cross-layer"))
def test_commands_about_transcoders(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    given, text, model = made / form, " ".join(words()[:6]), ("--model", model_folder())
    quick: tuple[Any, ...] = ("--threads", 1)
    assert "feature" in ran(capsys, "score", text, "--transcoders", given, *model, *quick).out
    effects = ("--out", tmp_path / "effects.parquet")
    ran(capsys, "promotes", words()[9], words()[10], "--transcoders", given, *effects, *model, *quick)
    asked = read_table(tmp_path / "effects.parquet")
    assert len(asked) == 2 * D_SAE * (1 + (form != "one"))
    ran(capsys, "task", made / "prompts.jsonl", "--transcoders", given, "--out", tmp_path / "task", "--kept", 2, *model)
    ran(capsys, "evaluate", given, "--cache", made / "cache", "--out", tmp_path / "evaluation", *quick)
    analysed = ("--cache", made / "cache", "--split", "train", "--rows", 40, *quick)
    later = made / "folder" if form == "one" else given
    ran(capsys, "analyze", given, "--out", tmp_path / "tables", "--downstream", later, *analysed)
    one = read_table(tmp_path / "tables" / ("" if form == "one" else "layer0") / "connections.parquet")
    assert {row["site"] for row in one.to_pylist() if row["kind"] == "feature"} == {"layer1"}
    missing = ("--missing-layers", "opaque")
    ran(
        capsys, "circuit", text, "--logit", words()[9], "--transcoders", given, "--out", tmp_path / "circuit",
        "--tables", made / "tables" / form, *missing, *model, *quick,
    )  # fmt: skip
    of_layer = "3" if form == "one" else "1:3"
    steering = ("--transcoders", given, "--tables", made / "tables" / form, "--tokens", 2, *model, *quick)
    steered = ran(capsys, "steer", text, "--feature", f"{of_layer}=+9", "--random", 2, *steering).out
    assert re.search(r"random: median of 2 draws", steered)
    ran(capsys, "steer", "--from-circuit", tmp_path / "circuit", "--nodes", "1=off", *steering)
    if form != "folder":
        assert "layer" in ran(capsys, "info", given).out
        assert len(tailrace.load_transcoder(given).encode(torch.zeros(1, WIDTH * (1 + (form != "one"))))[0]) > 0
    assert tailrace.open_model(given, model=model_folder()).n_layers == N_LAYERS
    loaded = tailrace.load_transcoders(given)
    assert [site.name for site in loaded] == list(NAMES[: 1 + (form != "one")])


@pytest.mark.parametrize("form", FORMS)
def test_commands_about_tables(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    tables, several = made / "tables" / form, form != "one"
    feature = "layer1:3" if several else "3"
    ran(capsys, "dashboard", tables, "--out", tmp_path / "dashboard", "--feature", feature)
    data = tmp_path / "dashboard" / "data" / ("layer1" if several else "")
    assert (data / "features-000000.js").exists()
    if several:
        assert not (data.parent / "layer0").exists()
        ran(capsys, "dashboard", tables, "--out", tmp_path / "all")
        assert sorted(one.name for one in (tmp_path / "all" / "data").iterdir()) == [*NAMES, "sites.js"]
    answer = json.loads(
        ran(capsys, "query", "--saved", "densest", "--set", "n=3", "--format", "json", "--tables", tables).out
    )
    assert [row.get("folder") for row in answer] == (
        [name for name in NAMES for _ in range(3)] if several else [None] * 3
    )
    other = made / "tables" / ("one" if form == "cross-layer" else "cross-layer")
    ran(
        capsys, "blind", "draw", "--tables", tables, "--tables", other, "--n", 3, "--min-active", 1,
        "--out", tmp_path / "blind",
    )  # fmt: skip
    ran(capsys, "blind", "study", "begin", tmp_path / "study", "--tables", tables, "--feature", feature)
    began = json.loads((tmp_path / "study" / "ledger.jsonl").read_text().splitlines()[0])
    assert began["subject"]["site"] == ("layer1" if several else "layer0")
    assert began["subject"]["feature"] == 3
    ran(capsys, "blind", "study", "begin", tmp_path / "random", "--tables", tables)


# ---- numbers


def scored(path: Path, **given: Any) -> score.Scores:
    texts = [" ".join(words()[:8]), " ".join(words()[5:20])]
    return score.run(texts, transcoder=path, model=str(model_folder()), compute=Compute(threads=1), **given)


def test_scores_of_a_cross_layer_transcoder_are_those_of_its_layers(made: Path) -> None:
    for given in ({"top": 4}, {"features": [(0, 3), (1, 3), (0, 1)]}, {"features": [(1, 2)], "raw": True}):
        across, folder = (as_json(scored(made / form, **given)) for form in ("cross-layer", "folder"))
        assert {**across, "transcoder": ""} == {**folder, "transcoder": ""}
    assert across["site"] == "layer0 to layer1"
    assert [one["site"] for one in across["features"]] == ["layer1"]
    whole, alone = scored(made / "cross-layer", features=[(0, 3)]), scored(made / "one", features=[3])
    np.testing.assert_array_equal(whole.texts[0].values, alone.texts[0].values)
    top = scored(made / "folder", top=5)
    largest = [float(np.nanmax(np.concatenate([text.values[:, column] for text in top.texts]))) for column in range(5)]
    assert largest == sorted(largest, reverse=True)
    assert {top.place(feature)[0] for feature in top.features} == set(NAMES)


def test_tables_of_a_folder_tell_what_is_known_of_each_layers_features(made: Path) -> None:
    about = scored(made / "cross-layer", features=[(0, 3), (1, 3)], tables=[made / "tables" / "cross-layer"]).about
    for layer, name in enumerate(NAMES):
        row = read_table(made / "tables" / "cross-layer" / name / "features.parquet").to_pylist()[3]
        assert about[layer * D_SAE + 3]["max"] == row["max"]


def done(made: Path, path: Path, output: Path) -> task.TaskResult:
    settings = TaskSettings(kept=(0, 3, 2 * D_SAE), leave_out=2)
    given: dict[str, Any] = {"model": str(model_folder()), "compute": Compute(threads=1, quiet=True)}
    return task.run(settings, prompts=made / "prompts.jsonl", transcoders=[path], output=output, **given)


def test_a_task_of_one_layer_of_either_kind_has_the_same_numbers(made: Path, tmp_path: Path) -> None:
    cache = open_cache(made / "cache")
    module = random_cross_layer(width=WIDTH, n_layers=1, seed=6)
    sites, model = [cache.sites["layer1"]], cache.manifest.model
    publish_cross_layer(tmp_path / "stack", module, sites, model=model)
    publish_one(tmp_path / "one", sites[0], split_layers(module, sites)[0].state_dict(), model)
    stack, one = (done(made, tmp_path / name, tmp_path / f"{name}-task") for name in ("stack", "one"))
    assert stack.curves == one.curves
    assert stack.ranking == one.ranking


def test_a_task_keeps_and_ranks_features_of_all_layers_together(made: Path, tmp_path: Path) -> None:
    found = done(made, made / "writes-on", tmp_path / "task")
    features = [one for one in found.ranking if one.kind == FEATURES]
    assert [one.rank for one in features] == list(range(2 * D_SAE))
    assert {(one.site, one.index) for one in features} == {(name, f) for name in NAMES for f in range(D_SAE)}
    variances = [one.variance for one in features]
    assert variances == sorted(variances, reverse=True)
    curves = {(one.kind, one.n_kept): one.scores for one in found.curves if one.site == "layer0 to layer1"}
    assert curves[FEATURES, 2 * D_SAE] == pytest.approx(curves[TRANSCODER, None], abs=1e-6)
    assert curves[FEATURES, 0] != pytest.approx(curves[TRANSCODER, None], abs=1e-4)
    layer0 = done(made, made / "folder" / "layer0", tmp_path / "alone")
    own = {one.index: one.variance for one in layer0.ranking if one.kind == FEATURES}
    across = done(made, made / "cross-layer", tmp_path / "across")
    for one in across.ranking:
        if one.kind == FEATURES and one.site == "layer0" and one.index in own:
            assert one.variance == own[one.index]


def test_an_evaluation_of_a_cross_layer_transcoder_is_that_of_its_layers_together(made: Path, tmp_path: Path) -> None:
    settings = EvaluateSettings(contexts=3)
    found = {
        form: evaluate.run(
            settings,
            transcoders=[made / form],
            cache=made / "cache",
            output=tmp_path / form,
            compute=Compute(threads=1, quiet=True),
        ).scores
        for form in ("cross-layer", "folder")
    }
    assert list(found["cross-layer"]) == [ALL_SITES]
    assert list(found["folder"]) == [*NAMES, ALL_SITES]
    across, folder = (found[form][ALL_SITES] for form in ("cross-layer", "folder"))
    assert across.spliced.ce == pytest.approx(folder.spliced.ce, rel=1e-6)
    assert across.in_place["layer1"].fvu == pytest.approx(folder.in_place["layer1"].fvu, rel=1e-5)
    assert across.zero == folder.zero


def test_one_beside_a_transcoder_of_another_layer_is_evaluated_alone_and_with_it(tmp_path: Path) -> None:
    run_cache(tmp_path / "cache", model=str(model_folder(n_layers=3)), layers="all")
    cache = open_cache(tmp_path / "cache")
    sites, model = list(cache.sites.values()), cache.manifest.model
    publish_cross_layer(tmp_path / "across", random_cross_layer(width=WIDTH, n_layers=2), sites[:2], model=model)
    third = random_cross_layer(width=WIDTH, n_layers=1, seed=9)
    publish_one(tmp_path / "third", sites[2], split_layers(third, sites[2:])[0].state_dict(), model)
    result = evaluate.run(
        EvaluateSettings(contexts=3), transcoders=[tmp_path / "third", tmp_path / "across"],
        cache=tmp_path / "cache", output=tmp_path / "evaluation", compute=Compute(threads=1, quiet=True), )  # fmt: skip
    assert list(result.scores) == ["layer0 to layer1", "layer2", ALL_SITES]
    assert result.scores["layer0 to layer1"].sites == ("layer0", "layer1")
    assert result.scores[ALL_SITES].sites == ("layer0", "layer1", "layer2")
    bridge = tailrace.open_model(tmp_path / "across", model=model_folder(n_layers=3)).bridge
    rows = read_table(tmp_path / "evaluation" / "tokens.parquet").to_pylist()
    first = rows[0]["context"]
    tokens = torch.from_numpy(cache.split("heldout").context_tokens(np.array([first])).astype(np.int64))
    loaded = tailrace.load_transcoders([tmp_path / "across", tmp_path / "third"])
    with torch.inference_mode():
        logits = run_replaced(bridge, tokens, {site: tailrace.Transcoded(layer) for site, layer in loaded.items()})
    own = [row["ce_spliced"] for row in rows if row["sites"] == ALL_SITES and row["context"] == first]
    losses = torch.nn.functional.cross_entropy(logits[0, :-1].double(), tokens[0, 1:], reduction="none")
    assert own == pytest.approx(losses.tolist(), rel=1e-5)


def test_dictionaries_of_all_layers_are_drawn_from_as_one(made: Path, tmp_path: Path) -> None:
    from tailrace.pipeline.blind import draw
    from tailrace.pipeline.blind.sealed import unseal
    from tailrace.pipeline.blind.settings import DrawSettings

    tables = [made / "tables" / "cross-layer", made / "tables" / "one"]
    result = draw.run(DrawSettings(n=8, min_active=1), tables=tables, output=tmp_path / "draw")
    key = unseal(tmp_path / "draw" / draw.KEY, result.commitment)
    drawn = {index: [one["feature"] for one in key["items"] if one["dictionary"] == index] for index in (0, 1)}
    assert {one.partition(":")[0] for one in drawn[0]} == set(NAMES)
    assert all(isinstance(one, int) for one in drawn[1])
    assert len(set(drawn[0])) == len(set(drawn[1])) == 8
    digests = [Manifest.read(tables[0] / name, "tables").digest for name in NAMES]
    assert key["tables"][0] == {"name": "cross-layer", "digests": digests}
    for item in key["items"]:
        page = (tmp_path / "draw" / draw.item_page(item["item"])).read_text()
        folder, _, feature = str(item["feature"]).rpartition(":")
        path = tables[item["dictionary"]] / folder
        examples = [row for row in read_table(path / "examples.parquet").to_pylist() if row["feature"] == int(feature)]
        assert page.count('<li class="example">') == len(examples)


def test_a_trained_one_is_compared_by_its_evaluation(made: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"cross_layer": True, "k": 4, "d_sae": D_SAE, "steps": 5, "batch_rows": 32}
    trained = tailrace.train(made / "cache", out=tmp_path / "set" / "trained", threads=1, **given)
    evaluation = tailrace.evaluate(tmp_path / "set", cache=made / "cache", out=tmp_path / "e", contexts=3)
    (point,) = pareto.collect([tmp_path / "set", tmp_path / "e"])
    assert (point.site, point.group) == ("layer0 to layer1", "batch_topk")
    assert point.fvu == trained.metrics["heldout"]["fvu"]
    assert point.ce_recovered == evaluation.scores[ALL_SITES].ce_recovered
    with pytest.raises(tailrace.ArtifactError, match="trained without held-out rows"):
        pareto.collect([made / "cross-layer", made / "folder"])
