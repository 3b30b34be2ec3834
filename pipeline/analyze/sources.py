"""Where `pipeline analyze` has its rows and its language model from: a cache, or fresh text through the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tailrace.analysis.harvest.rows import SampledSplit, ShownRows, cached_rows
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.artifacts.transcoders import TranscoderLayer
from tailrace.pipeline.cache.recorded_model import open_recorded_model
from tailrace.pipeline.live.settings import FreshText
from tailrace.pipeline.live.token_order import fresh_rows
from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.storage.activation_cache import ActivationCache


class Source(Protocol):
    """Rows and model. Nothing is opened before it is asked for: published tables need neither."""

    @property
    def inputs(self) -> dict[str, Any]:
        """What decides the rows, for the request."""
        ...

    @property
    def found(self) -> dict[str, Any]:
        """What is known of the rows once they were opened, for the manifest."""
        ...

    @property
    def model(self) -> Mapping[str, Any]:
        """The language model's identity."""
        ...

    def rows(self) -> ShownRows:
        """Return the rows."""
        ...

    def documents(self, rows: ShownRows) -> pa.Table | None:
        """Return what the dataset says of the documents that ``rows`` come from; None if nothing was kept."""
        ...

    def open_model(self) -> LanguageModel:
        """Return the language model, loaded and verified."""
        ...


class SplitRows:
    """The rows of a split of a cache, or of some of its contexts; its model is opened for its weights alone."""

    def __init__(
        self, cache: ActivationCache, settings: AnalyzeSettings, site: str, model: str | None, device: str
    ) -> None:
        self._cache, self._settings, self._site = cache, settings, site
        self._place, self._device = model, device
        self.inputs: dict[str, Any] = {"cache": cache.reference}
        if settings.rows is not None:  # tables of a release that read the first rows are other tables
            self.inputs["rows"] = {"drawn": "contexts, uniformly"}
        self.found: dict[str, Any] = {}
        self.model: Mapping[str, Any] = cache.manifest.model

    def rows(self) -> ShownRows:
        """Return the rows."""
        asked = self._settings
        rows = cached_rows(self._cache, asked.split, self._site, asked.rows, asked.seed)
        if isinstance(drawn := rows.split, SampledSplit):
            counts = {"n_contexts": drawn.n_contexts, "of_contexts": drawn.of_contexts}
            self.found = {
                "rows": {**self.inputs["rows"], **counts, "n_rows": drawn.n_rows, "of_rows": drawn.split.n_rows}
            }
        return rows

    def documents(self, rows: ShownRows) -> pa.Table | None:
        """Return the kept columns of the documents of a split, or of the rows drawn from it."""
        if not self._cache.kept_columns:
            return None
        documents = self._cache.split(self._settings.split).documents()
        drawn = rows.split
        if not isinstance(drawn, SampledSplit):
            return documents
        seen = [np.unique(drawn.read_unit(unit, ["document"])["document"]) for unit in range(drawn.n_units)]
        return documents.filter(pc.is_in(documents["document"], pa.array(np.unique(np.concatenate(seen)), pa.int64())))

    def open_model(self) -> LanguageModel:
        """Return the model that the cache was made with."""
        return open_recorded_model(self._cache, model=self._place, device=self._device).model


class FreshRows:
    """Rows of fresh text, computed by the model that the transcoder was trained on."""

    def __init__(
        self, text: FreshText, layer: TranscoderLayer, n_rows: int, open_model: Callable[[], LanguageModel]
    ) -> None:
        self._text, self._n_rows, self._open = text, n_rows, open_model
        self._site = replace(layer.site, dtype="float32")
        self.inputs: dict[str, Any] = {"live": text.model_dump(mode="json")}
        self.found: dict[str, Any] = {}
        self.model: Mapping[str, Any] = layer.model

    @cached_property
    def _opened(self) -> LanguageModel:
        return self._open()

    def rows(self) -> ShownRows:
        """Return the rows; runs the model over the first of them."""
        rows, text = fresh_rows(self._text, self._opened, self._site, self._n_rows)
        self.found = {"text": text}
        return rows

    def documents(self, rows: ShownRows) -> pa.Table | None:  # noqa: ARG002 - a source's signature
        """Return nothing: no columns are kept of text that is not cached."""
        return None

    def open_model(self) -> LanguageModel:
        """Return the model that runs."""
        return self._opened
