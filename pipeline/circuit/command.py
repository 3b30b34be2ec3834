"""``pipeline circuit``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from tailrace.pipeline.artifacts.made import echo_made
from tailrace.pipeline.circuit.settings import CircuitSettings
from tailrace.pipeline.shared import run_options as options
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.options import read_settings, settings_options
from tailrace.pipeline.shared.sections import SectionCommand, option

if TYPE_CHECKING:
    from tailrace.pipeline.circuit.stage import CircuitResult

asked = partial(option, section="What to explain")


@click.command("circuit", cls=SectionCommand)
@click.argument("prompt")
@click.option(
    "--transcoders", multiple=True, required=True, type=options.ARTIFACT,
    help="Transcoder of one layer, to be given again for each; folder that holds those of layers; a cross-layer one.",
)  # fmt: skip
@asked("--feature", metavar="LAYER:INDEX", help="Explain why this feature fires.")
@asked(
    "--direction", type=click.Choice(["encoder", "decoder"]), default="encoder", show_default=True,
    help="Of the feature: encoder for its activation, decoder for what its MLP writes along its decoder direction.",
)  # fmt: skip
@asked("--logit", metavar="TEXT", help="Explain why this token is predicted.")
@asked(
    "--logit-difference",
    nargs=2,
    metavar="TEXT TEXT",
    help="Explain the first's logit less the second's.",
)
@asked(
    "--token", type=int, default=-1, show_default=True,
    help="Position to explain: the BOS is 0, the last token -1.",
)  # fmt: skip
@click.option(
    "--tables", multiple=True, type=options.ARTIFACT,
    help="Tables of one of the transcoders, for what the page says of its features; may be given again, or a folder "
    "that holds tables of many, as pipeline analyze makes it.",
)  # fmt: skip
@click.option("--dashboard", type=options.ARTIFACT, help="Their dashboard, for links to the pages of features.")
@options.out
@settings_options(CircuitSettings)
@options.model_elsewhere
@options.as_json
@options.compute
def command(
    prompt: str,
    transcoders: tuple[Path, ...],
    feature: str | None,
    direction: Literal["encoder", "decoder"],
    logit: str | None,
    logit_difference: tuple[str, str] | None,
    token: int,
    tables: tuple[Path, ...],
    dashboard: Path | None,
    output: Path,
    config: Path | None,
    model: str | None,
    as_json: bool,
    compute: Compute,
    **given: Any,
) -> None:
    """Explain a feature's activation or a predicted token on PROMPT by features, heads and tokens before it.

    \b
    pipeline circuit "Oh, that rifle model is a 6M" --feature 8:89 --out circuits/6m \\
        --transcoders transcoders/gpt2
    pipeline circuit "The war lasted from 1735 to 17" --logit-difference 40 20 --out circuits/war \\
        --transcoders … --missing-layers opaque

    The BOS is put before the prompt. --out gets circuit.json, viewer.json (for the viewers of circuit-tracer and
    Neuronpedia) and index.html, which opens in any browser.
    """
    settings = read_settings(CircuitSettings, config, given)

    from tailrace.pipeline.circuit import stage as circuit
    from tailrace.pipeline.circuit.question import Question, parse_feature

    question = Question(
        prompt,
        token,
        None if feature is None else parse_feature(feature),
        direction,
        logit,
        logit_difference or None,
    )
    result = circuit.run(
        settings,
        question,
        transcoders=transcoders,
        output=output,
        tables=tables,
        dashboard=dashboard,
        model=model,
        compute=compute,
    )
    if as_json:
        echo_made(result.path)
    elif not compute.quiet:
        for line in show_circuit(result):
            click.echo(line)


_INACTIVE = (
    "the feature is not active here, so its pre-activation is explained "
    "(--order magnitude also shows what holds it down)"
)
N_PATHS = 8
"""Paths printed; all are in the files."""


def show_circuit(result: CircuitResult) -> list[str]:
    """Return what was found, in lines: the tokens, what the root is made of, the strongest paths, the graph."""
    from tailrace.pipeline.circuit.stage import CIRCUIT, PAGE
    from tailrace.pipeline.circuit.words import Words, quoted

    document = result.document
    root, words = document["root"], Words(document)
    lines = [" ".join(f"{place}:{token['text']!r}" for place, token in enumerate(document["tokens"]))]
    if likely := document.get("likely"):
        said = ", ".join(f"{quoted(one['text'])} {one['probability']:.0%}" for one in likely)
        lines.append(f"likely after token {root['node']['token']}: {said}")
    what = "" if root["is_active"] else f"; {_INACTIVE}"
    lines += [
        "",
        f"{words.root()} {root['value']:.6g}{what}",
        f"  {root['n_terms']:,} terms sum to it within {root['incompleteness']:.1e} of the sum of their sizes",
        "  of it " + ", ".join(_kind(kind, value, root.get("from_bos")) for kind, value in root["by_kind"].items()),
        "",
    ]
    paths = _longest([path["steps"] for paths in document["rounds"] for path in paths])
    paths.sort(key=lambda steps: -abs(steps[-1]["value"]))
    lines += [f"  ← {' ← '.join(words.path(steps))}" for steps in paths[:N_PATHS]]
    if len(paths) > N_PATHS:
        lines.append(f"  and {len(paths) - N_PATHS} weaker paths, and the beginnings of all, in {CIRCUIT}")
    if not paths:
        lines.append("no path: nothing that the filters allow contributes")
    graph = document["attribution_graph"]
    if graph is not None:
        lines += [
            "",
            f"attribution graph: {len(graph['nodes']):,} of {graph['n_nodes_before_pruning']:,} nodes and "
            f"{len(graph['edges']):,} edges kept; {graph['replacement_score']:.0%} of what reaches the target through "
            "them comes from tokens, the rest from what no transcoder explains",
        ]
    return [*lines, f"{result.path}: written; {result.path / PAGE} opens in a browser"]


def _longest(paths: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Return the paths that no other goes on from."""
    keys = [tuple(step["node"]["name"] for step in steps) for steps in paths]
    begun = {key[:length] for key in keys for length in range(len(key))}
    return [steps for steps, key in zip(paths, keys, strict=True) if key not in begun]


def _kind(kind: str, value: float, from_bos: float | None) -> str:
    """Return what a kind of nodes adds. Paths leave out what heads bring from the BOS, so its share is told."""
    from tailrace.analysis.circuits.paths import show_value

    share = f" ({show_value(from_bos)} from the BOS)" if kind == "head" and from_bos else ""
    return f"{kind} {show_value(value)}{share}"
