"""Every page that the project writes, small, with given texts in every token, name, prompt, label and note.

Each maker writes its page below a folder and returns it. No model runs: pages are made of what commands hand to them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from tailrace.analysis.circuits.documents import describe_node
from tailrace.analysis.circuits.nodes import Kind, Node
from tailrace.analysis.dashboards.values import visible_token
from tailrace.analysis.interventions.generation import NextTokenChange
from tailrace.pipeline.blind import draw
from tailrace.pipeline.blind.settings import DrawSettings
from tailrace.pipeline.circuit.page import render_page
from tailrace.pipeline.compare.page import page as compare_page
from tailrace.pipeline.compare.stage import SCHEMA
from tailrace.pipeline.curves.picture import write_picture
from tailrace.pipeline.dashboard import stage as dashboard
from tailrace.pipeline.dashboard.settings import DashboardSettings
from tailrace.pipeline.evaluate.pareto import Point, lines
from tailrace.pipeline.evaluate.pareto_plot import write_plot
from tailrace.pipeline.score.pictures import write_scores
from tailrace.pipeline.score.stage import ScoredText, Scores
from tailrace.pipeline.steer.page import write_result
from tailrace.pipeline.steer.stage import SteeredText, SteerResult
from tailrace.storage.labels import LabelEdit, edit_labels
from tailrace.training.loop.curves import read_all
from tests.support import dashboard_tables
from tests.support.run_logs import write_run
from tests.support.tables_by_hand import example_row, feature_row, publish_tables

PLAIN = (" of", " the", " people", " and", " war", "\n", " for", " ever", " in", " it")


def write_site(folder: Path, texts: Sequence[str]) -> Path:
    """Write a dashboard, with its tables beside it, labels and notes, and the names of a dataset and a model."""
    with patch.object(dashboard_tables, "WORDS", tuple(texts)):
        tables = dashboard_tables.make_tables(
            folder / "tables",
            max(8, len(texts)),
            model=texts[0],
            n_documents=40,
            kept=[f"kept {text}" for text in texts],
        ).path
    edit_labels(
        tables, [LabelEdit(index, "ann", text[:200], text, starred=True) for index, text in enumerate(texts) if index]
    )
    (folder / "cache").mkdir()
    (folder / "cache" / "manifest.json").write_text(json.dumps({"cache_id": "c0"}))
    (folder / "cache" / "request.json").write_text(json.dumps({"dataset": texts[-1]}))
    return dashboard.run(DashboardSettings(), tables=tables, output=folder / "site", quiet=True).page


def write_blind_items(folder: Path, texts: Sequence[str]) -> Path:
    """Write a list of pages that hide whose feature they are of."""
    with patch.object(dashboard_tables, "WORDS", tuple(texts)):
        tables = dashboard_tables.make_tables(folder / "tables", 8, model=texts[0]).path
    settings = DashboardSettings(blind=True, feature=(dashboard_tables.DENSE,))
    return dashboard.run(settings, tables=tables, output=folder / "blind", quiet=True).page


def write_blind_item(folder: Path, texts: Sequence[str]) -> Path:
    """Write such a page."""
    return write_blind_items(folder, texts).parent / "item-0001.html"


def write_rating_form(folder: Path, texts: Sequence[str]) -> Path:
    """Write the form that shows pages of two dictionaries and takes ratings."""
    shown = {"window_tokens": ["<bos>", *texts], "window_activations": [None, *(4.0 for _ in texts)]}
    pair = [
        publish_tables(folder / name, [feature_row(0)], [example_row(0, 0, largest, **shown)])
        for name, largest in (("one", 4.0), ("two", 3.0))
    ]
    return draw.run(DrawSettings(n=1), tables=pair, output=folder / "draw").path / draw.FORM


def write_circuit(folder: Path, texts: Sequence[str]) -> Path:
    """Write a circuit whose prompt is the texts, with a card for each of its features."""
    last = len(texts) - 1
    root = Node(Kind.LOGIT, 3, last, 7)
    nodes = [root, *(Node(Kind.FEATURE, 1, token, token) for token in range(len(texts))), Node(Kind.HEAD, 2, 0, 1)]
    described = [{**describe_node(node), "value": 1.0, "text": texts[0]} for node in nodes[:1]]
    described += [{**describe_node(node), "value": 1.0 / place} for place, node in enumerate(nodes) if place]
    document: dict[str, Any] = {
        "prompt": "".join(texts),
        "tokens": [{"text": text, "id": place} for place, text in enumerate(texts)],
        "likely": [{"text": text, "probability": 0.5} for text in texts],
        "root": {
            "node": describe_node(root), "value": 2.0, "is_active": True, "n_terms": 2, "incompleteness": 1e-7,
            "by_kind": {"feature": 1.5, "head": -0.5}, "from_bos": 0.1, "logits": [texts[0]],
        },
        "features": [
            {"layer": 1, "index": index, "fires_on": [{"token": index, "activation": 1.0}]}
            for index in range(len(texts))
        ],
        "rounds": [[{"steps": [{"node": one, "value": 1.0} for one in described[: 1 + len(texts) : len(texts)]]}]],
        "path_graph": {
            "root": 0, "nodes": described,
            "edges": [{"child": 0, "parent": place, "value": 1.0} for place in range(1, len(nodes))],
        },
        "attribution_graph": None,
    }  # fmt: skip
    cards = {
        (1, index): {
            "label": text[:200], "top_token": text, "facts": [("label", text), ("note", text)],
            "examples": [{"before": text, "token": text, "after": text}],
        }
        for index, text in enumerate(texts)
    }  # fmt: skip
    (folder / "circuit.html").write_text(render_page(document, cards))
    return folder / "circuit.html"


def write_score(folder: Path, texts: Sequence[str]) -> Path:
    """Write the scores of two texts by three features."""
    tokens = ["<s>", *texts]
    values = np.linspace(-4, 9, 3 * len(tokens), dtype=np.float32).reshape(len(tokens), 3)
    values[0] = np.nan
    text = ScoredText(tokens, [0] * len(tokens), ~np.isnan(values[:, 0]), values, [[] for _ in tokens])
    known = {"label": texts[-1], "frequency": 0.01, "max": 9.5, "top_token": texts[0], "promoted_tokens": list(texts)}
    scores = Scores(texts[0], texts[-1], "layer2", [89, 7, 1850], True, False, [text, text], about={89: known})
    write_scores(folder / "score.html", scores)
    return folder / "score.html"


def write_curves(folder: Path, texts: Sequence[str]) -> Path:
    """Write the curves of runs named as the texts, as far as a folder can be."""
    for text in texts:
        write_run(folder / "runs" / folder_name(text), n_lines=12, linear=0.4)
    write_picture(folder / "curves.html", read_all([folder / "runs"]))
    return folder / "curves.html"


def folder_name(text: str) -> str:
    """Return a text as a name of a folder."""
    return text.replace("/", "\u2215").strip()[:200] or "-"


def write_steer(folder: Path, texts: Sequence[str]) -> Path:
    """Write texts with and without a feature, which is named by them too."""
    prompts = tuple(texts)
    steered = [
        SteeredText(
            prompt, run, None if run == 0 else draw_, None, tuple(texts), tuple(range(len(texts))),
            NextTokenChange(1.0 * run, run, 4) if run else None,
        )
        for prompt in range(len(prompts))
        for run, draw_ in ((0, None), (1, None), (1, 0))
    ]  # fmt: skip
    about = {text: {"label": text, "top_token": text} for text in texts}
    write_result(folder / "steer.html", SteerResult(prompts, ("model", texts[0]), tuple(steered), about, None))
    return folder / "steer.html"


def write_pareto(folder: Path, texts: Sequence[str]) -> Path:
    """Write the plot of transcoders named as the texts, in lines named so too."""
    points = [
        Point(text, texts[at % 3], 8 * 2**level, 0.5 / (1 + level) + at / 100, None, 64, text, "", f"{at} {level}")
        for at, text in enumerate(texts)
        for level in range(2)
    ]
    write_plot(folder / "pareto.html", lines(points, "fvu"), "fvu")
    return folder / "pareto.html"


def write_compare(folder: Path, texts: Sequence[str]) -> Path:
    """Write the matches of two dictionaries whose features are labelled with the texts, in folders named so too."""
    n = len(texts)
    rows = [
        {
            "side": side, "feature": feature, "label": texts[feature], "cosine_feature": n - 1 - feature,
            "cosine": feature / n, "cosine_matched": feature > n // 2, "cosine_mutual": feature % 2 == 0,
            "phi_feature": feature if feature else None, "phi": -feature / n if feature else None,
            "jaccard": 0.5 if feature else None, "phi_matched": False if feature else None,
            "phi_mutual": True if feature else None,
        }
        for side in ("a", "b")
        for feature in range(n)
    ]  # fmt: skip
    share = {"compared": n, "chance": 0.3, "matched": 0.5, "mutual": 0.25, "median": 0.4}
    sides = {
        side: {"tables": str(folder / folder_name(text))}
        for side, text in zip("ab", (texts[0], texts[-1]), strict=True)
    }
    summary = {
        **sides,
        **{measure: {"a": share, "b": share} for measure in ("cosine", "phi")},
        "left_out": {"x": texts[0]},
    }
    about = dict(enumerate(texts))
    page = compare_page(pa.Table.from_pylist(rows, SCHEMA), summary, (about, about))
    (folder / "compare.html").write_text(page)
    return folder / "compare.html"


PAGES: dict[str, tuple[str, Callable[[Path, Sequence[str]], Path]]] = {
    "site": ("pipeline/dashboard/sites.py", write_site),
    "blind items": ("pipeline/dashboard/stage.py", write_blind_items),
    "blind item": ("pipeline/dashboard/blind.py", write_blind_item),
    "rating form": ("pipeline/blind/draw.py", write_rating_form),
    "circuit": ("pipeline/circuit/page.py", write_circuit),
    "score": ("pipeline/score/pictures.py", write_score),
    "curves": ("pipeline/curves/picture.py", write_curves),
    "steer": ("pipeline/steer/page.py", write_steer),
    "compare": ("pipeline/compare/page.py", write_compare),
    "pareto": ("pipeline/evaluate/pareto_plot.py", write_pareto),
}
"""By what it shows: the module that makes the page, and its maker."""


def shown(text: str) -> str:
    """Return a text as a page shows it, without its spaces."""
    return "".join(visible_token(text).split())
