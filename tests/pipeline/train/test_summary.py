"""What ``pipeline train`` says at its end."""

from __future__ import annotations

import pytest

from tailrace.pipeline.train.command import show_metrics
from tests.support.manifests import shown

HELDOUT = {"n_rows": 96, "fvu": 0.25, "l0": 31.96, "dead_fraction": 0.125}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "held-out FVU 0.2500, L0 32.0, dead features 12.5%"),
        ({"fvu": None}, "held-out FVU undefined, L0 32.0, dead features 12.5%"),
        (
            {"fvu_ordinary": 0.5, "n_ordinary": 90},
            "held-out FVU 0.5000 on the 90 rows it may learn from (0.2500 on all), L0 32.0, dead features 12.5%",
        ),
    ],
)
def test_the_held_out_score_is_told_in_one_line(changes: dict[str, float | None], said: str) -> None:
    assert show_metrics({"steps": 1500, "heldout": {**HELDOUT, **changes}}) == f"1,500 steps, {said}"


def test_a_summarise_outputs_that_do_not_vary_has_no_fvu() -> None:
    site = {"name": "mlp", "hook_in": "in", "hook_out": "out", "d_in": 2, "d_out": 2, "dtype": "float32"}
    manifest = {
        "kind": "transcoder",
        "model": {"name": "tiny"},
        "site": site,
        "inputs": {"cache": {"cache_id": "abc", "generation": 0, "digest": "sha256:0"}},
        "architecture": {"kind": "topk", "k": 2},
        "d_sae": 8,
        "metrics": {"steps": 3, "rows": 30, "heldout": {**HELDOUT, "fvu": None}},
    }
    lines = shown(manifest)
    assert lines["held out"] == "FVU undefined, L0 32.0, dead features 12.5%, over 96 rows"
