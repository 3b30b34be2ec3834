"""Runs a recipe with the code of this checkout, each step in the folder that its paths are relative to."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from contextlib import chdir
from pathlib import Path

import torch

from tailrace.pipeline.cli import main
from tests.released.recipe import MODEL, STEPS, TASK, TEXT, Step
from tests.support.cache_jobs import Kill, die_at, speech_texts
from tests.support.forked import forked
from tests.support.tiny_models import save_tiny_model

N_WORDS = 160
"""Words taken of each speech."""


def make(folder: Path) -> None:
    """Write the inputs into the new ``folder``, then run every step of the recipe there."""
    folder.mkdir(parents=True)
    write_inputs(folder)
    for step in STEPS:
        run_step(step, folder)


def write_inputs(folder: Path) -> None:
    """Write a random model of the commonest words, the beginning of each speech, and a task."""
    texts = [" ".join(text.split()[:N_WORDS]) for text in speech_texts()]
    words = Counter(word for text in texts for word in text.split())
    vocabulary = [word for word, _ in sorted(words.items(), key=lambda item: (-item[1], item[0]))[:60]]
    save_tiny_model(folder / MODEL, vocabulary=vocabulary, d_model=8, context_length=32)
    prompts = [
        {"prompt": "the people of", "correct": ["the"], "incorrect": ["of"]},
        {"prompt": "and the people", "correct": ["of"], "incorrect": ["the"]},
    ]
    for name, lines in ((TEXT, [{"text": text} for text in texts]), (TASK, prompts)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def run_step(step: Step, folder: Path) -> None:
    """Run a step below ``folder``; raise RuntimeError if it fails, or ends where it was to be killed."""
    if step.kill is None:
        run(step, folder)
        return
    child = forked().Process(target=_run_until, args=(step, folder, step.kill))
    child.start()
    child.join()
    if child.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"pipeline {step.line}: was to be killed, and ended with {child.exitcode}")


def finish(folder: Path) -> list[str]:
    """Go on, to their ends, with all steps that were killed below ``folder``; return what they made."""
    killed = [step for step in STEPS if step.kill is not None]
    for step in killed:
        run(step, folder)
    return [step.output for step in killed]


def run(step: Step, folder: Path) -> None:
    """Run a step below ``folder``, in this process and on one thread, to its end."""
    torch.set_num_threads(1)
    with chdir(folder):
        try:
            main(step.arguments)
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(f"pipeline {step.line}: ended with {stop.code}") from stop


def _run_until(step: Step, folder: Path, kill: Kill) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    die_at(kill)
    run(step, folder)
