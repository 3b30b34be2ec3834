"""A peer's dictionaries trained on our cached rows, and scored by our evaluator.

Rows go to the peer as a file in the order our runs see them, so that both sides take the same steps on the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.peers import run_script
from benchmarks.train_step import peer_python
from tailrace.training.loop.evaluate import Predictor


@dataclass(frozen=True)
class PeerRecipe:
    """One autoencoder of dictionary_learning's."""

    kind: str
    """topk or batch_topk."""
    k: int
    lr: float
    seed: int
    path: str
    """Where its weights go."""


def write_rows(path: Path, batches: Iterable[Tensor], n_rows: int) -> None:
    """Write ``n_rows`` rows of ``batches`` (rows, width), one after another, as float32. Raises ValueError if fewer."""
    written, rows = 0, None
    for batch in batches:
        if rows is None:
            rows = np.lib.format.open_memmap(path, "w+", np.float32, (n_rows, batch.shape[1]))
        taken = min(len(batch), n_rows - written)
        rows[written : written + taken] = batch[:taken].float().numpy()
        written += taken
        if written == n_rows:
            break
    if rows is None or written < n_rows:
        raise ValueError(f"{path}: {n_rows} rows were to be written and there were {written}; read more epochs")
    rows.flush()


def train_dictionary_learning(
    rows: Path, recipes: Sequence[PeerRecipe], *, d_sae: int, batch_rows: int, steps: int, threads: int = 1
) -> None:
    """Train all recipes side by side on a file of ``write_rows``; each one's weights are written to its path."""
    run_script(
        peer_python("dictionary_learning"),
        "quality_theirs.py",
        {
            "rows": str(rows.resolve()),
            "recipes": [{**asdict(recipe), "path": str(Path(recipe.path).resolve())} for recipe in recipes],
            "d_sae": d_sae,
            "batch_rows": batch_rows,
            "steps": steps,
            "threads": threads,
        },
    )


def peer_predictor(kind: str, weights: Path) -> Predictor:
    """Return what ``tailrace.training.loop.evaluate`` scores: TopK by its k, BatchTopK by the threshold it learnt, as
    it is used."""
    tensors = load_file(weights)
    k, threshold = int(tensors["k"]), float(tensors["threshold"])

    def predict(inputs: Tensor) -> tuple[Tensor, Tensor]:
        activations = (inputs @ tensors["W_enc"].T + tensors["b_enc"]).relu()
        if kind == "topk":
            values, features = activations.topk(k, dim=-1)
            activations = torch.zeros_like(activations).scatter(-1, features, values)
        else:
            activations = activations * (activations > threshold)
        return activations @ tensors["W_dec"] + tensors["b_dec_out"], activations > 0

    return predict
