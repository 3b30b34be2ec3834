"""The settings of every loss term that keeps features alive, and the list of them. They need no torch.

To add one: a class here, its name in ``AnyAuxiliary``, and a file named by its ``kind`` with the loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import Field, NonNegativeFloat, PositiveInt

from tailrace.storage.settings import Settings, code_of

if TYPE_CHECKING:
    from tailrace.training.architectures.objectives import Objective
    from tailrace.training.dead_features.record import FiringRecord
    from tailrace.training.kernels.kernel import ExtraLoss

Rescale = Literal["scalar", "elementwise"]


class Auxiliary(Settings):
    """Settings of one auxiliary loss. A subclass adds ``kind: Literal[…]``, by which files and flags name it;
    the file of that name beside this one has the loss, and a function ``build`` that makes it."""

    def build(self, firing: FiringRecord, objective: Objective, *, dead_after_steps: int) -> ExtraLoss | None:
        """Return the loss, which reads the run's own ``firing``; None for none."""
        built: ExtraLoss = code_of(self).build(self, firing, objective, dead_after_steps)
        return built


class NoAuxiliary(Auxiliary):
    """No loss term for dead features."""

    kind: Literal["none"] = "none"

    def build(self, firing: FiringRecord, objective: Objective, *, dead_after_steps: int) -> None:
        """Return None."""


class AuxK(Auxiliary):
    """The k most active dead features reconstruct the residual."""

    kind: Literal["auxk"] = "auxk"
    aux_k: PositiveInt | None = None
    """Dead features that reconstruct one row's residual; by default half of d_out, fewer if fewer are dead."""
    aux_coefficient: NonNegativeFloat = Field(default=1 / 32)
    """Weight of that reconstruction's share of unexplained variance in the loss."""


class Ghost(Auxiliary):
    """Ghost gradients for dead features."""

    kind: Literal["ghost"] = "ghost"
    ghost_rescale: Rescale = "scalar"
    """How the term is brought to the size of the reconstruction loss: scalar (one number, as published) or elementwise
    (one per element, as the original transcoder code)."""


AnyAuxiliary = Annotated[NoAuxiliary | AuxK | Ghost, Field(discriminator="kind")]
"""Settings of any auxiliary loss, told apart by ``kind``."""

AUXILIARIES: tuple[type[Auxiliary], ...] = get_args(get_args(AnyAuxiliary)[0])
"""Every auxiliary loss's settings class."""
