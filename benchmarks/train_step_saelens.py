"""SAELens' side of train_step.py: its SAETrainer's step, the call its training loop makes for every batch.

SAELens trains no transcoders, so an autoencoder of the same widths stands in: the same products, inputs as targets.
Modes: float32; bfloat16 (its autocast); "compiled" (torch.compile as its compile_sae does it); "sparse" (TopK's sparse
activations, which raise in the backward pass on a CPU unless rescaling by decoder norms is off).
"""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import (  # type: ignore[import-not-found]
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig  # type: ignore[import-not-found]
from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[import-not-found]

from benchmarks.step_server import LEARNING_RATE, Task, autocast, mean_active, serve

CONFIGS = {
    "topk": TopKTrainingSAEConfig,
    "batch_topk": BatchTopKTrainingSAEConfig,
    "jumprelu": JumpReLUTrainingSAEConfig,
    "relu": StandardTrainingSAEConfig,
}


class SaeLensStep:
    """A trainer that is handed its batches."""

    def __init__(self, task: Task) -> None:
        problem, planted = task.problem, task.planted
        settings = CONFIGS[task.architecture](d_in=problem.width, d_sae=problem.d_sae, **settings_of(task))
        sae = TrainingSAE.from_dict(settings.to_dict())
        with torch.no_grad():
            sae.W_enc.copy_(planted.encoder.T)
            sae.W_dec.copy_(planted.encoder)  # an autoencoder writes what it reads
            if task.architecture == "relu":
                sae.b_enc.fill_(-planted.threshold)
        if "compiled" in task.mode:
            sae.training_forward_pass = torch.compile(sae.training_forward_pass, backend="inductor")
        self._mode = task.mode
        self._trainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=10**9,
                train_batch_size_samples=problem.batch_rows,
                lr=LEARNING_RATE,
                lr_end=LEARNING_RATE,
                autocast="bfloat16" in task.mode,
            ),
            sae,
            data_provider=iter(()),
        )

    def step(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:  # noqa: ARG002
        """Take one step as ``SAETrainer.fit`` does."""
        self._trainer.step(inputs)
        self._trainer.n_training_steps += 1

    @torch.no_grad()
    def l0(self, inputs: torch.Tensor) -> float:
        """Return the mean number of features that fire on a row."""
        with autocast(self._mode):
            activations = self._trainer.sae.encode_with_hidden_pre(inputs)[0]
        return mean_active(activations.to_dense())


def settings_of(task: Task) -> dict[str, Any]:
    """Return what an architecture's settings need besides widths; penalties are its defaults."""
    if task.architecture == "topk":
        sparse = "sparse" in task.mode
        return {"k": task.problem.l0, "use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": not sparse}
    if task.architecture == "batch_topk":
        return {"k": task.problem.l0}
    if task.architecture == "jumprelu":
        return {"jumprelu_init_threshold": task.planted.threshold}
    return {}


if __name__ == "__main__":
    serve(SaeLensStep, ["sae-lens", "torch"])
