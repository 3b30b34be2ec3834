"""The GPU's sparse step in several processes, its programs interpreted: together they compute what one does alone."""

from __future__ import annotations

from tests.support import interpreted  # isort: skip  (before anything that imports the programs)

import copy
import json
import logging
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from tailrace.storage.errors import SettingsError
from tailrace.training.architectures import BatchTopK, JumpReLU, ReLU, TopK
from tailrace.training.architectures.base import Transcoder
from tailrace.training.cross_layer.device import DeviceStackStep
from tailrace.training.cross_layer.stack import build_stack
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.device import choice, operators
from tailrace.training.kernels.device.choice import DeviceChoice
from tailrace.training.kernels.device.step import DeviceGradients, DeviceStep
from tailrace.training.kernels.kernel import StepKernel, StepResult
from tailrace.training.loop import build
from tailrace.training.loop.distributed import DistributedStep, Group, rows_of_rank
from tailrace.training.loop.shards import FeatureShards, ShardedStep, join, split_parameters
from tailrace.training.rows.batch_reductions import BatchReductions
from tailrace.training.rows.batches import Batch
from tests.support.sharded_runs import cut, in_threads
from tests.support.small_steps import OBJECTIVE, CountedStep, with_random_weights
from tests.training.kernels.test_device import ARCHITECTURES, D_IN, D_OUT, TOLERANCE, random_batch, single
from tests.training.loop.test_distributed import difference

assert interpreted.__doc__

D_SAE = 24
QUICK = {("topk", 2), ("batch_topk", 3)}


def found_in(transcoder: Transcoder, result: StepResult, gradients: DeviceGradients) -> dict[str, Tensor]:
    """Return gradients, losses, counts and buffers by name."""
    assert gradients.overflow is not None
    found = {"overflow": gradients.overflow, "n_active": result.n_active}
    for name, parameter in transcoder.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        if name in gradients.at_pairs:
            gradients.at_pairs[name].add_to(gradient)
        found[f"gradient.{name}"] = gradient
    assert result.per_row is not None
    found |= {f"row.{name}": value for name, value in result.per_row._asdict().items()}
    found |= {f"loss.{name}": value for name, value in result.losses.items()}
    return found | {f"buffer.{name}": value for name, value in transcoder.named_buffers()}


def of_one(whole: Transcoder, batch: Batch) -> dict[str, Tensor]:
    """Return the same of one process, by dense autograd in float64."""
    alone = copy.deepcopy(whole)
    result = DenseStep()(alone, batch, OBJECTIVE, per_row=True)
    gradients = DeviceGradients()
    gradients.overflow = torch.zeros(1, dtype=torch.int32)
    return found_in(alone, result, gradients)


def check(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    off = {name: difference(found[name].to(value.dtype), value) for name, value in wanted.items()}
    assert {name: value for name, value in off.items() if value > 10 * TOLERANCE} == {}


def on_own_features(
    whole: Transcoder, part: Transcoder, step: type[DeviceStep], batch: Batch, fused: bool, n_layers: int, group: Group
) -> dict[str, Tensor]:
    shards, kept = FeatureShards(group, n_layers), DeviceGradients(fused=fused)
    own = cut(whole, copy.deepcopy(part), shards).float()
    result = ShardedStep(step(kept), shards)(own, single(batch), OBJECTIVE, per_row=True)
    assert bool(kept.at_pairs) == fused
    return found_in(own, result, kept)


def together(pieces: list[dict[str, Tensor]], whole: Transcoder, n_layers: int) -> dict[str, Tensor]:
    """Return what processes that share the features found; what they all have must be the same to the bit."""
    split = {f"gradient.{name}": len(whole.get_parameter(name)) for name in split_parameters(whole)}
    found = {}
    for name, first in pieces[0].items():
        own = [piece[name] for piece in pieces]
        if name in split:
            found[name] = join(own, n_layers if split[name] == whole.d_sae else 1)
        else:
            assert all(torch.equal(first, other) for other in own), name
            found[name] = first
    return found


def cases(*sizes: int) -> list[Any]:
    return [
        pytest.param(name, size, marks=() if (name, size) in QUICK else pytest.mark.slow)
        for name in ARCHITECTURES
        for size in sizes
    ]


@pytest.mark.parametrize(("name", "size"), cases(2, 4))
def test_slices_of_the_features_select_what_one_process_does(name: str, size: int) -> None:
    architecture = ARCHITECTURES[name]
    whole = with_random_weights(architecture.build(D_IN, D_OUT, D_SAE))
    part = architecture.build(D_IN, D_OUT, D_SAE // size).double()
    fused = name != "relu"
    work = partial(on_own_features, whole, part, DeviceStep, random_batch(), fused, 1)
    check(together(in_threads(size, work), whole, 1), of_one(whole, random_batch()))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [BatchTopK(k=3), JumpReLU(l0=0.1, bandwidth=0.4)])
def test_slices_of_the_features_of_several_layers_do(architecture: Any) -> None:
    whole = with_random_weights(build_stack(architecture, 3, 8, 6, 10))
    part, batch = build_stack(architecture, 3, 8, 6, 5).double(), random_batch(24, 18)
    pieces = in_threads(2, partial(on_own_features, whole, part, DeviceStackStep, batch, True, 3))
    check(together(pieces, whole, 3), of_one(whole, batch))


def on_own_rows(whole: Transcoder, batch: Batch, group: Group) -> dict[str, Tensor]:
    rows = rows_of_rank(len(batch.inputs), group.rank, group.size)
    kept, own = DeviceGradients(), copy.deepcopy(whole).float()
    part = single(Batch(batch.inputs[rows], batch.outputs[rows]))
    result = DistributedStep(DeviceStep(kept), group)(own, part, OBJECTIVE, per_row=True)
    return found_in(own, result, kept)


@pytest.mark.parametrize(("name", "size"), cases(3))
def test_slices_of_the_rows_do(name: str, size: int) -> None:
    whole = with_random_weights(ARCHITECTURES[name].build(D_IN, D_OUT, D_SAE))
    for found in in_threads(size, partial(on_own_rows, whole, random_batch())):
        check(found, of_one(whole, random_batch()))


def test_a_large_dictionary_is_searched_by_groups_of_features_in_all_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searched = Mock(side_effect=operators.maxima_of_rows)
    monkeypatch.setattr(operators, "maxima_of_rows", searched)
    whole = with_random_weights(BatchTopK(k=1).build(D_IN, D_OUT, 64))
    part = BatchTopK(k=1).build(D_IN, D_OUT, 32).double()
    pieces = in_threads(2, partial(on_own_features, whole, part, DeviceStep, random_batch(), True, 1))
    check(together(pieces, whole, 1), of_one(whole, random_batch()))
    rows = in_threads(2, partial(on_own_rows, whole, random_batch()))
    check(rows[0], of_one(whole, random_batch()))
    assert searched.call_count == 4


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [TopK(k=2), BatchTopK(k=2)])
def test_of_equal_numbers_as_many_are_taken_as_in_one_process(architecture: Any) -> None:
    whole = with_random_weights(architecture.build(D_IN, D_OUT, D_SAE))
    with torch.no_grad():  # features 0 to 5 are those of 12 to 17, in the other process
        for name in ("W_enc", "b_enc"):
            values = whole.get_parameter(name)
            values[12:18] = values[:6]
    batch = random_batch()
    batch.inputs[5:] = batch.inputs[1]
    part = architecture.build(D_IN, D_OUT, D_SAE // 2).double()
    pieces = in_threads(2, partial(on_own_features, whole, part, DeviceStep, batch, False, 1))
    assert int(pieces[0]["n_active"].sum()) == int(of_one(whole, batch)["n_active"].sum()) > 0
    by_rows = in_threads(2, partial(on_own_rows, whole, batch))
    alone, kept = copy.deepcopy(whole).float(), DeviceGradients()
    found = DeviceStep(kept)(alone, single(batch), OBJECTIVE, per_row=True)
    check(by_rows[0], found_in(alone, found, kept))  # the first of equal ones


def without_room(whole: Transcoder, part: Transcoder, group: Group) -> dict[str, Tensor]:
    shards, kept = FeatureShards(group), DeviceGradients()
    step = DeviceStep(kept)
    step.n_slots = None if group.is_first else 1
    own = cut(whole, copy.deepcopy(part), shards).float()
    return found_in(own, ShardedStep(step, shards)(own, single(random_batch()), OBJECTIVE, per_row=True), kept)


def test_where_one_process_has_no_room_for_its_pairs_none_takes_the_step() -> None:
    whole = with_random_weights(TopK(k=2).build(D_IN, D_OUT, D_SAE))
    part = TopK(k=2).build(D_IN, D_OUT, D_SAE // 2).double()
    for found in in_threads(2, partial(without_room, whole, part)):
        assert int(found["overflow"]) > 0
        assert not any(found[f"gradient.{name}"].any() for name, _ in whole.named_parameters())


def chosen(times: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Return what two processes choose that take so many microseconds for a sparse and for a dense step."""
    monkeypatch.setattr(choice, "largest_error", lambda *_: 0.0)
    whole = with_random_weights(TopK(k=1).build(D_IN, D_OUT, 60))
    part = TopK(k=1).build(D_IN, D_OUT, 30).double()

    def work(group: Group) -> str | None:
        shards, measured = FeatureShards(group), iter(times[group.rank])
        monkeypatch.setattr(choice, "_microseconds", lambda *_: next(measured))
        step = CountedStep(DeviceGradients())
        kernel: StepKernel = DeviceChoice(step, "float32", name="t")
        ShardedStep(kernel, shards)(cut(whole, copy.deepcopy(part), shards).float(), single(random_batch()), OBJECTIVE)
        assert isinstance(kernel, DeviceChoice)
        return kernel.choice

    return in_threads(2, work)


class Part(BatchReductions):
    """The reductions of one of ``n`` processes which all have the same."""

    def __init__(self, n: int, *, features: bool) -> None:
        self._n, self._features = n, features

    def n_rows(self, own: int) -> int:
        return own if self._features else own * self._n

    def n_features(self, own: int) -> int:
        return own * self._n if self._features else own

    def total(self, counts: Tensor) -> Tensor:
        return counts if self._features else counts * self._n

    def over_features(self, own: Tensor) -> Tensor:
        return own * self._n if self._features else own


@pytest.mark.parametrize("features", [True, False])
def test_dense_steps_of_a_share_find_no_room_too_small(features: bool, caplog: pytest.LogCaptureFixture) -> None:
    whole = with_random_weights(ReLU(l1=0.1).build(D_IN, D_OUT, D_SAE)).float()  # half of the features fire
    kernel = DeviceChoice(CountedStep(), "float32", name="run")
    with caplog.at_level(logging.WARNING):
        for _ in range(6):
            kernel(whole, single(random_batch()), OBJECTIVE, reductions=Part(4, features=features))
    assert kernel.is_sparse is False
    assert not caplog.records


@pytest.mark.parametrize("features", [True, False])
def test_a_run_that_goes_on_in_fewer_processes_has_room_for_what_they_had_together(features: bool) -> None:
    whole = with_random_weights(TopK(k=2).build(D_IN, D_OUT, D_SAE)).float()
    batch = single(random_batch())
    step = CountedStep()
    step.n_wanted = 30
    kernel = DeviceChoice(step, "float32", name="run", prove=False)
    for _ in range(4):
        kernel(whole, batch, OBJECTIVE, reductions=Part(4, features=features))
    assert step.n_slots == 64
    state = json.loads(json.dumps(kernel.state()))
    for n, room in ((1, 4 * 64), (2, 2 * 64), (4, 64)):
        step = CountedStep()
        step.n_wanted = 30 * 4 // n
        resumed = DeviceChoice(step, "float32", name="run", prove=False)
        resumed.load_state(state)
        assert json.loads(json.dumps(resumed.state())) == state  # before a step, too
        if n == 4:
            resumed(whole, batch, OBJECTIVE, reductions=Part(4, features=features))
            assert step.n_slots == room
            assert json.loads(json.dumps(resumed.state()))["n_slots"] == state["n_slots"]
        else:
            resumed._take_share(1 / n)
            assert step.n_slots == room


class Missing(Part):
    """A group as ``kernel_of_all`` asks it."""

    size, rank = 2, 0

    def add_up(self, values: Tensor) -> Tensor:
        return values + 1  # the other process lacks it


@pytest.mark.parametrize("kind", ["auto", "sparse"])
def test_processes_of_which_one_has_no_sparse_step_are_all_dense(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "missing_for_sparse", lambda device: None)
    group: Any = Missing(2, features=True)
    if kind == "auto":
        assert build.kernel_of_all(kind, torch.device("cuda", 0), group) == "dense"
    else:
        with pytest.raises(SettingsError, match="kernel: sparse: 1 of 2 processes cannot take the sparse step"):
            build.kernel_of_all(kind, torch.device("cuda", 0), group)
    assert build.kernel_of_all(kind, torch.device("cpu"), group) == kind


@pytest.mark.parametrize(
    ("times", "wanted"), [([[1, 2], [3, 5]], "sparse"), ([[1, 2], [9, 5]], "dense"), ([[1, 9], [6, 5]], "sparse")]
)
def test_processes_that_share_the_features_choose_alike(
    times: list[list[int]], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen(times, monkeypatch) == [wanted, wanted]
