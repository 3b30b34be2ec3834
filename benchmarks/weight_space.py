"""Claim: features' tables by weights cost little more than their matrix products, and norms of heads far less.

Random weights in the shape of GPT-2. What a feature does to the logits (both ends and a histogram of 50,257 products)
is measured beside the products alone; norms ‖OV[l, h] w‖ of all heads beside the original transcoder code's
formulation, which makes every matrix OV = W_V W_O of the model and multiplies features by it. Both are done for all
features at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Contender, Work, measure
from benchmarks.report import Report, parse_arguments
from tailrace.analysis.weights.extremes import products
from tailrace.analysis.weights.heads import HeadReader
from tailrace.analysis.weights.model_weights import AttentionWeights, LayerWeights, ModelWeights, Norm
from tailrace.analysis.weights.stream import write_point
from tailrace.analysis.weights.unembedding import token_effects

D_MODEL, D_HEAD, N_HEADS, N_LAYERS, D_VOCAB = 768, 64, 12, 12, 50_257


def made_up_weights() -> ModelWeights:
    """Return random weights of GPT-2's shape; gains are not one, so none is left out."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) / D_MODEL**0.5

    def norm() -> Norm:
        return Norm("layer", 1 + random(D_MODEL), random(D_MODEL), 1e-5)

    def layer() -> LayerWeights:
        attention = AttentionWeights(random(N_HEADS, D_MODEL, D_HEAD), random(N_HEADS, D_HEAD, D_MODEL))
        return LayerWeights(attention, norm(), norm())

    layers = tuple(layer() for _ in range(N_LAYERS))
    return ModelWeights(random(D_VOCAB, D_MODEL), random(D_MODEL, D_VOCAB), norm(), layers)


def whole_matrices(weights: ModelWeights, rows: Tensor) -> Tensor:
    """Return (n, heads) ‖OV[l, h] w‖ by way of every matrix OV, with gains and centring folded into W_V before."""
    columns = []
    for layer in weights.layers:
        gain = layer.norm_attention.weight
        assert gain is not None
        for W_V, W_O in zip(layer.attention.W_V, layer.attention.W_O, strict=True):
            read = gain[:, None] * W_V
            columns.append(torch.linalg.vector_norm((read - read.mean(0)) @ W_O @ rows.T, dim=0))
    return torch.stack(columns, dim=1)


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    torch.set_num_threads(1)
    n_features = 256 if arguments.quick else 4096
    weights = made_up_weights()
    rows = torch.randn(n_features, D_MODEL, generator=torch.Generator().manual_seed(1))
    writes = write_point("blocks.8.mlp.hook_out", weights)
    assert writes is not None
    token_effects(rows[:8], writes, weights)  # compiles

    def effects() -> Work:
        token_effects(rows, writes, weights)
        return Work(n_features)

    def alone() -> Work:
        for _ in products(rows, weights.W_U):
            pass
        return Work(n_features)

    def factors() -> Work:
        HeadReader.prepare(range(N_LAYERS), weights).norms(rows)
        return Work(n_features)

    def matrices() -> Work:
        whole_matrices(weights, rows)
        return Work(n_features)

    contenders = [
        Contender("effects on logits, ends and histogram", effects),
        Contender("their products alone", alone),
        Contender("norms of heads by factors", factors),
        Contender("norms of heads by whole matrices", matrices),
    ]
    rates = measure(contenders, 2 if arguments.quick else 7)
    names = [contender.name for contender in contenders]
    report = Report(
        "weight_space",
        "Features by weights alone",
        f"{n_features:,} features on random weights of GPT-2's shape, float32, one thread. Norms of heads include "
        "factoring, or multiplying, the matrices of the model.",
        ("what", "features per second", "ratio", "range"),
        ("torch", "numpy", "numba"),
        targets={"effects_vs_products": "≥ 0.6", "norms_vs_whole_matrices": "≥ 5"},
    )
    report.add_rates(rates, names[:2], names[1], 1.0)
    report.add_rates(rates, names[2:], names[3], 1.0)
    report.ratios["effects_vs_products"] = rates.ratio(names[0], names[1])
    report.ratios["norms_vs_whole_matrices"] = rates.ratio(names[2], names[3])
    expected, found = whole_matrices(weights, rows[:64]), HeadReader.prepare(range(N_LAYERS), weights).norms(rows[:64])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    report.finish(arguments)


if __name__ == "__main__":
    main()
