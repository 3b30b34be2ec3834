"""What a run costs, known before its first step: bytes by arithmetic, seconds from steps on random rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from tailrace.storage.errors import OutOfMemoryError
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.objectives import build_objective
from tailrace.training.cross_layer.stack import build_stack
from tailrace.training.kernels.adaptive import build_kernel, missing_for_sparse
from tailrace.training.kernels.kernel import Precision
from tailrace.training.loop.build import takes_pairs
from tailrace.training.loop.initialise import initialise
from tailrace.training.loop.optim import build_optimiser
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.batches import Batch

STATE_BYTES = 16
"""Of a parameter while it is trained: weight, gradient and two moments in float32."""
CHECKPOINT_BYTES = 12
"""Of a parameter in a checkpoint, and where a GPU's sparse step makes no gradient of weights."""
SCREENED_BYTES = 2
"""Of a number in bfloat16: an activation, and a weight of the encoder's copy that the sparse step of a GPU keeps."""


def n_parameters(settings: TrainSettings, widths: Sequence[tuple[int, int]]) -> int:
    """Return how many numbers a transcoder has; ``widths`` are (d_in, d_out) of each layer it reads."""
    (d_in, d_out), n_features = widths[0], settings.n_features(widths[0][0])
    with torch.device("meta"):
        made: Transcoder = (
            build_stack(settings.architecture, len(widths), d_in, d_out, n_features)
            if settings.cross_layer
            else settings.architecture.build(d_in, d_out, n_features)
        )
    return sum(parameter.numel() for parameter in made.parameters())


def training_bytes(
    settings: TrainSettings,
    widths: Sequence[tuple[int, int]],
    device: torch.device,
    *,
    n_shards: int = 1,
    shares_rows: bool = False,
) -> int:
    """Return the least memory that a run takes on its device: weights, moments, a batch and one activation each.

    Gradients, too, where they are matrices: everywhere but in the sparse step of a GPU, which has a copy of the encoder
    in bfloat16 instead. ``n_shards`` devices share the features; or, with ``shares_rows``, several the rows.
    """
    settings = settings.model_copy(update={"d_sae": settings.n_features(widths[0][0]) // n_shards})
    n_features, averaged = settings.n_features(widths[0][0]), 0 if settings.ema is None else 4
    n_columns = sum(d_in + d_out for d_in, d_out in widths)
    batch = settings.batch_rows * (4 * n_columns + SCREENED_BYTES * len(widths) * n_features)
    by_pairs = (
        device.type == "cuda"
        and settings.kernel in ("auto", "sparse")
        and not shares_rows
        and takes_pairs(settings, None)
        and missing_for_sparse(device) is None
    )
    state = (CHECKPOINT_BYTES if by_pairs else STATE_BYTES) + averaged
    copy = SCREENED_BYTES * n_features * sum(d_in for d_in, _ in widths) if by_pairs else 0
    return n_parameters(settings, widths) * state + copy + batch


def check_memory(
    runs: Sequence[tuple[TrainSettings, Sequence[tuple[int, int]]]],
    device: torch.device,
    *,
    n_shards: int = 1,
    shares_rows: bool = False,
) -> None:
    """Raise OutOfMemoryError if runs side by side, each (settings, widths), cannot fit into a GPU's free memory.

    ``n_shards`` and ``shares_rows`` are those of ``training_bytes``. Says the largest d_sae that fits.

    Of a CPU's memory nothing is known: others give theirs back when it is short.
    """
    if device.type != "cuda":
        return
    free = torch.cuda.mem_get_info(device)[0]
    count = partial(training_bytes, device=device, n_shards=n_shards, shares_rows=shares_rows)
    wanted = sum(count(settings, widths) for settings, widths in runs)
    if wanted <= free:
        return
    settings, widths = max(runs, key=lambda run: count(*run))
    d_sae = settings.n_features(widths[0][0])
    share = _largest_d_sae(settings, widths, free / len(runs), count) // (64 * n_shards) * (64 * n_shards)
    beside = f"the {len(runs)} runs side by side take" if len(runs) > 1 else "training takes"
    advice = f"d_sae: {d_sae} is too many, {share} fit" if share > 0 else "no d_sae is small enough"
    fewer = ", train fewer side by side" if len(runs) > 1 else ""
    raise OutOfMemoryError(
        f"--device {device}: {beside} at least {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free "
        f"(weights, what the optimiser keeps of them, and {settings.batch_rows} rows). "
        f"{advice}; lower it or batch_rows{fewer}, free the GPU of other programs, or take another"
    )


def _largest_d_sae(
    settings: TrainSettings, widths: Sequence[tuple[int, int]], n_bytes: float, count: Callable[..., int]
) -> int:
    """Return the largest d_sae of which a run takes at most ``n_bytes``, which grow linearly with it."""
    sizes = (1 << 12, 1 << 13)
    small, large = (count(settings.model_copy(update={"d_sae": size}), widths) for size in sizes)
    per_feature = (large - small) / (sizes[1] - sizes[0])
    return int(sizes[0] + (n_bytes - small) / per_feature)


def step_seconds(
    settings: TrainSettings, d_in: int, d_out: int, *, device: torch.device, precision: Precision, n_steps: int = 3
) -> float:
    """Return the median seconds of a step on random rows, after one that is not counted.

    Features that have no fixed number active fire on half of random rows, so for those it is more than training takes.
    """
    transcoder = settings.architecture.build(d_in, d_out, settings.n_features(d_in))
    objective = build_objective(settings.reconstruction, float(d_out))
    transcoder.activation_unit = objective.activation_unit
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = (torch.randn(settings.batch_rows, width, generator=generator) for width in (d_in, d_out))
    initialise(transcoder, mean_in=torch.zeros(d_in), mean_out=torch.zeros(d_out))
    transcoder = transcoder.to(device)
    batch = Batch(inputs.to(device), outputs.to(device))
    kernel = build_kernel(settings.kernel, precision, device, name="timing", fused=takes_pairs(settings, None))
    optimiser = build_optimiser(
        settings.optimiser,
        transcoder,
        lr=settings.lr,
        clip=settings.gradient_clip,
        gradients=getattr(kernel, "gradients", None),
    )
    seconds = []
    for step in range(n_steps + 1):
        started = time.perf_counter()
        transcoder.begin_step(step)
        result = kernel(transcoder, batch, objective)
        optimiser.step(settings.lr)
        result.losses["loss"].item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
