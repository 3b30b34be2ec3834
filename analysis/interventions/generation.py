"""Text that a language model writes while features are changed, and how far the change moves its next tokens.

Prompts of different lengths are padded on the left while text is written, so that new tokens stand in one column; a
position is a token's place in its own text, whatever stands before it. A change is added on top of the model's own
output, so a change of nothing leaves every bit of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tailrace.analysis.evaluate.next_tokens import next_token_divergences
from tailrace.analysis.interventions.features import Ablate, Add, Clamp, Edit, EditedFeatures, FeatureCoder, Scale
from tailrace.analysis.interventions.forward import forward
from tailrace.analysis.interventions.prompts import pad_prompts
from tailrace.analysis.splice.replacement import Substitute, replaced
from tailrace.storage.cache_format import Site

ChangeKind = Literal["add", "clamp", "scale", "off"]

Texts = Sequence[Sequence[int]]
"""Token ids of each text, the BOS first."""
TokenMask = Callable[[Tensor], Tensor]
"""Returns which of tokens (contexts, positions) may be changed, bool."""


@dataclass(frozen=True)
class FeatureChange:
    """What is done to features of one layer, at every token or at one position (0 is the BOS)."""

    site: Site
    features: tuple[int, ...]
    kind: ChangeKind
    value: float = 0.0
    position: int | None = None

    def edit(self, where: Tensor | None) -> Edit:
        """Return it as an edit of activations at ``where``."""
        match self.kind:
            case "add":
                return Add(self.features, self.value, where=where)
            case "clamp":
                return Clamp(self.features, self.value, where=where)
            case "scale":
                return Scale(self.features, self.value, where=where)
            case "off":
                return Ablate(self.features, where=where)


@dataclass(frozen=True)
class NextTokenChange:
    """How far a change moves the predictions of every token of a text after its first two, the BOS and another."""

    kl: float
    """Sum of KL(model ‖ changed) over the predictions, in nats."""
    n_changed: int
    """Predictions whose likeliest token is another."""
    n_tokens: int
    """Predictions."""


class SteeredModel:
    """A TransformerLens ``bridge`` that writes with features changed. Texts end at any of the tokens ``ends``."""

    def __init__(
        self, bridge: Any, coders: Mapping[Site, FeatureCoder], may_change: TokenMask, ends: Collection[int] = ()
    ) -> None:
        self._bridge, self._coders, self._may_change = bridge, coders, may_change
        self._ends = frozenset(ends)

    @torch.inference_mode()
    def write(
        self,
        prompts: Texts,
        n_new: int,
        changes: Sequence[FeatureChange] = (),
        *,
        temperature: float = 0.0,
        rngs: Sequence[np.random.Generator] = (),
        use_cache: bool = True,
    ) -> list[list[int]]:
        """Return up to ``n_new`` new tokens after each prompt; the last is an end where the text ends before.

        Temperature 0 takes the likeliest token; any other needs a generator of random numbers for each prompt.
        Without the cache of keys and values all tokens are run again for each new token.
        """
        longest = max(map(len, prompts))
        starts = [longest - len(prompt) for prompt in prompts]
        tokens = torch.tensor([[own[0]] * start + list(own) for own, start in zip(prompts, starts, strict=True)])
        where = torch.zeros(len(prompts), longest + n_new, dtype=torch.bool)
        for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            where[row, start:longest] = self._may_change(torch.tensor([list(prompt)]))[0]
        texts = [list(prompt) for prompt in prompts]
        passes = self._passes(tokens, torch.tensor(starts), use_cache)
        with replaced(self._bridge, self._substitutes(changes, starts, where.shape[1]), where=where):
            logits = next(passes)
            for column in range(longest, longest + n_new):
                chosen = _choose(logits, temperature, rngs).tolist()
                writing = [row for row, text in enumerate(texts) if not self._is_ended(text, prompts[row])]
                for row in writing:
                    texts[row].append(chosen[row])
                    where[row, column] = self._may_change(torch.tensor([texts[row]]))[0, -1]
                if all(self._is_ended(text, prompt) for text, prompt in zip(texts, prompts, strict=True)):
                    break
                if column + 1 < longest + n_new:
                    logits = passes.send(torch.tensor(chosen)[:, None])
        return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]

    def _is_ended(self, text: Sequence[int], prompt: Sequence[int]) -> bool:
        return len(text) > len(prompt) and text[-1] in self._ends

    def _passes(self, tokens: Tensor, starts: Tensor, use_cache: bool) -> Generator[Tensor, Tensor, None]:
        """Yield the logits (texts, vocab) after the last of ``tokens``, and after each column of tokens sent."""
        model = self._bridge.original_model
        device = next(model.parameters()).device
        takes = inspect.signature(model.forward).parameters
        text = tokens
        cache: Any = None
        while True:
            is_text = torch.arange(text.shape[1]) >= starts[:, None]
            named: dict[str, Any] = {"attention_mask": is_text.long(), "use_cache": use_cache}
            if "position_ids" in takes:
                named["position_ids"] = (is_text.cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
            if "logits_to_keep" in takes:
                named["logits_to_keep"] = 1
            on_device = {name: one.to(device) if isinstance(one, Tensor) else one for name, one in named.items()}
            if cache is not None:
                on_device["past_key_values"] = cache
            output = model(tokens.to(device), **on_device)
            new = yield output.logits[:, -1]
            text = torch.cat([text, new], 1)
            tokens, cache = (new, output.past_key_values) if use_cache else (text, None)

    def logits(self, texts: Texts, changes: Sequence[FeatureChange] = ()) -> Tensor:
        """Return (texts, positions, vocab) of all texts in one pass, padded on the right."""
        prompts = pad_prompts(texts)
        substitutes = self._substitutes(changes, [0] * len(texts), prompts.tokens.shape[1])
        where = self._may_change(prompts.tokens)
        return forward(self._bridge, prompts, substitutes=substitutes, where=where).logits

    def _substitutes(
        self, changes: Sequence[FeatureChange], starts: Sequence[int], n_columns: int
    ) -> dict[Site, Substitute]:
        """Return what makes ``changes`` in texts that begin at columns ``starts``."""
        edits: dict[Site, list[Edit]] = {}
        columns = torch.arange(n_columns) - torch.tensor(starts)[:, None]
        for change in changes:
            where = None if change.position is None else columns == change.position
            edits.setdefault(change.site, []).append(change.edit(where))
        return {site: EditedFeatures(self._coders[site], own, on_top_of="model") for site, own in edits.items()}


def next_token_changes(plain: Tensor, changed: Tensor, lengths: Sequence[int]) -> list[NextTokenChange]:
    """Return for each text how its predictions differ between two logits (texts, positions, vocab).

    ``lengths`` are those of the texts, the BOS included; what stands after a text counts nothing, nor does the
    prediction at the BOS, where nothing is changed.
    """
    divergences = next_token_divergences(plain, changed)
    differs = (plain.argmax(-1).to(changed.device) != changed.argmax(-1)).cpu()
    counted = [slice(1, length - 1) for length in lengths]
    return [
        NextTokenChange(float(divergences[row, own].sum()), int(differs[row, own].sum()), max(0, own.stop - 1))
        for row, own in enumerate(counted)
    ]


def _choose(logits: Tensor, temperature: float, rngs: Sequence[np.random.Generator]) -> Tensor:
    """Return (texts,) the likeliest tokens, or at a temperature those drawn, a random number for each text."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    drawn = torch.tensor([rng.random() for rng in rngs], dtype=torch.float64, device=logits.device)
    return torch.searchsorted(cumulative, drawn[:, None] * cumulative[:, -1:], right=True)[:, 0]
