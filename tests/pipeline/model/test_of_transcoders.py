"""The language model of a transcoder is opened from what the transcoder records, and no other is let pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tailrace.pipeline.model.language_model import load_language_model
from tailrace.pipeline.model.locations import MEMORY, named_folder, recorded_location, remember
from tailrace.pipeline.model.of_transcoders import open_transcoder_model
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
    transcoder = published(tmp_path / "transcoder", save_tiny_model(tmp_path / "models" / "there", "llama"))
    monkeypatch.chdir(tmp_path / "models")
    assert open_transcoder_model([transcoder]).d_model == WIDTH
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    with pytest.raises(ModelError, match=r"from a folder, there, which is not in the current directory, nor .*--model"):
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


def last_seen(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setenv(MEMORY, str(file))


def test_a_model_is_opened_where_this_machine_saw_it_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last_seen(monkeypatch, tmp_path / "cache" / "models.json")
    transcoder = published(tmp_path / "made" / "transcoder", save_tiny_model(tmp_path / "far" / "model", "llama"))
    assert open_transcoder_model([transcoder]).d_model == WIDTH
    # another model of that name, where a recorded name is looked for first, does not pass for it
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model", "llama", seed=1)
    assert open_transcoder_model([transcoder]).d_model == WIDTH
    (tmp_path / "far").rename(tmp_path / "away")
    with pytest.raises(ArtifactMismatch, match="files_digest"):
        open_transcoder_model([transcoder])


def test_a_model_is_looked_for_beside_the_folders_of_its_transcoder(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "demo" / "model", "llama")
    transcoder = published(tmp_path / "demo" / "circuits" / "transcoders" / "layer0", model)
    identity = json.loads((transcoder / "manifest.json").read_text())["model"]
    assert recorded_location(identity, "model", transcoder) == str(model)
    with pytest.raises(ModelError, match="nor is it beside the artifact, nor where this machine saw it last"):
        recorded_location(identity, "model", tmp_path / "elsewhere" / "transcoder")


def test_what_is_kept_of_models_may_be_broken_and_the_disk_may_refuse_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_seen(monkeypatch, tmp_path / "models.json")
    (tmp_path / "models.json").write_text("[not json")
    remember(tmp_path / "a", "sha256:1")
    remember(tmp_path / "b", "sha256:2")
    kept = {"sha256:1": str(tmp_path / "a"), "sha256:2": str(tmp_path / "b")}
    assert json.loads((tmp_path / "models.json").read_text()) == kept
    last_seen(monkeypatch, tmp_path / "models.json" / "under a file")
    remember(tmp_path / "c", "sha256:3")
    monkeypatch.setenv(MEMORY, "")
    remember(tmp_path / "c", "sha256:3")
    assert json.loads((tmp_path / "models.json").read_text()) == kept


def test_a_bundled_name_is_a_model_unless_a_folder_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named_folder("tiny") == str(bundled_model("tiny-lm"))
    assert named_folder("gpt2") == "gpt2"
    assert load_language_model(ModelSettings(model="tiny")).name == "tiny-lm"
    (tmp_path / "tiny").mkdir()
    assert named_folder("tiny") == "tiny"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fetch = "tailrace.pipeline.samples.smollm2.fetch_smollm2"
    monkeypatch.setattr(fetch, lambda folder: folder / "fetched")
    assert named_folder("smollm2") == str(tmp_path / "tailrace" / "smollm2-135m" / "fetched")
