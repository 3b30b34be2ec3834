"""The words of pages, each with its definition: shown at the word on pages, as the last section of the docs' glossary.

``python -m tailrace.analysis.dashboards.glossary docs/glossary.md`` writes that section; a test compares the two.
"""

from __future__ import annotations

import sys
from pathlib import Path

TERMS: dict[str, str] = {
    "activation": "How strongly a feature fires on a token: a number above zero, or zero where it does not fire.",
    "architecture": "How the features that may fire are chosen: BatchTopK and TopK keep k of them per token, "
    "ReLU and JumpReLU those above a threshold.",
    "band": "One of equal parts of the range from zero to the feature's largest activation, with the share of all "
    "tokens whose activation lies in it and examples drawn from it.",
    "cosine": "The cosine between the decoder rows of two features: 1 means that both write in the same direction.",
    "d_sae": "The number of features of the transcoder, dead ones included.",
    "de-embedding": "The product of a token's embedding and the encoder row: how strongly the feature reads that "
    "token, by weights alone, whatever the text.",
    "dead": "Active on none of the tokens analysed.",
    "decoder norm": "The length of the decoder row: how much the feature writes to the output per unit of activation.",
    "dense": "Active on more than 10 % of the tokens analysed.",
    "distinct tokens": "How many different tokens the feature fires on, and their share of all different tokens read.",
    "document": "A text of the dataset, numbered from 0 in the dataset's own order.",
    "encoder bias": "What is added to the encoder's product before the activation function; the more negative, the "
    "stronger the input must be.",
    "encoder norm": "The length of the encoder row: how much the activation grows per unit of input.",
    "fires on": "The tokens at the feature's strongest examples, the most frequent first; the stronger the shade, the "
    "larger the token's share of these examples.",
    "frequency": "The share of the tokens analysed on which the feature is active; the range beside it is the 95 % "
    "interval (Wilson), as if tokens were independent draws.",
    "FVU": "Fraction of variance unexplained: the squared error of the transcoder's output over the variance of the "
    "MLP's output. 0 is perfect, 1 is no better than the mean.",
    "head norm": "‖OV · encoder row‖: how strongly an attention head can carry what the feature's encoder reads.",
    "held-out": "Text kept apart from training.",
    "interest": "The order in which the list opens, from 0 to 1: c · s · n / √m. c is the share of the strongest "
    "examples at their most frequent word (case and spaces aside). s is log₂(max / median) / 3, at most 1. n is active "
    "tokens / 100 times documents / 3, each at most 1. m is the number of features with the same most frequent word. "
    "Dense and dead features and those with examples from one document have none and come last.",
    "Jaccard": "Tokens on which both features are active, over tokens on which either is.",
    "k": "The number of features that may fire on a token: on each for TopK, on average for BatchTopK.",
    "L0": "The mean number of features active on a token.",
    "label": "A name that a person, or a model, gave the feature.",
    "lift": "How many times more often the feature fires on this token than on a token in general.",
    "logit effect": "What the feature adds to a token's logit per unit of activation, by its decoder row alone, "
    "through the final norm's gain but not through what that norm divides by.",
    "max": "The largest activation on the tokens analysed.",
    "mean": "The mean activation over the tokens on which the feature is active, with its standard deviation.",
    "median": "The middle activation over the tokens on which the feature is active.",
    "p90": "The activation that nine in ten of the feature's active tokens do not exceed.",
    "position": "The number of a token in its context, from 0.",
    "promotes": "The tokens whose logits the feature raises most, by its decoder row alone.",
    "share": "A part of the whole, from 0 to 100 %.",
    "site": "The part of the model that the transcoder reads and writes, such as the MLP of layer 8.",
    "suppresses": "The tokens whose logits the feature lowers most, by its decoder row alone.",
    "φ": "Correlation of firing, from −1 to 1: 0 means that two features fire together as often as chance has it, 1 "
    "that they always do.",
}
"""A definition by word, in alphabetical order."""

_HEAD = """## Pages and tables

Pages show the same sentences at the word: point at it, tap it, or move to it with Tab. This section is made by
`python -m tailrace.analysis.dashboards.glossary docs/glossary.md`, and a test compares the two.

| word | meaning |
|---|---|
"""
_ANCHORS = {"φ": "phi"}
"""Of words that are no address."""


def as_markdown() -> str:
    """Return the section, in which each word can be linked to: ``#fires-on``."""
    anchors = {word: _ANCHORS.get(word, word.lower().replace(" ", "-")) for word in TERMS}
    return _HEAD + "".join(
        f'| <a id="{anchors[word]}"></a>**{word}** | {meaning} |\n' for word, meaning in TERMS.items()
    )


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(page.read_text().partition(_HEAD.partition("\n")[0])[0] + as_markdown())
