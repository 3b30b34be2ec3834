"""The list of architectures. To add one: a file beside this with a settings class and a module, and its name below."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from tailrace.training.architectures.base import Architecture, Transcoder
from tailrace.training.architectures.batch_topk import BatchTopK
from tailrace.training.architectures.gated import Gated
from tailrace.training.architectures.jumprelu import JumpReLU
from tailrace.training.architectures.matryoshka import Matryoshka
from tailrace.training.architectures.relu import ReLU
from tailrace.training.architectures.topk import TopK

__all__ = [
    "ARCHITECTURES",
    "AnyArchitecture",
    "Architecture",
    "BatchTopK",
    "Gated",
    "JumpReLU",
    "Matryoshka",
    "ReLU",
    "TopK",
    "Transcoder",
]

AnyArchitecture = Annotated[TopK | BatchTopK | JumpReLU | ReLU | Gated | Matryoshka, Field(discriminator="kind")]
"""Settings of any architecture, told apart by ``kind``."""

ARCHITECTURES: tuple[type[Architecture], ...] = get_args(get_args(AnyArchitecture)[0])
"""Every architecture's settings class."""
