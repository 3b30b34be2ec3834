"""From contexts to rows: the language model over a fixed grid of batches. Caches, live mode and fresh text use it.

Batch g is always contexts [gB, (g+1)B), padded to B with repeats where a split ends, so what a row holds depends on its
context and the grid alone: not on which unit asks, in which process, or whether the cache was made in one go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.pipeline.text.settings import RowMask
from tailrace.storage.cache_format import Site
from tailrace.storage.cache_writer import ContextBlocks
from tailrace.storage.errors import ActivationOverflow, NonFiniteActivation
from tailrace.training.rows.transfer import arrived, to_device, to_host


@dataclass(frozen=True)
class Rows:
    """Rows in token order: where each comes from, and its activations in storage dtype by ``site/side``.

    They are on the CPU, unless they were to stay where the model is.
    """

    provenance: Mapping[str, np.ndarray]
    activations: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.provenance["context"])

    def cut(self, start: int, stop: int) -> Rows:
        """Return rows [start, stop)."""
        return Rows(
            {name: values[start:stop] for name, values in self.provenance.items()},
            {key: values[start:stop] for key, values in self.activations.items()},
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the activations as NumPy arrays of the same memory."""
        return {key: as_array(values) for key, values in self.activations.items()}


class PendingRows:
    """Rows of a pass that may still be running: a GPU makes them and copies them out while the host goes on."""

    def __init__(
        self,
        provenance: Mapping[str, np.ndarray],
        values: Mapping[str, Tensor],
        dtypes: Mapping[str, torch.dtype],
        hooks: Mapping[str, str],
        copying: torch.cuda.Stream | None = None,
    ) -> None:
        self._provenance, self._dtypes, self._hooks = provenance, dtypes, hooks
        self._values = values
        stored = [rows.to(dtypes[key]).contiguous() for key, rows in values.items()]
        extremes = [torch.stack(torch.aminmax(rows)).double() for rows in values.values() if len(rows)]
        self._extremes = torch.stack(extremes) if extremes else torch.zeros(0, 2)
        self._stored = dict(zip(values, stored, strict=True))
        self._arrived: torch.cuda.Event | None = None if copying is None else self._copy_out(copying)

    def __len__(self) -> int:
        return len(self._provenance["context"])

    def _copy_out(self, copying: torch.cuda.Stream) -> torch.cuda.Event:
        """Begin to copy everything into pinned memory, which torch keeps for later batches once it is free."""
        self._on_device = (*self._stored.values(), self._extremes)  # until they are copied
        copying.wait_stream(torch.cuda.current_stream(self._extremes.device))
        with torch.cuda.stream(copying):
            self._stored = {key: to_host(rows) for key, rows in self._stored.items()}
            self._extremes = to_host(self._extremes)
            return arrived()

    def finished(self) -> Rows:
        """Wait for the rows and return them.

        Raises NonFiniteActivation, or ActivationOverflow beyond the storage dtype, naming hook, context and position.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived, self._on_device = None, ()
        for key, (lowest, highest) in zip(self._stored, self._extremes.tolist(), strict=False):
            limit = torch.finfo(self._dtypes[key]).max
            if not -limit <= lowest <= highest <= limit:  # NaN is in no order
                raise _unstorable(self._values[key], self._dtypes[key], self._hooks[key], self._provenance)
        self._values = {}
        return Rows(self._provenance, self._stored)


class RowMaker:
    """Runs the language model over batches of one size; keeps the rows of ``sites`` that the row mask keeps.

    Their activations go to the host, or stay where the model is.
    """

    def __init__(
        self,
        model: LanguageModel,
        sites: Sequence[Site],
        row_mask: RowMask,
        contexts_per_batch: int,
        *,
        copies_out: bool = True,
    ) -> None:
        self.sites, self.contexts_per_batch = tuple(sites), contexts_per_batch
        self._model, self._row_mask = model, row_mask
        self._hooks = [SiteHooks.of(site) for site in sites]
        sides = [
            (f"{site.name}/{side}", hook, torch_dtype(site))
            for site, hooks in zip(self.sites, self._hooks, strict=True)
            for side, hook in hooks.sides.items()
        ]
        self._hook_of = {key: hook for key, hook, _ in sides}
        self._dtype_of = {key: dtype for key, _, dtype in sides}
        on_gpu = copies_out and model.device.type == "cuda"
        self._copying = torch.cuda.Stream(model.device) if on_gpu else None  # type: ignore[no-untyped-call]

    @property
    def runs_ahead(self) -> bool:
        """Whether a batch can be begun while the rows of the one before are still on their way."""
        return self._copying is not None

    def rows(self, tokens: np.ndarray, documents: np.ndarray, first_context: int) -> Rows:
        """Return the rows of contexts (n, context_length), at most a batch of them; their documents are marked ones.

        Raises NonFiniteActivation, or ActivationOverflow beyond the storage dtype, naming hook, context and position.
        """
        return self.begin(tokens, documents, first_context).finished()

    def begin(self, tokens: np.ndarray, documents: np.ndarray, first_context: int) -> PendingRows:
        """Begin with ``rows``; on a GPU nothing here waits for it."""
        kept = self._row_mask(tokens, documents)
        padded = np.concatenate([tokens, np.repeat(tokens[-1:], self.contexts_per_batch - len(tokens), 0)])
        captured = self._model.capture(torch.from_numpy(padded.astype(np.int64)), self._hooks)
        # by numbers, which the host knows: how many a mask selects, a GPU would have to tell first
        chosen = to_device(torch.from_numpy(np.flatnonzero(kept)), self._model.device)
        values = {key: captured[hook].flatten(0, 1).index_select(0, chosen) for key, hook in self._hook_of.items()}
        provenance = _provenance(tokens, documents, kept, first_context)
        return PendingRows(provenance, values, self._dtype_of, self._hook_of, self._copying)


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


class UnitRows:
    """The rows of units from committed contexts; remembers the last batch, which two units may share."""

    def __init__(self, maker: RowMaker, contexts: Mapping[str, ContextBlocks]) -> None:
        self._maker, self._contexts = maker, contexts
        self._last: tuple[tuple[str, int, int], PendingRows] | None = None

    def pieces(self, task: UnitTask) -> Iterator[Rows]:
        """Yield the rows of one unit, a batch at a time."""
        missing, skipped, batch = task.n_rows, task.skipped_rows, task.first_batch
        pending = self._batch(task, batch)
        while missing:
            stop = min(len(pending), skipped + missing)
            missing, batch, this = missing - (stop - skipped), batch + 1, pending
            if missing and self._maker.runs_ahead:
                pending = self._batch(task, batch)
            if stop > skipped:
                yield this.finished().cut(skipped, stop)
            if missing and not self._maker.runs_ahead:
                pending = self._batch(task, batch)
            skipped = 0

    def _batch(self, task: UnitTask, batch: int) -> PendingRows:
        size = self._maker.contexts_per_batch
        start, stop = batch * size, min((batch + 1) * size, task.n_contexts)
        assert start < stop, f"batch {batch} of {task.split} lies beyond its {task.n_contexts} contexts"
        identity = (task.split, batch, stop)
        if self._last is None or self._last[0] != identity:
            self._last = (identity, self._maker.begin(*self._contexts[task.split].read(start, stop), start))
        return self._last[1]


def torch_dtype(site: Site) -> torch.dtype:
    """Return the dtype that a site's rows are handed over in; int8 is quantised when a row is stored."""
    dtype = getattr(torch, "float32" if site.dtype == "int8" else site.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def as_array(rows: Tensor) -> np.ndarray:
    """View rows on the CPU as NumPy, bfloat16 as uint16 bits, which is what storage reads."""
    return np.asarray(rows.view(torch.uint16 if rows.dtype == torch.bfloat16 else rows.dtype).numpy())


def _unstorable(
    values: Tensor, dtype: torch.dtype, hook: str, provenance: Mapping[str, np.ndarray]
) -> ActivationOverflow | NonFiniteActivation:
    """Return the error for the first row that ``dtype`` cannot hold."""
    limit = torch.finfo(dtype).max
    largest = values.abs().amax(dim=1).cpu()  # keeps NaN
    row = int(torch.nonzero(~(largest <= limit)).flatten()[0])
    context, position, document, token = (
        int(provenance[name][row]) for name in ("context", "position", "document", "token_id")
    )
    token_name = f"{hook}, context {context}, position {position} (document {document}, token id {token})"
    if bool(largest[row].isfinite()):
        return ActivationOverflow(
            f"{token_name}: {float(largest[row]):.6g} is beyond {_name(dtype)} ({limit:.6g}); start anew, with another "
            "--out and --storage-dtype bfloat16 or float32"
        )
    return NonFiniteActivation(
        f"{token_name}: NaN or infinity; the model overflows in {_name(values.dtype)}. Run it with --model-dtype "
        "float32, leave this site out, or leave that document out"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _provenance(
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
