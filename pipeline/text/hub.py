"""Datasets of the Hugging Face hub: pinned to a commit, streamed, and their failures put in words.

A name on the hub may point to other text tomorrow. The commit is therefore looked up first, streamed from, and
recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from tailrace.pipeline.text.examples import describe_failure
from tailrace.pipeline.text.files import near_paths, offer_zstandard
from tailrace.pipeline.text.retry import HTTP_ERROR, retry_opening
from tailrace.storage.errors import TextError

OPENING_FAILURES = (OSError, HTTP_ERROR, ValueError, RuntimeError, NotImplementedError)
"""What looking up or opening a hub dataset raises: no network, no such name, split or configuration, not streamable."""


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
