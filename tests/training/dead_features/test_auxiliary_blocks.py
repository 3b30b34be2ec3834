"""Losses for dead features with many of them: rows go in blocks, or at chosen pairs, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tailrace.training.architectures import TopK
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.objectives import VarianceObjective
from tailrace.training.dead_features.auxiliary import Auxiliary, AuxK, Ghost
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.sparse import SparseStep
from tailrace.training.rows.batches import Batch
from tests.training.architectures.test_architectures import random_tensor, random_transcoder
from tests.training.dead_features.test_auxiliary_losses import build, record, trace_of

N_ROWS, D_IN, D_OUT, D_SAE = 101, 6, 5, 64
DEAD = [*range(0, D_SAE, 3), 1, 2]
OBJECTIVE = VarianceObjective(2.0)
MATRIX_PRODUCTS = 10**9
"""As ``PAIRS_ABOVE``: never at pairs."""

KINDS: list[Auxiliary] = [Ghost(), Ghost(ghost_rescale="elementwise"), AuxK(aux_k=2), AuxK(aux_k=2 * len(DEAD))]


def problem(dtype: torch.dtype) -> tuple[Transcoder, Batch]:
    transcoder = random_transcoder(TopK(k=3, input_bias=True), D_IN, D_OUT, D_SAE).to(dtype)
    return transcoder, Batch(random_tensor(1, N_ROWS, D_IN).to(dtype), random_tensor(2, N_ROWS, D_OUT).to(dtype))


@contextmanager
def computed(
    monkeypatch: pytest.MonkeyPatch, *, rows_per_block: int = N_ROWS, element_size: int = 8, pairs_above: int
) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(
            "tailrace.training.dead_features.auxiliary.term.BLOCK_BYTES", rows_per_block * len(DEAD) * element_size
        )
        patch.setattr("tailrace.training.dead_features.auxiliary.auxk.PAIRS_ABOVE", pairs_above)
        yield


def term_and_gradients(auxiliary: Auxiliary, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    transcoder, batch = problem(dtype)
    trace = trace_of(transcoder, batch, OBJECTIVE)
    (term,) = build(auxiliary, record(D_SAE, DEAD), OBJECTIVE)(transcoder, batch, trace).values()
    term.backward()
    return float(term.detach()), {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in transcoder.named_parameters()
    }


def assert_same(found: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]], within: float) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=within)
    for name, gradient in wanted[1].items():
        assert float((found[1][name] - gradient).norm()) <= within * float(gradient.norm()), name
    assert float(wanted[1]["W_enc"].norm()) > 0


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("auxiliary", KINDS, ids=str)
@pytest.mark.parametrize("rows_per_block", [1, 7, 100])
def test_blocks_of_rows_give_the_term_and_gradients_of_all_rows_at_once(
    monkeypatch: pytest.MonkeyPatch, auxiliary: Auxiliary, dtype: torch.dtype, within: float, rows_per_block: int
) -> None:
    with computed(monkeypatch, pairs_above=MATRIX_PRODUCTS):
        wanted = term_and_gradients(auxiliary, dtype)
    size = dtype.itemsize
    with computed(monkeypatch, rows_per_block=rows_per_block, element_size=size, pairs_above=MATRIX_PRODUCTS):
        found = term_and_gradients(auxiliary, dtype)
    # elementwise divides by errors, which makes rounding ten times as large where one is near zero
    is_elementwise = getattr(auxiliary, "ghost_rescale", "") == "elementwise"
    assert_same(found, wanted, within * (10 if is_elementwise else 1))


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("rows_per_block", [7, N_ROWS])
def test_chosen_pairs_give_the_term_and_gradients_of_matrix_products(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, within: float, k: int, rows_per_block: int
) -> None:
    with computed(monkeypatch, pairs_above=MATRIX_PRODUCTS):
        wanted = term_and_gradients(AuxK(aux_k=k), dtype)
    with computed(monkeypatch, rows_per_block=rows_per_block, element_size=dtype.itemsize, pairs_above=0):
        found = term_and_gradients(AuxK(aux_k=k), dtype)
    assert_same(found, wanted, within)


@pytest.mark.parametrize("kernel", [DenseStep, SparseStep])
def test_steps_with_chosen_pairs_are_those_with_matrix_products(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    gradients = []
    for pairs_above in (MATRIX_PRODUCTS, 0):
        transcoder, batch = problem(torch.float64)
        step = kernel()
        with computed(monkeypatch, pairs_above=pairs_above):
            loss = build(AuxK(aux_k=3), record(D_SAE, DEAD), OBJECTIVE)
            for _ in range(2):  # the second time there are gradients of the step before
                result = step(transcoder, batch, OBJECTIVE, [loss])
        assert "auxk" in result.losses
        gradients.append({name: value.grad for name, value in transcoder.named_parameters()})
    for name, wanted in gradients[0].items():
        found = gradients[1][name]
        assert wanted is not None
        assert found is not None
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14), name


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements of any tensor that an operation gives."""

    n_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        self.n_elements = max(self.n_elements, *sizes, 0)
        return given


@pytest.mark.parametrize("auxiliary", [Ghost(), AuxK(aux_k=2), AuxK(aux_k=len(DEAD) - 1)], ids=str)
def test_no_tensor_of_all_rows_and_dead_features_exists_forwards_or_backwards(
    monkeypatch: pytest.MonkeyPatch, auxiliary: Auxiliary
) -> None:
    transcoder, batch = problem(torch.float64)
    trace = trace_of(transcoder, batch, OBJECTIVE)
    loss = build(auxiliary, record(D_SAE, DEAD), OBJECTIVE)
    largest = {}
    for rows_per_block in (7, N_ROWS):
        with computed(monkeypatch, rows_per_block=rows_per_block, pairs_above=3), LargestTensor() as seen:
            loss(transcoder, batch, trace)[loss.name].backward()  # type: ignore[attr-defined]
        largest[rows_per_block] = seen.n_elements
    assert largest[N_ROWS] == N_ROWS * len(DEAD)
    # what is left is as large as the batch itself, or its gradient
    assert largest[7] <= N_ROWS * D_IN
