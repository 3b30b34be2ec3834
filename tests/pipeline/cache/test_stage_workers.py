"""Work done in worker processes, one of them killed, gives the bytes of one process."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from tailrace.pipeline.cache import shuffle
from tailrace.pipeline.cache import stage as cache
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.errors import ArtifactCorrupt
from tests.support.cache_jobs import copy_cache, differing, run_cache, settings, small_blocks, tree


def kill_a_worker_after_the_first_unit(path: Path, killed: list[int]) -> None:
    """Kill one worker process as soon as a unit is on disk."""
    while not list(path.glob("commits/0/train-unit-*.json")):
        time.sleep(0.01)
    workers = [
        child
        for child in psutil.Process().children(recursive=True)
        if any("spawn_main" in part for part in child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE
    ]
    workers[0].send_signal(signal.SIGKILL)
    killed.append(workers[0].pid)


@pytest.mark.slow
def test_two_workers_one_of_which_is_killed_write_the_bytes_of_one_process(tmp_path: Path) -> None:
    # 63 units of 8 rows, so that some are left when the worker dies
    small = {"shard_rows": 8, "chunk_rows": 8}
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker_after_the_first_unit, args=(tmp_path / "cache", killed))
    killer.start()
    with small_blocks():
        cache.run(
            settings(**small),
            output=tmp_path / "cache",
            compute=Compute(threads=1, workers=2, quiet=True),
        )
    killer.join()
    assert len(killed) == 1
    run_cache(tmp_path / "expected", **small)
    assert differing(tree(tmp_path / "cache"), tree(tmp_path / "expected")) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "cache"
    run_cache(path)
    return path


def test_workers_materialise_the_order_that_one_process_does(finished: Path, tmp_path: Path) -> None:
    alone, together = (copy_cache(finished, tmp_path / name) for name in ("alone", "together"))
    shuffle.run(alone, epoch=1, compute=Compute(quiet=True))
    shuffle.run(together, epoch=1, compute=Compute(workers=2, quiet=True))
    assert differing(tree(together), tree(alone)) == []


def test_workers_share_the_threads_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert Compute(workers=3).worker_threads == 2
    assert Compute(workers=16).worker_threads == 1
    assert Compute(workers=3, threads=5).worker_threads == 5
    assert Compute(scheduler="tcp://10.0.0.1:8786").worker_threads is None


def test_training_streams_read_a_materialised_epoch_and_get_the_same_rows(finished: Path, tmp_path: Path) -> None:
    path = copy_cache(finished, tmp_path / "cache")
    before = read_epochs(path, "gathered")
    copied = shuffle.run(path, epoch=1, compute=Compute(quiet=True))
    assert copied == path / "epochs/train-generation0-seed0-epoch1"
    assert read_epochs(path, "auto") == before
    for shard in copied.rglob("sites/layer0/in/c/*/0"):  # what is read is the copy
        data = shard.read_bytes()
        shard.write_bytes(bytes(64) + data[64:])
    with pytest.raises(ArtifactCorrupt, match=r"epoch1/sites/layer0/in/c/0/0: checksum is"):
        read_epochs(path, "auto")
    assert read_epochs(path, "gathered") == before


def read_epochs(path: Path, order: str) -> list[bytes]:
    """Return every batch of the epochs 0 and 1."""
    split = open_cache(path).split("train")
    with split.stream(["layer0/in", "token_id"], batch_rows=64, n_epochs=2, order=order) as stream:
        return [b"".join(values.tobytes() for values in batch.arrays.values()) for batch in stream]


def test_materialising_needs_room_only_for_what_is_missing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from tailrace.storage.errors import StorageFull

    path = copy_cache(finished, tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(StorageFull, match="needed for one epoch's order"):
            shuffle.run(path, compute=Compute(quiet=True))
    assert not (path / "epochs").exists()
    copied = shuffle.run(path, compute=Compute(quiet=True))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    assert shuffle.run(path, compute=Compute(quiet=True)) == copied
