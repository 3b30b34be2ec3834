"""Rows of a cache as tensors: the one place where stored arrays become torch.

A batch is valid only until the next one is asked for: float32 rows on the CPU are views of the reader's buffer.
bfloat16 arrives as uint16 holding its bits, because NumPy has no such type; reading it as numbers is the mistake to
avoid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from tailrace.storage.activation_cache import CacheSplit
from tailrace.storage.cache_format import Site
from tailrace.storage.stream import RowStream, StreamState
from tailrace.training.rows.device_rows import DeviceRows

EVALUATION_SEED = 0
"""Decides which rows a partial held-out evaluation reads; the same for every run, so that runs compare."""


class _Sides(NamedTuple):
    inputs: Tensor
    outputs: Tensor


class Batch(_Sides):
    """Matching rows of a site: ``inputs (rows, d_in)`` and ``outputs (rows, d_out)``, float32 on the device.

    Raises ValueError for any other shapes: of (contexts, positions, width), a mean over rows is one over contexts.
    """

    __slots__ = ()

    def __new__(cls, inputs: Tensor, outputs: Tensor) -> Self:
        """Refuse what is not rows."""
        if not inputs.ndim == outputs.ndim == 2 or len(inputs) != len(outputs):
            raise ValueError(
                f"inputs {tuple(inputs.shape)} and outputs {tuple(outputs.shape)} are no batch: wanted as many rows of "
                "both, (rows, width); flatten contexts and positions into rows"
            )
        return super().__new__(cls, inputs, outputs)


SiteBatches = Mapping[str, Batch]
"""The same rows at several sites, by the site's name."""


class BatchStream(Protocol):
    """An endless stream of batches that can be put back to any of its states."""

    def next_batch(self) -> SiteBatches:
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


def _keys(sites: Sequence[Site]) -> list[str]:
    return [key for site in sites for key in keys_of(site)]


def keys_of(site: Site) -> list[str]:
    """Return the arrays to read for ``site``: one for an autoencoder, whose inputs are its outputs."""
    return [f"{site.name}/{side}" for side in site.sides]


class _HostRows:
    """The batches of a stream as float32 tensors, gathered and decoded by the host."""

    n_steps = 0

    def __init__(self, stream: RowStream, device: torch.device) -> None:
        self._stream, self._device = stream, device

    @property
    def state(self) -> StreamState:
        return self._stream.state

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Tensor]:
        arrays, stream = next(self._stream).arrays, self._stream
        return {
            name: as_tensor(array, stream.sources[stream.names[name]].dtype).to(self._device).to(torch.float32)
            for name, array in arrays.items()
        }

    def confirm(self) -> None:
        self._stream.confirm()

    def close(self) -> None:
        self._stream.close()


def _read(stream: RowStream, device: torch.device) -> _HostRows | DeviceRows:
    return DeviceRows(stream, device) if device.type == "cuda" else _HostRows(stream, device)


def _by_site(sites: Sequence[Site], rows: Mapping[str, Tensor]) -> dict[str, Batch]:
    keys = {site.name: keys_of(site) for site in sites}
    return {name: Batch(rows[sides[0]], rows[sides[-1]]) for name, sides in keys.items()}


class CacheBatches:
    """The training rows of some sites of a cache, in their shuffled order, epoch after epoch.

    The last batch of an epoch is left out when it would be short, unless the split is smaller than one batch. With
    ``n_rows``, every epoch is the same uniform sample of that many rows.
    """

    def __init__(
        self,
        split: CacheSplit,
        sites: Sequence[Site],
        *,
        batch_rows: int,
        seed: int,
        n_rows: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._split, self._seed, self._batch_rows, self._n_rows = split, seed, batch_rows, n_rows
        self._sites, self._device = sites, torch.device(device)
        self._n_steps = 0
        self._open(0, 0)

    def _open(self, epoch: int, step: int) -> None:
        n_rows = self._split.n_rows if self._n_rows is None else self._n_rows
        stream = self._split.stream(
            _keys(self._sites),
            batch_rows=self._batch_rows,
            seed=self._seed,
            epoch=epoch,
            step=step,
            n_rows=self._n_rows,
            drop_last=n_rows >= self._batch_rows,
        )
        self.n_steps_per_epoch = stream.n_steps_per_epoch
        """Number of batches in one pass over the split."""
        self._rows = _read(stream, self._device)
        self.expect(self._n_steps)

    def expect(self, n_steps: int) -> None:
        """Note that ``n_steps`` batches, counted from the first epoch's first, will be asked for, perhaps more.

        On a GPU, rows that will be read again are then kept where they fit.
        """
        self._n_steps = max(self._n_steps, n_steps)
        self._rows.n_steps = self._n_steps

    def next_batch(self) -> dict[str, Batch]:
        """Return the next batch by site, valid until the next call."""
        return _by_site(self._sites, next(self._rows))

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"epoch", "step"}`` of the next batch."""
        return asdict(self._rows.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the batch at ``state``."""
        self._rows.close()
        self._open(state["epoch"], state["step"])

    def confirm(self) -> None:
        """Wait until the shards that are compared in this epoch are; raise ArtifactCorrupt for a damaged one."""
        self._rows.confirm()

    def close(self) -> None:
        """Stop reading ahead."""
        self._rows.close()

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
    for batches in iter_sites_once(split, [site], batch_rows=batch_rows, device=device, max_rows=max_rows):
        yield batches[site.name]


def iter_sites_once(
    split: CacheSplit,
    sites: Sequence[Site],
    *,
    batch_rows: int,
    device: torch.device | str = "cpu",
    max_rows: int | None = None,
) -> Iterator[SiteBatches]:
    """Yield the same rows as ``iter_once``, at several sites."""
    n_rows = None if max_rows is None or max_rows >= split.n_rows else max_rows
    stream = split.stream(_keys(sites), batch_rows=batch_rows, seed=EVALUATION_SEED, n_epochs=1, n_rows=n_rows)
    with closing(_read(stream, torch.device(device))) as rows:
        for batch in rows:
            yield _by_site(sites, batch)
