"""What a user asks of a circuit, in words: a prompt and a feature, a logit or a difference of logits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.storage.errors import SettingsError


@dataclass(frozen=True)
class Question:
    """Which quantity is explained on which prompt; exactly one of the three is set."""

    prompt: str
    token: int = -1
    """Position at which it is explained, counted from the BOS as 0, or from the end as −1."""
    feature: tuple[int, int] | None = None
    """Layer and index."""
    direction: Literal["encoder", "decoder"] = "encoder"
    """encoder: the feature's activation; decoder: what the MLP's own output has along its decoder direction."""
    logit: str | None = None
    """Text of one token."""
    logit_difference: tuple[str, str] | None = None

    def record(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)

    def check(self) -> None:
        """Raise SettingsError unless exactly one quantity is asked for, with what belongs to it."""
        given = [name for name in ("feature", "logit", "logit_difference") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(f"--{name.replace('_', '-')}" for name in given) or "none"
            raise SettingsError(
                f"a circuit explains one quantity, and {found} is given; use one of --feature LAYER:INDEX, --logit "
                "TEXT and --logit-difference TEXT TEXT"
            )
        if self.feature is None and self.direction != "encoder":
            raise SettingsError(f"--direction {self.direction}: only with --feature; leave it out")
        if self.logit_difference is not None and len(set(self.logit_difference)) == 1:
            raise SettingsError(
                f"--logit-difference: both are {self.logit_difference[0]!r}, so there is nothing to explain; "
                "give two tokens"
            )


def parse_feature(text: str) -> tuple[int, int]:
    """Read ``8:89``; raise SettingsError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,18})\s*", text)
    if match is None:
        raise SettingsError(f"feature {text!r}: write LAYER:INDEX, such as 8:89")
    return int(match[1]), int(match[2])


def prompt_tokens(model: LanguageModel, prompt: str) -> list[int]:
    """Return the BOS and the prompt's tokens. Raises SettingsError for a prompt of no token, or of too many."""
    (ids,) = model.prompt_tokens([prompt])
    if len(ids) == 1:
        raise SettingsError(
            f"prompt {prompt!r}: has no token but the BOS, at which no transcoder stands in; give some text"
        )
    if len(ids) > model.max_context_length:
        raise SettingsError(
            f"prompt: has {len(ids)} tokens with the BOS, the model's longest context is {model.max_context_length}; "
            "shorten it"
        )
    return ids


def token_ids(model: LanguageModel, texts: Sequence[str], name: str) -> list[int]:
    """Return the token that each text is; raise SettingsError, with the pieces, for every text of none or several.

    ``name``: what the command calls such a text.
    """
    found, problems = [], []
    for text, ids in zip(texts, model.tokenize(texts), strict=True):
        if len(ids) == 1:
            found.append(ids[0])
        else:
            vocabulary = model.vocabulary()
            pieces = " ".join(repr(vocabulary[one]) for one in ids) or "nothing"
            problems.append(
                f"{name} {text!r}: is {len(ids)} tokens to this model ({pieces}), wanted one; words inside a sentence "
                "usually begin with a space"
            )
    if problems:
        raise SettingsError("\n".join(problems))
    return found


def check_askable(question: Question, d_sae: Mapping[int, int], n_layers: int, missing: str) -> None:
    """Raise SettingsError, with every problem, if these transcoders cannot answer, before a language model is loaded.

    ``d_sae`` has the number of features by layer. The feature must be there, and every layer below it, or below a
    logit, must have a transcoder unless ``missing`` is opaque.
    """
    problems = []
    last = n_layers
    if question.feature is not None:
        last, index = question.feature
        if last not in d_sae:
            have = ", ".join(map(str, sorted(d_sae))) or "none"
            problems.append(
                f"--feature {last}:{index}: no transcoder of layer {last} was given; layers with one: {have}"
            )
        elif index >= d_sae[last]:
            problems.append(f"--feature {last}:{index}: this transcoder has features 0 to {d_sae[last] - 1}")
    without = [layer for layer in range(min(last, n_layers)) if layer not in d_sae]
    if without and missing == "refuse":
        problems.append(
            f"layers {', '.join(map(str, without))}: no transcoder of them was given, so no features say what their "
            "MLPs do; give them too, or --missing-layers opaque to have each such MLP as one node"
        )
    if problems:
        raise SettingsError("\n".join(problems))
