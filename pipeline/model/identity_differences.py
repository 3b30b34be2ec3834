"""In what the language model that was opened differs from the one an artifact records, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from storage.differences import list_differences

_MEANINGS = {
    "files_digest": "content of the model's folder, such as other weights",
    "revision": "commit on the hub",
    "dtype": "precision the model computes in",
    "d_model": "width of the residual stream",
    "d_vocab": "tokens the model knows",
    "tokenizer.digest": "content of the tokenizer",
    "tokenizer.bos_source": "where the BOS comes from",
    "tokenizer.bos_token_id": "BOS",
}
"""What is meant by names that do not say it."""


def list_model_differences(recorded: Mapping[str, Any], opened: Mapping[str, Any]) -> list[str]:
    """Return a line for everything in which two identities differ, with both values and what they are of."""
    return [_meant(line) for line in list_differences(dict(recorded), dict(opened))]


def _meant(line: str) -> str:
    name, colon, values = line.partition(": ")
    return f"{name} ({_MEANINGS[name]}){colon}{values}" if name in _MEANINGS else line
