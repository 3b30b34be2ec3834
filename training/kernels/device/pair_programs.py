"""The GPU programs at pairs, in Triton: products, sums, the optimiser's step; ``select_programs`` says how they lie."""

from __future__ import annotations

import triton
import triton.language as tl

from tailrace.training.kernels.device.select_programs import ROUNDING

BETA1 = tl.constexpr(0.9)
BETA2 = tl.constexpr(0.999)
EPSILON = tl.constexpr(1e-8)
SMALLEST_SQUARED_NORM = tl.constexpr(1e-24)


@triton.jit
def pair_dots(
    by_row,
    by_feature,
    bias,
    chosen,
    features,
    rows,
    order,
    out,
    n_slots,
    width,
    row_offset,
    feature_offset,
    n_features,
    HAS_BIAS: tl.constexpr,
    HAS_CHOICE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write by_row[r] · by_feature[f] + bias[f] at pairs, PAIRS of them a program, in the order of features.

    So a feature's vector is read once from memory for all its pairs. Of features outside the range, and of pairs whose
    ``chosen`` is not positive, nothing is read; slots that hold no pair, and those, get zero if all features are meant.
    """
    at = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    slots = tl.load(order + at, mask=at < n_slots, other=0)
    feature = tl.load(features + slots, mask=at < n_slots, other=0) - feature_offset
    own = (at < n_slots) & (feature >= 0) & (feature < n_features)
    read = own
    if HAS_CHOICE:
        read = read & (tl.load(chosen + slots, mask=own, other=0.0) > 0)
    row = tl.load(rows + slots, mask=read, other=0) - row_offset
    sums = tl.zeros((PAIRS,), tl.float32)
    if tl.sum(read.to(tl.int32), 0) > 0:
        left = by_row + row.to(tl.int64) * width
        right = by_feature + feature.to(tl.int64) * width
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = read[:, None] & (columns < width)[None, :]
            x = tl.load(left[:, None] + columns[None, :], mask=mask, other=0.0)
            w = tl.load(right[:, None] + columns[None, :], mask=mask, other=0.0)
            sums += tl.sum(x * w, 1)
    if HAS_BIAS:
        sums += tl.load(bias + feature, mask=read, other=0.0)
    tl.store(out + slots, sums, mask=at < n_slots)


@triton.jit
def decode(
    values,
    weights,
    features,
    ends,
    counts,
    norms,
    group_ends,
    out,
    n_rows,
    n_slots,
    width,
    row_offset,
    feature_offset,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sum of value · weights[f] over a row's pairs whose feature is of the group. A program a row, and group.

    Zeros are not read. A row whose norm is not finite gets outputs that are none, so that the loss is none.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(2)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    last = tl.load(group_ends + group)
    first = tl.load(group_ends + group - 1, mask=group > 0, other=0)
    end = tl.load(ends + row_offset + row)
    begin = tl.minimum(end - tl.load(counts + row_offset + row), n_slots)
    end = tl.minimum(end, n_slots)
    total = tl.zeros((BLOCK,), tl.float32) + 0.0 * tl.load(norms + row_offset + row)
    for start in range(begin, end, PAIRS):
        slots = start + tl.arange(0, PAIRS)
        feature = tl.load(features + slots, mask=slots < end, other=0) - feature_offset
        value = tl.load(values + slots, mask=slots < end, other=0.0)
        read = (value != 0) & (feature >= first) & (feature < last)
        at = weights + feature.to(tl.int64) * width
        mask = read[:, None] & (columns < width)[None, :]
        tile = tl.load(at[:, None] + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(tl.where(read, value, 0.0)[:, None] * tile, 0)
    tl.store(out + (group * n_rows + row) * width + columns, total, mask=columns < width)


@triton.jit
def gather(per_feature, features, out, n_features, n_slots, BLOCK: tl.constexpr):
    """Write each pair's feature's number, zero for slots without a pair."""
    slots = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    feature = tl.load(features + slots, mask=slots < n_slots, other=0)
    inside = (slots < n_slots) & (feature < n_features)
    tl.store(out + slots, tl.load(per_feature + feature, mask=inside, other=0.0), mask=slots < n_slots)


@triton.jit
def sum_rows(values, ends, counts, out, n_slots, BLOCK: tl.constexpr):
    """Write the sum of each row's values."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(ends + row)
    begin = tl.minimum(end - tl.load(counts + row), n_slots)
    end = tl.minimum(end, n_slots)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        total += tl.load(values + slots, mask=slots < end, other=0).to(tl.float32)
    tl.store(out + row, tl.sum(total, 0).to(out.dtype.element_ty))


@triton.jit
def sum_features(values, order, bounds, out, BLOCK: tl.constexpr):
    """Write the sum of each feature's values."""
    feature = tl.program_id(0).to(tl.int64)
    end = tl.load(bounds + feature + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.load(bounds + feature), end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        slots = tl.load(order + at, mask=at < end, other=0)
        total += tl.load(values + slots, mask=at < end, other=0).to(tl.float32)
    tl.store(out + feature, tl.sum(total, 0).to(out.dtype.element_ty))


@triton.jit
def _gradient(
    weights, by_row, rows, order, begin, end, columns, width, row_offset, PAIRS: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the sum of weight · by_row[r] over the pairs of one feature, and that of the weights."""
    total, summed = tl.zeros((BLOCK,), tl.float32), tl.zeros((PAIRS,), tl.float32)
    for start in range(begin, end, PAIRS):
        at = start + tl.arange(0, PAIRS)
        slots = tl.load(order + at, mask=at < end, other=0)
        weight = tl.load(weights + slots, mask=at < end, other=0.0)
        row = tl.load(rows + slots, mask=at < end, other=0) - row_offset
        mask = (weight != 0)[:, None] & (columns < width)[None, :]
        tile = tl.load((by_row + row.to(tl.int64) * width)[:, None] + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(weight[:, None] * tile, 0)
        summed += weight
    return total, tl.sum(summed, 0)


@triton.jit
def outer(
    weights,
    by_row,
    taken_off,
    rows,
    order,
    bounds,
    gradient,
    width,
    row_offset,
    HAS_TAKEN_OFF: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add to gradient[f] the sum of weight · (by_row[r] − taken_off) over its pairs."""
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    begin, end = tl.load(bounds + feature), tl.load(bounds + feature + 1)
    if begin < end:
        total, summed = _gradient(weights, by_row, rows, order, begin, end, columns, width, row_offset, PAIRS, BLOCK)
        if HAS_TAKEN_OFF:
            total -= summed * tl.load(taken_off + columns, mask=inside, other=0.0)
        at = gradient + feature * width + columns
        tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def _slope(
    gradient,
    weights,
    by_row,
    taken_off,
    rows,
    order,
    begin,
    end,
    feature,
    columns,
    width,
    row_offset,
    HAS_GRADIENT: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    HAS_TAKEN_OFF: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the gradient of one feature's columns: what lies in memory and what its pairs add."""
    inside = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_PAIRS:
        total, summed = _gradient(weights, by_row, rows, order, begin, end, columns, width, row_offset, PAIRS, BLOCK)
        if HAS_TAKEN_OFF:
            total -= summed * tl.load(taken_off + columns, mask=inside, other=0.0)
    if HAS_GRADIENT:
        total += tl.load(gradient + feature * width + columns, mask=inside, other=0.0)
    return total


@triton.jit
def _adam(parameter, mean, square, at, inside, writes, slope, rate, per_root):
    """Take Adam's step on some numbers of a parameter, and return them."""
    first = BETA1 * tl.load(mean + at, mask=inside, other=0.0) + (1 - BETA1) * slope
    second = BETA2 * tl.load(square + at, mask=inside, other=0.0) + (1 - BETA2) * slope * slope
    value = tl.load(parameter + at, mask=inside, other=0.0)
    value -= rate * first / (tl.sqrt(second) * per_root + EPSILON)
    tl.store(mean + at, first, mask=writes)
    tl.store(square + at, second, mask=writes)
    return value


@triton.jit
def adam_rows(
    parameter,
    mean,
    square,
    screened,
    numbers,
    overflow,
    gradient,
    weights,
    by_row,
    taken_off,
    rows,
    order,
    bounds,
    width,
    screened_width,
    row_offset,
    HAS_GRADIENT: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    HAS_TAKEN_OFF: tl.constexpr,
    HAS_SCREENED: tl.constexpr,
    UNIT_NORM: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take Adam's step on a feature's row: sum the gradient, take its part along the row off, step, restore norm 1.

    ``numbers``: lr / (1 − β₁ᵗ), 1 / √(1 − β₂ᵗ), a factor of the gradient. With ``screened`` the row is also written as
    ``screen_vectors`` would. Nothing is written where ``overflow`` is not zero. A row of several BLOCKS is gone over
    up to three times, since its gradient does not fit into registers.
    """
    feature = tl.program_id(0).to(tl.int64)
    written = tl.where(tl.load(overflow) == 0, width, 0)
    rate, per_root, scale = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    begin, end = 0, 0
    if HAS_PAIRS:
        begin, end = tl.load(bounds + feature), tl.load(bounds + feature + 1)
    along = 0.0
    slope = tl.zeros((BLOCK,), tl.float32)
    if UNIT_NORM or BLOCKS == 1:
        part = tl.zeros((BLOCK,), tl.float32)
        for block in range(BLOCKS):
            columns = block * BLOCK + tl.arange(0, BLOCK)
            slope = _slope(
                gradient, weights, by_row, taken_off, rows, order, begin, end, feature, columns, width, row_offset,
                HAS_GRADIENT, HAS_PAIRS, HAS_TAKEN_OFF, PAIRS, BLOCK,
            )  # fmt: skip
            if UNIT_NORM:
                part += slope * tl.load(parameter + feature * width + columns, mask=columns < width, other=0.0)
        along = tl.sum(part, 0)
    total, lost = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    value = tl.zeros((BLOCK,), tl.float32)
    for block in range(BLOCKS):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        inside, writes = columns < width, columns < written
        at = feature * width + columns
        if BLOCKS > 1:
            slope = _slope(
                gradient, weights, by_row, taken_off, rows, order, begin, end, feature, columns, width, row_offset,
                HAS_GRADIENT, HAS_PAIRS, HAS_TAKEN_OFF, PAIRS, BLOCK,
            )  # fmt: skip
        if UNIT_NORM:
            slope -= along * tl.load(parameter + at, mask=inside, other=0.0)
        value = _adam(parameter, mean, square, at, inside, writes, slope * scale, rate, per_root)
        total += value * value
        if BLOCKS > 1 or not UNIT_NORM:
            tl.store(parameter + at, value, mask=writes)
        if HAS_SCREENED:
            rounded = value.to(tl.bfloat16)
            off = value - rounded.to(tl.float32)
            lost += off * off
            tl.store(screened + feature * screened_width + columns, rounded, mask=writes)
    squared = tl.sum(total, 0)
    if UNIT_NORM:
        tl.debug_barrier()  # the last pass reads what this one wrote
        shrink = tl.where(squared > SMALLEST_SQUARED_NORM, 1.0 / tl.sqrt(squared), 1.0)
        for block in range(BLOCKS):
            columns = block * BLOCK + tl.arange(0, BLOCK)
            inside = columns < width
            at = feature * width + columns
            if BLOCKS > 1:  # what this thread itself has written
                value = tl.load(parameter + at, mask=inside, other=0.0)
            tl.store(parameter + at, value * shrink, mask=columns < written)
    if HAS_SCREENED:
        norm, off_norm = tl.sqrt(squared), tl.sqrt(tl.sum(lost, 0))
        more = tl.arange(0, 16)
        columns = tl.where(more == 2, norm + off_norm, off_norm) * (1 + ROUNDING)
        writes = (more >= 2) & (more < tl.minimum(written + 1, 4))
        at = screened + feature * screened_width + width + more
        tl.store(at, columns.to(tl.bfloat16), mask=writes)


@triton.jit
def write_numbers(out, rate, per_root, scale):
    """Write three numbers of the host."""
    tl.store(out, rate)
    tl.store(out + 1, per_root)
    tl.store(out + 2, scale)


@triton.jit
def adam_numbers(parameter, mean, square, gradient, numbers, overflow, n, BLOCK: tl.constexpr):
    """Take Adam's step on a parameter without rows, element by element."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    writes = at < tl.where(tl.load(overflow) == 0, n, 0)
    rate, per_root, scale = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    slope = tl.load(gradient + at, mask=inside, other=0.0) * scale
    value = _adam(parameter, mean, square, at, inside, writes, slope, rate, per_root)
    tl.store(parameter + at, value, mask=writes)
