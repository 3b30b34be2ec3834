"""Text in: a dataset of the hub or local files, opened as one resumable stream of documents.

Settings and opening are here; the order of documents is in ``text_stream``, reading on after failures in
``text_examples``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tailrace.pipeline.text.columns import Column, choose_column, infer_schema
from tailrace.pipeline.text.examples import UNREADABLE, TextExamples, describe_failure
from tailrace.pipeline.text.files import TextFiles, find_text_files, load_text_files, looks_local
from tailrace.pipeline.text.hub import find_commit, load_hub_dataset
from tailrace.pipeline.text.settings import MIN_WINDOW, TextSettings
from tailrace.pipeline.text.stream import Document, DocumentReader, DocumentStream, empty_dataset
from tailrace.storage.artifact import JSON
from tailrace.storage.errors import TextError

__all__ = ["Document", "DocumentReader", "DocumentStream", "open_documents"]


def open_documents(settings: TextSettings, seed: int, *, sleep: Callable[[float], None] = time.sleep) -> DocumentStream:
    """Open the dataset that ``settings`` names; no document is consumed by finding its column.

    Raises TextError if it does not exist, cannot be reached or read, is empty, or has no usable column.
    """
    opened = _open_local(settings) if looks_local(settings.dataset) else _open_hub(settings, sleep)
    examples, column, source, files = opened
    values = TextExamples(settings.dataset, examples.select_columns([column.name]), column.name, files, sleep)
    return DocumentStream(values, column.kind, source, shuffle_window=settings.shuffle_window, seed=seed)


def _open_hub(
    settings: TextSettings, sleep: Callable[[float], None]
) -> tuple[Any, Column, dict[str, JSON], TextFiles | None]:
    dataset, config, split = settings.dataset, settings.dataset_config, settings.split
    commit = find_commit(dataset, settings.dataset_revision, sleep)
    options = {"sample_by": settings.text_unit} if settings.text_unit else {}
    examples = load_hub_dataset(dataset, config, split, commit, options, sleep)
    column = _find_column(examples, settings)
    source = {"source": "hub", "dataset": dataset, "config": config, "split": split, "commit": commit}
    return examples, column, {**source, **({"text_unit": settings.text_unit} if settings.text_unit else {})}, None


def _open_local(settings: TextSettings) -> tuple[Any, Column, dict[str, JSON], TextFiles | None]:
    files = find_text_files(settings.dataset)
    if settings.text_unit is not None and files.format != "text":
        raise TextError(
            f"{settings.dataset}: text_unit={settings.text_unit} is for .txt files; in {files.format} files "
            "a row is a document, so leave text_unit out"
        )
    unit = settings.text_unit or "document"
    try:
        examples = load_text_files(files, unit)
        column = _find_column(examples, settings)
    except StopIteration as error:
        raise empty_dataset(settings.dataset) from error
    except (OSError, *UNREADABLE) as error:
        where = files.paths[0] if len(files.paths) == 1 else f"{settings.dataset}: one of its files"
        raise TextError(f"{where}: cannot be read ({describe_failure(error)}); repair it or leave it out") from error
    source = {"source": "local", "format": files.format}
    return examples, column, {**source, **({"text_unit": unit} if files.format == "text" else {})}, files


def _find_column(examples: Any, settings: TextSettings) -> Column:
    """Choose the column from the declared types, or from the first rows, which stay unread for the stream."""
    if examples.features is not None:
        return choose_column(examples.features.arrow_schema, settings.column, settings.dataset)
    rows = list(examples.take(MIN_WINDOW))
    if not rows:
        raise empty_dataset(settings.dataset)
    return choose_column(infer_schema(rows, settings.dataset), settings.column, settings.dataset)
