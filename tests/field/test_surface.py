"""What commands say of data: the answer is the asked one, or it says that there is none."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tailrace.analysis.circuits.record import record_run
from tailrace.analysis.circuits.roots import logit_root
from tailrace.pipeline.analyze import stage as analyze
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.text.dataset import open_documents
from tailrace.pipeline.text.files import find_text_files
from tailrace.pipeline.text.settings import TextSettings
from tailrace.pipeline.train import stage as train
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.draft import Draft
from tailrace.storage.errors import ModelError, TextError
from tailrace.storage.tables import read_table
from tailrace.training.architectures import TopK
from tailrace.training.loop.settings import TrainSettings
from tests.support.circuit_runs import TOKENS, mixed_transcoders, tiny_model
from tests.support.synthetic_cache import write_synthetic_cache


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache and a transcoder."""
    root = tmp_path_factory.mktemp("surface")
    write_synthetic_cache(root / "cache", n_heldout_contexts=40)
    settings = TrainSettings(
        architecture=TopK(k=3), d_sae=24, steps=5, batch_rows=64, warmup_steps=1, decay_steps=1, lr=1e-2
    )
    compute = Compute(threads=1, quiet=True)
    train.run(settings, cache=root / "cache", output=root / "transcoder", compute=compute)
    return root


@pytest.mark.slow
def test_some_rows_are_those_of_contexts_drawn_from_all_of_the_split(made, tmp_path):
    settings = AnalyzeSettings(rows=150, examples=2, without_model=True, block_rows=50)
    paths = {"cache": made / "cache", "transcoder": made / "transcoder"}
    result = analyze.run(settings, **paths, output=tmp_path / "tables", compute=Compute(quiet=True, threads=1))
    assert (result.n_rows, result.of_rows) == (150, 600)
    split = open_cache(made / "cache").split("heldout")
    keys = ["layer0/in", "context", "position"]
    units = [split.read_unit(unit, keys) for unit in range(split.n_units)]
    cached = {key: np.concatenate([unit[key] for unit in units]) for key in keys}
    rows = read_table(tmp_path / "tables" / "rows.parquet").to_pydict()
    assert len(set(rows["context"])) == 10
    assert max(rows["context"]) - min(rows["context"]) > 20  # not the first ten
    for key in ("context", "position"):
        assert cached[key][rows["row"]].tolist() == rows[key]
    for row in read_table(tmp_path / "tables" / "examples.parquet").to_pylist():
        assert cached["context"][row["row"]] == row["context"]
        assert row["unit"] == row["row"] // 128
    for part in (tmp_path / "tables" / "activations").iterdir():
        assert set(read_table(part).to_pydict()["row"]) <= set(rows["row"])
    manifest = json.loads((tmp_path / "tables" / "manifest.json").read_text())
    assert manifest["inputs"]["rows"] == {
        "drawn": "contexts, uniformly",
        "n_contexts": 10,
        "of_contexts": 40,
        "n_rows": 150,
        "of_rows": 600,
    }
    on = Compute(threads=1, workers=2, quiet=True)
    shared = analyze.run(settings, **paths, output=tmp_path / "shared", compute=on)
    for name in ("features.parquet", "examples.parquet", "rows.parquet"):
        assert (shared.path / name).read_bytes() == (result.path / name).read_bytes()
    on = Compute(quiet=True, threads=1)
    other = analyze.run(settings.model_copy(update={"seed": 1}), **paths, output=tmp_path / "other", compute=on)
    assert read_table(other.path / "rows.parquet").to_pydict()["row"] != rows["row"]


def test_caches_below_a_folder_of_text_are_no_text(tmp_path, caplog):
    write_synthetic_cache(tmp_path / "texts" / "caches" / "old")
    with Draft(tmp_path / "texts" / "begun", "cache", {"tokens": "1M"}) as draft:
        (draft.path / "commits").mkdir()
        (draft.path / "commits" / "0.json").write_text('{"split": "train"}')
        texts = tmp_path / "texts" / "own"
        texts.mkdir()
        for name in ("manifest.json", "request.json", "a.json"):  # names that are anybody's
            (texts / name).write_text('{"text": "mine"}')
        files = find_text_files(str(tmp_path / "texts"))
    assert files.names == ("a.json", "manifest.json", "request.json")
    assert [message.split(":")[0] for message in caplog.messages] == [
        str(tmp_path / "texts" / name) for name in ("begun", "caches/old")
    ]
    with pytest.raises(TextError, match="is an artifact of this package"):
        find_text_files(str(tmp_path / "texts" / "caches" / "old"))


def test_hooks_that_hold_what_the_mlp_reads_and_writes_are_its_hooks():
    """A checkpoint of the reference, imported as docs/export.md says, for a model with folded norms."""
    model, weights = tiny_model("gpt2", "compatibility", double=True)
    coders = mixed_transcoders()
    named = {
        dataclasses.replace(
            site,
            hook_in=f"blocks.{site.layer}.ln2.hook_normalized",
            hook_out=f"blocks.{site.layer}.hook_mlp_out",
        ): coder
        for site, coder in coders.items()
    }
    assert model.bridge.hook_dict["blocks.0.ln2.hook_normalized"] is not model.bridge.hook_dict["blocks.0.mlp.hook_in"]
    asked, usual = (record_run(model.bridge, weights, given, TOKENS) for given in (named, coders))
    assert logit_root(asked, 5).value == pytest.approx(logit_root(usual, 5).value, rel=1e-12)
    for layer in range(3):
        assert torch.equal(asked.transcoders[layer].activation, usual.transcoders[layer].activation)
    raw, weights = tiny_model("gpt2", "raw", double=True)  # the norm's gain is between them there
    with pytest.raises(ModelError, match=r"blocks.0.ln2.hook_normalized to .* does not hold the input and output"):
        record_run(raw.bridge, weights, named, TOKENS)


LABELS = {
    "lang": ["code", "speech"],
    "path": ["/data/corpus/part/000000000000000000000000.json", "s3://bucket/very/long/name/of/a/file.parquet"],
    "labels": [[0, 1, 0], [1, 0, 0]],
    "attention_mask": [[1] * 12, [1] * 12],
    "targets": [[-100] * 9 + [7], [-100] * 10],
}
"""What stands beside text in datasets, and is none."""


@pytest.mark.parametrize("column", [None, "turns"])
@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_no_column_of_labels_is_advised(tmp_path, ending, column):
    beside = {"turns": [[{"speaker": "a"}], [{"speaker": "b"}]]}
    body = {"body": ["A text of some words that go on.", "這是一段沒有空格的文字用來說明沒有空格的文字也是文字"]}
    ids = {"ids": [list(range(5, 15)), list(range(300, 312))]}

    def advice(columns):
        path = tmp_path / f"{'-'.join(columns)[:20]}.{ending}"
        table = pa.table({**columns, **beside})
        if ending == "parquet":
            pq.write_table(table, path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        settings = TextSettings(dataset=str(path), column=column)
        with pytest.raises(TextError) as refused:
            open_documents(settings, 0)
        return str(refused.value).splitlines()[-1]

    assert advice(LABELS) == "To go on, choose another dataset; no column here holds running text"
    assert advice({**LABELS, **body}) == "To go on, pass --column body"
    assert advice({**ids, **LABELS}) == "To go on, pass --column ids"
