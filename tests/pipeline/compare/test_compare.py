"""`pipeline compare`: matches by rows that both tables keep, and why a measure is left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser, expect

from tailrace.pipeline.compare import stage as compare
from tailrace.storage.cache_format import Site
from tailrace.storage.draft import Draft
from tailrace.storage.errors import SettingsError
from tailrace.storage.labels import LabelEdit, edit_labels
from tailrace.storage.tables import describe, read_schema
from tests.support.browsers import Scheme, accessibility_problems, watched_page
from tests.support.cache_jobs import command
from tests.support.written_pages import PLAIN, write_compare

N_CONTEXTS, LENGTH, N_FEATURES = 60, 16, 200


def publish(path: Path, active: np.ndarray, *, first_row: int = 0, rows: bool = True, cache: Any = "c") -> Path:
    """Publish tables whose features fire where ``active`` (rows, features) says, on the rows from ``first_row`` on."""
    n_rows, n_features = active.shape
    feature, row = np.nonzero(active.T)
    at = np.arange(first_row, first_row + n_rows)
    tables = {
        "features": pa.table({"feature": pa.array(range(n_features), pa.int32())}),
        "rows": pa.table({"row": at, "context": at // LENGTH, "position": pa.array(at % LENGTH, pa.int32())}),
        "activations/features-000000-000199": pa.table({"feature": feature, "row": at[row], "activation": row * 1.0}),
    }
    if not rows:
        del tables["rows"]
    source = {"cache": {"cache_id": cache, "generation": 0, "digest": "d"}} if cache else {"live": {}}
    with Draft(path, "tables", {"settings": {"split": "heldout"}, "at": str(path)}) as draft:
        (path / "activations").mkdir()
        for name, table in tables.items():
            pq.write_table(table, path / f"{name}.parquet")
        manifest = {
            "inputs": {**source, "transcoder": {"digest": str(path)}},
            "model": {"name": "tiny"},
            "site": Site("layer1", "in", "out", 4, 4, "float32").as_json(),
            "tables": {"features": {"n_rows": n_features}},
        }
        draft.publish(manifest, [f"{name}.parquet" for name in tables])
    return path


def drawn(seed: int) -> np.ndarray:
    """Whether each feature fires on each row; the last fires by position alone."""
    active = np.random.default_rng(seed).random((N_CONTEXTS * LENGTH, N_FEATURES)) < 0.1
    active[:, -1] = np.arange(N_CONTEXTS * LENGTH) % LENGTH == 3
    return active


@pytest.fixture(scope="module")
def active() -> np.ndarray:
    return drawn(0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, active: np.ndarray) -> tuple[Path, Path]:
    """Tables, and those of the same features in another order over rows of which the first are left out."""
    place = tmp_path_factory.mktemp("compared")
    edit_labels(publish(place / "a", active), [LabelEdit(2, "ann", "votes")])
    return place / "a", publish(place / "b", active[5 * LENGTH :, ::-1], first_row=5 * LENGTH)


def test_features_are_found_again_on_the_rows_that_both_keep(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = compare.run(pair, output=tmp_path / "out.parquet")
    own = [row for row in result.table.to_pylist() if row["side"] == "a"]
    assert [row["phi_feature"] for row in own] == list(range(N_FEATURES))[::-1]
    assert all(row["phi"] == pytest.approx(1) and row["jaccard"] == 1 and row["phi_mutual"] for row in own)
    assert all(row["phi_matched"] for row in own)
    assert 0.05 < result.summary["phi"]["a"]["chance"] < 0.3
    assert [row["label"] for row in own if row["label"]] == ["votes"]
    assert all(row["cosine"] is None for row in own)
    assert "the transcoders were not given" in result.summary["left_out"]["cosine"]
    schema = read_schema(tmp_path / "out.parquet")
    assert all(one.meaning for one in describe(schema))
    assert json.loads(schema.metadata[b"summary"]) == result.summary


def test_unrelated_features_match_no_more_than_by_chance(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = publish(tmp_path / "other", drawn(1))
    shares = compare.run((pair[0], other)).summary["phi"]["a"]
    # all but the feature of a position: one in a hundred, and three standard errors of 200
    assert (shares["compared"], shares["matched"] < 0.04) == (N_FEATURES, True)
    own = [row for row in compare.run((pair[0], other)).table.to_pylist() if row["side"] == "a"]
    assert (own[-1]["phi_feature"], own[-1]["phi"]) == (N_FEATURES - 1, pytest.approx(1))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rows": False}, "keep none; run pipeline analyze with --activations all"),
        ({"cache": "other"}, "made from other rows (cache.cache_id: there it is 'c', asked for 'other')"),
        ({"cache": None}, "made from other rows"),
        ({"first_row": 10_000}, "keep no row in common"),
    ],
)
def test_what_cannot_be_compared_is_said_with_the_next_step(
    pair: tuple[Path, Path], active: np.ndarray, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    other = publish(tmp_path / "other", active, **changed)
    with pytest.raises(SettingsError) as caught:
        compare.run((pair[0], other))
    assert said in str(caught.value)
    assert "add --transcoders PATH" in str(caught.value)


def test_the_command_prints_shares_and_writes_what_the_name_says(
    capsys: pytest.CaptureFixture[str], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    said = command(capsys, "compare", *pair, "--out", tmp_path / "out.json").out
    assert "φ of firing, a → b: " in said
    assert "of 200 features matched" in said
    assert "not compared, decoder rows: the transcoders were not given" in said
    written = json.loads((tmp_path / "out.json").read_text())
    assert len(written["features"]) == 2 * N_FEATURES
    assert json.loads(command(capsys, "compare", *pair, "--json").out) == written["summary"]
    answer = command(capsys, "compare", *pair, "--out", tmp_path / "out.txt")
    assert "end it in .parquet, .json, .html" in answer.err


def test_the_page_has_every_pair_with_what_both_are_about(pair: tuple[Path, Path], tmp_path: Path) -> None:
    compare.run(pair, output=tmp_path / "out.html")
    held = re.search(r'id="data">(.*?)</script>', (tmp_path / "out.html").read_text())
    assert held is not None
    page = json.loads(held[1])
    assert page["names"] == ["a", "b"]
    assert [measure["name"] for measure in page["measures"]] == ["φ of firing"]
    (similar,) = page["sides"][0]["similar"]
    assert similar["feature"] == list(range(N_FEATURES))[::-1]
    assert similar["state"] == [2] * N_FEATURES
    assert [at for at, text in enumerate(page["sides"][0]["about"]) if text] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1360, 390])
def test_the_page_fits_and_is_accessible(browser: Browser, tmp_path: Path, width: int, scheme: Scheme) -> None:
    path = write_compare(tmp_path, PLAIN)
    with watched_page(browser, scheme, width=width) as watched:
        watched.page.goto(path.as_uri())
        expect(watched.page.locator("#pairs tbody tr")).to_have_count(len(PLAIN))
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
        assert accessibility_problems(watched.page) == []


@pytest.mark.slow
def test_pairs_are_searched_ordered_and_turned_round(browser: Browser, tmp_path: Path) -> None:
    path = write_compare(tmp_path, [f"topic {number}" for number in range(450)])
    with watched_page(browser) as watched:
        page = watched.page
        page.goto(path.as_uri())
        rows = page.locator("#pairs tbody tr")
        expect(rows).to_have_count(200)
        expect(rows.first).to_have_text("449 topic 4490.998 matched0 topic 0")
        page.get_by_role("button", name="Show more").click()
        expect(rows).to_have_count(400)
        page.get_by_label("Search").fill("Topic 44")
        # 44 and 440 to 449, and those that are similar to one of them
        expect(page.locator("#count")).to_have_text("22 of 450 features")
        page.get_by_label("Search").fill("7")
        expect(rows.first.locator(".id").first).to_have_text("447")
        page.get_by_label("Search").fill("")
        page.locator("#kept").select_option("unmatched")
        expect(page.locator("#count")).to_have_text("226 of 450 features")
        page.locator("#kept").select_option("all")
        page.get_by_role("button", name="φ of firing").click()
        page.locator("#order").select_option("up")
        expect(rows.first).to_have_text("449 topic 449-0.998 not matched449 topic 449")
        page.locator("#order").select_option("number")
        expect(rows.first).to_have_text("0 topic 0none: it fires too rarely, or writes nothing")
        first, last = (page.locator(f"#{name}").inner_text() for name in ("own", "other"))
        page.get_by_role("button", name="topic 449 → topic 0").click()
        expect(page.locator("#own")).to_have_text(last.replace("most similar", "feature"))
        assert first == "feature of topic 0"
