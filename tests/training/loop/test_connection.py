"""The sparse-connection loss: its value and gradient, under both kernels, and references that do not fit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tailrace.storage.errors import ArtifactMissing, SettingsError
from tailrace.training.architectures import TopK
from tailrace.training.architectures.base import Trace, Transcoder
from tailrace.training.architectures.objectives import VarianceObjective
from tailrace.training.kernels.dense import DenseStep
from tailrace.training.kernels.sparse import SparseStep
from tailrace.training.loop.connection import ConnectionLoss, build_connection
from tailrace.training.loop.settings import SparseConnection
from tailrace.training.rows.batches import Batch
from tests.support.resampled_runs import D_OUT, build, take_steps
from tests.training.architectures.test_architectures import random_tensor, random_transcoder

WIDTH, N = 3, 7


def alone(batch: Batch) -> Trace:
    """Return the trace of a step of one process, of which the loss looks at nothing else."""
    return Trace(batch.outputs, batch.outputs, {})


def reference(folder: Path, width: int = WIDTH) -> Path:
    path = folder / "reference.safetensors"
    tensors: dict[str, Tensor] = {"W_enc": random_tensor(5, N, width), "W_dec": random_tensor(6, N, width + 1)}
    save_file(tensors, path)
    return path


def direct(transcoder: Transcoder, rows: Tensor, coefficient: float) -> Tensor:
    return coefficient * (rows @ transcoder.W_dec.T).abs().sum(1).mean()


def build_loss(path: Path, coefficient: float = 0.3, d_out: int = WIDTH) -> ConnectionLoss:
    loss = build_connection(SparseConnection(connection_path=path, connection_coefficient=coefficient), d_out)
    assert loss is not None
    return loss


def test_the_value_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    save_file({"W_enc": torch.tensor([[1.0, 0.0], [2.0, -3.0]])}, path)
    transcoder = TopK(k=1).build(2, 2, 2)
    with torch.no_grad():
        transcoder.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    batch = Batch(torch.zeros(1, 2), torch.zeros(1, 2))
    # first row: |1| + |0.6|; second: |2| + |1.2 − 2.4|; mean 2.4, times 0.5
    terms = build_loss(path, 0.5, 2)(transcoder, batch, alone(batch))
    assert float(terms["connection"].detach()) == pytest.approx(1.2)


@pytest.mark.parametrize("block_numbers", [2**24, 20])
def test_sparse_and_dense_steps_add_its_gradient_to_the_decoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_numbers: int
) -> None:
    monkeypatch.setattr("tailrace.training.loop.connection._BLOCK_NUMBERS", block_numbers)
    path, objective = reference(tmp_path), VarianceObjective(2.0)
    rows = random_tensor(5, N, WIDTH)
    batch = Batch(random_tensor(40, 20, 4), random_tensor(41, 20, WIDTH))
    without = random_transcoder(TopK(k=3))
    DenseStep()(without, batch, objective)
    assert without.W_dec.grad is not None
    extra = torch.autograd.grad(direct(without, rows, 0.3), without.W_dec)[0]
    assert float(extra.abs().max()) > 0
    for kernel in (DenseStep(), SparseStep()):
        transcoder = random_transcoder(TopK(k=3))
        for _ in range(2):
            result = kernel(transcoder, batch, objective, [build_loss(path)])
        assert float(result.losses["connection"]) == pytest.approx(float(direct(without, rows, 0.3).detach()))
        assert transcoder.W_dec.grad is not None
        assert torch.allclose(transcoder.W_dec.grad, without.W_dec.grad + extra, atol=1e-12)
        assert transcoder.W_enc.grad is not None
        assert torch.allclose(transcoder.W_enc.grad, without.W_enc.grad, atol=1e-12)  # type: ignore[arg-type]


def test_training_with_it_makes_connections_weaker(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    save_file({"W_enc": random_tensor(7, 6, D_OUT).float()}, path)
    strengths = []
    for connection in (
        {"kind": "none"},
        {"kind": "sparse", "connection_path": str(path), "connection_coefficient": 0.05},
    ):
        run = build({"connection": connection})
        take_steps(run, 60)
        rows = random_tensor(7, 6, D_OUT).float()
        strengths.append(float(direct(run.transcoder, rows, 1.0).detach()))
    assert strengths[1] < 0.8 * strengths[0]


def test_the_file_is_read_at_the_first_step_and_once(tmp_path: Path) -> None:
    path = reference(tmp_path)
    loss = build_loss(path)
    transcoder, batch = random_transcoder(TopK(k=3)), Batch(random_tensor(1, 2, 4), random_tensor(2, 2, WIDTH))
    first = loss(transcoder, batch, alone(batch))["connection"]
    path.unlink()
    again = loss(copy.deepcopy(transcoder), batch, alone(batch))["connection"]
    assert float(first.detach()) == float(again.detach())


def test_a_reference_that_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    path = reference(tmp_path, width=WIDTH + 1)
    with pytest.raises(SettingsError, match=r"W_enc has shape \(7, 4\), wanted \(features, 3\)"):
        build_loss(path)
    with pytest.raises(SettingsError, match=r"Pickled checkpoints \(.pt, .pkl\) are not opened"):
        build_loss(tmp_path / "old.pt")
    with pytest.raises(SettingsError, match="absent: there is nothing at this path; give the directory of a published"):
        build_loss(tmp_path / "absent")
    with pytest.raises(SettingsError, match="there is no such file"):
        build_loss(tmp_path / "none.safetensors")
    broken, half = tmp_path / "broken.safetensors", tmp_path / "half.safetensors"
    broken.write_bytes(b"no tensors at all")
    with pytest.raises(SettingsError, match="cannot be read as safetensors"):
        build_loss(broken)
    save_file({"W_enc": torch.zeros(2, WIDTH)}, half)
    decoder = SparseConnection(connection_path=half, connection_coefficient=1.0, connection_matrix="decoder")
    with pytest.raises(SettingsError, match="holds no W_dec, only W_enc"):
        build_connection(decoder, WIDTH)
    with pytest.raises(ArtifactMissing):
        build_loss(tmp_path)
