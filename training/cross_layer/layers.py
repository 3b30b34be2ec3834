"""One layer of a cross-layer transcoder as a transcoder of its own, for what looks at a model layer by layer.

Summed over what its features write, a layer is for statistics and weights of features one at a time: what they fire on,
and what they add to the residual stream. Only what is asked for is read from disk, so a layer takes no more memory the
more layers there are.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tailrace.storage.artifact import published_file
from tailrace.storage.cache_format import Site
from tailrace.storage.names import home_path
from tailrace.training.architectures import JumpReLU
from tailrace.training.architectures.base import Transcoder
from tailrace.training.architectures.jumprelu import JumpReLUTranscoder
from tailrace.training.architectures.manifest import WEIGHTS, CrossLayerManifest, is_cross_layer
from tailrace.training.architectures.transcoder import load_transcoder as load_of_one_layer
from tailrace.training.architectures.transcoder import weights_as_described
from tailrace.training.cross_layer.stack import DECODER, CrossLayerTranscoder

_LATER = "later_"


class StackedLayer(JumpReLUTranscoder):
    """The features that read one layer. ``W_dec`` is what they write to that layer's own output, of any length.

    What they write to later layers is ``writes_to``; what earlier layers' features write to this one is not known here,
    so that ``decode`` is a part of the layer's output only. Made with all weights zero.
    """

    def __init__(self, sites: Sequence[Site], index: int, d_sae: int, stack: Hashable) -> None:
        own = sites[index]
        super().__init__(own.d_in, own.d_out, d_sae, settings=JumpReLU())
        self.sites = tuple(sites)
        """Those of all layers of the cross-layer transcoder, lowest first."""
        self.index = index
        """Which of them is this layer."""
        self.stack = stack
        """Tells the layers of one cross-layer transcoder from those of others."""
        for target in self.later:
            self.register_buffer(f"{_LATER}{target}", torch.zeros(d_sae, own.d_out))

    @property
    def later(self) -> range:
        """The later layers, by index, that its features write to besides."""
        return range(self.index + 1, len(self.sites))

    def writes_to(self, target: int) -> Tensor:
        """Return (d_sae, d_out): what the features write to their own layer or a later one, by index."""
        return self.W_dec if target == self.index else self.get_buffer(f"{_LATER}{target}")

    def writes(self, layer: int) -> Tensor | None:
        """Return (d_sae, d_out): what the features write to a layer of the model; None if nothing."""
        targets = [target for target in (self.index, *self.later) if self.sites[target].layer == layer]
        return self.writes_to(targets[0]) if targets else None

    @torch.no_grad()
    def take_writes(self, written: Iterable[Tensor]) -> None:
        """Copy (d_sae, d_out) of what the features write to their own and each later layer."""
        for target, values in zip((self.index, *self.later), written, strict=True):
            self.writes_to(target).copy_(values)


def split_layers(transcoder: CrossLayerTranscoder, sites: Sequence[Site]) -> list[StackedLayer]:
    """Return the layers of a cross-layer transcoder of ``sites``, lowest first; they share its weights."""
    layers = []
    width, stack = transcoder.width_out, transcoder.W_enc.data_ptr()  # of weights that layers keep alive
    for index in range(transcoder.n_layers):
        own = transcoder.of_layer(index)
        with torch.device("meta"):
            layer = StackedLayer(sites, index, transcoder.features_per_layer, stack)
        shared = {name: getattr(transcoder, name)[own] for name in ("W_enc", "b_enc", "log_threshold")}
        shared["b_dec_out"] = transcoder.b_dec_out[index * width : (index + 1) * width]
        shared["W_dec"] = transcoder.writes(index, index)
        for name, values in shared.items():
            setattr(layer, name, nn.Parameter(values.detach(), requires_grad=False))
        for target in layer.later:
            layer.register_buffer(f"{_LATER}{target}", transcoder.writes(index, target).detach())
        layers.append(layer.eval())
    return layers


def load_layers(path: Path | str) -> list[StackedLayer]:
    """Return the layers of a published cross-layer transcoder, lowest first, on the CPU, read one by one.

    Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch or ArtifactCorrupt.
    """
    layers = []
    with open_weights(path) as file:
        for index in range(len(file.sites)):
            layer = StackedLayer(file.sites, index, file.d_sae, file.digest)
            file.fill(layer, index)
            layer.take_writes(file.writes(index, target) for target in (index, *layer.later))
            layers.append(layer.eval().requires_grad_(False))
    return layers


class WeightsFile:
    """Parts of the weights, on the CPU. Layers count from 0 for the transcoder's lowest."""

    def __init__(self, file: Any, sites: list[Site], d_sae: int, digest: str) -> None:
        self._file, self.digest = file, digest
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

    def encoder(self, index: int) -> Tensor:
        """Return (d_sae, d_in): what the features of layer ``index`` read."""
        read: Tensor = self._file.get_slice("W_enc")[index * self.d_sae : (index + 1) * self.d_sae]
        return read

    def writes(self, source: int, target: int) -> Tensor:
        """Return (d_sae, d_out): what features that read layer ``source`` write to layer ``target``, no lower one."""
        d_out = self.sites[target].d_out
        start = (target - source) * d_out
        written: Tensor = self._file.get_slice(f"{DECODER}{source}")[:, start : start + d_out]
        return written

    def summed_writes(self, source: int, targets: Iterable[int]) -> Tensor:
        """Return (d_sae, d_out) float64: the sum of what features that read layer ``source`` write to ``targets``."""
        total = torch.zeros(self.d_sae, self.sites[source].d_out, dtype=torch.float64)
        for target in targets:
            total += self.writes(source, target)
        return total


@contextmanager
def open_weights(path: Path | str) -> Iterator[WeightsFile]:
    """Open the weights at ``path``. Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch or ArtifactCorrupt.

    The last also for what is read inside and is not there.
    """
    path = Path(path)
    manifest = CrossLayerManifest.read(path)
    file = published_file(path, manifest, WEIGHTS)
    with weights_as_described(file), safe_open(file, framework="pt") as opened:
        yield WeightsFile(opened, list(manifest.sites), manifest.d_sae, manifest.digest)


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
        layer.W_dec.copy_(file.summed_writes(index, range(index, len(file.sites))))
    return layer.eval().requires_grad_(False)


def load_cross_layer(path: Path | str, weights: str = WEIGHTS) -> CrossLayerTranscoder:
    """Load a published cross-layer transcoder on the CPU, in evaluation mode; ``weights`` may name a snapshot.

    Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch or ArtifactCorrupt.
    """
    path = Path(path)
    manifest = CrossLayerManifest.read(path)
    first = manifest.sites[0]
    transcoder = CrossLayerTranscoder(len(manifest.sites), first.d_in, first.d_out, manifest.d_sae)
    with weights_as_described(path / weights):
        transcoder.load_state_dict(load_file(published_file(path, manifest, weights, whole=True)))
    return transcoder.eval().requires_grad_(False)


def load_transcoder(path: str | os.PathLike[str], weights: str = WEIGHTS) -> Transcoder:
    """Return a published transcoder of one layer or a cross-layer one, on the CPU, in evaluation mode.

    ``encode`` takes MLP inputs (…, d_in) in the model's own units to activations (…, d_sae), ``decode`` these to MLP
    outputs (…, d_out); a cross-layer one has ``encode_layer``. ``weights`` may name a snapshot. Raises ArtifactError.

    ``tailrace.load_transcoder("transcoders/gpt2").encode(mlp_in)``
    """
    path = home_path(path)
    return load_cross_layer(path, weights) if is_cross_layer(path) else load_of_one_layer(path, weights)
