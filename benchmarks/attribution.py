"""Claim: attribution of one root, and a graph, of a 128-token prompt of SmolLM2 faster than circuit-tracer; and head
contributions without ever holding heads × tokens² × width numbers, faster than the formulation that does.

All layers have a transcoder of the same shape, random, with thresholds that let 32 features fire on a token: both
sides read the same files and load the same model from one folder. circuit-tracer runs in an environment of its own,
with the release of TransformerLens that it needs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import Contender, Rates, Work, measure
from benchmarks.peers import environment, run_script
from benchmarks.report import Report, parse_arguments, scratch_folder

CIRCUIT_TRACER = "circuit-tracer==0.5.0"
MODEL = Path("demo/smollm2-135m")
D_SAE, K = 4096, 32
QUICK, FULL = (32, 16, 2), (128, 64, 3)
"""Tokens of the prompt, features expanded in a graph, rounds."""
OURS_ROOT, THEIRS_ROOT = "one root: ours", "one root: circuit-tracer"
OURS_GRAPH, THEIRS_GRAPH = "graph: ours", "graph: circuit-tracer"
FACTORED, MATERIALISED = (
    "head contributions: pattern · (values · W_O n)",
    "head contributions: (pattern · values W_O) · n",
)


def main() -> None:
    arguments = parse_arguments(__doc__ or "")
    if not (MODEL / "config.json").exists():
        sys.exit(f"{MODEL}: there is no model; run `make demo MODEL=smollm2` or `make circuits-model` first")
    n_tokens, n_features, rounds = QUICK if arguments.quick else FULL
    python = environment("circuit_tracer", [CIRCUIT_TRACER, "psutil"])
    with scratch_folder(arguments) as folder:
        made = ours({"task": "make", "folder": str(folder), "n_tokens": n_tokens, "d_sae": D_SAE, "k": K})
        sides = Sides(folder, python, n_features, 64)
        batches = [16, 64]  # at 256 it takes minutes and 9 GB
        sides.batch = min(batches, key=lambda size: sides.their_graph(size)["seconds"])
        agreement = sides.agreement()
        rates = measure(sides.contenders(), rounds)
    report = Report(
        "attribution",
        "Attribution of a SmolLM2 prompt beside circuit-tracer",
        f"A prompt of {n_tokens} tokens, {made['n_layers']} layers, transcoders of {D_SAE:,} features with "
        f"{made['n_active']:,} active in all; float32, one thread, {rounds} rounds of alternating processes, each "
        "timed after a warm-up, loading left out. One root: the model's pass and everything that contributes to the "
        "centred logit of its likeliest next token (circuit-tracer has to expand one feature as well). Graph: "
        f"{n_features} features expanded, circuit-tracer {sides.batch} at a time, its fastest of "
        f"{', '.join(map(str, batches))}; ours 64. What tokens and errors contribute to the root differs between the "
        f"two by {agreement:.1e} of the largest. Head contributions: all heads, targets and sources of every layer "
        "along one direction, given patterns and values.",
        ("what", "s", "ratio"),
        ("torch", "transformer_lens"),
        extra_versions={"circuit-tracer's environment": ", ".join(f"{k} {v}" for k, v in sides.versions.items())},
    )
    for name in rates.by_name:
        to = {OURS_ROOT: THEIRS_ROOT, OURS_GRAPH: THEIRS_GRAPH, FACTORED: MATERIALISED}.get(name)
        against = f"{rates.ratio(name, to):.3g} ({rates.spread(name, to)})" if to else ""
        report.rows.append((name, f"{1 / rates.median(name):.3g}", against))
    report.rows += [(f"peak memory, {name}", f"{sides.peak_bytes[name] / 1e9:.2f} GB", "") for name in sides.peak_bytes]
    report.ratios = ratios(rates)
    report.finish(arguments)


def ratios(rates: Rates) -> dict[str, float]:
    """Return how many times as fast ours is."""
    return {
        "root_vs_circuit_tracer": rates.ratio(OURS_ROOT, THEIRS_ROOT),
        "graph_vs_circuit_tracer": rates.ratio(OURS_GRAPH, THEIRS_GRAPH),
        "heads_vs_materialised": rates.ratio(FACTORED, MATERIALISED),
    }


def ours(arguments: dict[str, Any]) -> dict[str, Any]:
    """Run a task of attribution_ours.py."""
    return run_script(sys.executable, "attribution_ours.py", {"model": str(MODEL.resolve()), **arguments})


class Sides:
    """Both sides' processes. Peak memory by contender is kept."""

    def __init__(self, folder: Path, python: Path, n_features: int, batch: int) -> None:
        self._folder, self._python, self._n_features = folder, python, n_features
        self.batch = batch
        self.versions: dict[str, str] = {}
        self.peak_bytes: dict[str, int] = {}

    def _theirs(self, arguments: dict[str, Any]) -> dict[str, Any]:
        given = {"model": str(MODEL.resolve()), "folder": str(self._folder), **arguments}
        found = run_script(self._python, "attribution_circuit_tracer.py", given)
        self.versions = found["versions"]
        return found

    def _ours(self, task: str) -> dict[str, Any]:
        return ours({"task": task, "folder": str(self._folder), "n_features": self._n_features})

    def their_graph(self, batch: int) -> dict[str, Any]:
        """Return their graph's time with ``batch`` features at a time."""
        return self._theirs({"n_features": self._n_features, "batch": batch})

    def agreement(self) -> float:
        """Return the largest difference of what tokens and errors contribute to the root, over the largest of ours."""
        self._theirs({"n_features": 1, "batch": 1, "write": str(self._folder / "theirs.json")})
        ours({"task": "root", "folder": str(self._folder), "write": str(self._folder / "ours.json"), "n_features": 1})
        mine, other = (json.loads((self._folder / f"{side}.json").read_text()) for side in ("ours", "theirs"))
        largest = max(abs(value) for values in mine.values() for value in values)
        return max(abs(a - b) for part in mine for a, b in zip(mine[part], other[part], strict=True)) / largest

    def contenders(self) -> list[Contender]:
        """Return everything that is timed."""

        def timed(name: str, found: dict[str, Any]) -> Work:
            self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), found["peak_bytes"])
            return Work(1, found["seconds"])

        return [
            Contender(OURS_ROOT, lambda: timed(OURS_ROOT, self._ours("root"))),
            Contender(THEIRS_ROOT, lambda: timed(THEIRS_ROOT, self._theirs({"n_features": 1, "batch": 1}))),
            Contender(OURS_GRAPH, lambda: timed(OURS_GRAPH, self._ours("graph"))),
            Contender(THEIRS_GRAPH, lambda: timed(THEIRS_GRAPH, self.their_graph(self.batch))),
            Contender(FACTORED, lambda: timed(FACTORED, self._ours("heads"))),
            Contender(MATERIALISED, lambda: timed(MATERIALISED, self._ours("heads_materialised"))),
        ]


if __name__ == "__main__":
    main()
