"""circuit-tracer's cross-layer transcoders: ``config.yaml``, and two files of weights for every layer N from 0 on.

``W_enc_N.safetensors`` holds the encoder, both biases and the thresholds, ``W_dec_N.safetensors`` what its features
write to layers N, N + 1, …, (d_sae, L − N, d_model). The reader counts the encoders to know L, and asks the first of
them alone whether there are thresholds. Nothing says which layers of the model these are: they have to be all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tailrace.analysis.weights.model_weights import ModelWeights
from tailrace.pipeline.artifacts.kinds import is_cross_layer
from tailrace.pipeline.formats.circuit_tracer_write import CONFIG, layer_problems, unlike_layers, write_config
from tailrace.pipeline.formats.conversion import folding_problems
from tailrace.pipeline.formats.hooks import NORMALISED_IN, STREAM_OUT
from tailrace.pipeline.formats.jump_form import JumpForm
from tailrace.pipeline.formats.subjects import Subject
from tailrace.pipeline.formats.tensor_files import present, write_tensors
from tailrace.storage.errors import SettingsError
from tailrace.training.cross_layer.artifact import load_cross_layer, read_cross_layer_manifest
from tailrace.training.cross_layer.stack import CrossLayerTranscoder

FORMAT = "circuit-tracer"
"""The one format that has cross-layer transcoders."""
MODEL_KIND = "cross_layer_transcoder"
"""What the package calls them in a configuration."""


@dataclass(frozen=True)
class CrossLayerSubject:
    """A published cross-layer transcoder on its way into circuit-tracer's format."""

    path: Path
    manifest: dict[str, Any]

    def load(self) -> CrossLayerTranscoder:
        """Return the transcoder; the errors are those of ``load_cross_layer``."""
        return load_cross_layer(self.path)

    @property
    def layers(self) -> list[Subject]:
        """Its layers, lowest first, by what the manifest says of each; their weights lie in one file."""
        return [Subject(self.path, {**self.manifest, "site": site}) for site in self.manifest["sites"]]


def open_cross_layer(paths: Sequence[Path], to: str) -> CrossLayerSubject | None:
    """Return the one that is to be exported, by its manifest; None if there is none among ``paths``.

    Raises SettingsError, naming what can hold it, if ``to`` cannot, and if it was given together with others.
    """
    across = [path for path in paths if is_cross_layer(path)]
    if not across:
        return None
    listed = ", ".join(map(str, across))
    problems = []
    if to != FORMAT:
        problems.append(
            f"{listed}: is a cross-layer transcoder, whose features write to several layers; {to} holds one layer at a "
            f"time. circuit-tracer alone can hold it: --to {FORMAT}"
        )
    if len(paths) > 1:
        problems.append(f"{listed}: a cross-layer transcoder is all layers by itself; export it alone")
    if problems:
        raise SettingsError("\n".join(problems))
    return CrossLayerSubject(across[0], read_cross_layer_manifest(across[0]))


def problems(subject: CrossLayerSubject) -> list[str]:
    """Return a sentence for everything that keeps it from being written."""
    layers = subject.layers
    found = [line for one in layers for line in layer_problems(one)]
    covered = [hooks.layer for one in layers if (hooks := one.hooks) is not None]
    n_layers = int(layers[0].model.get("n_layers", len(layers)))
    if len(covered) == len(layers) and covered != list(range(n_layers)):
        found.append(
            f"{subject.path}: is over layers {', '.join(map(str, covered))} of a model that has layers 0 to "
            f"{n_layers - 1}; circuit-tracer replaces the MLP of every layer, and its files cannot say which layers "
            "they are. Train one over all of them: pipeline cache with --layers all, then pipeline train --cross-layer"
        )
    return list(dict.fromkeys(found + unlike_layers(layers)))


@torch.no_grad()
def write(
    directory: Path, subject: CrossLayerSubject, model_name: str, scan: str | None, weights: ModelWeights | None
) -> list[str]:
    """Write a transcoder that has been checked; return the names of the files.

    With the language model's ``weights``, the gain and bias of the norm before each MLP are folded in. Before anything
    is written, raises SettingsError with every reason why that cannot be done.
    """
    layers = subject.layers
    if weights is not None and (found := [line for one in layers for line in folding_problems(one, weights)]):
        raise SettingsError("\n".join(dict.fromkeys(found)))
    transcoder = subject.load()
    thresholds = transcoder.thresholds()
    # No thresholds at all are ReLU to the reader; it has not some layers with and some without.
    has_thresholds = bool((thresholds > 0).any())
    width, files, hooks = transcoder.width_out, [CONFIG], ("", "")
    for number, layer in enumerate(layers):
        own = transcoder.of_layer(number)
        form = JumpForm(
            W_enc=transcoder.W_enc[own],
            b_enc=transcoder.b_enc[own],
            W_dec=transcoder.writes(number, number),
            b_dec=transcoder.b_dec_out[number * width : (number + 1) * width],
            threshold=thresholds[own] if has_thresholds else None,
        )
        hooks = (layer.site["hook_in"], layer.site["hook_out"])
        if weights is not None:
            form = form.before_gain(weights.layers[number].norm_mlp)
            hooks = (f"blocks.{number}.{NORMALISED_IN}", f"blocks.{number}.{STREAM_OUT}")
        encoder = {"W_enc": form.W_enc, "b_enc": form.b_enc, "b_dec": form.b_dec, "threshold": form.threshold}
        decoder = transcoder.decoder(number).view(transcoder.features_per_layer, -1, width)
        for name, tensors in {"W_enc": present(encoder), "W_dec": {"W_dec": decoder}}.items():
            files.append(f"{name}_{number}.safetensors")
            write_tensors(directory / files[-1], {f"{key}_{number}": value for key, value in tensors.items()})
    write_config(directory, MODEL_KIND, model_name, hooks, scan)
    return files
