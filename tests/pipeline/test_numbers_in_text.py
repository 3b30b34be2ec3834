"""What is no number to Python, or one too long for it, is refused in words wherever numbers are read from text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tailrace.pipeline.artifacts.folders import artifacts_inside
from tailrace.pipeline.circuit.question import parse_feature
from tailrace.pipeline.model.sites import resolve_sites
from tailrace.pipeline.shared.feature_selection import parse_features, parse_layer_features
from tailrace.pipeline.text.holdout import HoldoutRule
from tailrace.storage.artifact import MANIFEST, seal
from tailrace.storage.errors import ModelError, SettingsError

READERS: dict[str, Callable[[str], Any]] = {
    "a feature": lambda text: parse_feature(f"{text}:1"),
    "features": lambda text: parse_features([text], 10),
    "features of layers": lambda text: parse_layer_features([f"layer0:{text}"], {"layer0": 10}),
    "layers": lambda text: resolve_sites(text, (), n_layers=2, hook_names=(), count_heads=lambda _: {}),
    "documents held out": lambda text: HoldoutRule.parse(f"{text}:", 0),
}


@pytest.mark.parametrize("text", ["²", "9" * 5000], ids=["superscript", "5,000 digits"])
@pytest.mark.parametrize("reader", READERS)
def test_no_number_is_a_sentence(reader: str, text: str) -> None:
    with pytest.raises((SettingsError, ModelError)):
        READERS[reader](text)


def test_folders_whose_names_are_no_numbers_are_sorted_all_the_same(tmp_path: Path) -> None:
    names = ["layer2", "layer10", "²", "9" * 200]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_bytes(seal({"kind": "tables"}))
    inside = [path.name for path in artifacts_inside(tmp_path, "tables")]
    assert sorted(inside) == sorted(names)
    assert inside.index("layer2") < inside.index("layer10")
