"""One layer of a cross-layer transcoder as a transcoder of its own, for what looks at a model layer by layer.

Summed over what its features write, a layer is for statistics and weights of features one at a time: what they fire on,
and what they add to the residual stream. Only what is asked for is read from disk, so a layer takes no more memory the
more layers there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tailrace.storage.cache_format import Site
from tailrace.training.architectures import JumpReLU
from tailrace.training.architectures.jumprelu import JumpReLUTranscoder
from tailrace.training.architectures.transcoder import WEIGHTS, weights_as_described
from tailrace.training.cross_layer.artifact import read_cross_layer_manifest, sites_of
from tailrace.training.cross_layer.stack import DECODER, CrossLayerTranscoder

_LATER = "later_"


class StackedLayer(JumpReLUTranscoder):
    """The features that read one layer. ``W_dec`` is what they write to that layer's own output, of any length.

    What they write to later layers is ``writes``; what earlier layers' features write to this one is not known here,
    so that ``decode`` is a part of the layer's output only. Made with all weights zero.
    """

    def __init__(self, d_in: int, d_out: int, d_sae: int, layers: Sequence[int]) -> None:
        super().__init__(d_in, d_out, d_sae, settings=JumpReLU())
        self.layer = layers[0]
        """The model's number of the layer."""
        self.later_layers = tuple(layers[1:])
        """The layers of the model that its features write to besides."""
        for target in self.later_layers:
            self.register_buffer(f"{_LATER}{target}", torch.zeros(d_sae, d_out))

    def writes(self, layer: int) -> Tensor | None:
        """Return (d_sae, d_out): what the features write to a layer of the model; None if nothing."""
        if layer == self.layer:
            return self.W_dec
        return self.get_buffer(f"{_LATER}{layer}") if layer in self.later_layers else None

    @torch.no_grad()
    def take_writes(self, written: Iterable[Tensor]) -> None:
        """Copy (d_sae, d_out) of what the features write to their own and each later layer."""
        for layer, values in zip((self.layer, *self.later_layers), written, strict=True):
            own = self.writes(layer)
            assert own is not None, "there is one for each layer"
            own.copy_(values)


@torch.no_grad()
def split_layers(transcoder: CrossLayerTranscoder, layers: Sequence[int]) -> list[StackedLayer]:
    """Return copies of the layers of a cross-layer transcoder, lowest first; ``layers`` are their numbers in the model.

    On its device and in its dtype.
    """
    split = []
    width, indices = transcoder.width_out, range(transcoder.n_layers)
    for index in indices:
        layer = StackedLayer(transcoder.width_in, width, transcoder.features_per_layer, layers[index:])
        layer = layer.to(transcoder.W_enc)
        own = transcoder.of_layer(index)
        for name in ("W_enc", "b_enc", "log_threshold"):
            getattr(layer, name).copy_(getattr(transcoder, name)[own])
        layer.b_dec_out.copy_(transcoder.b_dec_out[index * width : (index + 1) * width])
        layer.take_writes(transcoder.writes(index, target) for target in indices[index:])
        split.append(layer.eval().requires_grad_(False))
    return split


def load_layers(path: Path | str, layers: Sequence[int]) -> list[StackedLayer]:
    """Return the same of a published cross-layer transcoder, on the CPU; it is never in memory as a whole besides.

    Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch or ArtifactCorrupt.
    """
    loaded = []
    with open_weights(path) as file:
        for index, site in enumerate(file.sites):
            layer = StackedLayer(site.d_in, site.d_out, file.d_sae, layers[index:])
            file.fill(layer, index)
            layer.take_writes(file.writes(index, target) for target in range(index, len(file.sites)))
            loaded.append(layer.eval().requires_grad_(False))
    return loaded


class WeightsFile:
    """Parts of the weights, on the CPU. Layers are indices in the transcoder, from 0 for its lowest."""

    def __init__(self, file: Any, sites: list[Site], d_sae: int) -> None:
        self._file = file
        self.sites = sites
        """Lowest layer first."""
        self.d_sae = d_sae
        """Features that read one layer."""

    @torch.no_grad()
    def fill(self, layer: JumpReLUTranscoder, index: int) -> None:
        """Give ``layer`` what the features of layer ``index`` read, and that layer's output bias; not their decoder."""
        assert 0 <= index < len(self.sites), f"{index} is a layer of the transcoder"
        d_out = self.sites[index].d_out
        for name in ("W_enc", "b_enc", "log_threshold"):
            getattr(layer, name).copy_(self._file.get_slice(name)[index * self.d_sae : (index + 1) * self.d_sae])
        layer.b_dec_out.copy_(self._file.get_slice("b_dec_out")[index * d_out : (index + 1) * d_out])

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


@torch.no_grad()
def load_summed_layer(path: Path | str, index: int) -> JumpReLUTranscoder:
    """Return the features that read layer ``index``, counted from the transcoder's lowest, on the CPU.

    ``encode`` is ``CrossLayerTranscoder.encode_layer``. ``W_dec`` (d_sae, d_out) is Σ_m W_dec_{index→m}, the sum of
    what a feature writes to its own and all later layers: what it adds to the residual stream in the end, added up in
    float64. Its rows have any length. ``decode`` is therefore no prediction of any layer's output; ``b_dec_out`` is the
    layer's own. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch or ArtifactCorrupt.
    """
    with open_weights(path) as file:
        site = file.sites[index]
        layer = JumpReLUTranscoder(site.d_in, site.d_out, file.d_sae, settings=JumpReLU())
        file.fill(layer, index)
        total = torch.zeros(file.d_sae, site.d_out, dtype=torch.float64)
        for target in range(index, len(file.sites)):
            total += file.writes(index, target)
        layer.W_dec.copy_(total)
    return layer.eval().requires_grad_(False)
