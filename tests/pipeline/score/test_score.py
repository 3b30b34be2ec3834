"""``pipeline score``: features on text, against a tiny model run by hand through transformers alone."""

from __future__ import annotations

import html
import io
import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import torch

from tailrace.analysis import text_scores
from tailrace.pipeline import cli
from tailrace.pipeline.artifacts.manifests import DashboardManifest
from tailrace.pipeline.dashboard.answers import Answers, TriedTexts
from tailrace.pipeline.model import of_transcoders
from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.score import pictures as score_pictures
from tailrace.pipeline.score import stage as score
from tailrace.pipeline.score.pictures import feature_links
from tailrace.pipeline.score.stage import ScoredText, Scores
from tailrace.pipeline.score.text import as_json, show
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.cache_format import Site
from tailrace.storage.draft import Draft
from tailrace.storage.errors import ArtifactMismatch, ModelError, SettingsError, TextError
from tailrace.storage.tables import write_table
from tailrace.training.architectures import ReLU
from tailrace.training.architectures.manifest import TranscoderManifest
from tailrace.training.architectures.transcoder import load_transcoder
from tests.support.cache_jobs import model_folder, run_cache
from tests.support.spliced_models import publish_transcoder, random_transcoder

LAYER = 1


def words(n: int) -> list[str]:
    """The first words that the tiny model knows."""
    known = json.loads((model_folder() / "tokenizer.json").read_text())["model"]["vocab"]
    return sorted(known, key=lambda word: known[word])[2 : 2 + n]


def text() -> str:
    return " ".join(words(15))


@pytest.fixture(scope="module")
def transcoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("scored")
    run_cache(place / "cache", layers="all")
    return publish_transcoder(place / "t", open_cache(place / "cache"), f"layer{LAYER}", random_transcoder(seed=3))


def run(transcoder: Path, *texts: str, **arguments: Any) -> Scores:
    return score.run(
        texts or (text(),), transcoder=transcoder, model=str(model_folder()), compute=Compute(threads=1), **arguments
    )


def by_hand(transcoder: Path, text: str) -> tuple[list[int], np.ndarray]:
    """Token ids with the BOS in front, and (tokens, d_sae) activations, from transformers and no code of ours."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder())
    ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(model_folder(), attn_implementation="eager").eval()
    seen = []
    plain.transformer.h[LAYER].mlp.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    with torch.inference_mode():
        plain(torch.tensor([ids]))
        return ids, load_transcoder(transcoder).encode(seen[0][0]).numpy()


def test_activations_are_those_of_the_model_run_with_one_bos_in_front(transcoder: Path) -> None:
    ids, expected = by_hand(transcoder, text())
    features = [int(feature) for feature in expected[1:].max(axis=0).argsort()[-3:]]
    scores = run(transcoder, features=features)
    [found] = scores.texts
    assert found.token_ids == ids
    assert found.tokens == ["<eos>", *words(15)]
    assert found.is_scored.tolist() == [False] + [True] * (len(ids) - 1)
    assert np.isnan(found.values[0]).all()
    assert found.values.dtype == np.float32
    np.testing.assert_allclose(found.values[1:], expected[1:, features], rtol=1e-4, atol=1e-5)
    assert (found.values[1:] > 0).any()


def test_a_character_split_over_tokens_is_shown_at_the_one_that_completes_it(
    transcoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {words(2)[0]: "<0xE6><0x97>", words(2)[1]: "<0xA5>"}  # 日 is E6 97 A5
    own = LanguageModel.vocabulary
    monkeypatch.setattr(LanguageModel, "vocabulary", lambda self: [named.get(token, token) for token in own(self)])
    scores = run(transcoder, " ".join(words(3)), features=[0])
    assert scores.texts[0].tokens == ["<eos>", "", "日", words(3)[2]]
    shown = [line.split()[1] for line in show(scores).splitlines() if re.match(r" *\d+ ", line)]
    assert shown == ["<eos>", "◌", "日", words(3)[2]]


def test_a_feature_that_is_strongest_where_a_character_begins_is_told_with_the_character() -> None:
    values = np.array([[np.nan], [2.0], [1.0]], np.float32)
    text = ScoredText(["<eos>", "", "日"], [0, 1, 2], ~np.isnan(values[:, 0]), values, [[], [(0, 2.0)], [(0, 1.0)]])
    [line] = [
        line for line in show(Scores("m", "t", "layer0", [0], False, False, [text])).splitlines() if "2.000  ◌" in line
    ]
    assert line.split()[:5] == ["0", "2.000", "◌", "of", "日"]


def test_raw_scores_are_pre_activations_and_what_relu_keeps_of_them_the_activations(transcoder: Path) -> None:
    coder = ReLU(input_bias=False).build(16, 16, 24)
    coder.load_state_dict(load_transcoder(transcoder).state_dict())
    inputs = torch.randn(2100, 16, generator=torch.Generator().manual_seed(0))  # several pieces
    raw = text_scores.feature_scores(coder, inputs, [4, 0, 4], raw=True)
    with torch.inference_mode():
        whole = (inputs @ coder.W_enc.T + coder.b_enc).numpy()
    np.testing.assert_allclose(raw, whole[:, [4, 0, 4]], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(text_scores.feature_scores(coder, inputs, [4]), np.maximum(raw[:, :1], 0), atol=1e-6)
    assert (run(transcoder, features=[0, 1, 2], raw=True).texts[0].values[1:] < 0).any()


def test_a_feature_that_is_silent_scores_zero_without_a_sign(monkeypatch) -> None:
    coder = ReLU(input_bias=False).build(2, 2, 2)
    monkeypatch.setattr(coder, "activate", lambda pre: pre.relu() * -0.0)
    found = text_scores.feature_scores(coder, torch.ones(3, 2), [0, 1])
    assert not np.signbit(found).any()


def test_without_a_feature_the_strongest_of_each_token_and_of_all_are_told(transcoder: Path) -> None:
    _, expected = by_hand(transcoder, text())
    scores = run(transcoder, top=3)
    [found] = scores.texts
    assert found.strongest[0] == []
    for strongest, acts in zip(found.strongest[1:], expected[1:], strict=True):
        order = [int(feature) for feature in np.argsort(-acts)[:3] if acts[feature] > 0]
        assert [feature for feature, _ in strongest] == order
        assert [value for _, value in strongest] == pytest.approx([acts[feature] for feature in order], rel=1e-4)
    assert scores.features == np.argsort(-expected[1:].max(axis=0))[:3].tolist()
    np.testing.assert_allclose(found.values[1:], expected[1:, scores.features], rtol=1e-4, atol=1e-5)


def test_a_long_text_goes_on_in_further_contexts_each_with_its_bos(transcoder: Path) -> None:
    scores = run(transcoder, features=[0, 1, 2, 3], raw=True, context_length=6)
    [found] = scores.texts
    assert [place for place, token in enumerate(found.tokens) if token == "<eos>"] == [0, 6, 12]
    assert found.is_scored.tolist() == [place % 6 > 0 for place in range(15 + 3)]
    assert [token for token in found.tokens if token != "<eos>"] == words(15)
    alone = run(transcoder, " ".join(words(10)[5:]), features=[0, 1, 2, 3], raw=True).texts[0]
    np.testing.assert_allclose(found.values[7:12], alone.values[1:], rtol=1e-4, atol=1e-5)


def test_a_separator_typed_in_the_text_is_scored_like_any_token(transcoder: Path) -> None:
    one, other = words(2)
    [found] = run(transcoder, f"{one} <eos> {other}", features=[0], raw=True).texts
    assert found.tokens == ["<eos>", one, "<eos>", other]
    assert found.is_scored.tolist() == [False, True, True, True]


def tables_of(path: Path, transcoder: Path, digest: str | None = None) -> Path:
    n = 24
    columns = {
        "feature": pa.array(range(n), pa.int32()),
        "frequency": [0.25] * n,
        "max": [2.0] * n,
        "top_token": [f"top{feature}" for feature in range(n)],
        "promoted_tokens": [[f"up{feature}", "b"] for feature in range(n)],
    }
    with Draft(path, "tables", {}) as draft:
        table = pa.table(columns)
        write_table(path / "features.parquet", table.schema, table.to_batches())
        of = TranscoderManifest.read(transcoder)
        inputs = {"transcoder": {"digest": digest or of.digest}}
        tables = {"features": {"n_rows": n}}
        manifest = {"inputs": inputs, "model": of.model, "site": of.site.as_json(), "tables": tables}
        draft.publish(manifest, ["features.parquet"])
    return path


def test_tables_tell_what_is_known_of_a_feature(transcoder: Path, tmp_path: Path) -> None:
    scores = run(transcoder, features=[7], tables=[tables_of(tmp_path / "tables", transcoder)])
    assert scores.about == {7: {"frequency": 0.25, "max": 2.0, "top_token": "top7", "promoted_tokens": ["up7", "b"]}}
    assert "feature 7: active on 25.00%, at most 2, top token 'top7', promotes 'up7' 'b'" in show(scores)
    with pytest.raises(ArtifactMismatch, match="made from a transcoder that was not given"):
        run(transcoder, features=[7], tables=[tables_of(tmp_path / "others", transcoder, "sha256:0")])


def test_a_text_tried_on_a_page_has_the_activations_of_a_score_and_opens_the_model_once(
    transcoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = tables_of(tmp_path / "tables", transcoder)
    opened = Mock(side_effect=of_transcoders.open_transcoder_model)
    monkeypatch.setattr(of_transcoders, "open_transcoder_model", opened)
    tried = TriedTexts([transcoder], model=str(model_folder()), compute=Compute(threads=1, quiet=True))
    expected = run(transcoder, features=[7]).texts[0]
    page = Answers({"": tables}, "ann", tried)
    answers = [page.answer("try", {"at": "", "feature": 7, "text": text()})[1] for _ in range(2)]
    assert [answer["tokens"] for answer in answers] == [expected.tokens] * 2
    assert [answer["values"] for answer in answers] == [[None, *expected.values[1:, 0].tolist()]] * 2
    assert opened.call_count == 1
    other = tables_of(tmp_path / "others", transcoder, "sha256:0")
    status, answer = Answers({"": other}, "ann", tried).answer("try", {"at": "", "feature": 7, "text": text()})
    assert (status, "start the server with its path" in answer["error"]) == (400, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"features": [24, 3, -1]},
            r"--feature 24: this transcoder has features 0 to 23\n--feature -1: features count",
        ),
        ({"raw": True}, "--raw shows pre-activations of the features that --feature names"),
        ({"features": [0], "context_length": 65}, "--context-length 65: wanted 2 .* to 64"),
    ],
)
def test_what_cannot_be_scored_is_refused(transcoder: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        run(transcoder, **arguments)


def test_no_text_and_texts_without_tokens_are_refused(transcoder: Path) -> None:
    with pytest.raises(TextError, match="no text to score"):
        score.run([], transcoder=transcoder)
    with pytest.raises(TextError, match="has no token"):
        run(transcoder, "   ", features=[0])


def test_a_model_that_is_not_found_is_told_with_what_to_give(transcoder: Path) -> None:
    with pytest.raises(ModelError, match="say where it lies with --model"):
        score.run([text()], transcoder=transcoder, features=[0])


# ---- where texts come from


def test_texts_come_from_arguments_standard_input_and_files(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("two\nlines\n")
    (tmp_path / "b.jsonl").write_text('"one"\n\n{"text": "two", "id": 3}\n')
    monkeypatch.setattr("sys.stdin", io.StringIO("typed in\n"))
    found = score.read_texts(["given", "-"], [tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert found == ["given", "typed in", "two\nlines", "one", "two"]


def test_every_text_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\nno json\n')
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(TextError) as caught:
        score.read_texts(["", "fine"], [tmp_path / "bad.jsonl", tmp_path / "bytes.txt", tmp_path / "none.txt"])
    message = str(caught.value)
    assert len(message.splitlines()) == 5
    for said in ("line 1: wanted a string", "line 2: is not JSON", "bytes.txt: cannot be read", "none.txt: cannot be"):
        assert said in message
    assert "text 1: is empty; give a text" in message
    assert "none.txt: cannot be read (No such file or directory)" in message


def test_an_empty_text_is_told_by_where_it_stands(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("\n")
    (tmp_path / "b.jsonl").write_text('"one"\n""\n')
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(TextError) as caught:
        score.read_texts(["-"], [tmp_path / "a.txt", tmp_path / "b.jsonl"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "standard input: is empty; give a text"
    assert lines[1].endswith("a.txt: is empty; give a text")
    assert lines[2].endswith("b.jsonl, line 2: is empty; give a text")


# ---- how scores are shown


def made_up(values: list[list[float]], tokens: list[str], features: list[int], **changes: Any) -> Scores:
    array = np.array(values, np.float32)
    text = ScoredText(tokens, list(range(len(tokens))), ~np.isnan(array[:, 0]), array, [[] for _ in tokens])
    return Scores("m", "t", "layer0", features, True, changes.pop("is_raw", False), [text], **changes)


NAN = float("nan")


def test_one_feature_is_shown_with_bars_by_the_largest_value() -> None:
    shown = show(made_up([[NAN], [0], [2], [4]], ["<s>", " a", "\n", "b"], [9]))
    lines = shown.splitlines()
    assert lines[0].split() == ["position", "token", "feature", "9"]
    assert re.fullmatch(r" +0  <s> +–", lines[1])
    assert re.fullmatch(r" +2  ⏎ +2\.000  █{12}", lines[3])
    assert re.fullmatch(r" +3  b +4\.000  █{24}", lines[4])
    assert "every context begins with BOS" in lines[-1]


def test_json_holds_numbers_and_null_for_the_bos() -> None:
    told = as_json(made_up([[NAN, NAN], [0.5, -1]], ["<s>", "a"], [9, 4], is_raw=True))
    assert told["texts"] == [{"tokens": ["<s>", "a"], "token_ids": [0, 1], "values": [[None, None], [0.5, -1.0]]}]
    assert told["values"] == "pre-activation"
    assert json.loads(json.dumps(told)) == told


def test_a_page_is_titled_by_its_text_and_holds_every_token_as_text() -> None:
    hostile = '</span><script>alert("x")</script>&'
    about = {9: {"promoted_tokens": [hostile]}}
    page = score_pictures.page(made_up([[NAN], [2]], [hostile, f" {hostile}"], [9], about=about))
    assert page.count("<script") == 3  # data, tooltip, the page's own
    assert page.count("</script>") == 3
    assert page.count("&lt;script&gt;") == 2 + 2  # the title and heading, the table
    assert f"<title>“{html.escape(hostile)}”: layer 0 of m</title>" in page
    [held] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    data = json.loads(held)
    assert data["texts"] == [
        {"tokens": [hostile, f" {hostile}"], "tips": [hostile, f" {hostile}"], "values": [[None, 2.0]]}
    ]
    assert (data["largest"], [one["label"] for one in data["features"]]) == (2.0, ["9"])
    assert hostile in data["features"][0]["note"]
    assert '<td class="number">–</td>' in page
    assert "<h2>" not in page  # a number says nothing of the only text
    long = score_pictures.page(made_up([[1.0]] * 50, [" word"] * 50, [9]))
    assert "<h1>“word word" in long
    assert "…”</h1>" in long


def test_features_link_to_the_pages_of_a_dashboard_of_their_layer(tmp_path: Path, monkeypatch) -> None:
    def dashboard(*names: str) -> DashboardManifest:
        sites = {name: Site(name.partition("-")[0], "in", "out", 4, 4, "float32") for name in names}
        several = sites if sites.keys() - {names[0]} else {}
        made: Any = {"site": sites[names[0]], "sites": several, "n_features": 8}
        return DashboardManifest.model_construct(**made)

    scores = made_up([[1.0, 2.0]], ["a"], [9, 4])
    assert feature_links(scores, dashboard("layer0")) == {9: "index.html#feature=9", 4: "index.html#feature=4"}
    assert feature_links(scores, dashboard("layer0-k 8", "layer1"))[9] == "index.html?at=layer0-k+8#feature=9"
    assert feature_links(scores, dashboard("layer1")) == {}
    assert feature_links(scores, dashboard("layer0-a", "layer0-b")) == {}  # which of the two is not known
    several = made_up([[1.0, 2.0]], ["a"], [9, 4], layers={"layer0": 8, "layer1": 8})
    assert feature_links(several, dashboard("layer1", "layer0"))[9] == "index.html?at=layer1#feature=1"
    monkeypatch.setattr(DashboardManifest, "read", lambda path: dashboard("layer0"))
    score_pictures.write_scores(tmp_path / "s.html", scores, tmp_path / "my site")
    assert '"href": "my%20site/index.html#feature=9"' in (tmp_path / "s.html").read_text()


def test_files_are_written_as_their_names_say(tmp_path: Path) -> None:
    scores = made_up([[NAN, NAN]] + [[0.5, -1]] * 60, ["<s>", *["$a_b$ 字"] * 60], [9, 4], is_raw=True)
    for name in ("s.html", "s.png", "s.json"):
        score_pictures.write_scores(tmp_path / name, scores)
    assert "Pre-activations of t in layer 0 of m" in (tmp_path / "s.html").read_text()
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "s.json").read_text()) == as_json(scores)
    with pytest.raises(SettingsError, match=r"end it in \.html, \.png, \.json"):
        score_pictures.write_scores(tmp_path / "s.pdf", scores)
    too_long = made_up([[1.0]] * 48 * 41, ["a"] * 48 * 41, [9])
    with pytest.raises(SettingsError, match="1 to 40 rows of 48 tokens, this would have 41"):
        score_pictures.write_scores(tmp_path / "s.png", too_long)


def test_the_command_prints_draws_and_says_so(transcoder: Path, tmp_path: Path, capsys) -> None:
    picture = tmp_path / "scores.html"
    wanted = [
        "score",
        text(),
        words(1)[0],
        "--transcoders",
        transcoder,
        "--model",
        model_folder(),
        "--threads",
        1,
        "--top",
        2,
    ]
    cli.main([str(argument) for argument in [*wanted, "--out", picture]])
    out = capsys.readouterr().out
    assert out.startswith("strongest features\nfeature ")
    assert "text 2 of 2\nposition  token  strongest features\n       0  <eos>  –\n" in out
    assert out.endswith(f"{picture}: written\n")
    page = picture.read_text()
    assert "<h2>Text 2</h2>" in page
    assert page.count("<td>–</td>") == 2  # the BOS of each text has no strongest feature
    assert len(re.findall(r"<td>\d+ \([\d.]+\)", page)) == 16


def test_features_are_named_by_number_list_and_range_and_shown_in_that_order(
    transcoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["score", text(), "--transcoders", str(transcoder), "--model", str(model_folder())]
    cli.main([*asked, "--feature", "7,2-4", "--feature", "3,0"])
    columns = re.findall(r"feature (\d+)", capsys.readouterr().out.splitlines()[0])
    assert columns == ["7", "2", "3", "4", "0"]
    with pytest.raises(SystemExit):
        cli.main([*asked, "--feature", "7,24", "--feature", "two"])
    told = capsys.readouterr().err
    assert "'24' is beyond the last feature, 23" in told
    assert "'two' is no feature" in told
