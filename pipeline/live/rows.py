"""From contexts to rows as the buffer keeps them: one pass of the language model, checked, in storage dtype.

A bad value is named by its hook and its token here, where that is still known: in the buffer rows are mixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tailrace.pipeline.cache.rows import RowMask, provenance_of
from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ActivationOverflow, NonFiniteActivation

_NUMPY_BITS = {torch.bfloat16: torch.uint16}


class RowMaker:
    """Runs the language model over batches of one size and keeps the rows that the row filter keeps."""

    def __init__(self, model: LanguageModel, sites: Sequence[Site], row_mask: RowMask, contexts_per_batch: int) -> None:
        self.sites = tuple(sites)
        self._model, self._row_mask, self._per_batch = model, row_mask, contexts_per_batch
        self._hooks = [SiteHooks(site.name, site.hook_in, site.hook_out) for site in sites]

    def rows(self, tokens: np.ndarray, documents: np.ndarray, first_context: int) -> dict[str, Tensor]:
        """Return the rows of contexts (n, context_length) by ``site/side``, each (rows, d) on the CPU, in text order.

        Fewer contexts than a batch are padded with repeats, as in a cache, since a row's last bits depend on the shape
        of its batch. Raises NonFiniteActivation, or ActivationOverflow beyond the storage dtype, naming hook, context
        and position.
        """
        kept = self._row_mask(tokens)
        where = provenance_of(tokens, documents, kept, first_context)
        padded = np.concatenate([tokens, np.repeat(tokens[-1:], self._per_batch - len(tokens), 0)])
        captured = self._model.capture(torch.from_numpy(padded.astype(np.int64)), self._hooks)
        mask = torch.from_numpy(kept).to(self._model.device)
        rows = {}
        for site in self.sites:
            for side in site.sides:
                hook = site.hook_in if side == "in" else site.hook_out
                values = captured[hook][: len(tokens)][mask]
                rows[f"{site.name}/{side}"] = to_buffer(values, torch_dtype(site), hook, where)
        return rows


def torch_dtype(site: Site) -> torch.dtype:
    """Return the dtype that a site's rows are kept in."""
    dtype = getattr(torch, site.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def to_buffer(values: Tensor, dtype: torch.dtype, hook: str, where: Mapping[str, np.ndarray]) -> Tensor:
    """Return rows (n, d) on the CPU in ``dtype``; refuse what it cannot hold. ``where``: provenance of the rows."""
    limit = torch.finfo(dtype).max
    largest = values.abs().amax(dim=1).cpu()  # keeps NaN
    bad = torch.nonzero(~(largest <= limit)).flatten()
    if len(bad):
        row = int(bad[0])
        place = f"{hook}, context {where['context'][row]}, position {where['position'][row]}"
        place += f" (document {where['document'][row]})"
        if bool(largest[row].isfinite()):
            raise ActivationOverflow(
                f"{place}: {float(largest[row]):.6g} is beyond {str(dtype).removeprefix('torch.')} ({limit:.6g}); "
                "start anew with --storage-dtype bfloat16, or float32"
            )
        raise NonFiniteActivation(
            f"{place}: NaN or infinity; the model overflows in {str(values.dtype).removeprefix('torch.')}. Run it with "
            "--model-dtype float32, leave this site out, or leave that document out"
        )
    return values.to(device="cpu", dtype=dtype).contiguous()


def as_array(rows: Tensor) -> np.ndarray:
    """View rows on the CPU as NumPy, bfloat16 as uint16 bits, which is what ``SiteStatistics`` reads."""
    return np.asarray(rows.view(_NUMPY_BITS.get(rows.dtype, rows.dtype)).numpy())
