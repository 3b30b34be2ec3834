"""Resampled features: which, from which rows, with which weights; everything else stays as it was."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tailrace.storage.errors import NonFiniteActivation, SettingsError
from tailrace.training.dead_features.resampling.resampler import PeriodicResampler, draw_distinct, draw_repeated
from tailrace.training.loop.run import TrainingRun
from tailrace.training.loop.settings import TrainSettings
from tailrace.training.rows.normalisation import Normalisation
from tailrace.training.rows.row_source import SampledRows
from tests.support.quick import quick
from tests.support.resampled_runs import D_IN, SAE_SITE, PlantedSource, build, kill, take_steps
from tests.training.architectures.test_architectures import SMALL

ANTHROPIC = {"kind": "anthropic", "resample_every": 10, "resample_window": 5, "resample_rows": 300}
L2 = {**ANTHROPIC, "kind": "l2"}
DEAD = list(range(6))


def run_to(n_steps: int, resampling: dict[str, Any], source: PlantedSource | None = None, **settings: Any) -> Any:
    """Return a run whose first features were dead from the start, and its source, after ``n_steps``."""
    source = source or PlantedSource()
    scorer, site = settings.pop("scorer", None), settings.pop("site", source.site)
    offset = source.offset
    run = build({"resampling": resampling, **settings}, site=site, row_source=source, row_scorer=scorer, offset=offset)
    kill(run, len(DEAD))
    take_steps(run, n_steps, offset=offset)
    return run, source


def weights(run: TrainingRun) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in run.transcoder.named_parameters()}


@pytest.mark.parametrize("resampling", [ANTHROPIC, L2], ids=["anthropic", "l2"])
@pytest.mark.parametrize("site", [None, SAE_SITE], ids=["transcoder", "autoencoder"])
def test_dead_features_and_no_others_are_replaced(resampling: dict[str, Any], site: Any) -> None:
    source = PlantedSource() if site is None else PlantedSource(site)
    never, _ = run_to(10, {"kind": "none"}, source)
    run, _ = run_to(10, resampling, source)
    before, after = weights(never), weights(run)
    alive = list(range(len(DEAD), 32))
    for name in ("W_enc", "b_enc", "W_dec"):
        assert torch.equal(before[name][alive], after[name][alive]), name
        changed = (before[name][DEAD] != after[name][DEAD]).reshape(len(DEAD), -1).any(1)
        assert bool(changed.all()), name
    assert torch.equal(before["b_dec_out"], after["b_dec_out"])
    assert run.latest_extras == {"resampled_features": len(DEAD)}
    assert not bool(run.firing.steps_since_fired[DEAD].any())


def test_encoder_rows_are_a_share_of_the_living_ones_length_and_biases_zero() -> None:
    run, _ = run_to(10, {**ANTHROPIC, "resample_scale": 0.3})
    norms = torch.linalg.vector_norm(run.transcoder.W_enc.detach(), dim=1)
    living = norms[len(DEAD) :].mean()
    assert torch.allclose(norms[DEAD], 0.3 * living.expand(len(DEAD)), rtol=1e-5)
    assert torch.equal(run.transcoder.b_enc.detach()[DEAD], torch.zeros(len(DEAD)))


def test_a_feature_reads_its_rows_centred_input_and_writes_that_rows_output_error() -> None:
    source = PlantedSource(n_rows=1, offset=4.0)
    resampling = {**ANTHROPIC, "resample_rows": 1}
    never, _ = run_to(10, {"kind": "none"}, source, normalisation="none")
    run, _ = run_to(10, resampling, source, normalisation="none")
    row = source(1, 10).batch
    sample = build({}, offset=4.0)  # only for its statistics, which are those of every run here
    assert isinstance(sample.normalisation, Normalisation)
    mean_in = sample.normalisation.mean_in.float()
    error = (row.outputs - never.transcoder(row.inputs)).detach()[0]
    centred = row.inputs[0] - mean_in
    found = run.transcoder
    assert torch.allclose(found.W_dec[0], error / error.norm(), atol=1e-5)
    assert torch.allclose(found.W_enc[0] / found.W_enc[0].norm(), centred / centred.norm(), atol=1e-5)
    # about the centre the bias is zero: an input at the mean gives no activation
    assert float((found.W_enc[0] @ mean_in + found.b_enc[0]).detach()) == pytest.approx(0, abs=1e-4)


def test_an_input_bias_is_what_inputs_are_centred_by() -> None:
    source = PlantedSource(n_rows=1, offset=4.0)
    run, _ = run_to(
        10,
        {**ANTHROPIC, "resample_rows": 1},
        source,
        normalisation="none",
        architecture={"kind": "relu", "l1": 0.01, "input_bias": True},
    )
    assert run.transcoder.b_dec is not None
    centred = (source(1, 10).batch.inputs[0] - run.transcoder.b_dec).detach()
    row = run.transcoder.W_enc[0].detach()
    assert torch.allclose(row / row.norm(), centred / centred.norm(), atol=1e-5)
    assert float(run.transcoder.b_enc[0].detach()) == 0.0


def test_the_published_decoder_of_an_autoencoder_is_its_encoders_direction() -> None:
    run, _ = run_to(10, {**ANTHROPIC, "resample_decoder": "target"}, PlantedSource(SAE_SITE))
    encoder, decoder = run.transcoder.W_enc.detach()[DEAD], run.transcoder.W_dec.detach()[DEAD]
    assert torch.allclose(encoder / encoder.norm(dim=1, keepdim=True), decoder, atol=1e-5)
    assert len({tuple(row.tolist()) for row in decoder}) == len(DEAD), "drawn without replacement"


@pytest.mark.parametrize("architecture", SMALL)
def test_every_architecture_can_be_resampled_and_goes_on(architecture: str) -> None:
    run, _ = run_to(10, ANTHROPIC, architecture=SMALL[architecture].model_dump())
    assert torch.allclose(torch.linalg.vector_norm(run.transcoder.W_dec.detach(), dim=1), torch.ones(32), atol=1e-5)
    own = dict(run.transcoder.named_parameters())
    first = dict(build({"architecture": SMALL[architecture].model_dump()}).transcoder.named_parameters())
    for name in own.keys() & {"log_threshold", "r_mag", "b_mag"}:
        assert torch.equal(own[name][DEAD], first[name][DEAD]), name
        assert not torch.equal(own[name], first[name]), "those of other features were learnt"
    take_steps(run, 3)
    assert math.isfinite(float(run.latest.losses["loss"]))


@pytest.mark.parametrize("optimiser", ["adam", "adamw", "muon"])
def test_moments_are_reset_for_resampled_features_only(optimiser: str) -> None:
    # d_sae equals d_in here, so that a bias or a skip matrix could be taken for a parameter of features
    settings = {"optimiser": optimiser, "d_sae": D_IN, "site": SAE_SITE, "architecture": {"kind": "relu", "l1": 0.01}}
    source = PlantedSource(SAE_SITE)
    never, _ = run_to(10, {"kind": "none"}, source, **dict(settings))
    run, _ = run_to(10, ANTHROPIC, source, **dict(settings))
    before, after = never.optimiser.state_tensors(), run.optimiser.state_tensors()
    assert before.keys() == after.keys()
    n_reset = 0
    for name, value in after.items():
        if name.endswith(("W_enc", "b_enc", "W_dec")) and value.ndim:
            assert not bool(value[DEAD].any()), name
            assert torch.equal(value[len(DEAD) :], before[name][len(DEAD) :]), name
            n_reset += 1
        else:
            assert torch.equal(value, before[name]), name
    assert n_reset == {"adam": 6, "adamw": 6, "muon": 4}[optimiser]


def test_an_average_of_weights_takes_resampled_features_as_they_are() -> None:
    run, _ = run_to(10, ANTHROPIC, ema=0.9)
    for name in ("W_enc", "b_enc", "W_dec"):
        own, averaged = getattr(run.transcoder, name), getattr(run.scored, name)
        assert torch.equal(own[DEAD], averaged[DEAD]), name
        assert not torch.equal(own[len(DEAD) :], averaged[len(DEAD) :]), name


def test_dead_is_counted_in_the_resamplings_own_window_alone() -> None:
    # features that fire until step 5 and not in the window of steps 6 to 10 are dead, others that begin in it are not
    run, source = run_to(0, ANTHROPIC)
    run.transcoder.b_enc.data[:6] = 0
    take_steps(run, 5)
    kill(run, 3)
    before = weights(run)
    with torch.no_grad():
        run.transcoder.b_enc[:] = torch.where(torch.arange(32) < 3, -20.0, 0.0)
    take_steps(run, 5)
    assert run.latest_extras == {"resampled_features": 3}
    assert source.asked == [(300, 10)]
    assert not torch.equal(before["W_dec"][:3], weights(run)["W_dec"][:3])


def resampler_of(run: TrainingRun) -> PeriodicResampler:
    resampler = run._resampler
    assert isinstance(resampler, PeriodicResampler)
    return resampler


def test_by_frequency_a_feature_is_dead_below_its_share_of_the_windows_rows() -> None:
    run, _ = run_to(9, {**ANTHROPIC, "resample_dead_by": "frequency", "resample_threshold": 0.01})
    resampler = resampler_of(run)
    # 4 of the 5 steps of the window, of 128 rows each: below 5.12
    resampler._n_fired = torch.tensor([0, 5, 6] + [512] * 29)
    assert resampler.dead().tolist() == [0, 1]
    assert resampler._rows_counted == 512


def test_rows_are_drawn_in_proportion_to_the_squared_loss() -> None:
    rng = np.random.Generator(np.random.Philox(5))
    drawn = np.bincount([draw_distinct(rng, np.array([0.0, 1.0, 3.0, 4.0]), 1)[0] for _ in range(4000)], minlength=4)
    # three standard deviations of a share of 4000 draws are at most 0.024
    assert np.allclose(drawn / 4000, [0, 0.125, 0.375, 0.5], atol=0.024)
    assert drawn[0] == 0
    repeated = np.bincount(draw_repeated(rng, np.array([0.0, 1.0, 3.0, 4.0]), 4000), minlength=4)
    assert np.allclose(repeated / 4000, [0, 0.125, 0.375, 0.5], atol=0.024)
    assert repeated[0] == 0


def test_drawing_without_replacement_takes_no_row_twice_and_no_row_without_weight() -> None:
    # the original raised here: fewer rows with a weight than draws
    rng = np.random.Generator(np.random.Philox(6))
    assert sorted(draw_distinct(rng, np.array([0.0, 1e-100, 2.0, 0.0, 1e100]), 9).tolist()) == [1, 2, 4]


def test_rows_without_any_weight_are_equally_likely() -> None:
    # the original divided zero by zero here
    rng = np.random.Generator(np.random.Philox(7))
    assert sorted(draw_distinct(rng, np.zeros(5), 9).tolist()) == [0, 1, 2, 3, 4]
    assert set(draw_repeated(rng, np.zeros(5), 200).tolist()) == {0, 1, 2, 3, 4}


def test_with_fewer_rows_than_dead_features_the_others_wait() -> None:
    run, _ = run_to(10, ANTHROPIC, PlantedSource(n_rows=4))
    assert run.latest_extras == {"resampled_features": 4}
    assert (run.transcoder.b_enc < -19).nonzero().squeeze(1).tolist() == [4, 5]
    take_steps(run, 10)
    assert not bool((run.transcoder.b_enc < -19).any())


def test_l2_leaves_features_alone_where_every_row_is_reconstructed() -> None:
    run, _ = run_to(9, L2)
    resampler = resampler_of(run)
    rng = np.random.Generator(np.random.Philox(8))
    assert len(resampler.choose(rng, np.full(4, 1e-13), 3)) == 0
    assert len(resampler.choose(rng, np.full(4, 1e-11), 9)) == 9, "with replacement"


def test_by_model_loss_the_scorer_decides_and_gets_the_transcoder_as_it_would_be_published() -> None:
    seen: list[tuple[Any, np.ndarray, np.ndarray]] = []

    def scorer(transcoder: Any, contexts: np.ndarray, positions: np.ndarray, /) -> np.ndarray:
        seen.append((transcoder, contexts, positions))
        scores = np.full(len(contexts), -1.0)
        scores[[17, 40]] = [2.0, 1.0]
        return scores

    run, source = run_to(10, {**ANTHROPIC, "resample_by": "model_loss"}, scorer=scorer)
    ((transcoder, contexts, positions),) = seen
    assert (contexts[17], positions[17]) == (2, 1)
    assert transcoder.b_dec is None
    # only two rows have a positive score; the encoder rows read these
    assert run.latest_extras == {"resampled_features": 2}
    rows = run.on_device.apply(source(300, 10).batch).inputs[[17, 40]]
    wanted = rows / rows.norm(dim=1, keepdim=True)
    found = run.transcoder.W_enc.detach()[:2]
    found = found / found.norm(dim=1, keepdim=True)
    assert torch.allclose((found @ wanted.T).max(1).values, torch.ones(2), atol=1e-5)


def test_a_score_that_is_no_number_stops_the_run() -> None:
    with pytest.raises(NonFiniteActivation, match="resampling at step 10, 300 of 300 sampled rows"):
        run_to(10, {**ANTHROPIC, "resample_by": "model_loss"}, scorer=lambda _, c, p: np.full(len(c), np.nan))


def test_learning_rate_rises_after_a_resampling_on_top_of_a_schedule_that_goes_on() -> None:
    settings = {"lr": 1.0, "schedule": "cosine", "final_lr": 0.0}
    plain = build(settings, n_steps=40)
    run = build(
        {**settings, "resampling": {**ANTHROPIC, "resample_ramp_steps": 4}}, n_steps=40, row_source=PlantedSource()
    )
    run.lr = plain.lr = 1e-3
    kill(run, 2)
    rates, factors = [], []
    for step in range(20):
        factors.append(plain.lr * plain.schedule.factor(step))
        rates.append(run.current_lr)
        take_steps(run, 1)
    ratios = np.array(rates) / np.array(factors)
    assert ratios[:16] == pytest.approx([1.0] * 10 + [0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_nothing_is_resampled_late_or_where_nothing_is_dead() -> None:
    run, source = run_to(0, {**ANTHROPIC, "resample_until": 0.5})
    run = build({"resampling": {**ANTHROPIC, "resample_until": 0.5}}, n_steps=40, row_source=source)
    kill(run, 2)
    take_steps(run, 10)
    run.transcoder.b_enc.data.zero_()
    run.transcoder.W_enc.data.normal_(generator=torch.Generator().manual_seed(1))
    take_steps(run, 10)
    kill(run, 2)
    take_steps(run, 20)
    assert [step for _, step in source.asked] == [10]
    assert bool((run.transcoder.b_enc[:2] < -19).all())


@pytest.mark.parametrize("stop", [3, 7, 10, 12, 26])
@pytest.mark.parametrize("resampling", [ANTHROPIC, L2], ids=["anthropic", "l2"])
def test_resampled_and_resumed_is_uninterrupted_bit_for_bit(resampling: dict[str, Any], stop: int) -> None:
    def begin() -> TrainingRun:
        settings = {"resampling": resampling, "ema": 0.9, "auxiliary": {"kind": "auxk"}}
        run = build(settings, row_source=PlantedSource())
        kill(run, len(DEAD))
        return run

    whole = begin()
    take_steps(whole, 30)
    first, second = begin(), begin()
    take_steps(first, stop)
    tensors = {name: value.clone() for name, value in first.state_tensors().items()}
    second.load_state(tensors, first.state(), n_steps_done=stop, n_rows_done=first.n_rows_done)
    take_steps(second, 30 - stop)
    wanted, found = whole.state_tensors(), second.state_tensors()
    assert whole.latest_extras["resampled_features"] >= len(DEAD)
    assert whole.latest_extras == second.latest_extras
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


REVIVALS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "ghost": {"auxiliary": {"kind": "ghost"}},
    "elementwise ghost": {"auxiliary": {"kind": "ghost", "ghost_rescale": "elementwise"}},
    "auxk": {"auxiliary": {"kind": "auxk", "aux_k": 6}},
    "anthropic": {"resampling": {**ANTHROPIC, "resample_ramp_steps": 5}},
    "l2": {"resampling": {**L2, "resample_ramp_steps": 5}},
}


@pytest.mark.parametrize("kernel", quick(["dense", "sparse"], "sparse"))
@pytest.mark.parametrize(
    ("method", "fewest", "most"),
    [
        ("nothing", 24, 24),
        # of few features whose sum points away from the residual, ghost gradients lower the pre-activations
        ("ghost", 0, 16),
        ("elementwise ghost", 0, 0),
        ("auxk", 0, 0),
        ("anthropic", 0, 0),
        ("l2", 0, 0),
    ],
)
def test_planted_dead_features_come_back_with_every_method_and_not_without(
    method: str, fewest: int, most: int, kernel: str
) -> None:
    settings = {"kernel": kernel, "architecture": {"kind": "relu", "l1": 0.05}, "lr": 0.02, **REVIVALS[method]}
    run = build(settings, n_steps=300, row_source=PlantedSource())
    kill(run, 24, bias=-6.0)
    take_steps(run, 240)
    assert fewest <= int(run.firing.dead(50)[:24].sum()) <= most


def test_resampling_needs_a_source_of_rows_and_by_model_loss_a_scorer() -> None:
    with pytest.raises(SettingsError, match="resampling: l2 takes new features from training rows"):
        build({"resampling": L2})
    with pytest.raises(SettingsError, match="resample_by: model_loss needs the language model"):
        build({"resampling": {**ANTHROPIC, "resample_by": "model_loss"}}, row_source=PlantedSource())

    def without_places(n_rows: int, step: int) -> SampledRows:
        return PlantedSource()(n_rows, step)._replace(context=None)

    run = build(
        {"resampling": {**ANTHROPIC, "resample_by": "model_loss"}},
        row_source=without_places,
        row_scorer=lambda _, c, p: np.ones(len(c)),
    )
    kill(run, 2)
    with pytest.raises(SettingsError, match="needs to know the context and position of every row"):
        take_steps(run, 10)


def test_a_window_longer_than_the_time_between_resamplings_is_refused() -> None:
    with pytest.raises(SettingsError, match="resample_window = 11 does not fit between resamplings 10 steps apart"):
        TrainSettings.read({"resampling": {**ANTHROPIC, "resample_window": 11}})
