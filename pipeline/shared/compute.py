"""Where and with how much a stage computes: the device by name, threads of a CPU, processes, and progress bars."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import click

from tailrace.pipeline.shared.worker_processes import worker_number
from tailrace.storage.errors import ActionableError, DeviceLostError, OutOfMemoryError, SettingsError, is_out_of_memory

if TYPE_CHECKING:  # commands import this module, and torch takes seconds
    import torch


def require_linux(work: str) -> None:
    """Raise ActionableError on any other system: ``work``, such as caching, is made with calls that only Linux has."""
    if sys.platform != "linux":
        raise ActionableError(
            f"{work} wants Linux, and this is {sys.platform}; what was made there can be looked at here: query, "
            "dashboard, serve, score, info and the Python readers work"
        )


@dataclass(frozen=True)
class Compute:
    """Where and with how much a stage computes, and whether it shows progress; it decides nothing about a result."""

    device: str = "auto"
    """As torch names it, or ``auto``: cuda where torch sees a GPU, else cpu."""
    threads: int | None = None
    """CPU threads of torch, in each worker if there are some; torch's own choice, or a worker's share of it, if None.
    """
    workers: int = 0
    """Processes that share the work; 0: this process does it."""
    scheduler: str | None = None
    """Address of a Dask scheduler to use instead of own workers."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        if self.workers < 0 or (self.threads is not None and self.threads < 1):
            raise SettingsError(
                f"--workers {self.workers}, --threads {self.threads}: give at least 1 thread, and 0 workers or more"
            )

    @property
    def device_name(self) -> str:
        """The device as torch names it: ``auto`` is cuda where torch sees a GPU, else cpu."""
        return device_named(self.device)

    @property
    def has_workers(self) -> bool:
        """Whether other processes do the work."""
        return self.workers > 0 or self.scheduler is not None

    @property
    def worker_threads(self) -> int | None:
        """Threads to set in each worker; None leaves a scheduler's workers as they are."""
        import torch

        if self.threads is not None or self.scheduler is not None:
            return self.threads
        return max(1, torch.get_num_threads() // self.workers)

    def in_worker(self) -> Compute:
        """Return what the process that is given this as a task computes with, where it is one of ``workers``."""
        return Compute(device_of_worker(self.device), self.worker_threads, quiet=True)

    @contextmanager
    def opened(self) -> Iterator[torch.device]:
        """Yield the device, with torch held to ``threads`` inside; say once, on standard error, which it is.

        Raises SettingsError if the device is not here. Where memory runs out inside, OutOfMemoryError says what to make
        smaller; where a GPU is lost, DeviceLostError says how to go on.
        """
        import torch

        device = _open_device(self.device_name)
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        if not self.quiet:
            say_once(f"device: {_described(device)}")
        try:
            yield device
        except ActionableError:
            raise
        except (RuntimeError, MemoryError, OSError) as error:
            if device.type == "cuda" and _is_lost(error):
                raise DeviceLostError(
                    f"--device {self.device_name}: the GPU stopped answering "
                    f"({str(error).splitlines()[0]}). Nothing published is touched: the same command again continues "
                    "from the last checkpoint or complete unit. `nvidia-smi` and `dmesg` say more of the GPU"
                ) from error
            if not is_out_of_memory(error):
                raise
            reason = (str(error).strip() or "MemoryError").splitlines()[0]
            raise OutOfMemoryError(
                f"--device {self.device_name}: its memory is not enough ({reason}). Free it of other programs, take "
                "another device, or need less: lower batch_rows or d_sae, or fewer runs of a sweep, where transcoders "
                "are trained; contexts_per_batch where the language model runs; block_rows where features are analysed"
            ) from error
        finally:
            torch.set_num_threads(before)


def device_named(name: str) -> str:
    """Return a device's name; ``auto`` is cuda where torch sees a GPU, else cpu."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


_LOST = ("unspecified launch", "uncorrectable", "busy or unavailable", "unknown error", "launch timed out", "hardware")
"""In CUDA's errors, of a GPU that fell off, not of a program that is wrong."""


def _is_lost(error: Exception) -> bool:
    text = str(error)
    return text.startswith("CUDA error") and any(sign in text for sign in _LOST)


@cache
def say_once(line: str) -> None:
    """Print a line once in a process, however many stages it runs."""
    click.echo(line, err=True)


def _described(device: torch.device) -> str:
    """Return a device's name and what it has."""
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{device}, {torch.cuda.get_device_name(device)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    return f"{device}, threads: {torch.get_num_threads()}; GPUs: {gpus_seen()}"


def gpus_seen() -> str:
    """Return the names of the GPUs that torch can use, or why there is none."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"none, torch {torch.__version__} is a build for CPUs"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_gpus:
        return ", ".join(f"cuda:{index}" for index in range(n_gpus))
    reason = str(caught[0].message).split(". ")[0] if caught else "the driver shows none"
    return f"none, {reason}"


def device_of_worker(name: str) -> str:
    """Return a device's name in this process: workers of one machine share its GPUs out in turn."""
    import torch

    name, number = device_named(name), worker_number()
    return name if name != "cuda" or number is None else f"cuda:{number % max(1, torch.cuda.device_count())}"


def _open_device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"--device {name}: is not a device; use auto, cpu, cuda or cuda:1") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(
            f"--device {name}: cannot be used here ({reason}). GPUs: {gpus_seen()}. Take one of them, or --device cpu; "
            "see docs/gpu.md"
        ) from error
    return device
