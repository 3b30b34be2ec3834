"""dictionary_learning's side of quality.py: its trainSAE over rows in a file; runs in its own environment.

It trains autoencoders only: the loop has a transcoder flag, but no trainer takes a pair of inputs and targets. The
loop, normalisation, initial bias and trainers are its own; the lengths of warm-up and decay follow ours, since its
defaults of 1000 steps are longer than the run. Weights are saved with its input bias folded into the encoder's.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # type: ignore[import-not-found]
from dictionary_learning.trainers.top_k import TopKTrainer  # type: ignore[import-not-found]
from dictionary_learning.training import trainSAE  # type: ignore[import-not-found]
from safetensors.torch import save_file

TRAINERS = {"topk": TopKTrainer, "batch_topk": BatchTopKTrainer}


class Rows:
    """Batches of a file's rows in their order, from the first whenever it is iterated; always fresh copies.

    trainSAE goes over them once for its norm and again to train, and divides each batch in place.
    """

    def __init__(self, path: str, batch_rows: int) -> None:
        self._rows, self._batch_rows = np.load(path, mmap_mode="r"), batch_rows

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self._rows), self._batch_rows):
            yield torch.from_numpy(np.array(self._rows[start : start + self._batch_rows], np.float32))


def configuration(recipe: dict[str, Any], width: int, d_sae: int, steps: int) -> dict[str, Any]:
    """Return trainSAE's description of one autoencoder."""
    return {
        "trainer": TRAINERS[recipe["kind"]],
        "steps": steps,
        "activation_dim": width,
        "dict_size": d_sae,
        "k": recipe["k"],
        "lr": recipe["lr"],
        "seed": recipe["seed"],
        "warmup_steps": min(1000, steps // 20),
        "decay_start": steps - steps // 5,
        "threshold_start_step": steps // 2,
        "threshold_beta": 0.99,  # its 0.999 looks back further than the run is long
        "layer": 0,
        "lm_name": "none",
        "device": "cpu",
    }


def folded(saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return raw rows' weights, feature-major, from a state dict of AutoEncoderTopK or BatchTopKSAE."""
    W_enc, b_dec = saved["encoder.weight"].double(), saved["b_dec"].double()
    return {
        "W_enc": saved["encoder.weight"].contiguous(),
        "b_enc": (saved["encoder.bias"].double() - W_enc @ b_dec).float(),
        "W_dec": saved["decoder.weight"].T.contiguous(),
        "b_dec_out": saved["b_dec"].contiguous(),
        "threshold": saved["threshold"].reshape(1).float(),
        "k": saved["k"].reshape(1).long(),
    }


def main(arguments: dict[str, Any]) -> None:
    torch.set_num_threads(arguments["threads"])
    rows = Rows(arguments["rows"], arguments["batch_rows"])
    first = next(iter(rows))
    configurations = [
        configuration(recipe, first.shape[1], arguments["d_sae"], arguments["steps"]) for recipe in arguments["recipes"]
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainSAE(rows, configurations, arguments["steps"], save_dir=folder, normalize_activations=True, device="cpu")
        for index, recipe in enumerate(arguments["recipes"]):
            saved = torch.load(Path(folder) / f"trainer_{index}" / "ae.pt", weights_only=True)
            save_file(folded(saved), recipe["path"])
    print(json.dumps({"steps": arguments["steps"]}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
