"""Correctness: what every stage gives on a device, beside what it gives on the CPU.

The cases are those of the tests (``tests.support.gpu_cases``), run on a device that is there or on a pretended one;
here are also those that only a check of a device needs.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.outcomes import TOLERANCE, Check, Numbers, WrongError, agreement
from tailrace.pipeline.cache import stage as cache_stage
from tailrace.pipeline.cache import verify
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.circuit import stage as circuit
from tailrace.pipeline.circuit.question import Question
from tailrace.pipeline.circuit.settings import CircuitSettings
from tailrace.pipeline.evaluate import stage as evaluate
from tailrace.pipeline.evaluate.settings import EvaluateSettings
from tailrace.pipeline.score import stage as score
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.errors import SettingsError
from tailrace.training.architectures import ARCHITECTURES, Architecture
from tailrace.training.architectures.objectives import VarianceObjective
from tailrace.training.dead_features.auxiliary.settings import AuxK, Ghost
from tailrace.training.dead_features.record import FiringRecord
from tailrace.training.kernels.adaptive import build_kernel
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.kernel import Precision
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batches import Batch, iter_once
from tests.support import gpu_cases
from tests.support.gpu_training import BASE, Case, across_layers, training
from tests.support.synthetic_cache import write_synthetic_cache
from tests.support.tiny_models import WORDS, save_tiny_model

LOOSE = 0.03
"""For steps in bfloat16, where choices between nearly equal activations are many, and for resampling, which draws."""
EXACT = 2e-5
"""Of float32 gradients from float64's, norms: products over 256 rows and 384 features, rounding 6e-8 each."""
REFUSED = "sparse"
"""How the names begin of cases that a device may refuse with an error that says so."""
SIZES = (48, 40, 384)
"""d_in, d_out and d_sae of a step's check."""


def checks(bench: Bench) -> Iterator[Check]:
    """Yield the checks; each is as independent of the others as a command is of another."""
    for kind in ARCHITECTURES:
        name = kind.model_fields["kind"].default
        yield Check(f"gradients, {name}", "correctness", 6, partial(gradients, bench, kind))
    for name, case in {**gpu_cases.CASES, **gpu_cases.SLOW, **STAGES}.items():
        yield Check(name, "correctness", 5, partial(compared, bench, name, case))
    for kind in ARCHITECTURES:
        name = kind.model_fields["kind"].default
        settings = {"architecture": small_settings(name)}
        yield Check(
            f"training by the chosen kernel, {name}",
            "correctness",
            6,
            partial(compared, bench, f"chosen {name}", by_chosen_kernel(settings)),
        )
    yield Check("the same command twice", "correctness", 6, partial(repeated, bench))
    if not bench.is_cuda:
        return  # programs are compiled for a real one; interpreted, as the tests do, they take minutes
    for name in ("topk", "batch_topk", "jumprelu", "gated"):
        case = training(architecture=small_settings(name), kernel="sparse")
        yield Check(
            f"training by the sparse step, {name}", "correctness", 20, partial(compared, bench, f"sparse {name}", case)
        )
    across = across_layers("batch_topk", kernel="sparse")
    yield Check(
        "training by the sparse step, layers", "correctness", 20, partial(compared, bench, "sparse layers", across)
    )


def compared(bench: Bench, name: str, case: Case) -> Numbers:
    """Run a case on the device and on the CPU; raise WrongError where numbers differ."""
    with bench.scratch(name) as folder:
        (folder / "device").mkdir()
        (folder / "cpu").mkdir()
        try:
            with bench.offered():
                there = case(folder / "device", bench.device)
        except SettingsError as error:
            if not name.startswith(REFUSED):
                raise
            return {"refused": str(error)[:100]}
        here = case(folder / "cpu", "cpu")
    loose = any(word in name for word in ("bfloat16", "resampling"))
    return {"largest difference": agreement(there, here, LOOSE if loose else TOLERANCE)}


# --- steps


def small_settings(kind: str) -> dict[str, Any]:
    """Return settings of an architecture with which a few features of some hundred fire on a row."""
    known: dict[str, dict[str, Any]] = {
        **{name: {"k": 8} for name in ("topk", "batch_topk")},
        "matryoshka": {"k": 8, "levels": 3},
        "jumprelu": {"l0": 0.1, "bandwidth": 0.5},
        **{name: {"l1": 0.3} for name in ("relu", "gated")},
    }
    return {"kind": kind, **known.get(kind, {})}


def gradients(bench: Bench, kind: type[Architecture]) -> Numbers:
    """Compare a step's gradients with float64's: by every kernel in float32, and what bfloat16 makes of them."""
    name = kind.model_fields["kind"].default
    worst: dict[str, float] = {}
    variants = [(False, None), (True, None), (False, AuxK(aux_k=16)), (False, Ghost())]
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    for (skip, auxiliary), precision in itertools.product(variants, precisions):
        settings = kind(**small_settings(name), skip=skip, input_bias=True)
        problem = _Problem(settings, auxiliary)
        wanted = problem.gradients("cpu", torch.float64, None)
        for kernel in ("dense", "auto"):
            with bench.offered():
                made = problem.gradients(bench.device, torch.float32, (kernel, precision))
            if made.keys() != wanted.keys():
                raise WrongError(
                    f"{kernel}: only one of the two has gradients of {sorted(made.keys() ^ wanted.keys())}"
                )
            difference = max(_relative(made[parameter], wanted[parameter]) for parameter in made)
            key = f"{kernel} {precision}"
            worst[key] = max(worst.get(key, 0.0), difference)
            if precision == "float32" and not difference <= EXACT:
                extra = "no auxiliary loss" if auxiliary is None else auxiliary.kind
                raise WrongError(f"{kernel}, skip {skip}, {extra}: gradients differ by {difference:.2g}, norms")
    return worst


class _Problem:
    """A transcoder and rows on which its gradients are compared, in float64."""

    def __init__(self, settings: Architecture, auxiliary: AuxK | Ghost | None) -> None:
        generator = torch.Generator().manual_seed(0)
        self._settings, self._auxiliary = settings, auxiliary
        transcoder = settings.build(*SIZES).double()
        with torch.no_grad():
            for parameter in transcoder.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.3 * noise)
            transcoder.constrain_parameters()
        # in float32's grid, so that both begin with the same numbers
        self._weights = {name: values.float() for name, values in transcoder.state_dict().items()}
        shapes = ((256, width) for width in SIZES[:2])
        self._rows = [torch.randn(shape, generator=generator) for shape in shapes]

    def gradients(self, device: str, dtype: torch.dtype, kernel: tuple[Any, Precision] | None) -> dict[str, Tensor]:
        """Return the gradients of one step, by parameter, on the CPU; ``kernel`` None: the dense step."""
        transcoder = self._settings.build(*SIZES)
        transcoder.load_state_dict(self._weights)
        transcoder = transcoder.to(device, dtype)
        objective = VarianceObjective(float(SIZES[1]))
        transcoder.activation_unit = objective.activation_unit
        extra = []
        if self._auxiliary is not None:
            firing = FiringRecord(SIZES[2], device)
            firing.steps_since_fired[::3] = 10
            loss = self._auxiliary.build(firing, objective, dead_after_steps=5)
            extra = [] if loss is None else [loss]
        batch = Batch(*(rows.to(device, dtype) for rows in self._rows))
        step = (
            DenseStep("float32")
            if kernel is None
            else build_kernel(kernel[0], kernel[1], torch.device(device), name="check")
        )
        step(transcoder, batch, objective, extra)
        return {
            name: parameter.grad.cpu()
            for name, parameter in transcoder.named_parameters()
            if parameter.grad is not None
        }


def _relative(made: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference over that of ``wanted``; where that is zero, the difference's own."""
    wanted = wanted.double()
    difference, scale = float((made.double() - wanted).norm()), float(wanted.norm())
    return difference / scale if scale else difference


def by_chosen_kernel(changes: Mapping[str, Any]) -> Case:
    """Return a case that trains by whatever kernel the device chooses, and on the CPU by the dense one."""

    def case(folder: Path, device: str) -> dict[str, float]:
        kernel = "dense" if device == "cpu" else "auto"
        return training(**{**changes, "kernel": kernel})(folder, device)

    return case


def repeated(bench: Bench) -> Numbers:
    """Train twice by the chosen kernel; raise WrongError unless both runs have the same bytes."""
    same: dict[str, Any] = {}
    with bench.scratch("repeated") as folder, bench.offered():
        for precision in ("float32", "bfloat16"):
            weights = []
            for run in ("first", "second"):
                home = folder / precision / run
                home.mkdir(parents=True)
                training(kernel="auto", precision=precision)(home, bench.device)
                (file,) = home.rglob("weights.safetensors")
                weights.append(file.read_bytes())
            same[precision] = weights[0] == weights[1]
    if not all(same.values()):
        raise WrongError(f"the same command twice gives other weights; the same bytes: {same}")
    return same


# --- stages that no case of the tests has


def rows_as_stored(folder: Path, device: str) -> dict[str, float]:
    """Bring rows of every stored dtype to the device and sum them there, each batch's bits against the CPU's."""
    numbers: dict[str, float] = {}
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        cache = write_synthetic_cache(folder / dtype, dtype=dtype, n_contexts=16, n_heldout_contexts=1)
        split, (site,) = cache.split("train"), cache.sites.values()
        pairs = zip(
            iter_once(split, site, batch_rows=100, device="cpu"),
            iter_once(split, site, batch_rows=100, device=device),
            strict=True,
        )
        n_equal = 0
        for here, there in pairs:
            if there.inputs.device.type != torch.device(device).type:
                raise WrongError(f"{dtype}: rows lie on {there.inputs.device}")
            n_equal += all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
        numbers[f"equal batches of {dtype}"] = n_equal
    return numbers


def text_of(folder: Path) -> Path:
    """Write a text in a tiny model's words."""
    path = folder / "text.jsonl"
    generator = np.random.Generator(np.random.Philox(0))
    lines = (json.dumps({"text": " ".join(generator.choice(WORDS, 60))}) for _ in range(120))
    path.write_text("\n".join(lines))
    return path


def cached(folder: Path, device: str) -> Path:
    """Cache both layers of a tiny model on a device."""
    settings = CacheSettings.read(
        {
            "model": str(save_tiny_model(folder / "model", "gpt2")),
            "model_dtype": "float32",
            "dataset": str(text_of(folder)),
            "tokens": 4000,
            "layers": "all",
            "context_length": 32,
            "contexts_per_batch": 8,
            "holdout": "3::10",
            "storage_dtype": "float32",
        }
    )
    cache_stage.run(settings, output=folder / "cache", compute=Compute(device=device, quiet=True))
    return folder / "cache"


def caching(folder: Path, device: str) -> dict[str, float]:
    """Cache a tiny model, and check the pairs of the cache on the same device."""
    path = cached(folder, device)
    checked = verify.run(path, checksums=True, pairs=4, compute=Compute(device=device, quiet=True))
    numbers: dict[str, float] = {"passed": checked.passed}
    opened = open_cache(path)
    for split, site in itertools.product(("train", "heldout"), opened.sites):
        rows = opened.split(split)
        keys = (f"{site}/in", f"{site}/out", "token_id", "context")
        units = [rows.read_unit(unit, list(keys)) for unit in range(rows.n_units)]
        weights = {key: np.concatenate([np.asarray(unit[key], np.float64) for unit in units]) for key in keys}
        order = np.arange(1, 1 + len(weights["context"])) / len(weights["context"])  # rows in another order show
        for key, values in weights.items():
            numbers[f"{split} {key}"] = float((np.abs(values).reshape(len(order), -1).sum(1) * order).sum())
    return numbers


def transcoders_of(folder: Path) -> tuple[Path, Path]:
    """Return a cache and transcoders of its two layers, made on the CPU, where every device gets the same."""
    cache = cached(folder, "cpu")
    kinds = ({"kind": "batch_topk", "k": 4}, {"kind": "jumprelu"})
    for layer, kind in enumerate(kinds):
        settings = TrainSettings.read(BASE, {"architecture": kind, "site": f"layer{layer}"})
        output = folder / "transcoders" / f"layer{layer}"
        train.run(settings, cache=cache, output=output, compute=Compute(device="cpu", quiet=True))
    return cache, folder / "transcoders"


def evaluating(folder: Path, device: str) -> dict[str, float]:
    """Run the model with transcoders in place, by ``pipeline evaluate``."""
    cache, transcoders = transcoders_of(folder)
    made = evaluate.run(
        EvaluateSettings(contexts=12),
        transcoders=[transcoders],
        cache=cache,
        output=folder / "evaluation",
        compute=Compute(device=device, quiet=True),
    )
    return dict(_flat({sites: asdict(scores) for sites, scores in made.scores.items()}))


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested mappings, by their names one after the other."""
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} ")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)


def explaining(folder: Path, device: str) -> dict[str, float]:
    """Attribute a logit by ``pipeline circuit``, and score the same text."""
    _, transcoders = transcoders_of(folder)
    compute = Compute(device=device, quiet=True)
    prompt = "the people of this time have"
    made = circuit.run(
        CircuitSettings(branches=4, max_features=20),
        Question(prompt, logit=" been"),
        transcoders=[transcoders],
        output=folder / "circuit",
        model=str(folder / "model"),
        compute=compute,
    )
    root = made.document["root"]
    (text,) = score.run([prompt], transcoder=transcoders / "layer0", model=str(folder / "model"), compute=compute).texts
    incompleteness = abs(root["incompleteness"])
    return {
        "logit": root["value"],
        "complete to 1e-3": float(incompleteness < 1e-3),
        "scores": float(np.nansum(text.values.astype(np.float64))),
    }


STAGES: dict[str, Case] = {
    "rows as stored": rows_as_stored,
    "cache and verify": caching,
    "evaluate": evaluating,
    "circuit and score": explaining,
}
