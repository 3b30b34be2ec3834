"""Attribution graphs in the JSON that circuit-tracer's and Neuronpedia's viewers read (circuit-tracer 0.4).

They know features, errors, token embeddings and logits. A learned position is part of its token there, an MLP without
transcoder an error, and a root that is a feature is shown as a logit. Nodes that become the same node there are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tailrace.analysis.circuits.attribution_graph import AttributionGraph
from tailrace.analysis.circuits.influence import Pruned
from tailrace.analysis.circuits.nodes import Kind, Node

JSON = dict[str, Any]


def viewer_document(
    graph: AttributionGraph,
    pruned: Pruned,
    *,
    slug: str,
    scan: str,
    prompt: str,
    tokens: Sequence[tuple[int, str]],
    names: Sequence[str],
    n_layers: int,
    node_threshold: float,
    labels: Mapping[tuple[int, int], str] | None = None,
) -> JSON:
    """Return a graph as the viewers' document.

    ``tokens`` are the prompt's ids and texts, ``names`` the targets' texts for people, ``scan`` the name under which
    the viewer finds features' examples, ``labels`` what people call features, by layer and index.
    """
    order = torch.argsort(pruned.influence, descending=True)
    cumulative = torch.empty_like(pruned.influence)
    total = pruned.influence.sum()
    cumulative[order] = pruned.influence[order].cumsum(0) / torch.where(total > 0, total, torch.ones_like(total))
    nodes: dict[str, JSON] = {}
    ids: dict[int, str] = {}
    for index in torch.nonzero(pruned.nodes).flatten().tolist():
        is_target = index < graph.n_targets
        described = _node(graph.nodes[index], tokens, n_layers, target=names[index] if is_target else None)
        described["influence"] = None if is_target else float(cumulative[index])
        if is_target:
            described["token_prob"] = float(graph.weights[index])
            described["is_target_logit"] = index == 0
        if graph.nodes[index].kind is Kind.FEATURE:
            described["activation"] = float(graph.values[index])
            described["clerp"] = (labels or {}).get((graph.nodes[index].layer or 0, graph.nodes[index].index or 0), "")
        ids[index] = str(described["node_id"])
        nodes.setdefault(ids[index], described)
    links: dict[tuple[str, str], float] = {}
    for target, source in zip(*np.nonzero(pruned.edges.numpy()), strict=True):
        ends = (ids[int(source)], ids[int(target)])
        links[ends] = links.get(ends, 0.0) + float(graph.adjacency[target, source])
    return {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "transcoder_list": [],
            "prompt_tokens": [text for _, text in tokens],
            "prompt": prompt,
            "node_threshold": node_threshold,
            "schema_version": 1,
        },
        "qParams": {"linkType": "both", "pinnedIds": [], "clickedId": "", "supernodes": [], "sg_pos": ""},
        "nodes": list(nodes.values()),
        "links": [{"source": source, "target": target, "weight": weight} for (source, target), weight in links.items()],
    }


def _node(node: Node, tokens: Sequence[tuple[int, str]], n_layers: int, target: str | None) -> JSON:
    token = node.token or 0
    layer, index = node.layer or 0, node.index or 0
    described: JSON = {
        "ctx_idx": token,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "token_prob": 0.0,
        "is_target_logit": False,
        "influence": None,
        "activation": None,
    }
    if target is not None:
        last = n_layers + 1
        number = index if node.kind is Kind.LOGIT else _paired(layer, index)
        identity = {"node_id": f"{last}_{number}_{token}", "feature": number, "layer": str(last)}
        return {**described, **identity, "feature_type": "logit", "clerp": target, "jsNodeId": f"L_{number}-{token}"}
    if node.kind is Kind.FEATURE:
        identity = {"node_id": f"{layer}_{index}_{token}", "feature": _paired(layer, index), "layer": str(layer)}
        kind = "cross layer transcoder"
        return {**described, **identity, "feature_type": kind, "clerp": "", "jsNodeId": f"{layer}_{index}-0"}
    if node.kind in (Kind.EMBEDDING, Kind.POSITION):
        token_id, text = tokens[token]
        identity = {"node_id": f"E_{token_id}_{token}", "feature": token, "layer": "E", "clerp": f'Emb: "{text}"'}
        return {**described, **identity, "feature_type": "embedding", "jsNodeId": f"E_{token_id}-{token}"}
    # circuit-tracer's own 0_LAYER_TOKEN is also the name of feature LAYER of layer 0; -1 is no feature's number.
    identity = {"node_id": f"{layer}_-1_{token}", "feature": -1, "layer": str(layer), "clerp": ""}
    return {**described, **identity, "feature_type": "mlp reconstruction error", "jsNodeId": f"{layer}_-1-{token}"}


def _paired(layer: int, index: int) -> int:
    """Return the number that the viewers give a layer's feature: Cantor's pairing of both."""
    return (layer + index) * (layer + index + 1) // 2 + index
