"""Activation patching: values of one run put into another, per layer, token and head.

Both runs must be of the same model. Inside a replacement that means the same replacement: taking values from the plain
model and putting them into a replaced one measures the difference of the two models as well, which is why
``analysis.interventions.experiment`` runs both sides itself.

Heads are counted at the hook. Where query heads share keys and values (grouped-query attention), ``hook_k`` and
``hook_v`` have fewer heads than ``hook_q`` and ``hook_z``, and patching one of them changes every query head that reads
it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from analysis.hook_points import HookFunction, hooked, name_problem
from analysis.replacement import tensor_in
from storage.errors import ModelError
from storage.hook_names import HookName

PlaceKind = Literal["resid_pre", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern"]

_HOOKS: Mapping[PlaceKind, str] = {
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "q": "blocks.{layer}.attn.hook_q",
    "k": "blocks.{layer}.attn.hook_k",
    "v": "blocks.{layer}.attn.hook_v",
    "z": "blocks.{layer}.attn.hook_z",
    "pattern": "blocks.{layer}.attn.hook_pattern",
}
_HEADS_FIRST = ("hook_pattern", "hook_attn_scores")
"""Hooks that hold (contexts, heads, destinations, sources): the position patched is the destination."""


def hook_of(kind: PlaceKind, layer: int, head: int | None = None) -> str:
    """Return the hook that holds what ``kind`` says of a layer, or of one head of it.

    ``attn_out`` and ``mlp_out`` are what is added to the residual stream, after any norm behind attention and MLP.
    """
    name = _HOOKS[kind].format(layer=layer)
    return name if head is None else f"{name}[{head}]"


def head_hooks(bridge: Any, kind: PlaceKind, layers: Sequence[int]) -> list[str]:
    """Return the hook of every head of ``layers``, as many as there are at that hook. For q, k, v, z and pattern."""
    n_heads = int(bridge.cfg.n_heads)
    shared = getattr(bridge.cfg, "n_key_value_heads", None)
    if kind in ("k", "v") and shared is not None:
        n_heads = int(shared)
    return [hook_of(kind, layer, head) for layer in layers for head in range(n_heads)]


@dataclass(frozen=True, eq=False)
class Patch:
    """Values to put at a hook, ``NAME`` or ``NAME[head]``."""

    hook: str
    values: Tensor
    """What the hook point held in the other run, all heads of it, in that point's own shape."""
    where: Tensor | None = None
    """(contexts, positions) bool: the positions to patch; all of them if None."""


class Patching:
    """What is patched inside a ``patched`` context."""

    def __init__(self, patches: Sequence[_Patch]) -> None:
        self._patches = patches

    def silent_hooks(self) -> list[str]:
        """Return the hooks that have not fired yet: nothing was patched there."""
        return [patch.name for patch in self._patches if patch.n_firings == 0]


@contextlib.contextmanager
def patched(bridge: Any, patches: Sequence[Patch]) -> Iterator[Patching]:
    """Put values at hooks of a TransformerLens ``bridge`` in every forward pass inside.

    Entered inside a ``replaced`` context it acts on what that left, and the other way round. Raises ModelError, listing
    every problem, for hooks that the model does not have and heads that the values do not have.
    """
    points: Mapping[str, Any] = bridge.hook_dict
    if problems := [problem for patch in patches for problem in _problems(patch, points)]:
        raise ModelError("cannot patch what was asked for:\n" + "\n".join(f"  {line}" for line in problems))
    inside = [_Patch(patch) for patch in patches]
    with hooked([(points[one.point], one.write) for one in inside]):
        yield Patching(inside)


def _problems(patch: Patch, points: Mapping[str, Any]) -> list[str]:
    problem = name_problem(patch.hook, points)
    if problem is not None:
        return [problem]
    address = HookName.parse(patch.hook)
    axis = _head_axis(address.point)
    if address.head is None:
        return []
    if patch.values.ndim != 4:
        return [f"{patch.hook}: holds a tensor of shape {tuple(patch.values.shape)}, which has no heads"]
    if address.head >= patch.values.shape[axis]:
        return [
            f"{patch.hook}: there are heads 0 to {patch.values.shape[axis] - 1} at this hook (where heads share keys "
            "and values, there are fewer of these)"
        ]
    return []


def _head_axis(point: str) -> int:
    return 1 if point.endswith(_HEADS_FIRST) else 2


class _Patch:
    """One patch while it is in place."""

    def __init__(self, patch: Patch) -> None:
        self.name = patch.hook
        self.n_firings = 0
        address = HookName.parse(patch.hook)
        self.point, self._head = address.point, address.head
        self._patch = patch
        self._axis = _head_axis(address.point)

    @property
    def write(self) -> HookFunction:
        """Put the values in the place of the model's."""

        def replace(value: Any, *, hook: Any) -> Any:  # noqa: ARG001 - TransformerLens passes it by name
            own = tensor_in(value)
            values = self._patch.values.to(own.device, own.dtype)
            if values.shape != own.shape:
                raise ModelError(
                    f"{self.name}: values of shape {tuple(values.shape)} cannot be put where this run has "
                    f"{tuple(own.shape)}; both runs need the same number of prompts of the same lengths"
                )
            self.n_firings += 1
            new = torch.where(self._chosen(own), values, own)
            return (new, *value[1:]) if isinstance(value, tuple) else new

        return replace

    def _chosen(self, own: Tensor) -> Tensor:
        """Return where to take the values, bool, of a shape that can be expanded to the hook's."""
        chosen = torch.ones((1,) * own.ndim, dtype=torch.bool, device=own.device)
        if self._head is not None:
            shape = [1] * own.ndim
            shape[self._axis] = own.shape[self._axis]
            heads = torch.arange(own.shape[self._axis], device=own.device) == self._head
            chosen = chosen & heads.view(shape)
        if self._patch.where is not None:
            n_positions = own.shape[2 if self._axis == 1 else 1]
            try:
                where = self._patch.where.to(own.device).expand(own.shape[0], n_positions)
            except RuntimeError as error:
                raise ModelError(
                    f"{self.name}: where has shape {tuple(self._patch.where.shape)}, the run ({own.shape[0]}, "
                    f"{n_positions}) (prompts, positions); give a mask of the prompts that are run"
                ) from error
            shape = [own.shape[0], *[1] * (own.ndim - 1)]
            shape[2 if self._axis == 1 else 1] = n_positions
            chosen = chosen & where.reshape(shape)
        return chosen
