"""What analyze.py shows every contender: planted rows as a split in memory, and a TopK transcoder of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.planted_rows import Planted, Problem, plant
from tailrace.analysis.harvest.one_pass import Subject
from tailrace.storage.bfloat16 import float32_to_bits
from tailrace.training.architectures import TopK
from tailrace.training.architectures.base import Transcoder

CONTEXT_LENGTH = 128
VOCABULARY_SIZE = 50_000
UNIT_ROWS = 65_536
SITE = "layer8"


class PlantedSplit:
    """Planted rows as bfloat16, in contexts of 128 tokens; after the last row the first comes again."""

    def __init__(self, planted: Planted, n_rows: int, unit_rows: int = UNIT_ROWS) -> None:
        self.n_rows, self._unit_rows = n_rows, unit_rows
        self.n_units = -(-n_rows // unit_rows)
        self._sides = {
            f"{SITE}/{side}": float32_to_bits(rows.reshape(-1, rows.shape[-1]).numpy())
            for side, rows in (("in", planted.inputs), ("out", planted.outputs))
        }

    def first_row(self, unit: int) -> int:
        """Return the index of a unit's first row."""
        return unit * self._unit_rows

    def read_unit(self, unit: int, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Return a unit's rows, copied as reading them would."""
        row = np.arange(self.first_row(unit), min(self.first_row(unit + 1), self.n_rows))
        places = {
            "context": (row // CONTEXT_LENGTH).astype(np.uint32),
            "position": (row % CONTEXT_LENGTH).astype(np.uint16),
        }
        return {key: places[key] if key in places else self._sides[key][row % len(self._sides[key])] for key in keys}

    def dtype(self, key: str) -> str:  # noqa: ARG002
        """Return the stored dtype of activations."""
        return "bfloat16"

    def context_tokens(self, contexts: np.ndarray) -> np.ndarray:
        """Return token ids (contexts, positions), as uneven as text has them."""
        place = np.asarray(contexts, np.uint64)[:, None] * np.uint64(CONTEXT_LENGTH) + np.arange(
            CONTEXT_LENGTH, dtype=np.uint64
        )
        uniform = (place * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)).astype(np.float64) / 2**24
        return (VOCABULARY_SIZE**uniform).astype(np.int32) - 1

    def context_documents(self, contexts: np.ndarray) -> np.ndarray:
        """Return document ids (contexts, positions): eight contexts each."""
        return np.repeat(np.asarray(contexts, np.uint32)[:, None] // 8, CONTEXT_LENGTH, axis=1)


def planted_transcoder(planted: Planted, k: int) -> Transcoder:
    """Return a TopK transcoder whose weights are the planted ones."""
    d_sae, width = planted.encoder.shape
    transcoder = TopK(k=k).build(width, width, d_sae)
    with torch.no_grad():
        transcoder.W_enc.copy_(planted.encoder)
        transcoder.W_dec.copy_(planted.decoder)
    return transcoder.eval().requires_grad_(False)


def planted_subject(problem: Problem, n_rows: int, planted: Planted | None = None, **more: Any) -> Subject:
    """Return what is analysed: ``n_rows`` planted rows and the transcoder of their own weights."""
    planted = planted or plant(problem)
    split = PlantedSplit(planted, n_rows)
    return Subject(
        coder=planted_transcoder(planted, problem.l0),
        split=split,
        split_name="planted",
        site=SITE,
        output_mean=planted.outputs.reshape(-1, problem.width).mean(0).double().numpy(),
        vocabulary=[f" token{token}" for token in range(VOCABULARY_SIZE)],
        **more,
    )
