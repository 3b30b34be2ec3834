"""The draft of a generation: what it was begun with and has settled on, kept until it is published."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from tailrace.pipeline.cache.context_packing import CHECKPOINT
from tailrace.pipeline.model.same_model import list_model_differences
from tailrace.pipeline.model.sites import SiteHooks
from tailrace.storage.artifact import MANIFEST, REQUEST, Record, canonical_json, remove_directory
from tailrace.storage.cache_format import BEGUN, DRAFT, SPLITS, CacheFormat, unit_record_name
from tailrace.storage.cache_writer import read_sealed_file, write_sealed
from tailrace.storage.draft import list_differences
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMismatch, StorageFull
from tailrace.storage.names import LOCK
from tailrace.storage.parsing import parse_json, read_regular

logger = logging.getLogger(__name__)

PLAN = "draft/plan.json"
LOG = "log.jsonl"


class Begun(Record):
    """What is being made, from which inputs."""

    change: str
    generation: int
    inputs: dict[str, Any]


class CachePlan(Record):
    """What was decided before the first unit."""

    layout: CacheFormat


Decided = TypeVar("Decided", bound=Record)


def _recall(root: Path, name: str, kind: type[Decided]) -> Decided:
    """Return a record of what was decided before anything was written; raise ArtifactCorrupt if it has changed."""
    try:
        return kind.parse(read_sealed_file(root, name), root / name)
    except ArtifactCorrupt as error:
        raise ArtifactCorrupt(
            f"{error}. Delete {root / DRAFT} and run the same command again: what was not published is made anew"
        ) from error


def begin_draft(root: Path, change: str, generation: int, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Note what is being made from which inputs, before anything else is; return the inputs first noted.

    Raises ArtifactMismatch if another change was interrupted here, or this one was begun with other inputs.
    """
    forget_finished_draft(root, generation - 1)
    if not (root / BEGUN).exists():
        # units made from nobody knows which inputs
        shutil.rmtree((root / unit_record_name(generation, SPLITS[0], 0)).parent, ignore_errors=True)
        (root / CHECKPOINT).unlink(missing_ok=True)
        content = {"change": change, "generation": generation, "inputs": dict(inputs)}
        write_sealed(root, BEGUN, canonical_json(content))
    begun = _recall(root, BEGUN, Begun)
    if begun.change != change:
        raise ArtifactMismatch(
            f"{root}: an unfinished `{begun.change}` lies here; finish it first, with {_finishing(root, begun)}"
        )
    refuse_other_inputs(str(root), begun.inputs, inputs)
    return begun.inputs


def begun_with(root: Path) -> dict[str, Any]:
    """Return the inputs that an unfinished draft was begun with; nothing if there is none."""
    return dict(_recall(root, BEGUN, Begun).inputs) if (root / BEGUN).exists() else {}


def begun_request(root: Path) -> dict[str, Any]:
    """Return the request of the cache that lies at a path, finished or not; nothing if none can be read."""
    for name, part in ((MANIFEST, "request"), (REQUEST, None)):
        with suppress(OSError, ValueError):
            content = parse_json(read_regular(root / name))
            content = content.get(part) if part and isinstance(content, dict) else content
            if isinstance(content, dict):
                return content
    return {}


def refuse_other_inputs(path: str, recorded: Mapping[str, Any], opened: Mapping[str, Any]) -> None:
    """Raise ArtifactMismatch where the model or the text is not the one the cache was begun with."""
    differences = list_differences(*({k: v for k, v in side.items() if k != "model"} for side in (recorded, opened)))
    if "model" in opened:
        differences += [f"model.{line}" for line in list_model_differences(recorded["model"], opened["model"])]
    if differences:
        raise ArtifactMismatch(
            f"{path}: was made from another model or text; use the recorded one, or another --out:\n"
            + "\n".join(f"  {line}" for line in differences)
        )


def _finishing(root: Path, begun: Begun) -> str:
    """Return the command that finishes what was begun. An extension may end at other rows than it was begun for."""
    if begun.change == "extend":
        return f"`pipeline extend {root} --tokens N`, N as large as its dataset allows (`all` always works)"
    if begun.change == "widen" and (layout := recall_plan(root)) is not None:
        return f"`pipeline widen {root} {hook_options(map(SiteHooks.of, layout.sites))}`"
    return "the command that began it"


def hook_options(hooks: Iterable[SiteHooks]) -> str:
    """Return the options of the command line that ask for these sites."""
    return " ".join(f"--hooks '{hook.name}={':'.join(hook.sides.values())}'" for hook in hooks)


def forget_finished_draft(root: Path, published: int) -> None:
    """Remove the draft of a generation that was published, which a kill right after publishing leaves behind."""
    if not (root / BEGUN).exists() or _recall(root, BEGUN, Begun).generation <= published:
        forget_draft(root)


def keep_plan(root: Path, layout: CacheFormat) -> None:
    """Keep in the draft what was decided before the first unit, so that a later run continues with the same."""
    write_sealed(root, PLAN, canonical_json({"layout": layout.as_json()}))


def recall_plan(root: Path) -> CacheFormat | None:
    """Return the format that an interrupted draft has settled on."""
    return _recall(root, PLAN, CachePlan).layout if (root / PLAN).exists() else None


def forget_draft(root: Path) -> None:
    """Remove what only an unfinished draft needs. Raises StorageFull if the disk refuses."""
    remove_directory(root / DRAFT)


@contextmanager
def nothing_left_behind(root: Path) -> Iterator[None]:
    """On an error before anything was packed, take the request back: corrected settings may use the same path."""
    try:
        yield
    except BaseException:
        left = {entry.name for entry in root.iterdir()}
        if left <= {LOCK, REQUEST, DRAFT, LOG} and not (root / CHECKPOINT).exists():
            with suppress(OSError, StorageFull):
                forget_draft(root)
                (root / REQUEST).unlink(missing_ok=True)
        raise


def log_event(root: Path, event: str, **numbers: Any) -> None:
    """Append to the log beside the artifact; times and rates belong here and in no published file."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "event": event, **numbers}
    try:
        with (root / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:  # no reason to fail: the log is no part of the result
        logger.warning("%s: cannot be written (%s)", root / LOG, error)
