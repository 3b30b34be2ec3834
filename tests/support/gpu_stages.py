"""Stages that run the language model, on a pretended GPU and on the CPU: caching, analysis, circuits, scores."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from tailrace.pipeline.analyze import stage as analyze
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.cache import rows as cache_rows
from tailrace.pipeline.cache import stage as cache
from tailrace.pipeline.cache.budget import plan_budget
from tailrace.pipeline.cache.verify import check_pairs
from tailrace.pipeline.circuit import stage as circuit
from tailrace.pipeline.circuit.question import Question
from tailrace.pipeline.circuit.settings import CircuitSettings
from tailrace.pipeline.compare import stage as compare
from tailrace.pipeline.evaluate import stage as evaluate
from tailrace.pipeline.evaluate.settings import EvaluateSettings
from tailrace.pipeline.live.settings import FreshText
from tailrace.pipeline.score import stage as score
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.steer import stage as steer
from tailrace.pipeline.steer.settings import SteerSettings
from tailrace.pipeline.task import stage as task
from tailrace.pipeline.task.settings import TaskSettings
from tailrace.pipeline.train import stage as train
from tailrace.pipeline.train.settings import ModelScoreSettings
from tailrace.storage.activation_cache import ActivationCache
from tailrace.storage.statistics import as_float32
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.transfer import to_host
from tests.support import cache_jobs
from tests.support.gpu_training import BASE, Case
from tests.support.pretended_gpu import record

MODEL = str(cache_jobs.model_folder())
ON_CPU = Compute(device="cpu", quiet=True)
PROMPT = " ".join(cache_jobs.speech_texts()[0].split()[:9])


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="gpu-stages-")


@functools.cache
def made() -> Path:
    """Return a folder, made once on the CPU: a cache of two layers, a transcoder of each, one across both."""
    folder = Path(_folder().name)
    settings = cache_jobs.settings(layers="0,1")
    cached = cache.run(settings, output=folder / "cache", compute=ON_CPU).path
    for layer in (0, 1):
        chosen = TrainSettings.read(BASE, {"site": f"layer{layer}"})
        train.run(chosen, cache=cached, output=folder / f"layers/layer{layer}", compute=ON_CPU)
    chosen = TrainSettings.read(BASE, {"cross_layer": True, "architecture": {"kind": "batch_topk", "k": 4}})
    train.run(chosen, cache=cached, output=folder / "across", compute=ON_CPU)
    return folder


def sums_of(path: Path) -> dict[str, float]:
    """Return the sum of every column of numbers of the Parquet files below ``path``."""
    sums = {}
    for file in sorted(path.rglob("*.parquet")):
        table = pq.read_table(file)
        for column in table.schema:
            if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
                values = pc.fill_null(table[column.name].cast("float64"), 0)
                sums[f"{file.relative_to(path)} {column.name}"] = float(pc.sum(values).as_py() or 0)
    return sums


def rows_of(opened: ActivationCache) -> dict[str, float]:
    """Return sums over the rows of a cache, each row with a weight of its own."""
    sums = {}
    for split in opened.manifest.splits:
        rows = opened.split(split)
        for key in (f"{site}/{side}" for site in opened.sites for side in ("in", "out")):
            for unit in range(rows.n_units):
                values = as_float32(rows.read_unit(unit, [key])[key])
                sums[f"{split} {key} {unit}"] = float(values.sum(1) @ np.linspace(1, 2, len(values)))
    return sums


def n_waits() -> int:
    """Return how often the host has waited for the device, or for a copy."""
    copies = sum(n for (way, _), n in record.copies.items() if "without a wait" not in way)
    return sum(record.waits.values()) + copies


def caching(storage_dtype: str) -> Case:
    """Return a case that makes a cache, after a look at its size, and checks its rows with the model."""

    def case(folder: Path, device: str) -> dict[str, float]:
        compute = Compute(device=device, quiet=True)
        settings = cache_jobs.settings(storage_dtype=storage_dtype, shard_rows=256)
        n_sites = len(plan_budget(settings, output=folder / "out", compute=compute).sites)
        copied: list[str] = []
        asked: list[int] = []
        begin = cache_rows.RowMaker.begin

        def noting_dtype(values: torch.Tensor) -> torch.Tensor:
            copied.append(str(values.dtype).removeprefix("torch."))
            return to_host(values)

        def noting_waits(*arguments: Any) -> Any:
            asked.append(n_waits())
            return begin(*arguments)

        with (
            mock.patch.object(cache_rows, "to_host", noting_dtype),
            mock.patch.object(cache_rows.RowMaker, "begin", noting_waits),
        ):
            done = cache.run(settings, output=folder / "out", compute=compute)
        if device == "cuda":
            # besides the smallest and the largest number of each side
            assert set(copied) == {{"int8": "float32"}.get(storage_dtype, storage_dtype), "float64"}, copied
            # the first passes are compared with what is recorded of them
            assert len(asked) > 8, len(asked)
            in_flight = 2
            assert n_waits() - asked[4] <= len(asked) - 4 + in_flight, "one wait a batch, for rows on their way"
        errors = [report.relative_error for report in check_pairs(done.path, n_contexts=3, compute=compute)]
        rows = rows_of(done.cache)
        wide = rows_of(cache.widen(done.path, "1", compute=compute).cache)
        long = cache.extend(done.path, done.cache.split("train").n_rows + 300, compute=compute).cache
        longer = {f"extended {name}": value for name, value in rows_of(long).items()}
        return {"sites": n_sites, "largest error": max(errors), **rows, **wide, **longer}

    return case


def evaluating(transcoder: str) -> Case:
    """Return a case that runs the model with transcoders in place."""

    def case(folder: Path, device: str) -> dict[str, float]:
        settings, compute = EvaluateSettings(contexts=6, split="train"), Compute(device=device, quiet=True)
        given = [made() / transcoder]
        done = evaluate.run(settings, transcoders=given, cache=made() / "cache", output=folder / "out", compute=compute)
        return sums_of(done.path)

    return case


def analysing_live(folder: Path, device: str) -> dict[str, float]:
    """Make all tables on fresh text, with connections to the next layer."""
    options = AnalyzeSettings(rows=200, activations=100, examples=3, window_before=4, window_after=2, block_rows=64)
    text = FreshText(dataset=str(cache_jobs.text_file()), context_length=16, contexts_per_batch=4)
    done = analyze.run(
        options,
        transcoder=made() / "layers/layer0",
        live=text,
        downstream=[made() / "layers/layer1"],
        output=folder / "out",
        model=MODEL,
        compute=Compute(device=device, quiet=True),
    )
    return sums_of(done.path)


def tracing(transcoder: str) -> Case:
    """Return a case that finds the circuit of a logit."""

    def case(folder: Path, device: str) -> dict[str, float]:
        done = circuit.run(
            CircuitSettings(branches=4, max_features=20),
            Question(PROMPT, logit=PROMPT.split()[-1]),
            transcoders=[made() / transcoder],
            output=folder / "out",
            model=MODEL,
            compute=Compute(device=device, quiet=True),
        )
        root = done.document["root"]
        return {name: float(root[name]) for name in root if isinstance(root[name], float)} | numbers_in(
            done.document, "value"
        )

    return case


def numbers_in(document: Any, name: str) -> dict[str, float]:
    """Return how many numbers of this name a document has, and the sum of their sizes."""
    values: list[float] = []

    def look(part: Any) -> None:
        if isinstance(part, dict):
            values.extend(abs(part[key]) for key in part if key == name and isinstance(part[key], float))
            part = list(part.values())
        for inner in part if isinstance(part, list) else []:
            look(inner)

    look(document)
    return {f"{name}s": len(values), f"sum of {name}s": sum(values)}


def scoring(folder: Path, device: str) -> dict[str, float]:
    """Score a text with the strongest features of both layers."""
    done = score.run([PROMPT], transcoder=made() / "layers", model=MODEL, compute=Compute(device=device, quiet=True))
    (text,) = done.texts
    strongest = sum(value for token in text.strongest for _, value in token)
    values = text.values[text.is_scored]
    return {"features": sum(done.features), "values": float(values.sum(dtype=np.float64)), "strongest": strongest}


def keeping_few(folder: Path, device: str) -> dict[str, float]:
    """Measure which features a task needs."""
    words = PROMPT.split()
    lines = [{"prompt": " ".join(words[:n]), "correct": [words[n]], "incorrect": [words[n - 1]]} for n in (4, 6, 7)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = TaskSettings(kept=(0, 2, 24), leave_out=3, prompts_per_batch=2)
    done = task.run(
        settings,
        prompts=prompts,
        transcoders=[made() / "layers/layer1"],
        output=folder / "out",
        model=MODEL,
        compute=Compute(device=device, quiet=True),
    )
    scores = {f"{one.kind} {one.n_kept}": float(sum(one.scores)) for one in done.curves}
    return scores | sums_of(done.path)


def steering(folder: Path, device: str) -> dict[str, float]:
    """Write on with a feature of each layer changed."""
    settings = SteerSettings.read({"feature": ["0:3=+5", "1:7=clamp:2"], "tokens": 6})
    compute = Compute(device=device, quiet=True)
    done = steer.run(settings, [PROMPT], transcoders=[made() / "layers"], model=MODEL, compute=compute)
    numbers = {}
    for text in done.texts:
        numbers[f"tokens of run {text.run}"] = float(sum(text.token_ids))
        if text.effect is not None:
            numbers[f"KL of run {text.run}"] = float(text.effect.kl)
    return numbers


def comparing(folder: Path, device: str) -> dict[str, float]:
    """Match the features of two transcoders by their decoder rows and by the rows they are active on."""
    options = AnalyzeSettings(examples=3, window_before=4, window_after=2, without_model=True)
    for layer in (0, 1):
        transcoder, output = made() / f"layers/layer{layer}", folder / f"tables{layer}"
        analyze.run(options, cache=made() / "cache", transcoder=transcoder, output=output, compute=ON_CPU)
    done = compare.run(
        (folder / "tables0", folder / "tables1"),
        transcoders=[made() / "layers"],
        output=folder / "matches.parquet",
        compute=Compute(device=device, quiet=True),
    )
    return {"features": done.table.num_rows} | sums_of(folder)


def training_beside_others(folder: Path, device: str) -> dict[str, float]:
    """Train with connections to a transcoder of the next layer, and scores in the language model on the way."""
    to_next = {"kind": "sparse", "connection_path": made() / "layers/layer1", "connection_coefficient": 0.1}
    done = train.run(
        TrainSettings.read(BASE, {"site": "layer0", "connection": to_next}),
        cache=made() / "cache",
        output=folder / "out",
        model_scores=ModelScoreSettings(evaluate_model_every=6, evaluate_model_contexts=4),
        compute=Compute(device=device, quiet=True),
    )
    lines = [json.loads(line) for line in (done.path / "metrics.jsonl").read_text().splitlines()]
    (kl, *_) = [line["kl"] for line in lines if line["split"] == "model"]
    return {"fvu": done.metrics["heldout"]["fvu"], "loss": done.metrics["train"]["loss"], "kl": kl}


STAGES: dict[str, Case] = {
    "cache in float32": caching("float32"),
    "cache in bfloat16": caching("bfloat16"),
    "cache in int8": caching("int8"),
    "evaluate": evaluating("layers"),
    "evaluate across layers": evaluating("across"),
    "analyze fresh text": analysing_live,
    "circuit": tracing("layers"),
    "circuit across layers": tracing("across"),
    "score": scoring,
    "steer": steering,
    "compare": comparing,
    "train beside other layers and the model": training_beside_others,
    "task": keeping_few,
}
"""Cases that take long together, by name."""
