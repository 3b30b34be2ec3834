"""Transcoders in the form that other tools can hold, with the norm before the MLP folded in where that is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tailrace.analysis.weights.model_weights import ModelWeights
from tailrace.pipeline.analyze.stage import check_same_site
from tailrace.pipeline.formats import calibration as calibrations
from tailrace.pipeline.formats.hooks import MLP_IN, MLP_OUT, NORMALISED_IN, STREAM_OUT, layer_hooks
from tailrace.pipeline.formats.jump_form import JumpForm, jump_form
from tailrace.pipeline.formats.subjects import Subject
from tailrace.storage.activation_cache import ActivationCache, open_cache
from tailrace.storage.errors import ArtifactMismatch, SettingsError


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


class Written(NamedTuple):
    """What a writer did."""

    files: list[str]
    """Names inside the directory."""
    costs: dict[str, calibrations.Calibration]
    """Of thresholds that stand in for k, by site."""
    notes: Sequence[str] = ()
    """What else a user should read."""


def convert(
    subjects: Sequence[Subject], *, cache: Path | None, rows: int, weights: ModelWeights | None
) -> Iterator[Converted]:
    """Bring transcoders into the common form, each when it is asked for.

    ``cache`` is where TopK's thresholds are calibrated and measured, on ``rows`` rows. With the language model's
    ``weights``, the gain and bias of the norm before the MLP are folded in, so that the input is
    ``ln2.hook_normalized``. Before the first one, raises SettingsError where a cache is needed and missing and for what
    cannot be folded, ArtifactMismatch for a cache of another site or model; all problems at once.
    """
    problems = [] if weights is None else [line for one in subjects for line in folding_problems(one, weights)]
    wanting = [str(one.path) for one in subjects if one.needs_calibration]
    if wanting and cache is None:
        problems.append(
            f"{', '.join(wanting)}: TopK has no thresholds, and this format holds nothing else; give --cache, on whose "
            "rows they are chosen and their cost measured"
        )
    if problems:
        raise SettingsError("\n".join(problems))
    opened = None if cache is None else open_cache(cache)
    sites = {} if opened is None else _check_sites(opened, [one for one in subjects if str(one.path) in wanting])
    for one in subjects:
        yield _convert(one, opened, sites.get(one.path), rows, weights)


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
    transcoder = subject.load()
    if subject.needs_calibration:
        assert cache is not None
        assert site is not None
        form, cost = calibrations.calibrate(transcoder, cache, cache.sites[site], rows)
    else:
        form = jump_form(transcoder)
    hook_in, hook_out = subject.site["hook_in"], subject.site["hook_out"]
    hooks = subject.hooks
    if weights is not None:
        assert hooks is not None
        block = f"blocks.{hooks.layer}"
        form = form.before_gain(weights.layers[hooks.layer].norm_mlp)
        hook_in, hook_out = f"{block}.{NORMALISED_IN}", f"{block}.{STREAM_OUT}"
    return Converted(subject, form, hook_in, hook_out, cost)


def folding_problems(subject: Subject, weights: ModelWeights) -> list[str]:
    """Return a sentence for each reason why the norm before the MLP cannot be folded into this transcoder."""
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
