"""The list of loss terms that keep features alive. To add one: a file beside this, and its name below."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from tailrace.training.dead_features.auxiliary.auxk import AuxK
from tailrace.training.dead_features.auxiliary.ghost import Ghost
from tailrace.training.dead_features.auxiliary.none import NoAuxiliary
from tailrace.training.dead_features.auxiliary.term import Auxiliary

__all__ = ["AUXILIARIES", "AnyAuxiliary", "AuxK", "Auxiliary", "Ghost", "NoAuxiliary"]

AnyAuxiliary = Annotated[NoAuxiliary | AuxK | Ghost, Field(discriminator="kind")]
"""Settings of any auxiliary loss, told apart by ``kind``."""

AUXILIARIES: tuple[type[Auxiliary], ...] = get_args(get_args(AnyAuxiliary)[0])
"""Every auxiliary loss's settings class."""
