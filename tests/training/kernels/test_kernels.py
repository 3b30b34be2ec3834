"""The sparse step computes what the dense one does; the blocked optimiser what torch's does."""

from __future__ import annotations

import copy
import importlib.util
import math
import pickle
import subprocess
import sys
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor

from tailrace.storage.errors import SettingsError
from tailrace.training.architectures import BatchTopK, ReLU, TopK
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.entries import Above, LargestOfBatch, LargestPerRow, Selection, restrict
from tailrace.training.architectures.objectives import VarianceObjective
from tailrace.training.cross_layer.sparse import build_stack_kernel
from tailrace.training.kernels.adaptive import AdaptiveStep, build_kernel
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.kernel import Precision
from tailrace.training.kernels.loops import kth_smallest
from tailrace.training.kernels.select import Selector, round_rows
from tailrace.training.kernels.sparse import SparseStep
from tailrace.training.loop.optim import BlockedAdam, Optimiser, TorchOptimiser, build_optimiser
from tailrace.training.loop.weight_average import WeightAverage
from tailrace.training.rows.batches import Batch
from tests.support.paths import ROOT
from tests.support.random_steps import (
    ARCHITECTURES,
    D_SAE,
    ROWS,
    cast,
    random_batch,
    random_transcoder,
)


def relative_error(found: Tensor | None, wanted: Tensor | None) -> float:
    assert found is not None
    assert wanted is not None
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [
        (torch.float64, "float32", 1e-13),
        (torch.float32, "float32", 2e-6),  # sums of 700 float32 products, far from the 5e-2 of bfloat16 products
        (torch.float32, "bfloat16", 2e-6),
    ],
    ids=["float64", "float32", "screened in bfloat16"],
)
def test_sparse_step_agrees_with_dense_autograd_in_float64(
    name: str, dtype: torch.dtype, precision: Precision, tolerance: float
) -> None:
    reference = random_transcoder(ARCHITECTURES[name])
    sparse = copy.deepcopy(reference).to(dtype)
    batch, objective = random_batch(), VarianceObjective(20.0)
    wanted = DenseStep()(reference, batch, objective)
    kernel = SparseStep(precision)
    for _ in range(2):  # the second time its memory is used again
        found = kernel(sparse, cast(batch, dtype), objective)
    assert torch.equal(found.n_active, wanted.n_active)
    assert relative_error(found.outputs, wanted.outputs) < tolerance
    for term, value in wanted.losses.items():
        assert float(found.losses[term]) == pytest.approx(float(value), rel=10 * tolerance), term
    for (parameter, mine), theirs in zip(sparse.named_parameters(), reference.parameters(), strict=True):
        assert relative_error(mine.grad, theirs.grad) < tolerance, parameter


@pytest.mark.slow  # compiles C++
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("name", ["relu", "batch_topk"])
def test_compiled_step_agrees_with_the_plain_one(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # torch.compile would compile the checks too
    reference = random_transcoder(ARCHITECTURES[name]).float()
    compiled = copy.deepcopy(reference)
    batch = cast(random_batch(), torch.float32)
    wanted = DenseStep()(reference, batch, VarianceObjective(20.0))
    found = DenseStep(compiled=True)(compiled, batch, VarianceObjective(20.0))
    assert torch.equal(found.n_active, wanted.n_active)
    for mine, theirs in zip(compiled.parameters(), reference.parameters(), strict=True):
        assert relative_error(mine.grad, theirs.grad) < 2e-6  # rounding in another order


SELECTIONS: dict[str, Selection] = {
    "above zero": Above(),
    "above floors": Above(torch.linspace(-1, 2, D_SAE, dtype=torch.float64)),
    "per row": LargestPerRow(7),
    "of batch": LargestOfBatch(7),
}


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("outliers", [False, True], ids=["", "outlier dimensions"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_screening_in_bfloat16_misses_nothing_at_any_scale(selection: str, outliers: bool, scale: float) -> None:
    chosen = SELECTIONS[selection]
    transcoder = random_transcoder(TopK(k=7))
    inputs = random_batch(scale).inputs
    if outliers:
        inputs[:, 3] *= 50
        inputs[::17] *= 20
    inputs, weights, bias = inputs.float(), transcoder.W_enc.detach().float(), transcoder.b_enc.detach().float()
    floors = chosen.floor if isinstance(chosen, Above) else None
    as_float = Above(floors.float()) if floors is not None else chosen
    pairs, pre = Selector(torch.bfloat16).select(inputs, weights, bias, as_float)
    dense = inputs.double() @ weights.double().T + bias.double()
    wanted = dense > (0 if floors is None else floors) if isinstance(chosen, Above) else restrict(dense, chosen) > 0
    found = torch.zeros_like(dense, dtype=torch.bool)
    found[torch.from_numpy(pairs.rows), torch.from_numpy(pairs.features)] = True
    # float32 and float64 may disagree about numbers within rounding of the edge
    doubtful = (dense.abs() + inputs.double().norm(dim=1, keepdim=True) * weights.double().norm(dim=1)) * 1e-6
    edge = torch.where(wanted, dense, torch.inf).min() if not isinstance(chosen, Above) else torch.zeros(())
    if isinstance(chosen, LargestPerRow):
        edge = torch.where(wanted, dense, torch.inf).min(dim=1, keepdim=True).values
    if floors is not None:
        edge = floors
    differ = (found != wanted) & ((dense - edge).abs() > doubtful)
    assert not bool(differ.any())
    exact = dense[torch.from_numpy(pairs.rows), torch.from_numpy(pairs.features)]
    assert torch.allclose(pre.double(), exact, rtol=1e-4, atol=float(doubtful.max()))


@pytest.mark.parametrize("n", [1, 2, 3, 64, 1001])
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "sorted", "with NaN"])
def test_the_kth_smallest_is_that_of_sorted_values(n: int, kind: str) -> None:
    values = np.random.Generator(np.random.Philox(n)).standard_normal(n).astype(np.float32)
    values = {"ties": np.round(values), "equal": np.ones_like(values), "sorted": np.sort(values)}.get(kind, values)
    if kind == "with NaN":  # of a run that diverged: any value will do, but it ends
        values[:: max(1, n // 7)] = np.nan
        kth_smallest(values, n // 2)
        return
    found = [kth_smallest(values.copy(), k) for k in range(0, n, 1 + n // 50)]
    assert np.array_equal(found, np.sort(values)[:: 1 + n // 50])


def test_a_row_without_a_positive_pre_activation_has_no_pair() -> None:
    pairs, pre = Selector(torch.float32).select(
        torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0], [1.0]]), torch.zeros(2), LargestPerRow(1)
    )
    assert (pairs.rows.tolist(), pairs.features.tolist(), pre.tolist()) == ([0], [0], [2.0])


def test_batch_selection_recovers_when_its_guess_from_the_last_batch_is_far_too_high() -> None:
    transcoder = random_transcoder(BatchTopK(k=5)).float()
    selector = Selector(torch.bfloat16)
    arguments = (transcoder.W_enc.detach(), transcoder.b_enc.detach(), LargestOfBatch(5))
    selector.select(random_batch(100.0).inputs.float(), *arguments)
    inputs = random_batch().inputs.float()
    found, _ = selector.select(inputs, *arguments)
    fresh, _ = Selector(torch.bfloat16).select(inputs, *arguments)
    assert len(found) == 5 * ROWS
    assert np.array_equal(found.features, fresh.features)


def test_adaptive_step_goes_sparse_when_few_features_fire_and_back() -> None:
    transcoder = random_transcoder(ReLU(l1=0.1)).float()
    batch, step = cast(random_batch(), torch.float32), AdaptiveStep("float32")
    taken = []
    for shift in (0, -6, 6):
        with torch.no_grad():
            transcoder.b_enc.add_(shift)
        step(transcoder, batch, VarianceObjective(20.0))
        taken.append(step.is_sparse)
    assert taken == [False, True, False]
    assert AdaptiveStep("float32").state() == {"is_sparse": None}


def test_a_nan_makes_the_loss_of_the_adaptive_step_nan() -> None:
    transcoder = random_transcoder(TopK(k=2)).float()
    batch = cast(random_batch(), torch.float32)
    batch.inputs[5, 3] = math.nan
    losses = AdaptiveStep("float32")(transcoder, batch, VarianceObjective(20.0)).losses
    assert math.isnan(float(losses["loss"]))


@pytest.mark.parametrize("clip", [None, 1e-3], ids=["", "clipped"])
def test_blocked_adam_takes_the_steps_of_torch_adam(clip: float | None) -> None:
    blocked = random_transcoder(ReLU(l1=0.1))
    plain = copy.deepcopy(blocked)
    optimisers: list[Optimiser] = [
        BlockedAdam(blocked, clip=clip),
        TorchOptimiser(plain, [torch.optim.Adam(plain.parameters(), lr=0.1)], clip=clip),
    ]
    for step in range(3):
        for transcoder, optimiser in zip((blocked, plain), optimisers, strict=True):
            DenseStep()(transcoder, random_batch(), VarianceObjective(20.0))
            optimiser.step(0.01 / (step + 1))
    for (name, mine), theirs in zip(blocked.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12), name
    assert torch.allclose(torch.linalg.vector_norm(blocked.W_dec, dim=1), torch.ones(D_SAE).double())


def test_clipping_scales_the_whole_gradient_to_its_bound() -> None:
    transcoder = random_transcoder(TopK(k=2))
    before = {name: value.detach().clone() for name, value in transcoder.named_parameters()}
    DenseStep()(transcoder, random_batch(), VarianceObjective(20.0))
    optimiser = TorchOptimiser(transcoder, [torch.optim.SGD(transcoder.parameters(), lr=1.0)], clip=1e-3)
    optimiser.step(1.0)
    moved = torch.cat([(value.detach() - before[name]).flatten() for name, value in transcoder.named_parameters()])
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("kind", ["adam", "adamw", "muon"])
def test_an_optimiser_that_is_saved_and_loaded_goes_on_as_if_it_had_not_been(kind: Any) -> None:
    transcoder = random_transcoder(TopK(k=2)).float()
    batch = cast(random_batch(), torch.float32)

    def step(module: Transcoder, optimiser: Optimiser) -> None:
        DenseStep()(module, batch, VarianceObjective(20.0))
        optimiser.step(1e-3)

    optimiser = build_optimiser(kind, transcoder, lr=1e-3, clip=None)
    step(transcoder, optimiser)
    again = copy.deepcopy(transcoder)
    restored = build_optimiser(kind, again, lr=1e-3, clip=None)
    restored.load_state({name: value.clone() for name, value in optimiser.state_tensors().items()})
    step(transcoder, optimiser)
    step(again, restored)
    assert all(torch.equal(*pair) for pair in zip(transcoder.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_forgotten_features_lose_their_moments_and_others_keep_them(kind: Any) -> None:
    transcoder = random_transcoder(ReLU(l1=0.1)).float()
    optimiser = build_optimiser(kind, transcoder, lr=1e-3, clip=None)
    DenseStep()(transcoder, cast(random_batch(), torch.float32), VarianceObjective(20.0))
    optimiser.step(1e-3)
    before = {name: value.clone() for name, value in optimiser.state_tensors().items()}
    optimiser.forget(torch.tensor([2, 7]))
    for name, value in optimiser.state_tensors().items():
        if value.ndim and len(value) == D_SAE:
            others = torch.ones(D_SAE, dtype=torch.bool)
            others[[2, 7]] = False
            assert not bool(value[[2, 7]].any()), name
            assert torch.equal(value[others], before[name][others]), name
        else:
            assert torch.equal(value, before[name]), name


def test_weight_average_is_the_plain_mean_at_first_and_then_forgets() -> None:
    transcoder = TopK(k=1).build(1, 1, 1)
    average = WeightAverage(transcoder, decay=0.75)
    seen = []
    for value in (1.0, 3.0, 5.0, 7.0, 9.0):
        with torch.no_grad():
            transcoder.b_enc.fill_(value)
        average.update()
        seen.append(float(average.transcoder.b_enc))
    # 1, (1+3)/2, (1+3+5)/3, (1+3+5+7)/4, then a quarter of the newest
    assert seen == pytest.approx([1.0, 2.0, 3.0, 4.0, 0.75 * 4.0 + 0.25 * 9.0])


def test_rounding_rows_is_torchs_and_measures_what_it_takes() -> None:
    rows = torch.randn(40, 33, generator=torch.Generator().manual_seed(0))
    rows[0, :4] = torch.tensor([1.00390625, 1.01171875, -1e-40, 0.0])  # two ties, a subnormal
    out = torch.empty_like(rows, dtype=torch.bfloat16)
    rounded = round_rows(rows, out)
    assert torch.equal(rounded.values, rows.bfloat16())
    torch.testing.assert_close(rounded.norms, rows.norm(dim=1))
    torch.testing.assert_close(rounded.lost, (rows - rows.bfloat16().float()).norm(dim=1))


@pytest.mark.parametrize(("inputs", "outputs"), [((2, 3, 8), (2, 3, 4)), ((6, 8), (5, 4)), ((8,), (4,))])
def test_what_is_not_rows_is_no_batch(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
    """Of (contexts, positions, width), an L1 penalty counted positions times over."""
    with pytest.raises(ValueError, match="flatten contexts and positions into rows"):
        Batch(torch.zeros(inputs), torch.zeros(outputs))
    both = Batch(torch.zeros(6, 8), torch.ones(6, 4))
    assert [tuple(side.shape) for side in both] == [(6, 8), (6, 4)]
    assert pickle.loads(pickle.dumps(both)).outputs.sum() == 24


@pytest.mark.parametrize("build", [build_kernel, build_stack_kernel])
def test_the_sparse_kernel_is_refused_where_it_cannot_compute(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="runs on CPUs and CUDA GPUs, and the device is meta"):
        build("sparse", "float32", torch.device("meta"), name="run")

    def broken(name: str) -> None:
        raise ImportError(f"{name}: undefined symbol")

    with monkeypatch.context() as patched:
        patched.setattr(importlib, "import_module", broken)
        with pytest.raises(SettingsError, match=r"cannot be imported \(ImportError: .* undefined symbol\)"):
            build("sparse", "float32", torch.device("cuda"), name="run")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"kernel: sparse: .* not installed"):
        build("sparse", "float32", torch.device("cuda"), name="run")
    assert isinstance(build("auto", "float32", torch.device("cuda"), name="run"), DenseStep)


COMPILED_STEPS = """
import torch
from tailrace.training.architectures import BatchTopK, TopK
from tailrace.training.architectures.objectives import VarianceObjective
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.rows.batches import Batch

compiled = torch.compile
torch.compile = lambda function: compiled(function, backend="eager")  # to count graphs, in a second
for kind in (TopK, BatchTopK):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    transcoder = kind(k=4, k_start=32, k_warmup_steps=30).build(8, 8, 64)
    step, ks = DenseStep(compiled=True), set()
    for index in range(0, 40, 3):
        transcoder.begin_step(index)
        ks.add(transcoder.selection().k)
        step(transcoder, Batch(torch.randn(16, 8), torch.randn(16, 8)), VarianceObjective(8.0))
    assert len(ks) > 8, ks  # torch's limit, past which it would not compile at all
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, kind  # the first k, and any other
"""


@pytest.mark.slow
def test_a_compiled_step_is_not_compiled_anew_for_every_k() -> None:
    # in a process of its own: the shape checks of this one cannot be compiled
    done = subprocess.run([sys.executable, "-c", COMPILED_STEPS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
