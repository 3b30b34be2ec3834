"""Golden bytes: a digest of everything the recipe makes, by which a change that should change nothing is judged.

``python -m tests.released.golden`` makes all of it and records its digests for this machine. Given a checkout of
another commit, it makes both there and here and says in which artifacts they differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path

import torch

from tailrace.storage.artifact import checksum_file
from tests.released.recipe import STEPS
from tests.released.runner import run_step, write_inputs

GOLDEN = Path(__file__).parent / "golden.json"
TIMED = {".lock", "log.jsonl", "timing.jsonl", "ledger.jsonl", "baselines.json"}
"""Files that are no part of an artifact: they hold times, what else was measured, or nothing."""
_LIBRARIES = ("torch", "numpy", "transformers", "transformer_lens", "tokenizers", "pyarrow", "safetensors", "zarr")
_MAKE = "import pathlib, sys, tests.released.golden as golden; golden.make_outputs(pathlib.Path(sys.argv[1]))"
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")


def machine() -> str:
    """Return what the last bits depend on: processor, interpreter, libraries, and kernels chosen by the environment."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found = {line.partition(":")[0].strip(): line.partition(":")[2].split() for line in lines}
    processor = [*found.get("vendor_id", [platform.machine()]), *(f for f in _FLAGS if f in found.get("flags", []))]
    libraries = [f"{name} {version(name).partition('+')[0]}" for name in _LIBRARIES]
    kernels = [torch.backends.cpu.get_cpu_capability(), os.environ.get("OPENBLAS_CORETYPE", "")]
    python = "Python " + ".".join(platform.python_version_tuple()[:2])
    return "; ".join([" ".join(processor), " ".join(filter(None, kernels)), python, *libraries])


def make_outputs(folder: Path, outputs: Collection[str] | None = None) -> None:
    """Run the recipe's steps in the new ``folder``: all of them, or those that make ``outputs``."""
    folder.mkdir(parents=True)
    write_inputs(folder)
    for step in STEPS:
        if outputs is None or step.output in outputs:
            run_step(step, folder)


def digests(folder: Path) -> dict[str, str]:
    """Return a digest of every output of the recipe below ``folder``, over names and bytes of its files."""
    return {
        output: _digest(folder / output)
        for output in {step.output: None for step in STEPS}
        if (folder / output).exists()
    }


def _digest(output: Path) -> str:
    files = sorted(path for path in output.rglob("*") if path.is_file() and path.name not in TIMED)
    state = hashlib.sha256()
    for path in files:
        state.update(f"{path.relative_to(output).as_posix()} {checksum_file(path)}\n".encode())
    return state.hexdigest()[:16]


def recorded() -> dict[str, dict[str, str]]:
    """Return the recorded digests by machine."""
    content: dict[str, dict[str, str]] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    return content


def differing(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Return the outputs of both whose digests differ."""
    return [name for name, one in found.items() if expected.get(name, one) != one]


def main(arguments: list[str]) -> None:
    """Record this machine's digests; or, given another checkout, say what it makes differently."""
    with tempfile.TemporaryDirectory() as scratch:
        here, there = Path(scratch) / "here", Path(scratch) / "there"
        make_outputs(here)
        if arguments:
            environment = {**os.environ, "PYTHONPATH": arguments[0]}
            command = [sys.executable, "-c", _MAKE, str(there)]
            subprocess.run(command, cwd=arguments[0], env=environment, check=True)
            different = differing(digests(there), digests(here))
            sys.stdout.write("\n".join(different or ["no artifact differs"]) + "\n")
            return
        found = {**recorded(), machine(): digests(here)}
    GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
