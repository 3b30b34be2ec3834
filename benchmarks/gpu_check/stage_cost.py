"""What the language model and the analysis cost on a device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.analyze_rows import PlantedSplit, planted_subject, planted_transcoder
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.outcomes import Check, NotHereError, Numbers
from benchmarks.planted_rows import Problem, plant
from tailrace.analysis.harvest.encoding import open_encoder
from tailrace.analysis.harvest.one_pass import Plan, gather
from tailrace.analysis.harvest.table import accumulators
from tailrace.analysis.tables import TABLES
from tailrace.pipeline.cache.rows import RowMaker
from tailrace.pipeline.model.language_model import load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.samples.bundled_models import bundled_model
from tailrace.pipeline.text.settings import RowFilter
from tailrace.storage.cache_format import Site

CONTEXT_LENGTH = 128


def checks(bench: Bench, *, uncompiled: bool) -> Iterator[Check]:
    """Yield the checks; ``uncompiled``: loops of rows run as plain Python, so stages of the host show nothing."""
    for dtype in ("bfloat16", "float32"):
        yield Check(f"caching, {dtype}", "cost", 15, partial(caching, bench, dtype))
    yield Check("encoding for analysis", "cost", 8, partial(encoding, bench))
    yield Check("analysis", "cost", 15, partial(analysis, bench, uncompiled))


def caching(bench: Bench, dtype: str) -> Numbers:
    """Return tokens/s of a random model of GPT-2's size: alone, with one layer captured, and with its rows on the host.

    The bundled model's tokenizer and vocabulary: the logits, which caching does not compute, cost the model less.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, heads, width, layer, batches = (2, 2, 32, 0, (2,)) if bench.small else (12, 12, 768, 8, (32, 128, 256))
    with bench.scratch(f"model {dtype}") as folder:
        shutil.copytree(bundled_model("tiny-lm"), folder / "model")
        size = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
        settings = GPT2Config(vocab_size=size, n_layer=layers, n_embd=width, n_head=heads)
        settings.bos_token_id = settings.eos_token_id = 0
        GPT2LMHeadModel(settings).save_pretrained(folder / "model")
        chosen = ModelSettings(model=str(folder / "model"), model_dtype=dtype)
        model = load_language_model(chosen, device=bench.device)
        hooks = model.resolve_sites(str(layer))
        (named,) = hooks
        site = Site(named.name, named.hook_in, named.hook_out, width, width, "bfloat16")
        plain = model.bridge.original_model
        numbers: dict[str, Any] = {}
        for contexts in batches:
            tokens = torch.randint(1, size, (contexts, CONTEXT_LENGTH), generator=torch.Generator().manual_seed(0))
            there = tokens.to(bench.device)
            maker = RowMaker(model, [site], RowFilter().row_mask(CONTEXT_LENGTH), contexts)
            arrays = tokens.numpy().astype(np.int32)
            documents = np.zeros_like(arrays, dtype=np.uint32)

            def alone(there: torch.Tensor = there) -> None:
                with torch.inference_mode():
                    plain(there)

            ways: dict[str, Callable[[], object]] = {
                "model alone": alone,
                "captured": partial(model.capture, tokens, hooks),
                "rows on the host": partial(maker.rows, arrays, documents, 0),
            }
            rates = {name: tokens.numel() / bench.time(way, 5, 2).wall for name, way in ways.items()}
            rates["rows of the model alone"] = rates["rows on the host"] / rates["model alone"]
            numbers[f"{contexts} contexts"] = rates
    return numbers


def _problem(bench: Bench) -> Problem:
    return Problem(64, 512, 8, 1024, 1) if bench.small else Problem(768, 24_576, 64, 8192, 1)


def encoding(bench: Bench) -> Numbers:
    """Return rows/s of a block's way through the encoder of an analysis, beside the transcoder's own."""
    problem = _problem(bench)
    planted = plant(problem)
    coder = planted_transcoder(planted, problem.l0).to(bench.device)
    inputs = planted.inputs[0].to(bench.device)
    with torch.inference_mode():
        encoder = open_encoder(coder, bench.device, problem.l0 / problem.d_sae)
        active = bench.time(lambda: encoder(inputs), 3, 1).wall
        alone = bench.time(lambda: coder.encode(inputs[:1024]), 5, 2).wall
    return {"rows/s": len(inputs) / active, "activations alone rows/s": min(1024, len(inputs)) / alone}


def analysis(bench: Bench, uncompiled: bool) -> Numbers:
    """Return rows/s of the pass over a cache that all tables are counted from."""
    if uncompiled and not bench.small:
        raise NotHereError("numba is not installed, and what the host counts would show nothing")
    problem = _problem(bench)
    planted = plant(problem)
    n_rows = 1024 if bench.small else 65_536
    with bench.scratch("analysis") as folder:
        subject = planted_subject(problem, n_rows, planted, scratch=folder / "pairs", device=bench.device)
        subject.coder.to(bench.device)  # type: ignore[attr-defined]
        assert isinstance(subject.split, PlantedSplit)
        kinds = accumulators(TABLES)
        seconds = bench.time(lambda: gather(subject, Plan(), kinds), 1, 1).wall
    return {"rows/s": n_rows / seconds}
