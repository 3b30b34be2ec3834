"""What each operator moves between a GPU's memory and its processors, declared.

No profiler is at hand where a step is planned. By operand: the bytes read or written, and how. The tests compare them
with every access of the interpreted programs, and ``benchmarks/gpu_step.py`` adds up a step's bytes from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import triton

from tailrace.training.kernels.device import operators

CACHE_BYTES = 40 << 20
"""What of an operand that is read here and there is thought to stay in a GPU's cache, which is 50 MB on an H200. Of a
larger operand, that share of the accesses finds what it looks for."""


class Sizes(NamedTuple):
    """What traffic depends on besides shapes."""

    n_pairs: int
    """Slots in use."""
    n_chosen: int
    """Pairs whose value is not zero."""


class Traffic(NamedTuple):
    """What an operator does with one operand."""

    accessed: int
    """Bytes read and written."""
    size: int
    """Bytes of the operand."""
    in_order: bool = True
    """Whether an element's accesses follow soon after one another."""
    both_ways: bool = False
    """Whether it is read and written."""

    @property
    def from_memory(self) -> int:
        """Bytes that go between memory and cache."""
        once = min(self.accessed, self.size * (2 if self.both_ways else 1))
        missed = 0.0 if self.in_order else max(0.0, 1 - CACHE_BYTES / max(1, self.size))
        return once + int(missed * (self.accessed - once))

    @property
    def from_cache(self) -> int:
        """Bytes that go between cache and processors: what is read again soon is still at hand there."""
        return self.from_memory if self.in_order else self.accessed


Declared = dict[str, Traffic]
Arguments = Mapping[str, Any]
"""Those of an operator, by name."""


def _all(arguments: Arguments, *, both_ways: bool = False, **times: int) -> Declared:
    """Return the traffic of operands whose every element is accessed so many times in order."""
    sizes = {name: arguments[name].nbytes for name in times}
    return {name: Traffic(sizes[name] * n, sizes[name], both_ways=both_ways) for name, n in times.items()}


def _some(arguments: Arguments, *, in_order: bool = True, **elements: int) -> Declared:
    """Return the traffic of operands of which so many elements are accessed, once or more."""
    return {
        name: Traffic(n * arguments[name].element_size(), arguments[name].nbytes, in_order)
        for name, n in elements.items()
    }


def _screen_vectors(a: Arguments, _: Sizes) -> Declared:
    return _all(a, vectors=1, out=1, norms=1)


def _screen_bias(a: Arguments, _: Sizes) -> Declared:
    declared = {**_all(a, bias=1), **_some(a, out=2 * len(a["bias"]))}
    return declared if a["floor"] is None else {**declared, **_all(a, floor=1)}


def _count_of_rows(a: Arguments, _: Sizes) -> Declared:
    grouped = a["k"] > 0 and operators.n_groups(a["k"], a["screened"].shape[1]) > 0
    declared = _all(a, screened=2 if grouped else 1, cuts=1, counts=1)
    n_rows = len(a["cuts"])
    return {**declared, **_some(a, rows=2 * n_rows, peaks=2 * n_rows)} if grouped else declared


def _maxima_of_rows(a: Arguments, _: Sizes) -> Declared:
    n_rows = len(a["keys"])
    return {**_all(a, screened=1, keys=1), **_some(a, rows=2 * n_rows, peaks=2 * n_rows)}


def _count_digits(a: Arguments, _: Sizes) -> Declared:
    # of a histogram, a program reads the levels before its own and adds to its own
    n_programs = triton.cdiv(a["values"].numel(), operators.DIGITS_BLOCK)
    return {**_all(a, values=1), **_some(a, histograms=n_programs * 256 * (a["level"] + 2))}


def _count_of_batch(a: Arguments, _: Sizes) -> Declared:
    return {**_all(a, screened=1, cuts=1, counts=1), **_some(a, histograms=len(a["cuts"]) * 512)}


def _write_pairs(a: Arguments, _: Sizes) -> Declared:
    return _all(a, screened=1, cuts=1, ends=2, counts=1, features=1, rows=1, overflow=1)


def _keep_of_rows(a: Arguments, sizes: Sizes) -> Declared:
    # once for each bit, twice for what is equal, and a zero for what is left out
    return {**_all(a, ends=1, counts=1), **_some(a, pre=34 * sizes.n_pairs - sizes.n_chosen)}


def _count_equal(a: Arguments, sizes: Sizes) -> Declared:
    n_rows = len(a["ends"])
    return {**_all(a, ends=1, counts=1, equal=1), **_some(a, pre=sizes.n_pairs, histograms=n_rows * 1024)}


def _keep_of_batch(a: Arguments, sizes: Sizes) -> Declared:
    n_rows = len(a["ends"])
    return {
        **_all(a, ends=1, counts=1, equal=1, equal_ends=1),
        **_some(a, pre=2 * sizes.n_pairs - sizes.n_chosen, histograms=n_rows * 1024),
    }


def _pair_dots(a: Arguments, sizes: Sizes) -> Declared:
    n = sizes.n_pairs if a["chosen"] is None else sizes.n_chosen
    width = a["by_row"].shape[1]
    declared = {
        **_all(a, features=1, order=1, out=1),
        **_some(a, in_order=False, by_row=n * width),
        **_some(a, by_feature=n * width, rows=n),  # in the order of features
    }
    if a["bias"] is not None:
        declared |= _some(a, bias=n)
    return declared if a["chosen"] is None else {**declared, **_some(a, chosen=sizes.n_pairs)}


def _decode(a: Arguments, sizes: Sizes) -> Declared:
    width = a["weights"].shape[1]
    n_groups, n_rows = a["out"].shape[:2]
    n_blocks = triton.cdiv(width, operators.column_block(width))
    times = n_blocks * n_groups
    per_row = n_rows * times
    return {
        **_all(a, out=1),
        **_some(a, values=sizes.n_pairs * times, features=sizes.n_pairs * times),
        **_some(a, in_order=False, weights=sizes.n_chosen * width),
        **_some(a, ends=per_row, counts=per_row, norms=per_row, group_ends=n_rows * n_blocks * (2 * n_groups - 1)),
    }


def _gather(a: Arguments, sizes: Sizes) -> Declared:
    return {**_all(a, features=1, out=1), **_some(a, per_feature=sizes.n_pairs)}


def _sum_rows(a: Arguments, sizes: Sizes) -> Declared:
    return {**_all(a, ends=1, counts=1, out=1), **_some(a, values=sizes.n_pairs)}


def _sum_features(a: Arguments, sizes: Sizes) -> Declared:
    n = sizes.n_pairs
    return {**_all(a, out=1), **_some(a, values=n, order=n, bounds=2 * len(a["out"]))}


def _at_pairs(a: Arguments, sizes: Sizes, *, width: int, n_features: int, n_blocks: int, times: int) -> Declared:
    """Return the traffic of a gradient that is summed at pairs, in so many blocks of columns, so many times."""
    n = sizes.n_pairs * n_blocks * times
    return {
        **_some(a, weights=n, rows=n, order=n, bounds=2 * n_features * (n_blocks if "gradient" in a else 1)),
        **_some(a, in_order=False, by_row=sizes.n_chosen * width * times),
    }


def _outer(a: Arguments, sizes: Sizes) -> Declared:
    n_features, width = a["gradient"].shape
    n_blocks = triton.cdiv(width, operators.column_block(width))
    declared = _at_pairs(a, sizes, width=width, n_features=n_features, n_blocks=n_blocks, times=1)
    # at most: rows without a pair are left alone
    taken_off = {} if a["taken_off"] is None else _some(a, taken_off=n_features * width)
    return {**declared, **_all(a, both_ways=True, gradient=2), **taken_off}


def _adam_rows(a: Arguments, sizes: Sizes) -> Declared:
    n_features, width = a["parameter"].shape
    n_blocks = triton.cdiv(width, operators.row_block(width))
    unit, times = a["unit_norm"], 2 if a["unit_norm"] and n_blocks > 1 else 1
    # a unit row is read for its part along itself, to take that off, and to step; one of several blocks again to shrink
    reads_and_writes = 2 if not unit else (4 if n_blocks == 1 else 6)
    declared = {
        **_all(a, both_ways=True, parameter=reads_and_writes, mean=2, square=2),
        **_some(a, numbers=3 * n_features, overflow=n_features),
    }
    if a["screened"] is not None:
        declared |= _some(a, screened=n_features * (width + 2))
    if a["gradient"] is not None:
        declared |= _all(a, gradient=times)
    if a["pairs"]:
        lists = dict(zip(("weights", "by_row", "rows", "order", "bounds"), a["pairs"], strict=True))
        sums = {"width": width, "n_features": n_features, "n_blocks": n_blocks, "times": times}
        declared |= _at_pairs(lists, sizes, **sums)
        if a["taken_off"] is not None:
            declared |= _some(a, taken_off=n_features * width * times)
    return declared


def _adam_numbers(a: Arguments, _: Sizes) -> Declared:
    n_programs = triton.cdiv(a["parameter"].numel(), operators.NUMBERS_BLOCK)
    return {
        **_all(a, gradient=1),
        **_all(a, both_ways=True, parameter=2, mean=2, square=2),
        **_some(a, numbers=3 * n_programs, overflow=n_programs),
    }


def _write_numbers(a: Arguments, _: Sizes) -> Declared:
    return _all(a, out=1)


TRAFFIC: dict[str, Callable[[Arguments, Sizes], Declared]] = {
    "screen_vectors": _screen_vectors,
    "screen_bias": _screen_bias,
    "count_of_rows": _count_of_rows,
    "maxima_of_rows": _maxima_of_rows,
    "count_digits": _count_digits,
    "count_of_batch": _count_of_batch,
    "write_pairs": _write_pairs,
    "keep_of_rows": _keep_of_rows,
    "count_equal": _count_equal,
    "keep_of_batch": _keep_of_batch,
    "pair_dots": _pair_dots,
    "decode": _decode,
    "gather": _gather,
    "sum_rows": _sum_rows,
    "sum_features": _sum_features,
    "outer": _outer,
    "adam_rows": _adam_rows,
    "adam_numbers": _adam_numbers,
    "write_numbers": _write_numbers,
}
"""By operator."""
