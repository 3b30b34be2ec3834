"""A split and a transcoder small enough to check by brute force, for the analysis tests.

Numbers are multiples of a quarter and small, so float32 sums of them are exact in any order: the expected values do
not depend on how rows are cut into blocks, and equal activations are common, which is what tests ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import Generator, Philox
from torch import Tensor

from tailrace.analysis.harvest.one_pass import Subject

CONTEXT_LENGTH = 8
SITE = "layer0"


def random(seed: int) -> Generator:
    return Generator(Philox(seed))


Array = np.ndarray[Any, Any]


class FakeSplit:
    """Rows held in memory. Position 0 of every context is left out, as BOS is; so is each position in ``missing``."""

    def __init__(
        self,
        n_contexts: int = 12,
        *,
        unit_rows: int = 17,
        d_in: int = 4,
        d_out: int = 3,
        missing: Sequence[tuple[int, int]] = (),
        exact: bool = True,
        seed: int = 0,
    ) -> None:
        rng = random(seed)
        self.tokens = rng.integers(0, 20, (n_contexts, CONTEXT_LENGTH), dtype=np.int32)
        self.documents = np.arange(n_contexts * CONTEXT_LENGTH, dtype=np.uint32).reshape(n_contexts, -1) // 13
        kept = [
            (context, position)
            for context in range(n_contexts)
            for position in range(1, CONTEXT_LENGTH)
            if (context, position) not in missing
        ]
        self.context = np.array([context for context, _ in kept], np.uint32)
        self.position = np.array([position for _, position in kept], np.uint16)
        self.n_rows = len(kept)
        self._unit_rows = unit_rows
        self.n_units = -(-self.n_rows // unit_rows)
        self.inputs: Array
        self.outputs: Array
        if exact:
            self.inputs = rng.integers(-4, 5, (self.n_rows, d_in)).astype(np.float32) / 4
            self.outputs = rng.integers(-4, 5, (self.n_rows, d_out)).astype(np.float32) / 4 + 2
        else:
            self.inputs = rng.standard_normal((self.n_rows, d_in), dtype=np.float32)
            self.outputs = rng.standard_normal((self.n_rows, d_out), dtype=np.float32) + 100

    def first_row(self, unit: int) -> int:
        return unit * self._unit_rows

    def read_unit(self, unit: int, keys: Sequence[str]) -> dict[str, Array]:
        arrays: dict[str, Array] = {
            f"{SITE}/in": self.inputs,
            f"{SITE}/out": self.outputs,
            "context": self.context,
            "position": self.position,
        }
        start = self.first_row(unit)
        return {key: arrays[key][start : start + self._unit_rows] for key in keys}

    def dtype(self, key: str) -> str:
        return "bfloat16" if self.inputs.dtype == np.uint16 else "float32"

    def context_tokens(self, context_ids: Array) -> Array:
        return np.asarray(self.tokens[context_ids])

    def context_documents(self, context_ids: Array) -> Array:
        return np.asarray(self.documents[context_ids])


class FakeCoder:
    """ReLU of an affine map and back."""

    def __init__(self, d_in: int = 4, d_out: int = 3, d_sae: int = 6, *, exact: bool = True, seed: int = 1) -> None:
        rng = random(seed)
        if exact:
            encoder, decoder = (rng.integers(-2, 3, (d_sae, width)).astype(np.float32) for width in (d_in, d_out))
        else:
            encoder, decoder = (rng.standard_normal((d_sae, width), dtype=np.float32) for width in (d_in, d_out))
        self.d_in, self.d_out, self.d_sae = d_in, d_out, d_sae
        self.W_enc, self.W_dec = torch.from_numpy(encoder), torch.from_numpy(decoder)
        self.b_enc = torch.full((d_sae,), -0.25)
        self.b_enc[-1] = -1e4  # the last feature is dead

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W_enc.T + self.b_enc)

    def decode(self, acts: Tensor, inputs: Tensor) -> Tensor:
        return acts @ self.W_dec


def subject(split: FakeSplit | None = None, coder: FakeCoder | None = None) -> Subject:
    split = split or FakeSplit()
    return Subject(
        coder=coder or FakeCoder(),
        split=split,
        split_name="heldout",
        site=SITE,
        output_mean=split.outputs.mean(axis=0, dtype=np.float64),
        vocabulary=[f"t{token}" for token in range(20)],
    )


def activations(subject: Subject) -> Array:
    """(rows, d_sae), all at once."""
    return subject.coder.encode(torch.from_numpy(split_of(subject).inputs)).numpy()


def split_of(subject: Subject) -> FakeSplit:
    assert isinstance(subject.split, FakeSplit)
    return subject.split
