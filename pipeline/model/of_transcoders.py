"""The language model that transcoders were trained on, opened again from what the transcoders themselves record.

No cache is needed, so a transcoder can be tried on any text. A model from a folder is recorded by the folder's name and
a digest of its files, never by a path; ``tailrace.pipeline.model.locations`` looks for it.

A model from the hub is opened by its name. One from a folder is not asked for there, not even if the hub has a model of
that name: its files could not be those recorded.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tailrace.pipeline.artifacts.folders import PathLike, Paths, as_paths, transcoder_paths
from tailrace.pipeline.model.language_model import LanguageModel, load_language_model
from tailrace.pipeline.model.locations import named_folder, recorded_location
from tailrace.pipeline.model.same_model import list_model_differences
from tailrace.pipeline.model.settings import ModelSettings
from tailrace.storage.errors import ArtifactMismatch, ModelError, SettingsError
from tailrace.storage.names import home_path
from tailrace.training.architectures.manifest import read_either_manifest

_NAMED = 3
"""Transcoders whose paths a message names where many have the same fault."""


def open_transcoder_model(
    transcoders: Sequence[Path], *, model: str | None = None, device: str = "cpu", dtype: str | None = None
) -> LanguageModel:
    """Return the language model that every one of ``transcoders`` was trained on.

    ``model`` is a hub name or a folder, where it is not (or no longer) under its recorded name; ``dtype`` computes in
    another precision than the recorded one. Raises SettingsError if no transcoder is given, ArtifactMismatch if they
    belong to different models or the model opened is another one, with every difference, and ModelError if it cannot
    be loaded, saying what to give.
    """
    if not transcoders:
        raise SettingsError("no transcoder given, and so no language model; give the path of at least one")
    recorded = _common_model(transcoders)
    model = None if model is None else named_folder(model)
    settings = {
        "model": model if model is not None else recorded_location(recorded, str(recorded["name"]), transcoders[0]),
        "revision": None if model is not None and home_path(model).is_dir() else recorded.get("revision"),
        "model_dtype": dtype if dtype is not None else recorded.get("dtype", "auto"),
        "processing": recorded.get("processing", "raw"),
        "bos_token_id": _given_bos(recorded),
    }
    ignored = () if dtype is None else ("dtype",)
    try:
        return load_recorded(
            ModelSettings.model_validate(settings),
            recorded,
            f"{transcoders[0]} was trained on",
            device,
            ignored=ignored,
        )
    except ModelError as error:
        if model is not None:
            raise
        raise ModelError(
            f"{transcoders[0]}: its language model is recorded as {recorded['name']!r} and cannot be opened under that "
            f"name; say where it lies with --model. {error}"
        ) from error


def load_recorded(
    settings: ModelSettings, recorded: Mapping[str, Any], use: str, device: str, *, ignored: Collection[str] = ()
) -> LanguageModel:
    """Load a language model; raise ArtifactMismatch, with every difference, if it is not the one ``recorded``.

    ``use`` is what was done with that one, for the message; ``ignored`` names keys that may differ.
    """
    loaded = load_language_model(settings, device=device, recorded=recorded)
    if differences := list_model_differences(recorded, loaded.identity(recorded), ignored=ignored):
        lines = "\n".join(f"  {line}" for line in differences)
        raise ArtifactMismatch(
            f"{settings.model}: is not the model that {use}; give the right one with --model ('there' is the "
            f"recorded model, 'asked for' the opened one):\n{lines}"
        )
    return loaded


def open_model(
    transcoders: Paths, *, model: PathLike | None = None, device: str = "cpu", dtype: str | None = None
) -> LanguageModel:
    """Return the language model that transcoders were trained on; its ``bridge`` is TransformerLens' model.

    ``model`` says where it lies, if not under the name that the transcoders record; ``dtype`` computes in another
    precision. Raises ArtifactError if it is another model, and ModelError if it cannot be loaded.

    ``tailrace.open_model("transcoders/gpt2").tokenize(["some text"])``
    """
    paths = transcoder_paths(as_paths(transcoders))
    return open_transcoder_model(paths, model=None if model is None else os.fspath(model), device=device, dtype=dtype)


def _common_model(transcoders: Sequence[Path]) -> Mapping[str, Any]:
    """Return the model all transcoders record; library versions may differ."""
    recorded = [read_either_manifest(path).model for path in transcoders]
    others: dict[tuple[str, ...], list[Path]] = {}
    for path, other in zip(transcoders[1:], recorded[1:], strict=True):
        if differences := list_model_differences(recorded[0], other):
            others.setdefault(tuple(differences), []).append(path)
    if others:
        lines = [line for differences, paths in others.items() for line in _of_another_model(paths, differences)]
        raise ArtifactMismatch(
            f"these transcoders were trained on other language models than {transcoders[0]} ('there'); use only those "
            "of one model:\n" + "\n".join(lines)
        )
    return dict(recorded[0])


def _of_another_model(paths: Sequence[Path], differences: Sequence[str]) -> Iterator[str]:
    """Yield lines about transcoders of one other model; some of a set for each layer are named."""
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    yield f"  {', '.join(map(str, paths[:_NAMED]))}{more}:"
    yield from (f"    {line}" for line in differences)


def _given_bos(recorded: Mapping[str, Any]) -> int | None:
    """Return the BOS if it was a setting; a tokenizer's own is found again."""
    tokenizer = recorded.get("tokenizer") or {}
    return tokenizer.get("bos_token_id") if tokenizer.get("bos_source") == "setting" else None
