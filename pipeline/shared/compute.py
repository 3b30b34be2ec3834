"""Where and with how much a stage computes: the device by name, how many threads of a CPU, and progress bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tailrace.storage.errors import SettingsError

if TYPE_CHECKING:  # commands import this module, and torch takes seconds
    import torch


@dataclass(frozen=True)
class Compute:
    """Where and with how much a stage computes, and whether it shows progress; it decides nothing about a result."""

    device: str = "cpu"
    threads: int | None = None
    """CPU threads of torch; its own choice if None."""
    quiet: bool = False
    """Show no progress."""

    @contextmanager
    def opened(self) -> Iterator[torch.device]:
        """Yield the device, with torch held to ``threads`` inside; raise SettingsError if the device is not here."""
        device = open_device(self.device)
        with limited_threads(self.threads):
            yield device


def open_device(name: str) -> torch.device:
    """Return the device called ``name``; raise SettingsError if it does not exist here."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"--device {name}: is no device; use cpu, cuda, cuda:1 or mps") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"--device {name}: cannot be used here ({reason}); use --device cpu") from error
    return device


@contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """Use ``threads`` CPU threads inside; as many as torch likes if None."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
