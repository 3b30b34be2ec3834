"""circuit-tracer's own classes read the document for its viewer, and would have written the same nodes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.peers import environment
from tailrace.pipeline.circuit import stage as circuit
from tailrace.pipeline.circuit.question import Question
from tests.support.circuit_places import PROMPT, SMALL, Place
from tests.support.interop import ENVIRONMENTS

pytestmark = pytest.mark.interop

READ = """
import json, sys
from circuit_tracer.frontend.graph_models import Model, Node
model = Model.model_validate(json.load(open(sys.argv[1])))
n_layers = 3
for node in model.nodes:
    layer, number, token = node.node_id.split("_")
    token = int(token)
    if node.feature_type == "cross layer transcoder":
        theirs = Node.feature_node(int(layer), token, int(number), node.influence, node.activation)
    elif node.feature_type == "embedding":
        theirs = Node.token_node(token, int(number), node.influence)
        node.clerp = ""
    elif node.feature_type == "logit":
        text = node.clerp.partition('"')[2].rpartition('"')[0]
        theirs = Node.logit_node(token, int(number), text, n_layers, node.is_target_logit, node.token_prob)
        if not node.clerp.startswith("Output"):
            theirs.clerp = node.clerp
    else:
        theirs = Node.error_node(int(layer), token, node.influence)
        theirs.node_id, theirs.jsNodeId = node.node_id, node.jsNodeId  # theirs is also the name of a feature
    assert theirs == node, (theirs, node)
print(len(model.nodes), len(model.links))
"""


def test_the_package_reads_every_node_as_its_own(tmp_path: Path) -> None:
    place = Place(tmp_path)
    asked = Question(PROMPT, logit="her")
    out = circuit.run(
        SMALL, asked, transcoders=place.transcoders, output=tmp_path / "c", model=str(place.model_path)
    ).path
    python = environment("circuit_tracer", ENVIRONMENTS["circuit_tracer"].requirements)
    done = subprocess.run(
        [str(python), "-c", READ, str(out / "viewer.json")],
        capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    document = json.loads((out / "viewer.json").read_text())
    assert done.stdout.split() == [str(len(document["nodes"])), str(len(document["links"]))]
