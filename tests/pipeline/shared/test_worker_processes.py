"""Worker processes: nothing listens for them, a lost one is replaced, and all of them end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from tailrace.pipeline.cache import shuffle
from tailrace.pipeline.shared import compute
from tailrace.pipeline.shared.compute import Compute, device_of_worker
from tailrace.pipeline.shared.worker_processes import completed, open_workers, worker_number
from tailrace.storage.errors import SettingsError, WorkerLostError
from tests.support.cache_jobs import run_cache
from tests.support.paths import ROOT

PARENT = """
import signal, time
from tailrace.pipeline.shared.worker_processes import completed, open_workers

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    with open_workers(2) as submit:
        for _ in completed(submit, time.sleep, [(0,), (600,), (600,), (600,)]):
            print("working", flush=True)
"""


def watch_ports(of: psutil.Process, workers: set[int], ports: set[str], stop: threading.Event) -> None:
    """Collect the workers of a process, and what it and they listen on, until told to stop."""
    while not stop.wait(0.01):
        for process in (of, *of.children(recursive=True)):
            try:
                workers |= {process.pid} if any("spawn_main" in part for part in process.cmdline()) else set()
                ports |= {str(one.laddr) for one in process.net_connections() if one.status == psutil.CONN_LISTEN}
            except psutil.NoSuchProcess:
                continue


def test_nothing_listens_while_workers_run(tmp_path: Path) -> None:
    run_cache(tmp_path / "cache")
    workers: set[int] = set()
    ports: set[str] = set()
    stop = threading.Event()
    watcher = threading.Thread(target=watch_ports, args=(psutil.Process(), workers, ports, stop))
    watcher.start()
    shuffle.run(tmp_path / "cache", compute=Compute(workers=2, quiet=True))
    stop.set()
    watcher.join()
    assert len(workers) == 2
    assert ports == set()


@pytest.mark.slow
def test_no_command_listens(tmp_path: Path) -> None:
    """Every command that makes an artifact, as the recipe of the golden bytes runs them; `serve` alone listens."""
    make = "import pathlib, sys, tests.released.golden as golden; golden.make_outputs(pathlib.Path(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", make, str(tmp_path / "made")], cwd=ROOT)
    ports: set[str] = set()
    stop = threading.Event()
    watcher = threading.Thread(target=watch_ports, args=(psutil.Process(process.pid), set(), ports, stop))
    watcher.start()
    code = process.wait()
    stop.set()
    watcher.join()
    assert (code, ports) == (0, set())


def test_a_task_that_costs_every_worker_it_gets_ends_as_one_sentence() -> None:
    with (
        pytest.raises(WorkerLostError, match=r"3 worker processes in a row .*code 1.*__main__"),
        open_workers(1) as submit,
    ):
        submit(os._exit, 1).result()
    with pytest.raises(WorkerLostError, match="memory runs out: use fewer workers"), open_workers(1) as submit:
        submit(signal.raise_signal, signal.SIGKILL).result()


class TwoArguments(Exception):
    """Pickles, and cannot be unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one)


def fail(how: str) -> None:
    if how == "unpicklable":
        raise TwoArguments(1, 2)
    raise KeyboardInterrupt


def test_an_error_that_cannot_be_sent_arrives_as_its_traceback() -> None:
    with open_workers(1) as submit:
        for how in ("unpicklable", "interrupt"):
            with pytest.raises(RuntimeError, match=r"In a worker process:[\s\S]*in fail"):
                submit(fail, how).result()


def test_workers_begin_with_one_thread_and_the_command_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    with open_workers(1) as submit:
        assert submit(os.getenv, "OMP_NUM_THREADS").result() == "1"
    assert "OMP_NUM_THREADS" not in os.environ


def test_workers_that_end_while_idle_are_replaced() -> None:
    with open_workers(1) as submit:
        first = submit(os.getpid).result()
        os.kill(first, signal.SIGKILL)
        assert submit(os.getpid).result() != first


def test_an_error_of_a_task_arrives_with_its_place() -> None:
    with pytest.raises(ValueError, match="'x'") as caught, open_workers(1) as submit:
        list(completed(submit, int, [("1",), ("x",)]))
    assert "In a worker process" in caught.value.__notes__[0]


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_workers_end_silently_with_their_parent(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "working\n"
    workers = psutil.Process(parent.pid).children()
    # as a terminal sends Ctrl-C to all of them, and `kill` the others to one
    (os.killpg if how == signal.SIGINT else os.kill)(parent.pid, how)
    _, told = parent.communicate(timeout=180)
    assert psutil.wait_procs(workers, timeout=180)[1] == []
    assert told.count("Traceback") == (how == signal.SIGINT)  # the parent's own


def test_a_scheduler_runs_tasks_by_its_address() -> None:
    import distributed

    with (
        distributed.LocalCluster(
            n_workers=1, processes=False, dashboard_address=None, scheduler_kwargs={"dashboard_address": "127.0.0.1:0"}
        ) as cluster,
        open_workers(0, cluster.scheduler_address) as submit,
    ):
        assert sorted(completed(submit, divmod, [(7, 2), (9, 2)])) == [(3, 1), (4, 1)]


def test_a_scheduler_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(SettingsError, match="--scheduler http://nowhere:1: cannot be reached: unknown address"):
        open_workers(0, "http://nowhere:1").__enter__()


def test_workers_are_numbered_and_share_the_gpus_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worker_number() is None
    with open_workers(2) as submit:
        assert set(completed(submit, worker_number, [()] * 6)) <= {0, 1}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert device_of_worker("cuda") == "cuda"  # of one process, or a scheduler's, which chooses itself
    for number, device in enumerate(["cuda:0", "cuda:1", "cuda:0"]):
        monkeypatch.setattr(compute, "worker_number", lambda number=number: number)
        assert device_of_worker("cuda") == device
        assert device_of_worker("cuda:1") == "cuda:1"
        assert device_of_worker("cpu") == "cpu"
