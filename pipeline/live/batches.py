"""Batches straight from the language model through a mixing buffer, resumable from a few thousand characters.

The same protocol as batches from a cache, for all sites at once. One background thread reads the text and runs the
model, a block ahead; it alone uses the text and the model once the stream has begun, so whoever else needs the model
borrows it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from tailrace.pipeline.cache.plan import PROBE_BATCHES, FirstBatch, choose_sites
from tailrace.pipeline.cache.rows import RowMaker
from tailrace.pipeline.cache.stage import check_pairing
from tailrace.pipeline.live.contexts import ContextBatches
from tailrace.pipeline.live.heldout import HeldoutRows, compute_heldout_rows, read_heldout_contexts
from tailrace.pipeline.live.mixing import STAGES_IN_MEMORY, Mixing, choose_block_rows
from tailrace.pipeline.live.producer import BlockProducer, BlockStart, StageMemory
from tailrace.pipeline.live.settings import LiveSettings
from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.same_model import without_versions
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.pipeline.text.dataset import open_documents
from tailrace.pipeline.text.holdout import HoldoutRule
from tailrace.pipeline.text.packing import HELDOUT, TRAIN, ContextSource
from tailrace.pipeline.text.reading import choose_reading
from tailrace.pipeline.text.settings import RowFilter
from tailrace.storage.artifact import JSON, Record, digest
from tailrace.storage.cache_format import Site
from tailrace.storage.draft import list_differences
from tailrace.storage.errors import ArtifactMismatch, SettingsError
from tailrace.storage.layout import Side
from tailrace.storage.statistics import SiteStatistics, StatisticsRecord
from tailrace.training.rows.batches import Batch
from tailrace.training.rows.transfer import to_device

DEVICE_SHARE = 0.25
"""Of a GPU's memory that is free beside the language model, how much rows may take; the rest is training's."""

logger = logging.getLogger(__name__)


class _OpeningRecord(Record):
    made_from: dict[str, JSON]
    dtypes: dict[str, str]
    statistics: dict[str, dict[Side, StatisticsRecord]]
    model_dtype: str | None = None


@dataclass(frozen=True)
class Opening:
    """Storage dtype of every site, and statistics of every side over the first block of training rows."""

    made_from: dict[str, Any]
    """What they belong to; see ``LiveBatches.made_from``."""
    dtypes: dict[str, str]
    statistics: dict[str, dict[Side, SiteStatistics]]
    model_dtype: str | None = None
    """What the model computed in; None if an older release did not keep it."""

    def as_json(self) -> dict[str, Any]:
        """Return the opening as JSON; about 22 characters for every dimension of every side."""
        statistics = {
            site: {side: sums.as_json() for side, sums in sides.items()} for site, sides in self.statistics.items()
        }
        return {
            "made_from": self.made_from,
            "dtypes": self.dtypes,
            "statistics": statistics,
            "model_dtype": self.model_dtype,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Return the opening written by ``as_json``. Raises ValueError for anything else."""
        record = _OpeningRecord.model_validate(value)
        statistics = {
            site: {side: SiteStatistics.of(sums) for side, sums in sides.items()}
            for site, sides in record.statistics.items()
        }
        return cls(record.made_from, record.dtypes, statistics, record.model_dtype)


class LiveBatches:
    """Endless batches of training rows of every site; a context manager that stops the background thread.

    Opening loads the model, computes the held-out rows and, unless an ``opening`` of an earlier run with the same
    settings is given, the first block of training rows for its statistics. Raises SettingsError, TextError,
    ModelError, NonFiniteActivation or ActivationOverflow; ``next_batch`` raises them too, when the background thread
    met one. ``device`` is where the model runs and batches arrive.
    """

    sites: Mapping[str, Site]
    """By name, with the dtype that rows are buffered in."""
    statistics: Mapping[str, Mapping[Side, SiteStatistics]]
    """Of the first block of training rows, as buffered, by site and side."""
    facts: dict[str, Any]
    """What decides every row, for a manifest: model, text, packing."""
    made_from: dict[str, Any]
    """What decides every batch, as digests and numbers: a state or an opening of another run is refused by it."""

    def __init__(
        self,
        settings: LiveSettings,
        *,
        batch_rows: int,
        device: torch.device | str = "cpu",
        opening: Opening | None = None,
        compile_model: bool = False,
    ) -> None:
        if batch_rows < 1:
            raise SettingsError(f"batch_rows is {batch_rows}, wanted at least 1")
        self.batch_rows = batch_rows
        self._settings, self._device = settings, torch.device(device)
        self._documents = open_documents(settings, settings.seed)  # first: a wrong path is refused before a long wait
        recorded = settings.in_dtype_of({"dtype": opening.model_dtype} if opening else {})
        self._model = load_language_model(recorded, device=str(device), compile_model=compile_model)
        hooks = self._model.resolve_sites(settings.layers, settings.hooks)
        self._row_mask = settings.rows_of(self._model)
        self._rule = HoldoutRule.parse(settings.holdout, settings.seed)
        made_from = opening.made_from if opening else None
        self._reading = choose_reading(settings, self._model, self._documents, made_from)
        sites = self._choose_sites(hooks, opening.dtypes if opening else {})
        self.sites = {site.name: site for site in sites}
        row_bytes = sum(site.row_bytes for site in sites)
        block_rows = choose_block_rows(settings.buffer_rows, settings.buffer_bytes, row_bytes, batch_rows)
        self._mixing = Mixing(settings.seed, block_rows)
        stay = self._fit_on_device(row_bytes, STAGES_IN_MEMORY * block_rows + settings.heldout_rows)
        self._maker = RowMaker(self._model, sites, self._row_mask, settings.contexts_per_batch, copies_out=not stay)
        self.facts = self._facts()
        self.made_from = self._made_from()
        if opening:
            _refuse_other_run("the opening", opening.made_from, self.made_from)
        self._heldout = self._compute_heldout()
        self._memory = StageMemory(sites, block_rows, self._device if stay else torch.device("cpu"))
        self._model_lock = threading.Lock()
        self._producer: BlockProducer | None = None
        self._begin(0, 0, BlockStart())
        logger.info("live buffer: blocks of %s rows, %.2f GB", f"{block_rows:,}", self._memory.n_bytes / 1e9)
        self.statistics = opening.statistics if opening else self._first_statistics()

    @property
    def opening(self) -> Opening:
        """What was decided and measured at the start of the text; opening again with it saves the first block."""
        dtypes = {name: site.dtype for name, site in self.sites.items()}
        statistics = {name: dict(sides) for name, sides in self.statistics.items()}
        return Opening(self.made_from, dtypes, statistics, self.facts["model"]["dtype"])

    @property
    def block_rows(self) -> int:
        """Rows of a block: half of the rows among which a batch is drawn."""
        return self._mixing.block_rows

    @property
    def n_heldout_rows(self) -> int:
        """Held-out rows in memory; 0 without held-out documents."""
        return self._heldout.n_rows if self._heldout else 0

    @property
    def buffer_bytes(self) -> int:
        """Memory of the mixing buffer."""
        return self._memory.n_bytes

    @property
    def n_passes(self) -> int:
        """Passes over the text that were finished before the newest block now served was begun."""
        return self._starts[-1].position.text_pass

    def next_batch(self) -> Mapping[str, Batch]:
        """Return the next batch of every site, (batch_rows, d) float32 on the device; valid until the next call."""
        if self._step == self._steps_in(self._stage):
            self._leave_stage()
        self._wait_for_stage()
        start = self._step * self.batch_rows
        rows = self._memory.read(self._stage, start, start + self.batch_rows)
        self._step += 1
        return self._as_batches(rows)

    def heldout(self, max_rows: int | None = None) -> Iterable[Mapping[str, Batch]]:
        """Yield the held-out rows, or ``max_rows`` of them, always the same uniform sample, in batches."""
        pieces = self._heldout.pieces(self.batch_rows, max_rows) if self._heldout else ()
        for rows in pieces:
            yield self._as_batches(rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch as JSON: its stage and step, and where the older block began."""
        stage, step = self._stage, self._step
        starts = self._starts
        if step == self._steps_in(stage):
            stage, step, starts = stage + 1, 0, starts[-1:]
        return {"stage": stage, "step": step, "text": starts[0].as_json(), "made_from": self.made_from}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position returned by ``state_dict``; computes two blocks anew, at most.

        Raises ArtifactMismatch for a state of a run with other settings, text or model.
        """
        _refuse_other_run("this position", state["made_from"], self.made_from)
        self._begin(state["stage"], state["step"], BlockStart.from_json(state["text"]))

    @contextmanager
    def borrowed_model(self) -> Iterator[LanguageModel]:
        """Lend the language model between two of its batches; leave it as it was."""
        with self._model_lock:
            yield self._model

    def close(self) -> None:
        """Stop the background thread."""
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fit_on_device(self, row_bytes: int, n_rows: int) -> bool:
        """Return whether the buffer and the held-out rows take at most a quarter of a GPU's memory that is free."""
        if self._device.type != "cuda":
            return True  # the host's memory is the device's
        free, _ = torch.cuda.mem_get_info(self._device)
        fits = row_bytes * n_rows <= DEVICE_SHARE * free
        if not fits:
            logger.info("live buffer: on the host, for want of memory on %s; smaller buffer_bytes fit", self._device)
        return fits

    def _begin(self, stage: int, step: int, oldest: BlockStart) -> None:
        """Stand before a step; ``oldest`` is where the older of the stage's blocks began. Nothing is computed yet."""
        self.close()
        self._stage, self._step = stage, step
        self._starts = [oldest]
        self._first_block = max(stage - 1, 0)
        self._n_ready = self._first_block
        """Blocks before this one were computed or are not needed."""

    def _start(self) -> BlockProducer:
        oldest = self._starts[0]
        return BlockProducer(
            self._read(oldest, self._mixing.block_rows),
            self._maker,
            self._mixing,
            self._memory,
            first_block=self._first_block,
            skipped_rows=oldest.skipped_rows,
            n_blocks_ahead=self._stage + 2 - self._first_block,
            model_lock=self._model_lock,
        )

    def _wait_for_stage(self) -> None:
        """Wait until every block of the stage is in memory."""
        if self._producer is None:
            self._producer = self._start()
        while self._n_ready <= self._stage:
            start = self._producer.wait_for_block()
            if self._n_ready == self._first_block:
                self._starts = []  # the same start, which is known more closely now
            self._starts.append(start)
            self._n_ready += 1

    def _leave_stage(self) -> None:
        assert self._producer is not None, "a stage is left after its last batch was served"
        self._producer.stage_is_served()
        self._stage, self._step, self._starts = self._stage + 1, 0, self._starts[-1:]

    def _steps_in(self, stage: int) -> int:
        return self._mixing.stage_rows(stage) // self.batch_rows

    def _first_statistics(self) -> dict[str, dict[Side, SiteStatistics]]:
        try:
            self._wait_for_stage()
        except BaseException:  # an interrupt too: nobody else could stop the thread
            self.close()
            raise
        assert self._producer is not None
        sums = self._producer.statistics
        return {name: {side: sums[f"{name}/{side}"] for side in site.sides} for name, site in self.sites.items()}

    def _as_batches(self, rows: Mapping[str, Tensor]) -> dict[str, Batch]:
        batches = {}
        for name, site in self.sites.items():
            sides = [to_device(rows[f"{name}/{side}"], self._device).to(torch.float32) for side in site.sides]
            batches[name] = Batch(sides[0], sides[-1])
        return batches

    def _choose_sites(self, hooks: Sequence[SiteHooks], dtypes: Mapping[str, str]) -> tuple[Site, ...]:
        """Return the sites with their storage dtypes: those of an earlier opening, or else decided as for a cache.

        Raises ModelError if a layer's captured output is not its MLP of the captured input, NonFiniteActivation if the
        first batches hold NaN or infinity.
        """
        settings = self._settings
        batches = self._read(None, 1)
        first = next(batches)
        check_pairing(self._model, hooks, first.tokens, settings.model)
        if dtypes.keys() == {hook.name for hook in hooks}:
            widths = self._model.widths(hooks)
            return tuple(Site(*hook, *widths[hook.name], dtypes[hook.name]) for hook in hooks)

        def first_batches() -> Iterator[FirstBatch]:
            for batch in (first, *islice(batches, PROBE_BATCHES - 1)):
                yield batch.tokens, batch.documents, batch.position.context

        return choose_sites(settings, settings.storage_dtype, self._model, hooks, first_batches)[0]

    def _compute_heldout(self) -> HeldoutRows | None:
        if not self._rule.holds_out:
            return None
        settings = self._settings
        contexts = read_heldout_contexts(
            self._open_source(None), self._rule, self._row_mask, settings.heldout_rows, settings.dataset
        )
        return compute_heldout_rows(contexts, self._maker, settings.heldout_rows)

    def _read(self, start: BlockStart | None, smallest_pass: int) -> ContextBatches:
        return ContextBatches(
            self._open_source,
            self._settings.contexts_per_batch,
            start.position if start else None,
            smallest_pass=smallest_pass,
            name=self._settings.dataset,
        )

    def _open_source(self, state: JSON | None) -> ContextSource:
        # held-out documents depend on how many of their rows are wanted, so every reader of the text asks for as many
        targets = {TRAIN: None, HELDOUT: self._settings.heldout_rows}
        return ContextSource.of(self._settings, self._model, self._documents, targets, state, self._reading)

    def _facts(self) -> dict[str, Any]:
        settings = self._settings
        return {
            "model": self._model.identity(),
            "text": self._documents.identity(),
            "packing": {
                "context_length": settings.context_length,
                "bos_token_id": self._model.bos_token_id,
                "separator_token_id": self._model.separator_token_id,
                "contexts_per_batch": settings.contexts_per_batch,
                **settings.model_dump(include=set(RowFilter.model_fields)),
                "holdout": settings.holdout,
                "heldout_rows": settings.heldout_rows,
                **self._reading.as_json(),
            },
        }

    def _made_from(self) -> dict[str, Any]:
        return {
            "model": digest(without_versions(self.facts["model"])),
            "text": digest(self.facts["text"]),
            **self.facts["packing"],
            "sites": {name: [site.hook_in, site.hook_out, site.dtype] for name, site in self.sites.items()},
            "seed": self._settings.seed,
            "block_rows": self._mixing.block_rows,
            "batch_rows": self.batch_rows,
        }


def _refuse_other_run(what: str, recorded: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ArtifactMismatch where something was made from other settings, text or model than this run's."""
    if differences := list_differences(dict(recorded), dict(own)):
        raise ArtifactMismatch(
            f"{what} belongs to another live run; use the settings it was made with, or start anew:\n"
            + "\n".join(f"  {line}" for line in differences)
        )
