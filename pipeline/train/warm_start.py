"""Starting from a published transcoder instead of random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tailrace.storage.cache_format import Site
from tailrace.training.architectures.manifest import CrossLayerManifest, read_either_manifest
from tailrace.training.cross_layer.layers import load_transcoder
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings


class WarmStart:
    """The weights of a published transcoder; the errors of opening it are those of ``load_transcoder``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made_of = read_either_manifest(path)
        self._transcoder = load_transcoder(path)

    @property
    def request(self) -> dict[str, Any]:
        """Which transcoder, wherever it lies."""
        return {"from": {"digest": self._made_of.digest}}

    def problems(self, settings: TrainSettings, sites: Sequence[Site]) -> list[str]:
        """Return a sentence for everything in which a run of ``settings`` would have another shape."""
        theirs, own = self._made_of.architecture, settings.architecture
        their_sites, site = self._made_of.sites, sites[0]
        n_theirs = len(their_sites) if isinstance(self._made_of, CrossLayerManifest) else "one, by itself"
        n_own = len(sites) if settings.cross_layer else "one, by itself"
        shapes = {
            "layers": (n_theirs, n_own),
            "architecture": (theirs.kind, own.kind),
            "architecture.skip": (theirs.skip, own.skip),
            "d_sae": (self._made_of.d_sae, settings.n_features(site.d_in)),
            f"width of the inputs at {site.name}": (their_sites[0].d_in, site.d_in),
            f"width of the outputs at {site.name}": (their_sites[0].d_out, site.d_out),
        }
        return [
            f"{name}: {self.path} has {there!r}, this run {here!r}"
            for name, (there, here) in shapes.items()
            if there != here
        ]

    def apply(self, run: TrainingRun) -> None:
        """Give a run that has taken no step the weights, in its own normalised units."""
        run.transcoder.take_folded(self._transcoder, run.normalisation)
