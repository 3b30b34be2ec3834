"""The original transcoder code's step by its formulas, in plain torch: what ReLU + L1 costs before anything is done.

Six dense products (two forward, four backward, one of them only for the gradient of the input bias), Adam with torch's
defaults, and decoder normalisation, projection and firing counts as passes of their own.
"""

from __future__ import annotations

import torch

from benchmarks.step_server import LEARNING_RATE, Task, autocast, mean_active, serve

L1 = 1.4e-4


class ReferenceStep:
    """f = relu((x − b_dec) W_enc + b_enc), ŷ = f W_dec + b_dec_out; loss mean((ŷ − y)² / ‖y‖) + l1 · mean Σ f."""

    def __init__(self, task: Task) -> None:
        planted, width, d_sae = task.planted, task.problem.width, task.problem.d_sae
        self._autocast = task.mode
        self._W_enc = planted.encoder.T.contiguous().requires_grad_()
        self._b_enc = torch.full((d_sae,), -planted.threshold).requires_grad_()
        self._W_dec = planted.decoder.clone().requires_grad_()
        self._b_dec = torch.zeros(width).requires_grad_()
        self._b_dec_out = torch.zeros(width).requires_grad_()
        parameters = [self._W_enc, self._b_enc, self._W_dec, self._b_dec, self._b_dec_out]
        self._optimiser = torch.optim.Adam(parameters, lr=LEARNING_RATE)
        self._steps_since_fired = torch.zeros(d_sae)
        self._fired_rows = torch.zeros(d_sae)

    def _encode(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.relu((inputs - self._b_dec) @ self._W_enc + self._b_enc)

    def step(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Take one step, in the original's order."""
        with torch.no_grad():
            self._W_dec /= self._W_dec.norm(dim=1, keepdim=True)
        self._optimiser.zero_grad()
        with autocast(self._autocast):
            activations = self._encode(inputs)
            predicted = activations @ self._W_dec + self._b_dec_out
        error = (predicted.float() - outputs).pow(2) / outputs.norm(dim=-1, keepdim=True)
        loss = error.mean() + L1 * activations.abs().sum(1).mean()
        with torch.no_grad():
            fires = (activations > 0).float().sum(0)
            self._steps_since_fired += 1
            self._steps_since_fired[fires > 0] = 0
            self._fired_rows += fires
        loss.backward()
        with torch.no_grad():
            gradient = self._W_dec.grad
            assert gradient is not None
            gradient -= (gradient * self._W_dec).sum(1, keepdim=True) * self._W_dec
        self._optimiser.step()

    @torch.no_grad()
    def l0(self, inputs: torch.Tensor) -> float:
        """Return the mean number of features that fire on a row."""
        return mean_active(self._encode(inputs))


if __name__ == "__main__":
    serve(ReferenceStep, ["torch"])
