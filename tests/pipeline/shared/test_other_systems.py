"""Where Linux's own calls are missing, artifacts are read, queried and shown as on Linux; making them is refused.

The calls that macOS lacks are taken away in a process of its own, which says that it is one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tailrace.storage.activation_cache import open_cache
from tests.support.paths import ROOT

RELEASED = next((ROOT / "tests" / "released").glob("*/caches")).parent

HIDE = """
import builtins, ctypes, io, json, mmap, os, pydoc, sys, threading, urllib.request
# other packages choose their files by the system when they are imported
import click, duckdb, numpy, pyarrow.parquet, pydantic, tqdm, zarr, yaml
{first}

for name in ("O_DIRECT", "posix_fadvise", "POSIX_FADV_RANDOM", "POSIX_FADV_DONTNEED", "posix_fallocate", "fdatasync",
             "preadv", "pwritev", "sched_getaffinity", "sched_setaffinity"):
    delattr(os, name)
delattr(mmap, "MADV_HUGEPAGE")

class Library:
    def __init__(self, *arguments, **options):
        self._library = Real(*arguments, **options)
    def __getattr__(self, name):
        if name in ("preadv", "preadv64"):
            raise AttributeError(name)
        return getattr(self._library, name)

Real, ctypes.CDLL = ctypes.CDLL, Library
plain_open = io.open

def without_proc(path, *arguments, **options):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(path)
    return plain_open(path, *arguments, **options)

builtins.open = io.open = without_proc
sys.platform = "darwin"
"""

LOOK = """
from pathlib import Path
import tailrace
from tailrace.pipeline import cli
from tailrace.pipeline.dashboard import serve
from tailrace.storage import memory

assert memory._preadv is None
split = tailrace.open_cache("caches/float32").split("train")
site = next(iter(split.cache.sites))
key = f"{site}/in"
unit = split.read_unit(0, [key])[key]
batch = next(iter(split.stream([key], batch_rows=16, seed=3, n_epochs=1)))
features = tailrace.query("SELECT count(*) AS n FROM features", "tables/topk").to_pylist()
for line in ("info caches/float32", "info transcoders/topk", "query --saved densest --tables tables/topk",
             "dashboard tables/topk --out {out}/site"):
    cli.main(line.replace("{out}", sys.argv[1]).split())
server = serve.open_server(Path("tables/topk"), port=0)
threading.Thread(target=server.serve_forever, daemon=True).start()
page = urllib.request.urlopen(f"http://127.0.0.1:{server.server_address[1]}/").read()
server.shutdown()
assert "torch" not in sys.modules
told = {"unit": unit.sum(dtype=float), "batch": batch.arrays[key].tolist(), "features": features, "page": len(page)}
with plain_open(f"{sys.argv[1]}/told.json", "w") as file:
    json.dump(told, file)
"""

REFUSE = """
import tailrace
told = []
for line in ("cache --model model --dataset text.jsonl --layers 0 --tokens 10 --out {out}/x",
             "extend caches/float32 --tokens all", "widen caches/float32 --layers 1", "shuffle caches/float32",
             "train caches/float32 --out {out}/y"):
    from tailrace.pipeline import cli
    try:
        cli.main(line.replace("{out}", sys.argv[1]).split())
    except SystemExit as stop:
        told.append(stop.code)
with plain_open(f"{sys.argv[1]}/told.json", "w") as file:
    json.dump(told, file)
"""

SCORE = """
from tailrace.pipeline import cli
arguments = ["score", "the people of the country", *sys.argv[2:], "--out", f"{sys.argv[1]}/told.json"]
cli.main(arguments)
"""


def run_hidden(code: str, folder: Path, *arguments: str, first: str = "") -> tuple[Any, str]:
    """Run code in a copy of the released artifacts without the calls of Linux; return what it told, and its errors."""
    shutil.copytree(RELEASED, folder / "here")
    script = HIDE.replace("{first}", first) + code
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), *arguments], cwd=folder / "here", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "told.json").read_text()), done.stderr


def test_artifacts_are_read_queried_and_shown_without_the_calls_of_linux(tmp_path: Path) -> None:
    told, _ = run_hidden(LOOK, tmp_path)
    split = open_cache(RELEASED / "caches" / "float32").split("train")
    key = f"{next(iter(split.cache.sites))}/in"
    assert told["unit"] == split.read_unit(0, [key])[key].sum(dtype=float)
    batch = next(iter(split.stream([key], batch_rows=16, seed=3, n_epochs=1)))
    assert np.array_equal(np.array(told["batch"], np.float32), batch.arrays[key])
    assert told["features"][0]["n"] > 0
    assert told["page"] > 500
    assert (tmp_path / "site" / "index.html").exists()


@pytest.mark.slow
def test_caching_and_training_say_that_they_want_linux(tmp_path: Path) -> None:
    codes, errors = run_hidden(REFUSE, tmp_path, first="import torch, transformers, datasets, transformer_lens, numba")
    assert codes == [1] * 5
    lines = [line for line in errors.splitlines() if "wants Linux" in line]
    assert [line.split("wants")[0].split()[-1] for line in lines] == ["caching"] * 3 + ["shuffling", "training"]
    assert all("this is darwin" in line for line in lines)
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "y").exists()


@pytest.mark.slow
def test_a_text_is_scored_without_the_calls_of_linux(tmp_path: Path) -> None:
    first = "import torch, transformers, datasets, transformer_lens.model_bridge, numba, safetensors.torch"
    told, _ = run_hidden(SCORE, tmp_path, "--transcoder", "transcoders/topk", "--feature", "0", first=first)
    assert told
