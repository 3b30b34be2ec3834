"""Whether two artifacts record the same language model, and in what they differ if not. Only this compares models."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tailrace.storage.draft import list_differences

_MEANINGS = {
    "files_digest": "content of the model's folder, such as other weights",
    "revision": "commit on the hub",
    "dtype": "precision the model computes in",
    "d_model": "width of the residual stream",
    "d_vocab": "tokens the model knows",
    "tokenizer.digest": "content of the tokenizer",
    "tokenizer.bos_source": "where the BOS comes from",
    "tokenizer.bos_token_id": "BOS",
    "tokenizer.separator_token_id": "token between documents",
}
"""What is meant by names that do not say it."""


def list_model_differences(
    recorded: Mapping[str, Any], opened: Mapping[str, Any], *, ignored: Collection[str] = ()
) -> list[str]:
    """Return a line for everything in which two models differ, with both values; none if they are the same model.

    Versions of libraries change the last bits at most, and the name of a folder whose files are equal nothing.
    Keys that only one of the identities has were recorded by another release. ``ignored`` names keys that may differ
    as well, such as ``dtype`` where another precision is asked for.
    """
    if recorded.get("files_digest") and recorded["files_digest"] == opened.get("files_digest"):
        ignored = {*ignored, "name"}
    left_out = {"versions", *ignored}
    left, right = ({key: value for key, value in side.items() if key not in left_out} for side in (recorded, opened))
    return [_explained(line) for line in list_differences(_shared(left, right), _shared(right, left))]


def _shared(one: Any, other: Any) -> Any:
    """Return ``one`` without the keys, at any depth, that ``other`` does not have."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return one
    return {key: _shared(value, other[key]) for key, value in one.items() if key in other}


def without_versions(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's identity without the versions of libraries, which change the last bits at most."""
    return {key: value for key, value in identity.items() if key != "versions"}


def _explained(line: str) -> str:
    name, colon, values = line.partition(": ")
    return f"{name} ({_MEANINGS[name]}){colon}{values}" if name in _MEANINGS else line
