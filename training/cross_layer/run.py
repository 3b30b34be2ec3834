"""From settings and a cache's statistics to a cross-layer transcoder that is ready for its first batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never, cast

import torch

from tailrace.storage.cache_format import Site
from tailrace.storage.encodings import Side
from tailrace.storage.errors import SettingsError
from tailrace.storage.statistics import SiteStatistics
from tailrace.training.architectures.batch_topk import BatchTopK
from tailrace.training.architectures.jumprelu import JumpReLU
from tailrace.training.architectures.objectives import build_objective
from tailrace.training.architectures.relu import ReLU
from tailrace.training.cross_layer.sparse import SparseStackStep
from tailrace.training.cross_layer.stack import BatchTopKStack, CrossLayerTranscoder, ReLUStack, Stack, fold
from tailrace.training.cross_layer.units import JOINED, JoinedRows, LayerUnits
from tailrace.training.kernels.adaptive import AdaptiveStep, KernelKind
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.kernel import Precision, StepKernel
from tailrace.training.loop.initialise import random_directions
from tailrace.training.loop.optim import build_optimiser
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.loop.weight_average import WeightAverage
from tailrace.training.rows.normalisation import Normalisation, build_normalisation, check_statistics
from tailrace.training.rows.ordinary_rows import OrdinaryRows
from tailrace.training.rows.row_source import RowSource

CrossLayerArchitecture = BatchTopK | JumpReLU | ReLU
"""The architectures whose features fire by a threshold in use, which is what a published stack has."""
_DEFAULTS_ONLY = (
    "auxiliary",
    "resampling",
    "connection",
    "reconstruction",
    "bias_init",
    "bias_init_rows",
    "decoder_init",
    "encoder_init",
)


class CrossLayerRun(TrainingRun):
    """Trains a stack on joined rows, which come normalised."""

    units: LayerUnits

    def folded(self) -> CrossLayerTranscoder:
        """Return the transcoder as it would be published: raw inputs to raw outputs of all layers, on the CPU."""
        return fold(cast("Stack", self.scored), self.units)


@dataclass(frozen=True)
class CrossLayerBuild:
    """A run, and what makes its rows."""

    run: CrossLayerRun
    rows: JoinedRows
    units: LayerUnits
    ordinary: Mapping[str, OrdinaryRows]
    """Limits by site; empty if all rows are learnt from."""


def cross_layer_problems(settings: TrainSettings, sites: Sequence[Site]) -> list[str]:
    """Return a sentence for every setting, and every site, of which no cross-layer transcoder can be made."""
    problems = []
    architecture = settings.architecture
    if not isinstance(architecture, CrossLayerArchitecture):
        problems.append(
            f"architecture: {architecture.kind} features have no threshold in use; a cross-layer transcoder can be "
            "batch_topk, jumprelu or relu"
        )
    if architecture.skip:
        problems.append("architecture.skip: a cross-layer transcoder has no skip path; leave it out")
    if settings.optimiser == "muon":
        problems.append("optimiser: muon would mix encoders of layers that read different inputs; use adam or adamw")
    if settings.kernel == "compiled":
        problems.append("kernel: compiled is for transcoders of one layer; use auto, dense or sparse")
    plain = TrainSettings()
    problems += [
        f"{name}: a cross-layer transcoder is trained with {getattr(plain, name)!r} only; leave it out"
        if isinstance(getattr(plain, name), str | int)
        else f"{name}: is for transcoders of one layer; leave it out"
        for name in _DEFAULTS_ONLY
        if getattr(settings, name) != getattr(plain, name)
    ]
    if len(sites) < 2:
        problems.append(f"a cross-layer transcoder takes at least two layers; got {len(sites)}")
    if len({(site.d_in, site.d_out) for site in sites}) > 1:
        widths = ", ".join(f"{site.name} {site.d_in} to {site.d_out}" for site in sites)
        problems.append(f"layers of one width are wanted; the sites go from {widths}")
    problems += [f"site {site.name}: is an autoencoder's" for site in sites if site.hook_in == site.hook_out]
    if sites:
        problems += architecture.problems(settings.n_features(sites[0].d_in))
    return problems


def build_cross_layer(
    settings: TrainSettings,
    sites: Sequence[Site],
    statistics: Mapping[str, Mapping[Side, SiteStatistics]],
    sources: Mapping[str, RowSource],
    *,
    n_steps: int,
    device: torch.device,
    precision: Precision,
    name: str = "transcoder",
) -> CrossLayerBuild:
    """Return a run with initial weights on ``device``; ``sites`` lowest first, ``statistics`` and ``sources`` by site.

    Raises SettingsError listing every problem of the settings, NonFiniteActivation for activations that cannot be
    learnt from.
    """
    if problems := cross_layer_problems(settings, sites):
        raise SettingsError("no cross-layer transcoder can be made of this:\n" + "\n".join(f"  {p}" for p in problems))
    ordinary: dict[str, OrdinaryRows] = {}
    seen = dict(statistics)
    if settings.max_norm_multiple is not None:
        for site in sites:
            limits = OrdinaryRows.within(settings.max_norm_multiple, statistics[site.name])
            ordinary[site.name] = limits
            seen[site.name] = limits.statistics(site.name, site.sides, limits.draw(sources[site.name]))
    for site in sites:
        check_statistics(site.name, seen[site.name])
    units = LayerUnits(
        [build_normalisation(settings.normalisation, seen[one.name]["in"], seen[one.name]["out"]) for one in sites]
    )
    variances = [
        float(seen[site.name]["out"].variance.sum()) / units.scales_out[layer] ** 2 for layer, site in enumerate(sites)
    ]
    objective = build_objective(settings.reconstruction, sum(variances))
    first = sites[0]
    stack = build_stack(settings, len(sites), first.d_in, first.d_out)
    stack.activation_unit = objective.activation_unit
    initialise_stack(stack, settings, units, seen, sites)
    stack = stack.to(device)
    run = CrossLayerRun(
        stack,
        objective,
        _as_they_are(stack),
        build_stack_kernel(settings.kernel, precision, device, name=name),
        build_optimiser(settings.optimiser, stack, lr=settings.lr, clip=settings.gradient_clip),
        settings.build_schedule(n_steps),
        site=JOINED,
        lr=settings.lr,
        average=None if settings.ema is None else WeightAverage(stack, settings.ema),
        name=name,
    )
    run.units = units
    return CrossLayerBuild(run, JoinedRows(sites, units.to(device, torch.float32), ordinary), units, ordinary)


def build_stack_kernel(kind: KernelKind, precision: Precision, device: torch.device, *, name: str) -> StepKernel:
    """Return the kernel of a run; auto is dense, and sparse not offered, on devices other than the CPU."""
    if kind == "dense" or device.type != "cpu":
        return DenseStep(precision)
    sparse = SparseStackStep(precision)
    return sparse if kind == "sparse" else AdaptiveStep(precision, name=name, sparse=sparse)


def build_stack(settings: TrainSettings, n_layers: int, width_in: int, width_out: int) -> Stack:
    """Return the stack of the settings' architecture with all weights zero."""
    sizes = (n_layers, width_in, width_out, settings.n_features(width_in))
    architecture = cast("CrossLayerArchitecture", settings.architecture)
    match architecture:
        case BatchTopK():
            return BatchTopKStack(*sizes, settings=architecture)
        case JumpReLU():
            return CrossLayerTranscoder(*sizes, settings=architecture)
        case ReLU():
            return ReLUStack(*sizes, settings=architecture)
        case _:
            assert_never(architecture)


@torch.no_grad()
def initialise_stack(
    stack: Stack,
    settings: TrainSettings,
    units: LayerUnits,
    statistics: Mapping[str, Mapping[Side, SiteStatistics]],
    sites: Sequence[Site],
) -> None:
    """Fill the weights: at first every feature writes a random direction to its own layer and nothing to later ones.

    That is a transcoder for each layer, from which a feature learns to reach further where it pays. Encoder rows are
    the same directions, of length ``encoder_scale``, where widths agree. Biases are the mean outputs.
    """
    n_features, width_out = stack.features_per_layer, stack.width_out
    means = []
    for layer, site in enumerate(sites):
        written = random_directions(settings.seed, f"initialise/decoder/{layer}", n_features, width_out)
        stack.decoder(layer)[:, :width_out] = written
        reads = written
        if stack.width_in != width_out:
            reads = random_directions(settings.seed, f"initialise/encoder/{layer}", n_features, stack.width_in)
        stack.W_enc[stack.of_layer(layer)] = reads * settings.encoder_scale
        means.append(units.layers[layer].outputs(torch.from_numpy(statistics[site.name]["out"].mean)))
    stack.b_dec_out.copy_(torch.cat(means))
    stack.initialise_own()


def _as_they_are(stack: Stack) -> Normalisation:
    return Normalisation(torch.zeros(stack.d_in), 1.0, torch.zeros(stack.d_out), 1.0)
