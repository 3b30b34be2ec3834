"""A cross-layer transcoder in place of the MLPs of a language model, layer by layer as a forward pass reaches them.

What stands in for a layer's MLP is the sum of what the features of that layer and of all earlier ones write to it, so
the parts of one transcoder share what has fired in the pass under way. They are only right together: every layer below
must have been read in the same pass, which ends with the output of the highest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailrace.storage.errors import ModelError
from tailrace.training.cross_layer.stack import CrossLayerTranscoder


class LayerInPlace:
    """One layer's part."""

    def __init__(self, transcoder: CrossLayerTranscoder, layer: int, fired: dict[int, Tensor]) -> None:
        self._transcoder, self._layer, self._fired = transcoder, layer, fired
        self.d_in, self.d_out = transcoder.width_in, transcoder.width_out

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the outputs (…, d_out) of inputs (…, d_in)."""
        return self.decode(self.encode(inputs), inputs)

    def encode(self, inputs: Tensor) -> Tensor:
        """Return the activations (…, features_per_layer) of this layer's features on its inputs (…, d_in)."""
        if self._layer == 0:
            self._fired.clear()
        activations = self._transcoder.encode_layer(self._layer, inputs.to(self._transcoder.W_enc.dtype))
        self._fired[self._layer] = activations
        return activations

    def decode(self, activations: Tensor, inputs: Tensor) -> Tensor:  # noqa: ARG002
        """Return what the features of this and all earlier layers write to this one, and its bias, (…, d_out).

        Raises ModelError if an earlier layer has not been read in this pass.
        """
        missing = [layer for layer in range(self._layer) if layer not in self._fired]
        if missing or any(self._fired[layer].shape[:-1] != activations.shape[:-1] for layer in range(self._layer)):
            raise ModelError(
                f"layer {self._layer} of a cross-layer transcoder was asked for before layers "
                f"{', '.join(map(str, missing)) or 'below'} were read on the same rows; put all its layers in place"
            )
        width = self._transcoder.width_out
        bias = self._transcoder.b_dec_out[self._layer * width : (self._layer + 1) * width]
        outputs = bias.expand(*activations.shape[:-1], -1)
        for layer in range(self._layer):
            outputs = outputs + self._fired[layer] @ self._transcoder.writes(layer, self._layer)
        if self._layer == self._transcoder.n_layers - 1:
            self._fired.clear()  # no one reads them any more, and logits, which come next, are large too
        return torch.add(outputs, activations @ self._transcoder.writes(self._layer, self._layer))


def layers_in_place(transcoder: CrossLayerTranscoder) -> list[LayerInPlace]:
    """Return the parts that stand in for each layer's MLP, lowest first. All of them belong in the same passes."""
    fired: dict[int, Tensor] = {}
    return [LayerInPlace(transcoder, layer, fired) for layer in range(transcoder.n_layers)]
