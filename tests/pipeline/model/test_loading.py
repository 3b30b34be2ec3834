"""Models open from folders and from the hub, say exactly what they are, and say what to do when they do not open."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.loading import choose_dtype, open_checkpoint
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.model.tokenizer import ModelTokenizer
from tailrace.storage.errors import ModelError
from tailrace.storage.token_text import has_bytes, join_characters
from tests.support.tiny_models import save_tiny_model, save_tiny_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-gpt2")


def load(folder: Path | str, **settings: Any) -> LanguageModel:
    return load_language_model(ModelSettings.model_validate({"model": str(folder), **settings}))


def refusal(folder: Path | str, *, device: str = "cpu", **settings: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_language_model(ModelSettings.model_validate({"model": str(folder), **settings}), device=device)
    return str(caught.value)


def put_in_hub_cache(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Lay ``folder`` out as if ``name`` had been downloaded from the hub before."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


def test_shape_and_identity_are_those_of_the_checkpoint(folder: Path) -> None:
    model = load(folder)
    assert (model.n_layers, model.d_model, model.d_vocab, model.max_context_length) == (2, 16, 80, 64)
    identity = model.identity()
    assert identity["name"] == "tiny-gpt2"
    assert identity["revision"] is None
    assert identity["architecture"] == "GPT2LMHeadModel"
    assert identity["dtype"] == "float32"
    assert identity["processing"] == "raw"
    assert sorted(identity["versions"]) == ["tokenizers", "torch", "transformer_lens", "transformers"]
    assert str(folder.parent) not in json.dumps(identity)


def test_identity_follows_weights_and_tokenizer_but_not_the_place(folder: Path, tmp_path: Path) -> None:
    here = load(folder).identity()
    assert load(shutil.copytree(folder, tmp_path / "tiny-gpt2")).identity() == here
    other_weights = load(save_tiny_model(tmp_path / "seed1", seed=1)).identity()
    assert other_weights["files_digest"] != here["files_digest"]
    assert other_weights["tokenizer"] == here["tokenizer"]
    reordered = tmp_path / "reordered"
    shutil.copytree(folder, reordered)
    save_tiny_tokenizer(reordered, ["<unk>", "<eos>", "of", "the"])
    assert load(reordered).identity()["tokenizer"]["digest"] != here["tokenizer"]["digest"]
    assert load(reordered).identity()["files_digest"] == here["files_digest"]


def test_using_the_tokenizer_does_not_change_its_digest(folder: Path) -> None:
    model = load(folder)
    before = model.identity()
    model.tokenize(["the of to", "and"])
    assert model.identity() == before


def test_a_hub_name_is_recorded_with_the_commit_it_stood_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_hub_cache(folder, "acme/tiny", monkeypatch, tmp_path)
    for settings in ({}, {"revision": "main"}, {"revision": COMMIT}):
        identity = load("acme/tiny", **settings).identity()
        assert (identity["name"], identity["revision"], identity["files_digest"]) == ("acme/tiny", COMMIT, None)


@pytest.mark.parametrize(
    ("stored", "wanted", "loaded"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float32),  # no CPU computes in float16
        (torch.float16, "float16", torch.float16),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_auto_dtype_is_the_checkpoints_except_float16_on_a_cpu(
    tmp_path: Path, stored: torch.dtype, wanted: str, loaded: torch.dtype
) -> None:
    assert load(save_tiny_model(tmp_path / "m", dtype=stored), model_dtype=wanted).dtype is loaded


@pytest.mark.parametrize(
    ("device", "wanted", "n_warnings"), [("cuda", "auto", 1), ("cuda", "float32", 0), ("cpu", "auto", 0)]
)
def test_a_float32_model_stays_so_on_a_gpu_and_the_faster_dtype_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, device: str, wanted: str, n_warnings: int
) -> None:
    checkpoint = open_checkpoint(str(save_tiny_model(tmp_path / "m")), None)
    assert choose_dtype(checkpoint, wanted, torch.device(device)) is torch.float32
    assert ["--model-dtype bfloat16" in line for line in caplog.messages] == [True] * n_warnings


def test_a_configuration_without_dtype_leaves_it_to_the_weights(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m", dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).dtype is torch.bfloat16


@pytest.mark.parametrize(("emulates", "n_warnings"), [(True, 1), (False, 0)])
def test_a_cpu_that_emulates_bfloat16_is_told_of_the_faster_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, emulates: bool, n_warnings: int
) -> None:
    monkeypatch.setattr("tailrace.pipeline.model.loading._emulates_bfloat16", lambda: emulates)
    load(save_tiny_model(tmp_path / "m", dtype=torch.bfloat16))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * n_warnings
    assert ("--model-dtype float32" in caplog.text) is emulates


def test_nothing_is_trainable_and_dropout_is_off(folder: Path) -> None:
    bridge = load(folder).bridge
    assert not any(parameter.requires_grad for parameter in bridge.original_model.parameters())
    assert not any(module.training for module in bridge.original_model.modules())


def test_loading_and_capturing_print_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    levels = {name: logging.getLogger(name).level for name in ("", "transformers", "huggingface_hub")}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = load(folder)
        model.capture(torch.full((2, 8), model.bos_token_id), model.resolve_sites("all"))
        model.tokenize(["the " * 1000])
    printed = capfd.readouterr()
    assert (printed.out, printed.err, caplog.records, warned) == ("", "", [], [])
    assert levels == {name: logging.getLogger(name).level for name in levels}


# Tokens


def test_special_tokens_are_never_added_and_nothing_is_cut(tmp_path: Path) -> None:
    model = load(save_tiny_model(tmp_path / "m", "llama", bos_token="<bos>"))
    # Ids: <unk> 0, <eos> 1, <bos> 2, then the words in order.
    assert model.tokenize(["the of zebra to", "", "of"]) == [[3, 4, 0, 5], [], [4]]
    assert len(model.tokenize(["the " * 1000])[0]) == 1000  # contexts have at most 64 positions
    assert model.tokenize([]) == []


@pytest.mark.parametrize(
    ("tokens", "setting", "bos", "separator"),
    [
        ({"bos_token": "<bos>", "eos_token": "<eos>"}, None, (2, "bos"), (1, "eos")),
        ({"eos_token": "<eos>"}, None, (1, "eos"), (1, "eos")),
        ({"bos_token": "<bos>", "eos_token": None}, None, (1, "bos"), (1, "bos")),
        ({"bos_token": "<bos>", "eos_token": "<eos>"}, 5, (5, "setting"), (1, "eos")),
        ({"bos_token": None, "eos_token": None}, 5, (5, "setting"), (5, "setting")),
    ],
)
def test_bos_falls_back_to_eos_and_the_separator_to_bos(
    tmp_path: Path, tokens: dict[str, str | None], setting: int | None, bos: tuple[int, str], separator: tuple[int, str]
) -> None:
    model = load(save_tiny_model(tmp_path / "m", **tokens), bos_token_id=setting)  # type: ignore[arg-type]
    assert (model.bos_token_id, model.separator_token_id) == (bos[0], separator[0])
    recorded = model.identity()["tokenizer"]
    assert (recorded["bos_token_id"], recorded["bos_source"]) == bos
    assert (recorded["separator_token_id"], recorded["separator_source"]) == separator


def test_a_tokenizer_without_bos_and_eos_asks_for_a_token(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m", eos_token=None)
    assert "choose one of its token ids with --bos-token-id" in refusal(folder)
    assert "token ids [79] lie outside its vocabulary, 0 to 78" in refusal(folder, bos_token_id=79)


def test_vocabulary_names_every_id_the_model_has(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m")
    save_tiny_tokenizer(folder, ["<unk>", "<eos>", "the", "of"])  # 4 tokens, but the model embeds 80
    vocabulary = load(folder).vocabulary()
    assert len(vocabulary) == 80
    assert vocabulary[:5] == ["<unk>", "<eos>", "the", "of", "<unused 4>"]
    assert vocabulary[79] == "<unused 79>"


def byte_level_tokenizer() -> ModelTokenizer:
    """Return a tokenizer whose vocabulary is the 256 bytes, two of them joined, and the replacement character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: token_id for token_id, letter in enumerate([*letters, "æĹ", "ï¿½"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("æ", "Ĺ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    return ModelTokenizer(made, name="bytes", d_vocab=len(made))


def test_parts_of_characters_are_shown_as_bytes_and_join_to_their_text() -> None:
    tokenizer = byte_level_tokenizer()
    vocabulary = tokenizer.vocabulary()
    assert sum(map(has_bytes, vocabulary)) == 129  # bytes 0x80 to 0xFF, and the two joined
    assert "\N{REPLACEMENT CHARACTER}" in vocabulary  # a character of its own, not two broken ones
    text = "日 café\n"
    texts = [vocabulary[token_id] for token_id in tokenizer.tokenize([text])[0]]
    assert texts[:3] == ["<0xE6><0x97>", "<0xA5>", " "]
    assert "".join(join_characters(texts)) == text


# What goes wrong


def test_a_missing_folder_is_answered_with_near_matches(folder: Path) -> None:
    wrong = folder.with_name("tinygpt2")
    assert refusal(wrong) == f"model {wrong}: no such folder; near matches: {folder}"


def test_a_folder_that_holds_no_model_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert "has no config.json and no weights (model.safetensors" in refusal(tmp_path)
    assert "found: notes.txt" in refusal(tmp_path)
    without_weights = shutil.copytree(folder, tmp_path / "no-weights")
    (without_weights / "model.safetensors").unlink()
    assert "has no weights (model.safetensors" in refusal(without_weights)


def test_damaged_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert refusal(damaged).startswith(f"model {damaged}: cannot be loaded: ")


def test_a_hub_name_without_network_is_answered_with_a_local_folder() -> None:
    message = refusal("acme/unheard-of")
    assert "pass --model FOLDER" in message
    assert "(hf download acme/unheard-of" in message


def test_an_old_name_is_answered_with_the_name_on_the_hub() -> None:
    assert "its name on the hub is EleutherAI/pythia-70m." in refusal("pythia-70m")


def test_a_folder_has_no_revisions(folder: Path) -> None:
    assert "leave out --revision main" in refusal(folder, revision="main")


@pytest.mark.parametrize("device", ["cuda:63", "gpu"])
def test_a_device_this_machine_lacks_is_refused(folder: Path, device: str) -> None:
    assert refusal(folder, device=device).startswith(f"device '{device}': ")


def test_a_folder_without_tokenizer_reads_token_ids_and_no_text(folder: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    model, with_tokenizer = load(bare), load(folder)
    assert model.bos_token_id == with_tokenizer.bos_token_id
    assert model.separator_token_id == with_tokenizer.separator_token_id
    assert model.vocabulary() == [f"<{number}>" for number in range(model.d_vocab)]
    with pytest.raises(ModelError, match=r"bare: has no tokenizer .tokenizer.json., so it reads token ids only"):
        model.tokenize(["the"])


def test_an_unreadable_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text('{"added_tokens": [')
    assert f"model {damaged}: its tokenizer cannot be opened: " in refusal(damaged)
