"""A tiny model with a transcoder of each layer on disk, for tests of ``pipeline circuit``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tailrace.pipeline import cli
from tailrace.pipeline.circuit import stage as circuit
from tailrace.pipeline.circuit.question import Question
from tailrace.pipeline.circuit.settings import CircuitSettings
from tailrace.pipeline.model.language_model import load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.storage.draft import Draft
from tailrace.training.architectures import TopK
from tailrace.training.architectures.manifest import FORMAT_VERSION, KIND, WEIGHTS
from tailrace.training.architectures.transcoder import save_weights
from tests.support.circuit_runs import mlp_site, random_transcoder
from tests.support.tiny_models import BOS, save_tiny_model

PROMPT = "the man was with her and then they said what"
SMALL = CircuitSettings(iterations=2, branches=4, max_features=40)


class Place:
    """A folder with a model and a transcoder of each of its three layers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model_path = save_tiny_model(folder / "tiny-model", "llama", n_layers=3, bos_token=BOS)
        self.model = load_language_model(ModelSettings(model=str(self.model_path)))
        self.transcoders = [self.publish(f"layer{layer}", layer) for layer in range(3)]

    def publish(self, name: str, layer: int, changes: dict[str, Any] | None = None, **site: str) -> Path:
        path = self.folder / name
        transcoder = random_transcoder(layer, settings=TopK(k=4))
        with Draft(path, KIND, {"name": name}) as draft:
            save_weights(path / WEIGHTS, transcoder)
            manifest = {
                "format": FORMAT_VERSION,
                "inputs": {},
                "model": {**self.model.identity(), **(changes or {})},
                "site": {**asdict(mlp_site(layer)), **site},
                "d_sae": transcoder.d_sae,
                "architecture": {"kind": "topk", "k": 4},
                "metrics": {},
            }
            draft.publish(manifest, [WEIGHTS])
        return path

    def active_feature(self, layer: int = 2) -> str:
        """A feature that fires on the last token of the prompt."""
        asked = Question(PROMPT, logit="her")
        result = circuit.run(
            CircuitSettings(iterations=1, branches=500, filter=("kind=feature", f"layer={layer}"), max_features=0),
            asked, transcoders=self.transcoders, output=self.folder / f"find{layer}", model=str(self.model_path),
        )  # fmt: skip
        node = result.document["rounds"][0][0]["steps"][-1]["node"]
        return f"{layer}:{node['index']}"


def run_command(place: Place, capsys: pytest.CaptureFixture[str], *arguments: object, fails: bool = False) -> str:
    arguments = ("circuit", *arguments, "--model", place.model_path)
    try:
        cli.main([str(one) for one in arguments])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    assert code in ((1, 2) if fails else (0,)), said.err
    return said.err if fails else said.out


def given(place: Place) -> list[object]:
    return [part for path in place.transcoders for part in ("--transcoders", path)]
