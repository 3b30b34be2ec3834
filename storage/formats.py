"""Kinds of artifacts, the format of each that this version writes, and the refusal of later formats.

A format is raised when the readers of the one before could not read the new one; see *Versions* in docs/format.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tailrace.storage.errors import ArtifactMismatch

ARTIFACT_FORMATS = {
    "activation-cache": 1,
    "shuffled-epoch": 1,
    "transcoder": 1,
    "cross_layer_transcoder": 1,
    "transcoders": 1,
    "sweep": 1,
    "tables": 2,
    "evaluation": 1,
    "circuit": 1,
    "task": 1,
    "dashboard": 1,
    "blind-comparison": 1,
    "blind-study": 1,
    "export": 1,
}
"""The newest format of each kind, which is written; all that a release wrote are read."""

LEFT_OUT = np.uint32(1 << 31)
"""Bit of a token's document in a cache's ``contexts/documents``: the token is in no message by the chosen roles."""
RESERVED_COLUMNS = ("document", "split")
"""Columns that a table of documents has by itself, beside those of the dataset that a cache keeps."""
TABLES_KIND = "tables"
"""What ``pipeline analyze`` publishes. Its readers need no torch, which making it does."""
CROSS_LAYER_KIND = "cross_layer_transcoder"
"""One transcoder over several layers."""
TRANSCODER_KINDS = ("transcoder", CROSS_LAYER_KIND)
"""What holds transcoders: of one layer, or of several."""
FOR_ONE_LAYER_ONLY = {
    CROSS_LAYER_KIND: (
        "what is wanted here is of one layer; pipeline analyze makes tables of each layer of a cross-layer transcoder, "
        "and pipeline export --to circuit-tracer writes it for another tool"
    )
}
"""The reason to refuse a kind where a transcoder of one layer, or its tables, are wanted."""


def refuse_newer(path: Path, kind: str, record: Mapping[str, Any]) -> None:
    """Raise ArtifactMismatch if ``record``, of the artifact at ``path``, has a format that this version cannot read.

    A record that names no format has the first; a record of an unknown kind is left to its reader.
    """
    newest = ARTIFACT_FORMATS.get(kind)
    recorded = record.get("format_version", record.get("format", 1))
    if newest is None or not isinstance(recorded, int) or recorded <= newest:
        return
    writer = (record.get("versions") or {}).get("tailrace")
    raise ArtifactMismatch(
        f"{path}: is in format {recorded} of {kind}, which {f'tailrace {writer}' if writer else 'a newer version'} "
        f"wrote; tailrace {version('tailrace')} reads formats up to {newest}; upgrade tailrace to use it"
    )


Compression = Literal["none", "lz4", "zstd", "gzip", "blosc-zstd"]
"""Lossless codecs of the Zarr v3 core; ``lz4`` and ``blosc-zstd`` are blosc with bit shuffling."""
