"""The weights of a published cross-layer transcoder, read a part at a time, for whoever wants one layer's or less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tailrace.storage.cache_format import Site
from tailrace.training.architectures.jumprelu import JumpReLUTranscoder
from tailrace.training.architectures.transcoder import WEIGHTS, weights_as_described
from tailrace.training.cross_layer.artifact import read_cross_layer_manifest, sites_of
from tailrace.training.cross_layer.stack import DECODER


class WeightsFile:
    """Parts of the weights, on the CPU. Layers are places in the transcoder, from 0 for its lowest."""

    def __init__(self, file: Any, sites: list[Site], d_sae: int) -> None:
        self._file = file
        self.sites = sites
        """Lowest layer first."""
        self.d_sae = d_sae
        """Features that read one layer."""

    @torch.no_grad()
    def fill(self, layer: JumpReLUTranscoder, place: int) -> None:
        """Give ``layer`` what the features of layer ``place`` read, and that layer's output bias; not their decoder."""
        assert 0 <= place < len(self.sites), f"{place} is a layer of the transcoder"
        d_out = self.sites[place].d_out
        for name in ("W_enc", "b_enc", "log_threshold"):
            getattr(layer, name).copy_(self._file.get_slice(name)[place * self.d_sae : (place + 1) * self.d_sae])
        layer.b_dec_out.copy_(self._file.get_slice("b_dec_out")[place * d_out : (place + 1) * d_out])

    def writes(self, source: int, target: int) -> Tensor:
        """Return (d_sae, d_out): what features that read layer ``source`` write to layer ``target``, no lower one."""
        d_out = self.sites[target].d_out
        start = (target - source) * d_out
        written: Tensor = self._file.get_slice(f"{DECODER}{source}")[:, start : start + d_out]
        return written


@contextmanager
def open_weights(path: Path | str) -> Iterator[WeightsFile]:
    """Open the weights at ``path``. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch or ArtifactCorrupt.

    The last also for what is read inside and is not there.
    """
    path = Path(path)
    manifest = read_cross_layer_manifest(path)
    with weights_as_described(path / WEIGHTS), safe_open(path / WEIGHTS, framework="pt") as file:
        yield WeightsFile(file, sites_of(manifest), int(manifest["d_sae"]))
