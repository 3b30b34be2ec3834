"""``pipeline steer``: what can be asked, what is refused before a model is loaded, and what is shown and written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import tailrace
from tailrace.analysis.interventions.generation import FeatureChange, NextTokenChange
from tailrace.pipeline.artifacts.transcoders import TranscoderLayer
from tailrace.pipeline.model.language_model import load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.steer import stage
from tailrace.pipeline.steer.changes import CircuitNodes, FeatureFacts, SteeredRun, asked_runs, random_runs
from tailrace.pipeline.steer.page import page
from tailrace.pipeline.steer.settings import SteerSettings
from tailrace.pipeline.steer.stage import SteeredText, SteerResult
from tailrace.pipeline.steer.text import json_of, show
from tailrace.storage.errors import ArtifactMismatch, SettingsError, TextError
from tests.support.cache_jobs import command, model_folder
from tests.support.cross_layer_transcoders import publish_cross_layer, random_cross_layer
from tests.support.quick import quick
from tests.support.spliced_models import WIDTH, mlp_site, publish_transcoder_of, random_transcoder

D_SAE = 24
LAYERS: dict[str, TranscoderLayer] = {
    f"layer{layer}": TranscoderLayer(
        Path(f"layer{layer}"), mlp_site(layer), None, SimpleNamespace(d_sae=D_SAE, digest=f"of {layer}")  # type: ignore[arg-type]
    )
    for layer in range(3)
}  # fmt: skip
CIRCUIT = CircuitNodes(
    Path("circuit"),
    "the prompt",
    {"mlp1tc[7]@2": (1, 7, 2), "mlp0tc[3]@4": (0, 3, 4), "mlp0tc[3]@1": (0, 3, 1), "mlp2tc[9]@4": (2, 9, 4)},
    3,
    {name: layer.digest for name, layer in LAYERS.items()},
)


def runs(*feature: str, nodes: tuple[str, ...] = (), own: bool = True) -> list[tuple[str, list[Any]]]:
    settings = SteerSettings(feature=feature, nodes=nodes)
    asked = asked_runs(settings, LAYERS, CIRCUIT if nodes else None, of_its_prompt=own)

    def shown(one: FeatureChange) -> tuple[Any, ...]:
        at = () if one.position is None else (one.position,)
        return (one.site.name, *one.features, one.kind, one.value, *at)

    return [(one.label, [shown(change) for change in one.changes]) for one in asked]


def test_what_is_typed_is_what_is_changed() -> None:
    assert runs("1:7=+30") == [("1:7=+30", [("layer1", 7, "add", 30.0)])]
    assert runs("layer2:4=-1e1", "2:5=off") == [
        ("layer2:4=-1e1, 2:5=off", [("layer2", 4, "add", -10.0), ("layer2", 5, "off", 0.0)])
    ]
    assert runs("0:1,3-4=clamp:2") == [("0:1,3-4=clamp:2", [("layer0", one, "clamp", 2.0) for one in (1, 3, 4)])]


def test_several_values_are_several_runs_and_one_value_is_for_all() -> None:
    assert runs("1:7=+10,scale:2", "0:1=off") == [
        ("1:7=+10, 0:1=off", [("layer1", 7, "add", 10.0), ("layer0", 1, "off", 0.0)]),
        ("1:7=scale:2, 0:1=off", [("layer1", 7, "scale", 2.0), ("layer0", 1, "off", 0.0)]),
    ]


def test_nodes_of_a_circuit_are_changed_at_their_tokens_in_its_own_prompt_only() -> None:
    two = [("layer1", 7, "off", 0.0, 2), ("layer0", 3, "off", 0.0, 4)]
    assert runs(nodes=("2=off",)) == [("2 nodes=off", two)]
    assert runs(nodes=("mlp1tc[7]@2, mlp2tc[9]@4=+5",)) == [
        ("mlp1tc[7]@2, mlp2tc[9]@4=+5", [("layer1", 7, "add", 5.0, 2), ("layer2", 9, "add", 5.0, 4)])
    ]
    everywhere = [("layer1", 7, "off", 0.0), ("layer0", 3, "off", 0.0)]  # at two tokens, and changed once
    assert runs(nodes=("3=off",), own=False) == [("3 nodes=off", everywhere)]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"feature": ["1:7"]}, "'1:7' does not say what to do with a feature"),
        ({"feature": ["1:7=30", "1:8=clamp:x"]}, r"'30' is no change; write \+30 or -30.*'x' is no finite number"),
        ({"feature": ["1:7=+inf"]}, "no finite number"),
        ({"feature": ["1:7=+nan"]}, "no finite number"),
        ({"feature": ["1:7=+1,+2", "1:8=+1,+2,+3"]}, "features have 2 and 3 values"),
        ({"feature": ["1:7=+1"], "count": "("}, "is no regular expression"),
        ({"feature": ["1:7=+1"], "temperature": -1}, "temperature"),
    ],
)
def test_settings_that_say_nothing_clear_are_refused(given: dict[str, Any], wanted: str) -> None:
    with pytest.raises(SettingsError, match=wanted):
        SteerSettings.read(given)


def test_features_and_nodes_that_are_not_there_are_refused_together() -> None:
    settings = SteerSettings(feature=("1:99=+3", "5:1=+3", "7=off"), nodes=("4=off", "mlp9tc[1]@1=off"))
    with pytest.raises(SettingsError) as raised:
        asked_runs(settings, LAYERS, CIRCUIT, of_its_prompt=True)
    said = str(raised.value)
    assert "'99' is beyond the last feature, 23" in said
    assert "'5:1' is of no layer here" in said
    assert "'7' is of no layer here" in said
    assert "--nodes 4: the attribution graph of circuit has 3 features" in said
    assert "--nodes mlp9tc[1]@1: is no feature of circuit; it has mlp1tc[7]@2" in said


def test_what_goes_with_a_circuit_is_asked_for() -> None:
    for settings, circuit, wanted in [
        (SteerSettings(), None, "nothing is to be changed"),
        (SteerSettings(nodes=("2=off",)), None, "are of a circuit; give it by --from-circuit"),
        (SteerSettings(feature=("1:7=+1",)), CIRCUIT, "say which of its nodes"),
    ]:
        with pytest.raises(SettingsError, match=wanted):
            asked_runs(settings, LAYERS, circuit, of_its_prompt=True)
    other = replace(CIRCUIT, digests={"layer1": "of another"})
    with pytest.raises(ArtifactMismatch, match="traced through other transcoders of layer1"):
        asked_runs(SteerSettings(nodes=("2=off",)), LAYERS, other, of_its_prompt=True)


def facts(d_sae: int = 400) -> dict[str, FeatureFacts]:
    rng = np.random.default_rng(0)
    n_active = np.round(np.exp(np.linspace(0, 10, d_sae))).astype(np.int64)
    n_active[::7] = 0
    return {f"layer{layer}": FeatureFacts(n_active, rng.uniform(0.5, 2, d_sae)) for layer in range(2)}


def test_random_features_are_as_often_active_and_write_as_much() -> None:
    known = facts()
    changes = [FeatureChange(mlp_site(0), (300,), "add", 30.0), FeatureChange(mlp_site(0), (303,), "clamp", 4.0, 2)]
    changes += [FeatureChange(mlp_site(1), (200,), "scale", 2.0)]
    run = SteeredRun("asked", tuple(changes))
    drawn = list(random_runs(run, known, 20, seed=0))
    for one in drawn:
        for asked, other in zip(changes, one.changes, strict=True):
            own, norms = known[asked.site.name].n_active, known[asked.site.name].norms
            (index,), (found,) = asked.features, other.features
            assert (other.site, other.kind, other.position) == (asked.site, asked.kind, asked.position)
            assert own[found] > 0
            assert abs(np.log(own[found] / own[index])) < 1.5  # the 80 nearest of 343 that live, on 10 e-folds
            expected = asked.value if asked.kind == "scale" else asked.value * norms[index] / norms[found]
            assert other.value == pytest.approx(expected)
        first, second, _ = one.changes
        assert len({*first.features, *second.features, 300, 303}) == 4
    for place in range(3):
        assert len({one.changes[place].features for one in drawn}) == 20
    assert drawn == list(random_runs(run, known, 20, seed=0)) != list(random_runs(run, known, 20, seed=1))
    stronger = SteeredRun("more", tuple(replace(change, value=2 * change.value) for change in changes))
    for one, twice in zip(drawn, random_runs(stronger, known, 20, seed=0), strict=True):
        assert [change.features for change in one.changes] == [change.features for change in twice.changes]


def test_more_random_features_than_live_are_refused() -> None:
    run = SteeredRun("asked", (FeatureChange(mlp_site(0), (5,), "add", 1.0),))
    with pytest.raises(SettingsError, match="--random 400: site layer0 has 341 other living features"):
        list(random_runs(run, facts(), 400, seed=0))


def made_up() -> SteerResult:
    def text(prompt: int, run: int, draw: int | None, words: str, kl: float = 0.0, n_changed: int = 0) -> SteeredText:
        tokens = tuple(re.findall(r"\s*\S+", words))
        ids = tuple(sum(map(ord, token)) for token in tokens)
        effect = NextTokenChange(kl, n_changed, 4) if run else None
        return SteeredText(prompt, run, draw, None if run == 0 else f"{run}/{draw}", tokens, ids, effect)

    texts = [
        text(0, 0, None, " of the people"),
        text(0, 1, None, " of the <war>", 2.0, 3),
        text(0, 1, 0, " of the men", 0.4, 1),
        text(0, 1, 1, " of the people", 0.0, 0),
        text(1, 0, None, " war and peace"),
        text(1, 1, None, " war and war", 1.0, 1),
        text(1, 1, 0, " war and peace", 0.4, 1),
        text(1, 1, 1, " law", 0.8, 2),
    ]
    return SteerResult(
        ("<i>one</i>", "two"), ("model", "3:5=+30"), tuple(texts), {"layer3:5": {"top_token": " war"}}, "war"
    )


def test_numbers_are_means_over_next_tokens_and_counts_over_texts() -> None:
    result = made_up()
    asked = result.summary(1)
    assert (asked.kl, asked.changed_share, asked.n_matches, asked.n_texts) == (3 / 8, 4 / 8, 2, 2)
    assert [one.kl for one in result.draws(1)] == [pytest.approx(0.1), pytest.approx(0.1)]
    assert [one.n_matches for one in result.draws(1)] == [1, 0]
    assert result.summary(0).n_matches == 1
    shown = show(result, 100)
    assert re.search(r"3:5=\+30 +0\.375 +50% +2 of 2 \(34%–100%\)", shown)
    assert re.search(r"  random +0\.1 \(0\.1–0\.1\) +25% \(25%–25%\) +1 of 4 \(5%–70%\)", shown)
    assert re.search(r"^of the people {20,}of the <war>$", show(result, 100), re.MULTILINE)  # side by side
    assert re.search(r"^3:5=\+30 +of the <war>$", show(result, 50), re.MULTILINE)  # below each other
    told = json_of(result)
    assert told["runs"][1]["random"][0]["kl"] == pytest.approx(0.1)
    assert len(told["texts"]) == 8


def test_the_page_shows_where_a_text_leaves_the_models_own_and_what_is_counted() -> None:
    shown = page(made_up())
    assert '<span class="same"> of the</span> &lt;<mark>war</mark>&gt;' in shown
    assert "&lt;i&gt;one&lt;/i&gt;" in shown
    assert "<i>one" not in shown
    assert re.findall(r'<span class="(\w+)" style="left:([\d.]+)%">', shown) == [
        ("random", "26.67"), ("random", "26.67"), ("own", "100.00")
    ]  # fmt: skip
    assert re.findall(r"https?://", shown) == []


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Transcoders of the tiny model: of its layer 1, and a cross-layer one."""
    folder = tmp_path_factory.mktemp("steer")
    loaded = load_language_model(ModelSettings(model=str(model_folder())))
    model = loaded.identity()
    publish_transcoder_of(folder / "one", model, mlp_site(1), random_transcoder(seed=1))
    module = random_cross_layer(width=WIDTH, n_layers=loaded.n_layers)
    sites = [mlp_site(layer) for layer in range(loaded.n_layers)]
    publish_cross_layer(folder / "across", module, sites, model=model)
    return folder


def words() -> list[str]:
    known = json.loads((model_folder() / "tokenizer.json").read_text())["model"]["vocab"]
    return sorted(known, key=lambda word: known[word])[2:40]


@pytest.mark.parametrize("form", quick(["one", "across"], "across"))
def test_a_file_of_prompts_gives_every_text_in_parquet(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    prompts = [" ".join(words()[i : i + 3 + i]) for i in range(3)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
    asked = ["--transcoders", given / form, "--model", model_folder(), "--feature", "1:4=+0,+60", "--tokens", 5]
    tables = []
    for name in ("txt", "jsonl"):
        out = tmp_path / f"{name}.parquet"
        answer = command(
            capsys, "steer", "--file", tmp_path / f"prompts.{name}", *asked, "--out", out, "--prompts-per-batch", 2,
            "--temperature", 1, "--seed", 3, "--json",
        )  # fmt: skip
        assert answer.code == 0, answer.err
        tables.append(pq.read_table(out))
    assert tables[0] == tables[1]  # the same seed, the same texts
    rows = tables[0].to_pylist()
    assert [row["prompt_text"] for row in rows] == [one for one in prompts for _ in range(3)]
    assert [row["run"] for row in rows] == ["model", "1:4=+0", "1:4=+60"] * 3
    for plain, nothing, more in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert (nothing["text"], nothing["kl"], nothing["changed_share"]) == (plain["text"], 0.0, 0.0)
        assert more["kl"] > 0
    assert [row["text"] for row in rows[2::3]] != [row["text"] for row in rows[::3]]
    assert len(json.loads(answer.out)["texts"]) == 9


def test_python_gives_what_the_command_prints(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, out = " ".join(words()[:4]), tmp_path / "page.html"
    common: dict[str, Any] = {"transcoders": given / "one", "model": model_folder(), "tokens": 4, "threads": 1}
    result = tailrace.steer(prompt, **common, feature="4=clamp:9", out=out)
    answer = command(
        capsys, "steer", prompt, "--transcoders", given / "one", "--model", model_folder(), "--tokens", 4, "--feature",
        "4=clamp:9", "--threads", 1,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    for run in (0, 1):
        assert result.of(0, run).text.split()[-1] in answer.out
    assert "4=clamp:9" in out.read_text()
    assert len(result.of(0, 0).tokens) <= 4


def test_what_is_known_to_be_wrong_is_refused_before_the_model_is_loaded(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "open_transcoder_model", lambda *_, **__: pytest.fail("the model was opened"))
    refused: list[tuple[dict[str, Any], str]] = [
        ({"feature": "4"}, "does not say what to do with a feature"),
        ({"feature": "2:4=+1"}, "'2:4' is of no layer here"),
        ({"feature": "4=+1", "random": 3}, "there are none of layer1; give them by tables"),
        ({"feature": "4=+1", "out": tmp_path / "x.pdf"}, "the name decides the kind of file"),
        ({"feature": "4=+1", "strength": 3}, "strength: is no setting"),
    ]
    for keywords, wanted in refused:
        with pytest.raises(SettingsError, match=wanted):
            tailrace.steer("a", transcoders=given / "one", **keywords)
    with pytest.raises(TextError, match="no prompt"):
        tailrace.steer(transcoders=given / "one", feature="4=+1")
    with pytest.raises(TextError, match="prompts 2: are empty"):
        tailrace.steer(["a", ""], transcoders=given / "one", feature="4=+1")


def test_prompts_beyond_the_models_context_are_named(given: Path) -> None:
    prompts = [" ".join(words()[:4]), " ".join(words() * 40)]
    with pytest.raises(SettingsError, match=r"prompt 2: has \d+ tokens with the BOS, and tokens=40 are to come"):
        tailrace.steer(prompts, transcoders=given / "one", model=model_folder(), feature="4=+1")
