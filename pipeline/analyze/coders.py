"""What ``pipeline analyze`` makes tables of: a transcoder of one layer, or one layer of a cross-layer transcoder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailrace.storage.errors import SettingsError
from tailrace.training.architectures.transcoder import Transcoder, load_transcoder, read_transcoder_manifest
from tailrace.training.cross_layer.artifact import is_cross_layer, read_cross_layer_manifest, sites_of
from tailrace.training.cross_layer.layers import load_summed_layer


@dataclass(frozen=True)
class AnalysedCoder:
    """Where it lies. Nothing is loaded; hashable, so that worker processes can be told."""

    path: Path
    name: str
    """Of its tables' folder beside others: the transcoder's folder, or the layer's site."""
    layer: int | None = None
    """Place in a cross-layer transcoder, from 0 for its lowest layer; None for a transcoder of one layer."""

    @classmethod
    def of_one_layer(cls, path: Path) -> AnalysedCoder:
        """Return a transcoder of one layer."""
        return cls(path, Path(os.path.abspath(path)).name)

    def __str__(self) -> str:
        return str(self.path) if self.layer is None else f"{self.path}, {self.name}"

    @property
    def is_whole(self) -> bool:
        """Whether its features alone are to give its site's outputs."""
        return self.layer is None

    def read_manifest(self) -> dict[str, Any]:
        """Return the transcoder's manifest, of a cross-layer one with ``site`` of the layer.

        The errors are those of ``tailrace.storage.artifact.read_manifest``.
        """
        if self.layer is None:
            return read_transcoder_manifest(self.path)
        manifest = read_cross_layer_manifest(self.path)
        return {**manifest, "site": manifest["sites"][self.layer]}

    def reference(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Return what tells it from every other, for the manifest of tables."""
        layer = {} if self.layer is None else {"layer": self.layer}
        return {"digest": manifest["digest"], **layer}

    def load(self) -> Transcoder:
        """Return it on the CPU. Of a layer, the decoder is the sum of what features write to it and later ones.

        Raises ArtifactCorrupt if the weights are not what the manifest describes.
        """
        return load_transcoder(self.path) if self.layer is None else load_summed_layer(self.path, self.layer)


def analysed_coders(transcoders: Sequence[Path]) -> list[AnalysedCoder]:
    """Return what is to be analysed: the transcoders, or of one cross-layer transcoder its layers, lowest first.

    Raises SettingsError for a cross-layer transcoder beside others, and the errors of reading its manifest.
    """
    across = [path for path in transcoders if is_cross_layer(path)]
    if not across:
        return [AnalysedCoder.of_one_layer(path) for path in transcoders]
    if len(transcoders) > 1:
        raise SettingsError(
            f"{', '.join(map(str, across))}: a cross-layer transcoder gets a folder of tables for each of its layers, "
            "named after their sites; analyse it alone, with an --out of its own"
        )
    sites = sites_of(read_cross_layer_manifest(across[0]))
    return [AnalysedCoder(across[0], site.name, layer) for layer, site in enumerate(sites)]
