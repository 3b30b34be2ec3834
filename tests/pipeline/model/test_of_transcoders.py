"""The language model of a transcoder is opened from what the transcoder records, and no other is let pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tailrace.pipeline.model.language_model import load_language_model
from tailrace.pipeline.model.of_transcoders import open_transcoder_model, recorded_location
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.samples.bundled_models import bundled_model
from tailrace.storage.artifact import digest
from tailrace.storage.errors import ArtifactMismatch, ModelError, SettingsError
from tests.support.spliced_models import WIDTH, mlp_site, publish_transcoder_of, random_transcoder
from tests.support.tiny_models import save_tiny_model


def published(folder: Path, model: Path, layer: int = 0) -> Path:
    identity = load_language_model(ModelSettings(model=str(model))).identity()
    return publish_transcoder_of(folder, identity, mlp_site(layer), random_transcoder(seed=layer))


def test_the_model_is_found_where_it_is_said_to_lie(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "there", "llama")
    transcoder = published(tmp_path / "transcoder", model)
    moved = model.rename(tmp_path / "elsewhere")

    loaded = open_transcoder_model([transcoder], model=str(moved), dtype="float64")

    assert loaded.dtype is torch.float64
    assert loaded.n_layers == 2


def test_a_recorded_folder_name_is_tried_and_its_absence_names_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcoder = published(tmp_path / "transcoder", save_tiny_model(tmp_path / "there", "llama"))
    monkeypatch.chdir(tmp_path)
    assert open_transcoder_model([transcoder]).d_model == WIDTH
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    with pytest.raises(ModelError, match=r"from a folder, there, which is not in the current directory; .*--model"):
        open_transcoder_model([transcoder])


def test_a_model_that_comes_with_the_package_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcoder = published(tmp_path / "transcoder", bundled_model("tiny-lm"))
    monkeypatch.chdir(tmp_path)
    assert open_transcoder_model([transcoder]).n_layers == 4


def test_a_model_from_the_hub_is_asked_for_by_its_name() -> None:
    assert recorded_location({"name": "gpt2", "files_digest": None}, "gpt2", Path("transcoder")) == "gpt2"


def test_another_model_is_refused_with_the_difference(tmp_path: Path) -> None:
    transcoder = published(tmp_path / "transcoder", save_tiny_model(tmp_path / "one", "llama"))
    other = save_tiny_model(tmp_path / "other", "llama", seed=1)
    with pytest.raises(ArtifactMismatch, match="files_digest"):
        open_transcoder_model([transcoder], model=str(other))


def test_transcoders_of_two_models_are_refused_together(tmp_path: Path) -> None:
    one = published(tmp_path / "a", save_tiny_model(tmp_path / "one", "llama"))
    two = published(tmp_path / "b", save_tiny_model(tmp_path / "two", "gpt2"), layer=1)
    with pytest.raises(ArtifactMismatch, match="trained on other language models than") as caught:
        open_transcoder_model([one, two])
    assert "architecture" in str(caught.value)
    assert "name" in str(caught.value)
    assert str(caught.value).count(str(two)) == 1  # above its differences, not before each of them


def test_many_transcoders_of_one_other_model_are_told_once_by_short_digests(tmp_path: Path) -> None:
    first, other = ({"name": "m", "files_digest": digest(seed), "tokenizer": {"bos_token_id": seed}} for seed in (1, 2))
    paths = [
        publish_transcoder_of(tmp_path / f"t{place}", first if place == 0 else other, mlp_site(0), random_transcoder())
        for place in range(6)
    ]
    with pytest.raises(ArtifactMismatch) as caught:
        open_transcoder_model(paths)
    assert str(caught.value).splitlines()[1:] == [
        f"  {tmp_path / 't1'}, {tmp_path / 't2'}, {tmp_path / 't3'} and 2 more:",
        f"    files_digest (content of the model's folder, such as other weights): there it is '{digest(1)[:19]}…', "
        f"asked for '{digest(2)[:19]}…'",
        "    tokenizer.bos_token_id (BOS): there it is 1, asked for 2",
    ]


def test_no_transcoder_is_refused() -> None:
    with pytest.raises(SettingsError, match="no transcoder given"):
        open_transcoder_model([])
