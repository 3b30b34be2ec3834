"""Units counted by several processes give the bytes of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tailrace.pipeline.analyze import stage as analyze
from tailrace.pipeline.analyze.settings import AnalyzeSettings
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage as train
from tailrace.storage.errors import SettingsError
from tailrace.training.architectures import BatchTopK
from tailrace.training.loop.settings import TrainSettings
from tests.support.synthetic_cache import write_synthetic_cache

SETTINGS = AnalyzeSettings(examples=5, window_before=4, window_after=2, block_rows=50, without_model=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("workers")
    cache = write_synthetic_cache(root / "cache", n_heldout_contexts=40)
    assert cache.split("heldout").n_units == 5
    training = TrainSettings(
        architecture=BatchTopK(k=3), d_sae=48, steps=20, batch_rows=64, warmup_steps=1, decay_steps=1, lr=1e-2
    )
    train.run(training, cache=root / "cache", output=root / "transcoder", compute=Compute(threads=1, quiet=True))
    return root


def tables_of(made: Path, name: str, settings: AnalyzeSettings = SETTINGS, workers: int = 0) -> dict[str, bytes]:
    output = made / name
    analyze.run(
        settings,
        cache=made / "cache",
        transcoder=made / "transcoder",
        output=output,
        compute=Compute(workers=workers, threads=1, quiet=True),
    )
    files = sorted(path for path in output.rglob("*") if path.is_file())
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_two_workers_write_the_bytes_of_one_process(made: Path) -> None:
    settings = SETTINGS.model_copy(update={"rows": 500, "activations": 400})  # the last units in part, or not at all
    alone, together = (tables_of(made, str(workers), settings, workers) for workers in (0, 2))
    assert alone == together
    assert {"features.parquet", "coactivation.parquet", "activations/features-000000-000047.parquet"} < alone.keys()


def test_a_number_of_workers_or_threads_that_cannot_be_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"--workers -1, .*0 workers or more"):
        Compute(workers=-1)
    with pytest.raises(SettingsError, match="--threads 0: give at least 1 thread"):
        Compute(threads=0)
