"""The skeleton of a stage: what is asked for is made once, and published complete or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tailrace.storage.artifact import JSON
from tailrace.storage.draft import Draft
from tailrace.storage.formats import ARTIFACT_FORMATS

MODEL_LIBRARIES = ("torch", "transformer_lens", "transformers")
"""Packages that decide what a language model computes."""


@dataclass(frozen=True)
class Made:
    """What a stage has made in its output directory."""

    record: Mapping[str, Any]
    """What the manifest says beside format, inputs and versions."""
    files: Iterable[str]
    """Names of all files, relative to the directory."""
    libraries: Iterable[str]
    """Packages whose versions had a say in it."""
    beside: Iterable[str] = ()
    """Names of files that users put there, and that are no part of it."""
    written: Mapping[str, JSON] = field(default_factory=dict)
    """What ``describe_files`` says of files, as they were written; what differs by then is not published."""


def open_draft(output: Path, kind: str, request: Mapping[str, Any]) -> Draft:
    """Open the output path of a stage. Raises ArtifactMismatch if something else lies there, ArtifactBusy."""
    return Draft(output, kind, {"format": ARTIFACT_FORMATS[kind], **request})


def publish_stage(output: Path, kind: str, request: Mapping[str, Any], make: Callable[[Path], Made]) -> None:
    """Publish at ``output`` what ``make`` makes of ``request``, unless it is published there.

    ``request`` has the settings, and under ``inputs`` the digests of what is read. The same request continues an
    unfinished artifact; any other is refused with ArtifactMismatch. An error of ``make`` before it writes leaves
    nothing behind, so that another request may use the same path.
    """
    with open_draft(output, kind, request) as draft:
        if draft.published:
            return
        made = make(draft.path)
        about = {"format": ARTIFACT_FORMATS[kind], "inputs": request["inputs"], **made.record}
        about["versions"] = {name: version(name) for name in made.libraries}
        draft.publish(about, made.files, beside=made.beside, written=made.written)
