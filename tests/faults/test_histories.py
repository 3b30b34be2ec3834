"""Random histories of a cache against a dictionary of what each of its generations must hold.

A generation's rows depend on its number of contexts and its sites alone, not on how it came to be. So what must be read
is what a new cache of that size gives, and the dictionary has a size for each generation.

A step is killed at a change of a name on the disk: from then on no name changes any more, whatever else the step does.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.train import stage
from tailrace.storage.activation_cache import ActivationCache, open_cache
from tailrace.storage.artifact import MANIFEST, REQUEST
from tailrace.storage.cache_format import manifest_name
from tailrace.storage.cache_verify import verify_bytes
from tailrace.storage.errors import ArtifactBusy, ArtifactMissing
from tailrace.storage.generations import CacheAt, Generations, read_pruned
from tailrace.storage.materialise import materialise_epoch
from tailrace.training.architectures.base import Transcoder
from tailrace.training.loop.settings import TrainSettings
from tests.faults.campaigns import second_opinion
from tests.support.synthetic_cache import extend_in_steps, memory_directory, widen_in_steps, write_synthetic_cache

SHAPE: dict[str, Any] = {"n_heldout_contexts": 1, "context_length": 9, "shard_rows": 16, "chunk_rows": 8}
"""Eight rows a context, two contexts a shard: every second size ends in a short shard."""
ADDED = [("layer1", 4, 4)]
CHANGES = ("link", "mkdir", "remove", "rename", "replace", "rmdir", "symlink", "unlink")
"""Functions of ``os`` that change names; all that we, pathlib and shutil change goes through them."""
TRAIN = TrainSettings.read(
    {
        "site": "layer0",
        "architecture": {"kind": "topk", "k": 2},
        "d_sae": 8,
        "steps": 5,
        "batch_rows": 16,
        "lr": 1e-2,
        "evaluation_rows": 8,
    }
)
KILLS = st.none() | st.integers(1, 60)


class Killed(BaseException):
    """The process is dead."""


@dataclass
class Disk:
    """What a step may still do."""

    is_dead: bool = False


@contextmanager
def killed_at(change: int | None) -> Iterator[Disk]:
    """Kill what runs inside at its n-th change of a name; nothing is changed after that, and no error leaves."""
    disk, left = Disk(), [change or 0]
    before = {name: getattr(os, name) for name in CHANGES}

    def counted(name: str) -> Callable[..., Any]:
        def changes(*given: Any, **options: Any) -> Any:
            if disk.is_dead:
                return None
            left[0] -= 1
            if left[0]:
                return before[name](*given, **options)
            disk.is_dead = True
            raise Killed

        return changes

    try:
        for name in CHANGES:
            setattr(os, name, counted(name))
        yield disk
    except BaseException:
        if not disk.is_dead:  # what a dead process still raises is of no interest
            raise
    finally:
        for name, function in before.items():
            setattr(os, name, function)


@dataclass(frozen=True)
class Size:
    """What decides the rows of a generation."""

    n_contexts: int
    is_wide: bool = False


def write(path: Path, size: Size) -> None:
    write_synthetic_cache(path, n_contexts=size.n_contexts, **SHAPE)
    if size.is_wide:
        run(widen_in_steps(path, widths=ADDED))


def run(steps: Iterable[str]) -> None:
    for _ in steps:
        pass


def in_turn(task: Callable[[int], None], ids: Iterable[int]) -> None:
    for number in ids:
        task(number)


def content(cache: ActivationCache) -> dict[str, bytes]:
    """Return all that reading a cache gives but its identity: units, an epoch, contexts, statistics."""
    found: dict[str, bytes] = {}
    for name in cache.manifest.splits:
        split = cache.split(name)
        sides = list(split.layout.encodings())
        keys = [*sides, "token_id", "context", "position", "document"]
        for unit in range(split.n_units):
            found |= {f"{name} {unit} {key}": rows.tobytes() for key, rows in split.read_unit(unit, keys).items()}
        with split.stream(keys, batch_rows=64, n_epochs=1) as stream:
            found |= {f"{name} at {batch.step} {key}": batch.arrays[key].tobytes() for batch in stream for key in keys}
        found[f"{name} contexts"] = split.context_tokens(np.arange(split.n_contexts)).tobytes()
        found |= {f"{name} mean {key}": one.mean.tobytes() for key, one in split.merged_statistics(sides).items()}
    return found


@functools.cache
def expected(size: Size) -> dict[str, bytes]:
    with memory_directory() as name:
        write(Path(name) / "cache", size)
        return content(open_cache(Path(name) / "cache"))


@functools.cache
def expected_weights(size: Size) -> bytes:
    with memory_directory() as name:
        write(Path(name) / "cache", size)
        return train(Path(name) / "cache", Path(name) / "run")


def train(cache: Path | CacheAt, output: Path, kill_step: int = 0) -> bytes:
    def kill(step: int, _: Transcoder) -> None:
        if step == kill_step:
            raise Killed

    compute = Compute(threads=1, quiet=True)
    stage.run(TRAIN, cache=cache, output=output, compute=compute, checkpoint_steps=2, hooks=[(1, kill)])
    return (output / "weights.safetensors").read_bytes()


class Histories(RuleBasedStateMachine):
    """Commands on a cache in any order, each cut off anywhere or not, and readers that stay open meanwhile."""

    readers = Bundle("readers")

    def __init__(self) -> None:
        super().__init__()
        self.folder = memory_directory()
        self.root = Path(self.folder.name)
        self.path = self.root / "cache"
        self.sizes: dict[int, Size] = {}
        """Of every generation, pruned ones included."""
        self.oldest = 0
        self.growth: Size | None = None
        """What a growth that was killed was to make: it has to be finished first."""
        self.open: list[ActivationCache] = []
        self.begun: tuple[Path, int] | None = None
        """A training that was killed, and the generation that it reads."""
        self.n_runs = 0

    @property
    def newest(self) -> int:
        return max(self.sizes)

    @initialize(n_contexts=st.integers(2, 4), kill=KILLS, extensions=st.lists(st.integers(1, 3), max_size=3))
    def create(self, n_contexts: int, kill: int | None, extensions: list[int]) -> None:
        size = Size(n_contexts)
        with killed_at(kill) as disk:
            write(self.path, size)
        if disk.is_dead:
            write(self.path, size)
        self.sizes[0] = size
        for more in extensions:
            self.extend(more, None)

    def grow(self, size: Size, kill: int | None) -> None:
        widens = size.is_wide and not self.sizes[self.newest].is_wide
        before = self.newest
        with killed_at(kill):
            if widens:
                run(widen_in_steps(self.path, widths=ADDED))
            else:
                run(extend_in_steps(self.path, n_contexts=size.n_contexts))
        is_published = open_cache(self.path).generation > before
        self.growth = None if is_published else size
        if is_published:
            self.sizes[before + 1] = size

    @precondition(lambda self: self.growth is None and self.sizes[self.newest].n_contexts < 12)
    @rule(more=st.integers(1, 3), kill=KILLS)
    def extend(self, more: int, kill: int | None) -> None:
        now = self.sizes[self.newest]
        self.grow(Size(now.n_contexts + more, now.is_wide), kill)

    @precondition(lambda self: self.growth is None and not self.sizes[self.newest].is_wide)
    @rule(kill=KILLS)
    def widen(self, kill: int | None) -> None:
        self.grow(Size(self.sizes[self.newest].n_contexts, True), kill)

    @precondition(lambda self: self.growth is not None)
    @rule(kill=KILLS)
    def grow_again(self, kill: int | None) -> None:
        assert self.growth is not None
        self.grow(self.growth, kill)

    @rule(age=st.integers(0, 5), kill=KILLS)
    def shuffle(self, age: int, kill: int | None) -> None:
        split = open_cache(self.path, self.generation(age)).split("train")
        with killed_at(kill):
            materialise_epoch(split, seed=0, epoch=0, run_tasks=in_turn)

    def generation(self, age: int) -> int:
        """Return a generation that is kept, the newest or one before."""
        return max(self.oldest, self.newest - age)

    @rule(age=st.integers(0, 5))
    def read(self, age: int) -> None:
        number = self.generation(age)
        assert content(open_cache(self.path, number)) == expected(self.sizes[number])

    @rule(number=st.integers(0, 12))
    def ask_for_any(self, number: int) -> None:
        if self.oldest <= number <= self.newest:
            assert open_cache(self.path, number).generation == number
            return
        with pytest.raises(ArtifactMissing, match="was pruned" if number < self.oldest else "has no generation"):
            open_cache(self.path, number)

    @rule(target=readers, age=st.integers(0, 5))
    def open_reader(self, age: int) -> Any:
        if len(self.open) == 3:
            return multiple()
        self.open.append(open_cache(self.path, self.generation(age)))
        return self.open[-1]

    @rule(reader=readers)
    def read_on(self, reader: ActivationCache) -> None:
        assert content(reader) == expected(self.sizes[reader.generation])

    @rule(reader=consumes(readers))
    def close_reader(self, reader: ActivationCache) -> None:
        self.open = [one for one in self.open if one is not reader]
        reader.close()

    @rule(keep=st.integers(1, 4), kill=KILLS)
    def prune(self, keep: int, kill: int | None) -> None:
        oldest = max(self.oldest, self.newest - keep + 1)
        if any(self.oldest <= reader.generation < oldest for reader in self.open):
            with pytest.raises(ArtifactBusy, match="being read"):
                Generations(self.path).prune(oldest)
            return
        with killed_at(kill) as disk:
            Generations(self.path).prune(oldest)
        self.oldest = read_pruned(self.path).oldest
        assert self.oldest == oldest or disk.is_dead
        if not disk.is_dead:
            assert Generations(self.path).unneeded(oldest) == []

    @precondition(lambda self: self.begun is None)
    @rule(age=st.integers(0, 5), step=st.integers(1, 8))
    def train(self, age: int, step: int) -> None:
        number = self.generation(age)
        output = self.root / f"run{self.n_runs}"
        self.n_runs += 1
        try:
            weights = train(CacheAt(self.path, number), output, step)
        except Killed:
            self.begun = output, number
        else:
            assert weights == expected_weights(self.sizes[number])

    @precondition(lambda self: self.begun is not None)
    @rule()
    def train_on(self) -> None:
        assert self.begun is not None
        output, number = self.begun
        self.begun = None
        if number >= self.oldest or not (output / REQUEST).exists():
            wanted = number if (output / REQUEST).exists() else self.newest
            assert train(self.path, output) == expected_weights(self.sizes[wanted])  # with the generation it began with
            return
        with pytest.raises(ArtifactMissing, match="was pruned"):
            train(self.path, output)

    @rule()
    def verify(self) -> None:
        assert verify_bytes(self.path) == []

    @precondition(lambda self: self.growth is None)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(self.oldest, self.newest))
        file = self.path / data.draw(st.sampled_from(sorted(self.vouched_for(number))))
        before = file.read_bytes()
        at = data.draw(st.integers(0, len(before) - 1))
        damaged = before[:at] + bytes([before[at] ^ 1 << data.draw(st.integers(0, 7))]) + before[at + 1 :]
        file.write_bytes(damaged)
        assert verify_bytes(self.path) != [], (file, at)
        file.write_bytes(before)
        assert verify_bytes(self.path) == []

    def vouched_for(self, number: int) -> set[str]:
        """Return the files of a generation that is kept."""
        cache = open_cache(self.path, number)
        files = {*cache.manifest.files, manifest_name(number), MANIFEST, REQUEST}
        for name in cache.manifest.splits:
            split = cache.split(name)
            for record in (*split.unit_records(), *split.block_records()):
                files |= {str((split.group_of(shard) / shard).relative_to(self.path)) for shard in record.shards}
        return files

    def teardown(self) -> None:
        """Finish what was begun: all that was promised is there."""
        try:
            if not self.sizes:
                return
            while self.growth is not None:
                self.grow(self.growth, None)
            assert verify_bytes(self.path) == []
            for number in range(self.oldest, self.newest + 1):
                assert content(open_cache(self.path, number)) == expected(self.sizes[number]), number
            second_opinion(self.path)
        finally:
            for reader in self.open:
                reader.close()
            self.folder.cleanup()


def histories(n: int, n_steps: int, *, is_random: bool = False) -> None:
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=n,
            stateful_step_count=n_steps,
            deadline=None,
            derandomize=not is_random,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_few_histories_end_as_the_dictionary_says() -> None:
    histories(2, 8)


@pytest.mark.slow
@pytest.mark.parametrize("_", range(4))  # 100 in all; together they may take longer than a test may
def test_many_histories_end_as_the_dictionary_says(_: int) -> None:
    histories(25, 25, is_random=True)
