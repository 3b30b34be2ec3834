"""From committed contexts to the rows of one unit: the language model over a fixed grid of batches.

Batch g is always contexts [gB, (g+1)B), padded to B with repeats where the split ends, so what a row holds depends on
its context and the grid alone: not on which unit asks, in which process, or whether the cache was made in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.storage.cache_format import CacheFormat
from tailrace.storage.context_blocks import ContextBlocks
from tailrace.storage.errors import ActivationOverflow

RowMask = Callable[[np.ndarray], np.ndarray]
"""Token ids (contexts, context_length) → which positions become rows, bool of the same shape."""

_FLOAT16_LIMIT = 65504.0
_TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.float32,  # quantised when the row is stored
}


@dataclass(frozen=True)
class UnitTask:
    """One unit to write, and where its rows begin on the grid."""

    split: str
    unit: int
    n_rows: int
    first_batch: int
    skipped_rows: int
    """Rows of the first batch that belong to the unit before."""
    n_contexts: int
    """Contexts of the split that may be read; beyond them the last batch is padded."""


@dataclass(frozen=True)
class Rows:
    """Rows in token order: where each comes from, and its activations in storage dtype by ``site/side``."""

    provenance: Mapping[str, np.ndarray]
    activations: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.provenance["context"])

    def cut(self, start: int, stop: int) -> Rows:
        """Return rows [start, stop)."""
        return Rows(
            {name: values[start:stop] for name, values in self.provenance.items()},
            {key: values[start:stop] for key, values in self.activations.items()},
        )


class RowProducer:
    """Runs the language model over grid batches; remembers the last one, which two units may share."""

    def __init__(
        self,
        model: LanguageModel,
        sites: Sequence[SiteHooks],
        layout: CacheFormat,
        contexts: Mapping[str, ContextBlocks],
        row_mask: RowMask,
        contexts_per_batch: int,
    ) -> None:
        self._model, self._sites, self._layout = model, list(sites), layout
        self._contexts, self._row_mask = contexts, row_mask
        self.contexts_per_batch = contexts_per_batch
        self._last: tuple[tuple[str, int, int], Rows] | None = None

    def unit_rows(self, task: UnitTask) -> Iterator[Rows]:
        """Yield the rows of one unit, a grid batch at a time."""
        missing, skipped, batch = task.n_rows, task.skipped_rows, task.first_batch
        while missing:
            rows = self.batch_rows(task.split, batch, task.n_contexts)
            piece = rows.cut(skipped, min(len(rows), skipped + missing))
            if len(piece):
                yield piece
            missing -= len(piece)
            skipped, batch = 0, batch + 1

    def batch_rows(self, split: str, batch: int, n_contexts: int) -> Rows:
        """Return all rows of one grid batch."""
        start = batch * self.contexts_per_batch
        stop = min(start + self.contexts_per_batch, n_contexts)
        assert start < stop, f"batch {batch} of {split} lies beyond its {n_contexts} contexts"
        identity = (split, batch, stop)
        if self._last is None or self._last[0] != identity:
            self._last = (identity, self._run(split, start, stop))
        return self._last[1]

    def _run(self, split: str, start: int, stop: int) -> Rows:
        tokens, documents = self._contexts[split].read(start, stop)
        kept = self._row_mask(tokens)
        provenance = provenance_of(tokens, documents, kept, start)
        padded = np.concatenate([tokens, np.repeat(tokens[-1:], self.contexts_per_batch - len(tokens), 0)])
        captured = self._model.capture(torch.from_numpy(padded.astype(np.int64)), self._sites)
        mask = torch.from_numpy(kept).to(self._model.device)
        activations = {}
        for site in self._sites:
            stored = self._layout.site(site.name)
            for side in stored.sides:
                values = captured[site.hook_in if side == "in" else site.hook_out][: len(tokens)][mask]
                activations[f"{site.name}/{side}"] = to_storage(values, stored.dtype, f"{site.name}/{side}", provenance)
        return Rows(provenance, activations)


def provenance_of(
    tokens: np.ndarray, documents: np.ndarray, kept: np.ndarray, first_context: int
) -> dict[str, np.ndarray]:
    """Return where each kept position of contexts (n, context_length) comes from, in token order."""
    context, position = np.nonzero(kept)
    return {
        "token_id": tokens[context, position].astype(np.int32),
        "context": (context + first_context).astype(np.uint32),
        "position": position.astype(np.uint16),
        "document": documents[context, position].astype(np.uint32),
    }


def to_storage(values: torch.Tensor, dtype: str, key: str, provenance: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return rows (n, d) in the NumPy form the writer wants; raise ActivationOverflow beyond float16."""
    if dtype == "float16" and values.dtype != torch.float16:
        largest = values.abs().amax(dim=1) if len(values) else values.new_zeros(1)
        if bool((largest.isfinite() & (largest > _FLOAT16_LIMIT)).any()):
            row = int(torch.where(largest.isfinite(), largest, 0).argmax())
            raise ActivationOverflow(
                f"{key}: {float(largest[row]):.6g} in context {int(provenance['context'][row])}, position "
                f"{int(provenance['position'][row])} is beyond float16 ({_FLOAT16_LIMIT:g}). Finished units are kept; "
                "run again with --storage-dtype bfloat16 and another --out"
            )
    stored = values.to(device="cpu", dtype=_TORCH_DTYPES[dtype]).contiguous()
    return stored.view(torch.uint16).numpy() if dtype == "bfloat16" else stored.numpy()
