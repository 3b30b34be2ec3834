"""``pipeline circuit`` from question to files: what it writes, what it says."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailrace.analysis.circuits.documents import describe_node, read_node
from tailrace.analysis.circuits.nodes import Kind, Node
from tailrace.analysis.circuits.paths import show_value
from tailrace.pipeline.artifacts.transcoders import open_tables, open_transcoders
from tailrace.pipeline.circuit import stage as circuit
from tailrace.pipeline.circuit.cards import read_cards
from tailrace.pipeline.circuit.question import Question, parse_feature, prompt_tokens
from tailrace.pipeline.circuit.traced import traced_layers
from tailrace.pipeline.model.language_model import load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.storage.artifact import Manifest
from tailrace.storage.draft import Draft
from tailrace.storage.errors import ArtifactMismatch
from tailrace.storage.labels import LabelEdit, edit_labels
from tailrace.storage.tables import TablesManifest
from tailrace.training.architectures.manifest import KIND
from tests.support.circuit_places import PROMPT, SMALL, Place, given, run_command
from tests.support.tiny_models import BOS, EOS, save_tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("circuits"))


def test_a_feature_is_explained_in_files_and_in_lines(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    feature = place.active_feature()
    out = tmp_path / "circuit"
    asked = [PROMPT, "--feature", feature, *given(place), "--out", out, "--branches", 12, "--max-features", 40]
    said = run_command(place, capsys, *asked)
    document = json.loads((out / "circuit.json").read_text())
    index = feature.partition(":")[2]
    assert f"feature 2:{index} at 'what' " in said
    printed = re.findall(r"^  ← \S.*$", said, re.MULTILINE)
    [n_more] = re.findall(r"^  and (\d+) weaker paths, and the beginnings of all, in circuit.json$", said, re.MULTILINE)
    assert (len(printed), 0 < int(n_more) < sum(map(len, document["rounds"])) - 8) == (8, True)
    assert all(re.fullmatch(r"  (← (head \d\.\d from|feature \d:\d+ at|token) '\S+' -?\S+ ?)+", one) for one in printed)
    [root] = [one for one in document["features"] if (one["layer"], one["index"]) == (2, int(index))]
    assert 10 in [fires["token"] for fires in root["fires_on"]]
    assert document["root"]["value"] in [pytest.approx(fires["activation"], rel=1e-4) for fires in root["fires_on"]]
    assert document["root"]["incompleteness"] < 1e-5
    assert [token["text"] for token in document["tokens"]][:3] == [BOS, "the", "man"]
    likely = [one["probability"] for one in document["likely"]]
    assert likely == sorted(likely, reverse=True)
    assert f"likely after token 10: '{document['likely'][0]['text']}' {likely[0]:.0%}, " in said
    assert f" ({show_value(document['root']['from_bos'])} from the BOS)" in said
    assert f"{out / 'index.html'} opens in a browser" in said
    assert len(document["rounds"]) == 3
    graph = document["path_graph"]
    for place_of, node in enumerate(graph["nodes"]):
        incoming = [edge["value"] for edge in graph["edges"] if edge["parent"] == place_of]
        if incoming:
            assert sum(incoming) == pytest.approx(node["value"], rel=1e-4, abs=1e-5)
    attribution = document["attribution_graph"]
    assert attribution["incompleteness"] < 1e-5
    assert attribution["nodes"][0] == {**attribution["nodes"][0], **document["root"]["node"]}
    assert Manifest.read(out, "circuit").as_json()["root"]["value"] == document["root"]["value"]


def test_the_cost_is_said_and_what_is_published_is_returned_without_running_the_model_again(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = Question(PROMPT, logit="her")
    inputs = {"transcoders": place.transcoders, "output": tmp_path / "c", "model": str(place.model_path)}
    first = circuit.run(SMALL, asked, **inputs)  # type: ignore[arg-type]
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cost: ")]
    n_tokens, n_active, n_rows = map(int, re.findall(r"(\d+) (?:tokens|active|of them)", said))
    assert (n_tokens, n_rows) == (len(first.document["tokens"]), min(SMALL.max_features, n_active))
    assert re.search(r"about \d+ s by the first, just timed; at least \d.* of memory", said)
    monkeypatch.setattr(circuit, "open_transcoder_model", lambda *_, **__: pytest.fail("the model was opened"))
    assert circuit.run(SMALL, asked, **inputs).document == first.document  # type: ignore[arg-type]
    with pytest.raises(ArtifactMismatch, match="branches: there it is 4, asked for 5"):
        circuit.run(SMALL.model_copy(update={"branches": 5}), asked, **inputs)  # type: ignore[arg-type]


def test_the_viewers_document_names_every_node_once_and_links_only_nodes(place: Place, tmp_path: Path) -> None:
    circuit.run(
        SMALL, Question(PROMPT, logit="her"), transcoders=place.transcoders, output=tmp_path / "c",
        model=str(place.model_path),
    )  # fmt: skip
    viewer = json.loads((tmp_path / "c" / "viewer.json").read_text())
    assert viewer["metadata"]["prompt_tokens"] == [BOS, *PROMPT.split()]
    assert viewer["metadata"]["scan"] == "tiny-model"
    ids = [node["node_id"] for node in viewer["nodes"]]
    assert len(ids) == len(set(ids))
    assert {end for link in viewer["links"] for end in (link["source"], link["target"])} <= set(ids)
    kinds = {node["feature_type"] for node in viewer["nodes"]}
    assert kinds == {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}
    for node in viewer["nodes"]:
        layer, number, token = node["node_id"].split("_")
        assert (layer, int(token)) == (node["layer"], node["ctx_idx"])
        if node["feature_type"] == "cross layer transcoder":
            pair = int(layer) + int(number)
            assert node["feature"] == pair * (pair + 1) // 2 + int(number)
            assert node["activation"] > 0
    first = next(node for node in viewer["nodes"] if node["is_target_logit"])
    assert first["layer"] == "4"  # as the viewers have it: one above the number of layers
    assert sum(node["token_prob"] for node in viewer["nodes"]) <= 1.0 + 1e-6


def test_differences_of_logits_decoder_directions_and_inactive_features_are_explained(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--iterations", 1, "--branches", 3, "--max-features", 10]
    said = run_command(
        place, capsys, PROMPT, "--logit-difference", "her", "him", *given(place), "--out", tmp_path / "d", *few
    )
    assert re.search(r"^'her' − 'him' -?[\d.]+$", said, re.MULTILINE)
    layer, index = parse_feature(place.active_feature())
    for number in range(24):
        if number != index:
            asked = [PROMPT, "--feature", f"{layer}:{number}", *given(place), "--out", tmp_path / f"f{number}", *few]
            said = run_command(place, capsys, *asked)
            if "the feature is not active here, so its pre-activation is explained" in said:
                break
    else:
        pytest.fail("TopK with 4 of 24 leaves features that do not fire")
    said = run_command(
        place, capsys, PROMPT, "--feature", f"{layer}:{index}", "--direction", "decoder", *given(place),
        "--out", tmp_path / "o", *few,
    )  # fmt: skip
    assert re.search(rf"^direction of feature 2:{index} at 'what' -?[\d.e-]+$", said, re.MULTILINE)


def test_a_filter_that_nothing_meets_says_so(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [PROMPT, "--logit", "her", *given(place), "--filter", "token=2", "--filter", "token=3", "--max-features", 0]
    assert "no path: nothing that the filters allow" in run_command(place, capsys, *asked, "--out", tmp_path / "c")
    assert (tmp_path / "c" / "index.html").exists()
    assert not (tmp_path / "c" / "viewer.json").exists()


# ---- prompts


def test_a_prompt_begins_with_one_bos_whatever_the_text_or_the_tokenizer_adds(place: Place) -> None:
    """D-44: the model put a BOS before prompts, the tokenizer did not, and results differed."""
    ids = prompt_tokens(place.model, PROMPT)
    assert ids == prompt_tokens(place.model, f"{BOS} {PROMPT}")
    assert ids.count(place.model.bos_token_id) == 1
    assert ids[0] == place.model.bos_token_id


def test_a_bos_that_is_the_eos_is_put_before_prompts_too(tmp_path: Path) -> None:
    model = load_language_model(ModelSettings(model=str(save_tiny_model(tmp_path / "gpt2", "gpt2"))))
    assert prompt_tokens(model, "the man")[0] == model.bos_token_id
    assert prompt_tokens(model, f"{EOS} the man") == prompt_tokens(model, "the man")


def test_nodes_survive_being_written_down() -> None:
    beside = Node(Kind.ERROR, token=5, of=Node(Kind.FEATURE, 2, 5, 7))
    for node in (beside, Node(Kind.LOGIT_DIFFERENCE, 3, 5, 1, 2), Node(Kind.EMBEDDING, 0, 0)):
        assert read_node(json.loads(json.dumps(describe_node(node)))) == node


# ---- the page


def page_data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def test_the_page_holds_no_markup_of_prompts_and_needs_nothing_else(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = '</script><img src=x onerror="alert(1)"> the man'
    circuit.run(
        SMALL, Question(evil, logit="her"), transcoders=place.transcoders, output=tmp_path / "c",
        model=str(place.model_path),
    )  # fmt: skip
    page = (tmp_path / "c" / "index.html").read_text()
    assert "<img" not in page
    assert page.count("</script>") == 3  # data, tooltip, the page's own
    assert page_data(page)["prompt"] == evil
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", page)
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    data = page_data(page)
    assert [graph["title"] for graph in data["graphs"]] == ["Paths", "Attribution graph"]
    for graph in data["graphs"]:
        assert all(-1 <= edge["strength"] <= 1 for edge in graph["edges"])
        assert len({(node["x"], node["y"]) for node in graph["nodes"]}) == len(graph["nodes"])
        names = [layer["name"] for layer in graph["layers"]]
        assert names[0] == "layer 0"  # what lies beside a token is lower, and in no layer
        assert names[-1] == "output"
    outputs = [node["label"] for node in data["graphs"][1]["nodes"] if node["kind"] == "logit"]
    assert all(re.fullmatch(r"\S+", label) for label in outputs)
    titles = re.findall(r"<(title|h1)>(.*?)</\1>", page)
    assert [text for _, text in titles] == [f"Why &#x27;her&#x27; after &#x27;{html.escape(evil)}&#x27;?"] * 2
    features = [node for graph in data["graphs"] for node in graph["nodes"] if node["kind"] == "feature"]
    assert features
    for node in features:
        layer, _, index = node["card"].partition(":")
        text = data["tokens"][node["token"]]
        assert node["name"] == f"Layer {layer}, feature {index} at '{text}'"
        number, _, fires = node["label"].partition(" ")
        assert number == f"#{index}"
        tokens = fires.split(" · ")  # the three of this prompt on which it fires most
        assert text in tokens or len(tokens) == 3
        assert len(tokens) <= 3
    for path in (path for paths in data["rounds"] for path in paths):
        assert len(path["steps"]) + 1 == len(path["nodes"][0])  # every step, and the root, is a node of the first graph


def write_tables(path: Path, transcoder: Path) -> Path:
    with Draft(path, "tables", {"name": path.name}) as draft:
        features = {
            "feature": pa.array([0, 1], pa.int32()), "frequency": [0.5, 0.001], "n_active": [2000, 4],
            "max": [2.0, None],
            "top_token": ["her", None], "top_token_share": [0.25, None], "promoted_tokens": [["a", "b"], None],
        }  # fmt: skip
        pq.write_table(pa.table(features), path / "features.parquet")
        words = ["the", " man", " was"]
        examples = {
            "feature": pa.array([0, 0], pa.int32()), "kind": ["top", "random"], "rank": pa.array([0, 1], pa.int32()),
            "position": pa.array([6, 6], pa.int32()), "window_start": pa.array([5, 5], pa.int32()),
            "window_tokens": [words, words],
        }  # fmt: skip
        pq.write_table(pa.table(examples), path / "examples.parquet")
        manifest = Manifest.read(transcoder, KIND).as_json()
        made_of = {"inputs": {"transcoder": {"digest": manifest["digest"]}}, "model": manifest["model"]}
        tables = {"features": {"n_rows": manifest["d_sae"]}, "examples": {"n_rows": 2}}
        names = [f"{name}.parquet" for name in tables]
        draft.publish({**made_of, "site": manifest["site"], "tables": tables}, names)
    return path


def write_dashboard(path: Path, tables: Path, **changed: Any) -> Path:
    """Publish what a circuit reads of a dashboard."""
    manifest = TablesManifest.read(tables)
    inputs = {"tables": {"digest": manifest.digest}}
    with Draft(path, "dashboard", {"settings": {}, "inputs": inputs}) as draft:
        site = manifest.site.as_json() | changed
        draft.publish({"inputs": inputs, "model": manifest.model, "site": site, "n_features": 24}, [])
    return path


def test_cards_tell_what_tables_know_of_the_features_shown(place: Place, tmp_path: Path) -> None:
    tables = write_tables(tmp_path / "tables", place.transcoders[2])
    cards = read_cards({2: tables}, [(2, 0), (2, 1), (1, 0)])
    assert cards == {
        (2, 0): {
            "top_token": "her", "is_rare": False,
            "facts": [
                ("fires on", "50.000% of rows"), ("strongest", "2"), ("top token", "'her' in 25% of examples"),
                ("promoted", "'a' 'b'"),
            ],
            "examples": [{"before": "the", "token": " man", "after": " was"}],
        },
        (2, 1): {
            "top_token": None, "is_rare": True, "examples": [],
            "facts": [("fires on", "0.100% of rows, only 4 in all")],
        },
    }  # fmt: skip
    stray = write_tables(tmp_path / "stray", place.publish("stray", 1))
    with pytest.raises(ArtifactMismatch, match="was made from a transcoder that was not given"):
        circuit.run(
            SMALL, Question(PROMPT, logit="her"), transcoders=place.transcoders, output=tmp_path / "c",
            tables=[tables, stray], model=str(place.model_path),
        )  # fmt: skip


def test_labels_are_on_cards_at_nodes_and_in_the_viewers_file(place: Place, tmp_path: Path) -> None:
    tables = write_tables(tmp_path / "tables", place.transcoders[2])
    d_sae = TablesManifest.read(tables).tables["features"].n_rows
    edit_labels(tables, [LabelEdit(feature, "ann", f"label {feature}", "a note") for feature in range(d_sae)])
    card = read_cards({2: tables}, [(2, 0)])[2, 0]
    assert (card["label"], card["facts"][:2]) == ("label 0", [("label", "label 0"), ("note", "a note")])
    result = circuit.run(
        SMALL, Question(PROMPT, logit="her"), transcoders=place.transcoders, output=tmp_path / "c",
        tables=[tables], model=str(place.model_path),
    )  # fmt: skip
    assert Manifest.read(result.path, "circuit").as_json()["inputs"]["labels"].keys() == {"layer2"}
    nodes = json.loads((result.path / "viewer.json").read_text())["nodes"]
    features = [node for node in nodes if node["feature_type"] == "cross layer transcoder"]
    own = [node for node in features if node["layer"] == "2"]
    assert own
    assert [node["clerp"] for node in own] == [f"label {node['node_id'].split('_')[1]}" for node in own]
    assert {node["clerp"] for node in features if node["layer"] != "2"} <= {""}
    assert "label " in (result.path / "index.html").read_text()


def test_of_a_folder_of_tables_those_of_the_transcoders_given_are_taken_by_their_digest(
    place: Place, tmp_path: Path
) -> None:
    folder = tmp_path / "tables"
    misnamed = write_tables(folder / "layer0", place.transcoders[2])
    write_tables(folder / "other", place.publish("other-layer1", 1, {"name": "elsewhere"}))
    traced = traced_layers(open_transcoders(place.transcoders))
    assert open_tables([folder], traced) == {2: misnamed}
    with pytest.raises(ArtifactMismatch) as caught:
        open_tables([folder, misnamed], {0: traced[0], 1: traced[1]})
    assert str(caught.value).splitlines() == [
        f"{folder}: the tables inside were made from a transcoder that was not given; give the tables of "
        "those that were",
        f"{misnamed}: was made from a transcoder that was not given; give the tables of those that were",
    ]
    result = circuit.run(
        SMALL, Question(PROMPT, logit="her"), transcoders=place.transcoders, output=tmp_path / "c",
        tables=[folder], model=str(place.model_path),
    )  # fmt: skip
    assert Manifest.read(result.path, "circuit").as_json()["inputs"]["tables"].keys() == {"layer2"}
    assert "labels" not in Manifest.read(result.path, "circuit").as_json()["inputs"]
    again = write_tables(folder / "again", place.transcoders[2])
    with pytest.raises(ArtifactMismatch, match=f"{misnamed}: {again} is of the same transcoder; give one of them"):
        open_tables([folder], traced)
