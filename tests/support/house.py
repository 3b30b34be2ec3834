"""The house in numbers: ``python -m tests.support.house`` counts what the plan of the code sets limits to.

Lines of code leave out blank lines, comments and docstrings. A walk is what lies on the call stacks of a real run at
the steps that it leads through: the files that a reader has open who goes the same way.
"""

from __future__ import annotations

import ast
import io
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

from tests.support.paths import ROOT

FOLDERS = ("pipeline", "analysis", "training", "storage")
CRUMB_LINES = 60
"""A module with fewer lines and one importer is a crumb, unless it is a plug-in."""


def modules() -> dict[str, Path]:
    """Return the modules of the four folders by their dotted names."""
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {dotted(path): path for path in found}


def dotted(path: Path) -> str:
    """Return the name by which a module of the repository is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("tailrace", *(part for part in parts if part != "__init__")))


def code_lines(path: Path) -> int:
    """Return the number of lines that hold code."""
    source = path.read_text(encoding="utf-8")
    documented = {line for start, end in _docstrings(ast.parse(source)) for line in range(start, end + 1)}
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    held = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in skipped
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(held - documented)


def _docstrings(tree: ast.AST) -> Iterator[tuple[int, int]]:
    """Yield first and last line of every string that stands alone: docstrings, also those under fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.end_lineno or node.lineno


def importers(known: dict[str, Path]) -> Counter[str]:
    """Return by how many other modules each module is imported."""
    counts: Counter[str] = Counter()
    for name, path in known.items():
        counts.update(_imported(path, known) - {name})
    return counts


def _imported(path: Path, known: dict[str, Path]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (below & known.keys()) or {node.module}
    return found & known.keys()


def crumbs(known: dict[str, Path]) -> list[str]:
    """Return the modules under ``CRUMB_LINES`` lines that exactly one other imports, but for plug-ins and commands."""
    counts = importers(known)
    small = [name for name, path in known.items() if len(path.read_text().splitlines()) < CRUMB_LINES]
    return [name for name in small if counts[name] == 1 and not _is_plugin(known[name])]


def _is_plugin(path: Path) -> bool:
    rooms = {"architectures", "auxiliary", "resampling", "tables", "formats"}
    return path.name == "__init__.py" or bool(rooms & set(path.parts)) or path.stem.startswith("command")


def widest_level() -> tuple[str, int]:
    """Return the folder with the most rooms, and how many: modules and folders side by side."""
    counts = {
        folder.relative_to(ROOT).as_posix(): sum(_is_room(entry) for entry in folder.iterdir())
        for top in FOLDERS
        for folder in [ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())]
    }
    widest = max(counts, key=lambda name: counts[name])
    return widest, counts[widest]


def _is_room(entry: Path) -> bool:
    return (entry.is_dir() and any(entry.rglob("*.py"))) or (entry.suffix == ".py" and entry.name != "__init__.py")


def walk_to_the_optimiser() -> list[str]:
    """Return the files on the way from ``pipeline train`` to the optimiser's step."""
    from tailrace.pipeline.cli import main
    from tailrace.training.loop.optim import BlockedAdam
    from tests.support.training_caches import small_cache

    with tempfile.TemporaryDirectory() as scratch:
        cache, output = small_cache(Path(scratch) / "cache"), Path(scratch) / "transcoder"
        line = f"train {cache} --k 2 --d-sae 8 --batch-rows 16 --steps 2 --quiet --out {output}"
        return _files_to([(BlockedAdam, "step")], lambda: main(line.split()))


def walk_to_a_cached_row() -> list[str]:
    """Return the files on the way of a document to a row in a cache: read, packed, run through the model, written.

    The threads that pack and that write have stacks of their own, so each step counts with the stack it has.
    """
    from tailrace.pipeline.cli import main
    from tailrace.pipeline.model.language_model import LanguageModel
    from tailrace.pipeline.model.tokenizer import ModelTokenizer
    from tailrace.pipeline.text.packer import Packer
    from tailrace.pipeline.text.stream import DocumentReader
    from tailrace.storage.cache_writer import ContextBlocks, UnitBuffer
    from tests.support.cache_jobs import model_folder, text_file

    steps: list[tuple[type, str]] = [
        (DocumentReader, "__next__"),
        (ModelTokenizer, "tokenize"),
        (Packer, "add"),
        (ContextBlocks, "write"),
        (LanguageModel, "capture"),
        (UnitBuffer, "fill"),
        (UnitBuffer, "commit"),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        line = f"cache --model {model_folder()} --dataset {text_file()} --layers 0 --tokens 500 --context-length 16 "
        line += f"--contexts-per-batch 4 --storage-dtype float32 --quiet --out {Path(scratch) / 'cache'}"
        return _files_to(steps, lambda: main(line.split()))


def _files_to(steps: Sequence[tuple[type, str]], run: Callable[[], object]) -> list[str]:
    """Return our files on the call stacks when each method is last called while ``run`` runs, and those methods'."""
    stacks: dict[tuple[type, str], list[str]] = {}
    with ExitStack() as patches:
        for step in steps:
            patches.enter_context(mock.patch.object(*step, _noted(step, getattr(*step), stacks)))
        with redirect_stdout(io.StringIO()):
            run()
    missed = [f"{owner.__name__}.{name}" for owner, name in steps if (owner, name) not in stacks]
    assert not missed, f"the run never called {', '.join(missed)}"
    return list(dict.fromkeys(file for step in steps for file in stacks[step]))


def _noted(step: tuple[type, str], original: Callable[..., Any], stacks: dict[tuple[type, str], list[str]]) -> Any:
    def noted(*arguments: Any, **named: Any) -> Any:
        own = Path(original.__code__.co_filename).resolve().relative_to(ROOT).as_posix()
        stacks[step] = [*list(_our_files(sys._getframe(1)))[::-1], own]
        return original(*arguments, **named)

    return noted


def _our_files(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        path = Path(frame.f_code.co_filename).resolve()
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in FOLDERS:
            yield path.relative_to(ROOT).as_posix()
        frame = frame.f_back


def report() -> list[str]:
    """Return the counts, a line each."""
    known = modules()
    folder, n_rooms = widest_level()
    walks = {
        "`pipeline train` to the optimiser": walk_to_the_optimiser(),
        "a document to a cached row": walk_to_a_cached_row(),
    }
    return [
        f"files: {len(known)}",
        f"lines of code: {sum(map(code_lines, known.values())):,}",
        f"modules with one importer: {sum(count == 1 for count in importers(known).values())}",
        f"crumbs: {len(crumbs(known))}",
        f"rooms at the widest level: {n_rooms} ({folder}/)",
        *(f"{name}: {len(files)} files: {', '.join(files)}" for name, files in walks.items()),
    ]


if __name__ == "__main__":
    sys.stdout.write("\n".join(report()) + "\n")
