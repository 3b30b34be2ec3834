"""A peer's rows are handed over as they are, and its weights are scored by the choice it makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.quality_peers import peer_predictor, write_rows

BATCHES = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]]).half()]


def test_rows_are_written_in_their_order(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.npy", BATCHES, 3)
    rows = np.load(tmp_path / "rows.npy")
    assert rows.dtype == np.float32
    assert rows.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="5 rows were to be written and there were 4"):
        write_rows(tmp_path / "rows.npy", BATCHES, 5)


@pytest.mark.parametrize(
    ("kind", "outputs", "n_active"), [("topk", [13.0, 1.0], [1, 0, 0]), ("batch_topk", [13.0, 3.0], [1, 1, 0])]
)
def test_a_peer_is_scored_by_its_own_choice(
    tmp_path: Path, kind: str, outputs: list[float], n_active: list[int]
) -> None:
    weights = {
        "W_enc": torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]),
        "b_enc": torch.tensor([0.0, -1.0, 4.5]),
        "W_dec": torch.tensor([[4.0, 0.0], [0.0, 1.0], [7.0, 7.0]]),
        "b_dec_out": torch.tensor([1.0, 1.0]),
        "threshold": torch.tensor([1.0]),
        "k": torch.tensor([1]),
    }
    save_file(weights, tmp_path / "weights.safetensors")
    # pre-activations 3, 2 and -1.5: TopK with k = 1 keeps the first, the threshold 1 the first two
    found, active = peer_predictor(kind, tmp_path / "weights.safetensors")(torch.tensor([[3.0, 3.0]]))
    assert found.tolist() == [outputs]
    assert active.sum(0).tolist() == n_active
