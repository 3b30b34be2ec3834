"""Inner loops of the pass over active pairs, compiled; every loop writes into its last arrays.

*Pairs by feature* are three arrays: ``offsets`` (features + 1), where each feature's pairs begin; ``rows``, ascending
within a feature; ``values``, the activations. Sums run in that order in float64, so a sum is the same to the bit
however the work is shared.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tailrace.storage.compiled import compiled_loop


@compiled_loop()
def add_pairs(
    offsets: Any,
    rows: Any,
    values: Any,
    bits: Any,
    bin_of_cell: Any,
    high_edge: Any,
    position_bin: Any,
    n_active: Any,
    sums: Any,
    squares: Any,
    maximum: Any,
    histogram: Any,
    profile: Any,
) -> None:
    """Count pairs into the totals of their features; ``bits`` are the values as uint32, for ``find_bins``'s look-up."""
    for feature in range(len(offsets) - 1):
        first, last = offsets[feature], offsets[feature + 1]
        total, square, largest = 0.0, 0.0, maximum[feature]
        for pair in range(first, last):
            value = values[pair]
            exact = np.float64(value)
            total += exact
            square += exact * exact
            largest = max(largest, value)
            bin_index = bin_of_cell[bits[pair] >> np.uint32(16)]
            if value >= high_edge[bin_index]:
                bin_index += 1
            histogram[feature, bin_index] += 1
            profile[feature, position_bin[rows[pair]]] += 1
        n_active[feature] += last - first
        sums[feature] += total
        squares[feature] += square
        maximum[feature] = largest


@compiled_loop("reassoc", "contract", "nsz")
def add_rows(outputs: Any, predicted: Any, center: Any, deviation: Any, sums: Any) -> None:
    """Add to ``sums`` Σ‖y − ŷ‖² and Σ‖y − c‖², and to ``deviation`` Σ(y − c), in one reading of both matrices."""
    error, squared = 0.0, 0.0
    for row in range(outputs.shape[0]):
        true, guess = outputs[row], predicted[row]
        for column in range(outputs.shape[1]):
            value = np.float64(true[column])
            missed = value - np.float64(guess[column])
            error += missed * missed
            apart = value - center[column]
            deviation[column] += apart
            squared += apart * apart
    sums[0] += error
    sums[1] += squared


@compiled_loop()
def keep_strongest(
    offsets: Any,
    rows: Any,
    values: Any,
    contexts: Any,
    n_kept: Any,
    slots: Any,
    activations: Any,
    chosen_pair: Any,
    chosen_feature: Any,
    chosen_slot: Any,
) -> int:
    """Keep each feature's strongest row of every context if it is among the strongest so far; earlier rows win ties.

    ``activations`` and ``slots`` (features, n) are by rank; a slot is the index of an example's other parts. Returns
    how many were kept; their pair, feature and slot are listed, and one listed later may take over a slot.
    """
    n, n_chosen = activations.shape[1], 0
    for feature in range(len(offsets) - 1):
        pair, last = offsets[feature], offsets[feature + 1]
        while pair < last:
            best, context = pair, contexts[rows[pair]]
            pair += 1
            while pair < last and contexts[rows[pair]] == context:
                if values[pair] > values[best]:
                    best = pair
                pair += 1
            value, rank = values[best], n_kept[feature]
            if rank == n:
                if not value > activations[feature, n - 1]:
                    continue
                rank, slot = n - 1, slots[feature, n - 1]
            else:
                slot = rank
                n_kept[feature] += 1
            while rank > 0 and activations[feature, rank - 1] < value:
                activations[feature, rank] = activations[feature, rank - 1]
                slots[feature, rank] = slots[feature, rank - 1]
                rank -= 1
            activations[feature, rank], slots[feature, rank] = value, slot
            chosen_pair[n_chosen], chosen_feature[n_chosen], chosen_slot[n_chosen] = best, feature, slot
            n_chosen += 1
    return n_chosen


@compiled_loop()
def fill_windows(
    offsets: Any,
    rows: Any,
    values: Any,
    contexts: Any,
    positions: Any,
    pairs: Any,
    features: Any,
    slots: Any,
    before: int,
    windows: Any,
) -> None:
    """Write the feature's activations around each chosen pair into its slot of ``windows`` (slots, width).

    NaN where the pair's context has no such position or no such row, 0 where the feature is not active.
    """
    after = windows.shape[1] - 1 - before
    for index in range(len(pairs)):
        pair, feature, window = pairs[index], features[index], windows[slots[index]]
        row = rows[pair]
        context, position = contexts[row], positions[row]
        window[:] = np.nan
        other = row
        while other >= 0 and contexts[other] == context and positions[other] >= position - before:
            window[positions[other] - position + before] = 0
            other -= 1
        other = row + 1
        while other < len(contexts) and contexts[other] == context and positions[other] <= position + after:
            window[positions[other] - position + before] = 0
            other += 1
        near = pair
        while near >= offsets[feature]:
            other = rows[near]
            if contexts[other] != context or positions[other] < position - before:
                break
            window[positions[other] - position + before] = values[near]
            near -= 1
        near = pair + 1
        while near < offsets[feature + 1]:
            other = rows[near]
            if contexts[other] != context or positions[other] > position + after:
                break
            window[positions[other] - position + before] = values[near]
            near += 1


@compiled_loop()
def sort_by_feature(
    features: Any, rows: Any, values: Any, start: int, stop: int, cursor: Any, sorted_rows: Any, sorted_values: Any
) -> None:
    """Write pairs of features [start, stop) to the next slot of their feature, ``cursor``, and advance it."""
    for pair in range(len(features)):
        feature = np.int64(features[pair])
        if start <= feature < stop:
            slot = cursor[feature - start]
            sorted_rows[slot] = rows[pair]
            sorted_values[slot] = values[pair]
            cursor[feature - start] = slot + 1


@compiled_loop()
def count_distinct(offsets: Any, rows: Any, token_of_row: Any, stamp: int, seen: Any, distinct: Any) -> None:
    """Write how many token ids each feature's rows have; ``seen`` (token ids) holds no stamp from ``stamp`` on."""
    for feature in range(len(offsets) - 1):
        n = 0
        for pair in range(offsets[feature], offsets[feature + 1]):
            token = token_of_row[rows[pair]]
            if seen[token] != stamp + feature:
                seen[token] = stamp + feature
                n += 1
        distinct[feature] = n


@compiled_loop()
def pick_by_hash(
    offsets: Any,
    rows: Any,
    values: Any,
    keys: Any,
    maximum: Any,
    n_bands: int,
    n_band: int,
    n_random: int,
    hashes: Any,
    picks: Any,
) -> None:
    """Write each feature's pairs of smallest hash: ``n_band`` of every band, then ``n_random`` of all; −1 for none.

    A pair's hash is ``tailrace.analysis.harvest.examples.mixed(keys[feature] + row)``. Band b holds the values
    in (maximum · b / n_bands, maximum · (b + 1) / n_bands]. ``hashes`` (as long as a row of ``picks``) is overwritten.
    """
    filled = np.zeros(n_bands + 1, np.int64)
    for feature in range(len(offsets) - 1):
        filled[:] = 0
        picks[feature, :] = -1
        peak = np.float64(maximum[feature])
        for pair in range(offsets[feature], offsets[feature + 1]):
            bits = keys[feature] + np.uint64(rows[pair])
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            bits = bits ^ (bits >> np.uint64(31))
            value = np.float64(values[pair])
            band = int(value * n_bands / peak)  # off by rounding at most, which the edges correct
            if band >= n_bands:
                band = n_bands - 1
            while band > 0 and value <= peak * band / n_bands:
                band -= 1
            while band < n_bands - 1 and value > peak * (band + 1) / n_bands:
                band += 1
            for group in (band, n_bands):
                size = n_random if group == n_bands else n_band
                start = group * n_band
                rank = filled[group]
                if rank == size:
                    if size == 0 or bits >= hashes[start + size - 1]:
                        continue
                    rank = size - 1
                else:
                    filled[group] += 1
                while rank > 0 and hashes[start + rank - 1] > bits:
                    hashes[start + rank] = hashes[start + rank - 1]
                    picks[feature, start + rank] = picks[feature, start + rank - 1]
                    rank -= 1
                hashes[start + rank] = bits
                picks[feature, start + rank] = pair


@compiled_loop()
def keep_listed(features: Any, offsets: Any, number: Any, kept: Any, kept_offsets: Any) -> int:
    """Write rows' features by their ``number``, without those numbered −1; returns how many are left."""
    n = 0
    kept_offsets[0] = 0
    for row in range(len(offsets) - 1):
        for pair in range(offsets[row], offsets[row + 1]):
            numbered = number[features[pair]]
            if numbered >= 0:
                kept[n] = numbered
                n += 1
        kept_offsets[row + 1] = n
    return n


@compiled_loop()
def list_rows(features: Any, offsets: Any, start: int, stop: int, row_offsets: Any, rows: Any) -> None:
    """Write the rows of each of features [start, stop), and the offsets at which they begin (stop − start + 1)."""
    row_offsets[:] = 0
    for feature in features[: offsets[-1]]:
        if start <= feature < stop:
            row_offsets[feature - start + 1] += 1
    for feature in range(stop - start):
        row_offsets[feature + 1] += row_offsets[feature]
    next_slot = row_offsets[:-1].copy()
    for row in range(len(offsets) - 1):
        for pair in range(offsets[row], offsets[row + 1]):
            feature = features[pair]
            if start <= feature < stop:
                rows[next_slot[feature - start]] = row
                next_slot[feature - start] += 1


@compiled_loop()
def count_together(
    features: Any, offsets: Any, row_offsets: Any, rows: Any, counts: Any, start: int, stop: int
) -> None:
    """Add to ``counts`` (features, others) the rows on which both are active, for features [start, stop).

    A feature's counts stay in the processor's cache while all its rows are read.
    """
    for feature in range(start, stop):
        own = counts[feature]
        for index in range(row_offsets[feature], row_offsets[feature + 1]):
            row = rows[index]
            for pair in range(offsets[row], offsets[row + 1]):
                own[features[pair]] += 1


@compiled_loop()
def largest_phi(
    counts: Any, n_active: Any, roots: Any, n_rows: float, first: int, others: Any, phis: Any, start: int, stop: int
) -> None:
    """Write, for features first + [start, stop), the others of largest φ above zero, falling; −1 where there are none.

    φ = (n·n₁₁ − n₁·n₂) / √(n₁(n − n₁) n₂(n − n₂)), the correlation of two binary variables; of equal φ the
    first feature. ``roots`` are √(n₁(n − n₁)).
    """
    n_top = others.shape[1]
    for feature in range(start, stop):
        own, n_own, root = counts[feature], np.float64(n_active[first + feature]), roots[first + feature]
        others[feature, :] = -1
        phis[feature, :] = 0.0
        for other in range(len(own)):
            if own[other] == 0 or other == first + feature:
                continue
            excess = n_rows * own[other] - n_own * n_active[other]
            if not excess > 0:
                continue
            phi = excess / (root * roots[other])
            rank = n_top - 1
            if not phi > phis[feature, rank]:
                continue
            while rank > 0 and phi > phis[feature, rank - 1]:
                phis[feature, rank] = phis[feature, rank - 1]
                others[feature, rank] = others[feature, rank - 1]
                rank -= 1
            phis[feature, rank], others[feature, rank] = phi, other
