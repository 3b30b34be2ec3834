"""EleutherAI sparsify's side of train_step.py: its SparseCoder as a transcoder, stepped as its Trainer's loop does.

The Trainer itself takes activations from a language model's hooks only, so what its loop does for a batch is done
here with the same objects and settings: loss "fvu", no AuxK (its default), Adam with its linear schedule. Its default
optimiser, signum, is not Adam and is not compared. Modes: float32, what it runs on a CPU; bfloat16, the autocast it
has on a GPU.
"""

from __future__ import annotations

import torch
from sparsify.config import SparseCoderConfig  # type: ignore[import-not-found]
from sparsify.sparse_coder import SparseCoder  # type: ignore[import-not-found]
from transformers import get_linear_schedule_with_warmup

from benchmarks.step_server import LEARNING_RATE, Task, autocast, serve

N_STEPS = 10**6


class SparsifyStep:
    """A transcoder with TopK."""

    def __init__(self, task: Task) -> None:
        problem, planted = task.problem, task.planted
        torch.set_float32_matmul_precision("high")  # as Trainer.fit does
        settings = SparseCoderConfig(num_latents=problem.d_sae, k=problem.l0, transcode=True)
        self._coder = SparseCoder(problem.width, settings, dtype=torch.float32)
        with torch.no_grad():
            self._coder.encoder.weight.copy_(planted.encoder)
            self._coder.W_dec.copy_(planted.decoder)
        self._mode = task.mode
        self._optimiser = torch.optim.Adam(self._coder.parameters(), lr=LEARNING_RATE)
        self._schedule = get_linear_schedule_with_warmup(self._optimiser, 0, N_STEPS)
        self._tokens_since_fired = torch.zeros(problem.d_sae, dtype=torch.long)
        self._fired = torch.zeros(problem.d_sae, dtype=torch.bool)
        self.mean_fvu = 0.0

    def step(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Take one step on one micro-batch."""
        total_variance = (outputs - outputs.mean(0)).pow(2).sum()
        with autocast(self._mode):
            out = self._coder(x=inputs, y=outputs, dead_mask=None, total_variance=total_variance)
        self._fired[out.latent_indices.flatten()] = True
        self.mean_fvu = float(out.fvu.detach())
        (out.fvu + out.multi_topk_fvu / 8).backward()
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._schedule.step()
        with torch.no_grad():
            self._tokens_since_fired += len(inputs)
            self._tokens_since_fired[self._fired] = 0
            self._fired.zero_()

    @torch.no_grad()
    def l0(self, inputs: torch.Tensor) -> float:
        """Return the mean number of features that fire on a row."""
        with autocast(self._mode):
            values = self._coder.encode(inputs).top_acts
        return float((values > 0).sum(-1).double().mean())


if __name__ == "__main__":
    serve(SparsifyStep, ["eai-sparsify", "torch"])
