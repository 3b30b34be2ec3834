"""What training may ask the language model: the loss with a transcoder in place, and its rise row by row."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from tailrace.analysis.evaluate.evaluation import Evaluation, SplicedSite
from tailrace.pipeline.cache.recorded_model import RecordedModel, open_recorded_model, sample_contexts
from tailrace.pipeline.train.loss_hooks import LossIncrease, SplicedLoss
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.errors import NonFiniteActivation, OutOfMemoryError, SettingsError
from tailrace.training.loop.session import PeriodicHook
from tests.support.cache_jobs import CONTEXT_LENGTH, run_cache
from tests.support.spliced_models import random_transcoder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> RecordedModel:
    path = tmp_path_factory.mktemp("cache") / "cache"
    run_cache(path, layers="all")
    return open_recorded_model(open_cache(path))


def test_the_hook_gives_the_numbers_of_an_evaluation_on_the_same_contexts(recorded: RecordedModel) -> None:
    hook: PeriodicHook = SplicedLoss(recorded, ["layer1"], n_contexts=4, contexts_per_batch=3)
    transcoder = random_transcoder()
    split = recorded.cache.split("heldout")
    mean = recorded.cache.split("train").statistics("layer1", "out").mean
    spliced = SplicedSite(recorded.cache.sites["layer1"], transcoder, mean)
    evaluation = Evaluation(recorded.bridge, {"layer1": [spliced]})
    for batch in recorded.batches(split, sample_contexts(split, 4, 0), 3):
        evaluation.add(batch)
    score = evaluation.scores()["layer1"]
    found = hook(100, transcoder)
    expected = {
        "ce_original": score.ce_original,
        "ce_spliced": score.spliced.ce,
        "ce_zero": score.zero.ce,
        **({} if score.ce_recovered is None else {"ce_recovered": score.ce_recovered}),
        "kl": score.spliced.kl,
    }
    assert found == pytest.approx(expected, abs=1e-5)
    other = hook(200, random_transcoder(seed=3))
    assert found is not None
    assert other is not None
    assert other["ce_original"] == found["ce_original"]
    assert other["ce_spliced"] != found["ce_spliced"]
    assert hook(300, transcoder) == found


def test_the_original_and_the_ablated_model_run_once(recorded: RecordedModel) -> None:
    hook = SplicedLoss(recorded, ["layer0"], n_contexts=4, contexts_per_batch=2)
    calls: list[int] = []
    handle = recorded.bridge.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        hook(1, random_transcoder())
    finally:
        handle.remove()
    assert len(calls) == 2


def test_training_goes_on_as_if_nothing_had_been_asked(recorded: RecordedModel) -> None:
    transcoder = random_transcoder().train().requires_grad_(True)
    before = copy.deepcopy(transcoder.state_dict())
    SplicedLoss(recorded, ["layer0"], n_contexts=2)(1, transcoder)
    LossIncrease(recorded, ["layer0"])(transcoder, np.array([0]), np.array([1]))
    assert transcoder.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in transcoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in transcoder.state_dict().items())
    transcoder(torch.ones(1, 16)).sum().backward()  # no inference tensor has got into its weights
    assert not any(point.has_hooks() for point in recorded.bridge.hook_dict.values())


def deltas_of(recorded: RecordedModel, transcoder, contexts: np.ndarray) -> np.ndarray:
    """(contexts, positions − 1), the model's losses with and without the transcoder subtracted token by token."""
    split = recorded.cache.split("train")
    spliced = SplicedSite(recorded.cache.sites["layer0"], transcoder, np.zeros(16))
    (found,) = Evaluation(recorded.bridge, {"layer0": [spliced]}).add(recorded.batch(split, contexts))
    return (found.ce_spliced - found.ce_original).reshape(len(contexts), -1)


def test_rows_are_scored_by_their_own_loss_not_by_its_distance_from_a_mean(recorded: RecordedModel) -> None:
    # the reference subtracted losses per token from a mean over the batch, which favours tokens that are easy anyway
    transcoder = random_transcoder(seed=1)
    contexts = np.array([9, 2, 9, 30, 2, 2])
    positions = np.array([3, 14, 1, 7, 4, 4])
    deltas = deltas_of(recorded, transcoder, np.arange(34))
    found = LossIncrease(recorded, ["layer0"], contexts_per_batch=2)(transcoder, contexts, positions)
    assert found.dtype == np.float64
    assert found == pytest.approx(np.maximum(deltas[contexts, positions], 0), abs=1e-5)


def test_falls_in_loss_score_zero_and_so_does_the_last_position(recorded: RecordedModel) -> None:
    transcoder = random_transcoder(seed=2)
    contexts = np.repeat(np.arange(34), CONTEXT_LENGTH)
    positions = np.tile(np.arange(CONTEXT_LENGTH), 34)
    scores = LossIncrease(recorded, ["layer0"])(transcoder, contexts, positions).reshape(34, CONTEXT_LENGTH)
    deltas = deltas_of(recorded, transcoder, np.arange(34))
    fell, rose = deltas < -1e-3, deltas > 1e-3
    assert fell.sum() > 20
    assert rose.sum() > 20
    assert not scores[:, :-1][fell].any()
    assert (scores[:, :-1][rose] > 0).all()
    assert not scores[:, -1].any()
    assert not scores[:, 0].any()  # at the BOS nothing has been replaced yet


def test_no_rows_have_no_scores(recorded: RecordedModel) -> None:
    none = np.array([], np.int64)
    assert LossIncrease(recorded, ["layer0"])(random_transcoder(), none, none).shape == (0,)


def test_rows_that_the_split_cannot_have_are_refused_together(recorded: RecordedModel) -> None:
    scorer = LossIncrease(recorded, ["layer0"])
    with pytest.raises(SettingsError) as caught:
        scorer(random_transcoder(), np.array([0, 99]), np.array([-1, 3]))
    assert "contexts reach from 0 to 99, the training split has 0 to 33" in str(caught.value)
    assert "positions reach from -1 to 3, the training split has 0 to 15" in str(caught.value)
    with pytest.raises(SettingsError, match="wanted two vectors of one length"):
        scorer(random_transcoder(), np.array([0, 1]), np.array([1]))


def test_a_transcoder_that_overflows_is_refused_by_both(recorded: RecordedModel) -> None:
    broken = random_transcoder()
    broken.b_dec_out.fill_(float("inf"))
    hook = SplicedLoss(recorded, ["layer0"], n_contexts=2)
    with pytest.raises(NonFiniteActivation, match=r"layer0: the loss of context \d+ is not finite"):
        hook(1, broken)
    with pytest.raises(NonFiniteActivation, match="layer0: the loss of context 5 is not finite"):
        LossIncrease(recorded, ["layer0"])(broken, np.array([5]), np.array([3]))


def test_a_site_that_the_cache_lacks_is_refused(recorded: RecordedModel) -> None:
    for make in (SplicedLoss, LossIncrease):
        with pytest.raises(SettingsError, match="has no site 'layer9', only layer0, layer1"):
            make(recorded, ["layer9"])


def test_running_out_of_memory_names_the_batch_to_try(recorded: RecordedModel) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = SplicedLoss(recorded, ["layer0"], n_contexts=2, contexts_per_batch=2)
    handle = recorded.bridge.blocks[0].register_forward_pre_hook(fail)
    try:
        with pytest.raises(OutOfMemoryError, match=r"try a batch of 1 \(--contexts-per-batch\)"):
            hook(1, random_transcoder())
    finally:
        handle.remove()


def test_hooks_are_made_from_a_cache_path_that_moved(recorded: RecordedModel, tmp_path: Path) -> None:
    link = tmp_path / "moved"
    link.symlink_to(recorded.cache.path)
    again = open_recorded_model(open_cache(link))
    numbers = [SplicedLoss(one, ["layer0"], n_contexts=2)(1, random_transcoder()) for one in (recorded, again)]
    assert numbers[0] == numbers[1]
