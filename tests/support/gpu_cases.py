"""What runs both on a pretended GPU and on the CPU: ``python -m tests.support.gpu_cases FOLDER [CASE…]``;
sparse is those of the sparse step.

Prints a line of JSON for each case: the numbers, or the error, of either device, and what the GPU was asked for.
"""

from __future__ import annotations

import os
import sys

# whether programs are interpreted is decided where Triton is imported, and torch may do that
os.environ["TRITON_INTERPRET"] = "1" if sys.argv[2:] == ["sparse"] else "0"

from tests.support.pretended_gpu import limit, pretended_gpu, record  # isort: skip  (before anything imports torch)

import json
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from tailrace.analysis.harvest import encoding
from tailrace.analysis.interventions.experiment import PatchPlace, patching_effects
from tailrace.analysis.interventions.features import Clamp, EditedFeatures
from tailrace.analysis.interventions.metrics import LogitDifference
from tailrace.analysis.interventions.patching import hook_of
from tailrace.analysis.interventions.prompts import pad_prompts
from tailrace.analysis.splice.replacement import run_replaced
from tailrace.pipeline.analyze import stage as analyze
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.live.batches import LiveBatches
from tailrace.pipeline.model.language_model import load_language_model
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.storage.errors import ArtifactCorrupt
from tailrace.storage.materialise import materialise_epoch
from tailrace.training.architectures import JumpReLU
from tailrace.training.architectures.objectives import VarianceObjective
from tailrace.training.cross_layer.stack import build_stack
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows import device_rows
from tailrace.training.rows.batches import Batch, CacheBatches, SiteBatches, iter_sites_once
from tests.support.gpu_stages import STAGES
from tests.support.gpu_training import BASE, TRAINED, Case, between_log_lines, resuming, training
from tests.support.live_runs import live_settings
from tests.support.spliced_models import mlp_site, random_transcoder
from tests.support.synthetic_cache import running_threads, write_synthetic_cache
from tests.support.tiny_models import save_tiny_model


def analysing(folder: Path, device: str) -> dict[str, float]:
    """Train on the CPU, where both devices get the same transcoder, and analyse it on the device."""
    write_synthetic_cache(folder / "cache", n_heldout_contexts=20)
    settings = TrainSettings.read(BASE, {"d_sae": 24})
    on_cpu = Compute(device="cpu", quiet=True)
    train.run(settings, cache=folder / "cache", output=folder / "transcoder", compute=on_cpu)
    options = AnalyzeSettings(examples=5, window_before=4, window_after=2, block_rows=50, without_model=True)
    with mock.patch.object(encoding, "DENSE_BYTES_ON_GPU", 4 * 24 * 30):  # two pieces a block
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


def bringing_rows(
    dtype: str,
    *,
    n_batches: int = 30,
    n_rows: int | None = None,
    start: dict[str, int] | None = None,
    materialised: bool = False,
    epochs: int = 3,
    by: str = "KeptOrder",
    **machine: Any,
) -> Case:
    """Return a case that compares rows brought to the device with those of the CPU: three sites, units of 128 rows.

    They must be the same to the bit, and once the first two batches were served the host must not wait for the device.
    Where several epochs are announced, rows are kept if ``machine`` has room for them; ``by`` is what reads in the end.
    """

    def case(folder: Path, device: str) -> dict[str, float]:
        n_once = 5
        if device == "cpu":  # which the case below is compared with batch by batch
            return {"batches": n_batches, "batches of 400 rows": n_once}
        limit(**machine)
        sites = [("layer0", 80, 96), ("layer1", 64, 64), ("layer2", 70, 90)]
        cache = write_synthetic_cache(folder / "cache", widths=sites, dtype=dtype, bucket_rows=128)
        split, chosen = cache.split("train"), list(cache.sites.values())
        if materialised:
            materialise_epoch(split, seed=3, epoch=0, run_tasks=one_by_one)

        def streams() -> list[CacheBatches]:
            opened = []
            for on in ("cpu", device):
                opened.append(CacheBatches(split, chosen, batch_rows=50, seed=3, n_rows=n_rows, device=on))
                opened[-1].expect(epochs * opened[-1].n_steps_per_epoch)
                opened[-1].load_state_dict(start or {"epoch": 0, "step": 0})
            return opened

        with mock.patch.object(device_rows, "SLOT_BYTES", 1 << 13), ExitStack() as stack:
            wanted, brought = map(stack.enter_context, streams())
            for batch in range(n_batches):
                if batch == 2:
                    record.clear()
                check_same(wanted.next_batch(), brought.next_batch(), device)
                assert wanted.state_dict() == brought.state_dict()
            check_no_waits(pinned=machine.get("can_pin", True))
            reader: Any = brought._rows
            assert type(reader._loader._open_order(0)).__name__ == by
            once = (iter_sites_once(split, chosen, batch_rows=90, device=on, max_rows=400) for on in ("cpu", device))
            for wanted_once, brought_once in zip(*once, strict=True):
                check_same(wanted_once, brought_once, device)
                n_once -= 1
            assert n_once == 0
        return {"batches": n_batches, "batches of 400 rows": 5}

    return case


def damaged_rows(folder: Path, device: str) -> dict[str, float]:
    """Read a cache of which a shard is cut short, until that is seen: by its name, with no thread left behind."""
    cache = write_synthetic_cache(folder / "cache", bucket_rows=128)
    split, site = cache.split("train"), cache.sites["layer0"]
    shard = split.root / "train/sites/layer0/out/c/4/0"
    shard.write_bytes(shard.read_bytes()[:-1000])
    before = running_threads()
    batches = CacheBatches(split, [site], batch_rows=50, seed=3, device=device)
    said = "nothing"
    try:
        with batches:
            list(iter(batches.next_batch, None))
    except ArtifactCorrupt as error:
        said = str(error)
    assert "sites/layer0/out/c/4/0" in said, said
    assert running_threads() <= before
    return {"refused": 1}


def living_rows(dtype: str, **machine: Any) -> Case:
    """Return a case that compares rows of a language model that runs beside with those of the CPU, to the bit."""

    def case(folder: Path, device: str) -> dict[str, float]:
        if device == "cpu":
            return {"batches": 20, "batches held out": 10}
        limit(**machine)
        settings = live_settings(storage_dtype=dtype)
        opened = [LiveBatches(settings, batch_rows=32, device=on) for on in ("cpu", device)]
        with ExitStack() as stack:
            wanted, brought = map(stack.enter_context, opened)
            for batch in range(20):
                if batch == 3:
                    record.clear()
                check_same(wanted.next_batch(), brought.next_batch(), device)
            if record.is_kept:
                asked = [*record.waits, *((way, line) for way, line in record.copies if "without a wait" not in way)]
                here = [line for _, line in asked if "another thread" not in line and line != "outside the project"]
                assert asked, "nothing was recorded"
                assert not here, here
            heldout = list(zip(wanted.heldout(), brought.heldout(), strict=True))
            for batches in heldout:
                check_same(*batches, device)
        return {"batches": 20, "batches held out": len(heldout)}

    return case


def one_by_one(task: Callable[[int], None], indices: Iterable[int]) -> None:
    """Do what workers would."""
    for index in indices:
        task(index)


def check_same(wanted: SiteBatches, brought: SiteBatches, device: str) -> None:
    """Raise AssertionError unless the rows brought to the device are those wanted, to the bit."""
    assert wanted.keys() == brought.keys()
    for site, sides in wanted.items():
        for values, there in zip(sides, brought[site], strict=True):
            assert there.device.type == device
            assert torch.equal(there.cpu(), values), site


def check_no_waits(*, pinned: bool) -> None:
    """Raise AssertionError if the device was waited for in this thread, or copied to from memory that is not pinned.

    A real device writes none of that down.
    """
    if not record.is_kept:
        return
    copies = [line for (way, line), _ in record.copies.items() if way == "to the device"]
    waits = [line for _, line in record.waits]
    assert any("device_rows.py" in line for line in waits), "nothing was recorded"
    here = [line for line in (*waits, *copies) if "another thread" not in line]
    assert not here, here
    assert bool(copies) != pinned, copies


CASES: dict[str, Case] = {
    "method": stepping,
    "topk": training(),
    "jumprelu": training(architecture={"kind": "jumprelu"}),
    "resume adam": resuming("adam"),
    "steps between log lines, topk": between_log_lines("topk"),
    "steps between log lines, jumprelu": between_log_lines("jumprelu"),
    "analyze": analysing,
    "batch_topk": training(architecture={"kind": "batch_topk", "k": 4}),
    "interventions": intervening,
    "threshold gradients": threshold_gradients,
    "rows in buckets": bringing_rows("bfloat16", n_batches=16, epochs=1, by="GatheredOrder"),
    "rows that are kept": bringing_rows("int8", n_batches=16, start={"epoch": 1, "step": 4}),
}
ROWS: dict[str, Case] = {
    **{f"rows of {dtype}, kept": bringing_rows(dtype) for dtype in ("float32", "float16", "bfloat16", "int8")},
    **{
        f"rows of {dtype} in buckets": bringing_rows(dtype, epochs=1, by="GatheredOrder")
        for dtype in ("float32", "float16", "bfloat16", "int8")
    },
    "rows on a small card": bringing_rows("int8", free_bytes=1 << 18, by="_HostBatches", start={"epoch": 0, "step": 5}),
    "rows beside large weights": bringing_rows("int8", epochs=1, by="GatheredOrder", allocated_bytes=20 << 30),
    "rows kept beside large weights": bringing_rows("bfloat16", allocated_bytes=20 << 30),
    "rows of a sample": bringing_rows("bfloat16", n_rows=310, epochs=5, start={"epoch": 2, "step": 3}),
    "rows of a sample in buckets": bringing_rows("float16", n_rows=310, epochs=1, by="GatheredOrder"),
    "rows of a materialised epoch": bringing_rows("bfloat16", epochs=1, by="MaterialisedOrder", materialised=True),
    "rows of a damaged shard": damaged_rows,
    "live rows": living_rows("float32"),
    "live rows on the host": living_rows("bfloat16", free_bytes=1000),
    "rows without pinned memory": bringing_rows("bfloat16", epochs=1, by="GatheredOrder", can_pin=False),
}
SLOW: dict[str, Case] = {
    **ROWS,
    "resume adamw": resuming("adamw"),
    "resume muon": resuming("muon"),
    **TRAINED,
    **STAGES,
}


def outcome(case: Case, folder: Path, device: str) -> dict[str, Any]:
    """Return the numbers of a case on a device, or its error and what the device was asked for."""
    folder.mkdir(parents=True)
    with pretended_gpu() if device == "cuda" else nullcontext() as asked:
        try:
            answer: dict[str, Any] = {"numbers": case(folder, device)}
        except Exception as error:  # every kind is an outcome
            answer = {"error": f"{type(error).__name__}: {error}"}
    if asked is not None:
        answer["waits"] = {f"{name} at {line}": n for (name, line), n in asked.waits.items()}
        answer["copies"] = {f"{name} at {line}": n for (name, line), n in asked.copies.items()}
    return answer


def main(folder: Path, names: list[str]) -> None:
    """Run the cases, those that take long if none is named, and print what became of them."""
    cases = CASES | SLOW
    if names == ["sparse"]:
        from tests.support.gpu_sparse import SPARSE

        cases, names = SPARSE, [*SPARSE]
    for name in names or SLOW:
        case = cases[name]
        both = {device: outcome(case, folder / name / device, device) for device in ("cuda", "cpu")}
        sys.stdout.write(json.dumps({"case": name, **both}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
