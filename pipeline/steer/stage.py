"""The stage ``pipeline steer``: text that a language model writes with features of transcoders changed, and without.

A change is decoder × change of activation, added to the MLP's own output, wherever the transcoders have learnt. How far
it moves the model is measured along the text that the model writes by itself: the same tokens for every change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tailrace.analysis.harvest.histogram import wilson_interval
from tailrace.analysis.interventions.generation import NextTokenChange, SteeredModel, next_token_changes
from tailrace.pipeline.artifacts.transcoders import (
    PublishedTranscoder,
    layers_by_site,
    open_tables,
    open_transcoders,
)
from tailrace.pipeline.cache.learnt_rows import LearntTokens
from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.pipeline.model.of_transcoders import open_transcoder_model
from tailrace.pipeline.score.stage import about_features, read_texts
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.progress import Progress
from tailrace.pipeline.steer.changes import FeatureFacts, Layers, SteeredRun, asked_runs, random_runs, read_circuit
from tailrace.pipeline.steer.settings import SteerSettings
from tailrace.storage.cache_format import Site
from tailrace.storage.display import card, share, table
from tailrace.storage.errors import SettingsError, TextError
from tailrace.storage.shuffle import philox
from tailrace.storage.tables import column
from tailrace.storage.token_text import join_characters
from tailrace.training.architectures.transcoder import Transcoder

MODEL = "model"
"""Label of what the model writes by itself."""

SCHEMA = pa.schema(
    [
        column("prompt", pa.int32(), "number of the prompt, from 0"),
        column("prompt_text", pa.string(), "the prompt"),
        column("run", pa.string(), "what was asked for, `model` where nothing is changed"),
        column("draw", pa.int32(), "number of the draw of random features; null for those asked for", nullable=True),
        column("features", pa.string(), "what is changed, of a draw the random ones; null for `model`", nullable=True),
        column("text", pa.string(), "what is written after the prompt"),
        column("token_ids", pa.list_(pa.int32()), "its tokens"),
        column("is_match", pa.bool_(), "whether it matches the regular expression of `--count`", nullable=True),
        column(
            "kl", pa.float64(), "mean KL(model ‖ changed) of the next token along the model's own text", unit="nats",
            nullable=True,
        ),
        column("changed_share", pa.float64(), "share of these next tokens whose likeliest is another", nullable=True),
        column("n_next_tokens", pa.int32(), "how many these are", nullable=True),
    ]
)  # fmt: skip
"""Columns of what ``pipeline steer --out texts.parquet`` writes."""


_PROMPTS_SHOWN = 5
"""In a notebook."""


@dataclass(frozen=True)
class SteeredText:
    """What was written after one prompt in one run."""

    prompt: int
    run: int
    """0 is the model by itself."""
    draw: int | None
    """Which draw of random features beside the run; None for the run itself."""
    features: str | None
    """Those that were changed, of a draw the random ones."""
    tokens: tuple[str, ...] = field(repr=False)
    token_ids: tuple[int, ...] = field(repr=False)
    effect: NextTokenChange | None
    """Of the change on the next tokens of the model's own text; None of the model itself."""

    @property
    def text(self) -> str:
        """What is new."""
        return "".join(self.tokens)


@dataclass(frozen=True)
class RunSummary:
    """A run over all prompts, or a draw of random features beside it."""

    kl: float | None
    """Mean over the next tokens of all prompts, in nats; None of the model itself, and where there is no next token."""
    changed_share: float | None
    n_matches: int
    n_texts: int


@dataclass(frozen=True)
class SteerResult:
    """Texts with and without changes."""

    prompts: tuple[str, ...]
    runs: tuple[str, ...]
    """Labels; the first is the model by itself."""
    texts: tuple[SteeredText, ...] = field(repr=False)
    """By prompt, run and draw."""
    about: Mapping[str, Mapping[str, Any]]
    """What the tables say of the features changed."""
    count: str | None = None
    """The regular expression whose matches are counted."""

    def _repr_html_(self) -> str:
        columns = ("", "text", "KL, nats", "next tokens changed")
        return "".join(
            card(prompt, {}, table(columns, (self._shown(number, run) for run in range(len(self.runs)))))
            for number, prompt in enumerate(self.prompts[:_PROMPTS_SHOWN])
        )

    def _shown(self, prompt: int, run: int) -> tuple[str, str, float | None, str]:
        text = self.of(prompt, run)
        if text.effect is None or not text.effect.n_tokens:
            return self.runs[run], text.text, None, share(None)
        n_tokens = text.effect.n_tokens
        return self.runs[run], text.text, text.effect.kl / n_tokens, share(text.effect.n_changed / n_tokens)

    def of(self, prompt: int, run: int) -> SteeredText:
        """Return what was written in a run, without its random features."""
        return next(one for one in self.texts if (one.prompt, one.run, one.draw) == (prompt, run, None))

    @property
    def n_draws(self) -> int:
        """Draws of random features beside each run."""
        return 1 + max((one.draw for one in self.texts if one.draw is not None), default=-1)

    def is_match(self, text: SteeredText) -> bool:
        """Return whether a text matches what is counted."""
        return self.count is not None and re.search(self.count, text.text) is not None

    def summary(self, run: int, draw: int | None = None) -> RunSummary:
        """Return a run, or one draw beside it, over all prompts."""
        own = self._by_run[run, draw]
        effects = [one.effect for one in own if one.effect is not None]
        n_tokens = sum(effect.n_tokens for effect in effects)
        return RunSummary(
            sum(effect.kl for effect in effects) / n_tokens if n_tokens else None,
            sum(effect.n_changed for effect in effects) / n_tokens if n_tokens else None,
            sum(map(self.is_match, own)),
            len(own),
        )

    def draws(self, run: int) -> list[RunSummary]:
        """Return each draw of random features beside a run."""
        return [self.summary(run, draw) for draw in range(self.n_draws)] if run else []

    @cached_property
    def _by_run(self) -> dict[tuple[int, int | None], list[SteeredText]]:
        found: dict[tuple[int, int | None], list[SteeredText]] = {}
        for one in self.texts:
            found.setdefault((one.run, one.draw), []).append(one)
        return found

    def table(self) -> pa.Table:
        """Return a row for every text, with the columns of ``SCHEMA``."""
        return pa.Table.from_pylist([self._row(one) for one in self.texts], schema=SCHEMA)

    def _row(self, one: SteeredText) -> dict[str, Any]:
        effect = one.effect
        n_tokens = None if effect is None else effect.n_tokens
        return {
            "prompt": one.prompt,
            "prompt_text": self.prompts[one.prompt],
            "run": self.runs[one.run],
            "draw": one.draw,
            "features": one.features,
            "text": one.text,
            "token_ids": list(one.token_ids),
            "is_match": None if self.count is None else self.is_match(one),
            "kl": effect.kl / n_tokens if effect and n_tokens else None,
            "changed_share": effect.n_changed / n_tokens if effect and n_tokens else None,
            "n_next_tokens": n_tokens,
        }


def share_interval(n_hits: int, n_trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share."""
    low, high = wilson_interval(np.array([n_hits]), n_trials)
    return float(low[0]), float(high[0])


def run(
    settings: SteerSettings,
    prompts: Sequence[str],
    *,
    transcoders: Sequence[Path],
    from_circuit: Path | None = None,
    tables: Sequence[Path] = (),
    model: str | None = None,
    compute: Compute = Compute(),
) -> SteerResult:
    """Write on after ``prompts`` with features changed and without; without any, after that of ``from_circuit``.

    ``transcoders`` are transcoders, folders of them or cross-layer ones; ``tables`` of them say what is known of
    features, and how often each is active, which random ones need; ``model`` says where the language model lies.
    Raises SettingsError for features that are not there, before the model is loaded, and for prompts longer than its
    context; ArtifactMismatch for a circuit or tables of other transcoders; TextError for an empty prompt.
    """
    circuit = None if from_circuit is None else read_circuit(from_circuit)
    texts = list(prompts) or ([circuit.prompt] if circuit is not None else [])
    if not texts:
        raise TextError("no prompt; give some as arguments, by --file, or on standard input as '-'")
    if empty := [str(number) for number, text in enumerate(texts, start=1) if not text]:
        raise TextError(f"prompts {', '.join(empty)}: are empty; give each some text")
    given = open_transcoders(transcoders)
    layers = layers_by_site(given)
    is_own = circuit is not None and texts == [circuit.prompt]
    runs = asked_runs(settings, layers, circuit, of_its_prompt=is_own)
    sites = {change.site.name for one in runs for change in one.changes}
    known = _tables_of(tables, layers)
    draws = _draws(settings, runs, {site: layers[site] for site in sites}, known)
    with compute.opened():
        used = [one for one in given if any(layer.site.name in sites for layer in one.layers)]
        opened = open_transcoder_model([one.path for one in given], model=model, device=compute.device_name)
        ids = _prompt_ids(opened, texts, settings.tokens)
        learnt = LearntTokens([layer for one in used for layer in one.layers], opened)
        ends = {opened.separator_token_id}
        steered = SteeredModel(opened.bridge, _loaded(used, sites, compute.device_name), learnt, ends)
        written = list(_written(steered, ids, [SteeredRun(MODEL, ()), *runs], draws, settings, compute.quiet))
    vocabulary = opened.vocabulary()
    return SteerResult(
        tuple(texts),
        (MODEL, *(one.label for one in runs)),
        tuple(_text(one, vocabulary, ends) for one in sorted(written, key=lambda one: (one.prompt, one.run))),
        _about(runs, layers, known),
        settings.count,
    )


@dataclass(frozen=True)
class _Written:
    prompt: int
    run: int
    draw: int | None
    features: str | None
    token_ids: list[int]
    effect: NextTokenChange | None


def _written(
    steered: SteeredModel,
    prompts: Sequence[Sequence[int]],
    runs: Sequence[SteeredRun],
    draws: Sequence[Sequence[SteeredRun]],
    settings: SteerSettings,
    quiet: bool,
) -> Iterator[_Written]:
    """Yield every text, a batch of prompts after the other; of each run the features asked for come first."""
    all_runs: list[tuple[int, int | None, SteeredRun]] = []
    for number, one in enumerate(runs):
        all_runs.append((number, None, one))
        all_runs += [(number, draw, other) for draw, other in enumerate(draws[number - 1] if number and draws else ())]
    size = settings.prompts_per_batch
    batches = [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
    total = len(all_runs) * len(prompts)
    with Progress(total, "steer", "texts", quiet=quiet) as bar:
        for batch in batches:
            own = [prompts[index] for index in batch]
            plain_texts: list[list[int]] = []
            plain_logits = None
            for number, draw, changed in all_runs:
                rngs = [np.random.Generator(philox(settings.seed, "steer/sample", index)) for index in batch]
                new = steered.write(own, settings.tokens, changed.changes, temperature=settings.temperature, rngs=rngs)
                effects: list[NextTokenChange | None] = [None] * len(own)
                if plain_logits is None:
                    plain_texts = [[*prompt, *text] for prompt, text in zip(own, new, strict=True)]
                    plain_logits = steered.logits(plain_texts)
                else:
                    logits = steered.logits(plain_texts, changed.changes)
                    effects = [*next_token_changes(plain_logits, logits, [len(text) for text in plain_texts])]
                label = changed.label if number else None
                for index, text, effect in zip(batch, new, effects, strict=True):
                    yield _Written(index, number, draw, label, text, effect)
                bar.update(len(own))


def _tables_of(tables: Sequence[Path], layers: Layers) -> dict[str, Path]:
    names = list(layers)
    return {names[at]: path for at, path in open_tables(tables, dict(enumerate(layers.values()))).items()}


def _draws(
    settings: SteerSettings, runs: Sequence[SteeredRun], layers: Layers, tables: Mapping[str, Path]
) -> list[list[SteeredRun]]:
    """Return the random runs beside each of ``runs``."""
    if settings.random == 0:
        return []
    if missing := [site for site in layers if site not in tables]:
        raise SettingsError(
            f"--random {settings.random}: which features are as often active is in tables, and there are none of "
            f"{', '.join(missing)}; give them by --tables (pipeline analyze makes them)"
        )
    facts = {site: FeatureFacts.of(layer, tables[site]) for site, layer in layers.items()}
    return [list(random_runs(one, facts, settings.random, settings.seed)) for one in runs]


def _loaded(transcoders: Sequence[PublishedTranscoder], sites: set[str], device: str) -> dict[Site, Transcoder]:
    return {site: layer.to(device) for one in transcoders for site, layer in one.load().items() if site.name in sites}


def _prompt_ids(model: LanguageModel, prompts: Sequence[str], n_new: int) -> list[list[int]]:
    """Return the tokens of each prompt, the BOS first. Raises SettingsError for those that leave no room."""
    ids = model.prompt_tokens(prompts)
    longest = model.max_context_length
    problems = [
        f"prompt {number}: has {len(own)} tokens with the BOS, and --tokens {n_new} are to come; the model's longest "
        f"context is {longest}"
        for number, own in enumerate(ids, start=1)
        if len(own) + n_new > longest
    ]
    if problems:
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise SettingsError("\n".join([*problems[:5], *more, "give shorter prompts, or fewer --tokens"]))
    return ids


def _text(one: _Written, vocabulary: Sequence[str], ends: set[int]) -> SteeredText:
    ids = one.token_ids[:-1] if one.token_ids and one.token_ids[-1] in ends else one.token_ids
    tokens = tuple(join_characters([vocabulary[token] for token in ids]))
    return SteeredText(one.prompt, one.run, one.draw, one.features, tokens, tuple(ids), one.effect)


def _about(
    runs: Sequence[SteeredRun], layers: Layers, tables: Mapping[str, Path], at_most: int = 12
) -> dict[str, dict[str, Any]]:
    """Return what tables say of the first features changed, by ``SITE:FEATURE``."""
    changed = dict.fromkeys(
        (change.site.name, index) for one in runs for change in one.changes for index in change.features
    )
    return {
        f"{site}:{index}": about_features(tables[site], {index}, 0, layers[site].d_sae)[index]
        for site, index in list(changed)[:at_most]
        if site in tables
    }


def read_prompts(arguments: Sequence[str], files: Sequence[Path]) -> list[str]:
    """Return the prompts given as arguments (``-`` is standard input, as one), then those of files, one a line.

    A line of a ``.jsonl`` file is a JSON string, or an object with the prompt under ``text`` or ``prompt``. Raises
    TextError with everything that cannot be read.
    """
    prompts = read_texts(arguments, [])
    for file in files:
        texts = read_texts([], [file])
        prompts += texts if file.suffix == ".jsonl" else [line for line in texts[0].splitlines() if line.strip()]
    return prompts
