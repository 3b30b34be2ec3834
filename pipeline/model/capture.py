"""Run a language model just far enough to see the activations at some hooks.

The forward pass is abandoned as soon as the last wanted hook has fired: no later layer, and no unembedding, is
computed. Hooks are put on TransformerLens's hook points directly, because its own ``run_with_cache`` rebuilds the
table of hook names on every call, keeps every attention pattern until the end and computes logits for the last layer.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailrace.pipeline.model.sites import SiteHooks, head_problem
from tailrace.storage.errors import ModelError, OutOfMemoryError
from tailrace.storage.hook_names import HookName

_HOOK_LEVEL = 712_349  # tells our hooks from anybody else's when they are taken away; any number no one uses
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


class _AllCaptured(Exception):
    """No error: leaves a forward pass that has shown all it was run for."""


@dataclass(frozen=True)
class PairingCheck:
    """Whether a site's output is its layer's MLP applied to its input, on the rows given."""

    applicable: bool
    """False for sites other than a layer's own MLP and for processed weights; the other fields then say nothing."""
    exact: bool = False
    """Bit for bit."""
    max_abs_difference: float = float("nan")
    relative_error: float = float("nan")
    """Norm of the difference over the norm of the outputs, over all rows."""


def capture(bridge: Any, points: Mapping[str, Any], hooks: Sequence[str], tokens: Tensor) -> dict[str, Tensor]:
    """Return the activation at each of ``hooks``, (contexts, positions, d), for ``tokens`` (contexts, positions).

    ``points`` maps hook names to hook points. ``HOOK[H]`` is head H's slice of a hook, and d then d_head; otherwise
    heads are flattened into one dimension. The tensors are inference tensors and may be the model's own, or views of
    one another: use them before the next call, or copy them. If a hook fires more than once in a pass, the first
    firing counts.
    """
    wanted = {hook: HookName.parse(hook) for hook in hooks}
    captured = _fired(bridge, points, list(dict.fromkeys(part.point for part in wanted.values())), tokens)
    _check_all_fired([part.point for part in wanted.values()], captured)
    with torch.inference_mode():
        return {hook: _rows(part, captured[part.point], tokens) for hook, part in wanted.items()}


def count_heads(bridge: Any, points: Mapping[str, Any], hooks: Sequence[str], tokens: Tensor) -> dict[str, int]:
    """Return the number of heads at each of ``hooks``, 0 where one vector per position is held.

    Keys and values have fewer heads than queries where attention is grouped. Hooks that never fire, or hold no
    activation of token positions, are left out: ``capture`` says so.
    """
    counts = {}
    for hook, value in _fired(bridge, points, hooks, tokens).items():
        if isinstance(value, Tensor) and value.ndim > 2 and value.shape[:2] == tokens.shape:
            counts[hook] = value.shape[2] if value.ndim == 4 else 0
    return counts


def compare_pair(mlp: Callable[[Tensor], Any], inputs: Tensor, outputs: Tensor) -> PairingCheck:
    """Return how ``mlp(inputs)`` compares with ``outputs``, both (contexts, positions, d); errors in float64."""
    with torch.inference_mode():
        computed = mlp(inputs)
        if isinstance(computed, tuple):  # an MLP with experts also returns its router's scores
            computed = computed[0]
        difference = (computed.double() - outputs.double()).abs()
        return PairingCheck(
            applicable=True,
            exact=torch.equal(computed, outputs),
            max_abs_difference=float(difference.max()),
            relative_error=float(difference.norm() / outputs.double().norm()),
        )


def unique_hooks(sites: Sequence[SiteHooks]) -> list[str]:
    """Return every hook of ``sites`` once, in order."""
    return list(dict.fromkeys(hook for site in sites for hook in (site.hook_in, site.hook_out)))


def _fired(bridge: Any, points: Mapping[str, Any], hooks: Sequence[str], tokens: Tensor) -> dict[str, Any]:
    """Run the model until the last of ``hooks`` has fired; return what each of those that did held."""
    # No KV cache: it would be filled and thrown away.
    with torch.inference_mode(), _captured(points, hooks) as captured:
        with explained_failures(tokens.shape[0]), without_padding_advice(), contextlib.suppress(_AllCaptured):
            bridge(tokens, return_type=None, use_cache=False)
        return captured


@contextlib.contextmanager
def _captured(points: Mapping[str, Any], hooks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Fill a dict as ``hooks`` fire, and take the hooks away again whatever happens."""
    captured: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def store(value: Any, *, hook: Any) -> None:  # noqa: ARG001 - TransformerLens passes it by name
            captured.setdefault(name, value)
            if len(captured) == len(hooks):
                raise _AllCaptured

        return store

    try:
        for name in hooks:
            points[name].add_hook(keep(name), level=_HOOK_LEVEL)
        yield captured
    finally:
        for name in hooks:
            points[name].remove_hooks("fwd", level=_HOOK_LEVEL)


@contextlib.contextmanager
def without_padding_advice() -> Iterator[None]:
    """Keep transformers from advising on padding when BOS doubles as padding: contexts here are never padded."""
    advisor = logging.getLogger("transformers.modeling_utils")
    advisor.addFilter(_is_not_about_padding)
    try:
        yield
    finally:
        advisor.removeFilter(_is_not_about_padding)


def _is_not_about_padding(record: logging.LogRecord) -> bool:
    return "attention_mask" not in record.getMessage()


@contextlib.contextmanager
def explained_failures(n_contexts: int) -> Iterator[None]:
    """Say what to do when memory runs out, on a GPU or a CPU, or when ``torch.compile`` cannot work."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if _is_out_of_memory(error):
            raise OutOfMemoryError(_smaller_batch(n_contexts)) from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(error).strip().splitlines()[0]
            raise ModelError(
                f"torch cannot compile the language model here: {reason}; run without compiling"
            ) from error
        raise


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in text for sign in _OUT_OF_MEMORY)


def _smaller_batch(n_contexts: int) -> str:
    batch = f"the language model ran out of memory on a batch of {n_contexts} context{'s' if n_contexts > 1 else ''}; "
    if n_contexts > 1:
        return batch + f"try a batch of {n_contexts // 2}"
    return batch + "no batch is smaller: use shorter contexts, a smaller dtype or a device with more memory"


def _check_all_fired(hooks: Sequence[str], captured: Mapping[str, Any]) -> None:
    silent = [hook for hook in dict.fromkeys(hooks) if hook not in captured]
    if silent:
        raise ModelError(
            f"the language model ran to its end and these hooks never fired: {', '.join(silent)}. TransformerLens "
            "leaves some hooks off, hook_mlp_in among them; an MLP's exact input and output are "
            "blocks.L.mlp.hook_in and blocks.L.mlp.hook_out"
        )


def _rows(hook: HookName, value: Any, tokens: Tensor) -> Tensor:
    """Return a captured value as (contexts, positions, d), or say why it is no activation of token positions."""
    if isinstance(value, tuple) and value:
        value = value[0]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise ModelError(f"hook {hook.point}: holds {kind}, wanted floating-point activations; choose another hook")
    if value.ndim < 3 or value.shape[:2] != tokens.shape:
        raise ModelError(
            f"hook {hook.point}: holds a tensor of shape {tuple(value.shape)} for {tokens.shape[0]} contexts of "
            f"{tokens.shape[1]} positions; wanted one vector per position, or one per head and position"
        )
    if hook.head is not None:
        problem = head_problem(hook, value.shape[2] if value.ndim == 4 else 0)
        if problem is not None:
            raise ModelError(f"hook {problem}")
        return value[:, :, hook.head]
    return value.flatten(2) if value.ndim > 3 else value
