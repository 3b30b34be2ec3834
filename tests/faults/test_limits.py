"""Sizes far from the usual: thousands of runs with few open files, a document of a million tokens, 500 sites."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import yaml

from tailrace.pipeline.cache.settings import CacheSettings
from tailrace.pipeline.cache.stage import run as cache
from tailrace.pipeline.shared.compute import Compute
from tailrace.storage.activation_cache import open_cache
from tailrace.storage.artifact import verify_artifact
from tailrace.storage.cache_verify import verify_bytes
from tests.support.cache_jobs import model_folder
from tests.support.paths import ROOT
from tests.support.synthetic_cache import write_synthetic_cache

pytestmark = pytest.mark.slow

TRAIN = ["--k", "2", "--d-sae", "4", "--steps", "2", "--batch-rows", "16", "--threads", "1", "--quiet"]


def pipeline(*arguments: object, open_files: int) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))

    program = [sys.executable, "-c", "from tailrace.pipeline.cli import main; main()", *map(str, arguments)]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)


def sweep(folder: Path, n_runs: int, open_files: int) -> Path:
    """Train a sweep of learning rates; return the sweep."""
    if not (folder / "cache").exists():
        write_synthetic_cache(folder / "cache", n_contexts=12, n_heldout_contexts=2)
    runs = [{"lr": round(1e-4 + 1e-6 * number, 6)} for number in range(n_runs)]
    (folder / "runs.yaml").write_text(yaml.safe_dump(runs))
    output = folder / f"sweep-{open_files}"
    flags = ["--sweep-file", folder / "runs.yaml", "--out", output, *TRAIN]
    finished = pipeline("train", folder / "cache", *flags, open_files=open_files)
    assert (finished.returncode, finished.stderr) == (0, "")
    return output


def test_a_sweep_of_more_runs_than_files_may_be_open_trains_the_same(tmp_path: Path) -> None:
    few, many = (sweep(tmp_path, 80, open_files) for open_files in (200, 4096))
    weights = [
        {file.parent.name: file.read_bytes() for file in path.glob("runs/*/weights.safetensors")}
        for path in (few, many)
    ]
    assert len(weights[0]) == 80
    assert weights[0] == weights[1]
    assert verify_artifact(few, "sweep") == []


def test_a_sweep_of_1100_runs_trains_where_1024_files_may_be_open(tmp_path: Path) -> None:
    made = sweep(tmp_path, 1100, 1024)
    assert len(json.loads((made / "manifest.json").read_bytes())["runs"]) == 1100


def cached(folder: Path, text: str, **changes: object) -> Path:
    (folder / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    settings = CacheSettings.read(
        {
            "model": str(model_folder()),
            "dataset": str(folder / "text.jsonl"),
            "layers": "0",
            "tokens": "all",
            "context_length": 64,
            "contexts_per_batch": 256,
            "storage_dtype": "float16",
            "holdout": "0",
            **changes,
        }
    )
    return cache(settings, output=folder / "cache", compute=Compute(threads=1, quiet=True)).path


def test_a_document_of_a_million_tokens_is_cached_whole(tmp_path: Path) -> None:
    path = cached(tmp_path, "the people " * 500_000)
    train = open_cache(path).split("train")
    assert train.n_contexts == 1_000_000 // 63
    assert np.unique(train.context_documents(np.arange(train.n_contexts))).tolist() == [0]
    assert verify_bytes(path) == []


def test_500_sites_are_cached_read_and_verified(tmp_path: Path) -> None:
    points = [
        f"blocks.{layer}.{name}" for layer in range(8) for name in ("hook_resid_pre", "mlp.hook_in", "mlp.hook_out")
    ]
    pairs = list(permutations(points, 2))[:500]
    hooks = tuple(f"site{number}={':'.join(pair)}" for number, pair in enumerate(pairs))
    path = cached(
        tmp_path, "the people " * 500, layers=None, hooks=hooks, tokens=640, model=str(model_folder(n_layers=8))
    )
    opened = open_cache(path)
    assert len(opened.sites) == 500
    same = [f"site{number}/in" for number, pair in enumerate(pairs) if pair[0] == pairs[0][0]]
    rows = opened.split("train").read_unit(0, same)
    assert len({rows[key].tobytes() for key in same}) == 1
    assert len(same) == 23
    assert verify_bytes(path) == []
