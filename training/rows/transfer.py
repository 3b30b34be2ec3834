"""Work side by side: copies between host and GPU that nobody waits for, and items made in a thread of their own.

Copies go through pinned memory, which torch keeps for the next.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


@dataclass
class _End:
    """That nothing more comes, and why."""

    error: BaseException | None = None


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return values on a device; for those of the host, the copy is only asked for."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return pinned(values.shape, values.dtype).copy_(values).to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """Ask the current stream to copy values of a GPU, and return where they will be on the host once it has."""
    return pinned(values.shape, values.dtype).copy_(values, non_blocking=True)


def arrived() -> torch.cuda.Event:
    """Return an event that has happened when everything is done that the current stream was asked for so far."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return memory on the host that the GPU copies from by itself; ordinary memory where the system has none."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        _say_unpinned((str(error).strip() or "refused").splitlines()[0])
        return torch.empty(shape, dtype=dtype)


@lru_cache
def _say_unpinned(reason: str) -> None:
    logger.warning("no pinned memory (%s): copies to and from the GPU take longer, and the host waits for them", reason)


def begun_early(items: Iterable[Item]) -> Iterator[Item]:
    """Yield items that are made in a thread of their own, up to two ahead."""
    made: queue.Queue[Item | _End] = queue.Queue(1)
    stopped = threading.Event()

    def make() -> None:
        end = _End()
        try:
            for item in items:
                made.put(item)
                del item
                if stopped.is_set():
                    return
        except BaseException as error:  # raised by whoever takes the items
            end = _End(error)
        made.put(end)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while not isinstance(item := made.get(), _End):
            yield item
            del item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        while thread.is_alive():
            with suppress(queue.Empty):
                made.get(timeout=0.05)
