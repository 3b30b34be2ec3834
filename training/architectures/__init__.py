"""The list of architectures. To add one: a file beside this with a settings class and a module, and its name below."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from training.architectures.base import Architecture, Transcoder
from training.architectures.relu import ReLU
from training.architectures.topk import TopK

__all__ = ["ARCHITECTURES", "AnyArchitecture", "Architecture", "ReLU", "TopK", "Transcoder"]

AnyArchitecture = Annotated[ReLU | TopK, Field(discriminator="kind")]
"""Settings of any architecture, told apart by ``kind``."""

ARCHITECTURES: tuple[type[Architecture], ...] = get_args(get_args(AnyArchitecture)[0])
"""Every architecture's settings class."""
