"""``pipeline score``: what features make of a text, token by token: of a transcoder, or of all layers of several.

One rule for the beginning of a text, the one by which a cache is made: every context begins with the model's BOS, the
tokenizer adds nothing by itself, a BOS that the text begins with is that one, and it has no score, since no transcoder
has learnt it. A text longer than a
context goes on in further ones, each with its own BOS.
"""

from __future__ import annotations

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
from tailrace.pipeline.artifacts.transcoders import TranscoderLayer, layers_by_site, open_tables, open_transcoders
from tailrace.pipeline.cache.learnt_rows import LearntTokens
from tailrace.pipeline.model.language_model import LanguageModel, SiteHooks
from tailrace.pipeline.model.of_transcoders import open_transcoder_model
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.errors import SettingsError, TextError
from tailrace.storage.labels import read_labels
from tailrace.storage.parsing import parse_json, read_text
from tailrace.storage.tables import read_schema, read_table
from tailrace.storage.token_text import join_characters

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
    """(tokens,) false where a transcoder has not learnt, such as at each BOS."""
    values: NDArray[np.float32]
    """(tokens, features) the activations; NaN where nothing is scored."""
    strongest: list[list[tuple[int, float]]]
    """For each token the strongest features with their activations, where no feature was asked for; else empty."""


@dataclass(frozen=True)
class Scores:
    """Texts scored by transcoders. Features of several layers are numbered through, layer after layer."""

    model: str
    """Name of the language model."""
    transcoder: str
    site: str
    """Its name; of several layers, those of the first and the last."""
    features: list[int]
    """The columns of ``values``: those asked for, or else the strongest of all texts."""
    is_chosen: bool
    """Whether features were asked for."""
    is_raw: bool
    """Whether values are pre-activations."""
    texts: list[ScoredText]
    about: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What the tables say of a feature."""
    layers: dict[str, int] = field(default_factory=dict)
    """Number of features by site, where there are several."""

    def label(self, feature: int) -> str:
        """Return a feature's name: its number, after that of its site where there are several."""
        site, own = self.place(feature)
        return str(own) if site is None else f"{site}:{own}"

    def place(self, feature: int) -> tuple[str | None, int]:
        """Return the site, None if there is only one, and the number there."""
        for site, d_sae in self.layers.items():
            if feature < d_sae:
                return site, feature
            feature -= d_sae
        return None, feature

    def record(self, feature: int) -> dict[str, Any]:
        """Return the same as JSON."""
        site, own = self.place(feature)
        return {"feature": own} if site is None else {"site": site, "feature": own}

    def largest(self) -> float:
        """Return the largest absolute value of all, 0 if none is different from it."""
        values = [np.abs(text.values[text.is_scored]).max(initial=0) for text in self.texts]
        return float(max(values, default=0))


def run(
    texts: Sequence[str],
    *,
    transcoder: Path | Sequence[Path],
    features: Sequence[int | tuple[int, int]] = (),
    raw: bool = False,
    top: int = 5,
    context_length: int | None = None,
    tables: Sequence[Path] = (),
    model: str | None = None,
    compute: Compute = Compute(),
) -> Scores:
    """Score ``texts`` with ``features`` of a published transcoder, or with the ``top`` strongest it finds in them.

    Of a cross-layer transcoder, or a folder of transcoders, features of all layers are scored: each is (layer, feature)
    then, with layers counted from 0 for the first. ``tables`` of the same transcoders, or a folder of some, add what is
    known of a feature; ``model`` says where the language model lies if it is not under its recorded name;
    ``context_length`` counts tokens, the BOS included, and is ``CONTEXT_LENGTH`` unless given, or the model's longest
    if that is less. Activations are float32. Memory: a row of each layer's input per token, a layer's weights at a
    time, and the model.

    Raises SettingsError for features that are not there or settings that do not go together, TextError for an empty
    text, ArtifactMismatch if tables or model are not the transcoder's, ModelError if the model cannot be loaded.
    """
    given = open_transcoders(transcoder)
    layers = list(layers_by_site(given).values())
    name = ", ".join(path.name for path in ([transcoder] if isinstance(transcoder, Path) else transcoder))
    asked = [(0, one) if isinstance(one, int) else one for one in dict.fromkeys(features)]
    _check(texts, asked, raw, [layer.d_sae for layer in layers])
    known = open_tables(tables, dict(enumerate(layers)))
    with compute.opened() as device:
        language_model = open_transcoder_model([one.path for one in given], model=model, device=compute.device_name)
        scorer = Scorer(name, layers, language_model, device, context_length)
        scores = scorer.score(texts, asked, raw=raw, top=top)
    mentioned = {feature for text in scores.texts for row in text.strongest for feature, _ in row}
    mentioned.update(scores.features)
    start = 0
    for index, layer in enumerate(layers):
        if index in known:
            scores.about.update(about_features(known[index], mentioned, start, layer.d_sae))
        start += layer.d_sae
    return scores


class Scorer:
    """A language model with layers of transcoders, opened once to score any number of texts.

    Raises SettingsError for a length of contexts that the model cannot have.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[TranscoderLayer],
        model: LanguageModel,
        device: torch.device,
        context_length: int | None = None,
    ) -> None:
        self._name, self._layers, self._model, self._device = name, layers, model, device
        self._length = _context_length(context_length, model)
        self._learnt = LearntTokens(layers, model)

    def score(
        self, texts: Sequence[str], asked: Sequence[tuple[int, int]], *, raw: bool = False, top: int = 5
    ) -> Scores:
        """Return the scores of ``texts`` with features (layer, index), or with the ``top`` strongest if none is asked.

        Raises TextError for a text without a token, and for texts with none that the transcoders have learnt.
        """
        hooks = [layer.site.hook_in for layer in self._layers]
        read = [_read(text, self._model, hooks, self._length, self._learnt) for text in texts]
        if not any(text.is_scored.any() for text in read):
            raise TextError(
                f"no token of the texts is of a kind that {self._name} has learnt from (its manifest's `packing` says "
                "which); give longer texts"
            )
        names = Path(self._model.name).name, self._name
        return _score(read, self._layers, asked, raw, top, names, self._device)


def layer_sizes(transcoder: Path | Sequence[Path]) -> dict[str, int]:
    """Return the number of features by site, of a transcoder or of several. Raises SettingsError, ArtifactError."""
    return {site: layer.d_sae for site, layer in layers_by_site(open_transcoders(transcoder)).items()}


@dataclass(frozen=True)
class _ReadText:
    """A text as the model read it."""

    tokens: list[str]
    token_ids: list[int]
    is_scored: NDArray[np.bool_]
    inputs: list[Tensor]
    """(scored tokens, d_in) what each layer reads."""


def _check(texts: Sequence[str], features: Sequence[tuple[int, int]], raw: bool, d_sae: Sequence[int]) -> None:
    if not texts:
        raise TextError("no text to score; give one as an argument, by --file, or on standard input as '-'")
    if unknown := sorted({layer for layer, _ in features if not 0 <= layer < len(d_sae)}):
        raise SettingsError(f"layers {', '.join(map(str, unknown))}: there are {len(d_sae)} here, counted from 0")
    problems = [
        f"--feature {one}: this transcoder has features 0 to {d_sae[layer] - 1}"
        for layer, one in features
        if one >= d_sae[layer]
    ]
    problems += [f"--feature {one}: features count from 0" for _, one in features if one < 0]
    if raw and not features:
        problems.append(
            "--raw shows pre-activations of the features that --feature names; name some, or leave --raw out"
        )
    if problems:
        raise SettingsError("\n".join(problems))


def _context_length(wanted: int | None, model: LanguageModel) -> int:
    longest = model.max_context_length
    if wanted is not None and not 2 <= wanted <= longest:
        raise SettingsError(f"--context-length {wanted}: wanted 2 (BOS and a token) to {longest}, the model's longest")
    return min(CONTEXT_LENGTH, longest) if wanted is None else wanted


def _read(text: str, model: LanguageModel, hooks: Sequence[str], length: int, learnt: LearntTokens) -> _ReadText:
    """Run the model on a text, a context at a time, as far as the last layer's input."""
    [[bos, *ids]] = model.prompt_tokens([text])
    if not ids:
        raise TextError(f"the text {text!r} has no token; give one that is not empty")
    vocabulary = model.vocabulary()
    all_ids: list[int] = []
    is_scored: list[NDArray[np.bool_]] = []
    inputs: list[list[Tensor]] = [[] for _ in hooks]
    for start in range(0, len(ids), length - 1):
        context = [bos, *ids[start : start + length - 1]]
        tokens = torch.tensor([context])
        is_scored.append(learnt(tokens)[0].numpy())
        captured = model.capture(tokens, [SiteHooks(hook, hook, hook) for hook in hooks])
        for own, hook in zip(inputs, hooks, strict=True):
            own.append(captured[hook][0][is_scored[-1]].float().clone())  # the next capture may use the same memory
        all_ids += context
    texts = join_characters([vocabulary[token] for token in all_ids])
    return _ReadText(texts, all_ids, np.concatenate(is_scored), [torch.cat(own) for own in inputs])


def _score(
    read: Sequence[_ReadText],
    layers: Sequence[TranscoderLayer],
    asked: Sequence[tuple[int, int]],
    raw: bool,
    top: int,
    names: tuple[str, str],
    device: torch.device,
) -> Scores:
    """Score layer after layer, each loaded for itself. Features are numbered through."""
    columns: dict[int, NDArray[np.float32]] = {}  # (scored tokens of all texts,) by feature
    strongest: list[list[tuple[int, float]]] = [[] for _ in range(sum(len(text.inputs[0]) for text in read))]
    start = 0
    for index, layer in enumerate(layers):
        coder = layer.load().to(device)
        inputs = torch.cat([text.inputs[index] for text in read])
        chosen = [feature for own, feature in asked if own == index]
        if not asked:
            found = strongest_features(coder, inputs, top)
            chosen = found.overall
            for row, own in zip(strongest, found.per_row, strict=True):
                row += [(start + feature, value) for feature, value in own]
        values = feature_scores(coder, inputs, chosen, raw=raw)
        columns |= {start + feature: values[:, column] for column, feature in enumerate(chosen)}
        start += layer.d_sae
    starts = np.cumsum([0, *(layer.d_sae for layer in layers)]).tolist()
    features = [starts[layer] + feature for layer, feature in asked]
    if not asked:  # sorts are stable: features of one layer come as they were ranked
        features = sorted(columns, key=lambda feature: -float(columns[feature].max(initial=0)))[:top]
        strongest = [sorted(row, key=lambda one: -one[1])[:top] for row in strongest]
    texts, first = [], 0
    for text in read:
        rows = slice(first, first := first + len(text.inputs[0]))
        values = np.full((len(text.tokens), len(features)), np.nan, np.float32)
        for column, feature in enumerate(features):
            values[text.is_scored, column] = columns[feature][rows]
        own_strongest = iter(strongest[rows])
        told = [next(own_strongest) if scored else [] for scored in text.is_scored]
        texts.append(ScoredText(text.tokens, text.token_ids, text.is_scored, values, told))
    sites = [layer.site.name for layer in layers]
    if len(layers) == 1:
        return Scores(*names, sites[0], features, bool(asked), raw, texts)
    sizes = dict(zip(sites, (layer.d_sae for layer in layers), strict=True))
    return Scores(*names, f"{sites[0]} to {sites[-1]}", features, bool(asked), raw, texts, layers=sizes)


def about_features(tables: Path, features: set[int], start: int, d_sae: int) -> dict[int, dict[str, Any]]:
    """Return what a layer's tables tell of those of ``features`` that are its own, the first being ``start``."""
    file = tables / "features.parquet"
    there = [name for name in _NOTED if name in read_schema(file).names]
    own = sorted(feature - start for feature in features if start <= feature < start + d_sae)
    rows = read_table(file, ["feature", *there], pc.field("feature").isin(own)).to_pylist()
    labels = {feature: {"label": one.label} for feature, one in read_labels(tables).items() if one.label}
    return {start + (feature := row.pop("feature")): {**labels.get(feature, {}), **row} for row in rows}


def read_texts(arguments: Sequence[str], files: Sequence[Path]) -> list[str]:
    """Return the texts given as arguments (``-`` is standard input, as one text) and those of files.

    A ``.jsonl`` file holds a text per line, as a JSON string or under the key ``text`` or ``prompt``; any other file is
    one text. The line break that ends a file or standard input is no part of a text.
    Raises TextError with everything that cannot be read.
    """
    problems: list[str] = []
    texts = [
        ("standard input", _without_last_break(sys.stdin.read())) if argument == "-" else (f"text {number}", argument)
        for number, argument in enumerate(arguments, start=1)
    ]
    for file in files:
        try:
            content = read_text(file)
        except ValueError as error:
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
            value = parse_json(line)
        except ValueError as error:
            problems.append(f"--file {file}, line {number}: is not JSON ({error})")
            continue
        text = value.get("text", value.get("prompt")) if isinstance(value, dict) else value
        if isinstance(text, str):
            yield f"--file {file}, line {number}", text
        else:
            problems.append(f"--file {file}, line {number}: wanted a string, or an object with one under 'text'")
