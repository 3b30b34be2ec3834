"""The settings of every architecture, and the list of them. They need no torch, so that ``--help`` does not load it.

To add one: a class here, its name in ``AnyArchitecture``, and a file named by its ``kind`` with the module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from pydantic import Field

from tailrace.storage.settings import Settings, code_of

if TYPE_CHECKING:
    from tailrace.training.architectures.base import Transcoder


class Architecture(Settings):
    """Settings of one architecture. A subclass adds ``kind: Literal[…]``, by which files and flags name it;
    the file of that name beside this one has its module, and a function ``build`` that makes it."""

    input_bias: bool = False
    """Subtract a learnt bias from the inputs (it is folded into the encoder when the transcoder is saved)."""
    skip: bool = False
    """Add a linear path from inputs to outputs past the features."""

    def build(self, d_in: int, d_out: int, d_sae: int) -> Transcoder:
        """Return the module with all weights zero; ``tailrace.training.loop.initialise`` fills them."""
        built: Transcoder = code_of(self).build(self, d_in, d_out, d_sae)
        return built

    def problems(self, d_sae: int) -> list[str]:  # noqa: ARG002
        """Return a sentence for every setting that does not fit ``d_sae`` features."""
        return []


class SelectsLargest(Architecture):
    """Settings of the architectures that choose the largest activations."""

    k: int = Field(default=64, ge=1)
    """Features that fire on one row (batch_topk, matryoshka: on average)."""
    k_start: int | None = Field(default=None, ge=1)
    """Start with this many and go linearly to k over k_warmup_steps."""
    k_warmup_steps: int = Field(default=1000, ge=1)
    """Steps from k_start to k."""

    def k_in(self, step: int) -> int:
        """Return k in ``step``, counted from 0."""
        if self.k_start is None or step >= self.k_warmup_steps:
            return self.k
        return round(self.k_start + (self.k - self.k_start) * step / self.k_warmup_steps)

    def problems(self, d_sae: int) -> list[str]:
        """Return a sentence for each of k and k_start that exceeds the number of features."""
        wanted = {"k": self.k, "k_start": self.k_start or 1}
        return [
            f"architecture.{name}: {k} features per row cannot be chosen from d_sae = {d_sae}; "
            f"lower {name} or raise d_sae"
            for name, k in wanted.items()
            if k > d_sae
        ]


class TopK(SelectsLargest):
    """The k largest features of each row."""

    kind: Literal["topk"] = "topk"


class BatchTopK(SelectsLargest):
    """The k · rows largest features of each batch."""

    kind: Literal["batch_topk"] = "batch_topk"


class JumpReLU(Architecture):
    """ReLU above learnt thresholds, with an L0 penalty."""

    kind: Literal["jumprelu"] = "jumprelu"
    l0: float = Field(default=1e-3, ge=0)
    """Weight of the mean number of active features in the loss, or of its squared distance from target_l0."""
    target_l0: float | None = Field(default=None, gt=0)
    """Number of active features to aim for; the penalty is then l0 · (L0 / target − 1)²."""
    l0_warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the penalty rises linearly from zero."""
    bandwidth: float = Field(default=1e-3, gt=0)
    """Width of the window in which thresholds learn, in units of the outputs' typical length."""
    initial_threshold: float = Field(default=1e-3, gt=0)
    """Thresholds at the start, in the same units."""


class ReLU(Architecture):
    """ReLU with an l1 or tanh penalty."""

    later: ClassVar = ("tied_bias",)

    kind: Literal["relu"] = "relu"
    input_bias: bool = True
    tied_bias: bool = False
    """Subtract the output bias from the inputs, instead of a bias of its own, as the original's autoencoders do."""
    l1: float = Field(default=0.05, ge=0)
    """Weight of the summed activations in the loss; higher gives fewer active features."""
    l1_warmup_steps: int = Field(default=0, ge=0)
    """Steps over which l1 rises linearly from zero."""
    tanh_scale: float | None = Field(default=None, gt=0)
    """Penalise tanh(s·a)/s instead of the activation a, in units of the outputs' typical length; s is this."""


class Gated(Architecture):
    """Gates with an l1 penalty, magnitudes without."""

    kind: Literal["gated"] = "gated"
    l1: float = Field(default=0.05, ge=0)
    """Weight of the summed positive gates in the loss; higher gives fewer active features."""
    l1_warmup_steps: int = Field(default=0, ge=0)
    """Steps over which l1 rises linearly from zero."""


class Matryoshka(SelectsLargest):
    """BatchTopK over nested dictionaries."""

    kind: Literal["matryoshka"] = "matryoshka"
    levels: int = Field(default=5, ge=1)
    """Number of nested dictionaries; each is half of the next."""

    def ends(self, d_sae: int) -> tuple[int, ...]:
        """Return the number of features of each level, smallest first."""
        return tuple(max(1, d_sae >> level) for level in reversed(range(self.levels)))

    def problems(self, d_sae: int) -> list[str]:
        """Return a sentence for each setting that does not fit ``d_sae`` features."""
        found = super().problems(d_sae)
        if d_sae >> (self.levels - 1) < 1:
            found.append(f"architecture.levels: d_sae = {d_sae} cannot be halved {self.levels - 1} times; lower levels")
        return found


AnyArchitecture = Annotated[TopK | BatchTopK | JumpReLU | ReLU | Gated | Matryoshka, Field(discriminator="kind")]
"""Settings of any architecture, told apart by ``kind``."""

ARCHITECTURES: tuple[type[Architecture], ...] = get_args(get_args(AnyArchitecture)[0])
"""Every architecture's settings class."""
