"""How well a model does a task with known answers: probabilities among the answers, and what is made of them.

Probabilities are a softmax over the logits of the answers alone, at the last token, so mass on other tokens does not
count. All in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tailrace.analysis.interventions.forward import ForwardPass
from tailrace.analysis.interventions.metrics import Metric
from tailrace.storage.errors import TextError


def answer_probabilities(logits: Tensor, answers: Tensor) -> Tensor:
    """Return (prompts, answers) float64: softmax of logits (prompts, vocab) over the tokens ``answers`` (answers,)."""
    return logits.double()[:, answers].softmax(1)


def probability_above_minus_below(probabilities: Tensor, start: Tensor) -> Tensor:
    """Return (prompts,) Σ_{y > start} p_y − Σ_{y ≤ start} p_y of probabilities (prompts, answers) of ordered answers.

    ``start`` (prompts,) is each prompt's own answer by index. This is the greater-than metric of Dunefsky et al. (2024,
    "Transcoders find interpretable LLM feature circuits", §5) after Hanna et al. (2023), for which answers are the
    hundred two-digit numbers and ``start`` is the year a war began; the answer ``start`` itself counts as below.
    """
    above = torch.arange(probabilities.shape[1], device=probabilities.device) > start[:, None]
    return torch.where(above, probabilities, -probabilities).sum(1)


def neighbour_difference(probabilities: Tensor, start: Tensor) -> Tensor:
    """Return (prompts,) p_{start+1} − p_{start−1}: how sharp the step is. ``start`` is neither first nor last."""
    rows = torch.arange(len(start), device=probabilities.device)
    return probabilities[rows, start + 1] - probabilities[rows, start - 1]


def divergences(probabilities: Tensor, changed: Tensor) -> Tensor:
    """Return (prompts,) KL(probabilities ‖ changed) in nats, both (prompts, answers)."""
    own: Tensor = torch.special.xlogy(probabilities, probabilities)
    crossed: Tensor = torch.special.xlogy(probabilities, changed)
    return (own - crossed).sum(1)


class CorrectMinusIncorrect(Metric):
    """Probability of a prompt's correct answers less that of its incorrect ones, among these answers: −1 to 1.

    Each prompt has its own lists of token ids. With the hundred two-digit numbers of a greater-than prompt, those above
    the year correct and all others incorrect, it is ``probability_above_minus_below``.
    """

    def __init__(self, correct: Sequence[Sequence[int]], incorrect: Sequence[Sequence[int]]) -> None:
        if problems := answer_problems(correct, incorrect):
            raise TextError("answers cannot be scored:\n" + "\n".join(f"  {line}" for line in problems))
        self.tokens = sorted({token for answers in (*correct, *incorrect) for token in answers})
        """Every answer of any prompt, by token id."""
        place = {token: index for index, token in enumerate(self.tokens)}
        self._signs = torch.zeros(len(correct), len(self.tokens), dtype=torch.float64)
        for sign, lists in ((1.0, correct), (-1.0, incorrect)):
            for row, answers in enumerate(lists):
                self._signs[row, [place[token] for token in answers]] = sign

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self._signs)

    def part(self, prompts: slice) -> CorrectMinusIncorrect:
        """Return the metric of some of the prompts."""
        part = object.__new__(CorrectMinusIncorrect)
        part.tokens, part._signs = self.tokens, self._signs[prompts]
        return part

    def __call__(self, run: ForwardPass) -> Tensor:
        """Return (prompts,) differences of probability."""
        logits = run.last_logits.cpu().double()[:, self.tokens]
        probabilities = logits.masked_fill(self._signs == 0, -torch.inf).softmax(1)
        return (probabilities * self._signs).sum(1)


def answer_problems(correct: Sequence[Sequence[int]], incorrect: Sequence[Sequence[int]]) -> list[str]:
    """Return a sentence for every prompt without correct or incorrect answers, or with one that is both."""
    problems = []
    if len(correct) != len(incorrect):
        return [f"there are correct answers of {len(correct)} prompts and incorrect ones of {len(incorrect)}"]
    for index, (right, wrong) in enumerate(zip(correct, incorrect, strict=True)):
        missing = [name for name, answers in (("correct", right), ("incorrect", wrong)) if not len(answers)]
        if missing:
            problems.append(f"prompt {index} has no {' and no '.join(missing)} answer")
        if both := sorted(set(right) & set(wrong)):
            problems.append(f"prompt {index}: token {both[0]} is a correct and an incorrect answer")
    return problems
