"""Prompts with known answers from a JSON Lines file, as tokens of a model.

A line is ``{"prompt": "The war lasted from 1735 to 17", "correct": ["36", "37"], "incorrect": ["34", "35"]}``. Answers
are what may come next, exactly as it would: with its leading space where the tokenizer puts one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailrace.analysis.task.answers import answer_problems
from tailrace.pipeline.model.language_model import LanguageModel
from tailrace.storage.errors import TextError
from tailrace.storage.parsing import parse_json, read_text

_KEYS = {"prompt", "correct", "incorrect"}


@dataclass(frozen=True)
class TaskPrompts:
    """Prompts, their tokens with the BOS in front once, and their answers' tokens."""

    texts: list[str]
    tokens: list[list[int]]
    correct: list[list[int]]
    incorrect: list[list[int]]


Lines = Sequence[tuple[int, dict[str, Any]]]
"""(line number, what it says)."""


def read_lines(path: Path) -> Lines:
    """Return the lines of a file of prompts.

    Raises TextError, listing every problem by line: no JSON, missing or unknown keys, values of another kind.
    """
    lines = list(_lines(path))
    problems = [problem for number, value in lines for problem in _form_problems(number, value)]
    if problems:
        raise _refusal(path, problems)
    return lines


def tokenized(path: Path, lines: Lines, model: LanguageModel) -> TaskPrompts:
    """Return what ``read_lines`` gave of ``path`` as tokens.

    Raises TextError, listing every problem by line: answers that are not one token or are both right and wrong, prompts
    longer than the model's contexts.
    """
    problems = []
    max_length = model.max_context_length
    texts = [value["prompt"] for _, value in lines]
    tokens = model.prompt_tokens(texts)
    for (number, _), ids in zip(lines, tokens, strict=True):
        if len(ids) > max_length:
            problems.append(f"line {number}: the prompt has {len(ids)} tokens, the model reads at most {max_length}")
    answers: dict[str, list[list[int]]] = {"correct": [], "incorrect": []}
    for kind, lists in answers.items():
        for number, value in lines:
            split = model.tokenize(value[kind])
            problems += [
                f"line {number}: the {kind} answer {text!r} is {len(ids)} tokens, but must be one; give its first "
                "token's text, or other answers"
                for text, ids in zip(value[kind], split, strict=True)
                if len(ids) != 1
            ]
            lists.append([ids[0] for ids in split if len(ids) == 1])
    if not problems:
        problems = answer_problems(answers["correct"], answers["incorrect"])
    if problems:
        raise _refusal(path, problems)
    return TaskPrompts(texts, tokens, answers["correct"], answers["incorrect"])


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of every line that is not empty."""
    try:
        text = read_text(path)
    except FileNotFoundError as error:
        raise TextError(f"{path}: there is no such file; check the path of the prompts") from error
    except (OSError, ValueError) as error:
        raise TextError(f"{path}: cannot be read as text ({error}); wanted JSON Lines in UTF-8") from error
    found = False
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        found = True
        try:
            yield number, parse_json(line)
        except ValueError:
            yield number, None
    if not found:
        raise TextError(f"{path}: is empty; {_WANTED}")


_WANTED = 'wanted lines such as {"prompt": "…", "correct": [" yes"], "incorrect": [" no"]}'


def _form_problems(number: int, value: Any) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"line {number}: is no JSON object; {_WANTED}"
        return
    if missing := sorted(_KEYS - value.keys()):
        yield f"line {number}: has no {', '.join(missing)}; {_WANTED}"
    if unknown := sorted(value.keys() - _KEYS):
        yield f"line {number}: has {', '.join(unknown)}, which mean nothing here; {_WANTED}"
    if "prompt" in value and not (isinstance(value["prompt"], str) and value["prompt"]):
        yield f"line {number}: prompt is {value['prompt']!r}, wanted text"
    for kind in ("correct", "incorrect"):
        answers = value.get(kind)
        if kind in value and not (
            isinstance(answers, list) and answers and all(isinstance(one, str) for one in answers)
        ):
            yield f"line {number}: {kind} is {answers!r}, wanted a list of texts"


def _refusal(path: Path, problems: Sequence[str]) -> TextError:
    shown = [f"  {problem}" for problem in problems[:20]]
    if len(problems) > len(shown):
        shown.append(f"  … and {len(problems) - len(shown)} more")
    return TextError(f"{path}: cannot be used as a task:\n" + "\n".join(shown))
