"""The stages that are tried: command lines of the recipe, those that write a file where a user asks, those that print.

Inputs are the artifacts of the last release, which lie in the repository; nothing needs to be made before a case.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

from tests.released.recipe import STEPS
from tests.released.values import VALUES

RELEASE = sorted(path.parent for path in Path(__file__).parents[1].glob(f"released/*/{VALUES}"))[-1]
OUTPUT = "made/output"
"""Where stages write, below the laboratory's folder."""
_NOTES = "notes.txt"


class Stage(NamedTuple):
    """A command line; ``{out}`` is where it writes."""

    line: str
    before: tuple[str, ...] = ()
    """Command lines that make what it continues."""
    begin_with: str | None = None
    """The artifact of the release that it writes into, or "" for a folder with a file of a user."""

    @property
    def changes_cache(self) -> bool:
        """Whether a cache that is there is changed, whose rows must be read as before all the time."""
        return self.line.startswith(("extend", "widen", "shuffle", "prune"))

    @property
    def keeps_ledger(self) -> bool:
        """Whether what it makes says when it was done, so that its bytes are others each time."""
        return self.line.startswith("blind study") and not self.answers

    @property
    def answers(self) -> bool:
        """Whether it writes nothing: what it prints is all there is."""
        return "{out}" not in self.line

    def refuses_again(self, output: Path) -> bool:
        """Return whether the same command is refused now: what is done once has been done."""
        if self.line.startswith("rm"):
            return not any(output.parent.iterdir())
        return self.line.startswith("blind study begin") and output.exists()


def command(line: str) -> list[str]:
    """Return the words of a stage's command line, with its output path."""
    return shlex.split(line.format(out=OUTPUT))


def _recipe() -> dict[str, Stage]:
    stages = {}
    for name, output, number in _NAMED:
        lines = [step.line for step in STEPS if step.output == output]
        stages[name] = Stage(lines[number], tuple(lines[:number]))
    return stages


_NAMED = (
    ("cache", "drafts/cache", 0),
    ("extend", "caches/grown", 1),
    ("widen", "caches/grown", 2),
    ("shuffle", "caches/grown", 3),
    ("train", "drafts/transcoder", 0),
    ("live", "drafts/live", 0),
    ("sweep", "drafts/sweep", 0),
    ("cross-layer", "drafts/cross-layer", 0),
    ("layers", "layers", 0),
    ("analyze", "tables/topk", 0),
    ("analyze-cross-layer", "tables/cross-layer", 0),
    ("evaluate", "evaluations/layers", 0),
    ("circuit", "circuits/logit", 0),
    ("task", "task", 0),
    ("dashboard", "dashboards/topk", 0),
    ("dashboard-blind", "dashboards/blind", 0),
    ("blind-draw", "blind/draw", 0),
    ("blind-begin", "blind/study", 0),
    ("blind-view", "blind/study", 1),
    ("blind-hypothesis", "blind/study", 2),
    ("export-saelens", "exports/saelens", 0),
    ("export-circuit-tracer", "exports/circuit-tracer", 0),
    ("export-cross-layer", "exports/cross-layer", 0),
    ("export-sparsify", "exports/sparsify", 0),
    ("export-features", "exports/features", 0),
    ("export-delphi", "exports/delphi", 0),
    ("import", "imports/layer", 0),
    ("import-cross-layer", "imports/cross-layer", 0),
)
"""A stage's name, its output in the recipe, and which of the lines with that output it is."""

_TABLES = "--tables tables/topk"
_PROMPT = "'the people of' --transcoders transcoders/topk"
_GROWN = tuple(step.line for step in STEPS if step.output == "caches/grown")
STAGES = _recipe() | {
    "prune": Stage("prune {out} --force", before=_GROWN),
    "rm": Stage("rm {out} --force", begin_with="sweep"),
    "label": Stage("label {out} 3 people --note often --author me", begin_with="tables/topk"),
    "label-export": Stage("label tables/topk --export {out}/labels.csv", begin_with=""),
    "query": Stage(f"query 'SELECT * FROM features' {_TABLES} --out {{out}}/answer.parquet", begin_with=""),
    "pareto": Stage("pareto sweep --out {out}/pareto.html", begin_with=""),
    "curves": Stage("curves transcoders/topk sweep --out {out}/curves.html", begin_with=""),
    "compare": Stage("compare tables/topk tables/relu --out {out}/matches.parquet", begin_with=""),
    "score": Stage(f"score {_PROMPT} {_TABLES} --out {{out}}/scores.html", begin_with=""),
    "verify": Stage("verify caches/grown"),
    "verify-folder": Stage("verify ."),
    "ls": Stage("ls ."),
    "info": Stage("info caches/grown"),
    "info-sweep": Stage("info sweep"),
    "query-shown": Stage(f"query 'SELECT * FROM features' {_TABLES}"),
    "label-shown": Stage("label tables/topk"),
    "promotes": Stage(f"promotes people --transcoders transcoders/topk {_TABLES}"),
    "blind-log": Stage("blind study log blind/study"),
    "steer": Stage(f"steer {_PROMPT} --feature 3=+10 --tokens 4 --out {{out}}/steered.html", begin_with=""),
}


def copy_release(folder: Path) -> None:
    """Copy what stages read into the laboratory's folder."""
    shutil.copytree(RELEASE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("drafts"))


def begin(stage: Stage, folder: Path) -> None:
    """Make what a stage's command finds at its output path, but for what other commands make."""
    output = folder / OUTPUT
    shutil.rmtree(output.parent, ignore_errors=True)
    output.parent.mkdir()
    if stage.begin_with:
        shutil.copytree(folder / stage.begin_with, output)
    elif stage.begin_with is not None:
        output.mkdir()
        (output / _NOTES).write_text("a user's own file\n")
