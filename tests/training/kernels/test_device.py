"""The GPU's sparse step, its programs interpreted here, computes what dense autograd does in float64."""

from __future__ import annotations

from tests.support import interpreted  # isort: skip  (before anything that imports the programs)

import copy
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from benchmarks.gpu_step import count
from tailrace.training.architectures import Architecture, BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.entries import Above, LargestOfBatch, LargestPerRow, Selection
from tailrace.training.cross_layer.device import DeviceStackStep
from tailrace.training.cross_layer.stack import build_stack
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.device import operators
from tailrace.training.kernels.device.adam import BETAS, EPSILON, DeviceAdam
from tailrace.training.kernels.device.graph import CapturedStep
from tailrace.training.kernels.device.proof import largest_error
from tailrace.training.kernels.device.step import DeviceGradients, DeviceStep, slots_for
from tailrace.training.kernels.device.traffic import TRAFFIC, Sizes
from tailrace.training.kernels.select import Selector
from tailrace.training.loop import optim
from tailrace.training.loop.optim import BlockedAdam, build_optimiser
from tailrace.training.rows.batches import Batch
from tests.support.paths import ROOT
from tests.support.small_steps import OBJECTIVE, CountedStep, generator, small_step, with_random_weights

assert interpreted.__doc__

D_IN, D_OUT, D_SAE, ROWS = 7, 5, 19, 7
TOLERANCE = 2e-6
"""Sums of float32 products; bfloat16 ones would be off by 5e-2."""

ARCHITECTURES: dict[str, Architecture] = {
    "topk": TopK(k=2),
    "relu": ReLU(l1=0.3, input_bias=True),
    "relu-tanh-skip": ReLU(l1=0.3, tanh_scale=2.0, skip=True, input_bias=False),
    "topk-as-many-as-there-are": TopK(k=25),
    "batch_topk": BatchTopK(k=3),
    "batch_topk-nearly-all": BatchTopK(k=16),
    "jumprelu": JumpReLU(l0=0.1, bandwidth=0.4),
    "jumprelu-target": JumpReLU(l0=0.1, target_l0=5.0, bandwidth=0.4, skip=True),
    "gated": Gated(l1=0.2, input_bias=True),
    "matryoshka": Matryoshka(k=3, levels=3),
}
QUICK = "topk"


def random_batch(d_in: int = D_IN, d_out: int = D_OUT) -> Batch:
    inputs = torch.randn(ROWS, d_in, dtype=torch.float64, generator=generator(60))
    inputs[3], inputs[4] = 0, 30 * inputs[4]
    return Batch(inputs, torch.randn(ROWS, d_out, dtype=torch.float64, generator=generator(61)))


def single(batch: Batch) -> Batch:
    return Batch(batch.inputs.float(), batch.outputs.float())


def relative_error(found: Tensor | None, wanted: Tensor | None) -> float:
    assert found is not None
    assert wanted is not None
    return float((found.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


def check_steps(reference: Transcoder, step: DeviceStep, batch: Batch, n_steps: int = 2) -> None:
    """Take some steps by dense autograd in float64 and BlockedAdam, and the same by a GPU's step and optimiser."""
    mine = copy.deepcopy(reference).float()
    step.gradients.trusted = True
    optimisers = (BlockedAdam(reference), DeviceAdam(mine, step.gradients))
    for _ in range(n_steps):
        wanted = DenseStep()(reference, batch, OBJECTIVE, per_row=True)
        found = step(mine, single(batch), OBJECTIVE, per_row=True)
        assert step.gradients.overflow is not None
        assert not int(step.gradients.overflow)
        assert torch.equal(found.n_active, wanted.n_active)
        assert relative_error(found.outputs, wanted.outputs) < TOLERANCE
        for term, value in wanted.losses.items():
            assert float(found.losses[term]) == pytest.approx(float(value), rel=10 * TOLERANCE), term
        assert found.per_row is not None
        assert wanted.per_row is not None
        assert torch.equal(found.per_row.l0, wanted.per_row.l0)
        assert relative_error(found.per_row.l1, wanted.per_row.l1) < TOLERANCE
        for (name, parameter), theirs in zip(mine.named_parameters(), reference.parameters(), strict=True):
            assert (parameter.grad is None) == (name in step.gradients.at_pairs), name
            if parameter.grad is not None:
                assert relative_error(parameter.grad, theirs.grad) < TOLERANCE, name
        for optimiser in optimisers:
            optimiser.step(0.01)
        for (name, parameter), theirs in zip(mine.named_parameters(), reference.parameters(), strict=True):
            assert relative_error(parameter, theirs) < TOLERANCE, name
    kept, screen = step.gradients.screen.features, step.gradients.screen
    assert kept is not None
    written, screen.features = kept.clone(), None  # as the optimiser wrote it, and rounded anew
    width = mine.W_enc.shape[1]
    fresh = screen.refresh(mine.W_enc)
    for columns in (slice(0, width), slice(width + 2, width + 4)):  # between them the bias of the last step
        assert torch.equal(written[:, columns], fresh[:, columns])


CASES = [
    pytest.param(name, fused, marks=[] if name == QUICK and fused else pytest.mark.slow)
    for name in ARCHITECTURES
    for fused in (True, False)
    if fused or name in (QUICK, "gated")
]


@pytest.mark.parametrize(("name", "fused"), CASES)
def test_steps_agree_with_dense_autograd_in_float64(name: str, fused: bool) -> None:
    reference = with_random_weights(ARCHITECTURES[name].build(D_IN, D_OUT, D_SAE))
    n_steps = 2 if name == "gated" else 1
    check_steps(reference, DeviceStep(DeviceGradients(fused=fused)), random_batch(), n_steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "fused"), [(BatchTopK(k=3), True), (JumpReLU(l0=0.1, bandwidth=0.4), True), (ReLU(l1=0.3), False)]
)
def test_steps_of_several_layers_agree_with_dense_autograd_in_float64(architecture: Any, fused: bool) -> None:
    reference = with_random_weights(build_stack(architecture, 3, 8, 6, 9))
    check_steps(reference, DeviceStackStep(DeviceGradients(fused=fused)), random_batch(24, 18), 1)


@pytest.mark.slow
def test_rows_wider_than_registers_are_gone_over_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "row_block", lambda _: 4)
    reference = with_random_weights(Gated(l1=0.2, input_bias=True).build(D_IN, D_OUT, D_SAE))
    check_steps(reference, DeviceStep(DeviceGradients(fused=True)), random_batch())


SELECTIONS: dict[str, Selection] = {
    "per row": LargestPerRow(3),
    "more per row than any has": LargestPerRow(400),
    "of batch": LargestOfBatch(2),
    "more of batch than it has": LargestOfBatch(70),
    "above zero": Above(),
    "above floors": Above(torch.linspace(-2, 3, 70)),
}


@pytest.mark.slow
@pytest.mark.parametrize("selection", SELECTIONS)
def test_of_equal_numbers_the_first_are_selected_and_rows_without_a_positive_one_select_none(selection: str) -> None:
    """Weights and inputs are small integers, so that many pre-activations are equal and all are exact."""
    n_features, n_rows = 70, 9
    weights = torch.randint(-2, 3, (n_features, 5), generator=generator(1)).float()
    inputs = torch.randint(-2, 3, (n_rows, 5), generator=generator(2)).float()
    bias = torch.randint(-1, 2, (n_features,), generator=generator(3)).float()
    bias[50:] = 0  # exactly zero for a row of zeros, where nothing is positive
    weights[:, 4], inputs[2], inputs[5], inputs[7] = 1, 0, torch.tensor([0.0, 0, 0, 0, -100]), 1.0
    wanted = torch.zeros(n_rows, n_features)
    chosen = SELECTIONS[selection]
    pairs, pre = Selector(torch.float32).select(inputs, weights, bias, chosen)
    wanted[torch.from_numpy(pairs.rows), torch.from_numpy(pairs.features)] = pre
    overflow = torch.zeros(1, dtype=torch.int32)
    screen = DeviceGradients().screen
    n_slots = n_rows * n_features
    found_pairs, found_pre = screen.select(inputs[None], weights, bias, chosen, overflow, n_slots)
    found = torch.zeros(n_rows, n_features + 1)
    found[found_pairs.rows.long(), found_pairs.features.long()] = found_pre
    if isinstance(chosen, Above):  # candidates below their floor stay, and the architecture makes them zero
        found[:, :-1][inputs @ weights.T + bias <= (0 if chosen.floor is None else chosen.floor)] = 0
    assert not int(overflow)
    assert torch.equal(found[:, :-1], wanted)
    assert not found[5].any()


def test_pairs_without_room_change_no_weight() -> None:
    transcoder, step, optimiser, batch = small_step()
    step.n_slots = 4
    before = {name: value.clone() for name, value in transcoder.state_dict().items()}
    step(transcoder, batch, OBJECTIVE)
    optimiser.step(0.1)
    assert all(torch.equal(value, before[name]) for name, value in transcoder.state_dict().items())
    assert step.gradients.n_candidates is not None
    assert int(step.gradients.n_candidates) > 4


def test_pairs_without_room_change_no_weight_with_another_optimiser_either() -> None:
    transcoder, step, _, batch = small_step()
    step.gradients.fused = False
    optimiser = build_optimiser("adamw", transcoder, lr=0.1, clip=None, gradients=step.gradients)
    step(transcoder, batch, OBJECTIVE)
    optimiser.step(0.1)
    before = {name: value.clone() for name, value in transcoder.state_dict().items()}
    moments = {name: value.clone() for name, value in optimiser.state_tensors().items()}
    step.n_slots = 4
    step(transcoder, batch, OBJECTIVE)
    optimiser.step(0.1)
    for name, value in transcoder.state_dict().items():
        assert torch.allclose(value, before[name], rtol=1e-6, atol=0), name  # rows of unit norm are divided by it
    assert all(torch.equal(value, moments[name]) for name, value in optimiser.state_tensors().items())
    step.n_slots = None
    step(transcoder, batch, OBJECTIVE)
    optimiser.step(0.1)
    assert not torch.equal(transcoder.W_dec, before["W_dec"])


@pytest.mark.slow
def test_pairs_without_room_leave_no_gradient_in_memory() -> None:
    transcoder, step, _, batch = small_step()
    step.n_slots, step.gradients.fused = 4, False
    step(transcoder, batch, OBJECTIVE)
    assert all(value.grad is None or not value.grad.any() for value in transcoder.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, which interprets
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_makes_the_loss_none(value: float) -> None:
    transcoder, step, _, batch = small_step(_3=value)
    assert not torch.isfinite(step(transcoder, batch, OBJECTIVE).losses["loss"])


@pytest.mark.slow
def test_the_same_batch_gives_the_same_bits_whatever_room_there_is() -> None:
    transcoder, step, _, batch = small_step()
    step.gradients.fused = False
    gradients = []
    for n_slots in (None, 50, 60):
        step.n_slots = n_slots
        step(transcoder, batch, OBJECTIVE)
        gradients.append([value.grad for value in transcoder.parameters()])
    for first, *others in zip(*gradients, strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True], ids=["programs", "torch"])
def test_clipped_steps_are_those_of_the_cpu(plain: bool) -> None:
    transcoder, step, _, batch = small_step()
    reference = copy.deepcopy(transcoder)
    step.gradients.trusted, step.gradients.fused = not plain, False
    optimisers = (DeviceAdam(transcoder, step.gradients, clip=1e-2), BlockedAdam(reference, clip=1e-2))
    for _ in range(2):
        step(transcoder, batch, OBJECTIVE)
        DenseStep()(reference, batch, OBJECTIVE)
        for optimiser in optimisers:
            optimiser.step(0.01)
    for mine, theirs in zip(transcoder.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_the_optimiser_is_that_of_the_cpu_and_goes_on_from_torchs_state() -> None:
    assert (BETAS, EPSILON) == (optim.BETAS, optim.EPSILON)
    transcoder, step, _, _ = small_step()
    torchs = torch.optim.Adam(transcoder.parameters())
    for parameter in transcoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    torchs.step()
    plain = optim.TorchOptimiser(transcoder, [torchs])
    mine, again = DeviceAdam(transcoder, step.gradients), DeviceAdam(transcoder, step.gradients)
    mine.load_state(plain.state_tensors())
    again.load_state(mine.state_tensors())
    state = again.state_tensors()
    assert int(state["optimiser.n_steps"]) == 1
    assert torch.equal(state["optimiser.mean.W_dec"], plain.state_tensors()["optimiser.exp_avg.W_dec"])
    assert state.keys() == BlockedAdam(transcoder).state_tensors().keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["topk", "gated", "jumprelu"])
def test_the_proof_passes_right_programs_and_changes_nothing(name: str) -> None:
    transcoder = with_random_weights(ARCHITECTURES[name].build(D_IN, D_OUT, D_SAE)).float()
    before = {key: value.clone() for key, value in transcoder.state_dict().items()}
    assert largest_error(DeviceStep(), transcoder, single(random_batch()), OBJECTIVE) < 1e-5  # what a run says of it
    assert all(torch.equal(value, before[key]) for key, value in transcoder.state_dict().items())
    assert all(value.grad is None for value in transcoder.parameters())


OPERATORS = {
    "screen_vectors": (1, 0),
    "keep_of_rows": (0, 0),
    "pair_dots": (7, 1.01),
    "decode": (7, 1.01),
    "sum_features": (3, 2),
    "outer": (6, 1.01),
    "adam_rows": (0, 1.01),
}
"""Which argument is made wrong, and by what factor."""


@pytest.mark.slow
@pytest.mark.parametrize("broken", OPERATORS)
def test_the_proof_finds_any_operator_that_is_wrong(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(operators, broken)

    def wrong(*arguments: Any) -> None:
        right(*arguments)
        index, factor = OPERATORS[broken]
        arguments[index].mul_(factor)

    monkeypatch.setattr(operators, broken, wrong)
    transcoder, _, _, batch = small_step()
    assert not largest_error(DeviceStep(), transcoder, batch, OBJECTIVE) < 1e-3


def test_room_for_a_penalty_is_twice_what_is_active() -> None:
    assert slots_for(Above(), 4096, 24_576, 0.01) == 1 << 21
    assert slots_for(LargestPerRow(64), 4096, 24_576) == 1 << 20
    assert slots_for(LargestPerRow(64), 2, 100) == 200


class Recording(TorchDispatchMode):
    """A graph on a CPU: the operators that were called, called again with the same memory.

    Unlike CUDA it computes while it captures; what the host read would be in the graph for ever on either.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.n_replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert func._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero"), "the host must not wait"
        self._calls.append((func, args, kwargs or {}, [v for v in tree_leaves(result) if isinstance(v, Tensor)]))
        return result

    @contextmanager
    def capture(self) -> Iterator[None]:
        with self:
            yield

    @torch.no_grad()
    def replay(self) -> None:
        self.n_replays += 1
        for func, args, kwargs, outputs in self._calls:
            again = [value for value in tree_leaves(func(*args, **kwargs)) if isinstance(value, Tensor)]
            for kept, value in zip(outputs, again, strict=True):
                if kept.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
                    kept.data.copy_(value.reshape(kept.shape))  # whatever autograd knows of it


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", [BatchTopK(k=2, k_start=4, k_warmup_steps=2, input_bias=True), JumpReLU(l0_warmup_steps=2)]
)
def test_a_captured_step_is_the_step_bit_for_bit(architecture: Any) -> None:
    """Batches differ, weights move, and a feature is given new weights from outside; the first steps change k or l0."""
    runs: list[tuple[Transcoder, Any, DeviceAdam]] = []
    graphs: list[Recording] = []

    def build() -> Recording:
        graphs.append(Recording())
        return graphs[-1]

    for captured in (False, True):
        transcoder = with_random_weights(architecture.build(4, 3, 12)).float()
        step = DeviceStep(DeviceGradients(fused=True))
        step.gradients.trusted, step.n_slots = True, 60
        kernel = CapturedStep(step, graph=build) if captured else step
        runs.append((transcoder, kernel, DeviceAdam(transcoder, step.gradients)))
    for index in range(8):
        batch = Batch(*(torch.randn(5, width, generator=generator(10 * index + width)) for width in (4, 3)))
        losses = []
        for transcoder, kernel, optimiser in runs:
            transcoder.begin_step(index)
            result = kernel(transcoder, batch, OBJECTIVE, per_row=index == 6)
            optimiser.step(0.1 / (index + 1))
            losses.append(float(result.losses["loss"]))
            if index == 6:
                with torch.no_grad():
                    transcoder.W_enc[3] = 0.5
        assert losses[0] == losses[1]
        mine, theirs = (run[0].state_dict() for run in runs)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert len(graphs) == 1  # of the steps after the warm-up
    assert graphs[0].n_replays >= 3


def test_a_step_that_cannot_be_captured_is_taken_as_before_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    transcoder, _, _, batch = small_step()

    def refuse() -> Recording:
        raise RuntimeError("no graphs here")

    step = CountedStep(DeviceGradients(fused=True))
    step.gradients.overflow = torch.zeros(1, dtype=torch.int32)
    kernel = CapturedStep(step, name="run", graph=refuse)
    with caplog.at_level(logging.WARNING):
        losses = [float(kernel(transcoder, batch, OBJECTIVE).losses["loss"]) for _ in range(6)]
    assert len(set(losses)) == 1
    assert [record.message[:50] for record in caplog.records] == ["run: the step is launched operator by operator, be"]
    assert "no graphs here" in caplog.text


class Accesses(TorchDispatchMode):
    """Compares what each operator declares with what its programs access, operand by operand."""

    AT_MOST = ("histograms", "gradient", "taken_off")
    """Bins that are empty, and features without a pair, are left alone."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self._addresses: list[tuple[Any, int]] = []
        plain = interpreter._interpreter
        recorded = SimpleNamespace(
            load=lambda pointers, mask, *rest: self._record(
                pointers, mask, np.dtype(rest[-1]).itemsize, plain.load, *rest
            ),
            store=lambda pointers, values, mask: self._record(
                pointers, mask, values.itemsize, lambda p, m, v: plain.store(p, v, m), values
            ),
            atomic_rmw=lambda how, pointers, values, mask, order: self._record(
                pointers, mask, 2 * values.itemsize, lambda p, m: plain.atomic_rmw(how, p, values, m, order)
            ),
        )
        rest = {name: getattr(plain, name) for name in dir(plain) if not hasattr(recorded, name)}
        patch.setattr(interpreter, "_interpreter", SimpleNamespace(**rest | vars(recorded)))

    def _record(self, pointers: Any, mask: Any, size: int, access: Any, *rest: Any) -> Any:
        self._addresses += [(pointers[mask], size)]
        return access(pointers, mask, *rest)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._addresses.clear()
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("tailrace::")
        if name not in TRAFFIC:
            return result
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=True))
        operands = {key: value for key, value in named.items() if isinstance(value, Tensor)}
        if named.get("pairs"):
            operands |= dict(zip(("weights", "by_row", "rows", "order", "bounds"), named["pairs"], strict=True))
        if name == "screen_bias":
            self.n_features = len(named["bias"])
        if name == "write_pairs":
            self.n_pairs = int((named["features"] < self.n_features).sum())
        values = next(
            (operands[key] for key in ("chosen", "values", "weights", "pre") if operands.get(key) is not None), None
        )
        sizes = Sizes(getattr(self, "n_pairs", 0), 0 if values is None else int((values != 0).sum()))
        for key, declared in TRAFFIC[name](named, sizes).items():
            accessed = sum(size * self._within(operands[key], addresses) for addresses, size in self._addresses)
            assert declared.size == operands[key].nbytes
            assert accessed == declared.accessed or (key in self.AT_MOST and accessed < declared.accessed), (name, key)
        self.seen[name] += 1
        return result

    @staticmethod
    def _within(tensor: Tensor, addresses: Any) -> int:
        start = tensor.data_ptr()
        return int(((addresses >= start) & (addresses < start + tensor.nbytes)).sum())


@pytest.mark.slow
def test_operators_move_what_they_declare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every access of every program is compared, in steps of which each operator is a part."""
    seen: Counter[str] = Counter()
    for architecture, fused in ((TopK(k=2), True), (BatchTopK(k=2), False), (JumpReLU(bandwidth=0.4), True)):
        transcoder = with_random_weights(architecture.build(6, 5, 19)).float()
        step = DeviceStep(DeviceGradients(fused=fused))
        step.gradients.trusted = True
        optimiser = DeviceAdam(transcoder, step.gradients)
        with Accesses(monkeypatch) as accesses:
            step(transcoder, single(random_batch(6, 5)), OBJECTIVE, per_row=True)
            optimiser.step(0.1)
        seen += accesses.seen
    assert set(seen) == set(TRAFFIC)


SIZES = {
    (768, 24_576): (1.0, 1.4),
    (2304, 65_536): (6.5, 6.5),
    (2304, 131_072): (13.0, 11.0),
    (4096, 131_072): (21.0, 19.0),
}
"""Width and features: the GB and, of an H200 as the counter models it, the milliseconds that a step may take. An input
bias would take two more reads of the encoder."""


@pytest.mark.parametrize(
    ("size", "architecture"),
    [
        (size, architecture)
        for size in SIZES
        for architecture in (TopK(k=64), BatchTopK(k=64), JumpReLU(), ReLU(input_bias=False))
    ],
    ids=str,
)
def test_a_step_of_4096_rows_stays_within_its_budget(size: tuple[int, int], architecture: Architecture) -> None:
    gigabytes, milliseconds = SIZES[size]
    cost = count(architecture, *size)
    assert cost.peak_bytes / 1e9 <= gigabytes
    assert 1e3 * sum(cost.seconds.values()) <= milliseconds
    if size[1] == 24_576:
        assert cost.bytes_moved.total() / 1e9 <= 4.2  # 6.2 for the dense step of TopK, at least


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_program_compiles_for_gpus_and_spills_no_register(capability: int) -> None:
    """For A100, H100 and H200, and B200, as they would be launched at the widths of real models."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.compiled_programs", str(capability)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    programs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {program["program"] for program in programs} == set(TRAFFIC)
    for program in programs:
        assert program["stack"] == program["local"] == 0, program  # where spilled registers go
        assert program["registers"] <= 128, program  # so that two programs of 8 warps share a processor
        assert program["shared"] <= 16 << 10, program
