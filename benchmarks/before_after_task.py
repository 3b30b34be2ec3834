"""One process of before_after.py: works with whatever revision PYTHONPATH names, by the package's public functions."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import xxhash

_LOCK = threading.Lock()
"""Of all counts: files are checksummed, opened and synced in several threads."""


class CountedChecksum:
    """xxh3 that counts the bytes it is given, over all checksums of the process."""

    n_bytes = 0
    _make = xxhash.xxh3_128

    def __init__(self, *data: Any) -> None:
        self._state = CountedChecksum._make()
        for part in data:
            self.update(part)

    def update(self, data: Any) -> None:
        """Take more bytes."""
        with _LOCK:
            CountedChecksum.n_bytes += memoryview(data).nbytes
        self._state.update(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


class DiskCalls:
    """Counts files opened and synced by Python code from its making on."""

    def __init__(self) -> None:
        self.opens = self.syncs = 0
        sys.addaudithook(self._audit)
        self._fsync = os.fsync
        setattr(os, "fsync", self._sync)  # noqa: B010

    def _audit(self, event: str, _: Any) -> None:
        if event == "open":
            with _LOCK:
                self.opens += 1

    def _sync(self, descriptor: Any) -> None:
        with _LOCK:
            self.syncs += 1
        self._fsync(descriptor)


def work(told: dict[str, Any]) -> Callable[[Path, int], object]:
    """Return the task as a function of where it writes and by what its size is divided."""
    import tailrace
    import tailrace.pipeline.api

    where = Path(tailrace.__file__ or "").resolve()
    assert where.is_relative_to(Path(told["tree"]).resolve()), f"{where}: not the revision to be measured"

    def cache(output: Path, part: int) -> object:
        text = {"model": told["model"], "dataset": told["text"], "layers": "2"}
        return tailrace.cache(out=output, tokens=told["tokens"] // part, threads=1, device="cpu", **text)

    def train(output: Path, part: int) -> object:
        rows = told["train_rows"] // part
        sizes: dict[str, Any] = {"d_sae": 4096, "batch_rows": 1024, "threads": 1, "device": "cpu"}
        return tailrace.train(told["cache"], out=output, rows=rows, **sizes)

    def read(_: Path, part: int) -> object:
        split = tailrace.open_cache(told["cache"]).split("train")
        n_epochs = max(told["epochs"] // part, 1)
        with closing(split.stream(("layer8/in", "layer8/out"), batch_rows=4096, n_epochs=n_epochs)) as batches:
            return sum(len(batch.arrays["layer8/in"]) for batch in batches)

    return {"cache": cache, "train": train, "read": read}[told["task"]]


def main(told: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if told.get("count"):
        setattr(xxhash, "xxh3_128", CountedChecksum)  # noqa: B010
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core for both: two are not equally fast
    run, output = work(told), Path(told["output"])
    for done in ("imports", "small run"):
        print(json.dumps({"done": done}), file=answers, flush=True)
        if not sys.stdin.readline():
            return  # the parent is gone
        if done == "imports":
            run(output / "small", 10)
    calls = DiskCalls() if told.get("count") else None
    checksummed, start = CountedChecksum.n_bytes, time.process_time()
    run(output / "whole", 1)
    found = {"processor_seconds": time.process_time() - start}
    if calls is not None:
        found |= {"opens": calls.opens, "syncs": calls.syncs}
        found["checksummed_bytes"] = CountedChecksum.n_bytes - checksummed
    print(json.dumps(found), file=answers, flush=True)
    sys.stdin.readline()  # stays until it is ended: its last moments are no part of anybody's turn


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
