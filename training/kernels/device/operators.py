"""The GPU programs as operators of torch, which write into tensors that they are given.

What each moves between memory and processor is declared in ``traffic``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from tailrace.training.kernels.device import pair_programs, select_programs

LARGEST_GROUPS = 8192
"""Groups of a row's features whose maxima a program holds."""
DIGITS_BLOCK = 2048
"""Numbers whose digits a program counts."""
NUMBERS_BLOCK = 512
"""Numbers of a parameter without rows that a program changes."""


def _operator(*changed: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that makes a function an operator which changes the arguments named."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        operator = torch.library.custom_op(f"tailrace::{function.__name__}", function, mutates_args=changed)
        operator.register_fake(lambda *_: None)
        return operator

    return register


def _launch(program: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
    """Start a program on the device of its first argument."""
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        program[grid](*arguments, num_warps=num_warps, enable_fp_fusion=True, **constants)


def _block(n: int, largest: int) -> int:
    """Return the smallest power of two that is at least ``n``, or ``largest``."""
    return int(min(largest, triton.next_power_of_2(max(n, 1))))


def column_block(width: int) -> int:
    """Return how many columns of a row a program at pairs writes."""
    return _block(width, 1024)


def row_block(width: int) -> int:
    """Return how many columns of a row the optimiser's program holds at a time: all, where registers suffice."""
    return _block(width, 4096) if width <= 4096 else 2048


def n_groups(k: int, n_features: int) -> int:
    """Return in how many groups a row's features are searched for the k largest; 0 where all positive ones are taken.

    Six times k, since fewer would put more of the largest into one group, and the cut lower.
    """
    groups = int(triton.next_power_of_2(6 * k))
    return groups if groups <= n_features and groups <= LARGEST_GROUPS else 0


@_operator("out", "norms")
def screen_vectors(vectors: Tensor, out: Tensor, norms: Tensor, is_rows: bool) -> None:
    """Round vectors (n, width) for screening, into (n, a little wider) bfloat16, and write their norms."""
    n, width = vectors.shape
    block = _block(width, 1024)
    _launch(
        select_programs.screen_vectors, (n,), vectors, out, norms, width, out.shape[1], IS_ROWS=is_rows, BLOCK=block
    )


@_operator("out")
def screen_bias(bias: Tensor, floor: Tensor | None, out: Tensor, width: int) -> None:
    """Write biases (n,), less floors, behind the features' ``width`` columns of ``out``."""
    has_floor = floor is not None
    _launch(
        select_programs.screen_bias,
        (triton.cdiv(len(bias), 256),),
        bias,
        floor if has_floor else bias,
        out,
        len(bias),
        width,
        out.shape[1],
        HAS_FLOOR=has_floor,
        BLOCK=256,
    )


@_operator("cuts", "counts")
def count_of_rows(
    screened: Tensor,
    rows: Tensor,
    peaks: Tensor,
    cuts: Tensor,
    counts: Tensor,
    k: int,
    width: int,
    rows_per_layer: int,
) -> None:
    """Write each row's cut and how many screened numbers reach it; with ``k`` 0 the cut is zero."""
    n_rows, n_features = screened.shape
    _launch(
        select_programs.count_of_rows,
        (n_rows,),
        screened,
        rows,
        peaks,
        cuts,
        counts,
        k,
        n_features,
        width,
        rows.shape[1],
        rows_per_layer,
        GROUPS=n_groups(k, n_features) if k else 0,
        BLOCK=_block(n_features, 1024),
    )


@_operator("keys")
def maxima_of_rows(
    screened: Tensor, rows: Tensor, peaks: Tensor, keys: Tensor, width: int, rows_per_layer: int
) -> None:
    """Write (rows, groups) int16: what the largest number of each group of a row's features is at least."""
    n_rows, n_features = screened.shape
    _launch(
        select_programs.maxima_of_rows,
        (n_rows,),
        screened,
        rows,
        peaks,
        keys,
        n_features,
        width,
        rows.shape[1],
        rows_per_layer,
        GROUPS=keys.shape[1],
    )


@_operator("histograms")
def count_digits(values: Tensor, histograms: Tensor, n_wanted: int, level: int) -> None:
    """Add the digit ``level`` of values, float32 or the keys of ``maxima_of_rows``, to that row of (levels, 256)."""
    n, are_keys = values.numel(), values.dtype == torch.int16
    _launch(
        select_programs.count_digits,
        (triton.cdiv(n, DIGITS_BLOCK),),
        values,
        histograms,
        n_wanted,
        n,
        LEVEL=level,
        ARE_KEYS=are_keys,
        BLOCK=DIGITS_BLOCK,
    )


@_operator("cuts", "counts")
def count_of_batch(screened: Tensor, histograms: Tensor, cuts: Tensor, counts: Tensor, n_wanted: int) -> None:
    """Write the batch's cut, for every row, and how many screened numbers of each row reach it."""
    n_rows, n_features = screened.shape
    _launch(
        select_programs.count_of_batch,
        (n_rows,),
        screened,
        histograms,
        cuts,
        counts,
        n_wanted,
        n_features,
        BLOCK=_block(n_features, 1024),
    )


@_operator("features", "rows", "overflow")
def write_pairs(
    screened: Tensor,
    cuts: Tensor,
    ends: Tensor,
    counts: Tensor,
    features: Tensor,
    rows: Tensor,
    overflow: Tensor,
    rows_per_layer: int,
    d_sae: int,
) -> None:
    """Write the feature and the row of every slot, and whether the slots are too few."""
    n_rows, n_features = screened.shape
    _launch(
        select_programs.write_pairs,
        (n_rows,),
        screened,
        cuts,
        ends,
        counts,
        features,
        rows,
        overflow,
        n_rows,
        n_features,
        len(features),
        rows_per_layer,
        d_sae,
        BLOCK=_block(n_features, 1024),
    )


@_operator("pre")
def keep_of_rows(pre: Tensor, ends: Tensor, counts: Tensor, k: int) -> None:
    """Set all but the k largest positive numbers of each row to zero."""
    _launch(select_programs.keep_of_rows, (len(ends),), pre, ends, counts, k, len(pre), BLOCK=512)


@_operator("equal")
def count_equal(pre: Tensor, ends: Tensor, counts: Tensor, histograms: Tensor, equal: Tensor, n_wanted: int) -> None:
    """Write how many numbers of each row equal the n-th largest of the batch."""
    _launch(
        select_programs.count_equal, (len(ends),), pre, ends, counts, histograms, equal, n_wanted, len(pre), BLOCK=512
    )


@_operator("pre")
def keep_of_batch(
    pre: Tensor,
    ends: Tensor,
    counts: Tensor,
    histograms: Tensor,
    equal: Tensor,
    equal_ends: Tensor,
    n_wanted: int,
) -> None:
    """Set all but the n largest positive numbers of the batch to zero."""
    _launch(
        select_programs.keep_of_batch,
        (len(ends),),
        pre,
        ends,
        counts,
        histograms,
        equal,
        equal_ends,
        n_wanted,
        len(pre),
        BLOCK=512,
    )


@_operator("out")
def pair_dots(
    by_row: Tensor,
    by_feature: Tensor,
    bias: Tensor | None,
    chosen: Tensor | None,
    features: Tensor,
    rows: Tensor,
    order: Tensor,
    out: Tensor,
    row_offset: int,
    feature_offset: int,
) -> None:
    """Write by_row[r] · by_feature[f] + bias[f] at pairs, with indices less the offsets; zero in all other slots."""
    n_features, width = by_feature.shape
    pairs = 4
    _launch(
        pair_programs.pair_dots,
        (triton.cdiv(len(out), pairs),),
        by_row,
        by_feature,
        by_feature if bias is None else bias,
        out if chosen is None else chosen,
        features,
        rows,
        order,
        out,
        len(out),
        width,
        row_offset,
        feature_offset,
        n_features,
        HAS_BIAS=bias is not None,
        HAS_CHOICE=chosen is not None,
        PAIRS=pairs,
        BLOCK=_block(width, 512),
    )


@_operator("out")
def decode(
    values: Tensor,
    weights: Tensor,
    features: Tensor,
    ends: Tensor,
    counts: Tensor,
    norms: Tensor,
    group_ends: Tensor,
    out: Tensor,
    row_offset: int,
    feature_offset: int,
) -> None:
    """Write (groups, rows, width): what each group of features writes to each row, from ``row_offset`` on."""
    width = weights.shape[1]
    block = column_block(width)
    _launch(
        pair_programs.decode,
        (out.shape[1], triton.cdiv(width, block), len(group_ends)),
        values,
        weights,
        features,
        ends,
        counts,
        norms,
        group_ends,
        out,
        out.shape[1],
        len(values),
        width,
        row_offset,
        feature_offset,
        PAIRS=4,
        BLOCK=block,
    )


@_operator("out")
def gather(per_feature: Tensor, features: Tensor, out: Tensor) -> None:
    """Write the number of each slot's feature, zero where there is none."""
    _launch(
        pair_programs.gather,
        (triton.cdiv(len(out), 1024),),
        per_feature,
        features,
        out,
        len(per_feature),
        len(out),
        BLOCK=1024,
    )


@_operator("out")
def sum_rows(values: Tensor, ends: Tensor, counts: Tensor, out: Tensor) -> None:
    """Write the sum of each row's values."""
    _launch(pair_programs.sum_rows, (len(out),), values, ends, counts, out, len(values), BLOCK=128, num_warps=1)


@_operator("out")
def sum_features(values: Tensor, order: Tensor, bounds: Tensor, out: Tensor) -> None:
    """Write the sum of each feature's values."""
    _launch(pair_programs.sum_features, (len(out),), values, order, bounds, out, BLOCK=32, num_warps=1)


@_operator("gradient")
def outer(
    weights: Tensor,
    by_row: Tensor,
    taken_off: Tensor | None,
    rows: Tensor,
    order: Tensor,
    bounds: Tensor,
    gradient: Tensor,
    row_offset: int,
) -> None:
    """Add to gradient[f] the sum over its pairs of weight · (by_row[r] − taken_off)."""
    n_features, width = gradient.shape
    block = column_block(width)
    _launch(
        pair_programs.outer,
        (n_features, triton.cdiv(width, block)),
        weights,
        by_row,
        by_row if taken_off is None else taken_off,
        rows,
        order,
        bounds,
        gradient,
        width,
        row_offset,
        HAS_TAKEN_OFF=taken_off is not None,
        PAIRS=4,
        BLOCK=block,
    )


@_operator("parameter", "mean", "square", "screened")
def adam_rows(
    parameter: Tensor,
    mean: Tensor,
    square: Tensor,
    screened: Tensor | None,
    numbers: Tensor,
    overflow: Tensor,
    gradient: Tensor | None,
    pairs: Sequence[Tensor],
    taken_off: Tensor | None,
    row_offset: int,
    unit_norm: bool,
) -> None:
    """Take Adam's step on rows whose gradient is ``gradient`` and what ``pairs`` add.

    ``pairs``: weights, by_row, rows, order and bounds as ``outer`` takes them, or none.
    """
    n_features, width = parameter.shape
    block = row_block(width)
    blocks = triton.cdiv(width, block)
    weights, by_row, rows, order, bounds = pairs or (parameter, parameter, overflow, overflow, overflow)
    _launch(
        pair_programs.adam_rows,
        (n_features,),
        parameter,
        mean,
        square,
        parameter if screened is None else screened,
        numbers,
        overflow,
        parameter if gradient is None else gradient,
        weights,
        by_row,
        parameter if taken_off is None else taken_off,
        rows,
        order,
        bounds,
        width,
        width if screened is None else screened.shape[1],
        row_offset,
        HAS_GRADIENT=gradient is not None,
        HAS_PAIRS=bool(pairs),
        HAS_TAKEN_OFF=taken_off is not None,
        HAS_SCREENED=screened is not None,
        UNIT_NORM=unit_norm,
        BLOCKS=blocks,
        PAIRS=4 if block <= 1024 else 2,
        BLOCK=block,
        num_warps=8 if block > 1024 and (blocks == 1 or not unit_norm) else 4,  # what spills nothing
    )


@_operator("parameter", "mean", "square")
def adam_numbers(
    parameter: Tensor, mean: Tensor, square: Tensor, gradient: Tensor, numbers: Tensor, overflow: Tensor
) -> None:
    """Take Adam's step on a parameter of any shape, element by element."""
    n = parameter.numel()
    _launch(
        pair_programs.adam_numbers,
        (triton.cdiv(n, NUMBERS_BLOCK),),
        parameter,
        mean,
        square,
        gradient,
        numbers,
        overflow,
        n,
        BLOCK=NUMBERS_BLOCK,
    )


@_operator("out")
def write_numbers(out: Tensor, rate: float, per_root: float, scale: float) -> None:
    """Write the three ``numbers`` of ``adam_rows``."""
    _launch(pair_programs.write_numbers, (1,), out, rate, per_root, scale, num_warps=1)
