"""What tests of the cache stage share: a tiny model, real text, and jobs in processes of their own that die on cue.

Processes are those of ``tests.support.forked``.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tailrace.pipeline import cli
from tailrace.pipeline.cache import plan as cache_plan
from tailrace.pipeline.cache import shuffle
from tailrace.pipeline.cache import stage as cache
from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.artifact import MANIFEST, canonical_json, checksum_file, describe_files, read_json, seal
from tests.support.forked import forked
from tests.support.paths import SPEECHES
from tests.support.tiny_models import save_tiny_model

if TYPE_CHECKING:  # the check of a GPU runs where pytest need not be installed
    import pytest

CONTEXT_LENGTH = 16
BLOCK_CONTEXTS = 8
NOT_COMPARED = (".lock", "log.jsonl")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cache-jobs-")


@functools.cache
def model_folder(**shape: Any) -> Path:
    """Return a random two-layer model that knows the speeches' 150 commonest words, saved once per process."""
    words = Counter(word for text in speech_texts() for word in text.split())
    vocabulary = [word for word, _ in sorted(words.items(), key=lambda item: (-item[1], item[0]))[:150]]
    name = "model" + "".join(f"-{value}" for value in shape.values())
    return save_tiny_model(Path(_folder().name) / name, vocabulary=vocabulary, **shape)


def scaled_model(folder: Path, scale: float) -> Path:
    """Return a copy of the tiny model whose first MLP's outputs are ``scale`` times larger."""
    shutil.copytree(model_folder(), folder)
    weights = load_file(folder / "model.safetensors")
    for name in ("weight", "bias"):
        weights[f"transformer.h.0.mlp.c_proj.{name}"] *= scale
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def speech_texts() -> list[str]:
    return [json.loads(line)["text"] for line in SPEECHES.read_text().splitlines()]


@functools.cache
def text_file() -> Path:
    """Return a file with the first 320 words of each of four speeches: 1,275 rows in contexts of 16."""
    path = Path(_folder().name) / "speeches.jsonl"
    texts = [" ".join(text.split()[:320]) for text in speech_texts()]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def settings(**changes: Any) -> CacheSettings:
    """Return settings of a cache of 500 rows in units of 64."""
    chosen = {
        "model": str(model_folder()),
        "dataset": str(text_file()),
        "layers": "0",
        "tokens": 500,
        "context_length": CONTEXT_LENGTH,
        "contexts_per_batch": 4,
        "shard_rows": 64,
        "chunk_rows": 16,
        "storage_dtype": "float32",
        "holdout": "0.1",
        **changes,
    }
    return CacheSettings.read(chosen)


def run_cache(output: Path, **changes: Any) -> cache.CacheResult:
    """Make a cache in this process, on one thread."""
    with small_blocks():
        return cache.run(settings(**changes), output=output, compute=Compute(threads=1, quiet=True))


class small_blocks:
    """Contexts are committed in blocks of 8 inside, so that a few hundred rows make several blocks."""

    def __enter__(self) -> None:
        self._before = cache_plan.BLOCK_TOKENS
        cache_plan.BLOCK_TOKENS = BLOCK_CONTEXTS * CONTEXT_LENGTH

    def __exit__(self, *_: object) -> None:
        cache_plan.BLOCK_TOKENS = self._before


HERE: dict[str, Any] = {"compute": Compute(threads=1, quiet=True)}


def tree(path: Path) -> dict[str, bytes]:
    """Return every file below ``path`` but the lock and the log."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name not in NOT_COMPARED]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Return the names of files that are missing, too many, or hold other bytes: a failure one can read."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


@dataclass(frozen=True)
class Job:
    """One run of a stage: ``cache``, ``extend``, ``widen`` or ``shuffle`` at ``output``."""

    stage: str
    output: Path
    settings: str = ""
    tokens: int = 0
    layers: str = ""

    @classmethod
    def cache(cls, output: Path, **changes: Any) -> Job:
        return cls("cache", output, settings=settings(**changes).model_dump_json())

    def run(self) -> None:
        with small_blocks():
            if self.stage == "cache":
                wanted = CacheSettings.model_validate_json(self.settings)
                cache.run(wanted, output=self.output, compute=Compute(threads=1, quiet=True))
            elif self.stage == "extend":
                cache.extend(self.output, self.tokens, **HERE)
            elif self.stage == "widen":
                cache.widen(self.output, self.layers, (), **HERE)
            else:
                shuffle.run(self.output, compute=Compute(quiet=True))


@dataclass(frozen=True)
class Kill:
    """SIGKILL at the ``count``-th rename to a name that holds ``name``: what is not renamed does not exist yet."""

    count: int
    name: str = ""
    after: bool = False
    """After the rename rather than before it, when the temporary file is cut to half."""


def run_job(job: Job, kill: Kill | None = None, seconds: float | None = None) -> int:
    """Run a job in its own process, killed at ``kill`` or after ``seconds``; return the exit code."""
    process = forked().Process(target=_perform, args=(job, kill))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def _perform(job: Job, kill: Kill | None) -> None:
    torch.set_num_threads(1)
    if kill is not None:
        die_at(kill)
    job.run()


def die_at(kill: Kill) -> None:
    """Make this process kill itself at a rename."""
    rename, lock, seen = Path.rename, threading.Lock(), [0]

    def counted(self: Path, target: Any) -> Path:
        if kill.name not in str(target):
            return rename(self, target)
        with lock:
            seen[0] += 1
            if seen[0] < kill.count:
                return rename(self, target)
            if kill.after:
                rename(self, target)
            else:
                os.truncate(self, self.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("SIGKILL was survived")

    setattr(Path, "rename", counted)  # noqa: B010 - mypy refuses to assign to a method


def count_renames(work: Callable[[], object]) -> int:
    """Return how many files ``work`` put into their places by renaming them."""
    rename, seen = Path.rename, [0]

    def counted(self: Path, target: Any) -> Path:
        seen[0] += 1
        return rename(self, target)

    setattr(Path, "rename", counted)  # noqa: B010
    try:
        work()
    finally:
        setattr(Path, "rename", rename)  # noqa: B010
    return seen[0]


def kill_until_done(job: Job, kills: list[Kill]) -> list[int]:
    """Run a job once for every kill, then to its end; return the exit codes."""
    return [run_job(job, kill) for kill in [*kills, None]]


def copy_cache(source: Path, target: Path) -> Path:
    """Return a copy of a cache, as made where the copy lies: nothing in it names its place."""
    shutil.copytree(source, target)
    return target


def plain_forward(tokens: np.ndarray, modules: list[str]) -> dict[str, np.ndarray]:
    """Return activations (contexts, positions, d) at modules of GPT-2 as transformers runs it: nothing of ours.

    ``h.0.mlp/in`` is what goes into the module ``h.0.mlp``, ``h.0.mlp/out`` what comes out of it. TransformerLens adds
    up norms in another order, so rows equal these within rounding.
    """
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_folder(), attn_implementation="eager").eval()
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def note(module: Any, inputs: Any, output: Any) -> None:
            seen[name] = (inputs[0] if name.endswith("/in") else output).clone()

        return note

    for name in modules:
        model.transformer.get_submodule(name.split("/")[0]).register_forward_hook(keep(name))
    with torch.no_grad():
        model(torch.from_numpy(tokens.astype(np.int64)))
    return {name: values.numpy() for name, values in seen.items()}


def full_forward(tokens: np.ndarray, hooks: list[str], batch: int = 4) -> dict[str, np.ndarray]:
    """Return activations (contexts, positions, d) at hooks from TransformerLens's own ``run_with_cache``.

    In batches of ``batch`` contexts, the last one padded with its last context as in the cache, so that sums are added
    up alike and rows equal these bit for bit.
    """
    from transformer_lens.model_bridge import TransformerBridge

    bridge: Any = TransformerBridge.boot_transformers(str(model_folder()), device="cpu", dtype=torch.float32)
    n_padded = -(-len(tokens) // batch) * batch
    padded = np.concatenate([tokens, np.repeat(tokens[-1:], n_padded - len(tokens), 0)])
    seen: dict[str, list[torch.Tensor]] = {hook: [] for hook in hooks}
    with torch.no_grad():
        for start in range(0, n_padded, batch):
            _, cached = bridge.run_with_cache(torch.from_numpy(padded[start : start + batch].astype(np.int64)))
            for hook in hooks:
                seen[hook].append(cached[hook].flatten(2))
    return {hook: torch.cat(values).numpy()[: len(tokens)] for hook, values in seen.items()}


def reseal(path: Path) -> None:
    """Make every checksum of a cache agree with its bytes again, as if it had been written like that."""
    for record_path in path.glob("commits/*/*.json"):
        record = read_json(record_path)
        for name in record["shards"]:
            shard = path / record["split"] / name
            record["shards"][name] = {"bytes": shard.stat().st_size, "checksum": checksum_file(shard)}
        record_path.write_bytes(canonical_json(record))
    manifest = read_json(path / MANIFEST)
    del manifest["digest"]
    manifest["files"] = describe_files(path, manifest["files"])
    for name in (MANIFEST, "manifest-0.json"):
        (path / name).write_bytes(seal(manifest))


@dataclass(frozen=True)
class Answer:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> Answer:
    """Run the command line in this process."""
    capsys.readouterr()
    code = 0
    with small_blocks():
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    said = capsys.readouterr()
    return Answer(code, said.out, said.err)
