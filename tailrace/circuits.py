"""Circuits by hand: what `pipeline circuit` is made of, to ask one prompt what no setting of it asks.

Record a run of the model, choose what is to be explained, and have its terms, paths or graph:

    model = tailrace.open_model(paths)
    tokens = torch.tensor(circuits.prompt_tokens(model, "The capital of France is"))
    weights, transcoders = circuits.read_weights(model), tailrace.load_transcoders(paths)
    run = circuits.record_run(model.bridge, weights, transcoders, tokens)
    root = circuits.feature_root(run, 12, 2456, token=4)
    circuits.search_paths(run, root, circuits.SearchSettings())

``docs/guides/circuits.md`` has the formulas, ``docs/notebooks/one_circuit.ipynb`` a circuit from question to test.
"""

from tailrace.analysis.circuits.attribution_graph import GraphSettings, build_graph
from tailrace.analysis.circuits.contributions import contributions
from tailrace.analysis.circuits.filters import NodeFilter
from tailrace.analysis.circuits.influence import influences, shares
from tailrace.analysis.circuits.nodes import Kind
from tailrace.analysis.circuits.path_graph import graph_of_paths, summed_over_tokens
from tailrace.analysis.circuits.paths import SearchSettings, search_paths, select_paths, show_paths, top_ends
from tailrace.analysis.circuits.record import mlp_layer, record_run
from tailrace.analysis.circuits.roots import feature_root, logit_root
from tailrace.analysis.weights.unembedding import logit_effects
from tailrace.pipeline.circuit.question import prompt_tokens
from tailrace.pipeline.model.weights import read_weights

__all__ = [
    "GraphSettings",
    "Kind",
    "NodeFilter",
    "SearchSettings",
    "build_graph",
    "contributions",
    "feature_root",
    "graph_of_paths",
    "influences",
    "logit_effects",
    "logit_root",
    "mlp_layer",
    "prompt_tokens",
    "read_weights",
    "record_run",
    "search_paths",
    "select_paths",
    "shares",
    "show_paths",
    "summed_over_tokens",
    "top_ends",
]
