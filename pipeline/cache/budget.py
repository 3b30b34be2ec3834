"""The budget planner behind ``pipeline cache --dry-run``: bytes, disk and hours before anything is written."""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tailrace.pipeline.cache.draft import begun_request
from tailrace.pipeline.cache.plan import choose_rows, row_bytes_of
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.text.dataset import open_documents
from tailrace.pipeline.text.packing import ContextSource
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import TextError

STORAGE_DTYPES = ("float32", "bfloat16", "float16", "int8")
_PROBE_SECONDS = 10.0
_PROBE_BATCHES = 8


@dataclass(frozen=True)
class Budget:
    """What a cache would cost."""

    sites: tuple[Site, ...]
    n_rows: int | None
    """None where the whole dataset was asked for, whose length is not known."""
    rows_per_second: float
    row_bytes: dict[str, int]
    """Bytes of one row over all sites and provenance, by storage dtype."""
    free_bytes: int
    shard_rows: int

    @property
    def hours(self) -> float | None:
        """Expected hours at the measured rate."""
        return None if self.n_rows is None else self.n_rows / self.rows_per_second / 3600

    def total_bytes(self, dtype: str) -> int | None:
        """Return the bytes of all rows in one dtype."""
        return None if self.n_rows is None else self.n_rows * self.row_bytes[dtype]


def plan_budget(settings: CacheSettings, *, output: Path, compute: Compute = Compute()) -> Budget:
    """Measure the model on the first batches of the text and say what the cache would cost. Writes nothing."""
    settings = settings.for_device(compute.device_name, begun_request(output))
    with compute.opened():
        model = load_language_model(settings, device=compute.device_name)
        model.may_record = True  # as in the stage
        hooks = model.resolve_sites(settings.layers, settings.hooks)
        widths = model.widths(hooks)
        rate = _rows_per_second(settings, model, hooks)
    dtype = settings.storage_dtype if settings.storage_dtype != "auto" else "bfloat16"
    sites = tuple(Site(hook.name, hook.hook_in, hook.hook_out, *widths[hook.name], dtype) for hook in hooks)
    n_rows = None if settings.tokens == "all" else settings.tokens
    row_bytes = {
        name: row_bytes_of([dataclasses.replace(site, dtype=name) for site in sites]) for name in STORAGE_DTYPES
    }
    shard_rows, _ = choose_rows(settings, sites, n_rows or 10**9)
    return Budget(sites, n_rows, rate, row_bytes, _free_bytes(output), shard_rows)


def _rows_per_second(settings: CacheSettings, model: LanguageModel, hooks: list[SiteHooks]) -> float:
    tokens = _first_contexts(settings, model)
    kept = int(settings.rows_of(model)(tokens).sum())
    batch = torch.from_numpy(tokens.astype(np.int64))
    for _ in range(2 if model.device.type == "cuda" else 1):  # warm-up; a GPU's second pass may be recorded
        model.capture(batch, hooks)
    started, n_batches = time.monotonic(), 0
    while n_batches < _PROBE_BATCHES and time.monotonic() - started < _PROBE_SECONDS:
        captured = model.capture(batch, hooks)
        for values in captured.values():
            values[:1, :1].float().cpu()  # waits for a GPU
        n_batches += 1
    return kept * n_batches / (time.monotonic() - started)


def _first_contexts(settings: CacheSettings, model: LanguageModel) -> np.ndarray:
    without_heldout = settings.model_copy(update={"holdout": "0"})
    documents = open_documents(settings, settings.seed, kept=settings.kept_columns)
    packed: list[np.ndarray] = []
    for piece in ContextSource.of(without_heldout, model, documents, {"train": None}):
        packed.append(piece.tokens)
        if sum(map(len, packed)) >= settings.contexts_per_batch:
            break
    if not packed:
        raise TextError(f"{settings.dataset}: its documents do not fill a single context of {settings.context_length}")
    tokens = np.concatenate(packed)[: settings.contexts_per_batch]
    repeats = -(-settings.contexts_per_batch // len(tokens))
    return np.tile(tokens, (repeats, 1))[: settings.contexts_per_batch]


def _free_bytes(output: Path) -> int:
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
