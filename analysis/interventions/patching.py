"""Activation patching: values of one run put into another, per layer, token and head.

Both runs must be of the same model. Inside a replacement that means the same replacement: taking values from the plain
model and putting them into a replaced one measures the difference of the two models as well, which is why
``tailrace.analysis.interventions.experiment`` runs both sides itself.

Heads are counted at the hook. Where query heads share keys and values (grouped-query attention), ``hook_k`` and
``hook_v`` have fewer heads than ``hook_q`` and ``hook_z``, and patching one of them changes every query head that reads
it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from tailrace.analysis.splice.hook_points import HookFunction, hooked, name_problem
from tailrace.analysis.splice.passes import Passes, PassTokens, following_passes
from tailrace.analysis.splice.replacement import tensor_in
from tailrace.storage.cache_format import HookName
from tailrace.storage.errors import ModelError

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
    """(contexts, positions) bool: the positions to patch; all of them if None. Longer than ``values`` for text that
    goes on after them, and False there."""

    @property
    def n_positions(self) -> int:
        """How many positions there are values of."""
        return self.values.shape[_position_axis(HookName.parse(self.hook).point)]


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

    Each value is put at the position it came from; a pass may compute some of them, as with a key-value cache. Entered
    inside a ``replaced`` context it acts on what that left, and the other way round. Raises ModelError, listing
    every problem, for hooks that the model does not have and heads that the values do not have.
    """
    points: Mapping[str, Any] = bridge.hook_dict
    if problems := [problem for patch in patches for problem in _problems(patch, points)]:
        raise ModelError("cannot patch what was asked for:\n" + "\n".join(f"  {line}" for line in problems))
    with following_passes(bridge) as passes:
        inside = [_Patch(patch, passes) for patch in patches]
        with hooked([(points[one.point], one.write) for one in inside]):
            yield Patching(inside)


def _problems(patch: Patch, points: Mapping[str, Any]) -> list[str]:
    problem = name_problem(patch.hook, points)
    if problem is not None:
        return [problem]
    address = HookName.parse(patch.hook)
    axis = _head_axis(address.point)
    if patch.values.ndim <= _position_axis(address.point):
        return [f"{patch.hook}: values of shape {tuple(patch.values.shape)} have no positions"]
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


def _position_axis(point: str) -> int:
    return 2 if point.endswith(_HEADS_FIRST) else 1


class _Patch:
    """One patch while it is in place."""

    def __init__(self, patch: Patch, passes: Passes) -> None:
        self.name = patch.hook
        self.n_firings = 0
        address = HookName.parse(patch.hook)
        self.point, self._head = address.point, address.head
        self._patch, self._passes = patch, passes
        self._axis, self._position_axis = _head_axis(address.point), _position_axis(address.point)

    @property
    def write(self) -> HookFunction:
        """Put the values in the place of the model's."""

        def replace(value: Any, *, hook: Any) -> Any:  # noqa: ARG001 - TransformerLens passes it by name
            own = tensor_in(value)
            tokens = self._passes.tokens(own, self._position_axis)
            where = None if self._patch.where is None else tokens.part(self._patch.where, self.name)
            values = self._values(own, where, tokens)
            self.n_firings += 1
            new = torch.where(self._chosen(own, where), values, own)
            return (new, *value[1:]) if isinstance(value, tuple) else new

        return replace

    def _values(self, own: Tensor, where: Tensor | None, tokens: PassTokens) -> Tensor:
        """Return the values of this pass's positions, in ``own``'s shape; its own at positions that they end before."""
        values, axis = self._patch.values.to(own.device, own.dtype), self._position_axis
        if tokens.first == 0 and values.shape == own.shape:
            return values
        end = min(tokens.end, values.shape[axis])
        n_here = max(0, end - tokens.first)
        beyond = n_here < own.shape[axis] if where is None else bool(where[:, n_here:].any())
        if not beyond and n_here == 0:
            return own
        new = own.clone()
        here, there = values.narrow(axis, min(tokens.first, end), n_here), new.narrow(axis, 0, n_here)
        if self._axis == 1:  # rows of a pattern: sources after the last of these positions have no part in them
            here, there = here[..., :end], there[..., :end]
        if beyond or here.shape != there.shape or (self._axis == 1 and own.shape[-1] != tokens.end):
            self._refuse(own, tokens)
        there.copy_(here)
        return new

    def _refuse(self, own: Tensor, tokens: PassTokens) -> NoReturn:
        run = list(own.shape)
        run[self._position_axis] = tokens.end
        raise ModelError(
            f"{self.name}: values of shape {tuple(self._patch.values.shape)} cannot be put where this run has "
            f"{tuple(run)}; both runs need the same number of prompts of the same lengths. For text generated after "
            "the prompts, give `where`, as long as all of it and False after the values"
        )

    def _chosen(self, own: Tensor, where: Tensor | None) -> Tensor:
        """Return where to take the values, bool, of a shape that can be expanded to the hook's."""
        chosen = torch.ones((1,) * own.ndim, dtype=torch.bool, device=own.device)
        if self._head is not None:
            shape = [1] * own.ndim
            shape[self._axis] = own.shape[self._axis]
            heads = torch.arange(own.shape[self._axis], device=own.device) == self._head
            chosen = chosen & heads.view(shape)
        if where is not None:
            shape = [own.shape[0], *[1] * (own.ndim - 1)]
            shape[self._position_axis] = own.shape[self._position_axis]
            chosen = chosen & where.reshape(shape)
        return chosen
