"""``pipeline score``: what a transcoder's features make of a text, token by token.

One rule for the beginning of a text, the one by which a cache is made: every context begins with the model's BOS, the
tokenizer adds nothing by itself, and the BOS has no score, since no transcoder has learnt it. A text longer than a
context goes on in further ones, each with its own BOS.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailrace.analysis.text_scores import feature_scores, strongest_features
from tailrace.pipeline.model.language_model import LanguageModel, SiteHooks
from tailrace.pipeline.model.of_transcoders import open_transcoder_model
from tailrace.pipeline.shared.device import limited_threads, open_device
from tailrace.storage.artifact import read_manifest
from tailrace.storage.errors import ArtifactMismatch, SettingsError, TextError
from tailrace.storage.formats import TABLES_KIND
from tailrace.storage.tables import read_schema, read_table
from tailrace.storage.token_text import join_characters
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.transcoder import load_transcoder, read_transcoder_manifest

CONTEXT_LENGTH = 1024
"""Tokens of a context unless asked otherwise: attention patterns take memory by the square of it."""

_NOTED = ("frequency", "max", "top_token", "promoted_tokens")
"""Columns of the table of features that are told with a feature, where the tables have them."""


@dataclass(frozen=True)
class ScoredText:
    """A text and what features make of it."""

    tokens: list[str]
    """The text of every token, the BOS of each context among them."""
    token_ids: list[int]
    is_scored: NDArray[np.bool_]
    """(tokens,) false for each BOS."""
    values: NDArray[np.float32]
    """(tokens, features) the activations; NaN for each BOS."""
    strongest: list[list[tuple[int, float]]]
    """For each token the strongest features with their activations, where no feature was asked for; else empty."""


@dataclass(frozen=True)
class Scores:
    """Texts scored by one transcoder."""

    transcoder: str
    site: str
    features: list[int]
    """The columns of ``values``: those asked for, or else the strongest of all texts."""
    is_chosen: bool
    """Whether features were asked for."""
    is_raw: bool
    """Whether values are pre-activations."""
    texts: list[ScoredText]
    about: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What the tables say of a feature."""

    def largest(self) -> float:
        """Return the largest absolute value of all, 0 if none is different from it."""
        values = [np.abs(text.values[text.is_scored]).max(initial=0) for text in self.texts]
        return float(max(values, default=0))


def run(
    texts: Sequence[str],
    *,
    transcoder: Path,
    features: Sequence[int] = (),
    raw: bool = False,
    top: int = 5,
    context_length: int | None = None,
    tables: Path | None = None,
    model: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> Scores:
    """Score ``texts`` with ``features`` of a published transcoder, or with the ``top`` strongest it finds in them.

    ``tables`` of the same transcoder add what is known of a feature; ``model`` says where the language model lies if it
    is not under its recorded name; ``context_length`` counts tokens, the BOS included, and is ``CONTEXT_LENGTH`` unless
    given, or the model's longest if that is less. Activations are float32. Memory: a row of the transcoder's input per
    token, and the model.

    Raises SettingsError for features that are not there or settings that do not go together, TextError for an empty
    text, ArtifactMismatch if tables or model are not the transcoder's, ModelError if the model cannot be loaded.
    """
    made_of = read_transcoder_manifest(transcoder)
    _check(texts, features, raw, made_of["d_sae"])
    about = _Tables(tables, transcoder, made_of) if tables is not None else None
    on = open_device(device)
    with limited_threads(threads):
        language_model = open_transcoder_model([transcoder], model=model, device=device)
        length = _context_length(context_length, language_model)
        hook = made_of["site"]["hook_in"]
        read = [_read(text, language_model, hook, length) for text in texts]
        coder = load_transcoder(transcoder).to(on)
        scores = _score(read, coder, transcoder.name, made_of["site"]["name"], list(dict.fromkeys(features)), raw, top)
    if about is not None:
        mentioned = {feature for text in scores.texts for row in text.strongest for feature, _ in row}
        scores.about.update(about.of(mentioned.union(scores.features)))
    return scores


@dataclass(frozen=True)
class _ReadText:
    """A text as the model read it."""

    tokens: list[str]
    token_ids: list[int]
    is_scored: NDArray[np.bool_]
    inputs: Tensor
    """(scored tokens, d_in) what the transcoder reads."""


def _check(texts: Sequence[str], features: Sequence[int], raw: bool, d_sae: int) -> None:
    if not texts:
        raise TextError("no text to score; give one as an argument, by --file, or on standard input as '-'")
    problems = [f"--feature {one}: this transcoder has features 0 to {d_sae - 1}" for one in features if one >= d_sae]
    problems += [f"--feature {one}: features count from 0" for one in features if one < 0]
    if raw and not features:
        problems.append("--raw shows pre-activations of features named by --feature; without one, activations are told")
    if problems:
        raise SettingsError("\n".join(problems))


def _context_length(wanted: int | None, model: LanguageModel) -> int:
    longest = model.max_context_length
    if wanted is not None and not 2 <= wanted <= longest:
        raise SettingsError(f"--context-length {wanted}: wanted 2 (BOS and a token) to {longest}, the model's longest")
    return min(CONTEXT_LENGTH, longest) if wanted is None else wanted


def _read(text: str, model: LanguageModel, hook: str, length: int) -> _ReadText:
    """Run the model on a text, a context at a time, as far as the transcoder's input."""
    [ids] = model.tokenize([text])
    if not ids:
        raise TextError(f"the text {text!r} has no token; give one that is not empty")
    vocabulary = model.vocabulary()
    all_ids: list[int] = []
    inputs = []
    for start in range(0, len(ids), length - 1):
        context = [model.bos_token_id, *ids[start : start + length - 1]]
        captured = model.capture(torch.tensor([context]), [SiteHooks("scored", hook, hook)])
        inputs.append(captured[hook][0, 1:].float().clone())  # the next capture may use the same memory
        all_ids += context
    is_scored = np.arange(len(all_ids)) % length != 0
    return _ReadText(join_characters([vocabulary[token] for token in all_ids]), all_ids, is_scored, torch.cat(inputs))


def _score(
    read: Sequence[_ReadText], coder: Transcoder, name: str, site: str, features: list[int], raw: bool, top: int
) -> Scores:
    is_chosen = bool(features)
    strongest: list[list[list[tuple[int, float]]]] = [[] for _ in read]
    if not is_chosen:
        found = strongest_features(coder, torch.cat([text.inputs for text in read]), top)
        features = found.overall
        rows = iter(found.per_row)
        strongest = [[next(rows) if scored else [] for scored in text.is_scored] for text in read]
    texts = []
    for text, own in zip(read, strongest, strict=True):
        values = np.full((len(text.tokens), len(features)), np.nan, np.float32)
        values[text.is_scored] = feature_scores(coder, text.inputs, features, raw=raw)
        texts.append(ScoredText(text.tokens, text.token_ids, text.is_scored, values, own))
    return Scores(name, site, features, is_chosen, raw, texts)


class _Tables:
    """The table of features of the same transcoder."""

    def __init__(self, tables: Path, transcoder: Path, made_of: dict[str, Any]) -> None:
        recorded = read_manifest(tables, TABLES_KIND)["inputs"]["transcoder"]["digest"]
        if recorded != made_of["digest"]:
            raise ArtifactMismatch(
                f"--tables {tables}: were made from another transcoder ({recorded}) than {transcoder} "
                f"({made_of['digest']}); give the tables of this one, or leave them out"
            )
        self._file = tables / "features.parquet"

    def of(self, features: set[int]) -> dict[int, dict[str, Any]]:
        """Return what there is to tell of each feature."""
        there = [name for name in _NOTED if name in read_schema(self._file).names]
        rows = read_table(self._file, ["feature", *there], pc.field("feature").isin(sorted(features))).to_pylist()
        return {row.pop("feature"): row for row in rows}


def read_texts(arguments: Sequence[str], files: Sequence[Path]) -> list[str]:
    """Return the texts given as arguments (``-`` is standard input, as one text) and those of files.

    A ``.jsonl`` file holds a text per line, as a JSON string or under the key ``text``; any other file is one text. The
    line break that ends a file or standard input is no part of a text.
    Raises TextError with everything that cannot be read.
    """
    problems: list[str] = []
    texts = [
        ("standard input", _without_last_break(sys.stdin.read())) if argument == "-" else (f"text {number}", argument)
        for number, argument in enumerate(arguments, start=1)
    ]
    for file in files:
        try:
            content = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            problems.append(f"--file {file}: cannot be read as UTF-8 text ({error})")
            continue
        except OSError as error:
            problems.append(f"--file {file}: cannot be read ({error.strerror})")
            continue
        if file.suffix == ".jsonl":
            texts += _json_lines(file, content, problems)
        else:
            texts.append((f"--file {file}", _without_last_break(content)))
    problems += [f"{place}: is empty; give a text" for place, text in texts if not text]
    if problems:
        raise TextError("\n".join(problems))
    return [text for _, text in texts]


def _without_last_break(text: str) -> str:
    return text.removesuffix("\n")


def _json_lines(file: Path, content: str, problems: list[str]) -> Iterator[tuple[str, str]]:
    """Yield every text with where it stands; add to ``problems`` what is none."""
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            problems.append(f"--file {file}, line {number}: is not JSON ({error})")
            continue
        text = value.get("text") if isinstance(value, dict) else value
        if isinstance(text, str):
            yield f"--file {file}, line {number}", text
        else:
            problems.append(f"--file {file}, line {number}: wanted a string, or an object with a string under 'text'")
