"""circuit-tracer's cross-layer transcoders: ``config.yaml``, and two files of weights for every layer N from 0 on.

``W_enc_N.safetensors`` holds the encoder, both biases and the thresholds, ``W_dec_N.safetensors`` what its features
write to layers N, N + 1, …, (d_sae, L − N, d_model). The reader counts the encoders to know L, and asks the first of
them alone whether there are thresholds. Nothing says which layers of the model these are: they have to be all of them.

The first decoder read says of how many layers L the transcoder is. Rows are kept as they are: their norm over all
layers need not be 1, and activations stay those that features were described by.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tailrace.analysis.weights.model_weights import ModelWeights
from tailrace.pipeline.formats.circuit_tracer import CONFIG, KEYS, layer_problems, unlike_layers, write_config
from tailrace.pipeline.formats.conversion import folding_problems
from tailrace.pipeline.formats.foreign import jsonable, log_threshold, read_keys, read_tensors, refuse
from tailrace.pipeline.formats.hooks import NORMALISED_IN, STREAM_OUT
from tailrace.pipeline.formats.jump_form import JumpForm
from tailrace.pipeline.formats.subjects import Subject, present
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMismatch, ArtifactMissing, SettingsError
from tailrace.storage.settings import load_yaml
from tailrace.training.architectures import JumpReLU, ReLU
from tailrace.training.architectures.transcoder import write_tensors
from tailrace.training.cross_layer.artifact import is_cross_layer, load_cross_layer, read_cross_layer_manifest
from tailrace.training.cross_layer.stack import CrossLayerTranscoder

FORMAT = "circuit-tracer"
"""The one format that has cross-layer transcoders."""
MODEL_KIND = "cross_layer_transcoder"
"""What the package calls them in a configuration."""

_WEIGHTS = re.compile(r"W_(?:enc|dec)_(\d+)\.safetensors")
_Shapes = dict[str, tuple[int, ...]]


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
    write_config(directory, MODEL_KIND, model_name, hooks, scan, layers[0].model)
    return files


@dataclass(frozen=True)
class ForeignLayers:
    """A cross-layer transcoder of another tool: what its files say besides the weights, which are read by ``load``."""

    folder: Path
    n_layers: int
    d_model: int
    d_sae: int
    """Features that read one layer."""
    has_thresholds: bool
    """Whether it is JumpReLU; else ReLU."""
    hooks: tuple[str, str] | None
    """What it reads and writes in every block; None if the files do not say."""
    model_name: str | None
    facts: dict[str, Any]
    """The configuration, as JSON; for the record only."""

    @property
    def files(self) -> list[Path]:
        """Everything that is read."""
        config = self.folder / CONFIG
        weights = [self.folder / name for layer in range(self.n_layers) for name in _names(layer)]
        return [*([config] if config.is_file() else []), *weights]

    @property
    def architecture(self) -> JumpReLU | ReLU:
        """What it was, as far as its activations go."""
        return JumpReLU() if self.has_thresholds else ReLU(input_bias=False)

    @torch.no_grad()
    def load(self) -> CrossLayerTranscoder:
        """Return the transcoder on the CPU in float32, read a layer at a time.

        Raises ArtifactCorrupt, naming every tensor, for NaN and infinity; ArtifactMismatch for negative thresholds.
        """
        made = CrossLayerTranscoder(self.n_layers, self.d_model, self.d_model, self.d_sae)
        made.log_threshold.fill_(-torch.inf)  # of a threshold of zero, which is ReLU
        broken = []
        for layer in range(self.n_layers):
            encoder, decoder = (self.folder / name for name in _names(layer))
            tensors = {**read_tensors(encoder), **read_tensors(decoder)}
            broken += [name for name, values in tensors.items() if not bool(torch.isfinite(values).all())]
            if broken:
                continue
            own, outputs = made.of_layer(layer), slice(layer * self.d_model, (layer + 1) * self.d_model)
            made.W_enc[own] = tensors[f"W_enc_{layer}"]
            made.b_enc[own] = tensors[f"b_enc_{layer}"]
            made.b_dec_out[outputs] = tensors[f"b_dec_{layer}"]
            made.decoder(layer).copy_(tensors[f"W_dec_{layer}"].flatten(1))
            if self.has_thresholds:
                made.log_threshold[own] = log_threshold(encoder, tensors[f"threshold_{layer}"])
        if broken:
            raise ArtifactCorrupt(f"{self.folder}: {', '.join(broken)} hold NaN or infinity; get the files again")
        return made.eval().requires_grad_(False)


def inspect_folder(folder: Path) -> ForeignLayers:
    """Return what the folder says of itself, without reading weights.

    Raises ArtifactMissing with every file that is not there, ArtifactCorrupt for one that is no safetensors, and
    ArtifactMismatch for what is no cross-layer transcoder, and with every tensor that is missing, unknown or has
    another shape than the others make it.
    """
    config = _read_config(folder)
    numbers = {int(match[1]) for path in folder.iterdir() if (match := _WEIGHTS.fullmatch(path.name))}
    n_layers = max(numbers, default=0) + 1
    names = [name for layer in range(n_layers) for name in _names(layer)]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ArtifactMissing(
            f"{folder}: has no {', '.join(missing)}; a cross-layer transcoder of circuit-tracer has an encoder and a "
            "decoder for every layer from 0 on: get the rest of the files, or check the path"
        )
    shapes = {name: _shapes(folder / name) for name in names}
    first = shapes[_names(0)[0]]
    sizes = [shape[0] for name in ("b_enc_0", "b_dec_0") if len(shape := first.get(name, ())) == 1]
    if len(sizes) < 2:
        raise ArtifactMismatch(
            f"{folder / _names(0)[0]}: holds {_described(first)}; wanted W_enc_0 and the vectors b_enc_0 and b_dec_0, "
            "as circuit-tracer's cross-layer transcoders have them; check --from"
        )
    d_sae, d_model = sizes
    has_thresholds = "threshold_0" in first
    written = shapes[_names(0)[1]].get("W_dec_0", ())
    if len(written) == 3 and written[1] > n_layers:
        raise ArtifactMissing(
            f"{folder}: W_dec_0 writes to {written[1]} layers, the files are of {n_layers}; get those of the others"
        )
    problems = []
    for layer in range(n_layers):
        wanted = _wanted(layer, n_layers, d_sae, d_model, has_thresholds)
        for name, expected in wanted.items():
            problems += _differences(name, shapes[name], expected)
    if problems:
        raise ArtifactMismatch(
            f"{folder}: is no cross-layer transcoder of {n_layers} layers, {d_sae} features each and width {d_model}: "
            f"{'; '.join(problems)}; check --from, or get the files again"
        )
    sides = [config.get(f"feature_{side}_hook") for side in ("input", "output")]
    return ForeignLayers(
        folder=folder,
        n_layers=n_layers,
        d_model=d_model,
        d_sae=d_sae,
        has_thresholds=has_thresholds,
        hooks=None if None in sides else (str(sides[0]), str(sides[1])),
        model_name=config.get("model_name"),
        facts=jsonable(config),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    config = load_yaml(path) if path.is_file() else {}
    if read_keys(path, config, KEYS)["activation"] == "topk":
        refuse(path, ["activation is 'topk'; of a cross-layer transcoder, wanted ReLU or thresholds"])
    if (kind := config.get("model_kind", MODEL_KIND)) != MODEL_KIND:
        raise ArtifactMismatch(
            f"{path}: is a {kind}; of a set of transcoders, give one layer's file, such as "
            f"{folder / 'layer_0.safetensors'}"
        )
    if "transcoders" in config:
        raise ArtifactMismatch(
            f"{path}: lists files of another layout under transcoders (as GemmaScope 2 has); load it with "
            "circuit-tracer, save it with to_safetensors, and import that folder"
        )
    return config


def _names(layer: int) -> tuple[str, str]:
    return f"W_enc_{layer}.safetensors", f"W_dec_{layer}.safetensors"


def _wanted(layer: int, n_layers: int, d_sae: int, d_model: int, has_thresholds: bool) -> dict[str, _Shapes]:
    encoder: _Shapes = {
        f"W_enc_{layer}": (d_sae, d_model),
        f"b_enc_{layer}": (d_sae,),
        f"b_dec_{layer}": (d_model,),
        **({f"threshold_{layer}": (d_sae,)} if has_thresholds else {}),
    }
    return dict(zip(_names(layer), (encoder, {f"W_dec_{layer}": (d_sae, n_layers - layer, d_model)}), strict=True))


def _differences(name: str, found: _Shapes, wanted: _Shapes) -> list[str]:
    missing = [f"{name} has no {tensor}" for tensor in wanted if tensor not in found]
    unknown = [f"{name} holds {tensor}, which would be ignored" for tensor in sorted(found.keys() - wanted.keys())]
    unlike = [
        f"{tensor} has shape {found[tensor]}, wanted {shape}"
        for tensor, shape in wanted.items()
        if tensor in found and found[tensor] != shape
    ]
    return missing + unknown + unlike


def _shapes(path: Path) -> _Shapes:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ArtifactCorrupt(f"{path}: cannot be read as safetensors ({error}); get the file again") from error


def _described(shapes: _Shapes) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items())) or "nothing"
