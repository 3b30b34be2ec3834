"""What loss terms for dead features share: who is dead, what the living leave unexplained, and their settings class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tailrace.training.architectures.base import Block, Trace, Transcoder, exact
from tailrace.training.dead_features.record import FiringRecord
from tailrace.training.rows.batches import Batch

BLOCK_BYTES = 1 << 27
"""What the pre-activations of dead features, (rows, n_dead), may take at a time: 128 MB. Up to three such tensors exist
at once."""


class DeadFeatureTerm(ABC):
    """A term computed from the dead features alone; there is none in a step in which no feature is dead."""

    name: str
    """Under which the term is logged."""

    def __init__(self, firing: FiringRecord, dead_after_steps: int) -> None:
        self._firing, self._dead_after_steps = firing, dead_after_steps

    def __call__(self, transcoder: Transcoder, batch: Batch, trace: Trace) -> dict[str, Tensor]:
        """Return the weighted term by its name, or nothing."""
        dead = self._firing.dead(self._dead_after_steps).nonzero().squeeze(1)
        if not len(dead):
            return {}
        # target − output: what dead features could add. (The original code took the *input* less the output.)
        residual = (batch.outputs - exact(trace.outputs, batch.outputs)).detach()
        return {self.name: self.term(self.write(transcoder, dead, batch.inputs), residual, batch, trace)}

    @abstractmethod
    def write(self, transcoder: Transcoder, dead: Tensor, inputs: Tensor) -> Tensor:
        """Return what the dead features (n_dead,), by index, write for ``inputs``: (rows, d_out)."""

    @abstractmethod
    def term(self, written: Tensor, residual: Tensor, batch: Batch, trace: Trace) -> Tensor:
        """Return the weighted scalar; ``written`` and ``residual`` are (rows, d_out), the latter without gradient."""


class DeadWeights(NamedTuple):
    """What dead features read, selected once for all rows: the gradient of a selection is as large as the whole."""

    encoder: Tensor
    """(n_dead, d_in)."""
    bias: Tensor
    """(n_dead,)."""

    @classmethod
    def of(cls, transcoder: Transcoder, dead: Tensor) -> DeadWeights:
        """Return those of features (n_dead,), by index; their pre-activations are encoder x + bias."""
        encoder, bias = transcoder.W_enc.index_select(0, dead), transcoder.b_enc.index_select(0, dead)
        taken_off = transcoder.input_bias
        return cls(encoder, bias if taken_off is None else bias - encoder @ taken_off)

    def blocks(self, inputs: Tensor) -> Iterator[Tensor]:
        """Yield ``inputs`` (rows, d_in) in blocks, at least one, whose pre-activations take ``BLOCK_BYTES`` at most."""
        n_rows = max(1, BLOCK_BYTES // (len(self.bias) * inputs.element_size()))
        for start in range(0, max(1, len(inputs)), n_rows):
            yield inputs[start : start + n_rows]


def write_in_blocks(
    write: Callable[[Tensor, Tensor], Tensor], transcoder: Transcoder, dead: Tensor, inputs: Tensor
) -> Tensor:
    """Return the sum of ``write(pre, decoder)``, (rows, d_out), over the blocks of a transcoder.

    ``pre`` are the pre-activations (rows, n_dead) of a block's dead features, ``decoder`` their rows; ``write`` treats
    each row by itself. Where pre-activations take more than ``BLOCK_BYTES``, those of some rows exist at a time, and
    are computed once more for their gradient: a sixth matrix product beside five.
    """
    blocks = transcoder.blocks()
    if len(blocks) == 1:
        return _write_block(write, transcoder, blocks[0], dead, inputs)
    outputs = inputs.new_zeros(len(inputs), transcoder.d_out)
    for block in blocks:
        if len(own := dead[block.own(dead)]):
            written = _write_block(write, transcoder, block, own, inputs[:, block.inputs])
            outputs = outputs + F.pad(written, (block.outputs.start, 0))
    return outputs


def _write_block(
    write: Callable[[Tensor, Tensor], Tensor], transcoder: Transcoder, block: Block, dead: Tensor, inputs: Tensor
) -> Tensor:
    read, decoder = DeadWeights.of(transcoder, dead), block.W_dec.index_select(0, dead - block.features.start)

    def write_rows(rows: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor) -> Tensor:
        return write(F.linear(rows, encoder, bias), decoder)

    parts = list(read.blocks(inputs))
    if len(parts) == 1:
        return write_rows(inputs, *read, decoder)
    # nothing is drawn at random, so there is no state of a generator to bring back
    written: list[Tensor] = [
        checkpoint(write_rows, rows, *read, decoder, use_reentrant=False, preserve_rng_state=False) for rows in parts
    ]
    return torch.cat(written)


def row_norms(values: Tensor) -> Tensor:
    """Return the norm of each row, (rows, 1)."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return norms
