"""Everything a run needs to continue bit for bit, in one file that appears whole or not at all.

A checkpoint is a safetensors file whose header also carries the run's JSON state: no pickle, and weights and position
cannot come from different steps. A checksum of both is in the header too, and is compared before a run continues from
them. There is no random state to keep: every draw is derived from (seed, purpose, index).

They are written once the last ones are old for what they cost, or after so many steps where that is asked for. What is
written when changes no result: a run continued from any checkpoint ends with the same bytes.

Where processes share a run's features, each writes its own part, and a step counts if all parts are there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tailrace.storage.errors import ArtifactCorrupt, SettingsError
from tailrace.storage.names import files_below, matching
from tailrace.storage.parsing import parse_json
from tailrace.training.architectures.transcoder import write_tensors

KEPT = 2
"""Newest checkpoints kept, so that a damaged last one costs only its interval."""
_STATE = "state"
"""The header's one key (several have no fixed order): a checksum, a space, and the state as JSON."""

CHECKPOINT_SECONDS = 60.0
"""Age at which checkpoints that are cheap are followed by new ones, for runs whose steps take long."""
LARGEST_SHARE = 0.05
"""Of the time, that goes into checkpoints written for their age. Thirty runs side by side on a busy disk can take
minutes for a round of them: once a minute they would never come to train."""


class RunCheckpoint(NamedTuple):
    """A run at a step: tensors by name and JSON state."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Shards(NamedTuple):
    """How the processes that wrote a checkpoint shared the features; as JSON in the ``run`` state of their first."""

    n: int
    """How many they were."""
    blocks: Mapping[str, int]
    """The tensors of which each part has the rows of its own features, and of how many layers these are."""


class Checkpoints:
    """The checkpoints of one run, in a directory of their own.

    ``rank`` and ``size`` say which of the features are this process's: those that it loads, from whatever parts.
    """

    def __init__(self, directory: Path, rank: int = 0, size: int = 1) -> None:
        self._root, self._rank, self._size = directory, rank, size
        self._directory = self._part(rank)

    def begin(self) -> None:
        """Prepare to save a checkpoint; unlike ``save``, called by the thread that trains."""

    def save(self, checkpoint: RunCheckpoint) -> None:
        """Write a checkpoint, then remove all but the newest ``KEPT``."""
        state = json.dumps(checkpoint.state, sort_keys=True, allow_nan=False)
        tensors = {name: tensor.detach().cpu() for name, tensor in checkpoint.tensors.items()}
        header = {_STATE: f"{_checksum(state, sorted(tensors.items()))} {state}"}
        write_tensors(self._path(checkpoint.step), tensors, header)
        if self._rank == 0 and len(kept := self._paths()[-KEPT:]) == KEPT:
            oldest = int(kept[0].stem)  # all parts of which are there
            self._remove(lambda step: step < oldest)

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints there are, ascending."""
        steps = [int(path.stem) for path in self._paths()]
        return [step for step in steps if self._is_complete(step)] if self._part(1).exists() else steps

    def state(self, step: int) -> dict[str, Any]:
        """Return the JSON state of a checkpoint, which is compared with nothing; the errors are those of ``load``."""
        with _opened(self._path(step, 0)) as file:
            state: dict[str, Any] = _state_in(file)
            return state

    def latest(self) -> RunCheckpoint | None:
        """Return the newest checkpoint, or None if there is none; the errors are those of ``load``."""
        steps = self.steps()
        return self.load(steps[-1]) if steps else None

    def load(self, step: int) -> RunCheckpoint:
        """Return the checkpoint at ``step``.

        Raises ArtifactCorrupt if it cannot be read; deleting the file named falls back to the one before.
        """
        with _reading(self._path(step, 0)) as file:
            state = _state_in(file)
            shards = _shards(state)
            if shards.n == 1 and self._size > 1:
                raise SettingsError(
                    f"{self._path(step, 0)}: was written by a process that had all features; continue without "
                    "--shard-features, or throw the run away with --fresh"
                )
            names = (name for name in file.keys() if name not in shards.blocks)  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
        if shards.blocks:
            tensors |= self._own_rows(step, shards)
        if shards.n == self._size > 1:
            with _reading(self._path(step)) as file:
                state["run"] = _state_in(file)["run"]
        return RunCheckpoint(step, tensors, state)

    def _own_rows(self, step: int, shards: Shards) -> dict[str, Tensor]:
        """Return this process's rows of the tensors that parts have slices of; nothing else is read."""
        pieces: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(n)] for name, n in shards.blocks.items()}
        for part in range(shards.n):
            with _reading(self._path(step, part)) as file:
                for name, blocks in pieces.items():
                    rows = file.get_slice(name)
                    n_rows = rows.get_shape()[0] // len(blocks)
                    own = n_rows * shards.n // self._size
                    start, stop = (
                        min(max(own * end - n_rows * part, 0), n_rows) for end in (self._rank, self._rank + 1)
                    )
                    for number, block in enumerate(blocks):
                        if start < stop:
                            block.append(rows[number * n_rows + start : number * n_rows + stop])
        return {name: torch.cat([piece for block in blocks for piece in block]) for name, blocks in pieces.items()}

    def _is_complete(self, step: int) -> bool:
        try:
            with _opened(self._path(step, 0)) as file:
                shards = _shards(_state_in(file))
        except ArtifactCorrupt:
            return True  # which ``load`` says
        return all(self._path(step, part).exists() for part in range(shards.n))

    def discard_after(self, step: int) -> None:
        """Remove checkpoints newer than ``step``: a run continued from there would count them among those kept."""
        self._remove(lambda other: other > step)

    def _remove(self, is_old: Callable[[int], bool]) -> None:
        for path in files_below(self._root):  # which follows no links: what lies behind them is others'
            if path.match("[0-9]*.safetensors") and is_old(int(path.stem)):
                path.unlink()

    def clear(self) -> None:
        """Remove every checkpoint and what a killed writer left: the run is published.

        Of a link, as where a user moved them to another disk, the checkpoints behind it and nothing else.
        """
        if self._directory.is_symlink():
            self.discard_after(-1)
        elif self._directory.exists():
            shutil.rmtree(self._directory)

    def _part(self, rank: int) -> Path:
        """Return the directory of a process's part; the first process's is the run's."""
        return self._root / f"part-{rank}" if rank else self._root

    def _path(self, step: int, rank: int | None = None) -> Path:
        return (self._directory if rank is None else self._part(rank)) / f"{step:09d}.safetensors"

    def _paths(self) -> list[Path]:
        return matching(self._directory, "[0-9]*.safetensors")


def _shards(state: Mapping[str, Any]) -> Shards:
    described = state.get("run", {}).get("shards")
    return Shards(1, {}) if described is None else Shards(**described)


def _checksum(state: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the checksum of a state and of tensors by name, which come in the order of their names."""
    checksum = xxhash.xxh3_128(state.encode())
    for name, tensor in tensors:
        checksum.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        checksum.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return "xxh3:" + checksum.hexdigest()


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Open a checkpoint's file whose checksum is right; the errors are those of ``_opened``."""
    with _opened(path) as file:
        checksum, state = _header_of(file)
        tensors = ((name, file.get_tensor(name)) for name in sorted(file.keys()))
        if checksum and _checksum(state, tensors) != checksum:
            raise ValueError("it differs from its own checksum")
        yield file


def _header_of(file: Any) -> tuple[str, str]:
    """Return the checksum and the state in a checkpoint's header; the first version wrote no checksum."""
    text = str(file.metadata()[_STATE])
    checksum, _, state = ("", "", text) if text.startswith("{") else text.partition(" ")
    return checksum, state


def _state_in(file: Any) -> Any:
    return parse_json(_header_of(file)[1])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a checkpoint's file; raise ArtifactCorrupt for whatever goes wrong inside with what it holds."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtifactCorrupt(
            f"{path}: is no readable checkpoint ({error}); delete it to continue from the one before it"
        ) from error


class CheckpointWriter:
    """Writes the checkpoints of all runs of a stream in the order in which they were taken. A context manager.

    On a CPU at once. On a GPU a thread does it: the step goes on as soon as the tensors are copied on the device, or to
    the host where the device has no room. The order matters: a round that one run has finished, every run has begun,
    so that there is always a step that all can be continued from.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, "checkpoints") if device.type == "cuda" else None
        self._copying: torch.cuda.Stream | None = None

    def write(self, checkpoints: Checkpoints, checkpoint: RunCheckpoint) -> Future[None]:
        """Write ``checkpoint`` as it is now; the future has the errors of ``Checkpoints.save``."""
        checkpoints.begin()
        if self._thread is None:
            done: Future[None] = Future()
            checkpoints.save(checkpoint)
            done.set_result(None)
            return done
        if self._copying is None:
            self._copying = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        n_bytes = sum(value.nbytes for value in checkpoint.tensors.values() if value.is_cuda)
        on_device = n_bytes < torch.cuda.mem_get_info(self._device)[0] // 2
        taken = {
            name: value.detach().clone() if on_device or not value.is_cuda else value.detach().cpu()
            for name, value in checkpoint.tensors.items()
        }
        self._copying.wait_stream(torch.cuda.current_stream(self._device))
        return self._thread.submit(self._save, checkpoints, checkpoint._replace(tensors=taken), self._copying)

    @staticmethod
    def _save(checkpoints: Checkpoints, checkpoint: RunCheckpoint, copying: torch.cuda.Stream) -> None:
        with torch.cuda.stream(copying):
            tensors = {name: checkpoint.tensors.pop(name).cpu() for name in [*checkpoint.tensors]}
        checkpoints.save(checkpoint._replace(tensors=tensors))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown()


class CheckpointClock:
    """Tells all runs of one stream after which steps to write a checkpoint, the same to each.

    One is due when the last round is ``CHECKPOINT_SECONDS`` old and so old that writing it took at most
    ``LARGEST_SHARE`` of the time since it began; and every ``every_steps``, if given, whatever it costs. ``now`` gives
    seconds that only rise.
    """

    def __init__(self, every_steps: int | None, *, now: Callable[[], float] = time.monotonic) -> None:
        self._every_steps, self._now = every_steps, now
        self._began = now()
        """When the last round of checkpoints began; the training itself, before there is one."""
        self._took = 0.0
        """Seconds that its runs took to write it."""
        self._step = -1
        self._is_due = False

    def is_due(self, step: int) -> bool:
        """Return whether runs write a checkpoint after ``step``; the time is looked at once per step."""
        if step != self._step:
            self._step = step
            now = self._now()
            wait = max(CHECKPOINT_SECONDS, self._took / LARGEST_SHARE)
            is_asked_for = self._every_steps is not None and step % self._every_steps == 0
            self._is_due = is_asked_for or now - self._began >= wait
            if self._is_due:
                self._began, self._took = now, 0.0
        return self._is_due

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Count the time inside as spent on one run's checkpoint of the round that is due."""
        start = self._now()
        yield
        self._took += self._now() - start
