"""What runs both on a pretended GPU and on the CPU: ``python -m tests.support.gpu_cases FOLDER CASE…``.

Prints a line of JSON for each case: the numbers, or the error, of either device, and what the GPU was asked for.
"""

from __future__ import annotations

from tests.support.pretended_gpu import pretended_gpu  # isort: skip  (before anything imports torch)

import json
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from tailrace.analysis.interventions.experiment import PatchPlace, patching_effects
from tailrace.analysis.interventions.features import Clamp, EditedFeatures
from tailrace.analysis.interventions.metrics import LogitDifference
from tailrace.analysis.interventions.patching import hook_of
from tailrace.analysis.interventions.prompts import pad_prompts
from tailrace.analysis.splice.replacement import run_replaced
from tailrace.pipeline.analyze import stage as analyze
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.model.language_model import load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.training.architectures import JumpReLU
from tailrace.training.architectures.objectives import VarianceObjective
from tailrace.training.cross_layer.stack import build_stack
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batches import Batch
from tests.support.gpu_training import BASE, TRAINED, Case, resuming, training
from tests.support.spliced_models import mlp_site, random_transcoder
from tests.support.synthetic_cache import write_synthetic_cache
from tests.support.tiny_models import save_tiny_model


def analysing(folder: Path, device: str) -> dict[str, float]:
    """Train on the CPU, where both devices get the same transcoder, and analyse it on the device."""
    write_synthetic_cache(folder / "cache", n_heldout_contexts=20)
    settings = TrainSettings.read(BASE, {"d_sae": 24})
    train.run(settings, cache=folder / "cache", output=folder / "transcoder", compute=Compute(quiet=True))
    options = AnalyzeSettings(examples=5, window_before=4, window_after=2, block_rows=50, without_model=True)
    made = analyze.run(
        options,
        cache=folder / "cache",
        transcoder=folder / "transcoder",
        output=folder / "tables",
        compute=Compute(device=device, quiet=True),
    )
    features = pq.read_table(made.path / "features.parquet")
    numeric = [
        field.name for field in features.schema if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
    ]
    return {name: float(pc.sum(pc.fill_null(features[name].cast("float64"), 0)).as_py()) for name in numeric}


def stepping(folder: Path, device: str) -> dict[str, float]:
    """Mix devices in the ways that CUDA refuses and count what it refuses."""
    tensor, host = torch.arange(6.0, device=device).reshape(2, 3), torch.ones(2, 3)
    wrong: list[Callable[[], Any]] = [
        lambda: tensor + host,
        lambda: tensor @ host.T,
        tensor.numpy,
        lambda: host.numpy() + tensor,
        lambda: torch.cat([tensor, host]),
        lambda: torch.randn(3, device=device, generator=torch.Generator()),
    ]
    refused = 0
    for operation in wrong if tensor.is_cuda else []:
        try:
            operation()
        except (RuntimeError, TypeError):
            refused += 1
    if tensor.is_cuda and refused < len(wrong):
        raise AssertionError(f"only {refused} of {len(wrong)} mixes of devices were refused")
    return {"sum": float((tensor * 2 + host[0].to(device)).sum())}


def intervening(folder: Path, device: str) -> dict[str, float]:
    """Patch and edit with prompts as the guide makes them: on the host, like the masks made from them."""
    model = load_language_model(ModelSettings(model=str(save_tiny_model(folder / "model", "gpt2"))), device=device)
    coder = random_transcoder().to(device)
    source, target = pad_prompts([[2, 9, 17, 33], [2, 21, 8]]), pad_prompts([[2, 50, 17, 61], [2, 21, 12]])
    edited = EditedFeatures(coder, [Clamp((3,), value=2.0, where=target.is_token)])
    effects = patching_effects(
        model.bridge,
        source=source,
        target=target,
        places=[PatchPlace(hook_of("resid_pre", 1), -1), PatchPlace(hook_of("z", 0, 1))],
        metric=LogitDifference(5, 6),
        substitutes={mlp_site(0): edited},
        where=target.is_token,
    )
    replaced = run_replaced(model.bridge, target.tokens, {mlp_site(0): edited}, target.is_token)
    numbers = {"source": effects.source, "target": effects.target, "patched": effects.patched, "logits": replaced}
    return {name: float(values.cpu().double().abs().sum()) for name, values in numbers.items()}


def threshold_gradients(folder: Path, device: str) -> dict[str, float]:
    """Take a JumpReLU step, in bfloat16 on the GPU, at thresholds whose window is as narrow as bfloat16's steps there.

    Inputs and encoders are bfloat16 numbers, so the CPU's step in float32 sums the same products. Decoders are zero:
    the gradient is the penalty's, a count of pairs in the window.
    """
    numbers: dict[str, float] = {}
    architecture = JumpReLU(bandwidth=2e-3)
    for threshold in (1.0, 4.3):
        kinds = {"layer": architecture.build(32, 32, 256), "stack": build_stack(architecture, 2, 16, 16, 128)}
        for kind, transcoder in kinds.items():
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                transcoder.W_enc.copy_((torch.randn(transcoder.W_enc.shape, generator=generator) / 4).bfloat16())
                transcoder.b_enc.fill_(threshold)
                transcoder.get_parameter("log_threshold").fill_(math.log(threshold))
            transcoder.activation_unit = 10.0
            rows = torch.randn(512, 32, generator=generator).bfloat16().float().to(device)
            step = DenseStep("bfloat16" if device == "cuda" else "float32")
            step(transcoder.to(device), Batch(rows, rows), VarianceObjective(32.0))
            gradient = transcoder.get_parameter("log_threshold").grad
            assert gradient is not None
            numbers[f"{kind} at {threshold}"] = float(gradient.sum())
    return numbers


CASES: dict[str, Case] = {
    "method": stepping,
    "topk": training(),
    "jumprelu": training(architecture={"kind": "jumprelu"}),
    "resume adam": resuming("adam"),
    "analyze": analysing,
    "batch_topk": training(architecture={"kind": "batch_topk", "k": 4}),
    "sparse": training(kernel="sparse"),
    "interventions": intervening,
    "threshold gradients": threshold_gradients,
}
SLOW: dict[str, Case] = {
    "resume adamw": resuming("adamw"),
    "resume muon": resuming("muon"),
    **TRAINED,
}


def outcome(case: Case, folder: Path, device: str) -> dict[str, Any]:
    """Return the numbers of a case on a device, or its error and what the device was asked for."""
    folder.mkdir(parents=True)
    with pretended_gpu() if device == "cuda" else nullcontext() as record:
        try:
            answer: dict[str, Any] = {"numbers": case(folder, device)}
        except Exception as error:  # every kind is an outcome
            answer = {"error": f"{type(error).__name__}: {error}"}
    if record is not None:
        answer["waits"] = {f"{name} at {line}": n for (name, line), n in record.waits.items()}
        answer["copies"] = {f"{name} at {line}": n for (name, line), n in record.copies.items()}
    return answer


def main(folder: Path, names: list[str]) -> None:
    """Run the cases and print what became of them."""
    for name in names:
        case = (CASES | SLOW)[name]
        both = {device: outcome(case, folder / name / device, device) for device in ("cuda", "cpu")}
        sys.stdout.write(json.dumps({"case": name, **both}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
