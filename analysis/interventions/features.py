"""Edits of feature activations while a transcoder stands in for an MLP: keep, ablate, clamp, add, scale.

An edit is a function of activations, so it works on a transcoder's features and on an MLP's neurons alike. Several
are applied in the order given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from numbers import Integral, Real
from typing import Any, Literal, NoReturn, Protocol

import torch
from torch import Tensor

from tailrace.analysis.splice.passes import PassTokens
from tailrace.analysis.splice.replacement import (
    ChangedByEarlier,
    InPlaceCoder,
    Substitute,
    change_in_pass,
    decode_in_pass,
    other_layers,
    weights_dtype,
    width_problems,
)
from tailrace.storage.cache_format import Site
from tailrace.storage.errors import SettingsError
from tailrace.training.cross_layer.layers import StackedLayer


class FeatureCoder(InPlaceCoder, Protocol):
    """The part of a transcoder that editing its features needs."""

    @property
    def d_sae(self) -> int:
        """Number of features."""
        ...

    @property
    def W_dec(self) -> Tensor:
        """(d_sae, d_out) what each feature writes."""
        ...


@dataclass(frozen=True, eq=False)
class Edit(ABC):
    """A change of the activations of ``features``, everywhere or at the positions of ``where``."""

    features: tuple[int, ...]
    where: Tensor | None = field(default=None, kw_only=True)
    """(contexts, positions) bool, or a shape that can be expanded to it; in generated text as for ``replaced``."""

    def __post_init__(self) -> None:
        """Raise SettingsError for values of another kind than the fields are of."""
        features: Any = self.features
        where: Any = self.where
        if not isinstance(features, Sequence) or not all(isinstance(one, Integral) for one in features):
            self._refuse("features", features, "feature numbers such as (1850,)")
        if where is not None and not (isinstance(where, Tensor) and where.dtype is torch.bool):
            self._refuse("where", where, "a bool tensor (contexts, positions)")

    @abstractmethod
    def new_values(self, activations: Tensor) -> Tensor:
        """Return what activations (…, n) of the chosen features become, in the order of ``features``."""

    def __call__(self, activations: Tensor, tokens: PassTokens | None = None) -> Tensor:
        """Return a copy of activations (contexts, positions, width) with the change made.

        ``tokens`` says which of their sequences' tokens these are, all of them by default.
        """
        chosen = torch.tensor(self.features, dtype=torch.long, device=activations.device)
        after = self._changed(activations, chosen)
        if self.where is None:
            return after
        where = self.where if tokens is None else tokens.part(self.where, type(self).__name__)
        return torch.where(where.to(activations.device).expand(activations.shape[:-1])[..., None], after, activations)

    def problems(self, width: int) -> list[str]:
        """Return a sentence if some feature does not exist among ``width``."""
        outside = sorted({feature for feature in self.features if not 0 <= feature < width})
        if not outside:
            return []
        named = ", ".join(str(feature) for feature in outside)
        return [f"{type(self).__name__}: there is no feature {named}; there are 0 to {width - 1}"]

    def _changed(self, activations: Tensor, chosen: Tensor) -> Tensor:
        changed = activations.clone()
        changed[..., chosen] = self.new_values(activations[..., chosen]).to(activations.dtype)
        return changed

    def _check_number(self, name: str, value: Any) -> None:
        if not isinstance(value, Real) or not isfinite(value):
            self._refuse(name, value, "a finite number")

    def _refuse(self, name: str, found: Any, wanted: str) -> NoReturn:
        shown = f"a tensor of {found.dtype}" if isinstance(found, Tensor) else repr(found)
        raise SettingsError(f"{type(self).__name__}: {name} is {shown}, wanted {wanted}")


@dataclass(frozen=True, eq=False)
class Ablate(Edit):
    """Set features to zero."""

    def new_values(self, activations: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(activations)


@dataclass(frozen=True, eq=False)
class KeepOnly(Edit):
    """Set every *other* feature to zero; with no features, all of them, which leaves the bias."""

    def new_values(self, activations: Tensor) -> Tensor:
        """Return the activations as they are."""
        return activations

    def _changed(self, activations: Tensor, chosen: Tensor) -> Tensor:
        changed = torch.zeros_like(activations)
        changed[..., chosen] = activations[..., chosen]
        return changed


@dataclass(frozen=True, eq=False)
class Clamp(Edit):
    """Set features to a value, whatever they were."""

    value: float = 0.0

    def __post_init__(self) -> None:
        """Raise SettingsError for values of another kind than the fields are of."""
        super().__post_init__()
        self._check_number("value", self.value)

    def new_values(self, activations: Tensor) -> Tensor:
        """Return ``value`` everywhere."""
        return torch.full_like(activations, self.value)


@dataclass(frozen=True, eq=False)
class Add(Edit):
    """Add a value to features, active or not."""

    value: float = 0.0

    def __post_init__(self) -> None:
        """Raise SettingsError for values of another kind than the fields are of."""
        super().__post_init__()
        self._check_number("value", self.value)

    def new_values(self, activations: Tensor) -> Tensor:
        """Return the activations and ``value``."""
        return activations + self.value


@dataclass(frozen=True, eq=False)
class Scale(Edit):
    """Multiply features by a factor."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        """Raise SettingsError for values of another kind than the fields are of."""
        super().__post_init__()
        self._check_number("factor", self.factor)

    def new_values(self, activations: Tensor) -> Tensor:
        """Return the activations times ``factor``."""
        return activations * self.factor


class EditedFeatures(Substitute):
    """A transcoder with its activations edited, bias and skip path kept.

    With ``on_top_of="transcoder"`` the output is the transcoder's of the edited activations. With ``"model"`` it is
    the model's own output and the difference that the edits make, so that the transcoder's error stays in and edits
    that change nothing leave the model as it is: that is for steering.

    A feature of a cross-layer transcoder writes to its own and all later layers, and so does a change of it. With
    ``on_top_of="model"``, one layer may be edited alone, and later ones get their part; else all layers of the
    transcoder are put in place, with edits or without.
    """

    def __init__(
        self,
        coder: FeatureCoder,
        edits: Sequence[Edit],
        *,
        on_top_of: Literal["transcoder", "model"] = "transcoder",
    ) -> None:
        self._coder, self._edits, self._on_top_of = coder, tuple(edits), on_top_of

    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Return the output of the edited activations."""
        return self._edited(inputs, outputs, None)

    def in_pass(self, inputs: Tensor, outputs: Tensor, tokens: PassTokens) -> Tensor:
        """Return the same, edited where these tokens are asked for."""
        return self._edited(inputs, outputs, tokens)

    def _edited(self, inputs: Tensor, outputs: Tensor, tokens: PassTokens | None) -> Tensor:
        rows = inputs.to(weights_dtype(self._coder, inputs.dtype))
        before = self._coder.encode(rows)
        after = before
        for edit in self._edits:
            after = edit(after, tokens)
        if self._on_top_of == "transcoder":
            return decode_in_pass(self._coder, after, rows, tokens).to(outputs.dtype)
        return outputs + change_in_pass(self._coder, after - before, tokens).to(outputs.dtype)

    def problems(self, site: Site) -> list[str]:
        """Return a sentence for every width that differs and every feature that does not exist."""
        return width_problems(self._coder, site) + [
            problem for edit in self._edits for problem in edit.problems(self._coder.d_sae)
        ]

    def others(self) -> Mapping[Site, Substitute | None]:
        """Return the other layers of a cross-layer transcoder, or the later ones that get a part of the change."""
        coder = self._coder
        if self._on_top_of == "transcoder":
            return other_layers(coder)
        if not isinstance(coder, StackedLayer):
            return {}
        return {coder.sites[target]: ChangedByEarlier(coder, target) for target in coder.later}


class EditedNeurons(Substitute):
    """A site's own values with some of their coordinates edited, such as an MLP's neurons at ``mlp.hook_post``."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        self._edits = tuple(edits)

    def __call__(self, inputs: Tensor, outputs: Tensor) -> Tensor:  # noqa: ARG002
        """Return the edited values."""
        return self._edited(outputs, None)

    def in_pass(self, inputs: Tensor, outputs: Tensor, tokens: PassTokens) -> Tensor:  # noqa: ARG002
        """Return the same, edited where these tokens are asked for."""
        return self._edited(outputs, tokens)

    def _edited(self, outputs: Tensor, tokens: PassTokens | None) -> Tensor:
        for edit in self._edits:
            outputs = edit(outputs, tokens)
        return outputs

    def problems(self, site: Site) -> list[str]:
        """Return a sentence for every neuron that does not exist."""
        return [problem for edit in self._edits for problem in edit.problems(site.d_out)]
