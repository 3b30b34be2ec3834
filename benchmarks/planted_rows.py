"""Activations with a planted sparse dictionary, and weights near it, for measuring a step at a known L0.

Every row is a sum of few directions, each with an amplitude, plus noise; outputs are other directions of the same
features. How often a feature fires is log-normal, as in trained dictionaries, so that work per feature is as uneven as
in real training. A bias (or threshold) found on the rows themselves brings a ReLU or JumpReLU to the wanted L0.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

LOG_NORMAL_SIGMA = 1.0
"""Spread of the logarithm of firing frequencies: the middle two thirds of features lie within a factor of 7."""
NOISE = 0.1
"""Root mean square of the noise over that of a row's planted part."""
CHUNK_ROWS = 512


@dataclass(frozen=True)
class Problem:
    """Sizes of a training step."""

    width: int
    """d_in and d_out."""
    d_sae: int
    l0: int
    batch_rows: int = 4096
    n_batches: int = 2
    """Batches that contenders step through again and again; a dozen contenders hold them in memory at once."""


@dataclass(frozen=True)
class Planted:
    """Rows and weights of a problem."""

    inputs: torch.Tensor
    """(n_batches, batch_rows, width), mean squared norm of a row = width, as normalised activations have."""
    outputs: torch.Tensor
    """(n_batches, batch_rows, width), likewise."""
    encoder: torch.Tensor
    """(d_sae, width), rows of unit norm: the directions planted in the inputs."""
    decoder: torch.Tensor
    """(d_sae, width), rows of unit norm: the directions planted in the outputs."""
    threshold: float
    """Above it lie ``l0`` of the first batch's inputs @ encoder.T per row, on average."""


def plant(problem: Problem, seed: int = 0) -> Planted:
    """Make rows and weights; same problem and seed, same numbers."""
    generator = np.random.Generator(np.random.Philox(seed))
    encoder, decoder = (_directions(generator, problem.d_sae, problem.width) for _ in range(2))
    frequencies = firing_frequencies(generator, problem.d_sae, problem.l0)
    n_rows = problem.n_batches * problem.batch_rows
    rows = [torch.empty(n_rows, problem.width) for _ in range(2)]
    for start in range(0, n_rows, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, n_rows)
        fires = generator.random((stop - start, problem.d_sae), np.float32) < frequencies
        features = torch.from_numpy(np.nonzero(fires)[1])
        ends = np.cumsum(fires.sum(1))
        offsets = torch.from_numpy(np.concatenate([[0], ends[:-1]]))
        amplitudes = torch.from_numpy(1 + np.abs(generator.standard_normal(len(features), np.float32)) / 2)
        for side, directions in zip(rows, (encoder, decoder), strict=True):
            side[start:stop] = F.embedding_bag(features, directions, offsets, mode="sum", per_sample_weights=amplitudes)
    shape = (problem.n_batches, problem.batch_rows, problem.width)
    inputs, outputs = (_with_noise(generator, side).reshape(shape) for side in rows)
    return Planted(inputs, outputs, encoder, decoder, _threshold(inputs[0], encoder, problem.l0))


def firing_frequencies(generator: np.random.Generator, d_sae: int, l0: int) -> np.ndarray:
    """Return (d_sae,) log-normal probabilities that sum to ``l0``, none above one half."""
    frequencies = np.exp(LOG_NORMAL_SIGMA * generator.standard_normal(d_sae))
    for _ in range(20):  # cutting the top off lowers the sum, scaling up may reach the top again
        frequencies = np.minimum(frequencies * (l0 / frequencies.sum()), 0.5)
    return frequencies.astype(np.float32)


def _directions(generator: np.random.Generator, n: int, width: int) -> torch.Tensor:
    rows = generator.standard_normal((n, width), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.from_numpy(rows)


def _with_noise(generator: np.random.Generator, rows: torch.Tensor) -> torch.Tensor:
    rows /= rows.pow(2).mean().sqrt()
    rows += NOISE * torch.from_numpy(generator.standard_normal(tuple(rows.shape), np.float32))
    return rows / rows.pow(2).mean().sqrt()


def _threshold(inputs: torch.Tensor, encoder: torch.Tensor, l0: int) -> float:
    sample = inputs[:1024]
    values = (sample @ encoder.T).flatten()
    return float(values.kthvalue(len(values) - l0 * len(sample)).values)


def save(planted: Planted, problem: Problem, folder: Path) -> None:
    """Write everything below ``folder``, for contenders in other processes and environments."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("inputs", "outputs", "encoder", "decoder"):
        np.save(folder / f"{name}.npy", getattr(planted, name).numpy())
    (folder / "problem.json").write_text(json.dumps({**asdict(problem), "threshold": planted.threshold}))


def load(folder: Path) -> tuple[Planted, Problem]:
    """Read what ``save`` wrote."""
    sizes = json.loads((folder / "problem.json").read_text())
    threshold = sizes.pop("threshold")
    names = ("inputs", "outputs", "encoder", "decoder")
    inputs, outputs, encoder, decoder = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in names)
    return Planted(inputs, outputs, encoder, decoder, threshold), Problem(**sizes)
