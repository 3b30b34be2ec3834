"""The counter of steps that others wrote, by a step that is counted by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu_check.peers import Step
from benchmarks.gpu_step import Counting, count_peer
from tailrace.training.kernels.device.traffic import Sizes

WIDTH, D_SAE, N_ROWS = 48, 512, 16
WEIGHTS, INPUTS, PRODUCT = 4 * WIDTH * D_SAE, 4 * N_ROWS * WIDTH, 2 * N_ROWS * D_SAE
"""Bytes, in float32, float32 and bfloat16."""


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_waits_is_counted(fused: bool) -> None:
    def make(device: str, width: int, d_sae: int, k: int) -> Step:
        weight = torch.nn.Parameter(torch.zeros(d_sae, width))
        n_chosen = torch.tensor(k)
        optimiser = torch.optim.Adam([weight], lr=1e-3, fused=fused or None)

        def step(inputs: torch.Tensor, _: torch.Tensor) -> None:
            with torch.autocast(device, dtype=torch.bfloat16):
                product = inputs @ weight.T
            loss = product.float().sum()
            assert loss.item() == 1.0
            assert n_chosen.item() == k
            assert int((weight > 0).sum()) == 0
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()

        return step

    cost = count_peer(make, WIDTH, D_SAE, N_ROWS)
    assert cost.n_waits == 3
    # weights, moments and gradients; and these in bfloat16 before, or the square roots that Adam for lists makes
    most = 4 * WEIGHTS + (WEIGHTS // 2 if fused else WEIGHTS) + PRODUCT + 2 * INPUTS
    assert 0 <= cost.peak_bytes - most <= 24  # and numbers
    adam = {"_fused_adam_": 7 * WEIGHTS + 4, "_foreach_add_": 8}  # the latter is that of the steps
    if not fused:
        times = {"lerp_": 3, "mul_": 2, "addcmul_": 3, "sqrt": 2, "div_": 2, "add_": 2, "addcdiv_": 4}
        adam = {f"_foreach_{name}": n * WEIGHTS for name, n in times.items()}
    n_copied = 3 * INPUTS // 2 + 3 * WEIGHTS // 2 + 3 * PRODUCT + 3 * PRODUCT + 3 * WEIGHTS // 2
    assert {name.removeprefix("aten::"): n for name, n in cost.bytes_moved.items()} == {
        "_to_copy": n_copied,  # inputs, weights and the product; then the gradients of the latter two
        "mm": 2 * (INPUTS // 2 + WEIGHTS // 2 + PRODUCT),
        "sum": 2 * PRODUCT + 4 + WEIGHTS // 4 + 8,
        "gt": WEIGHTS + WEIGHTS // 4,
        "ones_like": 8,
        **adam,
    }
    assert cost.operators.total() == 5 + 2 + 2 + 1 + 1 + len(adam)


def test_rows_that_are_looked_up_count_as_often_as_they_are_and_the_others_do_not() -> None:
    with FakeTensorMode(), Counting(Sizes(0, 0)) as counting:
        table, rows = torch.empty(1 << 20, 64, requires_grad=True), torch.zeros(100, 8, dtype=torch.int64)
        F.embedding_bag(rows, table, mode="sum")
        table.detach().index_add_(0, rows.flatten(), torch.empty(800, 64))
    found = 800 * 64 * 4
    moved = counting.cost.bytes_moved
    assert moved["aten::index_add_"] == 3 * found + 800 * 8
    assert 0 <= moved["aten::_embedding_bag"] - (found + 800 * 8 + 100 * 64 * 4) <= 4 * 800  # and where bags begin
