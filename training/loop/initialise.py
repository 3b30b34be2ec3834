"""The weights a run begins with, in normalised units.

Decoder rows are random directions of unit norm, or the directions of centred outputs of random rows. The encoder begins
as the decoder's rows times ``encoder_scale`` where inputs and outputs have one width, so that an autoencoder's feature
starts out reading what it writes; for other widths it is its own set of random directions. Biases that stand for
centres begin as the means or geometric medians of the cache, or as zero. A slice of the features begins as the same
features of all would: all random numbers are drawn, and only its own kept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tailrace.storage.shuffle import philox
from tailrace.training.architectures.base import Transcoder
from tailrace.training.choices import EncoderInit
from tailrace.training.cross_layer.stack import Stack
from tailrace.training.rows.batches import Batch
from tailrace.training.rows.geometric_median import geometric_median

logger = logging.getLogger(__name__)

_DRAWN = 1 << 24
"""Random numbers drawn at a time: 64 MB, of which the own features' are kept."""
_NO_DIRECTION = 1e-6
"""Share of the rows' root mean square norm below which a row points nowhere."""


class FeatureSlice(NamedTuple):
    """Features ``first`` to ``first`` + ``n`` of ``d_sae``, where several processes share them."""

    first: int
    n: int
    d_sae: int


class Centres(NamedTuple):
    """A point among the normalised inputs, (d_in,), and one among the outputs, (d_out,)."""

    inputs: Tensor
    outputs: Tensor


def medians(rows: Batch) -> Centres:
    """Return the geometric medians of normalised rows."""
    return Centres(_median("inputs", rows.inputs), _median("outputs", rows.outputs))


def _median(side: str, rows: Tensor) -> Tensor:
    result = geometric_median(rows)
    logger.info(
        "geometric median of %s %s: mean distance %.6g, %.6g to the mean, after %d iterations%s",
        f"{len(rows):,}",
        side,
        result.objectives[-1],
        result.objectives[0],
        result.n_iterations,
        "" if result.converged else ", which were not enough to converge",
    )
    return result.median


def random_directions(seed: int, purpose: str, own: FeatureSlice, width: int) -> Tensor:
    """Return (own.n, width) float32 rows of unit norm, uniform on the sphere, decided by (seed, purpose)."""
    rows = _rows_drawn(
        own, width, partial(np.random.Generator(philox(seed, purpose)).standard_normal, dtype=np.float32)
    )
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.from_numpy(rows)


def _rows_drawn(own: FeatureSlice, width: int, draw: Callable[..., Any]) -> np.ndarray:
    """Return the own rows of the (d_sae, width) numbers that ``draw(shape)`` gives, in the order of rows."""
    rows = np.empty((own.n, width), np.float32)
    n_rows = max(1, _DRAWN // width)
    for start in range(0, own.first + own.n, n_rows):
        drawn = draw((min(n_rows, own.first + own.n - start), width))
        skipped = max(0, own.first - start)
        if skipped < len(drawn):
            rows[max(0, start - own.first) :][: len(drawn) - skipped] = drawn[skipped:]
    return rows


def data_directions(outputs: Tensor, mean: Tensor, own: FeatureSlice, seed: int) -> Tensor:
    """Return (own.n, d_out) float32 unit directions of ``outputs`` (rows, d_out) from their ``mean``, on the CPU.

    Random directions where there are too few rows, or rows at the mean itself.
    """
    d_sae = own.d_sae
    directions = random_directions(seed, "initialise/decoder", own, outputs.shape[1])
    centred = outputs[:d_sae].cpu().float() - mean.cpu().float()
    norms = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    usable = (norms > _NO_DIRECTION * norms.square().mean().sqrt()).squeeze(1)
    of_own = slice(own.first, own.first + own.n)
    kept = usable[of_own]
    directions[: len(kept)][kept] = centred[of_own][kept] / norms[of_own][kept]
    if (n := d_sae - int(usable.sum())) > 0:
        logger.warning("decoder_init: data: %s of %s features begin as random directions, for want of rows", n, d_sae)
    return directions


@torch.no_grad()
def initialise(
    transcoder: Transcoder,
    *,
    mean_in: Tensor,
    mean_out: Tensor,
    encoder_scale: float = 1.0,
    encoder_init: EncoderInit = "tied",
    decoder: Tensor | None = None,
    seed: int = 0,
    own: FeatureSlice | None = None,
) -> None:
    """Fill the weights of ``transcoder``; biases become ``mean_in`` and ``mean_out``, points in normalised units.

    ``decoder`` (d_sae, d_out) has unit rows; random ones by default. ``encoder_init``: ``tied`` to the decoder if the
    widths agree, ``independent`` random directions, or ``kaiming``, each weight uniform within √(6 / d_sae), as in the
    original transcoder code; the latter's scale is also multiplied by ``encoder_scale``. ``own`` says which of all
    features those of ``transcoder`` are; by default they are all.
    """
    d_sae, d_in = transcoder.W_enc.shape
    own = own or FeatureSlice(0, d_sae, d_sae)
    if decoder is None:
        decoder = random_directions(seed, "initialise/decoder", own, transcoder.d_out)
    if encoder_init == "kaiming":
        bound = math.sqrt(6 / own.d_sae)
        draw = partial(np.random.Generator(philox(seed, "initialise/encoder")).random, dtype=np.float32)
        uniform = _rows_drawn(own, d_in, draw)
        encoder = torch.from_numpy((2 * uniform - 1) * np.float32(bound))
    elif encoder_init == "tied" and d_in == transcoder.d_out:
        encoder = decoder
    else:
        encoder = random_directions(seed, "initialise/encoder", own, d_in)
    transcoder.W_dec.copy_(decoder)
    transcoder.W_enc.copy_(encoder * encoder_scale)
    transcoder.b_enc.zero_()
    transcoder.b_dec_out.copy_(mean_out)
    if transcoder.b_dec is not None:
        transcoder.b_dec.copy_(mean_in)
    transcoder.initialise_own()


@torch.no_grad()
def initialise_stack(
    stack: Stack, *, mean_out: Tensor, encoder_scale: float, seed: int, own: FeatureSlice | None = None
) -> None:
    """Fill the weights: at first every feature writes a random direction to its own layer and nothing to later ones.

    That is a transcoder for each layer, from which a feature learns to reach further where it pays. Encoder rows are
    the same directions, of length ``encoder_scale``, where widths agree. Biases are ``mean_out``, the mean outputs of
    all layers side by side. ``own`` says which of a layer's features those of ``stack`` are; by default they are all.
    """
    n_features, width_out = stack.features_per_layer, stack.width_out
    own = own or FeatureSlice(0, n_features, n_features)
    for layer in range(stack.n_layers):
        written = random_directions(seed, f"initialise/decoder/{layer}", own, width_out)
        stack.decoder(layer)[:, :width_out] = written
        reads = written
        if stack.width_in != width_out:
            reads = random_directions(seed, f"initialise/encoder/{layer}", own, stack.width_in)
        stack.W_enc[stack.of_layer(layer)] = reads * encoder_scale
    stack.b_dec_out.copy_(mean_out)
    stack.initialise_own()
