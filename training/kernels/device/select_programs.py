"""The GPU programs that find pairs, in Triton. Each writes all of its outputs, in an order its inputs decide.

No floating-point number is added atomically, so the same inputs give the same bits. A *pair* is a row and a feature
that may be active. Pairs lie row after row, features ascending, in slots of a fixed number: row r has those that end
before ``ends[r]``, ``counts[r]`` of them. Slots that are left over hold the feature ``d_sae``, which does not exist.
``order`` lists the slots by feature, stable, so that a feature's pairs are in the order of rows; feature f has those
from ``bounds[f]`` to ``bounds[f + 1]`` in it.

Screening multiplies rows and features in bfloat16, each with four columns more than they are wide (``screen_vectors``):
a feature's bias in two parts, and what makes the product an upper bound of the exact pre-activation. By Cauchy-Schwarz
the product changes by at most ‖x − x̂‖ (‖w‖ + ‖w − ŵ‖) + ‖x‖ ‖w − ŵ‖ when x and w are rounded; the columns add that.
"""

from __future__ import annotations

import triton
import triton.language as tl

SUMMING = tl.constexpr(2.0**-13)
"""More than a product changes by the order, and the truncation, of a tensor core's sums, in ‖x‖ ‖w‖."""
ROUNDING = tl.constexpr(2.0**-7)
"""Twice the largest change of a number by rounding it to bfloat16, relative: it keeps eight bits."""


@triton.jit
def screen_vectors(vectors, out, norms, width, out_width, IS_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write a vector in bfloat16 with its four columns more, and its norm. A program a vector."""
    at = tl.program_id(0).to(tl.int64)
    total, lost = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        values = tl.load(vectors + at * width + columns, mask=inside, other=0.0)
        rounded = values.to(tl.bfloat16)
        off = values - rounded.to(tl.float32)
        tl.store(out + at * out_width + columns, rounded, mask=inside)
        total += values * values
        lost += off * off
    norm, off_norm = tl.sqrt(tl.sum(total, 0)), tl.sqrt(tl.sum(lost, 0))
    tl.store(norms + at, norm)
    _store_columns(out + at * out_width, norm, off_norm, width, out_width, IS_ROWS)


@triton.jit
def _store_columns(out, norm, lost, width, out_width, IS_ROWS: tl.constexpr):
    """Write what follows a rounded vector: of a feature 0, 0, ‖w‖ + ‖w − ŵ‖, ‖w − ŵ‖, of a row what they multiply."""
    more = tl.arange(0, 16)
    first = norm + lost
    second = lost
    bias = 0.0
    if IS_ROWS:
        first, second, bias = lost + norm * SUMMING, norm, 1.0
    raised = tl.where(more == 2, first, tl.where(more == 3, second, 0.0)) * (1 + ROUNDING)
    columns = tl.where(more < 2, bias, raised)
    tl.store(out + width + more, columns.to(tl.bfloat16), mask=width + more < out_width)


@triton.jit
def screen_bias(bias, floor, out, n, width, out_width, HAS_FLOOR: tl.constexpr, BLOCK: tl.constexpr):
    """Write features' biases, less their floors, raised to what rounding them takes, as two bfloat16 numbers each."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    values = tl.load(bias + at, mask=inside, other=0.0)
    if HAS_FLOOR:
        values -= tl.load(floor + at, mask=inside, other=0.0)
    values += tl.abs(values) * (ROUNDING * ROUNDING * 0.5)
    large = values.to(tl.bfloat16)
    small = (values - large.to(tl.float32)).to(tl.bfloat16)
    start = out + at.to(tl.int64) * out_width + width
    tl.store(start, large, mask=inside)
    tl.store(start + 1, small, mask=inside)


@triton.jit
def _lowered(screened, rows, row, peaks, width, row_width):
    """Return what the exact numbers that were screened as ``screened`` of one row are at least."""
    start = rows + row * row_width + width
    lost, norm = tl.load(start + 2).to(tl.float32), tl.load(start + 3).to(tl.float32)
    margin = lost * tl.load(peaks).to(tl.float32) + norm * tl.load(peaks + 1).to(tl.float32)
    return tl.maximum(screened * (1 - ROUNDING) - 2.0 * (1 + ROUNDING) * margin, 0.0)


@triton.jit
def _group_maxima(screened, row, n_features, GROUPS: tl.constexpr):
    """Return the largest screened number of each of GROUPS groups of a row's features, zero for none above it."""
    maxima = tl.zeros((GROUPS,), tl.float32)
    for start in range(0, n_features, GROUPS):
        columns = start + tl.arange(0, GROUPS)
        values = tl.load(screened + row * n_features + columns, mask=columns < n_features, other=0.0).to(tl.float32)
        maxima = tl.maximum(maxima, values)
    return maxima


@triton.jit
def _count_above(screened, row, cut, n_features, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n_features, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(screened + row * n_features + columns, mask=columns < n_features, other=0.0).to(tl.float32)
        total += ((values > 0) & (values >= cut)).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def count_of_rows(
    screened,
    rows,
    peaks,
    cuts,
    counts,
    k,
    n_features,
    width,
    row_width,
    rows_per_layer,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write each row's cut, below which none of its k largest is screened, and how many numbers reach it.

    The k-th largest of the maxima of groups of features is no larger than the k-th largest of all, since k groups hold
    one each. It is searched bit by bit: among positive bfloat16 numbers, bits keep the order. GROUPS 0: the cut is 0.
    """
    row = tl.program_id(0).to(tl.int64)
    cut = 0.0
    if GROUPS > 0:
        keys = _group_maxima(screened, row, n_features, GROUPS).to(tl.int32, bitcast=True) >> 16
        kth = 0
        for bit in tl.static_range(15):
            trial = kth | (1 << (14 - bit))
            kth = tl.where(tl.sum((keys >= trial).to(tl.int32), 0) >= k, trial, kth)
        value = (kth << 16).to(tl.float32, bitcast=True)
        of_layer = peaks + row // rows_per_layer * 2
        cut = _lowered(value, rows, row, of_layer, width, row_width) * (1 - ROUNDING)
    tl.store(cuts + row, cut)
    tl.store(counts + row, _count_above(screened, row, cut, n_features, BLOCK))


@triton.jit
def maxima_of_rows(screened, rows, peaks, keys, n_features, width, row_width, rows_per_layer, GROUPS: tl.constexpr):
    """Write what the largest number of each group of a row's features is at least: a bfloat16, as its bits."""
    row = tl.program_id(0).to(tl.int64)
    of_layer = peaks + row // rows_per_layer * 2
    lowered = _lowered(_group_maxima(screened, row, n_features, GROUPS), rows, row, of_layer, width, row_width)
    bits = lowered.to(tl.int32, bitcast=True) >> 16
    tl.store(keys + row * GROUPS + tl.arange(0, GROUPS), bits.to(tl.int16))


@triton.jit
def _digits(histograms, n_wanted, LEVELS: tl.constexpr):
    """Return the leading digits, LEVELS of them, of the n-th largest key, and the n that is left among those equal."""
    prefix, left = 0, n_wanted
    for level in tl.static_range(LEVELS):
        bins = tl.arange(0, 256)
        histogram = tl.load(histograms + level * 256 + bins)
        larger = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)
        digit = tl.minimum(tl.sum((larger >= left).to(tl.int32), 0), 255)
        left -= tl.sum(tl.where(bins == digit, larger, 0), 0)
        prefix = (prefix << 8) | digit
    return prefix, left


@triton.jit
def count_digits(values, histograms, n_wanted, n, LEVEL: tl.constexpr, ARE_KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Add to a histogram the digit LEVEL of keys whose digits before are those of the n-th largest.

    Keys are positive float32 numbers by their 31 bits, or bfloat16 ones by 15, one bit up, in digits of eight bits.
    Integers are added, so the order does not count.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if ARE_KEYS:
        keys = tl.load(values + at, mask=at < n, other=0).to(tl.int32) << 1
        shift: tl.constexpr = 8 - 8 * LEVEL
    else:
        numbers = tl.maximum(tl.load(values + at, mask=at < n, other=0.0), 0.0)
        keys = numbers.to(tl.int32, bitcast=True)
        shift: tl.constexpr = 24 - 8 * LEVEL
    prefix, _ = _digits(histograms, n_wanted, LEVEL)
    ours = keys > 0
    if LEVEL > 0:
        ours = ours & ((keys >> (shift + 8)) == prefix)
    digit = (keys >> shift) & 255
    bins = tl.arange(0, 256)
    # what is not counted is counted as 0, and taken off again
    histogram = tl.histogram(tl.where(ours, digit, 0), 256) - tl.where(bins == 0, tl.sum((~ours).to(tl.int32), 0), 0)
    tl.atomic_add(histograms + LEVEL * 256 + bins, histogram, mask=histogram != 0)


@triton.jit
def count_of_batch(screened, histograms, cuts, counts, n_wanted, n_features, BLOCK: tl.constexpr):
    """Write the batch's cut, the n-th largest of the groups' lowered maxima, and how many numbers of a row reach it."""
    row = tl.program_id(0).to(tl.int64)
    prefix, _ = _digits(histograms, n_wanted, 2)
    cut = (prefix << 15).to(tl.float32, bitcast=True) * (1 - ROUNDING)
    tl.store(cuts + row, cut)
    tl.store(counts + row, _count_above(screened, row, cut, n_features, BLOCK))


@triton.jit
def write_pairs(
    screened,
    cuts,
    ends,
    counts,
    features,
    rows,
    overflow,
    n_rows,
    n_features,
    n_slots,
    rows_per_layer,
    d_sae,
    BLOCK: tl.constexpr,
):
    """List the features of a row whose screened numbers reach its cut. A program a row, and a part of unused slots.

    ``overflow`` becomes 1 if there are more than fit.
    """
    row = tl.program_id(0).to(tl.int64)
    cut = tl.load(cuts + row)
    slot = tl.load(ends + row) - tl.load(counts + row)
    first = (row // rows_per_layer * n_features).to(tl.int32)
    for start in range(0, n_features, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(screened + row * n_features + columns, mask=columns < n_features, other=0.0).to(tl.float32)
        hits = ((values > 0) & (values >= cut)).to(tl.int32)
        n_hits = tl.sum(hits, 0)
        if n_hits > 0:
            slots = slot + tl.cumsum(hits, 0) - 1
            inside = (hits > 0) & (slots < n_slots)
            tl.store(features + slots, first + columns, mask=inside)
            tl.store(rows + slots, tl.full((BLOCK,), 0, tl.int32) + row.to(tl.int32), mask=inside)
        slot += n_hits
    used = tl.load(ends + n_rows - 1)
    tl.store(overflow, (used > n_slots).to(tl.int32), mask=row == 0)
    begin = tl.maximum(used, row * n_slots // n_rows)
    for start in range(begin, (row + 1) * n_slots // n_rows, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        inside = slots < (row + 1) * n_slots // n_rows
        tl.store(features + slots, tl.full((BLOCK,), 0, tl.int32) + d_sae, mask=inside)
        tl.store(rows + slots, tl.full((BLOCK,), 0, tl.int32), mask=inside)


@triton.jit
def keep_of_rows(pre, ends, counts, k, n_slots, BLOCK: tl.constexpr):
    """Set to zero all but the k largest positive numbers of each row; of equal ones the first are kept."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(ends + row)
    begin = tl.minimum(end - tl.load(counts + row), n_slots)
    end = tl.minimum(end, n_slots)
    kth, n_above = 0, 0
    for bit in tl.static_range(31):
        trial = kth | (1 << (30 - bit))
        n = 0
        for start in range(begin, end, BLOCK):
            n += tl.sum((_keys(pre, start, end, BLOCK) >= trial).to(tl.int32), 0)
        kth = tl.where(n >= k, trial, kth)
    for start in range(begin, end, BLOCK):
        n_above += tl.sum((_keys(pre, start, end, BLOCK) > kth).to(tl.int32), 0)
    _zero_below(pre, begin, end, kth, k - n_above, BLOCK)


@triton.jit
def _keys(pre, start, end, BLOCK: tl.constexpr):
    """Return the bits of positive numbers, zero for others; they keep the numbers' order."""
    slots = start + tl.arange(0, BLOCK)
    values = tl.load(pre + slots, mask=slots < end, other=0.0)
    return tl.maximum(values, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def _zero_below(pre, begin, end, kth, n_equal, BLOCK: tl.constexpr):
    """Set to zero what is not positive or below the key ``kth``, and all but the first ``n_equal`` equal to it."""
    for start in range(begin, end, BLOCK):
        keys = _keys(pre, start, end, BLOCK)
        equal = (keys == kth).to(tl.int32)
        kept = (keys > kth) | ((equal > 0) & (tl.cumsum(equal, 0) <= n_equal))
        n_equal -= tl.sum(equal, 0)
        slots = start + tl.arange(0, BLOCK)
        tl.store(pre + slots, tl.zeros((BLOCK,), tl.float32), mask=(slots < end) & ((keys == 0) | (kept == 0)))


@triton.jit
def count_equal(pre, ends, counts, histograms, equal, n_wanted, n_slots, BLOCK: tl.constexpr):
    """Write how many numbers of each row equal the n-th largest of the batch."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(ends + row)
    begin = tl.minimum(end - tl.load(counts + row), n_slots)
    end = tl.minimum(end, n_slots)
    kth, _ = _digits(histograms, n_wanted, 4)
    n = 0
    for start in range(begin, end, BLOCK):
        n += tl.sum((_keys(pre, start, end, BLOCK) == kth).to(tl.int32), 0)
    tl.store(equal + row, n)


@triton.jit
def keep_of_batch(pre, ends, counts, histograms, equal, equal_ends, n_wanted, n_slots, BLOCK: tl.constexpr):
    """Set to zero all but the n largest positive numbers of the batch; of equal ones the first are kept."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(ends + row)
    begin = tl.minimum(end - tl.load(counts + row), n_slots)
    end = tl.minimum(end, n_slots)
    kth, n_equal = _digits(histograms, n_wanted, 4)
    before = tl.load(equal_ends + row) - tl.load(equal + row)
    _zero_below(pre, begin, end, kth, n_equal - before, BLOCK)
