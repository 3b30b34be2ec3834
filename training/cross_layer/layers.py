"""One layer of a cross-layer transcoder as a transcoder of its own, for what looks at a model layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.architectures.jumprelu import JumpReLU, JumpReLUTranscoder
from training.cross_layer.stack import CrossLayerTranscoder

_LATER = "later_"


class StackedLayer(JumpReLUTranscoder):
    """The features that read one layer. ``W_dec`` is what they write to that layer's own output, of any length.

    What they write to later layers is ``writes``; what earlier layers' features write to this one is not known here,
    so that ``decode`` is a part of the layer's output only.
    """

    def __init__(self, transcoder: CrossLayerTranscoder, place: int, layers: Sequence[int]) -> None:
        super().__init__(transcoder.width_in, transcoder.width_out, transcoder.features_per_layer, settings=JumpReLU())
        own = transcoder.of_layer(place)
        width = transcoder.width_out
        with torch.no_grad():
            self.W_enc.copy_(transcoder.W_enc[own])
            self.b_enc.copy_(transcoder.b_enc[own])
            self.log_threshold.copy_(transcoder.log_threshold[own])
            self.W_dec.copy_(transcoder.writes(place, place))
            self.b_dec_out.copy_(transcoder.b_dec_out[place * width : (place + 1) * width])
        self.layer = layers[place]
        """The model's number of the layer."""
        self.later_layers = tuple(layers[place + 1 :])
        """The layers of the model that its features write to besides."""
        for offset, target in enumerate(self.later_layers, start=1):
            self.register_buffer(f"{_LATER}{target}", transcoder.writes(place, place + offset).detach().clone())

    def writes(self, layer: int) -> Tensor | None:
        """Return (features_per_layer, d_out): what the features write to a layer of the model; None if nothing."""
        if layer == self.layer:
            return self.W_dec
        return self.get_buffer(f"{_LATER}{layer}") if layer in self.later_layers else None


def split_layers(transcoder: CrossLayerTranscoder, layers: Sequence[int]) -> list[StackedLayer]:
    """Return the layers of a cross-layer transcoder, lowest first; ``layers`` are their numbers in the model."""
    return [
        StackedLayer(transcoder, place, layers).to(transcoder.W_enc).eval().requires_grad_(False)
        for place in range(transcoder.n_layers)
    ]
