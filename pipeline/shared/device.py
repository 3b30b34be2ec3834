"""Where tensors are computed: the device by name, and how many threads of a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tailrace.storage.errors import SettingsError


def open_device(name: str) -> torch.device:
    """Return the device called ``name``; raise SettingsError if it does not exist here."""
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
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
