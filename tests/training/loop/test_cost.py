"""What a run costs: counted by hand, and refused where a GPU cannot hold it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tailrace.storage.errors import OutOfMemoryError
from tailrace.training.loop import cost
from tailrace.training.loop.cost import check_memory, n_parameters, step_seconds, training_bytes
from tailrace.training.loop.settings import TrainSettings

CPU = torch.device("cpu")
SETTINGS = TrainSettings.read({"architecture": {"kind": "topk", "k": 4}, "d_sae": 256, "batch_rows": 64})


def test_parameters_and_bytes_are_those_counted_by_hand() -> None:
    parameters = 256 * 16 + 256 + 256 * 12 + 12  # encoder, its bias, decoder, its bias
    assert n_parameters(SETTINGS, [(16, 12)]) == parameters
    rows = 64 * (16 + 12) * 4 + 64 * 256 * 2
    assert training_bytes(SETTINGS, [(16, 12)], CPU) == 16 * parameters + rows
    averaged = SETTINGS.model_copy(update={"ema": 0.9})
    assert training_bytes(averaged, [(16, 12)], CPU) == 20 * parameters + rows


@pytest.mark.parametrize(
    ("changes", "missing", "shares_rows", "has_gradients"),
    [
        ({}, None, False, False),
        ({}, "no triton", False, True),
        ({}, None, True, True),
        ({"kernel": "dense"}, None, False, True),
        ({"optimiser": "adamw"}, None, False, True),
        ({"gradient_clip": 1.0}, None, False, True),
    ],
)
def test_a_gpu_has_a_copy_of_the_encoder_where_no_gradient_becomes_a_matrix(
    changes: dict[str, Any],
    missing: str | None,
    shares_rows: bool,
    has_gradients: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cost, "missing_for_sparse", lambda device: missing)
    settings = SETTINGS.model_copy(update=changes)
    parameters = 256 * 16 + 256 + 256 * 12 + 12
    state = 16 * parameters if has_gradients else 12 * parameters + 2 * 256 * 16
    found = training_bytes(settings, [(16, 12)], torch.device("cuda", 0), shares_rows=shares_rows)
    assert found == state + 64 * (16 + 12) * 4 + 64 * 256 * 2


def test_a_stack_has_an_activation_of_every_feature_of_every_layer() -> None:
    stack = TrainSettings.read({"cross_layer": True, "d_sae": 32, "batch_rows": 10})
    parameters = n_parameters(stack, [(16, 16)] * 3)
    assert training_bytes(stack, [(16, 16)] * 3, CPU) == 16 * parameters + 10 * (4 * 3 * 32 + 2 * 3 * 32)


def test_a_stack_counts_the_decoders_to_later_layers() -> None:
    stack = TrainSettings.read({"cross_layer": True, "d_sae": 32})
    assert n_parameters(stack, [(16, 16)] * 3) >= 3 * 32 * 16 + 6 * 32 * 16
    assert n_parameters(stack, [(16, 16)] * 3) < 3 * 32 * 16 + 6 * 32 * 16 + 3 * 3 * 32 + 3 * 16 + 1


def test_a_run_too_large_for_a_gpu_is_refused_with_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, run = torch.device("cuda", 1), (SETTINGS, [(16, 12)])
    wanted = training_bytes(*run, gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (wanted, 10 * wanted))
    check_memory([run], gpu)
    with pytest.raises(OutOfMemoryError, match=r"--device cuda:1: the 2 runs .+ d_sae: 256 is too many, 64 fit;"):
        check_memory([run, run], gpu)
    check_memory([run, run], CPU)
    for d_sae, fits in ((64, True), (128, False)):  # a multiple of 64 is advised
        taken = 2 * training_bytes(SETTINGS.model_copy(update={"d_sae": d_sae}), [(16, 12)], gpu)
        assert (taken <= wanted) == fits


def test_gpus_that_share_the_features_need_room_for_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, widths = torch.device("cuda", 0), [(16, 12)]
    free = training_bytes(SETTINGS.model_copy(update={"d_sae": 64}), widths, gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    check_memory([(SETTINGS, widths)], gpu, n_shards=4)
    with pytest.raises(OutOfMemoryError, match=r"d_sae: 256 is too many, 128 fit;"):
        check_memory([(SETTINGS, widths)], gpu, n_shards=2)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_a_step_is_timed(kind: str) -> None:
    settings = TrainSettings.read({"architecture": {"kind": kind}, "d_sae": 256, "batch_rows": 64})
    assert 0 < step_seconds(settings, 16, 12, device=torch.device("cpu"), precision="float32", n_steps=1) < 60
