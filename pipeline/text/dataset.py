"""Text in: a dataset of the hub or local files, opened as one resumable stream of documents.

A name on the hub may point to other text tomorrow. The commit is therefore looked up first, streamed from, and
recorded. Columns are judged by their Arrow type, never by the first value alone: a first row that is empty or missing
says nothing about the rest, and a column called ``tokens`` often holds words rather than ids.
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

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

logger = logging.getLogger(__name__)

TOKEN_COLUMNS = ("tokens", "input_ids")
TEXT_COLUMNS = ("text", "content", "document", "raw_content", "article", "passage", "sentence")

Kind = Literal["text", "tokens"]

OPENING_FAILURES = (OSError, HTTP_ERROR, ValueError, RuntimeError, NotImplementedError)
"""What looking up or opening a hub dataset raises: no network, no such name, split or configuration, not streamable."""


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
        examples = JsonExamples(files) if files.format == "json" else load_text_files(files, unit)
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
    return choose_column(infer_schema(rows), settings.column, settings.dataset)


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


class Column(NamedTuple):
    """The column that documents are taken from, and what it holds."""

    name: str
    kind: Kind


def choose_column(schema: pa.Schema, wanted: str | None, dataset: str) -> Column:
    """Return the column named ``wanted``, or else the first usable one of the customary names; token ids win.

    Raises TextError that lists every column with its type when ``wanted`` is absent or of another type, or when no
    customary name is usable.
    """
    kinds: dict[str, Kind] = {field.name: kind for field in schema if (kind := kind_of(field.type)) is not None}
    if wanted is not None:
        if wanted in kinds:
            return Column(wanted, kinds[wanted])
        raise TextError(_refusal(schema, kinds, wanted, dataset))
    usable = [name for name in TOKEN_COLUMNS if kinds.get(name) == "tokens"]
    usable += [name for name in TEXT_COLUMNS if kinds.get(name) == "text"]
    if not usable:
        raise TextError(_refusal(schema, kinds, None, dataset))
    if len(usable) > 1:
        logger.info("%s: reading column %r; pass --column to read %s", dataset, usable[0], " or ".join(usable[1:]))
    return Column(usable[0], kinds[usable[0]])


def kind_of(column_type: pa.DataType) -> Kind | None:
    """Tell what a column of this Arrow type can be read as: text, token ids, or neither."""
    if pa.types.is_string(column_type) or pa.types.is_large_string(column_type):
        return "text"
    is_list = pa.types.is_list(column_type) or pa.types.is_large_list(column_type)
    if (is_list or pa.types.is_fixed_size_list(column_type)) and pa.types.is_integer(column_type.value_type):
        return "tokens"
    return None


def infer_schema(rows: list[dict[str, Any]]) -> pa.Schema:
    """Return the Arrow types of the first rows of a dataset that declares none, each column judged by itself."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.schema([(name, _infer_type([row.get(name) for row in rows])) for name in names])


def _infer_type(values: list[Any]) -> pa.DataType:
    """Return the type that all values share; where they share none, that of the first text or list of token ids.

    The row that differs is then named when its turn comes.
    """
    try:
        return pa.array(values).type
    except (pa.ArrowException, OverflowError):
        usable: list[Any] = [value for value in values if isinstance(value, str)]
        usable = usable or [
            value for value in values if isinstance(value, list) and value and all(type(item) is int for item in value)
        ]
        try:
            return pa.array(usable[:1]).type
        except (pa.ArrowException, OverflowError):
            return pa.null()


def _refusal(schema: pa.Schema, kinds: dict[str, Kind], wanted: str | None, dataset: str) -> str:
    if wanted is None:
        problem = f"has no column named {', '.join(TOKEN_COLUMNS + TEXT_COLUMNS)} that holds text or token ids"
    elif wanted in schema.names:
        problem = f"column {wanted!r} holds {schema.field(wanted).type}, wanted text or lists of token ids"
    else:
        problem = f"has no column {wanted!r}"
    near = difflib.get_close_matches(wanted, schema.names, n=2, cutoff=0.5) if wanted else []
    offers = [name for name in near if name in kinds] or list(kinds)
    step = f"pass --column {' or --column '.join(offers)}" if offers else "choose another dataset"
    lines = [f"  {field.name}: {field.type}" for field in schema]
    return "\n".join([f"{dataset}: {problem}. Its columns are:", *lines, f"To go on, {step}"])
