"""What the benchmark of two revisions makes of its turns, and what it counts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
import xxhash

from benchmarks.before_after import Worker, paired_ratios, run_in_turns
from benchmarks.before_after_task import CountedChecksum


def test_what_coming_second_saves_is_no_part_of_a_ratio() -> None:
    # one side takes 10, the other 12, and who comes second saves a tenth
    before, now = [10.0, 9.0, 10.0, 9.0], [12 * 0.9, 12.0, 12 * 0.9, 12.0]
    assert paired_ratios(before, now) == pytest.approx([1.2, 1.2])


_TASK = """
import json, sys, time
for done in ("small", "whole"):
    sys.stdin.readline()
    while time.process_time() < float(sys.argv[1]) * (1 if done == "small" else 2):
        pass
    print(json.dumps({"done": done}), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    """Two processes that work for 0.3 and 0.6 seconds in either of their runs."""
    commands = [[sys.executable, "-c", _TASK, seconds] for seconds in ("0.3", "0.6")]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, process_group=0) for command in commands]
    yield [Worker(process) for process in processes]
    for process in processes:
        process.kill()
        process.communicate()


def test_a_process_is_charged_for_its_own_turns_of_the_whole_run_alone(
    workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[tuple[Worker, float]] = []
    turn = Worker.turn

    def written_down(worker: Worker, seconds: float) -> None:
        before = worker.wall
        turn(worker, seconds)
        turns.append((worker, worker.wall - before))

    monkeypatch.setattr(Worker, "turn", written_down)
    run_in_turns(workers)
    assert [worker.found for worker in workers] == [{"done": "whole"}] * 2
    for worker, work in zip(workers, (0.3, 0.6), strict=True):
        own = [taken for whose, taken in turns if whose is worker]
        assert worker.wall <= sum(own) - own[0] + 1e-6  # the first turn, of the small run, is not in it
        assert worker.wall > work - 0.05  # the work itself is; other processes of the machine can only add to it


def test_a_process_stands_still_while_it_is_not_its_turn(workers: list[Worker]) -> None:
    for worker in workers:
        worker.start()
    workers[0].turn(0.05)
    before = psutil.Process(workers[0].process.pid).cpu_times()
    workers[1].turn(0.3)
    assert psutil.Process(workers[0].process.pid).cpu_times() == before


def test_a_counted_checksum_is_the_checksum() -> None:
    before = CountedChecksum.n_bytes
    counted = CountedChecksum(b"abc")
    counted.update(memoryview(b"defg"))
    assert counted.hexdigest() == xxhash.xxh3_128(b"abcdefg").hexdigest()
    assert CountedChecksum.n_bytes - before == 7
