"""dictionary_learning's side of train_step.py: its trainers' update(), the call its training loop makes for a batch.

Its trainers for these architectures are of autoencoders; inputs are the targets. Modes: float32, what its loop runs on
a CPU (it drops its autocast there); bfloat16, the same update inside the autocast it uses on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # type: ignore[import-not-found]
from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # type: ignore[import-not-found]
from dictionary_learning.trainers.standard import StandardTrainer  # type: ignore[import-not-found]
from dictionary_learning.trainers.top_k import TopKTrainer  # type: ignore[import-not-found]

from benchmarks.step_server import LEARNING_RATE, Task, autocast, mean_active, serve

FIRST_STEP = 1
"""Step 0 would find a geometric median first, which is not part of a step."""


class DictionaryLearningStep:
    """A trainer that is handed its batches."""

    def __init__(self, task: Task) -> None:
        self._trainer = build_trainer(task)
        self._mode, self._next = task.mode, FIRST_STEP
        set_weights(self._trainer.ae, task)

    def step(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:  # noqa: ARG002
        """Take one step."""
        with autocast(self._mode):
            self._trainer.update(self._next, inputs)
        self._next += 1

    @torch.no_grad()
    def l0(self, inputs: torch.Tensor) -> float:
        """Return the mean number of features that fire on a row, by the choice made in training."""
        choice = {"use_threshold": False} if hasattr(self._trainer.ae, "k") else {}
        with autocast(self._mode):
            return mean_active(self._trainer.ae.encode(inputs, **choice))


def build_trainer(task: Task) -> Any:
    """Return the trainer of an architecture."""
    problem = task.problem
    shared = {
        "steps": 10**6,
        "activation_dim": problem.width,
        "dict_size": problem.d_sae,
        "lr": LEARNING_RATE,
        "warmup_steps": 0,
        "layer": 0,
        "lm_name": "none",
        "device": "cpu",
    }
    if task.architecture == "topk":
        return TopKTrainer(k=problem.l0, **shared)
    if task.architecture == "batch_topk":
        return BatchTopKTrainer(k=problem.l0, **shared)
    if task.architecture == "jumprelu":
        return JumpReluTrainer(target_l0=float(problem.l0), sparsity_warmup_steps=None, **shared)
    return StandardTrainer(sparsity_warmup_steps=None, **shared)


@torch.no_grad()
def set_weights(coder: Any, task: Task) -> None:
    """Copy the planted weights, of whatever orientation; an autoencoder writes what it reads."""
    encoder, threshold = task.planted.encoder, task.planted.threshold
    if task.architecture == "jumprelu":
        coder.W_enc.copy_(encoder.T)
        coder.W_dec.copy_(encoder)
        coder.threshold.fill_(threshold)
        return
    coder.encoder.weight.copy_(encoder)
    coder.decoder.weight.copy_(encoder.T)
    if task.architecture == "relu":
        coder.encoder.bias.fill_(-threshold)


if __name__ == "__main__":
    serve(DictionaryLearningStep, ["dictionary-learning", "torch"])
