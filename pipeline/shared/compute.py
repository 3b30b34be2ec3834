"""Where and with how much a stage computes: the device by name, threads of a CPU, processes, and progress bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tailrace.storage.errors import ActionableError, OutOfMemoryError, SettingsError, is_out_of_memory

if TYPE_CHECKING:  # commands import this module, and torch takes seconds
    import torch


@dataclass(frozen=True)
class Compute:
    """Where and with how much a stage computes, and whether it shows progress; it decides nothing about a result."""

    device: str = "cpu"
    """As torch names it, or ``auto``."""
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

    @contextmanager
    def opened(self) -> Iterator[torch.device]:
        """Yield the device, with torch held to ``threads`` inside; raise SettingsError if the device is not here.

        Where memory runs out inside, OutOfMemoryError says what to make smaller.
        """
        import torch

        device = _open_device(self.device_name)
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield device
        except ActionableError:
            raise
        except (RuntimeError, MemoryError) as error:
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


def _open_device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"--device {name}: is no device; use auto, cpu, cuda or cuda:1") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"--device {name}: cannot be used here ({reason}); use --device cpu") from error
    return device
