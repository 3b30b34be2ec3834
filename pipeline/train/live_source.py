"""Live rows as a source of training rows.

The opening of a live run (storage dtypes and first statistics) is kept beside the checkpoints of an unfinished run, so
that continuing it does not compute the first block of rows for nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tailrace.pipeline.cache.budget import plan_budget
from tailrace.pipeline.cache.settings import CacheSettings, CapturedSites
from tailrace.pipeline.live.batches import LiveBatches, Opening
from tailrace.pipeline.live.mixing import STAGES_IN_MEMORY, buffer_rows_problem, choose_block_rows
from tailrace.pipeline.live.settings import LiveSettings
from tailrace.pipeline.model.sites import resolve_sites
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.units import duration, size
from tailrace.pipeline.text.holdout import HoldoutRule
from tailrace.pipeline.train.cost import Planned, cost_line
from tailrace.pipeline.train.sources import choose_sites, known_problems
from tailrace.storage.artifact import make_directory, read_own, seal, write_atomically
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ArtifactCorrupt, ModelError, SettingsError
from tailrace.storage.layout import Side
from tailrace.storage.statistics import SiteStatistics
from tailrace.training.architectures.manifest import CHECKPOINTS
from tailrace.training.dead_features.resampling import NoResampling
from tailrace.training.loop.cost import check_memory
from tailrace.training.loop.session import HeldoutBatches
from tailrace.training.loop.settings import TrainSettings

OPENING = "opening.json"

_MOST_LAYERS = 10_000


class LiveSource:
    """The rows of a language model that runs beside training. Close it: it may have started a thread."""

    def __init__(
        self,
        settings: LiveSettings,
        draft: Path,
        *,
        batch_rows: int,
        device: torch.device,
        measured: Sequence[Site] | None = None,
    ) -> None:
        """``measured``: the sites, where nothing but them is asked for and no row shall be computed."""
        self.settings = settings
        self._measured = measured
        self._opening_path = draft / CHECKPOINTS / OPENING
        self._batch_rows, self._device = batch_rows, device
        self._live: LiveBatches | None = None

    @property
    def where(self) -> str:
        """The model and the text."""
        return f"live rows of {self.settings.model} on {self.settings.dataset}"

    @property
    def live(self) -> LiveBatches:
        """The batches; the first look loads the language model, computes held-out rows and the first block."""
        if self._live is None:
            opening = _read(self._opening_path) if self._opening_path.exists() else None
            self._live = LiveBatches(self.settings, batch_rows=self._batch_rows, device=self._device, opening=opening)
        return self._live

    @property
    def sites(self) -> Mapping[str, Site]:
        """The sites asked for, by name."""
        return self.live.sites if self._measured is None else {site.name: site for site in self._measured}

    @property
    def is_loaded(self) -> bool:
        """Whether the language model is loaded."""
        return self._live is not None or self._measured is not None

    @property
    def site_names(self) -> Sequence[str] | None:
        """The names of the sites asked for; None while only the model can say, such as of all its layers."""
        return list(self.sites) if self.is_loaded else names_asked_for(self.settings)

    def decided(self, settings: TrainSettings) -> TrainSettings:
        """Return settings as they are: what a site is called is known when the model is loaded."""
        return settings

    def problems(self, settings: TrainSettings) -> list[str]:
        """Return a sentence for each setting that needs a length of the text, rows on demand, held-out rows or a larger
        buffer; the language model is not needed to tell.
        """
        problems = []
        if settings.steps is None and settings.rows is None:
            problems.append("epochs: how many rows the text gives is not known in live mode; give rows or steps")
        problems += [
            f"{setting} needs training rows drawn at random, and live rows come in one order; train from a cache, or "
            "leave it out"
            for setting in _needing_rows(settings)
        ]
        if settings.keep_best and not HoldoutRule.parse(self.settings.holdout).holds_out:
            problems.append("keep_best needs held-out rows, and holdout is 0; leave it out, or hold out documents")
        if problem := buffer_rows_problem(self.settings.buffer_rows, self._batch_rows):
            problems.append(f"{problem}; raise it, or lower batch_rows")
        return problems

    @property
    def request(self) -> dict[str, Any]:
        """The settings of the live rows."""
        return {"live": self.settings.model_dump(mode="json")}

    def description(self) -> dict[str, Any]:
        """Return model, text, packing and mixing."""
        facts = self.live.facts
        mixing = {"seed": self.settings.seed, "block_rows": self.live.block_rows, "batch_rows": self._batch_rows}
        return {
            "inputs": {"live": {"text": facts["text"], "packing": facts["packing"], "mixing": mixing}},
            "model": facts["model"],
        }

    @contextmanager
    def open(self, sites: Sequence[Site], draft: Path) -> Iterator[LiveRows]:  # noqa: ARG002 - all sites are computed
        """Keep the opening, then serve."""
        if not self._opening_path.exists():
            make_directory(self._opening_path.parent)
            write_atomically(self._opening_path, seal(self.live.opening.as_json()))
        yield LiveRows(self.live)

    def close(self) -> None:
        """Stop the thread that runs the model."""
        if self._live is not None:
            self._live.close()


def plan_live(runs: Sequence[TrainSettings], live: LiveSettings, output: Path, compute: Compute = Compute()) -> str:
    """Return what ``runs`` side by side on live rows cost, in two lines; runs the model for a moment, writes nothing.

    Raises SettingsError with what does not fit the rows, ModelError, TextError, OutOfMemoryError.
    """
    batch_rows = runs[0].batch_rows
    with compute.opened() as device:
        source = LiveSource(live, output, batch_rows=batch_rows, device=device)
        if problems := {problem: None for settings in runs for problem in known_problems(settings, source)}:
            raise SettingsError(
                f"{source.where}: cannot train on this:\n" + "\n".join(f"  {line}" for line in problems)
            )
        n_steps = [settings.n_steps(settings.batch_rows, 1) for settings in runs]
        n_rows = max(n_steps) * batch_rows
        shared = (CacheSettings.model_fields.keys() & live.model_fields_set) - {"tokens"}
        as_cache = {name: getattr(live, name) for name in shared} | {"tokens": n_rows}
        budget = plan_budget(CacheSettings.model_validate(as_cache), output=output, compute=compute)
        source = LiveSource(live, output, batch_rows=batch_rows, device=device, measured=budget.sites)
        planned = [
            Planned(settings, [(site.d_in, site.d_out) for site in choose_sites(settings, source)], steps)
            for settings, steps in zip(runs, n_steps, strict=True)
        ]
        check_memory([(run.settings, run.widths) for run in planned], device)
        row_bytes = sum(site.row_bytes for site in budget.sites)
        block_rows = choose_block_rows(live.buffer_rows, live.buffer_bytes, row_bytes, batch_rows)
        buffer_bytes = (STAGES_IN_MEMORY * block_rows + live.heldout_rows) * row_bytes
        return (
            f"live rows: {n_rows:,}, about {duration(n_rows / budget.rows_per_second)} at the "
            f"{budget.rows_per_second:,.0f} rows/s just measured; {size(buffer_bytes)} of memory for the buffer\n"
            + cost_line(planned, device)
        )


def _needing_rows(settings: TrainSettings) -> list[str]:
    """Return the settings that draw training rows, each with its value."""
    needing = []
    if settings.bias_init == "geometric_median":
        needing.append(f"bias_init: {settings.bias_init}")
    if settings.decoder_init == "data":
        needing.append(f"decoder_init: {settings.decoder_init}")
    if settings.max_norm_multiple is not None:
        needing.append(f"max_norm_multiple: {settings.max_norm_multiple:g}")
    if not isinstance(settings.resampling, NoResampling):
        needing.append(f"resampling: {settings.resampling.kind}")
    return needing


def _read(path: Path) -> Opening:
    try:
        return Opening.from_json(read_own(path))
    except (ArtifactCorrupt, ValueError) as error:
        raise ArtifactCorrupt(f"{path}: {error}; delete it: it is computed anew") from error


class LiveRows:
    """Live rows that are being served."""

    def __init__(self, live: LiveBatches) -> None:
        self.stream = live
        self._live = live

    def statistics(self, site: Site) -> Mapping[Side, SiteStatistics]:
        """Return those of the first block of training rows."""
        return self._live.statistics[site.name]

    def heldout(self, sites: Sequence[Site]) -> HeldoutBatches | None:  # noqa: ARG002 - all sites are held
        """Return the held-out rows in memory."""
        return self._live.heldout if self._live.n_heldout_rows else None

    def n_steps(self, settings: TrainSettings) -> int:
        """Return the number of steps; ``rows`` or ``steps`` is given."""
        return settings.n_steps(settings.batch_rows, 1)

    def confirm(self) -> None:
        """Do nothing: live rows are read from no file."""

    def fresh_rows(self, site: Site, seed: int) -> None:  # noqa: ARG002
        """Return nothing: the text is read once, in its order."""
        return


class _AnyName(Collection[str]):
    """Stands for the hooks of a model that is not there: it has every one that is asked for."""

    def __contains__(self, name: object) -> bool:
        return True

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[str]:
        return iter(())


def names_asked_for(settings: CapturedSites) -> list[str] | None:
    """Return the names of the sites asked for; None where the model must be asked, or will refuse them."""
    if settings.layers is not None and settings.layers.strip().lower() == "all":
        return None
    try:
        sites = resolve_sites(
            settings.layers, settings.hooks, n_layers=_MOST_LAYERS, hook_names=_AnyName(), count_heads=_no_heads
        )
    except ModelError:  # told when the model is loaded, together with what only it knows
        return None
    return [site.name for site in sites]


def _no_heads(hooks: Sequence[str]) -> Mapping[str, int]:  # noqa: ARG001
    """Return nothing: hooks that are left out are not judged."""
    return {}
