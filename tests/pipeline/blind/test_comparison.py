"""A blind comparison from draw to tally: nothing on the way tells which dictionary an item is from."""

from __future__ import annotations

import csv
import json
import re

import pytest

from tailrace.pipeline import cli
from tailrace.pipeline.blind import draw
from tailrace.pipeline.blind.sealed import seal, unseal
from tailrace.pipeline.blind.settings import DrawSettings
from tailrace.storage.artifact import verify_artifact
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMissing, SettingsError
from tests.support.tables_by_hand import SETTINGS, dead_row, example_row, feature_row, publish_tables

N = 6


def dictionary(path, scale, first):
    """Publish 20 features whose activations and tokens only the test can tell from another dictionary's."""
    features, examples = [], []
    for feature in range(20):
        if feature % 5 == 4:
            features.append(dead_row(feature))
            continue
        few = feature % 5 == 3
        features.append(feature_row(feature, max=4.0 * scale, n_active=2 if few else 100))
        token = f"secret{first + feature}"
        examples.append(
            example_row(
                feature,
                0,
                4.0 * scale,
                window_tokens=["<bos>", token, "."],
                window_activations=[None, 4.0 * scale, 0.0],
            )
        )
    return publish_tables(path, features, examples)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("dictionaries")
    return [dictionary(root / "small", 1.0, 100), dictionary(root / "large", 1000.0, 500)]


@pytest.fixture(scope="module")
def drawn(pair, tmp_path_factory):
    output = tmp_path_factory.mktemp("draw") / "blind"
    return draw.run(DrawSettings(n=N, seed=1), tables=pair, output=output)


def key_of(drawn):
    return unseal(drawn.path / "key.sealed", drawn.commitment)


def rate(drawn, path, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["item", "interpretable", "context_free", "note"])
        writer.writerows(rows)
    return path


def test_every_item_has_a_page_with_its_own_feature_s_examples(drawn):
    key = key_of(drawn)
    assert [item["item"] for item in key["items"]] == list(range(1, 2 * N + 1))
    assert sorted(item["dictionary"] for item in key["items"]) == [0] * N + [1] * N
    for item in key["items"]:
        page = (drawn.path / f"items/{item['item']:04d}.html").read_text()
        assert f"secret{(100, 500)[item['dictionary']] + item['feature']}<" in page
        assert item["feature"] % 5 < 3  # neither dead nor with too few rows


def test_both_dictionaries_are_mixed(drawn):
    order = [item["dictionary"] for item in key_of(drawn)["items"]]
    assert order not in ([0] * N + [1] * N, [1] * N + [0] * N)


def test_no_file_but_the_sealed_key_tells_whose_an_item_is(drawn, pair):
    for file in drawn.path.rglob("*"):
        if file.is_file():
            text = file.read_text()
            assert not re.search(r"\bsmall\b|\blarge\b|dictionary\": ", text), file
    # nor do numbers on the pages: those of one dictionary are a thousand times those of the other
    pages = {
        item["item"]: (drawn.path / f"items/{item['item']:04d}.html").read_text() for item in key_of(drawn)["items"]
    }
    masked = {re.sub(r"secret\d+|Item \d+", "", page) for page in pages.values()}
    assert len(masked) == 1


def test_a_draw_repeats_with_its_seed_and_differs_with_another(drawn, pair, tmp_path):
    again = draw.run(DrawSettings(n=N, seed=1), tables=pair, output=tmp_path / "again")
    other = draw.run(DrawSettings(n=N, seed=2), tables=pair, output=tmp_path / "other")
    assert again.commitment == drawn.commitment
    assert key_of(other)["items"] != key_of(drawn)["items"]


def test_ratings_are_no_part_of_the_artifact_and_survive_a_rerun(pair, tmp_path):
    first = draw.run(DrawSettings(n=N), tables=pair, output=tmp_path / "blind")
    (tmp_path / "blind/ratings.csv").write_text("item,interpretable,context_free,note\n1,yes,,mine\n")
    assert draw.run(DrawSettings(n=N), tables=pair, output=tmp_path / "blind") == first
    assert "mine" in (tmp_path / "blind/ratings.csv").read_text()
    assert verify_artifact(tmp_path / "blind", "blind-comparison") == []


def test_a_tally_counts_each_dictionary_s_own_items(drawn, tmp_path):
    rows = []
    for item in key_of(drawn)["items"]:
        # every feature of the first dictionary is interpretable; of the second, features below 10 maybe, others not
        verdict = "yes" if item["dictionary"] == 0 else "maybe" if item["feature"] < 10 else "No"
        rows.append([item["item"], verdict, "yes" if item["dictionary"] else "", 'a "note", with commas'])
    result = draw.tally_ratings(drawn.path, ratings_file=rate(drawn, tmp_path / "r.csv", rows))
    below = sum(item["feature"] < 10 for item in key_of(drawn)["items"] if item["dictionary"] == 1)
    counts = {one.name: (one.first.count, one.second.count) for one in result.tally.comparisons}
    assert result.names == ("small", "large")
    assert counts == {
        "yes": (N, 0), "yes or maybe": (N, below), "maybe": (0, below), "no": (0, N - below), "context-free": (0, N),
    }  # fmt: skip
    record = json.loads((drawn.path / "tally.json").read_text())
    assert record["comparisons"][0]["p_value"] == pytest.approx(2 / 924)  # 12 choose 6
    assert {item["verdict"] for item in record["items"] if item["dictionary"] == 0} == {"yes"}


def test_everything_wrong_with_ratings_is_told_at_once_and_the_key_stays_closed(drawn, tmp_path):
    rows = [
        [1, "yes", "", ""], [1, "no", "", ""], [2, "perhaps", "", ""], [3, "yes", "sometimes", ""], [99, "yes", "", ""],
        [4, "", "", ""], *([item, "no", "no", ""] for item in range(6, 2 * N + 1)),
    ]  # fmt: skip
    with pytest.raises(SettingsError) as refused:
        draw.tally_ratings(drawn.path, ratings_file=rate(drawn, tmp_path / "r.csv", rows))
    for reason in (
        "line 3: item 1 was rated in line 2 already",
        "line 4: interpretable is 'perhaps', wanted yes, maybe, no",
        "line 5: context_free is 'sometimes'",
        "line 6: '99' is no item, they go from 1 to 12",
        "item 4: is not rated",
        "item 5: has no line",
    ):
        assert reason in str(refused.value)


def test_an_unfilled_or_missing_or_foreign_ratings_file_is_refused(drawn, tmp_path):
    with pytest.raises(SettingsError, match="item 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12: is not rated"):
        draw.tally_ratings(drawn.path, ratings_file=drawn.path / "ratings.csv")
    with pytest.raises(ArtifactMissing, match="there are no ratings"):
        draw.tally_ratings(drawn.path, ratings_file=tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a;b\n")
    with pytest.raises(SettingsError, match="wanted the columns item,interpretable,context_free,note"):
        draw.tally_ratings(drawn.path, ratings_file=tmp_path / "other.csv")


def test_a_key_that_was_changed_or_lost_is_noticed(tmp_path):
    commitment = seal(tmp_path / "key", {"items": [1, 2]})
    assert unseal(tmp_path / "key", commitment) == {"items": [1, 2]}
    assert "items" not in (tmp_path / "key").read_text()
    seal(tmp_path / "key", {"items": [2, 1]})
    with pytest.raises(ArtifactCorrupt, match="is not what was sealed"):
        unseal(tmp_path / "key", commitment)
    (tmp_path / "key").write_text("x\nnot base64!\n")
    with pytest.raises(ArtifactCorrupt, match="cannot be decoded"):
        unseal(tmp_path / "key", commitment)
    (tmp_path / "key").unlink()
    with pytest.raises(ArtifactMissing, match="the sealed key is gone"):
        unseal(tmp_path / "key", commitment)


def test_tables_that_were_made_differently_are_refused(pair, tmp_path):
    longer = publish_tables(tmp_path / "l", [feature_row(0)], [], settings={**SETTINGS, "examples": 30})
    with pytest.raises(SettingsError, match=r"(?s)pages would tell.*examples: there it is 20, asked for 30"):
        draw.run(DrawSettings(n=1), tables=[pair[0], longer], output=tmp_path / "out")
    elsewhere = publish_tables(
        tmp_path / "e", [feature_row(0)], [], cache={"cache_id": "other", "generation": 0, "digest": "x"}
    )
    with pytest.raises(SettingsError, match="cache: there it is 'c', asked for 'other'"):
        draw.run(DrawSettings(n=1), tables=[pair[0], elsewhere], output=tmp_path / "out")
    with pytest.raises(SettingsError, match="are the same tables"):
        draw.run(DrawSettings(n=1), tables=[pair[0], pair[0]], output=tmp_path / "out")
    with pytest.raises(SettingsError, match="give two artifacts of tables, each after --tables; there is 1"):
        draw.run(DrawSettings(n=1), tables=[pair[0]], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_no_page_shows_may_differ(tmp_path):
    rows = [feature_row(0), feature_row(1)]
    made = [
        publish_tables(tmp_path / name, rows, [], settings={**SETTINGS, "without_model": bare})
        for name, bare in (("a", False), ("b", True))
    ]
    assert draw.run(DrawSettings(n=1), tables=made, output=tmp_path / "out").n_items == 2


def test_tables_of_fresh_text_are_compared_by_text_and_model(tmp_path):
    fresh = {"live": {"dataset": "speeches"}, "text": {"files": ["x"]}}
    made = [publish_tables(tmp_path / name, [feature_row(0)], [], fresh=fresh) for name in "ab"]
    assert draw.run(DrawSettings(n=1), tables=made, output=tmp_path / "out").n_items == 2
    other = publish_tables(tmp_path / "c", [feature_row(0)], [], fresh={**fresh, "text": {"files": ["y"]}})
    cached = publish_tables(tmp_path / "d", [feature_row(0)], [])
    for tables, said in ((other, r"text.files: there it is \['x'\]"), (cached, "live: is there, not asked for")):
        with pytest.raises(SettingsError, match=said):
            draw.run(DrawSettings(n=1), tables=[made[0], tables], output=tmp_path / "none")


def test_the_commands_draw_and_tally(pair, tmp_path, capsys):
    cli.main(
        ["blind", "draw", "--tables", str(pair[0]), "--tables", str(pair[1]), "--n", "2", "--out", str(tmp_path / "d")]
    )
    told = capsys.readouterr().out
    assert "4 items" in told
    assert "key sealed, sha256:" in told
    lines = [f"{item},yes,," for item in range(1, 5)]
    (tmp_path / "d/ratings.csv").write_text("\n".join(["item,interpretable,context_free,note", *lines]) + "\n")
    cli.main(["blind", "tally", str(tmp_path / "d")])
    table = capsys.readouterr().out
    assert "small" in table
    assert "2/2 (34% to 100%)" in table
    assert "mean score (no 0, maybe 1, yes 2): 2.00 and 2.00, p = 1" in table
