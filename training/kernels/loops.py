"""The sparse step's inner loops. Arrays are plain NumPy views of tensors' memory; every loop writes into its last ones.

A loop takes a range so that threads can share one call's work; what is written for an index never depends on the range.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch

from tailrace.storage.compiled import compiled_loop


@compiled_loop("reassoc", "contract", "nsz")
def round_rows(rows: Any, bits: Any, start: int, stop: int, rounded: Any, norms: Any) -> None:
    """Write rows [start, stop) as bfloat16, to nearest, ties to even, with each row's norm and that of what was lost.

    ``bits`` is ``rows`` (n, width) seen as int32, ``rounded`` bfloat16 seen as int16, ``norms`` (2, n).
    """
    width = rows.shape[1]
    kept = np.empty(width, np.int32)
    values = kept.view(np.float32)
    for row in range(start, stop):
        for column in range(width):
            pattern = bits[row, column]
            kept[column] = (pattern + np.int32(0x7FFF) + ((pattern >> np.int32(16)) & np.int32(1))) & np.int32(-65536)
        total, lost = np.float32(0), np.float32(0)
        for column in range(width):
            value = rows[row, column]
            off = value - values[column]
            total += value * value
            lost += off * off
            rounded[row, column] = kept[column] >> np.int32(16)
        norms[0, row], norms[1, row] = np.sqrt(total), np.sqrt(lost)


@compiled_loop("nnan", "nsz")
def collect_above(screened: Any, cuts: Any, start: int, stop: int, columns: Any, counts: Any) -> int:
    """List, row by row, the columns of ``screened`` (rows, n) above the row's cut; ascending in a row.

    Returns how many there are in rows [start, stop), or −1 if ``columns`` may be too short for them.
    """
    n_columns, n_found = screened.shape[1], 0
    for row in range(start, stop):
        before, values, cut = n_found, screened[row], cuts[row]
        for block in range(0, n_columns, 64):
            # most blocks of columns hold no candidate, which their maximum, taken at once, tells
            piece = values[block : block + 64]
            largest = piece[0]
            for column in range(len(piece)):
                largest = piece[column] if piece[column] > largest else largest
            if not largest > cut:
                continue
            if n_found + 64 > columns.shape[0]:
                return -1
            for column in range(len(piece)):
                if piece[column] > cut:
                    columns[n_found] = block + column
                    n_found += 1
        counts[row] = n_found - before
    return n_found


@compiled_loop()
def kth_smallest(values: Any, k: int) -> Any:
    """Return the value that ``k`` others precede in order; the order of ``values`` is lost (Hoare's FIND).

    numba compiles ``np.partition`` for five seconds, at the first step on every machine.
    """
    low, high = 0, len(values) - 1
    while low < high:
        first, middle, last = values[low], values[(low + high) // 2], values[high]
        pivot = max(min(first, middle), min(max(first, middle), last))
        left, right = low, high
        while left <= right:
            while values[left] < pivot:
                left += 1
            while values[right] > pivot:
                right -= 1
            if left <= right:
                values[left], values[right] = values[right], values[left]
                left += 1
                right -= 1
        if k <= right:
            high = right
        elif k >= left:
            low = left
        else:
            break
    return values[k]


@compiled_loop("nnan", "nsz")
def kth_of_group_maxima(screened: Any, k: int, n_slabs: int, start: int, stop: int, kth: Any) -> None:
    """Write, for rows [start, stop), the k-th largest of the maxima of groups of ``n_slabs`` columns.

    A group's columns lie ``n / n_slabs`` apart, so that maxima are taken of whole stretches at once. At least k columns
    of the row are as large, because k groups hold one each.
    """
    n_columns = screened.shape[1]
    width = (n_columns + n_slabs - 1) // n_slabs
    maxima = np.empty(width, screened.dtype)
    for row in range(start, stop):
        values = screened[row]
        maxima[:] = values[:width]
        for slab in range(1, n_slabs):
            piece = values[slab * width : (slab + 1) * width]
            for column in range(len(piece)):
                maxima[column] = piece[column] if piece[column] > maxima[column] else maxima[column]
        kth[row] = kth_smallest(maxima, width - k)


@compiled_loop()
def sort_by_feature(features: Any, offsets: Any, order: Any) -> None:
    """Write the stable order of pairs by feature, and where each feature's pairs begin (d_sae + 1)."""
    offsets[:] = 0
    for feature in features:
        offsets[feature + 1] += 1
    for feature in range(len(offsets) - 1):
        offsets[feature + 1] += offsets[feature]
    slot = offsets[:-1].copy()
    for pair in range(len(features)):
        feature = features[pair]
        order[slot[feature]] = pair
        slot[feature] += 1


@compiled_loop("reassoc", "contract", "nsz")
def dot_pairs(
    by_row: Any, by_feature: Any, rows: Any, order: Any, offsets: Any, start: int, stop: int, out: Any
) -> None:
    """Write by_row[row of pair] · by_feature[f] for the pairs of features f in [start, stop).

    In the order of features, and four pairs at a time, a feature's vector is read once for all its pairs: 27 ms for
    262,144 pairs of width 768 on a core, 57 ms one by one in the order of rows.
    """
    width, zero = by_row.shape[1], by_row.dtype.type(0)
    for feature in range(start, stop):
        vector = by_feature[feature]
        index, end = offsets[feature], offsets[feature + 1]
        while index + 4 <= end:
            a, b, c, d = order[index], order[index + 1], order[index + 2], order[index + 3]
            row_a, row_b, row_c, row_d = by_row[rows[a]], by_row[rows[b]], by_row[rows[c]], by_row[rows[d]]
            sum_a, sum_b, sum_c, sum_d = zero, zero, zero, zero
            for column in range(width):
                value = vector[column]
                sum_a += value * row_a[column]
                sum_b += value * row_b[column]
                sum_c += value * row_c[column]
                sum_d += value * row_d[column]
            out[a], out[b], out[c], out[d] = sum_a, sum_b, sum_c, sum_d
            index += 4
        for last in range(index, end):
            a = order[last]
            row_a, sum_a = by_row[rows[a]], zero
            for column in range(width):
                sum_a += vector[column] * row_a[column]
            out[a] = sum_a


@compiled_loop("contract")
def add_outer(
    weights: Any, by_row: Any, rows: Any, order: Any, offsets: Any, start: int, stop: int, gradient: Any
) -> None:
    """Add to gradient[f], for features f in [start, stop), the sum over their pairs of weight · by_row[row of pair]."""
    width = by_row.shape[1]
    for feature in range(start, stop):
        out = gradient[feature]
        index, end = offsets[feature], offsets[feature + 1]
        while index + 4 <= end:
            a, b, c, d = order[index], order[index + 1], order[index + 2], order[index + 3]
            row_a, row_b, row_c, row_d = by_row[rows[a]], by_row[rows[b]], by_row[rows[c]], by_row[rows[d]]
            of_a, of_b, of_c, of_d = weights[a], weights[b], weights[c], weights[d]
            for column in range(width):
                out[column] += (of_a * row_a[column] + of_b * row_b[column]) + (
                    of_c * row_c[column] + of_d * row_d[column]
                )
            index += 4
        for last in range(index, end):
            a = order[last]
            row_a, of_a = by_row[rows[a]], weights[a]
            for column in range(width):
                out[column] += of_a * row_a[column]


@compiled_loop("reassoc", "contract", "nsz")
def dots_and_outer(
    by_row: Any,
    by_feature: Any,
    weights: Any,
    rows: Any,
    order: Any,
    offsets: Any,
    dots: Any,
    gradient: Any,
    start: int,
    stop: int,
) -> None:
    """Do what ``dot_pairs`` and ``add_outer`` do, reading each pair's row once: 46 ms instead of 68."""
    width, zero = by_row.shape[1], by_row.dtype.type(0)
    for feature in range(start, stop):
        vector, out = by_feature[feature], gradient[feature]
        index, end = offsets[feature], offsets[feature + 1]
        while index + 4 <= end:
            a, b, c, d = order[index], order[index + 1], order[index + 2], order[index + 3]
            row_a, row_b, row_c, row_d = by_row[rows[a]], by_row[rows[b]], by_row[rows[c]], by_row[rows[d]]
            of_a, of_b, of_c, of_d = weights[a], weights[b], weights[c], weights[d]
            sum_a, sum_b, sum_c, sum_d = zero, zero, zero, zero
            for column in range(width):
                value = vector[column]
                at_a, at_b, at_c, at_d = row_a[column], row_b[column], row_c[column], row_d[column]
                sum_a += value * at_a
                sum_b += value * at_b
                sum_c += value * at_c
                sum_d += value * at_d
                out[column] += (of_a * at_a + of_b * at_b) + (of_c * at_c + of_d * at_d)
            dots[a], dots[b], dots[c], dots[d] = sum_a, sum_b, sum_c, sum_d
            index += 4
        for last in range(index, end):
            a = order[last]
            row_a, of_a, sum_a = by_row[rows[a]], weights[a], zero
            for column in range(width):
                sum_a += vector[column] * row_a[column]
                out[column] += of_a * row_a[column]
            dots[a] = sum_a


@compiled_loop()
def sum_by_feature(weights: Any, order: Any, offsets: Any, out: Any) -> None:
    """Write the sum of each feature's weights, accumulated in float64."""
    for feature in range(len(offsets) - 1):
        total = 0.0
        for index in range(offsets[feature], offsets[feature + 1]):
            total += weights[order[index]]
        out[feature] = total


@compiled_loop()
def keep_largest(values: Any, offsets: Any, k: int, start: int, stop: int, kept: Any) -> None:
    """Mark, in each of rows [start, stop), the k largest positive values; of equal ones the first."""
    for row in range(start, stop):
        first, last = offsets[row], offsets[row + 1]
        n = last - first
        cut, n_equal = values.dtype.type(0), 0
        if n > k:
            cut = kth_smallest(values[first:last].copy(), n - k)
            n_above = 0
            for pair in range(first, last):
                n_above += values[pair] > cut
            n_equal = k - n_above
        for pair in range(first, last):
            value = values[pair]
            if value <= 0:
                kept[pair] = False
            elif value > cut:
                kept[pair] = True
            else:
                kept[pair] = value == cut and n_equal > 0
                n_equal -= kept[pair]


@compiled_loop("reassoc", "contract", "nsz")
def adam_rows(
    weights: Any,
    gradient: Any,
    mean: Any,
    square: Any,
    beta1: float,
    beta2: float,
    rate: float,
    root_correction: float,
    epsilon: float,
    scale: float,
    unit_norm: bool,
    start: int,
    stop: int,
) -> None:
    """Take Adam's step on rows [start, stop), while a row is in the processor's cache: one pass instead of four.

    With ``unit_norm`` the gradient's part along the row is removed first and the row brought back to norm one
    after. ``rate`` is lr / (1 − β₁ᵗ), ``root_correction`` √(1 − β₂ᵗ), ``scale`` multiplies the gradient.
    """
    width = weights.shape[1]
    number = weights.dtype.type
    b1, b2, rest1, rest2 = number(beta1), number(beta2), number(1 - beta1), number(1 - beta2)
    lr, per_root, eps, factor = number(rate), number(1 / root_correction), number(epsilon), number(scale)
    for row in range(start, stop):
        w, g, m, v = weights[row], gradient[row], mean[row], square[row]
        along = 0.0
        if unit_norm:
            for column in range(width):
                along += g[column] * w[column]
        part = number(along)
        total = 0.0
        for column in range(width):
            slope = factor * (g[column] - part * w[column])
            m[column] = b1 * m[column] + rest1 * slope
            v[column] = b2 * v[column] + rest2 * slope * slope
            w[column] -= lr * m[column] / (np.sqrt(v[column]) * per_root + eps)
        if unit_norm:
            for column in range(width):
                total += w[column] * w[column]
            if total > 1e-24:
                shrink = number(1 / np.sqrt(total))
                for column in range(width):
                    w[column] *= shrink


def over_ranges(n: int, work: Callable[[int, int], object]) -> None:
    """Call ``work(start, stop)`` for ranges that make up [0, n), side by side."""
    n_threads = min(torch.get_num_threads(), n)
    if n_threads <= 1:
        work(0, n)
        return
    bounds = [n * part // n_threads for part in range(n_threads + 1)]
    pending = [_pool(n_threads).submit(work, *pair) for pair in itertools.pairwise(bounds)]
    for done in pending:
        done.result()


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="kernel")
