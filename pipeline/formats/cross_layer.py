"""circuit-tracer's cross-layer transcoders, as they are read; ``tailrace.pipeline.formats.circuit_tracer`` writes them.

The first decoder read says of how many layers L the transcoder is. Nothing says which layers of the model these are.
Rows are kept as they are: their norm over all layers need not be 1, and activations stay those that features were
described by.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tailrace.pipeline.formats.circuit_tracer import CONFIG, CROSS_LAYER, KEYS
from tailrace.pipeline.formats.foreign import ForeignRecord, jsonable, log_threshold, read_keys, read_tensors, refuse
from tailrace.storage.errors import ArtifactCorrupt, ArtifactMismatch, ArtifactMissing
from tailrace.storage.settings import load_yaml
from tailrace.training.architectures import JumpReLU, ReLU
from tailrace.training.cross_layer.stack import CrossLayerTranscoder

_WEIGHTS = re.compile(r"W_(?:enc|dec)_(\d{1,3})\.safetensors")
_Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class ForeignLayers(ForeignRecord):
    """A cross-layer transcoder of another tool: all but its weights, which only ``build`` reads."""

    n_layers: int
    d_model: int
    d_sae: int
    """Features that read one layer."""
    hooks: list[tuple[str, str]] | None
    """What each layer reads and writes, lowest first; None if the files do not say."""

    @property
    def widths(self) -> tuple[int, int]:
        """The model's, on both sides."""
        return self.d_model, self.d_model

    @torch.no_grad()
    def build(self, where: Path) -> CrossLayerTranscoder:
        """Return the transcoder on the CPU in float32, read a layer at a time.

        Raises ArtifactCorrupt, naming every tensor, for NaN and infinity; ArtifactMismatch for negative thresholds.
        """
        made = CrossLayerTranscoder(self.n_layers, self.d_model, self.d_model, self.d_sae)
        made.log_threshold.fill_(-torch.inf)  # of a threshold of zero, which is ReLU
        broken = []
        for layer in range(self.n_layers):
            encoder, decoder = (where / name for name in _names(layer))
            tensors = {**read_tensors(encoder), **read_tensors(decoder)}
            broken += [name for name, values in tensors.items() if not bool(torch.isfinite(values).all())]
            if broken:
                continue
            own, outputs = made.of_layer(layer), slice(layer * self.d_model, (layer + 1) * self.d_model)
            made.W_enc[own] = tensors[f"W_enc_{layer}"]
            made.b_enc[own] = tensors[f"b_enc_{layer}"]
            made.b_dec_out[outputs] = tensors[f"b_dec_{layer}"]
            made.decoder(layer).copy_(tensors[f"W_dec_{layer}"].flatten(1))
            if isinstance(self.architecture, JumpReLU):
                made.log_threshold[own] = log_threshold(encoder, tensors[f"threshold_{layer}"])
        if broken:
            raise ArtifactCorrupt(f"{where}: {', '.join(broken)} hold NaN or infinity; get the files again")
        return made.eval().requires_grad_(False)


def read(folder: Path) -> ForeignLayers:
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
    hooks = [(f"blocks.{layer}.{sides[0]}", f"blocks.{layer}.{sides[1]}") for layer in range(n_layers)]
    return ForeignLayers(
        architecture=JumpReLU() if has_thresholds else ReLU(input_bias=False),
        n_layers=n_layers,
        d_model=d_model,
        d_sae=d_sae,
        hooks=None if None in sides else hooks,
        model_name=config.get("model_name"),
        facts=jsonable(config),
    )


def files(folder: Path) -> list[Path]:
    """Return everything of a folder that is read."""
    return [path for path in folder.iterdir() if path.name == CONFIG or _WEIGHTS.fullmatch(path.name)]


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    config = load_yaml(path) if path.is_file() else {}
    if read_keys(path, config, KEYS)["activation"] == "topk":
        refuse(path, ["activation is 'topk'; of a cross-layer transcoder, wanted ReLU or thresholds"])
    if (kind := config.get("model_kind", CROSS_LAYER)) != CROSS_LAYER:
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
