"""The least any exact step does: the encoder's matrix product, inputs (batch, width) times W_enc.T, and no more."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.step_server import Task, mean_active, serve


class EncoderProduct:
    """One product into a new (batch, d_sae) tensor, in the type that ``mode`` names."""

    def __init__(self, task: Task) -> None:
        self._dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[task.mode]
        self._encoder = task.planted.encoder.to(self._dtype)
        self._bias = torch.full((task.problem.d_sae,), -task.planted.threshold, dtype=self._dtype)

    @torch.no_grad()
    def step(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:  # noqa: ARG002
        """Multiply; converting the inputs is part of it."""
        F.linear(inputs.to(self._dtype), self._encoder, self._bias)

    @torch.no_grad()
    def l0(self, inputs: torch.Tensor) -> float:
        """Return how many entries a ReLU would leave."""
        return mean_active(F.linear(inputs.to(self._dtype), self._encoder, self._bias))


if __name__ == "__main__":
    serve(EncoderProduct, ["torch"])
