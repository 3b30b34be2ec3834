"""On how many different tokens each feature fires: from one (a word) to thousands (a context)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from tailrace.analysis.harvest import loops
from tailrace.analysis.harvest.activations import KeptPairs, RowPlaces
from tailrace.analysis.harvest.contexts import tokens_at
from tailrace.analysis.harvest.one_pass import Harvest, Subject


class TokenDiversity:
    """The columns ``n_token_ids`` and ``token_id_share``, exact over the rows whose pairs are kept."""

    def __init__(self, harvest: Harvest, subject: Subject) -> None:
        places = harvest[RowPlaces]
        self._kept = harvest[KeptPairs]
        self._token_of_row = tokens_at(subject.split, places.contexts, places.positions)
        self._seen = np.full(int(self._token_of_row.max(initial=0)) + 1, -1, np.int64)
        self._n_ids = len(np.unique(self._token_of_row))

    def of(self, features: range) -> dict[str, Any]:
        """Return the values of one of ``feature_ranges``."""
        counts = np.empty(len(features), np.int64)
        for pairs in self._kept.sorted_pairs(features):
            own = counts[pairs.features.start - features.start : pairs.features.stop - features.start]
            loops.count_distinct(pairs.offsets, pairs.row, self._token_of_row, pairs.first_feature, self._seen, own)
        # with no row kept there is nothing to have a share of
        return {
            "n_token_ids": counts,
            "token_id_share": counts / self._n_ids if self._n_ids else np.full(len(counts), np.nan),
        }

    @staticmethod
    def nulls(n: int) -> dict[str, Any]:
        """Return the values of ``n`` features where no pairs were kept."""
        return {"n_token_ids": pa.nulls(n, pa.int32()), "token_id_share": pa.nulls(n, pa.float64())}
