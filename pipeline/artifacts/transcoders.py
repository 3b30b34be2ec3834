"""Published transcoders as every command sees them: a transcoder has layers, one or several.

A transcoder of one layer has that layer, a cross-layer one several, and a folder stands for the transcoders in it. What
is needed to refuse, to name and to record is read from manifests; weights are loaded when they are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailrace.pipeline.artifacts.folders import Paths, artifacts_inside, as_paths, transcoder_paths
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import ActionableError, ArtifactMismatch, SettingsError, raise_together
from tailrace.storage.formats import TABLES_KIND
from tailrace.storage.tables import TablesManifest
from tailrace.training.architectures.manifest import AnyTranscoderManifest, CrossLayerManifest, read_either_manifest
from tailrace.training.architectures.settings import SelectsLargest
from tailrace.training.architectures.transcoder import Transcoder, load_transcoder
from tailrace.training.cross_layer.layers import load_layers, load_summed_layer, open_weights


@dataclass(frozen=True)
class TranscoderLayer:
    """The features that read one layer. Nothing is loaded; can be hashed and sent to worker processes."""

    path: Path
    """Of the transcoder."""
    site: Site
    index: int | None
    """Which layer of a cross-layer transcoder, from 0 for its lowest; None for a transcoder of one layer."""
    manifest: AnyTranscoderManifest = field(repr=False, compare=False)
    """The transcoder's."""

    def __str__(self) -> str:
        return str(self.path) if self.index is None else f"{self.path}, {self.site.name}"

    @property
    def is_whole(self) -> bool:
        """Whether its features alone are to give its site's outputs."""
        return self.index is None

    @property
    def d_sae(self) -> int:
        """Number of features that read the layer."""
        return self.manifest.d_sae

    @property
    def kind(self) -> str:
        """The kind of its architecture."""
        return self.manifest.architecture.kind

    @property
    def k(self) -> int:
        """Features that fire on one row, of an architecture that chooses them."""
        assert isinstance(self.manifest.architecture, SelectsLargest), "asked where k is a setting"
        return self.manifest.architecture.k

    @property
    def skips(self) -> bool:
        """Whether a path goes past its features."""
        return self.manifest.architecture.skip

    @property
    def is_autoencoder(self) -> bool:
        """Whether it reconstructs its own input."""
        return self.site.hook_in == self.site.hook_out

    @property
    def digest(self) -> str:
        """The transcoder's."""
        return self.manifest.digest

    @property
    def model(self) -> Mapping[str, Any]:
        """Identity of the language model."""
        return self.manifest.model

    @property
    def reference(self) -> dict[str, Any]:
        """What tells the layer from every other, for manifests."""
        return {"digest": self.digest, **({} if self.index is None else {"layer": self.index})}

    @property
    def heldout(self) -> Mapping[str, Any]:
        """What the manifest says of held-out rows at this layer; empty if it was never scored."""
        if isinstance(self.manifest, CrossLayerManifest):
            return next((scores for scores in self.manifest.layers if scores["site"] == self.site.name), {})
        return self.manifest.metrics.heldout

    def load(self) -> Transcoder:
        """Return the features on the CPU. Of a cross-layer transcoder, the decoder is the sum of what they write.

        Raises ArtifactCorrupt if the weights are not what the manifest describes.
        """
        return load_transcoder(self.path) if self.index is None else load_summed_layer(self.path, self.index)

    def load_writes(self) -> Tensor:
        """Return (d_sae, layers, d_out): what features write to their own and, of a cross-layer transcoder, each later
        layer; the errors are those of ``load``.
        """
        if self.index is None:
            return load_transcoder(self.path).W_dec.detach()[:, None]
        with open_weights(self.path) as file:
            return torch.stack([file.writes(self.index, to) for to in range(self.index, len(file.sites))], 1)

    def load_encoder(self) -> Tensor:
        """Return (d_sae, d_in) what the features read; the errors are those of ``load``."""
        if self.index is None:
            return load_transcoder(self.path).W_enc.detach()
        with open_weights(self.path) as file:
            return file.encoder(self.index)


@dataclass(frozen=True, eq=False)
class PublishedTranscoder:
    """A transcoder by what its manifest says."""

    path: Path
    manifest: AnyTranscoderManifest = field(repr=False)

    @property
    def is_cross_layer(self) -> bool:
        """Whether its features write to several layers."""
        return isinstance(self.manifest, CrossLayerManifest)

    @cached_property
    def layers(self) -> tuple[TranscoderLayer, ...]:
        """Its layers, lowest first."""
        return tuple(
            TranscoderLayer(self.path, site, index if self.is_cross_layer else None, self.manifest)
            for index, site in enumerate(self.manifest.sites)
        )

    @property
    def name(self) -> str:
        """Its site's, or those of its lowest and highest layer."""
        first, last = self.layers[0].site.name, self.layers[-1].site.name
        return f"{first} to {last}" if len(self.layers) > 1 else first

    def load(self) -> dict[Site, Transcoder]:
        """Return each layer on the CPU, as ``replaced`` and circuits take it.

        Raises ArtifactCorrupt if the weights are not what the manifest describes.
        """
        sites = [layer.site for layer in self.layers]
        if self.is_cross_layer:
            return dict(zip(sites, load_layers(self.path), strict=True))
        return {sites[0]: load_transcoder(self.path)}


def open_transcoders(paths: Path | Sequence[Path]) -> list[PublishedTranscoder]:
    """Return the transcoders at ``paths``; a folder stands for those in it.

    Raises ArtifactMissing, ArtifactIncomplete or ArtifactMismatch, with the problems of all.
    """
    found: list[PublishedTranscoder] = []
    problems: list[ActionableError] = []
    for path in transcoder_paths(paths):
        try:
            found.append(PublishedTranscoder(path, read_either_manifest(path)))
        except ActionableError as error:
            problems.append(error)
    raise_together(problems)
    return found


def layers_of(transcoders: Sequence[PublishedTranscoder]) -> list[TranscoderLayer]:
    """Return the layers of all transcoders."""
    return [layer for transcoder in transcoders for layer in transcoder.layers]


def layers_by_site(transcoders: Sequence[PublishedTranscoder]) -> dict[str, TranscoderLayer]:
    """Return the layers of all transcoders by their sites' names; raise SettingsError for every site given twice."""
    found: dict[str, TranscoderLayer] = {}
    problems = []
    for layer in layers_of(transcoders):
        if (other := found.setdefault(layer.site.name, layer)) is not layer:
            problems.append(f"{other.path} and {layer.path} are both of site {layer.site.name}; give one of them")
    if problems:
        raise SettingsError("\n".join(problems))
    return found


def load_transcoders(paths: Paths) -> dict[Site, Transcoder]:
    """Return the layers of transcoders by their sites, as ``replaced`` and circuits take them.

    A folder stands for the transcoders in it; of a cross-layer transcoder, all layers have to be in place together.
    Raises SettingsError for two of one site, and ArtifactError.

    ``((site, transcoder),) = tailrace.load_transcoders("transcoders/gpt2").items()``
    """
    transcoders = open_transcoders(as_paths(paths))
    layers_by_site(transcoders)
    return {site: layer for transcoder in transcoders for site, layer in transcoder.load().items()}


def open_tables(tables: Sequence[Path], known: Mapping[int, TranscoderLayer]) -> dict[int, Path]:
    """Return the tables of each of the layers ``known`` by a number.

    The digest alone does not tell the layers of a cross-layer transcoder apart. ``tables`` are tables or folders that
    hold some; of a folder, those of other transcoders are left out. Raises ArtifactMismatch, with every problem, for
    tables of another transcoder, a folder without any that fit, and two of one transcoder or layer.
    """
    layers = {(one.digest, one.site.name): layer for layer, one in known.items()}
    found: dict[int, Path] = {}
    problems = []
    for given in tables:
        inside = artifacts_inside(given, TABLES_KIND)
        fitting = {}
        for path in inside or [given]:
            manifest = TablesManifest.read(path)
            layer = layers.get((manifest.inputs.transcoder.digest, manifest.site.name))
            if layer is not None:
                fitting[path] = layer
        if not fitting:
            which = "the tables inside were" if inside else "was"
            problems.append(
                f"{given}: {which} made from a transcoder that was not given; give the tables of those that were"
            )
        for path, layer in fitting.items():
            if layer in found:
                problems.append(f"{path}: {found[layer]} is of the same transcoder; give one of them")
            found.setdefault(layer, path)
    if problems:
        raise ArtifactMismatch("\n".join(problems))
    return found
