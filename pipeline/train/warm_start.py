"""Starting from a published transcoder instead of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tailrace.storage.cache_format import Site
from tailrace.training.architectures.transcoder import load_transcoder, read_transcoder_manifest
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings


class WarmStart:
    """The weights of a published transcoder; the errors of opening it are those of ``load_transcoder``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made_of = read_transcoder_manifest(path)
        self._transcoder = load_transcoder(path)

    @property
    def request(self) -> dict[str, Any]:
        """Which transcoder, wherever it lies."""
        return {"from": {"digest": self._made_of["digest"]}}

    def problems(self, settings: TrainSettings, site: Site) -> list[str]:
        """Return a sentence for everything in which a run of ``settings`` would have another shape."""
        theirs, own = self._made_of["architecture"], settings.architecture.model_dump()
        shapes = {
            "architecture": (theirs["kind"], own["kind"]),
            "architecture.skip": (theirs["skip"], own["skip"]),
            "d_sae": (self._transcoder.d_sae, settings.n_features(site.d_in)),
            f"width of the inputs at {site.name}": (self._transcoder.d_in, site.d_in),
            f"width of the outputs at {site.name}": (self._transcoder.d_out, site.d_out),
        }
        return [
            f"{name}: {self.path} has {there!r}, asked for {here!r}"
            for name, (there, here) in shapes.items()
            if there != here
        ]

    def apply(self, run: TrainingRun) -> None:
        """Give a run that has taken no step the weights, in its own normalised units."""
        run.transcoder.take_folded(self._transcoder, run.normalisation)
