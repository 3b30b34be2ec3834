"""Dask, for the stages that can spread their tasks: a client of a scheduler, or of worker processes of this machine."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def dask_client(n_workers: int, scheduler: str | None = None) -> Iterator[tuple[Any, Any]]:
    """Yield (the module ``distributed``, a client); workers started here end with the block.

    ``distributed`` is untyped and slow to import, so it is loaded here only. It reports every step of a worker's life
    unless told before it is imported; workers inherit what it is told.
    """
    config: Any = importlib.import_module("dask").config
    config.set({"logging.distributed": "error"})
    distributed: Any = importlib.import_module("distributed")
    logging.getLogger("distributed").setLevel(logging.ERROR)
    with ExitStack() as stack:
        cluster: Any = scheduler or stack.enter_context(
            distributed.LocalCluster(
                n_workers=n_workers,
                threads_per_worker=1,
                dashboard_address=None,
                # any port will do: without a dashboard, too, the scheduler listens on a fixed one unless told
                scheduler_kwargs={"dashboard_address": ":0"},
                silence_logs=logging.ERROR,
            )
        )
        yield distributed, stack.enter_context(distributed.Client(cluster))
