"""Rows of a cache as tensors: the one place where stored arrays become torch.

A batch is valid only until the next one is asked for: float32 rows on the CPU are views of the reader's buffer.
bfloat16 arrives as uint16 holding its bits, because NumPy has no such type; reading it as numbers is the mistake to
avoid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from storage.activation_cache import CacheSplit
from storage.cache_format import Site
from storage.stream import RowStream

EVALUATION_SEED = 0
"""Decides which rows a partial held-out evaluation reads; the same for every run, so that runs compare."""


class Batch(NamedTuple):
    """Matching rows of a site: ``inputs (rows, d_in)`` and ``outputs (rows, d_out)``, float32 on the device."""

    inputs: Tensor
    outputs: Tensor


class BatchStream(Protocol):
    """An endless stream of batches that can be put back to any of its states."""

    d_in: int
    d_out: int

    def next_batch(self) -> Batch:
        """Return the next batch, valid until the next call."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch as JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position returned by ``state_dict``."""
        ...


class _Writable:
    """Present a read-only array's memory as writable: torch warns of, and cannot keep, read-only memory."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def as_tensor(array: np.ndarray, dtype: str) -> Tensor:
    """View ``array`` as a tensor without copying; ``dtype`` is the stored type, ``bfloat16`` being kept in uint16.

    The tensor must not be written to: it may show a file's pages.
    """
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))
    if dtype == "bfloat16":
        assert array.dtype == np.uint16, f"bfloat16 is stored in uint16, got {array.dtype}"
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def keys_of(site: Site) -> list[str]:
    """Return the arrays to read for ``site``: one for an autoencoder, whose inputs are its outputs."""
    return [f"{site.name}/{side}" for side in site.sides]


class _RowsToBatch:
    """Turn row arrays of one site into a batch on the device."""

    def __init__(self, split: CacheSplit, site: Site, device: torch.device) -> None:
        self._keys = keys_of(site)
        self._dtypes = [split.dtype(key) for key in self._keys]
        self._device = device

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> Batch:
        tensors = [
            as_tensor(arrays[key], dtype).to(self._device).to(torch.float32)
            for key, dtype in zip(self._keys, self._dtypes, strict=True)
        ]
        return Batch(tensors[0], tensors[-1])


class CacheBatches:
    """The training rows of one site of a cache, in their shuffled order, epoch after epoch.

    The last batch of an epoch is left out when it would be short, unless the split is smaller than one batch.
    """

    def __init__(
        self, split: CacheSplit, site: Site, *, batch_rows: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.d_in, self.d_out = site.d_in, site.d_out
        self._split, self._site = split, site
        self._to_batch = _RowsToBatch(split, site, torch.device(device))
        self._batch_rows, self._seed = batch_rows, seed
        self._stream = self._open(0, 0)

    def _open(self, epoch: int, step: int) -> RowStream:
        return self._split.stream(
            keys_of(self._site),
            batch_rows=self._batch_rows,
            seed=self._seed,
            epoch=epoch,
            step=step,
            drop_last=self._split.n_rows >= self._batch_rows,
        )

    @property
    def n_steps_per_epoch(self) -> int:
        """Number of batches in one pass over the split."""
        return self._stream.n_steps_per_epoch

    def next_batch(self) -> Batch:
        """Return the next batch, valid until the next call."""
        return self._to_batch(next(self._stream).arrays)

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"epoch", "step"}`` of the next batch."""
        return asdict(self._stream.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the batch at ``state``."""
        self._stream.close()
        self._stream = self._open(state["epoch"], state["step"])

    def close(self) -> None:
        """Stop reading ahead."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def iter_once(
    split: CacheSplit,
    site: Site,
    *,
    batch_rows: int,
    device: torch.device | str = "cpu",
    max_rows: int | None = None,
) -> Iterator[Batch]:
    """Yield every row of ``split`` once, or ``max_rows`` of them: always the same uniform sample."""
    to_batch = _RowsToBatch(split, site, torch.device(device))
    n_rows = None if max_rows is None or max_rows >= split.n_rows else max_rows
    with split.stream(keys_of(site), batch_rows=batch_rows, seed=EVALUATION_SEED, n_epochs=1, n_rows=n_rows) as stream:
        for rows in stream:
            yield to_batch(rows.arrays)
