"""One layer of a cross-layer transcoder as a transcoder of its own, for what looks at a model layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tailrace.training.architectures.jumprelu import JumpReLU, JumpReLUTranscoder
from tailrace.training.cross_layer.stack import CrossLayerTranscoder
from tailrace.training.cross_layer.weights_file import open_weights

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
    found = []
    width, places = transcoder.width_out, range(transcoder.n_layers)
    for place in places:
        layer = StackedLayer(transcoder.width_in, width, transcoder.features_per_layer, layers[place:])
        layer = layer.to(transcoder.W_enc)
        own = transcoder.of_layer(place)
        for name in ("W_enc", "b_enc", "log_threshold"):
            getattr(layer, name).copy_(getattr(transcoder, name)[own])
        layer.b_dec_out.copy_(transcoder.b_dec_out[place * width : (place + 1) * width])
        layer.take_writes(transcoder.writes(place, target) for target in places[place:])
        found.append(layer.eval().requires_grad_(False))
    return found


def load_layers(path: Path | str, layers: Sequence[int]) -> list[StackedLayer]:
    """Return the same of a published cross-layer transcoder, on the CPU; it is never in memory as a whole besides.

    Raises ArtifactMissing, ArtifactIncomplete, ArtifactMismatch or ArtifactCorrupt.
    """
    found = []
    with open_weights(path) as file:
        for place, site in enumerate(file.sites):
            layer = StackedLayer(site.d_in, site.d_out, file.d_sae, layers[place:])
            file.fill(layer, place)
            layer.take_writes(file.writes(place, target) for target in range(place, len(file.sites)))
            found.append(layer.eval().requires_grad_(False))
    return found
