"""The transcoders to be written in another format: opened together, everything wrong with them told at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.model_weights import ModelWeights
from pipeline.analyze import check_same_site
from pipeline.exports import calibration as calibrations
from pipeline.exports.hooks import MLP_IN, MLP_OUT, NORMALISED_IN, STREAM_OUT, LayerHooks, layer_hooks
from pipeline.exports.jump_form import JumpForm, jump_form, needs_calibration
from storage.activation_cache import ActivationCache, open_cache
from storage.errors import ArtifactMismatch, SettingsError
from training.architectures.base import Transcoder
from training.transcoder import load_transcoder, read_transcoder_manifest


@dataclass(frozen=True)
class Subject:
    """A published transcoder on its way into another format."""

    path: Path
    manifest: dict[str, Any]
    transcoder: Transcoder

    @property
    def site(self) -> dict[str, Any]:
        """The site as the manifest records it."""
        return dict(self.manifest["site"])

    @property
    def model(self) -> dict[str, Any]:
        """The identity of the language model."""
        return dict(self.manifest["model"] or {})

    @property
    def is_raw(self) -> bool:
        """Whether the language model's weights are as published; what is not recorded counts as raw."""
        return bool(self.model.get("processing", "raw") == "raw")

    @property
    def is_autoencoder(self) -> bool:
        """Whether it reconstructs its own input."""
        return bool(self.site["hook_in"] == self.site["hook_out"])

    @property
    def hooks(self) -> LayerHooks | None:
        """Its hooks within their block; None for any other pair."""
        return layer_hooks(self.site)


@dataclass(frozen=True)
class Converted:
    """A subject in the common form, with the hooks it now belongs to and what the conversion did."""

    subject: Subject
    form: JumpForm
    hook_in: str
    hook_out: str
    cost: calibrations.Calibration | None
    """Of thresholds that stand in for k; None where nothing had to."""

    @property
    def layer(self) -> int:
        """The block of both hooks; only for sites that have one."""
        hooks = layer_hooks({"hook_in": self.hook_in, "hook_out": self.hook_out})
        assert hooks is not None
        return hooks.layer


def open_subjects(paths: Sequence[Path]) -> list[Subject]:
    """Load transcoders, the errors being those of ``load_transcoder``. Raises SettingsError if none is given."""
    if not paths:
        raise SettingsError("nothing to export; give the path of at least one transcoder")
    return [Subject(path, read_transcoder_manifest(path), load_transcoder(path)) for path in paths]


def convert(
    subjects: Sequence[Subject],
    *,
    cache: Path | None,
    rows: int,
    weights: ModelWeights | None,
) -> list[Converted]:
    """Bring transcoders into the common form.

    ``cache`` is where TopK's thresholds are calibrated and measured, on ``rows`` rows. With the language
    model's ``weights``, the gain and bias of the norm before the MLP are folded in, so that the input is
    ``ln2.hook_normalized``. Raises SettingsError where
    a cache is needed and missing, ArtifactMismatch for one of another site or model and for what cannot be folded; all
    problems at once.
    """
    problems = [] if weights is None else [line for one in subjects for line in _folding_problems(one, weights)]
    wanting = [str(one.path) for one in subjects if needs_calibration(one.transcoder)]
    if wanting and cache is None:
        problems.append(
            f"{', '.join(wanting)}: TopK has no thresholds, and this format holds nothing else; give --cache, on whose "
            "rows they are chosen and their cost measured"
        )
    if problems:
        raise SettingsError("\n".join(problems))
    opened = None if cache is None else open_cache(cache)
    sites = {} if opened is None else _check_sites(opened, [one for one in subjects if str(one.path) in wanting])
    return [_convert(one, opened, sites.get(one.path), rows, weights) for one in subjects]


def _check_sites(cache: ActivationCache, subjects: Sequence[Subject]) -> dict[Path, str]:
    sites, problems = {}, []
    for one in subjects:
        try:
            sites[one.path] = check_same_site(cache, cache.path, one.manifest, one.path)
        except ArtifactMismatch as error:
            problems.append(str(error))
    if problems:
        raise ArtifactMismatch("\n".join(problems))
    return sites


def _convert(
    subject: Subject, cache: ActivationCache | None, site: str | None, rows: int, weights: ModelWeights | None
) -> Converted:
    cost = None
    if needs_calibration(subject.transcoder):
        assert cache is not None
        assert site is not None
        form, cost = calibrations.calibrate(subject.transcoder, cache, cache.sites[site], rows)
    else:
        form = jump_form(subject.transcoder)
    hook_in, hook_out = subject.site["hook_in"], subject.site["hook_out"]
    hooks = subject.hooks
    if weights is not None:
        assert hooks is not None
        block = f"blocks.{hooks.layer}"
        form = form.before_gain(weights.layers[hooks.layer].norm_mlp)
        hook_in, hook_out = f"{block}.{NORMALISED_IN}", f"{block}.{STREAM_OUT}"
    return Converted(subject, form, hook_in, hook_out, cost)


def _folding_problems(subject: Subject, weights: ModelWeights) -> list[str]:
    hooks = subject.hooks
    if hooks is None or (hooks.input, hooks.output) != (MLP_IN, MLP_OUT):
        return [
            f"{subject.path}: reads {subject.site['hook_in']} and writes {subject.site['hook_out']}; only a transcoder "
            "of blocks.L.mlp.hook_in and blocks.L.mlp.hook_out has a norm to fold in; leave out --fold-norm"
        ]
    if not subject.is_raw:
        return [
            f"{subject.path}: its language model's norms are folded into the weights already; leave out --fold-norm"
        ]
    layer = weights.layers[hooks.layer]
    if layer.norm_mlp.kind == "none":
        return [f"{subject.path}: this model has no norm of its own before the MLP; leave out --fold-norm"]
    if layer.norm_mlp_out.kind != "none":
        return [
            f"{subject.path}: this model has a norm after the MLP, so what is added to the stream is no linear map of "
            "what the transcoder writes; leave out --fold-norm"
        ]
    return []
