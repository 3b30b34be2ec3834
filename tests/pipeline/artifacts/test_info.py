"""``pipeline info`` of artifacts that are looked at rather than computed with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tailrace.pipeline.artifacts.info_stage import summarise
from tailrace.pipeline.dashboard import stage as dashboard
from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.storage.draft import Draft
from tailrace.storage.names import by_number
from tests.support.dashboard_tables import make_tables
from tests.support.manifests import shown
from tests.support.paths import ROOT
from tests.support.tables_by_hand import example_row, feature_row, publish_tables

CACHE = {"cache": {"cache_id": "0", "generation": 0, "digest": "sha256:0"}}


def test_a_dashboard_says_what_to_open(tmp_path: Path) -> None:
    make_tables(tmp_path / "tables")
    site = dashboard.run(DashboardSettings(), tables=tmp_path / "tables", output=tmp_path / "site", quiet=True)
    assert summarise(site.path)["open"] == "index.html"
    assert summarise(site.path)["features"] == 70


def test_an_unfinished_run_says_how_far_it_is_in_lines_of_one_fact() -> None:
    said = summarise(ROOT / "tests/released/d14043a/drafts/transcoder")
    assert said == {
        "state": "unfinished: run the command that makes it again to continue",
        "done": "67%, step 8 of 12, loss 0.604",
        "steps kept": 8,
        "architecture": "batch_topk, k 4, k_warmup_steps 1000",
        "site": "layer1",
        "d_sae": 16,
        "lr": 0.01,
        "steps": 12,
        "everything else": "--json",
    }


def test_sites_are_listed_in_the_order_of_their_layers() -> None:
    assert sorted(["layer10", "layer1", "layer2", "embed"], key=by_number) == ["embed", "layer1", "layer2", "layer10"]


def test_a_circuit_says_its_root_and_how_well_terms_add_up() -> None:
    root = {"text": "logit of ' War'", "value": 12.345, "n_terms": 335, "incompleteness": 2.3e-8}
    said = shown({"kind": "circuit", "root": root})
    assert said["root"] == "logit of ' War', 12.35"
    assert said["terms"] == "335, which miss it by 2.3e-08 of their magnitudes"


def test_an_export_says_for_whom_and_what_it_cost() -> None:
    files = {"cfg.json": {"bytes": 2, "checksum": "xxh3:0"}}
    said = shown({"kind": "export", "to": "saelens", "files": files, "notes": ["FVU 0.1 became 0.2"]})
    assert (said["written for"], said["files"], said["note"]) == ("saelens", 1, "FVU 0.1 became 0.2")


def test_an_export_that_was_published_is_shown(tmp_path: Path) -> None:
    with Draft(tmp_path, "export", {}) as draft:
        (tmp_path / "cfg.json").write_text("{}")
        draft.publish({"to": "sparsify", "notes": []}, ["cfg.json"])
    assert summarise(tmp_path) == {"kind": "export", "written for": "sparsify", "files": 1, "everything else": "--json"}


DRAWN = {"drawn": "contexts, uniformly", "n_contexts": 39, "of_contexts": 157, "n_rows": 4992, "of_rows": 20000}


@pytest.mark.parametrize(
    ("inputs", "rows", "said"),
    [
        (CACHE, None, "all heldout rows"),
        (CACHE, 5000, "the first 5,000 heldout rows"),
        ({**CACHE, "rows": DRAWN}, 5000, "4,992 of 20,000 heldout rows, drawn: contexts, uniformly"),
        ({**CACHE, "rows": {"drawn": "contexts, uniformly"}}, 50_000, "all heldout rows"),
        ({"live": {}}, 5000, "the first 5,000 rows"),
    ],
)
def test_tables_say_which_rows_they_are_about(inputs: dict[str, Any], rows: int | None, said: str) -> None:
    site = {"name": "layer0", "hook_in": "in", "hook_out": "out", "d_in": 4, "d_out": 4, "dtype": "float32"}
    manifest = {
        "kind": "tables",
        "inputs": {**inputs, "transcoder": {"digest": "sha256:0"}},
        "site": site,
        "request": {"settings": {"split": "heldout", "rows": rows}},
        "tables": {"features": {"n_rows": 1}},
    }
    assert shown(manifest)["rows read"] == said


def test_an_imported_transcoder_is_not_called_trained() -> None:
    site = {"name": "layer0", "hook_in": "in", "hook_out": "out", "d_in": 4, "d_out": 4, "dtype": "float32"}
    manifest = {
        "kind": "transcoder",
        "site": site,
        "architecture": {"kind": "relu"},
        "d_sae": 8,
        "metrics": {"steps": 0, "rows": 0},
        "origin": {"format": "saelens"},
    }
    assert shown(manifest)["imported from"] == "saelens"
    assert "trained" not in shown(manifest)


def test_a_folder_of_artifacts_says_what_is_inside(tmp_path: Path) -> None:
    for layer in (3, 4):
        publish_tables(tmp_path / f"layer{layer}", [feature_row(0)], [example_row(0)], layer=layer)
    assert summarise(tmp_path) == {
        "state": "a folder of 2 artifacts; name one of them, or list all with pipeline ls",
        "layer3": "tables",
        "layer4": "tables",
    }
