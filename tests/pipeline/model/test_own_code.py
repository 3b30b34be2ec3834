"""No code of a model's folder runs or is asked about, however the folder asks for it, and no pickle is opened."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tailrace.pipeline import cli
from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.of_transcoders import open_transcoder_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.storage.errors import ModelError
from tests.support.cache_jobs import text_file
from tests.support.spliced_models import mlp_site, publish_transcoder_of, random_transcoder
from tests.support.tiny_models import save_tiny_model

CODE = """
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
open({marker!r}, "w")
class Own(GPT2Config): model_type = "own"
class OwnModel(GPT2LMHeadModel): config_class = Own
class OwnTokenizer(PreTrainedTokenizerFast): pass
"""
OF_OWN_TYPE = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
OWN_TOKENIZER = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the folder's code writes when it runs; a `y` is waiting for whoever asks, and must be there at the end."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    return tmp_path / "ran"


def folder_with_code(
    plain: Path, marker: Path, config: dict[str, Any] | None = None, tokenizer: dict[str, Any] | None = None
) -> Path:
    """Return a copy of a model whose files say something else as well, and code under the names that are asked for."""
    folder = shutil.copytree(plain, marker.parent / "model")
    for name, changes in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **(changes or {})}))
    for name in ("own.py", "modeling_internlm2.py"):
        (folder / name).write_text(CODE.format(marker=str(marker)))
    return folder


def load(folder: Path) -> LanguageModel:
    return load_language_model(ModelSettings(model=str(folder)))


def assert_untouched(marker: Path) -> None:
    assert not marker.exists()
    assert sys.stdin.read() == "y\n" * 9


@pytest.mark.parametrize(
    ("config", "tokenizer", "asked"),
    [
        (OF_OWN_TYPE, {}, "its config.json asks for the class Own of own.py"),
        # transformers knows the type, but no language model of it
        (
            {"model_type": "clip_text_model", "auto_map": {"AutoModelForCausalLM": "own.OwnModel"}},
            {},
            "its config.json asks for the class OwnModel of own.py",
        ),
        # no class is named: TransformerLens takes the file from the architecture
        ({"architectures": ["InternLM2ForCausalLM"]}, {}, "its architecture is loaded with modeling_internlm2.py"),
        # transformers knows the type, but no tokenizer of it
        ({"model_type": "bloom"}, OWN_TOKENIZER, "its tokenizer_config.json asks for the class OwnTokenizer of own.py"),
    ],
)
def test_a_model_that_needs_its_own_code_is_refused_by_name(
    plain: Path, marker: Path, config: dict[str, Any], tokenizer: dict[str, Any], asked: str
) -> None:
    folder = folder_with_code(plain, marker, config, tokenizer)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert str(caught.value).startswith(f"model {folder}: {asked}, and transformers ")
    assert "is never run" in str(caught.value)
    assert_untouched(marker)


def test_a_known_type_is_loaded_with_transformers_own_classes(plain: Path, marker: Path) -> None:
    auto_map = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}
    opened = load(folder_with_code(plain, marker, {"auto_map": auto_map}, OWN_TOKENIZER))
    assert type(opened.bridge.original_model).__module__ == "transformers.models.gpt2.modeling_gpt2"
    assert_untouched(marker)


def cache_command(model: Path, output: Path) -> list[str]:
    where = ["--model", str(model), "--dataset", str(text_file()), "--out", str(output)]
    return ["cache", *where, "--tokens", "500", "--layers", "0"]


def test_the_command_line_refuses_it_in_one_sentence(
    plain: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_with_code(plain, marker, OF_OWN_TYPE)
    with pytest.raises(SystemExit) as stopped:
        cli.main(cache_command(folder, marker.parent / "cache"))
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "asks for the class Own of own.py" in said
    assert "Traceback" not in said
    assert_untouched(marker)


def test_a_transcoders_model_is_refused_as_well(plain: Path, marker: Path) -> None:
    transcoder = publish_transcoder_of(
        marker.parent / "transcoder", load(plain).identity(), mlp_site(0), random_transcoder()
    )
    folder = folder_with_code(plain, marker, OF_OWN_TYPE)
    with pytest.raises(ModelError, match=r"class Own of own\.py"):
        open_transcoder_model([transcoder], model=str(folder))
    assert_untouched(marker)


def test_loading_a_model_installs_nothing(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.model_bridge.sources.transformers import helpers, source

    def begin_as_for_images(*_: Any) -> None:
        monkeypatch.setitem(sys.modules, "torchvision", None)
        assert not helpers._ensure_torchvision()

    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("something was installed"))
    monkeypatch.setattr(source, "load_modality_processor", begin_as_for_images)
    load(plain)


class WritesWhenUnpickled:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("is_zip", [True, False])
def test_weights_in_a_pickle_are_read_if_they_are_tensors_and_refused_if_more(
    plain: Path, marker: Path, is_zip: bool
) -> None:
    folder = shutil.copytree(plain, marker.parent / "model")
    weights: dict[str, Any] = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    pickled = folder / "pytorch_model.bin"
    torch.save(weights, pickled, _use_new_zipfile_serialization=is_zip)
    assert load(folder).n_layers == 2
    torch.save({**weights, "more": WritesWhenUnpickled(marker)}, pickled, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ModelError, match="a pickle that holds more than tensors") as caught:
        load(folder)
    assert "weights_only" not in str(caught.value)
    assert_untouched(marker)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04" + bytes(99)])
def test_weights_that_are_no_checkpoint_are_refused(plain: Path, tmp_path: Path, content: bytes) -> None:
    folder = shutil.copytree(plain, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match=r"its weights are damaged|cannot be loaded"):
        load(folder)
