"""Text in: a dataset of the hub or local files, opened as one resumable stream of documents.

A name on the hub may point to other text tomorrow. The commit is therefore looked up first, streamed from, and
recorded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from tailrace.pipeline.text.columns import (
    BadRow,
    Column,
    Row,
    check_kept,
    choose_column,
    infer_schema,
    learn_padding,
)
from tailrace.pipeline.text.files import (
    TextFiles,
    find_text_files,
    load_text_files,
    looks_local,
    near_paths,
    offer_zstandard,
)
from tailrace.pipeline.text.json_rows import JsonExamples
from tailrace.pipeline.text.settings import MIN_WINDOW, TextSettings
from tailrace.pipeline.text.stream import (
    HTTP_ERROR,
    UNREADABLE,
    DocumentStream,
    TextExamples,
    describe_failure,
    empty_dataset,
    retry_opening,
)
from tailrace.storage.artifact import JSON
from tailrace.storage.errors import TextError

OPENING_FAILURES = (OSError, HTTP_ERROR, ValueError, RuntimeError, NotImplementedError)
"""What looking up or opening a hub dataset raises: no network, no such name, split or configuration, not streamable."""


def open_documents(
    settings: TextSettings, seed: int, *, kept: Sequence[str] = (), sleep: Callable[[float], None] = time.sleep
) -> DocumentStream:
    """Open the dataset that ``settings`` names; no document is consumed by finding its column.

    Documents bring along what their row says in the columns ``kept``. Raises TextError if the dataset does not exist,
    cannot be reached or read, is empty, has no usable column, or lacks one of ``kept``.
    """
    opened = _open_local(settings, kept) if looks_local(settings.dataset) else _open_hub(settings, kept, sleep)
    examples, column, first_rows, source, files = opened
    names = list(dict.fromkeys([*column.names, *kept]))
    return DocumentStream(
        TextExamples(settings.dataset, examples.select_columns(names), files, sleep),
        column,
        source,
        first_rows=first_rows,
        kept=tuple(kept),
        shuffle_window=settings.shuffle_window,
        seed=seed,
        skips_bad_rows=settings.on_bad_row == "skip",
    )


Opened = tuple[Any, Column, list[Row], dict[str, JSON], TextFiles | None]
"""Examples, their column and first rows, where they come from, and their files if they are local."""


def _open_hub(settings: TextSettings, kept: Sequence[str], sleep: Callable[[float], None]) -> Opened:
    dataset, config, split = settings.dataset, settings.dataset_config, settings.split
    commit = find_commit(dataset, settings.dataset_revision, sleep)
    options = {"sample_by": settings.text_unit} if settings.text_unit else {}
    examples = load_hub_dataset(dataset, config, split, commit, options, sleep)
    try:
        column, first_rows = retry_opening(lambda: _find_column(examples, settings, kept), sleep)
    except TextError:
        raise
    except OPENING_FAILURES as error:
        raise refuse(dataset, commit, error) from error
    source = {"source": "hub", "dataset": dataset, "config": config, "split": split, "commit": commit}
    return (
        examples,
        column,
        first_rows,
        {**source, **({"text_unit": settings.text_unit} if settings.text_unit else {})},
        None,
    )


def _open_local(settings: TextSettings, kept: Sequence[str]) -> Opened:
    files = find_text_files(settings.dataset)
    if settings.text_unit is not None and files.format != "text":
        raise TextError(
            f"{settings.dataset}: text_unit={settings.text_unit} is for .txt files; in {files.format} files "
            "a row is a document, so leave text_unit out"
        )
    unit = settings.text_unit or "document"
    try:
        examples = JsonExamples(files) if files.format == "json" else load_text_files(files, unit)
        column, first_rows = _find_column(examples, settings, kept)
    except StopIteration as error:
        raise empty_dataset(settings.dataset) from error
    except (OSError, *UNREADABLE) as error:
        where = files.paths[0] if len(files.paths) == 1 else f"{settings.dataset}: one of its files"
        raise TextError(f"{where}: cannot be read ({describe_failure(error)}); repair it or leave it out") from error
    source = {"source": "local", "format": files.format}
    return examples, column, first_rows, {**source, **({"text_unit": unit} if files.format == "text" else {})}, files


def _find_column(examples: Any, settings: TextSettings, kept: Sequence[str]) -> tuple[Column, list[Row]]:
    """Choose the column from the declared types or from the first rows; the stream reads those rows again.

    Rows are returned only of token ids, of which types say too little.
    """
    if examples.features is not None:
        schema, first = examples.features.arrow_schema, partial(_first_rows, examples)
        column = choose_column(schema, settings.column, settings.dataset, first)
    else:
        rows = list(examples.take(MIN_WINDOW))
        if not rows:
            raise empty_dataset(settings.dataset)
        good = [row for row in rows if not isinstance(row, BadRow)]
        if not good:
            raise TextError(f"{settings.dataset}: its first {len(rows)} rows are no rows: the first {rows[0].reason}")
        schema = infer_schema(good)
        column = choose_column(schema, settings.column, settings.dataset, lambda: good)
    check_kept(schema, kept, settings.dataset)
    if column.kind != "tokens":
        return column, []
    beside = [] if column.text is None else [column.text]
    rows = list(examples.select_columns([*column.names, *beside]).take(MIN_WINDOW))
    return learn_padding(column, rows), rows


def _first_rows(examples: Any) -> list[Row]:
    return list(examples.take(MIN_WINDOW))


def find_commit(dataset: str, revision: str | None, sleep: Callable[[float], None]) -> str:
    """Return the commit hash that ``revision`` (a branch, tag or hash; the main branch if None) stands for now.

    Raises TextError if the dataset or the revision does not exist or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        commit = retry_opening(lambda: HfApi().dataset_info(dataset, revision=revision).sha, sleep)
    except OPENING_FAILURES as error:
        raise refuse(dataset, revision, error) from error
    if commit is None:
        raise TextError(f"{dataset}: the hub names no commit for revision {revision!r}; pass another revision")
    return commit


def load_hub_dataset(
    dataset: str, config: str | None, split: str, commit: str, options: dict[str, Any], sleep: Callable[[float], None]
) -> Any:
    """Return the streaming dataset at one commit; raise TextError if ``datasets`` cannot open it."""
    from datasets import load_dataset

    offer_zstandard()
    try:
        return retry_opening(
            lambda: load_dataset(dataset, config, split=split, revision=commit, streaming=True, **options), sleep
        )
    except OPENING_FAILURES as error:
        raise refuse(dataset, commit, error) from error


def refuse(dataset: str, revision: str | None, error: BaseException) -> TextError:
    """Return the error a user can act on for a failure to look up or open a hub dataset."""
    reason = describe_failure(error)
    near = near_paths(dataset)
    meant = f" Or did you mean {' or '.join(near)}?" if near else ""
    if isinstance(error, GatedRepoError):
        return TextError(
            f"{dataset}: the hub gives this dataset only to users who accepted its terms; accept them on its page, "
            "log in with `hf auth login`, and run again"
        )
    if isinstance(error, RevisionNotFoundError):
        return TextError(f"{dataset}: has no revision {revision!r}; pass a branch, tag or commit hash of its page")
    if isinstance(error, RepositoryNotFoundError | FileNotFoundError):
        return TextError(
            f"{dataset}: no such dataset on the hub, and no such local file or folder ({reason}). Check the spelling "
            "(owner/name), log in with `hf auth login` if it is private, or give a path that starts with ./ or /."
            + meant
        )
    if isinstance(error, OSError | HTTP_ERROR):
        return TextError(
            f"{dataset}: is no local file or folder, and the hub cannot be reached ({reason}). Connect to the "
            "network and run again, or give the path of local .txt, .jsonl or .parquet files." + meant
        )
    return TextError(
        f"{dataset}: cannot be streamed as asked: {reason}\n"
        "Check --dataset-config and --split, or download its files and give their path"
    )
