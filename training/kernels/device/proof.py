"""Whether the sparse step of this GPU is right: compared with the dense step in float32, program by program.

Compilers and GPUs differ, and the programs were written where there was none to try them on. So no run relies on them
unseen: the first batch tells, and costs it a few steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tailrace.training.architectures.base import SMALLEST_NORM, Transcoder
from tailrace.training.architectures.objectives import Objective
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.device import operators
from tailrace.training.kernels.device.pairs import PairGradient
from tailrace.training.kernels.device.step import DeviceStep
from tailrace.training.kernels.kernel import StepResult
from tailrace.training.rows.batches import Batch

ROWS = 512
"""Rows compared: the dense step in float32 needs three tensors of rows × d_sae."""
FEATURES = 256
"""Features on which the optimiser is compared."""


@contextmanager
def unchanged(transcoder: Transcoder) -> Iterator[None]:
    """Put back afterwards what steps learn without a gradient, and drop the gradients."""
    before = {name: value.clone() for name, value in transcoder.named_buffers()}
    try:
        yield
    finally:
        for name, value in transcoder.named_buffers():
            value.copy_(before[name])
        transcoder.zero_grad(set_to_none=True)


def largest_error(step: DeviceStep, transcoder: Transcoder, batch: Batch, objective: Objective) -> float:
    """Return the largest relative error of what a step computes: outputs, losses, gradients, and an Adam step.

    Infinity where numbers are not finite.
    """
    part = Batch(batch.inputs[:ROWS], batch.outputs[:ROWS])
    precision, fused = torch.get_float32_matmul_precision(), step.gradients.fused
    step.gradients.fused = True  # so that sums over pairs are at hand, which are compared as added up and in Adam
    torch.set_float32_matmul_precision("highest")
    try:
        with unchanged(transcoder):
            wanted = DenseStep()(transcoder, part, objective, per_row=True)
            gradients = {name: value.grad for name, value in transcoder.named_parameters() if value.grad is not None}
        with unchanged(transcoder):
            found = step(transcoder, part, objective, per_row=True)
            errors = _of_results(found, wanted)
            assert step.gradients.overflow is not None, "a step has been taken"
            errors.append(step.gradients.overflow.double())
            at_pairs = dict(step.gradients.at_pairs)
            for name, gradient in gradients.items():
                parameter = transcoder.get_parameter(name)
                mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                if name in at_pairs:
                    errors.append(_of_adam(parameter, at_pairs[name], gradient, name in transcoder.unit_rows()))
                    at_pairs[name].add_to(mine)
                errors.append(_relative(mine, gradient))
    finally:
        torch.set_float32_matmul_precision(precision)
        step.gradients.fused = fused
    error = float(torch.stack([value.reshape(()) for value in errors]).nan_to_num(torch.inf).max())
    step.gradients.at_pairs.clear()
    return error


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    """Return ‖found − wanted‖ / ‖wanted‖, zero where both are zero."""
    off = torch.linalg.vector_norm(found.float() - wanted.float()).double()
    error: Tensor = off / torch.linalg.vector_norm(wanted.float()).double().clamp_min(1e-30)
    return error


def _of_results(found: StepResult, wanted: StepResult) -> list[Tensor]:
    assert found.per_row is not None, "it was asked for"
    assert wanted.per_row is not None, "it was asked for"
    pairs = [(found.outputs, wanted.outputs), (found.per_row.l1, wanted.per_row.l1)]
    pairs += [(found.losses[name], value) for name, value in wanted.losses.items()]
    counted = [(found.n_active, wanted.n_active), (found.per_row.l0, wanted.per_row.l0)]
    # a pair at the edge of a selection may be counted here and not there
    return [_relative(*pair) for pair in pairs] + [
        (mine - theirs).abs().sum() / theirs.sum().clamp_min(1).double() / 10 for mine, theirs in counted
    ]


@torch.no_grad()
def _of_adam(parameter: Tensor, at_pairs: PairGradient, gradient: Tensor, unit_norm: bool) -> Tensor:
    """Return the error of the second Adam step of some features, whose gradient is summed at pairs."""
    n = min(FEATURES, len(parameter))
    rows, slope = parameter[:n].detach().clone(), gradient[:n].double()
    mean, square = 0.1 * gradient[:n].float(), 0.01 * gradient[:n].float().square()
    before, first, second = rows.double(), mean.double(), square.double()
    numbers = rows.new_zeros(3)
    operators.write_numbers(numbers, 1e-3, 2.0, 0.5)
    screened = None if unit_norm else rows.new_empty(n, rows.shape[1] + 8, dtype=torch.bfloat16)
    weights, by_row, of_rows, order, bounds = at_pairs.pairs
    pairs = [weights, by_row, of_rows, order, bounds[: n + 1]]
    taken_off = None if at_pairs.taken_off is None else at_pairs.taken_off.detach()
    overflow = torch.zeros(1, dtype=torch.int32, device=rows.device)
    rest = (numbers, overflow, None, pairs, taken_off, at_pairs.row_offset, unit_norm)
    operators.adam_rows(rows, mean, square, screened, *rest)
    if unit_norm:
        slope = slope - (slope * before).sum(1, keepdim=True) * before
    slope = slope * 0.5
    first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope.square()
    after = before - 1e-3 * first / (second.sqrt() * 2.0 + 1e-8)
    if unit_norm:
        norms = torch.linalg.vector_norm(after, dim=1, keepdim=True)
        after = after / torch.where(norms > SMALLEST_NORM, norms, torch.ones_like(norms))
    # what moved counts; the weights themselves hide it
    moved = torch.linalg.vector_norm(after - before).clamp_min(1e-30)
    errors = [torch.linalg.vector_norm(rows.double() - after) / moved / 10, _relative(mean, first)]
    if screened is not None:
        rounded = torch.empty_like(screened)  # as it is made anew, to whichever side this device rounds
        operators.screen_vectors(rows, rounded, rows.new_empty(n), False)
        errors.append(_relative(screened[:, : rows.shape[1]], rounded[:, : rows.shape[1]]))
    return torch.stack([value.double() for value in errors]).max()
