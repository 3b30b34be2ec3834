"""Features as directions of the residual stream: every place a site may read or write is the gradient it should be."""

from __future__ import annotations

import pytest
import torch

from tailrace.analysis.weights.heads import HeadReader, through_head
from tailrace.analysis.weights.stream import layers_attending_before, read_point, write_point
from tests.support.made_up_weights import D_HEAD, D_MODEL, N_HEADS, gradient, made_up_weights, normalised
from tests.support.made_up_weights import through_head as head_forwards

KINDS = ("layer", "rms")
ROWS = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(1))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_at_the_mlps_input_reads_the_stream_through_the_norms_gain(kind) -> None:
    weights = made_up_weights(kind)
    point = read_point("blocks.1.mlp.hook_in", weights)
    assert point is not None
    for row, found in zip(ROWS.double(), point.carry(ROWS), strict=True):
        close(found, gradient(lambda x, row=row: row @ normalised(weights.layers[1].norm_mlp, x)))


def test_an_encoder_at_the_normalised_hook_reads_before_the_gain() -> None:
    weights = made_up_weights("layer")
    point = read_point("blocks.1.ln2.hook_normalized", weights)
    assert point is not None
    close(point.carry(ROWS), (ROWS - ROWS.mean(-1, keepdim=True)).double())
    of_rms = read_point("blocks.1.ln2.hook_normalized", made_up_weights("rms"))
    assert of_rms is not None
    close(of_rms.carry(ROWS), ROWS.double())


@pytest.mark.parametrize("hook", ["hook_resid_pre", "hook_resid_mid", "hook_resid_post"])
def test_an_autoencoder_of_the_stream_reads_and_writes_it_as_it_is(hook) -> None:
    weights = made_up_weights()
    reads, writes = read_point(f"blocks.1.{hook}", weights), write_point(f"blocks.1.{hook}", weights)
    assert reads is not None
    assert writes is not None
    assert reads.carry(ROWS) is writes.carry(ROWS) is ROWS
    assert reads.time == writes.time


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_behind_a_further_norm_writes_what_the_norm_lets_through(kind) -> None:
    weights = made_up_weights(kind)
    before, after = (write_point(f"blocks.2.{hook}", weights) for hook in ("mlp.hook_out", "hook_mlp_out"))
    assert before is not None
    assert after is not None
    close(before.carry(ROWS), normalised(weights.layers[2].norm_mlp_out, ROWS.double()))
    assert after.carry(ROWS) is ROWS


def test_decoders_of_heads_write_through_the_output_matrix() -> None:
    weights = made_up_weights()
    layer = weights.layers[1]
    values = torch.randn(5, N_HEADS, D_HEAD, generator=torch.Generator().manual_seed(2))
    together, alone = (write_point(f"blocks.1.attn.{hook}", weights) for hook in ("hook_z", "hook_z[2]"))
    assert together is not None
    assert alone is not None
    mixed = torch.einsum("nhe,hed->nd", values.double(), layer.attention.W_O.double())
    close(together.carry(values.flatten(1)), normalised(layer.norm_attention_out, mixed))
    of_head = values[:, 2].double() @ layer.attention.W_O[2].double()
    close(alone.carry(values[:, 2]), normalised(layer.norm_attention_out, of_head))


@pytest.mark.parametrize(
    "hook", ["blocks.1.attn.hook_z", "blocks.1.mlp.hook_out", "blocks.9.mlp.hook_in", "hook_embed"]
)
def test_what_is_not_read_off_the_stream_has_no_place_in_it(hook) -> None:
    assert read_point(hook, made_up_weights()) is None


@pytest.mark.parametrize("hook", ["blocks.1.mlp.hook_post", "blocks.1.attn.hook_q", "blocks.1.mlp.hook_in"])
def test_what_is_not_added_to_the_stream_writes_nowhere(hook) -> None:
    assert write_point(hook, made_up_weights()) is None


def test_a_feature_is_fed_by_heads_up_to_its_own_layer_and_in_parallel_blocks_by_earlier_ones() -> None:
    for parallel, expected in ((False, range(2)), (True, range(1))):
        weights = made_up_weights(parallel=parallel)
        point = read_point("blocks.1.mlp.hook_in", weights)
        assert point is not None
        assert layers_attending_before(point.time, weights) == expected


def test_an_mlp_writes_after_it_reads_and_before_the_next_block_reads() -> None:
    for parallel in (False, True):
        weights = made_up_weights(parallel=parallel)
        own, following = (read_point(f"blocks.{layer}.mlp.hook_in", weights) for layer in (1, 2))
        writes = write_point("blocks.1.mlp.hook_out", weights)
        assert own is not None
        assert following is not None
        assert writes is not None
        assert own.time < writes.time <= following.time


@pytest.mark.parametrize("kind", KINDS)
def test_directions_through_a_head_are_gradients_of_the_head(kind) -> None:
    layer = made_up_weights(kind).layers[1]
    for head in range(N_HEADS):
        found = through_head(layer, head, ROWS)
        for row, direction in zip(ROWS.double(), found, strict=True):
            close(direction, gradient(lambda x, row=row, head=head: row @ head_forwards(layer, head, x)))


@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_heads_are_those_of_their_whole_matrices(kind) -> None:
    weights = made_up_weights(kind)
    reader = HeadReader.prepare(range(3), weights)
    assert reader.names().tolist() == [[layer, head] for layer in range(3) for head in range(N_HEADS)]
    expected = torch.stack(
        [through_head(weights.layers[layer], head, ROWS).norm(dim=1) for layer, head in reader.names().tolist()], dim=1
    )
    close(reader.norms(ROWS), expected.double())
    strongest = reader.strongest(ROWS, 5)
    order = expected.argsort(dim=1, descending=True)[:, :5]
    assert strongest.indices.tolist() == order.tolist()
    for place in (0, 4):
        sources = reader.sources(ROWS, strongest.indices[:, place])
        close(sources.norm(dim=1), torch.from_numpy(strongest.values[:, place]).double())
