"""The same TopK step by other projects, each in bfloat16 autocast, beside this one's (``step_cost``)."""

from __future__ import annotations

import gc
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch

from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.outcomes import Check, NotHereError, Numbers

SIZES = ((768, 24_576, 64, 4096), (2304, 65_536, 64, 4096))
"""Width, features, k, rows of a batch."""
SMALL = ((64, 512, 8, 256),)
UNUSED = ("transformer_lens", "nnsight", "wandb", "plotly", "plotly_express", "nltk", "zstandard", "mamba_lens", "umap")
"""What the projects import for other things than a step."""

Step = Callable[[torch.Tensor, torch.Tensor], object]
"""One optimiser step on inputs and outputs (rows, width); an autoencoder ignores the latter."""


def checks(bench: Bench) -> Iterator[Check]:
    """Yield a check for each project."""
    for size in SMALL if bench.small else SIZES:
        for name, make in {
            "SAELens": saelens,
            "dictionary_learning": dictionary_learning,
            "sparsify": sparsify,
        }.items():
            yield Check(f"step of {name}, {size[1]}", "cost", 8, partial(step_of, bench, make, size))


def step_of(bench: Bench, make: Callable[[str, int, int, int], Step], size: tuple[int, int, int, int]) -> Numbers:
    """Return ms of a step on rows that lie on the device."""
    if bench.peers is not None and str(bench.peers) not in sys.path:
        sys.path.append(str(bench.peers))
    width, d_sae, k, n_rows = size
    if not bench.is_cuda:
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it takes an installed triton for one that runs
    gc.collect()  # an earlier one's weights may lie in circles of references
    try:
        with stand_ins(UNUSED):
            step = make(bench.device, width, d_sae, k)
    except ModuleNotFoundError as error:
        raise NotHereError(f"{error.name} is not installed, nor in the folder of --peers") from error
    rows = [torch.randn(n_rows, width, device=bench.device) for _ in range(4)]
    state = 0

    def go() -> None:
        nonlocal state
        step(rows[state % 4], rows[(state + 1) % 4])
        state += 1

    bench.forget_peak()
    timing = bench.time(go, 10, 3)
    return {"device ms": 1e3 * timing.device, "wall ms": 1e3 * timing.wall, "peak GB": bench.peak_gb()}


class _Anything(torch.nn.Identity):
    """Stands for a class or a function of a module that is not there."""

    def setup(self) -> None:
        """Do what the base class of a hooked model does at the end of its making: here, nothing."""

    def __class_getitem__(cls, _: Any) -> type[_Anything]:
        return cls


class _StandIn(ModuleType):
    __path__: MutableSequence[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in self._names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def stand_ins(names: Sequence[str]) -> Iterator[None]:
    """Let modules of these packages that are not installed be imported inside, empty."""
    finder = _Finder(names)
    sys.meta_path.append(finder)  # last: what is installed comes first
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def saelens(device: str, width: int, d_sae: int, k: int) -> Step:
    """Return SAELens' step, which its trainer takes for a batch."""
    from sae_lens import TopKTrainingSAEConfig, TrainingSAE  # type: ignore[import-not-found]
    from sae_lens.config import SAETrainerConfig  # type: ignore[import-not-found]
    from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[import-not-found]

    sae = TrainingSAE.from_dict(TopKTrainingSAEConfig(d_in=width, d_sae=d_sae, k=k, device=device).to_dict())
    settings = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=4096,
        lr=1e-4,
        lr_end=1e-4,
        device=device,
        autocast=True,
    )
    trainer = SAETrainer(settings, sae.to(device), data_provider=iter(()))

    def step(inputs: torch.Tensor, _: torch.Tensor) -> None:
        trainer.step(inputs)
        trainer.n_training_steps += 1

    return step


def dictionary_learning(device: str, width: int, d_sae: int, k: int) -> Step:
    """Return the update of dictionary_learning's trainer; its first, which looks for a median, is left out."""
    from dictionary_learning.trainers.top_k import TopKTrainer  # type: ignore[import-not-found]

    trainer = TopKTrainer(
        steps=10**6,
        activation_dim=width,
        dict_size=d_sae,
        k=k,
        lr=1e-4,
        warmup_steps=0,
        layer=0,
        lm_name="none",
        device=device,
    )
    n_done = 0

    def step(inputs: torch.Tensor, _: torch.Tensor) -> None:
        nonlocal n_done
        n_done += 1
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            trainer.update(n_done, inputs)

    return step


def sparsify(device: str, width: int, d_sae: int, k: int) -> Step:
    """Return what sparsify's training loop does for a batch of a transcoder, with Adam."""
    from sparsify.config import SparseCoderConfig  # type: ignore[import-not-found]
    from sparsify.sparse_coder import SparseCoder  # type: ignore[import-not-found]

    settings = SparseCoderConfig(num_latents=d_sae, k=k, transcode=True)
    coder = SparseCoder(width, settings, device=device, dtype=torch.float32)
    optimiser = torch.optim.Adam(coder.parameters(), lr=1e-4, fused=True)

    def step(inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        total_variance = (outputs - outputs.mean(0)).pow(2).sum()
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            out = coder(x=inputs, y=outputs, dead_mask=None, total_variance=total_variance)
        (out.fvu + out.multi_topk_fvu / 8).backward()
        optimiser.step()
        optimiser.zero_grad()

    return step
